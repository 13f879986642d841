//! The NBD server: wire format, option phase and transmission rules are pure; sockets are apart from them.
//!
//! ```text
//! socket bytes ──► handshake ──► transmission ──► engine request
//!                     │              │                 │
//!                     └── wire ──────┴──── status ◄────┘ ──► socket bytes
//! ```
pub mod handshake;
pub mod status;
pub mod transmission;
pub mod wire;
