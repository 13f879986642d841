//! `crash states`: crash states of many runs, judged. `crash table`: the same, a line for each kind of image.
//! `crash replay`: one state again.
//!
//! ```text
//!   plan 0, 1, 2, … ─► threads ─► results in order of plans, until `count` states were looked at
//! ```
//!
//! `--case short` takes every sequence of one and of two requests, `--case short3` those of three, until `--count` states.
//!
//! The same seed and count judge the same states, whatever the number of threads: results count in order of plans.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ringblock_engine::host::sim::{Change, Event};

use crate::args::Args;
use crate::cases::{self, Case, cases};
use crate::enumerate::{Budget, Tally};
use crate::hunt::{Failure, examine};
use crate::judge::Contract;
use crate::short;
use crate::work::{Plan, Work, plan};

/// One run in so many is enumerated with all subsets of up to twelve writes.
const DEEP: u64 = 12;

/// What one plan came to.
struct Done {
    case: &'static str,
    tally: Tally,
    seconds: f64,
}

#[derive(Default)]
struct Results {
    done: BTreeMap<u64, Done>,
    /// Plans that are finished without a gap, and the states of these.
    solid: u64,
    states: u64,
    failures: Vec<Failure>,
}

struct Run<'a> {
    args: &'a Args,
    cases: Vec<Case>,
    /// Every sequence of this range, instead of plans of all kinds.
    sequences: Option<Range<u32>>,
    next: AtomicU64,
    enough: AtomicBool,
    results: Mutex<Results>,
    start: Instant,
}

impl Run<'_> {
    fn lock(&self) -> MutexGuard<'_, Results> {
        self.results.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn work(&self) {
        let mut judge = Contract::default();
        while !self.enough.load(Ordering::Relaxed) && !self.args.is_over() {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            let plan = match &self.sequences {
                Some(s) if i >= u64::from(s.end - s.start) => return,
                Some(s) => Plan { case: short::case(), work: Work::Short(s.start + i as u32), seed: i },
                None => plan(&self.cases, i, self.args.seed),
            };
            let deep = i % DEEP == DEEP - 1;
            let budget = if deep { Budget::full(plan.seed) } else { Budget::quick(plan.seed) };
            let budget = Budget { until: self.args.until, states: plan.case.most, ..budget };
            let start = Instant::now();
            let (tally, failures) = examine(&plan, &budget, &mut judge);
            let done = Done { case: plan.case.name, tally, seconds: start.elapsed().as_secs_f64() };
            self.book(i, done, failures);
        }
    }

    fn book(&self, i: u64, done: Done, failures: Vec<Failure>) {
        let mut r = self.lock();
        for failure in failures {
            if r.failures.len() < 10 {
                println!("{failure}");
            }
            r.failures.push(failure);
        }
        r.done.insert(i, done);
        while r.states < self.args.count {
            let next = r.solid;
            let Some(distinct) = r.done.get(&next).map(|d| d.tally.distinct) else { break };
            r.states += distinct;
            r.solid += 1;
        }
        if r.states >= self.args.count || r.failures.len() >= 50 {
            self.enough.store(true, Ordering::Relaxed);
        }
    }

    fn progress(&self) {
        let r = self.lock();
        let states: u64 = r.done.values().map(|d| d.tally.distinct).sum();
        let seconds = self.start.elapsed().as_secs_f64();
        let rate = states as f64 / seconds;
        eprintln!("{states} states, {} runs, {rate:.0}/s, {} failures", r.done.len(), r.failures.len());
    }
}

/// Runs plans on all threads until enough states were looked at.
fn run(args: &Args) -> Result<(Results, f64), String> {
    let mut chosen = cases();
    let sequences = match args.case.as_deref() {
        Some("short") => Some(0..short::COUNT),
        Some("short3") => Some(short::COUNT..short::ALL),
        _ => None,
    };
    if let Some(name) = args.case.as_ref().filter(|_| sequences.is_none()) {
        chosen.retain(|c| c.name == name);
        if chosen.is_empty() {
            let names: Vec<_> = cases().iter().map(|c| c.name).collect();
            return Err(format!("--case: one of short, short3, {}", names.join(", ")));
        }
    }
    let start = Instant::now();
    let run = Run {
        args,
        cases: chosen,
        sequences,
        next: AtomicU64::new(0),
        enough: AtomicBool::new(false),
        results: Mutex::default(),
        start,
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..args.threads).map(|_| scope.spawn(|| run.work())).collect();
        let mut said = Instant::now();
        while threads.iter().any(|t| !t.is_finished()) {
            std::thread::sleep(Duration::from_millis(20));
            if said.elapsed() > Duration::from_secs(10) {
                said = Instant::now();
                run.progress();
            }
        }
    });
    let results = run.results.into_inner().unwrap_or_else(|e| e.into_inner());
    Ok((results, start.elapsed().as_secs_f64()))
}

pub(crate) fn usage(result: Result<bool, String>) -> bool {
    result.unwrap_or_else(|why| {
        eprintln!("crash: {why}");
        false
    })
}

/// `crash states`.
pub fn states(args: &[String]) -> bool {
    usage(Args::parse(args, 1_000_000).and_then(|args| {
        let (results, seconds) = run(&args)?;
        let mut all = Tally::default();
        results.done.values().for_each(|d| all.add(&d.tally));
        eprintln!("{}", summary(&all, results.done.len(), seconds));
        println!(
            "proof: crash states: {} states; corrupt {}; flushed data lost {}; alien sectors {}; {seconds:.1} s",
            all.distinct, all.corrupt, all.lost, all.alien
        );
        Ok(all.is_good() && results.failures.is_empty())
    }))
}

fn summary(all: &Tally, runs: usize, seconds: f64) -> String {
    format!(
        "{runs} runs, {} cuts, {:.1} % of them with all subsets, at most {} writes open; {} states built, {} of \
         them different; at most {} clusters leaked; {} states dirty; {:.0} states/s",
        all.cuts,
        100.0 * all.exhausted as f64 / all.cuts.max(1) as f64,
        all.widest,
        all.visited,
        all.distinct,
        all.leaks,
        all.dirty,
        all.distinct as f64 / seconds
    )
}

/// `crash table`.
pub fn table(args: &[String]) -> bool {
    usage(Args::parse(args, 200_000).and_then(|args| {
        let (results, seconds) = run(&args)?;
        let mut cases: BTreeMap<&str, (u64, Tally, f64)> = BTreeMap::new();
        for done in results.done.values() {
            let (runs, tally, time) = cases.entry(done.case).or_default();
            *runs += 1;
            tally.add(&done.tally);
            *time += done.seconds;
        }
        println!("case                  runs    cuts  all subsets   widest    visited   distinct  leaks    bad  states/s/core");
        let mut all = Tally::default();
        for (name, (runs, t, time)) in &cases {
            let share = 100.0 * t.exhausted as f64 / t.cuts.max(1) as f64;
            println!(
                "{name:<20} {runs:>5} {:>7} {share:>10.1} % {:>8} {:>10} {:>10} {:>6} {:>6} {:>14.0}",
                t.cuts,
                t.widest,
                t.visited,
                t.distinct,
                t.leaks,
                t.corrupt + t.lost + t.alien,
                t.distinct as f64 / time
            );
            all.add(t);
        }
        eprintln!("{}", summary(&all, results.done.len(), seconds));
        println!(
            "proof: crash table: {} states; kinds of image {}; bad {}",
            all.distinct,
            cases.len(),
            all.corrupt + all.lost + all.alien
        );
        Ok(all.is_good())
    }))
}

/// The plan that a failure's command names.
pub(crate) fn named(args: &Args) -> Result<Plan, String> {
    let name = args.case.as_deref().ok_or("--case is missing")?;
    let case = match name {
        "short" => short::case(),
        _ => cases::named(name).ok_or_else(|| format!("no case '{name}'"))?,
    };
    let work = args.get("work").ok_or("--work is missing")?.parse()?;
    Ok(Plan { case, work, seed: args.seed })
}

/// `crash replay`: one state of one run, judged again; with `--save DIR` its files are written there. Without `--state`
/// the whole run is enumerated. With `--mutant NAME` one rule is left out, with `--events on`
/// all that happened until then is printed.
pub fn replay(args: &[String]) -> bool {
    usage(Args::parse(args, 0).and_then(|args| with_mutant(&args, || again(&args))?))
}

#[cfg(feature = "mutants")]
fn with_mutant<T>(args: &Args, run: impl FnOnce() -> T) -> Result<T, String> {
    use ringblock_engine::mutants::{MUTANTS, with};
    match args.get("mutant") {
        Some(name) if MUTANTS.iter().all(|m| m.0 != name) => Err(format!("--mutant: no '{name}'")),
        name => Ok(with(name, run)),
    }
}

#[cfg(not(feature = "mutants"))]
fn with_mutant<T>(args: &Args, run: impl FnOnce() -> T) -> Result<T, String> {
    match args.get("mutant") {
        Some(_) => Err("--mutant: built without the feature 'mutants'".to_owned()),
        None => Ok(run()),
    }
}

/// One event, a line.
fn tell((i, event): (usize, &Event)) {
    match event {
        Event::Submitted { disk, id, change: Change::Data(off, data) } => {
            println!("{:>5} Submitted {{ disk: {disk}, id: {id}, {} bytes at {off:#x} }}", i + 1, data.len());
        }
        other => println!("{:>5} {other:?}", i + 1),
    }
}

fn again(args: &Args) -> Result<bool, String> {
    let plan = named(args)?;
    let Some(state) = args.get("state") else {
        let budget = Budget::full(plan.seed);
        let (tally, failures) = examine(&plan, &budget, &mut Contract::default());
        failures.iter().for_each(|f| println!("{f}"));
        println!("{}", summary(&tally, 1, 1.0));
        return Ok(tally.is_good());
    };
    let spot: crate::Spot = state.parse()?;
    let recording = plan.record()?;
    if args.get("events") == Some("on") {
        recording.events[..spot.at.min(recording.events.len())].iter().enumerate().for_each(tell);
    }
    print!("{}", crate::spot::describe(&recording, &spot));
    let save = args.get("save").map(std::path::PathBuf::from);
    let found = crate::spot::visit(&recording, &spot, |state| {
        if let Some(dir) = &save {
            state.save(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        }
        Ok::<_, String>(crate::Judge::judge(&mut Contract::default(), state))
    });
    match found.ok_or("the run has no such state")?? {
        Ok(good) => {
            println!("good: {} clusters leaked", good.leaks);
            Ok(true)
        }
        Err(bad) => {
            println!("{bad}");
            Ok(false)
        }
    }
}
