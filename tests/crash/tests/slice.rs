//! A slice of the crash states, small enough for every test run, and the runs that once showed something.

use ringblock_crash::cases::{cases, named};
use ringblock_crash::scenarios::SCENARIOS;
use ringblock_crash::work::{Plan, Work, plan};
use ringblock_crash::{Budget, Contract, examine, short};

/// Enumerates a plan and insists that nothing is found.
fn clean(plan: &Plan, states: u64) -> u64 {
    let budget = Budget { states, ..Budget::quick(plan.seed) };
    let (tally, failures) = examine(plan, &budget, &mut Contract::default());
    let said: Vec<String> = failures.iter().map(ToString::to_string).collect();
    assert!(tally.is_good() && said.is_empty(), "{}", said.join("\n"));
    tally.distinct
}

/// Goal: no state of a power cut is corrupt, has lost flushed data, or shows what was never written. Method: the first
/// plans of a seed, a few states of each.
#[test]
fn the_first_plans() {
    let states: u64 = (0..40).map(|i| clean(&plan(&cases(), i, 7), 150)).sum();
    assert!(states > 2000, "{states} states");
}

/// Goal: the same with every kind of image. Method: one run each.
#[test]
fn every_kind_of_image() {
    for case in cases() {
        let plan = Plan { case, work: Work::Guests, seed: 11 };
        clean(&plan, 60);
    }
}

/// Goal: the same after short sequences. Method: a few of each length.
#[test]
fn short_sequences() {
    for n in (0..short::COUNT).step_by(401).chain((short::COUNT..short::ALL).step_by(30_001)) {
        clean(&Plan { case: short::case(), work: Work::Short(n), seed: n.into() }, 100);
    }
}

/// Goal: a plan is a recording. Method: some are recorded twice.
#[test]
fn the_same_seed_is_the_same_recording() {
    for i in 0..16 {
        let plan = plan(&cases(), i, 3);
        assert!(plan.record().unwrap() == plan.record().unwrap(), "{plan}");
    }
}

/// Goal: without a mutant the scenarios for mutants are clean. Method: one run of each.
#[test]
fn scenarios_are_clean() {
    for scenario in SCENARIOS {
        let search = scenario.search(5, 1, None);
        assert!(search.found.is_none(), "{}: {}", scenario.name, search.found.unwrap());
    }
}

/// Goal: a creation that a power cut interrupts leaves no image, or the whole image. Method: every state of a few.
#[test]
fn interrupted_creation() {
    for name in ["512", "4k", "backed", "data-file", "subclusters"] {
        let case = named(name).unwrap();
        clean(&Plan { case, work: Work::Create, seed: 1 }, 2000);
    }
}
