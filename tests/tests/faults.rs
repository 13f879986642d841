//! Files that fail under a running daemon: a device that is full, writes and flushes that end with errors.
//!
//! Method: the faults come from outside the process, so all of the real ring is in play. A small tmpfs, or ext4 on a loop
//! device, is full; a file behind FUSE (`nbdfuse`, in front of `nbdkit`) fails while a trigger file is there. Mounting needs
//! root, as the rest of these machines' tests do.
//!
//! ```text
//!   NBD client ─► daemon ─ io_uring ─► file on a full file system
//!                                   └► file of nbdfuse ─► nbdkit: writes, flushes ─ trigger there? ─► EIO
//! ```

use ringblock_tests::images::check_no_errors;
use ringblock_tests::nbd::{self, Nbd};
use ringblock_tests::{Cmd, Daemon, TestDir, tools};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const UNIT: u64 = 64 << 10;

/// A mounted file system, gone with its handle.
struct Mount(String);

impl Mount {
    fn new(line: &str, what: &str, at: &str) -> Mount {
        std::fs::create_dir_all(at).expect("a folder");
        Cmd::new("mount").line(line).args([what, at]).ok();
        Mount(at.to_owned())
    }

    /// A tmpfs of 8 MiB.
    fn tmpfs(dir: &TestDir) -> Mount {
        Mount::new("-t tmpfs -o size=8m", "none", &dir.file("full"))
    }

    /// An ext4 of 16 MiB on a loop device.
    fn ext4(dir: &TestDir) -> Mount {
        let image = dir.file("ext4.img");
        std::fs::File::create(&image).and_then(|f| f.set_len(16 << 20)).expect("a file");
        Cmd::new("mkfs.ext4 -q -F -O ^has_journal -m 0").arg(&image).ok();
        Mount::new("-o loop", &image, &dir.file("full"))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        Cmd::new("umount -l").arg(&self.0).run();
    }
}

fn block(i: u64) -> Vec<u8> {
    (i + 1).to_le_bytes().repeat(UNIT as usize / 8)
}

fn errno(result: std::io::Result<()>) -> i32 {
    result.err().map_or(0, |e| e.raw_os_error().unwrap_or(-1))
}

/// Fills the device through the export, makes room, and goes on; what was written is there, then and at the end.
fn full(mount: &Mount, dir: &TestDir, driver: &str, direct: bool) {
    const SIZE: u64 = 32 << 20;
    let (image, ballast) = (format!("{}/image", mount.0), format!("{}/ballast", mount.0));
    std::fs::write(&ballast, vec![1; 3 << 20]).expect("ballast");
    tools::qemu_img().line("create -q -f").args([driver, &image, "32M"]).ok();
    let node = format!(
        "driver={driver},node-name=q,file.driver=file,file.filename={image},cache.direct={}",
        if direct { "on" } else { "off" }
    );
    let daemon = Daemon::on(dir).cores(2).blockdev(&node).export("d", "q", true).start();
    let mut conn = Nbd::connect(&daemon.nbd_socket(), "d").expect("connect");
    let mut written = Vec::new();
    let mut refused = 0;
    for i in 0..SIZE / UNIT {
        match errno(conn.write(i * UNIT, &block(i), 0)) {
            0 => written.push(i),
            e => {
                assert_eq!(e, ENOSPC, "{driver}, direct {direct}: the client is told why");
                refused += 1;
            }
        }
        if refused == 20 {
            break;
        }
    }
    assert!(refused == 20 && written.len() > 20, "{driver}: {} written, {refused} refused", written.len());
    let check = |conn: &mut Nbd, list: &[u64]| {
        for &i in list {
            let mut found = vec![0; UNIT as usize];
            conn.read(i * UNIT, &mut found).expect("a read");
            assert!(found == block(i), "{driver}, direct {direct}: block {i}");
        }
    };
    check(&mut conn, &written);
    let flushed = errno(conn.flush());
    assert!(flushed == 0 || flushed == ENOSPC, "{driver}: a flush: {flushed}");
    if driver == "qcow2" {
        tools::qemu_img().line("check -U -q -f qcow2").arg(&image).run().no_errors();
    }
    std::fs::remove_file(&ballast).expect("room");
    let (first, count) = (SIZE / UNIT - 10, 10);
    for i in first..first + count {
        conn.write(i * UNIT, &block(i), 0)
            .unwrap_or_else(|e| panic!("{driver}, direct {direct}: with room again: {e}"));
        written.push(i);
    }
    conn.flush().expect("a flush with room again");
    check(&mut conn, &written);
    conn.close();
    daemon.quit();
    if driver == "qcow2" {
        check_no_errors(&image);
    }
    let raw = dir.file("end.raw");
    tools::qemu_img().args(["convert", "-f", driver, "-O", "raw", &image, &raw]).ok();
    let bytes = std::fs::read(&raw).expect("the disk");
    for &i in &written {
        let at = (i * UNIT) as usize;
        assert!(
            bytes[at..at + UNIT as usize] == block(i)[..],
            "{driver}, direct {direct}: block {i} at the end"
        );
    }
}

trait Checked {
    fn no_errors(&self);
}

impl Checked for ringblock_tests::Output {
    /// Leaks are no errors.
    fn no_errors(&self) {
        assert!(self.code == 0 || self.code == 3, "{}", self.describe());
    }
}

/// Goal: on a full device writes fail with ENOSPC and nothing else happens: what was written can be read, the image has no
/// errors, and with room again writes succeed. Method: qcow2 and raw on a tmpfs of 8 MiB, with and without the page cache.
#[test]
fn a_full_tmpfs() {
    for driver in ["qcow2", "raw"] {
        for direct in [false, true] {
            let dir = TestDir::new("full");
            let mount = Mount::tmpfs(&dir);
            full(&mount, &dir, driver, direct);
        }
    }
}

/// Goal and method: the same on ext4, which finds out later than tmpfs what it has no room for.
#[test]
fn a_full_ext4() {
    for (driver, direct) in [("qcow2", false), ("qcow2", true), ("raw", true)] {
        let dir = TestDir::new("full");
        let mount = Mount::ext4(&dir);
        full(&mount, &dir, driver, direct);
    }
}

/// A regular file whose writes and flushes fail while a trigger is there. The server ends with its mount.
struct Faulty {
    path: String,
    writes: String,
    flushes: String,
    server: Child,
}

impl Faulty {
    /// In front of the file `behind`.
    fn new(dir: &TestDir, behind: &str) -> Faulty {
        let path = dir.file("disk");
        let (writes, flushes) = (dir.file("writes-fail"), dir.file("flushes-fail"));
        std::fs::write(&path, b"").expect("a mount point");
        let size = std::fs::metadata(behind).expect("a file").len();
        let unless = |trigger: &str| format!("if [ -e {trigger} ]; then echo EIO told to >&2; exit 1; fi; ");
        let dd = "dd bs=65536 status=none";
        let server = Cmd::new("nbdfuse").arg(&path).line("--socket-activation nbdkit -f eval");
        let server = server.args([
            format!("get_size=echo {size}"),
            format!("pread={dd} iflag=skip_bytes,count_bytes if={behind} skip=$4 count=$3"),
            format!("pwrite={}{dd} oflag=seek_bytes conv=notrunc of={behind} seek=$4", unless(&writes)),
            format!("flush={}sync {behind}", unless(&flushes)),
            "can_write=exit 0".into(),
            "can_flush=exit 0".into(),
        ]);
        let server = server
            .command()
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("nbdfuse is installed");
        let faulty = Faulty { path, writes, flushes, server };
        let began = Instant::now();
        while std::fs::metadata(&faulty.path).map_or(0, |m| m.len()) != size {
            assert!(began.elapsed() < Duration::from_secs(30), "nbdfuse does not mount");
            std::thread::sleep(Duration::from_millis(20));
        }
        faulty
    }

    fn fail(trigger: &str, fails: bool) {
        match fails {
            true => std::fs::write(trigger, b"").expect("a trigger"),
            false => std::fs::remove_file(trigger).expect("a trigger"),
        }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        Cmd::new("umount -l").arg(&self.path).run();
        if tools::wait(&mut self.server, Duration::from_secs(20)).is_none() {
            let _ = self.server.kill();
            let _ = self.server.wait();
        }
    }
}

/// Goal: writes that fail are told to the client and harm nothing; a failed flush is never followed by a successful one
/// (with qcow2, nor by a successful durable write) before the image is opened again, although the file itself reports success the
/// second time; opened again, all is well. Method: raw and qcow2, with and without the page cache, on a file behind FUSE
/// whose writes and flushes fail on demand.
#[test]
fn a_failed_flush_stays_failed() {
    for driver in ["raw", "qcow2"] {
        for direct in [false, true] {
            flushes(driver, direct);
        }
    }
}

fn flushes(driver: &str, direct: bool) {
    let what = format!("{driver}, direct {direct}");
    let dir = TestDir::new("flush");
    let behind = dir.file("behind");
    tools::qemu_img().line("create -q -f").args([driver, &behind, "4M"]).ok();
    let file = std::fs::OpenOptions::new().write(true).open(&behind).expect("a file");
    file.set_len(6 << 20).expect("room, for a server's files do not grow");
    let faulty = Faulty::new(&dir, &behind);
    let node = format!(
        "driver={driver},node-name=q,file.driver=file,file.filename={},cache.direct={}",
        faulty.path,
        if direct { "on" } else { "off" }
    );
    let daemon = Daemon::on(&dir).cores(2).blockdev(&node).export("d", "q", true).start();
    let mut conn = Nbd::connect(&daemon.nbd_socket(), "d").expect("connect");
    for i in 0..4 {
        conn.write(i * UNIT, &block(i), 0).expect("a write");
    }
    conn.flush().expect("a flush");

    Faulty::fail(&faulty.writes, true);
    let told = errno(conn.write(0, &block(7), 0).and_then(|()| conn.flush()));
    assert_eq!(told, EIO, "{what}: a failed write");
    Faulty::fail(&faulty.writes, false);
    conn.write(0, &block(9), 0).unwrap_or_else(|e| panic!("{what}: a write afterwards: {e}"));
    conn.flush().unwrap_or_else(|e| panic!("{what}: a flush after a failed write: {e}"));

    conn.write(UNIT, &block(11), 0).expect("a write");
    Faulty::fail(&faulty.flushes, true);
    assert_eq!(errno(conn.flush()), EIO, "{what}: a failed flush");
    Faulty::fail(&faulty.flushes, false);
    for _ in 0..3 {
        assert_eq!(errno(conn.flush()), EIO, "{what}: a flush after a failed flush");
        // of raw it makes nothing durable but its own data, which is written anew
        let durable = errno(conn.write(2 * UNIT, &block(13), nbd::FLAG_FUA));
        assert!(driver == "raw" || durable == EIO, "{what}: a durable write after a failed flush");
    }
    let mut found = vec![0; UNIT as usize];
    conn.read(3 * UNIT, &mut found).expect("a read");
    assert!(found == block(3), "{what}: reads go on");
    conn.close();

    let mut qmp = daemon.qmp();
    qmp.run("block-export-del", serde_json::json!({"id": "e-d", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    let closed = qmp.execute("blockdev-del", serde_json::json!({"node-name": "q"}));
    assert!(driver == "raw" || closed.is_err(), "{what}: closing tells of it too");
    let (format, path) = (driver.to_owned(), faulty.path.clone());
    qmp.run(
        "blockdev-add",
        serde_json::json!({"driver": format, "node-name": "q", "file": {"driver": "file", "filename": path}, "cache": {"direct": direct}}),
    );
    qmp.run(
        "block-export-add",
        serde_json::json!({"type": "nbd", "id": "e2", "node-name": "q", "name": "d", "writable": true}),
    );
    let mut conn = Nbd::connect(&daemon.nbd_socket(), "d").expect("connect again");
    conn.write(2 * UNIT, &block(15), nbd::FLAG_FUA).expect("a durable write");
    conn.flush().expect("a flush");
    for (i, value) in [(0, 9), (1, 11), (2, 15), (3, 3)] {
        conn.read(i * UNIT, &mut found).expect("a read");
        assert!(found == block(value), "{what}: block {i} after opening again: {}", found[0]);
    }
    conn.close();
    drop(qmp);
    daemon.quit();
    drop(faulty);
    if driver == "qcow2" {
        check_no_errors(&behind);
    }
}
