//! Judging a state: the independent checker, the sectors that the guest finds, and the rules about flags.
//!
//! ```text
//!   state ─► checker: references, refcounts, flags ─► corrupt
//!        └─► what the guest reads ─► Allowed ─► flushed data lost | alien sectors
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ringblock_checker::{Checker, Files, Report};
use ringblock_engine::host::sim::{Event, Image};

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
    /// Events that have happened.
    pub fn at(&self) -> usize {
        self.cut.at
    }

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
        self.recording.roles.files(|path| self.file(path))
    }
}

impl Roles {
    /// The image's files for the checker, out of all there are.
    fn files<'a>(&self, file: impl Fn(&Path) -> Option<&'a [u8]>) -> Files<'a> {
        let at = |path: &Option<PathBuf>| path.as_ref().and_then(|p| file(p));
        Files {
            image: file(&self.image).unwrap_or_default(),
            data: at(&self.data),
            backing: at(&self.backing),
        }
    }
}

impl Recording {
    /// The event after which an operation has succeeded for the first time: 0 if there is none of this name.
    pub fn succeeded(&self, operation: &str) -> usize {
        let mine = |e: &&Event| matches!(e, Event::Operation { name, .. } if name == operation);
        let good = |e: &Event| matches!(e, Event::Operation { name, ok: Some(true) } if name == operation);
        match self.events.iter().find(mine) {
            Some(_) => self.events.iter().position(good).map_or(usize::MAX, |at| at + 1),
            None => 0,
        }
    }

    /// The image's files at the beginning.
    pub fn of_image(&self) -> Files<'_> {
        let find = |path: &Path| self.files.iter().find(|f| f.0 == path).map(|f| f.1.as_slice());
        self.roles.files(find)
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
    known: Known,
}

/// What is the same for all states of a run.
#[derive(Debug, Default)]
struct Known {
    /// The run's trace.
    trace: u64,
    /// The event after which there must be an image.
    made: usize,
    /// What the internal snapshots hold.
    snapshots: Vec<Vec<u8>>,
}

impl Judge for Contract {
    fn judge(&mut self, state: &State<'_>) -> Result<Good, Bad> {
        let files = state.of_image();
        if self.known.trace != state.recording.trace {
            self.known = Known {
                trace: state.recording.trace,
                made: state.recording.succeeded("create"),
                snapshots: self.all_snapshots(&state.recording.of_image())?,
            };
        }
        // a creation that was cut short leaves a file that is no image
        if state.at() < self.known.made && self.checker.check(&files).refused {
            return Ok(Good::default());
        }
        let good = self.look(&files, state.allowed)?;
        self.look_at_snapshots(&files)?;
        Ok(good)
    }
}

impl Contract {
    /// Rule G4: snapshots are what they were.
    fn look_at_snapshots(&mut self, files: &Files<'_>) -> Result<(), Bad> {
        for (i, then) in self.known.snapshots.iter().enumerate() {
            self.guest.resize(then.len(), 0);
            let read = self.checker.read_snapshot(files, i, &mut self.guest);
            read.map_err(|e| Bad::Corrupt(format!("snapshot {i}: {e}")))?;
            if let Some(at) = self.guest.chunks(SECTOR).zip(then.chunks(SECTOR)).position(|(a, b)| a != b) {
                return Err(Bad::Corrupt(format!("snapshot {i}: sector {at} has changed")));
            }
        }
        Ok(())
    }

    fn all_snapshots(&mut self, files: &Files<'_>) -> Result<Vec<Vec<u8>>, Bad> {
        // a run that begins with a new file, or with one that cannot be opened, has none
        let sizes: Vec<u64> = match self.checker.snapshots(files) {
            Ok(list) => list.iter().map(|s| s.disk_size).collect(),
            Err(_) => Vec::new(),
        };
        let read = |(i, size): (usize, u64)| {
            let mut content = vec![0; size as usize];
            let read = self.checker.read_snapshot(files, i, &mut content);
            read.map(|()| content).map_err(|e| Bad::Corrupt(format!("snapshot {i}: {e}")))
        };
        sizes.into_iter().enumerate().map(read).collect()
    }

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
    !report.refused && report.check_errors == 0 && report.damages == 0
}

/// The roles of a plain image at a path.
pub fn plain(image: &str, sectors: usize) -> Roles {
    Roles { image: image.into(), data: None, backing: None, sectors }
}
