//! Table entries: what an L1 or L2 entry says, and how to say it.
//!
//! Invariants: decoding never panics and never yields an unaligned data offset; `encode(decode(e)) == e` for every
//! entry with clear reserved bits.
//!
//! ```text
//! L1        63 COPIED │ 62-56 0 │ 55-9 offset of an L2 table │ 8-0 0
//! standard  63 COPIED │ 62 = 0 │ 61-56 0 │ 55-9 offset │ 8-1 0 │ 0 ZERO
//! compressed 63 = 0   │ 62 = 1 │ 61-x extra sectors │ x-1…0 byte offset        x = 62 - (cluster_bits - 8)
//! extended  a second word: 63-32 subcluster reads zero │ 31-0 subcluster allocated
//! ```
//! Source: qcow2 specification, "L1 table entry", "L2 table entry", "Extended L2 Entries".

use ringblock_engine::units::HostOffset;

use super::geometry::Geometry;
use super::header::Header;

/// L1 and L2: the refcount of what the entry names is exactly 1.
pub const COPIED: u64 = 1 << 63;
/// L2: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// L2, version 3, not extended: the cluster reads as zeros.
pub const ZERO: u64 = 1;
/// The host offset in an L1 or standard L2 entry.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an L1 entry that must be clear.
pub const L1_RESERVED: u64 = !(COPIED | OFFSET_MASK);
/// Bits of a standard L2 entry that must be clear (bit 0 too where it has no meaning).
pub const L2_RESERVED: u64 = !(COPIED | COMPRESSED | OFFSET_MASK | ZERO);
/// Bits of a refcount table entry that must be clear.
pub const REFTABLE_RESERVED: u64 = 0x1ff;

/// A standard or extended first word that never decodes: put in place of an entry that must not be used.
pub(super) const BROKEN: u64 = COMPRESSED | COPIED;

/// What decoding depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EntryFormat {
    /// Cluster size and entry size.
    pub geometry: Geometry,
    /// Version 3: the zero flag exists.
    pub zero_flag: bool,
    /// Offsets are in an external file, where 0 is a valid place for data.
    pub external_data: bool,
}

/// A raw L2 entry: the word, and the bitmap word of an extended entry (0 otherwise).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RawEntry {
    /// The first 8 bytes.
    pub word: u64,
    /// The subcluster bitmap.
    pub bitmap: u64,
}

/// A raw standard entry.
impl From<u64> for RawEntry {
    fn from(word: u64) -> RawEntry {
        RawEntry { word, bitmap: 0 }
    }
}

/// What an L2 entry says about its guest cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum L2Entry {
    /// Reads from the backing file, or as zeros.
    Unallocated,
    /// Reads as zeros; may keep a host cluster for later use.
    Zero {
        /// The cluster kept, and whether it may be written in place.
        kept: Option<Allocation>,
    },
    /// Reads from a host cluster.
    Data(Allocation),
    /// Reads from packed bytes.
    Compressed(Packed),
    /// An extended entry whose subclusters differ, or that has no host cluster but zero subclusters.
    Sub {
        /// The host cluster, if there is one.
        host: Option<Allocation>,
        /// Subclusters that read from the host cluster.
        allocated: u32,
        /// Subclusters that read as zeros. Disjoint from `allocated`.
        zero: u32,
    },
}

/// A host cluster named by an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Allocation {
    /// Start of the cluster.
    pub host: HostOffset,
    /// Refcount is exactly 1: it may be written in place.
    pub copied: bool,
}

/// The bytes of a compressed cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packed {
    /// First byte; not aligned.
    pub at: HostOffset,
    /// Upper limit of the length: up to the end of the last 512-byte sector.
    pub len: u64,
}

/// Why an entry cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BadEntry {
    /// The zero flag in a version 2 image.
    ZeroInV2,
    /// A data cluster that is not aligned to clusters.
    Unaligned(HostOffset),
    /// A compressed cluster in an image with an external data file.
    CompressedExternal,
    /// A compressed cluster with the COPIED flag.
    CompressedCopied,
    /// A subcluster both allocated and zero, or allocated without a host cluster.
    SubclusterBitmap,
}

impl std::fmt::Display for BadEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BadEntry::ZeroInV2 => f.write_str("Zero cluster entry found in pre-v3 image"),
            BadEntry::Unaligned(at) => write!(f, "Cluster allocation offset {at} unaligned"),
            BadEntry::CompressedExternal => {
                f.write_str("Compressed cluster entry found in image with external data file")
            }
            BadEntry::CompressedCopied => f.write_str("Compressed cluster with the COPIED flag"),
            BadEntry::SubclusterBitmap => f.write_str("Invalid subcluster bitmap"),
        }
    }
}

impl EntryFormat {
    /// The format of an image's entries.
    pub fn of(header: &Header, geometry: Geometry) -> EntryFormat {
        EntryFormat { geometry, zero_flag: header.version >= 3, external_data: header.external_data() }
    }

    /// What an entry says. Reserved bits are ignored here, as QEMU does when reading; `check` reports them.
    #[inline]
    pub fn decode(&self, raw: RawEntry) -> Result<L2Entry, BadEntry> {
        let RawEntry { word, bitmap } = raw;
        if word & COMPRESSED != 0 {
            return self.decode_compressed(word);
        }
        let host = HostOffset(word & OFFSET_MASK);
        if !self.geometry.is_host_aligned(host) {
            return Err(BadEntry::Unaligned(host));
        }
        let copied = word & COPIED != 0;
        // Offset 0 is the header of an ordinary image but the first cluster of an external data file.
        let there = host.0 != 0 || (self.external_data && copied);
        let alloc = there.then_some(Allocation { host, copied });
        if self.geometry.extended {
            return decode_bitmap(alloc, bitmap);
        }
        if word & ZERO != 0 {
            return if self.zero_flag { Ok(L2Entry::Zero { kept: alloc }) } else { Err(BadEntry::ZeroInV2) };
        }
        Ok(alloc.map_or(L2Entry::Unallocated, L2Entry::Data))
    }

    fn decode_compressed(&self, word: u64) -> Result<L2Entry, BadEntry> {
        if self.external_data {
            return Err(BadEntry::CompressedExternal);
        }
        if word & COPIED != 0 {
            return Err(BadEntry::CompressedCopied);
        }
        let shift = self.geometry.compressed_shift();
        // The offset field is wider than the 56 bits a host offset may have for small clusters.
        let at = HostOffset(word & ((1 << shift) - 1));
        let sectors = (word & (COMPRESSED - 1)) >> shift;
        Ok(L2Entry::Compressed(Packed { at, len: (sectors + 1) * 512 - (at.0 & 511) }))
    }

    /// The bytes to store for an entry.
    pub fn encode(&self, entry: L2Entry) -> RawEntry {
        let word = |a: Allocation| a.host.0 | if a.copied { COPIED } else { 0 };
        let wide = self.geometry.extended;
        match entry {
            L2Entry::Unallocated => RawEntry::default(),
            L2Entry::Zero { kept } => {
                let w = kept.map_or(0, word);
                if wide {
                    RawEntry { word: w, bitmap: ALL_ZERO }
                } else {
                    RawEntry { word: w | ZERO, bitmap: 0 }
                }
            }
            L2Entry::Data(a) => RawEntry { word: word(a), bitmap: if wide { ALL_ALLOCATED } else { 0 } },
            L2Entry::Compressed(p) => {
                let last = p.at.0 + p.len.max(1) - 1;
                let sectors = (last >> 9) - (p.at.0 >> 9);
                RawEntry {
                    word: COMPRESSED | (sectors << self.geometry.compressed_shift()) | p.at.0,
                    bitmap: 0,
                }
            }
            L2Entry::Sub { host, allocated, zero } => {
                debug_assert!(wide && allocated & zero == 0 && (host.is_some() || allocated == 0));
                RawEntry { word: host.map_or(0, word), bitmap: u64::from(zero) << 32 | u64::from(allocated) }
            }
        }
    }
}

const ALL_ALLOCATED: u64 = 0xffff_ffff;
const ALL_ZERO: u64 = ALL_ALLOCATED << 32;

/// An extended entry; whole-cluster cases come out as the simple variants.
#[inline]
fn decode_bitmap(host: Option<Allocation>, bitmap: u64) -> Result<L2Entry, BadEntry> {
    let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
    match (host, bitmap) {
        (None, 0) => Ok(L2Entry::Unallocated),
        (_, ALL_ZERO) => Ok(L2Entry::Zero { kept: host }),
        (Some(a), ALL_ALLOCATED) => Ok(L2Entry::Data(a)),
        (None, _) if allocated != 0 => Err(BadEntry::SubclusterBitmap),
        _ if allocated & zero != 0 => Err(BadEntry::SubclusterBitmap),
        _ => Ok(L2Entry::Sub { host, allocated, zero }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(bits: u32, extended: bool) -> EntryFormat {
        let geometry = Geometry::new(bits, 4, extended).unwrap();
        EntryFormat { geometry, zero_flag: true, external_data: false }
    }

    /// Goal: decode and encode are inverse. Method: every variant, standard and extended, several cluster sizes.
    #[test]
    fn entries_survive_a_round_trip() {
        for bits in 9..=21 {
            for extended in [false, true] {
                if extended && bits < 14 {
                    continue;
                }
                let f = format(bits, extended);
                let a = Allocation { host: HostOffset(5 << 21), copied: true };
                let b = Allocation { host: HostOffset(1 << 50), copied: false };
                let mut all = vec![
                    L2Entry::Unallocated,
                    L2Entry::Zero { kept: None },
                    L2Entry::Zero { kept: Some(a) },
                    L2Entry::Data(a),
                    L2Entry::Data(b),
                ];
                for (at, len) in [(512 * 9, 512), (777, 512 - 265), (512 * 3 + 7, 512 + 505)] {
                    all.push(L2Entry::Compressed(Packed { at: HostOffset(at), len }));
                }
                if extended {
                    all.push(L2Entry::Sub { host: Some(a), allocated: 3, zero: 4 });
                    all.push(L2Entry::Sub { host: None, allocated: 0, zero: 4 });
                    all.push(L2Entry::Sub { host: Some(b), allocated: 0, zero: 0 });
                }
                for e in all {
                    assert_eq!(f.decode(f.encode(e)), Ok(e), "bits {bits} extended {extended}");
                }
            }
        }
    }

    /// Goal: impossible entries are refused. Method: one of each kind.
    #[test]
    fn bad_entries() {
        let f = format(16, false);
        assert!(matches!(f.decode(RawEntry::from(512)), Err(BadEntry::Unaligned(_))));
        assert_eq!(f.decode(RawEntry::from(COMPRESSED | COPIED)), Err(BadEntry::CompressedCopied));
        let v2 = EntryFormat { zero_flag: false, ..f };
        assert_eq!(v2.decode(RawEntry::from(ZERO)), Err(BadEntry::ZeroInV2));
        let ext = EntryFormat { external_data: true, ..f };
        assert_eq!(ext.decode(RawEntry::from(COMPRESSED)), Err(BadEntry::CompressedExternal));
        let first = Allocation { host: HostOffset(0), copied: true };
        assert_eq!(ext.decode(RawEntry::from(COPIED)), Ok(L2Entry::Data(first)));
        let wide = format(16, true);
        let both = RawEntry { word: 1 << 16, bitmap: 1 << 32 | 1 };
        assert_eq!(wide.decode(both), Err(BadEntry::SubclusterBitmap));
        assert_eq!(wide.decode(RawEntry { word: 0, bitmap: 1 }), Err(BadEntry::SubclusterBitmap));
    }
}
