//! The request path: how a request enters the graph at a root and reaches the ring (DESIGN §4).
//!
//! ```text
//!   Root::read/write ─► throttle ─► quiesce gate ─► resolve (lookup, lookup, …) ─► one transfer ─► accounting
//!                                                      │ stops at: Miss, Claim, Encoded, Full, a slow leaf
//!                                                      ▼
//!                                              slow path (boxed), piece by piece, then resolve again
//! ```
//!
//! Invariants: an admitted request runs to completion; a throttled one holds nothing; data never changes cores; the hot
//! path (`resolve` covers everything) allocates nothing.

mod child;
mod full;
mod party;
mod read;
mod resolve;
mod root;
#[allow(unreachable_pub)] // public to its model check
mod serial;
mod stats;
mod status;
mod write;
mod zero;

pub use child::Child;
pub(crate) use child::truncate_node;
pub use party::Party;
pub(crate) use party::is_of;
pub use root::{Permit, Root, RootId};
pub use stats::{OpClass, OpStats, Snapshot};
pub use status::Above;

pub(crate) use root::RootLocal;
pub use serial::{Serial, Ticket};
pub(crate) use zero::flush_node;
