//! Changing the length of a file, with or without space set aside.
//!
//! A failed growth puts the old length back, so the caller sees all or nothing.

use super::open::FileKind;
use super::sys::{check, off, retry};
use crate::error::{Errno, Error};
use std::os::fd::{AsRawFd, BorrowedFd};

/// What to do with the space that a file grows by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Prealloc {
    /// Leave a hole.
    #[default]
    Off,
    /// Reserve blocks without writing them (fallocate).
    Falloc,
    /// Write zeroes.
    Full,
}

impl Prealloc {
    /// The name in options.
    pub fn name(self) -> &'static str {
        match self {
            Prealloc::Off => "off",
            Prealloc::Falloc => "falloc",
            Prealloc::Full => "full",
        }
    }
}

/// Sets the length of an open file to `new` bytes.
///
/// A device cannot change: with `exact` any other size fails, without it only a larger one does.
pub fn set_size(fd: BorrowedFd<'_>, kind: FileKind, new: u64, exact: bool, p: Prealloc) -> Result<(), Error> {
    let old = super::open::size(fd, kind).map_err(|e| Error::io(e, "Could not inquire current size"))?;
    if kind != FileKind::Regular {
        return device_size(old, new, exact, p);
    }
    if p != Prealloc::Off && new < old {
        return Err(Error::new(Errno::ENOTSUP, "Preallocation can't be used for shrinking files"));
    }
    if new == old {
        return Ok(());
    }
    let done = match p {
        Prealloc::Off => truncate(fd, new).map_err(|e| Error::io(e, "Could not resize file")),
        Prealloc::Falloc => allocate(fd, old, new - old)
            .map_err(|e| Error::io(e, "Could not preallocate data for the new file")),
        Prealloc::Full => {
            truncate(fd, new).map_err(|e| Error::io(e, "Failed to resize file")).and_then(|()| {
                write_zeroes(fd, old, new)
                    .map_err(|e| Error::io(e, "Could not write zeros for preallocation"))
            })
        }
    };
    if done.is_err() {
        // The first error is what matters; if putting the length back fails as well the file is merely longer.
        let _ = truncate(fd, old);
    }
    done
}

fn device_size(old: u64, new: u64, exact: bool, p: Prealloc) -> Result<(), Error> {
    if p != Prealloc::Off {
        let text = format!("Preallocation mode '{}' unsupported for this non-regular file", p.name());
        return Err(Error::new(Errno::ENOTSUP, text));
    }
    if new != old && exact {
        return Err(Error::new(Errno::ENOTSUP, "Cannot resize device files"));
    }
    if new > old {
        return Err(Error::invalid("Cannot grow device files"));
    }
    Ok(())
}

fn truncate(fd: BorrowedFd<'_>, len: u64) -> Result<(), Errno> {
    let len = off(len)?;
    // SAFETY: ftruncate takes no pointer.
    retry(|| unsafe { libc::ftruncate64(fd.as_raw_fd(), len) }).map(drop)
}

/// Reserves blocks; posix_fallocate(3) writes where the file system cannot reserve.
fn allocate(fd: BorrowedFd<'_>, at: u64, len: u64) -> Result<(), Errno> {
    let (at, len) = (off(at)?, off(len)?);
    loop {
        // SAFETY: posix_fallocate takes no pointer; it returns the error number itself.
        match unsafe { libc::posix_fallocate64(fd.as_raw_fd(), at, len) } {
            0 => return Ok(()),
            libc::EINTR => {}
            e => return Err(Errno(e)),
        }
    }
}

/// Writes zeroes over `from..to` and makes them durable: a space reservation that a crash forgets is none.
fn write_zeroes(fd: BorrowedFd<'_>, from: u64, to: u64) -> Result<(), Errno> {
    const CHUNK: usize = 1 << 20;
    let buf = AlignedZeroes::<CHUNK>::new();
    let mut at = from;
    while at < to {
        let n = usize::try_from(to - at).unwrap_or(CHUNK).min(CHUNK);
        let pos = off(at)?;
        // SAFETY: the buffer holds CHUNK >= n initialised bytes and lives across the call.
        let res = unsafe { libc::pwrite64(fd.as_raw_fd(), buf.bytes().as_ptr().cast(), n, pos) };
        match u64::try_from(res) {
            Ok(0) => return Err(Errno::ENOSPC),
            Ok(done) => at += done,
            Err(_) => match super::sys::last() {
                Errno::EINTR => {}
                e => return Err(e),
            },
        }
    }
    // SAFETY: fdatasync takes no pointer.
    check(unsafe { libc::fdatasync(fd.as_raw_fd()) }).map(drop)
}

/// `N` zero bytes at a 4096-byte boundary, for `O_DIRECT`.
struct AlignedZeroes<const N: usize> {
    bytes: Vec<u8>,
    start: usize,
}

impl<const N: usize> AlignedZeroes<N> {
    fn new() -> Self {
        let bytes = vec![0u8; N + 4096];
        let start = bytes.as_ptr().align_offset(4096).min(4096);
        AlignedZeroes { bytes, start }
    }
    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + N]
    }
}

#[cfg(test)]
mod tests {
    use super::super::open::{Access, Expect, HostFile, OpenOptions, open};
    use super::super::sys::testdir::TestDir;
    use super::*;
    use std::os::fd::AsFd;

    fn rw(t: &TestDir, len: u64) -> HostFile {
        let o = OpenOptions { expect: Expect::Regular, access: Access::ReadWrite, direct: false };
        open(&t.file("f", len), o).expect("open")
    }

    /// Goal: each mode gives the length asked for and the allocation it promises. Method: st_blocks afterwards.
    #[test]
    fn modes_allocate_as_promised() {
        for (mode, least) in [(Prealloc::Off, 0), (Prealloc::Falloc, 3 << 20), (Prealloc::Full, 3 << 20)] {
            let t = TestDir::new();
            let f = rw(&t, 1000);
            set_size(f.as_fd(), f.kind(), (3 << 20) + 1000, true, mode).expect("grow");
            assert_eq!(f.size(), Ok((3 << 20) + 1000));
            let got = f.allocated_size().expect("stat");
            assert!(got >= least && (mode != Prealloc::Off || got < 1 << 20), "{mode:?}: {got}");
        }
    }

    /// Goal: impossible changes are refused and change nothing.
    #[test]
    fn refuses_and_restores() {
        let t = TestDir::new();
        let f = rw(&t, 4096);
        let e = set_size(f.as_fd(), f.kind(), 10, true, Prealloc::Full).expect_err("shrink");
        assert_eq!(e.message, "Preallocation can't be used for shrinking files");
        assert!(set_size(f.as_fd(), f.kind(), u64::MAX, true, Prealloc::Off).is_err());
        assert!(set_size(f.as_fd(), f.kind(), 1 << 60, true, Prealloc::Falloc).is_err());
        assert_eq!(f.size(), Ok(4096));
        assert_eq!(
            device_size(0, 5, false, Prealloc::Off).expect_err("grow").message,
            "Cannot grow device files"
        );
        assert_eq!(
            device_size(9, 5, true, Prealloc::Off).expect_err("set").message,
            "Cannot resize device files"
        );
        assert!(device_size(9, 5, false, Prealloc::Off).is_ok());
    }
}
