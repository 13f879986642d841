//! What is going on when a fault strikes: an image that is in use already, and a list of things to do with it.
//!
//! ```text
//!   seed ─► kind of image ─► created, written to, closed ─► [refcounts spoilt, dirty] ─► steps
//! ```
//!
//! Invariant: a scenario depends on its seed alone, and a run of it without a fault always does the same operations.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ringblock_crash::cases::{self, Case};
use ringblock_crash::{Roles, Tape, quietly};
use ringblock_engine::driver::{Flags, Preallocation};
use ringblock_engine::graph::Graph;
use ringblock_engine::host::sim::{Event, Faults, Image, Oracle, Rng, SECTOR, World, lock};
use ringblock_engine::mem::Buf;
use serde_json::{Value, json};

/// One thing to do.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// A read of sectors: first, how many.
    Read(usize, usize),
    /// A write, durable on return or not.
    Write(usize, usize, bool),
    /// A write of zeroes, that may unmap or not.
    Zeroes(usize, usize, bool),
    /// A discard.
    Discard(usize, usize),
    /// A flush.
    Flush,
    /// A compressed write of a cluster: its first sector.
    Compressed(usize),
    /// Another size in sectors.
    Resize(usize, Preallocation),
    /// The node's options change: bytes of the L2 cache.
    Reopen(u64),
    /// The node is closed and opened again.
    Again,
    /// Several clients at the same time, on all cores: from this seed.
    Burst(u64),
}

impl Step {
    /// What is going on meanwhile.
    pub(super) fn activity(&self) -> &'static str {
        match self {
            Step::Read(..) => "guest read",
            Step::Write(_, _, false) => "guest write",
            Step::Write(_, _, true) => "guest write, FUA",
            Step::Zeroes(_, _, false) => "write zeroes",
            Step::Zeroes(_, _, true) => "write zeroes, unmap",
            Step::Discard(..) => "discard",
            Step::Flush => "flush",
            Step::Compressed(_) => "compressed write",
            Step::Resize(_, Preallocation::Off) => "resize",
            Step::Resize(..) => "resize, preallocation",
            Step::Reopen(_) => "reopen",
            Step::Again => "close",
            Step::Burst(_) => "many clients",
        }
    }
}

/// An image and what is done with it.
#[derive(Clone)]
pub(super) struct Scenario {
    /// Where all choices come from.
    pub(super) seed: u64,
    /// The kind of image.
    pub(super) case: Case,
    /// Cores.
    pub(super) cores: usize,
    /// It is opened with the dirty bit and wrong refcounts.
    pub(super) dirty: bool,
    /// The node's options.
    pub(super) node: Value,
    /// Files at the beginning.
    pub(super) files: BTreeMap<PathBuf, Image>,
    /// Which is which.
    pub(super) roles: Roles,
    /// What guests did before, all of it durable.
    pub(super) events: Vec<Event>,
    /// What they may find.
    pub(super) oracle: Oracle,
    /// What is done.
    pub(super) steps: Vec<Step>,
}

impl std::fmt::Display for Scenario {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dirty = if self.dirty { ", dirty" } else { "" };
        write!(f, "{}{dirty}, {} cores, seed {}", self.case.name, self.cores, self.seed)
    }
}

/// Largest image of which every byte is looked at many times.
const LARGEST: u64 = 128 << 10;
/// Of an image whose refcount table is about to grow: sectors in use. One table counts 4,096 clusters of 512 bytes.
const NEARLY_FULL: u64 = 3_900;

impl Scenario {
    /// The scenario of a seed.
    ///
    /// # Errors
    /// The message of a panic while the image is made.
    pub(super) fn new(seed: u64) -> Result<Scenario, String> {
        let mut rng = Rng::new(seed);
        let all: Vec<Case> = cases::cases().into_iter().filter(|c| c.options.size <= LARGEST).collect();
        let mut case = all[rng.index(all.len())].clone();
        let dirty = case.options.version >= 3 && rng.chance(200);
        let growing = rng.chance(20);
        if growing {
            case = all.iter().find(|c| c.name == "512").unwrap_or(&case).clone();
            case.name = "512-growing";
            case.options.size = 4096 * SECTOR;
        }
        case.more = json!({
            "l2-cache-size": rng.pick(&[4096u64, 8192, 65536]),
            "refcount-cache-size": rng.pick(&[2048u64, 65536]),
        });
        let cores = rng.pick(&[1, 1, 2, 3]);
        let (mut setup, roles, tape) = case.start(seed, 1);
        setup.faults = Faults { stalled: 0, ..Faults::default() };
        let node = case.node(false);
        let (used, kept) = (node.clone(), tape.clone());
        let mut fill = rng.fork();
        let sectors = case.sectors();
        let files = quietly(move || {
            let mut world = World::new(setup);
            world
                .run(move || Box::pin(async move { prepare(used, tape, &mut fill, sectors, growing).await }));
            world.disks().live()
        })?;
        let events = kept.journal.take();
        let mut oracle = lock(&kept.oracle).clone();
        oracle.set_journal(None);
        let steps = steps(&case, growing, &mut rng);
        let mut s = Scenario { seed, case, cores, dirty, node, files, roles, events, oracle, steps };
        if dirty {
            s.spoil(&mut rng);
        }
        Ok(s)
    }

    /// Lowers and raises some counters, as an interrupted writer with lazy refcounts leaves them.
    fn spoil(&mut self, rng: &mut Rng) {
        let Some(image) = self.files.get_mut(&self.roles.image) else { return };
        let bytes = image.to_bytes();
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        let cluster = 1usize << (word(16) as u32);
        let block = word(word(48) as usize) as usize;
        image.write(79, &[bytes[79] | 1]);
        for _ in 0..rng.between(1, 6) {
            let at = block + rng.index(cluster.min(64));
            image.write(at as u64, &[if rng.chance(700) { 0 } else { 1 }]);
        }
    }
}

/// Fills part of a new image.
async fn prepare(node: Value, tape: Tape, rng: &mut Rng, sectors: usize, growing: bool) {
    let root = cases::attach(node, true).await.expect("a new image opens");
    let nearly = if growing { NEARLY_FULL.saturating_sub(rng.below(60)).div_ceil(100) } else { 0 };
    for i in 0..nearly + rng.between(4, 14) {
        let (first, count) = if i < nearly { (i as usize * 100, 100) } else { part(rng, sectors) };
        let range = first..first + count;
        let off = first as u64 * SECTOR;
        if i < nearly || rng.chance(800) {
            let mut buf = Buf::new(count * SECTOR as usize);
            let stamp = lock(&tape.oracle).write(first, &mut buf);
            root.write(off, buf, Flags::NONE).await.0.expect("a write");
            lock(&tape.oracle).wrote(range, stamp, true);
        } else {
            let stamp = lock(&tape.oracle).zero(range.clone());
            let flags = Flags { may_unmap: rng.chance(500), ..Flags::NONE };
            root.write_zeroes(off, count as u64 * SECTOR, flags).await.expect("zeroes");
            lock(&tape.oracle).wrote(range, stamp, true);
        }
    }
    let flush = lock(&tape.oracle).flush();
    root.flush().await.expect("a flush");
    lock(&tape.oracle).flushed(flush);
    Graph::current().shutdown().await.expect("it closes");
}

fn part(rng: &mut Rng, sectors: usize) -> (usize, usize) {
    let first = rng.index(sectors);
    let most = rng.pick(&[1, 3, 8, 24]).min(sectors - first);
    (first, 1 + rng.index(most))
}

/// Things to do, of every kind, in any order.
fn steps(case: &Case, growing: bool, rng: &mut Rng) -> Vec<Step> {
    let mut sectors = case.sectors();
    let per = (case.cluster() / SECTOR) as usize;
    let mut out = Vec::new();
    for _ in 0..rng.between(14, 26) {
        let (mut first, count) = part(rng, sectors);
        if growing {
            first = NEARLY_FULL as usize - 50 + rng.index(220);
        }
        out.push(match rng.below(100) {
            0..10 => Step::Read(first, count),
            10..36 => Step::Write(first, count, rng.chance(120)),
            36..44 => Step::Zeroes(first, count, rng.chance(500)),
            44..52 => Step::Discard(first, count),
            52..66 => Step::Flush,
            66..74 if case.compresses() => Step::Compressed(rng.index(sectors / per) * per),
            74..82 => {
                let (low, high) = (case.sectors() as u64 / 2, case.sectors() as u64 * 3 / 2);
                let to = rng.between(low, high) as usize;
                let grows = to > sectors && case.base == 0;
                sectors = to;
                let more = [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
                let chosen = if grows && rng.chance(400) { rng.pick(&more) } else { Preallocation::Off };
                Step::Resize(to, chosen)
            }
            82..87 => Step::Reopen(rng.pick(&[4096, 8192, 65536])),
            87..94 => Step::Again,
            _ => Step::Burst(rng.next()),
        });
    }
    out
}
