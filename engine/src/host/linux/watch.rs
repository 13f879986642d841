//! Watching what a child process does, for the proofs: which files of a folder are opened, and what it used when it ended.
//!
//! Invariant: an open of a file in a watched folder is noticed by whatever call it is made, io_uring's included; too many at
//! once are told as an error and never lost silently.
//!
//! ```text
//! folder ─ IN_OPEN ─► names      child ─ wait4 ─► exit status, peak memory, CPU time
//! ```

use super::sys::{check, cstr, retry, retry_fd};
use crate::error::Errno;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

/// Notices every open of a file in some folders (not of `O_PATH`, which opens nothing).
#[derive(Debug)]
pub struct Opens {
    fd: OwnedFd,
    folders: Vec<(i32, PathBuf)>,
}

impl Opens {
    /// Watches nothing yet.
    pub fn new() -> Result<Opens, Errno> {
        // SAFETY: inotify_init1 takes no pointer.
        let fd = retry_fd(|| unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) })?;
        Ok(Opens { fd, folders: Vec::new() })
    }

    /// Watches a folder, or one file.
    pub fn add(&mut self, path: &Path) -> Result<(), Errno> {
        let c = cstr(path)?;
        // SAFETY: `c` is NUL-terminated and lives across the call.
        let id =
            retry(|| unsafe { libc::inotify_add_watch(self.fd.as_raw_fd(), c.as_ptr(), libc::IN_OPEN) })?;
        self.folders.push((id, path.to_owned()));
        Ok(())
    }

    /// The files opened since the last call, by path; the folders themselves are left out. `EOVERFLOW` if some were lost.
    pub fn take(&mut self) -> Result<BTreeSet<PathBuf>, Errno> {
        let mut found = BTreeSet::new();
        let mut buf = [0u8; 16 << 10];
        loop {
            // SAFETY: `buf` is valid for writes of its whole length across the call.
            let n = unsafe { libc::read(self.fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) };
            match super::sys::check64(n as i64) {
                Ok(n) => self.parse(&buf[..n as usize], &mut found)?,
                Err(Errno::EAGAIN) => return Ok(found),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn parse(&self, mut events: &[u8], found: &mut BTreeSet<PathBuf>) -> Result<(), Errno> {
        let word = |b: &[u8], at: usize| {
            b.get(at..at + 4).and_then(|w| w.try_into().ok()).map_or(0, u32::from_ne_bytes)
        };
        // struct inotify_event: wd, mask, cookie, len, name padded with NUL
        while events.len() >= 16 {
            let (id, mask, len) = (word(events, 0) as i32, word(events, 4), word(events, 12) as usize);
            let name = events.get(16..16 + len).unwrap_or(&[]);
            let name: Vec<u8> = name.iter().copied().take_while(|&b| b != 0).collect();
            if mask & libc::IN_Q_OVERFLOW != 0 {
                return Err(Errno::EOVERFLOW);
            }
            let folder = self.folders.iter().find(|(i, _)| *i == id);
            if let Some((_, folder)) =
                folder.filter(|_| mask & libc::IN_OPEN != 0 && mask & libc::IN_ISDIR == 0)
            {
                let path =
                    if name.is_empty() { folder.clone() } else { folder.join(OsString::from_vec(name)) };
                found.insert(path);
            }
            events = events.get(16 + len..).unwrap_or(&[]);
        }
        Ok(())
    }
}

/// How a child ended and what it took.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Its exit status; that of SIGKILL where it was not done in time.
    pub status: ExitStatus,
    /// The largest resident memory it, or the process it was forked from, ever had, in bytes.
    pub peak: u64,
    /// CPU time, user and system.
    pub cpu: Duration,
    /// Whether it had to be killed.
    pub late: bool,
}

/// Waits for a child; kills it after `limit`.
pub fn reap(child: Child, limit: Duration) -> Result<Ended, Errno> {
    let pid = i32::try_from(child.id()).map_err(|_| Errno::EINVAL)?;
    let (start, mut late, mut pause) = (Instant::now(), false, Duration::from_micros(100));
    loop {
        let mut status = 0;
        let mut u = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        let how = if late { 0 } else { libc::WNOHANG };
        // SAFETY: the kernel writes one int and one rusage, which live across the call.
        let got = retry(|| unsafe { libc::wait4(pid, &raw mut status, how, u.as_mut_ptr()) })?;
        if got == pid {
            // SAFETY: zeroed and filled; every bit pattern is a valid rusage.
            let u = unsafe { u.assume_init() };
            let time = |t: libc::timeval| {
                Duration::from_secs(t.tv_sec.unsigned_abs()) + Duration::from_micros(t.tv_usec.unsigned_abs())
            };
            let peak = u64::try_from(u.ru_maxrss).unwrap_or(0).saturating_mul(1024);
            let cpu = time(u.ru_utime) + time(u.ru_stime);
            return Ok(Ended { status: ExitStatus::from_raw(status), peak, cpu, late });
        }
        if start.elapsed() >= limit {
            // SAFETY: kill takes no pointer; the child is not reaped yet, so the number is still its.
            check(unsafe { libc::kill(pid, libc::SIGKILL) })?;
            late = true;
        } else {
            std::thread::sleep(pause);
            pause = (pause * 5 / 4).min(Duration::from_millis(2));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sys::testdir::TestDir;
    use super::*;
    use std::process::Command;

    /// Goal: opens are seen, looks without opening are not, and a child's end is told. Method: cat and stat one of two files.
    #[test]
    fn opens_and_ends() {
        let t = TestDir::new();
        let (a, b) = (t.file("a", 3), t.file("b", 3));
        let mut opens = Opens::new().expect("inotify");
        opens.add(t.dir()).expect("watch");
        let mut run = |line: &str, path: &Path| {
            let child =
                Command::new(line).arg(path).stdout(std::process::Stdio::null()).spawn().expect("spawn");
            let ended = reap(child, Duration::from_secs(20)).expect("reap");
            assert!(ended.status.success() && !ended.late && ended.peak > 4096);
            opens.take().expect("events")
        };
        assert_eq!(run("cat", &a), BTreeSet::from([a.clone()]));
        assert_eq!(run("stat", &b), BTreeSet::new());
        let child = Command::new("sleep").arg("100").spawn().expect("spawn");
        let ended = reap(child, Duration::from_millis(20)).expect("reap");
        assert!(ended.late && ended.status.signal() == Some(libc::SIGKILL));
    }
}
