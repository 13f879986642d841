//! A small NBD client of our own: several can be driven at once from threads, and it can misbehave.
//!
//! Speaks fixed newstyle with `NBD_OPT_GO` and simple replies (no structured replies are asked for), one
//! request at a time or pipelined by hand. Source: the NBD protocol's `doc/proto.md`.
//!
//! ```text
//!   connect ─► greeting ─► flags ─► OPT_GO(name) ─► INFO*, ACK ─► request / simple reply …
//! ```

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Commands.
pub const READ: u16 = 0;
/// See [`READ`].
pub const WRITE: u16 = 1;
/// See [`READ`].
pub const DISC: u16 = 2;
/// See [`READ`].
pub const FLUSH: u16 = 3;
/// See [`READ`].
pub const TRIM: u16 = 4;
/// See [`READ`].
pub const WRITE_ZEROES: u16 = 6;
/// Command flag: force unit access.
pub const FLAG_FUA: u16 = 1;
/// Command flag of write-zeroes: keep the space allocated.
pub const FLAG_NO_HOLE: u16 = 2;

/// Transmission flags: read-only.
pub const HAS_READ_ONLY: u16 = 1 << 1;
/// Transmission flags: flush.
pub const HAS_FLUSH: u16 = 1 << 2;
/// Transmission flags: FUA.
pub const HAS_FUA: u16 = 1 << 3;
/// Transmission flags: trim.
pub const HAS_TRIM: u16 = 1 << 5;
/// Transmission flags: write zeroes.
pub const HAS_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flags: several connections see one disk.
pub const HAS_MULTI_CONN: u16 = 1 << 8;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPT_MAGIC: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;

/// A connection in the transmission phase.
#[derive(Debug)]
pub struct Nbd<S = UnixStream> {
    stream: S,
    /// The size of the export in bytes.
    pub size: u64,
    /// Its transmission flags.
    pub flags: u16,
    cookie: u64,
}

impl Nbd {
    /// Connects to the export `name` of the server at `path`.
    pub fn connect(path: &str, name: &str) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        Self::over(stream, name)
    }

    /// Gives up on a send or a receive that takes longer than `limit` (60 s unless told).
    pub fn patience(&self, limit: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(limit))?;
        self.stream.set_write_timeout(Some(limit))
    }
}

impl<S: Read + Write> Nbd<S> {
    /// Enters the export `name` over a connection on which nothing was said yet.
    pub fn over(mut stream: S, name: &str) -> io::Result<Self> {
        if (u64_from(&mut stream)?, u64_from(&mut stream)?) != (MAGIC, OPT_MAGIC) {
            return Err(bad("greeting"));
        }
        let server_flags = u16_from(&mut stream)?;
        if server_flags & 1 == 0 {
            return Err(bad("not fixed newstyle"));
        }
        // Answer with the flags offered: fixed newstyle and, where offered, no zeroes.
        stream.write_all(&u32::from(server_flags & 3).to_be_bytes())?;
        stream.write_all(&go(name))?;
        let (size, flags) = negotiate(&mut stream)?;
        Ok(Self { stream, size, flags, cookie: 0 })
    }

    /// Sends a request and returns its cookie; `data` is the payload of a write.
    pub fn submit(&mut self, cmd: u16, flags: u16, offset: u64, len: u32, data: &[u8]) -> io::Result<u64> {
        self.cookie += 1;
        let mut message = Vec::with_capacity(28 + data.len());
        message.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        message.extend_from_slice(&flags.to_be_bytes());
        message.extend_from_slice(&cmd.to_be_bytes());
        message.extend_from_slice(&self.cookie.to_be_bytes());
        message.extend_from_slice(&offset.to_be_bytes());
        message.extend_from_slice(&len.to_be_bytes());
        message.extend_from_slice(data);
        self.stream.write_all(&message)?;
        Ok(self.cookie)
    }

    /// Receives a reply's header: the cookie and the NBD error number (0 = done).
    pub fn reply(&mut self) -> io::Result<(u64, u32)> {
        if u32_from(&mut self.stream)? != SIMPLE_REPLY_MAGIC {
            return Err(bad("reply magic"));
        }
        let error = u32_from(&mut self.stream)?;
        Ok((u64_from(&mut self.stream)?, error))
    }

    /// Receives the payload of a read reply.
    pub fn payload(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.stream.read_exact(buf)
    }

    fn call(&mut self, cmd: u16, flags: u16, offset: u64, len: u32, data: &[u8]) -> io::Result<()> {
        let sent = self.submit(cmd, flags, offset, len, data)?;
        let (cookie, error) = self.reply()?;
        if cookie != sent {
            return Err(bad("another request's reply"));
        }
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error as i32));
        }
        Ok(())
    }

    /// Reads `buf.len()` bytes at `offset`.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.call(READ, 0, offset, buf.len() as u32, &[])?;
        self.payload(buf)
    }

    /// Writes `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8], flags: u16) -> io::Result<()> {
        self.call(WRITE, flags, offset, data.len() as u32, data)
    }

    /// Writes zeroes.
    pub fn zero(&mut self, offset: u64, len: u32, flags: u16) -> io::Result<()> {
        self.call(WRITE_ZEROES, flags, offset, len, &[])
    }

    /// Discards.
    pub fn trim(&mut self, offset: u64, len: u32) -> io::Result<()> {
        self.call(TRIM, 0, offset, len, &[])
    }

    /// Makes all completed writes durable.
    pub fn flush(&mut self) -> io::Result<()> {
        self.call(FLUSH, 0, 0, 0, &[])
    }

    /// Says good-bye and closes.
    pub fn close(mut self) {
        let _ = self.submit(DISC, 0, 0, 0, &[]);
    }
}

fn go(name: &str) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&0u16.to_be_bytes());
    let mut option = OPT_MAGIC.to_be_bytes().to_vec();
    option.extend_from_slice(&OPT_GO.to_be_bytes());
    option.extend_from_slice(&(data.len() as u32).to_be_bytes());
    option.extend_from_slice(&data);
    option
}

/// Reads the answers to `OPT_GO`; returns the export's size and flags.
fn negotiate(stream: &mut impl Read) -> io::Result<(u64, u16)> {
    let mut export = None;
    loop {
        if u64_from(stream)? != REPLY_MAGIC || u32_from(stream)? != OPT_GO {
            return Err(bad("option reply"));
        }
        let (kind, len) = (u32_from(stream)?, u32_from(stream)?);
        if len > 65536 {
            return Err(bad("an option reply over 64 KiB"));
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        match kind {
            REP_ACK => return export.ok_or_else(|| bad("no NBD_INFO_EXPORT")),
            REP_INFO if data.len() == 12 && data[..2] == [0, 0] => {
                let size = u64::from_be_bytes(data[2..10].try_into().expect("8 bytes"));
                export = Some((size, u16::from_be_bytes([data[10], data[11]])));
            }
            REP_INFO => {}
            _ => {
                let text = String::from_utf8_lossy(&data).into_owned();
                return Err(io::Error::other(format!("server refused: {kind:#x} {text}")));
            }
        }
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("NBD: {what}"))
}

fn u16_from(stream: &mut impl Read) -> io::Result<u16> {
    let mut b = [0; 2];
    stream.read_exact(&mut b).map(|()| u16::from_be_bytes(b))
}

fn u32_from(stream: &mut impl Read) -> io::Result<u32> {
    let mut b = [0; 4];
    stream.read_exact(&mut b).map(|()| u32::from_be_bytes(b))
}

fn u64_from(stream: &mut impl Read) -> io::Result<u64> {
    let mut b = [0; 8];
    stream.read_exact(&mut b).map(|()| u64::from_be_bytes(b))
}
