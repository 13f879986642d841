//! Single faults at chosen places, in the simulator: what has failed is made good, and nothing else is harmed by it.
//!
//! ```text
//!   a run without a fault ─► the operations of one step ─► the same run, and one of them fails ─► heal ─► all is well
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ringblock_drivers::format::qcow2::create::{self, CreateOptions};
use ringblock_drivers::format::qcow2::{Qcow2, Repair};
use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_engine::Errno;
use ringblock_engine::driver::{Flags, LocalFuture, Preallocation, perm};
use ringblock_engine::error::Error;
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::host::sim::{Disks, Harm, Image, OpKind, Saboteur, Setup, Submitted, Trap, World};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use serde_json::json;

fn options() -> BlockdevOptions {
    from_json(&json!({
        "driver": "qcow2", "node-name": "n", "discard": "unmap", "file": {"driver": "file", "filename": "/img"},
    }))
    .expect("options")
}

async fn attach() -> Result<Root, Error> {
    let graph = Graph::current();
    let node = graph.add(open::node(options())?).await?;
    let perm = perm::CONSISTENT_READ | perm::WRITE;
    graph.attach(RootSpec { node, perm, shared: perm::ALL, user: "the guest".into(), throttle: None }).await
}

fn new_image(o: &CreateOptions) -> Image {
    let new = create::create(o).expect("valid options");
    let mut image = Image::default();
    image.set_len(new.file_size);
    new.writes().for_each(|(at, data)| image.write(at.0, &data));
    image
}

/// Runs a program on core 0; what is on the disks afterwards.
fn run<T: 'static>(
    seed: u64,
    image: &Image,
    saboteur: Arc<Saboteur>,
    program: impl FnOnce(Arc<Disks>) -> LocalFuture<'static, T>,
) -> (T, BTreeMap<PathBuf, Image>) {
    let mut setup = Setup::new(seed, 1).file("/img", image.clone());
    setup.saboteur = Some(saboteur);
    let mut world = World::new(setup);
    let disks = world.disks();
    let value = world.run(|| program(disks));
    (value, world.disks().live())
}

/// Corruptions of a closed image, by our own check.
fn corruptions(live: &BTreeMap<PathBuf, Image>) -> u64 {
    let image = &live[Path::new("/img")];
    let program = |_| -> LocalFuture<'static, u64> {
        Box::pin(async {
            let graph = Graph::current();
            graph.add(open::node_for_check(options()).expect("a spec")).await.expect("it opens");
            let driver = graph.info().nodes.iter().find(|n| n.name == "n").expect("the node").driver.clone();
            let qcow2 = driver.as_any().downcast_ref::<Qcow2>().expect("a qcow2");
            let report = qcow2.check(Repair::None).await.expect("a check");
            report.corruptions + report.check_errors
        })
    };
    run(1, image, Saboteur::watching(), program).0
}

async fn fill(root: &Root, off: u64, len: usize, byte: u8) -> Result<(), Errno> {
    let mut buf = Buf::new(len);
    buf.fill(byte);
    root.write(off, buf, Flags::NONE).await.0
}

async fn byte(root: &Root, off: u64) -> Result<u8, Errno> {
    let (done, buf) = root.read(off, Buf::new(1)).await;
    done.map(|()| buf[0])
}

async fn reopen() -> Result<(), Error> {
    let graph = Graph::current();
    graph.reopen(open::reopen(vec![options()], &graph.info())?).await
}

/// Goal: a node that cannot be opened again with new options goes on as it was, during the fault and after it, and can be
/// reopened later. Method: each operation of a reopen fails, once or until healed.
#[test]
fn a_failed_reopen_leaves_the_node_working() {
    let image = new_image(&CreateOptions { size: 1 << 20, cluster_size: 4096, ..CreateOptions::default() });
    let saboteur = Saboteur::watching();
    let watched = saboteur.clone();
    let (log, _) = run(7, &image, saboteur, move |_| {
        Box::pin(async move {
            let root = attach().await.expect("it opens");
            fill(&root, 100, 9000, 7).await.expect("a write");
            let before = watched.take_log().len();
            reopen().await.expect("a reopen");
            (before, watched.take_log())
        })
    });
    let (before, ops) = log;
    assert!(ops.iter().any(|o| o.kind == OpKind::Read) && ops.iter().any(|o| o.kind == OpKind::Write));
    for (i, lasting) in (0..ops.len()).flat_map(|i| [(i, false), (i, true)]) {
        let flush = ops[i].kind == OpKind::Fdatasync;
        let saboteur =
            Saboteur::with(Trap { at: (before + i) as u64, harm: Harm::Error(Errno::EIO), lasting });
        let healer = saboteur.clone();
        let ((), live) = run(7, &image, saboteur, move |_| {
            Box::pin(async move {
                let root = attach().await.expect("it opens");
                fill(&root, 100, 9000, 7).await.expect("a write");
                let failed = reopen().await;
                assert!(failed.is_err() || !flush, "operation {i}");
                assert_eq!(healer.hits().min(1), 1, "operation {i}");
                healer.heal();
                assert_eq!(byte(&root, 9099).await, Ok(7), "operation {i}, {failed:?}");
                if flush {
                    let more = root.flush().await;
                    assert_eq!(more, Err(Errno::EIO), "operation {i}: no success after a failed flush");
                    assert!(Graph::current().shutdown().await.is_err());
                    return;
                }
                fill(&root, 50_000, 5000, 8)
                    .await
                    .unwrap_or_else(|e| panic!("operation {i}, {failed:?}: {e}"));
                root.flush().await.expect("a flush");
                reopen().await.expect("another reopen");
                assert_eq!((byte(&root, 100).await, byte(&root, 54_999).await), (Ok(7), Ok(8)));
                Graph::current().shutdown().await.expect("it closes");
            })
        });
        assert_eq!(corruptions(&live), 0, "operation {i}, lasting {lasting}");
    }
}

/// The fields of a header that a resize changes: size, and the L1 table's place and length.
fn header(image: &Image) -> (u64, u64, u32) {
    let mut b = [0; 64];
    image.read(0, &mut b);
    let word = |at: usize| u64::from_be_bytes(b[at..at + 8].try_into().expect("8 bytes"));
    (word(24), word(40), word(32) as u32)
}

/// Goal: a write of the header that failed (the disk has the old one or the new one) is made good before anything is
/// acknowledged as durable, and the L1 table that the disk may name is not reused meanwhile. Method: resizes up, across the
/// growth of the L1 table, and down; each write of the header fails; in many worlds, so that both headers are found; after
/// the next flush the durable header is that of the node, and the image is sound.
#[test]
fn a_failed_header_write_is_made_good() {
    const SIZE: u64 = 40 << 10;
    let image = new_image(&CreateOptions { size: SIZE, cluster_size: 512, ..CreateOptions::default() });
    let mut found = [0; 2];
    for (seed, to) in (0..12).flat_map(|s| [(s, SIZE / 2), (s, SIZE + 1024), (s, 4 << 20)]) {
        let saboteur = Saboteur::watching();
        let watched = saboteur.clone();
        let ((before, ops), _) = run(seed, &image, saboteur, move |_| {
            Box::pin(async move {
                let root = attach().await.expect("it opens");
                fill(&root, 0, SIZE as usize, 1).await.expect("a write");
                let before = watched.take_log().len();
                Graph::current().resize("n", to, Preallocation::Off).await.expect("a resize");
                (before, watched.take_log())
            })
        });
        let is_header = |o: &Submitted| o.kind == OpKind::Write && o.off == 0;
        let headers: Vec<usize> = (0..ops.len()).filter(|&i| is_header(&ops[i])).collect();
        assert!(!headers.is_empty());
        for at in headers {
            let trap = Trap { at: (before + at) as u64, harm: Harm::Error(Errno::EIO), lasting: false };
            let ((on_disk, now, durable), live) = run(seed, &image, Saboteur::with(trap), move |disks| {
                Box::pin(async move {
                    let root = attach().await.expect("it opens");
                    fill(&root, 0, SIZE as usize, 1).await.expect("a write");
                    let failed = Graph::current().resize("n", to, Preallocation::Off).await;
                    assert_eq!(failed.map_err(|e| e.errno), Err(Errno::EIO));
                    let disk = disks.open(Path::new("/img")).expect("the image");
                    let on_disk = header(&disk.live());
                    let size = root.size().expect("a size");
                    // takes clusters that must not be those of a table which the disk may name
                    root.discard(0, 2048).await.expect("a discard");
                    fill(&root, size - 20_000, 20_000, 2).await.expect("a write");
                    root.flush().await.expect("a flush");
                    let durable = header(&disk.durable());
                    assert_eq!(durable.0, size, "seed {seed}, to {to}: the durable size");
                    Graph::current().shutdown().await.expect("it closes");
                    (on_disk, header(&disk.live()), durable)
                })
            });
            found[usize::from(on_disk == now)] += 1;
            assert_eq!(durable, now, "seed {seed}, to {to}");
            assert_eq!(corruptions(&live), 0, "seed {seed}, to {to}");
        }
    }
    assert!(found[0] > 0 && found[1] > 0, "both headers are met: {found:?}");
}

/// Goal: whatever fails while the refcount table moves, nothing is written over, and it moves the next time. Method: 512-byte
/// clusters with 64-bit counters, so that one table counts 2 MiB; every write and flush around the growth fails.
#[test]
fn a_refcount_table_that_fails_to_grow() {
    const PIECE: u64 = 128 << 10;
    const SIZE: u64 = 20 * PIECE;
    let o = CreateOptions { size: SIZE, cluster_size: 512, refcount_bits: 64, ..CreateOptions::default() };
    let image = new_image(&o);
    let saboteur = Saboteur::watching();
    let watched = saboteur.clone();
    let (ops, _) = run(3, &image, saboteur, move |_| {
        Box::pin(async move {
            let root = attach().await.expect("it opens");
            for i in 0..SIZE / PIECE {
                fill(&root, i * PIECE, PIECE as usize, 1).await.expect("a write");
            }
            watched.take_log()
        })
    });
    let grown =
        ops.iter().position(|o| o.kind == OpKind::Write && o.off == 0).expect("the header is written");
    for (at, lasting) in (grown - 9..grown + 2).flat_map(|at| [(at, false), (at, true)]) {
        let flush = ops[at].kind == OpKind::Fdatasync;
        let saboteur = Saboteur::with(Trap { at: at as u64, harm: Harm::Error(Errno::EIO), lasting });
        let healer = saboteur.clone();
        let (done, live) = run(3, &image, saboteur, move |_| {
            Box::pin(async move {
                let root = attach().await.expect("it opens");
                let mut failed = 0;
                for i in 0..SIZE / PIECE {
                    let mut done = fill(&root, i * PIECE, PIECE as usize, 1).await;
                    if done.is_err() {
                        failed += 1;
                        healer.heal();
                        if flush {
                            assert!(root.flush().await.is_err(), "no success after a failed flush");
                            return false;
                        }
                        done = fill(&root, i * PIECE, PIECE as usize, 1).await;
                    }
                    done.unwrap_or_else(|e| panic!("operation {at}: piece {i}: {e}"));
                }
                assert!(healer.hits() > 0 && failed <= 1, "operation {at}");
                root.flush().await.expect("a flush");
                for i in 0..SIZE / 512 {
                    assert_eq!(byte(&root, i * 512).await, Ok(1), "operation {at}, sector {i}");
                }
                Graph::current().shutdown().await.expect("it closes");
                true
            })
        });
        assert!(done != flush, "operation {at}");
        assert!(!done || corruptions(&live) == 0, "operation {at}, lasting {lasting}");
    }
}

/// Goal: a repair trusts nothing that an earlier one, which failed on its way, may have left in the host's cache only: when the
/// dirty bit is gone, what was wrong is durably right. Method: a dirty image with a cluster counted that nobody uses; the
/// write of its counter fails (the cache has it, or not), so opening fails; the next opening succeeds, and what is durable
/// then is looked at, in many worlds.
#[test]
fn a_repair_after_one_that_failed() {
    const CLUSTER: u64 = 4096;
    let mut image =
        new_image(&CreateOptions { size: 1 << 20, cluster_size: CLUSTER, ..CreateOptions::default() });
    let word = |image: &Image, at: u64| {
        let mut b = [0; 8];
        image.read(at, &mut b);
        u64::from_be_bytes(b)
    };
    let counter = word(&image, word(&image, 48)) + 60 * 2;
    image.set_len(64 * CLUSTER);
    image.write(counter, &[0, 1]);
    image.write(79, &[1]);
    let saboteur = Saboteur::watching();
    let watched = saboteur.clone();
    let open_once = move |_| -> LocalFuture<'static, usize> {
        Box::pin(async move {
            attach().await.expect("it opens");
            watched.take_log().iter().position(|o| o.kind == OpKind::Write).expect("the counter is written")
        })
    };
    let at = run(1, &image, saboteur, open_once).0 as u64;
    let mut cached = 0;
    for seed in 0..12 {
        let saboteur = Saboteur::with(Trap { at, harm: Harm::Error(Errno::ENOSPC), lasting: true });
        let healer = saboteur.clone();
        let ((durable, there), _) = run(seed, &image, saboteur, move |disks| {
            Box::pin(async move {
                assert!(attach().await.is_err(), "seed {seed}: it cannot be repaired");
                healer.heal();
                let disk = disks.open(Path::new("/img")).expect("the disk");
                let (mut there, live) = ([0; 2], disk.live());
                live.read(counter, &mut there);
                attach().await.expect("it opens");
                (disk.durable(), there == [0, 0])
            })
        });
        cached += u32::from(there);
        assert_eq!(word(&durable, 72) & 1, 0, "seed {seed}: it is not dirty");
        assert_eq!(word(&durable, counter & !7) >> (48 - (counter & 6) * 8) & 0xffff, 0, "seed {seed}");
    }
    assert!((1..12).contains(&cached), "{cached} of 12 worlds had it in the cache");
}
