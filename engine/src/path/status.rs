//! Block status: what a range of a node is made of, in one layer or through a backing chain.

use std::ops::Range;

use crate::core::Core;
use crate::driver::{Access, Extents, Kind, LocalFuture, Lookup, Status, Target};
use crate::error::Errno;
use crate::graph::{NodeId, NodeView};
use std::sync::Arc;

/// Status of a range looked at through the layers above a base.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Above {
    /// The range's own flags, as the layer that decides them gives them.
    pub status: Status,
    /// That layer's distance from the top; where none decides, the deepest one that reaches this far.
    pub depth: u32,
    /// That layer.
    pub node: NodeId,
    /// The layer below it, which would be asked next, ends before this range.
    pub past_end: bool,
}

/// Status of the beginning of a range in one node. The range is inside the node and not empty.
pub(crate) fn status_node(
    id: NodeId,
    range: Range<u64>,
    want_zero: bool,
) -> LocalFuture<'static, Result<Status, Errno>> {
    Box::pin(async move {
        let core = Core::current();
        let view = core.view.borrow().node(id)?.clone();
        loop {
            let Kind::Map(map) = view.driver.kind() else {
                return view.driver.status(range, want_zero).await;
            };
            let mut out = Extents::new();
            match map.lookup(Access::Status, range.clone(), &mut out) {
                Lookup::Hit => {}
                Lookup::Miss(key) => {
                    super::read::fault(&core, id, key).await?;
                    continue;
                }
                Lookup::NeedsClaim { .. } => return Err(Errno::EIO),
                Lookup::Bad(e) => return Err(e),
            }
            let Some(first) = out.as_slice().first() else {
                return Err(Errno::EIO);
            };
            let none = Status {
                len: first.len,
                data: false,
                zero: false,
                allocated: false,
                encoded: false,
                offset: None,
            };
            return match first.target {
                Target::Data { child, off } if !view.has_owner => {
                    // raw: the file below decides
                    let below = view.child(child)?;
                    let mut s = status_node(below, off..off + first.len, want_zero).await?;
                    s.offset = s.offset.map(|_| off);
                    Ok(s)
                }
                Target::Data { child, off } => {
                    let mut s = Status { data: true, allocated: true, offset: Some(off), ..none };
                    if want_zero && view.driver.status_recurses() {
                        refine(&view, child, off, &mut s).await;
                    }
                    Ok(s)
                }
                Target::Encoded { .. } => Ok(Status { data: true, allocated: true, encoded: true, ..none }),
                Target::Zero { keeps } => {
                    Ok(Status { zero: true, allocated: true, offset: keeps.map(|(_, off)| off), ..none })
                }
                Target::Hole { keeps } => {
                    Ok(Status { zero: true, offset: keeps.map(|(_, off)| off), ..none })
                }
                Target::Below { .. } => Ok(none),
            };
        }
    })
}

/// An allocated cluster may be a hole of the file below: preallocated metadata reads as zeroes.
async fn refine(view: &crate::graph::NodeView, child: u8, off: u64, s: &mut Status) {
    let Ok(below) = view.child(child) else { return };
    let core = Core::current();
    let file = core.view.borrow().node(below).cloned();
    let Ok(file) = file else { return };
    let len = s.len;
    if off >= file.driver.size() {
        s.zero = true;
        return;
    }
    let end = (off + len).min(file.driver.size());
    if let Ok(b) = status_node(below, off..end, true).await {
        (s.zero, s.len) = (b.zero, b.len.min(len));
    }
}

/// Status of the beginning of a range through the chain from `top`, down to and without `base`.
pub(crate) async fn status_above(
    top: NodeId,
    base: Option<NodeId>,
    range: Range<u64>,
    want_zero: bool,
) -> Result<Above, Errno> {
    let core = Core::current();
    let (mut id, mut depth, mut range) = (top, 0, range);
    let mut last: Option<Above> = None;
    loop {
        let view = core.view.borrow().node(id)?.clone();
        let size = view.driver.size();
        if range.start >= size {
            // below a short backing file there is nothing: zeroes, and the layer above is the one to name
            if let Some(mut above) = last {
                above.status.zero = true;
                above.past_end = true;
                return Ok(above);
            }
            return Err(Errno::EINVAL);
        }
        range.end = range.end.min(size);
        let status = status_node(id, range.clone(), want_zero).await?;
        range.end = range.start + status.len;
        let here = Above { status, depth, node: id, past_end: false };
        if status.allocated {
            return Ok(here);
        }
        let Some((below, off)) = below(&core, &view, &range) else {
            return Ok(here);
        };
        if Some(below) == base {
            return Ok(here);
        }
        last = Some(here);
        let len = range.end - range.start;
        range = off..off + len;
        id = below;
        depth += 1;
    }
}

/// What shows through where a node has nothing. A filter has what its child has, and so has a window on another node.
fn below(core: &Core, view: &Arc<NodeView>, range: &Range<u64>) -> Option<(NodeId, u64)> {
    let (mut view, mut range) = (view.clone(), range.clone());
    loop {
        if let Some(child) = view.filtered {
            view = core.view.borrow().node(child).ok()?.clone();
            continue;
        }
        let Kind::Map(map) = view.driver.kind() else {
            return None;
        };
        let mut out = Extents::new();
        map.lookup(Access::Status, range.clone(), &mut out);
        let next = match out.as_slice().first()?.target {
            Target::Below { child, off } => return Some((view.child(child).ok()?, off)),
            Target::Data { child, off } if !view.has_owner => {
                range = off..off + (range.end - range.start);
                view.child(child).ok()?
            }
            _ => return None,
        };
        view = core.view.borrow().node(next).ok()?.clone();
    }
}
