//! Load generators and test nodes for the benchmarks.
//!
//! ```text
//!   leaf(...) ─► a node of the graph ─► Root ─► `depth` tasks that read or write at random offsets
//! ```
#![forbid(unsafe_code)]

pub mod load;
pub mod node;
