//! The standard library's synchronisation, or loom's models of it, for the modules that are model-checked
//! (`tests/loom.rs`): parking, one-shots and countdowns, serialising ranges.
//!
//! ```text
//!   cfg(loom)      ─► loom::sync     every interleaving of a small program is run
//!   otherwise      ─► std::sync      the very same types as without this module
//! ```

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence},
};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence},
};
