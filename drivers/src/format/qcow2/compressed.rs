//! Compressed clusters: reading them on any core, and packing new ones.
//!
//! Invariants: packed bytes are written, and every host cluster they touch is counted once per compressed cluster,
//! before the entry is published (rule 6); packed data never crosses a gap: a cluster's tail is used for the next one
//! only while nobody else was given the space.
//!
//! ```text
//! host cluster A              host cluster B
//! │ c0 │ c1 │   c2 … │────────│ … c2 │ c3 │ free tail → packing │
//! ```

use std::rc::Rc;

use ringblock_engine::Errno;
use ringblock_engine::core::Core;
use ringblock_engine::debug::DebugEvent;
use ringblock_engine::mem::Buf;
use ringblock_engine::mutant;
use ringblock_engine::path::Child;
use ringblock_engine::units::{GuestOffset, HostOffset};

use super::compress::unpack;
use super::entry::{COMPRESSED, EntryFormat, L2Entry, Packed, RawEntry};
use super::geometry::{GuestCluster, HostCluster};
use super::header::CompressionType;
use super::owner::Image;

/// Clusters smaller than this are unpacked on the core itself.
const UNPACK_HERE: usize = 16 << 10;

/// Reads `buf.len()` bytes of the compressed cluster that `cookie` (the L2 entry) names, from guest offset `guest`.
pub(super) async fn read(
    file: &Child,
    format: &EntryFormat,
    kind: CompressionType,
    cookie: u64,
    guest: u64,
    mut buf: Buf,
) -> (Result<(), Errno>, Buf) {
    let packed = match format.decode(RawEntry::from(cookie)) {
        Ok(L2Entry::Compressed(p)) if cookie & COMPRESSED != 0 => p,
        _ => return (Err(Errno::EIO), buf),
    };
    let cs = format.geometry.cluster_size() as usize;
    let skip = format.geometry.in_cluster(GuestOffset(guest)) as usize;
    if skip + buf.len() > cs {
        return (Err(Errno::EINVAL), buf);
    }
    file.event(DebugEvent::ReadCompressed).await;
    let (result, bytes) = file.read(packed.at.0, Buf::new(packed.len as usize)).await;
    if let Err(e) = result {
        return (Err(e), buf);
    }
    let whole = skip == 0 && buf.len() == cs;
    let cluster = if whole { std::mem::replace(&mut buf, Buf::new(0)) } else { Buf::new(cs) };
    let (result, cluster) = unpack_aside(kind, bytes, cluster).await;
    if whole {
        return (result, cluster);
    }
    let n = buf.len();
    if result.is_ok() {
        buf.copy_from_slice(&cluster[skip..skip + n]);
    }
    (result, buf)
}

/// Unpacks on the blocking pool, unless the cluster is so small that the way there costs more.
async fn unpack_aside(kind: CompressionType, bytes: Buf, mut cluster: Buf) -> (Result<(), Errno>, Buf) {
    if cluster.len() < UNPACK_HERE {
        return (unpack(kind, &bytes, &mut cluster), cluster);
    }
    let work = move || (unpack(kind, &bytes, &mut cluster), cluster);
    Core::current().blocking(work).await
}

impl Image {
    /// The content of a compressed cluster.
    pub(super) async fn unpacked(&self, cookie: u64) -> Result<Buf, Errno> {
        let Ok(L2Entry::Compressed(packed)) = self.shared.format().decode(RawEntry::from(cookie)) else {
            return Err(Errno::EIO);
        };
        let (result, bytes) = self.file.read(packed.at.0, Buf::new(packed.len as usize)).await;
        result?;
        let kind = self.header.borrow().compression;
        let cluster = Buf::new(self.geometry.cluster_size() as usize);
        let (result, cluster) = unpack_aside(kind, bytes, cluster).await;
        result.map(|()| cluster)
    }

    /// Writes one cluster compressed, or as it is where that saves nothing. It must be unallocated.
    pub(super) async fn write_compressed(self: &Rc<Self>, off: u64, data: &[u8]) -> Result<(), Errno> {
        self.writable()?;
        let g = self.geometry;
        let cs = g.cluster_size();
        let end = off.checked_add(data.len() as u64).ok_or(Errno::EINVAL)?;
        let size = self.shared.size();
        if self.external() {
            return Err(Errno::ENOTSUP);
        }
        if !off.is_multiple_of(cs) || data.is_empty() || data.len() as u64 > cs || end > size {
            return Err(Errno::EINVAL);
        }
        if (data.len() as u64) < cs && end != size {
            return Err(Errno::EINVAL);
        }
        let mut cluster = Buf::zeroed(cs as usize);
        cluster[..data.len()].copy_from_slice(data);
        let kind = self.header.borrow().compression;
        let c = g.guest_cluster(GuestOffset(off));
        let (packed, cluster) = self.runtime.pack(kind, cluster).await;
        match packed? {
            Some(packed) => self.store_packed(c, &packed).await,
            None => self.store_plain(c, cluster).await,
        }
    }

    /// A cluster that does not shrink: an ordinary allocating write.
    async fn store_plain(self: &Rc<Self>, c: GuestCluster, cluster: Buf) -> Result<(), Errno> {
        let start = self.geometry.guest_offset(c).0;
        let end = (start + self.geometry.cluster_size()).min(self.shared.size());
        let grant = self.claim(start..end).await?;
        let Some(seg) = grant.segs.first().copied() else { return Err(Errno::EIO) };
        // The claim covers the cluster (it starts at its edge), so what follows the disk's end is the cluster's zeros.
        let mut bytes = cluster;
        bytes.set_len(seg.len as usize);
        self.event(DebugEvent::WriteAio).await;
        match self.file.write(seg.off, bytes).await {
            Ok(()) => self.commit(&grant),
            Err(e) => {
                self.abort(&grant);
                Err(e)
            }
        }
    }

    async fn store_packed(self: &Rc<Self>, c: GuestCluster, packed: &[u8]) -> Result<(), Errno> {
        let g = self.geometry;
        let _ticket = self.claims.lock(c..GuestCluster(c.0 + 1)).await;
        self.own_table(g.l1_index(c)).await?;
        let frame = self.hold_frame(g.slice(c)).await?;
        let result = self.store_packed_in(frame, c, packed).await;
        self.frames.unpin(frame);
        self.relieve();
        result
    }

    async fn store_packed_in(
        self: &Rc<Self>,
        frame: u32,
        c: GuestCluster,
        packed: &[u8],
    ) -> Result<(), Errno> {
        let old = self.entry_of(frame, c)?;
        if !matches!(old, L2Entry::Unallocated | L2Entry::Zero { .. } | L2Entry::Compressed(_)) {
            return Err(Errno::EIO);
        }
        self.event(DebugEvent::ClusterAllocBytes).await;
        let (at, first, count) = self.allocate_bytes(packed.len() as u64).await?;
        // The entry counts whole sectors; what lies behind the packed bytes in the last one does not matter, and may be
        // the next packed cluster already, so nothing is written there.
        let len = (at.0 + packed.len() as u64).next_multiple_of(512) - at.0;
        self.event(DebugEvent::WriteCompressed).await;
        if let Err(e) = self.file.write(at.0, Buf::from_slice(packed)).await {
            self.give_back(first, count);
            return Err(e);
        }
        self.event(DebugEvent::L2UpdateCompressed).await;
        self.poisoned()?;
        let entry = L2Entry::Compressed(Packed { at, len });
        self.replace(frame, c, entry);
        self.unlink(&old);
        Ok(())
    }

    /// Space for packed bytes: (offset, first host cluster touched, clusters touched). Every cluster touched is counted
    /// once for this entry.
    async fn allocate_bytes(self: &Rc<Self>, len: u64) -> Result<(HostOffset, HostCluster, u64), Errno> {
        let g = self.geometry;
        let cs = g.cluster_size();
        let mut packing = self.packing.lock().await;
        if let Some(tail) = packing.take() {
            let room = tail.end - tail.start;
            let first = g.host_cluster(HostOffset(tail.start));
            if room >= len && self.share(first).await? {
                *packing = Some(tail.start + len..tail.end);
                return Ok((HostOffset(tail.start), first, 1));
            }
            // The tail and a cluster that follows it directly; the next cluster otherwise.
            if room > 0 && room < len {
                let run = self.allocate(1).await?;
                let at = g.host_offset(run.first).0;
                let shared = if at == tail.end { self.share(first).await } else { Ok(false) };
                if shared.inspect_err(|_| self.give_back(run.first, 1))? {
                    self.packing_in.set(Some(run.first));
                    *packing = Some(at + (len - room)..at + cs);
                    return Ok((HostOffset(tail.start), first, 2));
                }
                return Ok((self.start_packing(&mut packing, run.first, len), run.first, 1));
            }
        }
        let run = self.allocate(1).await?;
        Ok((self.start_packing(&mut packing, run.first, len), run.first, 1))
    }

    /// Packs `len` bytes at the start of a cluster; the rest is for what comes next.
    fn start_packing(
        &self,
        packing: &mut Option<std::ops::Range<u64>>,
        c: HostCluster,
        len: u64,
    ) -> HostOffset {
        let at = self.geometry.host_offset(c);
        self.packing_in.set(Some(c));
        *packing = Some(at.0 + len..at.0 + self.geometry.cluster_size());
        at
    }

    /// Counts one more compressed cluster in a host cluster. False where its counter is full, or the cluster was freed.
    async fn share(self: &Rc<Self>, c: HostCluster) -> Result<bool, Errno> {
        let turn = self.refcounts.lock().await;
        let n = self.refcounts.get(&turn, c).await?;
        // Once freed, the cluster may be anybody's: `free_run` clears the mark under the same lock.
        if self.packing_in.get() != Some(c) || n == 0 || n >= self.geometry.refcount_max() {
            return Ok(false);
        }
        if !mutant!("packed-counts") {
            self.refcounts.set(&turn, c, n + 1).await?;
        }
        Ok(true)
    }
}
