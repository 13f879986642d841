//! The read side: lookups of any core in the shared cache of L2 slices.
//!
//! Invariants: a lookup never waits, locks or allocates; what it returns was in the map at one moment during the call
//! (per cluster); an entry becomes visible only through [`Shared::publish`] by the home core, after its data (I2).
//!
//! Frames are reused for other slices without asking the readers: each frame has a sequence number that changes with
//! every reuse, and, for extended entries of two words, with every change. A reader that sees it change looks again.
//! That is why eviction needs no epoch barrier.
//!
//! ```text
//! guest range ─► Index: slice → frame ─► seq, word, seq again ─► decode ─► Data │ Below │ Zero │ Hole │ Encoded
//! ```

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use ringblock_engine::Errno;
use ringblock_engine::driver::{Access, ChildIx, Extents, Lookup, Map, Target};
use ringblock_engine::mutant;
use ringblock_engine::units::GuestOffset;

use super::entry::{Allocation, EntryFormat, L2Entry, RawEntry};
use super::geometry::{Geometry, InSlice, SUBCLUSTERS, SliceIndex};
use super::index::{Index, Place};

/// No backing child.
const NO_CHILD: u8 = u8::MAX;
/// After this many failed looks at a changing entry the reader asks the home core instead.
const LOOKS: u32 = 64;

/// One cached slice.
#[derive(Default)]
struct Frame {
    /// Odd while words change together.
    seq: AtomicU32,
    /// Looked at since the last sweep.
    used: AtomicBool,
    /// Entry words: one per entry, or two with extended entries. Made when the frame is first used.
    words: OnceLock<Box<[AtomicU64]>>,
}

/// What all cores share of an open image.
pub(super) struct Shared {
    format: EntryFormat,
    size: AtomicU64,
    data_child: ChildIx,
    below: AtomicU8,
    index: Index,
    frames: Box<[Frame]>,
}

impl Shared {
    /// An empty cache of `frames` slices. Guest data is in child `data_child`.
    pub(super) fn new(
        format: EntryFormat,
        size: u64,
        frames: u32,
        data_child: ChildIx,
        below: Option<ChildIx>,
    ) -> Shared {
        Shared {
            format,
            size: AtomicU64::new(size),
            data_child,
            below: AtomicU8::new(below.unwrap_or(NO_CHILD)),
            index: Index::new(),
            frames: (0..frames).map(|_| Frame::default()).collect(),
        }
    }

    /// Bytes of the virtual disk.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// Whether unallocated clusters read from a backing file.
    pub(super) fn has_below(&self) -> bool {
        self.below.load(Ordering::Acquire) != NO_CHILD
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.format.geometry
    }

    pub(super) fn format(&self) -> &EntryFormat {
        &self.format
    }

    pub(super) fn frame_count(&self) -> u32 {
        self.frames.len() as u32
    }

    pub(super) fn place(&self, s: SliceIndex) -> Place {
        self.index.get(s)
    }

    /// Says where a slice is. Home core only; a frame that is named here must be filled.
    pub(super) fn set_place(&self, s: SliceIndex, place: Place) {
        self.index.set(s, place);
    }

    fn words_per_entry(&self) -> usize {
        if self.format.geometry.extended { 2 } else { 1 }
    }

    fn words(&self, frame: u32) -> &[AtomicU64] {
        self.frames[frame as usize].words.get_or_init(|| {
            let n = self.format.geometry.slice_entries() as usize * self.words_per_entry();
            (0..n).map(|_| AtomicU64::new(0)).collect()
        })
    }

    /// Fills a frame that no slice is in. Missing words are zero. Home core only.
    pub(super) fn fill(&self, frame: u32, content: impl Iterator<Item = u64>) {
        let f = &self.frames[frame as usize];
        let words = self.words(frame);
        begin(f);
        let mut content = content;
        for w in words {
            w.store(content.next().unwrap_or(0), Ordering::Relaxed);
        }
        end(f);
        f.used.store(true, Ordering::Relaxed);
    }

    /// Takes the "looked at" mark of a frame and clears it.
    pub(super) fn take_used(&self, frame: u32) -> bool {
        self.frames[frame as usize].used.swap(false, Ordering::Relaxed)
    }

    /// The raw entry in a frame. Home core only (no one else changes it there).
    pub(super) fn raw(&self, frame: u32, i: InSlice) -> RawEntry {
        let (words, n) = (self.words(frame), self.words_per_entry());
        let word = words[i.at() * n].load(Ordering::Relaxed);
        RawEntry { word, bitmap: if n == 2 { words[i.at() * 2 + 1].load(Ordering::Relaxed) } else { 0 } }
    }

    /// Makes an entry visible to all cores. Home core only.
    pub(super) fn publish(&self, frame: u32, i: InSlice, raw: RawEntry) {
        let (words, n) = (self.words(frame), self.words_per_entry());
        if n == 1 {
            words[i.at()].store(raw.word, Ordering::Release);
            return;
        }
        let f = &self.frames[frame as usize];
        begin(f);
        words[i.at() * 2].store(raw.word, Ordering::Relaxed);
        words[i.at() * 2 + 1].store(raw.bitmap, Ordering::Relaxed);
        end(f);
    }

    /// The bytes of a frame as they go to disk. Home core only.
    pub(super) fn encode(&self, frame: u32, out: &mut [u8]) {
        for (w, b) in self.words(frame).iter().zip(out.chunks_exact_mut(8)) {
            b.copy_from_slice(&w.load(Ordering::Relaxed).to_be_bytes());
        }
    }

    /// Reads one entry of a slice; `None` where the slice is not in memory or changes too fast to be read.
    #[inline]
    fn look(&self, s: SliceIndex, i: InSlice) -> Option<RawEntry> {
        for _ in 0..LOOKS {
            let frame = match self.index.get(s) {
                Place::Missing => return None,
                Place::Empty => return Some(RawEntry::default()),
                Place::Frame(n) => n,
            };
            let f = &self.frames[frame as usize];
            let before = f.seq.load(Ordering::Acquire);
            // The frame may have been given away between the two loads: only if the index still names it now is the
            // sequence number that of this slice.
            let Some(words) = f.words.get().filter(|_| self.index.get(s) == Place::Frame(frame)) else {
                continue;
            };
            let n = self.words_per_entry();
            let word = words[i.at() * n].load(Ordering::Relaxed);
            let bitmap = if n == 2 { words[i.at() * 2 + 1].load(Ordering::Relaxed) } else { 0 };
            fence(Ordering::Acquire);
            if before & 1 == 0 && f.seq.load(Ordering::Relaxed) == before {
                if !f.used.load(Ordering::Relaxed) {
                    f.used.store(true, Ordering::Relaxed);
                }
                return Some(RawEntry { word, bitmap });
            }
            std::hint::spin_loop();
        }
        None
    }

    /// What unallocated guest bytes at `at` are.
    #[inline]
    fn unallocated(&self, at: u64) -> Target {
        match self.below.load(Ordering::Acquire) {
            NO_CHILD => Target::Hole { keeps: None },
            child => Target::Below { child, off: at },
        }
    }
}

/// Starts a change of several words.
fn begin(f: &Frame) {
    let seq = f.seq.load(Ordering::Relaxed);
    debug_assert!(seq & 1 == 0, "one mutator (I1)");
    f.seq.store(seq.wrapping_add(1), Ordering::Relaxed);
    fence(Ordering::Release);
}

/// Ends a change of several words.
fn end(f: &Frame) {
    let seq = f.seq.load(Ordering::Relaxed);
    f.seq.store(seq.wrapping_add(1), Ordering::Release);
}

/// What became of one cluster of a lookup.
enum Step {
    Taken,
    Full,
    Claim,
}

impl Map for Shared {
    fn lookup(&self, access: Access, range: Range<u64>, out: &mut Extents) -> Lookup {
        let g = self.format.geometry;
        let mut at = range.start;
        while at < range.end {
            let c = g.guest_cluster(GuestOffset(at));
            let s = g.slice(c);
            if access != Access::Write && self.index.get(s) == Place::Empty {
                let end = range.end.min((s.0 + 1).saturating_mul(g.slice_span()));
                if !out.push(end - at, self.unallocated(at)) {
                    return Lookup::Hit;
                }
                at = end;
                continue;
            }
            let end = range.end.min((at | (g.cluster_size() - 1)).saturating_add(1));
            let Some(raw) = self.look(s, g.in_slice(c)) else {
                return if at == range.start { Lookup::Miss(s.0) } else { Lookup::Hit };
            };
            let Ok(entry) = self.format.decode(raw) else {
                return if at == range.start { Lookup::Bad(Errno::EIO) } else { Lookup::Hit };
            };
            let before = out.covered();
            let step = match access {
                Access::Write => self.step_write(entry, at, end - at, out),
                _ => self.step_read(entry, raw, at, end - at, out),
            };
            match step {
                Step::Taken => at = end,
                Step::Full => return Lookup::Hit,
                Step::Claim if out.covered() > 0 => return Lookup::Hit,
                Step::Claim => return Lookup::NeedsClaim { len: self.claim_len(at, range.end) },
            }
            debug_assert!(out.covered() > before);
        }
        Lookup::Hit
    }
}

impl Shared {
    /// Adds what a read of `len` bytes at `at`, inside one cluster, finds.
    #[inline]
    fn step_read(&self, entry: L2Entry, raw: RawEntry, at: u64, len: u64, out: &mut Extents) -> Step {
        let g = &self.format.geometry;
        let skip = g.in_cluster(GuestOffset(at));
        let data = |a: Allocation, skip: u64| (self.data_child, a.host.0 + skip);
        let target = match entry {
            L2Entry::Data(a) => {
                let (child, off) = data(a, skip);
                Target::Data { child, off }
            }
            L2Entry::Unallocated => self.unallocated(at),
            L2Entry::Zero { kept } => Target::Zero { keeps: kept.map(|a| data(a, skip)) },
            L2Entry::Compressed(_) => Target::Encoded { cookie: raw.word },
            L2Entry::Sub { host, allocated, zero } => {
                return self.subclusters(at, len, out, |bit, skip| match host {
                    Some(a) if allocated & bit != 0 => {
                        let (child, off) = data(a, skip);
                        Some(Target::Data { child, off })
                    }
                    _ if zero & bit != 0 => Some(Target::Zero { keeps: host.map(|a| data(a, skip)) }),
                    _ => Some(match self.unallocated(at - g.in_cluster(GuestOffset(at)) + skip) {
                        Target::Hole { .. } => Target::Hole { keeps: host.map(|a| data(a, skip)) },
                        below => below,
                    }),
                });
            }
        };
        if out.push(len, target) { Step::Taken } else { Step::Full }
    }

    /// Adds what may be overwritten in place.
    #[inline]
    fn step_write(&self, entry: L2Entry, at: u64, len: u64, out: &mut Extents) -> Step {
        let skip = self.format.geometry.in_cluster(GuestOffset(at));
        match entry {
            L2Entry::Data(Allocation { host, copied }) if copied || mutant!("in-place-copied") => {
                let target = Target::Data { child: self.data_child, off: host.0 + skip };
                if out.push(len, target) { Step::Taken } else { Step::Full }
            }
            L2Entry::Sub { host: Some(Allocation { host, copied: true }), allocated, .. } => self
                .subclusters(at, len, out, |bit, skip| {
                    (allocated & bit != 0)
                        .then_some(Target::Data { child: self.data_child, off: host.0 + skip })
                }),
            _ => Step::Claim,
        }
    }

    /// Adds the subclusters of `len` bytes at `at`; `of` says what the one with this bit is, or that it needs a claim.
    fn subclusters(
        &self,
        at: u64,
        len: u64,
        out: &mut Extents,
        of: impl Fn(u32, u64) -> Option<Target>,
    ) -> Step {
        let g = &self.format.geometry;
        let (sub, mut skip) = (g.subcluster_size(), g.in_cluster(GuestOffset(at)));
        let end = skip + len;
        while skip < end {
            let i = (skip / sub) as u32;
            debug_assert!(i < SUBCLUSTERS);
            let stop = end.min((skip / sub + 1) * sub);
            let Some(target) = of(1 << i, skip) else { return Step::Claim };
            if !out.push(stop - skip, target) {
                return Step::Full;
            }
            skip = stop;
        }
        Step::Taken
    }

    /// How far from `at` a claim reaches: clusters that cannot be written in place, as far as they are in memory.
    fn claim_len(&self, at: u64, end: u64) -> u64 {
        let g = &self.format.geometry;
        let mut stop = end.min((at | (g.cluster_size() - 1)).saturating_add(1));
        if g.extended {
            // Up to the first subcluster that can be written in place.
            let mut probe = (at / g.subcluster_size() + 1) * g.subcluster_size();
            while probe < stop && self.needs_claim(probe, stop) {
                probe += g.subcluster_size();
            }
            if probe < stop {
                return probe - at;
            }
        }
        while stop < end && self.needs_claim(stop, end) {
            stop = end.min(stop.saturating_add(g.cluster_size()));
        }
        stop - at
    }

    /// Whether the first byte at `at` is known to need a claim.
    fn needs_claim(&self, at: u64, end: u64) -> bool {
        let g = &self.format.geometry;
        let c = g.guest_cluster(GuestOffset(at));
        let Some(raw) = self.look(g.slice(c), g.in_slice(c)) else { return false };
        let Ok(entry) = self.format.decode(raw) else { return false };
        let mut out = Extents::new();
        let len = (end - at).min(g.subcluster_size());
        matches!(self.step_write(entry, at, len, &mut out), Step::Claim) && out.covered() == 0
    }
}

#[cfg(test)]
#[path = "map_tests.rs"]
mod tests;
