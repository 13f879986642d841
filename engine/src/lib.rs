//! The Ringblock engine: cores, rings, epochs, the block graph and the request path.
//!
//! ```text
//!   engine ── cores ── ring + op slab · executor · inbox · timers · epochs
//!      │
//!      ├── graph   nodes, edges, permissions; changes by prepare → quiesce → commit
//!      ├── path    root → throttle → gate → lookup → transfer → accounting
//!      └── host    files, time and blocking calls: Linux, or the simulator
//! ```

pub mod core;
pub mod driver;
pub mod engine;
pub mod epoch;
pub mod error;
pub mod event;
mod exec;
pub mod graph;
pub mod host;
mod inbox;
pub mod mem;
pub mod net;
pub mod path;
mod pool;
pub mod ring;
pub mod sync;
pub mod throttle;
pub mod timer;
pub mod units;

pub use engine::{Config, Engine};
pub use error::{Errno, Error, ErrorClass};
