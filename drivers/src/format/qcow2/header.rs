//! The qcow2 header: parsing with every limit, and writing it back into the first cluster.
//!
//! Invariants: a [`Header`] that parsed has sizes and offsets within the limits of the format, so nothing later can
//! be made to allocate or seek by a hostile image; what is not understood (header fields past the known ones, unknown
//! extensions, the feature name table) is kept and written back byte for byte.
//!
//! ```text
//! 0       104   header_length                                backing_file_offset        cluster_size
//! │ fields │ unknown fields │ ext │ ext │ … │ end of ext (0) │ backing file name │ … 0 … │
//! ```
//! Source: qcow2 specification, "Header" and "Header extensions".

use ringblock_engine::units::HostOffset;
use ringblock_engine::{Errno, Error};

use super::bytes::{be32, be64, put32, put64};
use super::extensions::Extensions;
use super::geometry::{Geometry, MAX_CLUSTER_BITS, MAX_L1_BYTES, MAX_REFTABLE_BYTES, MIN_CLUSTER_BITS};

/// The magic number: "QFI" and 0xfb.
pub const MAGIC: u32 = 0x5146_49fb;
/// Length of a version 2 header, bytes.
pub const V2_LENGTH: u32 = 72;
/// Length of the header that Ringblock writes for version 3, bytes.
pub const V3_LENGTH: u32 = 112;
/// Limit on the number of snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Limit on the length of a backing file name, bytes.
pub const MAX_BACKING_NAME: u32 = 1023;

/// Incompatible feature bits: a reader that does not know one must not open the image.
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1 << 0;
    /// Some structure is known to be wrong.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data lives in an external file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// The compression type is not deflate.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries are 16 bytes with subcluster bitmaps.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All that Ringblock knows.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible feature bits.
pub mod compatible {
    /// Refcounts may be written late, under the dirty bit.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Autoclear feature bits: a writer that does not know one clears it.
pub mod autoclear {
    /// The bitmaps extension is consistent with the image.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is readable as a raw image.
    pub const DATA_FILE_RAW: u64 = 1 << 1;
    /// All that Ringblock knows.
    pub const KNOWN: u64 = BITMAPS | DATA_FILE_RAW;
}

/// How compressed clusters are packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CompressionType {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard frames.
    Zstd,
}

impl CompressionType {
    /// The name that options and `info` use.
    pub fn name(self) -> &'static str {
        match self {
            CompressionType::Zlib => "zlib",
            CompressionType::Zstd => "zstd",
        }
    }
}

/// The header of an image with its extensions.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// 0 none, 1 AES (legacy), 2 LUKS.
    pub crypt_method: u32,
    /// Entries in the active L1 table.
    pub l1_size: u32,
    /// Where the active L1 table is.
    pub l1_offset: HostOffset,
    /// Where the refcount table is.
    pub reftable_offset: HostOffset,
    /// Clusters of the refcount table.
    pub reftable_clusters: u32,
    /// Number of internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table is.
    pub snapshots_offset: HostOffset,
    /// Incompatible feature bits; 0 in version 2.
    pub incompatible: u64,
    /// Compatible feature bits; 0 in version 2.
    pub compatible: u64,
    /// Autoclear feature bits; 0 in version 2.
    pub autoclear: u64,
    /// log2 of the refcount width in bits; 4 in version 2.
    pub refcount_order: u32,
    /// The packing of compressed clusters.
    pub compression: CompressionType,
    /// Header bytes after the ones known here, kept as they are.
    pub unknown_fields: Vec<u8>,
    /// The header extensions.
    pub extensions: Extensions,
    /// The name of the backing file, if any.
    pub backing_file: Option<String>,
}

/// Reads magic, version and cluster size from the first bytes of a file: what must be known before the whole first
/// cluster can be read. Needs 24 bytes or more.
pub fn peek_cluster_bits(start: &[u8]) -> Result<u32, Error> {
    let (Some(magic), Some(version), Some(bits)) = (be32(start, 0), be32(start, 4), be32(start, 20)) else {
        return Err(Error::invalid("Image is not in qcow2 format"));
    };
    if magic != MAGIC {
        return Err(Error::invalid("Image is not in qcow2 format"));
    }
    if !(2..=3).contains(&version) {
        return Err(Error::new(Errno::ENOTSUP, format!("Unsupported qcow2 version {version}")));
    }
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
        return Err(Error::invalid(format!("Unsupported cluster size: 2^{}", bits as i32)));
    }
    Ok(bits)
}

/// Whether the bytes begin like a qcow2 image of a version that exists.
pub fn probe(start: &[u8]) -> bool {
    be32(start, 0) == Some(MAGIC) && be32(start, 4).is_some_and(|v| v >= 2)
}

impl Header {
    /// Parses the first cluster of an image (shorter files: zero-padded by the caller to a cluster).
    ///
    /// # Errors
    /// `EINVAL`, `ENOTSUP` or `EFBIG` with the text that `qemu-img` gives for the same fault.
    pub fn parse(cluster: &[u8]) -> Result<Header, Error> {
        let cluster_bits = peek_cluster_bits(cluster)?;
        let cluster_size = 1u64 << cluster_bits;
        let f = Fields(cluster);
        let version = f.u32(4)?;
        let header_length = if version == 2 { V2_LENGTH } else { f.u32(100)? };
        if version >= 3 && header_length < 104 {
            return Err(Error::invalid("qcow2 header too short"));
        }
        if u64::from(header_length) > cluster_size {
            return Err(Error::invalid("qcow2 header exceeds cluster size"));
        }
        let backing_offset = f.u64(8)?;
        if backing_offset > cluster_size {
            return Err(Error::invalid("Invalid backing file offset"));
        }
        let ext_end = if backing_offset == 0 { cluster_size } else { backing_offset };
        let [incompatible, compatible, autoclear] =
            if version == 2 { [0; 3] } else { [f.u64(72)?, f.u64(80)?, f.u64(88)?] };
        let exts = cluster.get(header_length as usize..ext_end as usize).unwrap_or(&[]);
        if incompatible & !incompatible::KNOWN != 0 {
            return Err(unsupported_features(exts, incompatible & !incompatible::KNOWN));
        }
        let compression = parse_compression(&f, version, header_length, incompatible)?;
        let refcount_order = if version == 2 { 4 } else { f.u32(96)? };
        if refcount_order > 6 {
            return Err(Error::invalid("Reference count entry width too large; may not exceed 64 bits"));
        }
        let crypt_method = f.u32(32)?;
        if crypt_method > 2 {
            return Err(Error::invalid(format!("Unsupported encryption method {crypt_method}")));
        }
        let known_end = if version == 2 { V2_LENGTH } else { V3_LENGTH.min(header_length) };
        let mut header = Header {
            version,
            cluster_bits,
            size: f.u64(24)?,
            crypt_method,
            l1_size: f.u32(36)?,
            l1_offset: HostOffset(f.u64(40)?),
            reftable_offset: HostOffset(f.u64(48)?),
            reftable_clusters: f.u32(56)?,
            snapshot_count: f.u32(60)?,
            snapshots_offset: HostOffset(f.u64(64)?),
            incompatible,
            compatible,
            autoclear,
            refcount_order,
            compression,
            unknown_fields: cluster.get(known_end as usize..header_length as usize).unwrap_or(&[]).to_vec(),
            extensions: Extensions::default(),
            backing_file: None,
        };
        if header.extended_l2() && cluster_bits < 14 {
            return Err(Error::invalid(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            ));
        }
        if version >= 3 && header.autoclear & autoclear::DATA_FILE_RAW != 0 && !header.external_data() {
            return Err(Error::invalid("data-file-raw requires a data file"));
        }
        header.check_tables()?;
        header.extensions = Extensions::parse(exts, &header)?;
        header.backing_file = parse_backing_name(&f, cluster, backing_offset, cluster_size)?;
        Ok(header)
    }

    /// The tables' sizes and places (sizes first, so that nothing overflows).
    fn check_tables(&self) -> Result<(), Error> {
        let g = self.geometry()?;
        let reftable_bytes = u64::from(self.reftable_clusters) << self.cluster_bits;
        if reftable_bytes > MAX_REFTABLE_BYTES {
            return Err(Error::invalid("Reference count table too large"));
        }
        self.table_in_range(self.reftable_offset, reftable_bytes, "Reference count table offset invalid")?;
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(Error::new(Errno::EFBIG, "Snapshot table too large"));
        }
        // 40 bytes is the smallest snapshot header; the real length is known when the table is walked.
        let snap_bytes = u64::from(self.snapshot_count) * 40;
        self.table_in_range(self.snapshots_offset, snap_bytes, "Snapshot table offset invalid")?;
        if u64::from(self.l1_size) * 8 > MAX_L1_BYTES {
            return Err(Error::new(Errno::EFBIG, "Active L1 table too large"));
        }
        self.table_in_range(self.l1_offset, u64::from(self.l1_size) * 8, "Active L1 table offset invalid")?;
        let needed = g.l1_entries_for(self.size);
        if needed > i32::MAX as u64 {
            return Err(Error::new(Errno::EFBIG, "Image is too big"));
        }
        if u64::from(self.l1_size) < needed {
            return Err(Error::invalid("L1 table is too small"));
        }
        Ok(())
    }

    /// A table of `bytes` at `at` is cluster-aligned and ends where a file can end. A check looks at it even there; other
    /// opens want it inside the file.
    fn table_in_range(&self, at: HostOffset, bytes: u64, text: &str) -> Result<(), Error> {
        let fits = at.checked_add(bytes).is_some_and(|end| end.0 <= i64::MAX as u64);
        if !fits || !at.is_aligned(1 << self.cluster_bits) {
            return Err(Error::invalid(text));
        }
        Ok(())
    }

    /// The sizes that fix all index arithmetic.
    pub fn geometry(&self) -> Result<Geometry, Error> {
        Geometry::new(self.cluster_bits, self.refcount_order, self.extended_l2())
            .ok_or_else(|| Error::invalid("Unsupported qcow2 geometry"))
    }

    /// Whether an incompatible feature is on.
    pub fn has(&self, incompatible_bit: u64) -> bool {
        self.incompatible & incompatible_bit != 0
    }

    /// Whether guest data lives in an external file.
    pub fn external_data(&self) -> bool {
        self.has(incompatible::DATA_FILE)
    }

    /// Whether the external data file must stay readable as a raw image.
    pub fn data_file_raw(&self) -> bool {
        self.external_data() && self.autoclear & autoclear::DATA_FILE_RAW != 0
    }

    /// Whether L2 entries carry subcluster bitmaps.
    pub fn extended_l2(&self) -> bool {
        self.has(incompatible::EXTENDED_L2)
    }

    /// Whether refcount updates may be postponed under the dirty bit.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & compatible::LAZY_REFCOUNTS != 0
    }

    /// The header as it stands at the start of the file: everything up to the end of the backing file name. The rest
    /// of the first cluster is zero.
    ///
    /// # Errors
    /// `ENOSPC` "No space left in the file header" where it does not fit one cluster.
    pub fn serialise(&self) -> Result<Vec<u8>, Error> {
        let full = || Error::new(Errno::ENOSPC, "No space left in the file header");
        let length = if self.version == 2 {
            V2_LENGTH as usize
        } else {
            V3_LENGTH as usize + self.unknown_fields.len()
        };
        let mut out = vec![0u8; length];
        put32(&mut out, 0, MAGIC);
        put32(&mut out, 4, self.version);
        put32(&mut out, 20, self.cluster_bits);
        put64(&mut out, 24, self.size);
        put32(&mut out, 32, self.crypt_method);
        put32(&mut out, 36, self.l1_size);
        put64(&mut out, 40, self.l1_offset.0);
        put64(&mut out, 48, self.reftable_offset.0);
        put32(&mut out, 56, self.reftable_clusters);
        put32(&mut out, 60, self.snapshot_count);
        put64(&mut out, 64, self.snapshots_offset.0);
        if self.version >= 3 {
            put64(&mut out, 72, self.incompatible);
            put64(&mut out, 80, self.compatible);
            put64(&mut out, 88, self.autoclear);
            put32(&mut out, 96, self.refcount_order);
            put32(&mut out, 100, u32::try_from(length).map_err(|_| full())?);
            out[104] = u8::from(self.compression == CompressionType::Zstd);
            out[V3_LENGTH as usize..].copy_from_slice(&self.unknown_fields);
        }
        let name = self.backing_file.as_deref().unwrap_or("").as_bytes();
        let room = 1usize << self.cluster_bits;
        // The feature name table is a courtesy: it gives way before the header overflows.
        let with_names = self.extensions.serialised(true);
        let fits = out.len() + with_names.len() + name.len() <= room;
        out.extend(if fits { with_names } else { self.extensions.serialised(false) });
        if !name.is_empty() {
            let at = out.len() as u64;
            put64(&mut out, 8, at);
            put32(&mut out, 16, u32::try_from(name.len()).map_err(|_| full())?);
            out.extend_from_slice(name);
        }
        if out.len() > room || name.len() > MAX_BACKING_NAME as usize {
            return Err(full());
        }
        Ok(out)
    }
}

/// Field access with the one error a short file gives.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> Result<u32, Error> {
        be32(self.0, at).ok_or_else(|| Error::invalid("qcow2 header too short"))
    }

    fn u64(&self, at: usize) -> Result<u64, Error> {
        be64(self.0, at).ok_or_else(|| Error::invalid("qcow2 header too short"))
    }
}

/// The compression type, which must agree with its feature bit.
fn parse_compression(
    f: &Fields<'_>,
    version: u32,
    length: u32,
    incompat: u64,
) -> Result<CompressionType, Error> {
    let kind = if version >= 3 && length > 104 { f.0.get(104).copied().unwrap_or(0) } else { 0 };
    let flagged = incompat & incompatible::COMPRESSION != 0;
    match (kind, flagged) {
        (0, false) => Ok(CompressionType::Zlib),
        (1, true) => Ok(CompressionType::Zstd),
        (0, true) => Err(Error::invalid("qcow2: Compression type incompatible feature bit must not be set")),
        (1, false) => Err(Error::invalid("qcow2: Compression type incompatible feature bit must be set")),
        (other, _) => Err(Error::new(Errno::ENOTSUP, format!("qcow2: unknown compression type: {other}"))),
    }
}

/// The backing file name, which lies in the first cluster.
fn parse_backing_name(
    f: &Fields<'_>,
    cluster: &[u8],
    at: u64,
    cluster_size: u64,
) -> Result<Option<String>, Error> {
    if at == 0 {
        return Ok(None);
    }
    let len = f.u32(16)?;
    if u64::from(len) > u64::from(MAX_BACKING_NAME).min(cluster_size - at) {
        return Err(Error::invalid("Backing file name too long"));
    }
    let end = at + u64::from(len);
    let raw =
        cluster.get(at as usize..end as usize).ok_or_else(|| Error::invalid("Backing file name too long"))?;
    let name = super::extensions::text(raw)
        .ok_or_else(|| Error::invalid("The backing file name in the image is not valid UTF-8"))?;
    Ok((!name.is_empty()).then_some(name))
}

/// "Unsupported qcow2 feature(s): …", with the names that the image itself gives its features.
fn unsupported_features(exts: &[u8], mut bits: u64) -> Error {
    let mut names = Vec::new();
    for (bit, name) in super::extensions::incompatible_names(exts) {
        if bits & (1 << bit) != 0 {
            names.push(name);
            bits &= !(1 << bit);
        }
    }
    if bits != 0 {
        names.push(format!("Unknown incompatible feature: {bits:x}"));
    }
    Error::new(Errno::ENOTSUP, format!("Unsupported qcow2 feature(s): {}", names.join(", ")))
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
