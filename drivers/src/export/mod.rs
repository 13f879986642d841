//! Exports: how clients reach a node.
mod iothread;
mod listen;
pub mod nbd;
mod registry;

pub use iothread::IoThread;
pub use listen::listen;
pub use registry::{Export, ExportStatus, Exports, RemoveMode, Reservation};
