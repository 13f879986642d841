//! Protocol drivers: they hold what the ring moves bytes to and from.
mod create;
pub mod file;
pub mod null;
mod state;
mod zero;
