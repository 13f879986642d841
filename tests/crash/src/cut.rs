//! One moment of a run, and the states that a power cut then may leave, in one set of buffers.
//!
//! ```text
//!   sector:  durable ◄ piece of write 3 ◄ piece of write 7      shown: the last that landed, or what is durable
//! ```
//!
//! Invariant: the buffers always show exactly the pieces marked as landed, whatever was marked before; marking one write
//! touches only the sectors of that write. No state allocates.

use ringblock_engine::host::sim::Rng;

use crate::medium::{Length, Medium, Open};

/// Whether extensions of files that no flush covers are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lengths {
    /// All of them.
    Kept,
    /// None of them.
    Lost,
    /// Those of writes that landed.
    Landed,
}

/// A write whose fate is open.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub(crate) file: usize,
    pub(crate) id: u64,
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) length: Length,
    pub(crate) tears: bool,
    /// None of its pieces landed, or all of them, or some.
    pub(crate) landed: bool,
}

struct Piece {
    slot: u32,
    sum: u64,
    at: u32,
    landed: bool,
}

/// A sector that is open.
struct Slot {
    file: u32,
    sector: u32,
    base: u64,
    now: u64,
    /// Its pieces, oldest first.
    stack: (u32, u32),
    base_at: u32,
}

/// All open writes at one moment, and one state.
#[derive(Default)]
pub struct Cut {
    unit: usize,
    pub(crate) writes: Vec<Write>,
    /// Writes that change a length.
    lengthy: Vec<usize>,
    pieces: Vec<Piece>,
    slots: Vec<Slot>,
    stacks: Vec<u32>,
    arena: Vec<u8>,
    shown: Vec<Vec<u8>>,
    durable_len: Vec<u64>,
    base: u64,
    /// Lengths of the files in the present state.
    pub(crate) len: Vec<u64>,
    /// Event it lies before.
    pub(crate) at: usize,
}

impl Cut {
    /// Loads the moment before event `at`. Writes in flight land in any order; this time in one that `rng` chooses.
    pub(crate) fn load(&mut self, medium: &Medium, at: usize, rng: &mut Rng) {
        self.at = at;
        self.unit = medium.unit;
        let mut open = medium.open();
        // completed ones keep their order, those in flight come last
        let flying = open.iter().filter(|o| o.1.completed == 0).count();
        open.sort_by_key(|(_, o)| if o.completed == 0 { usize::MAX } else { o.completed });
        let start = open.len() - flying;
        for i in (1..flying).rev() {
            open.swap(start + i, start + rng.index(i + 1));
        }
        self.load_files(medium, &open);
        self.load_writes(medium, &open);
        self.set_lengths(Lengths::Landed);
    }

    fn load_files(&mut self, medium: &Medium, open: &[(usize, Open)]) {
        self.shown.resize_with(medium.files.len(), Vec::new);
        self.durable_len.clear();
        self.base = 0;
        for (i, file) in medium.files.iter().enumerate() {
            let mine = open.iter().filter(|o| o.0 == i);
            let ends = mine.flat_map(|(_, o)| {
                let length = match o.length {
                    Length::Grow(end) | Length::Set(end) => end,
                    Length::Same => 0,
                };
                let last = o.pieces.last().map_or(0, |p| (p.sector as u64 + 1) * self.unit as u64);
                [length, last]
            });
            let end = ends.max().unwrap_or(0).max(file.durable.len() as u64).max(file.durable_len) as usize;
            let shown = &mut self.shown[i];
            shown.clear();
            shown.extend_from_slice(&file.durable);
            shown.resize(end.next_multiple_of(self.unit), 0);
            self.durable_len.push(file.durable_len);
            self.base ^= file.sums.iter().fold(0, |a, b| a ^ b);
        }
        self.len.clone_from(&self.durable_len);
    }

    fn load_writes(&mut self, medium: &Medium, open: &[(usize, Open)]) {
        self.writes.clear();
        self.lengthy.clear();
        self.pieces.clear();
        self.slots.clear();
        self.arena.clear();
        let mut places: Vec<(u32, u32, u32)> = Vec::new();
        for (i, (file, o)) in open.iter().enumerate() {
            let (first, count) = (self.pieces.len(), o.pieces.len());
            for p in &o.pieces {
                places.push((*file as u32, p.sector, self.pieces.len() as u32));
                self.pieces.push(Piece { slot: 0, sum: p.sum, at: self.arena.len() as u32, landed: false });
                self.arena.extend_from_slice(&p.data);
            }
            if o.length != Length::Same {
                self.lengthy.push(i);
            }
            let (length, tears) = (o.length, o.tears);
            self.writes.push(Write { file: *file, id: o.id, first, count, length, tears, landed: false });
        }
        places.sort_unstable();
        self.stacks.clear();
        for &(file, sector, piece) in &places {
            let same = self.slots.last().is_some_and(|s| s.file == file && s.sector == sector);
            if !same {
                let known = &medium.files[file as usize];
                let base = known.sums.get(sector as usize).copied().unwrap_or(0);
                let from = sector as usize * self.unit;
                let base_at = self.arena.len() as u32;
                self.arena.extend_from_slice(&self.shown[file as usize][from..from + self.unit]);
                let at = self.stacks.len() as u32;
                self.slots.push(Slot { file, sector, base, now: base, stack: (at, at), base_at });
            }
            let slot = self.slots.len() - 1;
            self.pieces[piece as usize].slot = slot as u32;
            self.stacks.push(piece);
            self.slots[slot].stack.1 += 1;
        }
    }

    /// Number of open writes.
    pub fn open_writes(&self) -> usize {
        self.writes.len()
    }

    /// Whether lengths are open.
    pub(crate) fn lengths_matter(&self) -> bool {
        !self.lengthy.is_empty()
    }

    /// The bytes of a file in the present state.
    pub(crate) fn file(&self, i: usize) -> &[u8] {
        &self.shown[i][..self.len[i] as usize]
    }

    /// A number that two states share only if their files are the same.
    pub(crate) fn number(&self) -> u64 {
        let mut h = self.base;
        for s in &self.slots {
            let inside = s.sector as u64 * (self.unit as u64) < self.len[s.file as usize];
            h ^= s.base ^ if inside { s.now } else { 0 };
        }
        for (i, len) in self.len.iter().enumerate() {
            h ^= (len + i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(i as u32 * 7 + 11);
        }
        h
    }

    /// All of a write lands, or nothing of it.
    pub(crate) fn set(&mut self, write: usize, lands: bool) {
        let (first, count) = (self.writes[write].first, self.writes[write].count);
        self.writes[write].landed = lands;
        for p in first..first + count {
            self.set_piece(p, lands);
        }
    }

    /// One sector of a write lands, or does not.
    pub(crate) fn set_part(&mut self, write: usize, part: usize, lands: bool) {
        let first = self.writes[write].first;
        self.set_piece(first + part, lands);
    }

    pub(crate) fn part(&self, write: usize, part: usize) -> bool {
        self.pieces[self.writes[write].first + part].landed
    }

    fn set_piece(&mut self, piece: usize, lands: bool) {
        if self.pieces[piece].landed == lands {
            return;
        }
        self.pieces[piece].landed = lands;
        let slot = &mut self.slots[self.pieces[piece].slot as usize];
        let stack = &self.stacks[slot.stack.0 as usize..slot.stack.1 as usize];
        let top = stack.iter().rev().find(|&&p| self.pieces[p as usize].landed);
        let (sum, at) = match top {
            Some(&p) => (self.pieces[p as usize].sum, self.pieces[p as usize].at),
            None => (slot.base, slot.base_at),
        };
        slot.now = sum;
        let from = slot.sector as usize * self.unit;
        self.shown[slot.file as usize][from..from + self.unit]
            .copy_from_slice(&self.arena[at as usize..at as usize + self.unit]);
    }

    /// Decides about lengths, given what landed.
    pub(crate) fn set_lengths(&mut self, lengths: Lengths) {
        self.len.copy_from_slice(&self.durable_len);
        for &w in &self.lengthy {
            let w = &self.writes[w];
            let len = &mut self.len[w.file];
            let counts = match lengths {
                Lengths::Kept => true,
                Lengths::Lost => false,
                Lengths::Landed => w.landed,
            };
            match w.length {
                Length::Grow(end) if counts => *len = (*len).max(end),
                Length::Set(end) if end > *len && counts => *len = end,
                // cutting off is a change like others
                Length::Set(end) if end < *len && w.landed => *len = end,
                _ => {}
            }
        }
    }

    /// Nothing lands.
    pub(crate) fn clear(&mut self) {
        for w in 0..self.writes.len() {
            self.set(w, false);
        }
    }
}
