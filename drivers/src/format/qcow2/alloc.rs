//! Host clusters for new data and new tables.
//!
//! Clusters are taken from a run reserved ahead: its counters are 1 before anything uses them, so an allocating write
//! costs no refcount I/O of its own. A crash leaks what is left of the run, which `check -r leaks` takes back; closing
//! gives it back.
//!
//! Invariants: a cluster handed out has counter 1, is named by no table, and is none of the image's own structures;
//! clusters at or above `fresh` were never handed out nor written, so they read as zeros.
//!
//! ```text
//! ── used ──│ run: reserved, counter 1 │── free ──│── never used: fresh, reads zero ──►
//! ```

use std::rc::Rc;

use ringblock_engine::Errno;
use ringblock_engine::debug::DebugEvent;
use ringblock_engine::mem::Buf;
use ringblock_engine::mutant;
use ringblock_engine::units::HostOffset;

use super::geometry::{HOST_OFFSET_LIMIT, HostCluster, ReftableIndex};
use super::owner::Image;
use super::refcounts::Turn;

/// Bytes reserved at a time.
const RUN_BYTES: u64 = 4 << 20;

/// The state of the allocator.
#[derive(Debug)]
pub(super) struct Alloc {
    /// Reserved clusters not yet handed out.
    run: std::ops::Range<u64>,
    /// First cluster that may be free.
    hint: u64,
    /// First cluster that was never handed out, and lies behind the file's end at open.
    fresh: u64,
}

/// Clusters handed out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// The first one.
    pub(super) first: HostCluster,
    /// How many, at least 1.
    pub(super) count: u64,
    /// They read as zeros.
    pub(super) fresh: bool,
}

impl Alloc {
    /// For a file that ends in cluster `end` (exclusive).
    pub(super) fn new(end: u64) -> Alloc {
        Alloc { run: 0..0, hint: 0, fresh: if mutant!("fresh-behind-end") { 0 } else { end } }
    }

    fn take(&mut self, want: u64) -> Option<Run> {
        let first = self.run.start;
        let count = want.min(self.run.end - first);
        if count == 0 {
            return None;
        }
        self.run.start += count;
        let fresh = first >= self.fresh;
        if !mutant!("fresh-moves-on") {
            self.fresh = self.fresh.max(first + count);
        }
        Some(Run { first: HostCluster(first), count, fresh })
    }

    /// A cluster became free.
    pub(super) fn freed(&mut self, c: HostCluster) {
        self.hint = self.hint.min(c.0);
    }

    /// Takes what is left of the reserved run.
    pub(super) fn take_run(&mut self) -> std::ops::Range<u64> {
        std::mem::replace(&mut self.run, 0..0)
    }

    /// First cluster behind everything that was ever handed out or reserved.
    fn end(&self) -> u64 {
        self.fresh.max(self.run.end)
    }
}

impl Image {
    /// Hands out up to `want` clusters in a row, at least one.
    pub(super) async fn allocate(self: &Rc<Self>, want: u64) -> Result<Run, Errno> {
        self.event(DebugEvent::ClusterAlloc).await;
        loop {
            if let Some(run) = self.alloc.borrow_mut().take(want) {
                return Ok(run);
            }
            let turn = self.refcounts.lock().await;
            if self.alloc.borrow().run.is_empty() {
                self.reserve(&turn, want).await?;
            }
        }
    }

    /// Fills the run. The refcounts are ours alone.
    async fn reserve(self: &Rc<Self>, turn: &Turn<'_>, want: u64) -> Result<(), Errno> {
        let g = self.geometry;
        let want = want.max((RUN_BYTES / g.cluster_size()).clamp(8, 2048));
        loop {
            let hint = HostCluster(self.alloc.borrow().hint);
            let (first, count, counted) = self.refcounts.find_free(turn, hint, want).await?;
            if !counted {
                // The free range has no counters yet: make a block in its first cluster, then look again.
                if self.is_metadata(first) {
                    return Err(self.overlap(first));
                }
                if g.reftable_index(first).at() >= self.refcounts.table.len() {
                    self.grow_reftable(turn, first).await?;
                    continue;
                }
                self.event(DebugEvent::RefblockAlloc).await;
                self.refcounts.make_block(turn, first).await?;
                self.metadata.borrow_mut().insert(first.0);
                let mut alloc = self.alloc.borrow_mut();
                alloc.fresh = alloc.fresh.max(first.0 + 1);
                continue;
            }
            if let Some(c) = (first.0..first.0 + count).find(|&c| self.is_metadata(HostCluster(c))) {
                return Err(self.overlap(HostCluster(c)));
            }
            for c in (first.0..first.0 + count).filter(|_| !mutant!("reserve-counts")) {
                self.refcounts.set(turn, HostCluster(c), 1).await?;
            }
            let mut alloc = self.alloc.borrow_mut();
            alloc.run = first.0..first.0 + count;
            alloc.hint = first.0 + count;
            return Ok(());
        }
    }

    /// A free cluster that is in use as a table: the refcounts are wrong, and writing there would destroy the image.
    fn overlap(self: &Rc<Self>, c: HostCluster) -> Errno {
        self.set_corrupt(&format!(
            "Preventing invalid allocation of host cluster {}: it holds metadata",
            c.0
        ));
        Errno::EIO
    }

    /// Whether a cluster holds one of the image's own structures.
    pub(super) fn is_metadata(&self, c: HostCluster) -> bool {
        c.0 == 0 || self.metadata.borrow().contains(&c.0)
    }

    /// Moves the refcount table to a larger place at the end, so that `last` can be counted (rule 2: new content, then
    /// the header, then the old place is free).
    async fn grow_reftable(self: &Rc<Self>, turn: &Turn<'_>, last: HostCluster) -> Result<(), Errno> {
        let g = self.geometry;
        self.event(DebugEvent::ReftableGrow).await;
        let (old_at, old_clusters) = {
            let h = self.header.borrow();
            (h.reftable_offset, u64::from(h.reftable_clusters))
        };
        // The new table goes to the first range of clusters that no block counts yet: all of it is free.
        let start = self.alloc.borrow().end().max(last.0);
        let mut first = HostCluster(start);
        if self.refcounts.load(turn, g.reftable_index(first)).await? {
            first = g.refblock_start(ReftableIndex(g.reftable_index(first).0 + 1));
        }
        let mut clusters = 1u64;
        let blocks = loop {
            // Enough for the table, and for the blocks that count the table and themselves.
            let blocks = (clusters + 2).div_ceil(g.refblock_entries() - 1) + 1;
            let end = HostCluster(first.0 + blocks * g.refblock_entries());
            let need = self.refcounts.table_clusters_for(end).ok_or(Errno::EFBIG)?;
            if need <= clusters {
                break blocks;
            }
            clusters = need;
        };
        if g.host_offset(HostCluster(first.0 + blocks * g.refblock_entries())).0 > HOST_OFFSET_LIMIT {
            return Err(Errno::EFBIG);
        }
        let entries = self.refcounts.table.len();
        self.refcounts.grow_table(clusters);
        let table_at = match self.write_grown_table(turn, first, clusters).await {
            Ok(at) => at,
            Err(e) => {
                // the table on the disk is the old one: entries behind its end would be written over something else
                self.refcounts.shrink_table(entries);
                let end = first.0 + blocks * g.refblock_entries();
                self.metadata.borrow_mut().retain(|c| !(first.0..end).contains(c));
                let mut alloc = self.alloc.borrow_mut();
                alloc.fresh = alloc.fresh.max(end);
                return Err(e);
            }
        };
        self.event(DebugEvent::RefblockAllocSwitchTable).await;
        {
            let mut h = self.header.borrow_mut();
            h.reftable_offset = g.host_offset(table_at);
            h.reftable_clusters = clusters as u32;
        }
        let written = match mutant!("grown-table-header") {
            true => self.write_header().await,
            false => self.write_header_durable().await,
        };
        if let Err(e) = written {
            return Err(self.set_poison(e));
        }
        self.refcounts.table.set_clean();
        let old = g.host_cluster(old_at);
        {
            let mut meta = self.metadata.borrow_mut();
            (0..old_clusters).for_each(|i| {
                meta.remove(&(old.0 + i));
            });
            meta.extend(table_at.0..table_at.0 + clusters);
        }
        self.limbo.borrow_mut().durable(old, old_clusters);
        Ok(())
    }

    /// Writes the grown table and the blocks that it needs to where nothing is yet, and makes them durable.
    async fn write_grown_table(
        self: &Rc<Self>,
        turn: &Turn<'_>,
        first: HostCluster,
        clusters: u64,
    ) -> Result<HostCluster, Errno> {
        let g = self.geometry;
        let table_at = self.place_table(turn, first, clusters).await?;
        self.event(DebugEvent::RefblockAllocWriteBlocks).await;
        if !mutant!("grown-table-counters") {
            self.refcounts.write_dirty(turn).await?;
        }
        let bytes = self.refcounts.table.encode_all((clusters * g.cluster_size()) as usize);
        self.event(DebugEvent::RefblockAllocWriteTable).await;
        self.file.write(g.host_offset(table_at).0, bytes).await?;
        if !mutant!("grown-table-barrier") {
            self.barrier().await?;
        }
        Ok(table_at)
    }

    /// Counts `clusters` clusters for a table from `first` on, making blocks on the way. Returns where the table goes.
    async fn place_table(
        self: &Rc<Self>,
        turn: &Turn<'_>,
        first: HostCluster,
        clusters: u64,
    ) -> Result<HostCluster, Errno> {
        let g = self.geometry;
        // Blocks first, all in front of the table, each counted by itself or by one before it.
        let mut blocks = 1;
        while g.reftable_index(HostCluster(first.0 + blocks + clusters - 1)).0 - g.reftable_index(first).0 + 1
            > blocks
        {
            blocks += 1;
        }
        let table_at = HostCluster(first.0 + blocks);
        for b in 0..blocks {
            let i = ReftableIndex(g.reftable_index(first).0 + b);
            let at = HostCluster(first.0 + b);
            self.refcounts.make_block_at(turn, i, at).await?;
            self.metadata.borrow_mut().insert(at.0);
        }
        for c in first.0..table_at.0 + clusters {
            self.refcounts.set(turn, HostCluster(c), 1).await?;
        }
        let mut alloc = self.alloc.borrow_mut();
        alloc.fresh = alloc.fresh.max(table_at.0 + clusters);
        Ok(table_at)
    }

    /// Gives clusters back that no table ever named: they wait for the data operations in flight only.
    pub(super) fn give_back(self: &Rc<Self>, first: HostCluster, count: u64) {
        self.limbo.borrow_mut().durable(first, count);
        self.reap_soon();
    }

    /// Zeros a part of the file with ordinary writes.
    pub(super) async fn write_zeros(&self, at: HostOffset, len: u64) -> Result<(), Errno> {
        self.event(DebugEvent::ClusterAllocSpace).await;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(1 << 20);
            self.file.write(at.0 + done, Buf::zeroed(n as usize)).await?;
            done += n;
        }
        Ok(())
    }
}
