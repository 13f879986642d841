//! Faults, histories, models and hostile input, thrown at the engine.
#![forbid(unsafe_code)]
