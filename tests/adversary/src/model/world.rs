//! The reference as a whole, what it answers, and the table of what can be done to it.
//!
//! ```text
//!   Family: a command, how often it is drawn, how it is drawn, what the reference says of it
//! ```
//!
//! A family that comes with a new feature is a file with its `draw` and its answer, and a line in [`FAMILIES`].

use ringblock_tests::Rng;
use serde_json::Value;

use super::files::Files;
use super::graph::Graph;
use super::{exports, nodes, reopen};

/// Nothing here is larger, in bytes.
pub(super) const LARGEST: u64 = 256 << 10;

/// What the reference knows.
#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) graph: Graph,
    pub(super) files: Files,
    /// Where the NBD server listens.
    pub(super) socket: String,
}

/// Why a command is not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The engine refuses it, and one of these is in its text.
    Text(Vec<String>),
    /// The reference does not know; the command is not tried.
    Unknown,
}

pub(super) type Answer = Result<(), Refusal>;

pub(super) fn refuse<T>(text: &str) -> Result<T, Refusal> {
    Err(Refusal::Text(vec![text.to_owned()]))
}

pub(super) fn skip<T>() -> Result<T, Refusal> {
    Err(Refusal::Unknown)
}

type Draw = fn(&mut Rng, &World) -> Option<Value>;

/// One command of the control pipe.
pub(super) struct Family {
    pub(super) command: &'static str,
    /// How often it is drawn, among all.
    pub(super) weight: u64,
    /// Arguments, if there is anything to do.
    pub(super) draw: Draw,
    /// What becomes of the reference. A refusal may leave the graph half changed (it is put back), never the files.
    pub(super) answer: fn(&mut World, &Value) -> Answer,
}

const fn family(
    command: &'static str,
    weight: u64,
    draw: Draw,
    answer: fn(&mut World, &Value) -> Answer,
) -> Family {
    Family { command, weight, draw, answer }
}

/// All commands that change something.
pub(super) const FAMILIES: &[Family] = &[
    family("blockdev-add", 26, nodes::draw_add, nodes::blockdev_add),
    family("blockdev-del", 14, nodes::draw_del, nodes::blockdev_del),
    family("blockdev-reopen", 18, reopen::draw, reopen::blockdev_reopen),
    family("block_resize", 10, nodes::draw_resize, nodes::block_resize),
    family("nbd-server-start", 4, exports::draw_start, exports::server_start),
    family("nbd-server-stop", 2, exports::draw_stop, exports::server_stop),
    family("block-export-add", 12, exports::draw_export, exports::export_add),
    family("block-export-del", 6, exports::draw_export_del, exports::export_del),
    family("nbd-server-add", 3, exports::draw_server_add, exports::server_add),
    family("nbd-server-remove", 3, exports::draw_server_remove, exports::server_remove),
    family("object-add", 3, exports::draw_object_add, exports::object_add),
    family("object-del", 3, exports::draw_object_del, exports::object_del),
];

/// The family of a command.
pub(super) fn family_of(command: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|f| f.command == command)
}
