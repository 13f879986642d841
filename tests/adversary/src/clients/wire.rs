//! Connections to a server, over either kind of socket, and the bytes that a client may say, good or bad.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Where a server listens.
#[derive(Clone, Debug)]
pub(super) enum Address {
    Unix(String),
    Tcp(u16),
}

/// A connection.
#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// What a client of ours waits for an answer, or for room to say something.
const PATIENCE: Duration = Duration::from_secs(5);

impl Address {
    /// Connects.
    pub(super) fn connect(&self) -> io::Result<Stream> {
        let stream = match self {
            Address::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
            Address::Tcp(port) => {
                let stream = TcpStream::connect(("127.0.0.1", *port))?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
        };
        stream.patience(PATIENCE)?;
        Ok(stream)
    }

    /// Connects, reads the greeting and answers it.
    pub(super) fn greeted(&self) -> io::Result<Stream> {
        let mut stream = self.connect()?;
        stream.read_exact(&mut [0; 18])?;
        stream.write_all(&3u32.to_be_bytes())?;
        Ok(stream)
    }
}

impl Stream {
    pub(super) fn patience(&self, limit: Duration) -> io::Result<()> {
        match self {
            Stream::Unix(s) => {
                s.set_read_timeout(Some(limit)).and_then(|()| s.set_write_timeout(Some(limit)))
            }
            Stream::Tcp(s) => s.set_read_timeout(Some(limit)).and_then(|()| s.set_write_timeout(Some(limit))),
        }
    }

    /// Says that nothing more will be said.
    pub(super) fn half_close(&self) -> io::Result<()> {
        match self {
            Stream::Unix(s) => s.shutdown(Shutdown::Write),
            Stream::Tcp(s) => s.shutdown(Shutdown::Write),
        }
    }

    /// Reads what there is, without waiting long, and throws it away.
    pub(super) fn drain(&mut self) {
        let _ = self.patience(Duration::from_millis(20));
        let mut buf = [0; 16 << 10];
        while matches!(self.read(&mut buf), Ok(n) if n > 0) {}
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.read(buf),
            Stream::Tcp(s) => s.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(s) => s.write(buf),
            Stream::Tcp(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An option that says its data are `len` bytes.
pub(super) fn option_of(number: u32, len: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &number.to_be_bytes(), &len.to_be_bytes(), data].concat()
}

/// An honest option.
pub(super) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    option_of(number, data.len() as u32, data)
}

/// `NBD_OPT_GO` for an export.
pub(super) fn go(name: &[u8]) -> Vec<u8> {
    option(7, &[&(name.len() as u32).to_be_bytes(), name, &[0, 0]].concat())
}

/// `NBD_OPT_SET_META_CONTEXT` for an export.
pub(super) fn contexts(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = [&(name.len() as u32).to_be_bytes(), name, &(queries.len() as u32).to_be_bytes()].concat();
    for q in queries {
        data.extend((q.len() as u32).to_be_bytes());
        data.extend_from_slice(q);
    }
    option(10, &data)
}

/// A request in a simple or structured session.
pub(super) fn request(flags: u16, command: u16, cookie: u64, off: u64, len: u32) -> Vec<u8> {
    let head = [&0x2560_9513u32.to_be_bytes()[..], &flags.to_be_bytes(), &command.to_be_bytes()].concat();
    [&head[..], &cookie.to_be_bytes(), &off.to_be_bytes(), &len.to_be_bytes()].concat()
}

/// A request in a session with extended headers.
pub(super) fn extended(flags: u16, command: u16, cookie: u64, off: u64, len: u64) -> Vec<u8> {
    let head = [&0x21e4_1c71u32.to_be_bytes()[..], &flags.to_be_bytes(), &command.to_be_bytes()].concat();
    [&head[..], &cookie.to_be_bytes(), &off.to_be_bytes(), &len.to_be_bytes()].concat()
}
