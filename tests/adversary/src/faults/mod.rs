//! `adversary faults`: every kind of I/O call site meets every fault, once and for ever.
//!
//! ```text
//!   scenario ─► watched: operation 0, 1, 2 … ─► sites ─┐
//!                                                      ├─► case: this operation fails thus ─► the same run again, judged
//!                {EIO, ENOSPC, short, EINTR, EAGAIN, stall} × {once, until healed} ─┘
//! ```
//!
//! A site is what an operation does (read, write, fdatasync, fallocate, ftruncate), what it touches (header, L1, L2, refcount
//! table, refcount block, data, data file, backing file) and what is going on (open, guest write, flush, resize, …). No fault
//! may make a request hang, the engine panic, data or images wrong (now, and after a power cut at any moment since), or a
//! flush succeed after one that failed; errors are the fault's own, what can be retried is, and once the fault is gone
//! everything works, after opening the image again where a flush had failed.
//!
//! `--case N` runs one case again.

mod client;
mod region;
mod run;
mod scenario;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use ringblock_engine::error::Errno;
use ringblock_engine::host::sim::{Harm, OpKind, Rng, Saboteur, Trap};

use crate::args::{Args, Progress};
use client::Fault;
use run::{Failure, Kind, Shown, Site};
use scenario::Scenario;

/// Cases made of one scenario.
const PER_SCENARIO: u64 = 40;

/// The faults, and their names.
const HARMS: [(&str, Harm); 6] = [
    ("EIO", Harm::Error(Errno::EIO)),
    ("ENOSPC", Harm::Error(Errno::ENOSPC)),
    ("short", Harm::Short),
    ("EINTR", Harm::Error(Errno::EINTR)),
    ("EAGAIN", Harm::Error(Errno::EAGAIN)),
    ("stall", Harm::Stall(30_000_000_000)),
];

/// One case of a scenario.
#[derive(Clone, Copy, Debug)]
struct Case {
    number: u64,
    site: Site,
    at: u64,
    harm: usize,
    lasting: bool,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let how = if self.lasting { "until healed" } else { "once" };
        write!(f, "case {}: {} {how}: {}, operation {}", self.number, HARMS[self.harm].0, self.site, self.at)
    }
}

/// How the cases of one kind of site ended.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    /// By fault: cases, of these with requests that failed.
    by: [(u64, u64); HARMS.len()],
    hidden: u64,
    failed: u64,
    reopened: u64,
}

#[derive(Default)]
struct Sum {
    cases: u64,
    scenarios: u64,
    states: u64,
    leaks: u32,
    missed: u64,
    bad: BTreeMap<&'static str, u64>,
    rows: BTreeMap<Site, Row>,
}

impl Sum {
    fn count(&self, kind: Kind) -> u64 {
        self.bad.get(name(kind)).copied().unwrap_or(0)
    }

    fn add(&mut self, case: &Case, shown: &Shown) {
        self.cases += 1;
        self.states += shown.states;
        self.leaks = self.leaks.max(shown.leaks);
        self.missed += u64::from(shown.hits == 0);
        let row = self.rows.entry(case.site).or_default();
        let failed = u64::from(shown.counts.failed > 0);
        row.by[case.harm].0 += 1;
        row.by[case.harm].1 += failed;
        row.failed += failed;
        row.hidden += 1 - failed;
        row.reopened += u64::from(shown.reopened);
    }

    fn fail(&mut self, scenario: &str, case: Option<&Case>, seed: u64, (kind, text): &Failure) {
        *self.bad.entry(name(*kind)).or_default() += 1;
        if self.bad.values().sum::<u64>() <= 20 {
            println!("{}: {scenario}: {text}", name(*kind));
            if let Some(case) = case {
                println!("  {case}\n  cargo xtask adversary faults --seed {seed} --case {}", case.number);
            }
        }
    }

    fn table(&self) {
        println!(
            "{:<47}{}  hidden  failed  reopened",
            "site",
            HARMS.map(|h| format!("{:>10}", h.0)).concat()
        );
        for (site, row) in &self.rows {
            let by = row.by.map(|(n, failed)| {
                format!("{:>10}", if n == 0 { "-".into() } else { format!("{n}:{failed}") })
            });
            println!("{site} {}  {:>6}  {:>6}  {:>8}", by.concat(), row.hidden, row.failed, row.reopened);
        }
        println!(
            "(cases:of these with failed requests; hidden: no request noticed; reopened: after a failed flush or close)"
        );
    }
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Hang => "hang",
        Kind::Panic => "panic",
        Kind::Corruption => "corruption",
        Kind::FalseFlush => "false flush",
        Kind::Error => "wrong error",
    }
}

/// The scenario that case number `i * PER_SCENARIO` and those after it are made of.
fn scenario_seed(seed: u64, i: u64) -> u64 {
    Rng::new(seed << 32 ^ i).next() >> 16
}

/// The cases of a scenario: every kind of site about equally often, every fault, all from one seed.
fn cases(sites: &[Site], seed: u64, first: u64) -> Vec<Case> {
    let mut rng = Rng::new(seed ^ 0xfa_017);
    let mut places: BTreeMap<Site, Vec<u64>> = BTreeMap::new();
    for (at, site) in sites.iter().enumerate() {
        places.entry(*site).or_default().push(at as u64);
    }
    let mut kinds: Vec<Site> = places.keys().copied().collect();
    for i in (1..kinds.len()).rev() {
        kinds.swap(i, rng.index(i + 1));
    }
    let mut out = Vec::new();
    let mut turn = rng.next();
    for i in 0..PER_SCENARIO {
        let site = kinds[i as usize % kinds.len()];
        turn += 1;
        // a short transfer of what transfers nothing would be no fault
        let moves = matches!(site.kind, OpKind::Read | OpKind::Write);
        let harm = match (turn % HARMS.len() as u64) as usize {
            2 if !moves => 0,
            harm => harm,
        };
        let (at, lasting) = (places[&site][rng.index(places[&site].len())], rng.chance(500));
        out.push(Case { number: first + i, site, at, harm, lasting });
    }
    out
}

fn challenge(s: &Scenario, case: &Case) -> Result<Shown, Failure> {
    let (harm, lasting) = (HARMS[case.harm].1, case.lasting);
    let fault = Fault { harm, lasting, flushes: case.site.kind == OpKind::Fdatasync };
    run::run(s, Saboteur::with(Trap { at: case.at, harm, lasting }), Some(fault), case.number)
}

/// All cases of one scenario, or one of them.
fn all_of(i: u64, args: &Args, only: Option<u64>, sum: &Mutex<Sum>, progress: &Progress) {
    let lock = || sum.lock().unwrap_or_else(|e| e.into_inner());
    let seed = scenario_seed(args.seed, i);
    let watched =
        Scenario::new(seed).map_err(|e| (Kind::Panic, e)).and_then(|s| run::watch(&s).map(|w| (s, w)));
    let (s, watched) = match watched {
        Ok(both) => both,
        Err(e) => return lock().fail(&format!("scenario {seed} without a fault"), None, args.seed, &e),
    };
    lock().scenarios += 1;
    for case in cases(&watched.sites, seed, i * PER_SCENARIO) {
        if args.is_over()
            || only.is_some_and(|n| n != case.number)
            || (only.is_none() && case.number >= args.count)
        {
            continue;
        }
        let result = challenge(&s, &case);
        let mut sum = lock();
        match &result {
            Ok(shown) => sum.add(&case, shown),
            Err(e) => sum.fail(&s.to_string(), Some(&case), args.seed, e),
        }
        if only.is_some() {
            let trace = result.as_ref().map_or(0, |shown| shown.trace);
            println!("{s}\n{case}\ntrace {trace:016x}\n{result:?}");
        }
        progress.tell(|| format!("faults: {} cases", sum.cases));
    }
}

/// Runs the command. False if anything was found.
pub fn run(args: &[String]) -> bool {
    let parsed = Args::parse(args, 5000, &["--case"]).and_then(|a| {
        let only = a.own("--case").map(str::parse::<u64>).transpose();
        let only = only.map_err(|_| "--case: a number is needed".to_owned())?;
        Ok((a, only))
    });
    let (args, only) = match parsed {
        Ok(parsed) => parsed,
        Err(e) => {
            eprintln!("adversary faults: {e}");
            return false;
        }
    };
    let (sum, progress) = (Mutex::new(Sum::default()), Progress::default());
    match only {
        Some(n) => all_of(n / PER_SCENARIO, &args, only, &sum, &progress),
        None => {
            let next = AtomicU64::new(0);
            std::thread::scope(|scope| {
                for _ in 0..args.threads {
                    scope.spawn(|| {
                        loop {
                            let i = next.fetch_add(1, Ordering::Relaxed);
                            if i * PER_SCENARIO >= args.count || args.is_over() {
                                return;
                            }
                            all_of(i, &args, None, &sum, &progress);
                        }
                    });
                }
            });
        }
    }
    let sum = sum.into_inner().unwrap_or_else(|e| e.into_inner());
    report(&sum, &args)
}

fn report(sum: &Sum, args: &Args) -> bool {
    sum.table();
    println!(
        "{} scenarios, {} kinds of sites, {} crash states, at most {} clusters leaked, {} faults that met nothing",
        sum.scenarios,
        sum.rows.len(),
        sum.states,
        sum.leaks,
        sum.missed
    );
    println!(
        "proof: fault cases: {}; hangs {}, panics {}, corruptions {}, false flushes {}, wrong errors {}; {:.1} s",
        sum.cases + sum.bad.values().sum::<u64>(),
        sum.count(Kind::Hang),
        sum.count(Kind::Panic),
        sum.count(Kind::Corruption),
        sum.count(Kind::FalseFlush),
        sum.count(Kind::Error),
        args.elapsed()
    );
    sum.bad.is_empty() && sum.cases > 0 && sum.missed == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: no fault at any of these sites does harm, and a case repeats exactly. Method: a slice of the matrix, and the
    /// first case of each scenario twice.
    #[test]
    fn a_slice() {
        let mut faults = std::collections::BTreeSet::new();
        for i in 0..6 {
            let seed = scenario_seed(1, i);
            let s = Scenario::new(seed).unwrap_or_else(|e| panic!("scenario {seed}: {e}"));
            let watched = run::watch(&s).unwrap_or_else(|(_, e)| panic!("{s}: {e}"));
            for (n, case) in cases(&watched.sites, seed, i * PER_SCENARIO).iter().enumerate() {
                let shown = challenge(&s, case).unwrap_or_else(|(_, e)| panic!("{s}: {case}: {e}"));
                assert!(shown.hits > 0, "{s}: {case}: met nothing");
                faults.insert((case.harm, case.lasting));
                if n == 0 {
                    let again = challenge(&s, case).unwrap_or_else(|(_, e)| panic!("{s}: {case}: {e}"));
                    assert_eq!(shown.trace, again.trace, "{s}: {case}");
                }
            }
        }
        assert_eq!(faults.len(), 12, "every fault, once and until healed");
    }

    /// Goal: the judge sees what is wrong. Method: a fault of which it is not told: the errors are wrong then.
    #[test]
    fn errors_are_not_believed_without_a_fault() {
        let seed = scenario_seed(1, 0);
        let s = Scenario::new(seed).expect("a scenario");
        let watched = run::watch(&s).unwrap_or_else(|(_, e)| panic!("{s}: {e}"));
        let at = watched.sites.iter().position(|s| s.kind == OpKind::Fdatasync).expect("a flush") as u64;
        let harm = Harm::Error(Errno::EIO);
        let told = Fault { harm: Harm::Short, lasting: false, flushes: false };
        let (kind, text) = run::run(&s, Saboteur::with(Trap { at, harm, lasting: false }), Some(told), 0)
            .expect_err("the error of a flush");
        assert_eq!(kind, Kind::Error, "{text}");
    }
}
