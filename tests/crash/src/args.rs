//! The arguments that all commands take.

use std::time::{Duration, Instant};

/// What a command is asked for.
#[derive(Clone, Debug)]
pub struct Args {
    /// States, cases or whatever the command counts.
    pub count: u64,
    /// Where choices come from.
    pub seed: u64,
    /// When to stop, whatever was done by then.
    pub until: Option<Instant>,
    /// Threads.
    pub threads: usize,
    /// Only images of this kind.
    pub case: Option<String>,
    /// Everything else: names and values.
    pub more: Vec<(String, String)>,
}

impl Args {
    /// Reads `--name value` pairs.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(args: &[String], count: u64) -> Result<Args, String> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let mut out = Args { count, seed: 1, until: None, threads, case: None, more: Vec::new() };
        let mut rest = args.iter();
        while let Some(name) = rest.next() {
            let name = name.strip_prefix("--").ok_or_else(|| format!("'{name}' is no option"))?;
            let value = rest.next().ok_or_else(|| format!("--{name} needs a value"))?;
            let number = || value.parse::<u64>().map_err(|_| format!("--{name}: '{value}' is no number"));
            match name {
                "count" => out.count = number()?,
                "seed" => out.seed = number()?,
                "seconds" => out.until = Some(Instant::now() + Duration::from_secs(number()?)),
                "threads" => out.threads = (number()? as usize).clamp(1, 64),
                "case" => out.case = Some(value.clone()),
                _ => out.more.push((name.to_owned(), value.clone())),
            }
        }
        Ok(out)
    }

    /// An argument that only this command knows.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.more.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// Whether the time is over.
    pub fn is_over(&self) -> bool {
        self.until.is_some_and(|t| Instant::now() >= t)
    }
}
