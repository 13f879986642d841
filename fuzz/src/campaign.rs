//! A campaign against one target on one thread: the corpus first, then mutants of whatever showed something new.
//!
//! Invariants: the same seed and corpus give the same executions (unless the target has threads of its own); an execution
//! that panics or is over its bounds is a [`Finding`] with its input, and ends nothing.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ringblock_crash::quietly;
use ringblock_engine::heap::Counting;

use crate::mutate::Mutator;
use crate::{Outcome, Target, corpus};

/// What one execution may take, alone on its core.
pub const TIME: Duration = Duration::from_secs(1);
/// Bytes that one execution may have allocated at the same time, where the program counts them (see [`Counting`]).
pub const MEMORY: u64 = 256 << 20;
/// Inputs that one campaign keeps.
const KEPT: usize = 4096;

/// How much to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Executions, the corpus among them.
    pub count: u64,
    /// Where mutants come from.
    pub seed: u64,
    /// When to stop in any case.
    pub until: Option<Instant>,
}

/// An input that broke a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which rule.
    pub what: String,
    /// The input.
    pub input: Vec<u8>,
}

/// What a campaign did.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Executions.
    pub executions: u64,
    /// Inputs in the corpus at the end.
    pub corpus: usize,
    /// Different things that were seen to happen.
    pub features: HashSet<u64>,
    /// Inputs that broke a rule; of each rule only the first.
    pub findings: Vec<Finding>,
    /// The longest execution.
    pub slowest: Duration,
    /// The most bytes of one execution.
    pub largest: u64,
}

impl Tally {
    /// Both together.
    pub fn add(&mut self, other: Tally) {
        self.executions += other.executions;
        self.corpus = self.corpus.max(other.corpus);
        self.features.extend(other.features);
        self.findings.extend(other.findings);
        self.slowest = self.slowest.max(other.slowest);
        self.largest = self.largest.max(other.largest);
    }
}

/// What a thread is working on, for somebody who watches over it.
#[derive(Debug, Default)]
pub struct Bench(Mutex<Option<(Instant, Vec<u8>)>>);

impl Bench {
    fn lock(&self) -> MutexGuard<'_, Option<(Instant, Vec<u8>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The input that has been worked on for longer than this.
    pub fn stuck(&self, longer: Duration) -> Option<Vec<u8>> {
        self.lock().as_ref().filter(|(since, _)| since.elapsed() > longer).map(|(_, input)| input.clone())
    }

    fn begin(&self, input: &[u8]) {
        match &mut *self.lock() {
            Some((since, held)) => {
                *since = Instant::now();
                held.clear();
                held.extend_from_slice(input);
            }
            none => *none = Some((Instant::now(), input.to_vec())),
        }
    }

    fn end(&self) {
        *self.lock() = None;
    }
}

/// How long the calling thread has run on a processor.
fn own_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(Duration::from_nanos(text.split_whitespace().next()?.parse().ok()?))
}

/// One execution, measured.
///
/// # Errors
/// The rule that it broke.
pub fn execute(target: &Target, input: &[u8]) -> Result<(Outcome, Duration, u64), String> {
    let begun = Instant::now();
    let (outcome, memory) = Counting::peak_of(|| quietly(|| (target.run)(input)));
    let (outcome, mut time) = (outcome?, begun.elapsed());
    if time > TIME {
        // The thread may have been kept waiting by others: what counts is its own time, when it is done again.
        let (begun, own) = (Instant::now(), own_time());
        quietly(|| (target.run)(input))?;
        time = begun.elapsed();
        if let (Some(before), Some(after)) = (own, own_time()) {
            time = (after - before).max(time / 10);
        }
    }
    if time > TIME {
        return Err(format!("over time: {:.1} s", time.as_secs_f64()));
    }
    if memory > MEMORY {
        return Err(format!("over memory: {} MiB", memory >> 20));
    }
    Ok((outcome, time, memory))
}

/// Runs a campaign.
pub fn run(target: &Target, plan: &Plan, bench: &Bench) -> Tally {
    let mut tally = Tally::default();
    let start = corpus::start(target);
    let mut inputs: Vec<Vec<u8>> = start.clone();
    let mut mutator = Mutator::new(plan.seed, target.words, target.longest);
    let mut data = Vec::new();
    let mut told = HashSet::new();
    for i in 0..plan.count {
        if plan.until.is_some_and(|t| i % 16 == 0 && Instant::now() >= t) {
            break;
        }
        match start.get(i as usize) {
            Some(input) => data.clone_from(input),
            None => mutator.next(&inputs, &mut data),
        }
        bench.begin(&data);
        tally.executions += 1;
        match execute(target, &data) {
            Ok((outcome, time, memory)) => {
                tally.slowest = tally.slowest.max(time);
                tally.largest = tally.largest.max(memory);
                let seen = tally.features.len();
                tally.features.extend(outcome.features);
                let is_new = tally.features.len() > seen && i >= start.len() as u64;
                if is_new && inputs.len() < KEPT {
                    inputs.push(data.clone());
                }
            }
            Err(what) => {
                let kind: String = what.chars().filter(|c| !c.is_ascii_digit()).take(120).collect();
                if told.insert(kind) {
                    tally.findings.push(Finding { what, input: data.clone() });
                }
            }
        }
    }
    bench.end();
    tally.corpus = inputs.len();
    tally
}
