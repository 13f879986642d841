//! Real input: a file system made from real files, carried through the whole path.
//!
//! ```text
//!  real files ─mkfs.ext4 -d─► raw ─qemu-img convert -c─► qcow2 ─► overlay ─serve─► NBD ─nbdcopy─► raw, compared
//!                                                                    │
//!                                                                    └─fio, crc32c-verified writes─► check, e2fsck
//! ```

use ringblock_tests::images::check_clean;
use ringblock_tests::tools::{self, Cmd};
use ringblock_tests::{Daemon, TestDir, workspace_file};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A folder of real files between 4 and 200 MiB: documentation, headers or libraries, whichever the machine
/// has; its size in MiB.
fn real_files() -> (PathBuf, u64) {
    let sysroot = Cmd::new("rustc --print sysroot").ok().stdout;
    let folders = ["/usr/share/doc", "/usr/include", "/usr/lib/python3", "/usr/share/perl", "/usr/share"]
        .map(PathBuf::from)
        .into_iter()
        .chain([Path::new(sysroot.trim()).join("share"), Path::new(&workspace_file("")).to_path_buf()]);
    for folder in folders.filter(|f| f.is_dir()) {
        let out = Cmd::new("du -sm --apparent-size").arg(folder.to_string_lossy()).run();
        let mib = out.stdout.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
        if (4..=200).contains(&mib) {
            return (folder, mib);
        }
    }
    panic!("no folder with 4 to 200 MiB of files found");
}

/// A raw ext4 image with real files and room to spare; returns its size in bytes.
fn file_system(raw: &str) -> u64 {
    let (folder, mib) = real_files();
    println!("{mib} MiB of files from {}", folder.display());
    let size = (mib * 2 + 64) << 20;
    let mkfs = Cmd::new("mkfs.ext4 -q -F -O ^has_journal -b 4096 -d").arg(folder.to_string_lossy());
    mkfs.args([raw, &format!("{}k", size >> 10)]).ok();
    fsck(raw);
    size
}

fn fsck(raw: &str) {
    Cmd::new("e2fsck -f -n").arg(raw).ok();
}

/// fio's options for writing through NBD and verifying what was written.
fn fio(uri: &str, dir: &TestDir, job: &str) {
    let fio =
        Cmd::new("fio --name=real --ioengine=nbd --verify=crc32c --verify_fatal=1 --verify_state_save=0");
    let out =
        fio.arg(format!("--uri={uri}")).line(job).dir(dir.path()).timeout(Duration::from_secs(300)).run();
    assert_eq!(out.code, 0, "{}", out.describe());
    assert!(out.stdout.contains("err= 0"), "{}", out.describe());
}

/// Goal: the whole path on real input. Method: see the diagram above; fio writes only beyond the file system's
/// end, in a part of the disk that the overlay adds, so that the file system must come out untouched.
#[test]
fn a_file_system_through_overlay_and_nbd() {
    let dir = TestDir::new("real");
    let raw = dir.file("fs.raw");
    let size = file_system(&raw);
    let convert = tools::qemu_img().line("convert -c -f raw -O qcow2").args([&raw, &dir.file("base.qcow2")]);
    convert.timeout(Duration::from_secs(300)).ok();
    let create =
        tools::qemu_img().dir(dir.path()).line("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    create.arg((size + (128 << 20)).to_string()).ok();
    let top = dir.file("top.qcow2");

    let daemon = Daemon::serving(&dir, "qcow2", &top).cores(2).start();
    let uri = daemon.uri("d");
    Cmd::new("nbdcopy --connections=2").args([&uri, &dir.file("before.raw")]).ok();
    let same = tools::qemu_img().line("compare -f raw -F raw").args([&raw, &dir.file("before.raw")]).ok();
    assert!(same.stdout.contains("Images are identical."), "{}", same.describe());

    let beyond = format!("--offset={size} --size=96m");
    fio(&uri, &dir, &format!("--rw=randwrite --bs=4k --iodepth=32 --io_size=24m {beyond}"));
    fio(&uri, &dir, &format!("--rw=write --bs=256k --iodepth=4 --numjobs=1 {beyond}"));
    fio(&uri, &dir, &format!("--rw=randrw --bsrange=512-64k --iodepth=16 --io_size=48m {beyond}"));

    Cmd::new("nbdcopy").args([&uri, &dir.file("after.raw")]).ok();
    daemon.quit();
    check_clean(&top);
    check_clean(&dir.file("base.qcow2"));
    let after = std::fs::OpenOptions::new().write(true).open(dir.file("after.raw")).expect("open");
    after.set_len(size).expect("truncate");
    let same = tools::qemu_img().line("compare -s -f raw -F raw").args([&raw, &dir.file("after.raw")]).ok();
    assert_eq!(same.stdout, "Images are identical.\n");
    fsck(&dir.file("after.raw"));
}

/// Goal: changes to the file system itself, made over NBD by a file system tool, survive.
/// Method: debugfs writes a file into a copy of the disk; the difference goes in with nbdcopy; what comes out
/// is fsck-clean and holds the file.
#[test]
fn a_changed_file_system_goes_in_and_out() {
    let dir = TestDir::new("change");
    let raw = dir.file("fs.raw");
    file_system(&raw);
    tools::img().line("convert -f raw -O qcow2").args([&raw, &dir.file("disk.qcow2")]).ok();
    check_clean(&dir.file("disk.qcow2"));
    let source = workspace_file("Cargo.lock");
    let command = format!("write {source} added-by-test");
    Cmd::new("debugfs -w -R").args([&command, &raw]).ok();
    let daemon = Daemon::serving(&dir, "qcow2", &dir.file("disk.qcow2")).start();
    Cmd::new("nbdcopy --flush").args([&raw, &daemon.uri("d")]).ok();
    daemon.quit();
    check_clean(&dir.file("disk.qcow2"));
    let out = dir.file("out.raw");
    tools::img().line("convert -f qcow2 -O raw").args([&dir.file("disk.qcow2"), &out]).ok();
    fsck(&out);
    let dumped = dir.file("dumped");
    Cmd::new("debugfs -R").args([&format!("dump added-by-test {dumped}"), &out]).ok();
    assert_eq!(std::fs::read(dumped).expect("read"), std::fs::read(source).expect("read"));
}

/// Goal: fio's verified load on a fresh image with several connections' worth of depth, trims included.
#[test]
fn fio_verifies_on_a_fresh_image() {
    for options in ["cluster_size=65536", "cluster_size=4096,lazy_refcounts=on", "extended_l2=on"] {
        let dir = TestDir::new("fio");
        let image = dir.file("disk.qcow2");
        tools::qemu_img().line("create -q -f qcow2 -o").args([options, &image, "64M"]).ok();
        let daemon = Daemon::serving(&dir, "qcow2", &image).cores(2).start();
        fio(&daemon.uri("d"), &dir, "--rw=randwrite --bsrange=512-32k --iodepth=32 --size=64m --io_size=48m");
        fio(
            &daemon.uri("d"),
            &dir,
            "--rw=randwrite --bs=4k --iodepth=32 --size=64m --io_size=16m --fsync=64",
        );
        daemon.quit();
        check_clean(&image);
    }
}
