//! `crash mutants`: the proof that the proof can fail. One rule of the crash contract after the other is left out of the
//! engine, and the failure that follows must be found; with all rules in force nothing may be found in the same places.
//!
//! ```text
//!   MUTANTS ─► threads: with(mutant, || scenario.search()) ─► killed | survived ─► table
//! ```
//!
//! A mutant lives on the thread that searches, and a simulated world has no other.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ringblock_engine::mutants::{MUTANTS, with};

use crate::args::Args;
use crate::scenarios::{SCENARIOS, Scenario, Search, scenario_of};
use crate::states::usage;

/// Where each mutant is looked for.
const PLACES: &[(&str, &str)] = &[
    ("data-file-flush", "data file"),
    ("sticky-file-flush", "flat file"),
    ("failed-slices-dirty", "faults"),
    ("failed-unlinks-wait", "faults"),
    ("limbo-tick", "churn"),
    ("discard-under-lock", "churn"),
    ("packing-ends", "packed"),
    ("punch-claims", "stalls"),
    ("in-place-copied", "snapshot"),
    ("own-table", "snapshot"),
    ("copy-head", "backed"),
    ("copy-tail", "backed"),
    ("close-flushes", "brief"),
    ("zero-fill", "holes"),
    ("new-table-content", "worn"),
    ("fresh-behind-end", "holes"),
    ("fresh-moves-on", "gaps"),
    ("evicted-block", "wide"),
    ("grown-table-barrier", "worn"),
    ("grown-table-counters", "worn"),
    ("grown-table-header", "worn"),
    ("packed-counts", "packed"),
    ("moved-l1-barrier", "tall"),
    ("tail-cleared", "operations"),
    ("below-hidden", "operations"),
    ("bitmaps-in-use", "bitmap"),
    ("bitmaps-in-use-barrier", "bitmap"),
    ("autoclear-first", "foreign"),
    ("dirty-repaired", "undercounted"),
    ("rebuild-behind-references", "cut off"),
    ("rebuild-barrier", "uncounted"),
    ("repair-barrier", "miscounted"),
    ("pin-reads", "churn"),
    ("pin-writes", "in place"),
    ("serial-tick", "blocks"),
    ("serial-wait", "blocks"),
    ("rmw-read-error", "failing blocks"),
    ("drain-waits", "operations"),
];

/// Where all others are.
const ELSEWHERE: &str = "plain";

/// Runs for one mutant, and time, at most.
const RUNS: u64 = 20_000;
const PATIENCE: Duration = Duration::from_secs(240);
/// Runs of each scenario without a mutant.
const CLEAN_RUNS: u64 = 12;

fn place(mutant: &str) -> &'static Scenario {
    let name = PLACES.iter().find(|p| p.0 == mutant).map_or(ELSEWHERE, |p| p.1);
    scenario_of(name).expect("a scenario of this name")
}

/// One search to be made: without a mutant, or with this one.
struct Job {
    mutant: Option<(&'static str, &'static str)>,
    scenario: &'static Scenario,
}

impl Job {
    fn run(&self, args: &Args) -> Search {
        let runs = if self.mutant.is_some() { RUNS } else { CLEAN_RUNS };
        let patience = Instant::now() + PATIENCE;
        let until = args.until.map_or(patience, |t| t.min(patience));
        with(self.mutant.map(|m| m.0), || self.scenario.search(args.seed, runs, Some(until)))
    }

    /// Whether it came out as it must.
    fn is_good(&self, search: &Search) -> bool {
        self.mutant.is_some() == search.found.is_some()
    }

    /// A line on the way.
    fn tell(&self, search: &Search, start: Instant) {
        let name = self.mutant.map_or("-", |m| m.0);
        let found = if search.found.is_some() { "found" } else { "nothing found" };
        let seconds = start.elapsed().as_secs_f64();
        let (runs, states, scenario) = (search.runs, search.states, self.scenario.name);
        eprintln!("{seconds:>5.1} s  {name}, {scenario}: {found} in {runs} runs, {states} states");
    }

    fn print(&self, search: &Search) {
        let (name, what) = self.mutant.unwrap_or(("-", "nothing: all rules in force"));
        let verdict = match (&search.found, self.mutant) {
            (Some(failure), _) => failure.bad.to_string(),
            (None, Some(_)) => "SURVIVED".to_owned(),
            (None, None) => "clean".to_owned(),
        };
        let (runs, states, scenario) = (search.runs, search.states, self.scenario.name);
        println!("{name:<26} {scenario:<15} {runs:>5} {states:>8}  {what}");
        println!("{:<26} {verdict}", "");
        if let Some(f) = &search.found {
            let mutant = self.mutant.map(|m| format!(" --mutant {}", m.0)).unwrap_or_default();
            let state = f.spot.as_ref().map(|s| format!(" --state {s}")).unwrap_or_default();
            println!("{:<26} cargo xtask crash replay {}{mutant}{state}", "", f.plan);
        }
    }
}

/// The searches asked for.
fn jobs(args: &Args) -> Result<Vec<Job>, String> {
    if let Some(name) = args.get("mutant") {
        let found = MUTANTS.iter().find(|m| m.0 == name).ok_or_else(|| format!("--mutant: no '{name}'"))?;
        return Ok(vec![Job { mutant: Some(*found), scenario: place(name) }]);
    }
    let clean = SCENARIOS.iter().map(|scenario| Job { mutant: None, scenario });
    let mutants = MUTANTS.iter().map(|&m| Job { mutant: Some(m), scenario: place(m.0) });
    Ok(clean.chain(mutants).collect())
}

/// `crash mutants`.
pub fn mutants(args: &[String]) -> bool {
    usage(Args::parse(args, 0).and_then(|args| {
        let jobs = jobs(&args)?;
        let start = Instant::now();
        let next = AtomicUsize::new(0);
        let done: Vec<Mutex<Option<Search>>> = jobs.iter().map(|_| Mutex::default()).collect();
        std::thread::scope(|scope| {
            for _ in 0..args.threads {
                scope.spawn(|| {
                    while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&i| i < jobs.len()) {
                        let search = jobs[i].run(&args);
                        jobs[i].tell(&search, start);
                        *done[i].lock().unwrap_or_else(|e| e.into_inner()) = Some(search);
                    }
                });
            }
        });
        println!("mutant                     scenario         runs   states  what it leaves out");
        let (mut killed, mut mutants, mut alarms, mut states) = (0, 0, 0, 0);
        for (job, search) in jobs.iter().zip(done) {
            let search = search.into_inner().unwrap_or_else(|e| e.into_inner());
            let search = search.ok_or("a search did not end")?;
            job.print(&search);
            states += search.states;
            match job.mutant {
                Some(_) => (killed, mutants) = (killed + u32::from(job.is_good(&search)), mutants + 1),
                None => alarms += u32::from(!job.is_good(&search)),
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "proof: ordering mutants: {killed} of {mutants} killed; false alarms without a mutant {alarms} in {} \
             scenarios; {states} states; {seconds:.1} s",
            jobs.len() - mutants as usize
        );
        Ok(killed == mutants && alarms == 0)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the table of places names mutants and scenarios that exist. Method: look each up.
    #[test]
    fn places_exist() {
        for (mutant, scenario) in PLACES {
            assert!(MUTANTS.iter().any(|m| m.0 == *mutant), "{mutant}");
            assert!(scenario_of(scenario).is_some(), "{scenario}");
        }
    }
}
