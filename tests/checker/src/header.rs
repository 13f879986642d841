//! The header and its extensions: what an image says of itself, or why it is refused.
//!
//! Limits beyond the specification are those of the peer: an L1 table of 32 MiB, a refcount table of 8 MiB, clusters of
//! 2 MiB, 65,535 bitmaps.
//!
//! ```text
//!   0        72 (v2)    104 (v3)     header_length              cluster_size
//!   │ header │ features │ compression │ extension, extension, … │ backing name … │
//! ```

use crate::bytes::{be32, be64, byte};
use crate::{Files, Finding, Kind};

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = 0x1f;
const AUTOCLEAR_BITMAPS: u64 = 1;
const AUTOCLEAR_DATA_FILE_RAW: u64 = 2;

const MAX_L1: u64 = 32 << 20;
const MAX_REFTABLE: u64 = 8 << 20;
const MAX_BITMAPS: u32 = 65_535;
/// Each directory entry has 24 bytes, a name of up to 1,023 and extra data of up to 256.
const MAX_BITMAP_DIRECTORY: u64 = MAX_BITMAPS as u64 * (24 + 1023 + 256);

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_CRYPTO: u32 = 0x0537_be77;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// The header of an image that can be opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// The size of the disk in bytes.
    pub virtual_size: u64,
    /// The offset of the active L1 table.
    pub l1_offset: u64,
    /// The number of entries of the active L1 table.
    pub l1_size: u32,
    /// The offset of the refcount table.
    pub reftable_offset: u64,
    /// The number of clusters of the refcount table.
    pub reftable_clusters: u32,
    /// The number of snapshots.
    pub snapshot_count: u32,
    /// The offset of the snapshot table.
    pub snapshots_offset: u64,
    /// The incompatible feature bits.
    pub incompatible: u64,
    /// The compatible feature bits.
    pub compatible: u64,
    /// The autoclear feature bits.
    pub autoclear: u64,
    /// log2 of the number of bits of a refcount.
    pub refcount_order: u32,
    /// 0 deflate, 1 zstd.
    pub compression: u8,
    /// The offset and the length of the backing file's name; 0 and 0 without one.
    pub backing_name: (u64, u32),
    /// The bitmaps extension, where it is valid: their number, the offset and the size of the directory.
    pub bitmaps: Option<(u32, u64, u64)>,
}

impl Header {
    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The dirty bit.
    pub fn dirty(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DIRTY != 0
    }

    /// The corrupt bit.
    pub fn marked_corrupt(&self) -> bool {
        self.incompatible & INCOMPATIBLE_CORRUPT != 0
    }

    /// Guest data are in a file of their own.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    /// L2 entries are of 16 bytes and describe subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster() / if self.extended_l2() { 16 } else { 8 }
    }

    /// Whether `offset` is a multiple of the cluster size.
    pub(crate) fn aligned(&self, offset: u64) -> bool {
        offset & (self.cluster() - 1) == 0
    }
}

fn refuse<T>(kind: Kind, at: u64, value: u64) -> Result<T, Finding> {
    Err(Finding { kind, at, value })
}

fn ensure(good: bool, kind: Kind, at: u64, value: u64) -> Result<(), Finding> {
    if good { Ok(()) } else { refuse(kind, at, value) }
}

/// Reads and judges the header.
pub(crate) fn open(files: &Files<'_>) -> Result<Header, Finding> {
    let image = files.image;
    ensure(be32(image, 0) == 0x5146_49fb, Kind::Magic, 0, be32(image, 0).into())?;
    let version = be32(image, 4);
    ensure(version == 2 || version == 3, Kind::Version, 4, version.into())?;
    let cluster_bits = be32(image, 20);
    ensure((9..=21).contains(&cluster_bits), Kind::ClusterBits, 20, cluster_bits.into())?;
    let mut header = Header {
        version,
        cluster_bits,
        virtual_size: be64(image, 24),
        l1_size: be32(image, 36),
        l1_offset: be64(image, 40),
        reftable_offset: be64(image, 48),
        reftable_clusters: be32(image, 56),
        snapshot_count: be32(image, 60),
        snapshots_offset: be64(image, 64),
        refcount_order: 4,
        ..Header::default()
    };
    let length = features(image, &mut header)?;
    let extensions_end = backing(image, &mut header)?;
    tables(image, &header)?;
    extensions(image, &mut header, length.into(), extensions_end)?;
    ensure(files.data.is_some() == header.has_data_file(), Kind::DataFile, 72, header.incompatible)?;
    Ok(header)
}

/// The fields of version 3; returns the header's length.
fn features(image: &[u8], header: &mut Header) -> Result<u32, Finding> {
    if header.version == 2 {
        return Ok(72);
    }
    header.incompatible = be64(image, 72);
    header.compatible = be64(image, 80);
    header.autoclear = be64(image, 88);
    header.refcount_order = be32(image, 96);
    let length = be32(image, 100);
    ensure(length >= 104 && u64::from(length) <= header.cluster(), Kind::HeaderLength, 100, length.into())?;
    ensure(header.incompatible & !INCOMPATIBLE_KNOWN == 0, Kind::Incompatible, 72, header.incompatible)?;
    ensure(
        !header.extended_l2() || header.cluster_bits >= 14,
        Kind::ClusterBits,
        20,
        header.cluster_bits.into(),
    )?;
    ensure(header.refcount_order <= 6, Kind::RefcountOrder, 96, header.refcount_order.into())?;
    if length > 104 {
        header.compression = byte(image, 104);
    }
    let flagged = header.incompatible & INCOMPATIBLE_COMPRESSION != 0;
    let fits = header.compression <= 1 && flagged == (header.compression != 0);
    ensure(fits, Kind::CompressionType, 104, header.compression.into())?;
    let raw = header.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0;
    ensure(!raw || header.has_data_file(), Kind::DataFile, 88, header.autoclear)?;
    Ok(length)
}

/// Encryption and the backing file's name; returns where the extensions end.
fn backing(image: &[u8], header: &mut Header) -> Result<u64, Finding> {
    let method = be32(image, 32);
    ensure(method == 0, Kind::Encryption, 32, method.into())?;
    let (offset, len) = (be64(image, 8), be32(image, 16));
    if offset == 0 {
        return Ok(header.cluster());
    }
    ensure(offset <= header.cluster(), Kind::BackingName, 8, offset)?;
    let room = (header.cluster() - offset).min(1023);
    ensure(u64::from(len) <= room, Kind::BackingName, 16, len.into())?;
    header.backing_name = (offset, len);
    Ok(offset)
}

/// Sizes and offsets of the refcount table and the L1 table.
fn tables(image: &[u8], header: &Header) -> Result<(), Finding> {
    let bytes = u64::from(header.reftable_clusters) << header.cluster_bits;
    ensure(bytes <= MAX_REFTABLE, Kind::ReftableSize, 56, header.reftable_clusters.into())?;
    ensure(
        table_fits(header, header.reftable_offset, bytes),
        Kind::ReftableOffset,
        48,
        header.reftable_offset,
    )?;
    let bytes = u64::from(header.l1_size) * 8;
    ensure(bytes <= MAX_L1, Kind::L1Size, 36, header.l1_size.into())?;
    ensure(table_fits(header, header.l1_offset, bytes), Kind::L1Offset, 40, header.l1_offset)?;
    let per_entry = u128::from(header.l2_entries()) << header.cluster_bits;
    let needed = u128::from(header.virtual_size).div_ceil(per_entry);
    ensure(needed <= u128::from(header.l1_size), Kind::L1Size, 24, be64(image, 24))
}

/// Whether a table may lie there as far as numbers go; the end of the file is no matter here.
pub(crate) fn table_fits(header: &Header, offset: u64, bytes: u64) -> bool {
    header.aligned(offset) && offset.checked_add(bytes).is_some_and(|end| end <= i64::MAX as u64)
}

/// Walks the header extensions.
fn extensions(image: &[u8], header: &mut Header, start: u64, end: u64) -> Result<(), Finding> {
    let mut at = start;
    while at < end {
        let (kind, len) = (be32(image, at), u64::from(be32(image, at + 4)));
        at += 8;
        if at > end || len > end - at {
            return refuse(Kind::Extension, at - 8, len);
        }
        match kind {
            EXTENSION_END => return Ok(()),
            EXTENSION_BACKING_FORMAT => ensure(len < 16, Kind::Extension, at, len)?,
            EXTENSION_CRYPTO => return refuse(Kind::Extension, at, kind.into()),
            EXTENSION_BITMAPS => bitmaps(image, header, at, len)?,
            _ => {}
        }
        at += len.next_multiple_of(8);
    }
    Ok(())
}

/// The bitmaps extension; without its autoclear bit it does not count.
fn bitmaps(image: &[u8], header: &mut Header, at: u64, len: u64) -> Result<(), Finding> {
    ensure(len == 24, Kind::BitmapsExtension, at, len)?;
    if header.autoclear & AUTOCLEAR_BITMAPS == 0 {
        return Ok(());
    }
    let (count, reserved) = (be32(image, at), be32(image, at + 4));
    let (size, offset) = (be64(image, at + 8), be64(image, at + 16));
    ensure(reserved == 0, Kind::BitmapsExtension, at + 4, reserved.into())?;
    ensure((1..=MAX_BITMAPS).contains(&count), Kind::BitmapsExtension, at, count.into())?;
    ensure(size <= MAX_BITMAP_DIRECTORY, Kind::BitmapsExtension, at + 8, size)?;
    ensure(table_fits(header, offset, size), Kind::BitmapsExtension, at + 16, offset)?;
    header.bitmaps = Some((count, offset, size));
    Ok(())
}
