//! `img`: images at rest. Create, look at, check, copy, compare and resize them.
//!
//! Options, output and exit codes are those of qemu-img; what is not supported is refused by name.
//!
//! ```text
//! argv ─► command table ─► getopt ─► command (one file each) ─► exit status
//! ```

mod bench;
mod check;
mod compare;
mod convert;
mod create;
mod human;
mod info;
mod map;
mod new;
mod progress;
mod resize;

pub use info::describe;
pub use new::temporary_overlay;

use crate::tool::getopt::{self, Opt, Parsed, opt};
use crate::tool::{Fail, Outcome, Tool, out};

/// A subcommand.
struct Command {
    name: &'static str,
    summary: &'static str,
    /// Operands, for the help text.
    operands: &'static str,
    options: &'static [Opt],
    run: fn(&Tool, Parsed) -> Outcome,
}

const QUIET: Opt = opt('q', "quiet", "", "print nothing but errors");
const FORMAT: Opt = opt('f', "format", "FMT", "format of the image (default: guess)");
const IMAGE_OPTS: Opt = opt('\0', "image-opts", "", "FILENAME is a list of options key=value,...");
const SHARE: Opt = opt('U', "force-share", "", "read even while another process writes");
const OBJECT: Opt = opt('\0', "object", "OBJDEF", "define an object");
const OUTPUT: Opt = opt('\0', "output", "human|json", "form of the output");

const COMMANDS: &[Command] = &[
    bench::COMMAND,
    check::COMMAND,
    compare::COMMAND,
    convert::COMMAND,
    create::COMMAND,
    info::COMMAND,
    map::COMMAND,
    resize::COMMAND,
];

/// Commands of qemu-img that come later.
const LATER: &[&str] = &["amend", "bitmap", "commit", "dd", "measure", "rebase", "snapshot"];

/// Runs the tool with the arguments behind its name; gives the exit status.
pub fn main(tool: &Tool, args: &[String]) -> i32 {
    let Some(first) = args.first() else {
        return tool.report("", &Fail::usage("Not enough arguments"));
    };
    match first.as_str() {
        "-h" | "--help" => {
            out(&overview(tool));
            return 0;
        }
        "-V" | "--version" => {
            out(&version(tool));
            return 0;
        }
        _ => {}
    }
    if let Some(option) = first.strip_prefix('-') {
        let what = match option.strip_prefix('-') {
            Some(long) => format!("unrecognized option '--{long}'"),
            None => format!("invalid option -- '{}'", option.chars().next().unwrap_or('-')),
        };
        return tool.report("", &Fail::usage(what));
    }
    let Some(command) = COMMANDS.iter().find(|c| c.name == first) else {
        let message = match LATER.contains(&first.as_str()) {
            true => format!("Command '{first}' is not supported yet"),
            false => format!("Command not found: {first}"),
        };
        return tool.report("", &Fail::usage(message));
    };
    run(tool, command, &signed_size(command, &args[1..]))
}

/// The last word of `resize` may be a size like "-1M", which is no list of options.
fn signed_size(command: &Command, args: &[String]) -> Vec<String> {
    let mut args = args.to_vec();
    let signed = |a: &String| a.starts_with('-') && a[1..].starts_with(|c: char| c.is_ascii_digit());
    if command.name == "resize" && args.last().is_some_and(signed) && !args.iter().any(|a| a == "--") {
        args.insert(args.len() - 1, "--".to_owned());
    }
    args
}

fn run(tool: &Tool, command: &Command, args: &[String]) -> i32 {
    if args.iter().take_while(|a| *a != "--").any(|a| a == "-h" || a == "--help") {
        out(&help(tool, command));
        return 0;
    }
    match getopt::parse(command.options, args) {
        Err(mistake) => {
            // the peer names the subcommand here and only here
            let named = Tool { name: format!("{} {}", tool.name, command.name), ..tool.clone() };
            named.error(mistake);
            tool.hint(command.name);
            1
        }
        Ok(parsed) => match (command.run)(tool, parsed) {
            Ok(code) => code,
            Err(fail) => tool.report(command.name, &fail),
        },
    }
}

fn version(tool: &Tool) -> String {
    format!("{} version {} (Ringblock)\n", tool.command, env!("CARGO_PKG_VERSION"))
}

fn overview(tool: &Tool) -> String {
    let mut text = version(tool);
    text += &format!("Usage: {} COMMAND [--help | OPTION...]\n\n", tool.command);
    text += "  -h, --help       this text\n  -V, --version    the version\n\nCommands:\n\n";
    for c in COMMANDS {
        text += &format!("  {:<10} {}\n", c.name, c.summary);
    }
    text + "\nSupported image formats: raw qcow2\nSupported protocols: file host_device null-co null-aio\n"
}

fn help(tool: &Tool, command: &Command) -> String {
    format!(
        "{}. Usage:\n\n  {} {} [OPTION...] {}\n\n{}  {:<32} {}\n",
        command.summary,
        tool.command,
        command.name,
        command.operands,
        getopt::help(command.options),
        "-h, --help",
        "this text"
    )
}

/// `--output`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Output {
    #[default]
    Human,
    Json,
}

impl Output {
    fn parse(text: &str) -> Result<Output, Fail> {
        match text {
            "human" => Ok(Output::Human),
            "json" => Ok(Output::Json),
            other => Err(Fail::usage(format!("--output expects 'human' or 'json' not '{other}'"))),
        }
    }
}

/// The options that most commands have, collected while their own are read.
#[derive(Default)]
struct Common {
    quiet: bool,
    progress: bool,
    format: Option<String>,
    image_opts: bool,
    force_share: bool,
    output: Output,
}

impl Common {
    /// Takes an option if it is one of these.
    fn take(&mut self, option: &str, value: &str) -> Result<bool, Fail> {
        match option {
            "quiet" => self.quiet = true,
            "progress" => self.progress = true,
            "format" => self.format = Some(value.to_owned()),
            "image-opts" => self.image_opts = true,
            "force-share" => self.force_share = true,
            "output" => self.output = Output::parse(value)?,
            "object" => crate::tool::refuse_object(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Refuses `-f` with `--image-opts`.
    fn check(&self) -> Result<(), Fail> {
        if self.image_opts && self.format.is_some() {
            return Err("--image-opts and --format are mutually exclusive".into());
        }
        Ok(())
    }

    fn source(&self, name: &str) -> crate::tool::image::Source {
        crate::tool::image::Source {
            name: name.to_owned(),
            format: self.format.clone(),
            image_opts: self.image_opts,
        }
    }
}

/// The one operand of a command that takes one image.
fn one_image(parsed: &Parsed) -> Result<String, Fail> {
    match &parsed.operands[..] {
        [one] => Ok(one.clone()),
        _ => Err(Fail::usage("Expecting one image file name")),
    }
}

/// What only qcow2 images have, as text, without their bitmaps.
pub fn qcow2_specific(header: &ringblock_drivers::format::qcow2::header::Header) -> String {
    human::members(&info::specific(header, Vec::new()), 1)
}
