//! Faults, histories, models and hostile input, thrown at the engine.
#![forbid(unsafe_code)]

pub mod args;
pub mod clients;
pub mod images;
pub mod linear;
