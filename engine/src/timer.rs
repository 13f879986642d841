//! Timers of a core, on the core's clock: monotonic nanoseconds, virtual in the simulator.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::core::Core;

/// Pending timers in order of time, then of arming.
#[derive(Default)]
pub(crate) struct Timers {
    heap: RefCell<BTreeMap<(u64, u64), Waker>>,
    next: Cell<u64>,
}

impl Timers {
    /// When the earliest timer fires, in ns of the core's clock.
    pub(crate) fn earliest(&self) -> Option<u64> {
        self.heap.borrow().first_key_value().map(|(k, _)| k.0)
    }

    /// Wakes all that are due.
    pub(crate) fn fire(&self, now: u64) -> bool {
        let mut any = false;
        loop {
            let due = {
                let mut heap = self.heap.borrow_mut();
                match heap.first_entry() {
                    Some(e) if e.key().0 <= now => e.remove(),
                    _ => return any,
                }
            };
            any = true;
            due.wake();
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

    /// For `ns` nanoseconds from now.
    pub fn ns(ns: u64) -> Sleep {
        let core = Core::current();
        let at = core.now().saturating_add(ns);
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
        timers.heap.borrow_mut().insert(key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.core.timers.heap.borrow_mut().remove(&key);
        }
    }
}
