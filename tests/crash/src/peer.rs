//! The peer's tools: images that they make, and what they say and do of images.
//!
//! ```text
//!   recipe ─► qemu-img create, qemu-io write, qemu-img snapshot … ─► Subject
//!          └► qemu-io through blklogwrites ─► log ─► Recording: every state that a power cut of QEMU may leave
//! ```
//!
//! Nothing of these images hangs on the clock but the dates of snapshots.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use ringblock_engine::host::sim::{Change, Event, Rng};
use ringblock_tests::tools::{self, Cmd};
use serde_json::Value;

use crate::record::{Recording, Roles};
use crate::subject::Subject;

/// A folder in memory, removed at the end.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// A new one.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Folder {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = base.join(format!("rb-crash-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap_or_else(|e| panic!("mkdir {}: {e}", path.display()));
        Folder(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn img(&self, line: &str) -> Cmd {
        tools::qemu_img().dir(&self.0).line(line)
    }

    fn io(&self, image: &str, commands: &[String]) {
        let mut cmd = tools::qemu_io().dir(&self.0).line("-d unmap");
        for command in commands {
            cmd = cmd.arg("-c").arg(command);
        }
        // compressed writes fail where plain data is
        let out = cmd.line(image).run();
        assert!(out.code <= 1 && !out.stderr.contains("can't open"), "{}", out.describe());
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A kind of image that the peer makes.
#[derive(Clone, Copy, Debug)]
struct Recipe {
    name: &'static str,
    options: &'static str,
    kilobytes: u64,
    snapshots: u32,
    bitmaps: u32,
    /// Bytes of a raw backing file.
    base: usize,
}

const fn recipe(name: &'static str, options: &'static str, kilobytes: u64, snapshots: u32) -> Recipe {
    Recipe { name, options, kilobytes, snapshots, bitmaps: 0, base: 0 }
}

const RECIPES: &[Recipe] = &[
    recipe("peer-512", "cluster_size=512", 48, 2),
    recipe("peer-512-bits64", "cluster_size=512,refcount_bits=64", 40, 1),
    recipe("peer-512-bits8", "cluster_size=512,refcount_bits=8", 40, 2),
    recipe("peer-bits1", "cluster_size=1024,refcount_bits=1", 64, 0),
    recipe("peer-1k-v2", "cluster_size=1024,compat=0.10", 64, 2),
    recipe("peer-4k", "cluster_size=4096", 128, 2),
    recipe("peer-4k-bits2", "cluster_size=4096,refcount_bits=2", 96, 1),
    recipe("peer-4k-lazy", "cluster_size=4096,lazy_refcounts=on", 96, 1),
    recipe("peer-subclusters", "cluster_size=16384,extended_l2=on", 192, 1),
    recipe("peer-64k", "cluster_size=65536", 512, 1),
    Recipe { bitmaps: 2, ..recipe("peer-bitmaps", "cluster_size=4096", 96, 1) },
    Recipe { bitmaps: 1, ..recipe("peer-512-bitmaps", "cluster_size=512", 40, 1) },
    Recipe { base: 50_000, ..recipe("peer-backed", "cluster_size=4096", 96, 1) },
    Recipe { base: 50_000, ..recipe("peer-512-backed", "cluster_size=512", 40, 1) },
];

/// Guest requests for `qemu-io`.
fn requests(rng: &mut Rng, size: u64, cluster: u64, count: u32, packed: bool) -> Vec<String> {
    let one = |rng: &mut Rng| {
        let longest = rng.pick(&[512, cluster, 3 * cluster]);
        let at = rng.below(size / 512) * 512;
        let len = (rng.between(1, longest / 512) * 512).min(size - at);
        match rng.below(20) {
            0 | 1 => format!("write -z {at} {len}"),
            2 => format!("write -z -u {at} {len}"),
            3 | 4 => format!("discard {at} {len}"),
            5 | 6 if packed => {
                format!("write -c -P {} {} {cluster}", rng.between(1, 250), at / cluster * cluster)
            }
            7 | 8 => "flush".to_owned(),
            _ => format!("write -P {} {at} {len}", rng.between(1, 250)),
        }
    };
    (0..count).map(|_| one(rng)).collect()
}

impl Recipe {
    fn make(&self, folder: &Folder, seed: u64) -> Subject {
        let mut rng = Rng::new(seed);
        let size = self.kilobytes << 10;
        let base = (0..self.base).map(|i| (i / 512) as u8 | 1).collect::<Vec<u8>>();
        let create = folder.img("create -q -f qcow2 -o").arg(self.options);
        match self.base {
            0 => create,
            _ => {
                std::fs::write(folder.path().join("base"), &base).expect("the base file");
                create.line("-b base -F raw")
            }
        }
        .arg("img")
        .arg(size.to_string())
        .ok();
        let word = self.options.split(',').find_map(|o| o.strip_prefix("cluster_size="));
        let cluster = word.and_then(|w| w.parse().ok()).unwrap_or(65536);
        for i in 0..self.bitmaps {
            folder.img(&format!("bitmap --add -g 4096 img b{i}")).ok();
        }
        for i in 0..=self.snapshots {
            let packed = self.bitmaps == 0;
            folder.io("-f qcow2 img", &requests(&mut rng, size, cluster, 14, packed));
            if i < self.snapshots {
                folder.img(&format!("snapshot -c s{i} img")).ok();
            }
        }
        match self.base {
            0 => Subject::alone(self.name, folder.read("img")),
            _ => Subject::backed(self.name, folder.read("img"), base),
        }
    }
}

/// Sound images of the peer, most with internal snapshots.
///
/// # Panics
/// If the peer's tools are missing or fail.
pub fn images(seed: u64) -> Vec<Subject> {
    let make =
        |(i, r): (usize, &Recipe)| r.make(&Folder::new(), seed.wrapping_mul(31).wrapping_add(i as u64));
    RECIPES.iter().enumerate().map(make).collect()
}

/// The peer's check in classes: exit code, whether there are errors, and leaks; and its words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// 0 sound, 1 not checked, 2 corrupt, 3 leaks.
    pub code: i32,
    /// Errors.
    pub corruptions: u64,
    /// Leaks.
    pub leaks: u64,
    /// What it said.
    pub text: String,
}

/// `qemu-img check` of the image in a folder.
///
/// # Panics
/// If the peer's tool is missing or is killed.
pub fn check(folder: &Folder) -> Verdict {
    let out = folder.img("check -f qcow2 --output=json img").run();
    assert!((0..=3).contains(&out.code), "{}", out.describe());
    let report: Value = serde_json::from_str(&out.stdout).unwrap_or_default();
    let number = |name: &str| report[name].as_u64().unwrap_or(0);
    let (corruptions, leaks) = (number("corruptions"), number("leaks"));
    Verdict { code: out.code, corruptions, leaks, text: out.stderr }
}

/// Opens the image in a folder for writing, and closes it. What went wrong.
pub fn open_for_writing(folder: &Folder) -> Result<(), String> {
    let out = tools::qemu_io().dir(folder.path()).line("-f qcow2 -c").arg("read 0 512").arg("img").run();
    if out.code == 0 && !out.stdout.contains("failed") { Ok(()) } else { Err(out.describe()) }
}

/// Writes a subject's files where the peer finds them.
///
/// # Panics
/// If the folder cannot be written.
pub fn put(folder: &Folder, subject: &Subject) {
    subject.save(folder.path()).unwrap_or_else(|e| panic!("{}: {e}", folder.path().display()));
}

/// A subject's files as the peer left them.
///
/// # Panics
/// If they cannot be read.
pub fn take(folder: &Folder, subject: &Subject) -> Subject {
    let name = |p: &PathBuf| p.file_name().unwrap_or(p.as_os_str()).to_string_lossy().into_owned();
    subject.with(subject.files.keys().map(|p| (p.clone(), folder.read(&name(p)))).collect())
}

/// Runs of QEMU with lazy refcounts, as it wrote them.
///
/// # Panics
/// If the peer's tools are missing or fail.
pub fn lazy_run(seed: u64) -> (Subject, Recording) {
    let mut rng = Rng::new(seed ^ 0x1a2);
    let folder = Folder::new();
    let (cluster, size) = rng.pick(&[(512, 64 << 10), (1024, 96 << 10), (4096, 256 << 10), (65536, 1 << 20)]);
    let more = if cluster < 16384 && rng.chance(300) { ",refcount_bits=64" } else { "" };
    let options = format!("cluster_size={cluster},lazy_refcounts=on{more}");
    folder.img("create -q -f qcow2 -o").arg(options).arg("img").arg(size.to_string()).ok();
    if rng.chance(500) {
        folder.io("-f qcow2 img", &requests(&mut rng, size, cluster, 12, true));
        if rng.chance(700) {
            folder.img("snapshot -c s img").ok();
        }
    }
    let image = folder.read("img");
    std::fs::write(folder.path().join("log"), []).expect("the log");
    let commands = requests(&mut rng, size, cluster, 40, true);
    let node = "driver=qcow2,discard=unmap,file.driver=blklogwrites,file.discard=unmap,file.file.driver=file,\
                file.file.discard=unmap,file.file.filename=img,file.log.driver=file,file.log.filename=log,\
                file.log-sector-size=512";
    folder.io(&format!("--image-opts {node}"), &commands);
    let events = replay(&folder.read("log"));
    let subject = Subject::alone("peer-lazy", image.clone());
    let roles = Roles { image: "/img".into(), data: None, backing: None, sectors: 0 };
    let recording =
        Recording { unit: 512, roles, files: vec![("/img".into(), image)], events, start: 0, trace: seed };
    (subject, recording)
}

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// A log of dm-log-writes, as events. One request at a time, for that is how it was written.
fn replay(log: &[u8]) -> Vec<Event> {
    let le = |at: usize| log.get(at..at + 8).map_or(0, |b| b.try_into().map_or(0, u64::from_le_bytes));
    assert_eq!(le(0), 0x006a_7366_7773_6872, "a log of writes");
    let entries = le(16);
    let mut events = Vec::new();
    let (mut at, mut id) = (512, 0);
    for _ in 0..entries {
        let (sector, count, flags) = (le(at), le(at + 8), le(at + 16));
        at += 512;
        if flags & FLUSH != 0 {
            id += 1;
            events.push(Event::FlushSubmitted { disk: 0, id });
            events.push(Event::FlushCompleted { disk: 0, id, ok: true });
        }
        if count == 0 {
            continue;
        }
        let (start, len) = (sector * 512, count * 512);
        let change = match flags & DISCARD {
            0 => {
                let data = log[at..at + len as usize].to_vec();
                at += len as usize;
                Change::Data(start, data)
            }
            _ => Change::Zero(start..start + len, true),
        };
        id += 1;
        events.push(Event::Submitted { disk: 0, id, change });
        events.push(Event::Completed { disk: 0, id, kept: len, durable: flags & FUA != 0 });
    }
    events
}
