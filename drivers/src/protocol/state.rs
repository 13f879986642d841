//! What a `file` node is made of: its descriptors, locks, length, and what it knows about the content.
//!
//! Invariants:
//! - A descriptor once in the table stays until the node is closed: requests in flight on it are never disturbed.
//! - `current` names a descriptor that is in the table.
//!
//! ```text
//! leaves[direct | writable]: ┌ page cache, read ┬ page cache, read-write ┬ direct, read ┬ direct, read-write ┐
//!                            └──────▲───────────┴────────────────────────┴──────────────┴────────────────────┘
//!                                current ── switched when permissions or options change, roots drained or not
//! ```

use super::file::FileConfig;
use super::zero::ZeroOps;
use ringblock_engine::core::Core;
use ringblock_engine::driver::{Leaf, Limits, Preallocation, Request, Status, perm};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::host::linux::extent::ExtentKind;
use ringblock_engine::host::linux::lock::{ImageLock, LockPerms};
use ringblock_engine::host::linux::open::FileKind;
use ringblock_engine::host::linux::resize::Prealloc;
use ringblock_engine::host::{Access, File, OpenOptions};
use ringblock_engine::mutant;
use ringblock_engine::timer::Sleep;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// How often, and how long apart, a refused image lock is asked for again: 300 ms in all.
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE_NS: u64 = 30_000_000;

/// Bit of a descriptor's place that says it can write.
pub(super) const WRITABLE: usize = 1;
/// Bit of a descriptor's place that says it bypasses the page cache.
pub(super) const DIRECT: usize = 2;

/// The options that can change while the node exists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mode {
    pub(super) read_only: bool,
    pub(super) auto_read_only: bool,
    pub(super) direct: bool,
    pub(super) force_share: bool,
}

impl Mode {
    pub(super) fn of(config: &FileConfig) -> Mode {
        Mode {
            read_only: config.read_only,
            auto_read_only: config.auto_read_only,
            direct: config.direct,
            force_share: config.force_share,
        }
    }

    /// Whether the node holds a writable descriptor even without a writer.
    pub(super) fn writable_at_rest(&self) -> bool {
        !self.read_only && !self.auto_read_only
    }

    pub(super) fn place(&self, writable: bool) -> usize {
        (if writable { WRITABLE } else { 0 }) | (if self.direct { DIRECT } else { 0 })
    }
}

/// A descriptor that is opened and not in the table yet, with its place.
pub(super) type Pending = (usize, Leaf, Limits);

/// Remembers the first failed flush for ever: what the kernel could not write then may be gone from its cache, and a
/// later success would not mean that it is on the disk.
#[derive(Default)]
struct Latch(AtomicI32);

impl Latch {
    fn check(&self) -> Result<(), Errno> {
        match self.0.load(Ordering::Acquire) {
            0 => Ok(()),
            e => Err(Errno(e)),
        }
    }

    /// The result of a flush, unless another one has failed meanwhile.
    fn note(&self, done: Result<(), Errno>) -> Result<(), Errno> {
        if let Some(e) = done.err().filter(|_| !mutant!("sticky-file-flush")) {
            let _ = self.0.compare_exchange(0, e.0, Ordering::AcqRel, Ordering::Acquire);
        }
        done.and(self.check())
    }
}

/// See the module.
pub(super) struct State {
    pub(super) config: FileConfig,
    pub(super) kind: FileKind,
    leaves: [OnceLock<(Leaf, Limits)>; 4],
    current: AtomicUsize,
    pub(super) mode: Mutex<Mode>,
    /// `None` in the simulator and after close. Only the graph changes it, one change at a time.
    pub(super) lock: Arc<Mutex<Option<ImageLock>>>,
    zero: ZeroOps,
    /// Length as last seen, for nodes whose length nobody may change.
    size: AtomicU64,
    growing: AtomicBool,
    flushed: Latch,
    /// A range last seen to be data. Writing cannot change that; zeroing, discarding and shrinking can.
    data_seen: Mutex<Range<u64>>,
}

/// A lock whose holder never panics while the value is half changed.
pub(super) fn locked<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// The limits of a descriptor.
fn limits_of(file: &File) -> Result<Limits, Error> {
    let host = file.limits();
    if host.memory_align > 4096 {
        let text = format!("Memory alignment of {} bytes is not supported", host.memory_align);
        return Err(Error::new(Errno::ENOTSUP, text));
    }
    Ok(Limits {
        request_alignment: host.request_align.max(1),
        memory_alignment: host.memory_align.max(1),
        ..Limits::default()
    })
}

impl State {
    /// Opens the file. No locks are taken before somebody asks for permissions.
    pub(super) async fn open(config: FileConfig) -> Result<State, Error> {
        if config.force_share && !config.read_only {
            return Err(Error::invalid("force-share=on can only be used with read-only images"));
        }
        let mode = Mode::of(&config);
        let writable = mode.writable_at_rest();
        let access = if writable { Access::ReadWrite } else { Access::ReadOnly };
        let opts = OpenOptions { expect: config.expect(), access, direct: config.direct };
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
        let limits = limits_of(&file)?;
        let state = State {
            config,
            kind,
            leaves: Default::default(),
            current: AtomicUsize::new(mode.place(writable)),
            mode: Mutex::new(mode),
            lock: Arc::new(Mutex::new(lock)),
            zero: ZeroOps::new(kind),
            size: AtomicU64::new(size),
            growing: AtomicBool::new(false),
            flushed: Latch::default(),
            data_seen: Mutex::new(0..0),
        };
        state.adopt((mode.place(writable), Leaf::File(file), limits));
        Ok(state)
    }

    #[inline]
    fn here(&self) -> Option<&(Leaf, Limits)> {
        self.leaves.get(self.current.load(Ordering::Acquire))?.get()
    }

    /// The descriptor in use.
    #[inline]
    pub(super) fn leaf(&self) -> &Leaf {
        /// What the invariant excludes: a leaf that stores nothing and takes no time.
        static NOTHING: Leaf = Leaf::Null { read_zeroes: false, latency_ns: 0 };
        debug_assert!(self.here().is_some());
        self.here().map_or(&NOTHING, |(leaf, _)| leaf)
    }

    pub(super) fn limits(&self) -> Limits {
        self.here().map(|(_, limits)| *limits).unwrap_or_default()
    }

    pub(super) fn file(&self) -> Result<&File, Errno> {
        match self.leaf() {
            Leaf::File(file) => Ok(file),
            Leaf::Null { .. } => Err(Errno::EBADF),
        }
    }

    pub(super) fn place(&self) -> usize {
        self.current.load(Ordering::Acquire)
    }

    /// Opens the descriptor of a place, if it is not there yet.
    pub(super) async fn prepare(&self, place: usize) -> Result<Option<Pending>, Error> {
        if self.leaves.get(place).is_some_and(|l| l.get().is_some()) {
            return Ok(None);
        }
        let file = self.file()?.reopen(place & WRITABLE != 0, place & DIRECT != 0).await?;
        let limits = limits_of(&file)?;
        Ok(Some((place, Leaf::File(file), limits)))
    }

    /// Puts a descriptor into the table. One that is there already stays.
    pub(super) fn adopt(&self, (place, leaf, limits): Pending) {
        if let Some(entry) = self.leaves.get(place) {
            let _ = entry.set((leaf, limits));
        }
    }

    /// Uses the descriptor of a place from now on, if there is one.
    pub(super) fn switch(&self, place: usize) {
        if self.leaves.get(place).is_some_and(|l| l.get().is_some()) {
            self.current.store(place, Ordering::Release);
        }
    }

    pub(super) async fn zeroes(&self, req: &Request) -> Result<(), Errno> {
        let end = req.offset.checked_add(req.len).ok_or(Errno::EINVAL)?;
        self.forget_data(req.offset..end);
        let done = self.zero.write_zeroes(self.file()?, req.offset..end, self.live_size(), req.flags).await;
        // Again: a status query may have come between.
        self.forget_data(req.offset..end);
        done
    }

    pub(super) async fn discard(&self, req: &Request) -> Result<(), Errno> {
        let end = req.offset.checked_add(req.len).ok_or(Errno::EINVAL)?;
        self.forget_data(req.offset..end);
        let done = self.zero.discard(self.file()?, req.offset..end).await;
        self.forget_data(req.offset..end);
        done
    }

    pub(super) async fn flush(&self) -> Result<(), Errno> {
        self.flushed.check()?;
        self.flushed.note(self.file()?.fdatasync().await)
    }

    /// The length of the file now; format drivers make it longer by writing past its end.
    pub(super) fn live_size(&self) -> u64 {
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

    /// Says whether somebody may change the length from now on.
    pub(super) fn set_growing(&self, growing: bool) {
        // The length as it is when the last one that may change it leaves.
        self.live_size();
        self.growing.store(growing, Ordering::Relaxed);
    }

    fn forget_data(&self, range: Range<u64>) {
        let mut seen = locked(&self.data_seen);
        if seen.start < range.end && range.start < seen.end {
            *seen = 0..0;
        }
    }

    fn known_data(&self, range: &Range<u64>) -> Option<u64> {
        let seen = locked(&self.data_seen);
        seen.contains(&range.start).then(|| seen.end.min(range.end) - range.start)
    }

    pub(super) async fn extent(&self, range: Range<u64>, want_zero: bool) -> Result<Status, Errno> {
        let len = range.end.checked_sub(range.start).filter(|n| *n > 0).ok_or(Errno::EINVAL)?;
        let offset = Some(range.start);
        let mut status = Status { len, data: true, zero: false, allocated: true, encoded: false, offset };
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
    ///
    /// A process that was killed keeps its locks until the kernel has let go of its ring's files, some milliseconds
    /// later. Whoever restarts it at once must not be turned away, so a refusal is believed only after a while.
    pub(super) async fn lock_prepare(&self, used: u8, shared: u8) -> Result<(), Error> {
        let shared = if locked(&self.mode).force_share { perm::ALL } else { shared };
        let mut tries = 0;
        loop {
            let lock = self.lock.clone();
            let prepare = move || match locked(&lock).as_mut() {
                Some(lock) => lock.prepare(LockPerms::from_bits(used), LockPerms::from_bits(shared)),
                None => Ok(()),
            };
            let done = Core::current().blocking(prepare).await;
            if done.is_ok() || tries == LOCK_TRIES {
                return done;
            }
            tries += 1;
            Sleep::ns(LOCK_PAUSE_NS).await;
        }
    }

    pub(super) async fn resize(&self, size: u64, prealloc: Preallocation) -> Result<(), Error> {
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
pub(super) fn prealloc_mode(p: Preallocation) -> Result<Prealloc, Error> {
    match p {
        Preallocation::Off => Ok(Prealloc::Off),
        Preallocation::Falloc => Ok(Prealloc::Falloc),
        Preallocation::Full => Ok(Prealloc::Full),
        Preallocation::Metadata => {
            Err(Error::new(Errno::ENOTSUP, "Unsupported preallocation mode: metadata"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: after a failed flush none succeeds, and all tell the first error. Method: success, two failures, success.
    #[test]
    fn a_failed_flush_stays_failed() {
        let l = Latch::default();
        assert_eq!((l.check(), l.note(Ok(()))), (Ok(()), Ok(())));
        assert_eq!(l.note(Err(Errno::EIO)), Err(Errno::EIO));
        assert_eq!(l.note(Err(Errno::ENOSPC)), Err(Errno::ENOSPC));
        assert_eq!((l.check(), l.note(Ok(()))), (Err(Errno::EIO), Err(Errno::EIO)));
    }

    /// Goal: each mode has a place of its own, and the writable one is one bit away.
    #[test]
    fn places() {
        let mode = |direct| Mode { read_only: false, auto_read_only: true, direct, force_share: false };
        let all = [
            mode(false).place(false),
            mode(false).place(true),
            mode(true).place(false),
            mode(true).place(true),
        ];
        assert_eq!(all, [0, WRITABLE, DIRECT, DIRECT | WRITABLE]);
    }
}
