//! The NBD wire format: numbers, request headers in, reply headers and chunks out.
//!
//! Source: the public NBD protocol document (NetworkBlockDevice, doc/proto.md). Everything is big-endian.
//! Nothing here reads a socket or decides anything; encoders append to a buffer the connection reuses, so
//! that replies cost no allocation once the buffer has grown to its bound.
//!
//! ```text
//! compact request   magic4 flags2 type2 cookie8 offset8 length4            28 bytes
//! extended request  magic4 flags2 type2 cookie8 offset8 length8            32
//! simple reply      magic4 error4 cookie8                       [data]     16
//! structured chunk  magic4 flags2 type2 cookie8 length4         [payload]  20
//! extended chunk    magic4 flags2 type2 cookie8 offset8 length8 [payload]  32
//! ```

use ringblock_engine::Errno;

/// First magic of the greeting, "NBDMAGIC".
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the greeting and of every option, "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of an option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Magic of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of a compact request header.
pub const COMPACT_REQUEST: usize = 28;
/// Bytes of an extended request header.
pub const EXTENDED_REQUEST: usize = 32;
/// The longest string of the protocol (names, queries, error texts).
pub const MAX_STRING: usize = 4096;
/// The largest payload of a read or write that is served, and the maximum block size advertised.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// Bits of the handshake, both directions.
pub mod handshake_flag {
    #![allow(missing_docs)]
    pub const FIXED_NEWSTYLE: u16 = 1;
    pub const NO_ZEROES: u16 = 2;
}

/// Numbers of the options.
pub mod opt {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of option replies; errors have the top bit set.
pub mod rep {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_POLICY: u32 = 0x8000_0002;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_SHUTDOWN: u32 = 0x8000_0007;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    pub const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

/// Information items of `NBD_OPT_INFO` and `NBD_OPT_GO`.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod flag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Commands.
pub mod cmd {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of a command.
pub mod cmd_flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Flag of a chunk: the last one of its reply.
pub const CHUNK_DONE: u16 = 1;

/// Types of reply chunks.
pub mod chunk {
    #![allow(missing_docs)]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = 0x8001;
}

/// An error as the protocol numbers it; the numbers are fixed and not those of the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum NbdError {
    /// Not permitted; the export is read-only.
    Perm = 1,
    /// Input or output error.
    Io = 5,
    /// Out of memory.
    NoMem = 12,
    /// Invalid argument.
    Inval = 22,
    /// No space left.
    NoSpc = 28,
    /// The reply would be too large.
    Overflow = 75,
    /// Not supported; for a fast zero: it would not be fast.
    NotSup = 95,
    /// The server is shutting down.
    Shutdown = 108,
}

impl NbdError {
    /// The number a client gets for a failure of the engine; what has no number of its own is an I/O error,
    /// except that unusual arguments stay arguments.
    pub fn of(e: Errno) -> NbdError {
        match e {
            Errno::EPERM | Errno::EROFS | Errno::EACCES => NbdError::Perm,
            Errno::ENOMEM => NbdError::NoMem,
            Errno::EINVAL => NbdError::Inval,
            Errno::ENOSPC | Errno::EFBIG => NbdError::NoSpc,
            Errno::EOVERFLOW => NbdError::Overflow,
            Errno::ENOTSUP => NbdError::NotSup,
            Errno::ESHUTDOWN => NbdError::Shutdown,
            _ => NbdError::Io,
        }
    }

    /// A short text for a structured error chunk.
    pub fn text(self) -> &'static str {
        match self {
            NbdError::Perm => "operation not permitted",
            NbdError::Io => "input/output error",
            NbdError::NoMem => "cannot allocate memory",
            NbdError::Inval => "invalid argument",
            NbdError::NoSpc => "no space left on device",
            NbdError::Overflow => "value too large",
            NbdError::NotSup => "operation not supported",
            NbdError::Shutdown => "server is shutting down",
        }
    }
}

/// How requests and replies are framed, as negotiated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Framing {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, structured replies where they carry something.
    Structured,
    /// Extended requests and replies.
    Extended,
}

impl Framing {
    /// Bytes of a request header.
    pub fn request_len(self) -> usize {
        match self {
            Framing::Extended => EXTENDED_REQUEST,
            _ => COMPACT_REQUEST,
        }
    }
}

/// A request header as it came, nothing in it checked but the magic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestHeader {
    /// Command flags, [`cmd_flag`].
    pub flags: u16,
    /// Command, [`cmd`].
    pub ty: u16,
    /// The client's token, returned untouched.
    pub cookie: u64,
    /// Guest offset in bytes.
    pub offset: u64,
    /// Length in bytes: of the effect, or of the payload.
    pub len: u64,
}

/// Why a header does not parse.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HeaderError {
    /// More bytes are needed.
    Short,
    /// The magic is wrong: the stream is out of step and the connection must end.
    Magic,
}

/// Big-endian integers at fixed places of a slice; `None` when it ends before.
pub fn be16(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(b.get(at..)?.first_chunk().copied()?))
}
/// See [`be16`].
pub fn be32(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(b.get(at..)?.first_chunk().copied()?))
}
/// See [`be16`].
pub fn be64(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(b.get(at..)?.first_chunk().copied()?))
}

impl RequestHeader {
    /// Parses the header at the front of `b`, in the framing negotiated.
    ///
    /// # Errors
    /// [`HeaderError::Short`] if the header is not all there, [`HeaderError::Magic`] if it is none.
    pub fn parse(b: &[u8], framing: Framing) -> Result<RequestHeader, HeaderError> {
        let want = if framing == Framing::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        if be32(b, 0).ok_or(HeaderError::Short)? != want {
            return Err(HeaderError::Magic);
        }
        let fields = || {
            Some(RequestHeader {
                flags: be16(b, 4)?,
                ty: be16(b, 6)?,
                cookie: be64(b, 8)?,
                offset: be64(b, 16)?,
                len: if framing == Framing::Extended { be64(b, 24)? } else { be32(b, 24)?.into() },
            })
        };
        fields().ok_or(HeaderError::Short)
    }
}

fn put(out: &mut Vec<u8>, b: &[u8]) {
    out.extend_from_slice(b);
}

/// Appends a simple reply.
pub fn simple_reply(out: &mut Vec<u8>, cookie: u64, error: Option<NbdError>) {
    let mut h = [0u8; 16];
    h[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    h[4..8].copy_from_slice(&error.map_or(0, |e| e as u32).to_be_bytes());
    h[8..].copy_from_slice(&cookie.to_be_bytes());
    put(out, &h);
}

/// What every reply to one request repeats.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReplyTo {
    /// The framing of the connection.
    pub framing: Framing,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset, which extended chunks carry.
    pub offset: u64,
}

/// Appends the header of a chunk whose payload is `len` bytes; `framing` must not be simple.
pub fn chunk_header(out: &mut Vec<u8>, to: ReplyTo, flags: u16, ty: u16, len: u32) {
    if to.framing == Framing::Extended {
        let mut h = [0u8; 32];
        h[..4].copy_from_slice(&EXTENDED_REPLY_MAGIC.to_be_bytes());
        h[4..6].copy_from_slice(&flags.to_be_bytes());
        h[6..8].copy_from_slice(&ty.to_be_bytes());
        h[8..16].copy_from_slice(&to.cookie.to_be_bytes());
        h[16..24].copy_from_slice(&to.offset.to_be_bytes());
        h[24..].copy_from_slice(&u64::from(len).to_be_bytes());
        put(out, &h);
    } else {
        let mut h = [0u8; 20];
        h[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        h[4..6].copy_from_slice(&flags.to_be_bytes());
        h[6..8].copy_from_slice(&ty.to_be_bytes());
        h[8..16].copy_from_slice(&to.cookie.to_be_bytes());
        h[16..].copy_from_slice(&len.to_be_bytes());
        put(out, &h);
    }
}

/// Appends what goes before the `len` bytes of data of a successful read. A zero-length read is whole
/// with this alone.
pub fn read_head(out: &mut Vec<u8>, to: ReplyTo, len: u32) {
    match to.framing {
        Framing::Simple => simple_reply(out, to.cookie, None),
        _ if len == 0 => chunk_header(out, to, CHUNK_DONE, chunk::NONE, 0),
        _ => {
            chunk_header(out, to, CHUNK_DONE, chunk::OFFSET_DATA, len.saturating_add(8));
            put(out, &to.offset.to_be_bytes());
        }
    }
}

/// Appends a whole successful read reply that says "all zeroes"; only with chunks, and `len` not 0.
pub fn hole(out: &mut Vec<u8>, to: ReplyTo, len: u32) {
    chunk_header(out, to, CHUNK_DONE, chunk::OFFSET_HOLE, 12);
    put(out, &to.offset.to_be_bytes());
    put(out, &len.to_be_bytes());
}

/// Appends the reply to a command that succeeded and carries nothing back.
///
/// With structured replies the simple form stays allowed for commands other than read, and is shorter.
pub fn done(out: &mut Vec<u8>, to: ReplyTo) {
    match to.framing {
        Framing::Extended => chunk_header(out, to, CHUNK_DONE, chunk::NONE, 0),
        _ => simple_reply(out, to.cookie, None),
    }
}

/// Appends an error reply; `text` is for people and is cut at the protocol's limit.
pub fn error_reply(out: &mut Vec<u8>, to: ReplyTo, error: NbdError, text: &str) {
    if to.framing == Framing::Simple {
        return simple_reply(out, to.cookie, Some(error));
    }
    let text = clip(text);
    // `clip` bounds the text by 4096, so the sums fit.
    chunk_header(out, to, CHUNK_DONE, chunk::ERROR, 6 + text.len() as u32);
    put(out, &(error as u32).to_be_bytes());
    put(out, &(text.len() as u16).to_be_bytes());
    put(out, text.as_bytes());
}

/// Cuts a text to [`MAX_STRING`] bytes at a character boundary.
pub fn clip(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_STRING)]
}

/// Appends one reply of the option phase.
pub fn option_reply(out: &mut Vec<u8>, option: u32, ty: u32, payload: &[&[u8]]) {
    let len: usize = payload.iter().map(|p| p.len()).sum();
    put(out, &OPTION_REPLY_MAGIC.to_be_bytes());
    put(out, &option.to_be_bytes());
    put(out, &ty.to_be_bytes());
    // Every caller's parts are bounded strings and integers, far below 4 GiB.
    put(out, &(len as u32).to_be_bytes());
    for p in payload {
        put(out, p);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(s: &str) -> Vec<u8> {
        (0..s.len()).step_by(2).map(|i| u8::from_str_radix(&s[i..i + 2], 16).unwrap()).collect()
    }
    const TO: ReplyTo = ReplyTo { framing: Framing::Structured, cookie: 0x1122_3344_5566_7788, offset: 0 };

    /// Goal: replies equal, byte for byte, what qemu-storage-daemon 10.0.2 was seen to send.
    /// Method: encode the same replies.
    #[test]
    fn replies_equal_the_peers() {
        let mut o = Vec::new();
        simple_reply(&mut o, TO.cookie, None);
        assert_eq!(o, hex("67446698000000001122334455667788"));
        o.clear();
        read_head(&mut o, TO, 16);
        assert_eq!(
            o,
            hex("668e33ef0001000111223344556677880000001800000000 00000000".replace(' ', "").as_str())
        );
        o.clear();
        read_head(&mut o, TO, 0);
        assert_eq!(o, hex("668e33ef00010000112233445566778800000000"));
        o.clear();
        hole(&mut o, ReplyTo { offset: 0x20000, ..TO }, 16);
        assert_eq!(o, hex("668e33ef0001000211223344556677880000000c000000000002000000000010"));
        o.clear();
        error_reply(&mut o, TO, NbdError::Inval, "need non-zero length");
        assert_eq!(
            o,
            hex(
                "668e33ef0001800111223344556677880000001a0000001600146e656564206e6f6e2d7a65726f206c656e677468"
            )
        );
        o.clear();
        done(&mut o, ReplyTo { framing: Framing::Extended, ..TO });
        assert_eq!(o, hex("6e8a278c00010000112233445566778800000000000000000000000000000000"));
        o.clear();
        read_head(&mut o, ReplyTo { framing: Framing::Extended, ..TO }, 16);
        assert_eq!(
            o,
            hex("6e8a278c000100011122334455667788000000000000000000000000000000180000000000000000")
        );
    }

    /// Goal: headers parse in both framings, and neither short nor foreign input does.
    /// Method: one header of each kind, all its prefixes, and a flipped magic.
    #[test]
    fn headers() {
        let mut b = hex("25609513000100000102030405060708000000000000100000000200");
        let h = RequestHeader::parse(&b, Framing::Simple).unwrap();
        let want = RequestHeader { flags: 1, ty: 0, cookie: 0x0102_0304_0506_0708, offset: 4096, len: 512 };
        assert_eq!(h, want);
        for n in 0..b.len() {
            assert_eq!(RequestHeader::parse(&b[..n], Framing::Structured), Err(HeaderError::Short));
        }
        assert_eq!(RequestHeader::parse(&b, Framing::Extended), Err(HeaderError::Magic));
        b[0] ^= 1;
        assert_eq!(RequestHeader::parse(&b, Framing::Simple), Err(HeaderError::Magic));
        let x = hex("21e41c71002000010102030405060708ffffffffffffffff0000000200000000");
        let h = RequestHeader::parse(&x, Framing::Extended).unwrap();
        assert_eq!((h.flags, h.ty, h.offset, h.len), (0x20, 1, u64::MAX, 2 << 32));
    }

    /// Goal: an error text never breaks the limits of the protocol. Method: a text of two-byte letters
    /// over the limit.
    #[test]
    fn long_texts_are_cut() {
        let mut o = Vec::new();
        error_reply(&mut o, TO, NbdError::Io, &"x\u{e9}".repeat(3000));
        assert_eq!(be32(&o, 16).unwrap() as usize, o.len() - 20);
        assert!(usize::from(be16(&o, 24).unwrap()) <= MAX_STRING);
        assert!(std::str::from_utf8(&o[26..]).is_ok());
    }

    /// Goal: host error numbers that differ from the protocol's arrive as the protocol's. Method: samples.
    #[test]
    fn errors_map() {
        assert_eq!(NbdError::of(Errno::EROFS), NbdError::Perm);
        assert_eq!(NbdError::of(Errno::EFBIG), NbdError::NoSpc);
        assert_eq!(NbdError::of(Errno::EBUSY), NbdError::Io);
        assert_eq!(NbdError::Shutdown as u32, 108);
    }
}
