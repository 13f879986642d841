//! Ringblock: a block storage engine over io_uring, one thread per core.
#![forbid(unsafe_code)]

pub mod cli;
pub mod qmp;
