//! The NBD server: wire format, option phase and transmission rules are pure; sockets are apart from them.
//!
//! ```text
//! server ──► connection ──► handshake (pure)
//!                 └──► transmission (pure) ──► serve ──► Root     flow ──► socket
//!                                                └── status, wire ──┘
//! ```
mod connection;
mod export;
mod flow;
pub mod handshake;
mod pace;
mod serve;
mod server;
pub mod status;
pub mod transmission;
pub mod wire;

pub use export::{NbdExport, NbdExportOptions};
pub use server::{NbdServer, ServerConfig};
