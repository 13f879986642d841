//! Making two programs' texts comparable: names, times and rates differ legitimately, all else must not.

use crate::tools::Output;

/// The names under which a program may announce itself in front of a message; longer ones first.
const PREFIXES: [&str; 7] = [
    "qemu-img",
    "qemu-io",
    "qemu-storage-daemon",
    "ringblock img",
    "ringblock io",
    "ringblock serve",
    "ringblock",
];

/// Replaces the program's own name at the start of a message, and what the option parsers of the two say of a
/// wrong option: that wording is the C library's, not the peer's.
pub fn program(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        let mut line = line.to_string();
        for prefix in PREFIXES {
            if let Some(rest) = line.strip_prefix(prefix).filter(|r| r.starts_with([':', ' '])) {
                line = format!("PROGRAM{rest}");
            }
            line = line.replace(&format!("Try '{prefix}"), "Try 'PROGRAM");
        }
        line = line.replace("invalid option '", "unrecognized option '");
        if let Some((front, option)) = line.split_once("missing argument for option ") {
            line = format!("{front}option {option} requires an argument");
        }
        lines.push(line);
    }
    lines.join("\n")
}

/// Replaces what the tools measure: seconds, rates.
pub fn rates(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        match line.find(" ops; ") {
            Some(at) => lines.push(format!("{} ops; TIME", &line[..at])),
            // The form for programs: bytes, operations, time, two rates.
            None if line.split(',').count() == 5 && line.contains(",0:00:00.") => {
                let front: Vec<&str> = line.split(',').take(2).collect();
                lines.push(format!("{},TIME", front.join(",")));
            }
            None if line.starts_with("Run completed in ") => lines.push("Run completed in TIME".to_string()),
            None => lines.push(line.to_string()),
        }
    }
    lines.join("\n")
}

/// Replaces the space an image takes on the host, which depends on the allocator's layout.
pub fn disk_size(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        let indent = &line[..line.len() - line.trim_start().len()];
        let word = line.trim_start();
        if word.starts_with("disk size: ") {
            lines.push(format!("{indent}disk size: N"));
        } else if word.starts_with("\"actual-size\": ") {
            lines.push(format!("{indent}\"actual-size\": N{}", if word.ends_with(',') { "," } else { "" }));
        } else if word.starts_with("file length: ") {
            lines.push(format!("{indent}file length: N"));
        } else {
            lines.push(line.to_string());
        }
    }
    lines.join("\n")
}

/// Takes out progress reports but the fact that there were any, the prompt's name, and the options in a
/// command's usage line.
pub fn manners(text: &str) -> String {
    let mut clean = String::new();
    let mut reported = false;
    for piece in text.split('\r') {
        let rest = match piece.split_once("/100%)") {
            Some((front, rest)) if front.trim_start().starts_with('(') => {
                reported = true;
                rest
            }
            _ => piece,
        };
        clean += if reported { rest.trim_start_matches('\n') } else { rest };
    }
    if reported {
        clean = format!("PROGRESS\n{clean}");
    }
    let usage = |line: &str| match (line.find(" ["), line.find(" -- ")) {
        (Some(option), Some(_)) => format!("USAGE of {}", &line[..option]),
        _ => line.replace("ringblock> ", "qemu-io> "),
    };
    clean.lines().map(usage).collect::<Vec<_>>().join("\n")
}

/// An output with everything replaced that may differ: exit code, standard output and standard error.
pub fn output(out: &Output) -> (i32, String, String) {
    let clean = |text: &str| manners(&rates(&program(text)));
    (out.code, clean(&out.stdout), clean(&out.stderr))
}
