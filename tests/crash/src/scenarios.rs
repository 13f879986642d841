//! Where an ordering mutant shows itself: kinds of images, what is done to them, and who judges.
//!
//! ```text
//!   Scenario { cases × works, judge } ─► plan 0, 1, 2, … ─► record, enumerate ─► the first failure
//! ```
//!
//! Without a mutant every scenario is clean; the crash contract alone judges most of them.

use std::time::Instant;

use ringblock_checker::{Checker, Files};
use ringblock_engine::host::sim::Rng;

use crate::cases::named;
use crate::enumerate::Budget;
use crate::hunt::{Failure, examine};
use crate::judge::{Bad, Contract, Good, Judge, State};
use crate::work::{Plan, Work};

/// One of them.
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    cases: &'static [&'static str],
    works: &'static [Work],
    judge: fn() -> Box<dyn Judge>,
    /// States of a run, at most: where the run itself goes wrong, many runs are better than many states.
    most: u64,
}

const fn scenario(
    name: &'static str,
    cases: &'static [&'static str],
    works: &'static [Work],
    judge: fn() -> Box<dyn Judge>,
    most: u64,
) -> Scenario {
    Scenario { name, cases, works, judge, most }
}

const BOTH: &[Work] = &[Work::Guests, Work::Operations];
const GUESTS: &[Work] = &[Work::Guests];
const CHURN: &[Work] = &[Work::Churn];
const FAULTS: &[Work] = &[Work::Faults];

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    scenario("plain", &["512", "1k", "4k"], BOTH, contract, 4000),
    scenario("backed", &["backed", "backed-4k", "subclusters-backed"], GUESTS, contract, 4000),
    scenario("data file", &["data-file", "data-file-raw"], GUESTS, contract, 4000),
    scenario("operations", &["512", "2k", "backed-4k"], &[Work::Operations], contract, 4000),
    scenario("packed", &["holes-2k"], &[Work::Packed], contract, 1000),
    scenario("churn", &["holes-2k"], CHURN, contract, 60),
    scenario("in place", &["holes"], CHURN, contract, 4),
    scenario("stalls", &["512", "1k", "2k"], CHURN, contract, 100),
    scenario("holes", &["holes-2k", "holes"], GUESTS, contract, 2000),
    scenario("gaps", &["gaps"], GUESTS, contract, 2000),
    scenario("brief", &["512-16"], GUESTS, contract, 300),
    scenario("faults", &["512", "1k"], FAULTS, contract, 2000),
    scenario("blocks", &["flat-blocks"], &[Work::Guests, Work::Churn], flat, 1000),
    scenario("failing blocks", &["blocks", "blocks-4k"], FAULTS, contract, 1000),
    scenario("written", &["512-16", "backed-written"], GUESTS, contract, 4000),
    scenario("snapshot", &["snapshot", "snapshot-4k"], BOTH, contract, 4000),
    scenario("worn", &["worn"], GUESTS, contract, 2000),
    scenario("wide", &["wide"], GUESTS, contract, 600),
    scenario("tall", &["tall"], &[Work::Operations], contract, 600),
    scenario("bitmap", &["bitmap"], GUESTS, untouched, 2000),
    scenario("foreign", &["foreign"], GUESTS, untouched, 2000),
    scenario("undercounted", &["undercounted"], GUESTS, contract, 4000),
    scenario("miscounted", &["miscounted"], GUESTS, contract, 4000),
    scenario("uncounted", &["uncounted"], GUESTS, contract, 4000),
    scenario("cut off", &["cut-off"], GUESTS, opened, 4000),
    scenario("flat file", &["flat"], FAULTS, flat, 1000),
];

/// The scenario of this name.
pub fn scenario_of(name: &str) -> Option<&'static Scenario> {
    SCENARIOS.iter().find(|s| s.name == name)
}

/// What a search came to.
#[derive(Default)]
pub struct Search {
    /// States looked at.
    pub states: u64,
    /// Runs.
    pub runs: u64,
    /// What was found.
    pub found: Option<Failure>,
}

impl Scenario {
    fn plan(&self, i: u64, seed: u64) -> Plan {
        let name = self.cases[i as usize % self.cases.len()];
        let work = self.works[i as usize / self.cases.len() % self.works.len()];
        let case = named(name).expect("a scenario's case");
        Plan { case, work, seed: Rng::new(seed.wrapping_add(i)).next() & 0xffff_ffff }
    }

    /// Looks for a failure in so many runs, on this thread.
    pub fn search(&self, seed: u64, runs: u64, until: Option<Instant>) -> Search {
        let mut judge = (self.judge)();
        let mut out = Search::default();
        for i in 0..runs {
            if until.is_some_and(|t| Instant::now() >= t) {
                break;
            }
            let plan = self.plan(i, seed);
            let budget = Budget { first: true, until, states: self.most, ..Budget::quick(plan.seed) };
            let (tally, failures) = examine(&plan, &budget, &mut *judge);
            out.states += tally.distinct;
            out.runs += 1;
            if let Some(failure) = failures.into_iter().next() {
                out.found = Some(failure);
                break;
            }
        }
        out
    }
}

fn contract() -> Box<dyn Judge> {
    Box::<Contract>::default()
}

fn untouched() -> Box<dyn Judge> {
    Box::<Untouched>::default()
}

fn opened() -> Box<dyn Judge> {
    Box::<Opened>::default()
}

fn flat() -> Box<dyn Judge> {
    Box::new(Flat)
}

/// The contract, and besides: as long as something in the image claims that nothing was written since it was made, or
/// that it knows all that was written, nothing was. (Rule 8; autoclear bits.)
#[derive(Default)]
struct Untouched {
    contract: Contract,
    checker: Checker,
    /// The disk at the beginning of the run with this trace.
    then: (u64, Vec<u8>),
    now: Vec<u8>,
}

/// Whether the image makes such a claim: an unknown autoclear bit, or a bitmap that is not in use.
fn claims(files: &Files<'_>) -> bool {
    let Ok(header) = Checker::header(files) else { return false };
    let valid = header.bitmaps.is_some_and(|(_, directory, _)| {
        // flags of the first entry
        files.image.get(directory as usize + 15).is_some_and(|flags| flags & 1 == 0)
    });
    header.autoclear & !0b11 != 0 || header.autoclear & 1 != 0 && valid
}

impl Judge for Untouched {
    fn judge(&mut self, state: &State<'_>) -> Result<Good, Bad> {
        let good = self.contract.judge(state)?;
        let files = state.of_image();
        if !claims(&files) {
            return Ok(good);
        }
        let size = state.recording.roles.sectors * crate::allowed::SECTOR;
        let mut read = |files: &Files<'_>, out: &mut Vec<u8>| {
            out.resize(size, 0);
            self.checker.read_guest(files, out).map_err(|e| Bad::Corrupt(e.to_string()))
        };
        if self.then.0 != state.recording.trace {
            self.then.0 = state.recording.trace;
            read(&state.recording.of_image(), &mut self.then.1)?;
        }
        read(&files, &mut self.now)?;
        match self.now == self.then.1 {
            true => Ok(good),
            false => Err(Bad::Corrupt("a bitmap or a foreign feature counts as valid after a write".into())),
        }
    }
}

/// The contract, once the image is open: what was there before could not be opened as it was.
#[derive(Default)]
struct Opened {
    contract: Contract,
    /// Where that is in the run with this trace.
    from: (u64, usize),
}

impl Judge for Opened {
    fn judge(&mut self, state: &State<'_>) -> Result<Good, Bad> {
        if self.from.0 != state.recording.trace {
            self.from = (state.recording.trace, state.recording.succeeded("open"));
        }
        if state.at() < self.from.1 { Ok(Good::default()) } else { self.contract.judge(state) }
    }
}

/// A file without a format: its bytes are the guest's disk.
struct Flat;

impl Judge for Flat {
    fn judge(&mut self, state: &State<'_>) -> Result<Good, Bad> {
        let disk = state.file(&state.recording.roles.image).unwrap_or_default();
        state.allowed.check(disk)?;
        Ok(Good::default())
    }
}
