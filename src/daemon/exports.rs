//! Commands about exports and the NBD server.

use super::{Daemon, lock};
use crate::qmp::dispatch::{Call, Registry};
use crate::{Errno, Error};
use ringblock_drivers::export::RemoveMode;
use ringblock_drivers::export::nbd::{NbdExportOptions, NbdServer, ServerConfig};
use ringblock_drivers::options::export::{
    BlockExportOptions, BlockExportType, NbdServerOptions, NbdServerOptionsLegacy,
};
use ringblock_drivers::options::types::{Empty, SocketAddress, SocketAddressType};
use ringblock_engine::host::linux::net::{
    InetListen, Listener, UnixListen, listen_inet, listen_inherited, listen_unix,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

ringblock_drivers::qapi! {
    /// How an export is removed.
    enum BlockExportRemoveMode {
        /// Only if no client is connected.
        Safe = "safe",
        /// Clients are cut.
        Hard = "hard",
    }

    /// Arguments of block-export-del.
    struct BlockExportDelArgs {
        /// The export.
        id: String = "id",
        /// How (default: safe).
        mode: Option<BlockExportRemoveMode> = "mode",
    }

    /// Types of exports.
    enum BlockExportTypeName {
        /// NBD.
        Nbd = "nbd",
    }

    /// An export.
    struct BlockExportInfo {
        /// Its id.
        id: String = "id",
        /// Its type.
        kind: BlockExportTypeName = "type",
        /// The node it shows.
        node_name: String = "node-name",
        /// Whether it is being removed.
        shutting_down: bool = "shutting-down",
    }

    /// Arguments of nbd-server-add.
    struct NbdServerAddArgs {
        /// Name for clients, and id (default: the name of the node).
        name: Option<String> = "name",
        /// A text for people.
        description: Option<String> = "description",
        /// The node.
        device: String = "device",
        /// Whether clients may write, if the node can be written (default: off).
        writable: Option<bool> = "writable",
    }

    /// Arguments of nbd-server-remove.
    struct NbdServerRemoveArgs {
        /// The export.
        name: String = "name",
        /// How (default: safe).
        mode: Option<BlockExportRemoveMode> = "mode",
    }
}

/// How long the answer to a removal waits for its end.
const GONE_SOON: Duration = Duration::from_millis(200);

type DaemonCall<'a> = Call<'a, Daemon>;

/// Adds the commands.
pub(super) fn register(registry: &mut Registry<Daemon>) {
    registry.command("nbd-server-start", |call: &DaemonCall<'_>, args: NbdServerOptionsLegacy| {
        call.context.nbd_server_start(&args.into()).map(|()| Empty {})
    });
    registry.command("nbd-server-stop", |call: &DaemonCall<'_>, _: Empty| {
        call.context.nbd_server_stop().map(|()| Empty {})
    });
    registry.marked_command("nbd-server-add", &["deprecated"], |call: &DaemonCall<'_>, args| {
        call.context.nbd_server_add(args).map(|()| Empty {})
    });
    registry.marked_command(
        "nbd-server-remove",
        &["deprecated"],
        |call: &DaemonCall<'_>, args: NbdServerRemoveArgs| remove(call, &args.name, args.mode),
    );
    registry.command("block-export-add", |call: &DaemonCall<'_>, options: BlockExportOptions| {
        call.context.block_export_add(options).map(|()| Empty {})
    });
    registry.command("block-export-del", |call: &DaemonCall<'_>, args: BlockExportDelArgs| {
        remove(call, &args.id, args.mode)
    });
    registry.command("query-block-exports", |call: &DaemonCall<'_>, _: Empty| {
        Ok(call.context.query_block_exports())
    });
}

fn remove(call: &DaemonCall<'_>, id: &str, mode: Option<BlockExportRemoveMode>) -> Result<Empty, Error> {
    let mode = match mode {
        Some(BlockExportRemoveMode::Hard) => RemoveMode::Hard,
        _ => RemoveMode::Safe,
    };
    let exports = &call.context.exports;
    exports.remove(id, mode)?;
    // An export without clients is gone in a moment. Scripts count on that, so the answer waits for it a little.
    let end = Instant::now() + GONE_SOON;
    while Instant::now() < end && exports.query().iter().any(|e| e.id == id) {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(Empty {})
}

impl Daemon {
    /// Starts the NBD server. One at a time.
    pub fn nbd_server_start(&self, options: &NbdServerOptions) -> Result<(), Error> {
        let storage = self.storage()?;
        let mut nbd = lock(&self.nbd);
        if nbd.is_some() {
            return Err(Error::new(Errno::EBUSY, "NBD server already running"));
        }
        let config = ServerConfig {
            max_connections: options.base.max_connections.unwrap_or(100),
            handshake_seconds: options.base.handshake_max_seconds.unwrap_or(10),
            ..ServerConfig::default()
        };
        let listener = listen(&options.addr)?;
        *nbd = Some(Arc::new(NbdServer::start(storage.engine(), config, vec![listener])?));
        Ok(())
    }

    /// Removes all NBD exports, cutting their clients, then the server. Waits until all are gone.
    pub fn nbd_server_stop(&self) -> Result<(), Error> {
        let mut nbd = lock(&self.nbd);
        let Some(server) = nbd.take() else { return Err(Error::invalid("NBD server not running")) };
        let exports = self.exports.clone();
        self.storage.engine().run(0, move || {
            Box::pin(async move {
                exports.remove_all("nbd").await;
                // A command that has just ended may still hold it for a moment; dropping closes it as well.
                if let Some(server) = Arc::into_inner(server) {
                    server.stop().await;
                }
            })
        });
        Ok(())
    }

    /// Adds an export.
    pub fn block_export_add(&self, options: BlockExportOptions) -> Result<(), Error> {
        let BlockExportType::Nbd(own) = options.kind;
        let base = options.base;
        // An export is tied to its iothread for good, so `fixed-iothread` asks for nothing more.
        self.add_nbd(NbdExportOptions::from_typed(&base, &own, None), base.iothread.as_deref())
    }

    fn add_nbd(&self, mut options: NbdExportOptions, iothread: Option<&str>) -> Result<(), Error> {
        let storage = self.storage()?;
        let nbd = lock(&self.nbd);
        let iothread = iothread.map(|id| self.iothread(id)).transpose();
        let (iothread, server) = match (iothread, nbd.clone()) {
            (Ok(iothread), Some(server)) => (iothread, server),
            (iothread, _) => {
                // Mistakes in the id and in the node's name are told first.
                drop(self.exports.reserve(&options.id)?);
                self.known("", &options.node_name)?;
                iothread?;
                return Err(Error::invalid("NBD server not running"));
            }
        };
        options.iothread = iothread;
        let exports = self.exports.clone();
        storage.engine().run(0, move || Box::pin(async move { server.add(&exports, options).await }))
    }

    fn nbd_server_add(&self, args: NbdServerAddArgs) -> Result<(), Error> {
        let read_only = self.known(&args.device, &args.device)?.flags.read_only;
        let name = args.name.unwrap_or_else(|| args.device.clone());
        let options = NbdExportOptions {
            id: name.clone(),
            node_name: args.device,
            name: Some(name),
            description: args.description,
            writable: args.writable.unwrap_or(false) && !read_only,
            ..NbdExportOptions::default()
        };
        self.add_nbd(options, None)
    }

    fn query_block_exports(&self) -> Vec<BlockExportInfo> {
        let info = |e: ringblock_drivers::export::ExportStatus| {
            let kind = BlockExportTypeName::from_word(e.kind)?;
            Some(BlockExportInfo { id: e.id, kind, node_name: e.node_name, shutting_down: e.shutting_down })
        };
        self.exports.query().into_iter().filter_map(info).collect()
    }
}

/// Opens the listening sockets of an address. Unix sockets can be used by their owner only (mode 0600).
pub(super) fn listen(addr: &SocketAddress) -> Result<Listener, Error> {
    match &addr.kind {
        SocketAddressType::Unix(unix) => listen_unix(&UnixListen::private(&unix.path)),
        SocketAddressType::Inet(inet) => {
            let port = inet.port.parse::<u16>();
            let port = port.map_err(|_| Error::invalid(format!("Invalid port '{}'", inet.port)))?;
            if inet.numeric == Some(true) && inet.host.parse::<std::net::IpAddr>().is_err() {
                return Err(Error::invalid(format!("'{}' is not a numeric address", inet.host)));
            }
            listen_inet(&InetListen {
                host: inet.host.clone(),
                port,
                to: None,
                ipv4: inet.ipv4,
                ipv6: inet.ipv6,
            })
        }
        SocketAddressType::Fd(fd) => {
            let number = fd.str.parse();
            listen_inherited(
                number.map_err(|_| Error::invalid(format!("Unable to parse FD number {}", fd.str)))?,
            )
        }
    }
}
