//! `file` and `host_device`: a file or device of the host, moved by the ring.
//!
//! Invariants:
//! - The image locks follow the permissions: taken in prepare, dropped in commit or abort, on an open file description
//!   that is there as long as the node, so that switching descriptors never loses a lock.
//! - With `auto-read-only` the file is opened read-only and gets a second, writable descriptor when the first writer
//!   comes; I/O in flight on the first is not disturbed.
//! - A flush that failed once fails for ever: the page cache may have dropped what it could not write
//!   (reference, part 5 item 16).
//!
//! ```text
//! FileDriver ─ state.rs ─ leaf ─────► ring          reads and writes
//!            │          ├ lock ─────► OFD bytes     prepare / commit / abort
//!            └ zero.rs ─────────────► fallocate     with what the host has refused so far
//! ```

pub use super::create::create;
use super::state::{Mode, Pending, State, WRITABLE, locked};
use crate::options::blockdev::{BlockdevDriver, BlockdevOptions};
use crate::options::types::OnOffAuto;
use ringblock_engine::core::Core;
use ringblock_engine::driver::{Driver, Kind, Limits, LocalFuture, Op, Preallocation, Request, Status, perm};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::{Prepared, Reopen};
use ringblock_engine::host::Expect;
use ringblock_engine::host::linux::lock::Locking;
use std::any::Any;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

/// Permissions that need a writable descriptor.
const WRITERS: u8 = perm::WRITE | perm::WRITE_UNCHANGED | perm::RESIZE;

/// What a `file` or `host_device` node is to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileConfig {
    /// `host_device`: the path must name a device, otherwise a regular file.
    pub device: bool,
    /// The path, taken literally.
    pub filename: PathBuf,
    /// `O_DIRECT`.
    pub direct: bool,
    /// Opened and kept read-only.
    pub read_only: bool,
    /// Opened read-only until a writer comes.
    pub auto_read_only: bool,
    /// Image locks.
    pub locking: Locking,
    /// Shares every permission with other processes.
    pub force_share: bool,
}

impl FileConfig {
    /// A read-write file with the page cache and the defaults of all options.
    pub fn new(filename: impl Into<PathBuf>) -> FileConfig {
        FileConfig {
            device: false,
            filename: filename.into(),
            direct: false,
            read_only: false,
            auto_read_only: false,
            locking: Locking::Auto,
            force_share: false,
        }
    }

    pub(super) fn expect(&self) -> Expect {
        if self.device { Expect::Device } else { Expect::Regular }
    }
}

/// The option `locking`.
pub fn locking(option: Option<OnOffAuto>) -> Locking {
    match option {
        None | Some(OnOffAuto::Auto) => Locking::Auto,
        Some(OnOffAuto::On) => Locking::On,
        Some(OnOffAuto::Off) => Locking::Off,
    }
}

/// A node on a file or device of the host.
pub struct FileDriver {
    state: Arc<State>,
    /// What is prepared for the permissions to come.
    pending: Mutex<Option<Pending>>,
    pending_perm: AtomicU8,
}

impl FileDriver {
    /// Opens the file. No locks are taken before somebody asks for permissions.
    pub async fn open(config: FileConfig) -> Result<FileDriver, Error> {
        let state = Arc::new(State::open(config).await?);
        Ok(FileDriver { state, pending: Mutex::default(), pending_perm: AtomicU8::new(0) })
    }

    /// The options it was opened with.
    pub fn config(&self) -> &FileConfig {
        &self.state.config
    }

    /// Bytes allocated on disk; `None` in the simulator.
    pub fn allocated_size(&self) -> Option<u64> {
        self.state.file().ok()?.host()?.allocated_size().ok()
    }

    /// Gets the descriptor and the locks for permissions to come.
    async fn prepare(&self, used: u8, shared: u8) -> Result<Option<Pending>, Error> {
        let place = self.state.place();
        let mut pending = None;
        if used & WRITERS != 0 && place & WRITABLE == 0 {
            pending = self.state.prepare(place | WRITABLE).await?;
        }
        self.state.lock_prepare(used, shared).await?;
        Ok(pending)
    }

    /// Checks new options, and opens what they need.
    async fn reopen(&self, new: &Reopen) -> Result<Prepared, Error> {
        let config = &self.state.config;
        let options = new.config.downcast_ref::<BlockdevOptions>();
        let file = match options.map(|o| &o.driver) {
            Some(BlockdevDriver::File(f)) if !config.device => f,
            Some(BlockdevDriver::HostDevice(f)) if config.device => f,
            _ => return Err(Error::invalid("Cannot change the option 'driver'")),
        };
        if config.filename.as_os_str() != file.filename.as_str() {
            return Err(Error::invalid("Cannot change the option 'filename'"));
        }
        if config.locking != locking(file.locking) {
            return Err(Error::invalid("Cannot change the option 'locking'"));
        }
        let mode = Mode {
            read_only: new.common.read_only,
            auto_read_only: new.common.auto_read_only,
            direct: new.common.direct,
            force_share: new.common.force_share,
        };
        let (place, opened) = self.descriptor_for(mode).await?;
        let state = self.state.clone();
        let commit = move || {
            if let Some(opened) = opened {
                state.adopt(opened);
            }
            *locked(&state.mode) = mode;
            // A writer may have come with this very change; then the writable descriptor of this kind is there.
            let writable = state.place() & WRITABLE;
            state.switch(place);
            state.switch(place | writable);
        };
        Ok(Prepared { commit: Box::new(commit), abort: Box::new(|| {}) })
    }

    /// The place of the descriptor to use in a mode, opened if it is not in the table.
    async fn descriptor_for(&self, mode: Mode) -> Result<(usize, Option<Pending>), Error> {
        let here = self.state.place();
        // With another kind of descriptor a writer that comes with this change would find none, so it is made now.
        let other_kind = here | WRITABLE != mode.place(true);
        let writable = here & WRITABLE != 0 || mode.writable_at_rest() || other_kind && !mode.read_only;
        let place = mode.place(writable);
        match self.state.prepare(place).await {
            // Read-only will do until a writer comes; who writes now has a writable descriptor already.
            Err(_) if writable && mode.auto_read_only => {
                let place = mode.place(false);
                Ok((place, self.state.prepare(place).await?))
            }
            opened => Ok((place, opened?)),
        }
    }
}

/// Lengths are kept in whole sectors of 512 bytes; what the file lacks reads as zeroes (reference, part 5 item 14).
fn whole_sectors(len: u64) -> u64 {
    len.checked_next_multiple_of(512).unwrap_or(len)
}

impl Driver for FileDriver {
    fn name(&self) -> &'static str {
        if self.state.config.device { "host_device" } else { "file" }
    }

    fn size(&self) -> u64 {
        whole_sectors(self.state.live_size())
    }

    fn limits(&self) -> Limits {
        self.state.limits()
    }

    #[inline]
    fn kind(&self) -> Kind<'_> {
        Kind::Leaf(self.state.leaf())
    }

    fn submit(&self, req: Request) -> LocalFuture<'_, (Result<(), Errno>, Request)> {
        Box::pin(async move {
            let done = match req.op {
                Op::WriteZeroes => self.state.zeroes(&req).await,
                Op::Discard => self.state.discard(&req).await,
                Op::Flush => self.state.flush().await,
                // The ring moves the data of a leaf; nobody asks the driver.
                Op::Read | Op::Write => Err(Errno::ENOTSUP),
            };
            (done, req)
        })
    }

    fn status(&self, range: Range<u64>, want_zero: bool) -> LocalFuture<'_, Result<Status, Errno>> {
        Box::pin(self.state.extent(range, want_zero))
    }

    fn truncate(&self, size: u64, prealloc: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.state.resize(size, prealloc))
    }

    fn set_perm_prepare(&self, used: u8, shared: u8) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let pending = self.prepare(used, shared).await?;
            *locked(&self.pending) = pending;
            self.pending_perm.store(used, Ordering::Relaxed);
            Ok(())
        })
    }

    fn set_perm_commit(&self) {
        if let Some(pending) = locked(&self.pending).take() {
            self.state.adopt(pending);
        }
        let used = self.pending_perm.load(Ordering::Relaxed);
        if used & WRITERS != 0 {
            self.state.switch(self.state.place() | WRITABLE);
        }
        if let Some(lock) = locked(&self.state.lock).as_mut() {
            lock.commit();
        }
        self.state.set_growing(used & perm::RESIZE != 0);
    }

    fn set_perm_abort(&self) {
        *locked(&self.pending) = None;
        if let Some(lock) = locked(&self.state.lock).as_mut() {
            lock.abort();
        }
    }

    fn filename(&self) -> String {
        self.state.config.filename.to_string_lossy().into_owned()
    }

    fn supports_reopen(&self) -> bool {
        true
    }

    fn reopen_prepare<'a>(&'a self, new: &'a Reopen) -> LocalFuture<'a, Result<Prepared, Error>> {
        Box::pin(self.reopen(new))
    }

    fn close(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            let lock = self.state.lock.clone();
            Core::current().blocking(move || drop(locked(&lock).take())).await;
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
