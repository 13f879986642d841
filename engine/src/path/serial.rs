//! Serialising requests: read-modify-write of a block that others may write to.
//!
//! A leaf with a request alignment (O_DIRECT) can only write whole blocks. A smaller write reads the block, merges, and
//! writes it back; meanwhile nobody else may write to it. The hot path pays one load of `active`.
//!
//! ```text
//!   RMW:   list += [a, b)  (waits for overlapping ones) ─► active += 1 ─► epoch tick: older transfers are done ─► read,
//!          merge, write ─► list -= [a, b)
//!   other: active == 0 ─► transfer (pinned)      active > 0 ─► overlapping? wait : transfer
//! ```
//!
//! Invariant: test of `active`, pin, and submission happen without an await in between, so a transfer either is older
//! than the tick or sees the range. Model-checked with loom (`tests/loom.rs`).

use std::future::poll_fn;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Poll, Waker};

#[cfg(not(loom))]
use crate::epoch;
use crate::shim::{AtomicU32, Mutex, MutexGuard, Ordering};

/// Ranges being serialised on one leaf.
#[derive(Default)]
pub struct Serial {
    active: AtomicU32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ranges: Vec<(u64, Range<u64>)>,
    next: u64,
    waiting: Vec<Waker>,
}

/// A range that is ours alone until this is dropped.
pub struct Ticket {
    serial: Arc<Serial>,
    id: u64,
}

impl Serial {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// How many ranges are taken.
    pub fn active(&self) -> u32 {
        self.active.load(Ordering::SeqCst)
    }

    /// Whether a range overlaps one being serialised.
    pub fn is_busy(&self, range: &Range<u64>) -> bool {
        self.active() > 0
            && self.lock().ranges.iter().any(|(_, r)| r.start < range.end && range.start < r.end)
    }

    /// Waits until a range overlaps none.
    pub async fn wait_free(&self, range: Range<u64>) {
        poll_fn(|cx| {
            let mut state = self.lock();
            if !state.ranges.iter().any(|(_, r)| r.start < range.end && range.start < r.end) {
                return Poll::Ready(());
            }
            state.waiting.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Takes a range: afterwards no transfer that overlaps it is in flight, and none will start.
    #[cfg(not(loom))]
    pub async fn take(self: &Arc<Serial>, range: Range<u64>) -> Ticket {
        let ticket = self.reserve(range).await;
        if !crate::mutant!("serial-tick") {
            epoch::quiet().await;
        }
        ticket
    }

    /// The first half of taking a range: no transfer that begins from now on overlaps it. Older ones may still be in
    /// flight until an epoch tick.
    pub async fn reserve(self: &Arc<Serial>, range: Range<u64>) -> Ticket {
        let id = poll_fn(|cx| {
            let mut state = self.lock();
            if state.ranges.iter().any(|(_, r)| r.start < range.end && range.start < r.end) {
                state.waiting.push(cx.waker().clone());
                return Poll::Pending;
            }
            let id = state.next;
            state.next += 1;
            state.ranges.push((id, range.clone()));
            self.active.fetch_add(1, Ordering::SeqCst);
            Poll::Ready(id)
        })
        .await;
        Ticket { serial: self.clone(), id }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.serial.lock();
            state.ranges.retain(|(id, _)| *id != self.id);
            self.serial.active.fetch_sub(1, Ordering::SeqCst);
            std::mem::take(&mut state.waiting)
        };
        for w in waiting {
            w.wake();
        }
    }
}
