//! Format drivers: they translate guest offsets, the engine transfers.
pub mod qcow2;
