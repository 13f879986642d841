//! Several NBD connections on several cores work on one image at once.
//!
//! Method common to all: our own small client drives each connection from a thread of its own; every sector
//! written names its writer, and [`Model`] knows which values may be seen, by reads meanwhile and at the end.

use ringblock_tests::images::{Base, Content, Recipe, check_clean};
use ringblock_tests::model::{After, Model, SECTOR};
use ringblock_tests::nbd::{self, Nbd};
use ringblock_tests::{Daemon, Rng, TestDir, for_all, tools};
use std::sync::atomic::{AtomicU64, Ordering};

const SIZE: u64 = 8 * 1024 * 1024;
const THREADS: u64 = 4;

const RECIPES: [Recipe; 8] = [
    Recipe { name: "v3", options: "cluster_size=65536", base: Base::None },
    Recipe { name: "c512", options: "cluster_size=512,refcount_bits=1", base: Base::None },
    Recipe { name: "c4k", options: "cluster_size=4096", base: Base::None },
    Recipe { name: "ext-l2", options: "extended_l2=on", base: Base::None },
    Recipe { name: "c2m", options: "cluster_size=2097152", base: Base::None },
    Recipe { name: "v2", options: "compat=0.10", base: Base::None },
    Recipe { name: "lazy", options: "lazy_refcounts=on", base: Base::None },
    Recipe { name: "data-file", options: "cluster_size=65536", base: Base::DataFile(false) },
];

/// What one thread does to one connection, one operation at a time; reads are judged at once.
fn step(conn: &mut Nbd, model: &Model, rng: &mut Rng, place: impl Fn(&mut Rng) -> (u64, u64)) {
    let (offset, len) = place(rng);
    let done = match rng.below(100) {
        0..50 => {
            let fua = rng.chance(5);
            let (id, data) = model.write(offset, len, fua);
            let flags = if fua { nbd::FLAG_FUA } else { 0 };
            conn.write(offset, &data, flags).map(|()| model.done(id))
        }
        50..62 => {
            let id = model.zero(offset, len, false);
            let flags = if rng.chance(50) { nbd::FLAG_NO_HOLE } else { 0 };
            conn.zero(offset, len as u32, flags).map(|()| model.done(id))
        }
        62..72 => {
            let id = model.trim(offset, len);
            conn.trim(offset, len as u32).map(|()| model.done(id))
        }
        72..76 => {
            let start = model.now();
            conn.flush().map(|()| model.flushed(start))
        }
        _ => {
            let start = model.now();
            let mut buf = vec![0; len as usize];
            conn.read(offset, &mut buf).map(|()| {
                model.check_read(start, offset, &buf).unwrap_or_else(|e| panic!("a read beside writes: {e}"));
            })
        }
    };
    done.unwrap_or_else(|e| panic!("request at {offset} of {len}: {e}"));
}

/// A range anywhere, from one sector to a few clusters, in sectors.
fn anywhere(rng: &mut Rng) -> (u64, u64) {
    let unit = *rng.pick(&[SECTOR, 4096, 65536]);
    let offset = rng.below(SIZE) / unit * unit;
    let len = (1 + rng.below(8)) * *rng.pick(&[SECTOR, 4096, 32768]);
    (offset, len.min(SIZE - offset))
}

/// Runs `THREADS` connections for `ops` steps each, then judges the image at rest.
fn load(recipe: &Recipe, ops: u64, place: impl Fn(u64, &mut Rng) -> (u64, u64) + Sync) {
    let seed = Rng::run_seed();
    println!("{}: RINGBLOCK_SEED={seed}", recipe.name);
    let dir = TestDir::new("multi");
    let image = recipe.make(&dir, tools::qemu_img, &mut Content::new(SIZE));
    let model = Model::zeroed(SIZE);
    let node = recipe.node(&dir, &image);
    let daemon = Daemon::on(&dir).cores(3).blockdev(&node).export("d", "q", true).start();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (model, place, socket) = (&model, &place, daemon.nbd_socket());
            scope.spawn(move || {
                let mut conn = Nbd::connect(&socket, "d").unwrap_or_else(|e| panic!("connect: {e}"));
                assert_eq!(conn.size, SIZE);
                assert_ne!(conn.flags & nbd::HAS_MULTI_CONN, 0, "several connections must be allowed");
                let mut rng = Rng::new(seed.wrapping_add(thread * 7919));
                for _ in 0..ops {
                    step(&mut conn, model, &mut rng, |rng| place(thread, rng));
                }
                conn.close();
            });
        }
    });
    daemon.quit();
    check_clean(&image);
    let raw = dir.file("end.raw");
    tools::qemu_img().line("convert -f qcow2 -O raw").args([&image, &raw]).ok();
    let disk = std::fs::read(&raw).expect("the copy can be read");
    let verdict = model.check(&disk, After::CleanEnd);
    verdict.unwrap_or_else(|e| panic!("{} (RINGBLOCK_SEED={seed}): {e}", recipe.name));
}

/// Goal: overlapping allocating writes, zeroes and discards leave each sector with a value that some order of
/// the requests explains, and the image sound.
#[test]
fn overlapping_requests_have_an_order() {
    for_all(&RECIPES, |recipe| load(recipe, 400, |_, rng| anywhere(rng)));
}

/// Goal: the same under the hardest contention. Method: all connections in the same two clusters.
#[test]
fn one_hot_cluster() {
    for_all(&RECIPES, |recipe| {
        load(recipe, 300, |_, rng| {
            let offset = rng.below(256) * SECTOR;
            (offset, ((1 + rng.below(64)) * SECTOR).min(131_072 - offset))
        });
    });
}

/// Goal: neighbours inside one cluster never harm each other: what a connection wrote to sectors that it
/// alone uses is exactly what stays. Method: sectors are dealt out to the connections in turns of 4 KiB.
#[test]
fn neighbours_in_a_cluster() {
    for_all(&RECIPES, |recipe| {
        load(recipe, 400, |thread, rng| {
            let slot = rng.below(SIZE / 4096 / THREADS) * THREADS + thread;
            let first = rng.below(8);
            (slot * 4096 + first * SECTOR, (1 + rng.below(8 - first)) * SECTOR)
        });
    });
}

/// Goal: copy-on-write from a backing file under concurrent writers keeps the rest of each cluster.
/// Method: the backing file holds known values; connections write single sectors all over.
#[test]
fn copy_on_write_beside_each_other() {
    for options in ["cluster_size=65536", "cluster_size=4096", "extended_l2=on"] {
        let seed = Rng::run_seed();
        println!("{options}: RINGBLOCK_SEED={seed}");
        let dir = TestDir::new("cow");
        let mut base = vec![0; SIZE as usize];
        let first = Model::zeroed(SIZE);
        let (id, data) = first.write(0, SIZE, false);
        base.copy_from_slice(&data);
        first.done(id);
        std::fs::write(dir.file("base.raw"), &base).expect("write");
        let values = first.check(&base, After::CleanEnd).expect("the base is as made");
        let create = tools::qemu_img().dir(dir.path()).line("create -q -f qcow2 -b base.raw -F raw -o");
        create.args([options, "top.qcow2"]).ok();
        let image = dir.file("top.qcow2");
        let model = Model::with_values(values);
        let daemon = Daemon::serving(&dir, "qcow2", &image).cores(3).start();
        let turns = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (model, turns, socket) = (&model, &turns, daemon.nbd_socket());
                scope.spawn(move || {
                    let mut conn = Nbd::connect(&socket, "d").unwrap_or_else(|e| panic!("connect: {e}"));
                    let mut rng = Rng::new(seed ^ (thread << 32));
                    for _ in 0..500 {
                        // All connections work in the same, slowly moving, window of clusters.
                        let window = turns.fetch_add(1, Ordering::Relaxed) * 4096 % (SIZE - 131_072);
                        step(&mut conn, model, &mut rng, |rng| {
                            let offset = window / SECTOR * SECTOR + rng.below(255) * SECTOR;
                            (offset, (1 + rng.below(6)) * SECTOR)
                        });
                    }
                    conn.close();
                });
            }
        });
        daemon.quit();
        check_clean(&image);
        let raw = dir.file("end.raw");
        tools::qemu_img().line("convert -f qcow2 -O raw").args([&image, &raw]).ok();
        let disk = std::fs::read(&raw).expect("the copy can be read");
        model.check(&disk, After::CleanEnd).unwrap_or_else(|e| panic!("{options} (seed {seed}): {e}"));
        assert_eq!(std::fs::read(dir.file("base.raw")).expect("read"), base, "the backing file was written");
    }
}

/// Goal: many requests in flight on every connection, replies in any order. Method: each connection keeps
/// sixteen writes in flight in its own slots and matches cookies.
#[test]
fn pipelined_requests_on_every_connection() {
    let dir = TestDir::new("pipeline");
    let recipe = Recipe { name: "v3", options: "cluster_size=65536", base: Base::None };
    let image = recipe.make(&dir, tools::qemu_img, &mut Content::new(SIZE));
    let model = Model::zeroed(SIZE);
    let daemon = Daemon::serving(&dir, "qcow2", &image).cores(3).start();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (model, socket) = (&model, daemon.nbd_socket());
            scope.spawn(move || {
                let mut conn = Nbd::connect(&socket, "d").unwrap_or_else(|e| panic!("connect: {e}"));
                let mut rng = Rng::new(thread);
                for _ in 0..40 {
                    let mut flying = std::collections::HashMap::new();
                    for _ in 0..16 {
                        let (offset, len) = anywhere(&mut rng);
                        let (id, data) = model.write(offset, len, false);
                        let cookie = conn.submit(nbd::WRITE, 0, offset, len as u32, &data).expect("submit");
                        flying.insert(cookie, id);
                    }
                    while !flying.is_empty() {
                        let (cookie, error) = conn.reply().expect("a reply");
                        assert_eq!(error, 0);
                        model.done(flying.remove(&cookie).expect("a reply to a request in flight"));
                    }
                }
                conn.close();
            });
        }
    });
    daemon.quit();
    check_clean(&image);
    let raw = dir.file("end.raw");
    tools::qemu_img().line("convert -f qcow2 -O raw").args([&image, &raw]).ok();
    model.check(&std::fs::read(&raw).expect("read"), After::CleanEnd).unwrap_or_else(|e| panic!("{e}"));
}
