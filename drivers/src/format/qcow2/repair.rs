//! Repairing an image: refcounts that agree with the references, COPIED flags that agree with the refcounts.
//!
//! Invariants: nothing that is referenced is overwritten, except flags in tables and counters in blocks; new structures go
//! behind the end of the file *and* of everything referenced, and are durable before the header names them; at every
//! moment of a repair a power cut leaves an image whose guest data is the same, that is no worse than before, and that
//! can be repaired again. Version 3 has the dirty bit for that: whoever opens a half-repaired image repairs it first
//! (rule 7 of the crash contract). Version 2 has the order of things alone: flags that promise too much go first, flags
//! that promise more come last, and a counter is never below what it was unless it was too high.
//!
//! ```text
//! references behind the end (a lost length) ─► the file is made longer ─► counted again
//! dirty bit on ─► COPIED off where it must be ─► counters ─► COPIED on where it may be ─► flush ─► header as it should be
//!                                                   ├ all clusters have a counter: in place
//!                                                   └ otherwise: new blocks + table behind everything ─► flush ─► header
//! ```

use std::collections::HashSet;

use ringblock_engine::mem::Buf;
use ringblock_engine::mutant;
use ringblock_engine::units::HostOffset;
use ringblock_engine::{Errno, Error};

use super::check::{Check, MESSAGES_MAX, Repair, copied_matters};
use super::entry::{COPIED, OFFSET_MASK};
use super::geometry::{Geometry, HostCluster, InBlock, MAX_REFTABLE_BYTES};
use super::header::{Header, incompatible};
use super::io::Store;
use super::refcount;

/// Clusters by which a repair makes a file longer, at most: what a writer may have appended since its last flush.
const LONGER_MAX: u64 = 1 << 22;

/// How many clusters behind the end of the file a reference is believed.
pub(super) fn longer_max(g: &Geometry, size: u64) -> u64 {
    let disk = g.clusters_for(size);
    LONGER_MAX.min(disk.saturating_add(disk / 8).saturating_add((64 << 20) / g.cluster_size()))
}

/// Makes the file reach as far as everything that is referenced: its length was lost, and what is there reads as zeros.
/// True if something has changed, and the image has to be looked at again.
pub(super) async fn lengthen(check: &Check<'_>, said: &mut Vec<String>) -> Result<bool, Error> {
    let g = check.g;
    let have = check.refs.0.len() as u64;
    if check.highest <= have || mutant!("rebuild-behind-references") {
        return Ok(false);
    }
    let end = check.highest << g.cluster_bits;
    tell(said, || format!("Extending the file to {end} bytes: clusters behind its end are in use"));
    check.file.truncate(end).await.map_err(|e| Error::io(e, "Could not extend the image file"))?;
    flush(check.file).await?;
    Ok(true)
}

/// Repairs what the check found, tells what was done, and returns the number of COPIED flags put right. The header is left
/// as a repair on its way has it: [`finish`] ends it.
pub(super) async fn run(check: &mut Check<'_>, fix: Repair, said: &mut Vec<String>) -> Result<u64, Error> {
    let rebuilds = fix == Repair::All && check.missing;
    // What the old structures lie on counts for whatever else is there: they are given up.
    let freed = if rebuilds { give_up(check) } else { Vec::new() };
    let (clear, set) = flags(check, fix, Pass::Count, said).await?;
    let corrupt = fix == Repair::All && check.report.corruptions > 0;
    if (corrupt || clear + set > 0) && !check.header.has(incompatible::DIRTY) && check.header.version >= 3 {
        check.header.incompatible |= incompatible::DIRTY;
        write_header(check.file, &check.header).await?;
    }
    if clear > 0 {
        flags(check, fix, Pass::Clear, said).await?;
        flush(check.file).await?;
    }
    if rebuilds {
        said.push("Rebuilding refcount structure".to_owned());
        for c in freed {
            tell(said, || format!("Repairing cluster {c} refcount=1 reference=0"));
        }
        rebuild(check).await?;
    } else if check.report.leaks > 0 || check.report.corruptions > 0 {
        adjust(check, fix, said).await?;
    }
    // Also if all counters looked right: after a repair that failed on its way, only the host's cache may have them so.
    if !mutant!("repair-barrier") {
        flush(check.file).await?;
    }
    if set > 0 {
        flags(check, fix, Pass::Set, said).await?;
        flush(check.file).await?;
    }
    Ok(clear + set)
}

/// Ends a repair: the dirty and corrupt bits as they were, or gone if nothing is wrong any more.
pub(super) async fn finish(
    file: &dyn Store,
    mut header: Header,
    before: u64,
    fix: Repair,
    sound: bool,
) -> Result<(), Error> {
    let bits = incompatible::DIRTY | incompatible::CORRUPT;
    let now = if fix == Repair::All && sound { before & !bits } else { before };
    if header.incompatible == now {
        return Ok(());
    }
    // everything before this ended with a flush
    header.incompatible = now;
    write_header(file, &header).await
}

async fn flush(file: &dyn Store) -> Result<(), Error> {
    file.flush().await.map_err(|e| Error::io(e, "Could not flush the image"))
}

async fn write(file: &dyn Store, at: u64, bytes: Buf) -> Result<(), Error> {
    file.write(at, bytes).await.map_err(|e| Error::io(e, "Could not write to the image"))
}

/// Writes the header, durably. What changes lies in its first sector.
async fn write_header(file: &dyn Store, header: &Header) -> Result<(), Error> {
    let bytes = header.serialise()?;
    let mut buf = Buf::zeroed(bytes.len().next_multiple_of(512));
    buf[..bytes.len()].copy_from_slice(&bytes);
    write(file, 0, buf).await?;
    flush(file).await
}

/// Lowers counters that are too high; with [`Repair::All`] raises those that are too low.
async fn adjust(check: &Check<'_>, fix: Repair, said: &mut Vec<String>) -> Result<(), Error> {
    let per = check.g.refblock_entries() as usize;
    for i in 0..check.refs.0.len().div_ceil(per) {
        let Some(mut block) = check.refblock(i).await? else { continue };
        let mut changed = false;
        for c in i * per..((i + 1) * per).min(check.refs.0.len()) {
            let at = check.g.in_block(HostCluster(c as u64));
            let (want, have) =
                (u64::from(check.refs.0[c]), refcount::get(&block, check.g.refcount_order, at));
            if have.is_some_and(|n| n > want || (n < want && fix == Repair::All)) {
                changed |= refcount::set(&mut block, check.g.refcount_order, at, want);
                tell(said, || {
                    format!("Repairing cluster {c} refcount={} reference={want}", have.unwrap_or(0))
                });
            }
        }
        if changed {
            write(check.file, check.reftable[i], block).await?;
        }
    }
    Ok(())
}

/// Takes away the references to the old table and its blocks, and lists the clusters that had no other. They stay until the
/// new ones are in force: the space they hold becomes free and not part of the new structure.
fn give_up(check: &mut Check<'_>) -> Vec<u64> {
    let g = check.g;
    let mut freed = Vec::new();
    for &at in check.reftable.iter().filter(|&&at| at != 0) {
        forget(&mut check.refs.0, at, g.cluster_size(), g.cluster_bits, &mut freed);
    }
    let old_bytes = u64::from(check.header.reftable_clusters) << g.cluster_bits;
    forget(&mut check.refs.0, check.header.reftable_offset.0, old_bytes, g.cluster_bits, &mut freed);
    freed.sort_unstable();
    freed
}

/// The first cluster behind everything. Entries of the old table that point behind the end of the file count too: until the
/// header names the new table, a block written there would be taken for theirs.
fn behind_all(check: &Check<'_>) -> u64 {
    let end = check.refs.0.len() as u64;
    let near = end..2 * end + 4096;
    let named = check.named.iter().map(|at| at >> check.g.cluster_bits).filter(|c| near.contains(c));
    named.max().map_or(end, |c| c + 1)
}

/// Writes new blocks and a new table behind everything, and makes the header name them.
async fn rebuild(check: &mut Check<'_>) -> Result<(), Error> {
    let g = check.g;
    let order = g.refcount_order;
    let refs = &check.refs.0;
    let end = behind_all(check);
    let used = |b: u64| {
        (b * g.refblock_entries()..(b + 1) * g.refblock_entries())
            .any(|c| refs.get(c as usize).is_some_and(|&n| n > 0))
    };
    let per = g.refblock_entries();
    let (mut blocks, mut table): (Vec<u64>, u64) = (Vec::new(), 1);
    loop {
        let total = end + blocks.len() as u64 + table;
        let need: Vec<u64> = (0..total.div_ceil(per)).filter(|&b| used(b) || (b + 1) * per > end).collect();
        let clusters = (total.div_ceil(per) * 8).div_ceil(g.cluster_size());
        if need.len() <= blocks.len() && clusters <= table {
            break;
        }
        (blocks, table) = (need, clusters.max(table));
    }
    if table * g.cluster_size() > MAX_REFTABLE_BYTES {
        return Err(Error::new(Errno::EFBIG, "The image is too large for a refcount table"));
    }
    let table_at = end + blocks.len() as u64;
    let mut entries = Buf::zeroed((table * g.cluster_size()) as usize);
    for (k, &b) in blocks.iter().enumerate() {
        let mut block = Buf::zeroed(g.cluster_size() as usize);
        for i in 0..per {
            let c = b * per + i;
            let ours = (end..table_at + table).contains(&c);
            let n = refs.get(c as usize).map_or(u64::from(ours), |&n| u64::from(n));
            if n > 0 && !refcount::set(&mut block, order, InBlock(i), n) {
                return Err(Error::invalid(format!("Cluster {c} has too many references for its refcount")));
            }
        }
        let at = (end + k as u64) << g.cluster_bits;
        write(check.file, at, block).await?;
        super::bytes::put64(&mut entries, b as usize * 8, at);
    }
    write(check.file, table_at << g.cluster_bits, entries).await?;
    if !mutant!("rebuild-barrier") {
        flush(check.file).await?;
    }
    check.header.reftable_offset = HostOffset(table_at << g.cluster_bits);
    check.header.reftable_clusters = table as u32;
    write_header(check.file, &check.header).await
}

/// Takes one reference away from each cluster of a range, and lists those of which it was the only one.
fn forget(refs: &mut [u32], at: u64, len: u64, bits: u32, freed: &mut Vec<u64>) {
    if len == 0 {
        return;
    }
    for c in at >> bits..=(at + len - 1) >> bits {
        if let Some(n) = refs.get_mut(c as usize) {
            if *n == 1 {
                freed.push(c);
            }
            *n = n.saturating_sub(1);
        }
    }
}

/// What a pass over the COPIED flags of the active tables does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// Counts what is wrong.
    Count,
    /// Clears flags: always safe, as a write then goes elsewhere.
    Clear,
    /// Sets flags: the counters have to be 1 by then.
    Set,
}

/// Makes the COPIED flags of the active tables agree with the references. Returns how many were (to clear, to set).
async fn flags(
    check: &mut Check<'_>,
    fix: Repair,
    pass: Pass,
    said: &mut Vec<String>,
) -> Result<(u64, u64), Error> {
    let g = check.g;
    let step = if g.extended { 2 } else { 1 };
    let mut l1 = check.l1.clone();
    let (mut sum, mut seen) = ((0, 0), HashSet::new());
    let mut count = |(clear, set): (u64, u64)| sum = (sum.0 + clear, sum.1 + set);
    for (i, entry) in l1.iter_mut().enumerate() {
        let l2 = *entry & OFFSET_MASK;
        if l2 == 0 || !l2.is_multiple_of(g.cluster_size()) || l2 >= check.file_size {
            continue;
        }
        let what = format!("L2 cluster: l1_index={i} l1_entry");
        count(flag(check, fix, pass, entry, Some(l2), &what, said));
        if !seen.insert(l2) {
            continue;
        }
        let mut words = check.read_l2(HostOffset(l2)).await?;
        let mut changed = (0, 0);
        for word in words.iter_mut().step_by(step) {
            let Some(at) = copied_matters(*word) else { continue };
            let at = Some(at).filter(|_| !check.format.external_data);
            let (clear, set) = flag(check, fix, pass, word, at, "data cluster: l2_entry", said);
            changed = (changed.0 + clear, changed.1 + set);
        }
        count(changed);
        if pass != Pass::Count && changed != (0, 0) {
            write(check.file, l2, encode(&words)).await?;
        }
    }
    if pass != Pass::Count && l1 != check.l1 {
        write(check.file, check.header.l1_offset.0, encode(&l1)).await?;
        check.l1 = l1;
    }
    Ok(sum)
}

/// One flag of one entry: (1, 0) if it is to be cleared, (0, 1) if it is to be set. The entry names the cluster at `at`, or
/// one of the external data file, which nobody shares and nothing counts.
fn flag(
    check: &Check<'_>,
    fix: Repair,
    pass: Pass,
    word: &mut u64,
    at: Option<u64>,
    what: &str,
    said: &mut Vec<String>,
) -> (u64, u64) {
    let c = at.map(|at| (at >> check.g.cluster_bits) as usize);
    let n = c.map_or(1, |c| check.refs.0.get(c).map_or(0, |&n| u64::from(n)));
    // A counter that stays too low must not be trusted to be 1.
    let stored = c.and_then(|c| check.stored.get(c));
    let low = fix == Repair::Leaks && (n == 0 || stored.is_some_and(|&have| have < n));
    let want = if n == 1 { *word | COPIED } else { *word & !COPIED };
    if low || want == *word {
        return (0, 0);
    }
    let sets = want & COPIED != 0;
    if pass == Pass::Count || (pass == Pass::Set) == sets {
        if pass != Pass::Count {
            tell(said, || format!("Repairing OFLAG_COPIED {what}={word:x} refcount={n}"));
            *word = want;
        }
        return (u64::from(!sets), u64::from(sets));
    }
    (0, 0)
}

/// Adds a message, if there is room.
fn tell(said: &mut Vec<String>, text: impl FnOnce() -> String) {
    if said.len() < MESSAGES_MAX {
        said.push(text());
    }
}

fn encode(words: &[u64]) -> Buf {
    let mut out = Buf::zeroed(words.len() * 8);
    for (w, b) in words.iter().zip(out.chunks_exact_mut(8)) {
        b.copy_from_slice(&w.to_be_bytes());
    }
    out
}
