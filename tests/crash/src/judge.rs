//! Judging a state: the independent checker, the sectors that the guest finds, and the rules about flags.
//!
//! ```text
//!   state ─► checker: references, refcounts, flags ─► corrupt
//!        └─► what the guest reads ─► Allowed ─► flushed data lost | alien sectors
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ringblock_checker::{Checker, Files, Kind, Report};
use ringblock_engine::host::sim::Image;

use crate::allowed::{Allowed, SECTOR, Wrong};
use crate::cut::Cut;
use crate::record::{Recording, Roles};

/// A state that a power cut may leave.
pub struct State<'a> {
    pub(crate) cut: &'a Cut,
    pub(crate) paths: &'a [PathBuf],
    /// What the guest may find.
    pub allowed: &'a Allowed,
    /// The run.
    pub recording: &'a Recording,
}

impl State<'_> {
    /// A file's bytes, if it is there.
    pub fn file(&self, path: &Path) -> Option<&[u8]> {
        Some(self.cut.file(self.paths.iter().position(|p| p == path)?))
    }

    /// All files, for a world or a folder.
    pub fn images(&self) -> BTreeMap<PathBuf, Image> {
        let files = self.paths.iter().enumerate();
        files.map(|(i, path)| (path.clone(), Image::from_bytes(self.cut.file(i)))).collect()
    }

    /// Writes the files into a folder.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn save(&self, folder: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        for (i, path) in self.paths.iter().enumerate() {
            let name = path.file_name().unwrap_or(path.as_os_str());
            std::fs::write(folder.join(name), self.cut.file(i))?;
        }
        Ok(())
    }

    /// The image's files, for the checker.
    pub fn of_image(&self) -> Files<'_> {
        let roles = &self.recording.roles;
        let at = |path: &Option<PathBuf>| path.as_ref().and_then(|p| self.file(p));
        Files {
            image: self.file(&roles.image).unwrap_or_default(),
            data: at(&roles.data),
            backing: at(&roles.backing),
        }
    }
}

/// What is wrong with a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bad {
    /// The image contradicts itself, or cannot be opened.
    Corrupt(String),
    /// Data that a flush had covered is not there.
    Lost(String),
    /// A sector has a value that was never written to it.
    Alien(String),
    /// The engine or the program did what it must never do.
    Panic(String),
}

impl std::fmt::Display for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bad::Corrupt(text) => write!(f, "corrupt: {text}"),
            Bad::Lost(text) => write!(f, "flushed data lost: {text}"),
            Bad::Alien(text) => write!(f, "alien sector: {text}"),
            Bad::Panic(text) => write!(f, "panic: {text}"),
        }
    }
}

impl From<Wrong> for Bad {
    fn from(wrong: Wrong) -> Bad {
        match wrong {
            Wrong::Lost(text) => Bad::Lost(text),
            Wrong::Alien(text) => Bad::Alien(text),
        }
    }
}

/// What is known of a state that is as it should be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Good {
    /// Clusters that leaked.
    pub leaks: u32,
    /// The dirty bit is set, and refcounts are wrong.
    pub dirty: bool,
}

/// Says whether a state may be.
pub trait Judge {
    /// Looks at one state.
    ///
    /// # Errors
    /// What is wrong with it.
    fn judge(&mut self, state: &State<'_>) -> Result<Good, Bad>;
}

/// The judge of the crash contract.
#[derive(Debug, Default)]
pub struct Contract {
    checker: Checker,
    guest: Vec<u8>,
}

impl Judge for Contract {
    fn judge(&mut self, state: &State<'_>) -> Result<Good, Bad> {
        self.look(&state.of_image(), state.allowed)
    }
}

impl Contract {
    /// The same for files from elsewhere.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn look(&mut self, files: &Files<'_>, allowed: &Allowed) -> Result<Good, Bad> {
        let report = self.checker.check(files);
        let counts_only = report.dirty && only_counts(report);
        if !report.is_sound() && !counts_only {
            return Err(Bad::Corrupt(report.explain().replace('\n', ";")));
        }
        if report.marked_corrupt {
            return Err(Bad::Corrupt("the corrupt bit is set".into()));
        }
        let good = Good { leaks: report.leaks, dirty: report.dirty && !report.is_sound() };
        let size = report.virtual_size as usize;
        if !allowed.sizes().contains(&(size / SECTOR)) {
            let text = format!("{} sectors, permitted {:?}", size / SECTOR, allowed.sizes());
            return Err(Bad::Corrupt(text));
        }
        self.guest.resize(size, 0);
        let read = self.checker.read_guest(files, &mut self.guest[..size]);
        read.map_err(|e| Bad::Corrupt(format!("reading: {e}")))?;
        allowed.check(&self.guest[..size])?;
        Ok(good)
    }
}

/// Rules I2 and I4: with the dirty bit, counts and what follows from them may be wrong; nothing else.
fn only_counts(report: &Report) -> bool {
    let counts = |k: Kind| matches!(k, Kind::TooFewRefs | Kind::CopiedL1 | Kind::CopiedL2 | Kind::Leak);
    !report.refused && report.check_errors == 0 && report.findings.iter().all(|f| counts(f.kind))
}

/// The roles of a plain image at a path.
pub fn plain(image: &str, sectors: usize) -> Roles {
    Roles { image: image.into(), data: None, backing: None, sectors }
}
