//! Sockets on the ring: what an export's connection tasks use.
//!
//! The descriptor is owned by the [`Socket`]; operations in flight keep it open, because the kernel holds its own
//! reference from submission to completion.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::error::Errno;
use crate::mem::Buf;
use crate::ring::{self, RawOp, SendBatch};

/// A connected socket. Its transfers are for tasks of a core; clones are the same socket, and any thread may end it.
#[derive(Clone, Debug)]
pub struct Socket(Arc<OwnedFd>);

impl Socket {
    /// Takes over a descriptor.
    pub fn new(fd: OwnedFd) -> Socket {
        Socket(Arc::new(fd))
    }

    /// Receives up to `len` bytes into `buf[pos..]`, within the buffer's capacity; 0 at the end of the stream.
    pub async fn recv(&self, buf: Buf, pos: usize, len: usize) -> (Result<usize, Errno>, Buf) {
        ring::recv(self.0.as_raw_fd(), buf, pos, len).await
    }

    /// Sends the whole batch, which comes back for reuse ([`SendBatch::clear`]).
    pub async fn send(&self, batch: Box<SendBatch>) -> (Result<usize, Errno>, Box<SendBatch>) {
        ring::send(self.0.as_raw_fd(), batch).await
    }

    /// Ends both directions: pending and later receives see the end of the stream.
    pub fn shutdown(&self) {
        use std::os::fd::AsFd;
        shutdown(self.0.as_fd());
    }
}

/// Ends a socket from any thread. On a listening one, pending and later accepts fail with `EINVAL`.
pub fn shutdown(fd: BorrowedFd<'_>) {
    // SAFETY: the descriptor is open as long as it is borrowed; shutdown takes no pointers.
    unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_RDWR) };
}

/// A listening socket on a core's ring.
pub struct Listener(OwnedFd);

impl Listener {
    /// Takes over a listening descriptor.
    pub fn new(fd: OwnedFd) -> Listener {
        Listener(fd)
    }

    /// Waits for a client. The descriptor is for [`Socket::new`] on whichever core serves the client.
    pub async fn accept(&self) -> Result<OwnedFd, Errno> {
        use std::os::fd::FromRawFd;
        let fd = ring::plain(RawOp::Accept { fd: self.0.as_raw_fd() }).await?;
        // SAFETY: a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }
}
