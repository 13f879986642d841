//! Character devices for monitors: sockets that listen or connect, and standard input and output.
//!
//! A device is made by `--chardev` and taken by the `--monitor` that names it; until then nothing is read from it.

use super::exports::listen;
use crate::cli::{ChardevBackend, ChardevOptions, ChardevSocket};
use crate::qmp::server::{Acceptor, Server};
use crate::{Errno, Error};
use ringblock_drivers::options::types::{
    Empty, FdSocketAddress, InetSocketAddress, SocketAddress, SocketAddressType, UnixSocketAddress,
};
use ringblock_engine::host::linux::net::{self, Listener};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A character device that no monitor has taken yet.
pub(super) enum Chardev {
    /// Listens; the first client may be there already.
    Listening(Listener, Option<OwnedFd>),
    /// Connected.
    Connected(OwnedFd),
    /// Standard input and output.
    Stdio,
}

impl Chardev {
    /// Makes it. With `wait` it waits here for the first client.
    pub(super) fn open(options: &ChardevOptions) -> Result<Chardev, Error> {
        let socket = match &options.backend {
            ChardevBackend::Stdio(_) => return Ok(Chardev::Stdio),
            ChardevBackend::Socket(socket) => socket,
        };
        let addr = address(socket)?;
        if !socket.server.unwrap_or(false) {
            if socket.wait == Some(true) {
                return Err(Error::invalid(
                    "'wait' option is incompatible with socket in client connect mode",
                ));
            }
            return connect(&addr).map(Chardev::Connected);
        }
        let listener = listen(&addr)?;
        let mut first = None;
        if socket.wait.unwrap_or(true) {
            first = accept(&listener)?;
        }
        Ok(Chardev::Listening(listener, first))
    }

    /// Serves QMP on it; the listener, if any, is given back: dropping it removes the socket's file.
    pub(super) fn serve<C: Send + Sync + 'static>(
        self,
        server: &Server<C>,
        pretty: bool,
    ) -> Result<Option<Listener>, Error> {
        match self {
            Chardev::Stdio => server.stdio(pretty).map(|()| None),
            Chardev::Connected(fd) => server.connect(fd, pretty).map(|()| None),
            Chardev::Listening(listener, first) => {
                if let Some(fd) = first {
                    server.connect(fd, pretty)?;
                }
                serve_listener(server, &listener, pretty)?;
                Ok(Some(listener))
            }
        }
    }
}

/// Serves QMP on every socket of a listener.
pub(super) fn serve_listener<C: Send + Sync + 'static>(
    server: &Server<C>,
    listener: &Listener,
    pretty: bool,
) -> Result<(), Error> {
    listener.fds().try_for_each(|fd| server.listen(fd.try_clone_to_owned().map_err(failed)?, pretty))
}

fn failed(e: std::io::Error) -> Error {
    Error::io(Errno::of(&e), "Could not use a monitor's socket")
}

fn address(o: &ChardevSocket) -> Result<SocketAddress, Error> {
    let kind = match (&o.path, &o.host, &o.port, &o.fd) {
        (Some(path), None, None, None) => SocketAddressType::Unix(UnixSocketAddress { path: path.clone() }),
        (None, Some(host), Some(port), None) => SocketAddressType::Inet(InetSocketAddress {
            host: host.clone(),
            port: port.clone(),
            numeric: None,
            ipv4: None,
            ipv6: None,
        }),
        (None, None, None, Some(fd)) => SocketAddressType::Fd(FdSocketAddress { str: fd.clone() }),
        _ => return Err(Error::invalid("one of path, host with port, and fd is needed")),
    };
    Ok(SocketAddress { base: Empty {}, kind })
}

fn accept(listener: &Listener) -> Result<Option<OwnedFd>, Error> {
    let Some(fd) = listener.fds().next() else { return Ok(None) };
    let socket = Acceptor::new(fd.try_clone_to_owned().map_err(failed)?);
    socket.accept().map(|s| Some(s.into())).map_err(failed)
}

fn connect(addr: &SocketAddress) -> Result<OwnedFd, Error> {
    let could_not = |to: &str, e: Errno| Error::io(e, format!("Failed to connect to '{to}'"));
    match &addr.kind {
        SocketAddressType::Unix(u) => {
            net::connect_unix(Path::new(&u.path)).map_err(|e| could_not(&u.path, e))
        }
        SocketAddressType::Inet(i) => {
            let to = format!("{}:{}", i.host, i.port);
            let port: u16 =
                i.port.parse().map_err(|_| Error::invalid(format!("Invalid port '{}'", i.port)))?;
            let stream = TcpStream::connect((i.host.as_str(), port));
            stream.map(OwnedFd::from).map_err(|e| could_not(&to, Errno::of(&e)))
        }
        SocketAddressType::Fd(fd) => {
            let bad = || Error::invalid(format!("Unable to parse FD number {}", fd.str));
            net::dup_inherited(fd.str.parse().map_err(|_| bad())?).map_err(|e| could_not(&fd.str, e))
        }
    }
}
