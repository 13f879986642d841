//! Exports and the servers they need.

use super::types::{SocketAddress, SocketAddressLegacy};

crate::qapi! {
    /// What every export has.
    struct BlockExportOptionsBase {
        /// Its name for the control pipe; free again after BLOCK_EXPORT_DELETED.
        id: String = "id",
        /// The node to export.
        node_name: String = "node-name",
        /// Whether clients may write (default: off).
        writable: Option<bool> = "writable",
        /// Whether every write is durable before its answer (default: off).
        writethrough: Option<bool> = "writethrough",
        /// The iothread that serves its clients (default: the cores in turn).
        iothread: Option<String> = "iothread",
        /// Whether it may never leave that iothread (default: off; here it never does).
        fixed_iothread: Option<bool> = "fixed-iothread",
    }

    /// An export of a block node.
    union BlockExportOptions {
        base: BlockExportOptionsBase,
        tag kind: BlockExportType = "type",
        /// Over the NBD server.
        Nbd(BlockExportOptionsNbd) = "nbd",
    }

    /// An NBD export.
    struct BlockExportOptionsNbd: Default {
        /// Its name for clients, at most 4096 bytes (default: the name of the node).
        name: Option<String> = "name",
        /// A text for people, at most 4096 bytes.
        description: Option<String> = "description",
        /// Whether `qemu:allocation-depth` is offered (default: off).
        allocation_depth: Option<bool> = "allocation-depth",
    }

    /// Limits of the NBD server.
    struct NbdServerOptionsBase: Default {
        /// How long a client may take to negotiate, in seconds (default: 10; 0: no limit).
        handshake_max_seconds: Option<u32> = "handshake-max-seconds",
        /// How many clients may be connected (default: 100; 0: no limit).
        max_connections: Option<u32> = "max-connections",
    }

    /// The NBD server.
    struct NbdServerOptions {
        ..NbdServerOptionsBase,
        /// Where it listens.
        addr: SocketAddress = "addr",
    }

    /// The NBD server, as nbd-server-start takes it.
    struct NbdServerOptionsLegacy {
        ..NbdServerOptionsBase,
        /// Where it listens.
        addr: SocketAddressLegacy = "addr",
    }
}

impl From<NbdServerOptionsLegacy> for NbdServerOptions {
    fn from(old: NbdServerOptionsLegacy) -> NbdServerOptions {
        NbdServerOptions { base: old.base, addr: old.addr.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{from_arg, from_json};
    use serde_json::json;

    /// Goal: command line and control pipe give the same server. Method: both spellings of one address.
    #[test]
    fn both_spellings() {
        let a: NbdServerOptions =
            from_arg("addr.type=inet,addr.host=::1,addr.port=10809,max-connections=3", None).unwrap();
        let b: NbdServerOptionsLegacy = from_json(&json!({
            "max-connections": 3, "addr": {"type": "inet", "data": {"host": "::1", "port": "10809"}},
        }))
        .unwrap();
        assert_eq!(NbdServerOptions::from(b), a);
        let missing = from_arg::<NbdServerOptions>("addr.type=unix", None).unwrap_err();
        assert_eq!(missing.message, "Parameter 'addr.path' is missing");
        let range = from_json::<NbdServerOptionsLegacy>(&json!({"max-connections": -1})).unwrap_err();
        assert_eq!(range.message, "Parameter 'max-connections' expects uint32_t");
    }
}
