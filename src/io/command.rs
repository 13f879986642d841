//! The commands: their table, and how a line becomes words.

use super::session::Session;
use super::{aio, breaks, misc, rw};
use crate::tool::getopt::{self, Opt, Parsed};
use crate::tool::{err, out};
use ringblock_drivers::options::size::{self, BadSize};
use ringblock_engine::driver::LocalFuture;

/// A command's work; false if it failed.
pub(super) type Run = for<'a> fn(&'a mut Session, Parsed) -> LocalFuture<'a, bool>;

/// A command.
pub(super) struct Command {
    pub(super) name: &'static str,
    /// Another name; empty for none.
    pub(super) alias: &'static str,
    /// Fewest and most words behind the name.
    pub(super) words: (usize, usize),
    /// Works without an open image.
    pub(super) without_image: bool,
    /// Needs a writable image.
    pub(super) writes: bool,
    pub(super) args: &'static str,
    pub(super) summary: &'static str,
    pub(super) options: &'static [Opt],
    pub(super) run: Run,
}

/// Any number of words.
pub(super) const MANY: usize = usize::MAX;

fn table() -> impl Iterator<Item = &'static Command> {
    rw::COMMANDS.iter().chain(aio::COMMANDS).chain(misc::COMMANDS).chain(breaks::COMMANDS)
}

fn find(name: &str) -> Option<&'static Command> {
    table().find(|c| c.name == name || (c.alias == name && !name.is_empty()))
}

/// "read [-v] off len -- reads a number of bytes": the line that tells how a command is used.
pub(super) fn usage(c: &Command) -> String {
    let args = if c.args.is_empty() { String::new() } else { format!(" {}", c.args) };
    format!("{}{args} -- {}\n", c.name, c.summary)
}

/// Help for all commands or one; false if there is no such command.
pub(super) fn help(name: Option<&str>) -> bool {
    let Some(name) = name else {
        let mut all: Vec<_> = table().collect();
        all.sort_by_key(|c| c.name);
        let lines: String = all.into_iter().map(usage).collect();
        out(&format!("{lines}\nUse 'help commandname' for extended help.\n"));
        return true;
    };
    let Some(c) = find(name) else {
        out(&format!("command {name} not found\n"));
        return false;
    };
    out(&format!("{}\n{}", usage(c), getopt::help(c.options)));
    true
}

/// Runs one line; false if it failed.
pub(super) async fn run(session: &mut Session, line: &str) -> bool {
    let words: Vec<String> = line.split_ascii_whitespace().map(str::to_owned).collect();
    let Some((name, args)) = words.split_first() else { return true };
    let Some(c) = find(name) else {
        err(&format!("command \"{name}\" not found\n"));
        return false;
    };
    if session.open.is_none() && !c.without_image {
        err("no file open, try 'help open'\n");
        return false;
    }
    if let Some(complaint) = count_complaint(name, args.len(), c.words) {
        err(&complaint);
        return false;
    }
    let parsed = match getopt::parse(c.options, args) {
        // words of a command without options may begin with a dash
        _ if c.options.is_empty() => Parsed { operands: args.to_vec(), ..Parsed::default() },
        Ok(parsed) => parsed,
        Err(mistake) => {
            err(&format!("{}: {mistake}\n", c.name));
            out(&usage(c));
            return false;
        }
    };
    if c.writes && session.open.as_ref().is_some_and(|o| !o.image.access.write) {
        session.tool.error("Block node is read-only");
        return false;
    }
    (c.run)(session, parsed).await
}

fn count_complaint(name: &str, n: usize, (least, most): (usize, usize)) -> Option<String> {
    if (least..=most).contains(&n) {
        return None;
    }
    let expected = match (least, most) {
        (least, MANY) => format!("at least {least} arguments"),
        (least, most) if least == most => format!("{least} arguments"),
        (least, most) => format!("between {least} and {most} arguments"),
    };
    Some(format!("bad argument count {n} to {name}, expected {expected}\n"))
}

/// A number with an optional suffix; complains itself.
pub(super) fn number(text: &str) -> Option<u64> {
    let negative = text.strip_prefix('-').is_some_and(|t| size::parse(t, 0).is_ok());
    let parsed = if negative { Err(BadSize::Range) } else { size::parse(text, 0) };
    match parsed {
        Ok(n) if n <= i64::MAX as u64 => return Some(n),
        Err(BadSize::Syntax) => out(&format!(
            "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}\n"
        )),
        _ => out(&format!("Parsing error: argument too large -- {text}\n")),
    }
    None
}

/// A byte to fill with or to look for; complains itself. `0x` is hexadecimal, a leading 0 octal.
pub(super) fn pattern(text: &str) -> Option<u8> {
    let parsed = if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        u8::from_str_radix(hex, 16).ok()
    } else if text.len() > 1 && text.starts_with('0') {
        u8::from_str_radix(text, 8).ok()
    } else {
        text.parse().ok()
    };
    if parsed.is_none() {
        out(&format!("{text} is not a valid pattern byte\n"));
    }
    parsed
}

/// The most bytes of one request.
pub(super) const REQUEST_MAX: u64 = 2_147_483_136;

/// A length of a request that moves data.
pub(super) fn length(text: &str, without: &str) -> Option<u64> {
    let n = number(text)?;
    if n > REQUEST_MAX {
        out(&format!("length cannot exceed {REQUEST_MAX}{without}, given {text}\n"));
        return None;
    }
    Some(n)
}
