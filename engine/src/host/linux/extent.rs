//! Which parts of a file hold data: `SEEK_DATA` and `SEEK_HOLE`.
//!
//! The answer is a snapshot: a writer may change it at once. A hole reads as zeroes; "data" may still be zeroes.
//!
//! ```text
//! file  |data----|hole------|data--| end of file
//! ask        ^from         ^to     → Data 4, then Hole, …; past the end → Beyond
//! ```

use super::sys::{last, off};
use crate::error::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What a stretch of a file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExtentKind {
    /// Backed by storage, or not known to be a hole.
    Data,
    /// A hole: reads as zeroes, takes no space.
    Hole,
    /// Past the end of the file.
    Beyond,
}

/// A stretch of a file from the offset asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// What it is.
    pub kind: ExtentKind,
    /// Length in bytes, at least 1, at most what was asked for.
    pub len: u64,
}

/// The extent that begins at `from`, no longer than up to `to`.
///
/// File systems and devices that cannot tell answer "data". `from >= to` is `EINVAL`.
pub fn extent_at(fd: BorrowedFd<'_>, from: u64, to: u64) -> Result<Extent, Errno> {
    if from >= to {
        return Err(Errno::EINVAL);
    }
    let cut = |kind, end: u64| Extent { kind, len: end.min(to).saturating_sub(from).max(1) };
    let all_data = Ok(cut(ExtentKind::Data, to));
    match seek(fd, from, libc::SEEK_DATA) {
        // From here on there is no data: a last hole, or past the end.
        Err(Errno::ENXIO) => tail(fd, from, to, cut),
        Err(Errno::EINVAL | Errno::ENOTSUP) => all_data,
        Err(e) => Err(e),
        Ok(data) if data > from => Ok(cut(ExtentKind::Hole, data)),
        Ok(_) => match seek(fd, from, libc::SEEK_HOLE) {
            Ok(hole) if hole > from => Ok(cut(ExtentKind::Data, hole)),
            // Punched or truncated between the two calls: "data" is always a safe answer.
            Ok(_) | Err(Errno::ENXIO | Errno::EINVAL | Errno::ENOTSUP) => all_data,
            Err(e) => Err(e),
        },
    }
}

fn tail(
    fd: BorrowedFd<'_>,
    from: u64,
    to: u64,
    cut: impl Fn(ExtentKind, u64) -> Extent,
) -> Result<Extent, Errno> {
    let end = seek(fd, 0, libc::SEEK_END)?;
    Ok(if from >= end { cut(ExtentKind::Beyond, to) } else { cut(ExtentKind::Hole, end) })
}

/// lseek moves the position of the open file description; nobody here reads or writes at that position.
fn seek(fd: BorrowedFd<'_>, at: u64, whence: libc::c_int) -> Result<u64, Errno> {
    let at = off(at)?;
    loop {
        // SAFETY: lseek takes no pointer.
        let res = unsafe { libc::lseek64(fd.as_raw_fd(), at, whence) };
        match u64::try_from(res) {
            Ok(v) => return Ok(v),
            Err(_) => match last() {
                Errno::EINTR => {}
                e => return Err(e),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sys::testdir::TestDir;
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    /// Goal: the walk covers the file exactly and finds data where it was written. Method: a sparse file with one
    /// 64 KiB block of data in the middle, walked in one go and from odd offsets.
    #[test]
    fn walks_a_sparse_file() {
        let t = TestDir::new();
        let f = std::fs::OpenOptions::new().read(true).write(true).open(t.file("s", 1 << 20)).expect("open");
        f.write_all_at(&[7; 65536], 524288).expect("write");
        let mut at = 0;
        let mut seen = Vec::new();
        while at < 2 << 20 {
            let e = extent_at(f.as_fd(), at, 2 << 20).expect("extent");
            seen.push((at, e.kind, e.len));
            at += e.len;
        }
        assert_eq!(
            seen,
            [
                (0, ExtentKind::Hole, 524288),
                (524288, ExtentKind::Data, 65536),
                (589824, ExtentKind::Hole, 458752),
                (1 << 20, ExtentKind::Beyond, 1 << 20)
            ]
        );
        let e = extent_at(f.as_fd(), 524288 + 100, 524288 + 300).expect("extent");
        assert_eq!(e, Extent { kind: ExtentKind::Data, len: 200 });
        assert_eq!(extent_at(f.as_fd(), 5, 5), Err(Errno::EINVAL));
    }

    /// Goal: descriptors that cannot seek for data say "data". Method: a character device.
    #[test]
    fn unknown_is_data() {
        let f = std::fs::File::open("/dev/zero").expect("open");
        let e = extent_at(f.as_fd(), 0, 4096);
        assert!(matches!(
            e,
            Ok(Extent { kind: ExtentKind::Data, len: 4096 }) | Ok(Extent { kind: ExtentKind::Beyond, .. })
        ));
    }
}
