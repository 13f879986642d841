//! Errors: a bare errno on the data path, an errno with a message on the control path.
//!
//! A request that fails in the ring costs no allocation: it carries an [`Errno`] and nothing else. Whoever
//! reports to a person (a tool, the control pipe) adds what was being done, to which node, with which option.
//!
//! ```text
//! CQE res < 0 ──► Errno ──► Error { errno, "Could not open 'a.qcow2'" : "No such file or directory" }
//! ```

use std::fmt;

/// An operating system error number, always positive (`EIO` is 5).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident)*) => { impl Errno { $(
        #[doc = concat!("`", stringify!($name), "` of errno(3).")]
        pub const $name: Errno = Errno(libc::$name);
    )* } };
}
errnos! {
    EPERM ENOENT EINTR EIO ENXIO E2BIG EBADF EAGAIN ENOMEM EACCES EBUSY EEXIST ENODEV ENOTDIR EISDIR EINVAL EFBIG ENOSPC EROFS
    EPIPE ERANGE ENOSYS ENOTSUP EOVERFLOW EMSGSIZE ESHUTDOWN ETIMEDOUT ECANCELED ENOMEDIUM EPROTO ECONNRESET ENOBUFS
}

impl Errno {
    /// The error of a result of the kernel: negative values are errors, others are `Ok`.
    pub fn check(res: i32) -> Result<u32, Errno> {
        u32::try_from(res).map_err(|_| Errno(res.checked_neg().unwrap_or(libc::EIO)))
    }

    /// The errno of an [`std::io::Error`]; `EIO` where it has none.
    pub fn of(e: &std::io::Error) -> Errno {
        Errno(e.raw_os_error().unwrap_or(libc::EIO))
    }

    /// What strerror(3) says, without the number: "No such file or directory".
    pub fn text(self) -> String {
        let s = std::io::Error::from_raw_os_error(self.0).to_string();
        match s.find(" (os error") {
            Some(at) => s[..at].to_owned(),
            None => s,
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.text(), self.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

impl std::error::Error for Errno {}

impl From<std::io::Error> for Errno {
    fn from(e: std::io::Error) -> Errno {
        Errno::of(&e)
    }
}

/// The class a QMP client sees (QMP specification, "Error classes").
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    #[default]
    GenericError,
    /// No such command.
    CommandNotFound,
    /// A device exists but is not in use, or a job does not exist.
    DeviceNotActive,
    /// No such device or node.
    DeviceNotFound,
}

/// A control-path error: what failed, in words, with the errno that a tool or client gets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Error {
    /// The number for programs.
    pub errno: Errno,
    /// The class for QMP clients.
    pub class: ErrorClass,
    /// The whole text for people, without a trailing full stop or newline.
    pub message: String,
}

impl Error {
    /// An error with a message of its own.
    pub fn new(errno: Errno, message: impl Into<String>) -> Error {
        Error { errno, class: ErrorClass::GenericError, message: message.into() }
    }

    /// `EINVAL` with a message: the usual answer to a bad option.
    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(Errno::EINVAL, message)
    }

    /// "`what`: strerror(errno)".
    pub fn io(errno: Errno, what: impl fmt::Display) -> Error {
        Error::new(errno, format!("{what}: {errno}"))
    }

    /// The same error under another QMP class.
    pub fn with_class(mut self, class: ErrorClass) -> Error {
        self.class = class;
        self
    }

    /// The same error with what an outer layer was doing put in front: "Could not open backing file: …".
    pub fn context(mut self, outer: impl fmt::Display) -> Error {
        self.message = format!("{outer}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<Errno> for Error {
    fn from(e: Errno) -> Error {
        Error::new(e, e.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: texts equal strerror(3). Method: two well-known numbers and a layered message.
    #[test]
    fn texts_are_those_of_strerror() {
        assert_eq!(Errno::ENOENT.text(), "No such file or directory");
        let e = Error::io(Errno::EACCES, "Could not open 'x'").context("Could not open backing file");
        assert_eq!(e.to_string(), "Could not open backing file: Could not open 'x': Permission denied");
    }

    /// Goal: kernel results map to errors. Method: the three kinds.
    #[test]
    fn kernel_results() {
        assert_eq!(Errno::check(5), Ok(5));
        assert_eq!(Errno::check(-5), Err(Errno::EIO));
        assert_eq!(Errno::check(i32::MIN), Err(Errno::EIO));
    }
}
