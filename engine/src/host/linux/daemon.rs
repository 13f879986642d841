//! Going to the background, and the file that holds the process number.
//!
//! ```text
//! parent ─ fork ─► child: setsid, start up … ─ Ready::announce ─► stdio to /dev/null, a byte through the pipe
//!    └ waits for the byte ◄──────────────────────────────────────────┘   exit 0
//!                 or for the pipe to close (the child failed)             exit 1
//! ```
//!
//! `fork` copies only the calling thread, so [`fork`] refuses to run once there are others.

use super::sys::{check, retry, retry_fd};
use crate::error::{Errno, Error};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Which side of the fork this is.
#[derive(Debug)]
pub enum Forked {
    /// The original process: it should exit with this status; the child has started up (0) or failed (1).
    Parent(i32),
    /// The background process, which is to announce when it is ready.
    Child(Ready),
}

/// The background process's way to let its parent go. Dropped unannounced, the parent exits with 1.
#[derive(Debug)]
pub struct Ready {
    pipe: std::fs::File,
}

/// Forks into the background; the parent's call returns when the child is ready or gone.
///
/// `EBUSY` if the process already has several threads.
pub fn fork() -> Result<Forked, Error> {
    let failed = |e: Errno| Error::io(e, "Failed to daemonize");
    if thread_count() != Some(1) {
        return Err(failed(Errno::EBUSY));
    }
    let mut ends = [-1; 2];
    // SAFETY: the kernel writes two ints, which live across the call.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }).map_err(failed)?;
    // SAFETY: both descriptors were just made and belong to nobody else.
    let (read, write) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // SAFETY: this is the only thread, so the child's copy of memory is consistent.
    match check(unsafe { libc::fork() }).map_err(failed)? {
        0 => {
            drop(read);
            // SAFETY: setsid takes no pointer; it cannot fail in a child that has just been made.
            unsafe { libc::setsid() };
            Ok(Forked::Child(Ready { pipe: write.into() }))
        }
        _ => {
            drop(write);
            let mut byte = [1];
            let told = std::fs::File::from(read).read_exact(&mut byte);
            Ok(Forked::Parent(if told.is_ok() { i32::from(byte[0]) } else { 1 }))
        }
    }
}

impl Ready {
    /// Lets go of the terminal and the working folder, then tells the parent that all is well.
    pub fn announce(mut self) -> Result<(), Error> {
        let failed = |e: Errno| Error::io(e, "Failed to daemonize");
        std::env::set_current_dir("/").map_err(|e| failed(Errno::of(&e)))?;
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null");
        let null = null.map_err(|e| failed(Errno::of(&e)))?;
        for standard in 0..3 {
            // SAFETY: dup2 takes no pointer; 0, 1 and 2 are the standard streams, which no OwnedFd here owns.
            retry(|| unsafe { libc::dup2(null.as_raw_fd(), standard) }).map_err(failed)?;
        }
        self.pipe.write_all(&[0]).map_err(|e| failed(Errno::of(&e)))
    }
}

fn thread_count() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

/// A locked file with the process number, removed on drop. The lock, not the contents, says that it is in use.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    _locked: OwnedFd,
}

impl PidFile {
    /// Creates (or takes over a stale) pid file with mode 0600 and writes this process's number.
    ///
    /// Errors: "Could not create 'p': …", "Cannot lock pid file: Resource temporarily unavailable".
    pub fn create(path: &Path) -> Result<PidFile, Error> {
        loop {
            if let Some(made) = PidFile::attempt(path)? {
                return Ok(made);
            }
        }
    }

    /// `None` if the file was removed between its opening and its locking, by a process that was just ending.
    fn attempt(path: &Path) -> Result<Option<PidFile>, Error> {
        use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
        let name = path.display();
        let could_not =
            |what: &str, e: &std::io::Error| Error::io(Errno::of(e), format!("Could not {what} '{name}'"));
        let mut file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|e| could_not("create", &e))?;
        lock_whole(file.as_raw_fd()).map_err(|e| Error::io(e, "Cannot lock pid file"))?;
        let ours = file.metadata().map_err(|e| could_not("stat", &e))?;
        let same = std::fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (ours.dev(), ours.ino()));
        if !same {
            return Ok(None);
        }
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|e| could_not("write", &e))?;
        // A relative name must still be found after the daemon has left its folder.
        let path = std::fs::canonicalize(path).map_err(|e| could_not("resolve", &e))?;
        Ok(Some(PidFile { path, _locked: file.into() }))
    }

    /// The absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Removed while still locked, so nobody can have taken it over yet.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A write lock on the whole file that belongs to the description: it survives `fork`, a POSIX lock does not.
fn lock_whole(fd: libc::c_int) -> Result<(), Errno> {
    // SAFETY: flock64 is plain integers, for which all zeroes is a valid value.
    let mut l: libc::flock64 = unsafe { std::mem::zeroed() };
    l.l_type = libc::F_WRLCK as libc::c_short;
    l.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: `l` is a whole flock64 and lives across the call.
    retry(|| unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &raw const l) }).map(drop)
}

/// Opens `/dev/null` for reading and writing.
pub fn dev_null() -> Result<OwnedFd, Errno> {
    // SAFETY: the path is NUL-terminated and lives across the call.
    retry_fd(|| unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) })
}

#[cfg(test)]
mod tests {
    use super::super::sys::testdir::TestDir;
    use super::*;

    /// Goal: a pid file in use is refused, a stale one is taken over, and it goes with its owner.
    #[test]
    fn pid_file_is_exclusive() {
        let t = TestDir::new();
        let p = t.path("pid");
        std::fs::write(&p, "999999999 stale").expect("write");
        let a = PidFile::create(&p).expect("stale file");
        assert_eq!(std::fs::read_to_string(&p).expect("read"), format!("{}\n", std::process::id()));
        let e = PidFile::create(&p).expect_err("in use");
        assert_eq!(e.message, "Cannot lock pid file: Resource temporarily unavailable");
        assert_eq!(std::fs::read_to_string(&p).expect("read"), format!("{}\n", std::process::id()));
        drop(a);
        assert!(!p.exists());
        let no = t.path("no/pid");
        let e = PidFile::create(&no).expect_err("no folder");
        assert_eq!(e.message, format!("Could not create '{}': No such file or directory", no.display()));
    }

    /// Goal: forking with threads around is refused (test runners have several). The fork itself is shown by the
    /// daemon's end-to-end tests.
    #[test]
    fn no_fork_with_threads() {
        let (tx, rx) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || rx.recv());
        assert!(matches!(fork(), Err(e) if e.errno == Errno::EBUSY));
        drop(tx);
        let _ = other.join();
    }
}
