//! The filter `blkverify` beside the peer's: what is the same goes on, what differs is said in the same words.

use ringblock_tests::{Cmd, Daemon, Output, TestDir, tools};
use serde_json::json;

const OPTIONS: &str = "driver=blkverify,test.driver=file,test.filename=t,raw.driver=file,raw.filename=r";

fn files(dir: &TestDir) {
    std::fs::write(dir.file("t"), vec![0; 1 << 20]).expect("a file");
    std::fs::write(dir.file("r"), vec![0; 1 << 20]).expect("a file");
}

fn spoil(dir: &TestDir, name: &str, at: usize) {
    let mut bytes = std::fs::read(dir.file(name)).expect("the file");
    bytes[at] ^= 0x55;
    std::fs::write(dir.file(name), bytes).expect("the file");
}

fn run(io: Cmd, dir: &TestDir, commands: &[&str]) -> Output {
    let mut cmd = io.dir(dir.path()).args(["-t", "writeback", "--image-opts", OPTIONS]);
    for c in commands {
        cmd = cmd.arg("-c").arg(c);
    }
    cmd.run()
}

/// Goal: a difference is found, said in the peer's words, and ends the tool with its status; what follows is not done.
/// Method: one byte of one file changed, both tools.
#[test]
fn a_difference() {
    let dir = TestDir::new("verify");
    for at in [0usize, 5000, 4095] {
        files(&dir);
        spoil(&dir, "r", at);
        let place = at / 4096 * 4096;
        let read = format!("read {place} 4096");
        let commands = [read.as_str(), "write -P 7 512k 4k"];
        let ours = run(tools::io(), &dir, &commands);
        let theirs = run(tools::qemu_io(), &dir, &commands);
        let said = |o: &Output| o.stderr.lines().find(|l| l.starts_with("blkverify: ")).map(str::to_owned);
        assert!(said(&ours).is_some(), "{}", ours.describe());
        assert_eq!(said(&ours), said(&theirs));
        assert_eq!((ours.code, theirs.code), (1, 1));
        assert_eq!(std::fs::read(dir.file("t")).expect("the file")[512 << 10], 0, "nothing follows");
    }
}

/// Goal: what changes one changes the other; the size is that of `test`. Method: every kind of request, then the files.
#[test]
fn both_change() {
    let dir = TestDir::new("verify-both");
    files(&dir);
    let commands = [
        "write -P 1 0 64k",
        "write -P 2 100 700",
        "write -z 4k 8k",
        "write -z -u 32k 8k",
        "discard 0 16k",
        "flush",
        "read -P 1 20k 4k",
        "read -P 0 4k 8k",
        "truncate 2M",
        "write -P 3 1536k 64k",
        "read -P 3 1536k 64k",
    ];
    let out = run(tools::io(), &dir, &commands);
    assert_eq!(out.code, 0, "{}", out.describe());
    let (t, r) =
        (std::fs::read(dir.file("t")).expect("a file"), std::fs::read(dir.file("r")).expect("a file"));
    assert_eq!((t.len(), t == r), (2 << 20, true));
    assert_eq!((t[0], t[150], t[5000], t[33 << 10]), (1, 2, 0, 0), "the discard went nowhere");
    let by_name = tools::io().dir(dir.path()).args(["-f", "raw", "-r", "-c", "length", "blkverify:r:t"]);
    assert_eq!(by_name.ok().stdout, "2 MiB\n");
    std::fs::File::options().write(true).open(dir.file("r")).and_then(|f| f.set_len(4096)).expect("shorter");
    let out = run(tools::io(), &dir, &["read 0 512"]);
    assert_eq!(out.code, 1);
    assert!(
        out.stderr.contains("'raw' (4096 bytes) is smaller than 'test' (2097152 bytes)"),
        "{}",
        out.stderr
    );
}

/// Goal: a daemon with a difference goes on: the request fails, everybody hears of it. Method: a qcow2 image under test,
/// NBD, the control pipe; the node is added, seen and deleted.
#[test]
fn in_the_daemon() {
    let dir = TestDir::new("verify-daemon");
    files(&dir);
    tools::qemu_img().args(["create", "-q", "-f", "qcow2", &dir.file("q"), "1M"]).ok();
    let mut daemon = Daemon::on(&dir).cores(2).start();
    let mut qmp = daemon.qmp();
    let file = |name: &str| json!({"driver": "file", "filename": dir.file(name)});
    let node = json!({"driver": "blkverify", "node-name": "v", "raw": file("r"),
        "test": {"driver": "qcow2", "file": file("q")}});
    qmp.run("blockdev-add", node.clone());
    qmp.run("blockdev-del", json!({"node-name": "v"}));
    qmp.run("blockdev-add", node);
    let nodes = qmp.run("query-named-block-nodes", json!({"flat": true}));
    assert!(nodes.as_array().expect("a list").iter().any(|n| n["drv"] == "blkverify"));
    qmp.run(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "v", "name": "d", "writable": true}),
    );
    let mut threads = Vec::new();
    for n in 1..=3u8 {
        let mut nbd = ringblock_tests::nbd::Nbd::connect(&daemon.nbd_socket(), "d").expect("a connection");
        threads.push(std::thread::spawn(move || {
            let mut found = vec![0; 8192];
            for i in 0..100u64 {
                nbd.write(i % 5 * 4096, &[n; 8192], 0).expect("a write");
                nbd.read(i % 3 * 4096, &mut found).expect("the same on both");
            }
        }));
    }
    threads.into_iter().for_each(|t| t.join().expect("no panic"));
    spoil(&dir, "r", 70_000);
    let mut nbd = ringblock_tests::nbd::Nbd::connect(&daemon.nbd_socket(), "d").expect("a connection");
    let error = nbd.read(65536, &mut [0; 8192]).expect_err("they differ");
    assert_eq!(error.raw_os_error(), Some(5));
    let event = qmp.event("BLOCK_IO_ERROR");
    assert_eq!((&event["node-name"], &event["operation"]), (&json!("v"), &json!("read")));
    nbd.read(0, &mut [0; 8192]).expect("the rest is the same");
    assert!(daemon.alive());
    assert!(
        daemon.log().contains("blkverify: read offset=65536 bytes=8192 contents mismatch at offset 70000"),
        "{}",
        daemon.log()
    );
}
