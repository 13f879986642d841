//! A guest: random requests to a part of a root, with everything it reads checked against an [`Oracle`].
//!
//! Several guests share one oracle; each writes to sectors of its own, which need not be aligned to anything, so that
//! guests on different cores meet in clusters, tables and blocks. Besides, all of them change the oracle's wild sectors and
//! read everywhere; there, only values that were never written to the sector are wrong.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Oracle, Rng, SECTOR};
use crate::driver::Flags;
use crate::error::Errno;
use crate::mem::Buf;
use crate::path::Root;

/// What a guest does. Weights are relative to each other.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The sectors it owns.
    pub sectors: Range<usize>,
    /// Requests, one after another.
    pub requests: u32,
    /// Sectors of one request, at most.
    pub longest: u64,
    /// Half of all requests begin and end at multiples of this many sectors.
    pub block: usize,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Write-zeroes, half of them with permission to unmap.
    pub zeroes: u64,
    /// Discards.
    pub discards: u64,
    /// Flushes.
    pub flushes: u64,
    /// Whether requests may fail with `EIO` and `ENOSPC`. Otherwise any error ends the run.
    pub faults: bool,
}

impl Guest {
    /// The mixture of the crash harness: of changes, 75 % writes, 13 % zeroes, 12 % discards (reference, 1b.2).
    pub fn new(sectors: Range<usize>, requests: u32) -> Guest {
        Guest {
            sectors,
            requests,
            longest: 48,
            block: 1,
            reads: 60,
            writes: 75,
            zeroes: 13,
            discards: 12,
            flushes: 8,
            faults: false,
        }
    }

    fn judge(&self, what: &str, result: Result<(), Errno>) -> bool {
        match result {
            Ok(()) => true,
            Err(e) if self.faults && super::oracle::is_injected(e) => false,
            Err(e) => panic!("{what}: {e}"),
        }
    }

    /// Runs it on the calling core.
    pub async fn run(&self, root: Root, oracle: &Arc<Mutex<Oracle>>, mut rng: Rng) {
        let all = self.reads + self.writes + self.zeroes + self.discards + self.flushes;
        for _ in 0..self.requests {
            let wild = lock(oracle).wild();
            let everything = 0..lock(oracle).len();
            if rng.chance(100) {
                let range = self.part(&everything, &mut rng);
                self.peek(root, oracle, range).await;
            }
            let of = if rng.chance(250) && !wild.is_empty() { &wild } else { &self.sectors };
            let range = self.part(of, &mut rng);
            let mut choice = rng.below(all);
            let mut is = |weight: u64| {
                let hit = choice < weight;
                choice = choice.wrapping_sub(weight);
                hit
            };
            if is(self.reads) {
                self.read(root, oracle, range).await;
            } else if is(self.writes) {
                self.write(root, oracle, range, rng.chance(50)).await;
            } else if is(self.zeroes) {
                self.zero(root, oracle, range, rng.chance(500)).await;
            } else if is(self.discards) {
                self.discard(root, oracle, range).await;
            } else {
                self.flush(root, oracle).await;
            }
        }
        self.read(root, oracle, self.sectors.clone()).await;
    }

    fn part(&self, of: &Range<usize>, rng: &mut Rng) -> Range<usize> {
        let first = of.start + rng.below((of.end - of.start) as u64) as usize;
        let n = 1 + rng.below(self.longest.min((of.end - first) as u64));
        let range = first..first + n as usize;
        if self.block > 1 && rng.chance(500) {
            let whole = range.start - range.start % self.block..range.end.next_multiple_of(self.block);
            return whole.start.max(of.start)..whole.end.min(of.end);
        }
        range
    }

    async fn peek(&self, root: Root, oracle: &Arc<Mutex<Oracle>>, range: Range<usize>) {
        let (result, buf) =
            root.read(range.start as u64 * SECTOR, Buf::new(range.len() * SECTOR as usize)).await;
        if self.judge("read", result) {
            let checked = lock(oracle).check_any(range.start, &buf);
            checked.unwrap_or_else(|e| panic!("read beside writers: {e}"));
        }
    }

    async fn read(&self, root: Root, oracle: &Arc<Mutex<Oracle>>, range: Range<usize>) {
        let (result, buf) =
            root.read(range.start as u64 * SECTOR, Buf::new(range.len() * SECTOR as usize)).await;
        if self.judge("read", result) {
            let checked = lock(oracle).check_read(range.start, &buf);
            checked.unwrap_or_else(|e| panic!("read: {e}"));
        }
    }

    async fn write(&self, root: Root, oracle: &Arc<Mutex<Oracle>>, range: Range<usize>, fua: bool) {
        let mut buf = Buf::new(range.len() * SECTOR as usize);
        let stamp = lock(oracle).write(range.start, &mut buf);
        let flags = Flags { fua, ..Flags::NONE };
        let (result, _) = root.write(range.start as u64 * SECTOR, buf, flags).await;
        let ok = self.judge("write", result);
        match fua {
            true => lock(oracle).wrote_through(range, stamp, ok),
            false => lock(oracle).wrote(range, stamp, ok),
        }
    }

    async fn zero(&self, root: Root, oracle: &Arc<Mutex<Oracle>>, range: Range<usize>, may_unmap: bool) {
        let stamp = lock(oracle).zero(range.clone());
        let (off, len) = (range.start as u64 * SECTOR, range.len() as u64 * SECTOR);
        let result = root.write_zeroes(off, len, Flags { may_unmap, ..Flags::NONE }).await;
        let ok = self.judge("write zeroes", result);
        lock(oracle).wrote(range, stamp, ok);
    }

    async fn discard(&self, root: Root, oracle: &Arc<Mutex<Oracle>>, range: Range<usize>) {
        let stamp = lock(oracle).zero(range.clone());
        let (off, len) = (range.start as u64 * SECTOR, range.len() as u64 * SECTOR);
        self.judge("discard", root.discard(off, len).await);
        // advice: parts of clusters keep what they had
        lock(oracle).wrote(range, stamp, false);
    }

    async fn flush(&self, root: Root, oracle: &Arc<Mutex<Oracle>>) {
        let flush = lock(oracle).flush();
        if self.judge("flush", root.flush().await) {
            lock(oracle).flushed(flush);
        }
    }
}

/// The oracle, whoever had it before.
pub fn lock(oracle: &Mutex<Oracle>) -> MutexGuard<'_, Oracle> {
    oracle.lock().unwrap_or_else(|e| e.into_inner())
}
