//! Development tasks, run as `cargo xtask TASK`.
//!
//! ```text
//!   test ─► tools: present? install? ─► release build ─► cargo test ─► loom models ─► address sanitizer ─► summary
//! ```
//!
//! Invariants: nothing is skipped silently (a step that cannot run has failed, a step that ran no test has
//! failed), and the exit code is 0 only if every step succeeded.

#![forbid(unsafe_code)]

mod install;
mod steps;

use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask TASK

Tasks:
  test [STEP...]     install what the tests need, then run every test
                     steps: tools build tests loom asan (default: all, in this order)
  tools              only check for the programs the tests use, and install what is missing
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["test", wanted @ ..] => steps::test(wanted),
        ["tools"] => steps::test(&["tools"]),
        ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprint!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
