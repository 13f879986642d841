//! What the command line tools `img` and `io` share: option parsing, opening images by name, texts and numbers.
//!
//! A tool runs as one task on core 0 of an engine of its own; what it does to images it does through the same nodes
//! and roots as the daemon and any embedder.
//!
//! ```text
//! argv ─► getopt ─► command ─► image::open (name or options → node → root) ─► I/O ─► text or JSON on stdout
//! ```

pub mod cache;
pub mod getopt;
pub mod image;
pub mod json;
pub mod names;

use ringblock_drivers::options::keyval;
use ringblock_drivers::options::size::{self, BadSize};
use ringblock_engine::driver::LocalFuture;
use ringblock_engine::event::Event;
use ringblock_engine::graph::Graph;
use ringblock_engine::{Config, Engine, Error};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// Who the user called: names in messages.
#[derive(Clone, Debug)]
pub struct Tool {
    /// In front of error messages: "qemu-img".
    pub name: String,
    /// What the user typed: "qemu-img", "ringblock img".
    pub command: String,
}

/// Why a command stops.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fail {
    /// What goes to standard error, without the program's name; empty for nothing.
    pub message: String,
    /// Points the user at the help text.
    pub usage: bool,
    /// Exit status.
    pub code: i32,
}

impl Fail {
    /// A mistake of the user: the message is followed by a pointer to the help text.
    pub fn usage(message: impl Into<String>) -> Fail {
        Fail { message: message.into(), usage: true, code: 1 }
    }

    /// The same error with another exit status.
    pub fn code(mut self, code: i32) -> Fail {
        self.code = code;
        self
    }

    /// Nothing to say, only a status.
    pub fn silent(code: i32) -> Fail {
        Fail { message: String::new(), usage: false, code }
    }
}

impl From<Error> for Fail {
    fn from(e: Error) -> Fail {
        Fail { message: e.message, usage: false, code: 1 }
    }
}

impl From<String> for Fail {
    fn from(message: String) -> Fail {
        Fail { message, usage: false, code: 1 }
    }
}

impl From<&str> for Fail {
    fn from(message: &str) -> Fail {
        Fail::from(message.to_owned())
    }
}

/// How a command ends: an exit status or a failure.
pub type Outcome = Result<i32, Fail>;

impl Tool {
    /// Prints an error message.
    pub fn error(&self, message: impl std::fmt::Display) {
        err(&format!("{}: {message}\n", self.name));
    }

    /// Reports how command `sub` (empty for none) failed, and gives the exit status.
    pub fn report(&self, sub: &str, fail: &Fail) -> i32 {
        if !fail.message.is_empty() {
            self.error(&fail.message);
        }
        if fail.usage {
            self.hint(sub);
        }
        fail.code
    }

    /// Points at the help text of command `sub`.
    pub fn hint(&self, sub: &str) {
        let sub = if sub.is_empty() { String::new() } else { format!(" {sub}") };
        err(&format!("Try '{}{sub} --help' for more info\n", self.command));
    }
}

/// Prints to standard output. A closed pipe is not an error.
pub fn out(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes());
    let _ = stdout.flush();
}

/// Prints to standard error.
pub fn err(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

static MISMATCH: AtomicBool = AtomicBool::new(false);

/// Whether a comparing node has found a difference in this run.
pub fn found_mismatch() -> bool {
    MISMATCH.load(Ordering::Relaxed)
}

/// Runs a tool's work on core 0 of a new engine, and closes what it leaves open.
pub fn on_engine<M>(cores: usize, make: M) -> Outcome
where
    M: FnOnce() -> LocalFuture<'static, Outcome> + Send + 'static,
{
    let config = Config { cores, pin: false, arena: 8 << 20, blocking_threads: 8 };
    let engine = Engine::start(&config)?;
    engine.on_event(|event| {
        if let Event::Mismatch { text, .. } = event {
            MISMATCH.store(true, Ordering::Relaxed);
            err(&format!("{text}\n"));
        }
    });
    engine.run(0, || {
        Box::pin(async move {
            let result = make().await;
            let closed = Graph::current().shutdown().await;
            let code = result?;
            closed?;
            Ok(code)
        })
    })
}

/// A size that the user typed; the error says what is wrong, for a message of the caller's own.
pub fn parse_size(text: &str) -> Result<u64, BadSize> {
    let n = size::parse(text, 0)?;
    if n > i64::MAX as u64 { Err(BadSize::Range) } else { Ok(n) }
}

/// A size option with bounds. Texts as qemu-img gives them.
pub fn size_option(what: &str, text: &str, least: u64, most: u64) -> Result<u64, Fail> {
    let negative = text.strip_prefix('-').is_some_and(|t| size::parse(t, 0).is_ok());
    match size::parse(text, 0) {
        Ok(n) if (least..=most).contains(&n) => Ok(n),
        Err(_) if negative => {
            Err(format!("Invalid {what} specified. Must be between {least} and {most}.").into())
        }
        Ok(_) | Err(BadSize::Range) => {
            Err(format!("Invalid {what} specified. Must be between {least} and {most}.").into())
        }
        Err(BadSize::Syntax) => Err(format!("Invalid {what} specified: '{text}'.").into()),
    }
}

/// A whole number option with bounds.
pub fn number_option(what: &str, text: &str, least: u64, most: u64) -> Result<u64, Fail> {
    let n = text.parse::<u64>().ok().filter(|n| (least..=most).contains(n));
    n.ok_or_else(|| Fail::from(format!("Invalid {what} specified: '{text}'")))
}

/// `--object`: there is no object that a tool could use yet, so each is refused by name.
pub fn refuse_object(definition: &str) -> Result<(), Fail> {
    let (tree, _) = keyval::parse_either(definition, Some("qom-type"))?;
    match tree.get("qom-type").and_then(|t| t.as_str()) {
        Some(kind) => Err(format!("Parameter 'qom-type' does not accept value '{kind}'").into()),
        None => Err("Parameter 'qom-type' is missing".into()),
    }
}
