//! Signals as ordinary events, and the terminal.
//!
//! Termination signals are blocked in every thread (threads inherit the mask of the one that made them, so this
//! comes first in `main`) and read from a descriptor by the control thread. Nothing ever runs in a handler.

use super::sys::{check, retry, retry_fd};
use crate::error::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// A signal that ends the program in an orderly way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Signal {
    /// Ctrl-C.
    Int,
    /// The polite kill.
    Term,
    /// The terminal is gone.
    Hup,
}

impl Signal {
    /// The number.
    pub fn number(self) -> i32 {
        match self {
            Signal::Int => libc::SIGINT,
            Signal::Term => libc::SIGTERM,
            Signal::Hup => libc::SIGHUP,
        }
    }
}

/// The descriptor that termination signals arrive at. Readable when one is pending.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Signals {
    /// Blocks SIGINT, SIGTERM and SIGHUP in this thread and those it will make, and ignores SIGPIPE everywhere.
    pub fn take() -> Result<Signals, Errno> {
        ignore_sigpipe()?;
        let set = termination_set();
        // SAFETY: `set` is an initialised sigset_t that lives across the call; no old mask is asked for.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
            0 => {}
            e => return Err(Errno(e)),
        }
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: as above; -1 asks for a new descriptor.
        let fd = retry_fd(|| unsafe { libc::signalfd(-1, &raw const set, flags) })?;
        Ok(Signals { fd })
    }

    /// Waits for a signal, at most for `timeout` (`None`: for ever). `Ok(None)` when the time is over.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Option<Signal>, Errno> {
        if let Some(s) = self.read()? {
            return Ok(Some(s));
        }
        let ms = timeout.map_or(-1, |t| i32::try_from(t.as_millis()).unwrap_or(i32::MAX));
        let mut p = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, which lives across the call.
        match check(unsafe { libc::poll(&raw mut p, 1, ms) }) {
            // Stopped and continued (SIGCONT): to the caller that is a time-out that came early.
            Ok(_) | Err(Errno::EINTR) => self.read(),
            Err(e) => Err(e),
        }
    }

    /// A pending signal, without waiting.
    pub fn read(&self) -> Result<Option<Signal>, Errno> {
        let mut info = std::mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer has `size` bytes and lives across the call.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if n != size as isize {
            let e = super::sys::last();
            return if n >= 0 || matches!(e, Errno::EAGAIN | Errno::EINTR) { Ok(None) } else { Err(e) };
        }
        // SAFETY: the kernel filled the whole structure.
        let info = unsafe { info.assume_init() };
        Ok(match info.ssi_signo as i32 {
            libc::SIGINT => Some(Signal::Int),
            libc::SIGTERM => Some(Signal::Term),
            libc::SIGHUP => Some(Signal::Hup),
            _ => None,
        })
    }
}

fn termination_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the whole set; sigaddset then works on an initialised one.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for s in [Signal::Int, Signal::Term, Signal::Hup] {
            libc::sigaddset(set.as_mut_ptr(), s.number());
        }
        set.assume_init()
    }
}

/// A write to a closed connection becomes `EPIPE` and not the end of the process.
pub fn ignore_sigpipe() -> Result<(), Errno> {
    // SAFETY: SIG_IGN installs no handler of ours.
    let old = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    if old == libc::SIG_ERR { Err(super::sys::last()) } else { Ok(()) }
}

/// Columns and rows of a terminal; `None` for anything else.
pub fn terminal_size(fd: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let mut w = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize, which lives across the call.
    retry(|| unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut w) }).ok()?;
    (w.ws_col > 0).then_some((w.ws_col, w.ws_row))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a termination signal becomes an event and does not end the process. Method: in a thread of its own
    /// (the mask is per thread), send it to that thread only.
    #[test]
    fn signals_become_events() {
        std::thread::spawn(|| {
            let s = Signals::take().expect("signalfd");
            assert_eq!(s.wait(Some(Duration::from_millis(1))), Ok(None));
            for sig in [Signal::Term, Signal::Int, Signal::Hup] {
                // SAFETY: the thread is this one, and the signal is blocked in it.
                let sent = unsafe { libc::pthread_kill(libc::pthread_self(), sig.number()) };
                assert_eq!(sent, 0);
                assert_eq!(s.wait(Some(Duration::from_secs(5))), Ok(Some(sig)));
            }
            assert_eq!(s.read(), Ok(None));
        })
        .join()
        .expect("thread");
    }

    /// Goal: no terminal, no size.
    #[test]
    fn files_are_not_terminals() {
        let f = std::fs::File::open("/dev/null").expect("open");
        assert_eq!(terminal_size(f.as_fd()), None);
    }
}
