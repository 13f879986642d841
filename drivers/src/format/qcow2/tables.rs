//! The tables of pointers that are kept in memory whole: the active L1 table and the refcount table.
//!
//! Invariants: the copy in memory is the truth; what differs from the disk is known in pieces of at most 4 KiB; a piece is
//! written as it was at one moment.
//!
//! ```text
//! entries  [ 0 … 511 | 512 … 1023 | … ]      dirty = { piece 1 } ──copy──► write at table offset + 4096
//! ```

use std::cell::RefCell;
use std::collections::BTreeSet;

use ringblock_engine::mem::Buf;

use super::geometry::L1Index;

/// Largest piece, bytes: one write, one page.
const PIECE: u64 = 4096;

/// A table of 8-byte entries with its dirty pieces.
pub(super) struct Table {
    entries: RefCell<Vec<u64>>,
    dirty: RefCell<BTreeSet<usize>>,
    /// Entries in a piece.
    per_piece: usize,
}

/// A copied piece.
pub(super) struct Piece {
    /// Its number.
    pub(super) number: usize,
    /// Byte offset in the table.
    pub(super) offset: u64,
    /// Its content, zero-padded behind the last entry.
    pub(super) bytes: Buf,
}

impl Table {
    pub(super) fn new(entries: Vec<u64>, cluster_size: u64) -> Table {
        let per_piece = (PIECE.min(cluster_size) / 8) as usize;
        Table { entries: RefCell::new(entries), dirty: RefCell::default(), per_piece }
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    /// The entry, 0 behind the end.
    pub(super) fn at(&self, i: usize) -> u64 {
        self.entries.borrow().get(i).copied().unwrap_or(0)
    }

    /// The L1 entry, 0 behind the end.
    pub(super) fn get(&self, i: L1Index) -> u64 {
        usize::try_from(i.0).map_or(0, |i| self.at(i))
    }

    /// Changes an entry that exists.
    pub(super) fn set(&self, i: usize, value: u64) {
        let mut entries = self.entries.borrow_mut();
        debug_assert!(i < entries.len());
        if let Some(e) = entries.get_mut(i) {
            *e = value;
            self.dirty.borrow_mut().insert(i / self.per_piece);
        }
    }

    /// Lengthens or shortens the table; new entries are 0 and count as being on disk.
    pub(super) fn resize(&self, len: usize) {
        self.entries.borrow_mut().resize(len, 0);
        let per = self.per_piece;
        self.dirty.borrow_mut().retain(|&p| p * per < len);
    }

    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.borrow().is_empty()
    }

    /// Copies of the dirty pieces, which then count as clean.
    pub(super) fn take_dirty(&self) -> Vec<Piece> {
        let numbers = std::mem::take(&mut *self.dirty.borrow_mut());
        numbers.into_iter().map(|number| self.piece(number)).collect()
    }

    fn piece(&self, number: usize) -> Piece {
        let entries = self.entries.borrow();
        let first = number * self.per_piece;
        let mut bytes = Buf::zeroed(self.per_piece * 8);
        for (e, b) in entries.iter().skip(first).zip(bytes.chunks_exact_mut(8)) {
            b.copy_from_slice(&e.to_be_bytes());
        }
        Piece { number, offset: first as u64 * 8, bytes }
    }

    /// Marks pieces dirty again whose write failed.
    pub(super) fn set_dirty(&self, numbers: impl Iterator<Item = usize>) {
        let len = self.len();
        self.dirty.borrow_mut().extend(numbers.filter(|&n| n * self.per_piece < len));
    }

    /// The whole table as bytes, padded to `bytes`; it then counts as clean.
    pub(super) fn encode_all(&self, bytes: usize) -> Buf {
        let mut out = Buf::zeroed(bytes);
        for (e, b) in self.entries.borrow().iter().zip(out.chunks_exact_mut(8)) {
            b.copy_from_slice(&e.to_be_bytes());
        }
        out
    }

    /// Forgets that anything is dirty: the whole table has been written elsewhere.
    pub(super) fn set_clean(&self) {
        self.dirty.borrow_mut().clear();
    }
}
