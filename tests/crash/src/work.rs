//! What is done to an image while it is recorded: guests at random, management operations, short sequences.
//!
//! ```text
//!   Plan { case, work, seed } ─► Recording
//! ```
//!
//! Invariant: a plan is a recording, for ever: all choices come from its seed.

use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_engine::core::Core;
use ringblock_engine::driver::{Flags, LocalFuture, Preallocation};
use ringblock_engine::error::Errno;
use ringblock_engine::graph::Graph;
use ringblock_engine::host::sim::{Faults, Guest, Rng, SECTOR, lock};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use ringblock_engine::timer::Sleep;
use serde_json::json;

use crate::cases::{Case, Past, attach};
use crate::record::{Recording, Tape, record};
use crate::short;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Guests on one to three cores, several requests at a time.
    Guests,
    /// The same, while transfers and flushes fail.
    Faults,
    /// The same, with many stalls, reads and freed clusters.
    Churn,
    /// Compressed writes, in turn with discards and others.
    Packed,
    /// The image is made first.
    Create,
    /// Resizes, reopens, closing and opening, compressed writes, with guests in between and meanwhile.
    Operations,
    /// The sequence of this number, see [`crate::short`].
    Short(u32),
}

/// A recording to be made.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The kind of image.
    pub case: Case,
    /// What is done to it.
    pub work: Work,
    /// Where all choices come from.
    pub seed: u64,
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "--case {} --work {} --seed {}", self.case.name, self.work, self.seed)
    }
}

impl std::fmt::Display for Work {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Work::Guests => f.write_str("guests"),
            Work::Faults => f.write_str("faults"),
            Work::Churn => f.write_str("churn"),
            Work::Packed => f.write_str("packed"),
            Work::Create => f.write_str("create"),
            Work::Operations => f.write_str("operations"),
            Work::Short(n) => write!(f, "short{n}"),
        }
    }
}

impl std::str::FromStr for Work {
    type Err = String;

    fn from_str(text: &str) -> Result<Work, String> {
        Ok(match text {
            "guests" => Work::Guests,
            "faults" => Work::Faults,
            "churn" => Work::Churn,
            "packed" => Work::Packed,
            "create" => Work::Create,
            "operations" => Work::Operations,
            other => {
                let number = other.strip_prefix("short").and_then(|n| n.parse().ok());
                Work::Short(number.ok_or_else(|| format!("no work '{other}'"))?)
            }
        })
    }
}

impl Plan {
    /// Makes the recording.
    ///
    /// # Errors
    /// The message of a panic in the engine or of a guest that read what it must not.
    pub fn record(&self) -> Result<Recording, String> {
        let mut rng = Rng::new(self.seed);
        let cores = match self.work {
            Work::Short(_) => 1,
            _ => rng.pick(&[1, 2, 2, 3]),
        };
        let past = if self.work == Work::Create { Past::New } else { self.case.past };
        let case = self.case.clone().past(past);
        let (mut setup, roles, tape) = case.start(self.seed, cores);
        if self.work == Work::Create {
            setup.files.retain(|path, _| Some(path) == roles.backing.as_ref());
        }
        let harmless = match rng.below(3) {
            0 => Faults::benign(),
            1 => Faults { stalled: 20, stall_ns: 2_000_000, ..Faults::default() },
            _ => Faults::default(),
        };
        setup.faults = match self.work {
            Work::Faults => faults(&mut rng, harmless),
            Work::Churn => Faults { stalled: rng.pick(&[20, 150]), stall_ns: 15_000_000, ..harmless },
            _ => harmless,
        };
        let work = self.work;
        let program = move |tape: Tape| -> LocalFuture<'static, ()> {
            Box::pin(async move {
                match work {
                    Work::Guests | Work::Churn => guests(case, tape, rng, work).await,
                    Work::Packed => packed(case, tape, rng).await,
                    Work::Faults => failing(case, tape, rng).await,
                    Work::Create => {
                        create(&case, &tape).await;
                        guests(case, tape, rng, Work::Guests).await;
                    }
                    Work::Operations => operations(case, tape, rng).await,
                    Work::Short(n) => short::run(case, tape, n).await,
                }
            })
        };
        record(setup, self.case.unit, roles, tape, program).map(|r| r.0)
    }
}

/// Errors now and then; flushes seldom fail, as nothing goes on after that.
fn faults(rng: &mut Rng, harmless: Faults) -> Faults {
    let some = |rng: &mut Rng| rng.pick(&[0, 10, 40, 80]);
    Faults {
        write_error: some(rng),
        no_space: some(rng),
        read_error: some(rng) / 2,
        flush_error: rng.pick(&[0, 0, 5, 30]),
        ..harmless
    }
}

/// Makes the image.
async fn create(case: &Case, tape: &Tape) {
    tape.began("create");
    let made = case.create().await;
    tape.ended("create", made.is_ok());
    made.expect("the image is made");
}

/// Guests, and a clean end.
async fn guests(case: Case, tape: Tape, mut rng: Rng, work: Work) {
    tape.began("open");
    let root = attach(case.node(false), true).await;
    tape.ended("open", root.is_ok());
    let root = root.expect("the image opens");
    let sectors = case.sectors();
    let guests = rng.between(1, 6) as usize;
    let all = if work == Work::Churn { rng.between(60, 200) } else { rng.between(16, 60) };
    let requests = match rng.chance(100) {
        true => 1,
        false => all as u32 / guests as u32 + 2,
    };
    burst(&case, &tape, root, &mut rng, guests, requests, sectors, work).await;
    // only formats promise that closing makes everything durable
    match rng.chance(500) || case.flat {
        true => finish(root, &tape).await,
        false => close(&tape).await,
    }
}

/// Clusters packed, unpacked, freed and written again, one after another.
async fn packed(case: Case, tape: Tape, mut rng: Rng) {
    let root = attach(case.node(false), true).await.expect("the image opens");
    let sectors = case.sectors();
    let per = (case.cluster() / SECTOR) as usize;
    lock(&tape.oracle).set_wild(0..sectors);
    let place = |rng: &mut Rng| (rng.index(sectors / per) * per) as u64 * SECTOR;
    // clusters that may be packed: they are discarded together, so that what they were packed into becomes free, and then
    // what is free is written to
    let mut packed: Vec<usize> = Vec::new();
    for _ in 0..rng.between(10, 40) {
        match rng.below(8) {
            0..3 => packed.extend(compressed(&case, &tape, root, &mut rng, sectors, Work::Packed).await),
            3 | 4 => flush(root, &tape).await,
            5 | 6 => short::write(&tape, root, place(&mut rng), per, Flags::NONE).await,
            _ => {
                for at in std::mem::take(&mut packed) {
                    short::discard(&tape, root, at as u64 * SECTOR, per).await;
                }
                flush(root, &tape).await;
                Sleep::ns(2_000_000).await;
                for _ in 0..rng.below(10) {
                    short::write(&tape, root, place(&mut rng), per, Flags::NONE).await;
                }
            }
        }
    }
    finish(root, &tape).await;
}

/// Guests whose requests may fail, and an end that may fail too.
async fn failing(case: Case, tape: Tape, mut rng: Rng) {
    let Ok(root) = attach(case.node(false), true).await else { return };
    let guests = rng.between(1, 4) as usize;
    burst(&case, &tape, root, &mut rng, guests, 20, case.sectors(), Work::Faults).await;
    for _ in 0..3 {
        let flush = lock(&tape.oracle).flush();
        if root.flush().await.is_ok() {
            lock(&tape.oracle).flushed(flush);
        }
    }
    tape.began("close");
    let closed = Graph::current().shutdown().await;
    tape.ended("close", closed.is_ok());
}

/// A last flush, and everything closed.
pub(crate) async fn finish(root: Root, tape: &Tape) {
    flush(root, tape).await;
    close(tape).await;
}

/// Everything closed, which makes everything durable.
async fn close(tape: &Tape) {
    tape.began("close");
    let flush = lock(&tape.oracle).flush();
    let closed = Graph::current().shutdown().await;
    if closed.is_ok() {
        lock(&tape.oracle).flushed(flush);
    }
    tape.ended("close", closed.is_ok());
    closed.expect("it closes");
}

/// A flush that the guest is told of.
pub(crate) async fn flush(root: Root, tape: &Tape) {
    let flush = lock(&tape.oracle).flush();
    root.flush().await.expect("a flush");
    lock(&tape.oracle).flushed(flush);
}

/// Guests that share the first `sectors` sectors. A third of them is for everybody, but in [`Work::Operations`] it is
/// only for compressed writes, because what everybody writes cannot be checked by reads later.
#[allow(clippy::too_many_arguments)]
async fn burst(
    case: &Case,
    tape: &Tape,
    root: Root,
    rng: &mut Rng,
    guests: usize,
    requests: u32,
    sectors: usize,
    work: Work,
) {
    if work != Work::Operations {
        lock(&tape.oracle).set_wild(sectors * 2 / 3..sectors);
    }
    let stripe = (sectors * 2 / 3 / guests).max(1);
    let cluster = (case.cluster() / SECTOR).max(1);
    let longest =
        rng.pick(&[2, cluster, cluster * 3, stripe as u64 / 2]).clamp(1, (sectors as u64 / 6 + 1).min(100));
    let churn = work == Work::Churn;
    let flushes = if churn { 30 } else { rng.pick(&[2, 4, 8, 16]) };
    let core = Core::current();
    let mut joins = Vec::new();
    for i in 0..guests {
        let mut guest = Guest::new(i * stripe..(i + 1) * stripe, requests);
        (guest.longest, guest.reads, guest.flushes) = (longest, if churn { 60 } else { 5 }, flushes);
        guest.discards = if churn { 60 } else { guest.discards };
        guest.faults = work == Work::Faults;
        guest.block = (case.align as usize / SECTOR as usize).max(1);
        let (oracle, seed) = (tape.oracle.clone(), rng.next());
        let call = move || -> LocalFuture<'static, ()> {
            Box::pin(async move { guest.run(root, &oracle, Rng::new(seed)).await })
        };
        joins.push(
            core.spawn_join(async move { Core::current().call(i % Core::current().count(), call).await }),
        );
    }
    if rng.chance(500) && case.compresses() {
        for _ in 0..rng.between(1, 3) {
            compressed(case, tape, root, rng, sectors, work).await;
        }
    }
    for j in joins {
        j.await.expect("ended").expect("the core runs");
    }
}

/// A whole cluster, compressed, in the part that is for everybody.
async fn compressed(
    case: &Case,
    tape: &Tape,
    root: Root,
    rng: &mut Rng,
    sectors: usize,
    work: Work,
) -> Option<usize> {
    let per = (case.cluster() / SECTOR) as usize;
    let first = if work == Work::Packed { 0 } else { (sectors * 2 / 3).div_ceil(per) };
    let last = sectors / per;
    if first >= last {
        return None;
    }
    let at = (first + rng.index(last - first)) * per;
    let mut buf = Buf::new(per * SECTOR as usize);
    let stamp = lock(&tape.oracle).write(at, &mut buf);
    let flags = Flags { compressed: true, ..Flags::NONE };
    let (done, _) = root.write(at as u64 * SECTOR, buf, flags).await;
    lock(&tape.oracle).wrote(at..at + per, stamp, done.is_ok());
    // a cluster that holds plain data already cannot be written compressed
    let known =
        matches!(done, Ok(()) | Err(Errno::EIO)) || work == Work::Faults && done == Err(Errno::ENOSPC);
    assert!(known, "a compressed write: {done:?}");
    Some(at)
}

/// Operations, one after another, with guests before and meanwhile.
async fn operations(case: Case, tape: Tape, mut rng: Rng) {
    let mut root = attach(case.node(false), true).await.expect("the image opens");
    let mut sectors = case.sectors();
    for _ in 0..rng.between(2, 5) {
        let guests = rng.between(1, 3) as usize;
        let requests = rng.between(2, 8) as u32;
        if rng.chance(700) {
            burst(&case, &tape, root, &mut rng, guests, requests, sectors, Work::Operations).await;
        }
        match rng.below(6) {
            0 | 1 => {
                let to = rng.between(sectors as u64 + 1, case.sectors() as u64 * 2 - 1) as usize;
                let prealloc = rng.pick(&[
                    Preallocation::Off,
                    Preallocation::Off,
                    Preallocation::Metadata,
                    Preallocation::Falloc,
                    Preallocation::Full,
                ]);
                // guests go on below
                let meanwhile = rng.chance(500);
                let other = tape.clone();
                let (c, mut r) = (case.clone(), rng.fork());
                let join = Core::current().spawn_join(async move {
                    if meanwhile {
                        burst(&c, &other, root, &mut r, 2, 4, sectors, Work::Operations).await;
                    }
                });
                if case.base > 0 && prealloc != Preallocation::Off {
                    resize(&tape, sectors, to, Preallocation::Off).await;
                } else {
                    resize(&tape, sectors, to, prealloc).await;
                }
                join.await.expect("ended");
                sectors = to;
            }
            2 => {
                let to = rng.between(sectors as u64 / 2, sectors as u64 - 1) as usize;
                resize(&tape, sectors, to, Preallocation::Off).await;
                sectors = to;
            }
            3 | 4 => {
                tape.began("reopen");
                let mut node = case.node(false);
                node["l2-cache-size"] = json!(rng.pick(&[4096u64, 8192, 65536]));
                let options: BlockdevOptions = from_json(&node).expect("options");
                let graph = Graph::current();
                let list = open::reopen(vec![options], &graph.info()).expect("a reopen");
                let done = graph.reopen(list).await;
                tape.ended("reopen", done.is_ok());
                done.expect("a reopen");
            }
            _ => {
                tape.began("close and open");
                let graph = Graph::current();
                graph.detach(root).await.expect("detach");
                graph.del("n").await.expect("del");
                let again = attach(case.node(false), true).await;
                tape.ended("close and open", again.is_ok());
                root = again.expect("it opens again");
            }
        }
    }
    burst(&case, &tape, root, &mut rng, 2, 4, sectors, Work::Operations).await;
    finish(root, &tape).await;
}

/// Changes the size, in sectors.
async fn resize(tape: &Tape, from: usize, to: usize, prealloc: Preallocation) {
    let name = format!("resize {from} to {to}, {prealloc:?}");
    tape.began(&name);
    tape.resize(to, false);
    let cut_off = (to < from).then(|| lock(&tape.oracle).zero(to..from));
    let done = Graph::current().resize("n", to as u64 * SECTOR, prealloc).await;
    if let Some(stamp) = cut_off {
        lock(&tape.oracle).wrote(to..from, stamp, done.is_ok());
    }
    lock(&tape.oracle).set_len(to);
    if done.is_ok() {
        tape.resize(to, true);
    }
    tape.ended(&name, done.is_ok());
    done.unwrap_or_else(|e| panic!("{name}: {e}"));
}

/// The `i`th plan of a run with this seed.
pub fn plan(cases: &[Case], i: u64, seed: u64) -> Plan {
    let mut rng = Rng::new(seed.wrapping_mul(0x9e37_79b9).wrapping_add(i));
    let total: u32 = cases.iter().map(|c| c.weight).sum();
    let mut at = rng.below(u64::from(total.max(1))) as u32;
    let chosen = cases.iter().find(|c| {
        let hit = at < c.weight;
        at = at.wrapping_sub(c.weight);
        hit
    });
    let case = chosen.unwrap_or(&cases[0]).clone();
    let work = match i % 8 {
        0 | 2 | 4 => Work::Guests,
        1 | 5 => Work::Operations,
        6 if i % 16 == 6 => Work::Faults,
        6 if i % 32 == 14 => Work::Create,
        6 if i % 64 == 30 && case.compresses() => Work::Packed,
        6 => Work::Churn,
        // the sequences one after another, from where the seed says
        _ => Work::Short(((i / 4 + seed.wrapping_mul(997)) % u64::from(short::COUNT)) as u32),
    };
    let case = match work {
        Work::Short(_) => short::case(),
        _ => case,
    };
    Plan { case, work, seed: rng.next() & 0xffff_ffff }
}
