//! Simulated disks: named files with what is in the cache, what is durable, and everything in between.
//!
//! ```text
//!   submit ─► in flight ─► complete: live image, log ─► a flush that began later, and succeeds: durable image
//!   crash = durable + any subset of the log and of what is in flight, torn by sectors, lengths kept or lost
//! ```
//!
//! Rules (reference, crash model D1 to D5):
//! - a write is durable for certain if a successful flush was submitted after it completed, or if it was a durable write;
//! - any other write may have landed wholly, not at all, or torn: any subset of its sectors, each old or new;
//! - lengths land independently of data; so do holes and zeroes;
//! - after a failed flush nothing from before it is ever promoted; only rewriting helps.
//!
//! A sector is the unit of tearing: a write of part of one lands as the whole sector that the cache held then.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::journal::{Event, Journal};
use super::{Image, Rng};
use crate::error::{Errno, Error};
use crate::host::linux::extent::Extent;
use crate::host::linux::probe::HostLimits;

/// The unit that is never torn, in bytes.
pub const SECTOR: u64 = 512;

/// A change of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes at an offset.
    Data(u64, Vec<u8>),
    /// A range reads as zeroes; `true` makes it a hole.
    Zero(Range<u64>, bool),
    /// The length.
    Len(u64),
}

/// A change on its way to the medium.
#[derive(Clone, Debug)]
struct Logged {
    change: Change,
    /// When it completed; 0 while in flight.
    completed: u64,
    /// The length it extended the file to.
    extends: Option<u64>,
    /// A flush after it failed: never promoted.
    doomed: bool,
    /// Parts that something durable has replaced since.
    masked: Vec<Range<u64>>,
}

#[derive(Debug, Default)]
struct State {
    live: Image,
    durable: Image,
    /// Completed, in order of completion.
    log: Vec<Logged>,
    flying: BTreeMap<u64, Logged>,
    /// Counts submissions and completions.
    event: u64,
}

/// One simulated file.
#[derive(Debug)]
pub struct Disk {
    id: i32,
    align: u32,
    state: Mutex<State>,
    journal: Option<Arc<Journal>>,
}

impl Disk {
    fn new(id: i32, align: u32, image: Image, journal: Option<Arc<Journal>>) -> Disk {
        let state = State { live: image.clone(), durable: image, ..State::default() };
        Disk { id, align, state: Mutex::new(state), journal }
    }

    fn note(&self, event: impl FnOnce() -> Event) {
        if let Some(journal) = &self.journal {
            journal.add(event());
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The number that stands for a descriptor.
    pub fn id(&self) -> i32 {
        self.id
    }

    /// Length in bytes, as the cache has it.
    pub fn len(&self) -> u64 {
        self.lock().live.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Alignments.
    pub fn limits(&self) -> HostLimits {
        HostLimits {
            request_align: self.align,
            memory_align: self.align.min(512),
            physical_block: 4096,
            discard_granularity: Some(self.align),
        }
    }

    /// Data or hole at `from`.
    pub fn extent_at(&self, from: u64, to: u64) -> Extent {
        self.lock().live.extent_at(from, to)
    }

    /// What a reader sees now.
    pub fn live(&self) -> Image {
        self.lock().live.clone()
    }

    /// What is durable for certain.
    pub fn durable(&self) -> Image {
        self.lock().durable.clone()
    }

    /// Changes whose fate at a crash is open.
    pub fn open_changes(&self) -> usize {
        let s = self.lock();
        s.log.len() + s.flying.len()
    }

    /// Whether a transfer is aligned as `O_DIRECT` wants it.
    pub(crate) fn takes(&self, memory: *const u8, len: u64, off: u64) -> bool {
        let limits = self.limits();
        (off | len).is_multiple_of(u64::from(limits.request_align))
            && memory.addr().is_multiple_of(limits.memory_align as usize)
    }

    pub(crate) fn read(&self, off: u64, buf: &mut [u8]) -> usize {
        self.lock().live.read(off, buf)
    }

    pub(crate) fn allocated(&self) -> u64 {
        self.lock().live.allocated()
    }

    /// A change is submitted; from now on a crash may find it.
    pub(crate) fn begin(&self, change: Change) -> u64 {
        let mut s = self.lock();
        s.event += 1;
        let id = s.event;
        self.note(|| Event::Submitted { disk: self.id, id, change: change.clone() });
        let logged = Logged { change, completed: 0, extends: None, doomed: false, masked: Vec::new() };
        s.flying.insert(id, logged);
        id
    }

    /// It completed; of data, only the first `keep` bytes were written. With `durable` it is so at once.
    pub(crate) fn finish(&self, id: u64, keep: u64, durable: bool) {
        let mut s = self.lock();
        let Some(mut logged) = s.flying.remove(&id) else { return };
        self.note(|| Event::Completed { disk: self.id, id, kept: keep, durable });
        if let Change::Data(_, data) = &mut logged.change {
            data.truncate(keep as usize);
        }
        s.land(logged, durable);
    }

    /// It failed: each of its sectors is old or new (D5).
    pub(crate) fn fail(&self, id: u64, rng: &mut Rng) {
        let mut s = self.lock();
        let Some(logged) = s.flying.remove(&id) else { return };
        self.note(|| Event::Dropped { disk: self.id, id });
        let live_len = s.live.len();
        let pieces = s.sectors(&logged, live_len);
        for (off, data) in pieces {
            // a failed write does not extend
            if rng.chance(500) && off + data.len() as u64 <= live_len {
                s.event += 1;
                let (id, kept) = (s.event, data.len() as u64);
                let part = Logged { change: Change::Data(off, data), ..logged.clone() };
                self.note(|| Event::Submitted { disk: self.id, id, change: part.change.clone() });
                self.note(|| Event::Completed { disk: self.id, id, kept, durable: false });
                s.land(part, false);
            }
        }
    }

    /// It was cancelled, or never started.
    pub(crate) fn forget(&self, id: u64) {
        if self.lock().flying.remove(&id).is_some() {
            self.note(|| Event::Dropped { disk: self.id, id });
        }
    }

    /// A flush begins; the answer is for [`Disk::flushed`].
    pub(crate) fn flush(&self) -> u64 {
        let mut s = self.lock();
        s.event += 1;
        self.note(|| Event::FlushSubmitted { disk: self.id, id: s.event });
        s.event
    }

    /// The flush submitted at `began` has ended.
    pub(crate) fn flushed(&self, began: u64, ok: bool) {
        let mut s = self.lock();
        self.note(|| Event::FlushCompleted { disk: self.id, id: began, ok });
        if !ok {
            s.log.iter_mut().for_each(|l| l.doomed = true);
            return;
        }
        let all = std::mem::take(&mut s.log);
        let (settled, open) = all.into_iter().partition(|l| l.completed < began && !l.doomed);
        s.log = open;
        let settled: Vec<Logged> = settled;
        settled.into_iter().for_each(|l| s.promote(l));
    }

    /// One of the states a power cut now could leave.
    pub fn crash(&self, rng: &mut Rng) -> Image {
        let s = self.lock();
        let mut image = s.durable.clone();
        let mut len = image.len();
        let landing = rng.pick(&[0u32, 100, 500, 900, 1000]);
        let torn = rng.pick(&[0u32, 0, 300, 1000]);
        let lengths = rng.pick(&[0u32, 500, 1000, 1000]);
        let mut flying: Vec<Logged> = s.flying.values().cloned().map(|l| s.in_flight(l)).collect();
        for i in (1..flying.len()).rev() {
            flying.swap(i, rng.index(i + 1));
        }
        for l in s.log.iter().chain(&flying) {
            if let Some(end) = l.extends
                && rng.chance(lengths)
            {
                len = len.max(end);
            }
            if !rng.chance(landing) {
                continue;
            }
            if let Change::Len(n) = l.change {
                image.settle(n.min(len));
                len = n;
                continue;
            }
            let whole = !rng.chance(torn);
            let prefix = rng.chance(300).then(|| rng.below(s.sector_count(l) + 1));
            for (i, (off, data)) in s.sectors(l, u64::MAX).into_iter().enumerate() {
                let lands = whole || prefix.map_or_else(|| rng.chance(500), |p| (i as u64) < p);
                if lands {
                    image.write_raw(off, &data);
                }
            }
            if let Change::Zero(range, punch) = &l.change {
                for part in unmasked(range.clone(), &l.masked) {
                    for piece in torn_range(part, whole, rng) {
                        image.zero_raw(piece, *punch);
                    }
                }
            }
        }
        image.settle(len);
        image
    }
}

impl State {
    /// A completed change: into the cache, and into the log or onto the medium.
    fn land(&mut self, mut logged: Logged, durable: bool) {
        self.event += 1;
        logged.completed = self.event;
        let before = self.live.len();
        match &mut logged.change {
            Change::Data(off, data) => {
                self.live.write(*off, data);
                if self.live.len() > before {
                    logged.extends = Some(self.live.len());
                }
                // what lands is whole sectors, as the cache holds them now
                let start = *off - *off % SECTOR;
                let end = (*off + data.len() as u64).next_multiple_of(SECTOR).min(self.live.len());
                let mut all = vec![0; (end - start) as usize];
                self.live.read(start, &mut all);
                (*off, *data) = (start, all);
            }
            Change::Zero(range, punch) => {
                self.live.zero_raw(range.clone(), *punch);
                if range.end > before {
                    self.live.set_len(range.end);
                    logged.extends = Some(range.end);
                }
            }
            Change::Len(n) => self.live.set_len(*n),
        }
        if durable { self.promote(logged) } else { self.log.push(logged) }
    }

    /// For a crash: an unfinished change as it would land.
    fn in_flight(&self, mut l: Logged) -> Logged {
        let end = match &mut l.change {
            Change::Data(off, data) => {
                let start = *off - *off % SECTOR;
                let end = *off + data.len() as u64;
                let mut all = vec![0; (end.next_multiple_of(SECTOR) - start) as usize];
                self.live.read(start, &mut all);
                all[(*off - start) as usize..(end - start) as usize].copy_from_slice(data);
                all.truncate((end.max(self.live.len()).min(start + all.len() as u64) - start) as usize);
                (*off, *data) = (start, all);
                end
            }
            Change::Zero(range, _) => range.end,
            Change::Len(_) => 0,
        };
        l.extends = (end > self.live.len()).then_some(end);
        l
    }

    fn promote(&mut self, l: Logged) {
        match &l.change {
            Change::Data(off, data) if l.masked.is_empty() => self.durable.write_raw(*off, data),
            Change::Data(..) => {
                for (off, data) in self.sectors(&l, u64::MAX) {
                    self.durable.write_raw(off, &data);
                }
            }
            Change::Zero(range, punch) => {
                for part in unmasked(range.clone(), &l.masked) {
                    self.durable.zero_raw(part, *punch);
                }
            }
            Change::Len(n) => self.durable.set_len(*n),
        }
        if let Some(end) = l.extends
            && end > self.durable.len()
        {
            self.durable.settle(end);
        }
        let range = match &l.change {
            Change::Data(off, data) => *off..*off + data.len() as u64,
            Change::Zero(range, _) => range.clone(),
            Change::Len(n) => *n..u64::MAX,
        };
        // what completed before and was not settled is settled now, as replaced
        let durable_len = self.durable.len();
        for older in self.log.iter_mut().filter(|o| o.completed < l.completed) {
            older.masked.push(range.clone());
            older.extends = older.extends.filter(|&end| end > durable_len);
        }
        self.log.retain(|o| !o.is_replaced());
    }

    fn sector_count(&self, l: &Logged) -> u64 {
        match &l.change {
            Change::Data(_, data) => (data.len() as u64).div_ceil(SECTOR),
            _ => 0,
        }
    }

    /// The pieces of a data change, by sectors, below `limit`, without what has been replaced.
    fn sectors(&self, l: &Logged, limit: u64) -> Vec<(u64, Vec<u8>)> {
        let Change::Data(off, data) = &l.change else { return Vec::new() };
        let mut out = Vec::new();
        let end = (off + data.len() as u64).min(limit);
        let mut at = *off;
        while at < end {
            let n = (SECTOR - at % SECTOR).min(end - at);
            if !l.masked.iter().any(|m| m.start <= at && at + n <= m.end) {
                let from = (at - off) as usize;
                out.push((at, data[from..from + n as usize].to_vec()));
            }
            at += n;
        }
        out
    }
}

impl Logged {
    fn is_replaced(&self) -> bool {
        match &self.change {
            Change::Data(off, data) => {
                let range = *off..*off + data.len() as u64;
                self.extends.is_none() && unmasked(range, &self.masked).is_empty()
            }
            Change::Zero(range, _) => {
                self.extends.is_none() && unmasked(range.clone(), &self.masked).is_empty()
            }
            Change::Len(_) => false,
        }
    }
}

/// The parts of a zeroed range that land: all of it, some sectors of a small one, the beginning of a large one.
fn torn_range(range: Range<u64>, whole: bool, rng: &mut Rng) -> Vec<Range<u64>> {
    let len = range.end - range.start;
    if whole {
        return vec![range];
    }
    if len > 128 * SECTOR {
        let end = range.start + rng.below(len / SECTOR) * SECTOR;
        return vec![Range { start: range.start, end }];
    }
    let mut out = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let next = ((at / SECTOR + 1) * SECTOR).min(range.end);
        if rng.chance(500) {
            out.push(at..next);
        }
        at = next;
    }
    out
}

/// What is left of a range without the masked parts.
fn unmasked(range: Range<u64>, masked: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = vec![range];
    for m in masked {
        left = left
            .into_iter()
            .flat_map(|r| [r.start..r.end.min(m.start).max(r.start), r.start.max(m.end).min(r.end)..r.end])
            .filter(|r| !r.is_empty())
            .collect();
    }
    left
}

/// Names, and the files by number.
type Files = (BTreeMap<PathBuf, i32>, Vec<Arc<Disk>>);

/// The files of one simulated world.
#[derive(Debug)]
pub struct Disks {
    align: u32,
    journal: Option<Arc<Journal>>,
    files: Mutex<Files>,
}

impl Disks {
    /// These files, all durable, on a medium with this request alignment. Everything later goes into the journal.
    pub fn new(align: u32, images: BTreeMap<PathBuf, Image>, journal: Option<Arc<Journal>>) -> Disks {
        let disks = Disks { align, journal, files: Mutex::default() };
        for (path, image) in images {
            disks.add(&path, image);
        }
        disks
    }

    fn add(&self, path: &Path, image: Image) -> Arc<Disk> {
        let mut files = self.files.lock().unwrap_or_else(|e| e.into_inner());
        let id = files.1.len() as i32;
        let disk = Arc::new(Disk::new(id, self.align, image, self.journal.clone()));
        files.0.insert(path.to_owned(), id);
        files.1.push(disk.clone());
        disk
    }

    /// Opens an existing file.
    pub fn open(&self, path: &Path) -> Result<Arc<Disk>, Error> {
        let files = self.files.lock().unwrap_or_else(|e| e.into_inner());
        let found = files.0.get(path).map(|&id| files.1[id as usize].clone());
        found.ok_or_else(|| Error::io(Errno::ENOENT, format!("Could not open '{}'", path.display())))
    }

    /// Creates or empties a file.
    pub fn create(&self, path: &Path) -> Arc<Disk> {
        match self.open(path) {
            Ok(disk) => {
                let id = disk.begin(Change::Len(0));
                disk.finish(id, 0, false);
                disk
            }
            Err(_) => {
                let disk = self.add(path, Image::default());
                disk.note(|| Event::Created { disk: disk.id, path: path.to_owned() });
                disk
            }
        }
    }

    pub(crate) fn by_id(&self, id: i32) -> Option<Arc<Disk>> {
        let files = self.files.lock().unwrap_or_else(|e| e.into_inner());
        files.1.get(usize::try_from(id).ok()?).cloned()
    }

    /// One of the states a power cut now could leave, of every file.
    pub fn crash(&self, rng: &mut Rng) -> BTreeMap<PathBuf, Image> {
        self.each(|disk| disk.crash(rng))
    }

    /// What readers see now, of every file.
    pub fn live(&self) -> BTreeMap<PathBuf, Image> {
        self.each(Disk::live)
    }

    fn each(&self, mut f: impl FnMut(&Disk) -> Image) -> BTreeMap<PathBuf, Image> {
        let files = self.files.lock().unwrap_or_else(|e| e.into_inner());
        files.0.iter().map(|(path, &id)| (path.clone(), f(&files.1[id as usize]))).collect()
    }
}
