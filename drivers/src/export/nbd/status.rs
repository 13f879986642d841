//! Block status: extents of the engine become descriptors of a chunk.
//!
//! Invariants:
//! - Equal neighbours are one descriptor; the sum of the lengths is at least 1 and at most the length asked for.
//! - A chunk holds at most [`LIMIT`] descriptors; a client asks again for the rest (the protocol allows a
//!   reply to stop early).
//! - A chunk is either whole in the buffer or not there at all.
//!
//! ```text
//! push(4096, DATA) push(8192, DATA) push(4096, HOLE|ZERO) ──► [12288 data][4096 hole,zero]
//! ```

use super::wire::{CHUNK_DONE, Framing, ReplyTo, chunk, chunk_header};

/// Descriptors of one chunk: about 64 KiB of 32-bit ones.
pub const LIMIT: u32 = 8192;

/// `base:allocation`: the range is not allocated.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: the range reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// The flags of `base:allocation`.
pub fn base_flags(data: bool, zero: bool) -> u32 {
    (if data { 0 } else { STATE_HOLE }) | if zero { STATE_ZERO } else { 0 }
}

/// Builds one block status chunk at the end of a buffer.
#[derive(Debug)]
pub struct Descriptors<'a> {
    out: &'a mut Vec<u8>,
    to: ReplyTo,
    start: usize,
    context: u32,
    /// Bytes of the request not described yet.
    left: u64,
    limit: u32,
    count: u32,
    last: Option<(u64, u32)>,
}

impl<'a> Descriptors<'a> {
    /// Starts a chunk for the context of that number; `len` is the length the client asked about.
    pub fn new(out: &'a mut Vec<u8>, to: ReplyTo, context: u32, len: u64, one: bool) -> Self {
        let start = out.len();
        // The header comes again when the length is known; this keeps its place.
        let head = if to.framing == Framing::Extended { 32 + 8 } else { 20 + 4 };
        out.resize(start + head, 0);
        let limit = if one { 1 } else { LIMIT };
        Descriptors { out, to, start, context, left: len, limit, count: 0, last: None }
    }

    /// Bytes of the request that still have no descriptor.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Adds an extent; returns whether another one is welcome. What reaches past the request is cut.
    pub fn push(&mut self, len: u64, flags: u32) -> bool {
        let len = len.min(self.left);
        if len == 0 {
            return self.left > 0;
        }
        match &mut self.last {
            // Bounded by the length of the request, so the sum fits.
            Some((have, same)) if *same == flags => *have += len,
            _ => {
                if self.count + u32::from(self.last.is_some()) == self.limit {
                    return false;
                }
                self.put();
                self.last = Some((len, flags));
            }
        }
        self.left -= len;
        self.left > 0
    }

    fn put(&mut self) {
        let Some((len, flags)) = self.last.take() else {
            return;
        };
        self.count += 1;
        if self.to.framing == Framing::Extended {
            self.out.extend_from_slice(&len.to_be_bytes());
            self.out.extend_from_slice(&u64::from(flags).to_be_bytes());
        } else {
            // A compact request is below 4 GiB and so is every part of it.
            self.out.extend_from_slice(&(len as u32).to_be_bytes());
            self.out.extend_from_slice(&flags.to_be_bytes());
        }
    }

    /// Completes the chunk; `done` if it is the last of the reply. Returns `false`, and leaves the buffer
    /// as it was, if there is nothing to say: the caller then owes the client an error.
    pub fn finish(mut self, done: bool) -> bool {
        self.put();
        if self.count == 0 {
            self.out.truncate(self.start);
            return false;
        }
        let extended = self.to.framing == Framing::Extended;
        let ty = if extended { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        let header = if extended { 32 } else { 20 };
        let payload = (self.out.len() - self.start - header) as u32;
        // The header is encoded behind the chunk and moved over its place.
        let end = self.out.len();
        chunk_header(self.out, self.to, if done { CHUNK_DONE } else { 0 }, ty, payload);
        self.out.copy_within(end.., self.start);
        self.out.truncate(end);
        let at = self.start + header;
        self.out[at..at + 4].copy_from_slice(&self.context.to_be_bytes());
        if extended {
            self.out[at + 4..at + 8].copy_from_slice(&self.count.to_be_bytes());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(s: &str) -> Vec<u8> {
        (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
    }
    fn to(framing: Framing) -> ReplyTo {
        ReplyTo { framing, cookie: 0x1122_3344_5566_7788, offset: 0 }
    }

    /// Goal: chunks equal those seen from qemu-storage-daemon 10.0.2 for a file of 73728 bytes of data in
    /// 1 MiB. Method: the same extents, split and behind other bytes, in both framings.
    #[test]
    fn chunks_equal_the_peers() {
        let data = base_flags(true, false);
        let hole = base_flags(false, true);
        for (framing, first, second) in [
            (
                Framing::Structured,
                "668e33ef00000005112233445566778800000014000000000001200000000000000ee00000000003",
                "668e33ef0001000511223344556677880000000c000000010010000000000001",
            ),
            (
                Framing::Extended,
                "6e8a278c0000000611223344556677880000000000000000000000000000002800000000000000020000000000012000000000000000000000000000000ee0000000000000000003",
                "6e8a278c00010006112233445566778800000000000000000000000000000018000000010000000100000000001000000000000000000001",
            ),
        ] {
            let mut out = b"before".to_vec();
            let mut d = Descriptors::new(&mut out, to(framing), 0, 1 << 20, false);
            assert!(d.push(65536, data) && d.push(8192, data) && d.push(4096, hole));
            assert!(!d.push(1 << 40, hole));
            assert!(d.finish(false));
            let mut d = Descriptors::new(&mut out, to(framing), 1, 1 << 20, false);
            assert!(!d.push(u64::MAX, 1));
            assert!(d.finish(true));
            assert_eq!(out[6..], hex(&[first, second].concat()));
        }
    }

    /// Goal: REQ_ONE gives one descriptor, merged as far as the state is the same, never past the request.
    /// Method: extents that go on in the same state, then in another.
    #[test]
    fn one_descriptor() {
        let mut out = Vec::new();
        let mut d = Descriptors::new(&mut out, to(Framing::Structured), 0, 10000, true);
        assert!(d.push(4096, 0) && d.push(4096, 0));
        assert!(!d.push(4096, 3));
        assert_eq!(d.left(), 10000 - 8192);
        assert!(d.finish(true));
        assert_eq!(out[24..], hex("0000200000000000"));
    }

    /// Goal: no reply outgrows its bound however scattered the map is. Method: alternating extents for ever.
    #[test]
    fn bounded() {
        for framing in [Framing::Structured, Framing::Extended] {
            let mut out = Vec::new();
            let mut d = Descriptors::new(&mut out, to(framing), 0, u64::MAX, false);
            let mut n = 0u32;
            while d.push(512, n % 2) {
                n += 1;
            }
            assert!(d.finish(true));
            assert_eq!(n, LIMIT);
            assert!(out.len() <= 40 + 16 * LIMIT as usize);
        }
    }

    /// Goal: with nothing to say nothing is said. Method: finish at once, and after empty extents.
    #[test]
    fn empty() {
        let mut out = vec![7];
        let mut d = Descriptors::new(&mut out, to(Framing::Extended), 0, 512, false);
        assert!(d.push(0, 0));
        assert!(!d.finish(true));
        assert_eq!(out, [7]);
    }
}
