//! Ringblock: a block storage engine over io_uring, one thread per core.
//!
//! Start with [`Storage`]: it runs the engine, opens nodes from typed options and hands out [`Disk`]s.
//!
//! ```no_run
//! use ringblock::{Config, Storage, options::{blockdev::BlockdevOptions, from_arg}};
//! # fn main() -> Result<(), ringblock::Error> {
//! let storage = Storage::start(&Config::default())?;
//! let options: BlockdevOptions =
//!     from_arg("qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2", Some("driver"))?;
//! storage.add(options)?;
//! let disk = storage.open("disk", true)?;
//! disk.write_at(b"hello", 4096)?;
//! disk.flush_now()?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod cli;
pub mod daemon;
pub mod img;
pub mod io;
pub mod qmp;
mod storage;
pub mod tool;

pub use ringblock_drivers as drivers;
pub use ringblock_drivers::options;
pub use ringblock_engine as engine;
pub use ringblock_engine::{Config, Engine, Errno, Error};
pub use storage::{Disk, Storage};
