//! `adversary model`: commands of the control pipe and requests of guests, in random sequences, against a reference.
//!
//! The reference ([`graph`], [`files`]) is small, plain and written from the rules alone: maps of nodes and exports, bytes
//! of disks. Each step is taken on both; each answer, each listing and each byte read has to be the reference's; what is
//! refused leaves no trace. At the end everything is taken down, and the images are judged by the independent checker, by
//! the reference and, on a sample, by the peer.
//!
//! ```text
//!   seed ─► session: draw ─► step ─► … ─► finish        a disagreement: shrink ─► seed, steps, replay
//!             ├ world (table of commands): nodes, reopen, exports     graph, files: the reference
//!             ├ guest (requests), wrong (refused whatever there is)
//!             └ queries (listings)
//! ```
//!
//! `--sequence SEED` runs just one sequence again, `--steps N` only its first steps, and `--trace on` tells each step before
//! it is taken: for what ends the process.

mod exports;
mod files;
mod graph;
mod guest;
mod nodes;
mod queries;
mod reopen;
mod session;
mod shrink;
mod step;
mod world;
mod wrong;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use ringblock_tests::Rng;

use crate::args::{Args, Progress};
use crate::panic_text;
use session::{Session, Tally};
use shrink::Watch;
use step::Step;

/// Steps of one sequence.
const STEPS: u64 = 400;
/// One in so many sequences has its images judged by the peer as well.
const SAMPLE: u64 = 8;
/// After so long without a step something hangs.
const HANGS: Duration = Duration::from_secs(60);

/// Whether steps are told before they are taken.
static TRACE: AtomicBool = AtomicBool::new(false);

#[derive(Default)]
struct Sum {
    tally: Tally,
    sequences: u64,
    disagreements: u64,
}

/// How a sequence ended that did not end well.
#[derive(Debug)]
pub(super) struct Failure {
    taken: Vec<Step>,
    what: String,
}

/// Runs the command. False if engine and reference disagreed.
pub fn run(args: &[String]) -> bool {
    let parsed = Args::parse(args, 32_000, &["--sequence", "--steps", "--trace"])
        .and_then(|args| Ok((seeds(&args)?, args)));
    let ((seeds, steps), args) = match parsed {
        Ok(parsed) => parsed,
        Err(e) => {
            eprintln!("adversary model: {e}");
            return false;
        }
    };
    TRACE.store(args.own("--trace") == Some("on"), Ordering::Relaxed);
    let (sum, next, progress) = (Mutex::new(Sum::default()), AtomicU64::new(0), Progress::default());
    std::thread::scope(|scope| {
        for _ in 0..args.threads.min(8) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(&seed) = seeds.get(at as usize).filter(|_| !args.is_over()) else { return };
                    let ended = sequence(seed, steps, at % SAMPLE == 0);
                    note(seed, ended, &sum);
                    progress.tell(|| format!("model: {} sequences", lock(&sum).sequences));
                }
            });
        }
    });
    let s = lock(&sum);
    let t = &s.tally;
    println!(
        "proof: model: {} sequences, {} commands ({} refused as they should), {} guest requests; disagreements {}; {} images \
         judged, {} of them by the peer; {:.1} s",
        s.sequences,
        t.commands,
        t.refused,
        t.requests,
        s.disagreements,
        t.images,
        t.compared,
        args.elapsed()
    );
    s.disagreements == 0 && s.sequences > 0
}

/// The sequences to run, and the steps of each.
fn seeds(args: &Args) -> Result<(Vec<u64>, u64), String> {
    let number = |name: &str| {
        let value =
            args.own(name).map(|v| v.parse::<u64>().map_err(|_| format!("{name}: {v:?} is no number")));
        value.transpose()
    };
    let steps = number("--steps")?.unwrap_or(STEPS);
    match number("--sequence")? {
        Some(seed) => Ok((vec![seed], steps)),
        None => Ok(((0..args.count.div_ceil(steps.max(1))).map(|i| args.seed << 24 | i).collect(), steps)),
    }
}

fn lock(sum: &Mutex<Sum>) -> MutexGuard<'_, Sum> {
    sum.lock().unwrap_or_else(|e| e.into_inner())
}

/// Runs one sequence.
fn sequence(seed: u64, steps: u64, sample: bool) -> Result<Tally, Failure> {
    let mut rng = Rng::new(seed ^ 0x5eed);
    let mut left = steps;
    attempt(seed, sample, move |session| {
        while left > 0 {
            left -= 1;
            if let Some(step) = session.draw(&mut rng) {
                return Some(step);
            }
        }
        None
    })
}

/// Takes steps until there are no more, or one goes wrong.
fn attempt(
    seed: u64,
    sample: bool,
    mut next: impl FnMut(&Session) -> Option<Step>,
) -> Result<Tally, Failure> {
    let mut taken = Vec::new();
    let watch = Watch::new(seed, HANGS);
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let mut session = Session::new(seed)?;
        while let Some(step) = next(&session) {
            watch.alive(&step);
            if TRACE.load(Ordering::Relaxed) {
                eprintln!("{seed} {}: {step}", taken.len());
            }
            taken.push(step.clone());
            session.step(&step)?;
        }
        session.finish(sample)
    }));
    let what = match ended {
        Ok(Ok(tally)) => return Ok(tally),
        Ok(Err(e)) => e,
        Err(panic) => format!("panic: {}", panic_text(&*panic)),
    };
    Err(Failure { taken, what })
}

fn note(seed: u64, ended: Result<Tally, Failure>, sum: &Mutex<Sum>) {
    let failure = match ended {
        Ok(t) => {
            let mut s = lock(sum);
            let all = &mut s.tally;
            all.commands += t.commands;
            all.refused += t.refused;
            all.requests += t.requests;
            all.images += t.images;
            all.compared += t.compared;
            s.sequences += 1;
            return;
        }
        Err(failure) => failure,
    };
    let steps = failure.taken.len();
    let least = shrink::shrink(seed, failure);
    let mut s = lock(sum);
    s.sequences += 1;
    s.disagreements += 1;
    println!("DISAGREEMENT: sequence {seed}, step {steps}: {}", least.what);
    least.taken.iter().for_each(|step| println!("  {step}"));
    println!("replay: cargo xtask adversary model --sequence {seed} --steps {STEPS}");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: engine and reference agree. Method: some short sequences, one judged by the peer as well.
    #[test]
    fn sequences() {
        let mut all = Tally::default();
        for seed in 0..6 {
            match sequence(seed, 150, seed == 0) {
                Ok(t) => {
                    all.commands += t.commands;
                    all.refused += t.refused;
                    all.requests += t.requests;
                }
                Err(f) => panic!("sequence {seed}: {}\n{:#?}", f.what, f.taken),
            }
        }
        assert!(all.commands > 200 && all.refused > 50 && all.requests > 50, "{all:?}");
    }

    /// Goal: a disagreement is found and made small. Method: a wrong command that the engine accepts.
    #[test]
    fn a_planted_disagreement_is_found_and_shrunk() {
        let lie =
            Step::Wrong { name: "query-block".into(), args: serde_json::json!({}), text: "refused".into() };
        let mut rng = Rng::new(1);
        let mut left = 30;
        let failed = attempt(1, false, |session| {
            left -= 1;
            if left == 0 {
                Some(lie.clone())
            } else {
                session.draw(&mut rng).or_else(|| Some(Step::Leave { slot: 0 }))
            }
        });
        let failure = failed.expect_err("it is found");
        assert!(failure.what.contains("succeeded"), "{}", failure.what);
        assert_eq!(shrink::shrink(1, failure).taken, [lie]);
    }
}
