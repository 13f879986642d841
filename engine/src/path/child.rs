//! What a driver holds of a node below it: metadata I/O of formats, everything of filters.

use std::ops::Range;
use std::sync::Arc;

use super::read::{on_owner, read_fast, read_node};
use super::status::status_node;
use super::write::{write_fast, write_node};
use super::zero::{discard_node, flush_node, zeroes_node};
use crate::core::Core;
use crate::debug::{DebugEvent, raise};
use crate::driver::{ChildIx, Driver, Flags, Kind, Limits, Preallocation, Status};
use crate::error::{Errno, Error};
use crate::graph::NodeId;
use crate::mem::Buf;

/// An edge of the graph, followed anew at each use: the child may be replaced meanwhile. Usable on any core, by tasks.
#[derive(Clone, Copy, Debug)]
pub struct Child {
    parent: NodeId,
    ix: ChildIx,
}

impl Child {
    pub(crate) fn new(parent: NodeId, ix: ChildIx) -> Child {
        Child { parent, ix }
    }

    /// The edge's index.
    pub fn ix(&self) -> ChildIx {
        self.ix
    }

    fn node(&self, core: &Core) -> Result<NodeId, Errno> {
        core.view.borrow().node(self.parent)?.child(self.ix)
    }

    /// Size of the child in bytes.
    pub fn size(&self) -> Result<u64, Errno> {
        let core = Core::current();
        let id = self.node(&core)?;
        Ok(core.view.borrow().node(id)?.driver.size())
    }

    /// Alignments and bounds of the child, merged with those below it.
    pub fn limits(&self) -> Result<Limits, Errno> {
        let core = Core::current();
        let id = self.node(&core)?;
        Ok(core.view.borrow().node(id)?.limits)
    }

    /// The name of the child's driver.
    pub fn driver_name(&self) -> Result<&'static str, Errno> {
        let core = Core::current();
        let id = self.node(&core)?;
        Ok(core.view.borrow().node(id)?.driver.name())
    }

    /// The file name of the child.
    pub fn filename(&self) -> Result<String, Errno> {
        let core = Core::current();
        let id = self.node(&core)?;
        Ok(core.view.borrow().node(id)?.driver.filename())
    }

    /// The name of the host file that the child shows: its own, or that of the node below a filter.
    pub fn host_name(&self) -> Result<String, Errno> {
        let core = Core::current();
        let view = core.view.borrow();
        let mut node = view.node(self.node(&core)?)?;
        while let Some(child) = node.filtered {
            node = view.node(child)?;
        }
        Ok(node.driver.filename())
    }

    /// The child's driver, for those who know what it is.
    pub fn driver(&self) -> Result<Arc<dyn Driver>, Errno> {
        let core = Core::current();
        let id = self.node(&core)?;
        Ok(Arc::clone(&core.view.borrow().node(id)?.driver))
    }

    /// Fills the buffer from `off`; any alignment; zeroes past the child's end.
    pub async fn read(&self, off: u64, buf: Buf) -> (Result<(), Errno>, Buf) {
        let core = Core::current();
        let id = match self.node(&core) {
            Ok(id) => id,
            Err(e) => return (Err(e), buf),
        };
        match read_fast(&core, id, off, buf).await {
            Ok(done) => done,
            Err(buf) => read_node(id, off, buf).await,
        }
    }

    /// Writes the buffer at `off`; any alignment; a file grows.
    pub async fn write(&self, off: u64, buf: Buf, flags: Flags) -> (Result<(), Errno>, Buf) {
        let core = Core::current();
        let id = match self.node(&core) {
            Ok(id) => id,
            Err(e) => return (Err(e), buf),
        };
        if flags == Flags::NONE {
            match write_fast(&core, id, off, buf, false).await {
                Ok(done) => done,
                Err(buf) => write_node(id, off, buf, flags).await,
            }
        } else {
            write_node(id, off, buf, flags).await
        }
    }

    /// Makes a range read as zeroes.
    pub async fn write_zeroes(&self, off: u64, len: u64, flags: Flags) -> Result<(), Errno> {
        let id = self.node(&Core::current())?;
        zeroes_node(id, off, len, flags).await
    }

    /// Advice that a range is not needed.
    pub async fn discard(&self, off: u64, len: u64) -> Result<(), Errno> {
        let id = self.node(&Core::current())?;
        discard_node(id, off, len).await
    }

    /// Tells a listener below that this point is reached. Costs next to nothing where there is none.
    pub async fn event(&self, event: DebugEvent) {
        let core = Core::current();
        if let Ok(id) = self.node(&core) {
            raise(&core, id, event).await;
        }
    }

    /// Whether an event would be heard.
    pub fn is_heard(&self) -> bool {
        let core = Core::current();
        let view = core.view.borrow();
        self.node(&core).and_then(|id| view.node(id)).is_ok_and(|n| n.listens)
    }

    /// Makes completed writes durable.
    pub async fn flush(&self) -> Result<(), Errno> {
        let id = self.node(&Core::current())?;
        flush_node(id).await
    }

    /// Block status of the beginning of a range.
    pub async fn status(&self, range: Range<u64>, want_zero: bool) -> Result<Status, Errno> {
        let id = self.node(&Core::current())?;
        status_node(id, range, want_zero).await
    }

    /// Changes the child's size.
    pub async fn truncate(&self, size: u64, prealloc: Preallocation) -> Result<(), Error> {
        let id = self.node(&Core::current())?;
        truncate_node(id, size, prealloc).await
    }
}

/// Changes the size of a node.
pub(crate) async fn truncate_node(id: NodeId, size: u64, prealloc: Preallocation) -> Result<(), Error> {
    let core = Core::current();
    let view = core.view.borrow().node(id)?.clone();
    match view.driver.kind() {
        Kind::Map(_) if view.has_owner => {
            let call = on_owner(&core, view.home, id, move |owner| {
                Box::pin(async move { Ok(owner.truncate(size, prealloc).await) })
            });
            call.await?
        }
        _ => view.driver.truncate(size, prealloc).await,
    }
}
