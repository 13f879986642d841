//! The simulator: the whole engine on one thread, under a seed (DESIGN §10).
//!
//! The engine and the drivers are the very same code; only the ring, the clock, the files and the order of things are
//! simulated. A failing seed reproduces exactly.
//!
//! ```text
//!   World ── picks ─► core 0 … core n   (executor, inbox, timers, epochs: the real ones)
//!     │                  └ SimRing ─► Kernel ─► Disk: live image, log, durable image ─► crash states
//!     └ clock, seed, trace hash
//! ```

pub mod disk;
mod guest;
mod image;
mod journal;
mod kernel;
mod oracle;
mod rng;
mod sabotage;
mod world;

pub use disk::{Change, Disk, Disks, SECTOR};
pub use guest::{Guest, lock};
pub use image::Image;
pub use journal::{Event, Journal};
pub use oracle::{Oracle, is_injected};
pub use rng::Rng;
pub use sabotage::{Harm, OpKind, Saboteur, Submitted, Trap};
pub use world::{Setup, World};

/// What goes wrong, and how long things take. Probabilities are per thousand operations.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Shortest and longest latency in ns.
    pub latency_ns: (u64, u64),
    /// Operations that take `stall_ns` longer.
    pub stalled: u32,
    /// How much longer, in ns.
    pub stall_ns: u64,
    /// Transfers that end early, at a sector boundary.
    pub short: u32,
    /// `EINTR` or `EAGAIN` without any effect.
    pub interrupted: u32,
    /// Reads that fail with `EIO`.
    pub read_error: u32,
    /// Writes that fail with `EIO`, each sector old or new.
    pub write_error: u32,
    /// Writes that fail with `ENOSPC`.
    pub no_space: u32,
    /// Flushes that fail with `EIO`.
    pub flush_error: u32,
    /// Allocated bytes beyond which growing a file fails with `ENOSPC`.
    pub capacity: Option<u64>,
    /// fallocate(2) modes answered with `ENOTSUP`.
    pub refused_fallocate: Vec<i32>,
}

impl Default for Faults {
    /// Nothing goes wrong; 5 to 300 microseconds.
    fn default() -> Faults {
        Faults {
            latency_ns: (5_000, 300_000),
            stalled: 5,
            stall_ns: 5_000_000,
            short: 0,
            interrupted: 0,
            read_error: 0,
            write_error: 0,
            no_space: 0,
            flush_error: 0,
            capacity: None,
            refused_fallocate: Vec::new(),
        }
    }
}

impl Faults {
    /// What every caller has to put up with and nobody may notice: short transfers, interruptions, stalls.
    pub fn benign() -> Faults {
        Faults { short: 100, interrupted: 50, stalled: 20, ..Faults::default() }
    }
}
