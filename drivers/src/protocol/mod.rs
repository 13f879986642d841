//! Protocol drivers: they hold what the ring moves bytes to and from.
pub mod file;
pub mod null;
mod zero;
