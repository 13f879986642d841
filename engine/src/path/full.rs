//! Requests to a node that answers them itself, in pieces that it can take.
//!
//! ```text
//!   write ─► aligned? ── no ─► own the blocks (serial) ─► read head, tail ─► merge ─┐
//!               └─ yes ─────────────────────────────────────────────────────────────┴► pieces ≤ max_transfer ─► submit
//!   zeroes, discard ─► pieces by the node's own alignment and bound ─► submit; what it cannot do is written, or left
//! ```
//!
//! Invariants: a driver sees only offsets and lengths that its own limits allow; a read that fails in a read-modify-write
//! fails the write, and nothing is written; where a node has blocks, writes that overlap in a block wait for each other.

use super::serial::Ticket;
use crate::core::Core;
use crate::debug::{DebugEvent, raise};
use crate::driver::{Flags, Limits, Op, Request};
use crate::error::Errno;
use crate::graph::NodeView;
use crate::mem::Buf;
use std::ops::Range;

/// Zeroes are written in pieces of this size where nothing better is to be had.
const BOUNCE: u64 = 1 << 20;

fn block(limits: &Limits) -> u64 {
    u64::from(limits.request_alignment).max(1)
}

/// The most that one request moves: whole blocks.
fn most(limits: &Limits) -> u64 {
    let align = block(limits);
    let most = u64::from(limits.max_transfer);
    (most - most % align).max(align)
}

/// The whole blocks around a range.
fn around(range: &Range<u64>, align: u64) -> Result<Range<u64>, Errno> {
    let end = range.end.checked_next_multiple_of(align).ok_or(Errno::EINVAL)?;
    Ok(range.start - range.start % align..end)
}

/// Fills the buffer from `off`.
pub(super) async fn read(view: &NodeView, off: u64, buf: Buf) -> (Result<(), Errno>, Buf) {
    let range = off..off + buf.len() as u64;
    let blocks = match around(&range, block(&view.driver.limits())) {
        Ok(b) => b,
        Err(e) => return (Err(e), buf),
    };
    if blocks == range {
        return read_blocks(view, off, buf).await;
    }
    let (result, all) =
        read_blocks(view, blocks.start, Buf::zeroed((blocks.end - blocks.start) as usize)).await;
    let mut buf = buf;
    if result.is_ok() {
        let skip = (off - blocks.start) as usize;
        let n = buf.len();
        buf.copy_from_slice(&all[skip..skip + n]);
    }
    (result, buf)
}

/// Reads whole blocks, as much at a time as the node takes.
async fn read_blocks(view: &NodeView, off: u64, mut buf: Buf) -> (Result<(), Errno>, Buf) {
    let most = most(&view.driver.limits()) as usize;
    if buf.len() <= most {
        return moved(view, Op::Read, off, buf, Flags::NONE).await;
    }
    let mut at = 0;
    while at < buf.len() {
        let n = most.min(buf.len() - at);
        let (result, piece) = moved(view, Op::Read, off + at as u64, Buf::new(n), Flags::NONE).await;
        if let Err(e) = result {
            return (Err(e), buf);
        }
        buf[at..at + n].copy_from_slice(&piece);
        at += n;
    }
    (Ok(()), buf)
}

/// One request that moves data.
async fn moved(view: &NodeView, op: Op, offset: u64, buf: Buf, flags: Flags) -> (Result<(), Errno>, Buf) {
    let (n, len) = (buf.len(), buf.len() as u64);
    let (result, mut req) = view.driver.submit(Request { op, offset, len, flags, buf: Some(buf) }).await;
    (result, req.buf.take().unwrap_or_else(|| Buf::new(n)))
}

/// Writes the buffer at `off`.
pub(super) async fn write(
    core: &Core,
    view: &NodeView,
    off: u64,
    buf: Buf,
    flags: Flags,
) -> (Result<(), Errno>, Buf) {
    let range = off..off + buf.len() as u64;
    let align = block(&view.driver.limits());
    let blocks = match around(&range, align) {
        Ok(b) => b,
        Err(e) => return (Err(e), buf),
    };
    let _ours = own(view, &blocks, align).await;
    if blocks == range {
        raise(core, view.id, DebugEvent::Pwritev).await;
        let (result, buf) = write_blocks(view, off, buf, flags).await;
        raise(core, view.id, DebugEvent::PwritevDone).await;
        return (result, buf);
    }
    let (result, mut all) = edges(core, view, &range, &blocks).await;
    if let Err(e) = result {
        return (Err(e), buf);
    }
    let skip = (off - blocks.start) as usize;
    all[skip..skip + buf.len()].copy_from_slice(&buf);
    raise(core, view.id, DebugEvent::Pwritev).await;
    let result = write_blocks(view, blocks.start, all, flags).await.0;
    raise(core, view.id, DebugEvent::PwritevDone).await;
    (result, buf)
}

/// Where a node has blocks, a writer owns those that it touches: one that is being read and written back must not change.
async fn own(view: &NodeView, blocks: &Range<u64>, align: u64) -> Option<Ticket> {
    if align > 1 { Some(view.serial.reserve(blocks.clone()).await) } else { None }
}

/// Reads what an unaligned write keeps of its first and its last block.
async fn edges(
    core: &Core,
    view: &NodeView,
    range: &Range<u64>,
    blocks: &Range<u64>,
) -> (Result<(), Errno>, Buf) {
    let align = block(&view.driver.limits());
    let mut all = Buf::zeroed((blocks.end - blocks.start) as usize);
    let (head, tail) = (range.start > blocks.start, range.end < blocks.end);
    let len = blocks.end - blocks.start;
    // both edges in one block, or in two that follow each other: one read
    let together = len == align || head && tail && len == 2 * align;
    if head || together {
        let n = if together { len } else { align };
        for (is, event) in
            [(head, DebugEvent::PwritevRmwHead), (tail && together, DebugEvent::PwritevRmwTail)]
        {
            if is {
                raise(core, view.id, event).await;
            }
        }
        let (result, got) = read_blocks(view, blocks.start, Buf::zeroed(n as usize)).await;
        if let Err(e) = result {
            return (Err(e), all);
        }
        all[..n as usize].copy_from_slice(&got);
        for (is, event) in
            [(head, DebugEvent::PwritevRmwAfterHead), (tail && together, DebugEvent::PwritevRmwAfterTail)]
        {
            if is {
                raise(core, view.id, event).await;
            }
        }
    }
    if tail && !together {
        raise(core, view.id, DebugEvent::PwritevRmwTail).await;
        let (result, got) = read_blocks(view, blocks.end - align, Buf::zeroed(align as usize)).await;
        if let Err(e) = result {
            return (Err(e), all);
        }
        let at = (len - align) as usize;
        all[at..].copy_from_slice(&got);
        raise(core, view.id, DebugEvent::PwritevRmwAfterTail).await;
    }
    (Ok(()), all)
}

/// Writes whole blocks, as much at a time as the node takes.
async fn write_blocks(view: &NodeView, off: u64, buf: Buf, flags: Flags) -> (Result<(), Errno>, Buf) {
    let most = most(&view.driver.limits()) as usize;
    if buf.len() <= most {
        return moved(view, Op::Write, off, buf, flags).await;
    }
    let mut at = 0;
    while at < buf.len() {
        let n = most.min(buf.len() - at);
        let piece = Buf::from_slice(&buf[at..at + n]);
        if let Err(e) = moved(view, Op::Write, off + at as u64, piece, flags).await.0 {
            return (Err(e), buf);
        }
        at += n;
    }
    (Ok(()), buf)
}

/// The pieces of a range: none crosses the edge of a piece of `align` bytes unless both its ends are on one, and none is
/// longer than `most`.
struct Pieces {
    rest: Range<u64>,
    align: u64,
    most: u64,
}

impl Pieces {
    fn of(range: Range<u64>, align: u32, most: u64) -> Pieces {
        let align = u64::from(align).max(1);
        let most = if most == 0 { u64::MAX } else { most };
        Pieces { rest: range, align, most: (most - most % align).max(align) }
    }
}

impl Iterator for Pieces {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let Range { start, end } = self.rest;
        if start >= end {
            return None;
        }
        let edge = start.next_multiple_of(self.align);
        let stop = if edge > start { edge.min(end) } else { start.saturating_add(self.most).min(end) };
        let whole = stop - (stop - start) % self.align;
        let stop = if edge > start || whole == start { stop } else { whole };
        self.rest.start = stop;
        Some(start..stop)
    }
}

/// Makes a range read as zeroes: by the driver where it can, otherwise by writing them.
pub(super) async fn zeroes(
    core: &Core,
    view: &NodeView,
    range: Range<u64>,
    flags: Flags,
) -> Result<(), Errno> {
    let limits = view.driver.limits();
    let align = block(&limits);
    let blocks = around(&range, align)?;
    let inner = range.start.next_multiple_of(align).min(range.end)..(range.end - range.end % align);
    // edges of blocks are read, changed and written back
    if blocks != range {
        if inner.start >= inner.end {
            return write(
                core,
                view,
                range.start,
                Buf::zeroed((range.end - range.start) as usize),
                Flags::NONE,
            )
            .await
            .0;
        }
        for edge in [range.start..inner.start, inner.end..range.end] {
            if edge.start < edge.end {
                let buf = Buf::zeroed((edge.end - edge.start) as usize);
                write(core, view, edge.start, buf, Flags::NONE).await.0?;
            }
        }
    }
    let _ours = own(view, &inner, align).await;
    raise(core, view.id, DebugEvent::PwritevZero).await;
    let result = zero_blocks(view, &limits, inner, flags).await;
    raise(core, view.id, DebugEvent::PwritevDone).await;
    result
}

async fn zero_blocks(view: &NodeView, limits: &Limits, range: Range<u64>, flags: Flags) -> Result<(), Errno> {
    let unit = limits.zero_alignment.max(limits.request_alignment).max(1);
    for piece in Pieces::of(range, unit, limits.max_zero) {
        let len = piece.end - piece.start;
        let whole = len.is_multiple_of(u64::from(unit)) || unit == limits.request_alignment.max(1);
        let done = match whole {
            true => {
                let (op, offset) = (Op::WriteZeroes, piece.start);
                view.driver.submit(Request { op, offset, len, flags, buf: None }).await.0
            }
            false => Err(Errno::ENOTSUP),
        };
        match done {
            Err(Errno::ENOTSUP) if !flags.no_fallback => write_zeroes(view, piece).await?,
            other => other?,
        }
    }
    Ok(())
}

async fn write_zeroes(view: &NodeView, range: Range<u64>) -> Result<(), Errno> {
    let step = most(&view.driver.limits()).min(BOUNCE.next_multiple_of(block(&view.driver.limits())));
    let mut at = range.start;
    while at < range.end {
        let n = (range.end - at).min(step);
        write_blocks(view, at, Buf::zeroed(n as usize), Flags::NONE).await.0?;
        at += n;
    }
    Ok(())
}

/// Advice that a range is not needed: what is not whole blocks is left alone, and what is not whole units comes apart from
/// what is.
pub(super) async fn discard(view: &NodeView, range: Range<u64>) -> Result<(), Errno> {
    let limits = view.driver.limits();
    let unit = limits.discard_alignment.max(limits.request_alignment).max(1);
    let align = block(&limits);
    let whole = range.start.next_multiple_of(align)..range.end - range.end % align;
    if whole.start >= whole.end {
        return Ok(());
    }
    let _ours = own(view, &whole, align).await;
    for piece in Pieces::of(whole, unit, limits.max_discard) {
        let (op, offset, len) = (Op::Discard, piece.start, piece.end - piece.start);
        match view.driver.submit(Request { op, offset, len, flags: Flags::NONE, buf: None }).await.0 {
            Err(Errno::ENOTSUP) => {}
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Pieces;

    /// Goal: pieces cover the range, keep to the alignment where they can, and to the bound. Method: a table.
    #[test]
    fn pieces() {
        let of = |range: std::ops::Range<u64>, align, most| {
            Pieces::of(range, align, most).map(|p| (p.start, p.end)).collect::<Vec<_>>()
        };
        assert_eq!(of(0..10, 1, 0), [(0, 10)]);
        assert_eq!(of(0..10, 1, 4), [(0, 4), (4, 8), (8, 10)]);
        assert_eq!(of(3..21, 8, 0), [(3, 8), (8, 16), (16, 21)]);
        assert_eq!(of(8..40, 8, 16), [(8, 24), (24, 40)]);
        assert_eq!(of(9..12, 8, 16), [(9, 12)]);
        assert_eq!(of(8..40, 8, 20), [(8, 24), (24, 40)]);
        assert_eq!(of(5..5, 8, 20), []);
    }
}
