//! Looking for a failure: plans recorded and enumerated until one is found or the budget is spent.
//!
//! Everything happens on the calling thread, so a switch that is local to the thread (an ordering mutant) is in force.

use std::time::Instant;

use crate::cases::Case;
use crate::enumerate::{Budget, Tally, enumerate};
use crate::judge::{Bad, Contract, Judge};
use crate::spot::{self, Spot};
use crate::work::{Plan, plan};

/// Something that must not be.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The run.
    pub plan: Plan,
    /// The state; none where the run itself went wrong.
    pub spot: Option<Spot>,
    /// What is wrong.
    pub bad: Bad,
    /// States looked at until then.
    pub states: u64,
    /// The changes that landed, in words.
    pub landed: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.bad)?;
        write!(f, "{}  cargo xtask crash replay {}", self.landed, self.plan)?;
        match &self.spot {
            Some(spot) => write!(f, " --state {spot}"),
            None => Ok(()),
        }
    }
}

/// Failures of runs with larger files are not made smaller.
const LARGE: usize = 1 << 20;

/// Records a plan and enumerates it; what is found is made smaller.
pub fn examine(plan: &Plan, budget: &Budget, judge: &mut dyn Judge) -> (Tally, Vec<Failure>) {
    let recording = match plan.record() {
        Ok(recording) => recording,
        Err(text) => {
            let failure = Failure {
                plan: plan.clone(),
                spot: None,
                bad: Bad::Panic(text),
                states: 0,
                landed: String::new(),
            };
            return (Tally { corrupt: 1, ..Tally::default() }, vec![failure]);
        }
    };
    let tally = enumerate(&recording, budget, judge);
    // of large files every look takes long
    let small = recording.files.iter().all(|(_, content)| content.len() <= LARGE);
    let shrunk = tally.failures.iter().map(|found| {
        let (spot, bad) = match small {
            true => spot::shrink(&recording, found.clone(), judge),
            false => found.clone(),
        };
        let landed = spot::describe(&recording, &spot);
        Failure { plan: plan.clone(), spot: Some(spot), bad, states: tally.distinct, landed }
    });
    let failures = shrunk.collect();
    (tally, failures)
}

/// Plans of these cases, from a seed, until something is found, `states` states were looked at, or the time is over.
pub fn hunt(cases: &[Case], seed: u64, states: u64, until: Option<Instant>) -> Option<Failure> {
    let mut judge = Contract::default();
    let mut done = 0;
    let mut i = 0;
    while done < states && until.is_none_or(|t| Instant::now() < t) {
        let plan = plan(cases, i, seed);
        let budget = Budget { first: true, until, states: states - done, ..Budget::quick(plan.seed) };
        let (tally, failures) = examine(&plan, &budget, &mut judge);
        done += tally.distinct;
        i += 1;
        if let Some(mut failure) = failures.into_iter().next() {
            failure.states = done;
            return Some(failure);
        }
    }
    None
}
