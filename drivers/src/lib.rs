//! Drivers of the block graph: protocols, formats, filters, and the exports on top.
#![forbid(unsafe_code)]
pub mod export;
pub mod filter;
pub mod format;
pub mod image;
pub mod open;
mod open_qcow2;
pub mod options;
pub mod protocol;
