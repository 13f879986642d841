//! Repairing an image: refcounts that agree with the references, COPIED flags that agree with the refcounts.
//!
//! Invariants: nothing that is referenced is overwritten; new structures go behind the end of the file and of everything
//! referenced; they are durable before the header names them; a repair that is interrupted can be repeated.
//!
//! ```text
//! all clusters have a counter:  lower (and raise) them in place ─► flush ┐
//! otherwise:  new blocks + table behind the end ─► flush ─► header ─► flush ┴─► COPIED flags ─► dirty, corrupt off
//! ```

use ringblock_engine::mem::Buf;
use ringblock_engine::units::HostOffset;
use ringblock_engine::{Errno, Error};

use super::check::{Check, MESSAGES_MAX, Repair, copied_matters};
use super::entry::{COPIED, OFFSET_MASK};
use super::geometry::{HostCluster, InBlock, MAX_REFTABLE_BYTES};
use super::header::incompatible;
use super::io::Store;
use super::refcount;

/// Repairs what the check found, tells what was done, and returns the number of COPIED flags put right.
pub(super) async fn run(mut check: Check<'_>, fix: Repair, said: &mut Vec<String>) -> Result<u64, Error> {
    let report = &check.report;
    if fix == Repair::All && check.missing {
        said.push("Rebuilding refcount structure".to_owned());
        rebuild(&mut check, said).await?;
    } else if report.leaks > 0 || report.corruptions > 0 {
        adjust(&check, fix, said).await?;
    }
    let flags = set_copied(&check, fix, said).await?;
    let bits = incompatible::DIRTY | incompatible::CORRUPT;
    if fix == Repair::All && check.header.incompatible & bits != 0 {
        check.header.incompatible &= !bits;
        flush(check.file).await?;
        write_header(&check).await?;
    }
    Ok(flags)
}

async fn flush(file: &dyn Store) -> Result<(), Error> {
    file.flush().await.map_err(|e| Error::io(e, "Could not flush the image"))
}

async fn write(file: &dyn Store, at: u64, bytes: Buf) -> Result<(), Error> {
    file.write(at, bytes).await.map_err(|e| Error::io(e, "Could not write to the image"))
}

async fn write_header(check: &Check<'_>) -> Result<(), Error> {
    let bytes = check.header.serialise()?;
    let mut buf = Buf::zeroed(bytes.len().next_multiple_of(512));
    buf[..bytes.len()].copy_from_slice(&bytes);
    write(check.file, 0, buf).await?;
    flush(check.file).await
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
                if said.len() < MESSAGES_MAX {
                    said.push(format!(
                        "Repairing cluster {c} refcount={} reference={want}",
                        have.unwrap_or(0)
                    ));
                }
            }
        }
        if changed {
            write(check.file, check.reftable[i], block).await?;
        }
    }
    flush(check.file).await
}

/// Writes new blocks and a new table behind everything, and makes the header name them.
async fn rebuild(check: &mut Check<'_>, said: &mut Vec<String>) -> Result<(), Error> {
    let g = check.g;
    let order = g.refcount_order;
    // The old table and blocks are not needed any more, but they stay until the new ones are in force, so the space they
    // hold becomes free and not part of the new structure.
    let mut freed = Vec::new();
    for &at in &check.reftable {
        forget(&mut check.refs.0, at, g.cluster_size(), g.cluster_bits, &mut freed);
    }
    let old_bytes = u64::from(check.header.reftable_clusters) << g.cluster_bits;
    forget(&mut check.refs.0, check.header.reftable_offset.0, old_bytes, g.cluster_bits, &mut freed);
    freed.sort_unstable();
    for c in freed {
        tell(said, || format!("Repairing cluster {c} refcount=1 reference=0"));
    }
    let refs = &check.refs.0;
    let end = refs.len() as u64;
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
            let n = if c < end { u64::from(refs[c as usize]) } else { u64::from(c < table_at + table) };
            if n > 0 && !refcount::set(&mut block, order, InBlock(i), n) {
                return Err(Error::invalid(format!("Cluster {c} has too many references for its refcount")));
            }
        }
        let at = (end + k as u64) << g.cluster_bits;
        write(check.file, at, block).await?;
        super::bytes::put64(&mut entries, b as usize * 8, at);
    }
    write(check.file, table_at << g.cluster_bits, entries).await?;
    flush(check.file).await?;
    check.header.reftable_offset = HostOffset(table_at << g.cluster_bits);
    check.header.reftable_clusters = table as u32;
    write_header(check).await
}

/// Takes one reference away from each cluster of a range, and lists those of which it was the only one.
fn forget(refs: &mut [u32], at: u64, len: u64, bits: u32, freed: &mut Vec<u64>) {
    if at == 0 || len == 0 {
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

/// Makes the COPIED flags of the active tables agree with the references.
async fn set_copied(check: &Check<'_>, fix: Repair, said: &mut Vec<String>) -> Result<u64, Error> {
    let g = check.g;
    let step = if g.extended { 2 } else { 1 };
    // a counter that stays too low must not be trusted to be 1
    let refcount = |at: u64| {
        let c = (at >> g.cluster_bits) as usize;
        let want = check.refs.0.get(c).map_or(0, |&n| u64::from(n));
        let low = fix == Repair::Leaks && (want == 0 || check.stored.get(c).is_some_and(|&n| n < want));
        (want, low)
    };
    let flagged = |word: u64, at: u64| match refcount(at) {
        (_, true) => word,
        (1, _) => word | COPIED,
        _ => word & !COPIED,
    };
    let mut fixed = 0;
    let mut l1 = check.l1.clone();
    for (i, entry) in l1.iter_mut().enumerate() {
        let l2 = *entry & OFFSET_MASK;
        if l2 == 0 || !l2.is_multiple_of(g.cluster_size()) || l2 >= check.file_size {
            continue;
        }
        let new = flagged(*entry, l2);
        if new != *entry {
            fixed += 1;
            tell(said, || {
                let n = refcount(l2).0;
                format!("Repairing OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={entry:x} refcount={n}")
            });
            *entry = new;
        }
        if check.format.external_data {
            continue;
        }
        let mut words = check.read_l2(HostOffset(l2)).await?;
        let mut changed = false;
        for word in words.iter_mut().step_by(step) {
            let Some(at) = copied_matters(*word) else { continue };
            let new = flagged(*word, at);
            if new != *word {
                fixed += 1;
                tell(said, || {
                    let n = refcount(at).0;
                    format!("Repairing OFLAG_COPIED data cluster: l2_entry={word:x} refcount={n}")
                });
                *word = new;
                changed = true;
            }
        }
        if changed {
            write(check.file, l2, encode(&words, g.cluster_size())).await?;
        }
    }
    if l1 != check.l1 {
        let bytes = (l1.len() as u64 * 8).next_multiple_of(512.min(g.cluster_size()));
        write(check.file, check.header.l1_offset.0, encode(&l1, bytes)).await?;
    }
    if fixed > 0 {
        flush(check.file).await?;
    }
    Ok(fixed)
}

/// Adds a message, if there is room.
fn tell(said: &mut Vec<String>, text: impl FnOnce() -> String) {
    if said.len() < MESSAGES_MAX {
        said.push(text());
    }
}

fn encode(words: &[u64], bytes: u64) -> Buf {
    let mut out = Buf::zeroed(bytes as usize);
    for (w, b) in words.iter().zip(out.chunks_exact_mut(8)) {
        b.copy_from_slice(&w.to_be_bytes());
    }
    out
}
