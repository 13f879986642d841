//! Serves one node over NBD, without a control pipe: for tests and measurements of the export alone.
//!
//! `nbd_server ADDRESS NODE [CORES]`, as in
//! `nbd_server type=unix,path=d.sock driver=null-co,node-name=n,size=10G`.
//! The node must be called `n`; it is exported as `d`, and read-only as `ro`. It stops when its input ends.

use std::sync::Arc;

use ringblock_drivers::export::nbd::{NbdExportOptions, NbdServer, ServerConfig};
use ringblock_drivers::export::{Exports, listen};
use ringblock_drivers::open;
use ringblock_drivers::options::{blockdev::BlockdevOptions, from_arg, types::SocketAddress};
use ringblock_engine::graph::Graph;
use ringblock_engine::sync::block_on;
use ringblock_engine::{Config, Engine, Error};

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [at, what, rest @ ..] = args.as_slice() else {
        return Err(Error::invalid("usage: nbd_server ADDRESS NODE [CORES]"));
    };
    let cores = rest.first().and_then(|n| n.parse().ok()).unwrap_or(0);
    let listener = listen(&from_arg::<SocketAddress>(at, None)?)?;
    let node: BlockdevOptions = from_arg(what, None)?;
    let engine = Engine::start(&Config { cores, ..Config::default() })?;
    let server = Arc::new(NbdServer::start(&engine, ServerConfig::default(), vec![listener])?);
    let exports = Exports::new(|id| eprintln!("export {id} is gone"));
    let (to, table) = (server.clone(), exports.clone());
    engine.run(0, move || {
        Box::pin(async move {
            let node_name = Graph::current().add(open::node(node)?).await?;
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
    block_on(server.stop());
    engine.run(0, || Box::pin(async { Graph::current().shutdown().await }))
}
