//! `cargo xtask adversary COMMAND`: see VERIFICATION.md.
#![forbid(unsafe_code)]

use std::process::ExitCode;

/// One command: its arguments in, whether all was well out.
type Command = fn(&[String]) -> bool;

const COMMANDS: &[(&str, Command)] = &[
    ("clients", ringblock_adversary::clients::run),
    ("faults", ringblock_adversary::faults::run),
    ("images", ringblock_adversary::images::run),
    ("kill9", ringblock_adversary::kill9::run),
    ("linear", ringblock_adversary::linear::run),
    ("model", ringblock_adversary::model::run),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let found = args.first().and_then(|name| COMMANDS.iter().find(|(n, _)| n == name));
    match found {
        Some((_, run)) if run(&args[1..]) => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
        None => {
            let names: Vec<&str> = COMMANDS.iter().map(|(n, _)| *n).collect();
            eprintln!("adversary: one of: {}", names.join(", "));
            ExitCode::from(2)
        }
    }
}
