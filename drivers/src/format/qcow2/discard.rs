//! Zeroing and discarding whole clusters, or subclusters.
//!
//! Invariants: a discard never lets data of the backing file show through (reference, part 5 item 20); a cluster that
//! leaves the map goes to limbo; punching holds the same tickets as claiming (I5).
//!
//! ```text
//!                 unallocated      data, ours        data, shared      compressed       zero, kept
//! zero            zero*            zero, kept        zero              zero             zero, kept
//! zero + unmap    zero*            zero              zero              zero             zero
//! discard         zero*            zero              zero              zero             zero
//!                 * nothing to do where nothing lies below
//! ```
//! Version 2 has no zero flag: unallocated where nothing lies below, otherwise `ENOTSUP`.

use std::ops::Range;
use std::rc::Rc;

use ringblock_engine::Errno;
use ringblock_engine::driver::Punch;
use ringblock_engine::mutant;
use ringblock_engine::units::GuestOffset;

use super::entry::L2Entry;
use super::geometry::GuestCluster;
use super::index::Place;
use super::owner::Image;

impl Image {
    /// Zeroes or discards a range that is aligned to subclusters, or ends at the end of the disk.
    pub(super) async fn punch(self: &Rc<Self>, range: Range<u64>, kind: Punch) -> Result<(), Errno> {
        self.writable()?;
        let g = self.geometry;
        let size = self.shared.size();
        let sub = g.subcluster_size();
        let aligned = range.start.is_multiple_of(sub) && (range.end.is_multiple_of(sub) || range.end == size);
        if !aligned || range.end > size || range.start > range.end {
            return Err(Errno::EINVAL);
        }
        self.check_version(kind)?;
        let mut at = range.start;
        while at < range.end {
            if !self.something_below() && self.l1.get(g.l1_index(g.guest_cluster(GuestOffset(at)))) == 0 {
                // No table and nothing below: all of it reads as zeros.
                at = (at / g.l2_span() + 1).saturating_mul(g.l2_span());
                continue;
            }
            let end = range.end.min((at / g.slice_span() + 1).saturating_mul(g.slice_span()));
            self.punch_slice(at..end, kind).await?;
            at = end;
        }
        self.relieve();
        Ok(())
    }

    /// What a version 2 image cannot express.
    pub(super) fn check_version(&self, kind: Punch) -> Result<(), Errno> {
        let keeps = matches!(kind, Punch::Zero { unmap: false });
        if self.header.borrow().version < 3 && (keeps || self.something_below()) {
            return Err(Errno::ENOTSUP);
        }
        Ok(())
    }

    /// Whether unallocated clusters may read as something else than zeros, here or when the image is opened with the
    /// backing file that it names.
    fn something_below(&self) -> bool {
        self.shared.has_below() || self.header.borrow().backing_file.is_some()
    }

    async fn punch_slice(self: &Rc<Self>, bytes: Range<u64>, kind: Punch) -> Result<(), Errno> {
        let g = self.geometry;
        let first = g.guest_cluster(GuestOffset(bytes.start));
        let end = GuestCluster(g.guest_cluster(GuestOffset(bytes.end - 1)).0 + 1);
        let held = if mutant!("punch-claims") { end..end } else { first..end };
        let _ticket = self.claims.lock(held).await;
        let slice = g.slice(first);
        self.fault(slice).await?;
        if self.shared.place(slice) == Place::Empty && !self.something_below() {
            return Ok(());
        }
        self.own_table(g.slice_l1(slice)).await?;
        let frame = self.hold_frame(slice).await?;
        let result = self.punch_clusters(frame, first..end, &bytes, kind).await;
        self.frames.unpin(frame);
        result
    }

    async fn punch_clusters(
        self: &Rc<Self>,
        frame: u32,
        clusters: Range<GuestCluster>,
        bytes: &Range<u64>,
        kind: Punch,
    ) -> Result<(), Errno> {
        if self.external() {
            self.punch_data_file(bytes, kind).await?;
        }
        for c in clusters.start.0..clusters.end.0 {
            let c = GuestCluster(c);
            let old = self.entry_of(frame, c)?;
            let new = match self.partial(c, bytes) {
                Some(mask) => self.punch_part(&old, mask),
                None => self.punch_whole(&old, kind),
            };
            // The cluster stays as it is if a part of it can only be zeroed by writing.
            let Some(new) = new else { return Err(Errno::ENOTSUP) };
            if new != old {
                self.replace(frame, c, new);
                if host_of(&new).is_none() {
                    self.unlink(&old);
                }
            }
        }
        Ok(())
    }

    /// In an external data file the content itself has to change where the file is to stay readable as it is.
    async fn punch_data_file(&self, bytes: &Range<u64>, kind: Punch) -> Result<(), Errno> {
        let Some(data) = &self.data else { return Ok(()) };
        let unmap = !matches!(kind, Punch::Zero { unmap: false });
        if self.header.borrow().data_file_raw() {
            return data.zero(bytes.start, bytes.end - bytes.start, unmap).await;
        }
        if unmap && self.options.pass_discard {
            // Zeros and not a discard: until the entry is durable the disk may still name these bytes (I10).
            data.zero(bytes.start, bytes.end - bytes.start, true).await?;
        }
        Ok(())
    }

    /// The subclusters to punch where that is not the whole cluster (whatever of it lies on the disk).
    fn partial(&self, c: GuestCluster, bytes: &Range<u64>) -> Option<u32> {
        let g = self.geometry;
        let start = g.guest_offset(c).0;
        let end = (start + g.cluster_size()).min(self.shared.size());
        let whole = bytes.start <= start && bytes.end >= end;
        (!whole).then(|| self.mask(c, bytes))
    }

    /// The entry after zeroing some subclusters. `None` where they cannot be zeroed apart.
    fn punch_part(&self, old: &L2Entry, mask: u32) -> Option<L2Entry> {
        let (host, allocated, zero) = match *old {
            L2Entry::Compressed(_) => return None,
            L2Entry::Zero { .. } => return Some(*old),
            L2Entry::Unallocated if !self.something_below() => return Some(*old),
            L2Entry::Unallocated => (None, 0, 0),
            L2Entry::Data(a) => (Some(a), u32::MAX, 0),
            L2Entry::Sub { host, allocated, zero } => (host, allocated, zero),
        };
        Some(match (allocated & !mask, zero | mask) {
            (_, u32::MAX) => L2Entry::Zero { kept: host },
            (allocated, zero) => L2Entry::Sub { host, allocated, zero },
        })
    }

    /// The entry after punching a whole cluster.
    fn punch_whole(&self, old: &L2Entry, kind: Punch) -> Option<L2Entry> {
        let kept = host_of(old).filter(|a| a.copied);
        let keep = matches!(kind, Punch::Zero { unmap: false }) || self.header.borrow().data_file_raw();
        Some(match old {
            L2Entry::Unallocated if !self.something_below() => L2Entry::Unallocated,
            _ if self.header.borrow().version < 3 => L2Entry::Unallocated,
            _ if keep => L2Entry::Zero { kept },
            _ => L2Entry::Zero { kept: None },
        })
    }
}

/// The host cluster that an entry holds, other than compressed bytes.
fn host_of(e: &L2Entry) -> Option<super::entry::Allocation> {
    match *e {
        L2Entry::Data(a) | L2Entry::Zero { kept: Some(a) } | L2Entry::Sub { host: Some(a), .. } => Some(a),
        _ => None,
    }
}
