//! The home core's side of the slice cache: which frame holds what, and which one to give away.
//!
//! Invariants: a frame is either free, or in exactly one slice's place, or in the hands of whoever is filling it; a dirty,
//! written or pinned frame is never given away, so the map in memory is always the newest (I1).
//!
//! ```text
//! free ──take──► being filled ──link──► clean ◄──► dirty ──snapshot──► writing ──► clean
//!                                         └── sweep: not looked at since the last pass ──► taken again
//! ```

use std::cell::{Cell, RefCell};

use ringblock_engine::sync::Event;

use super::geometry::SliceIndex;
use super::index::Place;
use super::map::Shared;

#[derive(Clone, Copy, Default)]
struct Meta {
    slice: Option<SliceIndex>,
    dirty: bool,
    writing: bool,
    pins: u32,
}

impl Meta {
    fn evictable(&self) -> bool {
        self.slice.is_some() && !self.dirty && !self.writing && self.pins == 0
    }
}

/// What the home core knows about the frames of [`Shared`].
pub(super) struct Frames {
    meta: RefCell<Vec<Meta>>,
    free: RefCell<Vec<u32>>,
    hand: Cell<usize>,
    dirty: Cell<usize>,
    /// All dirty frames, and perhaps some that are not any more.
    dirty_list: RefCell<Vec<u32>>,
    /// Something became evictable or free.
    pub(super) changed: Event,
}

impl Frames {
    pub(super) fn new(count: u32) -> Frames {
        Frames {
            meta: RefCell::new(vec![Meta::default(); count as usize]),
            free: RefCell::new((0..count).rev().collect()),
            hand: Cell::new(0),
            dirty: Cell::new(0),
            dirty_list: RefCell::default(),
            changed: Event::default(),
        }
    }

    /// Number of dirty frames.
    pub(super) fn dirty_count(&self) -> usize {
        self.dirty.get()
    }

    /// A frame to fill: a free one, or a clean one taken from its slice. `None` if all are in use.
    pub(super) fn take(&self, shared: &Shared) -> Option<u32> {
        if let Some(f) = self.free.borrow_mut().pop() {
            return Some(f);
        }
        let mut meta = self.meta.borrow_mut();
        let n = meta.len();
        // Two rounds: the first clears the marks that the second then misses.
        for _ in 0..2 * n {
            let at = self.hand.get();
            self.hand.set((at + 1) % n);
            let m = &mut meta[at];
            if !m.evictable() || shared.take_used(at as u32) {
                continue;
            }
            if let Some(s) = m.slice.take() {
                shared.set_place(s, Place::Missing);
                return Some(at as u32);
            }
        }
        None
    }

    /// Gives an unlinked frame back.
    pub(super) fn give(&self, frame: u32) {
        debug_assert!(self.meta.borrow()[frame as usize].slice.is_none());
        self.free.borrow_mut().push(frame);
        self.changed.notify();
    }

    /// Puts a filled frame in its slice's place, pinned once if asked.
    pub(super) fn link(&self, shared: &Shared, frame: u32, s: SliceIndex, pin: bool) {
        let mut meta = self.meta.borrow_mut();
        let m = &mut meta[frame as usize];
        debug_assert!(m.slice.is_none() && m.pins == 0 && !m.dirty && !m.writing);
        debug_assert!(!matches!(shared.place(s), Place::Frame(_)), "a slice has one frame");
        *m = Meta { slice: Some(s), pins: u32::from(pin), ..Meta::default() };
        shared.set_place(s, Place::Frame(frame));
    }

    /// Keeps a linked frame where it is until [`Frames::unpin`].
    pub(super) fn pin(&self, frame: u32) {
        self.meta.borrow_mut()[frame as usize].pins += 1;
    }

    /// Undoes one [`Frames::pin`].
    pub(super) fn unpin(&self, frame: u32) {
        let mut meta = self.meta.borrow_mut();
        let m = &mut meta[frame as usize];
        debug_assert!(m.pins > 0);
        m.pins = m.pins.saturating_sub(1);
        let notify = m.evictable();
        drop(meta);
        if notify {
            self.changed.notify();
        }
    }

    /// Marks a frame as differing from the disk.
    pub(super) fn set_dirty(&self, frame: u32) {
        let mut meta = self.meta.borrow_mut();
        let m = &mut meta[frame as usize];
        debug_assert!(m.slice.is_some() && m.pins > 0, "changed only while pinned");
        self.mark(m, frame);
    }

    fn mark(&self, m: &mut Meta, frame: u32) {
        if !m.dirty {
            m.dirty = true;
            self.dirty.set(self.dirty.get() + 1);
            self.dirty_list.borrow_mut().push(frame);
        }
    }

    /// All dirty frames with their slices; they count as being written until [`Frames::written`].
    pub(super) fn start_writing(&self) -> Vec<(u32, SliceIndex)> {
        let list = std::mem::take(&mut *self.dirty_list.borrow_mut());
        let mut out = Vec::with_capacity(self.dirty.get());
        let mut meta = self.meta.borrow_mut();
        for f in list {
            let m = &mut meta[f as usize];
            if let (true, Some(s)) = (m.dirty, m.slice) {
                debug_assert!(!m.writing, "one write-back at a time");
                m.dirty = false;
                m.writing = true;
                out.push((f, s));
            }
        }
        debug_assert_eq!(out.len(), self.dirty.get());
        self.dirty.set(0);
        out
    }

    /// Ends the writing of a frame; where it failed the frame is dirty again.
    pub(super) fn written(&self, frame: u32, ok: bool) {
        let mut meta = self.meta.borrow_mut();
        let m = &mut meta[frame as usize];
        debug_assert!(m.writing);
        m.writing = false;
        if !ok {
            self.mark(m, frame);
        }
        drop(meta);
        self.changed.notify();
    }

    /// Takes slices at or above `first` out of the cache (the disk shrinks); none of them is in use.
    pub(super) fn drop_from(&self, shared: &Shared, first: SliceIndex) {
        for (f, m) in self.meta.borrow_mut().iter_mut().enumerate() {
            if let Some(s) = m.slice.filter(|&s| s >= first) {
                debug_assert!(m.pins == 0 && !m.writing);
                if m.dirty {
                    self.dirty.set(self.dirty.get() - 1);
                }
                *m = Meta::default();
                shared.set_place(s, Place::Missing);
                self.free.borrow_mut().push(f as u32);
            }
        }
        self.changed.notify();
    }

    /// Unlinks clean slices that nobody looked at since the last call.
    pub(super) fn sweep(&self, shared: &Shared) {
        for (f, m) in self.meta.borrow_mut().iter_mut().enumerate() {
            if m.evictable()
                && !shared.take_used(f as u32)
                && let Some(s) = m.slice.take()
            {
                shared.set_place(s, Place::Missing);
                self.free.borrow_mut().push(f as u32);
            }
        }
    }
}
