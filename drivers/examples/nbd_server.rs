//! Serves memory that is not there, or a raw file, over NBD: the export alone, for tests and measurements.
//!
//! `nbd_server SOCKET|PORT null[:BYTES]|FILE [CORES]`; the export is called `d`, a read-only one `ro`.

use std::path::PathBuf;
use std::sync::Arc;

use ringblock_drivers::export::Exports;
use ringblock_drivers::export::nbd::{NbdExportOptions, NbdServer, ServerConfig};
use ringblock_engine::driver::{Driver, Kind, Leaf, LocalFuture, Op, Opened, Request};
use ringblock_engine::graph::{Common, Graph, NodeSpec};
use ringblock_engine::host::file::{Access, Expect, File, OpenOptions};
use ringblock_engine::host::linux::net::{InetListen, UnixListen, listen_inet, listen_unix};
use ringblock_engine::sync::block_on;
use ringblock_engine::{Config, Engine, Errno, Error};

struct Node {
    leaf: Leaf,
    size: u64,
}

impl Driver for Node {
    fn name(&self) -> &'static str {
        "example"
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn kind(&self) -> Kind<'_> {
        Kind::Leaf(&self.leaf)
    }
    fn submit(&self, req: Request) -> LocalFuture<'_, (Result<(), Errno>, Request)> {
        Box::pin(async move {
            let result = match (&self.leaf, req.op) {
                (Leaf::File(f), Op::Flush) => f.fdatasync().await,
                (Leaf::File(_), Op::WriteZeroes) => Err(Errno::ENOTSUP),
                _ => Ok(()),
            };
            (result, req)
        })
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

async fn open(what: String) -> Result<Arc<dyn Driver>, Error> {
    let driver: Node = match what.strip_prefix("null") {
        Some(size) => Node {
            leaf: Leaf::Null {
                read_zeroes: false,
                latency_ns: 0,
            },
            size: size.trim_start_matches(':').parse().unwrap_or(10 << 30),
        },
        None => {
            let opts = OpenOptions {
                expect: Expect::Regular,
                access: Access::ReadWrite,
                direct: false,
            };
            let file = File::open(&PathBuf::from(&what), opts).await?;
            Node {
                size: file.size().await?,
                leaf: Leaf::File(file),
            }
        }
    };
    Ok(Arc::new(driver))
}

fn main() -> Result<(), Error> {
    let mut args = std::env::args().skip(1);
    let (Some(at), Some(what)) = (args.next(), args.next()) else {
        return Err(Error::invalid(
            "usage: nbd_server SOCKET|PORT null[:BYTES]|FILE [CORES]",
        ));
    };
    let cores = args.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    let engine = Engine::start(&Config {
        cores,
        ..Config::default()
    })?;
    let listener = match at.parse() {
        Ok(port) => listen_inet(&InetListen {
            host: "127.0.0.1".into(),
            port,
            ..InetListen::default()
        })?,
        Err(_) => listen_unix(&UnixListen::private(at))?,
    };
    let server = Arc::new(NbdServer::start(
        &engine,
        ServerConfig::default(),
        vec![listener],
    )?);
    let exports = Exports::new(|id| eprintln!("export {id} is gone"));
    let (to, table) = (server.clone(), exports.clone());
    engine.run(0, move || {
        Box::pin(async move {
            let open = Box::new(move |_| -> LocalFuture<'static, Result<Opened, Error>> {
                Box::pin(async move {
                    Ok(Opened {
                        driver: open(what).await?,
                        owner: None,
                    })
                })
            });
            let common = Common {
                discard: true,
                ..Common::default()
            };
            let spec = NodeSpec {
                name: Some("n".into()),
                common,
                home: None,
                config: Arc::new(()),
                open,
            };
            let node_name = Graph::current().add(spec).await?;
            for (id, writable) in [("d", true), ("ro", false)] {
                let options = NbdExportOptions {
                    id: id.into(),
                    node_name: node_name.clone(),
                    name: Some(id.into()),
                    description: writable.then(|| "hello".into()),
                    writable,
                    allocation_depth: writable,
                    ..NbdExportOptions::default()
                };
                to.add(&table, options).await?;
            }
            Ok::<(), Error>(())
        })
    })?;
    let mut line = String::new();
    let _ = std::io::stdin().read_line(&mut line);
    block_on(exports.remove_all("nbd"));
    match Arc::try_unwrap(server) {
        Ok(server) => block_on(server.stop()),
        Err(_) => eprintln!("the server is in use"),
    }
    engine.run(0, || Box::pin(async { Graph::current().del("n").await }))
}
