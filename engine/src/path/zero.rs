//! Zeroing, discarding and flushing a node.

use std::ops::Range;

use super::full;
use super::read::on_owner;
use super::write::write_node;
use crate::core::Core;
use crate::debug::{DebugEvent, raise};
use crate::driver::{Access, Extents, Flags, Kind, LocalFuture, Lookup, Op, Punch, Request, Target};
use crate::error::Errno;
use crate::graph::{NodeId, NodeView};
use crate::mem::Buf;
use std::sync::Arc;

/// Zeroes are written in pieces of this size where nothing better is to be had.
const BOUNCE: u64 = 1 << 20;

fn node(core: &Core, id: NodeId) -> Result<Arc<NodeView>, Errno> {
    core.view.borrow().node(id).cloned()
}

/// Makes a range read as zeroes.
pub(crate) fn zeroes_node(
    id: NodeId,
    off: u64,
    len: u64,
    flags: Flags,
) -> LocalFuture<'static, Result<(), Errno>> {
    Box::pin(async move {
        let core = Core::current();
        let view = node(&core, id)?;
        let range = off..off.checked_add(len).ok_or(Errno::EINVAL)?;
        let flags = Flags { may_unmap: flags.may_unmap && view.flags.discard, ..flags };
        let inner = Flags { fua: false, ..flags };
        match view.driver.kind() {
            Kind::Map(_) if view.has_owner => zeroes_owner(&core, &view, range, inner).await?,
            Kind::Map(_) => {
                for (child, r) in translate(&core, &view, range)? {
                    zeroes_node(child, r.start, r.end - r.start, inner).await?;
                }
            }
            Kind::Full => full::zeroes(&core, &view, range, inner).await?,
            Kind::Leaf(_) => {
                let req = Request { op: Op::WriteZeroes, offset: off, len, flags: inner, buf: None };
                match submit(&core, &view, req).await {
                    Err(Errno::ENOTSUP) if !flags.no_fallback => write_zeroes(id, range).await?,
                    other => other?,
                }
            }
        }
        if flags.fua { flush_node(id).await } else { Ok(()) }
    })
}

/// Whole clusters by the owner, edges as ordinary writes.
async fn zeroes_owner(core: &Core, view: &NodeView, range: Range<u64>, flags: Flags) -> Result<(), Errno> {
    let align = u64::from(view.driver.limits().punch_alignment);
    let size = view.driver.size();
    let start = range.start.next_multiple_of(align).min(range.end);
    let end = if range.end == size { range.end } else { (range.end - range.end % align).max(start) };
    if range.start < start {
        zero_edge(core, view, range.start..start).await?;
    }
    if start < end {
        let (middle, kind) = (start..end, Punch::Zero { unmap: flags.may_unmap });
        let punch = middle.clone();
        let done = on_owner(core, view.home, view.id, move |owner| {
            Box::pin(async move { owner.punch(punch, kind).await })
        });
        match done.await {
            Err(Errno::ENOTSUP) if !flags.no_fallback => write_zeroes(view.id, middle).await?,
            other => other?,
        }
    }
    if end < range.end {
        zero_edge(core, view, end..range.end).await?;
    }
    Ok(())
}

/// Part of a cluster: nothing to do if it reads as zeroes already, otherwise written.
async fn zero_edge(core: &Core, view: &NodeView, range: Range<u64>) -> Result<(), Errno> {
    if let Kind::Map(map) = view.driver.kind() {
        let mut out = Extents::new();
        let hit = map.lookup(Access::Read, range.clone(), &mut out) == Lookup::Hit;
        let zero = |e: &crate::driver::Extent| matches!(e.target, Target::Zero { .. } | Target::Hole { .. });
        if hit && out.covered() >= range.end - range.start && out.as_slice().iter().all(zero) {
            return Ok(());
        }
    }
    let _ = core;
    write_zeroes(view.id, range).await
}

async fn write_zeroes(id: NodeId, range: Range<u64>) -> Result<(), Errno> {
    let mut at = range.start;
    let mut buf = Buf::zeroed((range.end - range.start).min(BOUNCE) as usize);
    while at < range.end {
        buf.set_len((range.end - at).min(BOUNCE) as usize);
        let n = buf.len() as u64;
        let (result, back) = write_node(id, at, buf, Flags::NONE).await;
        result?;
        buf = back;
        at += n;
    }
    Ok(())
}

/// The children and ranges that a format without a write side (`raw`) translates a range to.
fn translate(core: &Core, view: &NodeView, range: Range<u64>) -> Result<Vec<(NodeId, Range<u64>)>, Errno> {
    let _ = core;
    let Kind::Map(map) = view.driver.kind() else {
        return Err(Errno::EIO);
    };
    let (mut at, mut list) = (range.start, Vec::new());
    while at < range.end {
        let mut out = Extents::new();
        match map.lookup(Access::Write, at..range.end, &mut out) {
            Lookup::Hit => {}
            Lookup::Bad(e) => return Err(e),
            Lookup::Miss(_) | Lookup::NeedsClaim { .. } => return Err(Errno::EIO),
        }
        for e in out.as_slice() {
            if let Target::Data { child, off } = e.target {
                list.push((view.child(child)?, off..off + e.len));
            }
            at += e.len;
        }
    }
    Ok(list)
}

/// Tells a node that a range is not needed. Ignored unless the node passes discards on.
pub(crate) fn discard_node(id: NodeId, off: u64, len: u64) -> LocalFuture<'static, Result<(), Errno>> {
    Box::pin(async move {
        let core = Core::current();
        let view = node(&core, id)?;
        if !view.flags.discard || len == 0 {
            return Ok(());
        }
        let end = off.checked_add(len).ok_or(Errno::EINVAL)?;
        match view.driver.kind() {
            Kind::Map(_) if view.has_owner => {
                let align = u64::from(view.driver.limits().punch_alignment);
                let start = off.next_multiple_of(align);
                let stop = if end == view.driver.size() { end } else { end - end % align };
                if start >= stop {
                    return Ok(());
                }
                let punch = on_owner(&core, view.home, id, move |owner| {
                    Box::pin(async move { owner.punch(start..stop, Punch::Discard).await })
                });
                ignore_unsupported(punch.await)
            }
            Kind::Map(_) => {
                for (child, r) in translate(&core, &view, off..end)? {
                    discard_node(child, r.start, r.end - r.start).await?;
                }
                Ok(())
            }
            Kind::Full => full::discard(&view, off..end).await,
            Kind::Leaf(_) => {
                let req = Request { op: Op::Discard, offset: off, len, flags: Flags::NONE, buf: None };
                ignore_unsupported(submit(&core, &view, req).await)
            }
        }
    })
}

/// Makes a range of a leaf read as zeroes, where the host can without writing: `ENOTSUP` says that it cannot.
pub(super) async fn zero_leaf(
    core: &Core,
    view: &NodeView,
    range: Range<u64>,
    may_unmap: bool,
) -> Result<(), Errno> {
    let flags = Flags { may_unmap: may_unmap && view.flags.discard, ..Flags::NONE };
    let (offset, len) = (range.start, range.end - range.start);
    submit(core, view, Request { op: Op::WriteZeroes, offset, len, flags, buf: None }).await
}

/// Zeroes or discards on a leaf, whose blocks may be read and written back around it: the change waits for those
/// that overlap, and its pin makes later ones wait for it (see [`super::serial`]).
async fn submit(core: &Core, view: &NodeView, req: Request) -> Result<(), Errno> {
    let range = req.offset..req.offset.checked_add(req.len).ok_or(Errno::EINVAL)?;
    loop {
        view.serial.wait_free(range.clone()).await;
        // no await between this test and the pin
        if !view.serial.is_busy(&range) {
            let _pin = core.pin();
            return view.driver.submit(req).await.0;
        }
    }
}

fn ignore_unsupported(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::ENOTSUP) => Ok(()),
        other => other,
    }
}

/// Makes everything written to a node durable.
pub(crate) fn flush_node(id: NodeId) -> LocalFuture<'static, Result<(), Errno>> {
    Box::pin(async move {
        let core = Core::current();
        let view = node(&core, id)?;
        let below = view.children.first().copied().flatten();
        if let Some(child) = below {
            raise(&core, child, DebugEvent::FlushToOs).await;
            if !view.has_owner {
                raise(&core, child, DebugEvent::FlushToDisk).await;
            }
        }
        match view.driver.kind() {
            Kind::Map(_) if view.has_owner => {
                // with no-flush the owner still writes its tables back; its child's flushes go nowhere
                on_owner(&core, view.home, id, |owner| Box::pin(async move { owner.flush().await })).await
            }
            Kind::Map(_) => match below {
                Some(child) if !view.flags.no_flush => flush_node(child).await,
                _ => Ok(()),
            },
            Kind::Leaf(_) | Kind::Full if view.flags.no_flush || view.flags.read_only => Ok(()),
            Kind::Leaf(_) | Kind::Full => {
                let req = Request { op: Op::Flush, offset: 0, len: 0, flags: Flags::NONE, buf: None };
                view.driver.submit(req).await.0
            }
        }
    })
}
