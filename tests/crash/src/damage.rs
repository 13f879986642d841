//! Damage of the kinds that a repair puts right: none of it changes what the guest or a snapshot reads, but for a lost
//! length, behind which everything reads as zeroes.
//!
//! ```text
//!   header ─► refcount table ─► blocks ─► counters        L1 ─► L2 ─► COPIED
//!     │ dirty      │ moved        │ missing, overlapping    │       │       └ wrong
//!     └ table      └ …            └ …   └ too high, too low  …      length of the file: lost
//! ```

use std::collections::BTreeSet;

use ringblock_checker::{Checker, Files, Header, Snapshot};
use ringblock_engine::host::sim::Rng;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// The last kind of damage.
const TABLE: u64 = 15;

/// Where things are in an image.
pub(crate) struct Layout {
    pub(crate) header: Header,
    pub(crate) snapshots: Vec<Snapshot>,
}

pub(crate) fn be64(image: &[u8], at: u64) -> u64 {
    image.get(at as usize..at as usize + 8).map_or(0, |b| b.try_into().map_or(0, u64::from_be_bytes))
}

pub(crate) fn put64(image: &mut [u8], at: u64, value: u64) {
    if let Some(place) = image.get_mut(at as usize..at as usize + 8) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

impl Layout {
    /// `None` for an image that cannot be opened.
    pub(crate) fn of(files: &Files<'_>) -> Option<Layout> {
        let header = Checker::header(files).ok()?;
        let snapshots = Checker::default().snapshots(files).map(<[_]>::to_vec).unwrap_or_default();
        Some(Layout { header, snapshots })
    }

    pub(crate) fn cluster(&self) -> u64 {
        self.header.cluster()
    }

    pub(crate) fn clusters(&self, image: &[u8]) -> u64 {
        (image.len() as u64).div_ceil(self.cluster())
    }

    /// Offsets of the entries of the refcount table that name a block.
    pub(crate) fn table_entries(&self, image: &[u8]) -> Vec<u64> {
        let count = (u64::from(self.header.reftable_clusters) << self.header.cluster_bits) / 8;
        let at = |i: u64| self.header.reftable_offset + 8 * i;
        (0..count).map(at).filter(|&at| be64(image, at) != 0).collect()
    }

    /// Offsets of the L1 entries that name a table: the active ones, or those of all snapshots.
    pub(crate) fn l1_entries(&self, image: &[u8], active: bool) -> Vec<u64> {
        let tables: Vec<(u64, u32)> = match active {
            true => vec![(self.header.l1_offset, self.header.l1_size)],
            false => self.snapshots.iter().map(|s| (s.l1_offset, s.l1_size)).collect(),
        };
        let entries = tables.iter().flat_map(|&(at, size)| (0..u64::from(size)).map(move |i| at + 8 * i));
        entries.filter(|&at| be64(image, at) & OFFSET != 0).collect()
    }

    /// Offsets of the L2 entries of a table that are not zero.
    pub(crate) fn l2_entries(&self, image: &[u8], l1_entry: u64) -> Vec<u64> {
        let table = be64(image, l1_entry) & OFFSET;
        let step = if self.header.extended_l2() { 16 } else { 8 };
        let at = (0..self.cluster() / step).map(|i| table + i * step);
        at.filter(|&at| be64(image, at) != 0).collect()
    }

    /// Bits of a refcount, and counters of a block.
    fn counters(&self) -> (u32, u64) {
        (1 << self.header.refcount_order, (self.cluster() * 8) >> self.header.refcount_order)
    }

    /// The counter of a cluster, if it has one.
    pub(crate) fn refcount(&self, image: &[u8], cluster: u64) -> Option<u64> {
        let (bits, per) = self.counters();
        let block = self.block(image, cluster / per)?;
        let bit = (cluster % per) * u64::from(bits);
        let at = (block + bit / 8) as usize;
        match bits {
            64 => Some(be64(image, at as u64)),
            8.. => {
                let bytes = image.get(at..at + bits as usize / 8)?;
                Some(bytes.iter().fold(0, |n, &b| (n << 8) | u64::from(b)))
            }
            _ => Some(u64::from(image.get(at)? >> (bit % 8)) & ((1 << bits) - 1)),
        }
    }

    /// Changes the counter of a cluster, if it has one.
    pub(crate) fn set_refcount(&self, image: &mut [u8], cluster: u64, value: u64) {
        let (bits, per) = self.counters();
        let Some(block) = self.block(image, cluster / per) else { return };
        let bit = (cluster % per) * u64::from(bits);
        let at = (block + bit / 8) as usize;
        if bits >= 8 {
            let n = bits as usize / 8;
            if let Some(place) = image.get_mut(at..at + n) {
                place.copy_from_slice(&value.to_be_bytes()[8 - n..]);
            }
        } else if let Some(byte) = image.get_mut(at) {
            let mask = ((1u16 << bits) - 1) as u8;
            *byte = (*byte & !(mask << (bit % 8))) | ((value as u8 & mask) << (bit % 8));
        }
    }

    fn block(&self, image: &[u8], index: u64) -> Option<u64> {
        let count = (u64::from(self.header.reftable_clusters) << self.header.cluster_bits) / 8;
        let entry = be64(image, self.header.reftable_offset + 8 * index.min(count));
        let good = index < count && entry != 0 && entry.is_multiple_of(self.cluster());
        (good && entry < image.len() as u64).then_some(entry)
    }

    /// The largest value of a counter that is used here.
    fn most(&self) -> u64 {
        match self.header.refcount_order {
            0..=3 => (1 << (1 << self.header.refcount_order)) - 1,
            _ => 9,
        }
    }

    /// The end of the last table that the guest's data or a snapshot hangs on.
    fn tables_end(&self, image: &[u8]) -> u64 {
        let (h, cluster) = (&self.header, self.cluster());
        let mut ends = BTreeSet::from([cluster, h.l1_offset + u64::from(h.l1_size) * 8]);
        ends.extend(self.snapshots.iter().map(|s| s.l1_offset + u64::from(s.l1_size) * 8));
        if !self.snapshots.is_empty() {
            // the table's length is not stored; it fits into a few clusters here
            ends.insert(h.snapshots_offset + (self.snapshots.len() as u64 * 200).next_multiple_of(cluster));
        }
        let all = self.l1_entries(image, true).into_iter().chain(self.l1_entries(image, false));
        ends.extend(all.map(|at| (be64(image, at) & OFFSET) + cluster));
        if let Some((_, at, len)) = h.bitmaps {
            // bitmap tables and their data lie anywhere
            ends.insert((at + len).max(image.len() as u64));
        }
        ends.last().copied().unwrap_or(0).next_multiple_of(cluster)
    }

    /// Some things are damaged. In words, what. Counters first and the refcount table last: what is reached through a table
    /// that is damaged already could be anything.
    pub(crate) fn hurt(&self, image: &mut Vec<u8>, count: u64, rng: &mut Rng) -> String {
        let mut kinds: Vec<u64> = (0..count).map(|_| rng.below(16)).collect();
        kinds.sort_unstable();
        kinds.dedup_by(|a, b| (*a, *b) == (TABLE, TABLE));
        let mut one = |kind| match kind {
            0..=2 => self.leak(image, rng),
            3..=5 => self.too_low(image, rng),
            6..=8 => self.copied(image, rng),
            9 | 10 => self.dirty(image),
            11 | 12 => self.short(image, rng),
            TABLE => self.table(image, rng),
            _ => self.block_entry(image, rng),
        };
        let said: Vec<String> = kinds.into_iter().map(&mut one).collect();
        said.join(", ")
    }

    /// Some field of some table has another value, whatever it does to the guest.
    pub(crate) fn mutate(&self, image: &mut [u8], rng: &mut Rng) -> String {
        let (h, end) = (&self.header, self.clusters(image));
        let l1 = self.l1_entries(image, rng.chance(700));
        let blocks = self.table_entries(image);
        let word = |rng: &mut Rng, at: u64, len: u64| at + rng.below(len.max(8) / 8) * 8;
        let at = match rng.below(12) {
            0 => word(rng, 0, 112),
            1 => word(rng, 104, 408),
            2 => word(rng, h.reftable_offset, 64),
            3 | 4 if !blocks.is_empty() => {
                let block = be64(image, rng.pick(&blocks));
                word(rng, block, ((end * self.cluster() * 8) >> h.cluster_bits).min(self.cluster()))
            }
            5 | 6 if !l1.is_empty() => rng.pick(&l1),
            7 => word(rng, h.l1_offset, u64::from(h.l1_size) * 8),
            8 if h.snapshot_count > 0 => word(rng, h.snapshots_offset, 128),
            9 if h.bitmaps.is_some() => word(rng, h.bitmaps.map_or(0, |b| b.1), 64),
            _ if !l1.is_empty() => {
                let table = rng.pick(&l1);
                let entries = self.l2_entries(image, table);
                if entries.is_empty() || rng.chance(200) {
                    word(rng, be64(image, table) & OFFSET, self.cluster())
                } else {
                    rng.pick(&entries)
                }
            }
            _ => word(rng, 24, 48),
        };
        let have = be64(image, at);
        let somewhere = rng.below(end + 4) * self.cluster();
        let value = match rng.below(12) {
            0..=2 => have ^ (1 << rng.below(64)),
            3 => 0,
            4 => somewhere,
            5 | 6 => somewhere | COPIED,
            7 => have ^ COPIED,
            8 => have.wrapping_add(self.cluster()),
            9 => have | rng.pick(&[1, 2, 0x100, 0x200, COMPRESSED, u64::MAX]),
            10 => have.wrapping_add(rng.pick(&[1, 1 << 32, u64::MAX])),
            _ => rng.below(1 << 16) << rng.pick(&[0, 16, 32, 48]),
        };
        put64(image, at, value);
        format!("{at:#x}: {value:#x} instead of {have:#x}")
    }

    fn leak(&self, image: &mut Vec<u8>, rng: &mut Rng) -> String {
        if rng.chance(200) {
            let more = rng.between(1, 5) * self.cluster();
            image.resize(image.len() + more as usize, 0xa5);
        }
        let cluster = rng.below(self.clusters(image));
        let have = self.refcount(image, cluster).unwrap_or(0);
        let value = (have + rng.between(1, 3)).min(self.most());
        self.set_refcount(image, cluster, value);
        format!("cluster {cluster}: refcount {value} instead of {have}")
    }

    fn too_low(&self, image: &mut [u8], rng: &mut Rng) -> String {
        let used: Vec<u64> =
            (0..self.clusters(image)).filter(|&c| self.refcount(image, c).is_some_and(|n| n > 0)).collect();
        if used.is_empty() {
            return "nothing".into();
        }
        let cluster = rng.pick(&used);
        let have = self.refcount(image, cluster).unwrap_or(0);
        let value = rng.below(have);
        self.set_refcount(image, cluster, value);
        format!("cluster {cluster}: refcount {value} instead of {have}")
    }

    fn block_entry(&self, image: &mut [u8], rng: &mut Rng) -> String {
        let entries = self.table_entries(image);
        if entries.is_empty() {
            return "nothing".into();
        }
        let at = rng.pick(&entries);
        let have = be64(image, at);
        let end = self.clusters(image);
        let value = match rng.below(6) {
            0 | 1 => 0,
            2 | 3 => rng.below(end) * self.cluster(),
            4 => (end + rng.below(4)) * self.cluster(),
            _ => have | (1 << rng.below(u64::from(self.header.cluster_bits))),
        };
        put64(image, at, value);
        format!("refcount table at {at:#x}: {value:#x} instead of {have:#x}")
    }

    fn table(&self, image: &mut [u8], rng: &mut Rng) -> String {
        let end = self.clusters(image);
        if rng.chance(400) {
            let size = rng.between(1, 4) as u32;
            image[56..60].copy_from_slice(&size.to_be_bytes());
            return format!("a refcount table of {size} clusters");
        }
        let at = rng.below(end + 2) * self.cluster();
        put64(image, 48, at);
        format!("the refcount table at {at:#x}")
    }

    fn copied(&self, image: &mut [u8], rng: &mut Rng) -> String {
        let l1 = self.l1_entries(image, true);
        if l1.is_empty() {
            return "nothing".into();
        }
        let mut at = rng.pick(&l1);
        let l2: Vec<u64> =
            self.l2_entries(image, at).into_iter().filter(|&at| be64(image, at) & OFFSET != 0).collect();
        if !l2.is_empty() && rng.chance(700) {
            at = rng.pick(&l2);
        }
        let have = be64(image, at);
        if have & COMPRESSED != 0 {
            return "nothing".into();
        }
        put64(image, at, have ^ COPIED);
        format!("entry at {at:#x}: {:#x} instead of {have:#x}", have ^ COPIED)
    }

    fn dirty(&self, image: &mut [u8]) -> String {
        if self.header.version < 3 {
            return "nothing".into();
        }
        image[79] |= 1;
        "dirty".into()
    }

    fn short(&self, image: &mut Vec<u8>, rng: &mut Rng) -> String {
        let (least, have) = (self.tables_end(image), image.len() as u64);
        if least >= have {
            return "nothing".into();
        }
        let unit = rng.pick(&[512, self.cluster()]);
        let len = (least + rng.below(have - least)).next_multiple_of(unit).min(have);
        image.truncate(len as usize);
        format!("{len} bytes long instead of {have}")
    }
}
