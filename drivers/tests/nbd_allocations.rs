//! The NBD export serves reads and writes without touching the heap. A binary of its own: it counts every
//! allocation of the process.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use ringblock_drivers::export::nbd::wire::{REQUEST_MAGIC, cmd};
use ringblock_drivers::export::nbd::{NbdExportOptions, NbdServer, ServerConfig};
use ringblock_drivers::export::{Exports, listen};
use ringblock_drivers::open;
use ringblock_drivers::options::{from_arg, from_json};
use ringblock_engine::graph::Graph;
use ringblock_engine::heap::Counting;
use ringblock_engine::sync::block_on;
use ringblock_engine::{Config, Engine};
use serde_json::json;

#[global_allocator]
static COUNTING: Counting = Counting;

const DEPTH: usize = 32;
const LEN: usize = 4096;

/// Sends `DEPTH` requests at once and takes in their replies, all in memory that exists already.
fn round(s: &mut UnixStream, requests: &[u8], replies: &mut [u8]) {
    s.write_all(requests).unwrap();
    s.read_exact(replies).unwrap();
}

fn requests(ty: u16, data: &[u8]) -> Vec<u8> {
    let mut v = Vec::new();
    for i in 0..DEPTH as u64 {
        v.extend(REQUEST_MAGIC.to_be_bytes());
        v.extend([0, 0]);
        v.extend(ty.to_be_bytes());
        v.extend(i.to_be_bytes());
        v.extend((i * 8192).to_be_bytes());
        v.extend((LEN as u32).to_be_bytes());
        v.extend(data);
    }
    v
}

/// Goal: no heap allocation per request in steady state, on a file behind `raw`. Method: warm up, then count
/// the process's allocations over 12,800 reads and 12,800 writes.
#[test]
fn steady_state_allocates_nothing() {
    let dir = std::env::temp_dir().join(format!("rbnbd-alloc-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("disk"), vec![1; 1 << 20]).unwrap();
    let engine = Engine::start(&Config { cores: 1, pin: false, ..Config::default() }).unwrap();
    let at = format!("type=unix,path={}", dir.join("s").display());
    let listener = listen(&from_arg(&at, None).unwrap()).unwrap();
    let server = Arc::new(NbdServer::start(&engine, ServerConfig::default(), vec![listener]).unwrap());
    let exports = Exports::new(|_| {});
    let file = json!({"driver": "file", "filename": dir.join("disk")});
    let node = json!({"driver": "raw", "node-name": "n", "file": file});
    let (to, table) = (server.clone(), exports.clone());
    engine.run(0, move || {
        Box::pin(async move {
            Graph::current().add(open::node(from_json(&node).unwrap()).unwrap()).await.unwrap();
            let (id, node_name) = ("e".into(), "n".into());
            let options = NbdExportOptions { id, node_name, writable: true, ..NbdExportOptions::default() };
            to.add(&table, options).await.unwrap();
        })
    });
    let mut s = UnixStream::connect(dir.join("s")).unwrap();
    s.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x01n").unwrap();
    s.read_exact(&mut [0; 28]).unwrap();

    let (reads, writes) = (requests(cmd::READ, &[]), requests(cmd::WRITE, &[2; LEN]));
    let mut read_replies = vec![0; DEPTH * (16 + LEN)];
    let mut write_replies = vec![0; DEPTH * 16];
    let mut run = |rounds: usize| {
        for _ in 0..rounds {
            round(&mut s, &reads, &mut read_replies);
            round(&mut s, &writes, &mut write_replies);
        }
    };
    run(200);
    let before = Counting::of_all();
    run(400);
    let count = Counting::of_all() - before;
    // A queue may still double once or twice; one allocation per request would be 25,600.
    assert!(count <= 16, "{count} allocations in 25,600 requests");

    block_on(exports.remove_all("nbd"));
    block_on(server.stop());
    engine.run(0, || Box::pin(async { Graph::current().shutdown().await })).unwrap();
    let _ = std::fs::remove_dir_all(&dir);
}
