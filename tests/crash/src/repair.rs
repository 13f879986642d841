//! `crash repair`: power cuts at every point of a recovery, and what recovering again makes of them.
//!
//! ```text
//!   crash states of our runs and QEMU's, images of the peer ─► damage ─► recover (leaks, all, open), recorded
//!      ─► every state a cut may leave ─► same data, same snapshots, no worse ─► recover again ─► sound ─► again ─► no change
//! ```
//!
//! Data and snapshots are compared byte for byte with what the independent checker read of the image before the first
//! recovery, which is stricter than what a guest may find: a recovery has no reason to change any sector.

use ringblock_checker::{Checker, Kind, Report};
use ringblock_engine::host::sim::Rng;

use crate::args::Args;
use crate::cases::{Case, cases};
use crate::damage::Layout;
use crate::enumerate::{Budget, enumerate};
use crate::judge::{Bad, Good, Judge, State};
use crate::peer;
use crate::recover::{Mode, Said, recorded, twice};
use crate::spot;
use crate::subject::{Content, Subject, random_states};
use crate::trials::{self, Sum};
use crate::work::plan;

/// Distinct states of one recovery at most.
const STATES: u64 = 120;

/// What is known of an image before it is recovered.
struct Before {
    content: Content,
    report: Report,
    /// First cluster behind the end of the file and everything referenced, as an offset.
    end: u64,
    reftable: u64,
}

impl Before {
    fn of(subject: &Subject, checker: &mut Checker) -> Option<Before> {
        let files = subject.of_image();
        let content = Content::read(checker, &files).ok()?;
        let report = checker.check(&files).clone();
        let header = Checker::header(&files).ok()?;
        let end =
            checker.referenced_end().max((subject.image().len() as u64).next_multiple_of(header.cluster()));
        Some(Before { content, report, end, reftable: header.reftable_offset })
    }
}

/// Judges the states of a recorded recovery.
struct Again<'a> {
    subject: &'a Subject,
    mode: Mode,
    before: &'a Before,
    checker: Checker,
}

impl Judge for Again<'_> {
    fn judge(&mut self, state: &State<'_>) -> Result<Good, Bad> {
        let cut = self.subject.of_files(state);
        let now =
            Before::of(&cut, &mut self.checker).ok_or_else(|| Bad::Corrupt("it cannot be read".into()))?;
        if let Some(how) = self.before.content.difference(&now.content) {
            return Err(Bad::Lost(format!("when the power was cut: {how}")));
        }
        no_worse(&self.before.report, &now.report).map_err(Bad::Corrupt)?;
        // the same way again, mostly; the choice hangs on the state alone
        let mut rng =
            Rng::new(cut.image().iter().fold(7, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)));
        let mode = if rng.chance(600) {
            self.mode
        } else {
            rng.pick(&[Mode::Leaks, Mode::All, Mode::All, Mode::Open])
        };
        after(&cut, mode, &now, &mut self.checker)?;
        Ok(Good { leaks: now.report.leaks, dirty: now.report.dirty })
    }
}

/// Recovers twice and looks at the result.
fn after(subject: &Subject, mode: Mode, before: &Before, checker: &mut Checker) -> Result<(), Bad> {
    let result = twice(subject, mode, 1).map_err(Bad::Panic)?;
    let then = subject.with(result.files);
    let now =
        Before::of(&then, checker).ok_or_else(|| Bad::Corrupt(format!("{mode:?}: it cannot be read")))?;
    if let Some(how) = before.content.difference(&now.content) {
        return Err(Bad::Lost(format!("after {mode:?}: {how}")));
    }
    let changed = subject.image() != then.image();
    promise(mode, before, &now, &result.said, changed)
        .map_err(|why| Bad::Corrupt(format!("after {mode:?}: {why}; it said: {}", result.said.text)))?;
    if result.changed_again {
        return Err(Bad::Corrupt(format!("{mode:?} is not idempotent")));
    }
    placement(&then, before, &now).map_err(|why| Bad::Corrupt(format!("after {mode:?}: {why}")))
}

/// What a recovery promises of the image after it.
fn promise(mode: Mode, before: &Before, now: &Before, said: &Said, changed: bool) -> Result<(), String> {
    let (was, is) = (&before.report, &now.report);
    let sound = |leaks: u32| match is.is_sound() && is.leaks <= leaks && !is.marked_corrupt {
        true => Ok(()),
        false => Err(is.explain().replace('\n', ";")),
    };
    let clean = || {
        sound(0)?;
        if is.dirty { Err("still dirty".to_owned()) } else { Ok(()) }
    };
    match mode {
        Mode::Look if changed => Err("looking changed it".into()),
        Mode::Look => Ok(()),
        Mode::All if said.code != 0 => Err(format!("exit code {}", said.code)),
        Mode::All => clean(),
        Mode::Leaks if said.needs_rebuild && changed => Err("refused, and changed".into()),
        Mode::Leaks if said.needs_rebuild => Ok(()),
        Mode::Leaks if was.is_sound() => sound(0),
        Mode::Leaks if is.leaks > 0 => Err(format!("{} leaks are left", is.leaks)),
        Mode::Leaks => no_worse(was, is),
        Mode::Open if was.dirty && said.code != 0 => Err("it does not open".into()),
        Mode::Open if was.is_sound() && said.code != 0 => Err("it does not open".into()),
        Mode::Open if said.guest.as_ref().is_some_and(|g| *g != before.content.guest) => {
            Err("the engine reads other data".into())
        }
        Mode::Open if was.dirty => clean(),
        Mode::Open if was.is_sound() => sound(was.leaks),
        Mode::Open => no_worse(was, is),
    }
}

/// An interrupted recovery leaves nothing worse than it found: under the dirty bit counters and flags may be anything, for
/// whoever opens it repairs it first; version 2 has no such bit, and flags may be on their way there.
fn no_worse(was: &Report, is: &Report) -> Result<(), String> {
    if is.refused {
        return Err("refused".into());
    }
    // only the first findings are kept, so what is said of kinds holds for those
    let too_few = |r: &Report| r.findings.iter().any(|f| f.kind == Kind::TooFewRefs);
    let more = |r: &Report| r.corruptions + r.check_errors > was.corruptions + was.check_errors;
    let worse = match is.version {
        // a longer file shows more of what was wrong before, and less is wrong with it
        2 => more(is) && (is.damages > was.damages || too_few(is) && !too_few(was)),
        _ if is.dirty => false,
        _ => more(is),
    };
    match worse {
        true => {
            Err(format!("worse than before: {} (before: {})", is.explain(), was.explain()).replace('\n', ";"))
        }
        false => Ok(()),
    }
}

/// New refcount structures lie at or above the old end of the file and everything referenced.
fn placement(then: &Subject, before: &Before, now: &Before) -> Result<(), String> {
    if now.reftable == before.reftable {
        return Ok(());
    }
    let layout = Layout::of(&then.of_image()).ok_or("it cannot be read")?;
    let entries = layout.table_entries(then.image());
    let blocks = entries.iter().map(|&at| crate::damage::be64(then.image(), at));
    match blocks.chain([now.reftable]).find(|&at| at < before.end) {
        Some(at) => Err(format!("a new structure at {at:#x}, below {:#x}", before.end)),
        None => Ok(()),
    }
}

/// The figures.
#[derive(Default)]
struct Figures {
    states: u64,
    recoveries: u64,
    changed: u64,
    damaged: u64,
    failures: Vec<String>,
}

impl Sum for Figures {
    fn add(&mut self, other: Figures) {
        self.states += other.states;
        self.recoveries += other.recoveries;
        self.changed += other.changed;
        self.damaged += other.damaged;
        self.failures.extend(other.failures);
    }

    fn counted(&self) -> u64 {
        self.states
    }

    fn failures(&self) -> &[String] {
        &self.failures
    }
}

impl Figures {
    fn fail(&mut self, what: &str, mode: Mode, bad: &Bad, state: Option<String>) {
        match bad {
            Bad::Lost(_) | Bad::Alien(_) => self.changed += 1,
            Bad::Corrupt(_) | Bad::Panic(_) => self.damaged += 1,
        }
        let state = state.map_or(String::new(), |s| format!(" state {s}"));
        self.failures.push(format!("{what}, {mode:?}{state}: {bad}"));
    }
}

/// Where images to be recovered come from.
pub(crate) struct Sources {
    cases: Vec<Case>,
    images: Vec<Subject>,
}

impl Sources {
    /// Builds the peer's images.
    pub(crate) fn new(seed: u64) -> Sources {
        Sources { cases: cases(), images: peer::images(seed) }
    }

    /// Some images: crash states of one run of ours, of one of QEMU's, or one of the peer's images.
    pub(crate) fn some(&self, rng: &mut Rng, count: usize) -> Vec<Subject> {
        let mut out = Vec::new();
        match rng.below(10) {
            0..=2 => {
                let plan = plan(&self.cases, rng.below(1 << 20), rng.next());
                let Ok(recording) = plan.record() else { return out };
                random_states(&recording, rng, count, |s| out.push(Subject::of_state(&plan.case, s)));
            }
            3 => {
                let (subject, recording) = peer::lazy_run(rng.below(1 << 30));
                random_states(&recording, rng, count, |s| out.push(subject.of_files(s)));
            }
            _ => out.extend((0..count).map(|_| self.images[rng.index(self.images.len())].clone())),
        }
        out
    }
}

/// One image, damaged and recovered.
fn one(subject: &mut Subject, hurts: u64, rng: &mut Rng, save: Option<&str>) -> Figures {
    let mut figures = Figures::default();
    let Some(layout) = Layout::of(&subject.of_image()) else { return figures };
    let damage = layout.hurt(subject.image_mut(), hurts, rng);
    let what = format!("{}: {damage}", subject.name);
    let mode = rng.pick(&[Mode::Leaks, Mode::All, Mode::All, Mode::Open, Mode::Open]);
    let v3 = subject.image().get(7) == Some(&3);
    if mode == Mode::Open && v3 && rng.chance(800) {
        subject.image_mut()[79] |= 1;
    }
    if let Some(dir) = save {
        subject.save(std::path::Path::new(dir)).unwrap_or_else(|e| panic!("{dir}: {e}"));
    }
    let mut checker = Checker::default();
    // a state that nobody can read is no case of a repair
    let Some(before) = Before::of(subject, &mut checker) else { return figures };
    figures.recoveries += 1;
    if let Err(bad) = after(subject, mode, &before, &mut checker) {
        figures.fail(&what, mode, &bad, None);
        return figures;
    }
    let recording = match recorded(subject, mode, rng.next()) {
        Ok((recording, _)) => recording,
        Err(text) => {
            figures.fail(&what, mode, &Bad::Panic(text), None);
            return figures;
        }
    };
    let budget = Budget { states: STATES, random: 40, pairs: 20, ..Budget::quick(rng.next()) };
    let mut judge = Again { subject, mode, before: &before, checker };
    let tally = enumerate(&recording, &budget, &mut judge);
    figures.states += tally.distinct;
    for found in tally.failures.into_iter().take(1) {
        let (spot, bad) = spot::shrink(&recording, found, &mut judge);
        let landed = spot::describe(&recording, &spot);
        figures.fail(&what, mode, &bad, Some(format!("{spot}\n{landed}")));
    }
    figures
}

/// Images of one trial.
const IMAGES: usize = 4;

fn trial(sources: &Sources, args: &Args, number: u64) -> Figures {
    let mut rng = trials::rng(args, number);
    let mut figures = Figures::default();
    let mut images = sources.some(&mut rng, IMAGES);
    for (i, subject) in images.iter_mut().enumerate() {
        let hurts = rng.pick(&[0, 1, 1, 2, 3, 4]);
        let mut own = rng.fork();
        if args.get("image").is_some_and(|n| n != i.to_string()) {
            continue;
        }
        let save = args.get("image").and(args.get("save"));
        let mut one = one(subject, hurts, &mut own, save);
        let again = format!("  cargo xtask crash repair --seed {} --trial {number} --image {i}", args.seed);
        one.failures.iter_mut().for_each(|f| *f = format!("{f}\n{again}"));
        figures.add(one);
    }
    figures
}

/// `crash repair`.
pub fn command(args: &[String]) -> bool {
    let args = match Args::parse(args, 50_000) {
        Ok(args) => args,
        Err(why) => {
            eprintln!("crash: {why}");
            return false;
        }
    };
    let sources = Sources::new(args.seed);
    let (f, seconds) = trials::run(&args, |number| trial(&sources, &args, number));
    println!(
        "proof: crashes during repair: {} states; not idempotent or data changed {}; of {} recoveries; {seconds:.1} s",
        f.states,
        f.changed + f.damaged,
        f.recoveries
    );
    f.failures.is_empty() && f.states > 0
}
