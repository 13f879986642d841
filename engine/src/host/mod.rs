//! The host: files, time and blocking calls, real (Linux) or simulated, behind one door.
//!
//! Drivers see [`File`] and never a descriptor, so that the same driver runs on both. A file's data path is the ring
//! (slot numbers in every core's registered file table); its slow calls go to the blocking pool.
//!
//! ```text
//!   File ─ slot ─► ring of each core ─► kernel | simulator
//!        └ calls ► blocking pool ─► linux::{open, lock, probe, extent} | sim::disk
//! ```
//!
//! Invariant: a slot is reused only after every core has emptied it in its ring's table; the descriptor is closed after
//! that.

pub mod file;
pub mod linux;
pub mod sim;

pub use file::{Access, Expect, File, OpenOptions};

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where time comes from.
#[derive(Clone)]
pub(crate) enum Clock {
    /// CLOCK_MONOTONIC.
    Real(std::time::Instant),
    /// The simulator's virtual time in ns.
    Sim(Arc<AtomicU64>),
}

impl Clock {
    /// Nanoseconds since the engine started.
    pub(crate) fn now(&self) -> u64 {
        match self {
            Clock::Real(start) => start.elapsed().as_nanos() as u64,
            Clock::Sim(t) => t.load(Ordering::Relaxed),
        }
    }
}

/// Which world the engine lives in.
pub(crate) enum Host {
    /// Files of this machine.
    Linux,
    /// Files of a simulation.
    Sim(Arc<sim::disk::Disks>),
}
