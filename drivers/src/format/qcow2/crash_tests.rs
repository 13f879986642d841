//! Power cuts at any moment: the image stays clean, flushed data is there, and every sector is old or new.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use ringblock_engine::Errno;
use ringblock_engine::driver::Punch;

use super::check::{self, Repair};
use super::create::{self, CreateOptions};
use super::simkit::{Disk, Sim, SimFile, SimFiles};
use super::testkit::{Random, Scratch, qemu_img, qemu_io};

const SECTOR: u64 = 512;

/// One value of a sector: what, from when, until when it was being written.
struct Value {
    stamp: u8,
    s: u64,
    c: u64,
}

/// What the guest did, sector by sector, and its flushes that were acknowledged.
struct History {
    sectors: Vec<Vec<Value>>,
    flushes: Vec<(u64, u64)>,
}

impl History {
    fn new(first: impl Iterator<Item = u8>) -> History {
        let sectors = first.map(|stamp| vec![Value { stamp, s: 0, c: 0 }]).collect();
        History { sectors, flushes: Vec::new() }
    }

    /// Whether a sector may hold `bytes` after a power cut at `time`.
    fn allows(&self, sector: usize, bytes: &[u8], time: u64) -> bool {
        let flushed = self.flushes.iter().filter(|f| f.1 <= time).map(|f| f.0).max().unwrap_or(0);
        let values = &self.sectors[sector];
        let durable = values.iter().rposition(|v| v.c <= flushed).unwrap_or(0);
        let same = bytes.iter().all(|&b| b == bytes[0]);
        same && values[durable..].iter().any(|v| v.s <= time && v.stamp == bytes[0])
    }
}

/// The bytes of a new image file.
fn bytes_of(options: &CreateOptions) -> Vec<u8> {
    let image = create::create(options).unwrap();
    let mut bytes = vec![0; image.file_size as usize];
    for (at, data) in image.writes() {
        bytes[at.0 as usize..at.0 as usize + data.len()].copy_from_slice(&data);
    }
    bytes
}

/// A guest that owns every n-th block of a few sectors and works on its blocks one after the other.
async fn guest(disk: Rc<Disk>, history: Rc<RefCell<History>>, me: u64, guests: u64, ops: u64, seed: u64) {
    let mut random = Random::new(seed);
    let g = *disk.shared.geometry();
    let sectors = disk.shared.size() / SECTOR;
    // Punching needs whole subclusters: blocks are that large.
    let block = g.subcluster_size() / SECTOR;
    for i in 0..ops {
        let mine = random.below(sectors.div_ceil(block).div_ceil(guests)) * guests + me;
        let first = mine * block;
        if first >= sectors {
            continue;
        }
        let block_end = (first + block).min(sectors);
        let (from, to) = match random.below(3) {
            0 => (first, block_end),
            _ => {
                let from = first + random.below(block_end - first);
                (from, from + 1 + random.below(block_end - from))
            }
        };
        let kind = random.below(13);
        let stamp = match kind {
            0..7 | 12 => 1 + ((i * guests + me) % 250) as u8,
            _ => 0,
        };
        let s = disk.sim.stamp();
        let range = if kind < 7 { from..to } else { first..block_end };
        let bytes = range.start * SECTOR..range.end * SECTOR;
        let changes = kind < 10 || kind == 12;
        if changes {
            for sector in range.clone() {
                history.borrow_mut().sectors[sector as usize].push(Value { stamp, s, c: u64::MAX });
            }
        }
        let result = match kind {
            0..7 => disk.write(bytes.start, &vec![stamp; (bytes.end - bytes.start) as usize]).await,
            7 => disk.image.punch(bytes, Punch::Zero { unmap: false }).await,
            8 => disk.image.punch(bytes, Punch::Zero { unmap: true }).await,
            9 => disk.image.punch(bytes, Punch::Discard).await,
            10 if random.below(3) == 0 => {
                let result = disk.image.flush().await;
                let c = disk.sim.stamp();
                if result.is_ok() {
                    history.borrow_mut().flushes.push((s, c));
                }
                result
            }
            12 => {
                disk.image
                    .write_compressed(bytes.start, &vec![stamp; (bytes.end - bytes.start) as usize])
                    .await
            }
            11 => read_others(&disk, &history, random.below(sectors)).await,
            _ => read_own(&disk, &history, range.clone()).await,
        };
        let c = disk.sim.stamp();
        if changes && result.is_ok() {
            for sector in range {
                if let Some(v) = history.borrow_mut().sectors[sector as usize].last_mut() {
                    v.c = c;
                }
            }
        }
    }
}

/// Reads back what this guest wrote last (after an error: any of the values since).
async fn read_own(disk: &Disk, history: &RefCell<History>, range: std::ops::Range<u64>) -> Result<(), Errno> {
    let got = disk.read(range.start * SECTOR..range.end * SECTOR).await?;
    for (sector, bytes) in range.zip(got.chunks_exact(SECTOR as usize)) {
        let history = history.borrow();
        let values = &history.sectors[sector as usize];
        let done = values.iter().rposition(|v| v.c != u64::MAX).unwrap_or(0);
        assert!(
            values[done..].iter().any(|v| bytes.iter().all(|&b| b == v.stamp)),
            "sector {sector} reads {}",
            bytes[0]
        );
    }
    Ok(())
}

/// Reads what others work on at the same time: never anything that nobody wrote there.
async fn read_others(disk: &Disk, history: &RefCell<History>, from: u64) -> Result<(), Errno> {
    let to = (from + 40).min(disk.shared.size() / SECTOR);
    let got = disk.read(from * SECTOR..to * SECTOR).await?;
    for (sector, bytes) in (from..to).zip(got.chunks_exact(SECTOR as usize)) {
        let history = history.borrow();
        let known = history.sectors[sector as usize].iter().any(|v| bytes.iter().all(|&b| b == v.stamp));
        assert!(known, "sector {sector} reads {}, which nobody wrote there", bytes[0]);
    }
    Ok(())
}

/// One workload; then many power cuts.
struct Crash {
    options: CreateOptions,
    base: u64,
    frames: Option<u32>,
    write_fails: u64,
    /// An image made by somebody else, and the bytes at its beginning that hold [`SNAPSHOT`].
    initial: Option<(Vec<u8>, u64)>,
}

/// What the disk held when its snapshot was taken.
const SNAPSHOT: u8 = 255;

impl Crash {
    fn on(options: CreateOptions) -> Crash {
        Crash { options, base: 0, frames: None, write_fails: 0, initial: None }
    }
}

fn base_stamp(sector: u64) -> u8 {
    251 + (sector % 4) as u8
}

/// What a workload left.
struct Worked {
    files: SimFiles,
    history: Rc<RefCell<History>>,
    end: u64,
    base: Vec<u8>,
}

/// Runs the workload.
fn work(case: &Crash, seed: u64) -> Worked {
    let sim = Sim::new(seed);
    let base: Vec<u8> = (0..case.base).map(|i| base_stamp(i / SECTOR)).collect();
    let (bytes, snapshot) = case.initial.clone().unwrap_or_else(|| (bytes_of(&case.options), 0));
    let files = SimFiles {
        file: SimFile::new(&sim, bytes),
        below: (case.base > 0).then(|| SimFile::new(&sim, base.clone())),
        data: case
            .options
            .data_file
            .is_some()
            .then(|| SimFile::new(&sim, vec![0; case.options.size as usize])),
    };
    let first = (0..case.options.size / SECTOR).map(|s| match s * SECTOR {
        at if at < snapshot => SNAPSHOT,
        at if at < case.base => base_stamp(s),
        _ => 0,
    });
    let history = Rc::new(RefCell::new(History::new(first)));
    let (f, h, s, frames, fails) =
        (files.clone(), history.clone(), sim.clone(), case.frames, case.write_fails);
    sim.run(async move {
        let disk = Disk::open(&s, f.clone(), frames).await;
        f.file.write_fails.set(fails);
        let left = Rc::new(std::cell::Cell::new(4));
        for me in 0..4 {
            let (disk, h, left) = (disk.clone(), h.clone(), left.clone());
            let task = guest(disk.clone(), h, me, 4, 60, seed * 16 + me);
            disk.image.runtime.spawn(Box::pin(async move {
                task.await;
                left.set(left.get() - 1);
            }));
        }
        poll_fn(|_| if left.get() == 0 { Poll::Ready(()) } else { Poll::Pending }).await;
        f.file.write_fails.set(0);
        disk.image.close().await.unwrap();
    });
    Worked { files, history, end: sim.stamp(), base }
}

/// Looks at one state after a power cut.
fn look(bytes: &[u8], data: Option<Vec<u8>>, base: &[u8], history: &History, time: u64, what: &str) {
    let sim = Sim::new(1);
    let files = SimFiles {
        file: SimFile::new(&sim, bytes.to_vec()),
        below: (!base.is_empty()).then(|| SimFile::new(&sim, base.to_vec())),
        data: data.map(|d| SimFile::new(&sim, d)),
    };
    let s = sim.clone();
    let (report, got) = sim.run(async move {
        let report = check::run(&*files.file, Repair::None).await.unwrap();
        let disk = Disk::open(&s, files, None).await;
        let size = disk.shared.size();
        (report, disk.read(0..size).await.unwrap())
    });
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {:?}", report.messages);
    for (i, sector) in got.chunks(SECTOR as usize).enumerate() {
        assert!(history.allows(i, sector, time), "{what}: sector {i} holds {:x?}", &sector[..4]);
    }
}

/// qemu-img has nothing to say, and finds the snapshot as it was.
fn ask_peer(dir: &Scratch, bytes: &[u8], snapshot: u64, what: &str, leaks: bool) {
    std::fs::write(dir.path("a.qcow2"), bytes).unwrap();
    let (rc, out, err) = qemu_img(dir, &["check", "-f", "qcow2", "a.qcow2"]);
    assert!(rc == 0 || leaks && rc == 3, "{what}\n{out}{err}");
    if snapshot > 0 {
        let (rc, _, err) =
            qemu_img(dir, &["convert", "-f", "qcow2", "-O", "raw", "-l", "s", "a.qcow2", "s.raw"]);
        assert_eq!(rc, 0, "{what}: {err}");
        let old = std::fs::read(dir.path("s.raw")).unwrap();
        let same =
            old.iter().enumerate().all(|(i, &b)| b == if (i as u64) < snapshot { SNAPSHOT } else { 0 });
        assert!(same, "{what}: the snapshot changed");
    }
}

fn crash_everywhere(case: &Crash, seeds: std::ops::Range<u64>, cuts: u64) {
    let dir = Scratch::new();
    std::fs::write(dir.path("base.raw"), vec![0; case.base as usize]).unwrap();
    std::fs::write(dir.path("d.raw"), vec![0; case.options.size as usize]).unwrap();
    let snapshot = case.initial.as_ref().map_or(0, |i| i.1);
    for seed in seeds {
        let Worked { files, history, end, base } = work(case, seed);
        let history = history.borrow();
        let mut random = Random::new(seed + 1000);
        for cut in 0..cuts {
            let time = random.below(end + 1);
            let what = format!("{:?} seed {seed} cut {cut} at {time} of {end}", case.options);
            let bytes = files.file.crash_image(time, &mut random);
            let data = files.data.as_ref().map(|d| d.crash_image(time, &mut random));
            look(&bytes, data, &base, &history, time, &what);
            if cut % 40 == 0 {
                ask_peer(&dir, &bytes, snapshot, &what, true);
            }
        }
        let last = files.file.content();
        look(&last, files.data.as_ref().map(|d| d.content()), &base, &history, u64::MAX, "closed");
        ask_peer(
            &dir,
            &last,
            snapshot,
            &format!("{:?} seed {seed} closed", case.options),
            case.write_fails > 0,
        );
    }
}

fn small(cluster_size: u64) -> CreateOptions {
    CreateOptions { size: 96 << 10, cluster_size, ..Default::default() }
}

/// Goal: after a power cut at any moment the image has no corruption, flushed data is there and no sector holds anything
/// that was never written to it. Method: four guests in random interleaving, tiny clusters so that all tables grow,
/// random cuts with every subset of the unflushed sectors; our checker for all, qemu-img's for a sample.
#[test]
fn power_cuts_leave_old_or_new() {
    crash_everywhere(&Crash::on(small(512)), 0..4, 150);
    crash_everywhere(&Crash::on(CreateOptions { refcount_bits: 64, ..small(512) }), 10..13, 150);
    crash_everywhere(&Crash::on(small(1024)), 20..23, 150);
    crash_everywhere(&Crash { base: 64 << 10, ..Crash::on(backed(small(2048))) }, 30..34, 150);
    crash_everywhere(&Crash { base: 64 << 10, ..Crash::on(backed(small(4096))) }, 35..38, 150);
}

/// Goal: the same with extended L2 entries, over a backing file too. Method: as above.
#[test]
fn power_cuts_with_subclusters() {
    let wide = CreateOptions { extended_l2: true, size: 512 << 10, ..small(16384) };
    crash_everywhere(&Crash::on(wide.clone()), 40..44, 120);
    crash_everywhere(&Crash { base: 300 << 10, ..Crash::on(backed(wide)) }, 45..49, 120);
}

/// Goal: the same with a cache of three slices, where dirty slices are written back under way. Method: as above.
#[test]
fn power_cuts_with_a_tiny_cache() {
    let options = CreateOptions { size: 300 << 10, ..small(512) };
    crash_everywhere(&Crash { frames: Some(3), ..Crash::on(options) }, 50..54, 120);
}

/// Goal: writes that fail, torn, leave an image that is clean and goes on working. Method: one in thirty fails.
#[test]
fn power_cuts_after_failed_writes() {
    crash_everywhere(&Crash { write_fails: 30, ..Crash::on(small(512)) }, 60..66, 80);
    let case = Crash { write_fails: 30, base: 64 << 10, ..Crash::on(backed(small(2048))) };
    crash_everywhere(&case, 70..74, 80);
}

fn backed(o: CreateOptions) -> CreateOptions {
    CreateOptions { backing_file: Some("base.raw".into()), backing_format: Some("raw".into()), ..o }
}

/// Goal: after a failed flush nothing is acknowledged any more (I9, D4). Method: one flush fails, the next would work.
#[test]
fn a_failed_flush_poisons_the_image() {
    let sim = Sim::new(7);
    let file = SimFile::new(&sim, bytes_of(&small(4096)));
    let (f, s) = (file.clone(), sim.clone());
    sim.run(async move {
        let disk = Disk::open(&s, SimFiles::one(f.clone()), None).await;
        disk.write(0, &[1; 512]).await.unwrap();
        f.flush_fails.set(true);
        assert_eq!(disk.image.flush().await, Err(Errno::EIO));
        f.flush_fails.set(false);
        assert_eq!(disk.image.flush().await, Err(Errno::EIO));
        assert_eq!(disk.write(8192, &[1; 512]).await, Err(Errno::EIO));
        assert_eq!(disk.read(0..512).await.unwrap(), vec![1; 512]);
    });
}

/// Goal: the same with guest data in a file of its own, with and without a backing file. Method: both files lose power
/// at the same moment.
#[test]
fn power_cuts_with_an_external_data_file() {
    let external = CreateOptions { data_file: Some("d.raw".into()), ..small(2048) };
    crash_everywhere(&Crash::on(external.clone()), 80..84, 100);
    crash_everywhere(&Crash { base: 64 << 10, ..Crash::on(backed(external)) }, 85..89, 100);
}

/// Goal: the same over internal snapshots, which never change. Method: qemu-img takes a snapshot first, so that tables
/// and clusters are shared.
#[test]
fn power_cuts_over_snapshots() {
    for (n, cluster_size) in [512u64, 4096].into_iter().enumerate() {
        let dir = Scratch::new();
        let opts = format!("cluster_size={cluster_size}");
        qemu_img(&dir, &["create", "-q", "-f", "qcow2", "-o", &opts, "a.qcow2", "96k"]);
        qemu_io(&dir, &["-f", "qcow2", "-c", "write -P 255 0 60k", "a.qcow2"]);
        qemu_img(&dir, &["snapshot", "-c", "s", "a.qcow2"]);
        let bytes = std::fs::read(dir.path("a.qcow2")).unwrap();
        let case = Crash { initial: Some((bytes, 60 << 10)), ..Crash::on(small(cluster_size)) };
        crash_everywhere(&case, 90 + 10 * n as u64..94 + 10 * n as u64, 120);
    }
}

/// Cuts the power at random moments of what `body` does to an image, and looks at what is left.
fn cut_anywhere<F: Future<Output = ()> + 'static>(
    bytes: Vec<u8>,
    seed: u64,
    cuts: u64,
    body: impl FnOnce(Rc<Disk>) -> F + 'static,
    look_at: impl Fn(Vec<u8>, u64),
) {
    cut_anywhere_over(None, bytes, seed, cuts, body, look_at);
}

/// The same with this backing file.
fn cut_anywhere_over<F: Future<Output = ()> + 'static>(
    below: Option<Vec<u8>>,
    bytes: Vec<u8>,
    seed: u64,
    cuts: u64,
    body: impl FnOnce(Rc<Disk>) -> F + 'static,
    look_at: impl Fn(Vec<u8>, u64),
) {
    let sim = Sim::new(seed);
    let file = SimFile::new(&sim, bytes);
    let (s, f) = (sim.clone(), file.clone());
    let below = below.map(|b| SimFile::new(&sim, b));
    sim.run(async move {
        let disk = Disk::open(&s, SimFiles { below, ..SimFiles::one(f) }, None).await;
        body(disk.clone()).await;
        disk.image.close().await.unwrap();
    });
    let end = sim.stamp();
    let mut random = Random::new(seed + 5);
    for _ in 0..cuts {
        let time = random.below(end + 1);
        look_at(file.crash_image(time, &mut random), time);
    }
    look_at(file.content(), end);
}

/// The checker's verdict on an image, and what the disk holds.
fn verdict(bytes: Vec<u8>) -> (check::CheckReport, Vec<u8>) {
    verdict_over(None, bytes)
}

/// The same with this backing file.
fn verdict_over(below: Option<Vec<u8>>, bytes: Vec<u8>) -> (check::CheckReport, Vec<u8>) {
    let sim = Sim::new(1);
    let file = SimFile::new(&sim, bytes);
    let below = below.map(|b| SimFile::new(&sim, b));
    let s = sim.clone();
    sim.run(async move {
        let report = check::run(&*file, Repair::None).await.unwrap();
        let disk = Disk::open(&s, SimFiles { below, ..SimFiles::one(file) }, None).await;
        let size = disk.shared.size();
        (report, disk.read(0..size).await.unwrap())
    })
}

/// Goal: a power cut while the refcount table grows leaves the old or the new one. Method: 64-bit counters and 512-byte
/// clusters, 3 MiB written and flushed in steps.
#[test]
fn power_cuts_while_the_refcount_table_grows() {
    let o = CreateOptions { size: 3 << 20, refcount_bits: 64, ..small(512) };
    let body = |disk: Rc<Disk>| async move {
        for i in 0..12u64 {
            disk.write(i << 18, &vec![i as u8 + 1; 1 << 18]).await.unwrap();
            disk.image.flush().await.unwrap();
        }
    };
    cut_anywhere(bytes_of(&o), 3, 60, body, |bytes, time| {
        let (report, _) = verdict(bytes);
        assert_eq!(
            report.corruptions,
            0,
            "at {time}: {:?}",
            &report.messages[..report.messages.len().min(5)]
        );
    });
}

/// Goal: a power cut while the disk is resized leaves the old or the new size, and what was flushed before. Method: up
/// and down across the growth of the L1 table.
#[test]
fn power_cuts_while_resizing() {
    const SIZES: [u64; 5] = [96 << 10, 400 << 10, 64 << 10, 3 << 20, 200 << 10];
    let body = |disk: Rc<Disk>| async move {
        disk.write(0, &[7; 3000]).await.unwrap();
        disk.image.flush().await.unwrap();
        disk.sim.stamp();
        for size in SIZES.into_iter().skip(1) {
            disk.image.truncate(size, ringblock_engine::driver::Preallocation::Off).await.unwrap();
            disk.write(size - 2000, &[8; 2000]).await.unwrap();
        }
    };
    for seed in 0..4 {
        cut_anywhere(bytes_of(&small(512)), seed, 120, body, |bytes, time| {
            let (report, got) = verdict(bytes);
            assert_eq!(
                report.corruptions,
                0,
                "at {time}: {:?}",
                &report.messages[..report.messages.len().min(5)]
            );
            assert!(SIZES.contains(&(got.len() as u64)));
            assert!(got[..3000].iter().all(|&b| b == 7 || b == 0) && got[3000..3072].iter().all(|&b| b == 0));
        });
    }
}

/// Goal: a resize is all or nothing (G4): with the old size all the data is there, with the new one what is left of it and
/// zeros behind, also over a longer backing file and where an earlier size reached further. Method: a full disk made
/// shorter and longer, by whole clusters and not, cut at any moment.
#[test]
fn a_resize_is_all_or_nothing() {
    const OLD: usize = 96 << 10;
    for (below, cluster) in
        [(None, 512), (None, 4096), (Some(vec![9; 300 << 10]), 512), (Some(vec![9; 300 << 10]), 4096)]
    {
        let sim = Sim::new(2);
        let backing_file = below.as_ref().map(|_| "below".to_owned());
        let file = SimFile::new(&sim, bytes_of(&CreateOptions { backing_file, ..small(cluster) }));
        let (s, f) = (sim.clone(), file.clone());
        sim.run(async move {
            let disk = Disk::open(&s, SimFiles::one(f), None).await;
            disk.write(0, &[7; OLD]).await.unwrap();
            disk.image.close().await.unwrap();
        });
        // each with the end of what is left of the data
        for sizes in [
            &[(50 << 10 | 512, 50 << 10 | 512), (200 << 10, 50 << 10 | 512)][..],
            &[(400 << 10, OLD)],
            &[(512, 512), (OLD, 512)],
        ] {
            for seed in 0..6 {
                let body = move |disk: Rc<Disk>| async move {
                    for &(size, _) in sizes {
                        let off = ringblock_engine::driver::Preallocation::Off;
                        disk.image.truncate(size as u64, off).await.unwrap();
                    }
                };
                let over = below.clone();
                cut_anywhere_over(below.clone(), file.content(), seed, 60, body, |bytes, time| {
                    let (report, got) = verdict_over(over.clone(), bytes);
                    let what = format!("cluster {cluster}, {sizes:?}, seed {seed}, at {time}");
                    assert_eq!(report.corruptions, 0, "{what}: {:?}", report.messages.first());
                    let mut allowed =
                        sizes.iter().copied().chain([(OLD, OLD)]).filter(|&(size, _)| size == got.len());
                    let ok = |data: usize| {
                        got[..data].iter().all(|&b| b == 7) && got[data..].iter().all(|&b| b == 0)
                    };
                    assert!(
                        allowed.any(|(_, data)| ok(data)),
                        "{what}: {} bytes, {:?}",
                        got.len(),
                        runs(&got)
                    );
                });
            }
        }
    }
}

/// The runs of equal bytes: value and end.
fn runs(bytes: &[u8]) -> Vec<(u8, usize)> {
    bytes
        .chunk_by(|a, b| a == b)
        .scan(0, |end, run| {
            *end += run.len();
            Some((run[0], *end))
        })
        .collect()
}

/// Goal: a repair that is cut short can be repeated, and content survives. Method: refcounts cleared, repair cut at any
/// moment, then repaired again.
#[test]
fn power_cuts_while_repairing() {
    let mut bytes = bytes_of(&small(512));
    let sim = Sim::new(2);
    let file = SimFile::new(&sim, bytes);
    let (s, f) = (sim.clone(), file.clone());
    sim.run(async move {
        let disk = Disk::open(&s, SimFiles::one(f), None).await;
        disk.write(1000, &[5; 40_000]).await.unwrap();
        disk.image.close().await.unwrap();
    });
    bytes = file.content();
    let want = verdict(bytes.clone()).1;
    bytes[1024..1200].fill(0);
    for seed in 0..4 {
        let sim = Sim::new(seed);
        let file = SimFile::new(&sim, bytes.clone());
        let f = file.clone();
        let report = sim.run(async move { check::run(&*f, Repair::All).await.unwrap() });
        assert!(report.is_clean() && report.corruptions_fixed > 0);
        let end = sim.stamp();
        let mut random = Random::new(seed);
        for _ in 0..40 {
            let time = random.below(end + 1);
            let sim = Sim::new(1);
            let again = SimFile::new(&sim, file.crash_image(time, &mut random));
            let f = again.clone();
            let report = sim.run(async move { check::run(&*f, Repair::All).await.unwrap() });
            assert!(report.is_clean(), "at {time}: {report:?}");
            assert!(verdict(again.content()).1 == want, "at {time}");
        }
    }
}
