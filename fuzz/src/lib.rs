//! Fuzz targets: what Ringblock reads from strangers, as plain functions on bytes.
//!
//! ```text
//!   cargo xtask fuzz run                      all targets under the mutator of this crate, on stable
//!   cargo fuzz run TARGET --features libfuzzer    one, guided by coverage, for as long as you like
//!   cargo test -p ringblock-fuzz                  the corpora, and a little of both kinds of mutation
//!
//!   corpus/TARGET/ ─► Mutator ─► target(bytes) ─► Outcome ─ something new? ─► joins the corpus
//!                                   └ panic, over time, over memory ─► Finding
//! ```
//!
//! Property of all: no panic, at most [`campaign::TIME`] and [`campaign::MEMORY`] for one input, and no file is touched
//! but those of the simulator. What else must hold is said by each target.
#![forbid(unsafe_code)]

pub mod campaign;
pub mod choices;
pub mod corpus;
pub mod mutate;
pub mod outcome;
mod sim;
pub mod targets;

pub use outcome::Outcome;
pub use targets::{TARGETS, Target, find};
