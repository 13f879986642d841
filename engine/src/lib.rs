//! The Ringblock engine: cores, rings, epochs, the block graph and the request path.
//!
//! ```text
//!   engine ── cores ── ring + op slab · executor · inbox · timers · epochs
//!      │
//!      ├── graph   nodes, edges, permissions; changes by prepare → quiesce → commit
//!      ├── path    root → throttle → gate → lookup → transfer → accounting
//!      └── host    files, time and blocking calls: Linux, or the simulator
//! ```

#![cfg_attr(loom, allow(dead_code, unused_imports, unreachable_pub, missing_docs))]

#[cfg(not(loom))]
pub mod core;
#[cfg(not(loom))]
pub mod debug;
#[cfg(not(loom))]
pub mod driver;
#[cfg(not(loom))]
pub mod engine;
#[cfg(not(loom))]
pub mod epoch;
#[cfg(not(loom))]
pub mod error;
#[cfg(not(loom))]
pub mod event;
#[cfg(not(loom))]
mod exec;
#[cfg(not(loom))]
pub mod graph;
#[cfg(not(loom))]
pub mod heap;
#[cfg(not(loom))]
pub mod host;
#[cfg(not(loom))]
#[allow(unreachable_pub)] // parking is public to its model check
mod inbox;
#[cfg(not(loom))]
pub mod mem;
#[cfg(not(loom))]
pub mod mutants;
#[cfg(not(loom))]
pub mod net;
#[cfg(not(loom))]
pub mod path;
#[cfg(not(loom))]
mod pool;
#[cfg(not(loom))]
pub mod ring;
mod shim;
pub mod sync;
#[cfg(not(loom))]
pub mod throttle;
#[cfg(not(loom))]
pub mod timer;
#[cfg(not(loom))]
pub mod units;

// Under `--cfg loom` only the model-checked modules are built.
#[cfg(loom)]
pub mod inbox;
#[cfg(loom)]
#[path = "path/serial.rs"]
pub mod serial;

#[cfg(not(loom))]
pub use engine::{Config, Engine};
#[cfg(not(loom))]
pub use error::{Errno, Error, ErrorClass};
