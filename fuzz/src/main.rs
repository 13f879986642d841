//! `cargo xtask fuzz COMMAND`: the targets under the mutator of this crate. See VERIFICATION.md.
//!
//! ```text
//!   run     [--target T] [--count N] [--seed S] [--seconds S] [--threads N]
//!   replay  [--target T] FILE…       the target is the name of the file's folder, if it is not given
//!   gather  [--target T] FOLDER…     adds what shows something new to the corpus (FOLDER/T if there is such a folder)
//!   list
//! ```
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ringblock_engine::heap::Counting;
use ringblock_fuzz::campaign::{self, Bench, Finding, Plan, Tally};
use ringblock_fuzz::{TARGETS, Target, corpus, find};

#[global_allocator]
static HEAP: Counting = Counting;

/// An execution that takes so long will not end.
const STUCK: Duration = Duration::from_secs(30);

/// What the user asks for.
struct Args {
    target: Option<&'static Target>,
    count: u64,
    seed: u64,
    seconds: Option<u64>,
    threads: u64,
    paths: Vec<PathBuf>,
}

fn parse(args: &[String]) -> Result<Args, String> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let mut out =
        Args { target: None, count: 200_000, seed: 1, seconds: None, threads: cores, paths: vec![] };
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let Some(name) = arg.strip_prefix("--") else {
            out.paths.push(arg.into());
            continue;
        };
        let value = rest.next().ok_or_else(|| format!("--{name} needs a value"))?;
        let number = || value.parse::<u64>().map_err(|_| format!("--{name}: '{value}' is no number"));
        match name {
            "target" => {
                out.target = Some(find(value).ok_or_else(|| format!("--target: there is no '{value}'"))?);
            }
            "count" => out.count = number()?,
            "seed" => out.seed = number()?,
            "seconds" => out.seconds = Some(number()?),
            "threads" => out.threads = number()?.clamp(1, 64),
            _ => return Err(format!("there is no option --{name}")),
        }
    }
    Ok(out)
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let command = args.first().map_or("", String::as_str);
    let parsed = parse(args.get(1..).unwrap_or_default());
    let done = match (command, parsed) {
        ("list", _) => {
            TARGETS.iter().for_each(|t| println!("{}", t.name));
            Ok(true)
        }
        ("run", Ok(args)) => Ok(run(&args)),
        ("replay", Ok(args)) => replay(&args),
        ("gather", Ok(args)) => gather(&args),
        (_, Err(why)) => Err(why),
        _ => Err("one of: run, replay, gather, list".into()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("fuzz: {why}");
            ExitCode::from(2)
        }
    }
}

/// The target of an input, by the folder in which it lies.
fn target_of(path: &Path, args: &Args) -> Result<&'static Target, String> {
    let folder = path.parent().and_then(Path::file_name).and_then(|n| n.to_str());
    let found = args.target.or_else(|| find(folder?));
    found.ok_or_else(|| format!("{}: for which target? Say --target", path.display()))
}

fn replay(args: &Args) -> Result<bool, String> {
    let mut good = true;
    for path in &args.paths {
        let target = target_of(path, args)?;
        let input = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        match campaign::execute(target, &input) {
            Ok((outcome, time, memory)) => println!(
                "{}: ok, {} features, {:.1} ms, {} KiB",
                path.display(),
                outcome.features.len(),
                time.as_secs_f64() * 1e3,
                memory >> 10
            ),
            Err(what) => {
                println!("{}: {what}", path.display());
                good = false;
            }
        }
    }
    Ok(good)
}

fn gather(args: &Args) -> Result<bool, String> {
    for target in chosen(args) {
        let mut inputs = Vec::new();
        for path in &args.paths {
            let own = path.join(target.name);
            let folder = if own.is_dir() { &own } else { path };
            if own.is_dir() || args.target.is_some() {
                inputs.extend(corpus::read(folder).into_iter().map(|(_, input)| input));
            }
        }
        let n = inputs.len();
        inputs.retain(|i| i.len() <= target.longest && campaign::execute(target, i).is_ok());
        let (count, bytes) = corpus::gather(target, inputs).map_err(|e| e.to_string())?;
        println!("{:<18} {n:>7} looked at, {count:>5} kept, {bytes:>7} bytes", target.name);
    }
    Ok(true)
}

fn chosen(args: &Args) -> Vec<&'static Target> {
    TARGETS.iter().filter(|t| args.target.is_none_or(|only| only.name == t.name)).collect()
}

/// All campaigns, one target after another, each on all threads.
fn run(args: &Args) -> bool {
    let targets = chosen(args);
    let all: u64 = targets.iter().map(|t| t.share).sum();
    println!(
        "{:<18} {:>11} {:>9} {:>7} {:>9} {:>8} {:>10} {:>9} {:>7}",
        "target", "executions", "seconds", "corpus", "features", "1/s", "slowest ms", "most KiB", "crashes"
    );
    let (mut executions, mut crashes) = (0, 0);
    for target in &targets {
        let count = (args.count * target.share).div_ceil(all.max(1));
        let time = args.seconds.map(|s| Duration::from_secs(s) / targets.len() as u32);
        let begun = Instant::now();
        let tally = on_threads(target, args, count, time.map(|t| begun + t));
        let seconds = begun.elapsed().as_secs_f64();
        println!(
            "{:<18} {:>11} {:>9.1} {:>7} {:>9} {:>8.0} {:>10.1} {:>9} {:>7}",
            target.name,
            tally.executions,
            seconds,
            tally.corpus,
            tally.features.len(),
            tally.executions as f64 / seconds.max(1e-3),
            tally.slowest.as_secs_f64() * 1e3,
            tally.largest >> 10,
            tally.findings.len()
        );
        executions += tally.executions;
        crashes += tally.findings.len();
        tally.findings.iter().for_each(|f| report(target, f));
    }
    println!("proof: fuzz executions: {executions}; open crashes {crashes}; targets {}", targets.len());
    crashes == 0
}

/// One target's campaign, in parts, with somebody watching for executions that do not end.
fn on_threads(target: &'static Target, args: &Args, count: u64, until: Option<Instant>) -> Tally {
    let benches: Vec<Arc<Bench>> = (0..args.threads).map(|_| Arc::default()).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| watch(target, &benches, &over));
        let parts: Vec<_> = (0..args.threads)
            .map(|i| {
                let own = count / args.threads + u64::from(i < count % args.threads);
                let seed = args.seed.wrapping_mul(0x1_0001).wrapping_add(i);
                let plan = Plan { count: own, seed, until };
                let bench = benches[i as usize].clone();
                scope.spawn(move || campaign::run(target, &plan, &bench))
            })
            .collect();
        let mut tally = Tally::default();
        for part in parts {
            match part.join() {
                Ok(part) => tally.add(part),
                Err(_) => {
                    tally.findings.push(Finding { what: "the campaign panicked".into(), input: vec![] })
                }
            }
        }
        over.store(true, Ordering::Relaxed);
        tally
    })
}

fn watch(target: &Target, benches: &[Arc<Bench>], over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(20));
        if let Some(input) = benches.iter().find_map(|b| b.stuck(STUCK)) {
            report(target, &Finding { what: format!("no end after {} s", STUCK.as_secs()), input });
            println!("proof: fuzz executions: 0; open crashes 1; stopped");
            std::process::exit(1);
        }
    }
}

/// Prints a finding and keeps its input where `replay` finds it.
fn report(target: &Target, finding: &Finding) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("artifacts").join(target.name);
    let path = folder.join(corpus::name(&finding.input));
    let saved = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&path, &finding.input));
    println!("  {}: {}", target.name, finding.what);
    match saved {
        Ok(()) => println!("  replay: cargo xtask fuzz replay {}", path.display()),
        Err(e) => println!("  its input could not be kept ({e}): {:02x?}", finding.input),
    }
}
