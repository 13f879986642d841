//! What refers to what: every table is walked once, and every cluster it names is counted.
//!
//! Invariants:
//! - an L2 table is scanned once however many L1 entries name it; what it names counts as often as it is named;
//! - a budget in proportion to the file bounds tables that overlap without sharing.
//!
//! ```text
//!   header ─► L1 ──┐
//!   snapshots ─► L1├─► L2 ─► data          references[cluster]
//!   bitmaps ─► tables ─► data        ───►
//!   refcount table ─► blocks               stored[cluster]
//! ```

use crate::bytes::{be16, be32, be64, byte, inside};
use crate::header::Header;
use crate::snapshots::{Snapshot, table_bytes};
use crate::{Files, Kind, Report};

pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const COMPRESSED: u64 = 1 << 62;
pub(crate) const ZERO: u64 = 1;
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const REFTABLE_RESERVED: u64 = 0x1ff;
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;
const MAX_L1_ENTRIES: u32 = (32 << 20) / 8;
const MAX_BITMAP_NAME: u16 = 1023;

/// A refcount whose block cannot be read.
pub(crate) const UNREADABLE: u64 = u64::MAX;

/// References and refcounts of every cluster.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// How often each cluster is named.
    pub(crate) references: Vec<u32>,
    /// The refcounts as they are stored, or [`UNREADABLE`].
    pub(crate) stored: Vec<u64>,
    /// The clusters that are compared: those of the file, and one more if it is named.
    pub(crate) compared: usize,
    /// The end of the last cluster that is named, wherever the file ends.
    pub(crate) end: u64,
    /// How often each aligned L2 table is named: by all L1 tables, and by the active one.
    named: Vec<(u32, u32)>,
    /// The L2 tables named, each once.
    tables: Vec<u64>,
    budget: u64,
}

/// What all steps of one walk need.
struct Walk<'a> {
    image: &'a [u8],
    header: &'a Header,
    report: &'a mut Report,
    limit: u32,
}

impl Tally {
    /// Counts the references of the whole image.
    pub(crate) fn count(
        &mut self,
        files: &Files<'_>,
        header: &Header,
        snapshots: &[Snapshot],
        report: &mut Report,
    ) {
        let image = files.image;
        let clusters = (image.len() as u64).div_ceil(header.cluster()) as usize;
        self.compared = clusters;
        self.end = 0;
        self.references.clear();
        self.references.resize(clusters + 2, 0);
        self.named.clear();
        self.named.resize(clusters + 2, (0, 0));
        self.tables.clear();
        self.budget = 4096 + 16 * image.len() as u64;
        self.stored(image, header);
        let limit =
            if header.refcount_order >= 5 { u32::MAX } else { (1 << (1 << header.refcount_order)) - 1 };
        let mut walk = Walk { image, header, report, limit };
        self.refer(&mut walk, 0, header.cluster(), 1);
        self.l1(&mut walk, header.l1_offset, header.l1_size, true);
        self.snapshots(&mut walk, snapshots);
        self.scan_named(&mut walk);
        self.refer(&mut walk, header.snapshots_offset, table_bytes(header, snapshots), 1);
        let reftable = u64::from(header.reftable_clusters) << header.cluster_bits;
        self.refer(&mut walk, header.reftable_offset, reftable, 1);
        self.bitmaps(&mut walk);
        self.refblocks(&mut walk);
    }

    /// Reads every refcount of the file, and of the two clusters behind it.
    fn stored(&mut self, image: &[u8], header: &Header) {
        let count = self.references.len();
        self.stored.clear();
        let entries_bits = header.cluster_bits + 3 - header.refcount_order;
        let table = u64::from(header.reftable_clusters) << (header.cluster_bits - 3);
        let mut index = 0;
        while self.stored.len() < count {
            let wanted = (count - self.stored.len()).min(1 << entries_bits);
            let entry = if index < table { be64(image, header.reftable_offset + 8 * index) } else { 0 };
            index += 1;
            let block = entry & !REFTABLE_RESERVED;
            if block == 0 {
                self.stored.resize(self.stored.len() + wanted, 0);
            } else if !readable(header, block) {
                self.stored.resize(self.stored.len() + wanted, UNREADABLE);
            } else {
                let block = inside(image, block, header.cluster());
                append_refcounts(block, header.refcount_order, wanted, &mut self.stored);
            }
        }
    }

    /// Counts `times` references to every cluster of a range.
    fn refer(&mut self, walk: &mut Walk<'_>, offset: u64, len: u64, times: u32) {
        if len == 0 {
            return;
        }
        let bits = walk.header.cluster_bits;
        let end = u128::from(offset) + u128::from(len);
        // offsets beyond the format's 56 bits are nowhere
        self.end = self.end.max((end.div_ceil(1 << bits) << bits).min(1 << 56) as u64);
        if end >= walk.image.len() as u128 + u128::from(walk.header.cluster()) {
            return walk.report.corrupt_times(times, Kind::BeyondEnd, offset, len);
        }
        let (first, last) = ((offset >> bits) as usize, ((offset + len - 1) >> bits) as usize);
        self.compared = self.compared.max(last + 1);
        self.budget = self.budget.saturating_sub((last - first) as u64);
        for count in &mut self.references[first..=last] {
            let sum = u64::from(*count) + u64::from(times);
            let over = sum.saturating_sub(walk.limit.into());
            if over > 0 {
                walk.report.corrupt_times(over.min(u32::MAX.into()) as u32, Kind::Overflow, offset, len);
            }
            *count = sum.min(walk.limit.into()) as u32;
        }
    }

    /// Takes `steps` from the budget; false when it is used up, which is told once.
    fn afford(&mut self, walk: &mut Walk<'_>, steps: u64) -> bool {
        if self.budget == 0 {
            return false;
        }
        self.budget = self.budget.saturating_sub(steps);
        if self.budget == 0 {
            walk.report.corrupt(Kind::Tangled, 0, 0);
        }
        self.budget > 0
    }

    /// One L1 table: counts the table itself and notes the L2 tables it names.
    fn l1(&mut self, walk: &mut Walk<'_>, offset: u64, size: u32, active: bool) {
        let bytes = u64::from(size) * 8;
        self.refer(walk, offset, bytes, 1);
        let table = inside(walk.image, offset, bytes);
        if !self.afford(walk, table.len() as u64 / 8) {
            return;
        }
        for (index, raw) in table.chunks_exact(8).enumerate() {
            let entry = number(raw);
            if entry != 0 {
                self.l1_entry(walk, index as u64, entry, active);
            }
        }
    }

    fn l1_entry(&mut self, walk: &mut Walk<'_>, index: u64, entry: u64, active: bool) {
        if entry & L1_RESERVED != 0 {
            walk.report.corrupt(Kind::L1Reserved, index, entry);
        }
        let table = entry & OFFSET;
        self.refer(walk, table, walk.header.cluster(), 1);
        if active && table != 0 {
            let stored = self.stored_at(walk, table);
            if stored != UNREADABLE && (stored == 1) != (entry & COPIED != 0) {
                walk.report.corrupt(Kind::CopiedL1, index, entry);
            }
        }
        if !walk.header.aligned(table) {
            walk.report.corrupt(Kind::L2Unaligned, index, entry);
            return self.l2(walk, table, 1, u32::from(active));
        }
        let Some(named) = self.named.get_mut((table >> walk.header.cluster_bits) as usize) else {
            return;
        };
        if *named == (0, 0) {
            self.tables.push(table);
        }
        named.0 = named.0.saturating_add(1);
        // A table at offset 0 is no table: the flags of its entries are nobody's.
        named.1 = named.1.saturating_add(u32::from(active && table != 0));
    }

    /// Scans the L2 tables that were noted.
    fn scan_named(&mut self, walk: &mut Walk<'_>) {
        let tables = std::mem::take(&mut self.tables);
        for &table in &tables {
            let (times, active) = self.named[(table >> walk.header.cluster_bits) as usize];
            self.l2(walk, table, times, active);
        }
        self.tables = tables;
    }

    /// One L2 table that is named `times` times, `active` times of them by the active L1 table.
    fn l2(&mut self, walk: &mut Walk<'_>, offset: u64, times: u32, active: u32) {
        let table = inside(walk.image, offset, walk.header.cluster());
        if !self.afford(walk, table.len() as u64 / 8) {
            return;
        }
        let width = if walk.header.extended_l2() { 16 } else { 8 };
        for (row, line) in table.chunks(64).enumerate() {
            if line.iter().fold(0, |all, b| all | b) == 0 {
                continue;
            }
            for (i, raw) in line.chunks_exact(width).enumerate() {
                let entry = number(raw);
                let bitmap = if width == 16 { number(&raw[8..]) } else { 0 };
                if entry | bitmap != 0 {
                    let at = offset + (row * 64 + i * width) as u64;
                    self.l2_entry(walk, at, entry, bitmap, (times, active));
                }
            }
        }
    }

    fn l2_entry(
        &mut self,
        walk: &mut Walk<'_>,
        at: u64,
        entry: u64,
        bitmap: u64,
        (times, active): (u32, u32),
    ) {
        if entry & COMPRESSED != 0 {
            return self.compressed(walk, at, entry, bitmap, times);
        }
        if entry & L2_RESERVED != 0 {
            walk.report.corrupt_times(times, Kind::L2Reserved, at, entry);
        }
        let header = walk.header;
        let offset = entry & OFFSET;
        let extended = header.extended_l2();
        if offset == 0 && !(header.has_data_file() && entry & COPIED != 0) {
            if extended && bitmap & 0xffff_ffff != 0 {
                walk.report.corrupt_times(times, Kind::SubclusterNone, at, bitmap);
            }
            return;
        }
        let stored = if header.has_data_file() { 1 } else { self.stored_at(walk, offset) };
        if active > 0 && stored != UNREADABLE && (stored == 1) != (entry & COPIED != 0) {
            walk.report.corrupt_times(active, Kind::CopiedL2, at, entry);
        }
        if extended && (bitmap >> 32) & bitmap & 0xffff_ffff != 0 {
            return walk.report.corrupt_times(times, Kind::SubclusterBoth, at, bitmap);
        }
        if !header.aligned(offset) {
            walk.report.corrupt_times(times, Kind::ClusterUnaligned, at, entry);
        }
        if !header.has_data_file() {
            self.refer(walk, offset, header.cluster(), times);
        }
    }

    fn compressed(&mut self, walk: &mut Walk<'_>, at: u64, entry: u64, bitmap: u64, times: u32) {
        if walk.header.has_data_file() {
            return walk.report.corrupt_times(times, Kind::CompressedData, at, entry);
        }
        if entry & COPIED != 0 {
            walk.report.corrupt_times(times, Kind::CompressedCopied, at, entry);
        }
        if bitmap != 0 {
            return walk.report.corrupt_times(times, Kind::CompressedBitmap, at, bitmap);
        }
        let (offset, len) = compressed_range(walk.header, entry);
        self.refer(walk, offset, len, times);
    }

    /// The stored refcount of the cluster that `offset` lies in.
    fn stored_at(&self, walk: &Walk<'_>, offset: u64) -> u64 {
        let header = walk.header;
        let cluster = offset >> header.cluster_bits;
        if let Some(stored) = self.stored.get(cluster as usize) {
            return *stored;
        }
        let entries_bits = header.cluster_bits + 3 - header.refcount_order;
        let index = cluster >> entries_bits;
        if index >= u64::from(header.reftable_clusters) << (header.cluster_bits - 3) {
            return 0;
        }
        let block = be64(walk.image, header.reftable_offset + 8 * index) & !REFTABLE_RESERVED;
        if block == 0 {
            return 0;
        }
        if !readable(header, block) {
            return UNREADABLE;
        }
        let block = inside(walk.image, block, header.cluster());
        refcount(block, header.refcount_order, cluster & ((1 << entries_bits) - 1))
    }

    fn snapshots(&mut self, walk: &mut Walk<'_>, snapshots: &[Snapshot]) {
        if walk.header.has_data_file() && !snapshots.is_empty() {
            walk.report.corrupt(Kind::SnapshotsData, 60, snapshots.len() as u64);
        }
        for snapshot in snapshots {
            if snapshot.l1_offset > i64::MAX as u64 {
                walk.report.refuse(Kind::SnapshotL1, snapshot.l1_offset, snapshot.l1_size.into());
            } else if !walk.header.aligned(snapshot.l1_offset) || snapshot.l1_size > MAX_L1_ENTRIES {
                walk.report.corrupt(Kind::SnapshotL1, snapshot.l1_offset, snapshot.l1_size.into());
            } else {
                self.l1(walk, snapshot.l1_offset, snapshot.l1_size, false);
            }
        }
    }

    fn bitmaps(&mut self, walk: &mut Walk<'_>) {
        let Some((count, directory, size)) = walk.header.bitmaps else {
            return;
        };
        self.refer(walk, directory, size, 1);
        let mut at = directory;
        for index in 0..count {
            let entry = Bitmap::read(walk.image, at);
            if at + entry.len > directory.saturating_add(size) || entry.extra != 0 {
                return walk.report.refuse(Kind::BitmapDirectory, at, index.into());
            }
            if !entry.is_valid(walk.header) {
                return walk.report.refuse(Kind::BitmapEntryInvalid, at, index.into());
            }
            at += entry.len;
            self.bitmap(walk, &entry);
        }
        if at != directory.saturating_add(size) {
            walk.report.refuse(Kind::BitmapDirectory, at, size);
        }
    }

    fn bitmap(&mut self, walk: &mut Walk<'_>, entry: &Bitmap) {
        let (offset, bytes) = (entry.table, u64::from(entry.entries) * 8);
        self.refer(walk, offset, bytes, 1);
        let table = inside(walk.image, offset, bytes);
        if !self.afford(walk, table.len() as u64 / 8) {
            return;
        }
        for (index, raw) in table.chunks_exact(8).enumerate() {
            let word = number(raw);
            let offset = word & OFFSET;
            let bad = word & BITMAP_RESERVED != 0
                || (offset != 0 && (word & 1 != 0 || !walk.header.aligned(offset)));
            // one that is up to date is loaded when the image is opened
            match bad {
                true if entry.flags & 1 == 0 => walk.report.refuse(Kind::BitmapEntry, index as u64, word),
                true => walk.report.corrupt(Kind::BitmapEntry, index as u64, word),
                false if offset != 0 => self.refer(walk, offset, walk.header.cluster(), 1),
                false => {}
            }
        }
    }

    /// The refcount blocks come last: each must have no other use.
    fn refblocks(&mut self, walk: &mut Walk<'_>) {
        let bytes = u64::from(walk.header.reftable_clusters) << walk.header.cluster_bits;
        let table = inside(walk.image, walk.header.reftable_offset, bytes);
        for (index, raw) in table.chunks_exact(8).enumerate() {
            let entry = number(raw);
            if entry == 0 {
                continue;
            }
            let (index, offset) = (index as u64, entry & !REFTABLE_RESERVED);
            let cluster = offset >> walk.header.cluster_bits;
            if entry & REFTABLE_RESERVED != 0 {
                walk.report.corrupt(Kind::ReftableReserved, index, entry);
            } else if !walk.header.aligned(offset) {
                walk.report.corrupt(Kind::RefblockUnaligned, index, entry);
            } else if cluster >= self.compared as u64 {
                walk.report.corrupt(Kind::RefblockOutside, index, entry);
            } else {
                self.refer(walk, offset, walk.header.cluster(), 1);
                let references = self.references[cluster as usize];
                if references != 1 {
                    walk.report.corrupt(Kind::RefblockShared, index, references.into());
                }
            }
        }
    }
}

/// An entry of the bitmap directory.
struct Bitmap {
    table: u64,
    entries: u32,
    flags: u32,
    kind: u8,
    granularity: u8,
    name: u16,
    extra: u32,
    len: u64,
}

impl Bitmap {
    fn read(image: &[u8], at: u64) -> Bitmap {
        let (name, extra) = (be16(image, at + 18), be32(image, at + 20));
        Bitmap {
            table: be64(image, at),
            entries: be32(image, at + 8),
            flags: be32(image, at + 12),
            kind: byte(image, at + 16),
            granularity: byte(image, at + 17),
            name,
            extra,
            len: (24 + u64::from(name) + u64::from(extra)).next_multiple_of(8),
        }
    }

    /// The constraints of the format, and the peer's limits.
    fn is_valid(&self, header: &Header) -> bool {
        let bytes = u64::from(self.entries) << header.cluster_bits;
        let covered = (u128::from(bytes) * 8) << self.granularity.min(63);
        self.table != 0
            && header.aligned(self.table)
            && self.entries != 0
            && self.entries <= 0x800_0000
            && bytes <= 0x2000_0000
            && self.flags & !7 == 0
            && self.kind == 1
            && (9..=31).contains(&self.granularity)
            && self.name != 0
            && self.name <= MAX_BITMAP_NAME
            && (self.flags & 1 != 0 || covered >= u128::from(header.virtual_size))
    }
}

/// The bytes that a compressed cluster may use: up to the end of its last 512-byte sector.
pub(crate) fn compressed_range(header: &Header, entry: u64) -> (u64, u64) {
    let shift = 62 - (header.cluster_bits - 8);
    let offset = entry & ((1 << shift) - 1);
    let sectors = ((entry & !(COPIED | COMPRESSED)) >> shift) + 1;
    (offset, sectors * 512 - (offset & 511))
}

/// Whether counters can be read there: a file may end before, but no file reaches beyond what a signed offset names.
fn readable(header: &Header, block: u64) -> bool {
    header.aligned(block) && block <= i64::MAX as u64
}

fn number(raw: &[u8]) -> u64 {
    raw.first_chunk().map_or(0, |b| u64::from_be_bytes(*b))
}

/// Refcount `index` of a block that may be cut short by the end of the file.
fn refcount(block: &[u8], order: u32, index: u64) -> u64 {
    match order {
        0..=2 => {
            let bit = index << order;
            let mask = (1u16 << (1 << order)) - 1;
            u64::from((u16::from(byte(block, bit / 8)) >> (bit % 8)) & mask)
        }
        3 => byte(block, index).into(),
        4 => be16(block, index * 2).into(),
        5 => be32(block, index * 4).into(),
        _ => be64(block, index * 8),
    }
}

fn append_refcounts(block: &[u8], order: u32, wanted: usize, out: &mut Vec<u64>) {
    let end = out.len() + wanted;
    if order == 4 {
        let fast = block.chunks_exact(2).take(wanted).map(|b| u64::from(u16::from_be_bytes([b[0], b[1]])));
        out.extend(fast);
    } else {
        out.extend((0..wanted as u64).map(|i| refcount(block, order, i)));
    }
    out.resize(end, 0);
}
