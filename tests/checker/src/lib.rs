//! An independent checker of qcow2 images, written from the format's specification alone: it shares no code with the
//! engine it judges.
//!
//! Purpose: to judge crash states, hundreds of thousands a second. An image is a byte slice; the checker says how
//! many references and refcounts contradict each other, what the guest would read, and which snapshots there are.
//!
//! Invariants:
//! - no call allocates once the scratch space has grown to the size of the images;
//! - the work is bounded by the length of the file, never by what a header claims;
//! - no input makes it panic.
//!
//! ```text
//!   Files ──► header (open or refuse) ──► tables (what refers to what) ──► verdict (counts against references)
//!                    │
//!                    └──► guest (sectors as the guest reads them) ◄── inflate
//! ```
//!
//! Two rules of counting are easy to miss, and both follow the peer's `qemu-img check`: refcounts of clusters beyond
//! the end of the file are not leaks, and a reference whose end lies one cluster or more beyond the end of the file is
//! corruption and counts nowhere else.
#![forbid(unsafe_code)]

mod bytes;
mod finding;
mod guest;
mod header;
mod inflate;
mod snapshots;
mod tables;
mod verdict;

pub use finding::{Finding, Kind};
pub use header::Header;
pub use snapshots::Snapshot;

/// The files of one image. All are contents, not names.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// The qcow2 file.
    pub image: &'a [u8],
    /// The external data file, where the image has one.
    pub data: Option<&'a [u8]>,
    /// What the guest sees of the backing image: its contents as raw.
    pub backing: Option<&'a [u8]>,
}

impl<'a> Files<'a> {
    /// An image that stands alone.
    pub fn new(image: &'a [u8]) -> Self {
        Self { image, data: None, backing: None }
    }
}

/// How many findings a report keeps; the counts go on beyond it.
const KEPT: usize = 20;

/// What [`Checker::check`] found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The image cannot be opened at all: everything else but the findings is then meaningless.
    pub refused: bool,
    /// References without a refcount, wrong flags, impossible entries.
    pub corruptions: u32,
    /// Of these, what has nothing to do with refcounts: the dirty bit excuses none of it.
    pub damages: u32,
    /// Clusters whose refcount is greater than the number of references.
    pub leaks: u32,
    /// Parts that could not be checked because something they hang on is broken.
    pub check_errors: u32,
    /// The version of the format: 2 or 3.
    pub version: u32,
    /// The dirty bit: refcounts may be wrong, and a writable open repairs them.
    pub dirty: bool,
    /// The corrupt bit.
    pub marked_corrupt: bool,
    /// The size of the disk in bytes.
    pub virtual_size: u64,
    /// The first findings, for messages.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Nothing is wrong but perhaps leaks.
    pub fn is_sound(&self) -> bool {
        !self.refused && self.corruptions == 0 && self.check_errors == 0
    }

    /// The exit code of a check command: 0 clean, 1 not checked, 2 corrupt, 3 leaks.
    pub fn exit_code(&self) -> i32 {
        match self {
            r if r.refused || r.check_errors > 0 => 1,
            r if r.corruptions > 0 => 2,
            r if r.leaks > 0 => 3,
            _ => 0,
        }
    }

    /// The findings in words, a line each.
    pub fn explain(&self) -> String {
        let mut text = format!(
            "refused {}, corruptions {}, leaks {}, check errors {}",
            self.refused, self.corruptions, self.leaks, self.check_errors
        );
        for finding in &self.findings {
            text.push_str(&format!("\n  {finding}"));
        }
        text
    }

    /// Forgets everything but its memory.
    fn reset(&mut self) {
        let mut findings = std::mem::take(&mut self.findings);
        findings.clear();
        *self = Self { findings, ..Self::default() };
    }

    fn keep(&mut self, finding: Finding) {
        if self.findings.len() < KEPT {
            self.findings.push(finding);
        }
    }

    /// The image cannot be opened.
    pub(crate) fn refuse(&mut self, kind: Kind, at: u64, value: u64) {
        self.refused = true;
        self.keep(Finding { kind, at, value });
    }

    pub(crate) fn corrupt(&mut self, kind: Kind, at: u64, value: u64) {
        self.corrupt_times(1, kind, at, value);
    }

    pub(crate) fn corrupt_times(&mut self, times: u32, kind: Kind, at: u64, value: u64) {
        self.corruptions = self.corruptions.saturating_add(times);
        if !kind.is_about_counts() {
            self.damages = self.damages.saturating_add(times);
        }
        self.keep(Finding { kind, at, value });
    }

    pub(crate) fn leak(&mut self, at: u64, value: u64) {
        self.leaks = self.leaks.saturating_add(1);
        self.keep(Finding { kind: Kind::Leak, at, value });
    }

    pub(crate) fn unchecked(&mut self, kind: Kind, at: u64, value: u64) {
        self.check_errors = self.check_errors.saturating_add(1);
        self.keep(Finding { kind, at, value });
    }
}

/// A checker and its scratch space; keep one per thread.
#[derive(Debug, Default)]
pub struct Checker {
    report: Report,
    tally: tables::Tally,
    snapshots: Vec<Snapshot>,
    unknown: Vec<(u64, u64)>,
    inflate: inflate::Scratch,
}

impl Checker {
    /// Judges the metadata of an image.
    pub fn check(&mut self, files: &Files<'_>) -> &Report {
        self.report.reset();
        match header::open(files) {
            Err(finding) => {
                self.report.refused = true;
                self.report.keep(finding);
            }
            Ok(header) => {
                self.report.version = header.version;
                self.report.dirty = header.dirty();
                self.report.marked_corrupt = header.marked_corrupt();
                self.report.virtual_size = header.virtual_size;
                snapshots::read(files, &header, &mut self.snapshots, &mut self.report);
                self.tally.count(files, &header, &self.snapshots, &mut self.report);
                verdict::compare(&self.tally, &mut self.report);
            }
        }
        &self.report
    }

    /// The report of the last [`Checker::check`].
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The end of the last cluster that anything of the last checked image names, even behind the end of the file.
    pub fn referenced_end(&self) -> u64 {
        self.tally.end
    }

    /// The header of an image.
    ///
    /// # Errors
    /// Why the image is refused.
    pub fn header(files: &Files<'_>) -> Result<Header, Finding> {
        header::open(files)
    }

    /// The guest's view of the disk from offset 0. What `out` holds beyond the end of the disk becomes zero.
    ///
    /// # Errors
    /// The first thing that makes a read fail.
    pub fn read_guest(&mut self, files: &Files<'_>, out: &mut [u8]) -> Result<(), Finding> {
        let header = header::open(files)?;
        let view =
            guest::View { files, header: &header, l1_offset: header.l1_offset, l1_size: header.l1_size };
        view.read(header.virtual_size, out, &mut self.unknown, &mut self.inflate)
    }

    /// The ranges (start, end) of the last read whose contents are not known: clusters of a compression that this
    /// crate does not speak (zstd). They read as zeroes.
    pub fn unknown(&self) -> &[(u64, u64)] {
        &self.unknown
    }

    /// The internal snapshots, as far as their table can be read.
    ///
    /// # Errors
    /// Why the image is refused, or the first fault of the table.
    pub fn snapshots(&mut self, files: &Files<'_>) -> Result<&[Snapshot], Finding> {
        let header = header::open(files)?;
        self.report.reset();
        snapshots::read(files, &header, &mut self.snapshots, &mut self.report);
        match self.report.findings.first() {
            Some(finding) => Err(*finding),
            None => Ok(&self.snapshots),
        }
    }

    /// What the guest saw when snapshot `index` was taken. `out` beyond the disk of that time becomes zero.
    ///
    /// # Errors
    /// As [`Checker::snapshots`] and [`Checker::read_guest`]; [`Kind::NoSuchSnapshot`].
    pub fn read_snapshot(&mut self, files: &Files<'_>, index: usize, out: &mut [u8]) -> Result<(), Finding> {
        self.snapshots(files)?;
        let none = Finding { kind: Kind::NoSuchSnapshot, at: index as u64, value: 0 };
        let snapshot = *self.snapshots.get(index).ok_or(none)?;
        let header = header::open(files)?;
        let view =
            guest::View { files, header: &header, l1_offset: snapshot.l1_offset, l1_size: snapshot.l1_size };
        view.read(snapshot.disk_size, out, &mut self.unknown, &mut self.inflate)
    }
}
