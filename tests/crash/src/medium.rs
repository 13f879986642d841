//! The files of a recorded run as a medium holds them: what readers see, what is durable, and what is open.
//!
//! ```text
//!   Submitted ─► flying ─ Completed ─► live, open ─ a flush submitted later, and successful ─► durable
//!                                           └ a failed flush: open for ever, until rewritten and flushed
//! ```
//!
//! Rules D1 to D5 of the crash model (crash reference, 1), written down a second time and apart from the simulator's disks,
//! which this judges too. The unit of tearing is a sector of 512 or 4,096 bytes: part of one lands as the whole sector that
//! the cache held when the write completed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ringblock_engine::host::sim::{Change, Event};

/// One sector of an open change.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) sector: u32,
    /// What the sector adds to the number of a state.
    pub(crate) sum: u64,
    pub(crate) data: Box<[u8]>,
}

/// What an open change does to the length of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Length {
    Same,
    /// At least this.
    Grow(u64),
    /// Exactly this.
    Set(u64),
}

/// A change that a crash may or may not find.
#[derive(Clone, Debug)]
pub(crate) struct Open {
    pub(crate) id: u64,
    /// The event of its completion; 0 in flight.
    pub(crate) completed: usize,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) length: Length,
    /// Whether its sectors land apart from each other.
    pub(crate) tears: bool,
    /// A flush after it failed.
    doomed: bool,
}

/// One file.
#[derive(Debug, Default)]
pub(crate) struct File {
    pub(crate) path: PathBuf,
    number: u64,
    live: Vec<u8>,
    live_len: u64,
    pub(crate) durable: Vec<u8>,
    pub(crate) durable_len: u64,
    /// Per sector of `durable`; a sector of zeroes is 0.
    pub(crate) sums: Vec<u64>,
    pub(crate) open: Vec<Open>,
    flying: Vec<(u64, Change)>,
    flushes: BTreeMap<u64, usize>,
}

/// All files of a run.
#[derive(Debug)]
pub(crate) struct Medium {
    pub(crate) unit: usize,
    pub(crate) files: Vec<File>,
}

/// A number for the content of a sector at a place.
fn sum(file: u64, sector: u64, data: &[u8]) -> u64 {
    if data.iter().all(|&b| b == 0) {
        return 0;
    }
    let mut h = (file << 40 | sector).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x517c_c1b7_2722_0a95;
    for word in data.chunks(8) {
        let mut bytes = [0; 8];
        bytes[..word.len()].copy_from_slice(word);
        h = (h.rotate_left(5) ^ u64::from_le_bytes(bytes)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    }
    (h ^ (h >> 32)).wrapping_mul(0xc4ce_b9fe_1a85_ec53) | 1
}

impl File {
    fn new(path: PathBuf, number: u64, content: &[u8], unit: usize) -> File {
        let mut file = File { path, number, live_len: content.len() as u64, ..File::default() };
        file.live = content.to_vec();
        file.live.resize(content.len().next_multiple_of(unit), 0);
        file.durable = file.live.clone();
        file.durable_len = file.live_len;
        file.sums = file.durable.chunks(unit).enumerate().map(|(i, s)| sum(number, i as u64, s)).collect();
        file
    }

    fn reach(&mut self, end: u64, unit: usize) {
        let end = (end as usize).next_multiple_of(unit);
        if self.live.len() < end {
            self.live.resize(end, 0);
        }
    }

    /// The sectors of a range as the cache holds them.
    fn pieces(&self, range: std::ops::Range<u64>, unit: usize) -> Vec<Piece> {
        self.pieces_with(range, unit, |_, _| {})
    }

    fn pieces_with(
        &self,
        range: std::ops::Range<u64>,
        unit: usize,
        overlay: impl Fn(u64, &mut [u8]),
    ) -> Vec<Piece> {
        if range.is_empty() {
            return Vec::new();
        }
        let sectors = range.start / unit as u64..range.end.div_ceil(unit as u64);
        sectors
            .map(|s| {
                let from = s as usize * unit;
                let mut data = vec![0; unit];
                let there = self.live.len().saturating_sub(from).min(unit);
                data[..there].copy_from_slice(&self.live[from.min(self.live.len())..][..there]);
                overlay(from as u64, &mut data);
                let sum = sum(self.number, s, &data);
                Piece { sector: s as u32, sum, data: data.into_boxed_slice() }
            })
            .collect()
    }

    /// A completed change: into the cache. What of it is open from now on.
    fn land(&mut self, id: u64, completed: usize, change: Change, kept: u64, unit: usize) -> Open {
        let before = self.live_len;
        let mut open =
            Open { id, completed, pieces: Vec::new(), length: Length::Same, tears: true, doomed: false };
        let range = match change {
            Change::Data(off, data) => {
                let data = &data[..(kept as usize).min(data.len())];
                let end = off + data.len() as u64;
                self.reach(end, unit);
                self.live[off as usize..end as usize].copy_from_slice(data);
                off..end
            }
            Change::Zero(range, _) => {
                self.reach(range.end, unit);
                self.live[range.start as usize..range.end as usize].fill(0);
                range
            }
            Change::Len(len) => {
                (open.length, open.tears) = (Length::Set(len), false);
                self.reach(len, unit);
                self.live[len as usize..].fill(0);
                self.live_len = len;
                open.pieces = self.pieces(len..before.max(len), unit);
                return open;
            }
        };
        if range.end > before && !range.is_empty() {
            open.length = Length::Grow(range.end);
            self.live_len = range.end;
        }
        open.pieces = self.pieces(range, unit);
        open
    }

    /// A change in flight as it would land now.
    fn in_flight(&self, id: u64, change: &Change, unit: usize) -> Open {
        let mut open =
            Open { id, completed: 0, pieces: Vec::new(), length: Length::Same, tears: true, doomed: false };
        match change {
            Change::Data(off, data) => {
                let end = off + data.len() as u64;
                open.pieces = self.pieces_with(*off..end, unit, |from, sector| {
                    let (start, stop) = ((*off).max(from), end.min(from + sector.len() as u64));
                    sector[(start - from) as usize..(stop - from) as usize]
                        .copy_from_slice(&data[(start - off) as usize..(stop - off) as usize]);
                });
                open.length = if end > self.live_len { Length::Grow(end) } else { Length::Same };
            }
            Change::Zero(range, _) => {
                open.pieces = self.zeroed(range.clone(), unit);
                open.length = if range.end > self.live_len && !range.is_empty() {
                    Length::Grow(range.end)
                } else {
                    Length::Same
                };
            }
            Change::Len(len) => {
                open.pieces = self.zeroed(*len..self.live_len.max(*len), unit);
                (open.length, open.tears) = (Length::Set(*len), false);
            }
        }
        open
    }

    fn zeroed(&self, range: std::ops::Range<u64>, unit: usize) -> Vec<Piece> {
        self.pieces_with(range.clone(), unit, |from, sector| {
            let (start, stop) = (range.start.max(from), range.end.min(from + sector.len() as u64));
            sector[(start - from) as usize..(stop - from) as usize].fill(0);
        })
    }

    fn promote(&mut self, open: &Open, unit: usize) {
        for p in &open.pieces {
            let at = p.sector as usize * unit;
            if self.durable.len() < at + unit {
                self.durable.resize(at + unit, 0);
                self.sums.resize(p.sector as usize + 1, 0);
            }
            self.durable[at..at + unit].copy_from_slice(&p.data);
            self.sums[p.sector as usize] = p.sum;
        }
        match open.length {
            Length::Same => {}
            Length::Grow(end) => self.durable_len = self.durable_len.max(end),
            Length::Set(len) => self.durable_len = len,
        }
        // what completed earlier and is still open has been replaced there
        let len = self.durable_len;
        for older in self.open.iter_mut().filter(|o| o.completed < open.completed) {
            older.pieces.retain(|p| open.pieces.iter().all(|q| q.sector != p.sector));
            if matches!(older.length, Length::Grow(end) if end <= len) {
                older.length = Length::Same;
            }
        }
        self.open.retain(|o| !o.pieces.is_empty() || o.length != Length::Same);
    }
}

impl Medium {
    /// The files at the beginning; a file's place in the list is its number in the events.
    pub(crate) fn new(files: &[(PathBuf, Vec<u8>)], unit: usize) -> Medium {
        let file = |(i, (path, content)): (usize, &(PathBuf, Vec<u8>))| {
            File::new(path.clone(), i as u64, content, unit)
        };
        Medium { unit, files: files.iter().enumerate().map(file).collect() }
    }

    /// Whether the event settles something: the moment before it has the most states.
    pub(crate) fn settles(&self, event: &Event) -> bool {
        match event {
            Event::FlushCompleted { disk, ok: true, .. } => !self.files[*disk as usize].open.is_empty(),
            Event::Completed { durable, .. } => *durable,
            _ => false,
        }
    }

    /// Event number `at`, counted from 1, happens. Events of guests mean nothing here.
    pub(crate) fn step(&mut self, at: usize, event: &Event) {
        let unit = self.unit;
        match event {
            Event::Created { path, .. } => {
                let number = self.files.len() as u64;
                self.files.push(File::new(path.clone(), number, &[], unit));
            }
            Event::Submitted { disk, id, change } => {
                self.files[*disk as usize].flying.push((*id, change.clone()));
            }
            Event::Completed { disk, id, kept, durable } => {
                let file = &mut self.files[*disk as usize];
                let Some(i) = file.flying.iter().position(|f| f.0 == *id) else { return };
                let (id, change) = file.flying.remove(i);
                let open = file.land(id, at, change, *kept, unit);
                match (durable, open.pieces.is_empty() && open.length == Length::Same) {
                    (_, true) => {}
                    (true, _) => file.promote(&open, unit),
                    (false, _) => file.open.push(open),
                }
            }
            Event::Dropped { disk, id } => {
                self.files[*disk as usize].flying.retain(|f| f.0 != *id);
            }
            Event::FlushSubmitted { disk, id } => {
                self.files[*disk as usize].flushes.insert(*id, at);
            }
            Event::FlushCompleted { disk, id, ok } => {
                let file = &mut self.files[*disk as usize];
                let Some(began) = file.flushes.remove(id) else { return };
                if !ok {
                    file.open.iter_mut().for_each(|o| o.doomed = true);
                    return;
                }
                let all = std::mem::take(&mut file.open);
                let (settled, open): (Vec<Open>, Vec<Open>) =
                    all.into_iter().partition(|o| o.completed < began && !o.doomed);
                file.open = open;
                settled.iter().for_each(|o| file.promote(o, unit));
            }
            _ => {}
        }
    }

    /// Everything open now: of each file what completed, in order, then what is in flight.
    pub(crate) fn open(&self) -> Vec<(usize, Open)> {
        let mut out = Vec::new();
        for (i, file) in self.files.iter().enumerate() {
            out.extend(file.open.iter().map(|o| (i, o.clone())));
            out.extend(file.flying.iter().map(|(id, c)| (i, file.in_flight(*id, c, self.unit))));
        }
        out.retain(|(_, o)| !o.pieces.is_empty() || o.length != Length::Same);
        out
    }
}
