//! The options that every command takes: how much, from which seed, for how long, on how many threads.
//!
//! Invariant: what is done depends on `--seed` and `--count` alone; `--seconds` and `--threads` only decide how soon it ends.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Options of a command.
#[derive(Clone, Debug)]
pub struct Args {
    /// How many cases, operations or steps.
    pub count: u64,
    /// Where all choices come from.
    pub seed: u64,
    /// When to stop early.
    pub limit: Option<Duration>,
    /// Threads that work.
    pub threads: usize,
    /// When the command began.
    pub began: Instant,
    more: BTreeMap<String, String>,
}

impl Args {
    /// Reads `--name value` pairs. `own` are the names that only this command knows.
    ///
    /// Errors: an unknown name, a value that is missing or no number.
    pub fn parse(args: &[String], count: u64, own: &[&str]) -> Result<Args, String> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let mut out =
            Args { count, seed: 1, limit: None, threads, began: Instant::now(), more: BTreeMap::new() };
        let mut it = args.iter();
        while let Some(name) = it.next() {
            let value = it.next().ok_or_else(|| format!("{name}: a value is missing"))?;
            let number = || value.parse::<u64>().map_err(|_| format!("{name}: {value:?} is no number"));
            match name.as_str() {
                "--count" => out.count = number()?,
                "--seed" => out.seed = number()?,
                "--seconds" => out.limit = Some(Duration::from_secs(number()?)),
                "--threads" => out.threads = number()?.clamp(1, 256) as usize,
                other if own.contains(&other) => {
                    out.more.insert(other.to_owned(), value.clone());
                }
                other => return Err(format!("unknown option {other}")),
            }
        }
        Ok(out)
    }

    /// The value of one of the command's own options.
    pub fn own(&self, name: &str) -> Option<&str> {
        self.more.get(name).map(String::as_str)
    }

    /// Whether the time given is over.
    pub fn is_over(&self) -> bool {
        self.limit.is_some_and(|l| self.began.elapsed() >= l)
    }

    /// Seconds since the command began.
    pub fn elapsed(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }
}

/// Says how far a command is, at most every 10 s, on the error channel.
#[derive(Debug)]
pub struct Progress {
    last: Mutex<Instant>,
}

impl Default for Progress {
    fn default() -> Progress {
        Progress { last: Mutex::new(Instant::now()) }
    }
}

impl Progress {
    /// Prints the line if the last one was long enough ago.
    pub fn tell(&self, line: impl FnOnce() -> String) {
        let mut last = self.last.lock().unwrap_or_else(|e| e.into_inner());
        if last.elapsed() >= Duration::from_secs(10) {
            *last = Instant::now();
            eprintln!("{}", line());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: mistakes are told and not taken for defaults. Method: good and bad lines.
    #[test]
    fn options() {
        let parse = |line: &str| {
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            Args::parse(&words, 7, &["--source"])
        };
        let args = parse("--seed 3 --source sim --threads 0").unwrap();
        assert_eq!((args.count, args.seed, args.own("--source"), args.threads), (7, 3, Some("sim"), 1));
        for bad in ["--seed", "--seed x", "--sauce sim", "5"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
