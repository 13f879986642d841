//! The rules of the transmission phase, without I/O: is this request one we run, refuse, or hang up on?
//!
//! Invariants:
//! - A command that comes out of here lies wholly inside the export, is permitted, and has a length the
//!   server can hold; nothing after this checks again.
//! - A refused request leaves the stream in step: how many payload bytes follow it is always known.
//! - Hanging up is the last resort: a wrong magic, or a payload so large that draining it would serve
//!   nobody ([`DRAIN_LIMIT`]).
//!
//! ```text
//! header ──► Session::judge ──► Run(command) | StatusPayload | Refuse { error, drain } | Fatal
//! ```

use super::handshake::{BASE_ID, Contexts, DEPTH_ID, Negotiated};
use super::wire::{Framing, MAX_PAYLOAD, NbdError, ReplyTo, RequestHeader, be32, be64, cmd, cmd_flag, flag};

/// The largest payload of a refused request that is read and thrown away, in bytes.
pub const DRAIN_LIMIT: u32 = 2 * MAX_PAYLOAD;
/// The largest payload of a block status request: an effect length and every context once.
pub const STATUS_PAYLOAD_LIMIT: u32 = 16;

/// A request that was found good. Offsets and lengths are in bytes and inside the export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Read; `len` is at most [`MAX_PAYLOAD`] and may be 0.
    Read {
        /// Guest offset.
        off: u64,
        /// Length.
        len: u32,
    },
    /// Write `len` bytes of payload that follow.
    Write {
        /// Guest offset.
        off: u64,
        /// Length.
        len: u32,
        /// Durable before the reply.
        fua: bool,
    },
    /// Zero a range.
    WriteZeroes {
        /// Guest offset.
        off: u64,
        /// Length.
        len: u64,
        /// Durable before the reply.
        fua: bool,
        /// The range must stay allocated.
        no_hole: bool,
        /// Fail rather than be slow.
        fast: bool,
    },
    /// The client no longer needs a range.
    Trim {
        /// Guest offset.
        off: u64,
        /// Length.
        len: u64,
        /// Durable before the reply.
        fua: bool,
    },
    /// Read ahead, advice only.
    Cache {
        /// Guest offset.
        off: u64,
        /// Length.
        len: u64,
    },
    /// Make all completed writes durable.
    Flush,
    /// Describe a range.
    BlockStatus {
        /// Guest offset.
        off: u64,
        /// Length, not 0.
        len: u64,
        /// One descriptor for each context and no more.
        one: bool,
        /// What to describe.
        contexts: Contexts,
    },
    /// The client leaves.
    Disconnect,
}

/// What to do with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Run it. A [`Command::Write`] is followed by its payload.
    Run(Command),
    /// Read `len` bytes of payload and give them to [`Session::status_payload`].
    StatusPayload {
        /// Bytes that follow, at most [`STATUS_PAYLOAD_LIMIT`].
        len: u32,
    },
    /// Answer with the error, throw away `drain` bytes of payload, go on.
    Refuse {
        /// For the client.
        error: NbdError,
        /// For people at the client.
        text: &'static str,
        /// Payload bytes that follow the header.
        drain: u32,
    },
    /// Answer with the error and hang up.
    Fatal {
        /// For the client.
        error: NbdError,
        /// For people at the client.
        text: &'static str,
    },
}

/// What the transmission of one connection is measured against.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Session {
    /// Size of the export in bytes, as the client was told.
    pub size: u64,
    /// Transmission flags, as the client was told.
    pub flags: u16,
    /// Framing of both directions.
    pub framing: Framing,
    /// Contexts of a block status.
    pub contexts: Contexts,
}

type Checked = Result<Command, (NbdError, &'static str)>;

impl Session {
    /// The session that follows from a handshake.
    pub fn new(n: &Negotiated) -> Session {
        Session { size: n.export.size, flags: n.flags, framing: n.framing, contexts: n.contexts }
    }

    /// What replies to this request start from.
    pub fn reply_to(&self, h: &RequestHeader) -> ReplyTo {
        ReplyTo { framing: self.framing, cookie: h.cookie, offset: h.offset }
    }

    /// Judges a request by its header.
    #[inline]
    pub fn judge(&self, h: &RequestHeader) -> Verdict {
        let payload = self.payload(h);
        let refused = match u32::try_from(payload) {
            Ok(0) if h.ty == cmd::BLOCK_STATUS && self.status_has_payload(h) => {
                (NbdError::Inval, "block status payload is not valid")
            }
            Ok(n) if n > 0 && h.ty == cmd::BLOCK_STATUS => match self.flags_ok(h) {
                Ok(()) if self.status_has_payload(h) && (12..=STATUS_PAYLOAD_LIMIT).contains(&n) => {
                    return Verdict::StatusPayload { len: n };
                }
                Ok(()) => (NbdError::Inval, "block status payload is not valid"),
                Err(e) => e,
            },
            Ok(_) => match self.check(h) {
                Ok(command) => return Verdict::Run(command),
                Err(e) => e,
            },
            Err(_) => (NbdError::Inval, "payload too large"),
        };
        match u32::try_from(payload) {
            Ok(drain) if drain <= DRAIN_LIMIT => Verdict::Refuse { error: refused.0, text: refused.1, drain },
            _ => Verdict::Fatal { error: refused.0, text: refused.1 },
        }
    }

    /// Bytes of payload that follow the header.
    fn payload(&self, h: &RequestHeader) -> u64 {
        let flagged = self.framing == Framing::Extended && h.flags & cmd_flag::PAYLOAD_LEN != 0;
        // A write carries its data even if an extended client forgot to say so.
        if flagged || h.ty == cmd::WRITE { h.len } else { 0 }
    }

    fn status_has_payload(&self, h: &RequestHeader) -> bool {
        h.flags & cmd_flag::PAYLOAD_LEN != 0 && self.flags & flag::BLOCK_STATUS_PAYLOAD != 0
    }

    /// Flags that mean nothing for a command are errors, but FUA, which may go with every command.
    fn flags_ok(&self, h: &RequestHeader) -> Result<(), (NbdError, &'static str)> {
        let extended = self.framing == Framing::Extended;
        let own = match h.ty {
            cmd::READ if self.framing != Framing::Simple => cmd_flag::DF,
            cmd::WRITE if extended => cmd_flag::PAYLOAD_LEN,
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            cmd::BLOCK_STATUS if self.flags & flag::BLOCK_STATUS_PAYLOAD != 0 => {
                cmd_flag::REQ_ONE | cmd_flag::PAYLOAD_LEN
            }
            cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
            _ => 0,
        };
        match h.flags & !(own | cmd_flag::FUA) {
            0 => Ok(()),
            _ => Err((NbdError::Inval, "flags not supported with this command")),
        }
    }

    fn check(&self, h: &RequestHeader) -> Checked {
        self.flags_ok(h)?;
        let (off, len) = (h.offset, h.len);
        let fua = h.flags & cmd_flag::FUA != 0;
        match h.ty {
            cmd::READ => {
                self.inside(off, len, NbdError::Inval)?;
                Ok(Command::Read { off, len: limited(len)? })
            }
            cmd::WRITE => {
                self.writable()?;
                let len32 = limited(len)?;
                self.inside(off, len, NbdError::NoSpc)?;
                Ok(Command::Write { off, len: len32, fua })
            }
            cmd::WRITE_ZEROES => {
                self.writable()?;
                self.inside(off, len, NbdError::NoSpc)?;
                let (no_hole, fast) = (h.flags & cmd_flag::NO_HOLE != 0, h.flags & cmd_flag::FAST_ZERO != 0);
                Ok(Command::WriteZeroes { off, len, fua, no_hole, fast })
            }
            cmd::TRIM => {
                self.writable()?;
                self.inside(off, len, NbdError::Inval)?;
                Ok(Command::Trim { off, len, fua })
            }
            cmd::CACHE => {
                self.inside(off, len, NbdError::Inval)?;
                Ok(Command::Cache { off, len })
            }
            cmd::FLUSH => Ok(Command::Flush),
            cmd::DISC => Ok(Command::Disconnect),
            cmd::BLOCK_STATUS => self.status(off, len, h.flags, self.contexts),
            _ => Err((NbdError::Inval, "no such command")),
        }
    }

    fn status(&self, off: u64, len: u64, flags: u16, contexts: Contexts) -> Checked {
        if self.contexts.is_empty() {
            return Err((NbdError::Inval, "no meta context was negotiated"));
        }
        if len == 0 {
            return Err((NbdError::Inval, "the length must not be 0"));
        }
        self.inside(off, len, NbdError::Inval)?;
        Ok(Command::BlockStatus { off, len, one: flags & cmd_flag::REQ_ONE != 0, contexts })
    }

    /// Judges a block status request by its payload: an effect length (8 bytes), then context numbers.
    pub fn status_payload(&self, h: &RequestHeader, payload: &[u8]) -> Verdict {
        let parse = || -> Checked {
            let bad = (NbdError::Inval, "block status payload is not valid");
            let len = be64(payload, 0).ok_or(bad)?;
            let ids = payload.get(8..).ok_or(bad)?;
            if ids.is_empty() || ids.len() % 4 != 0 {
                return Err(bad);
            }
            let mut want = Contexts::default();
            for at in (0..ids.len()).step_by(4) {
                match be32(ids, at) {
                    Some(BASE_ID) if self.contexts.base && !want.base => want.base = true,
                    Some(DEPTH_ID) if self.contexts.depth && !want.depth => want.depth = true,
                    _ => return Err(bad),
                }
            }
            self.status(h.offset, len, h.flags, want)
        };
        match parse() {
            Ok(command) => Verdict::Run(command),
            Err((error, text)) => Verdict::Refuse { error, text, drain: 0 },
        }
    }

    fn writable(&self) -> Result<(), (NbdError, &'static str)> {
        match self.flags & flag::READ_ONLY {
            0 => Ok(()),
            _ => Err((NbdError::Perm, "the export is read-only")),
        }
    }

    fn inside(&self, off: u64, len: u64, error: NbdError) -> Result<(), (NbdError, &'static str)> {
        match off.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err((error, "the request reaches past the end of the export")),
        }
    }
}

fn limited(len: u64) -> Result<u32, (NbdError, &'static str)> {
    match u32::try_from(len) {
        Ok(n) if n <= MAX_PAYLOAD => Ok(n),
        _ => Err((NbdError::Inval, "longer than the maximum block size")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Verdict::{Fatal, Refuse, Run};

    const SIZE: u64 = 1 << 20;

    fn session(framing: Framing, writable: bool) -> Session {
        let ro = if writable { 0 } else { flag::READ_ONLY };
        let payload = if framing == Framing::Extended { flag::BLOCK_STATUS_PAYLOAD } else { 0 };
        let contexts = Contexts { base: framing != Framing::Simple, depth: framing == Framing::Extended };
        Session { size: SIZE, flags: flag::HAS_FLAGS | ro | payload, framing, contexts }
    }
    fn header(ty: u16, offset: u64, len: u64, flags: u16) -> RequestHeader {
        RequestHeader { flags, ty, cookie: 1, offset, len }
    }
    /// The error and drain of a refusal; (0, 0) for a request that runs; drain -1 for a hang-up.
    fn outcome(s: &Session, ty: u16, offset: u64, len: u64, flags: u16) -> (u32, i64) {
        match s.judge(&header(ty, offset, len, flags)) {
            Run(_) | Verdict::StatusPayload { .. } => (0, 0),
            Refuse { error, drain, .. } => (error as u32, drain.into()),
            Fatal { error, .. } => (error as u32, -1),
        }
    }

    /// Goal: each wrong request gets the error the protocol names, with the right bytes drained, and each
    /// right one runs. Method: a table; the good and bad ones are those tried against qemu-storage-daemon.
    #[test]
    fn verdicts() {
        let s = session(Framing::Simple, true);
        let m = u64::from(MAX_PAYLOAD);
        let table: &[(u16, u64, u64, u16, u32, i64)] = &[
            (cmd::READ, 0, 16, 0, 0, 0),
            (cmd::READ, SIZE - 16, 16, 0, 0, 0),
            (cmd::READ, SIZE, 0, 0, 0, 0),
            (cmd::READ, SIZE, 16, 0, 22, 0),
            (cmd::READ, SIZE - 8, 16, 0, 22, 0),
            (cmd::READ, u64::MAX, 16, 0, 22, 0),
            (cmd::READ, 0, 16, cmd_flag::DF, 22, 0),
            (cmd::READ, 0, 16, cmd_flag::FUA, 0, 0),
            (cmd::WRITE, 0, 16, 0, 0, 0),
            (cmd::WRITE, SIZE - 8, 16, 0, 28, 16),
            (cmd::WRITE, 1 << 63, 16, 0, 28, 16),
            (cmd::WRITE, 0, 16, 0x80, 22, 16),
            (cmd::WRITE, 0, 16, cmd_flag::PAYLOAD_LEN, 22, 16),
            (cmd::WRITE, 0, m + 1, 0, 22, i64::from(MAX_PAYLOAD) + 1),
            (cmd::WRITE, 0, u32::MAX.into(), 0, 22, -1),
            (99, 0, 4, 0, 22, 0),
            (cmd::BLOCK_STATUS, 0, 16, 0, 22, 0),
            (cmd::WRITE_ZEROES, 0, SIZE, cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO | cmd_flag::FUA, 0, 0),
            (cmd::WRITE_ZEROES, 1, SIZE, 0, 28, 0),
            (cmd::TRIM, 0, 16, cmd_flag::NO_HOLE, 22, 0),
            (cmd::TRIM, SIZE, 1, 0, 22, 0),
            (cmd::FLUSH, 5, 5, cmd_flag::FUA, 0, 0),
            (cmd::CACHE, 0, SIZE, 0, 0, 0),
            (cmd::CACHE, 0, SIZE + 1, 0, 22, 0),
            (cmd::DISC, 0, 0, 0, 0, 0),
        ];
        for &(ty, off, len, flags, error, drain) in table {
            assert_eq!(outcome(&s, ty, off, len, flags), (error, drain), "{ty} {off} {len} {flags}");
        }
    }

    /// Goal: nothing changes a read-only export. Method: every command.
    #[test]
    fn read_only() {
        let s = session(Framing::Structured, false);
        let got: Vec<_> = (0..8).map(|ty| outcome(&s, ty, 0, 16, 0)).collect();
        assert_eq!(got, [(0, 0), (1, 16), (0, 0), (0, 0), (1, 0), (0, 0), (1, 0), (0, 0)]);
    }

    /// Goal: with extended headers a payload is known and drained whatever the command, and lengths beyond
    /// 32 bits work where there is no payload. Method: a table.
    #[test]
    fn extended() {
        let mut s = session(Framing::Extended, true);
        let p = cmd_flag::PAYLOAD_LEN;
        assert_eq!(outcome(&s, cmd::WRITE, 0, 16, p), (0, 0));
        assert_eq!(outcome(&s, cmd::WRITE, 0, 16, 0), (0, 0));
        assert_eq!(outcome(&s, cmd::READ, 0, 16, p), (22, 16));
        assert_eq!(outcome(&s, cmd::TRIM, 0, 16, p), (22, 16));
        assert_eq!(outcome(&s, cmd::TRIM, 0, 1 << 33, p), (22, -1));
        assert_eq!(outcome(&s, cmd::WRITE, 0, u64::MAX, p), (22, -1));
        assert_eq!(outcome(&s, 99, 0, 16, p), (22, 16));
        assert_eq!(outcome(&s, cmd::BLOCK_STATUS, 0, 0, p), (22, 0));
        assert_eq!(outcome(&s, cmd::BLOCK_STATUS, 0, 9, p), (22, 9));
        assert_eq!(outcome(&s, cmd::BLOCK_STATUS, 0, 4096, p), (22, 4096));
        s.size = 1 << 40;
        assert_eq!(outcome(&s, cmd::WRITE_ZEROES, 0, 1 << 40, 0), (0, 0));
        assert_eq!(outcome(&s, cmd::READ, 0, 1 << 33, 0), (22, 0));
    }

    /// Goal: block status runs for the contexts asked for only. Method: payloads good and bad.
    #[test]
    fn status_payloads() {
        let s = session(Framing::Extended, true);
        let h = header(cmd::BLOCK_STATUS, 0, 12, cmd_flag::PAYLOAD_LEN);
        let run = |len: u64, ids: &[u32]| {
            let mut b = len.to_be_bytes().to_vec();
            ids.iter().for_each(|i| b.extend(i.to_be_bytes()));
            match s.status_payload(&h, &b) {
                Run(Command::BlockStatus { len, contexts, .. }) => Some((len, contexts.base, contexts.depth)),
                Refuse { error: NbdError::Inval, drain: 0, .. } => None,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(run(SIZE, &[0]), Some((SIZE, true, false)));
        assert_eq!(run(512, &[1, 0]), Some((512, true, true)));
        for bad in [&[][..], &[0, 0], &[2], &[0, 9]] {
            assert_eq!(run(512, bad), None);
        }
        assert_eq!((run(0, &[0]), run(SIZE + 1, &[0])), (None, None));
        assert!(matches!(s.status_payload(&h, b"123456789"), Refuse { .. }));
        assert!(matches!(s.status_payload(&h, b""), Refuse { .. }));
    }
}
