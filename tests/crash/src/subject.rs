//! The files of one image by themselves, as a crash or a fixture left them, and what is in it.
//!
//! ```text
//!   a state of a recording ─┐
//!   an image of the peer  ──┼─► Subject ─► damage, recovery, checkers          Content: guest's disk + every snapshot
//!   a sound image, damaged ─┘
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ringblock_checker::{Checker, Files, Finding};
use ringblock_engine::host::sim::{Image, Rng, Setup};
use serde_json::{Value, json};

use crate::cases::Case;
use crate::cut::{Cut, Lengths};
use crate::enumerate::Walk;
use crate::judge::State;
use crate::record::{Recording, Roles, calm};

/// An image and the files it needs.
#[derive(Clone, Debug)]
pub struct Subject {
    /// What it is, for messages.
    pub name: String,
    /// All files.
    pub files: BTreeMap<PathBuf, Vec<u8>>,
    /// Which file is what.
    pub roles: Roles,
    /// The options of its node, called `n`.
    pub node: Value,
    /// Request alignment of the disk, bytes.
    pub align: u32,
    /// What is never torn, bytes.
    pub unit: usize,
}

/// Everything that a repair must not change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// The guest's disk.
    pub guest: Vec<u8>,
    /// The disk of each internal snapshot.
    pub snapshots: Vec<Vec<u8>>,
}

impl Subject {
    /// An image that stands alone.
    pub fn alone(name: &str, image: Vec<u8>) -> Subject {
        let node = json!({
            "driver": "qcow2", "node-name": "n", "discard": "unmap", "backing": null,
            "file": {"driver": "file", "filename": "/img"},
        });
        Subject {
            name: name.to_owned(),
            files: BTreeMap::from([("/img".into(), image)]),
            roles: Roles { image: "/img".into(), data: None, backing: None, sectors: 0 },
            node,
            align: 1,
            unit: 512,
        }
    }

    /// One with a raw backing file.
    pub fn backed(name: &str, image: Vec<u8>, base: Vec<u8>) -> Subject {
        let mut subject = Subject::alone(name, image);
        subject.files.insert("/base".into(), base);
        subject.roles.backing = Some("/base".into());
        let file = json!({"driver": "file", "filename": "/base"});
        subject.node["backing"] = json!({"driver": "raw", "read-only": true, "file": file});
        subject
    }

    /// A state of a run with this kind of image.
    pub fn of_state(case: &Case, state: &State<'_>) -> Subject {
        let files =
            state.paths.iter().enumerate().map(|(i, path)| (path.clone(), state.cut.file(i).to_vec()));
        Subject {
            name: case.name.to_owned(),
            files: files.collect(),
            roles: state.recording.roles.clone(),
            node: case.node(false),
            align: case.align,
            unit: case.unit,
        }
    }

    /// The same as a state of a recording has it.
    pub fn of_files(&self, state: &State<'_>) -> Subject {
        let files = self.files.keys().map(|p| (p.clone(), state.file(p).unwrap_or_default().to_vec()));
        self.with(files.collect())
    }

    /// The same with other files.
    pub fn with(&self, files: BTreeMap<PathBuf, Vec<u8>>) -> Subject {
        Subject { files, ..self.clone() }
    }

    /// The bytes of the image.
    pub fn image(&self) -> &[u8] {
        self.files.get(&self.roles.image).map_or(&[], Vec::as_slice)
    }

    /// The same, to be changed.
    pub fn image_mut(&mut self) -> &mut Vec<u8> {
        self.files.entry(self.roles.image.clone()).or_default()
    }

    /// For the checker.
    pub fn of_image(&self) -> Files<'_> {
        let at = |path: &Option<PathBuf>| path.as_ref().and_then(|p| self.files.get(p)).map(Vec::as_slice);
        Files { image: self.image(), data: at(&self.roles.data), backing: at(&self.roles.backing) }
    }

    /// A world with these files.
    pub fn world(&self, seed: u64) -> Setup {
        let files = self.files.iter().map(|(path, bytes)| (path.clone(), Image::from_bytes(bytes)));
        calm(seed, files.collect(), self.align)
    }

    /// Writes the files into a folder, the image as `img`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn save(&self, folder: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(folder)?;
        for (path, bytes) in &self.files {
            std::fs::write(folder.join(path.file_name().unwrap_or(path.as_os_str())), bytes)?;
        }
        Ok(())
    }
}

impl Content {
    /// What the independent checker reads.
    ///
    /// # Errors
    /// The first thing that cannot be read.
    pub fn read(checker: &mut Checker, files: &Files<'_>) -> Result<Content, Finding> {
        let mut guest = vec![0; Checker::header(files)?.virtual_size as usize];
        checker.read_guest(files, &mut guest)?;
        let sizes: Vec<u64> = checker.snapshots(files)?.iter().map(|s| s.disk_size).collect();
        let mut snapshots = Vec::with_capacity(sizes.len());
        for (index, size) in sizes.into_iter().enumerate() {
            let mut disk = vec![0; size as usize];
            checker.read_snapshot(files, index, &mut disk)?;
            snapshots.push(disk);
        }
        Ok(Content { guest, snapshots })
    }

    /// How another one differs.
    pub fn difference(&self, other: &Content) -> Option<String> {
        if self.snapshots.len() != other.snapshots.len() {
            return Some(format!("{} snapshots, then {}", self.snapshots.len(), other.snapshots.len()));
        }
        let names = std::iter::once("the guest's disk".to_owned());
        let names = names.chain((0..self.snapshots.len()).map(|i| format!("snapshot {i}")));
        let mine = std::iter::once(&self.guest).chain(&self.snapshots);
        let theirs = std::iter::once(&other.guest).chain(&other.snapshots);
        for ((a, b), name) in mine.zip(theirs).zip(names) {
            if a != b {
                let at = a.iter().zip(b).position(|(x, y)| x != y);
                let at = at.map_or("its length".to_owned(), |at| format!("offset {at:#x}"));
                return Some(format!("{name} differs at {at}"));
            }
        }
        None
    }
}

/// Some states of a recording, chosen at random: moments, subsets, torn writes, lengths.
pub fn random_states(recording: &Recording, rng: &mut Rng, count: usize, mut look: impl FnMut(&State<'_>)) {
    let events = recording.events.len();
    let mut moments: Vec<usize> = (0..count).map(|_| 1 + rng.index(events.max(1))).collect();
    moments.sort_unstable();
    let mut walk = Walk::new(recording, 0, 0);
    let mut cut = Cut::default();
    for at in moments {
        walk.go_to(at);
        walk.load(&mut cut);
        let share = rng.pick(&[0, 300, 500, 700, 900, 1000]);
        for w in 0..cut.open_writes() {
            let lands = rng.chance(share);
            cut.set(w, lands);
            let count = cut.writes[w].count;
            if lands && cut.writes[w].tears && count > 1 && rng.chance(200) {
                (0..count).for_each(|p| cut.set_part(w, p, rng.chance(500)));
            }
        }
        cut.set_lengths(rng.pick(&[Lengths::Kept, Lengths::Lost, Lengths::Landed]));
        let paths = walk.paths();
        look(&State { cut: &cut, paths: &paths, allowed: &walk.allowed, recording });
    }
}
