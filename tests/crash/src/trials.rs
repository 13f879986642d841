//! Trials 0, 1, 2, … on all threads, until enough was counted.
//!
//! ```text
//!   thread ─ next number ─► trial(number) ─► counted, failures ─► sum
//! ```
//!
//! A trial's choices all come from its number and the seed, so one can be looked at again: `--trial NUMBER`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use ringblock_engine::host::sim::Rng;

use crate::args::Args;

/// What a trial came to.
pub(crate) trait Sum: Default + Send {
    /// Adds another one's figures.
    fn add(&mut self, other: Self);
    /// What `--count` counts.
    fn counted(&self) -> u64;
    /// What went wrong.
    fn failures(&self) -> &[String];
}

/// Failures after which nobody needs more.
const ENOUGH: usize = 20;

/// Where a trial's choices come from.
pub(crate) fn rng(args: &Args, trial: u64) -> Rng {
    Rng::new(args.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(trial.wrapping_mul(0x5851_f42d)))
}

/// With `--mutant NAME` an ordering mutant is alive meanwhile: the proof that a command can fail.
fn under<T>(args: &Args, f: impl FnOnce() -> T) -> T {
    match args.get("mutant") {
        #[cfg(feature = "mutants")]
        Some(name) => ringblock_engine::mutants::with(Some(name), f),
        #[cfg(not(feature = "mutants"))]
        Some(name) => panic!("--mutant {name}: built without the mutants"),
        None => f(),
    }
}

/// Runs trials; with `--trial` just that one. Failures are printed as they come. Returns the sum and the seconds taken.
pub(crate) fn run<S: Sum>(args: &Args, trial: impl Fn(u64) -> S + Sync) -> (S, f64) {
    let start = Instant::now();
    if let Some(only) = args.get("trial").and_then(|t| t.parse().ok()) {
        let sum = under(args, || trial(only));
        sum.failures().iter().for_each(|f| println!("trial {only}: {f}"));
        return (sum, start.elapsed().as_secs_f64());
    }
    let (next, all) = (AtomicU64::new(0), Mutex::new(S::default()));
    let lock = || -> MutexGuard<'_, S> { all.lock().unwrap_or_else(|e| e.into_inner()) };
    let enough = || {
        let sum = lock();
        sum.counted() >= args.count || sum.failures().len() >= ENOUGH
    };
    std::thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                while !args.is_over() && !enough() {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let done = under(args, || trial(number));
                    let mut sum = lock();
                    done.failures().iter().for_each(|f| println!("trial {number}: {f}"));
                    sum.add(done);
                }
            });
        }
    });
    (all.into_inner().unwrap_or_else(|e| e.into_inner()), start.elapsed().as_secs_f64())
}
