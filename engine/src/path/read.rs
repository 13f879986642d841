//! Reads: one transfer where everything resolves, otherwise piece by piece.

use crate::core::Core;
use crate::debug::raise;
use crate::driver::{Access, Kind, Leaf, LocalFuture};
use crate::error::Errno;
use crate::graph::NodeId;
use crate::mem::Buf;
use crate::mutant;
use crate::path::full;
use crate::path::resolve::{Plan, Stop};
use crate::ring::{self, Dir};
use crate::timer::Sleep;

/// The whole range in one transfer, if it resolves at once: the hot path. `Err` gives the buffer back.
#[inline]
pub(crate) async fn read_fast(
    core: &Core,
    node: NodeId,
    off: u64,
    mut buf: Buf,
) -> Result<(Result<(), Errno>, Buf), Buf> {
    let pin = core.pin();
    let mut plan = Plan::default();
    let all = plan.add(&core.view.borrow(), Access::Read, node, off..off + buf.len() as u64);
    if all.is_err() {
        return Err(buf);
    }
    plan.fill_zeroes(&mut buf);
    let pin = Some(pin).filter(|_| !mutant!("pin-reads"));
    Ok(ring::transfer(Dir::Read, buf, plan.segs, pin).await)
}

/// Fills the buffer from `off` of a node. The range is inside the node.
pub(crate) fn read_node(node: NodeId, off: u64, buf: Buf) -> LocalFuture<'static, (Result<(), Errno>, Buf)> {
    Box::pin(async move {
        let core = Core::current();
        let mut buf = buf;
        let mut done = 0usize;
        while done < buf.len() {
            let pin = core.pin();
            let mut plan = Plan::at(done);
            let range = off + done as u64..off + buf.len() as u64;
            let stop = plan.add(&core.view.borrow(), Access::Read, node, range).err();
            if plan.covered > 0 {
                plan.fill_zeroes(&mut buf);
                done += plan.covered as usize;
                let (result, back) = ring::transfer(Dir::Read, buf, plan.segs, Some(pin)).await;
                buf = back;
                if let Err(e) = result {
                    return (Err(e), buf);
                }
                continue;
            }
            let Some(stop) = stop else { break };
            let (result, back) = read_piece(&core, stop, pin, buf, done).await;
            buf = back;
            match result {
                Ok(n) => done += n,
                Err(e) => return (Err(e), buf),
            }
        }
        (Ok(()), buf)
    })
}

/// Deals with what stopped the translation; returns bytes read, 0 to look again.
async fn read_piece(
    core: &Core,
    stop: Stop,
    pin: crate::epoch::Pin,
    mut buf: Buf,
    done: usize,
) -> (Result<usize, Errno>, Buf) {
    match stop {
        Stop::Bad(e) => (Err(e), buf),
        Stop::Claim { .. } => (Err(Errno::EIO), buf),
        Stop::Miss { node, key } => {
            drop(pin);
            (fault(core, node, key).await.map(|()| 0), buf)
        }
        Stop::Encoded { node, cookie, guest, len } => {
            let held = core.hold();
            drop(pin);
            let n = len as usize;
            let driver = match core.view.borrow().node(node) {
                Ok(n) => n.driver.clone(),
                Err(e) => return (Err(e), buf),
            };
            let (result, piece) = driver.read_encoded(cookie, guest, Buf::new(n)).await;
            drop(held);
            buf[done..done + n].copy_from_slice(&piece);
            (result.map(|()| n), buf)
        }
        Stop::Full { node, off, len, via } => {
            let _held = core.hold();
            drop(pin);
            let view = match core.view.borrow().node(node) {
                Ok(n) => n.clone(),
                Err(e) => return (Err(e), buf),
            };
            if let Some(event) = via.read_event() {
                raise(core, node, event).await;
            }
            let n = len as usize;
            let whole = done == 0 && n == buf.len();
            let piece = if whole { std::mem::replace(&mut buf, Buf::new(0)) } else { Buf::new(n) };
            let (result, piece) = full::read(&view, off, piece).await;
            if whole {
                buf = piece;
            } else {
                buf[done..done + n].copy_from_slice(&piece);
            }
            (result.map(|()| n), buf)
        }
        Stop::SlowLeaf { node, off, len } => {
            let (result, piece) = leaf_read(core, node, off, len as usize, pin).await;
            if let Ok(skip) = result {
                let n = len as usize;
                buf[done..done + n].copy_from_slice(&piece[skip..skip + n]);
                return (Ok(n), buf);
            }
            (result, buf)
        }
    }
}

/// Reads the aligned blocks around a range of a leaf; the result says where in the buffer the range begins.
pub(crate) async fn leaf_read(
    core: &Core,
    node: NodeId,
    off: u64,
    len: usize,
    pin: crate::epoch::Pin,
) -> (Result<usize, Errno>, Buf) {
    let view = match core.view.borrow().node(node) {
        Ok(n) => n.clone(),
        Err(e) => return (Err(e), Buf::new(0)),
    };
    let align = u64::from(view.driver.limits().request_alignment);
    let start = off - off % align;
    let Some(end) = (off + len as u64).checked_next_multiple_of(align) else {
        return (Err(Errno::EINVAL), Buf::new(0));
    };
    let buf = Buf::zeroed((end - start) as usize);
    match view.driver.kind() {
        Kind::Leaf(Leaf::File(file)) => {
            let file = file.clone();
            let (result, buf) = file.read(start, buf).await;
            drop(pin);
            (result.map(|()| (off - start) as usize), buf)
        }
        Kind::Leaf(Leaf::Null { latency_ns, .. }) => {
            let ns = *latency_ns;
            drop(pin);
            Sleep::ns(ns).await;
            (Ok((off - start) as usize), buf)
        }
        _ => (Err(Errno::EIO), buf),
    }
}

/// Loads missing metadata on the node's home core.
pub(crate) async fn fault(core: &Core, node: NodeId, key: u64) -> Result<(), Errno> {
    let home = core.view.borrow().node(node)?.home;
    on_owner(core, home, node, move |owner| Box::pin(async move { owner.fault(key).await })).await
}

/// Runs a call of a node's owner on its home core.
pub(crate) async fn on_owner<T, F>(core: &Core, home: usize, node: NodeId, f: F) -> Result<T, Errno>
where
    T: Send + 'static,
    F: FnOnce(std::rc::Rc<dyn crate::driver::Owner>) -> LocalFuture<'static, Result<T, Errno>>
        + Send
        + 'static,
{
    let call = move || -> LocalFuture<'static, Result<T, Errno>> {
        Box::pin(async move {
            match Core::current().owner(node) {
                Some(owner) => f(owner).await,
                None => Err(Errno::EROFS),
            }
        })
    };
    core.call(home, call).await.unwrap_or(Err(Errno::ESHUTDOWN))
}
