//! What an image says of other files is not believed without being asked for.
//!
//! Method common to all: the peer makes images whose headers name other files in dangerous ways; we must
//! refuse to follow, say which image it was about, and still be able to describe the image. Ours only: the
//! peer follows such names.

use ringblock_tests::tools;
use ringblock_tests::{Daemon, TestDir};
use serde_json::json;

/// Goal: a backing file named by `json:` or a protocol prefix is never opened. Method: such names, written
/// into headers without a look; reading, serving and adding must fail, `info` must not.
#[test]
fn backing_names_are_plain_paths() {
    if !tools::is_product("RINGBLOCK_IO") {
        return;
    }
    let dir = TestDir::new("backing");
    let secret = dir.file("secret.raw");
    std::fs::write(&secret, vec![0x42; 65536]).expect("write");
    let json =
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{secret}\"}}}}");
    for (n, name) in
        [json, format!("file:{secret}"), "nbd:unix:/nonexistent".into(), "nbd://localhost/d".into()]
            .iter()
            .enumerate()
    {
        let image = dir.file(&format!("evil{n}.qcow2"));
        tools::qemu_img().line("create -q -u -f qcow2 -F raw -b").args([name, &image, "64k"]).ok();
        let read = tools::io().line("-r -f qcow2 -c").args(["read -P 0x42 0 512", &image]).run();
        assert_eq!(read.code, 1, "{}", read.describe());
        let node = format!("driver=qcow2,node-name=q,read-only=on,file.driver=file,file.filename={image}");
        let log = Daemon::on(&dir).blockdev(&node).try_start().expect_err("must not be opened");
        assert!(!log.is_empty());
        tools::img().line("info -f qcow2").arg(&image).ok();
        let chain = tools::img().line("info --backing-chain -f qcow2").arg(&image).fails(1);
        assert!(chain.stderr.contains("only plain paths"), "{}", chain.describe());
    }
    // A plain path is followed.
    let image = dir.file("plain.qcow2");
    tools::qemu_img().dir(dir.path()).line("create -q -f qcow2 -F raw -b secret.raw").arg(&image).ok();
    tools::io().line("-r -f qcow2 -c").args(["read -P 0x42 0 64k", &image]).ok();
}

/// Goal: a daemon opens an external data file only if its options name it; the tools' `info` opens none.
/// Method: an image whose data file is something else's file.
#[test]
fn data_files_are_opened_when_named() {
    if !tools::is_product("RINGBLOCK_SERVE") {
        return;
    }
    let dir = TestDir::new("datafile");
    let (image, data) = (dir.file("disk.qcow2"), dir.file("disk.data"));
    tools::qemu_img().line("create -q -f qcow2 -o").args([&format!("data_file={data}"), &image, "1M"]).ok();
    let daemon = Daemon::on(&dir).start();
    let mut qmp = daemon.qmp();
    let file = json!({"driver": "file", "filename": image});
    qmp.refuse("blockdev-add", json!({"driver": "qcow2", "node-name": "q", "file": file}));
    let named = json!({"driver": "file", "filename": data});
    qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "q", "file": file, "data-file": named}));
    drop(qmp);
    daemon.quit();
    std::fs::remove_file(&data).expect("remove");
    tools::img().line("info -f qcow2").arg(&image).ok();
}

/// Goal: a loop of backing files is refused, not followed until memory ends. Method: an image that backs
/// itself, and two that back each other.
#[test]
fn backing_loops_end() {
    if !tools::is_product("RINGBLOCK_IO") {
        return;
    }
    let dir = TestDir::new("loop");
    // The peer refuses to make an image that backs itself, so one is renamed.
    for (image, below) in [("x.qcow2", "self.qcow2"), ("a.qcow2", "b.qcow2"), ("b.qcow2", "a.qcow2")] {
        let create = tools::qemu_img().dir(dir.path()).line("create -q -u -f qcow2 -F qcow2 -b");
        create.args([below, image, "1M"]).ok();
    }
    std::fs::rename(dir.file("x.qcow2"), dir.file("self.qcow2")).expect("rename");
    for image in ["self.qcow2", "a.qcow2"] {
        let read = tools::io().line("-r -U -f qcow2 -c").args(["read 0 512", &dir.file(image)]);
        let read = read.timeout(std::time::Duration::from_secs(30)).run();
        assert_ne!(read.code, 0, "{}", read.describe());
        let info = tools::img().line("info --backing-chain -f qcow2").arg(dir.file(image)).run();
        assert!(info.code == 1 && info.stderr.contains("infinite loop"), "{}", info.describe());
    }
}

/// Goal: what a guest writes is never taken for a format. Method: a guest writes a qcow2 header into its raw
/// disk; the disk, served and opened as raw, stays raw.
#[test]
fn a_raw_disk_stays_raw() {
    let dir = TestDir::new("raw");
    let (raw, trap) = (dir.file("disk.raw"), dir.file("trap.qcow2"));
    std::fs::write(&raw, vec![0; 1 << 20]).expect("write");
    tools::qemu_img().line("create -q -u -f qcow2 -F raw -b /etc/passwd").args([&trap, "64k"]).ok();
    let daemon = Daemon::serving(&dir, "raw", &raw).start();
    let header = std::fs::read(&trap).expect("read");
    let mut client = ringblock_tests::nbd::Nbd::connect(&daemon.nbd_socket(), "d").expect("connect");
    client.write(0, &header[..65536], 0).expect("write");
    client.flush().expect("flush");
    client.close();
    daemon.quit();
    let info = tools::img().line("info --output=json -f raw").arg(&raw).ok().json();
    assert_eq!((&info["format"], &info["virtual-size"]), (&json!("raw"), &json!(1 << 20)));
    let daemon = Daemon::serving(&dir, "raw", &raw).start();
    let mut client = ringblock_tests::nbd::Nbd::connect(&daemon.nbd_socket(), "d").expect("connect");
    let mut back = vec![0; 65536];
    client.read(0, &mut back).expect("read");
    assert!(back == header[..65536], "the guest's own bytes");
    daemon.quit();
}

/// Goal: broken headers are refused with a reason, never with a crash, and never written to.
/// Method: single fields of a good header are replaced by hostile values.
#[test]
fn broken_headers_are_refused() {
    if !tools::is_product("RINGBLOCK_IO") {
        return;
    }
    let dir = TestDir::new("header");
    let good = dir.file("good.qcow2");
    tools::qemu_img().line("create -q -f qcow2").args([&good, "1M"]).ok();
    tools::qemu_io().line("-f qcow2 -c").args(["write 0 64k", &good]).ok();
    let bytes = std::fs::read(&good).expect("read");
    let fields: &[(&str, usize, &[u8])] = &[
        ("version 1", 4, &[0, 0, 0, 1]),
        ("version 4", 4, &[0, 0, 0, 4]),
        ("cluster bits 8", 20, &[0, 0, 0, 8]),
        ("cluster bits 22", 20, &[0, 0, 0, 22]),
        ("cluster bits 255", 20, &[0, 0, 0, 255]),
        ("a size near 2^64", 24, &[0xff; 8]),
        ("an L1 of 2^32 entries", 36, &[0xff; 4]),
        ("an L1 that is not aligned", 40, &[0, 0, 0, 0, 0, 3, 0, 1]),
        ("no L1 entries", 36, &[0; 4]),
        ("a refcount table that is not aligned", 48, &[0, 0, 0, 0, 0, 1, 0, 1]),
        ("a refcount table of 2^32 clusters", 56, &[0xff; 4]),
        ("refcount order 7", 96, &[0, 0, 0, 7]),
        ("a header of 4 bytes", 100, &[0, 0, 0, 4]),
        ("a header larger than a cluster", 100, &[0, 1, 0, 8]),
        ("a backing name of 2000 bytes", 8, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 7, 0xd0]),
        ("an encryption nobody knows", 32, &[0, 0, 0, 9]),
        ("2^31 snapshots", 60, &[0x7f, 0xff, 0xff, 0xff]),
    ];
    let image = dir.file("bad.qcow2");
    for (what, at, value) in fields {
        let mut bad = bytes.clone();
        bad[*at..*at + value.len()].copy_from_slice(value);
        std::fs::write(&image, &bad).expect("write");
        let out = tools::io().line("-f qcow2 -c").args(["write 0 512", &image]).run();
        assert_eq!(out.code, 1, "{what}: {}", out.describe());
        assert!(!out.stderr.contains("panicked"), "{what}: {}", out.describe());
        let mut after = std::fs::read(&image).expect("read");
        // The corrupt bit, in bytes 72..80, may have been set on the way.
        after[72..80].copy_from_slice(&bad[72..80]);
        assert!(after == bad, "{what}: the image was written");
        let check = tools::img().line("check -f qcow2").arg(&image).run();
        // 63: the version is not one that can be checked.
        assert!(matches!(check.code, 1..=3 | 63), "{what}: {}", check.describe());
        assert!(!check.stderr.contains("panicked"), "{what}: {}", check.describe());
    }
    for len in [0, 1, 71, 72, 103, 104, 511, 65535, 65536, 131_072] {
        std::fs::write(&image, &bytes[..len]).expect("write");
        let out = tools::io().line("-r -f qcow2 -c").args(["read 0 512", &image]).run();
        assert!(out.code == 1 || len >= 104, "cut to {len} bytes: {}", out.describe());
        assert!(out.code <= 1 && !out.stderr.contains("panicked"), "cut to {len} bytes: {}", out.describe());
    }
}
