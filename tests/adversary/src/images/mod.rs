//! `adversary images`: a thousand files made to harm whoever opens them, given to every command that opens images.
//!
//! ```text
//! fields ─┐
//! shapes ─┼─► cases by name ─► files ─► info check convert map read serve repair write ─► time, memory, opens, changes
//! names  ─┤                                                                                failure: the files, a command
//! seed   ─┘
//! ```
//!
//! All named cases always run where `--count` reaches them; what is left of it are mutations of the seed. `--case NAME` runs
//! that case, or those whose names begin so. `--trace N` traces every Nth case (default 20) besides those that name other files.

mod bench;
mod case;
mod fields;
mod forge;
mod names;
mod shapes;
mod trial;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use crate::args::{Args, Progress};
use bench::Bench;
use case::{Case, Named};
use trial::{Usual, Wrong};

/// What all cases showed together.
#[derive(Default)]
struct Sum {
    files: u64,
    runs: u64,
    traced: u64,
    refused: u64,
    time: u64,
    memory: u64,
    opens: u64,
    panics: u64,
    changed: u64,
    broken: u64,
    peak: u64,
    slowest: Duration,
}

impl Sum {
    fn add(&mut self, wrong: Wrong) {
        *match wrong {
            Wrong::Time => &mut self.time,
            Wrong::Memory => &mut self.memory,
            Wrong::Open => &mut self.opens,
            Wrong::Panic => &mut self.panics,
            Wrong::Change => &mut self.changed,
        } += 1;
    }

    fn clean(&self) -> bool {
        self.time + self.memory + self.opens + self.panics + self.changed + self.broken == 0 && self.runs > 0
    }
}

/// Every case that has a name: small ones first.
fn named() -> Vec<Named> {
    let mut all = names::all();
    all.extend(shapes::all());
    all.extend(fields::pokes());
    all
}

/// `count` cases: all that have names and mutations; an even choice of the named ones where they are too many.
fn chosen(count: u64, seed: u64) -> Vec<Named> {
    let all = named();
    let n = all.len() as u64;
    if count >= n {
        let mutations = (0..count - n).map(|i| fields::mutation(seed, i));
        return all.into_iter().chain(mutations).collect();
    }
    let wanted = |i: u64| (i * count / n) != ((i + 1) * count / n);
    all.into_iter().enumerate().filter(|(i, _)| wanted(*i as u64)).map(|(_, c)| c).collect()
}

/// The cases that a name stands for.
fn replayed(name: &str) -> Vec<Named> {
    if let Some((seed, n)) = name.strip_prefix("mutation-").and_then(|rest| {
        let mut parts = rest.rsplit('-');
        let n = parts.next()?.parse().ok()?;
        Some((parts.next()?.parse().ok()?, n))
    }) {
        return vec![fields::mutation(seed, n)];
    }
    let exact = named().iter().any(|c| c.name == name);
    named().into_iter().filter(|c| if exact { c.name == name } else { c.name.starts_with(name) }).collect()
}

/// Runs the command. False if any rule was broken.
pub fn run(args: &[String]) -> bool {
    let args = match Args::parse(args, 1_000, &["--case", "--trace"]) {
        Ok(args) => args,
        Err(e) => {
            eprintln!("adversary images: {e}");
            return false;
        }
    };
    let cases = match args.own("--case") {
        Some(name) => replayed(name),
        None => chosen(args.count, args.seed),
    };
    let every = args.own("--trace").and_then(|n| n.parse().ok()).unwrap_or(20);
    let sum = all(&cases, every, &args);
    println!(
        "{} runs refused the image, {} runs were traced; slowest {:.2} s, most memory {} MiB",
        sum.refused,
        sum.traced,
        sum.slowest.as_secs_f64(),
        sum.peak >> 20
    );
    println!(
        "proof: hostile images: {} files, {} runs; over time {}, over memory {}, foreign opens {}, panics {}, changed {}; {:.1} s",
        sum.files,
        sum.runs,
        sum.time,
        sum.memory,
        sum.opens,
        sum.panics,
        sum.changed,
        args.elapsed()
    );
    sum.clean()
}

/// Runs cases on some threads.
fn all(cases: &[Named], every: usize, args: &Args) -> Sum {
    let (next, sum, progress) = (AtomicU64::new(0), Mutex::new(Sum::default()), Progress::default());
    std::thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                let worked = worker(cases, every, args, &next, &sum, &progress);
                if let Err(e) = worked {
                    println!("BROKEN: {e}");
                    lock(&sum).broken += 1;
                }
            });
        }
    });
    sum.into_inner().unwrap_or_else(|e| e.into_inner())
}

fn lock(sum: &Mutex<Sum>) -> MutexGuard<'_, Sum> {
    sum.lock().unwrap_or_else(|e| e.into_inner())
}

/// A folder that goes away with its worker.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        Scratch(parent.join(format!("rbh-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is no business of a case.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn worker(
    cases: &[Named],
    every: usize,
    args: &Args,
    next: &AtomicU64,
    sum: &Mutex<Sum>,
    progress: &Progress,
) -> Result<(), String> {
    let scratch = Scratch::new();
    let mut bench = Bench::new(&scratch.0)?;
    let usual = usual(&mut bench)?;
    loop {
        let i = next.fetch_add(1, Ordering::Relaxed) as usize;
        let Some(case) = cases.get(i).filter(|_| !args.is_over()) else { return Ok(()) };
        let case = case.make(&bench.ground);
        let trace = case.traced || (every > 0 && i.is_multiple_of(every));
        let seen = trial::run(&case, &mut bench, &usual, trace)?;
        let mut s = lock(sum);
        s.files += 1;
        s.runs += seen.runs;
        s.traced += seen.traced;
        s.refused += seen.refused;
        s.peak = s.peak.max(seen.peak);
        s.slowest = s.slowest.max(seen.slowest);
        for fault in &seen.faults {
            s.add(fault.kind);
            println!("FOUND: {:?}: {}: {}", fault.kind, case.name, fault.text);
        }
        if !seen.faults.is_empty() {
            keep(&case);
        }
        progress.tell(|| format!("images: {} files, {} runs", s.files, s.runs));
    }
}

/// What the programs open for a good image, other files of the case left out: libraries and the like.
fn usual(bench: &mut Bench) -> Result<Usual, String> {
    let mut good = Case::qcow2("good", forge::Forge::new(12).build().bytes);
    good.traced = true;
    // the C library's, when it gives memory back
    let mut usual = Usual::from([PathBuf::from("/proc/sys/vm/overcommit_memory")]);
    for format in [Some("qcow2"), None, Some("raw")] {
        good.format = format;
        let seen = trial::run(&good, bench, &Usual::new(), true)?;
        // all that is foreign to an image that names nothing
        usual.extend(seen.faults.iter().filter(|f| f.kind == Wrong::Open).flat_map(|f| quoted(&f.text)));
    }
    Ok(usual)
}

fn quoted(text: &str) -> Vec<PathBuf> {
    text.lines().next().unwrap_or("").split('"').skip(1).step_by(2).map(PathBuf::from).collect()
}

/// Saves the files of a case that found something, and says how to run it again.
fn keep(case: &Case) {
    let name: String = case.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let dir = std::env::temp_dir().join("ringblock-hostile-images").join(name);
    let _ = std::fs::remove_dir_all(&dir);
    let kept = std::fs::create_dir_all(&dir).and_then(|()| case.lay(&dir));
    match kept {
        Ok(()) => println!("files: {}", dir.display()),
        Err(e) => println!("files could not be kept: {}: {e}", dir.display()),
    }
    println!("replay: cargo xtask adversary images --case {}", case.name);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Goal: the corpus is as large as it is said to be. Method: count the names.
    #[test]
    fn corpus() {
        let names: BTreeSet<String> = named().into_iter().map(|c| c.name).collect();
        assert_eq!(names.len(), named().len(), "each name once");
        assert!(names.len() > 700, "{}", names.len());
        assert_eq!(chosen(40, 1).len(), 40);
        assert_eq!(chosen(5_000, 1).len(), 5_000);
    }

    /// Goal: what did harm once does none any more. Method: the cases that did: chains whose permissions were worked out over
    /// and over, tables read as often as they were named, counters for the holes of a file, names that `info` followed,
    /// flags of a table that is not there, repairs that were given up half-way.
    #[test]
    fn regressions() {
        for name in [
            "chain/deep-100",
            "fan/l1-4k",
            "fan/snapshots-deep",
            "fan/bitmaps-many",
            "sparse/qcow2-9-50",
            "name/backing-guess/json-short",
            "v3/l1-0=0x8100000000000000",
            "ext/l1-0=0x8000000000000000",
            "dirty/bitmap-table-offset=0xd000",
            "dirty/l1-0",
        ] {
            assert!(run(&["--case", name, "--trace", "0"].map(str::to_owned)), "{name}");
        }
    }

    /// Goal: a slice of the hostile images harms nobody. Method: some of each kind, all commands.
    #[test]
    fn slice() {
        let words = ["--count", "16", "--trace", "8"].map(str::to_owned);
        assert!(run(&words));
    }
}
