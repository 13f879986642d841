//! `adversary kill9`: servers killed under write load, on every kind of image; see [`ringblock_tests::kill9`].
//!
//! ```text
//!   --count cycles ─► one trial per kind of image and seed, --threads of them side by side ─► sums
//! ```
//!
//! `--case NAME --trial SEED` runs just one trial again. What is drawn repeats, the moment of a kill does not: a replay
//! may need several goes, so it takes `--count` cycles of that trial.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use ringblock_tests::kill9::{CASES, Case, SOON, Tally, Trial};

use crate::args::{Args, Progress};
use crate::panic_text;

/// Cycles of one trial: enough for an image to grow old.
const CYCLES: u64 = 12;

#[derive(Default)]
struct Sum {
    tally: Tally,
    violations: u64,
}

/// Runs the command. False if anything was lost or corrupt, or a restart took too long.
pub fn run(args: &[String]) -> bool {
    let parsed = Args::parse(args, 300, &["--case", "--trial"]).and_then(|args| Ok((trials(&args)?, args)));
    let (trials, args) = match parsed {
        Ok(parsed) => parsed,
        Err(e) => {
            eprintln!("adversary kill9: {e}");
            return false;
        }
    };
    let (sum, next, progress) = (Mutex::new(Sum::default()), AtomicU64::new(0), Progress::default());
    std::thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                while let Some(&(case, seed, cycles)) =
                    trials.get(next.fetch_add(1, Ordering::Relaxed) as usize)
                {
                    if args.is_over() {
                        return;
                    }
                    one(case, seed, cycles, &sum);
                    progress.tell(|| format!("kill9: {} cycles", lock(&sum).tally.cycles));
                }
            });
        }
    });
    let sum = lock(&sum);
    let t = &sum.tally;
    println!(
        "{} requests answered, {} of them made something durable; {} kills while starting, {} two in a row; {} images judged \
         by the peer as well",
        t.requests, t.flushes, t.while_starting, t.in_a_row, t.samples
    );
    println!(
        "proof: kill -9: {} cycles; lost flushed data, alien sectors, corrupt images {}; restarts over {} s {} (of {}, the longest \
         {} ms); {:.1} s",
        t.cycles,
        sum.violations,
        SOON.as_secs(),
        t.slow,
        t.restarts,
        t.longest.as_millis(),
        args.elapsed()
    );
    sum.violations == 0 && t.slow == 0 && t.cycles > 0
}

fn lock(sum: &Mutex<Sum>) -> std::sync::MutexGuard<'_, Sum> {
    sum.lock().unwrap_or_else(|e| e.into_inner())
}

/// What to run: a case, its seed, its cycles.
fn trials(args: &Args) -> Result<Vec<(&'static Case, u64, u64)>, String> {
    let case =
        args.own("--case").map(|name| Case::named(name).ok_or_else(|| format!("--case: no case {name:?}")));
    if let Some(seed) = args.own("--trial") {
        let seed = seed.parse().map_err(|_| format!("--trial: {seed:?} is no number"))?;
        let case = case.ok_or("--trial: needs --case")??;
        return Ok(vec![(case, seed, args.count)]);
    }
    let cases: Vec<&Case> = match case {
        Some(case) => vec![case?],
        None => CASES.iter().collect(),
    };
    // The last one takes what is left.
    let left = |i: u64| CYCLES.min(args.count - i * CYCLES);
    let trial = |i: u64| (cases[i as usize % cases.len()], args.seed << 20 ^ i, left(i));
    Ok((0..args.count.div_ceil(CYCLES)).map(trial).collect())
}

fn one(case: &'static Case, seed: u64, cycles: u64, sum: &Mutex<Sum>) {
    let tried = catch_unwind(AssertUnwindSafe(|| {
        let mut trial = Trial::new(case, seed);
        while trial.tally().cycles < cycles {
            trial.cycle().map_err(|e| (e, *trial.tally()))?;
        }
        let before = *trial.tally();
        trial.finish().map_err(|e| (e, before))
    }));
    let mut sum = lock(sum);
    let wrong = match tried {
        Ok(Ok(tally)) => return sum.tally.add(&tally),
        Ok(Err((e, tally))) => {
            sum.tally.add(&tally);
            e
        }
        Err(panic) => panic_text(&*panic),
    };
    sum.violations += 1;
    println!("VIOLATION: {}, trial {seed}: {wrong}", case.name);
    println!(
        "replay: cargo xtask adversary kill9 --case {} --trial {seed} --count {}",
        case.name,
        cycles * 10
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: `--count` is what is run, and a replay names its trial. Method: the list for several lines.
    #[test]
    fn counts() {
        let list = |line: &str| {
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            trials(&Args::parse(&words, 300, &["--case", "--trial"]).unwrap())
        };
        let all = list("--count 301").unwrap();
        assert_eq!(all.iter().map(|t| t.2).sum::<u64>(), 301);
        assert!(CASES.iter().all(|c| all.iter().any(|t| t.0.name == c.name)));
        let one = list("--case lazy --trial 7 --count 5").unwrap();
        assert_eq!((one.len(), one[0].0.name, one[0].1, one[0].2), (1, "lazy", 7, 5));
        assert!(list("--trial 7").is_err() && list("--case nope").is_err());
    }
}
