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
pub mod time;
pub mod watch;

/// fallocate(2): the length of the file stays as it is.
pub const FALLOC_KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
/// fallocate(2): the range becomes a hole. Goes with [`FALLOC_KEEP_SIZE`].
pub const FALLOC_PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE;
/// fallocate(2): the range reads as zeroes and stays allocated.
pub const FALLOC_ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE;
