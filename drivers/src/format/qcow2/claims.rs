//! Exclusive use of ranges of guest clusters, in order of asking (I5).
//!
//! Invariants: no two tickets in force overlap; who asked earlier for an overlapping range goes first; a ticket only ever
//! shrinks, so shrinking cannot block.
//!
//! ```text
//! lock(4..8) ─► in force      lock(6..9) ─► waits for 4..8      lock(9..10) ─► in force
//! ```

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use ringblock_engine::mutant;
use ringblock_engine::sync::Event;

use super::geometry::GuestCluster;

struct Entry {
    id: u64,
    range: Range<u64>,
}

/// The ranges in use, in order of asking.
#[derive(Default)]
pub(super) struct Claims {
    list: RefCell<VecDeque<Entry>>,
    next: Cell<u64>,
    changed: Event,
}

/// A range in use; given back when dropped.
pub(super) struct Ticket {
    claims: Rc<Claims>,
    id: u64,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Claims {
    /// Waits until nobody who came earlier uses a cluster of the range.
    pub(super) async fn lock(self: &Rc<Claims>, clusters: Range<GuestCluster>) -> Ticket {
        let range = clusters.start.0..clusters.end.0;
        let id = self.next.get();
        self.next.set(id + 1);
        self.list.borrow_mut().push_back(Entry { id, range: range.clone() });
        let ticket = Ticket { claims: self.clone(), id };
        while !mutant!("claims-wait")
            && self.list.borrow().iter().take_while(|e| e.id < id).any(|e| overlap(&e.range, &range))
        {
            self.changed.wait().await;
        }
        ticket
    }

    /// Whether a cluster is in use by a ticket other than the last in line: for assertions.
    pub(super) fn is_idle(&self) -> bool {
        self.list.borrow().is_empty()
    }
}

impl Ticket {
    /// Keeps only the clusters below `end`.
    pub(super) fn shrink(&self, end: GuestCluster) {
        if let Some(e) = self.claims.list.borrow_mut().iter_mut().find(|e| e.id == self.id) {
            debug_assert!(end.0 > e.range.start && end.0 <= e.range.end);
            e.range.end = end.0;
        }
        self.claims.changed.notify();
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.claims.list.borrow_mut().retain(|e| e.id != self.id);
        self.claims.changed.notify();
    }
}
