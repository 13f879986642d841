//! Recoveries of an image, in the simulator: `check -r leaks`, `check -r all`, and opening it for writing.
//!
//! ```text
//!   Subject ─► World: recover ─► files ─► recover again ─► files          record: the same with a journal
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;

use ringblock_drivers::format::qcow2::check::Repair;
use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_engine::driver::LocalFuture;
use ringblock_engine::error::Error;
use ringblock_engine::graph::Graph;
use ringblock_engine::host::sim::World;
use ringblock_engine::mem::Buf;
use serde_json::Value;

use crate::cases::{attach, own_check};
use crate::record::{Recording, Tape, quietly, record};
use crate::subject::Subject;

/// A way to recover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Only looking: `check`.
    Look,
    /// `check -r leaks`.
    Leaks,
    /// `check -r all`.
    All,
    /// Opening for writing: a dirty image is repaired first.
    Open,
}

/// What a recovery said of the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// The exit code of `img check`: 0 sound, 1 not checked, 2 corrupt, 3 leaks. Opening: 0 or 1.
    pub code: i32,
    /// Errors found or left.
    pub corruptions: u64,
    /// Leaks found or left.
    pub leaks: u64,
    /// Nothing was done because the refcounts have to be built anew.
    pub needs_rebuild: bool,
    /// The guest's disk, as the engine read it after opening.
    pub guest: Option<Vec<u8>>,
    /// The error, if there was one, or the messages.
    pub text: String,
}

/// A recovery and another one after it.
#[derive(Clone, Debug)]
pub struct Twice {
    /// What the first said.
    pub said: Said,
    /// The files after it.
    pub files: BTreeMap<PathBuf, Vec<u8>>,
    /// Whether the second changed anything.
    pub changed_again: bool,
}

/// Recovers on the present core.
async fn recover(node: Value, mode: Mode) -> Said {
    let result = match mode {
        Mode::Look => checked(node, Repair::None).await,
        Mode::Leaks => checked(node, Repair::Leaks).await,
        Mode::All => checked(node, Repair::All).await,
        Mode::Open => opened(node).await,
    };
    let ended = Graph::current().shutdown().await;
    let mut said = result.unwrap_or_else(|e| Said { code: 1, text: e.to_string(), ..Said::default() });
    if let Err(e) = ended {
        said = Said { code: 1, text: format!("closing: {e}"), ..said };
    }
    said
}

async fn checked(node: Value, fix: Repair) -> Result<Said, Error> {
    let options: BlockdevOptions = from_json(&node)?;
    Graph::current().add(open::node_for_check(options)?).await?;
    let report = own_check(fix).await?;
    let code = match &report {
        r if r.check_errors > 0 || r.needs_rebuild => 1,
        r if r.corruptions > 0 => 2,
        r if r.leaks > 0 => 3,
        _ => 0,
    };
    Ok(Said {
        code,
        corruptions: report.corruptions,
        leaks: report.leaks,
        needs_rebuild: report.needs_rebuild,
        guest: None,
        text: report.messages.join("; "),
    })
}

async fn opened(node: Value) -> Result<Said, Error> {
    let root = attach(node, true).await?;
    let size = root.size().map_err(|e| Error::io(e, "the size"))?;
    let (done, buf) = root.read(0, Buf::new(size as usize)).await;
    done.map_err(|e| Error::io(e, "reading the disk"))?;
    Ok(Said { guest: Some(buf.to_vec()), ..Said::default() })
}

/// Recovers, and does it again.
///
/// # Errors
/// The message of a panic.
pub fn twice(subject: &Subject, mode: Mode, seed: u64) -> Result<Twice, String> {
    quietly(|| {
        let mut world = World::new(subject.world(seed));
        let said = once(&mut world, subject, mode);
        let files = live(&world, subject);
        once(&mut world, subject, mode);
        let changed_again = live(&world, subject) != files;
        Twice { said, files, changed_again }
    })
}

/// Recovers once.
///
/// # Errors
/// The message of a panic.
pub fn single(subject: &Subject, mode: Mode, seed: u64) -> Result<(Said, Subject), String> {
    quietly(|| {
        let mut world = World::new(subject.world(seed));
        let said = once(&mut world, subject, mode);
        let files = live(&world, subject);
        (said, subject.with(files))
    })
}

/// Recovers and records it.
///
/// # Errors
/// The message of a panic.
pub fn recorded(subject: &Subject, mode: Mode, seed: u64) -> Result<(Recording, Said), String> {
    let node = subject.node.clone();
    let mut setup = subject.world(seed);
    setup.faults.latency_ns = (1_000, 50_000);
    let program = move |_: Tape| -> LocalFuture<'static, Said> { Box::pin(recover(node, mode)) };
    record(setup, subject.unit, subject.roles.clone(), Tape::new(0), program)
}

fn once(world: &mut World, subject: &Subject, mode: Mode) -> Said {
    let node = subject.node.clone();
    world.run(move || -> LocalFuture<'static, Said> { Box::pin(recover(node, mode)) })
}

fn live(world: &World, subject: &Subject) -> BTreeMap<PathBuf, Vec<u8>> {
    let bytes = |path: &PathBuf| world.live(path).map(|i| i.to_bytes()).unwrap_or_default();
    subject.files.keys().map(|path| (path.clone(), bytes(path))).collect()
}
