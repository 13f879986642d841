//! A batch of replies in one sendmsg(2): small headers and whole buffers, in order.
//!
//! Invariant: between [`SendBatch::arm`] and the terminal completion nothing is added, so the pointers in `iov` into
//! `small` and the buffers stay valid; the batch is boxed, so `msg` does not move either.

use crate::mem::Buf;

enum Part {
    Small { at: usize, len: usize },
    Buf(usize),
}

/// Headers and payloads to be sent in order; reusable.
pub struct SendBatch {
    small: Vec<u8>,
    bufs: Vec<Buf>,
    parts: Vec<Part>,
    bytes: usize,
    iov: Vec<libc::iovec>,
    first: usize,
    msg: libc::msghdr,
}

/// Parts of one batch: the kernel's UIO_MAXIOV.
pub(crate) const PARTS_MAX: usize = 1024;

impl Default for SendBatch {
    fn default() -> SendBatch {
        SendBatch {
            small: Vec::new(),
            bufs: Vec::new(),
            parts: Vec::new(),
            bytes: 0,
            iov: Vec::new(),
            first: 0,
            // SAFETY: msghdr is plain data for which all zeroes is valid (no name, no vectors, no control data).
            msg: unsafe { std::mem::zeroed() },
        }
    }
}

impl SendBatch {
    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Bytes to send.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether `parts` more parts fit.
    pub fn has_room(&self, parts: usize) -> bool {
        self.parts.len() + parts <= PARTS_MAX
    }

    /// Appends bytes by copying them; runs of these share one part.
    pub fn push_bytes(&mut self, data: &[u8]) {
        let at = self.small.len();
        self.small.extend_from_slice(data);
        self.bytes += data.len();
        match self.parts.last_mut() {
            Some(Part::Small { len, .. }) => *len += data.len(),
            _ => self.parts.push(Part::Small { at, len: data.len() }),
        }
    }

    /// Appends a buffer without copying it.
    pub fn push_buf(&mut self, buf: Buf) {
        if !buf.is_empty() {
            self.bytes += buf.len();
            self.parts.push(Part::Buf(self.bufs.len()));
        }
        self.bufs.push(buf);
    }

    /// Forgets everything sent and gives the buffers back to their pools.
    pub fn clear(&mut self) {
        self.small.clear();
        self.bufs.clear();
        self.parts.clear();
        self.iov.clear();
        self.bytes = 0;
        self.first = 0;
    }

    /// Builds the vectors; from now on nothing may be added.
    pub(crate) fn arm(&mut self) {
        self.iov.clear();
        self.first = 0;
        for part in &self.parts {
            let piece = match *part {
                Part::Small { at, len } => &self.small[at..at + len],
                Part::Buf(i) => &self.bufs[i][..],
            };
            self.iov.push(libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() });
        }
        self.point();
    }

    fn point(&mut self) {
        let rest = &mut self.iov[self.first..];
        self.msg.msg_iovlen = rest.len();
        self.msg.msg_iov = rest.as_mut_ptr();
    }

    pub(crate) fn msg(&self) -> *const libc::msghdr {
        &self.msg
    }

    /// `n` more bytes have gone out; whether some remain.
    pub(crate) fn advance(&mut self, mut n: usize) -> bool {
        while let Some(v) = self.iov.get_mut(self.first) {
            if n < v.iov_len {
                // SAFETY: n is inside the vector.
                v.iov_base = unsafe { v.iov_base.cast::<u8>().add(n) }.cast();
                v.iov_len -= n;
                break;
            }
            n -= v.iov_len;
            self.first += 1;
        }
        self.point();
        self.first < self.iov.len()
    }
}
