//! Clients: random requests, each written down with its times and what it found.

use std::rc::Rc;
use std::sync::Arc;

use ringblock_engine::driver::Flags;
use ringblock_engine::error::Errno;
use ringblock_engine::host::sim::{Rng, is_injected};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;

use super::history::{Clock, Fate, Grid, Kind, Op};
use super::shape::{Mix, Shape};

/// A request to make.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    /// What.
    pub(super) kind: Kind,
    /// The first cell.
    pub(super) first: u32,
    /// Number of cells.
    pub(super) count: u32,
    /// Byte offset: in the margin before the first cell, or where it begins.
    pub(super) off: u64,
    /// Bytes.
    pub(super) len: u64,
    /// With FUA.
    pub(super) fua: bool,
    /// Zeroing may unmap.
    pub(super) unmap: bool,
}

/// The next request.
pub(super) fn draw(grid: &Grid, mix: &Mix, rng: &mut Rng) -> Request {
    let mut choice = rng.below(mix.reads + mix.writes + mix.zeroes + mix.discards + mix.flushes);
    let mut is = |weight: u64| {
        let hit = choice < weight;
        choice = choice.wrapping_sub(weight);
        hit
    };
    let kind = if is(mix.reads) {
        Kind::Read
    } else if is(mix.writes) {
        Kind::Write
    } else if is(mix.zeroes) {
        if rng.chance(300) { Kind::WriteZeroBuffer } else { Kind::Zero }
    } else if is(mix.discards) {
        Kind::Discard
    } else {
        Kind::Flush
    };
    // half of them meet in a small place
    let place = if rng.chance(500) { grid.cells.min(48) } else { grid.cells };
    let shift = if rng.chance(500) { grid.cells - place } else { 0 };
    let first = shift + rng.below(u64::from(place)) as u32;
    let most = u64::from(mix.longest.min(grid.cells - first));
    let most = if rng.chance(600) { most.min(4) } else { most };
    let count = 1 + rng.below(most) as u32;
    let (off, len) = grid.bytes(first, count);
    let (before, after) = (rng.below(grid.margin + 1), rng.below(grid.margin + 1));
    let (fua, unmap) = (rng.chance(mix.fua), rng.chance(500));
    Request { kind, first, count, off: off - before, len: before + len + after, fua, unmap }
}

/// One client on a core.
pub(super) struct Client {
    /// Its number.
    pub(super) index: u32,
    /// What it works on, and how.
    pub(super) shape: Arc<Shape>,
    /// The root.
    pub(super) root: Root,
    /// The time.
    pub(super) clock: Arc<Clock>,
    /// Requests.
    pub(super) requests: u64,
}

impl Client {
    /// Makes its requests, one after another. An error is one that no fault explains.
    pub(super) async fn run(self, mut rng: Rng) -> Result<Vec<Op>, String> {
        let mut ops = Vec::with_capacity(self.requests as usize);
        let grid = self.shape.grid;
        for _ in 0..self.requests {
            let request = draw(&grid, &self.shape.mix, &mut rng);
            ops.push(perform(self.root, &grid, &self.clock, self.index, request, self.shape.failing).await?);
        }
        Ok(ops)
    }
}

/// Makes one request and writes it down.
pub(super) async fn perform(
    root: Root,
    grid: &Grid,
    clock: &Clock,
    client: u32,
    r: Request,
    failing: bool,
) -> Result<Op, String> {
    let id = clock.tick();
    let mut buf = Buf::new(if r.kind == Kind::Read || r.kind == Kind::Write { r.len as usize } else { 0 });
    let flags = Flags { fua: r.fua, ..Flags::NONE };
    let zeroing = Flags { may_unmap: r.unmap, ..flags };
    let result = match r.kind {
        Kind::Read => {
            let (result, back) = root.read(r.off, buf).await;
            buf = back;
            result
        }
        Kind::Write => {
            grid.fill(id, r.off, &mut buf);
            root.write(r.off, std::mem::replace(&mut buf, Buf::new(0)), flags).await.0
        }
        Kind::WriteZeroBuffer => root.write(r.off, Buf::zeroed(r.len as usize), flags).await.0,
        Kind::Zero => root.write_zeroes(r.off, r.len, zeroing).await,
        Kind::Discard => root.discard(r.off, r.len).await,
        Kind::Flush => root.flush().await,
    };
    let end = clock.tick();
    let fate = judge(result, failing).map_err(|e| format!("client {client}: {r:?}: {e}"))?;
    let (mut found, mut bad) = (Box::default(), Vec::new());
    if r.kind == Kind::Read && fate == Fate::Done {
        found = grid.decode(r.first, r.count, r.off, &buf, &mut bad);
    }
    Ok(Op { id, end, client, kind: r.kind, first: r.first, count: r.count, fate, found, bad })
}

fn judge(result: Result<(), Errno>, failing: bool) -> Result<Fate, Errno> {
    match result {
        Ok(()) => Ok(Fate::Done),
        Err(e) if failing && is_injected(e) => Ok(Fate::Failed),
        Err(e) => Err(e),
    }
}

/// Reads every cell.
pub(super) async fn read_all(
    root: Root,
    grid: &Grid,
    clock: &Clock,
    ops: &mut Vec<Op>,
) -> Result<(), String> {
    let mut first = 0;
    while first < grid.cells {
        let count = (grid.cells - first).min(512);
        let (off, len) = grid.bytes(first, count);
        let r = Request { kind: Kind::Read, first, count, off, len, fua: false, unmap: false };
        ops.push(perform(root, grid, clock, u32::MAX, r, false).await?);
        first += count;
    }
    Ok(())
}

/// Says "enough" to a task of the same core.
pub(super) type Stop = Rc<std::cell::Cell<bool>>;
