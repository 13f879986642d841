//! One run of a scenario: with a fault, until everything works again, and is shown to; or without, to see where faults could
//! strike.
//!
//! ```text
//!   open ─► steps ─ fault strikes ─► some more steps ─► heal ─► [close, open: after a failed flush or close]
//!        ─► read all, write, flush, read, close ─► checker; power cuts at every moment since the fault
//! ```

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use ringblock_checker::{Checker, Files};
use ringblock_crash::cases::attach;
use ringblock_crash::{Bad, Budget, Contract, Recording, Tape, enumerate, quietly};
use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_engine::core::Core;
use ringblock_engine::driver::{LocalFuture, Preallocation};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::Graph;
use ringblock_engine::host::sim::{Disks, Event, Faults, OpKind, Rng, SECTOR, Saboteur, Setup, World, lock};
use serde_json::json;

use super::client::{Client, Counts, Fault, Shared};
use super::region::{Region, Regions};
use super::scenario::{Scenario, Step};

/// Where a fault may strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Site {
    /// What is going on.
    pub(super) activity: &'static str,
    /// What the operation does.
    pub(super) kind: OpKind,
    /// What it touches.
    pub(super) region: Region,
}

impl std::fmt::Display for Site {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            OpKind::Read => "read",
            OpKind::Write => "write",
            OpKind::Fdatasync => "fdatasync",
            OpKind::Fallocate => "fallocate",
            OpKind::Ftruncate => "ftruncate",
        };
        write!(f, "{:<22} {kind:<9} {:<14}", self.activity, self.region)
    }
}

/// What a run showed.
#[derive(Clone, Debug, Default)]
pub(super) struct Shown {
    /// Where operations took place, in order; only of a run that was watched.
    pub(super) sites: Vec<Site>,
    /// How requests ended.
    pub(super) counts: Counts,
    /// The image had to be opened again.
    pub(super) reopened: bool,
    /// Operations harmed.
    pub(super) hits: u64,
    /// Crash states looked at.
    pub(super) states: u64,
    /// Clusters that leaked.
    pub(super) leaks: u32,
    /// The world's trace.
    pub(super) trace: u64,
}

/// What must not be, in words, and of which kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing went on any more, or for too long.
    Hang,
    /// The engine panicked.
    Panic,
    /// Wrong data, or a wrong image, now or after a power cut.
    Corruption,
    /// A flush reported success that it had no right to.
    FalseFlush,
    /// An error that nothing explains, or one too many.
    Error,
}

/// A failure.
pub(super) type Failure = (Kind, String);

fn classify(text: String) -> Failure {
    let kind = match () {
        () if text.contains("HANG") || text.contains("deadlock:") || text.contains("stuck:") => Kind::Hang,
        () if text.contains("CORRUPT") => Kind::Corruption,
        () if text.contains("FALSE FLUSH") => Kind::FalseFlush,
        () if text.contains("ERROR") => Kind::Error,
        () => Kind::Panic,
    };
    (kind, text)
}

/// Runs a scenario without a fault.
///
/// # Errors
/// What went wrong.
pub(super) fn watch(s: &Scenario) -> Result<Shown, Failure> {
    run(s, Saboteur::watching(), None, 0)
}

/// Runs a scenario with a saboteur; `seed` decides when the fault is healed.
///
/// # Errors
/// What went wrong.
pub(super) fn run(
    s: &Scenario,
    saboteur: Arc<Saboteur>,
    fault: Option<Fault>,
    seed: u64,
) -> Result<Shown, Failure> {
    let tape = Tape::new(s.roles.sectors);
    s.events.iter().for_each(|e| tape.journal.add(e.clone()));
    *lock(&tape.oracle) = s.oracle.clone();
    lock(&tape.oracle).set_journal(Some(tape.journal.clone()));
    let mut setup = Setup::new(s.seed, s.cores);
    setup.align = s.case.align;
    setup.files = s.files.clone();
    setup.faults = Faults { stalled: 0, ..Faults::default() };
    setup.journal = Some(tape.journal.clone());
    setup.saboteur = Some(saboteur.clone());
    let (journal, scenario) = (tape.journal.clone(), s.clone());
    let (ended, live, trace) = quietly(move || {
        let mut world = World::new(setup);
        let disks = world.disks();
        let program = || -> LocalFuture<'static, Ended> {
            Box::pin(Run::new(scenario, tape, saboteur, fault, disks, seed).all())
        };
        let ended = world.run(program);
        (ended, world.disks().live(), world.trace())
    })
    .map_err(classify)?;
    let mut shown = Shown { trace, ..ended.shown };
    let bytes = |path: &std::path::PathBuf| live.get(path).map(|i| i.to_bytes());
    let image = bytes(&s.roles.image).unwrap_or_default();
    let (data, backing) = (s.roles.data.as_ref().and_then(bytes), s.roles.backing.as_ref().and_then(bytes));
    let mut checker = Checker::default();
    let report = checker.check(&Files { image: &image, data: data.as_deref(), backing: backing.as_deref() });
    if !report.is_sound() || report.dirty || report.marked_corrupt {
        return Err((Kind::Corruption, format!("after closing: {}", report.explain().replace('\n', ";"))));
    }
    shown.leaks = report.leaks;
    let mut events = journal.take();
    events.truncate(ended.trusted.unwrap_or(usize::MAX));
    if let Some(from) = ended.from.filter(|f| *f < events.len()) {
        shown.states = cut(s, events, from, trace)?;
    }
    Ok(shown)
}

/// Power cuts from an event on.
fn cut(s: &Scenario, events: Vec<Event>, from: usize, trace: u64) -> Result<u64, Failure> {
    let files = s.files.iter().map(|(path, image)| (path.clone(), image.to_bytes())).collect();
    let recording = Recording { unit: s.case.unit, roles: s.roles.clone(), files, events, start: 0, trace };
    let budget = Budget {
        bits: 3,
        random: 6,
        pairs: 4,
        moments: 20,
        states: 250,
        first: true,
        from,
        ..Budget::quick(trace)
    };
    let tally = enumerate(&recording, &budget, &mut Contract::default());
    match tally.failures.into_iter().next() {
        None => Ok(tally.distinct),
        Some((spot, bad)) => {
            let landed = ringblock_crash::spot::describe(&recording, &spot).replace('\n', ";");
            let kind = if matches!(bad, Bad::Lost(_)) { Kind::FalseFlush } else { Kind::Corruption };
            Err((
                kind,
                format!(
                    "CORRUPT after a power cut at event {} of {}: {bad}; {landed}",
                    spot.at,
                    recording.events.len()
                ),
            ))
        }
    }
}

/// How the program ended.
struct Ended {
    shown: Shown,
    /// Events up to which the crash contract is in force: a failed flush that was closed over ends it (D4).
    trusted: Option<usize>,
    /// The event before which the fault struck.
    from: Option<usize>,
}

/// A run on its way.
struct Run {
    s: Scenario,
    shared: Rc<Shared>,
    disks: Arc<Disks>,
    rng: Rng,
    client: Option<Client>,
    /// Sectors of the disk.
    sectors: usize,
    /// The size is to be settled by the next flush.
    resized: Cell<bool>,
    watching: bool,
    sites: Vec<Site>,
    regions: RefCell<Regions>,
    trusted: Option<usize>,
    from: Option<usize>,
    /// Steps until the fault is healed.
    patience: u64,
    reopened: bool,
}

impl Run {
    fn new(
        s: Scenario,
        tape: Tape,
        saboteur: Arc<Saboteur>,
        fault: Option<Fault>,
        disks: Arc<Disks>,
        seed: u64,
    ) -> Run {
        let shared = Rc::new(Shared {
            tape,
            saboteur,
            fault,
            counts: Cell::default(),
            poisoned: Cell::new(false),
            shaken: Cell::new(false),
            said: RefCell::default(),
        });
        let mut rng = Rng::new(seed);
        let patience = rng.below(4);
        let sectors = s.case.sectors();
        Run {
            s,
            shared,
            disks,
            rng,
            client: None,
            sectors,
            resized: Cell::new(false),
            watching: fault.is_none(),
            sites: Vec::new(),
            regions: RefCell::default(),
            trusted: None,
            from: None,
            patience,
            reopened: false,
        }
    }

    async fn all(mut self) -> Ended {
        self.look();
        self.begin();
        self.open().await;
        self.end("open");
        for i in 0..self.s.steps.len() {
            let step = self.s.steps[i].clone();
            self.begin();
            self.step(&step).await;
            self.end(step.activity());
            if self.shared.saboteur.hits() > 0 {
                if self.patience == 0 {
                    self.shared.saboteur.heal();
                }
                self.patience = self.patience.saturating_sub(1);
            }
        }
        self.begin();
        self.close().await;
        self.end("close");
        self.shared.saboteur.heal();
        self.prove().await;
        let counts = self.shared.counts.get();
        let hits = self.shared.saboteur.hits();
        let shown = Shown { sites: self.sites, counts, reopened: self.reopened, hits, ..Shown::default() };
        Ended { shown, trusted: self.trusted, from: self.from }
    }

    /// Takes note of where the image's structures are.
    fn look(&self) {
        if self.watching
            && let Ok(disk) = self.disks.open(&self.s.roles.image)
        {
            self.regions.borrow_mut().add(&disk.live().to_bytes());
        }
    }

    /// Something begins.
    fn begin(&mut self) {
        if self.shared.saboteur.hits() == 0 {
            self.from = Some(self.shared.tape.journal.len());
        }
    }

    /// What began has ended: what the operations meanwhile touched.
    fn end(&mut self, activity: &'static str) {
        if !self.watching {
            return;
        }
        self.look();
        let names: Vec<_> = self.s.files.keys().cloned().collect();
        for op in self.shared.saboteur.take_log() {
            let name = names.get(op.disk as usize);
            let whole = matches!(op.kind, OpKind::Fdatasync | OpKind::Ftruncate);
            let region = match name {
                n if n == self.s.roles.backing.as_ref() => Region::Backing,
                n if n == self.s.roles.data.as_ref() => Region::DataFile,
                _ if whole => Region::Whole,
                _ => self.regions.borrow().of(op.off),
            };
            self.sites.push(Site { activity, kind: op.kind, region });
        }
        *self.regions.borrow_mut() = Regions::default();
        self.look();
    }

    fn outcome(&self, what: &str, asked: super::client::Asked, result: Result<(), Error>) -> bool {
        if let Err(e) = &result {
            assert!(!e.message.is_empty(), "ERROR: {what}: no message");
        }
        self.shared.answer(what, asked, result.map_err(|e| e.errno))
    }

    /// Opens the image. After a failure there is no node, and its name is free.
    async fn open(&mut self) -> bool {
        if self.shared.shaken.get() {
            self.shared.saboteur.heal();
        }
        let asked = self.shared.ask();
        let opened = attach(self.s.node.clone(), true).await;
        let root = opened.as_ref().ok().copied();
        if !self.outcome("open", asked, opened.map(drop)) {
            let info = Graph::current().info();
            assert!(info.nodes.is_empty() && info.roots.is_empty(), "ERROR: a failed open leaves nodes");
            self.shared.poisoned.set(false);
            return false;
        }
        let Some(root) = root else { return false };
        let size = root.size().unwrap_or(0) / SECTOR;
        self.client = Some(Client { root, shared: self.shared.clone() });
        self.adopt(size as usize);
        if self.shared.shaken.get() {
            self.settle().await;
        }
        true
    }

    /// After a failed close what was not flushed may be gone: everything is looked at, and written anew.
    async fn settle(&mut self) {
        let Some(client) = self.client.clone() else { return };
        client.read(0..self.sectors).await;
        client.write(0..self.sectors, false).await;
        self.shared.shaken.set(false);
        self.reopened = true;
    }

    /// The disk has this size, as its node says.
    fn adopt(&mut self, size: usize) {
        if size < self.sectors {
            let mut oracle = lock(&self.shared.tape.oracle);
            let stamp = oracle.zero(size..self.sectors);
            oracle.wrote(size..self.sectors, stamp, true);
        }
        lock(&self.shared.tape.oracle).set_len(size);
        self.sectors = size;
    }

    /// Closes the image. Whatever the answer, everything is let go.
    async fn close(&mut self) -> bool {
        let Some(client) = self.client.take() else { return true };
        let graph = Graph::current();
        let before = self.shared.tape.journal.len();
        let was_poisoned = self.shared.poisoned.get();
        let asked = self.shared.ask();
        let detached = graph.detach(client.root).await;
        let deleted = graph.del("n").await;
        let ok = self.outcome("close", asked, detached.and(deleted));
        assert!(!(ok && was_poisoned), "FALSE FLUSH: closed without an error after a failed flush");
        let info = graph.info();
        assert!(info.nodes.is_empty() && info.roots.is_empty(), "ERROR: a failed close keeps nodes");
        if !ok {
            self.trusted.get_or_insert(before);
            self.shared.shaken.set(true);
        }
        self.shared.poisoned.set(false);
        ok
    }

    async fn step(&mut self, step: &Step) {
        let Some(client) = self.client.clone() else {
            self.open().await;
            return;
        };
        let within = |first: usize, count: usize| {
            let first = first.min(self.sectors - 1);
            first..(first + count).min(self.sectors)
        };
        match *step {
            Step::Read(first, count) => client.read(within(first, count)).await,
            Step::Write(first, count, fua) => client.write(within(first, count), fua).await,
            Step::Zeroes(first, count, unmap) => client.zeroes(within(first, count), unmap).await,
            Step::Discard(first, count) => client.discard(within(first, count)).await,
            Step::Flush => self.flush(&client).await,
            Step::Compressed(first) => {
                let count = (self.s.case.cluster() / SECTOR) as usize;
                if first + count <= self.sectors {
                    client.compressed(first..first + count).await;
                }
            }
            Step::Resize(to, prealloc) => self.resize(to, prealloc).await,
            Step::Reopen(cache) => self.reopen(cache).await,
            Step::Again => {
                self.close().await;
                self.open().await;
            }
            Step::Burst(seed) => self.burst(&client, seed).await,
        }
    }

    /// A flush; it settles the size too.
    async fn flush(&self, client: &Client) {
        let resized = self.resized.get();
        if client.flush().await && resized {
            self.resized.set(false);
            self.shared.tape.resize(self.sectors, true);
        }
    }

    async fn resize(&mut self, to: usize, prealloc: Preallocation) {
        let Some(client) = self.client.clone() else { return };
        let (tape, from) = (self.shared.tape.clone(), self.sectors);
        tape.resize(to, false);
        self.resized.set(true);
        let cut_off = (to < from).then(|| lock(&tape.oracle).zero(to..from));
        let asked = self.shared.ask();
        let prealloc = if to > from { prealloc } else { Preallocation::Off };
        let done = Graph::current().resize("n", to as u64 * SECTOR, prealloc).await;
        // version 2 cannot hide what a longer backing file has behind the old end
        let refused =
            done.as_ref().is_err_and(|e| e.errno == Errno::ENOTSUP) && self.s.case.options.version < 3;
        let ok = !refused && self.outcome("resize", asked, done);
        if let Some(stamp) = cut_off {
            lock(&tape.oracle).wrote(to..from, stamp, ok);
        }
        let now = (client.root.size().unwrap_or(0) / SECTOR) as usize;
        assert!(now == to || (!ok && now == from), "ERROR: resized from {from} to {to}: {now}");
        self.adopt(now);
        if ok {
            self.resized.set(false);
            tape.resize(to, true);
        }
    }

    async fn reopen(&mut self, cache: u64) {
        let mut node = self.s.node.clone();
        node["l2-cache-size"] = json!(cache);
        let options: BlockdevOptions = from_json(&node).expect("options");
        let graph = Graph::current();
        let list = open::reopen(vec![options], &graph.info()).expect("a list");
        let asked = self.shared.ask();
        let done = graph.reopen(list).await;
        self.outcome("reopen", asked, done);
    }

    /// Clients with sectors of their own, on all cores.
    async fn burst(&mut self, client: &Client, seed: u64) {
        let mut rng = Rng::new(seed);
        let n = rng.between(2, 4) as usize;
        let stripe = (self.sectors / n).max(1);
        let mut joins = Vec::new();
        for i in 0..n {
            let (client, own, rng) =
                (client.clone(), i * stripe..((i + 1) * stripe).min(self.sectors), rng.fork());
            if !own.is_empty() {
                joins.push(Core::current().spawn_join(async move { client.some(own, 5, rng).await }));
            }
        }
        for j in joins {
            j.await.expect("a client ends");
        }
    }

    /// The fault is gone: everything works, after opening again where a flush or a close has failed.
    async fn prove(&mut self) {
        for round in 0..2 {
            if self.client.is_none() {
                assert!(self.open().await, "ERROR: it does not open although nothing is wrong any more");
            }
            let Some(client) = self.client.clone() else { return };
            client.read(0..self.sectors).await;
            let (first, count) = (self.rng.index(self.sectors), 1 + self.rng.index(12));
            let range = first..(first + count).min(self.sectors);
            client.write(range.clone(), false).await;
            client.zeroes(0..self.sectors.min(5), round == 0).await;
            self.flush(&client).await;
            client.read(0..self.sectors).await;
            let failed = self.shared.counts.get().failed;
            let closed = self.close().await;
            assert!(closed && failed == self.shared.counts.get().failed, "ERROR: it does not close");
        }
    }
}
