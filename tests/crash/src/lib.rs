//! Crash states of recorded runs, enumerated and judged.
//!
//! ```text
//!   cases × workload × seed ─► record (simulator) ─► Recording ─► enumerate ─► judge: checker, guest's sectors, a sample
//!                                                       └ spot: one state, replayed and made smaller
//! ```
//!
//! Only recording needs the engine. What a power cut may leave is computed here from the recording alone, by rules of its
//! own (module `medium`), and judged by a checker that shares no code with the engine.
#![forbid(unsafe_code)]

pub mod agree;
pub mod allowed;
pub mod args;
pub mod cases;
mod craft;
mod cut;
mod damage;
mod enumerate;
mod hunt;
mod judge;
pub mod lazy;
pub mod log;
mod medium;
#[cfg(feature = "mutants")]
pub mod mutants;
mod past;
pub mod peer;
mod record;
pub mod recover;
pub mod repair;
pub mod scenarios;
pub mod seeds;
pub mod short;
pub mod spot;
pub mod states;
pub mod subject;
mod trials;
pub mod work;

pub use cut::Cut;
pub use enumerate::{Budget, Tally, enumerate};
pub use hunt::{Failure, examine, hunt};
pub use judge::{Bad, Contract, Good, Judge, State, plain};
pub use record::{Recording, Roles, Tape, calm, quietly, record};
pub use spot::Spot;
