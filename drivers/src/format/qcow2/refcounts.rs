//! The refcount blocks: a bounded cache of counters, and their way to the disk.
//!
//! Invariants: a counter in memory is never below the number of references that the disk may hold to its cluster, because
//! it is lowered only after the unlink is durable (see `limbo`); so a block may be written at any time, in any order. A
//! new block is written before its entry in the refcount table is set, and the entry is durable before an L2 entry that
//! depends on it (`writeback`).
//!
//! ```text
//! cluster ─► refcount table[i] ─► block (cache) ─► counter        dirty pages of 4 KiB ──► file
//!                  └ 0: everything in its range is free
//! ```
//! All operations run one at a time under [`Refcounts::lock`].

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

use ringblock_engine::Errno;
use ringblock_engine::debug::DebugEvent;
use ringblock_engine::mem::Buf;
use ringblock_engine::mutant;
use ringblock_engine::sync::{Guard, Mutex};
use ringblock_engine::units::HostOffset;

use super::geometry::{Geometry, HOST_OFFSET_LIMIT, HostCluster, MAX_REFTABLE_BYTES, ReftableIndex};
use super::io::{Store, raise};
use super::refcount;
use super::tables::Table;

const PAGE: usize = 4096;

struct Block {
    bytes: Buf,
    /// Numbers of the dirty pages.
    dirty: BTreeSet<usize>,
    stamp: u64,
}

/// The refcount table and the cached blocks.
pub(super) struct Refcounts {
    geometry: Geometry,
    file: Rc<dyn Store>,
    /// The refcount table.
    pub(super) table: Table,
    blocks: RefCell<HashMap<ReftableIndex, Block>>,
    limit: usize,
    clock: Cell<u64>,
    turn: Mutex<()>,
}

/// Proof that nobody else works on the refcounts.
pub(super) type Turn<'a> = Guard<'a, ()>;

impl Refcounts {
    /// `cache` bytes of blocks are kept, four blocks at least.
    pub(super) fn new(geometry: Geometry, file: Rc<dyn Store>, table: Vec<u64>, cache: u64) -> Refcounts {
        Refcounts {
            geometry,
            file,
            table: Table::new(table, geometry.cluster_size()),
            blocks: RefCell::default(),
            limit: usize::try_from(cache >> geometry.cluster_bits).unwrap_or(usize::MAX).max(4),
            clock: Cell::new(0),
            turn: Mutex::new(()),
        }
    }

    /// Waits for the exclusive use of the refcounts.
    pub(super) async fn lock(&self) -> Turn<'_> {
        self.turn.lock().await
    }

    fn block_offset(&self, i: ReftableIndex) -> Result<Option<HostOffset>, Errno> {
        let entry = self.table.at(i.at());
        let at = HostOffset(entry & !super::entry::REFTABLE_RESERVED);
        if entry == 0 {
            return Ok(None);
        }
        let sane = self.geometry.is_host_aligned(at) && at.0 < HOST_OFFSET_LIMIT && at.0 != 0;
        if sane { Ok(Some(at)) } else { Err(Errno::EIO) }
    }

    /// Loads the block above `i`; false where there is none.
    pub(super) async fn load(&self, turn: &Turn<'_>, i: ReftableIndex) -> Result<bool, Errno> {
        let stamp = self.clock.get() + 1;
        self.clock.set(stamp);
        if let Some(b) = self.blocks.borrow_mut().get_mut(&i) {
            b.stamp = stamp;
            return Ok(true);
        }
        let Some(at) = self.block_offset(i)? else { return Ok(false) };
        self.make_room(turn).await?;
        raise(&*self.file, DebugEvent::RefblockLoad).await;
        let (result, bytes) = self.file.read(at.0, Buf::new(self.geometry.cluster_size() as usize)).await;
        result?;
        self.blocks.borrow_mut().insert(i, Block { bytes, dirty: BTreeSet::new(), stamp });
        Ok(true)
    }

    /// Gives the block longest unused away, writing it first if it must be.
    async fn make_room(&self, turn: &Turn<'_>) -> Result<(), Errno> {
        while self.blocks.borrow().len() >= self.limit {
            let oldest = self.blocks.borrow().iter().min_by_key(|(_, b)| b.stamp).map(|(&i, _)| i);
            let Some(i) = oldest else { return Ok(()) };
            if !mutant!("evicted-block") {
                self.write_block(turn, i).await?;
            }
            self.blocks.borrow_mut().remove(&i);
        }
        Ok(())
    }

    async fn write_block(&self, _turn: &Turn<'_>, i: ReftableIndex) -> Result<(), Errno> {
        let Some(at) = self.block_offset(i)? else { return Ok(()) };
        let page = PAGE.min(self.geometry.cluster_size() as usize);
        loop {
            // Runs of neighbouring dirty pages go out as one write.
            let run = {
                let mut blocks = self.blocks.borrow_mut();
                let Some(b) = blocks.get_mut(&i) else { return Ok(()) };
                let Some(first) = b.dirty.pop_first() else { return Ok(()) };
                let mut end = first + 1;
                while b.dirty.remove(&end) {
                    end += 1;
                }
                (first, end, Buf::from_slice(&b.bytes[first * page..end * page]))
            };
            let (first, end, bytes) = run;
            let whole = bytes.len() as u64 == self.geometry.cluster_size();
            let event = if whole { DebugEvent::RefblockUpdate } else { DebugEvent::RefblockUpdatePart };
            raise(&*self.file, event).await;
            if let Err(e) = self.file.write(at.0 + (first * page) as u64, bytes).await {
                if let Some(b) = self.blocks.borrow_mut().get_mut(&i) {
                    b.dirty.extend(first..end);
                }
                return Err(e);
            }
        }
    }

    /// Writes all dirty blocks. They are durable after the next flush of the file.
    pub(super) async fn write_dirty(&self, turn: &Turn<'_>) -> Result<(), Errno> {
        let dirty: Vec<_> =
            self.blocks.borrow().iter().filter(|(_, b)| !b.dirty.is_empty()).map(|(&i, _)| i).collect();
        for i in dirty {
            self.write_block(turn, i).await?;
        }
        Ok(())
    }

    /// Whether something has to be written.
    pub(super) fn is_dirty(&self) -> bool {
        self.table.is_dirty() || self.blocks.borrow().values().any(|b| !b.dirty.is_empty())
    }

    /// The counter of a cluster.
    pub(super) async fn get(&self, turn: &Turn<'_>, c: HostCluster) -> Result<u64, Errno> {
        let g = self.geometry;
        if !self.load(turn, g.reftable_index(c)).await? {
            return Ok(0);
        }
        let blocks = self.blocks.borrow();
        let block = blocks.get(&g.reftable_index(c)).ok_or(Errno::EIO)?;
        refcount::get(&block.bytes, g.refcount_order, g.in_block(c)).ok_or(Errno::EIO)
    }

    /// Sets the counter of a cluster whose block exists.
    pub(super) async fn set(&self, turn: &Turn<'_>, c: HostCluster, value: u64) -> Result<(), Errno> {
        let g = self.geometry;
        if !self.load(turn, g.reftable_index(c)).await? {
            return Err(Errno::EIO);
        }
        let mut blocks = self.blocks.borrow_mut();
        let block = blocks.get_mut(&g.reftable_index(c)).ok_or(Errno::EIO)?;
        if !refcount::set(&mut block.bytes, g.refcount_order, g.in_block(c), value) {
            return Err(Errno::EINVAL);
        }
        let byte = (g.in_block(c).at() << g.refcount_order) / 8;
        block.dirty.insert(byte / PAGE.min(g.cluster_size() as usize));
        Ok(())
    }

    /// Lowers the counters of `n` clusters from `first` by one each. Returns those that became free.
    pub(super) async fn release(
        &self,
        turn: &Turn<'_>,
        first: HostCluster,
        n: u64,
    ) -> Result<Vec<HostCluster>, Errno> {
        let mut free = Vec::new();
        for c in first.0..first.0 + n {
            let c = HostCluster(c);
            let now = self.get(turn, c).await?;
            // A counter of 0 below a reference is damage that was there before; it must not wrap.
            let Some(less) = now.checked_sub(1) else { return Err(Errno::EIO) };
            self.set(turn, c, less).await?;
            if less == 0 {
                free.push(c);
            }
        }
        Ok(free)
    }

    /// The first run of free clusters at or behind `from`: (start, length ≤ `want`, whether its block exists).
    pub(super) async fn find_free(
        &self,
        turn: &Turn<'_>,
        from: HostCluster,
        want: u64,
    ) -> Result<(HostCluster, u64, bool), Errno> {
        let g = self.geometry;
        let mut at = from;
        loop {
            if g.host_offset(at).0 >= HOST_OFFSET_LIMIT {
                return Err(Errno::ENOSPC);
            }
            let i = g.reftable_index(at);
            let end = g.refblock_start(ReftableIndex(i.0 + 1)).0;
            if !self.load(turn, i).await? {
                return Ok((at, want.min(end - at.0), false));
            }
            let blocks = self.blocks.borrow();
            let block = &blocks.get(&i).ok_or(Errno::EIO)?.bytes;
            let free = |c: u64| refcount::get(block, g.refcount_order, g.in_block(HostCluster(c))) == Some(0);
            if let Some(start) = (at.0..end).find(|&c| free(c)) {
                let n = (start..end.min(start + want)).take_while(|&c| free(c)).count();
                return Ok((HostCluster(start), n as u64, true));
            }
            at = HostCluster(end);
        }
    }

    /// Makes a block for the range of `at`, which has none, in the cluster `at` itself, and writes it.
    pub(super) async fn make_block(&self, turn: &Turn<'_>, at: HostCluster) -> Result<(), Errno> {
        self.make_block_at(turn, self.geometry.reftable_index(at), at).await
    }

    /// Makes block `i` in the cluster `at` and writes it. It counts itself if it covers `at`.
    pub(super) async fn make_block_at(
        &self,
        turn: &Turn<'_>,
        i: ReftableIndex,
        at: HostCluster,
    ) -> Result<(), Errno> {
        let g = self.geometry;
        debug_assert!(self.table.at(i.at()) == 0 && i.at() < self.table.len());
        self.make_room(turn).await?;
        let mut bytes = Buf::zeroed(g.cluster_size() as usize);
        if g.reftable_index(at) == i && !refcount::set(&mut bytes, g.refcount_order, g.in_block(at), 1) {
            return Err(Errno::EIO);
        }
        raise(&*self.file, DebugEvent::RefblockAllocWrite).await;
        if !mutant!("new-block-content") {
            self.file.write(g.host_offset(at).0, Buf::from_slice(&bytes)).await?;
        }
        let stamp = self.clock.get();
        self.blocks.borrow_mut().insert(i, Block { bytes, dirty: BTreeSet::new(), stamp });
        // Content first, then the entry: both before any L2 entry that relies on them (rule 2).
        self.table.set(i.at(), g.host_offset(at).0);
        Ok(())
    }

    /// Entries that a refcount table of `clusters` clusters has.
    fn entries(&self, clusters: u64) -> usize {
        (clusters * self.geometry.cluster_size() / 8) as usize
    }

    /// How many clusters the table needs so that `last` is counted; `None` if that exceeds the format's limit.
    pub(super) fn table_clusters_for(&self, last: HostCluster) -> Option<u64> {
        let g = self.geometry;
        let need = ((g.reftable_index(last).0 + 1) * 8).div_ceil(g.cluster_size());
        // A half more, so that growing stays rare.
        let need = (need + need / 2).min(MAX_REFTABLE_BYTES / g.cluster_size()).max(need);
        (need * g.cluster_size() <= MAX_REFTABLE_BYTES).then_some(need)
    }

    /// Takes back what [`Refcounts::grow_table`] added, and the blocks made for it.
    pub(super) fn shrink_table(&self, entries: usize) {
        self.table.resize(entries);
        self.blocks.borrow_mut().retain(|i, _| i.at() < entries);
    }

    /// Lengthens the table in memory to `clusters` clusters.
    pub(super) fn grow_table(&self, clusters: u64) {
        self.table.resize(self.entries(clusters));
    }
}
