//! The engine in the simulator: the same code, several cores on one thread, under a seed.
#![cfg(not(loom))]

mod support;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ringblock_engine::core::Core;
use ringblock_engine::driver::LocalFuture;
use ringblock_engine::graph::{Graph, NodeSpec};
use ringblock_engine::host::sim::{Faults, Guest, Image, Oracle, Rng, SECTOR, Setup, World, lock};
use ringblock_engine::path::Root;
use ringblock_engine::timer::Sleep;
use support::*;

const SIZE: u64 = 256 << 10;
const SECTORS: usize = (SIZE / SECTOR) as usize;

fn spec(kind: &str, align: u32) -> NodeSpec {
    let path = Path::new("/disk");
    match kind {
        "leaf" => leaf_spec(Some("n"), path, SIZE, align),
        _ => table_spec("n", path, SIZE, 8192, 1, align),
    }
}

/// Opens a node and runs a guest on every core, two per core, in stripes that are not aligned to clusters.
async fn guests(kind: &'static str, align: u32, oracle: Arc<Mutex<Oracle>>, faults: bool, seed: u64) -> Root {
    let root = add_and_attach(spec(kind, align)).await;
    let core = Core::current();
    let count = core.count() * 2;
    let mut joins = Vec::new();
    for i in 0..count {
        let oracle = oracle.clone();
        let call = move || -> LocalFuture<'static, ()> {
            Box::pin(async move {
                // the last quarter is everybody's
                let stripe = SECTORS * 3 / 4 / count;
                let mut guest = Guest::new(i * stripe..(i + 1) * stripe, 120);
                guest.faults = faults;
                guest.run(root, &oracle, Rng::new(seed ^ (i as u64) << 32)).await;
            })
        };
        joins.push(
            core.spawn_join(async move { Core::current().call(i % Core::current().count(), call).await }),
        );
    }
    for j in joins {
        j.await.expect("ended").expect("the core runs");
    }
    root
}

fn world(seed: u64, align: u32, faults: Faults) -> World {
    let mut image = Image::default();
    image.set_len(SIZE);
    let mut setup = Setup::new(seed, 3).file("/disk", image);
    (setup.align, setup.faults) = (align, faults);
    World::new(setup)
}

fn wild() -> Oracle {
    let mut oracle = Oracle::new(SECTORS);
    oracle.set_wild(SECTORS * 3 / 4..SECTORS);
    oracle
}

fn run(kind: &'static str, align: u32, seed: u64, faults: Faults, failing: bool) -> (u64, Vec<u8>) {
    let mut world = world(seed, align, faults);
    let oracle = Arc::new(Mutex::new(wild()));
    world.run(move || {
        Box::pin(async move {
            guests(kind, align, oracle, failing, seed).await;
            let closed = Graph::current().shutdown().await;
            assert!(failing || closed.is_ok(), "{closed:?}");
        })
    });
    let data = world.live(Path::new("/disk")).expect("the file").to_bytes();
    (world.trace(), data)
}

/// Goal: a seed is a whole run. Method: random guest I/O on three cores with short transfers and interruptions, twice;
/// traces and contents are equal, and another seed gives another trace.
#[test]
fn same_seed_same_run() {
    for (kind, align) in [("leaf", 1), ("table", 512)] {
        let one = run(kind, align, 11, Faults::benign(), false);
        let two = run(kind, align, 11, Faults::benign(), false);
        assert_eq!(one.0, two.0, "{kind}: trace");
        assert!(one.1 == two.1, "{kind}: contents");
        assert_ne!(one.0, run(kind, align, 12, Faults::benign(), false).0);
    }
}

/// Goal: guests read what they wrote, whatever the order of things. Method: many seeds, with and without alignment; every
/// read is checked by the oracle.
#[test]
fn guests_read_what_they_wrote() {
    for seed in 0..40 {
        let kind = if seed % 3 == 0 { "leaf" } else { "table" };
        // blocks larger than sectors: read-modify-write between guests
        let align = [1, 512, 4096][seed as usize / 3 % 3];
        run(kind, align, seed, Faults::benign(), false);
    }
}

/// Goal: guests that share a block never lose each other's changes, be they writes, zeroes or discards. Method: six guests on
/// three cores in two dozen sectors of a disk with blocks of eight.
#[test]
fn guests_share_blocks() {
    for seed in 400..440 {
        let mut world = world(seed, 4096, Faults::default());
        let oracle = Arc::new(Mutex::new(Oracle::new(SECTORS)));
        world.run(move || {
            Box::pin(async move {
                let root = add_and_attach(spec("leaf", 4096)).await;
                let core = Core::current();
                let joins: Vec<_> = (0..6usize)
                    .map(|i| {
                        let oracle = oracle.clone();
                        let call = move || -> LocalFuture<'static, ()> {
                            Box::pin(async move {
                                let mut guest = Guest::new(i * 4 + 1..i * 4 + 5, 150);
                                guest.longest = 4;
                                guest.run(root, &oracle, Rng::new(seed ^ (i as u64) << 32)).await;
                            })
                        };
                        core.spawn_join(async move { Core::current().call(i % 3, call).await })
                    })
                    .collect();
                for j in joins {
                    j.await.expect("ended").expect("the core runs");
                }
            })
        });
    }
}

/// Goal: with failing disks nothing hangs and every error is the disk's own. Method: EIO, ENOSPC and failing flushes at
/// high rates; the oracle allows old or new where a write failed.
#[test]
fn faults_are_reported_and_nothing_hangs() {
    for seed in 100..130 {
        let faults = Faults {
            read_error: 20,
            write_error: 30,
            no_space: 20,
            flush_error: 100,
            stalled: 50,
            ..Faults::benign()
        };
        let kind = if seed % 2 == 0 { "leaf" } else { "table" };
        run(kind, [1, 512, 4096][seed as usize / 2 % 3], seed, faults, true);
    }
}

/// Goal: what a power cut leaves of a plain disk is what the crash contract allows. Method: guests on a leaf; stop after a
/// random number of steps, sample crash states, compare every sector with the oracle.
#[test]
fn crash_states_of_a_plain_disk() {
    let (mut states, mut changed) = (0, 0);
    for seed in 200..220 {
        let mut world = world(seed, 1, Faults::benign());
        let oracle = Arc::new(Mutex::new(Oracle::new(SECTORS)));
        let shared = oracle.clone();
        world.spawn(0, move || {
            Box::pin(async move {
                guests("leaf", 1, shared, false, seed).await;
            })
        });
        let mut rng = Rng::new(seed);
        loop {
            let more = world.steps(50 + rng.below(300));
            let disk = world.disks().open(Path::new("/disk")).expect("the file");
            for _ in 0..5 {
                let image = disk.crash(&mut rng);
                let data = image.to_bytes();
                assert_eq!(data.len() as u64, SIZE);
                states += 1;
                changed += u64::from(data != disk.durable().to_bytes());
                lock(&oracle).check_crash(0, &data).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            }
            if !more || world.now() > 60_000_000 {
                break;
            }
        }
    }
    assert!(states > 500 && changed > states / 4, "{changed} of {states} states differ from the durable one");
}

/// Goal: the harness notices a flush that does not flush. Method: as above, but the oracle is told of flushes that never
/// reach the disk; some state must be refused.
#[test]
fn the_oracle_catches_lost_flushes() {
    let mut caught = 0;
    for seed in 300..310 {
        let mut world = world(seed, 1, Faults::default());
        let oracle = Arc::new(Mutex::new(Oracle::new(SECTORS)));
        let shared = oracle.clone();
        world.run(move || {
            Box::pin(async move {
                let root = add_and_attach(spec("leaf", 1)).await;
                let mut guest = Guest::new(0..SECTORS, 60);
                guest.flushes = 0;
                guest.run(root, &shared, Rng::new(seed)).await;
                let flush = lock(&shared).flush();
                lock(&shared).flushed(flush);
            })
        });
        let disk = world.disks().open(Path::new("/disk")).expect("the file");
        let mut rng = Rng::new(seed);
        caught += (0..20)
            .filter(|_| lock(&oracle).check_crash(0, &disk.crash(&mut rng).to_bytes()).is_err())
            .count();
    }
    assert!(caught > 100, "{caught} of 200 bad states were noticed");
}

/// Goal: an hour of virtual time costs nothing, and a sleep is exact. Method: sleep, look at the clock.
#[test]
fn time_is_virtual() {
    let mut world = World::new(Setup::new(1, 2));
    let slept = world.run(|| {
        Box::pin(async {
            let started = Core::current().now();
            Sleep::ns(600_000_000_000).await;
            Core::current().now() - started
        })
    });
    assert!((600_000_000_000..600_000_100_000).contains(&slept), "{slept}");
}

/// Goal: a run that can never end is noticed, with its seed. Method: wait for what nobody does.
#[test]
#[should_panic(expected = "seed 77: deadlock")]
fn deadlocks_are_noticed() {
    let mut world = World::new(Setup::new(77, 2));
    world.run(|| Box::pin(std::future::pending::<()>()));
}

/// Goal: files of a world are created, sized, and survive into the next one. Method: create, write, flush, crash, reopen.
#[test]
fn files_survive_into_another_world() {
    let path = PathBuf::from("/made");
    let mut first = World::new(Setup::new(5, 2));
    let name = path.clone();
    first.run(move || {
        Box::pin(async move {
            let file = ringblock_engine::host::File::create(&name).await.expect("create");
            let data = ringblock_engine::mem::Buf::from_slice(&[7; 5000]);
            file.write(100, data, false).await.0.expect("write");
            assert_eq!(file.size().await, Ok(5100));
            file.fdatasync().await.expect("flush");
        })
    });
    let mut setup = Setup::new(6, 1);
    setup.files = first.disks().crash(&mut Rng::new(9));
    let mut second = World::new(setup);
    second.run(move || {
        Box::pin(async move {
            let opts = ringblock_engine::host::OpenOptions {
                expect: ringblock_engine::host::Expect::Regular,
                access: ringblock_engine::host::Access::ReadWrite,
                direct: false,
            };
            let file = ringblock_engine::host::File::open(&path, opts).await.expect("open");
            let (result, buf) = file.read(99, ringblock_engine::mem::Buf::new(6000)).await;
            result.expect("read");
            assert!(
                buf[0] == 0 && buf[1..5001].iter().all(|&b| b == 7) && buf[5001..].iter().all(|&b| b == 0)
            );
        })
    });
}
