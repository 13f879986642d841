//! `adversary linear`: what many clients on many cores see of one disk is what some order of their requests explains.
//!
//! ```text
//!   simulator ─┐
//!   real ring ─┼─► histories ─► one register per cell ─► linearizable?        violation: the cell's story, a seed
//!   NBD ───────┘
//! ```
//!
//! `--source sim|real|nbd` takes only that source; `--session SEED` runs just one of its sessions again.

mod client;
pub mod history;
mod nbd;
mod real;
pub mod register;
mod session;
pub mod shape;
pub mod sim;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use ringblock_engine::host::sim::Rng;

use crate::args::{Args, Progress};
use history::Looked;
use shape::Shape;

/// What all sessions showed together.
#[derive(Default)]
struct Sum {
    looked: Looked,
    sessions: u64,
    disturbances: u64,
    violations: u64,
}

/// A source of histories: its name, its part of the operations (percent), requests of one session.
const SOURCES: [(&str, u64, u64); 3] =
    [("sim", 65, sim::REQUESTS), ("real", 20, real::REQUESTS), ("nbd", 15, nbd::REQUESTS)];

/// Runs the command. False if a history was not linearizable, or a session did not end as it should.
pub fn run(args: &[String]) -> bool {
    let args = match Args::parse(args, 1_000_000, &["--source", "--session"]) {
        Ok(args) => args,
        Err(e) => {
            eprintln!("adversary linear: {e}");
            return false;
        }
    };
    let (sum, progress) = (Mutex::new(Sum::default()), Progress::default());
    let only = args.own("--source");
    for (name, percent, requests) in SOURCES {
        if only.is_some_and(|o| o != name) {
            continue;
        }
        let part = if only.is_some() { args.count } else { args.count * percent / 100 };
        let seeds: Vec<u64> = match args.own("--session").map(str::parse) {
            Some(Ok(seed)) => vec![seed],
            Some(Err(_)) => Vec::new(),
            None => (0..part.div_ceil(requests)).map(|i| session_seed(args.seed, i)).collect(),
        };
        source(name, &seeds, &args, &sum, &progress);
    }
    let s = lock(&sum);
    println!(
        "{} sessions, {} disturbances, {} operations on cells, {} failed or unanswered, {} torn by the page cache",
        s.sessions, s.disturbances, s.looked.events, s.looked.unsure, s.looked.torn
    );
    println!(
        "proof: linearizability: {} operations; violations {}; {:.1} s",
        s.looked.ops,
        s.violations,
        args.elapsed()
    );
    s.violations == 0 && s.looked.ops > 0
}

fn session_seed(seed: u64, i: u64) -> u64 {
    Rng::new(seed << 32 ^ i).next() >> 16
}

fn lock(sum: &Mutex<Sum>) -> MutexGuard<'_, Sum> {
    sum.lock().unwrap_or_else(|e| e.into_inner())
}

/// Runs sessions of one source.
fn source(name: &str, seeds: &[u64], args: &Args, sum: &Mutex<Sum>, progress: &Progress) {
    let next = AtomicU64::new(0);
    let threads = if name == "sim" { args.threads } else { 1 };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut engine = None;
                while let Some(&seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    if args.is_over() {
                        return;
                    }
                    let result = match name {
                        "sim" => {
                            sim::run(Shape::of(seed), seed, sim::REQUESTS).map(|s| (s.looked, s.disturbances))
                        }
                        "real" => on_ring(&mut engine, seed),
                        _ => nbd::run(seed),
                    };
                    note(name, seed, result, sum);
                    progress.tell(|| format!("linear: {name}: {} operations", lock(sum).looked.ops));
                }
            });
        }
    });
}

fn on_ring(engine: &mut Option<ringblock_engine::Engine>, seed: u64) -> Result<(Looked, u64), String> {
    if engine.is_none() {
        *engine = Some(real::engine(3)?);
    }
    engine.as_ref().map_or_else(|| Err("no engine".into()), |e| real::run(e, seed))
}

fn note(name: &str, seed: u64, result: Result<(Looked, u64), String>, sum: &Mutex<Sum>) {
    let mut s = lock(sum);
    s.sessions += 1;
    match result {
        Ok((looked, disturbances)) => {
            s.disturbances += disturbances;
            s.looked.ops += looked.ops;
            s.looked.events += looked.events;
            s.looked.torn += looked.torn;
            s.looked.unsure += looked.unsure;
        }
        Err(e) => {
            s.violations += 1;
            println!("VIOLATION: {name}, session {seed} ({}): {e}", Shape::of(seed).describe());
            println!("replay: cargo xtask adversary linear --source {name} --session {seed}");
        }
    }
}
