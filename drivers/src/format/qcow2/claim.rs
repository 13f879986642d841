//! Allocating writes: claim → (the engine writes the data) → commit.
//!
//! Invariants: nothing changes in the map before `commit` (I2); a grant's clusters are held by a ticket until commit or
//! abort (I5); the slice that will be changed is in memory and pinned, and its table may be written in place, so that
//! commit neither waits nor fails for want of room.
//!
//! ```text
//! claim:  ticket ─► slice in memory ─► table ours alone ─► what is there? ─► In place: already allocated meanwhile
//!                                                                         ├► Reuse: kept or partly used cluster of ours
//!                                                                         └► New: fresh clusters, copy-on-write around
//! commit: entries published, old clusters to limbo, ticket back
//! ```

use std::ops::Range;
use std::rc::Rc;

use ringblock_engine::Errno;
use ringblock_engine::debug::DebugEvent;
use ringblock_engine::driver::{Grant, GrantSeg};
use ringblock_engine::mutant;
use ringblock_engine::units::{GuestOffset, HostOffset};
use smallvec::smallvec;

use super::claims::Ticket;
use super::entry::{Allocation, COPIED, L2Entry, OFFSET_MASK, Packed};
use super::geometry::{GuestCluster, HostCluster, L1Index, SUBCLUSTERS, SliceIndex};
use super::index::Place;
use super::owner::Image;

/// Most bytes one grant covers.
const GRANT_BYTES: u64 = 4 << 20;

/// How a grant's clusters come to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// Already writable: nothing to publish.
    InPlace,
    /// In host clusters that the entries keep already.
    Reuse,
    /// In clusters taken from the allocator.
    New,
}

/// A grant in force.
pub(super) struct Live {
    kind: Kind,
    first: GuestCluster,
    count: u64,
    host: HostOffset,
    frame: u32,
    _ticket: Ticket,
}

/// A slice held in memory; commit needs it there.
struct Held {
    frame: u32,
    slice: SliceIndex,
}

impl Image {
    /// Reserves host space for the beginning of a guest range.
    pub(super) async fn claim(self: &Rc<Self>, range: Range<u64>) -> Result<Grant, Errno> {
        self.writable()?;
        let g = self.geometry;
        if range.start >= range.end || range.end > self.shared.size() {
            return Err(Errno::EINVAL);
        }
        let first = g.guest_cluster(GuestOffset(range.start));
        let slice = g.slice(first);
        // One slice, and not too much at a time.
        let stop = (slice.0 + 1).saturating_mul(g.slice_span()).min(range.start.saturating_add(GRANT_BYTES));
        let range = range.start..range.end.min(stop);
        let end = GuestCluster(g.guest_cluster(GuestOffset(range.end - 1)).0 + 1);
        let ticket = self.claims.lock(first..end).await;
        self.own_table(g.slice_l1(slice)).await?;
        let held = self.hold(slice).await?;
        match self.grant(range, first, end, &held).await {
            Ok((grant, kind, count, host)) => {
                ticket.shrink(GuestCluster(first.0 + count));
                let live = Live { kind, first, count, host, frame: held.frame, _ticket: ticket };
                self.live.borrow_mut().insert(grant.id, live);
                Ok(grant)
            }
            Err(e) => {
                self.frames.unpin(held.frame);
                Err(e)
            }
        }
    }

    /// Brings a slice into a frame and pins it there.
    async fn hold(self: &Rc<Self>, s: SliceIndex) -> Result<Held, Errno> {
        loop {
            match self.shared.place(s) {
                Place::Frame(frame) => {
                    self.frames.pin(frame);
                    return Ok(Held { frame, slice: s });
                }
                Place::Missing => self.fault(s).await?,
                Place::Empty => {
                    let frame = self.take_frame().await?;
                    if self.shared.place(s) != Place::Empty {
                        self.frames.give(frame);
                        continue;
                    }
                    self.shared.fill(frame, std::iter::empty());
                    self.frames.link(&self.shared, frame, s, true);
                    return Ok(Held { frame, slice: s });
                }
            }
        }
    }

    /// [`Image::hold`] for other parts of the write side: the pinned frame.
    pub(super) async fn hold_frame(self: &Rc<Self>, s: SliceIndex) -> Result<u32, Errno> {
        Ok(self.hold(s).await?.frame)
    }

    fn entry(self: &Rc<Self>, frame: u32, c: GuestCluster) -> Result<L2Entry, Errno> {
        let raw = self.shared.raw(frame, self.geometry.in_slice(c));
        self.shared.format().decode(raw).map_err(|bad| {
            self.set_corrupt(&format!("{bad} (guest cluster {})", c.0));
            Errno::EIO
        })
    }

    /// The entry of a cluster whose slice is pinned.
    pub(super) fn entry_of(self: &Rc<Self>, frame: u32, c: GuestCluster) -> Result<L2Entry, Errno> {
        self.entry(frame, c)
    }

    /// Decides how the beginning of the range is written.
    async fn grant(
        self: &Rc<Self>,
        range: Range<u64>,
        first: GuestCluster,
        end: GuestCluster,
        held: &Held,
    ) -> Result<(Grant, Kind, u64, HostOffset), Errno> {
        debug_assert!(self.geometry.slice(first) == held.slice);
        let old = self.entry(held.frame, first)?;
        let (kind, host) = match old {
            L2Entry::Data(a) if a.copied => (Kind::InPlace, a.host),
            L2Entry::Zero { kept: Some(a) } if a.copied => (Kind::Reuse, a.host),
            L2Entry::Sub { host: Some(a), .. } if a.copied => (Kind::Reuse, a.host),
            _ => return self.grant_new(range, first, end, held.frame, old).await,
        };
        let count = self.same_run(held.frame, first, end, host, kind)?;
        let guest = range.start..range.end.min(self.geometry.guest_offset(GuestCluster(first.0 + count)).0);
        let (head, tail) = match kind {
            Kind::InPlace => (0, 0),
            _ => self.padding_in(held.frame, &guest)?,
        };
        Ok((self.make(guest, head, tail, first, host), kind, count, host))
    }

    /// How many clusters from `first` are of the same kind and follow each other in the file.
    fn same_run(
        self: &Rc<Self>,
        frame: u32,
        first: GuestCluster,
        end: GuestCluster,
        host: HostOffset,
        kind: Kind,
    ) -> Result<u64, Errno> {
        let mut count = 1;
        for c in first.0 + 1..end.0 {
            let next = HostOffset(host.0 + (count << self.geometry.cluster_bits));
            let fits = match self.entry(frame, GuestCluster(c))? {
                L2Entry::Data(a) => kind == Kind::InPlace && a.copied && a.host == next,
                L2Entry::Zero { kept: Some(a) } => kind == Kind::Reuse && a.copied && a.host == next,
                L2Entry::Sub { host: Some(a), .. } => kind == Kind::Reuse && a.copied && a.host == next,
                _ => false,
            };
            if !fits {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// Bytes to copy around `guest` in clusters that are reused: up to the edge of the cluster, or of the subcluster, and
    /// nothing where the subcluster is there already.
    fn padding_in(self: &Rc<Self>, frame: u32, guest: &Range<u64>) -> Result<(u64, u64), Errno> {
        let g = self.geometry;
        let sub = g.subcluster_size();
        let there = |at: u64| -> Result<bool, Errno> {
            let c = g.guest_cluster(GuestOffset(at));
            Ok(match self.entry(frame, c)? {
                L2Entry::Sub { allocated, .. } => allocated & 1 << (g.in_cluster(GuestOffset(at)) / sub) != 0,
                L2Entry::Data(_) => true,
                _ => false,
            })
        };
        let head = if there(guest.start)? { 0 } else { guest.start % sub };
        let tail = if there(guest.end - 1)? { 0 } else { guest.end.next_multiple_of(sub) - guest.end };
        Ok((head, tail))
    }

    /// Takes new clusters.
    async fn grant_new(
        self: &Rc<Self>,
        range: Range<u64>,
        first: GuestCluster,
        end: GuestCluster,
        frame: u32,
        old: L2Entry,
    ) -> Result<(Grant, Kind, u64, HostOffset), Errno> {
        let g = self.geometry;
        let mut want = 1;
        while first.0 + want < end.0 && needs_new(&self.entry(frame, GuestCluster(first.0 + want))?) {
            want += 1;
        }
        let (host, count, fresh) = if self.external() {
            (HostOffset(g.guest_offset(first).0), want, false)
        } else {
            let run = self.allocate(want).await?;
            (g.host_offset(run.first), run.count, run.fresh)
        };
        let guest = range.start..range.end.min(g.guest_offset(GuestCluster(first.0 + count)).0);
        let last = self.entry(frame, GuestCluster(first.0 + count - 1))?;
        let head = self.padding(
            &old,
            fresh,
            g.in_cluster(GuestOffset(guest.start)),
            guest.start % g.subcluster_size(),
        );
        let sub_tail = guest.end.next_multiple_of(g.subcluster_size()) - guest.end;
        let tail =
            self.padding(&last, fresh, guest.end.next_multiple_of(g.cluster_size()) - guest.end, sub_tail);
        let head = if mutant!("copy-head") { 0 } else { head };
        let tail = if mutant!("copy-tail") { 0 } else { tail };
        Ok((self.make(guest, head, tail, first, host), Kind::New, count, host))
    }

    /// Bytes to copy at one end of new clusters: `whole` up to the cluster's edge, `sub` up to the subcluster's.
    fn padding(&self, old: &L2Entry, fresh: bool, whole: u64, sub: u64) -> u64 {
        let reads_zero = match old {
            L2Entry::Zero { .. } => true,
            L2Entry::Unallocated => !self.shared.has_below(),
            _ => false,
        };
        match old {
            // Space that was never used reads as zeros already.
            _ if (fresh || mutant!("zero-fill")) && reads_zero => 0,
            // Subclusters that are not written stay as they are.
            L2Entry::Unallocated | L2Entry::Zero { .. } | L2Entry::Sub { host: None, .. } => sub,
            _ => whole,
        }
    }

    /// Puts a grant together.
    fn make(&self, guest: Range<u64>, head: u64, tail: u64, first: GuestCluster, host: HostOffset) -> Grant {
        let g = self.geometry;
        let start = guest.start - head;
        let off = host.0 + (start - g.guest_offset(first).0);
        let len = guest.end + tail - start;
        let id = self.group.next_id();
        Grant {
            id,
            guest,
            head,
            tail,
            segs: smallvec![GrantSeg { child: self.options.data_child, off, len }],
        }
    }

    /// Publishes a grant whose data is written.
    pub(super) fn commit(self: &Rc<Self>, grant: &Grant) -> Result<(), Errno> {
        if let Err(e) = self.poisoned() {
            self.abort(grant);
            return Err(e);
        }
        let live = self.live.borrow_mut().remove(&grant.id).ok_or(Errno::EINVAL)?;
        let g = self.geometry;
        if live.kind != Kind::InPlace {
            let written = grant.guest.start - grant.head..grant.guest.end + grant.tail;
            for i in 0..live.count {
                let c = GuestCluster(live.first.0 + i);
                let host = HostOffset(live.host.0 + (i << g.cluster_bits));
                self.publish_data(live.frame, c, host, live.kind == Kind::New, &written)?;
            }
        }
        self.frames.unpin(live.frame);
        drop(live);
        self.relieve();
        Ok(())
    }

    /// The new entry of one cluster of a grant.
    fn publish_data(
        self: &Rc<Self>,
        frame: u32,
        c: GuestCluster,
        host: HostOffset,
        new: bool,
        written: &Range<u64>,
    ) -> Result<(), Errno> {
        let g = self.geometry;
        let old = self.entry(frame, c)?;
        let a = Allocation { host, copied: true };
        let entry =
            if g.extended { self.merged(&old, a, new, self.mask(c, written)) } else { L2Entry::Data(a) };
        debug_assert!(!matches!(old, L2Entry::Data(o) if o.copied && o.host != host && !new), "I7");
        self.replace(frame, c, entry);
        if new {
            self.unlink(&old);
        }
        Ok(())
    }

    /// The subclusters of `c` that a byte range touches.
    pub(super) fn mask(&self, c: GuestCluster, bytes: &Range<u64>) -> u32 {
        let g = self.geometry;
        let base = g.guest_offset(c).0;
        let sub = g.subcluster_size();
        let from = bytes.start.max(base) - base;
        let to = bytes.end.min(base + g.cluster_size()).saturating_sub(base);
        let (a, b) = (from / sub, to.div_ceil(sub).min(u64::from(SUBCLUSTERS)));
        (a..b).fold(0, |m, i| m | 1 << i)
    }

    /// An extended entry after the subclusters in `mask` were written at `a`.
    fn merged(&self, old: &L2Entry, a: Allocation, new: bool, mask: u32) -> L2Entry {
        let all = u32::MAX;
        let (allocated, zero) = match *old {
            L2Entry::Unallocated => (0, 0),
            L2Entry::Zero { .. } => (0, all),
            L2Entry::Sub { allocated, zero, .. } if !new => (allocated, zero),
            L2Entry::Sub { host: None, zero, .. } => (0, zero),
            // Everything was copied.
            _ => return L2Entry::Data(a),
        };
        match (allocated | mask, zero & !mask) {
            (u32::MAX, _) => L2Entry::Data(a),
            (allocated, zero) => L2Entry::Sub { host: Some(a), allocated, zero },
        }
    }

    /// Publishes an entry and marks its slice dirty. The slice is pinned.
    pub(super) fn replace(&self, frame: u32, c: GuestCluster, entry: L2Entry) {
        let raw = self.shared.format().encode(entry);
        debug_assert!(
            self.l1.get(self.geometry.l1_index(c)) & COPIED != 0,
            "only tables of our own are changed"
        );
        debug_assert_eq!(self.shared.format().decode(raw), Ok(entry));
        self.shared.publish(frame, self.geometry.in_slice(c), raw);
        self.frames.set_dirty(frame);
    }

    /// Sends the clusters that an entry named to limbo.
    pub(super) fn unlink(&self, old: &L2Entry) {
        if self.external() {
            return;
        }
        let g = self.geometry;
        let mut limbo = self.limbo.borrow_mut();
        match *old {
            L2Entry::Data(a) | L2Entry::Zero { kept: Some(a) } | L2Entry::Sub { host: Some(a), .. } => {
                limbo.unlinked(g.host_cluster(a.host), 1);
            }
            L2Entry::Compressed(Packed { at, len }) => {
                let first = g.host_cluster(at);
                let last = g.host_cluster(HostOffset(at.0 + len - 1));
                limbo.unlinked(first, last.0 - first.0 + 1);
            }
            _ => {}
        }
    }

    /// Gives a grant back unused.
    pub(super) fn abort(self: &Rc<Self>, grant: &Grant) {
        let Some(live) = self.live.borrow_mut().remove(&grant.id) else { return };
        self.frames.unpin(live.frame);
        if live.kind == Kind::New && !self.external() {
            self.give_back(self.geometry.host_cluster(live.host), live.count);
        }
    }

    /// Makes sure that the L2 table below an L1 entry exists and belongs to the active image alone.
    pub(super) async fn own_table(self: &Rc<Self>, i: L1Index) -> Result<(), Errno> {
        // In a damaged image the flag may stand there alone: it is a table that is ours, not the flag.
        let ours = |entry: u64| entry & COPIED != 0 && entry & OFFSET_MASK != 0;
        if ours(self.l1.get(i)) || self.l1.get(i) != 0 && mutant!("own-table") {
            return Ok(());
        }
        let _turn = self.tables_turn.lock().await;
        let g = self.geometry;
        let old = self.l1.get(i);
        if ours(old) {
            return Ok(());
        }
        if i.at() >= self.l1.len() {
            return Err(Errno::EINVAL);
        }
        let run = self.allocate(1).await?;
        if let Err(e) = self.fill_table(g.host_offset(run.first), HostOffset(old & OFFSET_MASK)).await {
            self.give_back(run.first, 1);
            return Err(e);
        }
        self.l1.set(i.at(), g.host_offset(run.first).0 | COPIED);
        self.metadata.borrow_mut().insert(run.first.0);
        if old & OFFSET_MASK != 0 {
            self.limbo.borrow_mut().unlinked(g.host_cluster(HostOffset(old & OFFSET_MASK)), 1);
        }
        Ok(())
    }

    /// The first content of a new L2 table, written whole before anything names it (rule 3): zeros, or the old table.
    async fn fill_table(self: &Rc<Self>, at: HostOffset, old: HostOffset) -> Result<(), Errno> {
        let g = self.geometry;
        if mutant!("new-table-content") {
            return Ok(());
        }
        if old.0 == 0 {
            self.event(DebugEvent::L2AllocWrite).await;
            return self.write_zeros(at, g.cluster_size()).await;
        }
        if !g.is_host_aligned(old) {
            self.set_corrupt(&format!("L2 table offset {old} unaligned"));
            return Err(Errno::EIO);
        }
        self.event(DebugEvent::L2AllocCowRead).await;
        let (result, bytes) =
            self.file.read(old.0, ringblock_engine::mem::Buf::new(g.cluster_size() as usize)).await;
        result?;
        self.event(DebugEvent::L2AllocWrite).await;
        self.file.write(at.0, bytes).await
    }

    /// Whether a cluster is held by a claim in force: for assertions.
    pub(super) fn idle(&self) -> bool {
        self.live.borrow().is_empty() && self.claims.is_idle()
    }

    /// The file cluster count of a new allocation that was never used, given back at close.
    pub(super) async fn give_back_run(self: &Rc<Self>) -> Result<(), Errno> {
        let run = self.alloc.borrow_mut().take_run();
        if run.is_empty() {
            return Ok(());
        }
        let turn = self.refcounts.lock().await;
        let free = self.refcounts.release(&turn, HostCluster(run.start), run.end - run.start).await?;
        let mut alloc = self.alloc.borrow_mut();
        free.iter().for_each(|&c| alloc.freed(c));
        Ok(())
    }
}

/// Whether a cluster cannot be written where it is.
fn needs_new(e: &L2Entry) -> bool {
    match e {
        L2Entry::Data(a) | L2Entry::Zero { kept: Some(a) } | L2Entry::Sub { host: Some(a), .. } => !a.copied,
        _ => true,
    }
}
