//! Faults, histories, models and hostile input, thrown at the engine.
#![forbid(unsafe_code)]

pub mod args;
pub mod faults;
pub mod linear;
