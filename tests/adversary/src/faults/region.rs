//! Which part of an image an offset belongs to: read from the image's own tables, as they are at two moments.
//!
//! ```text
//!   header ─► L1 table ─► L2 tables          refcount table ─► refcount blocks          everything else: data
//! ```

use std::collections::BTreeMap;

/// Part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Region {
    /// The first cluster.
    Header,
    /// The L1 table.
    L1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefTable,
    /// A refcount block.
    RefBlock,
    /// Guest data, and what no table names.
    Data,
    /// The external data file.
    DataFile,
    /// The backing file.
    Backing,
    /// All of the file: flushes, and changes of its length.
    Whole,
}

impl std::fmt::Display for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Region::Header => "header",
            Region::L1 => "L1",
            Region::L2 => "L2",
            Region::RefTable => "refcount table",
            Region::RefBlock => "refcount block",
            Region::Data => "data",
            Region::DataFile => "data file",
            Region::Backing => "backing",
            Region::Whole => "file",
        })
    }
}

/// The clusters of an image's own structures.
#[derive(Clone, Debug, Default)]
pub(super) struct Regions {
    bits: u32,
    clusters: BTreeMap<u64, Region>,
}

fn word(image: &[u8], at: u64) -> u64 {
    let at = at as usize;
    image.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

impl Regions {
    /// Adds what is where in an image, to what was there at another moment.
    pub(super) fn add(&mut self, image: &[u8]) {
        const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
        self.bits = (word(image, 16) as u32).clamp(9, 21);
        let (l1_at, l1_size) = (word(image, 40), word(image, 32) & 0xffff_ffff);
        let (table_at, table_clusters) = (word(image, 48), word(image, 56) >> 32);
        let l1_bytes = (l1_size * 8).min(image.len() as u64);
        let table_bytes = (table_clusters << self.bits).min(image.len() as u64);
        for (table, bytes, own, below) in [
            (l1_at, l1_bytes, Region::L1, Region::L2),
            (table_at, table_bytes, Region::RefTable, Region::RefBlock),
        ] {
            for at in (0..bytes).step_by(8) {
                self.name((table + at) >> self.bits, own);
                let to = word(image, table + at) & OFFSET;
                if to != 0 {
                    self.name(to >> self.bits, below);
                }
            }
        }
        self.clusters.insert(0, Region::Header);
    }

    fn name(&mut self, cluster: u64, region: Region) {
        self.clusters.entry(cluster).or_insert(region);
    }

    /// The part that an offset lies in.
    pub(super) fn of(&self, off: u64) -> Region {
        self.clusters.get(&(off >> self.bits)).copied().unwrap_or(Region::Data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the parts of a new image are told apart. Method: one with clusters of 512 bytes, and its tables.
    #[test]
    fn parts() {
        let mut image = vec![0; 8 * 512];
        let mut put = |at: usize, v: u64| image[at..at + 8].copy_from_slice(&v.to_be_bytes());
        put(16, 9);
        put(32, 4);
        put(40, 3 * 512);
        put(48, 512);
        put(56, 1 << 32);
        put(512, 2 * 512);
        put(3 * 512 + 8, (1 << 63) | (5 * 512));
        let mut r = Regions::default();
        r.add(&image);
        use Region::{Data, Header, L1, L2, RefBlock, RefTable};
        let found: Vec<Region> = (0..7).map(|c| r.of(c * 512 + 8)).collect();
        assert_eq!(found, [Header, RefTable, RefBlock, L1, Data, L2, Data]);
    }
}
