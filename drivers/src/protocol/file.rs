//! `file` and `host_device`: a file or device of the host, moved by the ring.
//!
//! Invariants:
//! - The image locks follow the permissions: taken in prepare, dropped in commit or abort, on an open file description
//!   that serves nothing else, so that swapping descriptors never loses a lock.
//! - With `auto-read-only` the file is opened read-only and gets a second, writable descriptor when the first writer
//!   comes; both stay open, so I/O in flight on the first is not disturbed.
//! - A flush that failed once fails for ever: the page cache may have dropped what it could not write
//!   (reference, part 5 item 16).
//!
//! ```text
//! FileDriver ─ first: Leaf ──────────► ring          reads, and writes if opened read-write
//!            ├ writable: Leaf (later) ► ring         after the first writer of an auto-read-only node
//!            ├ lock: ImageLock ───────► OFD bytes    prepare / commit / abort
//!            └ zero.rs ───────────────► fallocate    with what the host has refused so far
//! ```

use super::zero::ZeroOps;
use ringblock_engine::core::Core;
use ringblock_engine::driver::{
    Driver, Kind, Leaf, Limits, LocalFuture, Op, Preallocation, Request, Status, perm,
};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::host::linux::extent::ExtentKind;
use ringblock_engine::host::linux::lock::{ImageLock, LockPerms, Locking};
use ringblock_engine::host::linux::open::FileKind;
use ringblock_engine::host::linux::resize::Prealloc;
use ringblock_engine::host::{Access, Expect, File, OpenOptions};
use std::any::Any;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// Permissions that need a writable descriptor.
const WRITERS: u8 = perm::WRITE | perm::WRITE_UNCHANGED | perm::RESIZE;

/// What a `file` or `host_device` node is to be.
#[derive(Clone, Debug)]
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

    fn expect(&self) -> Expect {
        if self.device {
            Expect::Device
        } else {
            Expect::Regular
        }
    }
}

/// A node on a file or device of the host.
pub struct FileDriver {
    config: FileConfig,
    kind: FileKind,
    first: Leaf,
    first_writable: bool,
    writable: OnceLock<Leaf>,
    /// A writable descriptor that is prepared and not committed.
    pending: Mutex<Option<File>>,
    pending_perm: AtomicU8,
    /// `None` in the simulator and after close. Only touched by the graph's core, one change at a time.
    lock: Arc<Mutex<Option<ImageLock>>>,
    zero: ZeroOps,
    limits: Limits,
    /// Length as last seen, for nodes whose length nobody may change.
    size: AtomicU64,
    growing: AtomicBool,
    flush_failed: AtomicI32,
    /// A range last seen to be data. Writing cannot change that; zeroing, discarding and shrinking can.
    data_seen: Mutex<Range<u64>>,
}

fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl FileDriver {
    /// Opens the file. No locks are taken before somebody asks for permissions.
    pub async fn open(config: FileConfig) -> Result<FileDriver, Error> {
        if config.force_share && !config.read_only {
            return Err(Error::invalid(
                "force-share=on can only be used with read-only images",
            ));
        }
        let read_only = config.read_only || config.auto_read_only;
        let access = if read_only {
            Access::ReadOnly
        } else {
            Access::ReadWrite
        };
        let opts = OpenOptions {
            expect: config.expect(),
            access,
            direct: config.direct,
        };
        let file = File::open(&config.filename, opts).await?;
        let could_not = |e: Errno| Error::io(e, format!("Could not open '{}'", config.filename.display()));
        let size = file.size().await.map_err(could_not)?;
        let (kind, lock) = match file.host() {
            None => (FileKind::Regular, None),
            Some(host) => {
                let fd = host.try_clone_fd().map_err(could_not)?;
                (host.kind(), Some(ImageLock::new(fd, config.locking)?))
            }
        };
        let host = file.limits();
        if host.memory_align > 4096 {
            let text = format!("Memory alignment of {} bytes is not supported", host.memory_align);
            return Err(Error::new(Errno::ENOTSUP, text));
        }
        Ok(FileDriver {
            kind,
            first: Leaf::File(file),
            first_writable: !read_only,
            writable: OnceLock::new(),
            pending: Mutex::default(),
            pending_perm: AtomicU8::new(0),
            lock: Arc::new(Mutex::new(lock)),
            zero: ZeroOps::new(kind),
            limits: Limits {
                request_alignment: host.request_align.max(1),
                memory_alignment: host.memory_align.max(1),
                ..Limits::default()
            },
            size: AtomicU64::new(size),
            growing: AtomicBool::new(false),
            flush_failed: AtomicI32::new(0),
            data_seen: Mutex::new(0..0),
            config,
        })
    }

    fn leaf(&self) -> &Leaf {
        self.writable.get().unwrap_or(&self.first)
    }

    fn file(&self) -> Result<&File, Errno> {
        match self.leaf() {
            Leaf::File(file) => Ok(file),
            Leaf::Null { .. } => Err(Errno::EBADF),
        }
    }

    fn can_write(&self) -> bool {
        self.first_writable || self.writable.get().is_some()
    }

    async fn zeroes(&self, req: &Request) -> Result<(), Errno> {
        let end = req.offset.checked_add(req.len).ok_or(Errno::EINVAL)?;
        self.forget_data(req.offset..end);
        let done = self
            .zero
            .write_zeroes(self.file()?, req.offset..end, self.live_size(), req.flags)
            .await;
        // Again: a status query may have come between.
        self.forget_data(req.offset..end);
        done
    }

    async fn discard(&self, req: &Request) -> Result<(), Errno> {
        let end = req.offset.checked_add(req.len).ok_or(Errno::EINVAL)?;
        self.forget_data(req.offset..end);
        let done = self.zero.discard(self.file()?, req.offset..end).await;
        self.forget_data(req.offset..end);
        done
    }

    async fn flush(&self) -> Result<(), Errno> {
        let before = self.flush_failed.load(Ordering::Acquire);
        if before != 0 {
            return Err(Errno(before));
        }
        let done = self.file()?.fdatasync().await;
        if let Err(e) = done {
            // The first failure is the one that tells; whoever comes later gets the same.
            let _ = self
                .flush_failed
                .compare_exchange(0, e.0, Ordering::AcqRel, Ordering::Acquire);
        }
        done
    }

    /// The length of the file now; format drivers make it longer by writing past its end.
    fn live_size(&self) -> u64 {
        if !self.growing.load(Ordering::Relaxed) {
            return self.size.load(Ordering::Relaxed);
        }
        match self.file().and_then(File::len_now) {
            Ok(now) => {
                self.size.store(now, Ordering::Relaxed);
                now
            }
            Err(_) => self.size.load(Ordering::Relaxed),
        }
    }

    fn forget_data(&self, range: Range<u64>) {
        let mut seen = locked(&self.data_seen);
        if seen.start < range.end && range.start < seen.end {
            *seen = 0..0;
        }
    }

    fn known_data(&self, range: &Range<u64>) -> Option<u64> {
        let seen = locked(&self.data_seen);
        seen.contains(&range.start)
            .then(|| seen.end.min(range.end) - range.start)
    }

    async fn extent(&self, range: Range<u64>, want_zero: bool) -> Result<Status, Errno> {
        let len = range
            .end
            .checked_sub(range.start)
            .filter(|n| *n > 0)
            .ok_or(Errno::EINVAL)?;
        let mut status = Status {
            len,
            data: true,
            zero: false,
            allocated: true,
            encoded: false,
            offset: Some(range.start),
        };
        if !want_zero || self.kind != FileKind::Regular {
            return Ok(status);
        }
        if let Some(len) = self.known_data(&range) {
            status.len = len;
            return Ok(status);
        }
        let found = self.file()?.extent_at(range.start, range.end).await?;
        status.len = found.len.clamp(1, len);
        if found.kind == ExtentKind::Data {
            *locked(&self.data_seen) = range.start..range.start + status.len;
        } else {
            (status.data, status.zero) = (false, true);
        }
        Ok(status)
    }

    /// Changes the permissions behind the image locks; the calls may sleep, so they run on the blocking pool.
    async fn lock_prepare(&self, used: u8, shared: u8) -> Result<(), Error> {
        let shared = if self.config.force_share {
            perm::ALL
        } else {
            shared
        };
        let lock = self.lock.clone();
        let prepare = move || match locked(&lock).as_mut() {
            Some(lock) => lock.prepare(LockPerms::from_bits(used), LockPerms::from_bits(shared)),
            None => Ok(()),
        };
        Core::current().blocking(prepare).await
    }

    async fn resize(&self, size: u64, prealloc: Preallocation) -> Result<(), Error> {
        let prealloc = prealloc_mode(prealloc)?;
        *locked(&self.data_seen) = 0..0;
        // A device only has to be large enough.
        self.file()?.set_size(size, false, prealloc).await?;
        let now = self.file()?.size().await?;
        self.size.store(now, Ordering::Relaxed);
        *locked(&self.data_seen) = 0..0;
        Ok(())
    }
}

/// The host's way to preallocate. A file has no metadata of its own to preallocate.
fn prealloc_mode(p: Preallocation) -> Result<Prealloc, Error> {
    match p {
        Preallocation::Off => Ok(Prealloc::Off),
        Preallocation::Falloc => Ok(Prealloc::Falloc),
        Preallocation::Full => Ok(Prealloc::Full),
        Preallocation::Metadata => Err(Error::new(
            Errno::ENOTSUP,
            "Unsupported preallocation mode 'metadata'",
        )),
    }
}

/// Lengths are kept in whole sectors of 512 bytes; what the file lacks reads as zeroes (reference, part 5 item 14).
fn whole_sectors(len: u64) -> u64 {
    len.checked_next_multiple_of(512).unwrap_or(len)
}

impl Driver for FileDriver {
    fn name(&self) -> &'static str {
        if self.config.device { "host_device" } else { "file" }
    }

    fn size(&self) -> u64 {
        whole_sectors(self.live_size())
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn kind(&self) -> Kind<'_> {
        Kind::Leaf(self.leaf())
    }

    fn submit(&self, req: Request) -> LocalFuture<'_, (Result<(), Errno>, Request)> {
        Box::pin(async move {
            let done = match req.op {
                Op::WriteZeroes => self.zeroes(&req).await,
                Op::Discard => self.discard(&req).await,
                Op::Flush => self.flush().await,
                // The ring moves the data of a leaf; nobody asks the driver.
                Op::Read | Op::Write => Err(Errno::ENOTSUP),
            };
            (done, req)
        })
    }

    fn status(&self, range: Range<u64>, want_zero: bool) -> LocalFuture<'_, Result<Status, Errno>> {
        Box::pin(self.extent(range, want_zero))
    }

    fn truncate(&self, size: u64, prealloc: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.resize(size, prealloc))
    }

    fn set_perm_prepare(&self, used: u8, shared: u8) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            if used & WRITERS != 0 && !self.can_write() {
                if self.config.read_only {
                    return Err(Error::new(Errno::EACCES, "Block node is read-only"));
                }
                let again = self.file()?.reopen(true, self.config.direct).await?;
                *locked(&self.pending) = Some(again);
            }
            let taken = self.lock_prepare(used, shared).await;
            match taken {
                Ok(()) => self.pending_perm.store(used, Ordering::Relaxed),
                Err(_) => *locked(&self.pending) = None,
            }
            taken
        })
    }

    fn set_perm_commit(&self) {
        if let Some(file) = locked(&self.pending).take() {
            // Only the graph's core gets here, and only while there is none yet.
            let _ = self.writable.set(Leaf::File(file));
        }
        if let Some(lock) = locked(&self.lock).as_mut() {
            lock.commit();
        }
        let growing = self.pending_perm.load(Ordering::Relaxed) & perm::RESIZE != 0;
        // The length as it is when the last one that may change it leaves.
        self.live_size();
        self.growing.store(growing, Ordering::Relaxed);
    }

    fn set_perm_abort(&self) {
        *locked(&self.pending) = None;
        if let Some(lock) = locked(&self.lock).as_mut() {
            lock.abort();
        }
    }

    fn filename(&self) -> String {
        self.config.filename.to_string_lossy().into_owned()
    }

    fn close(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            let lock = self.lock.clone();
            Core::current().blocking(move || drop(locked(&lock).take())).await;
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Creates a regular file of `size` bytes, or checks that a device is large enough.
///
/// An existing file is emptied, after the locks have told that nobody uses it.
pub async fn create(path: &Path, size: u64, prealloc: Preallocation) -> Result<(), Error> {
    let prealloc = prealloc_mode(prealloc)?;
    let file = File::create(path).await?;
    let Some(host) = file.host() else {
        return file.set_size(size, true, prealloc).await;
    };
    let fd = host.try_clone_fd()?;
    let regular = host.kind() == FileKind::Regular;
    let lock = move || {
        let mut lock = ImageLock::new(fd, Locking::Auto)?;
        let used = LockPerms::from_bits(perm::WRITE | perm::RESIZE);
        lock.prepare(used, LockPerms::from_bits(perm::ALL & !perm::RESIZE))?;
        lock.commit();
        Ok::<_, Error>(lock)
    };
    let held = Core::current().blocking(lock).await?;
    let mut done = Ok(());
    if regular {
        done = file.set_size(0, true, Prealloc::Off).await;
    }
    if done.is_ok() {
        done = file.set_size(size, false, prealloc).await;
    }
    drop(held);
    done
}
