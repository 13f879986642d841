//! Recording a run: a program in a simulated world, with everything it does to its files and tells its guests.
//!
//! ```text
//!   record(setup, roles, program) ─► World ─► Recording { files at the beginning, events }
//!                                                └─► enumerate: no engine needed from here on
//! ```
//!
//! Invariant: the same seed, files and program give the same recording.

use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use ringblock_engine::driver::LocalFuture;
use ringblock_engine::host::sim::{Event, Faults, Image, Journal, Oracle, Setup, World};
use ringblock_engine::timer::Sleep;

/// Which file is what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roles {
    /// The qcow2 file.
    pub image: PathBuf,
    /// The external data file.
    pub data: Option<PathBuf>,
    /// The backing file, raw.
    pub backing: Option<PathBuf>,
    /// Sectors of the guest's disk at the beginning.
    pub sectors: usize,
}

/// A run that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recording {
    /// Bytes that land together: 512, or 4096.
    pub unit: usize,
    /// Which file is what.
    pub roles: Roles,
    /// The files at the beginning, all durable. A file's place is its number in the events.
    pub files: Vec<(PathBuf, Vec<u8>)>,
    /// What happened.
    pub events: Vec<Event>,
    /// Events before the run: what guests know of the files as they are at the beginning.
    pub start: usize,
    /// The world's trace.
    pub trace: u64,
}

/// What a program that is recorded has in its hands.
#[derive(Clone)]
pub struct Tape {
    /// For events of its own: operations, changes of size.
    pub journal: Arc<Journal>,
    /// For guests: what they ask for goes into the journal.
    pub oracle: Arc<Mutex<Oracle>>,
}

impl Tape {
    /// A tape for a disk of this many sectors.
    pub fn new(sectors: usize) -> Tape {
        let journal = Journal::new();
        let mut oracle = Oracle::new(sectors);
        oracle.set_journal(Some(journal.clone()));
        Tape { journal, oracle: Arc::new(Mutex::new(oracle)) }
    }

    /// An operation begins.
    pub fn began(&self, name: &str) {
        self.journal.add(Event::Operation { name: name.to_owned(), ok: None });
    }

    /// It ended.
    pub fn ended(&self, name: &str, ok: bool) {
        self.journal.add(Event::Operation { name: name.to_owned(), ok: Some(ok) });
    }

    /// The guest's disk is to have this many sectors, or has them for certain.
    pub fn resize(&self, sectors: usize, settled: bool) {
        self.journal.add(Event::Resize { sectors, settled });
    }
}

/// Runs a program on core 0 of a new world and records it. `setup` holds the files as they are at the beginning; the
/// faults of `setup` begin at once. `unit` is the size of what is never torn.
///
/// # Errors
/// The message of a panic: a deadlock, an assertion of the engine, or one of the program.
pub fn record<T: 'static>(
    mut setup: Setup,
    unit: usize,
    roles: Roles,
    tape: Tape,
    program: impl FnOnce(Tape) -> LocalFuture<'static, T>,
) -> Result<(Recording, T), String> {
    let files: Vec<(PathBuf, Vec<u8>)> =
        setup.files.iter().map(|(path, image)| (path.clone(), image.to_bytes())).collect();
    setup.journal = Some(tape.journal.clone());
    let journal = tape.journal.clone();
    let start = journal.len();
    let (trace, value) = quietly(move || {
        let mut world = World::new(setup);
        let value = world.run(move || watched(program(tape)));
        (world.trace(), value)
    })?;
    let events = journal.take();
    Ok((Recording { unit, roles, files, events, start, trace }, value))
}

/// Virtual time after which a run is called endless, in ns.
const ENDLESS: u64 = 300_000_000_000;

/// A program that panics if it does not end.
fn watched<T: 'static>(mut program: LocalFuture<'static, T>) -> LocalFuture<'static, T> {
    let mut end = Box::pin(Sleep::ns(ENDLESS));
    Box::pin(poll_fn(move |cx| {
        assert!(end.as_mut().poll(cx).is_pending(), "the run does not end");
        program.as_mut().poll(cx)
    }))
}

/// A world for files that a crash left: one core, nothing goes wrong, as fast as it goes.
pub fn calm(seed: u64, files: BTreeMap<PathBuf, Image>, align: u32) -> Setup {
    let mut setup = Setup::new(seed, 1);
    setup.faults = Faults { latency_ns: (1_000, 2_000), stalled: 0, ..Faults::default() };
    setup.files = files;
    setup.align = align;
    setup
}

thread_local! {
    static SAID: std::cell::RefCell<Option<String>> = const { std::cell::RefCell::new(None) };
    static QUIET: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// Runs something that may panic; the message instead of the noise.
///
/// # Errors
/// The message and place of a panic.
pub fn quietly<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: std::sync::Once = std::sync::Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if QUIET.get() == 0 {
                usual(info);
            } else {
                SAID.with(|s| {
                    s.borrow_mut().get_or_insert_with(|| info.to_string().replace('\n', " ")).len()
                });
            }
        }));
    });
    SAID.with(|s| s.borrow_mut().take());
    QUIET.set(QUIET.get() + 1);
    let result = catch_unwind(AssertUnwindSafe(run));
    QUIET.set(QUIET.get() - 1);
    result.map_err(|_| SAID.with(|s| s.borrow_mut().take()).unwrap_or_else(|| "a panic".to_owned()))
}
