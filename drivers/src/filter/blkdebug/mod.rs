//! `blkdebug`: a filter that makes chosen requests fail, or hold, at chosen points of its parent's work.
//!
//! Rules are given as options, in a config file, or, for breakpoints, by `io`. An event that a parent raises
//! ([`DebugEvent`](ringblock_engine::debug::DebugEvent)) puts the rules that name it into force; requests that reach the node are then tried against the rules in
//! force. The filter can also claim to have other limits than its child, to show that parents keep to them.
//!
//! ```text
//!   event ─► rules of that event, in the state we are in ─┬─ inject-error: now in force (those of earlier events are not)
//!                                                         ├─ set-state:    the state when the event ends
//!                                                         └─ break:        the one that raised it waits for `resume`
//!   request ─► first rule in force that fits its kind and place? ─ yes ─► its error     no ─► child
//! ```
//!
//! Invariants: rules change under one lock that is never held across an await; a request that fails here has not touched
//! the child; a node without rules passes everything on.

mod config;
mod driver;
mod rules;

pub use driver::Blkdebug;
pub(crate) use driver::open_fn;
pub use rules::Note;
