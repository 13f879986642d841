//! A core: one thread with one ring, one executor, one inbox (DESIGN §3).
//!
//! ```text
//!   turn:  inbox ─► runnable tasks (bounded) ─► one submit ─► reap ─► timers ─► [nothing to do: park in the ring]
//! ```
//!
//! Invariants: everything reachable from a [`Core`] is used by its own thread only (the part other threads see is
//! `CoreShared`); completions are queued as wake-ups and never run inside the reaper; a core sleeps only
//! after it has announced that it is parked and has found its inbox empty.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::driver::{LocalFuture, Owner};
use crate::engine::EngineShared;
use crate::epoch::{self, Epochs, Pin};
use crate::exec::Exec;
use crate::graph::{NodeId, View};
use crate::host::Clock;
use crate::inbox::{CoreShared, Msg};
use crate::path::{RootId, RootLocal};
use crate::ring::{Backend, Ring};
use crate::sync::{Receiver, oneshot};
use crate::timer::Timers;

/// Task polls in one turn.
const POLLS: usize = 256;
/// Messages taken in one turn.
const MESSAGES: usize = 256;

/// A core, as its own tasks see it.
pub struct Core {
    /// Index in the engine, from 0.
    pub index: usize,
    pub(crate) slot: u16,
    pub(crate) engine: Arc<EngineShared>,
    pub(crate) shared: Arc<CoreShared>,
    pub(crate) ring: RefCell<Ring>,
    pub(crate) exec: Exec,
    pub(crate) timers: Timers,
    /// Transfers in flight.
    pub(crate) epochs: Rc<Epochs>,
    /// Requests in flight that are no transfers of their own.
    pub(crate) held: Rc<Epochs>,
    pub(crate) view: RefCell<Arc<View>>,
    pub(crate) owners: RefCell<BTreeMap<NodeId, Rc<dyn Owner>>>,
    roots: RefCell<Vec<Option<Rc<RootLocal>>>>,
    /// State of other modules that lives on this core, by type.
    locals: RefCell<Vec<Rc<dyn Any>>>,
    outbox: RefCell<VecDeque<(Arc<CoreShared>, Msg)>>,
    clock: Clock,
    now: Cell<u64>,
    stopping: Cell<bool>,
    scratch: RefCell<Scratch>,
}

#[derive(Default)]
struct Scratch {
    woken: Vec<std::task::Waker>,
    trash: Vec<crate::ring::Payload>,
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Core>>> = const { RefCell::new(None) };
}

impl Core {
    pub(crate) fn new(
        shared: Arc<CoreShared>,
        slot: u16,
        engine: Arc<EngineShared>,
        backend: Box<dyn Backend>,
        clock: Clock,
    ) -> Rc<Core> {
        let now = clock.now();
        Rc::new(Core {
            index: shared.index,
            slot,
            engine,
            shared,
            ring: RefCell::new(Ring::new(backend)),
            exec: Exec::new(slot),
            timers: Timers::default(),
            epochs: Rc::default(),
            held: Rc::default(),
            view: RefCell::default(),
            owners: RefCell::default(),
            roots: RefCell::default(),
            locals: RefCell::default(),
            outbox: RefCell::default(),
            clock,
            now: Cell::new(now),
            stopping: Cell::new(false),
            scratch: RefCell::default(),
        })
    }

    /// The core this thread is. Panics elsewhere: only tasks of a core call it.
    pub fn current() -> Rc<Core> {
        CURRENT.with_borrow(|c| c.clone()).expect("called on a core")
    }

    /// The core this thread is, if it is one.
    pub fn try_current() -> Option<Rc<Core>> {
        CURRENT.try_with(|c| c.try_borrow().ok().and_then(|c| c.clone())).ok().flatten()
    }

    pub(crate) fn try_with_current<R>(f: impl FnOnce(&Rc<Core>) -> R) -> Option<R> {
        CURRENT.try_with(|c| c.try_borrow().ok().and_then(|c| c.as_ref().map(f))).ok().flatten()
    }

    /// Makes this the current core while `f` runs: for the core's thread, and for the simulator's turns.
    pub(crate) fn enter<R>(self: &Rc<Core>, f: impl FnOnce() -> R) -> R {
        let before = CURRENT.replace(Some(self.clone()));
        let result = f();
        CURRENT.set(before);
        result
    }

    /// Nanoseconds of the core's monotonic clock, read once per turn.
    pub fn now(&self) -> u64 {
        self.now.get()
    }

    /// Nanoseconds of the core's monotonic clock, read now.
    pub fn now_exact(&self) -> u64 {
        let now = self.clock.now();
        self.now.set(now);
        now
    }

    /// Number of cores of the engine.
    pub fn count(&self) -> usize {
        self.engine.cores.len()
    }

    /// Adds a task to this core.
    pub fn spawn<F: Future<Output = ()> + 'static>(&self, future: F) {
        self.exec.spawn(future);
    }

    /// Adds a task whose result somebody waits for.
    pub fn spawn_join<T: 'static, F: Future<Output = T> + 'static>(&self, future: F) -> Receiver<T> {
        let (tx, rx) = oneshot();
        self.spawn(async move { tx.send(future.await) });
        rx
    }

    /// Runs a task on core `index` and waits for its result; on this core itself, directly. `None` if it has stopped.
    pub async fn call<T, M>(&self, index: usize, make: M) -> Option<T>
    where
        T: Send + 'static,
        M: FnOnce() -> LocalFuture<'static, T> + Send + 'static,
    {
        if index == self.index {
            return Some(make().await);
        }
        let (tx, rx) = oneshot();
        let target = self.engine.cores.get(index)?.clone();
        let job = Box::new(move |core: &Rc<Core>| core.spawn(async move { tx.send(make().await) }));
        self.send(&target, Msg::Run(job));
        rx.await
    }

    /// Runs something that blocks (opening files, ioctls, compression) on the engine's small thread pool.
    pub async fn blocking<T, F>(&self, f: F) -> T
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let (tx, rx) = oneshot();
        self.engine.pool.run(Box::new(move || tx.send(f())));
        rx.await.expect("the pool runs every job, and none of ours panics")
    }

    /// The engine's groups of I/O limits, by name.
    pub fn throttle_groups(&self) -> &crate::throttle::Groups {
        &self.engine.groups
    }

    /// Tells the program of something.
    pub fn emit(&self, event: crate::event::Event) {
        if let Some(listener) = &*self.engine.listener.lock().unwrap_or_else(|e| e.into_inner()) {
            listener(event);
        }
    }

    /// Sends a message to a core, from this one. What does not fit waits here.
    pub(crate) fn send(&self, target: &Arc<CoreShared>, msg: Msg) {
        if let Err(msg) = target.try_send(msg) {
            self.outbox.borrow_mut().push_back((target.clone(), msg));
        }
    }

    /// Sends a message from whatever thread this is.
    pub(crate) fn send_from_anywhere(target: &Arc<CoreShared>, msg: Msg) {
        match Core::try_current() {
            Some(core) => core.send(target, msg),
            None => target.send_blocking(msg),
        }
    }

    /// Keeps what lookups of this core refer to alive until it is dropped (I3).
    pub fn pin(&self) -> Pin {
        self.epochs.pin()
    }

    /// Keeps the space that a lookup found from being reused until it is dropped (I3), for requests that may themselves
    /// have to wait for the transfers in flight: a [`Pin`] would then wait for itself.
    pub(crate) fn hold(&self) -> Pin {
        self.held.pin()
    }

    pub(crate) fn root(&self, id: RootId) -> Rc<RootLocal> {
        let mut roots = self.roots.borrow_mut();
        let at = id.0 as usize;
        if roots.len() <= at {
            roots.resize_with(at + 1, || None);
        }
        roots[at].get_or_insert_with(Rc::default).clone()
    }

    /// Forgets a root that is gone, so that its number can be used again.
    pub(crate) fn forget_root(&self, id: RootId) {
        if let Some(place) = self.roots.borrow_mut().get_mut(id.0 as usize) {
            *place = None;
        }
    }

    /// The state of type `T` that belongs to this core, made on first use.
    pub fn local<T: Any + Default>(&self) -> Rc<T> {
        let found = self.locals.borrow().iter().find_map(|l| l.clone().downcast::<T>().ok());
        found.unwrap_or_else(|| {
            let made: Rc<T> = Rc::default();
            self.locals.borrow_mut().push(made.clone());
            made
        })
    }

    /// The owner of a node whose home this core is.
    pub fn owner(&self, node: NodeId) -> Option<Rc<dyn Owner>> {
        self.owners.borrow().get(&node).cloned()
    }

    fn drain_inbox(self: &Rc<Core>) -> bool {
        for n in 0..MESSAGES {
            let Some(msg) = self.shared.queue.pop() else {
                return n > 0;
            };
            match msg {
                Msg::Run(job) => job(self),
                Msg::Wake(packed) => {
                    self.exec.enqueue(packed as usize);
                }
                Msg::Barrier(b) => epoch::receive(self, &b),
                Msg::Stop => self.stopping.set(true),
            }
        }
        true
    }

    fn flush_outbox(&self) {
        let waiting = self.outbox.borrow().len();
        for _ in 0..waiting {
            // not borrowed while sending: a message that is dropped may send others
            let next = self.outbox.borrow_mut().pop_front();
            if let Some((target, msg)) = next
                && let Err(msg) = target.try_send(msg)
            {
                self.outbox.borrow_mut().push_back((target, msg));
            }
        }
    }

    /// One turn up to the point where the ring is entered. Returns whether there is more to do at once.
    pub(crate) fn run_ready(self: &Rc<Core>) -> bool {
        let more = self.begin_turn();
        for _ in 0..POLLS {
            if !self.exec.run_one() {
                break;
            }
        }
        let more = self.end_turn() | more;
        more | self.exec.has_work() | !self.shared.queue.is_empty()
    }

    /// Takes messages and fires timers. Returns whether there were messages.
    pub(crate) fn begin_turn(self: &Rc<Core>) -> bool {
        self.now.set(self.clock.now());
        let more = self.drain_inbox();
        self.timers.fire(self.now());
        self.ring.borrow_mut().resume(self.now());
        more
    }

    /// What follows the tasks. Returns whether messages are left that their receivers have no room for.
    pub(crate) fn end_turn(&self) -> bool {
        self.advance_epochs();
        if !self.outbox.borrow().is_empty() {
            self.flush_outbox();
        }
        !self.outbox.borrow().is_empty()
    }

    /// Polls the simulator's choice of the ready tasks.
    pub(crate) fn poll_one(&self, choice: u64) {
        self.exec.rotate(choice as usize);
        self.exec.run_one();
    }

    /// Whether a turn at `now` would do anything, its ring apart.
    pub(crate) fn is_runnable(&self, now: u64) -> bool {
        self.exec.has_work()
            || !self.shared.queue.is_empty()
            || !self.outbox.borrow().is_empty()
            || self.next_alarm().is_some_and(|at| at <= now)
    }

    /// When the next timer fires, or the ring has to be entered for something that backs off.
    pub(crate) fn next_alarm(&self) -> Option<u64> {
        self.timers.earliest().into_iter().chain(self.ring.borrow().earliest()).min()
    }

    fn advance_epochs(&self) {
        for epochs in [&self.epochs, &self.held] {
            if epochs.is_waiting() {
                epochs.advance();
            }
        }
    }

    /// Enters the ring, waiting up to `wait`, and books completions.
    pub(crate) fn enter_ring(&self, wait: Option<Duration>) {
        let mut scratch = self.scratch.take();
        let bell = {
            let mut ring = self.ring.borrow_mut();
            ring.submit(wait);
            self.now.set(self.clock.now());
            ring.reap(self.now(), &mut scratch.woken, &mut scratch.trash)
        };
        if bell {
            self.shared.clear_bell();
        }
        for w in scratch.woken.drain(..) {
            w.wake();
        }
        scratch.trash.clear();
        *self.scratch.borrow_mut() = scratch;
        self.advance_epochs();
    }

    /// How long the core may sleep: until its next timer, at most.
    fn idle_time(&self) -> Duration {
        const LONG: u64 = 3_600_000_000_000;
        let wait = self.next_alarm().map_or(LONG, |at| at.saturating_sub(self.clock.now()));
        Duration::from_nanos(wait.min(LONG))
    }

    /// The loop of a real core. Returns when it has been stopped.
    pub(crate) fn run(self: &Rc<Core>) {
        while !self.stopping.get() {
            let busy = self.run_ready();
            if busy {
                self.enter_ring(None);
                continue;
            }
            self.shared.parking.prepare();
            let wait = self.shared.queue.is_empty().then(|| self.idle_time());
            self.enter_ring(wait);
            self.shared.parking.unpark();
        }
        self.teardown();
    }

    /// Drops all tasks, lets the ring drain, and drops what is left (the order matters, see [`crate::ring`]).
    pub(crate) fn teardown(self: &Rc<Core>) {
        self.exec.clear();
        self.ring.borrow_mut().shutdown();
        self.exec.clear();
        drop(self.owners.take());
        drop(self.roots.take());
        drop(self.locals.take());
        drop(self.view.take());
        drop(self.outbox.take());
        self.shared.close();
    }
}

/// Lets other tasks of the core, and its ring, have a turn.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return std::task::Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await
}
