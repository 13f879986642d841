//! `cargo xtask crash COMMAND`: see VERIFICATION.md.
#![forbid(unsafe_code)]

use std::process::ExitCode;

/// One command: its arguments in, whether all was well out.
type Command = fn(&[String]) -> bool;

const COMMANDS: &[(&str, Command)] = &[
    ("agree", ringblock_crash::agree::command),
    ("lazy", ringblock_crash::lazy::command),
    ("log", ringblock_crash::log::log),
    #[cfg(feature = "mutants")]
    ("mutants", ringblock_crash::mutants::mutants),
    ("repair", ringblock_crash::repair::command),
    ("replay", ringblock_crash::states::replay),
    ("seeds", ringblock_crash::seeds::seeds),
    ("states", ringblock_crash::states::states),
    ("table", ringblock_crash::states::table),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let found = args.first().and_then(|name| COMMANDS.iter().find(|(n, _)| n == name));
    match found {
        Some((_, run)) if run(&args[1..]) => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
        None => {
            let names: Vec<&str> = COMMANDS.iter().map(|(n, _)| *n).collect();
            eprintln!("crash: one of: {}", names.join(", "));
            ExitCode::from(2)
        }
    }
}
