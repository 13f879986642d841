//! How anything reaches a core from outside: a bounded queue and a wake-up that is never lost.
//!
//! ```text
//!   sender                                core
//!   queue.push(msg)                       parked = true
//!   if parked.swap(false) ── wake fd ──►  if queue is empty ── sleep in the ring (the wake fd is polled there)
//!                                         parked = false
//! ```
//!
//! Invariant: after a push returns, either the core is running a turn that will look at the queue again before it
//! sleeps, or its wake fd is readable. It is model-checked with loom (`tests/loom.rs`): the two sides each write, fence, and
//! read what the other wrote.

use crate::shim::{AtomicBool, Ordering, fence};

/// The sleeping half: whether the core sleeps, and who may wake it. Model-checked.
///
/// Every change is a read-modify-write: of several senders exactly one wakes, and loom, which knows the order of
/// modifications only where they synchronise, can follow it. It costs nothing next to the system call of parking.
#[derive(Debug)]
pub struct Parking {
    parked: AtomicBool,
}

impl Default for Parking {
    fn default() -> Parking {
        Parking { parked: AtomicBool::new(false) }
    }
}

impl Parking {
    /// The core is about to sleep. It sleeps only if its queue is empty *after* this call.
    pub fn prepare(&self) {
        self.parked.swap(true, Ordering::AcqRel);
        fence(Ordering::SeqCst);
    }

    /// The core runs again.
    pub fn unpark(&self) {
        self.parked.swap(false, Ordering::AcqRel);
    }

    /// After a push: whether this sender has to wake the core.
    #[must_use]
    pub fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        self.parked.load(Ordering::Relaxed) && self.parked.swap(false, Ordering::AcqRel)
    }
}

#[cfg(not(loom))]
pub(crate) use queue::*;

#[cfg(not(loom))]
mod queue {
    use super::*;
    use crate::core::Core;
    use crate::epoch::BarrierMsg;
    use crossbeam::queue::ArrayQueue;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::sync::Arc;

    /// A piece of work for a core.
    pub(crate) type Job = Box<dyn FnOnce(&std::rc::Rc<Core>) + Send>;

    /// What can be sent to a core.
    pub(crate) enum Msg {
        /// Run this on the core.
        Run(Job),
        /// A task of the core was woken from elsewhere.
        Wake(u64),
        /// One part of an epoch barrier.
        Barrier(Arc<BarrierMsg>),
        /// Leave the loop.
        Stop,
    }

    /// Messages a core's inbox holds; senders on other cores keep the surplus, other threads wait.
    pub(crate) const INBOX: usize = 4096;

    /// The part of a core that other threads see.
    pub(crate) struct CoreShared {
        /// Index in the engine.
        pub(crate) index: usize,
        pub(crate) queue: ArrayQueue<Msg>,
        pub(crate) parking: Parking,
        /// The core has stopped: nobody will ever look at the queue again.
        closed: AtomicBool,
        wake: OwnedFd,
    }

    impl CoreShared {
        pub(crate) fn new(index: usize) -> std::io::Result<CoreShared> {
            // SAFETY: eventfd takes no pointers.
            let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
            if fd < 0 {
                return Err(std::io::Error::last_os_error());
            }
            // SAFETY: a new descriptor that nobody else owns.
            let wake = unsafe { OwnedFd::from_raw_fd(fd) };
            Ok(CoreShared {
                index,
                queue: ArrayQueue::new(INBOX),
                parking: Parking::default(),
                closed: AtomicBool::new(false),
                wake,
            })
        }

        /// The descriptor that becomes readable on a wake-up.
        pub(crate) fn wake_fd(&self) -> i32 {
            self.wake.as_raw_fd()
        }

        /// Puts a message into the inbox; gives it back if that is full. A core that has stopped drops it.
        pub(crate) fn try_send(&self, msg: Msg) -> Result<(), Msg> {
            self.queue.push(msg)?;
            if self.parking.must_wake() {
                self.ring_bell();
            }
            // ordered by the fence in `must_wake` against the one in `close`: either side sees the other
            if self.closed.load(Ordering::Relaxed) {
                self.drop_all();
            }
            Ok(())
        }

        /// The core stops: messages that are left, and later ones, are dropped. What they own (files, senders that
        /// somebody waits for) must not stay in a queue that the files themselves keep alive.
        pub(crate) fn close(&self) {
            self.closed.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            self.drop_all();
        }

        fn drop_all(&self) {
            while let Some(msg) = self.queue.pop() {
                drop(msg);
            }
        }

        /// Puts a message into the inbox, waiting for room: for threads that are not cores.
        pub(crate) fn send_blocking(&self, msg: Msg) {
            let mut msg = msg;
            while let Err(back) = self.try_send(msg) {
                msg = back;
                std::thread::sleep(std::time::Duration::from_micros(50));
            }
        }

        fn ring_bell(&self) {
            let one = 1u64.to_ne_bytes();
            // SAFETY: writes eight bytes from a live array. A full counter (EAGAIN) is a wake-up that is already there.
            unsafe { libc::write(self.wake.as_raw_fd(), one.as_ptr().cast(), 8) };
        }

        /// Takes the wake-ups that have arrived.
        pub(crate) fn clear_bell(&self) {
            let mut n = [0u8; 8];
            // SAFETY: reads at most eight bytes into a live array.
            unsafe { libc::read(self.wake.as_raw_fd(), n.as_mut_ptr().cast(), 8) };
        }
    }
}
