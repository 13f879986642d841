//! `crash log`: crash states of runs on the real ring, from logs that `blklogwrites` wrote.
//!
//! ```text
//!   crash log --count N                     N runs of the daemon under load (see `live`), each enumerated and judged
//!   crash log FILE --base IMAGE             a log of a run that began with IMAGE, ours or another program's
//!             [--image RESULT]              and what replaying all of it gives must be RESULT
//! ```
//!
//! Where the guests of a run are known, states are judged by the whole contract: the image is sound and each sector has a
//! permitted value. Of any other log only the image is judged; what a flush covered is there in every state, for the states
//! are made so.

mod live;
mod replay;

use std::path::Path;

use ringblock_checker::Checker;
use ringblock_engine::host::sim::Event;

use crate::args::Args;
use crate::enumerate::{Budget, Tally, enumerate};
use crate::judge::{Bad, Contract, Good, Judge, State};
use crate::record::Recording;

/// Fewer states at each moment than of simulated runs, which cost nothing to make: all moments of a run are to be seen.
fn budget(seed: u64, args: &Args) -> Budget {
    Budget { bits: 6, random: 40, pairs: 20, until: args.until, ..Budget::quick(seed) }
}

/// Judges the image alone.
#[derive(Default)]
struct Sound(Checker);

impl Judge for Sound {
    fn judge(&mut self, state: &State<'_>) -> Result<Good, Bad> {
        let report = self.0.check(&state.of_image());
        if !report.is_sound() && !report.dirty || report.refused {
            return Err(Bad::Corrupt(report.explain().replace('\n', ";")));
        }
        Ok(Good { leaks: report.leaks, dirty: report.dirty && !report.is_sound() })
    }
}

/// `crash log`.
pub fn log(args: &[String]) -> bool {
    let result = match args.first().filter(|a| !a.starts_with("--")) {
        Some(file) => Args::parse(&args[1..], 0).and_then(|a| one(file, &a)),
        None => Args::parse(args, 12).and_then(|a| runs(&a)),
    };
    result.unwrap_or_else(|why| {
        eprintln!("crash: {why}");
        false
    })
}

/// Runs of the daemon.
fn runs(args: &Args) -> Result<bool, String> {
    let (mut all, mut logs, mut entries, mut flushes, mut requests) = (Tally::default(), 0, 0, 0, 0);
    let mut broken = 0;
    for seed in args.seed..args.seed.saturating_add(args.count.max(1)) {
        if args.is_over() {
            break;
        }
        let run = match live::run(seed) {
            Ok(run) => run,
            Err(why) => {
                println!("run {seed}: {why}\n  cargo xtask crash log --seed {seed} --count 1");
                broken += 1;
                continue;
            }
        };
        let tally = enumerate(&run.recording, &budget(seed, args), &mut Contract::default());
        for (spot, bad) in &tally.failures {
            println!("run {seed}, state {spot}: {bad}");
            print!("{}", crate::spot::describe(&run.recording, spot));
        }
        if logs == 0 && forgetful(&run.recording, seed).is_good() {
            println!("run {seed}: nothing was found on a disk that ignores flushes");
            broken += 1;
        }
        logs += 1;
        entries += run.log.items.len();
        flushes += run.log.flushes();
        requests += run.requests;
        all.add(&tally);
    }
    eprintln!(
        "{requests} requests of guests, {entries} entries, {flushes} flushes; {} cuts, at most {} writes open",
        all.cuts, all.widest
    );
    println!(
        "proof: recorded runs: {logs} logs, {} states; corrupt {}; flushed data lost {}; alien sectors {}; broken runs {broken}",
        all.distinct, all.corrupt, all.lost, all.alien
    );
    Ok(all.is_good() && broken == 0 && logs > 0)
}

/// What is found if the same run's disk had ignored all flushes: the judges must see that.
fn forgetful(recording: &Recording, seed: u64) -> Tally {
    let mut recording = recording.clone();
    recording.events.retain(|e| !matches!(e, Event::FlushSubmitted { .. } | Event::FlushCompleted { .. }));
    enumerate(&recording, &Budget { first: true, ..Budget::quick(seed) }, &mut Contract::default())
}

/// A log that is there.
fn one(file: &str, args: &Args) -> Result<bool, String> {
    let read = |path: &str| std::fs::read(Path::new(path)).map_err(|e| format!("{path}: {e}"));
    let base = read(args.get("base").ok_or("--base is missing: the image as it was when the log began")?)?;
    let log = replay::Log::parse(&read(file)?)?;
    let mut good = true;
    if let Some(path) = args.get("image") {
        good = log.image(&base) == read(path)?;
        println!("replayed: {}", if good { "the same image" } else { "another image" });
    }
    let recording = log.recording(base, 0, &[]);
    let budget = Budget { until: args.until, ..Budget::quick(args.seed) };
    let tally = enumerate(&recording, &budget, &mut Sound::default());
    for (spot, bad) in &tally.failures {
        println!("state {spot}: {bad}");
        print!("{}", crate::spot::describe(&recording, spot));
    }
    eprintln!("{} entries, {} flushes, {} cuts", log.items.len(), log.flushes(), tally.cuts);
    println!("proof: recorded runs: 1 logs, {} states; corrupt {}", tally.distinct, tally.corrupt);
    Ok(good && tally.is_good())
}
