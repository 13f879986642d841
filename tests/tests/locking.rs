//! A live qemu process and Ringblock keep each other off an image.
//!
//! Method: one side holds the image in a daemon, the other side's tools try to use it. The lock bytes are the
//! same in both, so every pair is tried: ours against ours, ours against the peer's, the peer's against ours.

use ringblock_tests::tools::{self, Cmd};
use ringblock_tests::{Daemon, TestDir};

fn image(dir: &TestDir, format: &str, name: &str) -> String {
    tools::qemu_img().line("create -q -f").args([format, &dir.file(name), "4M"]).ok();
    dir.file(name)
}

/// Fails unless `cmd` is refused because of a lock.
fn refused(cmd: Cmd, lock: &str) {
    let out = cmd.fails(1);
    assert!(out.stderr.contains(lock), "no word of the lock {lock:?}\n{}", out.describe());
    assert!(out.stderr.contains("Is another process using the image"), "no hint\n{}", out.describe());
}

/// Holds the qcow2 image `file` in `holder` for writing; `img` and `io` must be refused, and may look with
/// force-share.
fn writer_excludes(holder: Daemon, img: fn() -> Cmd, io: fn() -> Cmd, file: &str) {
    let format = "qcow2";
    refused(img().line("info -f").args([format, file]), "Failed to get shared \"write\" lock");
    refused(img().line("check -f qcow2").arg(file), "Failed to get shared \"write\" lock");
    refused(io().line("-f").args([format, "-c", "write 0 512", file]), "Failed to get");
    refused(
        io().line("-r -f").args([format, "-c", "read 0 512", file]),
        "Failed to get shared \"write\" lock",
    );
    refused(img().line("resize -q -f").args([format, file, "8M"]), "Failed to get");
    img().line("info -U -f").args([format, file]).ok();
    io().line("-r -U -f").args([format, "-c", "read 0 512", file]).ok();
    let u_write = io().line("-U -f").args([format, "-c", "write 0 512", file]).run();
    assert_ne!(u_write.code, 0, "force-share is for readers: {}", u_write.describe());
    holder.quit();
    io().line("-f").args([format, "-c", "write 0 512", file]).ok();
}

fn exporting(start: ringblock_tests::daemon::Start, format: &str, file: &str, writable: bool) -> Daemon {
    let read_only = if writable { "off" } else { "on" };
    let node =
        format!("driver={format},node-name=q,read-only={read_only},file.driver=file,file.filename={file}");
    start.blockdev(&node).export("d", "q", writable).start()
}

/// Goal: nobody opens what a peer's daemon writes. Method: qemu-storage-daemon holds, our tools try.
#[test]
fn we_respect_the_peers_writer() {
    let dir = TestDir::new("lock");
    let file = image(&dir, "qcow2", "disk.qcow2");
    let holder = exporting(Daemon::peer(&dir), "qcow2", &file, true);
    let second = Daemon::on(&dir).image("qcow2", &file).export("d", "q", true).try_start();
    let log = second.expect_err("a second server must not start");
    assert!(log.contains("Failed to get") && log.contains("lock"), "{log}");
    writer_excludes(holder, tools::img, tools::io, &file);
}

/// Goal: the peer's tools and daemon cannot open what we write. Method: our daemon holds, theirs try.
#[test]
fn the_peer_respects_our_writer() {
    let dir = TestDir::new("lock");
    let file = image(&dir, "qcow2", "disk.qcow2");
    let holder = exporting(Daemon::on(&dir), "qcow2", &file, true);
    let second = Daemon::peer(&dir).image("qcow2", &file).export("d", "q", true).try_start();
    let log = second.expect_err("a second server must not start");
    assert!(log.contains("Failed to get") && log.contains("lock"), "{log}");
    writer_excludes(holder, tools::qemu_img, tools::qemu_io, &file);
}

/// Goal: two of us exclude each other. Method: our daemon holds, our tools try.
#[test]
fn we_respect_ourselves() {
    let dir = TestDir::new("lock");
    let file = image(&dir, "qcow2", "disk.qcow2");
    let holder = exporting(Daemon::on(&dir), "qcow2", &file, true);
    writer_excludes(holder, tools::img, tools::io, &file);
}

/// Goal: of a raw image, whose writers may share it, nobody changes the size while it is served for
/// writing. Method: each daemon holds, each side's tools try.
#[test]
fn a_raw_image_in_use_keeps_its_size() {
    for start in [Daemon::on as fn(&TestDir) -> _, Daemon::peer] {
        let dir = TestDir::new("lock");
        let file = image(&dir, "raw", "disk.raw");
        let holder = exporting(start(&dir), "raw", &file, true);
        for (img, io) in
            [(tools::img as fn() -> Cmd, tools::io as fn() -> Cmd), (tools::qemu_img, tools::qemu_io)]
        {
            refused(img().line("resize -q -f raw").args([&file, "8M"]), "Failed to get \"resize\" lock");
            refused(img().line("create -q -f raw").args([&file, "8M"]), "Failed to get \"resize\" lock");
            img().line("info -f raw").arg(&file).ok();
            io().line("-f raw -c").args(["write 0 512", &file]).ok();
        }
        holder.quit();
    }
}

/// Goal: readers share, and keep writers out. Method: both daemons hold one image read-only at once; readers
/// of both sides pass, writers of both sides are refused.
#[test]
fn readers_share_and_keep_writers_out() {
    let dir = TestDir::new("lock");
    let file = image(&dir, "qcow2", "disk.qcow2");
    let ours = exporting(Daemon::on(&dir), "qcow2", &file, false);
    let theirs = exporting(Daemon::peer(&dir), "qcow2", &file, false);
    for io in [tools::io, tools::qemu_io] {
        io().line("-r -f qcow2 -c").args(["read 0 512", &file]).ok();
        refused(io().line("-f qcow2 -c").args(["write 0 512", &file]), "Failed to get \"write\" lock");
    }
    for img in [tools::img, tools::qemu_img] {
        img().line("info -f qcow2").arg(&file).ok();
        img().line("check -q -f qcow2").arg(&file).ok();
    }
    ours.quit();
    refused(tools::io().line("-f qcow2 -c").args(["write 0 512", &file]), "Failed to get \"write\" lock");
    theirs.quit();
    tools::io().line("-f qcow2 -c").args(["write 0 512", &file]).ok();
}

/// Goal: a backing file in use as such may not be written. Method: a daemon holds the overlay; writers of
/// both sides try the base, readers of both sides may read it.
#[test]
fn a_backing_file_is_held_against_writers() {
    for start in [Daemon::on as fn(&TestDir) -> _, Daemon::peer] {
        let dir = TestDir::new("lock");
        let base = image(&dir, "qcow2", "base.qcow2");
        let top = dir.file("top.qcow2");
        tools::qemu_img().line("create -q -f qcow2 -F qcow2 -b base.qcow2").arg(&top).ok();
        let holder = exporting(start(&dir), "qcow2", &top, true);
        for io in [tools::io, tools::qemu_io] {
            io().line("-r -f qcow2 -c").args(["read 0 512", &base]).ok();
            refused(io().line("-f qcow2 -c").args(["write 0 512", &base]), "Failed to get \"write\" lock");
        }
        holder.quit();
    }
}

/// Goal: the lock dies with its holder. Method: kill -9 our daemon, then open the image.
#[test]
fn a_killed_holder_leaves_no_lock() {
    let dir = TestDir::new("lock");
    let file = image(&dir, "qcow2", "disk.qcow2");
    exporting(Daemon::on(&dir), "qcow2", &file, true).kill9();
    ringblock_tests::daemon::wait_unlocked(&file);
    tools::qemu_io().line("-f qcow2 -c").args(["write 0 512", &file]).ok();
}

/// Goal: `locking=off` opens what another process holds. Method: the peer holds, we serve with locking off.
#[test]
fn locking_can_be_switched_off() {
    let dir = TestDir::new("lock");
    let file = image(&dir, "raw", "disk.raw");
    let holder = exporting(Daemon::peer(&dir), "raw", &file, true);
    let node = format!("driver=raw,node-name=q,file.driver=file,file.locking=off,file.filename={file}");
    let second = Daemon::on(&dir).blockdev(&node).export("d", "q", true).start();
    second.quit();
    holder.quit();
}
