//! Small helpers shared by the Linux calls: results to [`Errno`], retry on `EINTR`, C strings.

use crate::error::Errno;
use std::ffi::CString;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The errno of the last failed call of this thread.
pub(super) fn last() -> Errno {
    Errno::of(&std::io::Error::last_os_error())
}

/// `Ok(result)` for results other than -1, otherwise errno.
pub(super) fn check(res: libc::c_int) -> Result<libc::c_int, Errno> {
    if res == -1 { Err(last()) } else { Ok(res) }
}

/// As [`check`] for calls with 64-bit results.
pub(super) fn check64(res: i64) -> Result<u64, Errno> {
    u64::try_from(res).map_err(|_| last())
}

/// Repeats a call for as long as it is interrupted by a signal.
pub(super) fn retry(mut call: impl FnMut() -> libc::c_int) -> Result<libc::c_int, Errno> {
    loop {
        match check(call()) {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// As [`retry`], for calls that return a fresh descriptor.
pub(super) fn retry_fd(call: impl FnMut() -> libc::c_int) -> Result<OwnedFd, Errno> {
    let fd = retry(call)?;
    // SAFETY: every caller passes a call that returns a descriptor it has just created, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A path as a C string; `EINVAL` if it contains a NUL.
pub(super) fn cstr(path: &Path) -> Result<CString, Errno> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

/// A file offset as the kernel's signed type; `EFBIG` if it does not fit.
pub(super) fn off(v: u64) -> Result<libc::off_t, Errno> {
    libc::off_t::try_from(v).map_err(|_| Errno::EFBIG)
}

/// A directory of a test's own, removed when dropped.
#[cfg(test)]
pub(super) mod testdir {
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicU32, Ordering};

    static NEXT: AtomicU32 = AtomicU32::new(0);

    pub(crate) struct TestDir(PathBuf);

    impl TestDir {
        pub(crate) fn new() -> TestDir {
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let dir = std::env::temp_dir().join(format!("rbhost-{}-{n}", std::process::id()));
            std::fs::create_dir_all(&dir).expect("temporary directory");
            TestDir(dir)
        }
        pub(crate) fn path(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }
        pub(crate) fn dir(&self) -> &Path {
            &self.0
        }
        pub(crate) fn file(&self, name: &str, len: u64) -> PathBuf {
            let p = self.path(name);
            std::fs::File::create(&p).and_then(|f| f.set_len(len)).expect("temporary file");
            p
        }
    }

    impl Drop for TestDir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}
