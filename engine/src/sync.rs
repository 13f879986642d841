//! Small synchronisation pieces: one-shot results across threads, and async locks that stay on one core.
//!
//! ```text
//!   across threads                    on one core
//!   Sender ──value──► Receiver        Mutex (fair, FIFO)     Event (wake all)     Semaphore (FIFO permits)
//! ```

use std::cell::{Cell, RefCell, RefMut};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use crate::shim::{self, AtomicUsize, Ordering};

struct Shot<T> {
    value: Option<T>,
    waker: Option<Waker>,
    closed: bool,
}

/// The sending half of a one-shot channel; dropping it unsent closes the channel.
pub struct Sender<T>(Arc<shim::Mutex<Shot<T>>>);

/// The receiving half: a future that any thread may poll.
pub struct Receiver<T>(Arc<shim::Mutex<Shot<T>>>);

/// A one-shot channel.
pub fn oneshot<T>() -> (Sender<T>, Receiver<T>) {
    let shot = Arc::new(shim::Mutex::new(Shot { value: None, waker: None, closed: false }));
    (Sender(shot.clone()), Receiver(shot))
}

impl<T> Sender<T> {
    /// Delivers the value.
    pub fn send(self, value: T) {
        let mut shot = self.0.lock().unwrap_or_else(|e| e.into_inner());
        shot.value = Some(value);
        let waker = shot.waker.take();
        drop(shot);
        if let Some(w) = waker {
            w.wake();
        }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut shot = self.0.lock().unwrap_or_else(|e| e.into_inner());
        shot.closed = true;
        let waker = shot.waker.take();
        drop(shot);
        if let Some(w) = waker {
            w.wake();
        }
    }
}

impl<T> Future for Receiver<T> {
    /// `None` if the sender was dropped (its core has stopped).
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut shot = self.0.lock().unwrap_or_else(|e| e.into_inner());
        match shot.value.take() {
            Some(v) => Poll::Ready(Some(v)),
            None if shot.closed => Poll::Ready(None),
            None => {
                shot.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future on the calling thread, sleeping while it waits. Not for use on a core.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(v) => return v,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// Counts down to zero from several threads, then wakes one waiter.
pub struct Countdown {
    left: AtomicUsize,
    waker: shim::Mutex<Option<Waker>>,
}

impl Countdown {
    /// Waits for `n` calls of [`Countdown::ack`].
    pub fn new(n: usize) -> Countdown {
        Countdown { left: AtomicUsize::new(n), waker: shim::Mutex::new(None) }
    }

    /// One part is done.
    pub fn ack(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let waker = self.waker.lock().unwrap_or_else(|e| e.into_inner()).take();
            if let Some(w) = waker {
                w.wake();
            }
        }
    }

    /// Ready when all parts are done. One waiter at a time.
    pub async fn wait(&self) {
        poll_fn(|cx| {
            // the lock orders this against `ack`: it either sees the waker or we see zero
            let mut waker = self.waker.lock().unwrap_or_else(|e| e.into_inner());
            if self.left.load(Ordering::Acquire) == 0 {
                return Poll::Ready(());
            }
            *waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// Wakes everybody who waits, on one core.
#[derive(Default)]
pub struct Event {
    waiters: RefCell<Vec<Waker>>,
    count: Cell<u64>,
}

impl Event {
    /// Wakes all who wait now.
    pub fn notify(&self) {
        self.count.set(self.count.get() + 1);
        for w in self.waiters.take() {
            w.wake();
        }
    }

    /// Waits for the next [`Event::notify`]. The caller tests its condition, then waits, in a loop.
    pub async fn wait(&self) {
        let seen = self.count.get();
        poll_fn(|cx| {
            if self.count.get() != seen {
                return Poll::Ready(());
            }
            self.waiters.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// An async mutex for one core; FIFO.
#[derive(Default)]
pub struct Mutex<T> {
    turn: Semaphore,
    value: RefCell<T>,
}

/// Access to what a [`Mutex`] protects.
pub struct Guard<'a, T> {
    value: Option<RefMut<'a, T>>,
    turn: &'a Semaphore,
}

impl<T> Mutex<T> {
    /// A mutex around `value`.
    pub fn new(value: T) -> Mutex<T> {
        Mutex { turn: Semaphore::new(1), value: RefCell::new(value) }
    }

    /// Waits for its turn.
    pub async fn lock(&self) -> Guard<'_, T> {
        self.turn.acquire(1).await;
        Guard { value: Some(self.value.borrow_mut()), turn: &self.turn }
    }
}

impl<T> std::ops::Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.value.as_ref().expect("there until drop")
    }
}

impl<T> std::ops::DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("there until drop")
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        self.value = None;
        self.turn.release(1);
    }
}

struct Waiter {
    id: u64,
    need: usize,
    waker: Waker,
    granted: bool,
}

/// Counted permits for one core, handed out in order of asking.
#[derive(Default)]
pub struct Semaphore {
    free: Cell<usize>,
    next: Cell<u64>,
    queue: RefCell<VecDeque<Waiter>>,
}

impl Semaphore {
    /// `n` permits.
    pub fn new(n: usize) -> Semaphore {
        Semaphore { free: Cell::new(n), next: Cell::new(0), queue: RefCell::default() }
    }

    /// Takes permits at once, if nobody waits and they are there.
    pub fn try_acquire(&self, n: usize) -> bool {
        let ok = self.queue.borrow().is_empty() && self.free.get() >= n;
        if ok {
            self.free.set(self.free.get() - n);
        }
        ok
    }

    /// Waits for `n` permits. Dropping the future gives its place (or its permits) back.
    pub fn acquire(&self, n: usize) -> Acquire<'_> {
        Acquire { semaphore: self, need: n, id: None }
    }

    /// Gives permits back.
    pub fn release(&self, n: usize) {
        self.free.set(self.free.get() + n);
        self.hand_out();
    }

    fn hand_out(&self) {
        for w in self.queue.borrow_mut().iter_mut() {
            if w.granted {
                continue;
            }
            if self.free.get() < w.need {
                break;
            }
            self.free.set(self.free.get() - w.need);
            w.granted = true;
            w.waker.wake_by_ref();
        }
    }
}

/// The future of [`Semaphore::acquire`].
pub struct Acquire<'a> {
    semaphore: &'a Semaphore,
    need: usize,
    id: Option<u64>,
}

impl Future for Acquire<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let sem = self.semaphore;
        let Some(id) = self.id else {
            if sem.try_acquire(self.need) {
                return Poll::Ready(());
            }
            let id = sem.next.get();
            sem.next.set(id + 1);
            let waiter = Waiter { id, need: self.need, waker: cx.waker().clone(), granted: false };
            sem.queue.borrow_mut().push_back(waiter);
            self.id = Some(id);
            return Poll::Pending;
        };
        let mut queue = sem.queue.borrow_mut();
        let Some(at) = queue.iter().position(|w| w.id == id) else {
            return Poll::Ready(());
        };
        if queue[at].granted {
            queue.remove(at);
            drop(queue);
            self.id = None;
            return Poll::Ready(());
        }
        queue[at].waker.clone_from(cx.waker());
        Poll::Pending
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        let waiter = {
            let mut queue = self.semaphore.queue.borrow_mut();
            queue.iter().position(|w| w.id == id).and_then(|at| queue.remove(at))
        };
        match waiter {
            Some(w) if w.granted => self.semaphore.release(w.need),
            _ => self.semaphore.hand_out(),
        }
    }
}
