//! Which slice is in which frame: a sparse table that any core reads and the home core alone writes.
//!
//! Invariants: a lookup costs three dependent loads and never allocates; memory is taken only for parts of the disk that
//! were touched; a part once made stays until the image is closed, so a reader's reference is always good.
//!
//! ```text
//! slice number │ 9 bits top │ 10 bits middle │ 12 bits leaf │ ──► MISSING │ EMPTY │ frame
//! ```
//! Why not one flat array: the largest legal disk has 2^31 slices.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::geometry::SliceIndex;

const LEAF_BITS: u32 = 12;
const MIDDLE_BITS: u32 = 10;
const TOP_BITS: u32 = 9;

type Leaf = Box<[AtomicU32]>;
type Middle = Box<[OnceLock<Leaf>]>;

/// What is known of a slice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// Not in memory.
    Missing,
    /// All its entries are zero; it needs no frame.
    Empty,
    /// In this frame.
    Frame(u32),
}

impl Place {
    fn pack(self) -> u32 {
        match self {
            Place::Missing => 0,
            Place::Empty => 1,
            Place::Frame(f) => f + 2,
        }
    }

    fn unpack(v: u32) -> Place {
        match v {
            0 => Place::Missing,
            1 => Place::Empty,
            f => Place::Frame(f - 2),
        }
    }
}

/// The table.
pub(super) struct Index {
    top: Box<[OnceLock<Middle>]>,
}

fn locks<T>(bits: u32) -> Box<[OnceLock<T>]> {
    (0..1 << bits).map(|_| OnceLock::new()).collect()
}

fn split(s: SliceIndex) -> (usize, usize, usize) {
    let mask = |bits: u32| (1u64 << bits) - 1;
    let top = s.0 >> (LEAF_BITS + MIDDLE_BITS);
    (
        (top & mask(TOP_BITS)) as usize,
        (s.0 >> LEAF_BITS & mask(MIDDLE_BITS)) as usize,
        (s.0 & mask(LEAF_BITS)) as usize,
    )
}

impl Index {
    pub(super) fn new() -> Index {
        Index { top: locks(TOP_BITS) }
    }

    /// Where a slice is.
    #[inline]
    pub(super) fn get(&self, s: SliceIndex) -> Place {
        let (a, b, c) = split(s);
        let leaf = self.top[a].get().and_then(|m| m[b].get());
        leaf.map_or(Place::Missing, |l| Place::unpack(l[c].load(Ordering::Acquire)))
    }

    /// Says where a slice is. Home core only.
    pub(super) fn set(&self, s: SliceIndex, place: Place) {
        debug_assert!(s.0 < 1 << (TOP_BITS + MIDDLE_BITS + LEAF_BITS));
        let (a, b, c) = split(s);
        let middle = self.top[a].get_or_init(|| locks(MIDDLE_BITS));
        let leaf = middle[b].get_or_init(|| (0..1 << LEAF_BITS).map(|_| AtomicU32::new(0)).collect());
        leaf[c].store(place.pack(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: slices do not alias, up to the last one of the largest disk. Method: set a spread, read all back.
    #[test]
    fn slices_do_not_alias() {
        let index = Index::new();
        let all: Vec<u64> = (0..31).map(|b| 1 << b).chain([0, 4095, 4097, (1 << 31) - 1]).collect();
        for (i, &s) in all.iter().enumerate() {
            assert_eq!(index.get(SliceIndex(s)), Place::Missing);
            index.set(SliceIndex(s), Place::Frame(i as u32));
        }
        for (i, &s) in all.iter().enumerate() {
            assert_eq!(index.get(SliceIndex(s)), Place::Frame(i as u32));
        }
        index.set(SliceIndex(1), Place::Empty);
        assert_eq!(index.get(SliceIndex(1)), Place::Empty);
    }
}
