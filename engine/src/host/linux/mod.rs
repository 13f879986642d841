//! The Linux host: plain synchronous calls, each with a safe face over libc.
//!
//! Nothing here is on the data path. Functions that may sleep (open, ioctl, lseek, lock) run on the blocking
//! pool; the data path is the ring. All `unsafe` of these calls sits in these files, and no function keeps a
//! pointer after it returns.
//!
//! ```text
//! open ──► HostFile ──► probe (alignment, discard) ──► ring
//!              ├──► lock (OFD bytes)   ├──► extent (SEEK_DATA / SEEK_HOLE)   └──► resize
//! net ──► listening descriptors ──► ring      signals, daemon, cpu ──► the program around it
//! ```

pub mod cpu;
pub mod daemon;
pub mod extent;
pub mod lock;
pub mod net;
pub mod open;
pub mod probe;
pub mod resize;
pub mod signals;
mod sys;
