//! Exports: how clients reach a node.
pub mod nbd;
mod registry;

pub use registry::{Export, ExportStatus, Exports, RemoveMode, Reservation};
