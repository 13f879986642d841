//! Freed clusters on their way back: nobody may reuse one while the disk or a transfer in flight may still need it (I4).
//!
//! Invariants: a cluster's counter is lowered only after (1) the table that no longer names it is durable and (2) an
//! epoch barrier has passed since it was unlinked; (1) is skipped for clusters that no table ever named.
//!
//! ```text
//! unlink in memory ─► pending ─► in the group being written ─► durable ─► tick ─► [discard in the file] ─► counter - 1
//! ```

use std::rc::Rc;

use ringblock_engine::debug::DebugEvent;
use ringblock_engine::mutant;

use super::geometry::HostCluster;
use super::owner::Image;

/// Clusters in a row: first and how many.
type Freed = (u64, u64);

/// The clusters between their last use and their next.
#[derive(Default)]
pub(super) struct Limbo {
    pending: Vec<Freed>,
    durable: Vec<Freed>,
    reaping: bool,
}

/// Adds clusters, as part of the last run where they follow it.
fn add(list: &mut Vec<Freed>, first: HostCluster, count: u64) {
    match list.last_mut() {
        Some((start, n)) if *start + *n == first.0 => *n += count,
        _ => list.push((first.0, count)),
    }
}

impl Limbo {
    /// The entry that named these clusters was changed in memory.
    pub(super) fn unlinked(&mut self, first: HostCluster, count: u64) {
        let list = if mutant!("limbo-durable") { &mut self.durable } else { &mut self.pending };
        add(list, first, count);
    }

    /// No table on disk names these clusters.
    pub(super) fn durable(&mut self, first: HostCluster, count: u64) {
        add(&mut self.durable, first, count);
    }

    /// What was unlinked so far: it becomes durable with the group of writes that starts now.
    pub(super) fn take_pending(&mut self) -> Vec<Freed> {
        std::mem::take(&mut self.pending)
    }

    /// The group of writes failed: still pending.
    pub(super) fn put_back(&mut self, mut list: Vec<Freed>) {
        list.append(&mut self.pending);
        self.pending = list;
    }

    /// The group of writes is durable.
    pub(super) fn settle(&mut self, mut list: Vec<Freed>) {
        self.durable.append(&mut list);
    }

    /// Number of runs waiting for a group of writes.
    pub(super) fn pending_runs(&self) -> usize {
        self.pending.len()
    }

    /// Whether unlinked clusters wait for a group of writes.
    pub(super) fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }
}

impl Image {
    /// Starts a background task that frees what is durable, unless one runs.
    pub(super) fn reap_soon(self: &Rc<Self>) {
        let mut limbo = self.limbo.borrow_mut();
        if limbo.reaping || limbo.durable.is_empty() || self.poisoned().is_err() {
            return;
        }
        limbo.reaping = true;
        drop(limbo);
        let image = self.clone();
        self.runtime.spawn(Box::pin(async move {
            image.reap().await;
        }));
    }

    /// Frees what is durable, until nothing is left.
    pub(super) async fn reap(self: &Rc<Self>) {
        loop {
            let batch = std::mem::take(&mut self.limbo.borrow_mut().durable);
            if batch.is_empty() || self.poisoned().is_err() {
                break;
            }
            if !mutant!("limbo-tick") {
                self.runtime.tick().await;
            }
            for (first, count) in batch {
                self.free_run(HostCluster(first), count).await;
            }
        }
        self.limbo.borrow_mut().reaping = false;
        self.reaped.notify();
    }

    /// Waits until no reaping task runs.
    pub(super) async fn reap_all(self: &Rc<Self>) {
        loop {
            self.reap_soon();
            if !self.limbo.borrow().reaping {
                return;
            }
            self.reaped.wait().await;
        }
    }

    /// Lowers the counters of a run and tells the file about what became free.
    async fn free_run(self: &Rc<Self>, first: HostCluster, count: u64) {
        self.event(DebugEvent::ClusterFree).await;
        let turn = self.refcounts.lock().await;
        match self.refcounts.release(&turn, first, count).await {
            Ok(free) => {
                if self.packing_in.get().is_some_and(|c| free.contains(&c)) && !mutant!("packing-ends") {
                    self.packing_in.set(None);
                }
                if mutant!("discard-under-lock") {
                    drop(turn);
                }
                if self.options.pass_discard {
                    self.discard_free(&free).await;
                }
                let mut alloc = self.alloc.borrow_mut();
                free.iter().for_each(|&c| alloc.freed(c));
            }
            // The counters stay too high: a leak, which does no harm.
            Err(_) => self.leaked.set(self.leaked.get() + count),
        }
    }

    /// Discards free clusters in the file, before the lock that keeps them from being handed out is given up.
    async fn discard_free(&self, free: &[HostCluster]) {
        let g = self.geometry;
        let mut list: Vec<Freed> = Vec::new();
        free.iter().for_each(|&c| add(&mut list, c, 1));
        for (first, n) in list {
            // Advice: a file that cannot do it keeps the space.
            let _ = self.file.discard(g.host_offset(HostCluster(first)).0, n << g.cluster_bits).await;
        }
    }
}
