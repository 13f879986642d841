//! The filter `blklogwrites` beside the peer's: the same requests leave the same entries, and either continues a log that
//! the other began. Logs are read here by a parser of the test's own.

use ringblock_tests::{Cmd, Daemon, TestDir, tools};
use serde_json::json;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;

/// Sector, number of sectors, flags; data.
type Entry = ((u64, u64, u64), Vec<u8>);

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn entries(path: &str) -> Vec<Entry> {
    let bytes = std::fs::read(path).expect("the log");
    assert_eq!((u64_at(&bytes, 0), u64_at(&bytes, 8)), (MAGIC, 1), "{path}");
    let sector = u32::from_le_bytes(bytes[24..28].try_into().expect("4 bytes")) as usize;
    let (mut at, mut out) = (sector, Vec::new());
    for _ in 0..u64_at(&bytes, 16) {
        let head = (u64_at(&bytes, at), u64_at(&bytes, at + 8), u64_at(&bytes, at + 16));
        assert_eq!(u64_at(&bytes, at + 24), 0, "no inline data");
        at += sector;
        let len = if head.2 & DISCARD == 0 { head.1 as usize * sector } else { 0 };
        out.push((head, bytes[at..at + len].to_vec()));
        at += len;
    }
    out
}

/// The file after all entries.
fn replay(mut image: Vec<u8>, log: &[Entry], sector: usize) -> Vec<u8> {
    for ((at, count, flags), data) in log {
        let (from, end) = (*at as usize * sector, (*at + *count) as usize * sector);
        if flags & DISCARD != 0 {
            let end = end.min(image.len());
            image[from.min(end)..end].fill(0);
        } else if *count > 0 {
            image.resize(image.len().max(end), 0);
            image[from..end].copy_from_slice(data);
        }
    }
    image
}

fn options(more: &str) -> String {
    format!(
        "driver=blklogwrites,discard=unmap,file.driver=file,file.filename=raw,file.discard=unmap,log.driver=file,\
         log.filename=log{more}"
    )
}

fn files(dir: &TestDir) {
    std::fs::write(dir.file("raw"), vec![0; 1 << 20]).expect("a file");
    std::fs::write(dir.file("log"), []).expect("a file");
}

fn run(io: Cmd, dir: &TestDir, more: &str, commands: &[&str]) {
    let mut cmd = io.dir(dir.path()).args(["-t", "writeback", "--image-opts"]).arg(options(more));
    for c in commands {
        cmd = cmd.arg("-c").arg(c);
    }
    cmd.ok();
}

/// Goal: the same requests leave the same log, entry by entry, and replaying it gives the file. Method: both tools, sector
/// sizes, aligned and unaligned requests, zeroes, discards, flushes.
#[test]
fn the_peers_entries() {
    let all: &[&str] = &[
        "write -P 1 0 4096",
        "flush",
        "write -P 2 8192 1024",
        "write -z 64k 64k",
        "write -z -u 128k 64k",
        "discard 256k 64k",
        "write -P 3 100 700",
        "read 0 4096",
        "flush",
        "write -z 5000 3000",
        "write -z 9000 100",
        "write -P 9 700000 100000",
    ];
    // the peer ends itself at an unaligned zero write with sectors other than 512
    let some: &[&str] =
        &["write -P 1 0 4096", "write -P 3 100 700", "flush", "write -P 4 5000 9000", "write -z 64k 64k"];
    for (more, sector, commands) in
        [("", 512, all), (",log-sector-size=4096", 4096, some), (",log-sector-size=64", 64, some)]
    {
        let (ours, theirs) = (TestDir::new("lw-ours"), TestDir::new("lw-peer"));
        for (dir, io) in [(&ours, tools::io()), (&theirs, tools::qemu_io())] {
            files(dir);
            run(io, dir, more, commands);
        }
        let (a, b) = (entries(&ours.file("log")), entries(&theirs.file("log")));
        let heads = |l: &[Entry]| l.iter().map(|e| e.0).collect::<Vec<_>>();
        assert_eq!(heads(&a), heads(&b), "{more}");
        assert_eq!(a, b, "{more}: data");
        let file = std::fs::read(ours.file("raw")).expect("the file");
        assert_eq!(file, std::fs::read(theirs.file("raw")).expect("the file"));
        assert!(replay(vec![0; 1 << 20], &a, sector) == file, "{more}: replaying gives the file");
    }
}

/// Goal: a log that one program began is continued by the other. Method: turns, both first; all of it replayed; a log that
/// is not to be continued begins anew.
#[test]
fn continued_by_either() {
    for first in [0, 1] {
        let dir = TestDir::new("lw-turns");
        files(&dir);
        for turn in 0..4 {
            let io = if turn % 2 == first { tools::io() } else { tools::qemu_io() };
            let more = if turn == 0 { ",log-sector-size=1024" } else { ",log-append=on" };
            let write = format!("write -P {} {}k 5000", turn + 1, turn * 3);
            run(io, &dir, more, &[&write, "flush", "discard 64k 8k"]);
        }
        let log = entries(&dir.file("log"));
        assert_eq!(log.len(), 4 * 4);
        let file = std::fs::read(dir.file("raw")).expect("the file");
        assert!(replay(vec![0; 1 << 20], &log, 1024) == file);
        run(tools::io(), &dir, "", &["write 0 512"]);
        assert_eq!(
            entries(&dir.file("log")).iter().map(|e| e.0).collect::<Vec<_>>(),
            [(0, 1, 0), (0, 0, FLUSH)]
        );
    }
}

/// Goal: what is wrong is refused with the peer's words. Method: options and super blocks, both tools.
#[test]
fn refusals() {
    let dir = TestDir::new("lw-refused");
    files(&dir);
    let mut bad = Vec::new();
    let mut head = |magic: u64, version: u64, sector: u32, flags: u64| {
        let mut log = vec![0; 4096];
        log[..8].copy_from_slice(&magic.to_le_bytes());
        log[8..16].copy_from_slice(&version.to_le_bytes());
        log[16] = 1;
        log[24..28].copy_from_slice(&sector.to_le_bytes());
        log[512 + 16..512 + 24].copy_from_slice(&flags.to_le_bytes());
        bad.push((",log-append=on", log));
    };
    head(1, 1, 512, 0);
    head(MAGIC, 2, 512, 0);
    head(MAGIC, 1, 100, 0);
    head(MAGIC, 1, 512, 16);
    for more in [
        ",log-sector-size=0",
        ",log-sector-size=16",
        ",log-sector-size=1000",
        ",log-sector-size=16777216",
        ",log-super-update-interval=0",
        ",log-append=on,log-sector-size=512",
    ] {
        bad.push((more, Vec::new()));
    }
    for (more, log) in bad {
        std::fs::write(dir.file("log"), &log).expect("the log");
        let said = |io: Cmd| {
            let io = io.dir(dir.path()).args(["--image-opts"]).arg(options(more)).args(["-c", "read 0 512"]);
            let text = io.fails(1).stderr;
            text.rsplit(": ").next().unwrap_or_default().trim().to_owned()
        };
        assert_eq!(said(tools::io()), said(tools::qemu_io()), "{more}");
        assert_eq!(std::fs::read(dir.file("log")).expect("the log"), log, "{more}: nothing was written");
    }
}

/// Goal: the daemon: add, look, delete; what a flush covered is in the log after SIGKILL; an overlapping pair of requests on
/// two connections ends the same in the log and in the file. Method: qcow2 over the filter, the control pipe, NBD.
#[test]
fn in_the_daemon() {
    let dir = TestDir::new("lw-daemon");
    tools::qemu_img().args(["create", "-q", "-f", "qcow2", &dir.file("d.qcow2"), "1M"]).ok();
    let base = std::fs::read(dir.file("d.qcow2")).expect("the image");
    std::fs::write(dir.file("log"), []).expect("a log");
    let daemon = Daemon::on(&dir).cores(2).start();
    let mut qmp = daemon.qmp();
    let node = json!({
        "driver": "blklogwrites", "node-name": "l", "discard": "unmap",
        "file": {"driver": "file", "node-name": "lf", "filename": dir.file("d.qcow2"), "discard": "unmap"},
        "log": {"driver": "file", "node-name": "ll", "filename": dir.file("log")},
    });
    qmp.run("blockdev-add", node.clone());
    let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}));
    let l =
        nodes.as_array().expect("a list").iter().find(|n| n["node-name"] == "l").expect("the node").clone();
    assert_eq!((&l["drv"], &l["ro"]), (&json!("blklogwrites"), &json!(false)));
    let error = qmp.refuse(
        "blockdev-reopen",
        json!({"options": [
        {"driver": "blklogwrites", "node-name": "l", "file": "lf", "log": "ll"}]}),
    );
    assert_eq!(error.desc, "Block format 'blklogwrites' used by node 'l' does not support reopening files");
    qmp.run("blockdev-del", json!({"node-name": "l"}));
    qmp.run("blockdev-add", node);
    qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "q", "file": "l", "discard": "unmap"}));
    assert!(qmp.refuse("blockdev-del", json!({"node-name": "l"})).desc.contains("in use"));
    qmp.run(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "q", "name": "d", "writable": true}),
    );

    let connect = || ringblock_tests::nbd::Nbd::connect(&daemon.nbd_socket(), "d").expect("a connection");
    let mut threads = Vec::new();
    for n in 1..=3u8 {
        let mut nbd = connect();
        threads.push(std::thread::spawn(move || {
            for i in 0..60u64 {
                nbd.write(i % 7 * 4096, &vec![n; 65536], 0).expect("a write");
            }
            nbd.flush().expect("a flush");
        }));
    }
    threads.into_iter().for_each(|t| t.join().expect("no panic"));
    drop(qmp);
    daemon.kill9();
    let log = entries(&dir.file("log"));
    assert!(log.iter().any(|e| e.0.2 == FLUSH));
    let mut file = std::fs::read(dir.file("d.qcow2")).expect("the image");
    let mut replayed = replay(base, &log, 512);
    let len = file.len().max(replayed.len());
    file.resize(len, 0);
    replayed.resize(len, 0);
    assert!(file == replayed, "everything was flushed, so the log has everything");
    std::fs::write(dir.file("replayed"), &replayed).expect("a file");
    tools::qemu_img().args(["check", "-q", "-f", "qcow2", &dir.file("replayed")]).ok();
}
