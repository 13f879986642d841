//! Forging qcow2 images: first a valid one of any combination of features, then some of its fields are broken.
//!
//! Written from the specification, without the driver's help (but for packing clusters).
//!
//! ```text
//!   │ header, extensions, name │ L1 │ L2 … data … │ snapshots │ bitmaps │ refcount table │ refcount blocks │
//!          every field that is written is remembered ──► break: numbers at edges, cuts, bits
//! ```

use ringblock_drivers::format::qcow2::compress::pack;
use ringblock_drivers::format::qcow2::header::CompressionType;

use crate::choices::Choices;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// A forged image.
#[derive(Clone, Debug, Default)]
pub(super) struct Forged {
    /// The qcow2 file.
    pub(super) image: Vec<u8>,
    /// The external data file, if the image has one.
    pub(super) data: Option<Vec<u8>>,
    /// The backing file, raw, if the image has one.
    pub(super) base: Option<Vec<u8>>,
    /// Nothing was broken.
    pub(super) whole: bool,
    /// A set of features, for the outcome.
    pub(super) features: u64,
}

impl Forged {
    /// Whether there is a bitmap, whatever became of it.
    pub(super) fn has_bitmaps(&self) -> bool {
        self.features >> 5 & 1 != 0
    }
}

/// What the image is like.
#[derive(Clone, Copy, Debug)]
struct Kind {
    bits: u32,
    version: u32,
    extended: bool,
    order: u32,
    zstd: bool,
    data_file: bool,
    backed: bool,
    lazy: bool,
    dirty: bool,
    tables: u64,
    snapshots: u64,
    bitmaps: bool,
}

impl Kind {
    fn choose(c: &mut Choices<'_>) -> Kind {
        let flags = c.number(2);
        let v3 = flags & 1 == 0;
        let extended = v3 && flags & 14 == 14;
        let data_file = v3 && flags & 48 == 48;
        let order = if v3 { c.pick(&[4, 6, 0, 1, 2, 3, 5]) } else { 4 };
        Kind {
            bits: if extended { 14 } else { c.pick(&[9, 9, 9, 10, 11, 12]) },
            version: if v3 { 3 } else { 2 },
            extended,
            order,
            zstd: v3 && !data_file && flags & 64 != 0,
            data_file,
            backed: !data_file && flags & 128 != 0,
            lazy: v3 && flags & 256 != 0,
            dirty: v3 && flags & 1536 == 1536,
            // guest offsets are offsets of the data file, which is to stay small
            tables: if data_file { 1 } else { 1 + c.below(3) },
            snapshots: if order >= 3 && !data_file && flags & 2048 != 0 { 1 + c.below(2) } else { 0 },
            bitmaps: v3 && !data_file && flags & 4096 != 0,
        }
    }

    fn features(&self) -> u64 {
        let flags = [
            self.version == 2,
            self.extended,
            self.zstd,
            self.data_file,
            self.backed,
            self.dirty,
            self.bitmaps,
            self.snapshots > 0,
        ];
        flags.into_iter().fold(0, |n, f| n << 1 | u64::from(f)) << 4 | u64::from(self.order)
    }

    fn cluster(&self) -> u64 {
        1 << self.bits
    }

    fn entry(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    fn per_table(&self) -> u64 {
        self.cluster() / self.entry()
    }
}

/// An image being built.
struct Forge {
    kind: Kind,
    image: Vec<u8>,
    data: Vec<u8>,
    /// References by cluster.
    refs: Vec<u64>,
    /// Offset and width of everything that may be broken.
    fields: Vec<(usize, u32)>,
    l1: u64,
    /// L2 tables and the entries in them, which snapshots share.
    entries: Vec<(u64, u64)>,
    last_packed: u64,
}

/// Makes an image of these choices.
pub(super) fn forge(c: &mut Choices<'_>) -> Forged {
    let kind = Kind::choose(c);
    let mut f = Forge {
        kind,
        image: Vec::new(),
        data: Vec::new(),
        refs: Vec::new(),
        fields: Vec::new(),
        l1: 0,
        entries: Vec::new(),
        last_packed: 0,
    };
    f.alloc(1);
    f.l1 = f.alloc(1);
    for index in 0..kind.tables {
        if c.below(4) != 3 {
            f.table(index, c);
        }
    }
    let snapshots = f.snapshots(c);
    let bitmaps = f.bitmaps(c);
    let size = f.size(c);
    let (table, clusters) = f.refcounts();
    f.header(size, (table, clusters), snapshots, bitmaps);
    let whole = f.break_some(c);
    let base = (0..3000u32).map(|i| i as u8 | 1).collect();
    Forged {
        image: f.image,
        data: kind.data_file.then_some(f.data),
        base: kind.backed.then_some(base),
        whole,
        features: kind.features(),
    }
}

impl Forge {
    /// New clusters at the end, with one reference each.
    fn alloc(&mut self, n: u64) -> u64 {
        let at = self.image.len() as u64;
        self.image.resize((at + n * self.kind.cluster()) as usize, 0);
        self.refs.resize(self.refs.len() + n as usize, 1);
        at
    }

    fn put(&mut self, at: u64, width: u32, value: u64) {
        let bytes = value.to_be_bytes();
        let at = at as usize;
        self.image[at..at + width as usize].copy_from_slice(&bytes[8 - width as usize..]);
        self.fields.push((at, width));
    }

    fn get(&self, at: u64) -> u64 {
        let at = at as usize;
        self.image[at..at + 8].iter().fold(0, |n, b| n << 8 | u64::from(*b))
    }

    fn refs_of(&mut self, offset: u64) -> &mut u64 {
        &mut self.refs[(offset >> self.kind.bits) as usize]
    }

    /// An L2 table with some entries.
    fn table(&mut self, index: u64, c: &mut Choices<'_>) {
        let table = self.alloc(1);
        self.put(self.l1 + 8 * index, 8, table | COPIED);
        let entries = 1 + c.below(6);
        for _ in 0..entries {
            let slot = c.below(self.kind.per_table().min(40));
            let at = table + slot * self.kind.entry();
            if !self.entries.contains(&(table, at)) {
                let guest = (index * self.kind.per_table() + slot) << self.kind.bits;
                self.entry(at, guest, c);
                self.entries.push((table, at));
            }
        }
        if self.entries.iter().all(|(t, _)| *t != table) {
            self.entries.push((table, table));
        }
    }

    fn entry(&mut self, at: u64, guest: u64, c: &mut Choices<'_>) {
        let k = self.kind;
        let (fill, cluster) = (c.byte(), k.cluster());
        match c.below(5) {
            0 | 1 => {
                let offset = self.cluster(guest, fill);
                self.put(at, 8, offset | COPIED);
                if k.extended {
                    let allocated = c.number(4);
                    let zeroes = c.number(4) & !allocated;
                    self.put(at + 8, 8, zeroes << 32 | allocated);
                }
            }
            2 if k.extended => self.put(at + 8, 8, c.number(4) << 32),
            2 if k.version == 3 => self.put(at, 8, 1),
            3 if k.version == 3 && !k.extended => {
                let offset = self.cluster(guest, fill);
                self.put(at, 8, offset | COPIED | 1);
            }
            4 if !k.data_file => {
                let text: Vec<u8> = (0..cluster).map(|i| fill.wrapping_add((i / 64) as u8)).collect();
                self.packed(at, &text);
            }
            _ => self.put(at, 8, 0),
        }
    }

    /// A data cluster for this guest offset.
    fn cluster(&mut self, guest: u64, fill: u8) -> u64 {
        let cluster = self.kind.cluster() as usize;
        if self.kind.data_file {
            let at = guest as usize;
            self.data.resize(self.data.len().max(at + cluster), 0);
            self.data[at..at + cluster].fill(fill);
            return guest;
        }
        let at = self.alloc(1);
        self.image[at as usize..at as usize + cluster].fill(fill);
        at
    }

    /// A compressed cluster: in the cluster of the one before if there is room.
    fn packed(&mut self, at: u64, text: &[u8]) {
        let kind = if self.kind.zstd { CompressionType::Zstd } else { CompressionType::Zlib };
        let Ok(Some(packed)) = pack(kind, text) else { return self.put(at, 8, 0) };
        let cluster = self.kind.cluster();
        let room = cluster - self.last_packed % cluster;
        let offset =
            match self.last_packed > 0 && self.refs_full(self.last_packed) && packed.len() as u64 <= room {
                true if !self.last_packed.is_multiple_of(cluster) => {
                    let place = self.last_packed;
                    *self.refs_of(place) += 1;
                    place
                }
                _ => self.alloc(1),
            };
        self.image[offset as usize..offset as usize + packed.len()].copy_from_slice(&packed);
        self.last_packed = offset + packed.len() as u64;
        let sectors = (offset % 512 + packed.len() as u64).div_ceil(512).max(1) - 1;
        let shift = 62 - (self.kind.bits - 8);
        self.put(at, 8, COMPRESSED | sectors << shift | offset);
        if self.kind.extended {
            self.put(at + 8, 8, 0);
        }
    }

    /// Whether a refcount can hold one more.
    fn refs_full(&mut self, offset: u64) -> bool {
        let most = if self.kind.order >= 6 { u64::MAX } else { (1u64 << (1u32 << self.kind.order)) - 1 };
        offset / self.kind.cluster() < self.refs.len() as u64 && *self.refs_of(offset) < most
    }

    /// Snapshots of what is there: all of it is shared, so nothing is COPIED any more. Where their table is, and how many.
    fn snapshots(&mut self, c: &mut Choices<'_>) -> (u64, u64) {
        let n = self.kind.snapshots;
        if n == 0 {
            return (0, 0);
        }
        let offset_of = 0x00ff_ffff_ffff_fe00;
        let mut tables: Vec<u64> = self.entries.iter().map(|e| e.0).collect();
        tables.dedup();
        for table in tables {
            *self.refs_of(table) += n;
        }
        for i in 0..self.kind.tables {
            let at = self.l1 + 8 * i;
            self.put(at, 8, self.get(at) & !COPIED);
        }
        for (table, at) in self.entries.clone() {
            let entry = self.get(at);
            if entry & COMPRESSED != 0 {
                let offset = entry & ((1 << (62 - (self.kind.bits - 8))) - 1);
                *self.refs_of(offset) += n;
            } else if entry & offset_of != 0 && (at != table || entry != 0) {
                *self.refs_of(entry & offset_of) += n;
                self.put(at, 8, entry & !COPIED);
            }
        }
        let list = self.alloc(1);
        let mut at = list;
        for i in 0..n {
            let l1 = self.alloc(1);
            for t in 0..self.kind.tables {
                self.put(l1 + 8 * t, 8, self.get(self.l1 + 8 * t));
            }
            self.put(at, 8, l1);
            self.put(at + 8, 4, self.kind.tables);
            self.put(at + 12, 2, 1);
            self.put(at + 14, 2, 2);
            self.put(at + 16, 8, c.number(2));
            self.put(at + 32, 4, 0);
            self.put(at + 36, 4, 16);
            let size = (self.kind.tables * self.kind.per_table()) << self.kind.bits;
            self.put(at + 48, 8, size);
            self.image[at as usize + 56..at as usize + 59].copy_from_slice(&[b'1' + i as u8, b's', b'n']);
            at += 64;
        }
        (list, n)
    }

    /// A bitmap directory with one bitmap, and where it is.
    fn bitmaps(&mut self, c: &mut Choices<'_>) -> Option<(u64, u64)> {
        if !self.kind.bitmaps {
            return None;
        }
        let (directory, table) = (self.alloc(1), self.alloc(1));
        let bits = match c.below(3) {
            0 => 0,
            1 => 1,
            _ => self.alloc(1),
        };
        self.put(table, 8, bits);
        self.put(directory, 8, table);
        self.put(directory + 8, 4, 1);
        self.put(directory + 12, 4, c.below(4));
        self.put(directory + 16, 1, 1);
        self.put(directory + 17, 1, 16);
        self.put(directory + 18, 2, 3);
        self.put(directory + 20, 4, 0);
        self.image[directory as usize + 24..directory as usize + 27].copy_from_slice(b"bit");
        Some((directory, 32))
    }

    /// Up to all that the L1 table can describe.
    fn size(&mut self, c: &mut Choices<'_>) -> u64 {
        let all = (self.kind.tables * self.kind.per_table()) << self.kind.bits;
        let less = c.below(self.kind.per_table().min(64)) * 512;
        all - less.min(all / 2)
    }

    /// The refcount table and its blocks. Gives where the table is, and its clusters.
    fn refcounts(&mut self) -> (u64, u64) {
        let (order, cluster) = (self.kind.order, self.kind.cluster());
        let per_block = (cluster * 8) >> order;
        let table = self.alloc(1);
        let mut blocks = Vec::new();
        while (blocks.len() as u64) * per_block < self.refs.len() as u64 {
            blocks.push(self.alloc(1));
        }
        for (i, &block) in blocks.iter().enumerate() {
            self.put(table + 8 * i as u64, 8, block);
        }
        for (i, n) in self.refs.clone().into_iter().enumerate() {
            let (block, within) = (blocks[i / per_block as usize], i as u64 % per_block);
            match order {
                0..=2 => {
                    let bit = within << order;
                    let at = block + bit / 8;
                    self.image[at as usize] |= (n << (bit % 8)) as u8;
                    self.fields.push((at as usize, 1));
                }
                _ => self.put(block + (within << order) / 8, 1 << (order - 3), n),
            }
        }
        (table, 1)
    }

    fn header(
        &mut self,
        size: u64,
        reftable: (u64, u64),
        snapshots: (u64, u64),
        bitmaps: Option<(u64, u64)>,
    ) {
        let k = self.kind;
        self.image[..4].copy_from_slice(b"QFI\xfb");
        let name_at = 400;
        let name = if k.backed { (name_at, 5) } else { (0, 0) };
        for (at, width, value) in [
            (4, 4, u64::from(k.version)),
            (8, 8, name.0),
            (16, 4, name.1),
            (20, 4, k.bits.into()),
            (24, 8, size),
            (32, 4, 0),
            (36, 4, k.tables),
            (40, 8, self.l1),
            (48, 8, reftable.0),
            (56, 4, reftable.1),
            (60, 4, snapshots.1),
            (64, 8, snapshots.0),
        ] {
            self.put(at, width, value);
        }
        self.image[name_at as usize..name_at as usize + 5].copy_from_slice(b"/base");
        let mut at = 72;
        if k.version == 3 {
            let bits = [k.dirty, false, k.data_file, k.zstd, k.extended];
            let incompatible = bits.iter().rev().fold(0, |n, b| n << 1 | u64::from(*b));
            self.put(72, 8, incompatible);
            self.put(80, 8, k.lazy.into());
            self.put(88, 8, bitmaps.is_some().into());
            self.put(96, 4, k.order.into());
            self.put(100, 4, 112);
            self.put(104, 1, k.zstd.into());
            at = 112;
        }
        if k.backed {
            at = self.extension(at, 0xe279_2aca, b"raw");
        }
        if k.data_file {
            at = self.extension(at, 0x4441_5441, b"/data");
        }
        if let Some((directory, len)) = bitmaps {
            let words = [1u64 << 32, len, directory].map(u64::to_be_bytes).concat();
            at = self.extension(at, 0x2385_2875, &words);
        }
        self.extension(at, 0, b"");
    }

    fn extension(&mut self, at: u64, kind: u64, data: &[u8]) -> u64 {
        self.put(at, 4, kind);
        self.put(at + 4, 4, data.len() as u64);
        let from = at as usize + 8;
        self.image[from..from + data.len()].copy_from_slice(data);
        self.fields.extend((0..data.len() / 8).map(|i| (from + 8 * i, 8)));
        at + 8 + (data.len() as u64).next_multiple_of(8)
    }

    /// Breaks up to four things; whether nothing was broken.
    fn break_some(&mut self, c: &mut Choices<'_>) -> bool {
        let times = c.below(5);
        for _ in 0..times {
            match c.below(16) {
                0 => {
                    let at = c.below(self.image.len() as u64 / 256 + 1) as usize * 256 + c.byte() as usize;
                    self.image.truncate(at);
                }
                1 => self.image.extend(vec![c.byte(); 1 + c.byte() as usize * 8]),
                2 => self.data.truncate(c.number(2) as usize),
                n => {
                    // the header and what was written last are chosen more often than all the refcounts
                    let of = match n {
                        3..=6 => self.fields.len() * 3 / 4,
                        _ => 0,
                    };
                    let from = if n % 2 == 0 { of } else { 0 };
                    let i = from + c.below((self.fields.len() - from) as u64) as usize;
                    let (at, width) = self.fields[i];
                    if at + width as usize <= self.image.len() {
                        let field = &mut self.image[at..at + width as usize];
                        let was = field.iter().fold(0, |n, b| n << 8 | u64::from(*b));
                        let value = c.broken(was, width).to_be_bytes();
                        field.copy_from_slice(&value[8 - width as usize..]);
                    }
                }
            }
        }
        times == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringblock_checker::{Checker, Files};
    use ringblock_engine::host::sim::Rng;

    /// Goal: what is not broken is valid, in every combination of features. Method: the independent checker, and a count
    /// of the combinations.
    #[test]
    fn valid_unless_broken() {
        let (mut rng, mut checker) = (Rng::new(5), Checker::default());
        let (mut whole, mut sound, mut features) = (0, 0, std::collections::BTreeSet::new());
        for i in 0..1500 {
            let bytes: Vec<u8> = (0..rng.between(1, 120)).map(|_| rng.next() as u8).collect();
            let forged = forge(&mut Choices::new(&bytes));
            let (data, base) = (forged.data.as_deref(), forged.base.as_deref());
            let files = Files { image: &forged.image, data, backing: base };
            let report = checker.check(&files);
            if forged.whole {
                assert!(
                    report.exit_code() == 0,
                    "image {i}, features {:#x}: {}",
                    forged.features,
                    report.explain()
                );
                let mut guest = vec![0; (report.virtual_size as usize).min(1 << 20)];
                checker.read_guest(&files, &mut guest).unwrap_or_else(|e| panic!("image {i}: {e}"));
                features.insert(forged.features);
                whole += 1;
            } else {
                sound += u32::from(report.exit_code() == 0);
            }
        }
        let kinds = features.len();
        assert!(whole > 200 && kinds > 100 && sound < 1000, "{whole} whole, {kinds} kinds, {sound} sound");
    }
}
