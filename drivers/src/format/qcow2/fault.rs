//! Faults: bringing a slice of an L2 table into memory, once for all who wait.
//!
//! Invariants: a slice is read at most once at a time; a table that moved while it was read is read again; what is read
//! from the disk is newer than nothing in memory, because dirty frames are never given away.
//!
//! ```text
//! Miss(slice) ─► in flight? wait : L1 entry ─► none: Empty
//!                                           └► frame, read, check entries ─► all zero: Empty, else linked
//! ```

use std::rc::Rc;

use ringblock_engine::Errno;
use ringblock_engine::debug::DebugEvent;
use ringblock_engine::mem::Buf;
use ringblock_engine::sync::Event;
use ringblock_engine::units::HostOffset;

use super::entry::{OFFSET_MASK, RawEntry};
use super::geometry::SliceIndex;
use super::index::Place;
use super::owner::Image;

impl Image {
    /// Makes sure that a slice is known: in a frame, or empty.
    pub(super) async fn fault(self: &Rc<Self>, s: SliceIndex) -> Result<(), Errno> {
        if self.geometry.slice_l1(s).0 >= self.l1.len() as u64 {
            return Err(Errno::EINVAL);
        }
        loop {
            if self.shared.place(s) != Place::Missing {
                return Ok(());
            }
            let flying = self.faults.borrow().get(&s).cloned();
            match flying {
                Some(event) => event.wait().await,
                None => return self.load_alone(s).await,
            }
        }
    }

    async fn load_alone(self: &Rc<Self>, s: SliceIndex) -> Result<(), Errno> {
        let event = Rc::new(Event::default());
        self.faults.borrow_mut().insert(s, event.clone());
        let result = self.load(s).await;
        self.faults.borrow_mut().remove(&s);
        event.notify();
        result
    }

    async fn load(self: &Rc<Self>, s: SliceIndex) -> Result<(), Errno> {
        let g = self.geometry;
        loop {
            let l1 = self.l1.get(g.slice_l1(s));
            let table = HostOffset(l1 & OFFSET_MASK);
            if table.0 == 0 {
                self.shared.set_place(s, Place::Empty);
                return Ok(());
            }
            if !g.is_host_aligned(table) {
                self.set_corrupt(&format!(
                    "L2 table offset {table} unaligned (L1 index: {})",
                    g.slice_l1(s).0
                ));
                return Err(Errno::EIO);
            }
            let frame = self.take_frame().await?;
            let at = table.0 + g.slice_in_table(s);
            self.event(DebugEvent::L2Load).await;
            let (result, bytes) = self.file.read(at, Buf::new(g.slice_size() as usize)).await;
            if result.is_err() || self.l1.get(g.slice_l1(s)) != l1 {
                self.frames.give(frame);
                result?;
                continue;
            }
            if bytes.is_zero() {
                self.frames.give(frame);
                self.shared.set_place(s, Place::Empty);
                return Ok(());
            }
            let words = bytes.chunks_exact(8).map(|b| b.try_into().map_or(0, u64::from_be_bytes));
            self.shared.fill(frame, words);
            self.check_slice(s, frame);
            self.frames.link(&self.shared, frame, s, false);
            return Ok(());
        }
    }

    /// A frame that nobody else has, writing dirty ones back if it must be.
    pub(super) async fn take_frame(self: &Rc<Self>) -> Result<u32, Errno> {
        loop {
            if let Some(frame) = self.frames.take(&self.shared) {
                return Ok(frame);
            }
            if self.frames.dirty_count() > 0 {
                self.write_back().await?;
            } else {
                self.frames.changed.wait().await;
            }
        }
    }

    /// Looks for entries that name the image's own tables: a guest write through such an entry would destroy the image.
    /// They are made unusable in memory, and a writable image is marked corrupt.
    fn check_slice(self: &Rc<Self>, s: SliceIndex, frame: u32) {
        if self.external() {
            return;
        }
        let g = self.geometry;
        let meta = self.metadata.borrow();
        let mut bad = Vec::new();
        for i in 0..g.slice_entries() {
            let raw = self.shared.raw(frame, super::geometry::InSlice(i));
            if raw.word == 0 || raw.word & super::entry::COMPRESSED != 0 {
                continue;
            }
            let host = g.host_cluster(HostOffset(raw.word & OFFSET_MASK));
            if host.0 != 0 && meta.contains(&host.0) {
                bad.push((i, host));
            }
        }
        drop(meta);
        for (i, host) in bad {
            let broken = RawEntry::from(super::entry::BROKEN);
            self.shared.publish(frame, super::geometry::InSlice(i), broken);
            let cluster = g.slice_start(s).0 + i;
            self.set_corrupt(&format!(
                "Guest cluster {cluster} overlaps with metadata in host cluster {}",
                host.0
            ));
        }
    }
}
