//! What a file or device wants and can do: alignment for `O_DIRECT`, block sizes, discard.
//!
//! Whether holes can be punched or ranges zeroed depends on the file system and is not told in advance: it is
//! learnt at the first use and remembered in [`Capabilities`].
//!
//! ```text
//! statx(DIOALIGN) ─► device: BLKSSZGET ─► XFS: DIOINFO ─► trial reads ─► 4096
//! ```

use super::open::{FileKind, HostFile};
use super::sys::{retry, retry_fd};
use crate::error::Errno;
use std::os::fd::AsFd;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, Ordering};

/// The largest alignment that is believed; anything above is a kernel or device fault.
pub const MAX_ALIGN: u32 = 64 * 1024;

/// The limits of one descriptor, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostLimits {
    /// Offset and length of requests must be a multiple of this (1 with the page cache).
    pub request_align: u32,
    /// Buffers must start at a multiple of this.
    pub memory_align: u32,
    /// Sector size that avoids read-modify-write inside the device, or the file system's block size.
    pub physical_block: u32,
    /// Discards are only useful at multiples of this; `None` if the device does not discard.
    pub discard_granularity: Option<u32>,
}

/// An optional operation of the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostOp {
    /// `FALLOC_FL_PUNCH_HOLE`: deallocate, reads zero.
    PunchHole,
    /// `FALLOC_FL_ZERO_RANGE`: zero, stay allocated.
    ZeroRange,
    /// Plain `fallocate`: allocate.
    Allocate,
}

/// Which optional operations work, learnt as they are used. Shared by all cores.
#[derive(Debug, Default)]
pub struct Capabilities {
    refused: AtomicU8,
}

impl Capabilities {
    /// False once the operation has been refused as unsupported: use the fallback without asking again.
    pub fn may_try(&self, op: HostOp) -> bool {
        self.refused.load(Ordering::Relaxed) & (1 << op as u8) == 0
    }

    /// Notes the result of an attempt. True if `e` means "not supported here", so that the fallback is due.
    pub fn note_error(&self, op: HostOp, e: Errno) -> bool {
        let unsupported = matches!(e, Errno::ENOTSUP | Errno::ENOSYS | Errno::ENODEV)
            // Old kernels say so for unknown fallocate modes on devices and some network file systems.
            || e == Errno(libc::ENOTTY);
        if unsupported {
            self.refused.fetch_or(1 << op as u8, Ordering::Relaxed);
        }
        unsupported
    }
}

/// Reads the limits of an open file. Never fails: what cannot be found out gets a safe value.
pub fn limits(file: &HostFile) -> HostLimits {
    let fd = file.as_fd();
    let (request_align, memory_align) = if file.direct() { direct_align(fd, file.kind()) } else { (1, 1) };
    let physical = match file.kind() {
        FileKind::Block => ioctl_u32(fd, libc::BLKPBSZGET).or_else(|| ioctl_u32(fd, libc::BLKSSZGET)),
        _ => None,
    };
    let discard_granularity = match file.kind() {
        FileKind::Regular => Some(block_size(fd)),
        FileKind::Block => sysfs_u32(file, "discard_granularity"),
        _ => None,
    };
    HostLimits {
        request_align,
        memory_align,
        physical_block: physical.filter(|v| v.is_power_of_two() && *v <= MAX_ALIGN).unwrap_or(512),
        discard_granularity: discard_granularity.filter(|v| *v > 0),
    }
}

/// (request, memory) alignment for `O_DIRECT` on this descriptor.
fn direct_align(fd: BorrowedFd<'_>, kind: FileKind) -> (u32, u32) {
    let believable = |v: &u32| v.is_power_of_two() && *v <= MAX_ALIGN;
    if let Some((offset, memory)) = statx_dio(fd).filter(|(o, m)| believable(o) && believable(m)) {
        return (offset, memory);
    }
    let sector = match kind {
        FileKind::Block => ioctl_u32(fd, libc::BLKSSZGET),
        _ => xfs_dioinfo(fd),
    };
    if let Some(s) = sector.filter(believable) {
        return (s, s.max(512));
    }
    let request = trial(fd, true).unwrap_or(4096);
    (request, trial(fd, false).unwrap_or(4096).max(512))
}

/// Linux 6.1: the kernel's own answer; `None` where the file system does not give one.
fn statx_dio(fd: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let mut st = std::mem::MaybeUninit::<libc::statx>::zeroed();
    retry(|| {
        // SAFETY: the path is an empty NUL-terminated string, the buffer is a whole statx and lives across the call.
        unsafe {
            libc::statx(
                fd.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                libc::STATX_DIOALIGN,
                st.as_mut_ptr(),
            )
        }
    })
    .ok()?;
    // SAFETY: zeroed above and filled by the call; every bit pattern is a valid statx.
    let st = unsafe { st.assume_init() };
    let told = st.stx_mask & libc::STATX_DIOALIGN != 0 && st.stx_dio_offset_align != 0;
    told.then_some((st.stx_dio_offset_align, st.stx_dio_mem_align.max(1)))
}

fn ioctl_u32(fd: BorrowedFd<'_>, request: libc::Ioctl) -> Option<u32> {
    let mut v: libc::c_int = 0;
    // SAFETY: the requests used here (BLKSSZGET, BLKPBSZGET) write one int, which lives across the call.
    retry(|| unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut v) }).ok()?;
    u32::try_from(v).ok()
}

/// `struct dioattr` of ioctl_xfs_... (xfsctl(3)): memory alignment, smallest and largest transfer.
#[repr(C)]
#[derive(Default)]
struct DioAttr {
    mem: u32,
    min_io: u32,
    max_io: u32,
}

/// `_IOR('X', 30, struct dioattr)`. Other file systems answer `ENOTTY`.
const XFS_IOC_DIOINFO: libc::Ioctl = 0x800c_581e_u32 as libc::Ioctl;

fn xfs_dioinfo(fd: BorrowedFd<'_>) -> Option<u32> {
    let mut d = DioAttr::default();
    // SAFETY: XFS_IOC_DIOINFO writes one dioattr (12 bytes), which lives across the call.
    retry(|| unsafe { libc::ioctl(fd.as_raw_fd(), XFS_IOC_DIOINFO, &raw mut d) }).ok()?;
    let _ = (d.mem, d.max_io);
    Some(d.min_io)
}

/// Finds an alignment by reading: of the offset and length with an aligned buffer, or of the buffer.
///
/// Offset 0 tells nothing about the alignment of offsets, but the length must obey it as well. An empty file tells
/// nothing at all: the read succeeds with any length on some file systems, so it is not tried.
fn trial(fd: BorrowedFd<'_>, of_request: bool) -> Option<u32> {
    const MOST: usize = MAX_ALIGN as usize;
    let mut area = vec![0u8; 3 * MOST];
    let start = area.as_ptr().align_offset(MOST);
    let mut align = if of_request { 512 } else { 1 };
    while align <= 4096 {
        let (shift, len) = if of_request { (0, align) } else { (align, MOST) };
        let at = start.checked_add(shift)?;
        let buf = area.get_mut(at..at + len)?;
        // SAFETY: `buf` is valid for writes of its whole length across the call.
        let res = unsafe { libc::pread64(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), 0) };
        if res > 0 {
            return u32::try_from(align).ok();
        }
        if res == 0 {
            return None;
        }
        align *= 2;
    }
    None
}

/// `st_blksize` through fstatvfs: the unit in which a file system can punch holes.
fn block_size(fd: BorrowedFd<'_>) -> u32 {
    let mut s = std::mem::MaybeUninit::<libc::statvfs64>::zeroed();
    // SAFETY: the buffer is a whole statvfs and lives across the call.
    let res = retry(|| unsafe { libc::fstatvfs64(fd.as_raw_fd(), s.as_mut_ptr()) });
    // SAFETY: zeroed, and filled if the call succeeded; every bit pattern is a valid statvfs.
    let s = unsafe { s.assume_init() };
    match res {
        Ok(_) => u32::try_from(s.f_bsize).ok().filter(|v| v.is_power_of_two()).unwrap_or(4096),
        Err(_) => 4096,
    }
}

/// A number of the request queue of a block device (of the whole disk, for a partition).
fn sysfs_u32(file: &HostFile, name: &str) -> Option<u32> {
    let dev = file.identity().rdev;
    let base = format!("/sys/dev/block/{}:{}", libc::major(dev), libc::minor(dev));
    ["queue", "../queue"]
        .iter()
        .find_map(|q| std::fs::read_to_string(format!("{base}/{q}/{name}")).ok()?.trim().parse().ok())
}

/// `_IO(0x12, 119)`: discard a range given as two u64, offset and length.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Tells a block device that a range is not needed. Multiples of 512. `ENOTSUP` if it cannot discard.
pub fn discard_device(file: &HostFile, at: u64, len: u64) -> Result<(), Errno> {
    let range = [at, len];
    // SAFETY: BLKDISCARD reads two u64 through the pointer, which live across the call.
    match retry(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) }) {
        Err(Errno(libc::ENOTTY)) => Err(Errno::ENOTSUP),
        done => done.map(drop),
    }
}

/// Drops the clean cached pages of a file (`drop-cache`, `invalidate`): `fdatasync`, then `POSIX_FADV_DONTNEED`.
pub fn drop_cache(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: fdatasync takes no pointer.
    retry(|| unsafe { libc::fdatasync(fd.as_raw_fd()) })?;
    // SAFETY: posix_fadvise takes no pointer; it returns the error number itself.
    match unsafe { libc::posix_fadvise64(fd.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        e => Err(Errno(e)),
    }
}

/// Whether any page of the first `len` bytes of a file is in the page cache (`x-check-cache-dropped`).
pub fn is_cached(fd: BorrowedFd<'_>, len: u64) -> Result<bool, Errno> {
    /// Pages are looked at through a window of this many bytes, so that memory stays bounded.
    const WINDOW: u64 = 128 << 20;
    let page = 4096usize;
    let mut at = 0;
    while at < len {
        let n = (len - at).min(WINDOW);
        if Mapping::new(fd, at, usize::try_from(n).map_err(|_| Errno::EFBIG)?)?.any_resident(page)? {
            return Ok(true);
        }
        at += n;
    }
    Ok(false)
}

/// A read-only mapping that is never dereferenced, only asked about.
struct Mapping {
    addr: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, at: u64, len: usize) -> Result<Mapping, Errno> {
        let at = super::sys::off(at)?;
        // SAFETY: a fresh shared read-only mapping at an address the kernel chooses; nothing refers to it yet.
        let addr = unsafe {
            libc::mmap64(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, fd.as_raw_fd(), at)
        };
        if addr == libc::MAP_FAILED { Err(super::sys::last()) } else { Ok(Mapping { addr, len }) }
    }

    fn any_resident(&self, page: usize) -> Result<bool, Errno> {
        let mut vec = vec![0u8; self.len.div_ceil(page)];
        // SAFETY: the mapping is live and `vec` has one byte for each of its pages.
        retry(|| unsafe { libc::mincore(self.addr, self.len, vec.as_mut_ptr()) })?;
        Ok(vec.iter().any(|v| v & 1 != 0))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length and is not used any more.
        unsafe { libc::munmap(self.addr, self.len) };
    }
}

/// A memory file descriptor of the given size, for tests and for scratch space.
pub fn memory_file(name: &std::ffi::CStr, len: u64) -> Result<std::os::fd::OwnedFd, Errno> {
    // SAFETY: the name is NUL-terminated and lives across the call.
    let fd = retry_fd(|| unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) })?;
    let len = super::sys::off(len)?;
    // SAFETY: ftruncate takes no pointer.
    retry(|| unsafe { libc::ftruncate64(fd.as_raw_fd(), len) })?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::super::open::{Access, Expect, OpenOptions, open};
    use super::super::sys::testdir::TestDir;
    use super::*;

    fn opened(t: &TestDir, direct: bool) -> HostFile {
        let p = t.path("f");
        std::fs::write(&p, vec![1u8; 1 << 20]).expect("write");
        open(&p, OpenOptions { expect: Expect::Regular, access: Access::ReadWrite, direct }).expect("open")
    }

    /// Goal: the probed alignment really works for O_DIRECT. Method: read at exactly that alignment.
    #[test]
    fn direct_alignment_is_usable() {
        let t = TestDir::new();
        let f = opened(&t, true);
        let l = limits(&f);
        assert!(l.request_align.is_power_of_two() && l.memory_align.is_power_of_two(), "{l:?}");
        let (r, m) = (l.request_align as usize, l.memory_align as usize);
        let mut area = vec![0u8; r + 2 * MAX_ALIGN as usize];
        let at = area.as_ptr().align_offset(MAX_ALIGN as usize) + m;
        let buf = &mut area[at..at + r];
        // SAFETY: `buf` is valid for writes of its whole length across the call.
        let n = unsafe { libc::pread64(f.as_raw_fd(), buf.as_mut_ptr().cast(), r, r as i64) };
        assert_eq!(n, r as isize);
        let tried = trial(f.as_fd(), true).expect("trial reads");
        assert!(tried <= 4096, "{tried}");
    }

    /// Goal: with the page cache any byte range is fine; punching granularity is the file system's block.
    #[test]
    fn page_cache_has_no_alignment() {
        let t = TestDir::new();
        let l = limits(&opened(&t, false));
        assert_eq!((l.request_align, l.memory_align), (1, 1));
        assert!(l.discard_granularity.is_some_and(u32::is_power_of_two));
    }

    /// Goal: "unsupported" is remembered per operation, other errors are not.
    #[test]
    fn refusals_are_remembered() {
        let c = Capabilities::default();
        assert!(!c.note_error(HostOp::PunchHole, Errno::ENOSPC));
        assert!(c.may_try(HostOp::PunchHole));
        assert!(c.note_error(HostOp::ZeroRange, Errno::ENOTSUP));
        assert!(!c.may_try(HostOp::ZeroRange));
        assert!(c.may_try(HostOp::PunchHole) && c.may_try(HostOp::Allocate));
    }

    /// Goal: a file just written is cached. Method: mincore; an empty one is not.
    #[test]
    fn residency() {
        let t = TestDir::new();
        let f = opened(&t, false);
        assert_eq!(is_cached(f.as_fd(), 1 << 20), Ok(true));
        assert_eq!(drop_cache(f.as_fd()), Ok(()));
        let m = memory_file(c"m", 1 << 20).expect("memfd");
        assert_eq!(is_cached(m.as_fd(), 1 << 20), Ok(false));
    }
}
