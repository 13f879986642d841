//! Kill -9 under write load: what a server that was killed leaves is sound, holds what was flushed, and is served again
//! at once.
//!
//! A [`Trial`] is one image and its cycles. Every sector that its connections write carries a stamp of its own, so
//! [`Model`] tells for each sector read back whether its value may be there: every flushed sector holds what was
//! flushed, every other an old or a new value, never a third.
//!
//! ```text
//!            ┌───────────────────────────── next cycle ────────────────────────────────┐
//!            ▼                                                                          │
//!   start ─► first request served (≤ 1 s) ─► read all, judge ─► write load ─► kill -9 ─► check
//!     └─► kill -9 ─► check ─► start …        a kill while it starts, or repairs
//!                                            write load ─► kill -9 ─► start ─► write load ─► kill -9   two in a row
//! ```
//!
//! Invariant: an image is judged by the checker as the kill left it, before anything opens it again.

use crate::daemon::{Daemon, Start, wait_unlocked};
use crate::dir::TestDir;
use crate::images::{Base, Content, Recipe, check_no_errors};
use crate::model::{self, After, Model, SECTOR};
use crate::nbd::{self, Nbd};
use crate::rng::Rng;
use crate::tools;
use ringblock_checker::{Checker, Files};
use std::time::{Duration, Instant};

/// How soon an image has to be served again.
pub const SOON: Duration = Duration::from_secs(1);

/// The size of the disks: their last cluster is never whole.
const SIZE: u64 = 4 * 1024 * 1024 + 3 * SECTOR;
/// One in so many images is also judged by the peer's check.
const SAMPLE: u64 = 8;

/// A kind of image, and how it is opened.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// A name, for messages and replays.
    pub name: &'static str,
    /// The value of `-o` at creation.
    options: &'static str,
    under: Under,
    /// O_DIRECT, on a disk; else the page cache, in memory where that is to be had.
    direct: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Under {
    Nothing,
    /// A raw image, shorter than the disk.
    Backing,
    DataFile,
}

const fn case(name: &'static str, options: &'static str, under: Under, direct: bool) -> Case {
    Case { name, options, under, direct }
}

/// All of them.
pub const CASES: [Case; 14] = [
    case("v3", "cluster_size=65536", Under::Nothing, false),
    case("v3-direct", "cluster_size=65536", Under::Nothing, true),
    case("c512", "cluster_size=512", Under::Nothing, false),
    case("c512-backing-direct", "cluster_size=512", Under::Backing, true),
    case("c4k-rc1", "cluster_size=4096,refcount_bits=1", Under::Nothing, false),
    case("c4k-backing", "cluster_size=4096", Under::Backing, false),
    case("sub", "extended_l2=on", Under::Nothing, true),
    case("sub-16k-backing", "extended_l2=on,cluster_size=16384", Under::Backing, false),
    case("v2", "compat=0.10", Under::Nothing, false),
    case("v2-backing-direct", "compat=0.10,cluster_size=4096", Under::Backing, true),
    case("lazy", "lazy_refcounts=on", Under::Nothing, false),
    case("lazy-512-direct", "lazy_refcounts=on,cluster_size=512", Under::Nothing, true),
    case("data-file", "cluster_size=4096", Under::DataFile, false),
    case("data-file-sub-direct", "extended_l2=on", Under::DataFile, true),
];

impl Case {
    /// The case of this name.
    pub fn named(name: &str) -> Option<&'static Case> {
        CASES.iter().find(|c| c.name == name)
    }

    fn recipe(&self) -> Recipe {
        let base = if self.under == Under::DataFile { Base::DataFile(false) } else { Base::None };
        Recipe { name: self.name, options: self.options, base }
    }

    /// Makes the image; returns its path and the stamp of each sector.
    fn make(&self, dir: &TestDir) -> (String, Vec<u64>) {
        let mut values = vec![0; (SIZE / SECTOR) as usize];
        if self.under != Under::Backing {
            return (self.recipe().make(dir, tools::qemu_img, &mut Content::new(SIZE)), values);
        }
        let mut below = vec![0; (SIZE * 3 / 4 / SECTOR * SECTOR) as usize];
        for (sector, bytes) in (0u64..).zip(below.chunks_mut(SECTOR as usize)) {
            // Some sectors of zeroes among them.
            if sector % 7 != 0 {
                values[sector as usize] = (0x4241 << 48) | (sector / 3);
                model::fill(bytes, sector * SECTOR, values[sector as usize]);
            }
        }
        std::fs::write(dir.file("below.raw"), below).expect("write");
        let create = tools::qemu_img().dir(dir.path()).line("create -q -f qcow2 -b below.raw -F raw -o");
        create.arg(self.options).arg("top.qcow2").arg(SIZE.to_string()).ok();
        (dir.file("top.qcow2"), values)
    }
}

/// What a trial has done so far.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    /// Kills.
    pub cycles: u64,
    /// Kills before the first request was served.
    pub while_starting: u64,
    /// Kills of a server that followed a kill with nothing but a start in between.
    pub in_a_row: u64,
    /// Restarts, from the start of the process to the answer to the first request.
    pub restarts: u64,
    /// The longest of them.
    pub longest: Duration,
    /// Those that took longer than [`SOON`].
    pub slow: u64,
    /// Requests of the load that were answered.
    pub requests: u64,
    /// Flushes among them, and writes with FUA.
    pub flushes: u64,
    /// Images judged by the peer as well.
    pub samples: u64,
}

impl Tally {
    /// Adds another trial's.
    pub fn add(&mut self, other: &Tally) {
        self.cycles += other.cycles;
        self.while_starting += other.while_starting;
        self.in_a_row += other.in_a_row;
        self.restarts += other.restarts;
        self.longest = self.longest.max(other.longest);
        self.slow += other.slow;
        self.requests += other.requests;
        self.flushes += other.flushes;
        self.samples += other.samples;
    }
}

/// One image on its way through its cycles.
pub struct Trial {
    case: &'static Case,
    dir: TestDir,
    image: String,
    model: Model,
    rng: Rng,
    checker: Checker,
    tally: Tally,
}

impl Trial {
    /// A new image.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(case: &'static Case, seed: u64) -> Trial {
        let dir = if case.direct { TestDir::new("kill9") } else { TestDir::in_memory("kill9") };
        let (image, values) = case.make(&dir);
        let (model, rng) = (Model::with_values(values), Rng::new(seed));
        Trial { case, dir, image, model, rng, checker: Checker::default(), tally: Tally::default() }
    }

    /// What was done so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// At least one kill and what is to be checked after it.
    ///
    /// # Errors
    /// What is wrong with the image, or with a sector.
    pub fn cycle(&mut self) -> Result<(), String> {
        if self.rng.chance(15) {
            self.kill_while_starting()?;
        }
        let (daemon, mut conn) = self.served()?;
        self.judge(&mut conn, After::Crash)?;
        conn.close();
        self.load(daemon)?;
        if self.rng.chance(20) {
            let (daemon, conn) = self.served()?;
            drop(conn);
            self.tally.in_a_row += 1;
            self.load(daemon)?;
        }
        Ok(())
    }

    /// Judges what the last kill left, ends the server in order, gives back what the kills leaked, and has the peer read
    /// all of it.
    ///
    /// # Errors
    /// As [`Trial::cycle`].
    ///
    /// # Panics
    /// If a tool fails.
    pub fn finish(mut self) -> Result<Tally, String> {
        let (daemon, mut conn) = self.served()?;
        self.judge(&mut conn, After::Crash)?;
        conn.close();
        daemon.quit();
        check_no_errors(&self.image);
        tools::img()
            .line("check -q -r leaks --image-opts")
            .arg(self.case.recipe().spec(&self.dir, &self.image))
            .ok();
        let raw = self.dir.file("end.raw");
        tools::qemu_img().line("convert -f qcow2 -O raw").args([&self.image, &raw]).ok();
        let disk = std::fs::read(&raw).map_err(|e| format!("{raw}: {e}"))?;
        self.model.check(&disk, After::CleanEnd).map_err(|e| format!("as the peer reads it: {e}"))?;
        Ok(self.tally)
    }

    fn start(&self) -> Start {
        let mut node = self.case.recipe().node(&self.dir, &self.image);
        if self.case.direct {
            node += ",cache.direct=on";
        }
        Daemon::on(&self.dir).cores(2).blockdev(&node).export("d", "q", true)
    }

    /// Starts a server and waits for its first answer.
    fn served(&mut self) -> Result<(Daemon, Nbd), String> {
        let start = self.start();
        let began = Instant::now();
        let mut daemon = start.launch();
        let conn = loop {
            match Nbd::connect(&daemon.nbd_socket(), "d")
                .and_then(|mut c| c.read(0, &mut [0; 512]).map(|()| c))
            {
                Ok(conn) => break conn,
                Err(e) if !daemon.alive() => return Err(format!("no restart ({e}):\n{}", daemon.log())),
                Err(e) if began.elapsed() > SOON * 30 => return Err(format!("no restart in 30 s: {e}")),
                Err(_) => std::thread::sleep(Duration::from_micros(500)),
            }
        };
        let took = began.elapsed();
        self.tally.restarts += 1;
        self.tally.longest = self.tally.longest.max(took);
        self.tally.slow += u64::from(took > SOON);
        Ok((daemon, conn))
    }

    /// Reads the whole disk; what it holds is where the next model begins.
    fn judge(&mut self, conn: &mut Nbd, after: After) -> Result<(), String> {
        let mut disk = vec![0; SIZE as usize];
        for (i, chunk) in disk.chunks_mut(1 << 20).enumerate() {
            conn.read((i << 20) as u64, chunk).map_err(|e| format!("read: {e}"))?;
        }
        self.model = Model::with_values(self.model.check(&disk, after)?);
        Ok(())
    }

    fn kill_while_starting(&mut self) -> Result<(), String> {
        let daemon = self.start().launch();
        // Most of a start is over after some milliseconds: as many kills in the first as in all that follow.
        let most = 1 << (8 + self.rng.below(7));
        std::thread::sleep(Duration::from_micros(self.rng.below(most)));
        daemon.kill9();
        self.tally.while_starting += 1;
        self.killed()
    }

    /// Writes from several connections until the kill.
    fn load(&mut self, daemon: Daemon) -> Result<(), String> {
        let most = 1 << (12 + self.rng.below(6));
        let pause = Duration::from_micros(self.rng.below(most));
        let seeds: Vec<u64> = (0..1 + self.rng.below(4)).map(|_| self.rng.next_u64()).collect();
        let model = &self.model;
        let done = std::thread::scope(|scope| {
            let clients: Vec<_> = seeds
                .into_iter()
                .map(|seed| {
                    let socket = daemon.nbd_socket();
                    scope.spawn(move || client(&socket, model, Rng::new(seed)))
                })
                .collect();
            std::thread::sleep(pause);
            daemon.kill9();
            clients
                .into_iter()
                .map(|c| c.join().unwrap_or_default())
                .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
        });
        self.tally.requests += done.0;
        self.tally.flushes += done.1;
        self.model.crashed();
        self.killed()
    }

    /// The image as a kill left it.
    fn killed(&mut self) -> Result<(), String> {
        self.tally.cycles += 1;
        wait_unlocked(&self.image);
        let read = |path: &str| std::fs::read(path).map_err(|e| format!("{path}: {e}"));
        let image = read(&self.image)?;
        let data = match self.case.under {
            Under::DataFile => Some(read(&self.case.recipe().data_file(&self.dir))?),
            _ => None,
        };
        let report = self.checker.check(&Files { image: &image, data: data.as_deref(), backing: None });
        // Refcounts of a dirty image are wrong by design until the next writable open.
        if report.refused || !report.is_sound() && !report.dirty {
            let kept = self.dir.file("broken.qcow2");
            let _ = std::fs::write(&kept, &image);
            return Err(format!("corrupt after a kill ({kept}): {}", report.explain()));
        }
        if !report.dirty && self.tally.cycles.is_multiple_of(SAMPLE) {
            self.tally.samples += 1;
            check_no_errors(&self.image);
        }
        Ok(())
    }
}

/// Works until the server is gone; returns how many requests were answered, and how many of them made something
/// durable.
fn client(socket: &str, model: &Model, mut rng: Rng) -> (u64, u64) {
    let mut done = (0, 0);
    if let Ok(mut conn) = Nbd::connect(socket, "d") {
        while let Ok(durable) = step(&mut conn, model, &mut rng) {
            done.0 += 1;
            done.1 += u64::from(durable);
        }
    }
    done
}

/// One step of the load: whether it made something durable. An error means that the server is gone.
fn step(conn: &mut Nbd, model: &Model, rng: &mut Rng) -> std::io::Result<bool> {
    let unit = *rng.pick(&[SECTOR, 4096, 65536]);
    let offset = rng.below(SIZE) / unit * unit;
    let len = ((1 + rng.below(8)) * *rng.pick(&[SECTOR, 4096, 16384])).min(SIZE - offset);
    let fua = rng.chance(10);
    let flags = if fua { nbd::FLAG_FUA } else { 0 };
    match rng.below(100) {
        0..70 => {
            let (id, data) = model.write(offset, len, fua);
            conn.write(offset, &data, flags)?;
            model.done(id);
        }
        70..80 => {
            let id = model.zero(offset, len, fua);
            conn.zero(offset, len as u32, flags)?;
            model.done(id);
        }
        80..88 => {
            let id = model.trim(offset, len);
            conn.trim(offset, len as u32)?;
            model.done(id);
            return Ok(false);
        }
        _ => {
            let start = model.now();
            conn.flush()?;
            model.flushed(start);
            return Ok(true);
        }
    }
    Ok(fua)
}
