//! Checking an image: every reference is counted and compared with the refcounts; repair makes them agree.
//!
//! Works on the file alone, without the caches of an open image, so that it can look at images too damaged to be opened
//! for writing. Nobody else may use the image meanwhile.
//!
//! Invariants: work and memory are bounded by the length of the file, whatever the header claims; a repair changes no
//! guest data; a rebuilt refcount structure lies behind everything referenced and behind the file's end, is durable
//! before the header names it, and a crash on the way leaves the old one in force.
//!
//! ```text
//! header ─► L1 ─► L2 ─► clusters ┐
//! snapshots ─► L1 ─► L2 ─► …     ├─► references[cluster]  ◄─ compare ─►  refcounts[cluster]
//! refcount table, blocks, bitmaps┘        │ too low: corruption      │ too high: leak
//! ```

use std::collections::{BTreeMap, HashMap, HashSet};

use ringblock_engine::mem::Buf;
use ringblock_engine::units::HostOffset;
use ringblock_engine::{Errno, Error};

use super::entry::{
    Allocation, BadEntry, COPIED, EntryFormat, L1_RESERVED, L2_RESERVED, L2Entry, OFFSET_MASK,
    REFTABLE_RESERVED, RawEntry,
};
use super::geometry::{Geometry, HostCluster, MAX_L1_BYTES};
use super::header::Header;
use super::io::Store;
use super::open::{read_geometry, read_snapshots, read_table};
use super::refcount;
use super::snapshot_table::{self, Snapshot};
use super::{bitmaps, repair};

/// What a check may change.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Repair {
    /// Nothing.
    #[default]
    None,
    /// Refcounts that are too high.
    Leaks,
    /// Everything that can be put right.
    All,
}

/// The result of a check: the numbers of `qemu-img check`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CheckReport {
    /// Clusters with a refcount that is too high.
    pub leaks: u64,
    /// Everything else that is wrong.
    pub corruptions: u64,
    /// Of these, entries of the snapshot table without what version 3 wants: they harm nothing, and stay.
    pub incomplete_snapshots: u64,
    /// Things that could not be looked at.
    pub check_errors: u64,
    /// Leaks put right.
    pub leaks_fixed: u64,
    /// Corruptions put right.
    pub corruptions_fixed: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Of these, allocated.
    pub allocated_clusters: u64,
    /// Of these, not following their neighbour in the file.
    pub fragmented_clusters: u64,
    /// Of these, compressed.
    pub compressed_clusters: u64,
    /// End of the last cluster in use, bytes.
    pub image_end_offset: u64,
    /// References without any refcount were found: only a full repair, which was not asked for, would help.
    pub needs_rebuild: bool,
    /// One line for each finding, in the words of `qemu-img`; at most [`MESSAGES_MAX`].
    pub messages: Vec<String>,
}

/// A refcount that cannot be looked at.
const UNREADABLE: u64 = u64::MAX;

/// Findings beyond this number are counted but not described.
pub const MESSAGES_MAX: usize = 10_000;

impl CheckReport {
    /// Describes a finding, if there is room.
    fn say(&mut self, text: impl FnOnce() -> String) {
        if self.messages.len() < MESSAGES_MAX {
            self.messages.push(text());
        }
    }

    fn corrupt(&mut self, text: impl FnOnce() -> String) {
        self.corrupt_times(1, text);
    }

    /// One finding that counts as often as what it is in is referenced.
    fn corrupt_times(&mut self, times: u32, text: impl FnOnce() -> String) {
        self.corruptions += u64::from(times);
        self.say(|| format!("ERROR {}", text()));
    }

    /// Whether nothing is wrong any more.
    pub fn is_clean(&self) -> bool {
        self.leaks == 0 && self.corruptions == 0 && self.check_errors == 0
    }
}

/// References by cluster. Clusters behind the end of the file are not counted.
pub(super) struct References(pub(super) Vec<u32>);

/// A check on its way.
pub(super) struct Check<'a> {
    pub(super) file: &'a dyn Store,
    pub(super) header: Header,
    pub(super) g: Geometry,
    pub(super) format: EntryFormat,
    pub(super) file_size: u64,
    pub(super) refs: References,
    pub(super) report: CheckReport,
    pub(super) l1: Vec<u64>,
    pub(super) reftable: Vec<u64>,
    /// Where its entries point to, whatever is wrong with them: refcounts are read from there.
    pub(super) named: Vec<u64>,
    /// The refcounts as they are stored.
    pub(super) stored: Vec<u64>,
    /// A cluster in use has no refcount at all, or the refcount structure itself is damaged: it has to be built anew.
    pub(super) missing: bool,
    /// First cluster behind everything referenced below `reach`.
    pub(super) highest: u64,
    /// No writer in its senses appends further than this before it flushes, in clusters.
    reach: u64,
    /// A table could not be read: what only it uses looks like leaks.
    unknown: bool,
    /// Something but refcount structures, which a rebuild gives up, lies in the header or in the L1 table.
    tangled: bool,
}

/// Checks an image, and repairs it where asked; after a repair it is checked again and the rest is reported.
pub(super) async fn run(file: &dyn Store, fix: Repair) -> Result<CheckReport, Error> {
    let mut first = Check::walk(file).await?;
    if fix == Repair::None {
        first.compare_copied().await?;
        return Ok(first.report);
    }
    let refuse = match () {
        () if first.unknown => Some("a table could not be read"),
        () if first.tangled => Some("something lies in the header or in the L1 table"),
        () => None,
    };
    if let Some(why) = refuse {
        first.report.check_errors += 1;
        first.report.say(|| format!("ERROR {why}: nothing is repaired"));
        return Ok(first.report);
    }
    if fix == Repair::Leaks && first.missing {
        first.report.say(|| "ERROR need to rebuild refcount structures".to_owned());
        first.report.needs_rebuild = true;
        return Ok(first.report);
    }
    let before = first.header.incompatible;
    let (leaks, corruptions) = (first.report.leaks, first.report.corruptions);
    let mut messages = std::mem::take(&mut first.report.messages);
    if fix == Repair::All && repair::lengthen(&first, &mut messages).await? {
        first = Check::walk(file).await?;
    }
    let flags = repair::run(&mut first, fix, &mut messages).await?;
    // its counters make room for the next ones
    drop(first);
    let mut second = Check::walk(file).await?;
    second.compare_copied().await?;
    let mut again = second.report;
    let sound = again.corruptions == again.incomplete_snapshots && again.check_errors == 0;
    repair::finish(file, second.header, before, fix, sound).await?;
    again.leaks_fixed = leaks.saturating_sub(again.leaks);
    again.corruptions_fixed = (corruptions + flags).saturating_sub(again.corruptions);
    messages.append(&mut again.messages);
    again.messages = messages;
    Ok(again)
}

impl<'a> Check<'a> {
    /// Counts all references and compares them with the refcounts.
    async fn walk(file: &'a dyn Store) -> Result<Check<'a>, Error> {
        let (header, g) = read_geometry(file).await?;
        let file_size = file.size()?;
        let l1 = read_table(file, header.l1_offset, u64::from(header.l1_size) * 8, "Could not read L1 table")
            .await?;
        let reftable_bytes = u64::from(header.reftable_clusters) << g.cluster_bits;
        let reftable =
            read_table(file, header.reftable_offset, reftable_bytes, "Could not read refcount table").await?;
        let clusters = countable(g.clusters_for(file_size), file.used()?)?;
        let mut check = Check {
            file,
            format: EntryFormat::of(&header, g),
            header,
            g,
            file_size,
            refs: References(vec![0; clusters]),
            report: CheckReport { total_clusters: 0, ..Default::default() },
            l1,
            named: reftable.iter().map(|entry| entry & !REFTABLE_RESERVED).collect(),
            reftable,
            stored: Vec::new(),
            missing: false,
            highest: 0,
            reach: 0,
            unknown: false,
            tangled: false,
        };
        check.report.total_clusters = g.clusters_for(check.header.size);
        check.reach = clusters as u64 + repair::longer_max(&g, check.header.size);
        check.count_all().await?;
        check.compare().await?;
        Ok(check)
    }

    async fn count_all(&mut self) -> Result<(), Error> {
        let h = self.header.clone();
        self.count(0, self.g.cluster_size());
        let mut tables = Tables::new();
        let l1 = std::mem::take(&mut self.l1);
        self.count_l1(h.l1_offset, &l1, Times { all: 1, active: 1 }, &mut tables);
        self.l1 = l1;
        let snapshots = read_snapshots(self.file, &h).await?;
        self.count_snapshots(&snapshots, &mut tables).await?;
        for (at, times) in tables {
            let words = self.read_l2(HostOffset(at)).await?;
            self.count_l2(&words, times);
        }
        let table_bytes: u64 = snapshots.iter().map(|s| s.stored_len() as u64).sum();
        self.count(h.snapshots_offset.0, table_bytes);
        if let Some((at, len)) = h.extensions.crypto {
            self.count(at.0, len);
        }
        self.count_bitmaps().await?;
        self.tangled = self.shares_core();
        self.count(h.reftable_offset.0, u64::from(h.reftable_clusters) << self.g.cluster_bits);
        self.count_refblocks();
        Ok(())
    }

    /// Counts the L1 tables of snapshots and gathers what they name. A table that several share is read once; tables that
    /// do not lie over each other fit the file, so more than that is not read.
    async fn count_snapshots(&mut self, snapshots: &[Snapshot], tables: &mut Tables) -> Result<(), Error> {
        let mut l1s = BTreeMap::new();
        for (i, s) in snapshots.iter().enumerate() {
            if self.header.version >= 3 && s.extra.len() < snapshot_table::EXTRA_V3 {
                self.report.corrupt(|| format!("snapshot table entry {i} is incomplete"));
                self.report.incomplete_snapshots += 1;
            }
            if s.l1_offset.0 > i64::MAX as u64 {
                let text = format!("snapshot table entry {i}: no file reaches its L1 table");
                return Err(Error::io(Errno::EIO, text));
            }
            match s.check_l1(&self.g) {
                Ok(()) => *l1s.entry((s.l1_offset.0, s.l1_size)).or_insert(0) += 1,
                Err(e) => {
                    self.report.corrupt(|| format!("snapshot {} ({}): {e}", text(&s.id), text(&s.name)));
                    self.unknown = true;
                }
            }
        }
        let mut left = self.file_size.saturating_add(MAX_L1_BYTES);
        for ((at, size), times) in l1s {
            let Some(rest) = left.checked_sub(u64::from(size) * 8) else {
                self.report.corrupt(|| "the L1 tables of snapshots overlap each other".to_owned());
                self.unknown = true;
                break;
            };
            left = rest;
            let at = HostOffset(at);
            let table = read_table(self.file, at, u64::from(size) * 8, "Could not read snapshot L1").await?;
            self.count_l1(at, &table, Times { all: times, active: 0 }, tables);
        }
        Ok(())
    }

    /// Whether something counted so far shares the clusters of the header or of the L1 table: repairing one would damage the other.
    fn shares_core(&self) -> bool {
        let bits = self.g.cluster_bits;
        let l1 = self.header.l1_offset.0 >> bits;
        let clusters = self.g.clusters_for(self.l1.len() as u64 * 8);
        let shared = |c: u64| self.refs.0.get(c as usize).is_some_and(|&n| n > 1);
        shared(0) || (l1..l1.saturating_add(clusters)).any(shared)
    }

    /// Adds one reference to each cluster of a byte range.
    fn count(&mut self, at: u64, len: u64) {
        self.count_times(at, len, 1);
    }

    /// Adds some references to each cluster of a byte range.
    fn count_times(&mut self, at: u64, len: u64, times: u32) {
        if len == 0 {
            return;
        }
        let end = at.saturating_add(len);
        let last = ((end - 1) >> self.g.cluster_bits) + 1;
        if last <= self.reach {
            self.highest = self.highest.max(last);
        }
        if end.saturating_sub(self.file_size) >= self.g.cluster_size() {
            self.report.corruptions += u64::from(times);
            self.report.say(|| format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset {at:#x} size {len:#x}"
            ));
            return;
        }
        for c in at >> self.g.cluster_bits..=(end - 1) >> self.g.cluster_bits {
            if let Some(n) = self.refs.0.get_mut(c as usize) {
                *n = n.saturating_add(times);
            }
        }
    }

    /// Counts an L1 table and the L2 tables it names, which are gathered to be read once each.
    fn count_l1(&mut self, at: HostOffset, table: &[u64], times: Times, tables: &mut Tables) {
        self.count_times(at.0, table.len() as u64 * 8, times.all);
        for (i, &entry) in table.iter().enumerate() {
            if entry == 0 {
                continue;
            }
            if entry & L1_RESERVED != 0 {
                let text = || format!("found L1 entry with reserved bits set: {entry:x}");
                self.report.corrupt_times(times.all, text);
            }
            let l2 = entry & OFFSET_MASK;
            if !l2.is_multiple_of(self.g.cluster_size()) {
                self.report.corrupt_times(times.all, || {
                    format!(
                        "l2_offset={l2:x}: Table is not cluster aligned; L1 entry corrupted (L1 index: {i})"
                    )
                });
                self.unknown = true;
            }
            self.count_times(l2, self.g.cluster_size(), times.all);
            if l2 < self.file_size {
                let sum = tables.entry(l2).or_default();
                sum.all = sum.all.saturating_add(times.all);
                sum.active = sum.active.saturating_add(times.active);
            }
        }
    }

    pub(super) async fn read_l2(&self, at: HostOffset) -> Result<Vec<u64>, Error> {
        read_table(self.file, at, self.g.cluster_size(), "Could not read L2 table").await
    }

    fn count_l2(&mut self, words: &[u64], times: Times) {
        let mut next = None;
        let step = if self.g.extended { 2 } else { 1 };
        for entry in words.chunks_exact(step) {
            let raw = RawEntry { word: entry[0], bitmap: entry.get(1).copied().unwrap_or(0) };
            if raw == RawEntry::default() {
                continue;
            }
            if raw.word & super::entry::COMPRESSED == 0 && raw.word & L2_RESERVED != 0 {
                self.report.corrupt_times(times.all, || {
                    format!("found l2 entry with reserved bits set: {:x}", raw.word)
                });
            }
            match self.format.decode(raw) {
                Ok(e) => self.count_entry(e, times, &mut next),
                Err(bad) => {
                    self.bad_entry(raw, bad, times.all);
                    if let BadEntry::Unaligned(host) = bad {
                        // whatever it covers is not to be given away
                        let kept = Allocation { host, copied: false };
                        self.count_entry(L2Entry::Data(kept), times, &mut next);
                    }
                }
            }
        }
    }

    fn bad_entry(&mut self, raw: RawEntry, bad: BadEntry, times: u32) {
        let at = raw.word & OFFSET_MASK;
        let text = match bad {
            BadEntry::CompressedCopied => {
                format!("coffset={at:#x}: copied flag must never be set for compressed clusters")
            }
            BadEntry::CompressedExternal => {
                format!("compressed cluster with data file, entry={:#x}", raw.word)
            }
            BadEntry::Unaligned(at) => {
                format!("offset={:x}: Data cluster is not properly aligned; L2 entry corrupted.", at.0)
            }
            BadEntry::SubclusterBitmap => {
                format!("offset={at:x}: Allocated cluster has corrupted subcluster allocation bitmap")
            }
            BadEntry::ZeroInV2 => format!("offset={at:x}: zero flag in a version 2 image"),
        };
        self.report.corrupt_times(times, || text);
        // Whatever it holds is not to be given away.
        match bad {
            BadEntry::CompressedCopied => {
                if let Ok(L2Entry::Compressed(p)) = self.format.decode((raw.word & !COPIED).into()) {
                    self.count_times(p.at.0, p.len, times);
                }
            }
            BadEntry::SubclusterBitmap | BadEntry::ZeroInV2 if !self.format.external_data && at != 0 => {
                self.count_times(at, self.g.cluster_size(), times);
            }
            _ => {}
        }
    }

    fn count_entry(&mut self, e: L2Entry, times: Times, next: &mut Option<u64>) {
        let host = match e {
            L2Entry::Data(a) | L2Entry::Zero { kept: Some(a) } | L2Entry::Sub { host: Some(a), .. } => {
                a.host.0
            }
            L2Entry::Compressed(p) => {
                self.report.allocated_clusters += u64::from(times.active);
                self.report.compressed_clusters += u64::from(times.active);
                self.report.fragmented_clusters += u64::from(times.active);
                self.count_times(p.at.0, p.len, times.all);
                return;
            }
            _ => return,
        };
        self.report.allocated_clusters += u64::from(times.active);
        if next.is_some_and(|n| n != host) {
            self.report.fragmented_clusters += u64::from(times.active);
        }
        *next = Some(host + self.g.cluster_size());
        if !self.format.external_data {
            self.count_times(host, self.g.cluster_size(), times.all);
        }
    }

    async fn count_bitmaps(&mut self) -> Result<(), Error> {
        let Some(ext) = self.header.extensions.bitmaps else { return Ok(()) };
        self.count(ext.directory_offset.0, ext.directory_size);
        let (_, list) = bitmaps::read(self.file, &ext, &self.header).await?;
        let mut tables = BTreeMap::new();
        for b in list {
            *tables.entry((b.table_offset, u64::from(b.table_size) * 8)).or_insert(0) += 1;
        }
        // As with the L1 tables of snapshots: what lies over each other is not read.
        let mut left = self.file_size;
        for ((at, bytes), times) in tables {
            self.count_times(at, bytes, times);
            if at >= self.file_size || bytes > self.file_size {
                continue;
            }
            let Some(rest) = left.checked_sub(bytes) else {
                self.report.corrupt(|| "the tables of bitmaps overlap each other".to_owned());
                self.unknown = true;
                break;
            };
            left = rest;
            let table = read_table(self.file, HostOffset(at), bytes, "Could not read bitmap table").await?;
            for entry in table {
                if entry & OFFSET_MASK != 0 {
                    self.count_times(entry & OFFSET_MASK, self.g.cluster_size(), times);
                }
            }
        }
        Ok(())
    }

    fn count_refblocks(&mut self) {
        let mut seen = HashMap::new();
        for i in 0..self.reftable.len() {
            let entry = self.reftable[i];
            let at = entry & !REFTABLE_RESERVED;
            if entry == 0 {
                continue;
            }
            if entry & REFTABLE_RESERVED != 0 {
                self.report.corrupt(|| format!("refcount table entry {i} has reserved bits set"));
                self.reftable[i] = 0;
            } else if !at.is_multiple_of(self.g.cluster_size()) {
                self.report.corrupt(|| {
                    format!("refcount block {i} is not cluster aligned; refcount table entry corrupted")
                });
                self.reftable[i] = 0;
            } else if at >= self.file_size {
                self.report.corrupt(|| format!("refcount block {i} is outside image"));
                self.reftable[i] = 0;
            } else if seen.insert(at, i).is_some() {
                self.report.corrupt(|| format!("refcount block {i} refcount=2"));
                self.reftable[i] = 0;
            } else {
                self.count(at, self.g.cluster_size());
            }
            // Named by nothing: its range has no counters, and the table has to lose the entry.
            self.missing |= self.reftable[i] == 0;
        }
        let shared =
            |&at: &u64| self.refs.0.get((at >> self.g.cluster_bits) as usize).is_some_and(|&n| n > 1);
        // A block that is something else as well cannot be written without changing that.
        self.missing |= self.reftable.iter().filter(|&&at| at != 0).any(shared);
    }

    /// The refcount block `i`, if it can be read.
    pub(super) async fn refblock(&self, i: usize) -> Result<Option<Buf>, Error> {
        let at = self.reftable.get(i).copied().unwrap_or(0);
        if at == 0 {
            return Ok(None);
        }
        let (result, bytes) = self.file.read(at, Buf::new(self.g.cluster_size() as usize)).await;
        result.map_err(|e| Error::io(e, "Could not read refcount block"))?;
        Ok(Some(bytes))
    }

    /// The counters of block `i` as they are stored; an error for a block that cannot be looked at.
    async fn counters(&self, i: usize) -> Result<Option<Buf>, ()> {
        let at = self.named.get(i).copied().unwrap_or(0);
        if at == 0 {
            return Ok(None);
        }
        if !at.is_multiple_of(self.g.cluster_size()) || at > i64::MAX as u64 {
            return Err(());
        }
        if at >= self.file_size {
            return Ok(None);
        }
        let (result, bytes) = self.file.read(at, Buf::new(self.g.cluster_size() as usize)).await;
        result.map(|()| Some(bytes)).map_err(drop)
    }

    async fn compare(&mut self) -> Result<(), Error> {
        let per = self.g.refblock_entries() as usize;
        let mut stored = Vec::with_capacity(self.refs.0.len());
        for i in 0..self.refs.0.len().div_ceil(per) {
            let Ok(block) = self.counters(i).await else {
                self.unreadable(i, &mut stored);
                continue;
            };
            for c in i * per..((i + 1) * per).min(self.refs.0.len()) {
                let have = block.as_ref().and_then(|b| {
                    refcount::get(b, self.g.refcount_order, self.g.in_block(HostCluster(c as u64)))
                });
                stored.push(have.unwrap_or(0));
            }
        }
        for (c, &have) in stored.iter().enumerate() {
            if have == UNREADABLE {
                continue;
            }
            let want = u64::from(self.refs.0[c]);
            if have > 0 || want > 0 {
                self.report.image_end_offset = (c as u64 + 1) << self.g.cluster_bits;
            }
            if have > want {
                self.report.leaks += 1;
                self.report.say(|| format!("Leaked cluster {c} refcount={have} reference={want}"));
            } else if have < want {
                self.missing |= have == 0;
                self.report.corrupt(|| format!("cluster {c} refcount={have} reference={want}"));
            }
        }
        self.stored = stored;
        Ok(())
    }

    /// The refcounts of block `i` cannot be looked at. A rebuild does not need them.
    fn unreadable(&mut self, i: usize, stored: &mut Vec<u64>) {
        let per = self.g.refblock_entries() as usize;
        for c in i * per..((i + 1) * per).min(self.refs.0.len()) {
            self.report.check_errors += 1;
            self.report.say(|| format!("Can't get refcount for cluster {c}: Input/output error"));
            stored.push(UNREADABLE);
        }
    }

    /// The COPIED flags of the active tables must say which refcounts are 1.
    async fn compare_copied(&mut self) -> Result<(), Error> {
        let (stored, bits) = (std::mem::take(&mut self.stored), self.g.cluster_bits);
        let refcount = |at: u64| stored.get((at >> bits) as usize).copied().unwrap_or(0);
        let mut seen = HashSet::new();
        for (i, &entry) in self.l1.iter().enumerate() {
            let l2 = entry & OFFSET_MASK;
            if l2 == 0 || !l2.is_multiple_of(self.g.cluster_size()) || l2 >= self.file_size {
                continue;
            }
            let n = refcount(l2);
            if n != UNREADABLE && (n == 1) != (entry & COPIED != 0) {
                let text =
                    || format!("OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={entry:x} refcount={n}");
                self.report.corrupt(text);
            }
            if !seen.insert(l2) {
                continue;
            }
            let words = self.read_l2(HostOffset(l2)).await?;
            for word in words.iter().step_by(if self.g.extended { 2 } else { 1 }) {
                let Some(at) = copied_matters(*word) else { continue };
                let n = if self.format.external_data { 1 } else { refcount(at) };
                if n != UNREADABLE && (n == 1) != (word & COPIED != 0) {
                    let text = || format!("OFLAG_COPIED data cluster: l2_entry={word:x} refcount={n}");
                    self.report.corrupt(text);
                }
            }
        }
        self.stored = stored;
        Ok(())
    }
}

/// L2 tables by offset, and how often each is named.
type Tables = BTreeMap<u64, Times>;

/// How often a table is named: by all L1 tables, and by the active one.
#[derive(Clone, Copy, Default)]
struct Times {
    all: u32,
    active: u32,
}

/// Memory for counters that every image may have, whatever it holds.
const COUNTERS_FREE: u64 = 128 << 20;
/// Memory for the counters of one cluster, bytes.
const COUNTER: u64 = 12;

/// The number of clusters of a file, if their counters are no more than what the file really holds allows: a long file
/// made of a hole is not worth any memory.
fn countable(clusters: u64, used: u64) -> Result<usize, Error> {
    let most = COUNTERS_FREE.max(used.saturating_mul(4));
    let fits = clusters.checked_mul(COUNTER).is_some_and(|bytes| bytes <= most);
    usize::try_from(clusters).ok().filter(|_| fits).ok_or_else(|| {
        let text =
            format!("The image file is too long for what it holds: {clusters} clusters cannot be counted");
        Error::new(Errno::EFBIG, text)
    })
}

/// The host cluster of an L2 entry whose COPIED flag has a meaning.
pub(super) fn copied_matters(word: u64) -> Option<u64> {
    let at = word & OFFSET_MASK;
    (word & super::entry::COMPRESSED == 0 && at != 0).then_some(at)
}

fn text(raw: &[u8]) -> String {
    String::from_utf8_lossy(raw).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: counters are refused to a file that is a hole, and never to one that holds as much as they take. Method: the limits.
    #[test]
    fn counters_in_proportion() {
        let free = COUNTERS_FREE / COUNTER;
        assert_eq!(countable(free, 0), Ok(free as usize));
        assert_eq!(countable(free + 1, 0).map_err(|e| e.errno), Err(Errno::EFBIG));
        assert_eq!(countable(1 << 30, 3 << 30), Ok(1 << 30));
        assert_eq!(countable(u64::MAX, u64::MAX).map_err(|e| e.errno), Err(Errno::EFBIG));
    }
}
