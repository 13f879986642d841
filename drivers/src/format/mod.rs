//! Format drivers: they translate guest offsets, the engine transfers.
pub mod probe;
pub mod qcow2;
pub mod raw;
