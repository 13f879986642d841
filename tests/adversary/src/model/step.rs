//! One step of a sequence, as it can be taken again: it names everything and depends on nothing.

use serde_json::Value;

/// A request of a guest.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Io {
    Read { off: u64, len: u64 },
    Write { off: u64, len: u64, stamp: u64, fua: bool },
    Zero { off: u64, len: u64, unmap: bool },
    Discard { off: u64, len: u64 },
    Flush,
}

impl Io {
    pub(super) fn range(&self) -> (u64, u64) {
        match *self {
            Io::Read { off, len }
            | Io::Write { off, len, .. }
            | Io::Zero { off, len, .. }
            | Io::Discard { off, len } => (off, len),
            Io::Flush => (0, 0),
        }
    }
}

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    /// A command that the reference has an answer to.
    Command { name: &'static str, args: Value },
    /// A command that is refused with this text, whatever there is.
    Wrong { name: String, args: Value, text: String },
    /// A guest comes over NBD.
    Connect { slot: usize, export: String },
    /// A guest comes in the process.
    Attach { slot: usize, node: String, writable: bool },
    /// A guest goes.
    Leave { slot: usize },
    /// A guest's request.
    Request { slot: usize, io: Io },
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Step::Command { name, args } => write!(f, "{name} {args}"),
            Step::Wrong { name, args, .. } => write!(f, "{name} {args} (wrong)"),
            Step::Connect { slot, export } => write!(f, "guest {slot}: connect to {export}"),
            Step::Attach { slot, node, writable } => {
                write!(f, "guest {slot}: attach to {node}, writable {writable}")
            }
            Step::Leave { slot } => write!(f, "guest {slot}: leave"),
            Step::Request { slot, io } => write!(f, "guest {slot}: {io:?}"),
        }
    }
}
