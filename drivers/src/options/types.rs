//! Small types that several structures share.

crate::qapi! {
    /// Nothing.
    struct Empty: Default {}

    /// On, off, or whatever fits.
    enum OnOffAuto {
        /// Decided by the driver.
        Auto = "auto",
        /// On.
        On = "on",
        /// Off.
        Off = "off",
    }

    /// What happens to discard requests.
    enum BlockdevDiscardOptions {
        /// They succeed and do nothing.
        Ignore = "ignore",
        /// They free space.
        Unmap = "unmap",
    }

    /// Whether writes are searched for zeroes.
    enum BlockdevDetectZeroesOptions {
        /// No.
        Off = "off",
        /// Writes of zeroes become zero writes that keep their space.
        On = "on",
        /// Writes of zeroes become zero writes that free space; needs discard=unmap.
        Unmap = "unmap",
    }

    /// How a host file is read and written; all of them use io_uring here.
    enum BlockdevAioOptions {
        /// Accepted for compatibility.
        Threads = "threads",
        /// Accepted for compatibility; needs cache.direct=on.
        Native = "native",
        /// io_uring.
        IoUring = "io_uring",
    }

    /// How a node uses the host's page cache.
    struct BlockdevCacheOptions: Default {
        /// Go past the page cache with O_DIRECT (default: off).
        direct: Option<bool> = "direct",
        /// Ignore flush requests; the data does not survive a crash of the host (default: off).
        no_flush: Option<bool> = "no-flush",
    }

    /// What a user does to a node, or lets others do.
    enum BlockPermission {
        /// Read what was written.
        ConsistentRead = "consistent-read",
        /// Write.
        Write = "write",
        /// Write what is there already.
        WriteUnchanged = "write-unchanged",
        /// Change the size.
        Resize = "resize",
    }

    /// A TCP address.
    struct InetSocketAddress {
        /// Host name or address.
        host: String = "host",
        /// Port number, 0 for any free one.
        port: String = "port",
        /// Whether host names are not looked up: only addresses are accepted (default: off).
        numeric: Option<bool> = "numeric",
        /// Whether IPv4 addresses may be used (default: both, if neither is given).
        ipv4: Option<bool> = "ipv4",
        /// Whether IPv6 addresses may be used (default: both, if neither is given).
        ipv6: Option<bool> = "ipv6",
    }

    /// A unix socket.
    struct UnixSocketAddress {
        /// Its path in the file system.
        path: String = "path",
    }

    /// An open file descriptor.
    struct FdSocketAddress {
        /// Its number; it must be a listening socket that this process inherited.
        str: String = "str",
    }

    /// Where a server listens.
    union SocketAddress {
        base: Empty,
        tag kind: SocketAddressType = "type",
        /// TCP.
        Inet(InetSocketAddress) = "inet",
        /// A unix socket.
        Unix(UnixSocketAddress) = "unix",
        /// An inherited descriptor.
        Fd(FdSocketAddress) = "fd",
    }

    /// A TCP address in an envelope.
    struct InetSocketAddressWrapper {
        /// The address.
        data: InetSocketAddress = "data",
    }

    /// A unix socket in an envelope.
    struct UnixSocketAddressWrapper {
        /// The address.
        data: UnixSocketAddress = "data",
    }

    /// A descriptor in an envelope.
    struct FdSocketAddressWrapper {
        /// The descriptor.
        data: FdSocketAddress = "data",
    }

    /// Where a server listens, in the older form with `data` inside.
    union SocketAddressLegacy {
        base: Empty,
        tag kind: SocketAddressLegacyType = "type",
        /// TCP.
        Inet(InetSocketAddressWrapper) = "inet",
        /// A unix socket.
        Unix(UnixSocketAddressWrapper) = "unix",
        /// An inherited descriptor.
        Fd(FdSocketAddressWrapper) = "fd",
    }
}

impl From<SocketAddressLegacy> for SocketAddress {
    fn from(old: SocketAddressLegacy) -> SocketAddress {
        let kind = match old.kind {
            SocketAddressLegacyType::Inet(w) => SocketAddressType::Inet(w.data),
            SocketAddressLegacyType::Unix(w) => SocketAddressType::Unix(w.data),
            SocketAddressLegacyType::Fd(w) => SocketAddressType::Fd(w.data),
        };
        SocketAddress { base: Empty {}, kind }
    }
}

/// Whether a text may name a node, an export or an object: a letter, then letters, digits, `-`, `.`, `_`.
pub fn is_id(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}
