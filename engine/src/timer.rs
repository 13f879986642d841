//! Timers of a core, on the core's clock: monotonic nanoseconds, virtual in the simulator.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::core::Core;

/// Pending timers in order of time, then of arming; the next to fire is the last of the list. A sorted list and no
/// tree, so that arming allocates nothing once it has grown.
#[derive(Default)]
pub(crate) struct Timers {
    list: RefCell<Vec<((u64, u64), Waker)>>,
    next: Cell<u64>,
}

impl Timers {
    /// When the earliest timer fires, in ns of the core's clock.
    pub(crate) fn earliest(&self) -> Option<u64> {
        self.list.borrow().last().map(|(k, _)| k.0)
    }

    /// Wakes all that are due.
    pub(crate) fn fire(&self, now: u64) -> bool {
        let mut any = false;
        loop {
            let due = {
                let mut list = self.list.borrow_mut();
                match list.pop_if(|(key, _)| key.0 <= now) {
                    Some((_, waker)) => waker,
                    None => return any,
                }
            };
            any = true;
            due.wake();
        }
    }

    fn arm(&self, key: (u64, u64), waker: &Waker) {
        let mut list = self.list.borrow_mut();
        match list.binary_search_by(|(k, _)| key.cmp(k)) {
            Ok(at) => list[at].1.clone_from(waker),
            Err(at) => list.insert(at, (key, waker.clone())),
        }
    }

    fn disarm(&self, key: (u64, u64)) {
        let mut list = self.list.borrow_mut();
        if let Ok(at) = list.binary_search_by(|(k, _)| key.cmp(k)) {
            list.remove(at);
        }
    }
}

/// Sleeps until a time of the core's clock; dropping it takes the timer back.
pub struct Sleep {
    core: Rc<Core>,
    at: u64,
    key: Option<(u64, u64)>,
}

impl Sleep {
    /// Until `at` ns of [`Core::now`].
    pub fn until(at: u64) -> Sleep {
        Sleep { core: Core::current(), at, key: None }
    }

    /// For `ns` nanoseconds from now, not less: the clock is read, for the turn's may be old by the length of the turn.
    pub fn ns(ns: u64) -> Sleep {
        let core = Core::current();
        let at = core.now_exact().saturating_add(ns);
        Sleep { core, at, key: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.core.now() >= self.at {
            return Poll::Ready(());
        }
        let core = self.core.clone();
        let timers = &core.timers;
        let key = self.key.unwrap_or_else(|| {
            let n = timers.next.get();
            timers.next.set(n + 1);
            (self.at, n)
        });
        self.key = Some(key);
        timers.arm(key, cx.waker());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.core.timers.disarm(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: timers fire in order of time, then of arming, and one taken back does not fire. Method: arm out of order,
    /// take one back, arm one anew, and look at what is due at each time.
    #[test]
    fn order() {
        let timers = Timers::default();
        for key in [(5, 0), (3, 1), (9, 2), (3, 3), (7, 4), (5, 0)] {
            timers.arm(key, Waker::noop());
        }
        timers.disarm((7, 4));
        timers.disarm((8, 8));
        let due: Vec<u64> = std::iter::from_fn(|| {
            let at = timers.earliest()?;
            timers.list.borrow_mut().pop().map(|(k, _)| (assert_eq!(k.0, at), k.1).1)
        })
        .collect();
        assert_eq!(due, [1, 3, 0, 2]);
        timers.arm((4, 0), Waker::noop());
        assert!(!timers.fire(3) && timers.fire(4) && timers.earliest().is_none());
    }
}
