//! A user of a root whose waiting requests can be called off together: a client's connection.
//!
//! ```text
//!   connection ─► Party::admit ─► limits of the root ─► Permit
//!   connection cut (any thread) ─► Party::leave ─► whoever waits: ESHUTDOWN, without a charge
//! ```
//!
//! Invariant: after [`Party::leave`] nothing of the party waits for limits, and nothing of it begins to.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use smallvec::SmallVec;

use super::{Permit, Root};
use crate::error::Errno;
use crate::throttle::Member;

#[derive(Default)]
struct State {
    left: bool,
    /// Where requests of it may wait.
    at: SmallVec<[Arc<Member>; 1]>,
}

/// A user of a root that may leave while its requests wait for limits.
pub struct Party {
    root: Root,
    number: u32,
    state: Mutex<State>,
}

impl Party {
    /// A new user.
    pub fn new(root: Root) -> Arc<Party> {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        Arc::new(Party { root, number: COUNT.fetch_add(1, Ordering::Relaxed), state: Mutex::default() })
    }

    /// The root.
    pub fn root(&self) -> Root {
        self.root
    }

    /// [`Root::admit`] on its behalf.
    ///
    /// # Errors
    /// Also `ESHUTDOWN` if the party has left.
    #[inline]
    pub async fn admit(&self, write: bool, bytes: u64) -> Result<Permit, Errno> {
        self.root.admit_for(Some(self), write, bytes).await
    }

    pub(super) fn tag(&self) -> u64 {
        tag(self.root, self.number)
    }

    /// It is about to wait for a member.
    pub(super) fn waits_at(&self, member: &Arc<Member>) -> Result<(), Errno> {
        let mut s = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if s.left {
            return Err(Errno::ESHUTDOWN);
        }
        if !s.at.iter().any(|m| Arc::ptr_eq(m, member)) {
            s.at.push(member.clone());
        }
        Ok(())
    }

    /// Whether it has left.
    pub(super) fn has_left(&self) -> bool {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).left
    }

    /// Calls its waiting requests off. From any thread.
    pub fn leave(&self) {
        let members = {
            let mut s = self.state.lock().unwrap_or_else(|e| e.into_inner());
            s.left = true;
            std::mem::take(&mut s.at)
        };
        members.iter().for_each(|m| m.release(|tag| tag == self.tag()));
    }
}

/// Whose a waiting request is: of a root, and of one of its parties (0: of none).
pub(super) fn tag(root: Root, party: u32) -> u64 {
    u64::from(root.id().0) << 32 | u64::from(party)
}

/// Whether a tag is one of a root's.
pub(crate) fn is_of(tag: u64, root: super::RootId) -> bool {
    tag >> 32 == u64::from(root.0)
}
