//! An open file of the host: what protocol drivers hold.
//!
//! Data operations go through the calling core's ring by slot number; everything that may sleep goes to the blocking
//! pool. Clones share the descriptor; the last clone gives the slot back once every core has emptied it.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use super::Host;
use super::linux::extent::{Extent, extent_at};
use super::linux::open::{self, HostFile};
use super::linux::probe::{self, HostLimits};
use super::linux::resize::{self, Prealloc};
use super::sim::disk::Disk;
use crate::core::Core;
use crate::engine::EngineShared;
use crate::epoch::Pin;
use crate::error::{Errno, Error};
use crate::inbox::Msg;
use crate::mem::Buf;
use crate::ring::{self, Dir, RawOp, Seg, Segs};
use crate::sync::Countdown;

pub use super::linux::open::{Access, Expect, OpenOptions};

/// What stands behind a file.
pub(crate) enum Backing {
    /// A descriptor of this process.
    Linux(HostFile),
    /// A disk of the simulator.
    Sim(Arc<Disk>),
}

/// Descriptor and slot, shared by the handle and by every core's ring table.
struct Held {
    backing: Backing,
    slot: u32,
    engine: Arc<EngineShared>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.engine.slots.lock().unwrap_or_else(|e| e.into_inner()).give(self.slot);
    }
}

struct Inner {
    held: Arc<Held>,
    limits: HostLimits,
    path: PathBuf,
}

impl Drop for Inner {
    /// Each core empties the slot, then lets go of `held`; the last one closes the descriptor.
    fn drop(&mut self) {
        for core in &self.held.engine.cores {
            let held = self.held.clone();
            let job = Box::new(move |core: &Rc<Core>| {
                core.ring.borrow_mut().set_file(held.slot, -1);
                drop(held);
            });
            Core::send_from_anywhere(core, Msg::Run(job));
        }
    }
}

/// An open file. Clones are the same file.
#[derive(Clone)]
pub struct File(Arc<Inner>);

impl File {
    /// Opens a file (or, in the simulator, a simulated disk) and registers it with every core.
    pub async fn open(path: &Path, opts: OpenOptions) -> Result<File, Error> {
        let core = Core::current();
        let backing = match &core.engine.host {
            Host::Sim(disks) => Backing::Sim(disks.open(path)?),
            Host::Linux => {
                let path = path.to_owned();
                Backing::Linux(core.blocking(move || open::open(&path, opts)).await?)
            }
        };
        File::register(&core, path, backing).await
    }

    /// Creates or empties a regular file and opens it read-write.
    pub async fn create(path: &Path) -> Result<File, Error> {
        let core = Core::current();
        let backing = match &core.engine.host {
            Host::Sim(disks) => Backing::Sim(disks.create(path)),
            Host::Linux => {
                let path = path.to_owned();
                Backing::Linux(core.blocking(move || open::create(&path)).await?)
            }
        };
        File::register(&core, path, backing).await
    }

    /// The same inode again with another access mode, for read-only ↔ read-write changes.
    pub async fn reopen(&self, writable: bool, direct: bool) -> Result<File, Error> {
        let core = Core::current();
        let this = self.clone();
        let backing = match &self.0.held.backing {
            Backing::Sim(disk) => Backing::Sim(disk.clone()),
            Backing::Linux(_) => {
                let again = core.blocking(move || this.host().map(|f| f.reopen(writable, direct))).await;
                Backing::Linux(again.unwrap_or_else(|| Err(Error::from(Errno::EBADF)))?)
            }
        };
        File::register(&core, &self.0.path, backing).await
    }

    async fn register(core: &Core, path: &Path, backing: Backing) -> Result<File, Error> {
        let engine = core.engine.clone();
        let slot = engine.slots.lock().unwrap_or_else(|e| e.into_inner()).take();
        let slot = slot.ok_or_else(|| Error::new(Errno(libc::EMFILE), "Too many open image files"))?;
        let limits = match &backing {
            Backing::Linux(file) => probe::limits(file),
            Backing::Sim(disk) => disk.limits(),
        };
        let held = Arc::new(Held { backing, slot, engine });
        let file = File(Arc::new(Inner { held, limits, path: path.to_owned() }));
        let done = Arc::new(Countdown::new(core.engine.cores.len()));
        for target in &core.engine.cores {
            let (held, done) = (file.0.held.clone(), done.clone());
            let job = Box::new(move |core: &Rc<Core>| {
                core.ring.borrow_mut().set_file(held.slot, held.descriptor());
                done.ack();
            });
            core.send(target, Msg::Run(job));
        }
        done.wait().await;
        Ok(file)
    }

    /// The slot in every ring's file table.
    pub(crate) fn slot(&self) -> u32 {
        self.0.held.slot
    }

    /// The real file; `None` in the simulator. For locks and ioctls, on the blocking pool.
    pub fn host(&self) -> Option<&HostFile> {
        match &self.0.held.backing {
            Backing::Linux(file) => Some(file),
            Backing::Sim(_) => None,
        }
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Alignments.
    pub fn limits(&self) -> HostLimits {
        self.0.limits
    }

    /// Current length in bytes.
    pub async fn size(&self) -> Result<u64, Errno> {
        match &self.0.held.backing {
            Backing::Sim(disk) => Ok(disk.len()),
            Backing::Linux(_) => {
                let this = self.clone();
                Core::current().blocking(move || this.host().map_or(Err(Errno::EBADF), HostFile::size)).await
            }
        }
    }

    /// Length in bytes now, without leaving the core: one fstat of an open file, which does not sleep on a local disk.
    pub fn len_now(&self) -> Result<u64, Errno> {
        match &self.0.held.backing {
            Backing::Sim(disk) => Ok(disk.len()),
            Backing::Linux(file) => file.size(),
        }
    }

    /// Changes the length; `exact` false allows a device that is at least as large.
    pub async fn set_size(&self, size: u64, exact: bool, prealloc: Prealloc) -> Result<(), Error> {
        use std::os::fd::AsFd;
        match &self.0.held.backing {
            Backing::Sim(disk) => {
                let old = disk.len();
                ring::plain(RawOp::Ftruncate { file: self.slot(), len: size }).await?;
                if prealloc == Prealloc::Full && size > old {
                    let (mode, len) = (super::linux::FALLOC_ZERO_RANGE, size - old);
                    self.fallocate(mode, old, len, None).await?;
                    self.fdatasync().await?;
                }
                Ok(())
            }
            Backing::Linux(_) => {
                let this = self.clone();
                let set = move || match this.host() {
                    Some(f) => resize::set_size(f.as_fd(), f.kind(), size, exact, prealloc),
                    None => Err(Error::from(Errno::EBADF)),
                };
                Core::current().blocking(set).await
            }
        }
    }

    /// The extent (data or hole) at `from`, bounded by `to`.
    pub async fn extent_at(&self, from: u64, to: u64) -> Result<Extent, Errno> {
        use std::os::fd::AsFd;
        match &self.0.held.backing {
            Backing::Sim(disk) => Ok(disk.extent_at(from, to)),
            Backing::Linux(_) => {
                let this = self.clone();
                let ask = move || this.host().map_or(Err(Errno::EBADF), |f| extent_at(f.as_fd(), from, to));
                Core::current().blocking(ask).await
            }
        }
    }

    /// Reads `buf.len()` bytes at `off`; zeroes past the end. Offset, length and memory must suit [`File::limits`].
    pub async fn read(&self, off: u64, buf: Buf) -> (Result<(), Errno>, Buf) {
        let segs = self.whole(off, &buf);
        ring::transfer(Dir::Read, buf, segs, None).await
    }

    /// Writes the buffer at `off`; with `dsync` it is durable on return.
    pub async fn write(&self, off: u64, buf: Buf, dsync: bool) -> (Result<(), Errno>, Buf) {
        let segs = self.whole(off, &buf);
        ring::transfer(Dir::Write { dsync }, buf, segs, None).await
    }

    fn whole(&self, off: u64, buf: &Buf) -> Segs {
        let mut segs = Segs::new();
        if !buf.is_empty() {
            segs.push(Seg { file: self.slot(), off, pos: 0, len: buf.len() as u32 });
        }
        segs
    }

    /// fdatasync.
    pub async fn fdatasync(&self) -> Result<(), Errno> {
        ring::plain(RawOp::Fdatasync { file: self.slot() }).await.map(drop)
    }

    /// fallocate(2) on the ring, `mode` as the system call takes it. With a pin, the pin lasts as long as the call.
    pub async fn fallocate(&self, mode: i32, off: u64, len: u64, pin: Option<Pin>) -> Result<(), Errno> {
        let result = ring::plain(RawOp::Fallocate { file: self.slot(), mode, off, len }).await.map(drop);
        drop(pin);
        result
    }
}

impl Held {
    fn descriptor(&self) -> i32 {
        use std::os::fd::AsRawFd;
        match &self.backing {
            Backing::Linux(file) => file.as_raw_fd(),
            Backing::Sim(disk) => disk.id(),
        }
    }
}
