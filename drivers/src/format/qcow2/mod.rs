//! The qcow2 format: sparse, copy-on-write, compressed, refcounted images.
//!
//! The lower half are plain functions on bytes; the upper half is the driver. Invariants I1 to I10 of the project's
//! ARCHITECTURE hold here; each file says which ones it keeps.
//!
//! ```text
//!   open ─► driver ─ map ◄── index, frames          any core reads
//!             └─ owner ─ fault │ claim │ discard │ resize │ compressed │ writeback │ limbo │ alloc │ refcounts
//!   check, repair                                    on the file alone
//!   header, extensions, geometry, entry, refcount, snapshot_table, bitmaps, compress, create      bytes
//! ```
//!
//! Not done here: keeping persistent bitmaps up to date (they are marked as in use), encryption, and changing internal
//! snapshots; snapshots that exist are preserved. Lazy refcounts are accepted and not used: with the two-barrier group
//! commit, refcounts cost next to nothing, and no image of ours ever needs the dirty bit.

mod alloc;
mod bitmaps;
mod bytes;
pub mod check;
#[cfg(test)]
mod check_tests;
mod claim;
mod claims;
pub mod compress;
mod compressed;
#[cfg(test)]
mod crash_tests;
pub mod create;
mod discard;
pub mod driver;
#[cfg(test)]
mod engine_tests;
pub mod entry;
pub mod extensions;
mod fault;
#[cfg(test)]
mod feature_tests;
mod frames;
pub mod geometry;
pub mod header;
mod index;
mod io;
mod limbo;
mod map;
pub mod open;
pub mod options;
mod owner;
pub mod refcount;
mod refcounts;
mod rehearsal;
mod repair;
mod resize;
#[cfg(test)]
mod simkit;
pub mod snapshot_table;
mod tables;
#[cfg(test)]
mod testkit;
mod writeback;

pub use check::{CheckReport, Repair};
pub use driver::Qcow2;
pub use open::open;
pub use options::{Backing, CacheOptions, NameOpener, NamedInImage, Qcow2Options};
