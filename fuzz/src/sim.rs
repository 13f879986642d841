//! What the targets in the simulator share: a calm world of some files, and looking at nodes from all sides.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ringblock_drivers::format::qcow2::{CheckReport, Qcow2, Repair};
use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_engine::driver::{Driver, Flags, LocalFuture};
use ringblock_engine::error::Error;
use ringblock_engine::graph::Graph;
use ringblock_engine::host::sim::{Image, World};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use serde_json::{Value, json};

use crate::Outcome;

/// Bytes of one read when everything is read.
const PIECE: u64 = 64 << 10;

/// A file that a broken table made larger is looked at up to here.
const LARGEST: u64 = 4 << 20;

/// Files by name.
pub(crate) type Files = BTreeMap<PathBuf, Vec<u8>>;

/// Whether no file has grown out of proportion.
pub(crate) fn are_small(files: &Files) -> bool {
    files.values().all(|bytes| (bytes.len() as u64) < LARGEST)
}

/// Runs a program in a world of these files, where nothing goes wrong; its value, and the files afterwards.
pub(crate) fn run<T: 'static>(
    seed: u64,
    files: &Files,
    program: impl FnOnce() -> LocalFuture<'static, T>,
) -> (T, Files) {
    let images = files.iter().map(|(path, bytes)| (path.clone(), Image::from_bytes(bytes))).collect();
    let mut world = World::new(ringblock_crash::calm(seed, images, 1));
    let value = world.run(program);
    let cut = |mut image: Image| {
        image.set_len(image.len().min(LARGEST));
        image.to_bytes()
    };
    let after = world.disks().live().into_iter().map(|(path, image)| (path, cut(image)));
    (value, after.collect())
}

/// A file's bytes; none if it is not there.
pub(crate) fn bytes<'a>(files: &'a Files, path: &str) -> Option<&'a [u8]> {
    files.get(Path::new(path)).map(Vec::as_slice)
}

/// Closes everything.
pub(crate) async fn close(out: &mut Outcome) {
    out.result("close", &Graph::current().shutdown().await);
}

/// Checks an image as `img check` does, without opening it otherwise.
pub(crate) async fn check(path: &str, repair: Repair) -> Result<CheckReport, Error> {
    let node = json!({"driver": "qcow2", "read-only": repair == Repair::None,
        "file": {"driver": "file", "filename": path}, "backing": null});
    let options: BlockdevOptions = from_json(&node)?;
    let graph = Graph::current();
    let name = graph.add(open::node_for_check(options)?).await?;
    let node = graph.info().nodes.into_iter().find(|n| n.name == name);
    let driver: Arc<dyn Driver> = node.ok_or_else(|| Error::invalid("no node"))?.driver;
    let qcow2: &Qcow2 = driver.as_any().downcast_ref().ok_or_else(|| Error::invalid("no qcow2"))?;
    let report = qcow2.check(repair).await;
    drop(driver);
    graph.del(&name).await?;
    report
}

/// What a check found, as features.
pub(crate) fn tell(place: &str, report: &Result<CheckReport, Error>, out: &mut Outcome) {
    match report {
        Err(e) => out.text(place, &e.message),
        Ok(r) => {
            let counts = [r.corruptions, r.leaks, r.check_errors, r.corruptions_fixed, r.leaks_fixed];
            for (i, n) in counts.into_iter().enumerate().filter(|(_, n)| *n > 0) {
                out.size(place, n << 3 | i as u64);
            }
            r.messages.iter().take(50).for_each(|m| out.text(place, m));
        }
    }
}

/// Walks over the status of a range as `img map` does, some steps of it. Every step must go on.
pub(crate) async fn map(root: Root, mut at: u64, end: u64, out: &mut Outcome) {
    for _ in 0..64 {
        if at >= end {
            return;
        }
        match root.status_above(None, at..end, true).await {
            Err(e) => return out.text("map", &e.text()),
            Ok(above) => {
                let s = above.status;
                assert!(s.len > 0 && s.len <= end - at, "a status of {} bytes at {at}..{end}", s.len);
                let flags = [s.data, s.zero, s.allocated, s.encoded, s.offset.is_some(), above.past_end];
                let flags = flags.into_iter().fold(0, |n, f| n << 1 | u64::from(f));
                out.kind("status", flags << 4 | u64::from(above.depth));
                at += s.len;
            }
        }
    }
}

/// Reads a disk, at most `most` bytes of it; what cannot be read is missing.
pub(crate) async fn read(root: Root, most: u64, out: &mut Outcome) -> Vec<Option<Vec<u8>>> {
    let size = root.size().unwrap_or(0).min(most);
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < size {
        let n = PIECE.min(size - at);
        let (done, buf) = root.read(at, Buf::new(n as usize)).await;
        out.result("read", &done);
        pieces.push(done.is_ok().then(|| buf.to_vec()));
        at += n;
    }
    pieces
}

/// A node of options like these; the same for the simulator as for anybody.
pub(crate) fn qcow2_node(files: &Files, read_only: bool) -> Value {
    let file = |path: &str| json!({"driver": "file", "filename": path});
    let mut node = json!({"driver": "qcow2", "node-name": "n", "read-only": read_only, "discard": "unmap",
        "file": file("/img"), "backing": null});
    if bytes(files, "/base").is_some() {
        node["backing"] = json!({"driver": "raw", "read-only": true, "file": file("/base")});
    }
    if bytes(files, "/data").is_some() {
        node["data-file"] = file("/data");
    }
    node
}

/// Flags of a request by number.
pub(crate) fn flags(n: u8) -> Flags {
    Flags { fua: n & 1 != 0, may_unmap: n & 2 != 0, ..Flags::NONE }
}
