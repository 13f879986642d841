//! The qcow2 format.
mod bytes;
pub mod compress;
pub mod create;
pub mod entry;
pub mod extensions;
pub mod geometry;
pub mod header;
pub mod refcount;
pub mod snapshot_table;
#[cfg(test)]
mod testkit;
