//! From the address of an option to a listening socket.

use ringblock_engine::Error;
use ringblock_engine::host::linux::net::{
    InetListen, Listener, UnixListen, listen_inet, listen_inherited, listen_unix,
};

use crate::options::types::{SocketAddress, SocketAddressType};

/// Makes the socket an address describes listen. A unix socket is its owner's alone (mode 0600).
///
/// # Errors
/// Those of the host's calls, with the address in the text; "invalid port 'x'", "invalid file descriptor 'x'".
pub fn listen(addr: &SocketAddress) -> Result<Listener, Error> {
    match &addr.kind {
        SocketAddressType::Unix(unix) => listen_unix(&UnixListen::private(&unix.path)),
        SocketAddressType::Inet(inet) => {
            let numeric = inet.numeric == Some(true);
            if numeric && !inet.host.is_empty() && inet.host.parse::<std::net::IpAddr>().is_err() {
                return Err(Error::invalid(format!("'{}' is not a numeric address", inet.host)));
            }
            let port =
                inet.port.parse().map_err(|_| Error::invalid(format!("invalid port '{}'", inet.port)))?;
            let host = inet.host.clone();
            listen_inet(&InetListen { host, port, to: None, ipv4: inet.ipv4, ipv6: inet.ipv6 })
        }
        SocketAddressType::Fd(fd) => {
            let bad = |_| Error::invalid(format!("invalid file descriptor '{}'", fd.str));
            listen_inherited(fd.str.parse().map_err(bad)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::from_arg;

    /// Goal: every spelling reaches its call, and what is wrong is named. Method: good and bad addresses.
    #[test]
    fn addresses() {
        let at = |text: &str| listen(&from_arg::<SocketAddress>(text, None).expect("an address"));
        let ok = at("type=inet,host=127.0.0.1,port=0").expect("any port");
        assert!(ok.local_addrs()[0].port() != 0);
        let e = at("type=inet,host=127.0.0.1,port=nbd").expect_err("no number");
        assert_eq!(e.message, "invalid port 'nbd'");
        assert!(at("type=inet,host=localhost,port=0,numeric=on").is_err());
        assert!(at("type=unix,path=/nonexistent/x").is_err());
        assert_eq!(at("type=fd,str=x").expect_err("no number").message, "invalid file descriptor 'x'");
    }
}
