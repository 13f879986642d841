//! Writes: in place where every byte may be overwritten, otherwise claim → copy-on-write → transfer → commit.
//!
//! ```text
//!   resolve(Write) ─► in place ─────────────────────────────► transfer
//!        └ Claim ─► home: claim ─► [head | data | tail] ─► transfer ─► home: commit   (publish after data, I2)
//!                                                          └ failed ─► home: abort
//! ```

use super::full;
use super::read::{leaf_read, on_owner, read_node};
use super::resolve::{Plan, Stop, Via};
use super::zero::{flush_node, zero_leaf};
use crate::core::Core;
use crate::debug::{DebugEvent, raise};
use crate::driver::{Access, Flags, Grant, Kind, Leaf, LocalFuture};
use crate::epoch::Pin;
use crate::error::Errno;
use crate::graph::{DetectZeroes, NodeId};
use crate::mem::Buf;
use crate::mutant;
use crate::ring::{self, Dir};
use crate::timer::Sleep;

/// Writes the buffer at `off` of a node. The range is inside the node, or the node is a growable leaf.
pub(crate) fn write_node(
    node: NodeId,
    off: u64,
    buf: Buf,
    flags: Flags,
) -> LocalFuture<'static, (Result<(), Errno>, Buf)> {
    Box::pin(async move {
        let core = Core::current();
        let mut buf = buf;
        if flags.fua
            && !flags.compressed
            && let Some(dsync) = fua_leaf(&core, node)
        {
            match write_fast(&core, node, off, buf, dsync).await {
                Ok(done) => return done,
                Err(back) => buf = back,
            }
        }
        // a filter may know a better way to make one write durable than a flush
        let handed_down = flags.fua && !flags.compressed && above_filter(&core, node);
        let down = Flags { fua: handed_down, ..Flags::NONE };
        let (result, buf) = match flags.compressed {
            true => write_compressed(&core, node, off, buf).await,
            false => write_all(&core, node, off, buf, down).await,
        };
        if result.is_ok() && flags.fua && !handed_down && !mutant!("fua-flushes") {
            return (flush_node(node).await, buf);
        }
        (result, buf)
    })
}

/// Whether FUA can be left to the write itself: only ownerless formats above one leaf. The answer is whether that leaf
/// flushes at all.
fn fua_leaf(core: &Core, node: NodeId) -> Option<bool> {
    let view = core.view.borrow();
    let mut node = view.node(node).ok()?;
    loop {
        match node.driver.kind() {
            Kind::Leaf(Leaf::File(_)) => return Some(!node.flags.no_flush),
            Kind::Leaf(Leaf::Null { .. }) => return Some(false),
            Kind::Map(_) if !node.has_owner => node = view.node(node.child(0).ok()?).ok()?,
            _ => return None,
        }
    }
}

/// Whether a write ends in one filter, as a whole: only ownerless formats are above it.
fn above_filter(core: &Core, node: NodeId) -> bool {
    let view = core.view.borrow();
    let mut next = view.node(node).ok();
    while let Some(node) = next {
        match node.driver.kind() {
            Kind::Full => return node.driver.is_filter() && !node.flags.no_flush,
            Kind::Map(_) if !node.has_owner => next = node.child(0).and_then(|c| view.node(c)).ok(),
            _ => return false,
        }
    }
    false
}

/// The whole range in place in one transfer, if it resolves at once: the hot path. With `dsync` it is durable when it
/// completes. `Err` gives the buffer back.
#[inline]
pub(crate) async fn write_fast(
    core: &Core,
    node: NodeId,
    off: u64,
    buf: Buf,
    dsync: bool,
) -> Result<(Result<(), Errno>, Buf), Buf> {
    let pin = core.pin();
    let mut plan = Plan::default();
    if plan.add(&core.view.borrow(), Access::Write, node, off..off + buf.len() as u64).is_err() {
        return Err(buf);
    }
    let pin = Some(pin).filter(|_| !mutant!("pin-writes"));
    Ok(ring::transfer(Dir::Write { dsync }, buf, plan.segs, pin).await)
}

async fn write_all(
    core: &Core,
    node: NodeId,
    off: u64,
    mut buf: Buf,
    flags: Flags,
) -> (Result<(), Errno>, Buf) {
    let mut done = 0usize;
    while done < buf.len() {
        let pin = core.pin();
        let mut plan = Plan::at(done);
        let range = off + done as u64..off + buf.len() as u64;
        let stop = plan.add(&core.view.borrow(), Access::Write, node, range).err();
        let (result, back) = if plan.covered > 0 {
            let n = plan.covered as usize;
            let (result, back) = ring::transfer(Dir::Write { dsync: false }, buf, plan.segs, Some(pin)).await;
            (result.map(|()| n), back)
        } else {
            match stop {
                Some(stop) => write_piece(core, stop, pin, buf, done, flags).await,
                None => break,
            }
        };
        buf = back;
        match result {
            Ok(n) => done += n,
            Err(e) => return (Err(e), buf),
        }
    }
    (Ok(()), buf)
}

/// Deals with what stopped the translation; returns bytes written, 0 to look again.
async fn write_piece(
    core: &Core,
    stop: Stop,
    pin: Pin,
    mut buf: Buf,
    done: usize,
    flags: Flags,
) -> (Result<usize, Errno>, Buf) {
    // what the lookup found must stay where it is until the write has ended, whatever it waits for on the way
    let _held = matches!(stop, Stop::Full { .. } | Stop::SlowLeaf { .. }).then(|| core.hold());
    drop(pin);
    match stop {
        Stop::Bad(e) => (Err(e), buf),
        Stop::Encoded { .. } => (Err(Errno::EIO), buf),
        Stop::Miss { node, key } => (super::read::fault(core, node, key).await.map(|()| 0), buf),
        Stop::Claim { node, off, len } => write_claimed(core, node, off..off + len, buf, done).await,
        Stop::Full { node, off, len, via } => {
            let view = match core.view.borrow().node(node) {
                Ok(n) => n.clone(),
                Err(e) => return (Err(e), buf),
            };
            if via == Via::Data {
                raise(core, node, DebugEvent::WriteAio).await;
            }
            let n = len as usize;
            let whole = done == 0 && n == buf.len();
            let piece = match whole {
                true => std::mem::replace(&mut buf, Buf::new(0)),
                false => Buf::from_slice(&buf[done..done + n]),
            };
            let (result, piece) = full::write(core, &view, off, piece, flags).await;
            if whole {
                buf = piece;
            }
            (result.map(|()| n), buf)
        }
        Stop::SlowLeaf { node, off, len } => {
            let n = len as usize;
            let result = leaf_write(core, node, off, &buf[done..done + n]).await;
            (result.map(|()| n), buf)
        }
    }
}

/// Claims host space on the node's home core, writes it, and publishes it.
async fn write_claimed(
    core: &Core,
    node: NodeId,
    range: std::ops::Range<u64>,
    buf: Buf,
    done: usize,
) -> (Result<usize, Errno>, Buf) {
    let home = match core.view.borrow().node(node) {
        Ok(n) => n.home,
        Err(e) => return (Err(e), buf),
    };
    let start = range.start;
    let claim = on_owner(core, home, node, move |owner| Box::pin(async move { owner.claim(range).await }));
    let grant = match claim.await {
        Ok(g) => g,
        Err(e) => return (Err(e), buf),
    };
    debug_assert!(grant.guest.start == start && grant.guest.end > start);
    let n = (grant.guest.end - grant.guest.start) as usize;
    let late = mutant!("publish-after-data").then(|| grant.clone());
    let (result, mut buf) = match late {
        Some(_) => (Ok(()), buf),
        None => fill_grant(core, node, &grant, buf, done).await,
    };
    let publish = on_owner(core, home, node, move |owner| {
        Box::pin(async move {
            match result {
                Ok(()) => owner.commit(grant).await,
                Err(e) => {
                    owner.abort(grant);
                    Err(e)
                }
            }
        })
    });
    let result = publish.await.map(|()| n);
    if let Some(grant) = late {
        buf = fill_grant(core, node, &grant, buf, done).await.1;
    }
    (result, buf)
}

/// Writes head, guest data and tail into a grant's host space.
async fn fill_grant(
    core: &Core,
    node: NodeId,
    grant: &Grant,
    buf: Buf,
    done: usize,
) -> (Result<(), Errno>, Buf) {
    let events = Events::of(core, node, grant);
    if grant.head == 0 && grant.tail == 0 {
        events.raise(core, DebugEvent::WriteAio).await;
        return write_segs(core, node, grant, buf, done).await;
    }
    let n = (grant.guest.end - grant.guest.start) as usize;
    let (head, tail) = (grant.head as usize, grant.tail as usize);
    let mut merged = Buf::new(head + n + tail);
    merged[head..head + n].copy_from_slice(&buf[done..done + n]);
    for (at, len, from) in [(0, head, grant.guest.start - grant.head), (head + n, tail, grant.guest.end)] {
        if len > 0 {
            events.raise(core, DebugEvent::CowRead).await;
            let (result, old) = read_padded(core, node, from, len).await;
            if let Err(e) = result {
                return (Err(e), buf);
            }
            merged[at..at + len].copy_from_slice(&old);
        }
    }
    // one write, with the old data around the new
    events.raise(core, DebugEvent::WriteAio).await;
    events.raise(core, DebugEvent::CowWrite).await;
    (write_segs(core, node, grant, merged, 0).await.0, buf)
}

/// Where the events of an allocating write are heard: at the child that holds the data, and at the first for copies.
struct Events {
    data: Option<NodeId>,
    file: Option<NodeId>,
}

impl Events {
    fn of(core: &Core, node: NodeId, grant: &Grant) -> Events {
        let view = core.view.borrow();
        let child = |ix| view.node(node).and_then(|n| n.child(ix)).ok();
        Events { data: grant.segs.first().and_then(|s| child(s.child)), file: child(0) }
    }

    async fn raise(&self, core: &Core, event: DebugEvent) {
        let at = if event == DebugEvent::WriteAio { self.data } else { self.file };
        if let Some(at) = at {
            raise(core, at, event).await;
        }
    }
}

/// Reads what a node has at `from`; a cluster may reach past the node's end, where there are zeroes.
async fn read_padded(core: &Core, node: NodeId, from: u64, len: usize) -> (Result<(), Errno>, Buf) {
    let size = match core.view.borrow().node(node) {
        Ok(n) => n.driver.size(),
        Err(e) => return (Err(e), Buf::new(0)),
    };
    let there = size.saturating_sub(from).min(len as u64) as usize;
    let mut buf = Buf::new(len);
    buf.set_len(there);
    let (result, mut buf) = read_node(node, from, buf).await;
    buf.set_len(len);
    buf[there..].fill(0);
    (result, buf)
}

/// Writes `buf[done..]` into the segments of a grant: in one transfer where they all lie on leaves.
async fn write_segs(
    core: &Core,
    node: NodeId,
    grant: &Grant,
    mut buf: Buf,
    done: usize,
) -> (Result<(), Errno>, Buf) {
    let view = match core.view.borrow().node(node) {
        Ok(n) => n.clone(),
        Err(e) => return (Err(e), buf),
    };
    let pin = core.pin();
    let mut plan = Plan::at(done);
    let direct = grant.segs.iter().all(|seg| {
        view.child(seg.child).is_ok_and(|child| {
            plan.add(&core.view.borrow(), Access::Write, child, seg.off..seg.off + seg.len).is_ok()
        })
    });
    if direct {
        return ring::transfer(Dir::Write { dsync: false }, buf, plan.segs, Some(pin)).await;
    }
    drop(pin);
    let mut at = done;
    for seg in &grant.segs {
        let child = match view.child(seg.child) {
            Ok(c) => c,
            Err(e) => return (Err(e), buf),
        };
        let n = seg.len as usize;
        let whole = at == 0 && n == buf.len();
        let piece = match whole {
            true => std::mem::replace(&mut buf, Buf::new(0)),
            false => Buf::from_slice(&buf[at..at + n]),
        };
        let (result, piece) = write_node(child, seg.off, piece, Flags::NONE).await;
        if whole {
            buf = piece;
        }
        if let Err(e) = result {
            return (Err(e), buf);
        }
        at += n;
    }
    (Ok(()), buf)
}

/// Writes to a leaf that the ring cannot serve directly.
async fn leaf_write(core: &Core, node: NodeId, off: u64, data: &[u8]) -> Result<(), Errno> {
    let view = core.view.borrow().node(node)?.clone();
    if view.flags.detect_zeroes != DetectZeroes::Off && crate::mem::is_zero(data) {
        // where the host cannot, the zeroes at hand are written: to write them as zeroes would lead here again
        let unmap = view.flags.detect_zeroes == DetectZeroes::Unmap;
        match zero_leaf(core, &view, off..off + data.len() as u64, unmap).await {
            Err(Errno::ENOTSUP) => {}
            done => return done,
        }
    }
    let file = match view.driver.kind() {
        Kind::Leaf(Leaf::File(file)) => file.clone(),
        Kind::Leaf(Leaf::Null { latency_ns, .. }) => {
            Sleep::ns(*latency_ns).await;
            return Ok(());
        }
        _ => return Err(Errno::EIO),
    };
    let align = u64::from(view.driver.limits().request_alignment);
    let end = off + data.len() as u64;
    if (off | end).is_multiple_of(align) {
        let range = off..end;
        loop {
            view.serial.wait_free(range.clone()).await;
            // no await between this test and the submission
            if !view.serial.is_busy(&range) {
                let pin = core.pin();
                let segs =
                    smallvec::smallvec![ring::Seg { file: file.slot(), off, pos: 0, len: data.len() as u32 }];
                let dir = Dir::Write { dsync: false };
                return ring::transfer(dir, Buf::from_slice(data), segs, Some(pin)).await.0;
            }
        }
    }
    let start = off - off % align;
    let stop = end.checked_next_multiple_of(align).ok_or(Errno::EINVAL)?;
    let _ticket = view.serial.take(start..stop).await;
    // a failed read fails the write: what it would have preserved is unknown
    let (result, mut block) = leaf_read(core, node, off, data.len(), core.pin()).await;
    let skip = if mutant!("rmw-read-error") { (off - start) as usize } else { result? };
    block[skip..skip + data.len()].copy_from_slice(data);
    file.write(start, block, false).await.0
}

/// Writes whole clusters compressed, through the owner.
async fn write_compressed(core: &Core, node: NodeId, off: u64, buf: Buf) -> (Result<(), Errno>, Buf) {
    let view = match core.view.borrow().node(node) {
        Ok(n) => n.clone(),
        Err(e) => return (Err(e), buf),
    };
    let cluster = u64::from(view.driver.limits().cluster_size);
    let end = off + buf.len() as u64;
    if !view.has_owner || cluster == 0 {
        return (Err(Errno::ENOTSUP), buf);
    }
    if !off.is_multiple_of(cluster) || (!end.is_multiple_of(cluster) && end != view.driver.size()) {
        return (Err(Errno::EINVAL), buf);
    }
    let mut at = 0usize;
    while at < buf.len() {
        let n = (cluster as usize).min(buf.len() - at);
        let piece = Buf::from_slice(&buf[at..at + n]);
        let guest = off + at as u64;
        let write = on_owner(core, view.home, node, move |owner| {
            Box::pin(async move { owner.write_compressed(guest, piece).await.0 })
        });
        if let Err(e) = write.await {
            return (Err(e), buf);
        }
        at += n;
    }
    (Ok(()), buf)
}
