//! Index arithmetic of a qcow2 image: from a guest offset to the entry that translates it, and from a host cluster
//! to the counter that owns it.
//!
//! Invariants: every index type is distinct, so an L1 index cannot be used on an L2 table; nothing here overflows
//! for a guest offset below 2^63 or a host offset below 2^56, the largest the format can name.
//!
//! ```text
//! guest offset  │ L1 index │      L2 index       │ offset in cluster │
//!                          │ slice │ index in it │   512 B … 2 MiB
//! host offset   │ reftable index │ index in block│ offset in cluster │
//! ```
//! Source: qcow2 specification, "Cluster mapping" and "Host cluster management".

use ringblock_engine::units::{GuestOffset, HostOffset};

/// Smallest cluster: 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster that QEMU and Ringblock accept: 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Host offsets occupy bits 9 to 55 of an entry.
pub const HOST_OFFSET_LIMIT: u64 = 1 << 56;
/// L2 tables are cached in pieces of this many bytes, or of a cluster where that is smaller.
pub const SLICE_BYTES: u64 = 4096;
/// Limit on the active L1 table: 32 MiB of 8-byte entries.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Limit on the refcount table: 8 MiB.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Subclusters in a cluster of an image with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;

macro_rules! index_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// As an index of memory. A value from a bounded table always fits.
            #[inline]
            pub fn at(self) -> usize {
                self.0 as usize
            }
        }
    };
}
index_type! {
    /// Number of a cluster on the virtual disk.
    GuestCluster
}
index_type! {
    /// Number of a cluster in the image file.
    HostCluster
}
index_type! {
    /// Index in the active L1 table, which names L2 tables.
    L1Index
}
index_type! {
    /// Index of an entry (not a byte offset) in one L2 table.
    L2Index
}
index_type! {
    /// Number of a slice of L2 entries, counted over the whole disk.
    SliceIndex
}
index_type! {
    /// Index of an entry inside one slice.
    InSlice
}
index_type! {
    /// Index in the refcount table, which names refcount blocks.
    ReftableIndex
}
index_type! {
    /// Index of a counter in one refcount block.
    InBlock
}

/// The sizes that fix all index arithmetic of one image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// log2 of the refcount width in bits, 0 to 6.
    pub refcount_order: u32,
    /// Whether L2 entries are 16 bytes with a subcluster bitmap.
    pub extended: bool,
}

impl Geometry {
    /// The geometry, or `None` where a parameter is outside the format's limits.
    pub fn new(cluster_bits: u32, refcount_order: u32, extended: bool) -> Option<Geometry> {
        let sane = (MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits)
            && refcount_order <= 6
            && (!extended || cluster_bits >= 14);
        sane.then_some(Geometry { cluster_bits, refcount_order, extended })
    }

    /// Bytes in a cluster.
    #[inline]
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the bytes of an L2 entry: 3, or 4 with extended entries.
    #[inline]
    pub fn l2_entry_bits(&self) -> u32 {
        3 + u32::from(self.extended)
    }

    /// Bytes of an L2 entry.
    #[inline]
    pub fn l2_entry_size(&self) -> u64 {
        1 << self.l2_entry_bits()
    }

    /// log2 of the entries of an L2 table, which is one cluster.
    #[inline]
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.l2_entry_bits()
    }

    /// Entries of an L2 table.
    #[inline]
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// log2 of the bytes of an L2 slice.
    #[inline]
    pub fn slice_bits(&self) -> u32 {
        SLICE_BYTES.trailing_zeros().min(self.cluster_bits)
    }

    /// Bytes of an L2 slice.
    #[inline]
    pub fn slice_size(&self) -> u64 {
        1 << self.slice_bits()
    }

    /// log2 of the entries in a slice.
    #[inline]
    pub fn slice_entry_bits(&self) -> u32 {
        self.slice_bits() - self.l2_entry_bits()
    }

    /// Entries in a slice.
    #[inline]
    pub fn slice_entries(&self) -> u64 {
        1 << self.slice_entry_bits()
    }

    /// Guest bytes that one slice maps.
    #[inline]
    pub fn slice_span(&self) -> u64 {
        1 << (self.slice_entry_bits() + self.cluster_bits)
    }

    /// Guest bytes that one L2 table maps.
    #[inline]
    pub fn l2_span(&self) -> u64 {
        1 << (self.l2_bits() + self.cluster_bits)
    }

    /// Bytes of a subcluster; a whole cluster without extended entries.
    #[inline]
    pub fn subcluster_size(&self) -> u64 {
        if self.extended { self.cluster_size() / u64::from(SUBCLUSTERS) } else { self.cluster_size() }
    }

    /// The guest cluster that holds `at`.
    #[inline]
    pub fn guest_cluster(&self, at: GuestOffset) -> GuestCluster {
        GuestCluster(at.0 >> self.cluster_bits)
    }

    /// Where a guest cluster starts on the disk.
    #[inline]
    pub fn guest_offset(&self, c: GuestCluster) -> GuestOffset {
        GuestOffset(c.0 << self.cluster_bits)
    }

    /// Bytes from the start of the cluster to `at`.
    #[inline]
    pub fn in_cluster(&self, at: GuestOffset) -> u64 {
        at.0 & (self.cluster_size() - 1)
    }

    /// The L1 entry above a guest cluster.
    #[inline]
    pub fn l1_index(&self, c: GuestCluster) -> L1Index {
        L1Index(c.0 >> self.l2_bits())
    }

    /// The entry of a guest cluster in its L2 table.
    #[inline]
    pub fn l2_index(&self, c: GuestCluster) -> L2Index {
        L2Index(c.0 & (self.l2_entries() - 1))
    }

    /// The slice that holds a guest cluster's entry.
    #[inline]
    pub fn slice(&self, c: GuestCluster) -> SliceIndex {
        SliceIndex(c.0 >> self.slice_entry_bits())
    }

    /// The place of a guest cluster's entry in its slice.
    #[inline]
    pub fn in_slice(&self, c: GuestCluster) -> InSlice {
        InSlice(c.0 & (self.slice_entries() - 1))
    }

    /// The first guest cluster that a slice maps.
    #[inline]
    pub fn slice_start(&self, s: SliceIndex) -> GuestCluster {
        GuestCluster(s.0 << self.slice_entry_bits())
    }

    /// The L1 entry above a slice.
    #[inline]
    pub fn slice_l1(&self, s: SliceIndex) -> L1Index {
        L1Index(s.0 >> (self.l2_bits() - self.slice_entry_bits()))
    }

    /// Byte offset of a slice in its L2 table.
    #[inline]
    pub fn slice_in_table(&self, s: SliceIndex) -> u64 {
        (s.0 & ((1 << (self.l2_bits() - self.slice_entry_bits())) - 1)) << self.slice_bits()
    }

    /// Slices in one L2 table.
    #[inline]
    pub fn slices_per_table(&self) -> u64 {
        1 << (self.cluster_bits - self.slice_bits())
    }

    /// The first slice below an L1 entry.
    #[inline]
    pub fn first_slice(&self, l1: L1Index) -> SliceIndex {
        SliceIndex(l1.0 << (self.cluster_bits - self.slice_bits()))
    }

    /// L1 entries needed to map a disk of `size` bytes.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }

    /// Clusters needed for `bytes`.
    pub fn clusters_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// The host cluster that holds `at`.
    #[inline]
    pub fn host_cluster(&self, at: HostOffset) -> HostCluster {
        HostCluster(at.0 >> self.cluster_bits)
    }

    /// Where a host cluster starts in the file.
    #[inline]
    pub fn host_offset(&self, c: HostCluster) -> HostOffset {
        HostOffset(c.0 << self.cluster_bits)
    }

    /// Whether a host offset is at the start of a cluster.
    #[inline]
    pub fn is_host_aligned(&self, at: HostOffset) -> bool {
        at.is_aligned(self.cluster_size())
    }

    /// log2 of the counters in a refcount block, which is one cluster.
    #[inline]
    pub fn refblock_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Counters in a refcount block.
    #[inline]
    pub fn refblock_entries(&self) -> u64 {
        1 << self.refblock_bits()
    }

    /// The refcount table entry above a host cluster's counter.
    #[inline]
    pub fn reftable_index(&self, c: HostCluster) -> ReftableIndex {
        ReftableIndex(c.0 >> self.refblock_bits())
    }

    /// The place of a host cluster's counter in its block.
    #[inline]
    pub fn in_block(&self, c: HostCluster) -> InBlock {
        InBlock(c.0 & (self.refblock_entries() - 1))
    }

    /// The first host cluster counted under a refcount table entry.
    #[inline]
    pub fn refblock_start(&self, r: ReftableIndex) -> HostCluster {
        HostCluster(r.0 << self.refblock_bits())
    }

    /// The largest value a counter of this image can hold.
    #[inline]
    pub fn refcount_max(&self) -> u64 {
        match self.refcount_order {
            6 => u64::MAX,
            order => (1 << (1u32 << order)) - 1,
        }
    }

    /// log2 of the number of 512-byte sectors a compressed entry can count: where its length field starts.
    #[inline]
    pub fn compressed_shift(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// The largest virtual disk that a legal L1 table can map.
    pub fn max_disk_size(&self) -> u64 {
        (MAX_L1_BYTES / 8).saturating_mul(self.l2_span())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the split of a guest offset agrees with the specification's formulas for every cluster size.
    /// Method: recompute with division and modulo.
    #[test]
    fn splits_agree_with_the_formulas() {
        for bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
            for extended in [false, true] {
                let Some(g) = Geometry::new(bits, 4, extended) else {
                    continue;
                };
                let (cs, es) = (1u64 << bits, if extended { 16 } else { 8 });
                for at in [0, 1, cs - 1, cs, 3 << 33, (1 << 45) + 12345] {
                    let c = g.guest_cluster(GuestOffset(at));
                    assert_eq!(g.l2_index(c).0, (at / cs) % (cs / es));
                    assert_eq!(g.l1_index(c).0, (at / cs) / (cs / es));
                    let s = g.slice(c);
                    assert_eq!(g.slice_l1(s), g.l1_index(c));
                    assert_eq!(g.slice_in_table(s) / es + g.in_slice(c).0, g.l2_index(c).0);
                    assert!(g.slice_start(s) <= c);
                    assert!(g.first_slice(g.l1_index(c)) <= s);
                }
            }
        }
    }

    /// Goal: refcount arithmetic for all widths. Method: compare with the specification's formula.
    #[test]
    fn refcount_indexes() {
        for order in 0..=6 {
            let g = Geometry::new(16, order, false).unwrap();
            let per_block = (65536 * 8) / (1u64 << order);
            assert_eq!(g.refblock_entries(), per_block);
            let c = HostCluster(per_block * 3 + 7);
            assert_eq!((g.reftable_index(c).0, g.in_block(c).0), (3, 7));
        }
        assert_eq!(Geometry::new(16, 0, false).unwrap().refcount_max(), 1);
        assert_eq!(Geometry::new(16, 6, false).unwrap().refcount_max(), u64::MAX);
    }

    /// Goal: parameters outside the limits are refused. Method: each side of each limit.
    #[test]
    fn limits() {
        assert!(Geometry::new(8, 4, false).is_none());
        assert!(Geometry::new(22, 4, false).is_none());
        assert!(Geometry::new(16, 7, false).is_none());
        assert!(Geometry::new(13, 4, true).is_none());
        assert!(Geometry::new(14, 4, true).is_some());
    }
}
