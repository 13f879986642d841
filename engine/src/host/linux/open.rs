//! Opening image files and devices.
//!
//! Invariants:
//! - A path is only opened for use once its type is known, so that a FIFO never blocks the caller and a tape or a
//!   tty is not touched by accident.
//! - A second descriptor for an open file ([`HostFile::reopen`]) always names the same inode, also when the path
//!   has been renamed or replaced since.
//! - Every descriptor has `O_CLOEXEC`.
//!
//! ```text
//! path ─ O_PATH ─ fstat ─ type as wanted? ─ open(mode) ─ fstat ─ same inode? ─► HostFile ─ reopen(mode) ─► HostFile
//! ```

use super::sys::{cstr, retry, retry_fd};
use crate::error::{Errno, Error};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What a descriptor refers to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
    /// A character device.
    Char,
    /// Anything else (directory, socket, FIFO): never handed out by [`open`].
    Other,
}

/// The kind of file a driver works on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expect {
    /// The `file` driver: a regular file.
    Regular,
    /// The `host_device` driver: a block or character device.
    Device,
    /// Either of the two (tools that choose the driver by what they find).
    Any,
}

/// How to open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// `O_RDONLY`.
    ReadOnly,
    /// `O_RDWR`, or an error.
    ReadWrite,
    /// `O_RDWR`, and `O_RDONLY` where permissions or a read-only file system or device forbid that.
    Auto,
}

/// Options of [`open`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenOptions {
    /// What the path must name.
    pub expect: Expect,
    /// Read-only or writable.
    pub access: Access,
    /// Bypass the page cache (`O_DIRECT`).
    pub direct: bool,
}

/// Names an inode; for devices also the device it stands for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Identity {
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
    /// `st_rdev`, 0 for regular files.
    pub rdev: u64,
}

/// An open image file or device.
#[derive(Debug)]
pub struct HostFile {
    fd: OwnedFd,
    path: PathBuf,
    kind: FileKind,
    identity: Identity,
    writable: bool,
    direct: bool,
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for HostFile {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

impl From<HostFile> for OwnedFd {
    fn from(f: HostFile) -> OwnedFd {
        f.fd
    }
}

/// Opens `path` as a regular file or device.
///
/// Errors name the path: "Could not open 'x': …", "'file' driver requires 'x' to be a regular file",
/// "'host_device' driver requires 'x' to be either a character or block device".
pub fn open(path: &Path, opts: OpenOptions) -> Result<HostFile, Error> {
    let name = path.display();
    if path.as_os_str().is_empty() {
        let driver = if opts.expect == Expect::Device { "host_device" } else { "file" };
        return Err(Error::invalid(format!("The '{driver}' block driver requires a file name")));
    }
    let could_not = |e: Errno| Error::io(e, format!("Could not open '{name}'"));
    let probe = open_at(path, libc::O_PATH).map_err(could_not)?;
    let (kind, identity) = stat(probe.as_fd()).map_err(could_not)?;
    expect_kind(path, kind, opts)?;
    drop(probe);
    let file = match opts.access {
        Access::ReadOnly => open_mode(path, false, opts.direct)?,
        Access::ReadWrite => open_mode(path, true, opts.direct)?,
        Access::Auto => match open_mode(path, true, opts.direct) {
            Err(e) if is_read_only_error(e.errno) => open_mode(path, false, opts.direct)?,
            other => other?,
        },
    };
    if (file.kind, file.identity) != (kind, identity) {
        return Err(Error::io(Errno::EBUSY, format!("Could not open '{name}': it was replaced meanwhile")));
    }
    Ok(file)
}

/// Creates (or empties) the regular file `path` with mode 0644 less the umask, open for reading and writing.
///
/// An existing device is opened and left as it is. Errors read "Could not create 'x': …".
pub fn create(path: &Path) -> Result<HostFile, Error> {
    let could_not = |e: Errno| Error::io(e, format!("Could not create '{}'", path.display()));
    let kind = open_at(path, libc::O_PATH).ok().and_then(|fd| stat(fd.as_fd()).ok()).map(|(kind, _)| kind);
    let flags = match kind {
        None => libc::O_RDWR | libc::O_CREAT,
        Some(FileKind::Regular | FileKind::Block | FileKind::Char) => libc::O_RDWR,
        Some(FileKind::Other) if path.is_dir() => return Err(could_not(Errno::EISDIR)),
        Some(FileKind::Other) => return Err(could_not(Errno::EINVAL)),
    };
    // The file is not truncated here: whoever creates an image takes the locks first, then sets the length.
    let fd = open_at(path, flags | libc::O_NONBLOCK).map_err(could_not)?;
    let (kind, identity) = stat(fd.as_fd()).map_err(could_not)?;
    clear_nonblock(fd.as_fd()).map_err(could_not)?;
    Ok(HostFile { fd, path: path.to_owned(), kind, identity, writable: true, direct: false })
}

impl HostFile {
    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Regular file or device.
    pub fn kind(&self) -> FileKind {
        self.kind
    }
    /// The inode.
    pub fn identity(&self) -> Identity {
        self.identity
    }
    /// Whether this descriptor can write.
    pub fn writable(&self) -> bool {
        self.writable
    }
    /// Whether this descriptor bypasses the page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// A new, independent descriptor of the same inode with another mode; `self` stays as it is, so I/O in flight
    /// on it is not disturbed.
    pub fn reopen(&self, writable: bool, direct: bool) -> Result<HostFile, Error> {
        let could_not = |e: Errno| Error::io(e, format!("Could not open '{}'", self.path.display()));
        let again = PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()));
        let flags = mode_flags(writable, direct);
        // Without /proc the path is the only way; the inode is compared below in either case.
        let fd = match open_at(&again, flags) {
            Err(Errno::ENOENT) => open_at(&self.path, flags),
            other => other,
        };
        let fd = fd.map_err(could_not)?;
        let (kind, identity) = stat(fd.as_fd()).map_err(could_not)?;
        if (kind, identity) != (self.kind, self.identity) {
            return Err(Error::new(
                Errno::EBUSY,
                format!("Could not open '{}': the file was replaced", self.path.display()),
            ));
        }
        let file = HostFile { fd, path: self.path.clone(), kind, identity, writable, direct };
        if writable {
            file.refuse_read_only_device().map_err(could_not)?;
        }
        Ok(file)
    }

    /// Another handle of the same open file description (shares its locks).
    pub fn try_clone_fd(&self) -> Result<OwnedFd, Errno> {
        self.fd.try_clone().map_err(|e| Errno::of(&e))
    }

    /// Length in bytes: of the file, or of the medium of a device.
    pub fn size(&self) -> Result<u64, Errno> {
        size(self.fd.as_fd(), self.kind)
    }

    /// Bytes allocated on disk (`st_blocks`), 0 for devices.
    pub fn allocated_size(&self) -> Result<u64, Errno> {
        let st = fstat(self.fd.as_fd())?;
        Ok(u64::try_from(st.st_blocks).unwrap_or(0).saturating_mul(512))
    }

    /// A block device can be marked read-only while its node in /dev may be opened for writing.
    fn refuse_read_only_device(&self) -> Result<(), Errno> {
        if self.kind != FileKind::Block {
            return Ok(());
        }
        let mut ro: libc::c_int = 0;
        // SAFETY: BLKROGET writes one int through the pointer, which lives across the call.
        let res = retry(|| unsafe { libc::ioctl(self.fd.as_raw_fd(), BLKROGET, &raw mut ro) });
        if res.is_ok() && ro != 0 { Err(Errno::EACCES) } else { Ok(()) }
    }
}

/// `_IO(0x12, 94)`: is the block device read-only?
const BLKROGET: libc::Ioctl = 0x125e;
/// `_IOR(0x12, 114, size_t)`: size of the block device in bytes. The number carries the size of a pointer.
const BLKGETSIZE64: libc::Ioctl = (0x8000_1272u32 | ((size_of::<usize>() as u32) << 16)) as libc::Ioctl;

/// Length of an open file or device in bytes.
pub fn size(fd: BorrowedFd<'_>, kind: FileKind) -> Result<u64, Errno> {
    match kind {
        FileKind::Block => {
            let mut bytes: u64 = 0;
            // SAFETY: BLKGETSIZE64 writes one u64 through the pointer, which lives across the call.
            retry(|| unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) })?;
            Ok(bytes)
        }
        FileKind::Regular => u64::try_from(fstat(fd)?.st_size).map_err(|_| Errno::EOVERFLOW),
        // Character devices that can be images answer lseek; the others have no length.
        FileKind::Char | FileKind::Other => {
            // SAFETY: lseek takes no pointer.
            let end = unsafe { libc::lseek64(fd.as_raw_fd(), 0, libc::SEEK_END) };
            super::sys::check64(end)
        }
    }
}

/// The kind and the inode behind a descriptor.
pub fn stat(fd: BorrowedFd<'_>) -> Result<(FileKind, Identity), Errno> {
    let st = fstat(fd)?;
    let kind = match st.st_mode & libc::S_IFMT {
        // reading one that the kernel makes up may wait for ever (/proc/kmsg), and none is an image
        libc::S_IFREG if is_made_up(fd)? => FileKind::Other,
        libc::S_IFREG => FileKind::Regular,
        libc::S_IFBLK => FileKind::Block,
        libc::S_IFCHR => FileKind::Char,
        _ => FileKind::Other,
    };
    Ok((kind, Identity { dev: st.st_dev, ino: st.st_ino, rdev: st.st_rdev }))
}

/// Whether a file lies in one of the kernel's own file systems, which show its state as files.
fn is_made_up(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    const KINDS: [i64; 4] =
        [libc::PROC_SUPER_MAGIC, libc::SYSFS_MAGIC, libc::DEBUGFS_MAGIC, libc::TRACEFS_MAGIC];
    let mut fs = std::mem::MaybeUninit::<libc::statfs64>::uninit();
    // SAFETY: fstatfs writes a whole statfs64 through the pointer when it succeeds; the buffer lives across the call.
    retry(|| unsafe { libc::fstatfs64(fd.as_raw_fd(), fs.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so the kernel filled the structure.
    Ok(KINDS.contains(&unsafe { fs.assume_init() }.f_type))
}

fn fstat(fd: BorrowedFd<'_>) -> Result<libc::stat64, Errno> {
    let mut st = std::mem::MaybeUninit::<libc::stat64>::uninit();
    // SAFETY: fstat writes a whole stat64 through the pointer when it succeeds; the buffer lives across the call.
    retry(|| unsafe { libc::fstat64(fd.as_raw_fd(), st.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so the kernel filled the structure.
    Ok(unsafe { st.assume_init() })
}

/// Errors that say "this cannot be opened for writing", not "this cannot be opened".
pub fn is_read_only_error(e: Errno) -> bool {
    matches!(e, Errno::EACCES | Errno::EPERM | Errno::EROFS)
}

fn mode_flags(writable: bool, direct: bool) -> libc::c_int {
    let mode = if writable { libc::O_RDWR } else { libc::O_RDONLY };
    mode | if direct { libc::O_DIRECT } else { 0 }
}

fn open_at(path: &Path, flags: libc::c_int) -> Result<OwnedFd, Errno> {
    let c = cstr(path)?;
    // SAFETY: `c` is NUL-terminated and lives across the call; the mode is read only with O_CREAT.
    retry_fd(|| unsafe { libc::open64(c.as_ptr(), flags | libc::O_CLOEXEC, 0o644 as libc::c_uint) })
}

fn open_mode(path: &Path, writable: bool, direct: bool) -> Result<HostFile, Error> {
    let name = path.display();
    let could_not = |e: Errno| Error::io(e, format!("Could not open '{name}'"));
    let fd = open_at(path, mode_flags(writable, direct) | libc::O_NONBLOCK).map_err(|e| {
        if e == Errno::EINVAL && direct {
            return Error::new(e, format!("Could not open '{name}': filesystem does not support O_DIRECT"));
        }
        could_not(e)
    })?;
    let (kind, identity) = stat(fd.as_fd()).map_err(could_not)?;
    clear_nonblock(fd.as_fd()).map_err(could_not)?;
    let file = HostFile { fd, path: path.to_owned(), kind, identity, writable, direct };
    if writable {
        file.refuse_read_only_device().map_err(could_not)?;
    }
    Ok(file)
}

/// `O_NONBLOCK` keeps `open` from waiting; afterwards it would make io_uring answer `EAGAIN` on some devices.
fn clear_nonblock(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: F_GETFL takes no pointer.
    let flags = retry(|| unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: F_SETFL takes an int, no pointer.
    retry(|| unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) })?;
    Ok(())
}

fn expect_kind(path: &Path, kind: FileKind, opts: OpenOptions) -> Result<(), Error> {
    let name = path.display();
    let ok = match opts.expect {
        Expect::Regular => kind == FileKind::Regular,
        Expect::Device => matches!(kind, FileKind::Block | FileKind::Char),
        Expect::Any => kind != FileKind::Other,
    };
    if ok {
        return Ok(());
    }
    if opts.access == Access::ReadWrite && path.is_dir() {
        return Err(Error::io(Errno::EISDIR, format!("Could not open '{name}'")));
    }
    Err(Error::invalid(match opts.expect {
        Expect::Device => {
            format!("'host_device' driver requires '{name}' to be either a character or block device")
        }
        _ => format!("'file' driver requires '{name}' to be a regular file"),
    }))
}

#[cfg(test)]
mod tests {
    use super::super::sys::testdir::TestDir;
    use super::*;

    const RW: OpenOptions = OpenOptions { expect: Expect::Regular, access: Access::ReadWrite, direct: false };

    fn text(path: &Path, opts: OpenOptions) -> String {
        open(path, opts).err().map(|e| e.message).unwrap_or_default()
    }

    /// Goal: wrong types and missing files are refused with the texts users know, and a FIFO does not block.
    /// Method: one of each.
    #[test]
    fn refuses_what_it_cannot_serve() {
        let t = TestDir::new();
        let (p, d) = (t.path("x"), t.path("d"));
        assert_eq!(text(&p, RW), format!("Could not open '{}': No such file or directory", p.display()));
        std::fs::create_dir(&d).expect("mkdir");
        assert_eq!(text(&d, RW), format!("Could not open '{}': Is a directory", d.display()));
        let fifo = t.path("fifo");
        let c = cstr(&fifo).expect("path");
        // SAFETY: `c` is NUL-terminated and lives across the call.
        assert_eq!(unsafe { libc::mkfifo(c.as_ptr(), 0o600) }, 0);
        assert_eq!(
            text(&fifo, RW),
            format!("'file' driver requires '{}' to be a regular file", fifo.display())
        );
        let zero = Path::new("/dev/zero");
        assert_eq!(text(zero, RW), "'file' driver requires '/dev/zero' to be a regular file");
        let proc = Path::new("/proc/version");
        let any = OpenOptions { expect: Expect::Any, access: Access::ReadOnly, direct: false };
        assert_eq!(text(proc, any), "'file' driver requires '/proc/version' to be a regular file");
        let dev = OpenOptions { expect: Expect::Device, ..RW };
        let f = t.file("f", 512);
        assert!(text(&f, dev).ends_with("to be either a character or block device"));
        assert!(open(Path::new("/dev/null"), dev).is_ok());
        assert_eq!(text(Path::new(""), RW), "The 'file' block driver requires a file name");
    }

    /// Goal: a re-opened file is the same inode even when its name now belongs to another file.
    /// Method: replace the path between open and reopen, write through the new descriptor, look at both files.
    #[test]
    fn reopen_keeps_the_inode() {
        use std::os::unix::fs::FileExt;
        let t = TestDir::new();
        let p = t.file("a", 4096);
        let ro = open(&p, OpenOptions { access: Access::ReadOnly, ..RW }).expect("open");
        assert!(!ro.writable());
        std::fs::rename(&p, t.path("moved")).expect("rename");
        t.file("a", 10);
        let rw = ro.reopen(true, false).expect("reopen");
        assert!(rw.writable());
        assert_eq!(rw.identity(), ro.identity());
        assert_eq!(rw.size(), Ok(4096));
        std::fs::File::from(OwnedFd::from(rw)).write_all_at(b"hit", 0).expect("write");
        assert_eq!(&std::fs::read(t.path("moved")).expect("read")[..3], b"hit");
    }

    /// Goal: creating leaves existing contents alone (locks come first) and reports the path.
    #[test]
    fn create_does_not_truncate() {
        let t = TestDir::new();
        let p = t.file("a", 100);
        assert_eq!(create(&p).expect("create").size(), Ok(100));
        assert_eq!(create(&t.path("b")).expect("create").size(), Ok(0));
        let gone = t.path("no/x");
        let e = create(&gone).expect_err("no directory");
        assert_eq!(e.message, format!("Could not create '{}': No such file or directory", gone.display()));
        assert_eq!(create(t.dir()).expect_err("directory").errno, Errno::EISDIR);
    }
}
