//! qcow2 through the whole engine in the simulator: several cores, the real file driver, faults, power cuts.
//!
//! ```text
//!   world A: guests on every core ─► root ─► qcow2 ─► file ─► simulated disk ─► crash states
//!                 └ oracle                                         │
//!   world B (one per state): open ─► check ─► read all ─► oracle ─► open writable ─► close ─► check ◄─┘
//! ```
//!
//! `RINGBLOCK_SIM_SEEDS` multiplies the number of seeds, `RINGBLOCK_SIM_SEED` starts at another one.

use std::path::Path;
use std::sync::{Arc, Mutex};

use ringblock_drivers::format::qcow2::create::{self, CreateOptions};
use ringblock_drivers::format::qcow2::{CheckReport, Qcow2, Repair};
use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_engine::Errno;
use ringblock_engine::core::Core;
use ringblock_engine::driver::{LocalFuture, perm};
use ringblock_engine::error::Error;
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::host::linux::{FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE};
use ringblock_engine::host::sim::{Faults, Guest, Image, Oracle, Rng, SECTOR, Setup, World, lock};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use serde_json::{Value, json};

/// One kind of image.
#[derive(Clone)]
struct Case {
    name: &'static str,
    options: CreateOptions,
    /// The backing file's length, in sectors.
    base: usize,
    /// More node options.
    more: Value,
    /// Request alignment of the disk.
    align: u32,
}

impl Case {
    fn new(name: &'static str, cluster_size: u64, size: u64) -> Case {
        let options = CreateOptions { size, cluster_size, ..CreateOptions::default() };
        Case { name, options, base: 0, more: json!({}), align: 1 }
    }

    fn sectors(&self) -> usize {
        (self.options.size / SECTOR) as usize
    }

    /// The files of a new image, and what the guest may find on it.
    fn files(&self, setup: Setup) -> (Setup, Oracle) {
        let new = create::create(&self.options).expect("valid options");
        let mut image = Image::default();
        image.set_len(new.file_size);
        for (at, data) in new.writes() {
            image.write(at.0, &data);
        }
        let mut oracle = Oracle::new(self.sectors());
        // a third of the disk for everybody
        oracle.set_wild(self.sectors() * 2 / 3..self.sectors());
        let mut setup = setup.file("/img", image);
        setup.align = self.align;
        if self.base > 0 {
            let mut base = vec![0; self.base * SECTOR as usize];
            let stamp = oracle.write(0, &mut base);
            oracle.wrote(0..self.base, stamp, true);
            let flush = oracle.flush();
            oracle.flushed(flush);
            setup = setup.file("/base", Image::from_bytes(&base));
        }
        if let Some(len) = new.data_file_size {
            let mut data = Image::default();
            data.set_len(len);
            setup = setup.file("/data", data);
        }
        (setup, oracle)
    }

    fn node(&self, read_only: bool) -> Value {
        let mut node = json!({
            "driver": "qcow2", "node-name": "n", "read-only": read_only, "discard": "unmap",
            "file": {"driver": "file", "filename": "/img"},
            "backing": null,
        });
        let map = node.as_object_mut().expect("an object");
        if self.base > 0 {
            let file = json!({"driver": "file", "filename": "/base"});
            map.insert("backing".into(), json!({"driver": "raw", "read-only": true, "file": file}));
        }
        if self.options.data_file.is_some() {
            map.insert("data-file".into(), json!({"driver": "file", "filename": "/data"}));
        }
        map.extend(self.more.as_object().expect("an object").clone());
        node
    }
}

async fn attach(node: Value, writable: bool) -> Result<Root, Error> {
    let options: BlockdevOptions = from_json(&node)?;
    let graph = Graph::current();
    let node = graph.add(open::node(options)?).await?;
    let perm = if writable { perm::CONSISTENT_READ | perm::WRITE } else { perm::CONSISTENT_READ };
    graph.attach(RootSpec { node, perm, shared: perm::ALL, user: "the guest".into(), throttle: None }).await
}

async fn check() -> CheckReport {
    let info = Graph::current().info();
    let node = info.nodes.iter().find(|n| n.name == "n").expect("the node");
    let qcow2 = node.driver.as_any().downcast_ref::<Qcow2>().expect("a qcow2");
    qcow2.check(Repair::None).await.expect("a check")
}

/// Guests on every core, then a clean end. With `failing`, errors are part of it.
async fn work(root: Root, case: Case, oracle: Arc<Mutex<Oracle>>, requests: u32, failing: bool, seed: u64) {
    let mut guest = Guest::new(0..0, requests);
    guest.faults = failing;
    work_as(root, case, oracle, guest, 2, seed).await;
}

/// The same with guests of this kind.
async fn work_as(
    root: Root,
    case: Case,
    oracle: Arc<Mutex<Oracle>>,
    guest: Guest,
    per_core: usize,
    seed: u64,
) {
    let failing = guest.faults;
    let core = Core::current();
    let guests = core.count() * per_core;
    let mut joins = Vec::new();
    for i in 0..guests {
        let (oracle, stripe) = (oracle.clone(), (case.sectors() * 2 / 3 / guests).max(1));
        let mut guest = guest.clone();
        let call = move || -> LocalFuture<'static, ()> {
            Box::pin(async move {
                guest.sectors = i * stripe..(i + 1) * stripe;
                guest.longest = 1 + stripe as u64 / 2;
                guest.run(root, &oracle, Rng::new(seed ^ (i as u64 + 1) << 32)).await;
            })
        };
        joins.push(
            core.spawn_join(async move { Core::current().call(i % Core::current().count(), call).await }),
        );
    }
    for j in joins {
        j.await.expect("ended").expect("the core runs");
    }
    if !failing {
        let report = check_closed(root).await;
        assert!(report.corruptions == 0 && report.check_errors == 0, "seed {seed}: {:?}", report.messages);
    }
    let closed = Graph::current().shutdown().await;
    assert!(failing || closed.is_ok(), "seed {seed}: {closed:?}");
}

/// After a flush the file is what a check may look at, as long as nobody writes.
async fn check_closed(root: Root) -> CheckReport {
    root.flush().await.expect("flush");
    check().await
}

/// A world with the image open. The faults begin after that.
fn world(case: &Case, seed: u64, faults: Faults) -> (World, Root, Arc<Mutex<Oracle>>) {
    let (setup, oracle) = case.files(Setup::new(seed, 3));
    let mut world = World::new(setup);
    let node = case.node(false);
    let root = world.run(move || Box::pin(async move { attach(node, true).await.expect("the image opens") }));
    world.set_faults(faults);
    (world, root, Arc::new(Mutex::new(oracle)))
}

/// Opens one state in a world of its own: it is clean but for leaks, and holds what the oracle allows; opening it for
/// writing and closing it again changes nothing of that.
fn look(
    case: &Case,
    files: std::collections::BTreeMap<std::path::PathBuf, Image>,
    oracle: &Oracle,
    what: &str,
) {
    let mut setup = Setup::new(1, 1);
    setup.files = files;
    setup.align = case.align;
    let mut world = World::new(setup);
    let len = case.options.size as usize;
    for writable in [false, true, false] {
        let node = case.node(!writable);
        let (report, data) = world
            .run(move || {
                Box::pin(async move {
                    let root = attach(node, writable).await.map_err(|e| e.to_string())?;
                    let report = check().await;
                    let (result, buf) = root.read(0, Buf::new(len)).await;
                    result.map_err(|e| format!("reading: {e}"))?;
                    Graph::current().shutdown().await.map_err(|e| format!("closing: {e}"))?;
                    Ok::<_, String>((report, buf))
                })
            })
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {:?}", report.messages);
        oracle.check_crash(0, &data).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
}

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// The seeds of one test.
fn seeds(count: u64) -> std::ops::Range<u64> {
    let first = env("RINGBLOCK_SIM_SEED", 1000);
    first..first + count * env("RINGBLOCK_SIM_SEEDS", 1)
}

fn cases() -> Vec<Case> {
    let mut tiny = Case::new("512", 512, 96 << 10);
    tiny.options.refcount_bits = 64;
    let small = Case::new("4k", 4096, 300 << 10);
    let usual = Case::new("64k", 65536, 1 << 20);
    let mut old = Case::new("v2", 1024, 96 << 10);
    old.options.version = 2;
    let mut backed = Case::new("backed", 4096, 200 << 10);
    backed.base = 300;
    let mut wide = Case::new("subclusters", 16384, 400 << 10);
    wide.options.extended_l2 = true;
    wide.base = 500;
    let mut data = Case::new("data-file", 4096, 200 << 10);
    data.options.data_file = Some("/data".into());
    let mut direct = Case::new("direct", 4096, 200 << 10);
    direct.align = 512;
    let mut blocks = Case::new("blocks", 2048, 200 << 10);
    blocks.align = 4096;
    vec![tiny, small, usual, old, backed, wide, data, direct, blocks]
}

/// Goal: a seed is a whole run, with qcow2 on several cores too. Method: twice, traces and files compared.
#[test]
fn same_seed_same_run() {
    for case in cases() {
        let run = || {
            let (mut world, root, oracle) = world(&case, 3, Faults::benign());
            let c = case.clone();
            world.run(move || Box::pin(work(root, c, oracle, 60, false, 3)));
            (world.trace(), world.live(Path::new("/img")).expect("the image").to_bytes())
        };
        let (one, two) = (run(), run());
        assert_eq!(one.0, two.0, "{}: trace", case.name);
        assert!(one.1 == two.1, "{}: file", case.name);
    }
}

/// Goal: guests on three cores read what they wrote and the image is clean, in any order of things, with short transfers
/// and interruptions. Method: random guests, every kind of image, several seeds.
#[test]
fn guests_on_several_cores() {
    for case in cases() {
        for seed in seeds(4) {
            let (mut world, root, oracle) = world(&case, seed, Faults::benign());
            let (c, o) = (case.clone(), oracle.clone());
            world.run(move || Box::pin(work(root, c, o, 150, false, seed)));
            let flush = lock(&oracle).flush();
            lock(&oracle).flushed(flush);
            // closing wrote and flushed everything
            let files = world.disks().crash(&mut Rng::new(seed));
            look(&case, files, &lock(&oracle), &format!("{} seed {seed}, closed", case.name));
        }
    }
}

/// Goal: whoever still reads or writes a freed cluster keeps it from being reused (I3, I4). Method: some operations take
/// longer than several flushes; many guests discard, zero and flush all the time, all over each other, on small clusters
/// with wide counters, so that the allocator reserves little at a time and comes back to what was freed.
#[test]
fn slow_operations_meet_reuse() {
    for cluster_size in [512, 1024] {
        let mut case = Case::new("small", cluster_size, 48 << 10);
        case.options.refcount_bits = 64;
        for seed in seeds(15) {
            let faults = Faults { stalled: 10, stall_ns: 20_000_000, ..Faults::default() };
            let (mut world, root, oracle) = world(&case, seed, faults);
            lock(&oracle).set_wild(8..case.sectors());
            let mut guest = Guest::new(0..0, 400);
            (guest.reads, guest.flushes, guest.discards, guest.zeroes) = (150, 40, 60, 30);
            let c = case.clone();
            world.run(move || Box::pin(work_as(root, c, oracle, guest, 8, seed)));
        }
    }
}

/// Runs guests and samples power cuts on the way. Returns the number of states.
fn power_cuts(case: &Case, seed: u64, faults: Faults, failing: bool) -> u64 {
    let (mut world, root, oracle) = world(case, seed, faults);
    let (c, o) = (case.clone(), oracle.clone());
    let done = std::rc::Rc::new(std::cell::Cell::new(false));
    let ended = done.clone();
    world.spawn(0, move || {
        Box::pin(async move {
            work(root, c, o, 60, failing, seed).await;
            ended.set(true);
        })
    });
    let mut rng = Rng::new(seed);
    let mut states = 0;
    while !done.get() {
        if !world.steps(1 + rng.below(400)) && !done.get() {
            panic!("{} seed {seed}: deadlock", case.name);
        }
        assert!(world.now() < 3_600_000_000_000, "{} seed {seed}: stuck", case.name);
        for _ in 0..4 {
            let state = rng.next();
            let files = world.disks().crash(&mut Rng::new(state));
            let what = format!("{} seed {seed} at {} ns, state {state:#x}", case.name, world.now());
            let oracle = lock(&oracle).clone();
            look(case, files, &oracle, &what);
            states += 1;
        }
    }
    states
}

/// Goal: after a power cut at any moment the image opens, is clean but for leaks, flushed data is there, and every sector is
/// old or new. Method: guests on three cores, sampled states, each looked at in a world of its own.
#[test]
fn power_cuts_on_several_cores() {
    let mut states = 0;
    for case in cases() {
        for seed in seeds(4) {
            states += power_cuts(&case, seed, Faults::benign(), false);
        }
    }
    assert!(states > 200, "{states} states");
}

/// Goal: with failing disks nothing hangs, errors are the disk's own, and power cuts leave images as clean as ever. Method: as
/// above with EIO, ENOSPC and failed flushes.
#[test]
fn power_cuts_and_faults() {
    for (i, case) in cases().into_iter().enumerate() {
        for seed in seeds(4) {
            let faults = match (i as u64 + seed) % 3 {
                0 => Faults { write_error: 10, ..Faults::benign() },
                1 => Faults { no_space: 10, read_error: 10, ..Faults::benign() },
                _ => Faults { flush_error: 100, ..Faults::benign() },
            };
            power_cuts(&case, seed, faults, true);
        }
    }
}

/// Goal: a full disk is an error and not an end: what is written stays readable, and freeing space lets writes go on.
/// Method: a small capacity, writes until ENOSPC, room again.
#[test]
fn a_full_disk_is_survived() {
    let case = Case::new("64k", 65536, 1 << 20);
    let (mut world, root, _) = world(&case, 9, Faults { capacity: Some(500 << 10), ..Faults::default() });
    let failed = world.run(move || {
        Box::pin(async move {
            let mut failed = 0;
            for i in 0..16u64 {
                let mut buf = Buf::new(65536);
                buf.fill(i as u8 + 1);
                match root.write(i << 16, buf, Default::default()).await.0 {
                    Ok(()) => {}
                    Err(Errno::ENOSPC) => failed += 1,
                    Err(e) => panic!("{e}"),
                }
            }
            failed
        })
    });
    assert!((5..12).contains(&failed), "{failed} writes found the disk full");
    world.set_faults(Faults::default());
    world.run(move || {
        Box::pin(async move {
            for i in 0..16u64 {
                let (result, buf) = root.read(i << 16, Buf::new(65536)).await;
                result.expect("read");
                let first = buf[0];
                assert!((first == 0 || first == i as u8 + 1) && buf.iter().all(|&b| b == first));
                root.write(i << 16, buf, Default::default()).await.0.expect("there is room again");
            }
            let report = check_closed(root).await;
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:?}", report.messages);
            Graph::current().shutdown().await.expect("closing");
        })
    });
}

/// Goal: zeroes that are found are written where the host has no way to zero a range, and nothing goes round in circles.
/// Method: zero detection on a file, every way of fallocate refused; zeroes into an allocated cluster and into a new one.
#[test]
fn zeroes_are_found_where_the_host_cannot_zero() {
    let mut case = Case::new("64k", 65536, 1 << 20);
    case.more = json!({"file": {"driver": "file", "filename": "/img", "detect-zeroes": "on"}});
    let punch = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE;
    let refused_fallocate = vec![0, punch, FALLOC_ZERO_RANGE, FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE];
    let (mut world, root, _) = world(&case, 9, Faults { refused_fallocate, ..Faults::default() });
    world.run(move || {
        Box::pin(async move {
            for (off, byte, len) in [(0, 7, 65536), (4096, 0, 4096), (131072, 0, 4096)] {
                let mut buf = Buf::new(len);
                buf.fill(byte);
                root.write(off, buf, Default::default()).await.0.expect("write");
                let (result, buf) = root.read(off, Buf::new(len)).await;
                result.expect("read");
                assert!(buf.iter().all(|&b| b == byte));
            }
            Graph::current().shutdown().await.expect("closing");
        })
    });
}
