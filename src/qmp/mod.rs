//! The control pipe: QMP, as `qemu-storage-daemon` speaks it.
//!
//! This module is the wire and the rules of the wire; it knows no block device. What commands do is registered in a
//! [`dispatch::Registry`] over a context of the program's choice (for the daemon: `crate::daemon`).
//!
//! Invariants:
//! * answers of one client are in the order of its commands, and every command has exactly one answer;
//! * whatever a client sends, its session goes on and others do not notice;
//! * memory per client is bounded: one message being read, one queue of output.
//!
//! ```text
//! client ─► server (thread) ─► session (rules) ─► dispatch (registry) ─► command(context, arguments)
//!    ▲                             │ answer                                   │
//!    └── outbox (bounded) ◄────────┴──────────── events ◄──────────────────────┘  to all negotiated clients
//! ```

pub mod dispatch;
pub mod events;
pub mod introspect;
mod outbox;
pub mod server;
pub mod session;
