//! The one cross-core primitive: the epoch barrier (DESIGN §6).
//!
//! A barrier goes to every core's inbox and is done when every core has acknowledged it. `Tick` means: whatever transfer was
//! pinned before is finished; `Release`, the same for requests on their way through a driver that answers itself. Pins are core-local counters, so the hot path pays two increments of plain memory.
//!
//! ```text
//!   initiator ── BarrierMsg ──► core 0: flip parity, old pins == 0 ──► ack ┐
//!             └────────────────► core 1: flip parity, 3 old pins … 0 ─► ack ┴─► Countdown ─► initiator goes on
//! ```
//!
//! Invariants: a pin belongs to the parity that was current when it was taken; parity flips only when no pin of the other
//! parity is left, so two parities suffice; a parked core with nothing pinned acknowledges when it is woken, at once.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use crate::core::Core;
use crate::graph::View;
use crate::inbox::Msg;
use crate::path::RootId;
use crate::sync::Countdown;

/// What every core does on a barrier.
#[derive(Clone)]
pub(crate) enum Barrier {
    /// Every transfer pinned before is complete.
    Tick,
    /// Every request that holds what its lookup found, and held it before, is complete.
    Release,
    /// The roots take no new requests, and have none in flight.
    Drain(Arc<[RootId]>),
    /// The roots take requests again.
    Resume(Arc<[RootId]>),
    /// From now on lookups use this view of the graph.
    Install(Arc<View>),
}

/// One barrier on its way.
pub(crate) struct BarrierMsg {
    kind: Barrier,
    done: Countdown,
}

/// Sends a barrier to all cores and waits for all of them. Runs on any core.
pub(crate) async fn barrier(kind: Barrier) {
    let core = Core::current();
    let cores = &core.engine.cores;
    let msg = Arc::new(BarrierMsg { kind, done: Countdown::new(cores.len()) });
    for target in cores {
        core.send(target, Msg::Barrier(msg.clone()));
    }
    msg.done.wait().await;
}

/// Waits until every transfer that was in flight anywhere when this was called has completed.
pub(crate) async fn quiet() {
    barrier(Barrier::Tick).await;
}

/// Waits until nothing that was in flight anywhere when this was called still refers to what its lookup found: transfers,
/// and requests on their way through drivers that answer themselves (which may in turn wait for transfers).
pub async fn tick() {
    // in this order: a transfer's pin may become a hold, and never the other way round
    barrier(Barrier::Tick).await;
    barrier(Barrier::Release).await;
}

/// Pins of one kind on one core.
#[derive(Default)]
pub(crate) struct Epochs {
    parity: Cell<usize>,
    pins: [Cell<u32>; 2],
    /// Being waited for: acknowledged when the old parity has no pin left.
    active: RefCell<Vec<Arc<BarrierMsg>>>,
    queued: RefCell<Vec<Arc<BarrierMsg>>>,
}

/// Keeps the epoch in which it was taken from ending on this core.
pub struct Pin {
    epochs: Rc<Epochs>,
    parity: usize,
}

impl Epochs {
    pub(crate) fn pin(self: &Rc<Epochs>) -> Pin {
        let parity = self.parity.get();
        self.pins[parity].set(self.pins[parity].get() + 1);
        Pin { epochs: self.clone(), parity }
    }

    fn start(&self, msg: &Arc<BarrierMsg>) {
        self.queued.borrow_mut().push(msg.clone());
        self.advance();
    }

    /// Acknowledges what is finished and starts what is queued. Called once per turn while there is something.
    pub(crate) fn advance(&self) {
        loop {
            let old = 1 - self.parity.get();
            if self.pins[old].get() > 0 {
                return;
            }
            for msg in self.active.take() {
                msg.done.ack();
            }
            if self.queued.borrow().is_empty() {
                return;
            }
            self.parity.set(old);
            self.active.swap(&self.queued);
        }
    }

    /// Whether anything is pinned.
    #[cfg(test)]
    pub(crate) fn has_pins(&self) -> bool {
        self.pins.iter().any(|p| p.get() > 0)
    }

    pub(crate) fn is_waiting(&self) -> bool {
        !self.active.borrow().is_empty()
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let pins = &self.epochs.pins[self.parity];
        debug_assert!(pins.get() > 0);
        pins.set(pins.get() - 1);
    }
}

/// Carries out a barrier on this core.
pub(crate) fn receive(core: &Rc<Core>, msg: &Arc<BarrierMsg>) {
    match &msg.kind {
        Barrier::Tick => core.epochs.start(msg),
        Barrier::Release => core.held.start(msg),
        Barrier::Install(view) => {
            *core.view.borrow_mut() = view.clone();
            msg.done.ack();
        }
        Barrier::Drain(roots) => {
            for &root in roots.iter() {
                core.root(root).close();
            }
            let (roots, msg, core2) = (roots.clone(), msg.clone(), core.clone());
            core.spawn(async move {
                for &root in roots.iter() {
                    if !crate::mutant!("drain-waits") {
                        core2.root(root).idle().await;
                    }
                }
                msg.done.ack();
            });
        }
        Barrier::Resume(roots) => {
            for &root in roots.iter() {
                core.root(root).open();
            }
            msg.done.ack();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::{Context, Poll, Waker};

    fn msg() -> Arc<BarrierMsg> {
        Arc::new(BarrierMsg { kind: Barrier::Tick, done: Countdown::new(1) })
    }

    fn done(m: &BarrierMsg) -> bool {
        let wait = std::pin::pin!(m.done.wait());
        matches!(wait.poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(()))
    }

    use std::future::Future;

    /// Goal: a tick ends exactly when the pins taken before it end, in any interleaving of two ticks.
    /// Method: pins before, between and after two ticks, released one by one.
    #[test]
    fn ticks_wait_for_older_pins_only() {
        let epochs = Rc::new(Epochs::default());
        let before = epochs.pin();
        let first = msg();
        epochs.start(&first);
        assert!(!done(&first));
        let between = epochs.pin();
        let second = msg();
        epochs.start(&second);
        drop(before);
        epochs.advance();
        assert!(done(&first));
        assert!(!done(&second));
        let after = epochs.pin();
        drop(between);
        epochs.advance();
        assert!(done(&second), "a younger pin holds nobody up");
        drop(after);
        epochs.advance();
        let third = msg();
        epochs.start(&third);
        assert!(done(&third), "nothing pinned: acknowledged at once");
    }
}
