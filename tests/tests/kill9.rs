//! Kill -9 under write load, a hundred times over.
//!
//! Method: rounds on one image, for several kinds of image side by side. In each round two connections write,
//! zero, trim and flush from threads of their own until the server is killed at a random moment. Then the
//! server is started again on the image, the disk is read over NBD and judged by [`Model`]: every flushed
//! sector is there, every other holds an old or a new value, never a third. The peer's check finds no error
//! (leaks are allowed). What was found is the starting point of the next round.
//!
//! ```text
//!   serve ─► write load ─► kill -9 ─► check ─► serve again ─► read all, judge ─► next round
//! ```

use ringblock_tests::daemon::wait_unlocked;
use ringblock_tests::images::{Base, Content, Recipe, check_no_errors};
use ringblock_tests::model::{After, Model, SECTOR};
use ringblock_tests::nbd::{self, Nbd};
use ringblock_tests::{Daemon, Rng, TestDir, tools};
use std::time::Duration;

const SIZE: u64 = 4 * 1024 * 1024 + 3 * SECTOR;
const CONNECTIONS: u64 = 2;

/// One step of the load; an error means that the server is gone.
fn step(conn: &mut Nbd, model: &Model, rng: &mut Rng) -> std::io::Result<()> {
    let unit = *rng.pick(&[SECTOR, 4096, 65536]);
    let offset = rng.below(SIZE) / unit * unit;
    let len = ((1 + rng.below(8)) * *rng.pick(&[SECTOR, 4096, 16384])).min(SIZE - offset);
    match rng.below(100) {
        0..70 => {
            let fua = rng.chance(10);
            let (id, data) = model.write(offset, len, fua);
            conn.write(offset, &data, if fua { nbd::FLAG_FUA } else { 0 })?;
            model.done(id);
        }
        70..80 => {
            let fua = rng.chance(20);
            let id = model.zero(offset, len, fua);
            conn.zero(offset, len as u32, if fua { nbd::FLAG_FUA } else { 0 })?;
            model.done(id);
        }
        80..88 => {
            let id = model.trim(offset, len);
            conn.trim(offset, len as u32)?;
            model.done(id);
        }
        _ => {
            let start = model.now();
            conn.flush()?;
            model.flushed(start);
        }
    }
    Ok(())
}

fn serve(recipe: &Recipe, dir: &TestDir, image: &str) -> Daemon {
    Daemon::on(dir).cores(2).blockdev(&recipe.node(dir, image)).export("d", "q", true).start()
}

/// Reads the whole disk over NBD.
fn read_all(daemon: &Daemon) -> Vec<u8> {
    let mut conn = Nbd::connect(&daemon.nbd_socket(), "d").expect("connect");
    let mut disk = vec![0; SIZE as usize];
    for (i, chunk) in disk.chunks_mut(1 << 20).enumerate() {
        conn.read((i << 20) as u64, chunk).expect("read");
    }
    conn.close();
    disk
}

/// Runs `rounds` rounds on one image.
fn rounds(recipe: &Recipe, rounds: u64) {
    let seed = Rng::run_seed();
    println!("{}: RINGBLOCK_SEED={seed}", recipe.name);
    let dir = TestDir::new("kill9");
    let image = recipe.make(&dir, tools::qemu_img, &mut Content::new(SIZE));
    let mut values = vec![0; (SIZE / SECTOR) as usize];
    let mut rng = Rng::new(seed);
    for round in 0..rounds {
        let model = Model::with_values(values);
        let daemon = serve(recipe, &dir, &image);
        std::thread::scope(|scope| {
            for _ in 0..CONNECTIONS {
                let (model, socket, mut rng) = (&model, daemon.nbd_socket(), Rng::new(rng.next_u64()));
                scope.spawn(move || {
                    let Ok(mut conn) = Nbd::connect(&socket, "d") else {
                        return;
                    };
                    while step(&mut conn, model, &mut rng).is_ok() {}
                });
            }
            std::thread::sleep(Duration::from_micros(rng.below(60_000)));
            daemon.kill9();
        });
        wait_unlocked(&image);
        // Lazy refcounts are wrong by design until the next writable open repairs them.
        if !recipe.options.contains("lazy") {
            check_no_errors(&image);
        }
        let daemon = serve(recipe, &dir, &image);
        let disk = read_all(&daemon);
        daemon.quit();
        check_no_errors(&image);
        values = model
            .check(&disk, After::Crash)
            .unwrap_or_else(|e| panic!("{} round {round} (RINGBLOCK_SEED={seed}): {e}", recipe.name));
    }
    // What a hundred crashes leaked can be given back.
    tools::img().line("check -q -r leaks -f qcow2").arg(&image).ok();
    let raw = dir.file("end.raw");
    tools::qemu_img().line("convert -f qcow2 -O raw").args([&image, &raw]).ok();
    let model = Model::with_values(values);
    model.check(&std::fs::read(&raw).expect("read"), After::CleanEnd).unwrap_or_else(|e| panic!("{e}"));
}

fn plain(name: &'static str, options: &'static str) -> Recipe {
    Recipe { name, options, base: Base::None }
}

/// Goal: the crash contract at its simplest: the default image, 30 kills.
#[test]
fn default_image() {
    rounds(&plain("v3", "cluster_size=65536"), 30);
}

/// Goal: the same where tables grow all the time: tiny clusters, 20 kills.
#[test]
fn tiny_clusters() {
    rounds(&plain("c512", "cluster_size=512"), 20);
}

/// Goal: the same with 4 KiB clusters and one-bit refcounts, 15 kills.
#[test]
fn small_clusters() {
    rounds(&plain("c4k", "cluster_size=4096,refcount_bits=1"), 15);
}

/// Goal: the same with subclusters, 15 kills.
#[test]
fn subclusters() {
    rounds(&plain("ext-l2", "extended_l2=on"), 15);
}

/// Goal: the same with lazy refcounts, where opening again repairs; 10 kills.
#[test]
fn lazy_refcounts() {
    rounds(&plain("lazy", "lazy_refcounts=on"), 10);
}

/// Goal: the same with an external data file and with the old version, 5 kills each.
#[test]
fn data_file_and_version_two() {
    rounds(&Recipe { name: "data", options: "cluster_size=4096", base: Base::DataFile(false) }, 5);
    rounds(&plain("v2", "compat=0.10"), 5);
}
