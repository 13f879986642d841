//! `cargo xtask prove`: every adversary of VERIFICATION.md in a row, and the figures they print.
//!
//! ```text
//!   build (profile "proof", mutants in) ─► crash … ─► adversary … ─► fuzz … ─► the lines "proof: …" as one table
//! ```
//!
//! Invariants: an adversary that prints no figure has failed, whatever its exit code; one that fails does not keep the
//! others from running.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use crate::steps::{Counts, Places};

/// An adversary: the program, its command (with options, if any), and how many cases it takes here and when there is time.
struct Adversary {
    program: &'static str,
    command: &'static str,
    count: u64,
    long: Option<u64>,
}

impl Adversary {
    /// Whether it is asked for by this name: its program's, or its command's.
    fn is(&self, name: &str) -> bool {
        self.program == name || self.command.split_whitespace().next() == Some(name)
    }
}

const fn adversary(program: &'static str, command: &'static str, count: u64, long: Option<u64>) -> Adversary {
    Adversary { program, command, count, long }
}

/// In the order of the table of figures.
const ADVERSARIES: &[Adversary] = &[
    adversary("crash", "states", 1_000_000, Some(100_000_000)),
    adversary("crash", "states --case short", 0, None),
    adversary("crash", "lazy", 50_000, Some(1_000_000)),
    adversary("crash", "repair", 50_000, Some(1_000_000)),
    adversary("crash", "mutants", 0, None),
    adversary("crash", "agree", 2_000, Some(20_000)),
    adversary("crash", "seeds", 100, None),
    adversary("crash", "log", 40, Some(1_000)),
    adversary("adversary", "faults", 5_000, None),
    adversary("adversary", "linear", 1_000_000, Some(100_000_000)),
    adversary("adversary", "model", 0, None),
    adversary("adversary", "images", 1_000, None),
    adversary("adversary", "clients", 10_000, None),
    adversary("adversary", "kill9", 300, Some(5_000)),
    adversary("fuzz", "run", 2_000_000, Some(500_000_000)),
];

/// Those that still find something: `clients`, and the long form of the fuzz targets, which the tests run in small.
const OPEN: [&str; 2] = ["clients", "run"];

/// The packages of the programs.
const PACKAGES: [&str; 4] = ["ringblock", "ringblock-crash", "ringblock-adversary", "ringblock-fuzz"];

/// Builds the programs with all assertions and the ordering mutants, which are off unless asked for.
pub(crate) fn build(places: &Places) -> Result<(), String> {
    let mut cargo = places.cargo("build --locked --profile proof");
    cargo.args(PACKAGES.iter().flat_map(|p| ["--package", p]));
    cargo.args(["--features", "ringblock-crash/mutants"]);
    match cargo.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("cargo build: {status}")),
        Err(e) => Err(format!("cargo build: {e}")),
    }
}

/// A program of profile "proof", with what the programs look for in the environment.
fn program(places: &Places, name: &str) -> Command {
    let folder = places.target.join("proof");
    let mut command = Command::new(folder.join(name));
    command.current_dir(&places.root).env("RINGBLOCK_BIN", folder.join("ringblock"));
    command.env("RINGBLOCK_PYTHON", crate::install::venv_python(places));
    command
}

/// `cargo xtask crash …`, `cargo xtask adversary …`, `cargo xtask fuzz …`: one program with these arguments.
pub(crate) fn one(name: &str, args: &[&str]) -> ExitCode {
    let places = Places::find();
    let ran = build(&places)
        .and_then(|()| program(&places, name).args(args).status().map_err(|e| format!("{name}: {e}")));
    match ran {
        Ok(status) => ExitCode::from(status.code().map_or(1, |c| c as u8)),
        Err(why) => {
            eprintln!("xtask: {why}");
            ExitCode::FAILURE
        }
    }
}

/// `cargo xtask prove`: all of them, or those of these names.
pub(crate) fn all(long: bool, wanted: &[&str]) -> ExitCode {
    let unknown = wanted.iter().find(|w| ADVERSARIES.iter().all(|a| !a.is(w)));
    if let Some(unknown) = unknown {
        eprintln!("xtask: there is no adversary {unknown:?}");
        return ExitCode::from(2);
    }
    let places = Places::find();
    let result = build(&places).and_then(|()| run(&places, long, wanted));
    match result {
        Ok(_) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("xtask: {why}");
            ExitCode::FAILURE
        }
    }
}

/// The step of `cargo xtask test`, whose step `build` has built the programs.
pub(crate) fn step(places: &Places) -> Result<Counts, String> {
    let of_the_tests = |a: &&Adversary| !OPEN.contains(&a.command);
    let wanted: Vec<&str> =
        ADVERSARIES.iter().filter(of_the_tests).filter_map(|a| a.command.split_whitespace().next()).collect();
    println!(
        "not among the tests, as they still find something: adversary clients, fuzz run (VERIFICATION.md, \"Open\")"
    );
    run(places, false, &wanted)
}

fn run(places: &Places, long: bool, wanted: &[&str]) -> Result<Counts, String> {
    let mut lines = Vec::new();
    let mut bad = 0;
    let asked = |a: &&Adversary| wanted.is_empty() || wanted.iter().any(|w| a.is(w));
    for a in ADVERSARIES.iter().filter(asked) {
        println!("---- {} {}", a.program, a.command);
        let start = Instant::now();
        let (line, good) = match challenge(places, a, long) {
            Ok(line) => (line, true),
            Err(why) => (why, false),
        };
        bad += u64::from(!good);
        let verdict = if good { "ok" } else { "FAILED" };
        lines.push(format!("{verdict:<6} {:>7.1} s  {line}", start.elapsed().as_secs_f64()));
    }
    println!("\n---- proof");
    lines.iter().for_each(|line| println!("{line}"));
    match bad {
        0 => Ok(Counts::good(lines.len() as u64)),
        n => Err(format!("{n} of {} adversaries found something", lines.len())),
    }
}

/// Runs one and returns its figure.
fn challenge(places: &Places, a: &Adversary, long: bool) -> Result<String, String> {
    let mut command = program(places, a.program);
    command.args(a.command.split_whitespace());
    let count = if long { a.long.unwrap_or(a.count) } else { a.count };
    if count > 0 {
        command.args(["--count", &count.to_string()]);
    }
    let name = format!("{} {}", a.program, a.command);
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|e| format!("{name}: {e}"))?;
    let mut figure = None;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            println!("{line}");
            if let Some(found) = line.strip_prefix("proof: ") {
                figure = Some(found.to_owned());
            }
        }
    }
    let status = child.wait().map_err(|e| format!("{name}: {e}"))?;
    match figure {
        Some(figure) if status.success() => Ok(figure),
        Some(figure) => Err(format!("{figure} ({status})")),
        None => Err(format!("{name}: no figure ({status})")),
    }
}
