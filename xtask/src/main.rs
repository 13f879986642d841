//! Development tasks, run as `cargo xtask TASK`.
//!
//! ```text
//!   test ─► tools: present? install? ─► build ─► cargo test ─► loom ─► address sanitizer ─► proof ─► summary
//!   prove, crash, adversary, fuzz ─► the adversaries of VERIFICATION.md, all or one
//! ```
//!
//! Invariants: nothing is skipped silently (a step that cannot run has failed, a step that ran no test has
//! failed), and the exit code is 0 only if every step succeeded.

#![forbid(unsafe_code)]

mod install;
mod prove;
mod steps;

use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask TASK

Tasks:
  test [STEP...]     install what the tests need, then run every test
                     steps: tools build tests loom asan proof (default: all, in this order)
  prove [--long] [NAME...]
                     the adversaries of VERIFICATION.md, all or these; --long takes hours
  crash ...          one of the crash adversaries: states, replay, mutants, repair, lazy, agree, log, ...
  adversary ...      one of the others: faults, linear, model, images, clients, kill9
  fuzz ...           the fuzz targets under the in-tree mutator
  tools              only check for the programs the tests use, and install what is missing
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["test", wanted @ ..] => steps::test(wanted),
        ["prove", "--long", wanted @ ..] => prove::all(true, wanted),
        ["prove", wanted @ ..] => prove::all(false, wanted),
        [name @ ("crash" | "adversary" | "fuzz"), rest @ ..] => prove::one(name, rest),
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
