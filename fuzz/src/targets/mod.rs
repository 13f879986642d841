//! The targets, one file each.
//!
//! ```text
//!   parsers      qcow2_header  snapshot_table  nbd_handshake  json  options  names       millions a minute
//!   simulator    image_open  qcow2_ops  qcow2_image  nbd_transmission                    thousands
//!   engine       qmp_commands                                                            thousands
//! ```

mod forge;
mod image_open;
mod json;
mod names;
mod nbd_handshake;
mod nbd_stream;
mod nbd_transmission;
mod options;
mod qcow2_header;
mod qcow2_image;
mod qcow2_ops;
mod qmp_commands;
mod snapshot_table;

use crate::Outcome;

/// Something that reads bytes from strangers.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name on the command line, and of its corpus.
    pub name: &'static str,
    /// The target: panics if a property does not hold.
    pub run: fn(&[u8]) -> Outcome,
    /// What to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// What to put into inputs.
    pub words: &'static [&'static [u8]],
    /// The longest input, in bytes.
    pub longest: usize,
    /// How many of 2,000,000 executions it gets: the cheaper, the more.
    pub share: u64,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    qcow2_header::TARGET,
    snapshot_table::TARGET,
    nbd_handshake::TARGET,
    json::TARGET,
    options::TARGET,
    names::TARGET,
    image_open::TARGET,
    qcow2_ops::TARGET,
    qcow2_image::TARGET,
    nbd_transmission::TARGET,
    qmp_commands::TARGET,
];

/// The target of this name.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|t| t.name == name)
}
