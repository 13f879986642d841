//! Write-back: the two-barrier group commit that brings the metadata in memory to the disk.
//!
//! Invariants (crash reference, §1): a group is a copy of everything dirty at one moment, so whatever it names was
//! complete at that moment; everything a group's pointers rely on is durable before the first pointer is written; a failed
//! flush poisons the image; the image in memory stays the truth whatever the disk does.
//!
//! ```text
//! header, if a write of it failed ─► flush
//! copy: dirty slices, L1 pieces, freed list            (one moment, no await)
//! refcount blocks ─► flush (data file first) ─► refcount table ─► flush     rules 1, 2, 4; second flush only if needed
//! L2 slices, L1 pieces ─► flush                                             rules 3, 5
//! freed list ─► limbo: durable
//! ```
//! A flush with nothing dirty is one flush of the file. A *write* that fails leaves each sector old or new (D5); both are
//! valid by the above, so the group is simply dirty again and a later flush retries. A *flush* that fails says nothing
//! about what is on the disk for ever after (D4): the image takes no more changes (I9).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use ringblock_engine::Errno;
use ringblock_engine::debug::DebugEvent;
use ringblock_engine::driver::LocalFuture;
use ringblock_engine::mem::Buf;
use ringblock_engine::mutant;
use ringblock_engine::sync::Event;

use super::entry::OFFSET_MASK;
use super::header::incompatible;
use super::owner::Image;
use super::tables::Piece;

/// Writes of a group in flight together.
const PARALLEL: usize = 32;
/// Neighbouring slices become one write of at most this many bytes.
const WRITE_MAX: usize = 256 << 10;
/// Freed runs that may wait before a group is written in the background.
const LIMBO_RUNS: usize = 4096;

/// Who writes a group, and who waits for which.
#[derive(Default)]
pub(super) struct Group {
    started: Cell<u64>,
    running: Cell<bool>,
    /// A background group is on its way to start.
    kicked: Cell<bool>,
    last: Cell<Option<Errno>>,
    finished: Event,
    ids: Cell<u64>,
    /// Files that may hold more than is durable although nothing is dirty.
    unsynced: Cell<bool>,
    errors: RefCell<u64>,
}

impl Group {
    /// A number for a grant.
    pub(super) fn next_id(&self) -> u64 {
        self.ids.set(self.ids.get() + 1);
        self.ids.get()
    }
}

/// A copied slice, where it goes, and the frame it came from.
struct SliceCopy {
    at: u64,
    frame: u32,
    bytes: Buf,
}

/// Everything dirty at one moment.
struct Copies {
    slices: Vec<SliceCopy>,
    l1: Vec<Piece>,
    freed: Vec<(u64, u64)>,
}

impl Image {
    /// Everything committed so far, and the data below it, becomes durable.
    pub(super) async fn flush(self: &Rc<Self>) -> Result<(), Errno> {
        self.poisoned()?;
        if self.options.read_only {
            return Ok(());
        }
        self.write_back().await
    }

    /// Waits for a group that starts after this call; starts it where none runs.
    pub(super) async fn write_back(self: &Rc<Self>) -> Result<(), Errno> {
        let group = &self.group;
        let need = group.started.get() + u64::from(!(group.running.get() && mutant!("flush-own-group")));
        loop {
            if group.started.get() >= need && !group.running.get() {
                return group.last.get().map_or(Ok(()), Err);
            }
            if group.running.get() {
                let mine = group.started.get() >= need;
                group.finished.wait().await;
                if mine {
                    return group.last.get().map_or(Ok(()), Err);
                }
                continue;
            }
            group.started.set(group.started.get() + 1);
            group.running.set(true);
            let result = self.run_group().await;
            group.last.set(result.err());
            group.running.set(false);
            group.finished.notify();
            self.reap_soon();
            return result;
        }
    }

    async fn run_group(self: &Rc<Self>) -> Result<(), Errno> {
        self.poisoned()?;
        self.settle_header().await?;
        let copies = self.copy_dirty();
        let result = self.write_group(&copies).await;
        let Copies { slices, l1, freed } = copies;
        for s in &slices {
            self.frames.written(s.frame, result.is_ok() || mutant!("failed-slices-dirty"));
        }
        if result.is_ok() || mutant!("failed-unlinks-wait") {
            self.limbo.borrow_mut().settle(freed);
        } else {
            *self.group.errors.borrow_mut() += 1;
            self.l1.set_dirty(l1.iter().map(|p| p.number));
            self.limbo.borrow_mut().put_back(freed);
        }
        result
    }

    /// Copies of everything dirty. No await: all of it is as of one moment.
    fn copy_dirty(&self) -> Copies {
        let g = self.geometry;
        let mut slices = Vec::new();
        for (frame, s) in self.frames.start_writing() {
            let table = self.l1.get(g.slice_l1(s)) & OFFSET_MASK;
            debug_assert!(table != 0, "a dirty slice has a table");
            let mut bytes = Buf::new(g.slice_size() as usize);
            self.shared.encode(frame, &mut bytes);
            slices.push(SliceCopy { at: table + g.slice_in_table(s), frame, bytes });
        }
        slices.sort_unstable_by_key(|s| s.at);
        Copies { slices, l1: self.l1.take_dirty(), freed: self.limbo.borrow_mut().take_pending() }
    }

    async fn write_group(self: &Rc<Self>, copies: &Copies) -> Result<(), Errno> {
        // First barrier: data, refcounts, and the first content of new tables (written when they were made).
        if let Some(data) = self.data.as_ref().filter(|_| !mutant!("data-file-flush")) {
            data.flush().await.map_err(|e| self.set_poison(e))?;
        }
        let turn = self.refcounts.lock().await;
        if mutant!("counters-first") {
            drop(turn);
            self.write_pointers(copies).await?;
            return self.refcounts.write_dirty(&self.refcounts.lock().await).await;
        }
        self.refcounts.write_dirty(&turn).await?;
        if self.refcounts.table.is_dirty() {
            // The table may not move or change while pieces of it are on their way: the turn is kept.
            self.write_reftable().await?;
        } else {
            drop(turn);
            if !mutant!("flush-before-pointers") {
                self.barrier().await?;
            }
        }
        self.write_pointers(copies).await
    }

    /// Makes the new refcount blocks durable, then the entries that name them.
    async fn write_reftable(&self) -> Result<(), Errno> {
        let pieces = self.refcounts.table.take_dirty();
        let result = self.write_reftable_pieces(&pieces).await;
        if result.is_err() {
            self.refcounts.table.set_dirty(pieces.iter().map(|p| p.number));
        }
        result
    }

    async fn write_reftable_pieces(&self, pieces: &[Piece]) -> Result<(), Errno> {
        if !mutant!("flush-before-reftable") {
            self.barrier().await?;
        }
        let at = self.header.borrow().reftable_offset.0;
        self.event(DebugEvent::RefblockAllocHookup).await;
        self.event(DebugEvent::ReftableUpdate).await;
        self.write_all(pieces.iter().map(|p| (at + p.offset, Buf::from_slice(&p.bytes))).collect()).await?;
        if mutant!("flush-after-reftable") { Ok(()) } else { self.barrier().await }
    }

    /// L2 slices and L1 pieces, which may name what is durable now.
    async fn write_pointers(&self, copies: &Copies) -> Result<(), Errno> {
        if copies.slices.is_empty() && copies.l1.is_empty() {
            return Ok(());
        }
        if !copies.slices.is_empty() {
            self.event(DebugEvent::L2Update).await;
            self.write_all(self.slice_writes(&copies.slices)).await?;
        }
        if !copies.l1.is_empty() {
            self.event(DebugEvent::L1Update).await;
            let at = self.header.borrow().l1_offset.0;
            let pieces = copies.l1.iter().map(|p| (at + p.offset, Buf::from_slice(&p.bytes)));
            self.write_all(pieces.collect()).await?;
        }
        if mutant!("flush-after-pointers") { Ok(()) } else { self.barrier().await }
    }

    /// Writes of slices, neighbours together.
    fn slice_writes(&self, slices: &[SliceCopy]) -> Vec<(u64, Buf)> {
        let size = self.geometry.slice_size();
        let mut out = Vec::new();
        let mut rest = slices;
        while let Some(first) = rest.first() {
            let most = (WRITE_MAX / size as usize).max(1);
            let follows = |w: &[SliceCopy]| w[0].at + size == w[1].at;
            let n = 1 + rest.windows(2).take(most - 1).take_while(|w| follows(w)).count();
            let mut buf = Buf::new(n * size as usize);
            for (s, part) in rest[..n].iter().zip(buf.chunks_exact_mut(size as usize)) {
                part.copy_from_slice(&s.bytes);
            }
            out.push((first.at, buf));
            rest = &rest[n..];
        }
        out
    }

    /// Writes to the image file, several at a time. The first error is returned after all have ended.
    async fn write_all(&self, writes: Vec<(u64, Buf)>) -> Result<(), Errno> {
        let mut result = Ok(());
        let mut writes = writes.into_iter().peekable();
        while writes.peek().is_some() && result.is_ok() {
            let batch = writes.by_ref().take(PARALLEL).map(|(at, buf)| self.file.write(at, buf)).collect();
            result = join(batch).await;
        }
        result
    }

    /// Starts a group in the background where the cache or limbo fills up.
    pub(super) fn relieve(self: &Rc<Self>) {
        let full = self.frames.dirty_count() > self.shared.frame_count() as usize / 2
            || self.limbo.borrow().pending_runs() > LIMBO_RUNS;
        if !full || self.group.running.get() || self.group.kicked.replace(true) {
            return;
        }
        let image = self.clone();
        self.runtime.spawn(Box::pin(async move {
            // An error shows at the next flush; what failed stays dirty.
            let _ = image.write_back().await;
            image.group.kicked.set(false);
        }));
    }

    /// Writes everything back and gives reserved clusters back. Roots are drained.
    pub(super) async fn close(self: &Rc<Self>) -> Result<(), Errno> {
        if self.options.read_only {
            return Ok(());
        }
        self.poisoned()?;
        debug_assert!(self.idle(), "closed with claims in force");
        self.group.unsynced.set(!mutant!("close-flushes"));
        while self.is_dirty() || self.group.unsynced.replace(false) {
            self.write_back().await?;
            self.reap_all().await;
            self.give_back_run().await?;
        }
        if self.header.borrow().has(incompatible::DIRTY) && self.leaked.get() == 0 {
            self.header.borrow_mut().incompatible &= !incompatible::DIRTY;
            self.write_header_durable().await?;
        }
        Ok(())
    }

    /// Whether memory and disk differ.
    pub(super) fn is_dirty(&self) -> bool {
        self.frames.dirty_count() > 0
            || self.l1.is_dirty()
            || self.refcounts.is_dirty()
            || self.limbo.borrow().is_pending()
            || self.is_header_unsure()
    }
}

/// Waits for all; the first error.
async fn join(mut list: Vec<LocalFuture<'_, Result<(), Errno>>>) -> Result<(), Errno> {
    let mut result = Ok(());
    poll_fn(|cx| {
        list.retain_mut(|f| match f.as_mut().poll(cx) {
            Poll::Ready(r) => {
                result = result.and(r);
                false
            }
            Poll::Pending => true,
        });
        if list.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    result
}
