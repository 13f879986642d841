//! Tests of single features on a running engine: snapshots, compression, resizing, growth of the tables, repair.

use std::os::unix::fs::FileExt;

use ringblock_engine::driver::{Flags, Preallocation};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use ringblock_engine::{Engine, Errno, Error};
use serde_json::json;

use super::create::CreateOptions;
use super::engine_tests::{agree, attach, detach, json, make, on_graph, read_all, start};
use super::header::CompressionType;
use super::testkit::{Random, Scratch, qemu_img, qemu_io};

/// Goal: an L1 entry that is only its flag names no table: nothing is written where none is. Method: such an entry, a
/// write, and qemu-img looks at all of it.
#[test]
fn a_flag_alone_is_no_table() {
    let (engine, dir) = (start(1), Scratch::new());
    let options = CreateOptions { size: 256 << 10, cluster_size: 4096, ..Default::default() };
    make(&dir, "a.qcow2", &options);
    let bytes = std::fs::read(dir.path("a.qcow2")).unwrap();
    let header = super::header::Header::parse(&bytes[..4096]).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(dir.path("a.qcow2")).unwrap();
    file.write_all_at(&super::entry::COPIED.to_be_bytes(), header.l1_offset.0).unwrap();
    let root = attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
    let mut model = vec![0; 256 << 10];
    model[..9000].copy_from_slice(&data(9000, 1));
    write(&engine, root, 0, &model[..9000], Flags::NONE).unwrap();
    detach(&engine).unwrap();
    agree(&dir, "after a write", &model);
}

/// Goal: what was behind the end of a disk does not come back when it grows, not even in a cluster that cannot be changed
/// where it is. Method: a compressed cluster, and one of a snapshot, with the end moved into it and back.
#[test]
fn tails_that_cannot_be_cleared_in_place() {
    let engine = start(1);
    for (compressed, opts) in [
        (true, "cluster_size=4k"),
        (true, "cluster_size=64k,compression_type=zstd"),
        (false, "cluster_size=4k"),
        (false, "cluster_size=64k,extended_l2=on"),
    ] {
        let dir = Scratch::new();
        qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-o", opts, "a.qcow2", "128k"]);
        let write = if compressed { "write -c -P 7 64k 64k" } else { "write -P 7 64k 64k" };
        qemu_io(&dir, &["-f", "qcow2", "-c", write, "a.qcow2"]);
        if !compressed {
            qemu_img(&dir, &["snapshot", "-c", "s", "a.qcow2"]);
        }
        attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
        resize(&engine, (64 << 10) + 512, Preallocation::Off).unwrap();
        resize(&engine, 128 << 10, Preallocation::Off).unwrap();
        detach(&engine).unwrap();
        let mut model = vec![0; 128 << 10];
        model[64 << 10..(64 << 10) + 512].fill(7);
        agree(&dir, opts, &model);
        if !compressed {
            qemu_img(&dir, &["snapshot", "-a", "s", "a.qcow2"]);
            model[64 << 10..].fill(7);
            agree(&dir, opts, &model);
        }
    }
}

/// Goal: an image that is refused for its bitmaps is not changed. Method: a feature bit that a writable open takes away, and a
/// directory whose entry has a name that is too long.
#[test]
fn refused_for_its_bitmaps() {
    let (engine, dir) = (start(1), Scratch::new());
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    qemu_img(&dir, &["bitmap", "--add", "a.qcow2", "b"]);
    let mut bytes = std::fs::read(dir.path("a.qcow2")).unwrap();
    let header = super::header::Header::parse(&bytes[..65536]).unwrap();
    let directory = header.extensions.bitmaps.unwrap().directory_offset.0 as usize;
    bytes[88] |= 0x40;
    bytes[directory + 18] = 0xff;
    std::fs::write(dir.path("a.qcow2"), &bytes).unwrap();
    let refused = attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap_err();
    assert!(refused.message.contains("Broken bitmap directory"), "{refused}");
    assert!(std::fs::read(dir.path("a.qcow2")).unwrap() == bytes);
}

/// Half noise, half pattern.
fn data(len: u64, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..len).map(|i| if i % 512 < 200 { random.next() as u8 } else { seed as u8 }).collect()
}

fn write(engine: &Engine, root: Root, at: u64, bytes: &[u8], flags: Flags) -> Result<(), Errno> {
    let buf = Buf::from_slice(bytes);
    engine.run(0, move || Box::pin(async move { root.write(at, buf, flags).await.0 }))
}

fn resize(engine: &Engine, size: u64, prealloc: Preallocation) -> Result<(), Error> {
    on_graph(engine, move |graph| Box::pin(async move { graph.resize("disk", size, prealloc).await }))
}

/// Goal: clusters of internal snapshots are never written, and the snapshot table survives. Method: qemu-img takes a
/// snapshot, we overwrite, discard and zero, qemu-img goes back to it.
#[test]
fn snapshots_keep_their_content() {
    let engine = start(1);
    for opts in ["cluster_size=64k", "cluster_size=512", "extended_l2=on", "compat=v2,cluster_size=4k"] {
        let dir = Scratch::new();
        qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-o", opts, "a.qcow2", "2M"]);
        qemu_io(&dir, &["-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "write -P 2 1500k 64k", "a.qcow2"]);
        qemu_img(&dir, &["snapshot", "-c", "first", "a.qcow2"]);
        qemu_io(&dir, &["-f", "qcow2", "-c", "write -P 3 100k 300k", "a.qcow2"]);
        qemu_img(&dir, &["snapshot", "-c", "second", "a.qcow2"]);
        let mut model = vec![0; 2 << 20];
        model[..1 << 20].fill(1);
        model[1500 << 10..1564 << 10].fill(2);
        let first = model.clone();
        model[100 << 10..400 << 10].fill(3);
        let root = attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
        for (i, at) in [0u64, 70_000, 300 << 10, 900 << 10, 1800 << 10].into_iter().enumerate() {
            let bytes = data(40_000, i as u64 + 9);
            write(&engine, root, at, &bytes, Flags::NONE).unwrap();
            model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        }
        engine
            .run(0, move || {
                Box::pin(async move { root.write_zeroes(512 << 10, 128 << 10, Flags::NONE).await })
            })
            .unwrap();
        model[512 << 10..640 << 10].fill(0);
        detach(&engine).unwrap();
        agree(&dir, opts, &model);
        let (rc, _, err) = qemu_img(&dir, &["snapshot", "-a", "first", "a.qcow2"]);
        assert_eq!(rc, 0, "{err}");
        agree(&dir, opts, &first);
        qemu_img(&dir, &["snapshot", "-d", "first", "a.qcow2"]);
        qemu_img(&dir, &["snapshot", "-d", "second", "a.qcow2"]);
        agree(&dir, opts, &first);
    }
}

/// Goal: compressed writes read back, here and with qemu-img, and may be overwritten. Method: both packers and several
/// refcount widths; noise that does not shrink; clusters rewritten plainly afterwards.
#[test]
fn compressed_writes() {
    let engine = start(2);
    for compression in [CompressionType::Zlib, CompressionType::Zstd] {
        for (cluster_size, refcount_bits) in [(512, 16), (4096, 1), (65536, 16), (65536, 2), (2 << 20, 16)] {
            let dir = Scratch::new();
            let size = (4 << 20) + 512;
            let o = CreateOptions { size, cluster_size, refcount_bits, compression, ..Default::default() };
            make(&dir, "a.qcow2", &o);
            let mut model = data(size, cluster_size);
            let mut noise = Random::new(3);
            model[65536..3 * 65536].iter_mut().for_each(|b| *b = noise.next() as u8);
            let root = attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
            let all = model.clone();
            let packed = Flags { compressed: true, ..Flags::NONE };
            let step = (1u64 << 20).max(cluster_size);
            engine
                .run(1, move || {
                    Box::pin(async move {
                        for at in (0..size).step_by(step as usize) {
                            let buf = Buf::from_slice(&all[at as usize..(at + step).min(size) as usize]);
                            root.write(at, buf, packed).await.0?;
                        }
                        root.flush().await
                    })
                })
                .unwrap();
            let got = engine.run(0, move || Box::pin(read_all(root, size, 100_000))).unwrap();
            assert!(got == model, "{o:?}");
            for at in [0u64, 200_000, 1 << 20] {
                let bytes = data(3000, at);
                write(&engine, root, at, &bytes, Flags::NONE).unwrap();
                model[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
            }
            detach(&engine).unwrap();
            agree(&dir, &format!("{o:?}"), &model);
        }
    }
}

/// Goal: growing shows zeros and shrinking frees, whatever was there. Method: sizes up and down across L1 growth, with
/// writes at the end in between; old content never comes back.
#[test]
fn resizing() {
    let engine = start(1);
    let d = CreateOptions { size: 100 << 10, cluster_size: 512, ..Default::default() };
    for o in [
        d.clone(),
        CreateOptions { cluster_size: 65536, ..d.clone() },
        CreateOptions { cluster_size: 16384, extended_l2: true, ..d.clone() },
        CreateOptions { cluster_size: 4096, refcount_bits: 64, ..d },
    ] {
        let dir = Scratch::new();
        make(&dir, "a.qcow2", &o);
        let mut model = vec![0; o.size as usize];
        let root = attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
        for (i, size) in [300 << 10, 512, 70_144, 20 << 20, 5 << 20, 0, 6 << 20].into_iter().enumerate() {
            resize(&engine, size, Preallocation::Off).unwrap();
            model.resize(size as usize, 0);
            let at = size.saturating_sub(30_000);
            let bytes = data(size - at, i as u64 + 1);
            write(&engine, root, at, &bytes, Flags::NONE).unwrap();
            model[at as usize..].copy_from_slice(&bytes);
            let got = engine.run(0, move || Box::pin(read_all(root, size, 1 << 20))).unwrap();
            assert!(got == model, "{o:?} at size {size}");
        }
        detach(&engine).unwrap();
        agree(&dir, &format!("{o:?}"), &model);
    }
}

/// Goal: what a shrink cut off reads as zeros after growing again, also in a cluster that cannot be written in place, and a
/// snapshot keeps it. Method: the end of the disk goes into the middle of a compressed cluster, and of one that is shared.
#[test]
fn cut_off_in_a_cluster_that_stays() {
    let engine = start(1);
    for (opts, compressed) in [
        ("cluster_size=4k", true),
        ("cluster_size=64k", true),
        ("cluster_size=4k", false),
        ("extended_l2=on,cluster_size=16k", false),
    ] {
        let dir = Scratch::new();
        qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-o", opts, "a.qcow2", "256k"]);
        let write = if compressed { "write -c -P 7 0 256k" } else { "write -P 7 0 256k" };
        qemu_io(&dir, &["-f", "qcow2", "-c", write, "a.qcow2"]);
        if !compressed {
            qemu_img(&dir, &["snapshot", "-c", "s", "a.qcow2"]);
        }
        let root = attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
        for size in [129 << 10, 256 << 10] {
            resize(&engine, size, Preallocation::Off).unwrap();
        }
        let got = engine.run(0, move || Box::pin(read_all(root, 256 << 10, 64 << 10))).unwrap();
        assert!(got[..129 << 10].iter().all(|&b| b == 7), "{opts}: what stays");
        assert!(got[129 << 10..].iter().all(|&b| b == 0), "{opts}: what was cut off");
        detach(&engine).unwrap();
        let (rc, out, err) = qemu_img(&dir, &["check", "-f", "qcow2", "a.qcow2"]);
        assert_eq!(rc, 0, "{opts}: {out}{err}");
        if !compressed {
            qemu_img(&dir, &["convert", "-f", "qcow2", "-O", "raw", "-l", "s", "a.qcow2", "s.raw"]);
            assert!(
                std::fs::read(dir.path("s.raw")).unwrap().iter().all(|&b| b == 7),
                "{opts}: the snapshot"
            );
        }
    }
}

/// Goal: growing over a longer backing file does not show its data, and preallocation allocates. Method: a small overlay
/// on a large base, grown by every mode.
#[test]
fn growing_over_a_backing_file() {
    let engine = start(1);
    for extended in [false, true] {
        let dir = Scratch::new();
        std::fs::write(dir.path("base.raw"), vec![7; 1 << 20]).unwrap();
        let size = (100 << 10) + 512;
        let o = CreateOptions {
            size,
            extended_l2: extended,
            backing_file: Some("base.raw".into()),
            backing_format: Some("raw".into()),
            ..Default::default()
        };
        make(&dir, "a.qcow2", &o);
        attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
        resize(&engine, 2 << 20, Preallocation::Off).unwrap();
        detach(&engine).unwrap();
        let mut model = vec![0; 2 << 20];
        model[..size as usize].fill(7);
        agree(&dir, "grown over a backing file", &model);
    }
    for prealloc in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        let dir = Scratch::new();
        let o = CreateOptions { size: 1 << 20, cluster_size: 4096, ..Default::default() };
        make(&dir, "a.qcow2", &o);
        attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
        resize(&engine, 3 << 20, prealloc).unwrap();
        detach(&engine).unwrap();
        agree(&dir, &format!("{prealloc:?}"), &vec![0; 3 << 20]);
        let (_, out, _) = qemu_img(&dir, &["check", "-f", "qcow2", "--output=json", "a.qcow2"]);
        assert!(out.contains("\"allocated-clusters\": 512"), "{prealloc:?}: {out}");
    }
}

/// Goal: the refcount table grows when the file outgrows it. Method: 512-byte clusters with 64-bit counters: one table
/// cluster counts 2 MiB; 7 MiB are written.
#[test]
fn refcount_table_grows() {
    let engine = start(1);
    let dir = Scratch::new();
    let size = 7 << 20;
    let o = CreateOptions { size, cluster_size: 512, refcount_bits: 64, ..Default::default() };
    make(&dir, "a.qcow2", &o);
    let model = data(size, 4);
    let root = attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
    for at in (0..size).step_by(256 << 10) {
        write(&engine, root, at, &model[at as usize..(at + (256 << 10)) as usize], Flags::NONE).unwrap();
    }
    detach(&engine).unwrap();
    agree(&dir, "grown table", &model);
}

/// Goal: an image that a QEMU process left dirty is repaired when it is opened for writing, and only then. Method:
/// qemu-io aborts in the middle of lazy refcounts.
#[test]
fn dirty_images_are_repaired() {
    let engine = start(1);
    for opts in
        ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=512", "lazy_refcounts=on,extended_l2=on"]
    {
        let dir = Scratch::new();
        qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-o", opts, "a.qcow2", "4M"]);
        qemu_io(&dir, &["-f", "qcow2", "-c", "write -P 5 1M 300k", "-c", "flush", "-c", "abort", "a.qcow2"]);
        let before = std::fs::read(dir.path("a.qcow2")).unwrap();
        assert_eq!(before[79] & 1, 1, "{opts}: the peer left the dirty bit");
        attach(&engine, json(&dir, "a.qcow2", json!({"read-only": true})), false).unwrap();
        detach(&engine).unwrap();
        assert!(std::fs::read(dir.path("a.qcow2")).unwrap() == before);
        let root = attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
        write(&engine, root, 0, &[6; 1000], Flags::NONE).unwrap();
        detach(&engine).unwrap();
        let mut model = vec![0; 4 << 20];
        model[..1000].fill(6);
        model[1 << 20..(1 << 20) + (300 << 10)].fill(5);
        agree(&dir, opts, &model);
    }
}

/// Goal: damage is refused with the peer's words, and features we do not keep are handed on. Method: the corrupt bit, an
/// unknown autoclear bit, an unknown incompatible bit, a name that is not a path.
#[test]
fn refusals_and_features_at_open() {
    let engine = start(1);
    let dir = Scratch::new();
    let patch = |at: u64, bytes: &[u8]| {
        qemu_img(&dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
        let f = std::fs::OpenOptions::new().write(true).open(dir.path("a.qcow2")).unwrap();
        f.write_all_at(bytes, at).unwrap();
    };
    let fails = |extra: serde_json::Value, writable: bool| {
        let e = attach(&engine, json(&dir, "a.qcow2", extra), writable).unwrap_err();
        detach(&engine).unwrap();
        e.message
    };
    patch(79, &[2]);
    assert_eq!(fails(json!({}), true), "qcow2: Image is corrupt; cannot be opened read/write");
    attach(&engine, json(&dir, "a.qcow2", json!({"read-only": true})), false).unwrap();
    detach(&engine).unwrap();
    patch(78, &[0x10]);
    assert!(fails(json!({}), true).starts_with("Unsupported qcow2 feature(s): "));
    patch(95, &[0x80]);
    attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
    detach(&engine).unwrap();
    assert_eq!(std::fs::read(dir.path("a.qcow2")).unwrap()[95], 0);
    qemu_img(&dir, &["create", "-q", "-u", "-f", "qcow2", "-b", "json:{}", "-F", "raw", "a.qcow2", "1M"]);
    assert!(fails(json!({}), true).contains("only plain paths"));
    attach(&engine, json(&dir, "a.qcow2", json!({"backing": null})), true).unwrap();
    detach(&engine).unwrap();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "a.qcow2", "1M"]);
    assert_eq!(fails(json!({}), true), "'data-file' is required for this image");
}

/// Goal: a tool checks and repairs an image through a node opened for it. Method: a leak and a missing refcount, found
/// and put right; the image named a backing file that does not exist.
#[test]
fn check_through_a_node() {
    use crate::format::qcow2::{Qcow2, Repair};
    let engine = start(1);
    let dir = Scratch::new();
    qemu_img(&dir, &["create", "-q", "-u", "-f", "qcow2", "-b", "gone.raw", "-F", "raw", "a.qcow2", "1M"]);
    let f = std::fs::OpenOptions::new().write(true).open(dir.path("a.qcow2")).unwrap();
    f.write_all_at(&[1], 0x20000 + 2 * 9 + 1).unwrap();
    f.write_all_at(&[0], 0x20000 + 2 * 3 + 1).unwrap();
    f.set_len(10 << 16).unwrap();
    let check = |repair: Repair| {
        let spec = crate::open::node_for_check(
            crate::options::from_json(&json(&dir, "a.qcow2", json!({}))).unwrap(),
        );
        let spec = spec.unwrap();
        let report = on_graph(&engine, move |graph| {
            Box::pin(async move {
                graph.add(spec).await.unwrap();
                let node = graph.info().nodes.into_iter().find(|n| n.name == "disk").unwrap();
                let image = node.driver.as_any().downcast_ref::<Qcow2>().unwrap();
                image.check(repair).await.unwrap()
            })
        });
        detach(&engine).unwrap();
        report
    };
    let found = check(Repair::None);
    assert!(found.leaks == 1 && found.corruptions >= 1, "{found:?}");
    let fixed = check(Repair::All);
    assert!(fixed.is_clean() && fixed.leaks_fixed == 1 && fixed.corruptions_fixed >= 1, "{fixed:?}");
    assert!(check(Repair::None).is_clean());
}

/// Goal: a bitmap that we do not keep is not trusted afterwards, and nothing of it leaks. Method: qemu-img adds one, we
/// write, qemu-img looks.
#[test]
fn bitmaps_are_marked_in_use() {
    let engine = start(1);
    let dir = Scratch::new();
    qemu_img(&dir, &["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    qemu_img(&dir, &["bitmap", "--add", "a.qcow2", "b0"]);
    qemu_img(&dir, &["bitmap", "--add", "a.qcow2", "b1"]);
    attach(&engine, json(&dir, "a.qcow2", json!({"read-only": true})), false).unwrap();
    detach(&engine).unwrap();
    assert!(!qemu_img(&dir, &["info", "a.qcow2"]).1.contains("in-use"));
    let root = attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
    write(&engine, root, 0, &[1; 512], Flags::NONE).unwrap();
    assert!(resize(&engine, 8 << 20, Preallocation::Off).is_err());
    detach(&engine).unwrap();
    let (_, out, _) = qemu_img(&dir, &["info", "a.qcow2"]);
    assert_eq!(out.matches("in-use").count(), 2, "{out}");
    let mut model = vec![0; 4 << 20];
    model[..512].fill(1);
    agree(&dir, "bitmaps", &model);
}

/// Goal: unused space costs nothing. Method: a disk of 2 PiB is zeroed, discarded, written at both ends and grown.
#[test]
fn huge_disks() {
    let engine = start(1);
    let dir = Scratch::new();
    let size = (2u64 << 50) - (1 << 40);
    make(&dir, "a.qcow2", &CreateOptions { size, ..Default::default() });
    let root = attach(&engine, json(&dir, "a.qcow2", json!({})), true).unwrap();
    let started = std::time::Instant::now();
    engine.run(0, move || Box::pin(async move { root.write_zeroes(0, size, Flags::NONE).await })).unwrap();
    engine.run(0, move || Box::pin(async move { root.discard(0, size).await })).unwrap();
    write(&engine, root, size - 1000, &[3; 1000], Flags::NONE).unwrap();
    write(&engine, root, 0, &[4; 1000], Flags::NONE).unwrap();
    engine.run(0, move || Box::pin(async move { root.discard(0, size).await })).unwrap();
    resize(&engine, size + (1 << 40), Preallocation::Off).unwrap();
    detach(&engine).unwrap();
    assert!(started.elapsed().as_secs() < 60);
    let (rc, out, err) = qemu_img(&dir, &["check", "-f", "qcow2", "a.qcow2"]);
    assert_eq!(rc, 0, "{out}{err}");
}
