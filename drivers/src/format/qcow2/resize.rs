//! Changing the size of the virtual disk.
//!
//! Invariants: a resize is all or nothing (crash contract, G4), so the size field is the last thing to change when growing
//! and the first when shrinking; nothing that an earlier size showed comes back: what lies behind the end is dropped before
//! the end moves over it, for a shrink may have been cut short. The L1 table moves as a whole: new content durable, then
//! the header (offset and length in one sector), then the old place is free. Roots are drained, so no claim is in force.
//!
//! ```text
//! grow:    new L1 ─► flush ─► header (L1) ─► flush ─► old L1 to limbo
//!          behind the end: old clusters dropped, tail cleared, backing file hidden ─► write back ─► header (size)
//! shrink:  header (size) ─► flush ─► clusters and L2 tables behind the end to limbo ─► write back
//! ```

use std::rc::Rc;

use ringblock_engine::debug::DebugEvent;
use ringblock_engine::driver::{Access, Extent, Extents, Lookup, Map, Preallocation, Punch, Target};
use ringblock_engine::mem::Buf;
use ringblock_engine::mutant;
use ringblock_engine::units::{GuestOffset, HostOffset};
use ringblock_engine::{Errno, Error};

use super::entry::{Allocation, L2Entry, OFFSET_MASK};
use super::geometry::{GuestCluster, HostCluster, L1Index, MAX_L1_BYTES};
use super::index::Place;
use super::io::Store;
use super::owner::Image;

impl Image {
    /// Changes the virtual size.
    pub(super) async fn truncate(self: &Rc<Self>, size: u64, prealloc: Preallocation) -> Result<(), Error> {
        self.writable()?;
        if !size.is_multiple_of(512) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        {
            let header = self.header.borrow();
            if header.snapshot_count > 0 && header.version < 3 {
                return Err(Error::new(Errno::ENOTSUP, "Can't resize a v2 image which has snapshots"));
            }
            if header.extensions.bitmaps.is_some() {
                return Err(Error::new(Errno::ENOTSUP, "Can't resize an image with persistent bitmaps"));
            }
        }
        let old = self.shared.size();
        if size < old && prealloc != Preallocation::Off {
            return Err(Error::invalid("Preallocation can't be used for shrinking an image"));
        }
        let io = |e: Errno| Error::io(e, "Failed to resize the image");
        self.write_back().await.map_err(io)?;
        if size < old {
            self.shrink(old, size).await.map_err(io)?;
        } else if size > old {
            self.grow(old, size).await?;
            if prealloc != Preallocation::Off {
                self.preallocate(old, size, prealloc)
                    .await
                    .map_err(|e| Error::io(e, "Could not preallocate"))?;
            }
        }
        if let Some(data) = &self.data {
            data.truncate(size).await.map_err(io)?;
        }
        self.write_back().await.map_err(io)
    }

    async fn grow(self: &Rc<Self>, old: u64, size: u64) -> Result<(), Error> {
        let g = self.geometry;
        let need = g.l1_entries_for(size);
        if need * 8 > MAX_L1_BYTES {
            return Err(Error::new(Errno::EFBIG, "Failed to grow the L1 table: File too large"));
        }
        // Told before anything has changed.
        if !self.part_to_hide(old, size)?.is_empty() {
            let hide = self.check_version(Punch::Zero { unmap: true });
            hide.map_err(|e| Error::io(e, "Failed to hide the backing file behind the old end"))?;
        }
        let io = |e: Errno| Error::io(e, "Failed to grow the L1 table");
        if need > self.l1.len() as u64 {
            self.grow_l1(need).await.map_err(io)?;
        }
        self.drop_behind(old).await.map_err(io)?;
        self.show_tail(old).await.map_err(io)?;
        self.shared.set_size(size);
        let hidden = async {
            self.hide_below(old, size).await?;
            self.write_back().await?;
            self.header.borrow_mut().size = size;
            self.write_header_durable().await
        };
        hidden.await.map_err(|e| {
            self.header.borrow_mut().size = old;
            self.shared.set_size(old);
            Error::io(e, "Failed to update the image size")
        })
    }

    /// Moves the L1 table to where it can have `entries` entries.
    async fn grow_l1(self: &Rc<Self>, entries: u64) -> Result<(), Errno> {
        let g = self.geometry;
        let (old_at, old_len) = (self.header.borrow().l1_offset, self.l1.len());
        let clusters = g.clusters_for(entries * 8);
        let old_clusters = g.clusters_for(old_len as u64 * 8);
        if clusters == old_clusters && old_len > 0 {
            // The cluster it ends in has room: entries behind the end were never read, so they are cleared first.
            self.l1.resize(entries as usize);
            let bytes = self.l1.encode_all((clusters * g.cluster_size()) as usize);
            self.event(DebugEvent::L1GrowWriteTable).await;
            let cleared = match self.file.write(old_at.0, bytes).await {
                Ok(()) => self.barrier().await,
                failed => failed,
            };
            // Longer in memory than the header says, it would be taken for grown the next time.
            cleared.inspect_err(|_| self.l1.resize(old_len))?;
            self.event(DebugEvent::L1GrowActivateTable).await;
            self.header.borrow_mut().l1_size = entries as u32;
            return self.write_header_durable().await;
        }
        self.event(DebugEvent::L1GrowAllocTable).await;
        let at = self.allocate_row(clusters).await?;
        self.l1.resize(entries as usize);
        let bytes = self.l1.encode_all((clusters * g.cluster_size()) as usize);
        if let Err(e) = self.place_l1(at, bytes, entries).await {
            self.l1.resize(old_len);
            // The header on the disk may name the new table: it is free when the old header is there for certain.
            self.limbo.borrow_mut().unlinked(at, clusters);
            return Err(e);
        }
        self.l1.set_clean();
        let first = g.host_cluster(old_at);
        let mut meta = self.metadata.borrow_mut();
        (first.0..first.0 + old_clusters).for_each(|c| {
            meta.remove(&c);
        });
        meta.insert(0);
        meta.extend(at.0..at.0 + clusters);
        drop(meta);
        self.limbo.borrow_mut().durable(first, old_clusters);
        Ok(())
    }

    async fn place_l1(self: &Rc<Self>, at: HostCluster, bytes: Buf, entries: u64) -> Result<(), Errno> {
        let g = self.geometry;
        self.event(DebugEvent::L1GrowWriteTable).await;
        self.file.write(g.host_offset(at).0, bytes).await?;
        // The counters of the new place have to be durable too (rule 1).
        if !mutant!("moved-l1-barrier") {
            self.write_back().await?;
        }
        self.event(DebugEvent::L1GrowActivateTable).await;
        let before = {
            let mut h = self.header.borrow_mut();
            let before = (h.l1_offset, h.l1_size);
            (h.l1_offset, h.l1_size) = (g.host_offset(at), entries as u32);
            before
        };
        let result = self.write_header_durable().await;
        if result.is_err() {
            let mut h = self.header.borrow_mut();
            (h.l1_offset, h.l1_size) = before;
        }
        result
    }

    /// Exactly `n` clusters in a row.
    async fn allocate_row(self: &Rc<Self>, n: u64) -> Result<HostCluster, Errno> {
        let mut row: Option<(u64, u64)> = None;
        loop {
            let have = row.map_or(0, |(_, k)| k);
            let run = self.allocate(n - have).await?;
            row = match row {
                Some((first, k)) if first + k == run.first.0 => Some((first, k + run.count)),
                Some((first, k)) => {
                    self.give_back(HostCluster(first), k);
                    Some((run.first.0, run.count))
                }
                None => Some((run.first.0, run.count)),
            };
            if let Some((first, k)) = row
                && k == n
            {
                return Ok(HostCluster(first));
            }
        }
    }

    /// The rest of the last cluster becomes visible: it must read as zeros.
    async fn show_tail(self: &Rc<Self>, old: u64) -> Result<(), Errno> {
        let g = self.geometry;
        if old.is_multiple_of(g.cluster_size()) {
            return Ok(());
        }
        let c = g.guest_cluster(GuestOffset(old));
        self.fault(g.slice(c)).await?;
        if self.is_fixed(c)? {
            let start = g.guest_offset(c).0;
            let part = self.read_visible(start..old).await?;
            return self.store_zero_padded(start, &part).await;
        }
        self.clear_tail(c, old).await?;
        let Some(below) = self.below.clone().filter(|_| self.shared.has_below()) else { return Ok(()) };
        if below.size()? <= old {
            return Ok(());
        }
        // Data of the backing file behind the old end must not appear: the cluster is copied up to there.
        let start = g.guest_offset(c).0;
        let mut out = Extents::new();
        let there = self.shared.lookup(Access::Read, old - 1..old, &mut out);
        if there == Lookup::Hit && matches!(out.as_slice(), [Extent { target: Target::Below { .. }, .. }]) {
            let from = start + (old - 1 - start) / g.subcluster_size() * g.subcluster_size();
            let (result, part) = below.read(from, Buf::new((old - from) as usize)).await;
            result?;
            self.store_zero_padded(from, &part).await?;
        }
        Ok(())
    }

    /// Whether nothing may be written where the cluster is, because it is compressed or shared with a snapshot. Its slice is
    /// in memory.
    fn is_fixed(self: &Rc<Self>, c: GuestCluster) -> Result<bool, Errno> {
        let Place::Frame(frame) = self.shared.place(self.geometry.slice(c)) else { return Ok(false) };
        Ok(match self.entry_of(frame, c)? {
            L2Entry::Compressed(_) => true,
            L2Entry::Data(a) | L2Entry::Sub { host: Some(a), .. } => !a.copied,
            _ => false,
        })
    }

    /// What the guest reads in a part of a cluster whose slice is in memory.
    async fn read_visible(self: &Rc<Self>, range: std::ops::Range<u64>) -> Result<Vec<u8>, Errno> {
        let mut bytes = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let mut out = Extents::new();
            if self.shared.lookup(Access::Read, at..range.end, &mut out) != Lookup::Hit {
                return Err(Errno::EIO);
            }
            for e in out.as_slice() {
                let (n, skip) = (e.len as usize, self.geometry.in_cluster(GuestOffset(at)) as usize);
                let (result, part) = match (e.target, &self.below) {
                    (Target::Data { off, .. }, _) => self.data_store().read(off, Buf::new(n)).await,
                    (Target::Below { off, .. }, Some(below)) => below.read(off, Buf::new(n)).await,
                    (Target::Encoded { cookie }, _) => {
                        let cluster = self.unpacked(cookie).await?;
                        (Ok(()), Buf::from_slice(&cluster[skip..skip + n]))
                    }
                    _ => (Ok(()), Buf::zeroed(n)),
                };
                result?;
                bytes.extend_from_slice(&part);
                at += e.len;
            }
        }
        Ok(bytes)
    }

    /// Writes guest data up to the end of the disk through a claim, and zeros behind it.
    async fn store_zero_padded(self: &Rc<Self>, from: u64, part: &[u8]) -> Result<(), Errno> {
        let grant = self.claim(from..from + part.len() as u64).await?;
        let Some(seg) = grant.segs.first().copied() else { return Err(Errno::EIO) };
        let mut bytes = Buf::zeroed(seg.len as usize);
        let head = grant.head as usize;
        bytes[head..head + part.len()].copy_from_slice(part);
        match self.data_store().write(seg.off, bytes).await {
            Ok(()) => self.commit(&grant),
            Err(e) => {
                self.abort(&grant);
                Err(e)
            }
        }
    }

    /// The new part of the disk that lies over a longer backing file, in whole subclusters.
    fn part_to_hide(&self, old: u64, size: u64) -> Result<std::ops::Range<u64>, Errno> {
        let Some(below) = self.below.clone().filter(|_| self.shared.has_below()) else { return Ok(0..0) };
        let g = self.geometry;
        let from = old.next_multiple_of(g.subcluster_size());
        let to = below.size()?.next_multiple_of(g.subcluster_size()).min(size);
        Ok(from..to)
    }

    /// What the backing file has there must not appear.
    async fn hide_below(self: &Rc<Self>, old: u64, size: u64) -> Result<(), Errno> {
        let part = self.part_to_hide(old, size)?;
        if !part.is_empty() && !mutant!("below-hidden") {
            self.punch(part, Punch::Zero { unmap: true }).await
        } else {
            Ok(())
        }
    }

    /// Zeros the part of a cluster behind the old end of the disk, where it may be written in place.
    async fn clear_tail(self: &Rc<Self>, c: GuestCluster, old: u64) -> Result<(), Errno> {
        let g = self.geometry;
        self.fault(g.slice(c)).await?;
        let Place::Frame(frame) = self.shared.place(g.slice(c)) else { return Ok(()) };
        let a = match self.entry_of(frame, c)? {
            L2Entry::Data(a) | L2Entry::Sub { host: Some(a), .. } if a.copied => a,
            _ => return Ok(()),
        };
        let Allocation { host, .. } = a;
        let skip = g.in_cluster(GuestOffset(old));
        let at = HostOffset(host.0 + skip);
        let store = self.data_store();
        let len = g.cluster_size() - skip;
        let len = len.min(store.size()?.saturating_sub(at.0));
        if len == 0 || mutant!("tail-cleared") {
            return Ok(());
        }
        store.write(at.0, Buf::zeroed(len as usize)).await
    }

    async fn shrink(self: &Rc<Self>, old: u64, size: u64) -> Result<(), Errno> {
        self.header.borrow_mut().size = size;
        self.write_header_durable().await.inspect_err(|_| {
            self.header.borrow_mut().size = old;
        })?;
        self.shared.set_size(size);
        self.drop_behind(size).await?;
        self.event(DebugEvent::L1ShrinkWriteTable).await;
        self.write_back().await?;
        self.event(DebugEvent::L1ShrinkFreeL2Clusters).await;
        Ok(())
    }

    /// Unlinks everything behind the end of the disk: clusters, then whole tables.
    async fn drop_behind(self: &Rc<Self>, size: u64) -> Result<(), Errno> {
        let g = self.geometry;
        let mut c = g.clusters_for(size);
        let last = self.l1.len() as u64 * g.l2_entries();
        while c < last {
            if self.l1.get(g.l1_index(GuestCluster(c))) == 0 {
                c = (c / g.l2_entries() + 1) * g.l2_entries();
                continue;
            }
            let stop = last.min((c / g.slice_entries() + 1) * g.slice_entries());
            self.drop_clusters(c..stop).await?;
            c = stop;
        }
        if let Some(data) = &self.data {
            let end = data.size()?;
            if end > size {
                data.zero(size, end - size, true).await?;
            }
        }
        self.write_back().await?;
        self.drop_tables(g.l1_entries_for(size), self.l1.len() as u64).await
    }

    /// Unlinks clusters for good.
    async fn drop_clusters(self: &Rc<Self>, clusters: std::ops::Range<u64>) -> Result<(), Errno> {
        let g = self.geometry;
        let slice = g.slice(GuestCluster(clusters.start));
        self.fault(slice).await?;
        if self.shared.place(slice) == Place::Empty {
            return Ok(());
        }
        self.own_table(g.slice_l1(slice)).await?;
        let frame = self.hold_frame(slice).await?;
        let mut result = Ok(());
        for c in clusters.map(GuestCluster) {
            match self.entry_of(frame, c) {
                Ok(L2Entry::Unallocated) => {}
                Ok(old) => {
                    self.replace(frame, c, L2Entry::Unallocated);
                    self.unlink(&old);
                }
                Err(e) => result = Err(e),
            }
        }
        self.frames.unpin(frame);
        result
    }

    /// Frees the L2 tables of L1 entries from `first` on.
    async fn drop_tables(self: &Rc<Self>, first: u64, end: u64) -> Result<(), Errno> {
        let g = self.geometry;
        self.frames.drop_from(&self.shared, g.first_slice(L1Index(first)));
        for i in first..end.min(self.l1.len() as u64) {
            let entry = self.l1.get(L1Index(i));
            if entry & OFFSET_MASK == 0 {
                continue;
            }
            for s in 0..g.slices_per_table() {
                let s = super::geometry::SliceIndex(g.first_slice(L1Index(i)).0 + s);
                if self.shared.place(s) == Place::Empty {
                    self.shared.set_place(s, Place::Missing);
                }
            }
            let table = g.host_cluster(HostOffset(entry & OFFSET_MASK));
            self.l1.set(i as usize, 0);
            self.metadata.borrow_mut().remove(&table.0);
            self.limbo.borrow_mut().unlinked(table, 1);
        }
        Ok(())
    }

    /// Allocates what is new.
    async fn preallocate(self: &Rc<Self>, old: u64, size: u64, prealloc: Preallocation) -> Result<(), Errno> {
        let cs = self.geometry.cluster_size();
        let mut at = old.next_multiple_of(cs).min(size);
        while at < size {
            let grant = self.claim(at..size).await?;
            let Some(seg) = grant.segs.first().copied() else { return Err(Errno::EIO) };
            let store = self.data_store();
            let len = seg.len.next_multiple_of(cs);
            let result = match prealloc {
                Preallocation::Full => self.write_zeros_to(store, seg.off, len).await,
                _ => store.zero(seg.off, len, prealloc == Preallocation::Metadata).await,
            };
            if let Err(e) = result {
                self.abort(&grant);
                return Err(e);
            }
            at = grant.guest.end;
            self.commit(&grant)?;
        }
        Ok(())
    }

    async fn write_zeros_to(&self, store: &Rc<dyn Store>, at: u64, len: u64) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let n = (len - done).min(1 << 20);
            store.write(at + done, Buf::zeroed(n as usize)).await?;
            done += n;
        }
        Ok(())
    }
}
