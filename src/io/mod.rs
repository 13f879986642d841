//! `io`: single requests to an image, typed as commands. For tests and for looking at images by hand.
//!
//! Options, commands, output and exit status are those of qemu-io. The status is 1 if a command that waits for its
//! result failed.
//!
//! ```text
//! -c COMMAND… | standard input ─► command table ─► Session (image, requests under way) ─► report
//! ```

mod aio;
mod breaks;
mod command;
mod misc;
mod open;
mod report;
mod rw;
mod session;

use crate::tool::getopt::{self, Opt, opt};
use crate::tool::{Fail, Outcome, Tool, err, found_mismatch, on_engine, out};
use ringblock_engine::core::Core;
use session::Session;
use std::io::BufRead;

const OPTIONS: &[Opt] = &[
    opt('\0', "object", "OBJDEF", "define an object"),
    opt('\0', "image-opts", "", "FILE is a list of options key=value,..."),
    opt('c', "cmd", "COMMAND", "run this command (may be given again)"),
    opt('f', "format", "FMT", "format of the image (default: guess)"),
    opt('r', "read-only", "", "open read-only"),
    opt('s', "snapshot", "", "writes go to a temporary file"),
    opt('n', "nocache", "", "the same as -t none"),
    opt('C', "copy-on-read", "", "copy what is read from the backing file"),
    opt('m', "misalign", "", "use misaligned buffers"),
    opt('k', "native-aio", "", "the same as -i native"),
    opt('i', "aio", "MODE", "threads, native or io_uring: all of them use io_uring"),
    opt('t', "cache", "MODE", "use of the page cache (default: writethrough)"),
    opt('d', "discard", "MODE", "what to do with discards: ignore or unmap (default)"),
    opt('T', "trace", "WHAT", "tracing"),
    opt('U', "force-share", "", "read even while another process writes"),
    opt('h', "help", "", "this text"),
    opt('V', "version", "", "the version"),
];

/// Runs the tool with the arguments behind its name; gives the exit status.
pub fn main(tool: &Tool, args: &[String]) -> i32 {
    let parsed = match getopt::parse(OPTIONS, args) {
        Ok(parsed) => parsed,
        Err(mistake) => {
            tool.error(mistake);
            err(&help(tool));
            return 1;
        }
    };
    for (option, _) in &parsed.options {
        match *option {
            "help" => {
                out(&help(tool));
                return 0;
            }
            "version" => {
                out(&format!("{} version {} (Ringblock)\n", tool.command, env!("CARGO_PKG_VERSION")));
                return 0;
            }
            _ => {}
        }
    }
    if parsed.operands.len() > 1 {
        err(&help(tool));
        return 1;
    }
    match run(tool, parsed) {
        Ok(code) => code,
        Err(fail) => tool.report("", &fail),
    }
}

fn help(tool: &Tool) -> String {
    format!(
        "Usage: {} [OPTION...] [-c COMMAND]... [FILE]\nSingle requests to a disk image\n\n{}\n\
         See '{} -c help' for the commands.\n",
        tool.command,
        getopt::help(OPTIONS),
        tool.command
    )
}

fn run(tool: &Tool, parsed: getopt::Parsed) -> Outcome {
    let mut how = open::How::default();
    let mut commands = Vec::new();
    for (option, value) in parsed.options {
        match option {
            "cmd" => commands.push(value),
            "object" => crate::tool::refuse_object(&value)?,
            other => how.take(other, &value)?,
        }
    }
    how.name = parsed.operands.into_iter().next();
    if how.image_opts && how.format.is_some() {
        return Err("--image-opts and -f are mutually exclusive".into());
    }
    let tool = tool.clone();
    on_engine(1, move || {
        Box::pin(async move {
            let mut session = Session::new(tool.clone());
            if let Some(name) = how.name.clone() {
                let by_options = how.image_opts;
                let opened = session.open(how).await;
                let opened = opened.map_err(|e| crate::tool::image::lock_hint(e, &name));
                opened.map_err(|e| match by_options {
                    true => Fail::from(format!("can't open: {}", e.message)),
                    false => Fail::from(can_not_open(&name, &e.message)),
                })?;
            }
            let failed = if commands.is_empty() {
                interactive(&mut session).await
            } else {
                let mut failed = false;
                for line in &commands {
                    failed |= !command::run(&mut session, line).await || found_mismatch();
                    // where two nodes that must be the same are not, nothing that follows means anything
                    if session.quit || found_mismatch() {
                        break;
                    }
                }
                failed
            };
            breaks::let_go(&session);
            session.wait_all().await;
            session.close().await?;
            Ok(i32::from(failed || found_mismatch()))
        })
    })
}

/// The peer names the device once.
fn can_not_open(name: &str, message: &str) -> String {
    format!("can't open device {name}: {message}")
}

/// Commands from standard input; says whether one failed.
async fn interactive(session: &mut Session) -> bool {
    let mut failed = false;
    while !session.quit && !found_mismatch() {
        out(&format!("{}> ", session.tool.name));
        // waiting for the user must not stop requests under way
        let line = Core::current()
            .blocking(|| {
                let mut line = String::new();
                match std::io::stdin().lock().read_line(&mut line) {
                    Ok(n) if n > 0 => Some(line),
                    _ => None,
                }
            })
            .await;
        let Some(line) = line else { break };
        failed |= !command::run(session, line.trim_end_matches(['\n', '\r'])).await;
    }
    failed
}
