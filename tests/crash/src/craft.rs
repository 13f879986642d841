//! Images as older runs, crashes and other writers leave them, made from an image that our own engine wrote.
//!
//! ```text
//!   written image ─┬ snapshot    tables and clusters shared with an internal snapshot
//!                  ├ worn        all that the refcount table can count has leaked: it has to grow soon
//!                  ├ bitmap      a persistent bitmap that claims to know every change
//!                  ├ foreign     an autoclear bit that we do not know
//!                  └ undercounted, uncounted, cut off: dirty, with wrong counters, a missing block, a lost length
//! ```
//!
//! Only what these need of the format is spelled out here: counters of whole bytes, one block where not said otherwise.

use ringblock_checker::{Checker, Files, Header};

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const DIRTY: u8 = 1;

/// An image in the making.
pub(crate) struct Craft {
    bytes: Vec<u8>,
    header: Header,
}

impl Craft {
    /// From the bytes of a sound image.
    pub(crate) fn new(bytes: Vec<u8>) -> Craft {
        let header = Checker::header(&Files::new(&bytes)).expect("a sound image");
        assert!(header.refcount_order >= 3, "counters of whole bytes");
        Craft { bytes, header }
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn cluster(&self) -> u64 {
        self.header.cluster()
    }

    fn clusters(&self) -> u64 {
        (self.bytes.len() as u64).div_ceil(self.cluster())
    }

    fn get(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.bytes[at as usize..at as usize + 8]);
        u64::from_be_bytes(word)
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// Bytes of a counter, and counters in a block.
    fn counters(&self) -> (u64, u64) {
        let width = 1 << (self.header.refcount_order - 3);
        (width, self.cluster() / width)
    }

    /// Where the counter of a cluster is.
    fn counter(&self, cluster: u64) -> u64 {
        let (width, per) = self.counters();
        let block = self.get(self.header.reftable_offset + 8 * (cluster / per));
        assert!(block != 0, "cluster {cluster} has a block");
        block + cluster % per * width
    }

    fn count(&self, cluster: u64) -> u64 {
        let (at, (width, _)) = (self.counter(cluster), self.counters());
        self.bytes[at as usize..(at + width) as usize].iter().fold(0, |n, &b| n << 8 | u64::from(b))
    }

    fn set_count(&mut self, cluster: u64, n: u64) {
        let (at, (width, _)) = (self.counter(cluster), self.counters());
        self.put(at, &n.to_be_bytes()[8 - width as usize..]);
    }

    /// New clusters at the end: the offset of the first.
    fn append(&mut self, bytes: u64) -> u64 {
        let (first, cluster) = (self.clusters(), self.cluster());
        let end = first + bytes.div_ceil(cluster);
        self.bytes.resize((end * cluster) as usize, 0);
        (first..end).for_each(|c| self.set_count(c, 1));
        first * cluster
    }

    /// An internal snapshot of the disk as it is: everything is shared, nothing may be written in place.
    pub(crate) fn snapshot(mut self) -> Craft {
        let (l1, entries) = (self.header.l1_offset, u64::from(self.header.l1_size));
        let copy = self.append(entries * 8);
        for i in 0..entries {
            let entry = self.get(l1 + 8 * i) & !COPIED;
            self.put(l1 + 8 * i, &entry.to_be_bytes());
            self.put(copy + 8 * i, &entry.to_be_bytes());
            if entry != 0 {
                self.share_table(entry & OFFSET);
            }
        }
        let table = self.append(128);
        let mut entry = Vec::new();
        entry.extend(copy.to_be_bytes());
        entry.extend((entries as u32).to_be_bytes());
        // an ID and a name of one byte, no date, no state of a machine, the two usual fields of extra data
        entry.extend([0, 1, 0, 1]);
        entry.extend([0; 16 + 4]);
        entry.extend(16u32.to_be_bytes());
        entry.extend(0u64.to_be_bytes());
        entry.extend(self.header.virtual_size.to_be_bytes());
        entry.extend(b"1s");
        self.put(table, &entry);
        self.put(60, &1u32.to_be_bytes());
        self.put(64, &table.to_be_bytes());
        self
    }

    /// One more reference to a table, and to all that it names.
    fn share_table(&mut self, table: u64) {
        let cluster = self.cluster();
        self.set_count(table / cluster, self.count(table / cluster) + 1);
        for at in (table..table + cluster).step_by(if self.header.extended_l2() { 16 } else { 8 }) {
            let entry = self.get(at);
            assert!(entry & COMPRESSED == 0, "nothing is compressed yet");
            if entry & OFFSET != 0 {
                self.put(at, &(entry & !COPIED).to_be_bytes());
                let data = (entry & OFFSET) / cluster;
                self.set_count(data, self.count(data) + 1);
            }
        }
    }

    /// Whatever the refcount table can count has leaked, except for the last `free` clusters. What nobody may see is in all
    /// of them.
    pub(crate) fn worn(mut self, free: u64) -> Craft {
        let (_, per) = self.counters();
        let cluster = self.cluster();
        let blocks = u64::from(self.header.reftable_clusters) * cluster / 8;
        self.bytes.resize((blocks * per * cluster) as usize, 0xba);
        for i in 0..blocks {
            if self.get(self.header.reftable_offset + 8 * i) == 0 {
                let block = i * per * cluster;
                self.put(self.header.reftable_offset + 8 * i, &block.to_be_bytes());
                self.bytes[block as usize..(block + cluster) as usize].fill(0);
            }
        }
        for c in (0..blocks * per - free).rev() {
            if self.count(c) == 0 {
                self.set_count(c, 1);
            }
        }
        self
    }

    /// The next free clusters stand alone, `holes` of them, and hold what nobody may see: inside the file, between leaked
    /// clusters; or (`behind`) behind its end, where nothing is yet.
    pub(crate) fn holes(mut self, holes: u64, behind: bool) -> Craft {
        let (_, per) = self.counters();
        let (cluster, first) = (self.cluster(), self.clusters());
        let end = (first + 2 * holes).next_multiple_of(per);
        let old = self.bytes.len();
        self.bytes.resize((end * cluster) as usize, if behind { 0 } else { 0xba });
        let mut last = first;
        for block in first / per..end / per {
            if self.get(self.header.reftable_offset + 8 * block) == 0 {
                let at = block * per * cluster;
                self.put(self.header.reftable_offset + 8 * block, &at.to_be_bytes());
                self.bytes[at as usize..(at + cluster) as usize].fill(0);
                self.set_count(block * per, 1);
                last = block * per + 1;
            }
        }
        for c in first..end {
            let hole = c % 2 == 1 && c < first + 2 * holes && self.count(c) == 0;
            self.set_count(c, u64::from(!hole));
        }
        if behind {
            self.bytes.truncate((last * cluster).max(old as u64) as usize);
        }
        self
    }

    /// A persistent bitmap, valid and empty: it claims that nothing has changed since it was made.
    pub(crate) fn bitmap(mut self) -> Craft {
        let table = self.append(8);
        let directory = self.append(32);
        let mut entry = Vec::new();
        entry.extend(table.to_be_bytes());
        entry.extend(1u32.to_be_bytes());
        // no flags; a dirty bitmap of granularity 2^16 with a name of one byte
        entry.extend([0, 0, 0, 0, 1, 16, 0, 1, 0, 0, 0, 0, b'b']);
        self.put(directory, &entry);
        let mut extension = Vec::new();
        extension.extend(0x2385_2875u32.to_be_bytes());
        extension.extend(24u32.to_be_bytes());
        extension.extend(1u32.to_be_bytes());
        extension.extend(0u32.to_be_bytes());
        extension.extend(32u64.to_be_bytes());
        extension.extend(directory.to_be_bytes());
        extension.extend([0; 8]);
        // in front of everything else that the header is extended by
        let mut header_length = [0; 4];
        header_length.copy_from_slice(&self.bytes[100..104]);
        self.put(u64::from(u32::from_be_bytes(header_length)), &extension);
        self.bytes[95] |= 1;
        self
    }

    /// An autoclear bit of a feature that we do not know: whoever keeps it may believe that nothing was written since.
    pub(crate) fn foreign(mut self) -> Craft {
        self.bytes[88] |= 0x40;
        self
    }

    /// Dirty, and half of the counters are 0.
    pub(crate) fn undercounted(mut self) -> Craft {
        self.bytes[79] |= DIRTY;
        let clusters = self.clusters();
        (clusters / 2..clusters).for_each(|c| self.set_count(c, 0));
        self
    }

    /// Dirty, and what is shared counts once. (A counter of 0 would be repaired in another way.)
    pub(crate) fn miscounted(mut self) -> Craft {
        self.bytes[79] |= DIRTY;
        for c in 0..self.clusters() {
            self.set_count(c, self.count(c).min(1));
        }
        self
    }

    /// Dirty, and no counters at all.
    pub(crate) fn uncounted(mut self) -> Craft {
        self.bytes[79] |= DIRTY;
        let (from, bytes) = (self.header.reftable_offset, u64::from(self.header.reftable_clusters));
        let end = from + bytes * self.cluster();
        self.bytes[from as usize..end as usize].fill(0);
        self
    }

    /// The last clusters of the file are lost.
    pub(crate) fn cut_off(mut self, clusters: u64) -> Craft {
        let len = (self.clusters() - clusters) * self.cluster();
        self.bytes.truncate(len as usize);
        self
    }
}

#[cfg(test)]
mod tests {
    use crate::cases::{Case, Past, named};

    /// Goal: what is made here is what it says it is. Method: the independent checker on each.
    #[test]
    fn pasts_are_sound_or_wrong_as_said() {
        use ringblock_checker::{Checker, Files};
        let made = |past| {
            let case: Case = named("512-16").expect("the case").past(past);
            let (setup, roles, _) = case.start(1, 1);
            setup.files[&roles.image].to_bytes()
        };
        let mut checker = Checker::default();
        for past in [Past::Written, Past::Snapshot, Past::Bitmap, Past::Foreign] {
            let report = checker.check(&Files::new(&made(past))).clone();
            assert!(report.is_sound() && report.leaks == 0, "{past:?}: {}", report.explain());
        }
        let bytes = made(Past::Snapshot);
        assert_eq!(checker.snapshots(&Files::new(&bytes)).map(<[_]>::len), Ok(1));
        let mut then = vec![0; 40 << 10];
        let mut now = vec![0; 40 << 10];
        checker.read_snapshot(&Files::new(&bytes), 0, &mut then).unwrap();
        checker.read_guest(&Files::new(&bytes), &mut now).unwrap();
        assert!(then == now && now.iter().any(|&b| b != 0));
        for past in [Past::Undercounted, Past::Miscounted, Past::Uncounted, Past::CutOff] {
            let report = checker.check(&Files::new(&made(past))).clone();
            assert!(report.dirty && !report.refused && report.corruptions > 0, "{past:?}");
        }
    }
}
