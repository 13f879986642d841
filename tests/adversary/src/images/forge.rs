//! A qcow2 image made by hand, with the place of every field, so that each can be made to lie.
//!
//! Shares no code with the engine. Source: qcow2 specification.
//!
//! ```text
//! cluster  0       1         2         3   4   5     6        7        8          9          10      11    12      13
//!        header reftable refblock    L1  L2  data  snap L1  snap L2  snapshots  directory  table   bits  packed  data
//! ```

use flate2::{Compress, Compression, FlushCompress};

/// Numbers of the clusters, in the order of the picture.
pub(super) const REFTABLE: u64 = 1;
/// See [`REFTABLE`].
pub(super) const REFBLOCK: u64 = 2;
/// See [`REFTABLE`].
pub(super) const L1: u64 = 3;
/// See [`REFTABLE`].
pub(super) const L2: u64 = 4;
/// See [`REFTABLE`].
pub(super) const DATA: u64 = 5;
/// See [`REFTABLE`].
pub(super) const SNAP_L1: u64 = 6;
/// See [`REFTABLE`].
pub(super) const SNAP_L2: u64 = 7;
/// See [`REFTABLE`].
pub(super) const SNAPSHOTS: u64 = 8;
/// See [`REFTABLE`].
pub(super) const DIRECTORY: u64 = 9;
/// See [`REFTABLE`].
pub(super) const BITMAP_TABLE: u64 = 10;
/// See [`REFTABLE`].
pub(super) const BITMAP: u64 = 11;
/// See [`REFTABLE`].
pub(super) const PACKED: u64 = 12;
/// See [`REFTABLE`].
pub(super) const DATA2: u64 = 13;
/// Clusters of the image.
pub(super) const CLUSTERS: u64 = 14;

/// The flag of entries whose cluster has one reference.
pub(super) const COPIED: u64 = 1 << 63;
/// The flag of compressed clusters.
pub(super) const COMPRESSED: u64 = 1 << 62;

/// What a field means, which decides what it is made to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Sense {
    /// An offset into the file, perhaps with flags.
    Offset,
    /// Anything else.
    Number,
}

/// Where a field is.
#[derive(Clone, Debug)]
pub(super) struct Field {
    pub(super) name: String,
    pub(super) at: u64,
    /// Bytes.
    pub(super) width: usize,
    pub(super) sense: Sense,
}

/// How to make an image.
#[derive(Clone, Debug)]
pub(super) struct Forge {
    /// log2 of the cluster size.
    pub(super) bits: u32,
    pub(super) version: u32,
    /// log2 of the width of a refcount.
    pub(super) order: u32,
    pub(super) extended: bool,
    pub(super) zstd: bool,
    pub(super) dirty: bool,
    pub(super) backing: Option<Vec<u8>>,
    pub(super) backing_format: Option<&'static str>,
    pub(super) data_file: Option<Vec<u8>>,
}

/// An image and its fields.
pub(super) struct Forged {
    pub(super) bytes: Vec<u8>,
    pub(super) fields: Vec<Field>,
    pub(super) bits: u32,
}

impl Forge {
    /// Version 3, 16-bit refcounts, with snapshot, bitmap and a compressed cluster.
    pub(super) fn new(bits: u32) -> Forge {
        Forge {
            bits,
            version: 3,
            order: 4,
            extended: false,
            zstd: false,
            dirty: false,
            backing: None,
            backing_format: None,
            data_file: None,
        }
    }

    /// An image on `name`.
    pub(super) fn on(bits: u32, name: impl Into<Vec<u8>>, format: Option<&'static str>) -> Forge {
        Forge { backing: Some(name.into()), backing_format: format, ..Forge::new(bits) }
    }

    /// An image whose data are in `name`.
    pub(super) fn beside(bits: u32, name: impl Into<Vec<u8>>) -> Forge {
        Forge { data_file: Some(name.into()), ..Forge::new(bits) }
    }

    fn entry_size(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Bytes of the virtual disk.
    pub(super) fn disk_size(&self) -> u64 {
        let table = ((1u64 << self.bits) / self.entry_size()) << self.bits;
        (table + table / 2).min(4 << 20)
    }

    /// Makes it.
    pub(super) fn build(&self) -> Forged {
        let mut out =
            Forged { bytes: vec![0; (CLUSTERS << self.bits) as usize], fields: Vec::new(), bits: self.bits };
        self.header(&mut out);
        self.refcounts(&mut out);
        self.mappings(&mut out);
        self.snapshots(&mut out);
        if self.version >= 3 {
            bitmaps(&mut out);
        }
        out
    }

    fn header(&self, out: &mut Forged) {
        let at = |c: u64| c << self.bits;
        for (name, offset, value) in [
            ("magic", 0, 0x5146_49fb),
            ("version", 4, self.version),
            ("cluster-bits", 20, self.bits),
            ("crypt-method", 32, 0),
            ("l1-size", 36, 2),
            ("reftable-clusters", 56, 1),
            ("snapshot-count", 60, 1),
        ] {
            out.field(name, offset, 4, Sense::Number, value.into());
        }
        out.field("size", 24, 8, Sense::Number, self.disk_size());
        for (name, offset, value) in [
            ("l1-offset", 40, at(L1)),
            ("reftable-offset", 48, at(REFTABLE)),
            ("snapshots-offset", 64, at(SNAPSHOTS)),
        ] {
            out.field(name, offset, 8, Sense::Offset, value);
        }
        let mut end = 72;
        if self.version >= 3 {
            let external = self.data_file.is_some();
            let incompatible = u64::from(self.dirty)
                | u64::from(external) << 2
                | u64::from(self.zstd) << 3
                | u64::from(self.extended) << 4;
            out.field("incompatible", 72, 8, Sense::Number, incompatible);
            out.field("compatible", 80, 8, Sense::Number, self.dirty.into());
            out.field("autoclear", 88, 8, Sense::Number, 1);
            out.field("refcount-order", 96, 4, Sense::Number, self.order.into());
            out.field("header-length", 100, 4, Sense::Number, 112);
            out.field("compression-type", 104, 1, Sense::Number, self.zstd.into());
            end = self.extensions(out);
        }
        let name = self.backing.as_deref().unwrap_or(b"");
        let here = if name.is_empty() { 0 } else { end };
        out.field("backing-offset", 8, 8, Sense::Offset, here);
        out.field("backing-length", 16, 4, Sense::Number, name.len() as u64);
        out.put(here.max(end), name);
    }

    /// Writes the header extensions; gives their end.
    fn extensions(&self, out: &mut Forged) -> u64 {
        let mut end = 112;
        let mut push = |out: &mut Forged, name: &str, kind: u32, data: &[u8]| {
            out.field(&format!("{name}-type"), end, 4, Sense::Number, kind.into());
            out.field(&format!("{name}-length"), end + 4, 4, Sense::Number, data.len() as u64);
            out.put(end + 8, data);
            end = (end + 8 + data.len() as u64).next_multiple_of(8);
            end
        };
        if let Some(format) = self.backing_format {
            push(out, "ext-format", 0xe279_2aca, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            push(out, "ext-data-file", 0x4441_5441, name);
        }
        let end = push(out, "ext-bitmaps", 0x2385_2875, &[0; 24]);
        out.field("ext-bitmaps-count", end - 24, 4, Sense::Number, 1);
        out.field("ext-bitmaps-reserved", end - 20, 4, Sense::Number, 0);
        out.field("ext-bitmaps-size", end - 16, 8, Sense::Number, 32);
        out.field("ext-bitmaps-offset", end - 8, 8, Sense::Offset, DIRECTORY << self.bits);
        push(out, "ext-end", 0, &[])
    }

    fn refcounts(&self, out: &mut Forged) {
        let (table, block) = (REFTABLE << self.bits, REFBLOCK << self.bits);
        out.field("reftable-0", table, 8, Sense::Offset, block);
        out.field("reftable-1", table + 8, 8, Sense::Offset, 0);
        for c in 0..CLUSTERS {
            let external = self.data_file.is_some() && [DATA, PACKED, DATA2].contains(&c);
            let unused = self.version < 3 && (DIRECTORY..=BITMAP).contains(&c);
            let shared = c == DATA && self.order > 0;
            out.refcount(self.order, c, if external || unused { 0 } else { 1 + u64::from(shared) });
        }
        let width = (1usize << self.order).div_ceil(8);
        for c in [0, L2, DATA, PACKED, CLUSTERS] {
            let at = block + ((c << self.order) >> 3);
            let value = out.get(at, width);
            out.field(&format!("refcount-{c}"), at, width, Sense::Number, value);
        }
    }

    fn mappings(&self, out: &mut Forged) {
        let at = |c: u64| c << self.bits;
        out.field("l1-0", at(L1), 8, Sense::Offset, at(L2) | COPIED);
        out.field("l1-1", at(L1) + 8, 8, Sense::Offset, 0);
        let all = 0xffff_ffff;
        let packed = self.packed();
        let mut entries = match self.data_file {
            Some(_) => vec![(COPIED, all), (0, 0), (0, 0), (at(3) | COPIED, all)],
            None => {
                let kept = if self.order > 0 { 0 } else { COPIED };
                vec![
                    (at(DATA) | kept, all),
                    (self.descriptor(packed.len()), 0),
                    (1, 0),
                    (at(DATA2) | COPIED, all),
                ]
            }
        };
        if self.extended {
            entries[2] = (0, all << 32);
        } else if self.version < 3 {
            entries[2] = (0, 0);
        }
        for (i, (word, bitmap)) in entries.into_iter().enumerate() {
            let here = at(L2) + i as u64 * self.entry_size();
            out.field(&format!("l2-{i}"), here, 8, Sense::Offset, word);
            if self.extended {
                out.field(&format!("l2-{i}-bitmap"), here + 8, 8, Sense::Number, bitmap);
            }
        }
        if self.data_file.is_none() {
            out.put(at(PACKED), &packed);
        }
        for c in [DATA, DATA2] {
            out.put(at(c), &vec![0x5a; 1 << self.bits]);
        }
    }

    /// A cluster of 0x77, packed.
    pub(super) fn packed(&self) -> Vec<u8> {
        pack(self.zstd, &vec![0x77; 1 << self.bits])
    }

    /// The L2 entry of `len` packed bytes at the start of their cluster.
    pub(super) fn descriptor(&self, len: usize) -> u64 {
        descriptor(self.bits, PACKED << self.bits, len as u64)
    }

    fn snapshots(&self, out: &mut Forged) {
        let at = |c: u64| c << self.bits;
        let here = at(SNAPSHOTS);
        out.field("snap-l1-offset", here, 8, Sense::Offset, at(SNAP_L1));
        for (name, offset, width, value) in [
            ("l1-size", 8, 4, 2),
            ("id-length", 12, 2, 1),
            ("name-length", 14, 2, 4),
            ("date", 16, 4, 1_700_000_000),
            ("nsec", 20, 4, 5),
            ("clock", 24, 8, 7),
            ("vm-state", 32, 4, 0),
            ("extra-length", 36, 4, 24),
            ("vm-state-64", 40, 8, 0),
            ("disk-size", 48, 8, self.disk_size()),
            ("icount", 56, 8, u64::MAX),
        ] {
            out.field(&format!("snap-{name}"), here + offset, width, Sense::Number, value);
        }
        out.put(here + 64, b"1snap");
        out.field("snap-l1-0", at(SNAP_L1), 8, Sense::Offset, at(SNAP_L2) | COPIED);
        let shared = self.order > 0 && self.data_file.is_none();
        out.field("snap-l2-0", at(SNAP_L2), 8, Sense::Offset, if shared { at(DATA) } else { 0 });
        if self.extended {
            out.field("snap-l2-0-bitmap", at(SNAP_L2) + 8, 8, Sense::Number, 0xffff_ffff);
        }
    }
}

fn bitmaps(out: &mut Forged) {
    let at = |c: u64| c << out.bits;
    let (directory, table, bits) = (at(DIRECTORY), at(BITMAP_TABLE), at(BITMAP));
    out.field("bitmap-table-offset", directory, 8, Sense::Offset, table);
    for (name, offset, width, value) in [
        ("table-size", 8, 4, 1),
        ("flags", 12, 4, 0),
        ("type", 16, 1, 1),
        ("granularity", 17, 1, 16),
        ("name-length", 18, 2, 4),
        ("extra-length", 20, 4, 0),
    ] {
        out.field(&format!("bitmap-{name}"), directory + offset, width, Sense::Number, value);
    }
    out.put(directory + 24, b"bits");
    out.field("bitmap-table-0", table, 8, Sense::Offset, bits);
    out.put(bits, &[0x81]);
}

/// The L2 entry of `len` packed bytes at `at`.
pub(super) fn descriptor(bits: u32, at: u64, len: u64) -> u64 {
    let sectors = ((at % 512) + len).div_ceil(512).saturating_sub(1);
    COMPRESSED | sectors << (62 - (bits - 8)) | at
}

/// Packs as the format wants it: raw deflate, or a Zstandard frame.
pub(super) fn pack(zstd: bool, data: &[u8]) -> Vec<u8> {
    if zstd {
        return zstd::bulk::compress(data, 3).unwrap_or_default();
    }
    let mut out = Vec::with_capacity(data.len() + 64);
    let mut c = Compress::new_with_window_bits(Compression::default(), false, 12);
    let _ = c.compress_vec(data, &mut out, FlushCompress::Finish);
    out
}

impl Forged {
    /// Notes a field and writes it.
    fn field(&mut self, name: &str, at: u64, width: usize, sense: Sense, value: u64) {
        self.fields.push(Field { name: name.to_owned(), at, width, sense });
        self.set(at, width, value);
    }

    /// Writes a number.
    pub(super) fn set(&mut self, at: u64, width: usize, value: u64) {
        self.put(at, &value.to_be_bytes()[8 - width..]);
    }

    /// Reads a number.
    pub(super) fn get(&self, at: u64, width: usize) -> u64 {
        let bytes = self.bytes.get(at as usize..at as usize + width).unwrap_or(&[]);
        bytes.iter().fold(0, |n, &b| n << 8 | u64::from(b))
    }

    /// Writes bytes, and lengthens the file where they reach further.
    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) {
        let end = at as usize + bytes.len();
        if end > self.bytes.len() {
            self.bytes.resize(end, 0);
        }
        self.bytes[at as usize..end].copy_from_slice(bytes);
    }

    /// Writes the field `name`.
    ///
    /// # Panics
    /// Where the image has no such field: a mistake of the generator.
    pub(super) fn with(mut self, name: &str, value: u64) -> Forged {
        let field = self.fields.iter().find(|f| f.name == name);
        let (at, width) = field.map(|f| (f.at, f.width)).unwrap_or_else(|| panic!("no field {name}"));
        self.set(at, width, value);
        self
    }

    /// Writes the refcount of a cluster.
    pub(super) fn refcount(&mut self, order: u32, cluster: u64, value: u64) {
        let (at, bit) = ((REFBLOCK << self.bits) + ((cluster << order) >> 3), (cluster << order) & 7);
        match order {
            0..=2 => {
                let (mask, old) = ((1u64 << (1 << order)) - 1, self.get(at, 1));
                self.set(at, 1, old & !(mask << bit) | (value & mask) << bit);
            }
            _ => self.set(at, 1 << (order - 3), value),
        }
    }
}
