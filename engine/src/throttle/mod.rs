//! I/O limits: groups of leaky buckets, asked at admission, before a request holds anything (DESIGN §7).
//!
//! ```text
//!   request ─► Member::admit ─► bucket: allowed now? ─ yes, nobody waits ─► charged, on its way
//!                                          └ no ─► queue of its direction: members in turn, by weight
//!                                                    └ the first of the queue runs the one timer, then admits as many as it may
//!   Group (limits, buckets, queues) ◄── Member: a device's backend, a throttle node ◄── requests of any core
//! ```
//!
//! Invariants: a request is charged once, by its full size, when it is allowed; requests of a member go in order, members
//! in turn; whoever waits is either first in a queue, with a timer, or behind somebody who is.
//!
//! A group is one lock and no leases of credit: admissions are exact to the nanosecond, and the lock is taken only while
//! limits are set (what it costs is measured by `cargo bench -p ringblock-bench -- throttle`).

mod bucket;
#[cfg(all(test, not(loom)))]
mod exact_tests;
mod group;
mod member;
mod queue;

pub use bucket::{Config, Kind, Rate};
pub use group::{Group, Groups};
pub use member::{Admit, DEFAULT_WEIGHT, Member, MemberStats, Outcome, WEIGHT_MAX};
