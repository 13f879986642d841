//! Making a new image: options, their checks, and the bytes to write.
//!
//! Invariants: every cluster of the layout is used exactly once and has refcount 1; nothing that is zero is written
//! (the file is new, so its holes read as zeros); the texts of refused options are those of `qemu-img`.
//!
//! ```text
//! │ header │ refcount table │ refcount blocks │ L1 │ L2 tables (preallocated) │ data clusters (preallocated) │
//! ```
//! Source: qcow2 specification; option checks as observed with `qemu-img create` 10.0.

use ringblock_engine::driver::Flags;
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use ringblock_engine::units::HostOffset;
use ringblock_engine::{Errno, Error};

use super::entry::{Allocation, EntryFormat, L2Entry};
use super::extensions::{Extensions, standard_feature_names};
use super::geometry::{Geometry, InBlock, MAX_CLUSTER_BITS, MAX_REFTABLE_BYTES, MIN_CLUSTER_BITS};
use super::header::{CompressionType, Header, autoclear, compatible, incompatible};
use super::refcount;

/// How much of a new image is allocated ahead.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All tables, with data clusters named but not backed by storage.
    Metadata,
    /// Tables, and storage reserved for the data.
    Falloc,
    /// Tables, and zeros written for the data.
    Full,
}

impl Preallocation {
    /// The option value's meaning, or the text of the refusal.
    pub fn parse(text: &str) -> Result<Preallocation, Error> {
        match text {
            "off" => Ok(Preallocation::Off),
            "metadata" => Ok(Preallocation::Metadata),
            "falloc" => Ok(Preallocation::Falloc),
            "full" => Ok(Preallocation::Full),
            other => {
                Err(Error::invalid(format!("Parameter 'preallocation' does not accept value '{other}'")))
            }
        }
    }
}

/// The options of a new image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CreateOptions {
    /// Bytes of the virtual disk, a multiple of 512.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bits of a refcount.
    pub refcount_bits: u64,
    /// Extended L2 entries with subclusters.
    pub extended_l2: bool,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Packing of compressed clusters.
    pub compression: CompressionType,
    /// Name of the backing file, as it will be stored.
    pub backing_file: Option<String>,
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// Name of the external data file, as it will be stored.
    pub data_file: Option<String>,
    /// The data file must stay readable as a raw image.
    pub data_file_raw: bool,
    /// How much is allocated ahead.
    pub preallocation: Preallocation,
}

impl Default for CreateOptions {
    fn default() -> CreateOptions {
        CreateOptions {
            size: 0,
            cluster_size: 65536,
            version: 3,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            compression: CompressionType::Zlib,
            backing_file: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
        }
    }
}

/// The version that a `compat` or `version` option names.
pub fn parse_compat(text: &str) -> Result<u32, Error> {
    match text {
        "0.10" | "v2" => Ok(2),
        "1.1" | "v3" => Ok(3),
        other => Err(Error::invalid(format!("Parameter 'version' does not accept value '{other}'"))),
    }
}

/// The packing that a `compression_type` option names.
pub fn parse_compression(text: &str) -> Result<CompressionType, Error> {
    match text {
        "zlib" => Ok(CompressionType::Zlib),
        "zstd" => Ok(CompressionType::Zstd),
        other => Err(Error::invalid(format!("Parameter 'compression-type' does not accept value '{other}'"))),
    }
}

impl CreateOptions {
    /// Checks everything that does not need a file.
    ///
    /// # Errors
    /// `EINVAL` with the text of `qemu-img create` for the same options.
    pub fn check(&self) -> Result<Geometry, Error> {
        let fail = |text: &str| Err(Error::invalid(text));
        if !self.size.is_multiple_of(512) {
            return fail("Image size must be a multiple of 512 bytes");
        }
        let bits = self.cluster_size.trailing_zeros();
        if !self.cluster_size.is_power_of_two() || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
            return fail("Cluster size must be a power of two between 512 and 2048k");
        }
        if self.extended_l2 && self.version < 3 {
            return fail(
                "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            );
        }
        if self.extended_l2 && bits < 14 {
            return fail("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes");
        }
        self.check_files()?;
        if self.version < 3 && self.lazy_refcounts {
            return fail(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            );
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return fail("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if self.version < 3 && self.refcount_bits != 16 {
            return fail(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
            );
        }
        if self.data_file_raw && self.data_file.is_none() {
            return fail("data-file-raw requires data-file");
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return fail("Backing file and data-file-raw cannot be used at the same time");
        }
        if self.data_file.is_some() && self.version < 3 {
            return fail(
                "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            );
        }
        if self.compression != CompressionType::Zlib && self.version < 3 {
            return fail(
                "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            );
        }
        let g = Geometry::new(bits, self.refcount_bits.trailing_zeros(), self.extended_l2)
            .ok_or_else(|| Error::invalid("Unsupported qcow2 geometry"))?;
        if self.size > i64::MAX as u64 {
            return fail("Image size cannot be negative");
        }
        if self.size > g.max_disk_size() {
            return Err(Error::new(
                Errno::EFBIG,
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            ));
        }
        Ok(g)
    }

    /// The checks on backing file and preallocation.
    fn check_files(&self) -> Result<(), Error> {
        if self.preallocation != Preallocation::Off && self.backing_file.is_some() && !self.extended_l2 {
            return Err(Error::invalid(
                "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            ));
        }
        if self.backing_format.is_some() && self.backing_file.is_none() {
            return Err(Error::invalid("Backing format cannot be used without backing file"));
        }
        Ok(())
    }

    /// The preallocation in force: a raw external file needs all its clusters named.
    fn effective_preallocation(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off if self.data_file_raw => Preallocation::Metadata,
            p => p,
        }
    }

    /// The header, before the tables have places.
    fn header(&self, g: &Geometry) -> Header {
        let mut extensions = Extensions {
            backing_format: self.backing_format.clone(),
            data_file: self.data_file.clone(),
            ..Extensions::default()
        };
        let bit = |on: bool, bit: u64| if on { bit } else { 0 };
        if self.version >= 3 {
            extensions.feature_names = Some(standard_feature_names());
        }
        Header {
            version: self.version,
            cluster_bits: g.cluster_bits,
            size: self.size,
            crypt_method: 0,
            l1_size: 0,
            l1_offset: HostOffset(0),
            reftable_offset: HostOffset(0),
            reftable_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: HostOffset(0),
            incompatible: bit(self.data_file.is_some(), incompatible::DATA_FILE)
                | bit(self.compression != CompressionType::Zlib, incompatible::COMPRESSION)
                | bit(self.extended_l2, incompatible::EXTENDED_L2),
            compatible: bit(self.lazy_refcounts, compatible::LAZY_REFCOUNTS),
            autoclear: bit(self.data_file_raw, autoclear::DATA_FILE_RAW),
            refcount_order: g.refcount_order,
            compression: self.compression,
            unknown_fields: Vec::new(),
            extensions,
            backing_file: self.backing_file.clone(),
        }
    }
}

/// What to do to an empty file to make it the image.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// The header as it will be written.
    pub header: Header,
    /// Bytes of the image file: set first, the holes read as zeros.
    pub file_size: u64,
    /// Bytes of the external data file, where there is one.
    pub data_file_size: Option<u64>,
    /// Preallocated guest data: start and length in the image file, or in the data file where there is one.
    pub data: Option<(HostOffset, u64)>,
    /// What to do with `data`: nothing, reserve storage, or write zeros.
    pub preallocation: Preallocation,
    geometry: Geometry,
    header_bytes: Vec<u8>,
    clusters: u64,
    refblocks: u64,
    l2_tables: u64,
}

/// Lays out a new image.
///
/// # Errors
/// As [`CreateOptions::check`], or `ENOSPC` where names do not fit the first cluster.
pub fn create(options: &CreateOptions) -> Result<NewImage, Error> {
    let g = options.check()?;
    let preallocation = options.effective_preallocation();
    let cs = g.cluster_size();
    let l1_entries = g.l1_entries_for(options.size);
    let l1_clusters = g.clusters_for(l1_entries * 8);
    let guest_clusters = g.clusters_for(options.size);
    let (l2_tables, data_clusters) = match preallocation {
        Preallocation::Off => (0, 0),
        _ if options.data_file.is_some() => (l1_entries, 0),
        _ => (l1_entries, guest_clusters),
    };
    let (reftable_clusters, refblocks) = refcount_clusters(&g, 1 + l1_clusters + l2_tables + data_clusters);
    if reftable_clusters * cs > MAX_REFTABLE_BYTES {
        return Err(Error::new(
            Errno::EFBIG,
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
        ));
    }
    let mut header = options.header(&g);
    header.reftable_offset = HostOffset(cs);
    header.reftable_clusters = reftable_clusters as u32;
    header.l1_size = l1_entries as u32;
    let l1 = 1 + reftable_clusters + refblocks;
    header.l1_offset = HostOffset(if l1_clusters == 0 { 0 } else { l1 * cs });
    let clusters = l1 + l1_clusters + l2_tables + data_clusters;
    let first_data = l1 + l1_clusters + l2_tables;
    let data = match (l2_tables, options.data_file.is_some()) {
        (0, _) => None,
        (_, true) => Some((HostOffset(0), options.size)),
        (_, false) => Some((HostOffset(first_data * cs), data_clusters * cs)),
    };
    Ok(NewImage {
        header_bytes: header.serialise()?,
        header,
        file_size: clusters * cs,
        data_file_size: options.data_file.as_ref().map(|_| options.size),
        data,
        preallocation,
        geometry: g,
        clusters,
        refblocks,
        l2_tables,
    })
}

impl NewImage {
    /// Writes everything into a file that reads as zeros. The tables are durable before the header makes an image of them.
    ///
    /// # Errors
    /// Those of the file.
    pub async fn write_to(&self, file: &Root) -> Result<(), Errno> {
        for (at, bytes) in self.writes() {
            if at.0 == 0 {
                file.flush().await?;
            }
            file.write(at.0, Buf::from_slice(&bytes), Flags::NONE).await.0?;
        }
        file.flush().await
    }

    /// The writes, in ascending order of place, in pieces of at most a cluster. All-zero pieces are left out. The
    /// header comes last, so that an interrupted creation leaves a file that is not an image.
    pub fn writes(&self) -> impl Iterator<Item = (HostOffset, Vec<u8>)> + '_ {
        let g = self.geometry;
        let reft = self.header.reftable_offset;
        let blocks = HostOffset(reft.0 + u64::from(self.header.reftable_clusters) * g.cluster_size());
        let l2 = HostOffset(self.header.l1_offset.0 + g.clusters_for(self.l1_bytes()) * g.cluster_size());
        let pointers = move |at: HostOffset, n: u64, first: HostOffset, flag: u64| {
            let per = g.cluster_size() / 8;
            (0..n.div_ceil(per)).map(move |c| {
                let here = (c * per)..((c + 1) * per).min(n);
                let bytes =
                    here.flat_map(|i| ((first.0 + i * g.cluster_size()) | flag).to_be_bytes()).collect();
                (HostOffset(at.0 + c * g.cluster_size()), bytes)
            })
        };
        let counters = (0..self.refblocks).map(move |b| {
            let left = self.clusters - b * g.refblock_entries();
            (HostOffset(blocks.0 + b * g.cluster_size()), ones(&g, left.min(g.refblock_entries())))
        });
        let tables =
            (0..self.l2_tables).map(move |t| (HostOffset(l2.0 + t * g.cluster_size()), self.l2_table(t)));
        pointers(reft, self.refblocks, blocks, 0)
            .chain(counters)
            .chain(pointers(self.header.l1_offset, self.l2_tables, l2, super::entry::COPIED))
            .chain(tables)
            .chain(std::iter::once((HostOffset(0), self.header_bytes.clone())))
    }

    fn l1_bytes(&self) -> u64 {
        u64::from(self.header.l1_size) * 8
    }

    /// The preallocated L2 table `t`. Extended entries name a cluster whose subclusters are still unallocated.
    fn l2_table(&self, t: u64) -> Vec<u8> {
        let g = &self.geometry;
        let format = EntryFormat::of(&self.header, *g);
        let start = self.data.map_or(HostOffset(0), |(at, _)| at);
        let end = g.clusters_for(self.header.size).min((t + 1) * g.l2_entries());
        let mut out = Vec::with_capacity(g.cluster_size() as usize);
        for c in t * g.l2_entries()..end {
            let a = Allocation { host: HostOffset(start.0 + c * g.cluster_size()), copied: true };
            let entry = if g.extended {
                L2Entry::Sub { host: Some(a), allocated: 0, zero: 0 }
            } else {
                L2Entry::Data(a)
            };
            let raw = format.encode(entry);
            out.extend(raw.word.to_be_bytes());
            if g.extended {
                out.extend(raw.bitmap.to_be_bytes());
            }
        }
        out
    }
}

/// A refcount block whose first `n` counters are 1, cut after them.
fn ones(g: &Geometry, n: u64) -> Vec<u8> {
    let bits = n << g.refcount_order;
    let mut block = vec![0; bits.div_ceil(8) as usize];
    for i in 0..n {
        let ok = refcount::set(&mut block, g.refcount_order, InBlock(i), 1);
        debug_assert!(ok);
    }
    block
}

/// Clusters of refcount table and refcount blocks for `used` other clusters, themselves included: (table, blocks).
fn refcount_clusters(g: &Geometry, used: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1, 1);
    loop {
        let total = used + table + blocks;
        let b = total.div_ceil(g.refblock_entries()).max(1);
        let t = (b * 8).div_ceil(g.cluster_size()).max(1);
        if (t, b) == (table, blocks) {
            return (t, b);
        }
        // Both only grow, and each new refcount cluster covers many others, so this ends.
        (table, blocks) = (t.max(table), b.max(blocks));
    }
}

/// The size of an image file that would hold data: what `qemu-img measure` prints.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Measure {
    /// Bytes for the data that exists.
    pub required: u64,
    /// Bytes when every cluster is allocated.
    pub fully_allocated: u64,
}

/// Computes [`Measure`] for new images with `options`, of which `data_bytes` (rounded to clusters by the caller) hold
/// data.
pub fn measure(options: &CreateOptions, data_bytes: u64) -> Result<Measure, Error> {
    let g = options.check()?;
    let cs = g.cluster_size();
    let guest = g.clusters_for(options.size) * cs;
    let l2_bytes = g.clusters_for(options.size).next_multiple_of(g.l2_entries()) * g.l2_entry_size();
    let l1_bytes = (l2_bytes / cs).next_multiple_of(cs / 8) * 8;
    let base = cs + l2_bytes + l1_bytes;
    let (mut table, mut blocks) = (0u64, 0u64);
    loop {
        let b = ((base + guest) / cs + table + blocks).div_ceil(g.refblock_entries());
        let t = b.div_ceil(cs / 8);
        if (t, b) == (table, blocks) {
            break;
        }
        (table, blocks) = (t, b);
    }
    let fully_allocated = base + (table + blocks) * cs + guest;
    let held = match options.preallocation {
        Preallocation::Falloc | Preallocation::Full => guest,
        _ => data_bytes.min(guest),
    };
    Ok(Measure { required: fully_allocated - guest + held, fully_allocated })
}

#[cfg(test)]
#[path = "create_tests.rs"]
mod tests;
