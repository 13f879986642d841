//! Exports: how clients reach a node.
mod listen;
pub mod nbd;
mod registry;

pub use listen::listen;
pub use registry::{Export, ExportStatus, Exports, RemoveMode, Reservation};
