//! Moving data between nodes: the block-copy engine and what stands on it.
//!
//! ```text
//!   extents of the source (status) ─► pieces ─► bounded tasks: read ─► zero search ─► write | write-zeroes | skip
//! ```
//!
//! Nothing here names a driver: everything goes through roots.
#![forbid(unsafe_code)]

pub mod compare;
pub mod copy;
pub mod lanes;
mod zeroes;

pub use compare::{Difference, compare};
pub use copy::{BlockCopy, Options, Source};
pub use lanes::copy_on_all_cores;
