//! Listening sockets: made, bound and made to listen here; accepted on a ring.
//!
//! Invariants:
//! - A unix socket appears with its final mode; there is no moment in which others could connect.
//! - Only a dead socket is replaced: never a living server's, never a file of another type.
//! - What is removed at the end is the socket that was made here, not one that replaced it.
//!
//! ```text
//! path exists? ─ no ─────────────────────────────► bind, listen
//!     └ socket ─ connect ─ refused ─► unlink ────►     ↑          (under a lock on the folder)
//!                  └ accepted ─► "Address already in use"
//! ```

use super::sys::{check, cstr, retry_fd};
use crate::error::{Errno, Error};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Longest path of a unix socket in bytes (`sun_path` less the closing NUL).
pub const UNIX_PATH_MAX: usize = 107;

/// How to make a listening unix socket.
#[derive(Clone, Debug)]
pub struct UnixListen {
    /// Where.
    pub path: PathBuf,
    /// Access mode of the socket file; 0600 unless told otherwise.
    pub mode: u32,
    /// Length of the kernel's queue of connections waiting to be accepted.
    pub backlog: i32,
}

impl UnixListen {
    /// A socket only its owner can connect to.
    pub fn private(path: impl Into<PathBuf>) -> UnixListen {
        UnixListen { path: path.into(), mode: 0o600, backlog: 128 }
    }
}

/// How to make a listening TCP socket.
#[derive(Clone, Debug, Default)]
pub struct InetListen {
    /// Name or address; empty for every address of the machine.
    pub host: String,
    /// Port; 0 lets the kernel choose.
    pub port: u16,
    /// Try the ports up to this one while they are taken.
    pub to: Option<u16>,
    /// Use IPv4: yes, no, or whatever the name resolves to.
    pub ipv4: Option<bool>,
    /// Use IPv6, likewise.
    pub ipv6: Option<bool>,
}

/// One server address: its listening descriptors (several where a name has several addresses).
#[derive(Debug)]
pub struct Listener {
    fds: Vec<OwnedFd>,
    local: Vec<SocketAddr>,
    unlink: Option<SocketFile>,
}

impl Listener {
    /// The listening descriptors, blocking, close-on-exec.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.fds.iter().map(AsFd::as_fd)
    }
    /// The addresses bound, in the order of [`fds`](Self::fds); empty for unix sockets.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.local
    }
    /// The path, for unix sockets.
    pub fn path(&self) -> Option<&Path> {
        self.unlink.as_ref().map(|f| f.path.as_path())
    }
}

/// A socket file made here; removed on drop if it still is the one.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    dev: u64,
    ino: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == (self.dev, self.ino)) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Makes a listening unix socket, replacing one whose server is gone.
///
/// Errors: "Failed to bind socket to 'p': …", "UNIX socket path 'p' is too long".
pub fn listen_unix(opts: &UnixListen) -> Result<Listener, Error> {
    let path = opts.path.as_path();
    let failed = |e: Errno| Error::io(e, format!("Failed to bind socket to {}", path.display()));
    check_length(path)?;
    let fd = socket(libc::AF_UNIX).map_err(|e| Error::io(e, "Failed to create Unix socket"))?;
    // SAFETY: fchmod takes no pointer. On Linux a unix socket's file gets the mode of the socket when it is bound.
    check(unsafe { libc::fchmod(fd.as_raw_fd(), opts.mode & 0o777) }).map_err(failed)?;
    let _guard = FolderLock::take(path);
    clear_the_way(path).map_err(failed)?;
    let (addr, len) = unix_addr(path).map_err(failed)?;
    bind(fd.as_fd(), (&raw const addr).cast(), len).map_err(failed)?;
    let made = std::fs::symlink_metadata(path).map_err(|e| failed(Errno::of(&e)))?;
    // Absolute, because a daemon leaves its folder.
    let unlink = SocketFile {
        path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
        dev: made.dev(),
        ino: made.ino(),
    };
    // The umask took its part at bind; the mode asked for is what is wanted.
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(opts.mode & 0o777))
        .map_err(|e| failed(Errno::of(&e)))?;
    listen(fd.as_fd(), opts.backlog).map_err(|e| Error::io(e, "Failed to listen on socket"))?;
    Ok(Listener { fds: vec![fd], local: Vec::new(), unlink: Some(unlink) })
}

/// Is somebody listening on this unix socket?
pub fn unix_is_alive(path: &Path) -> bool {
    !matches!(connect_unix(path), Err(ECONNREFUSED | Errno::ENOENT | ENOTSOCK))
}

const ENOTSOCK: Errno = Errno(libc::ENOTSOCK);
const ECONNREFUSED: Errno = Errno(libc::ECONNREFUSED);
const EADDRINUSE: Errno = Errno(libc::EADDRINUSE);

/// Connects to a unix socket; never waits for a server that does not accept (`EAGAIN`). The descriptor is blocking.
pub fn connect_unix(path: &Path) -> Result<OwnedFd, Errno> {
    let fd = socket(libc::AF_UNIX)?;
    let (addr, len) = unix_addr(path)?;
    set_nonblocking(fd.as_fd(), true)?;
    // SAFETY: `addr` is a sockaddr_un of which `len` bytes are initialised; it lives across the call.
    check(unsafe { libc::connect(fd.as_raw_fd(), (&raw const addr).cast(), len) })?;
    set_nonblocking(fd.as_fd(), false)?;
    Ok(fd)
}

/// Makes listening TCP sockets on every address that the host name stands for.
///
/// Errors: "address resolution failed for h:p: …", "Failed to bind socket: …",
/// "Failed to find an available port: Address already in use".
pub fn listen_inet(opts: &InetListen) -> Result<Listener, Error> {
    let addrs = resolve(opts)?;
    let last = opts.to.unwrap_or(opts.port).max(opts.port);
    for port in opts.port..=last {
        // With port 0 the first address gets a free port and the others try that one: a few attempts find a pair.
        for _ in 0..if port == 0 { 16 } else { 1 } {
            match bind_all(&addrs, port) {
                Err(EADDRINUSE) => {}
                Err(e) => return Err(Error::io(e, "Failed to bind socket")),
                Ok(l) => return Ok(l),
            }
        }
    }
    Err(Error::io(EADDRINUSE, "Failed to find an available port"))
}

/// Takes over a listening descriptor that was inherited (by number): a duplicate is kept.
///
/// Errors: `EBADF`, and `ENOTSOCK` or `EINVAL` if it does not listen.
pub fn listen_inherited(number: RawFd) -> Result<Listener, Error> {
    let bad = |e: Errno| Error::io(e, format!("File descriptor {number} is not a listening socket"));
    let fd = dup_inherited(number).map_err(bad)?;
    if socket_option(fd.as_fd(), libc::SO_ACCEPTCONN).map_err(bad)? == 0 {
        return Err(bad(Errno::EINVAL));
    }
    Ok(Listener { fds: vec![fd], local: Vec::new(), unlink: None })
}

/// A close-on-exec duplicate of an inherited descriptor given by number.
pub fn dup_inherited(number: RawFd) -> Result<OwnedFd, Errno> {
    if number < 0 {
        return Err(Errno::EBADF);
    }
    // SAFETY: duplicating any number is memory-safe; the result is a descriptor of our own.
    retry_fd(|| unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) })
}

/// The numbers of the descriptors passed by socket activation (`LISTEN_PID`, `LISTEN_FDS`; sd_listen_fds(3)).
pub fn activation_fds() -> std::ops::Range<RawFd> {
    let var = |n: &str| std::env::var(n).ok()?.parse::<u32>().ok();
    match (var("LISTEN_PID"), var("LISTEN_FDS")) {
        (Some(pid), Some(n)) if pid == std::process::id() => 3..3 + n.min(64) as RawFd,
        _ => 3..3,
    }
}

/// Switches `O_NONBLOCK`.
pub fn set_nonblocking(fd: BorrowedFd<'_>, on: bool) -> Result<(), Errno> {
    let mut v: libc::c_int = on.into();
    // SAFETY: FIONBIO reads one int, which lives across the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONBIO, &raw mut v) }).map(drop)
}

/// Sends small packets at once (`TCP_NODELAY`); does nothing useful and no harm on other sockets.
pub fn set_nodelay(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)
}

/// Lets the kernel notice dead peers (`SO_KEEPALIVE`).
pub fn set_keepalive(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)
}

fn check_length(path: &Path) -> Result<(), Error> {
    let n = path.as_os_str().as_bytes().len();
    if n > UNIX_PATH_MAX {
        return Err(Error::invalid(format!("UNIX socket path '{}' is too long", path.display())));
    }
    if n == 0 {
        return Err(Error::invalid("UNIX socket path is empty"));
    }
    Ok(())
}

/// Removes a socket file nobody listens on; anything else in the way is `EADDRINUSE`.
fn clear_the_way(path: &Path) -> Result<(), Errno> {
    let meta = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    if !meta.file_type().is_socket() || unix_is_alive(path) {
        return Err(EADDRINUSE);
    }
    Ok(std::fs::remove_file(path)?)
}

/// Keeps two starting servers from each finding the other's socket dead between bind and listen.
struct FolderLock(#[expect(dead_code, reason = "held for its lock, which closing it drops")] std::fs::File);

impl FolderLock {
    /// Best effort: a folder that cannot be locked within a second (network file system) is used without.
    fn take(path: &Path) -> Option<FolderLock> {
        let folder = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        let dir = std::fs::File::open(folder).ok()?;
        for _ in 0..50 {
            match dir.try_lock() {
                Ok(()) => return Some(FolderLock(dir)),
                Err(std::fs::TryLockError::WouldBlock) => {
                    std::thread::sleep(std::time::Duration::from_millis(20))
                }
                Err(std::fs::TryLockError::Error(_)) => return None,
            }
        }
        None
    }
}

fn unix_addr(path: &Path) -> Result<(libc::sockaddr_un, libc::socklen_t), Errno> {
    let bytes = cstr(path)?;
    let bytes = bytes.as_bytes_with_nul();
    if bytes.len() > UNIX_PATH_MAX + 1 {
        return Err(Errno(libc::ENAMETOOLONG));
    }
    let mut path = [0 as libc::c_char; UNIX_PATH_MAX + 1];
    for (to, from) in path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let addr = libc::sockaddr_un { sun_family: libc::AF_UNIX as libc::sa_family_t, sun_path: path };
    Ok((addr, (size_of::<libc::sa_family_t>() + bytes.len()) as libc::socklen_t))
}

fn socket(family: libc::c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: socket takes no pointer.
    retry_fd(|| unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })
}

fn bind(fd: BorrowedFd<'_>, addr: *const libc::sockaddr, len: libc::socklen_t) -> Result<(), Errno> {
    // SAFETY: every caller passes a pointer to a live socket address of which `len` bytes are initialised.
    check(unsafe { libc::bind(fd.as_raw_fd(), addr, len) }).map(drop)
}

fn listen(fd: BorrowedFd<'_>, backlog: i32) -> Result<(), Errno> {
    // SAFETY: listen takes no pointer.
    check(unsafe { libc::listen(fd.as_raw_fd(), backlog.max(1)) }).map(drop)
}

fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: libc::c_int) -> Result<(), Errno> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is one int of the length told, which lives across the call.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), len) }).map(drop)
}

fn socket_option(fd: BorrowedFd<'_>, name: i32) -> Result<libc::c_int, Errno> {
    let mut v: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, one int, and the length; both live across the call.
    let res = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut v).cast(), &raw mut len)
    };
    check(res).map(|_| v)
}

fn resolve(opts: &InetListen) -> Result<Vec<IpAddr>, Error> {
    let no = |v: Option<bool>, other: Option<bool>| v == Some(false) || (v.is_none() && other == Some(true));
    let (no4, no6) = (no(opts.ipv4, opts.ipv6), no(opts.ipv6, opts.ipv4));
    let mut addrs: Vec<IpAddr> = if opts.host.is_empty() {
        vec![Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()]
    } else {
        let host = opts.host.trim_start_matches('[').trim_end_matches(']');
        let found = (host, opts.port).to_socket_addrs().map_err(|e| {
            let text = e.to_string();
            let text = text.rsplit_once("information: ").map_or(text.as_str(), |(_, t)| t);
            Error::invalid(format!("address resolution failed for {}:{}: {text}", opts.host, opts.port))
        })?;
        found.map(|a| a.ip()).collect()
    };
    addrs.retain(|a| if a.is_ipv4() { !no4 } else { !no6 });
    let mut seen = std::collections::HashSet::new();
    addrs.retain(|a| seen.insert(*a));
    if addrs.is_empty() {
        let text = "Address family for hostname not supported";
        return Err(Error::invalid(format!(
            "address resolution failed for {}:{}: {text}",
            opts.host, opts.port
        )));
    }
    Ok(addrs)
}

/// Binds every address to one port. Address families the machine lacks are left out as long as one is left.
fn bind_all(addrs: &[IpAddr], port: u16) -> Result<Listener, Errno> {
    let mut made = Listener { fds: Vec::new(), local: Vec::new(), unlink: None };
    let mut failed = Errno::EINVAL;
    for ip in addrs {
        let port = made.local.first().map_or(port, SocketAddr::port);
        match bind_one(SocketAddr::new(*ip, port)) {
            Ok((fd, local)) => {
                made.fds.push(fd);
                made.local.push(local);
            }
            Err(e @ Errno(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)) => failed = e,
            Err(e) => return Err(e),
        }
    }
    if made.fds.is_empty() { Err(failed) } else { Ok(made) }
}

fn bind_one(addr: SocketAddr) -> Result<(OwnedFd, SocketAddr), Errno> {
    let fd = socket(if addr.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 })?;
    set_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    match addr {
        SocketAddr::V4(a) => {
            let s = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: a.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(a.ip().octets()) },
                sin_zero: [0; 8],
            };
            bind(fd.as_fd(), (&raw const s).cast(), size_of_val(&s) as libc::socklen_t)?;
        }
        SocketAddr::V6(a) => {
            set_option(fd.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
            let s = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: a.port().to_be(),
                sin6_flowinfo: a.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: a.ip().octets() },
                sin6_scope_id: a.scope_id(),
            };
            bind(fd.as_fd(), (&raw const s).cast(), size_of_val(&s) as libc::socklen_t)?;
        }
    }
    listen(fd.as_fd(), 128)?;
    let socket = std::net::TcpListener::from(fd);
    let local = socket.local_addr()?;
    Ok((socket.into(), local))
}

#[cfg(test)]
mod tests {
    use super::super::sys::testdir::TestDir;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// Goal: the mode, the stale-socket rule and the clean-up. Method: a live server refuses a second; after it is
    /// gone without removing its file the path is taken over; a plain file is never removed.
    #[test]
    fn unix_sockets_replace_only_the_dead() {
        let t = TestDir::new();
        let o = UnixListen::private(t.path("s"));
        let a = listen_unix(&o).expect("listen");
        let mode = std::fs::metadata(&o.path).expect("stat").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(unix_is_alive(&o.path));
        let e = listen_unix(&o).expect_err("taken");
        assert_eq!(
            e.message,
            format!("Failed to bind socket to {}: Address already in use", o.path.display())
        );
        // A crash: the descriptor closes, the file stays.
        let Listener { fds, unlink, .. } = a;
        std::mem::forget(unlink);
        drop(fds);
        assert!(!unix_is_alive(&o.path) && o.path.exists());
        let b = listen_unix(&o).expect("stale");
        assert!(connect_unix(&o.path).is_ok());
        drop(b);
        assert!(!o.path.exists());
        std::fs::write(&o.path, b"precious").expect("write");
        assert!(listen_unix(&o).is_err());
        assert_eq!(std::fs::read(&o.path).expect("read"), b"precious");
    }

    /// Goal: a listener that was replaced leaves the new socket alone when it goes.
    #[test]
    fn unlinks_only_its_own() {
        let t = TestDir::new();
        let o = UnixListen::private(t.path("s"));
        let a = listen_unix(&o).expect("listen");
        std::fs::remove_file(&o.path).expect("rm");
        let _b = listen_unix(&o).expect("listen again");
        drop(a);
        assert!(connect_unix(&o.path).is_ok());
        let long = UnixListen::private(t.path(&"x".repeat(120)));
        assert!(listen_unix(&long).expect_err("long").message.ends_with("is too long"));
    }

    /// Goal: port 0 gives one port on both families, a taken port is refused or stepped over, names fail clearly.
    #[test]
    fn inet_ports() {
        let any = listen_inet(&InetListen::default()).expect("any address");
        let ports: Vec<u16> = any.local_addrs().iter().map(SocketAddr::port).collect();
        assert!(ports[0] != 0 && ports.iter().all(|p| *p == ports[0]));
        let v4 = InetListen { host: "127.0.0.1".into(), port: ports[0], ..Default::default() };
        let e = listen_inet(&v4).expect_err("taken");
        assert_eq!(e.message, "Failed to find an available port: Address already in use");
        if let Some(to) = ports[0].checked_add(20) {
            assert!(listen_inet(&InetListen { to: Some(to), ..v4.clone() }).is_ok());
        }
        assert!(std::net::TcpStream::connect(("127.0.0.1", ports[0])).is_ok());
        let nowhere = InetListen { host: "nope.invalid".into(), port: 1, ..Default::default() };
        let text = listen_inet(&nowhere).expect_err("no such name").message;
        assert!(text.starts_with("address resolution failed for nope.invalid:1: "), "{text}");
        let six = InetListen { host: "127.0.0.1".into(), ipv6: Some(true), ..Default::default() };
        assert!(listen_inet(&six).is_err());
    }

    /// Goal: inherited descriptors are checked. Method: a listener, a file, a closed number.
    #[test]
    fn inherited() {
        let l = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        assert!(listen_inherited(l.as_raw_fd()).is_ok());
        let f = std::fs::File::open("/dev/null").expect("open");
        assert!(listen_inherited(f.as_raw_fd()).is_err());
        assert_eq!(listen_inherited(-1).expect_err("negative").errno, Errno::EBADF);
    }
}
