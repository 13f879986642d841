//! The steps of `cargo xtask test` and their summary.

use crate::install;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Where things are.
pub(crate) struct Places {
    /// The root of the workspace.
    pub(crate) root: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
}

/// What a step reports.
#[derive(Default, Clone, Copy)]
pub(crate) struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

type Step = fn(&Places) -> Result<Counts, String>;

const STEPS: [(&str, Step); 6] = [
    ("tools", tools),
    ("build", build),
    ("tests", tests),
    ("loom", loom),
    ("asan", asan),
    ("proof", crate::prove::step),
];

struct Done {
    name: &'static str,
    time: Duration,
    result: Result<Counts, String>,
}

/// Runs the steps named in `wanted` (all if none is named) and prints a summary.
pub(crate) fn test(wanted: &[&str]) -> ExitCode {
    if let Some(unknown) = wanted.iter().find(|w| STEPS.iter().all(|(name, _)| name != *w)) {
        eprintln!("xtask: there is no step {unknown:?}");
        return ExitCode::from(2);
    }
    let places = Places::find();
    let mut done = Vec::new();
    for (name, step) in STEPS {
        if !wanted.is_empty() && !wanted.contains(&name) {
            continue;
        }
        println!("==== {name}");
        let start = Instant::now();
        let result = step(&places);
        if let Err(why) = &result {
            eprintln!("==== {name} failed: {why}");
        }
        let stop = result.is_err() && matches!(name, "tools" | "build");
        done.push(Done { name, time: start.elapsed(), result });
        if stop {
            break;
        }
    }
    summary(&done, wanted)
}

fn summary(done: &[Done], wanted: &[&str]) -> ExitCode {
    let mut all = Counts::default();
    let mut good = true;
    println!("\n==== summary");
    for (name, _) in STEPS {
        let Some(step) = done.iter().find(|d| d.name == name) else {
            let why = if wanted.is_empty() || wanted.contains(&name) {
                good = false;
                "not run: an earlier step failed"
            } else {
                "not asked for"
            };
            println!("{name:<8}           {why}");
            continue;
        };
        let time = step.time.as_secs_f64();
        match &step.result {
            Ok(c) if c.passed + c.failed == 0 => println!("{name:<8} {time:>7.1} s  ok"),
            Ok(c) => println!("{name:<8} {time:>7.1} s  ok, {} tests, {} ignored", c.passed, c.ignored),
            Err(why) => println!("{name:<8} {time:>7.1} s  FAILED: {why}"),
        }
        match &step.result {
            Ok(c) => all.passed += c.passed,
            Err(_) => {
                good = false;
                all.failed += 1;
            }
        }
    }
    println!("{} passed, {} failed", all.passed, all.failed);
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Places {
    pub(crate) fn find() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default();
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir));
        Self { root, target }
    }

    pub(crate) fn cargo(&self, line: &str) -> Command {
        let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
        let mut command = Command::new(program);
        command.args(line.split_whitespace()).current_dir(&self.root);
        // The outer cargo's settings for xtask itself must not leak into the inner one.
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().starts_with("CARGO_PKG_") || key == "CARGO_MANIFEST_DIR" {
                command.env_remove(key);
            }
        }
        command
    }
}

fn tools(places: &Places) -> Result<Counts, String> {
    install::all(places).map(|()| Counts::default())
}

/// The programs, optimised and with all assertions: what the end-to-end tests run, and the proofs.
fn build(places: &Places) -> Result<Counts, String> {
    crate::prove::build(places).map(|()| Counts::default())
}

fn tests(places: &Places) -> Result<Counts, String> {
    let mut command = places.cargo("test --locked --workspace --no-fail-fast");
    command.env("RINGBLOCK_BIN", places.target.join("proof/ringblock"));
    command.env("RINGBLOCK_PYTHON", install::venv_python(places));
    watch(command)
}

/// The model-checked parts: the engine built with `--cfg loom`, in a target directory of its own because the
/// flag changes every crate's fingerprint. Optimised, for loom explores millions of steps.
fn loom(places: &Places) -> Result<Counts, String> {
    let mut command = places.cargo("test --locked --package ringblock-engine --release --test loom");
    command.env("RUSTFLAGS", flags("--cfg loom")).env("CARGO_TARGET_DIR", places.target.join("loom"));
    watch(command)
}

/// The engine's tests under the address sanitizer. The flag is unstable; `RUSTC_BOOTSTRAP` lets the stable
/// compiler take it.
fn asan(places: &Places) -> Result<Counts, String> {
    let host = host_triple()?;
    let line = format!("test --locked --package ringblock-engine --lib --tests --target {host}");
    let mut command = places.cargo(&line);
    command.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", flags("-Zsanitizer=address"));
    // Leaks are not errors here: tests forget futures and sockets on purpose.
    command.env("ASAN_OPTIONS", "detect_leaks=0");
    command.env("CARGO_TARGET_DIR", places.target.join("asan"));
    watch(command)
}

fn flags(more: &str) -> String {
    match std::env::var("RUSTFLAGS") {
        Ok(given) if !given.is_empty() => format!("{given} {more}"),
        _ => more.to_string(),
    }
}

fn host_triple() -> Result<String, String> {
    let out = Command::new("rustc").arg("-vV").output().map_err(|e| format!("rustc -vV: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(String::from).ok_or_else(|| "rustc -vV names no host".to_string())
}

/// Runs a `cargo test`, passing its output on and counting the results. No test run is a failure.
fn watch(mut command: Command) -> Result<Counts, String> {
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|e| format!("{command:?}: {e}"))?;
    let mut counts = Counts::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line.map_err(|e| format!("cargo's output: {e}"))?;
            counts.add(&line);
            // A closed pipe downstream must not end the tests.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    }
    let status = child.wait().map_err(|e| format!("cargo test: {e}"))?;
    if !status.success() {
        return Err(format!("{} tests failed ({status})", counts.failed));
    }
    if counts.passed == 0 {
        return Err("no test was run".to_string());
    }
    if counts.ignored > 0 {
        return Err(format!("{} tests are ignored; nothing may be skipped", counts.ignored));
    }
    Ok(counts)
}

impl Counts {
    /// So many successes.
    pub(crate) fn good(passed: u64) -> Counts {
        Counts { passed, ..Counts::default() }
    }

    /// Adds a line such as `test result: ok. 4 passed; 0 failed; 1 ignored; 0 measured; …`.
    fn add(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("test result: ") else {
            return;
        };
        for part in rest.split(['.', ';']) {
            let mut words = part.split_whitespace();
            let (Some(number), Some(what)) = (words.next(), words.next()) else {
                continue;
            };
            let Ok(number) = number.parse::<u64>() else {
                continue;
            };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Counts;

    /// Goal: results are counted from cargo's own lines. Method: one good, one bad, one unrelated line.
    #[test]
    fn counts_cargos_lines() {
        let mut c = Counts::default();
        c.add(
            "test result: ok. 4 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.10s",
        );
        c.add("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out");
        c.add("test passes ... ok");
        assert_eq!((c.passed, c.failed, c.ignored), (7, 2, 1));
    }
}
