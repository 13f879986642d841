//! Changing the options of open nodes: `blockdev-reopen` (reference, part 5 item 18).
//!
//! All roots are drained, so nothing is in flight. A driver either switches by itself ([`Driver::reopen_prepare`]), or, a
//! format whose state hangs together with its tables, is closed and opened again on the same edges.
//!
//! ```text
//!   flags and edges ─► reopen_prepare of each ─► permissions ─► commit of each ─► close and open again
//!        └ any failure: flags, edges, permissions and options go back to what they were
//! ```

use std::any::Any;
use std::rc::Rc;
use std::sync::Arc;

use super::open::{OpenCx, put_in_place};
use super::{Common, Graph, NodeFlags, NodeId, close_owner};
use crate::driver::{Driver, OpenFn, perm};
use crate::error::{Errno, Error};
use crate::path::{self, RootId};

/// New options for one node, for [`Graph::reopen`]. What is not given is at its default.
pub struct Reopen {
    /// The node's name.
    pub name: String,
    /// Flags the data path sees.
    pub flags: NodeFlags,
    /// The common options.
    pub common: Common,
    /// The driver's own options, as its open function took them.
    pub config: Arc<dyn Any + Send + Sync>,
    /// For drivers that are closed and opened again: with the new options, and with the old ones.
    pub open: Option<(OpenFn, OpenFn)>,
    /// Edges that lead nowhere from now on.
    pub detach: Vec<&'static str>,
}

/// A driver that is ready to switch to new options.
pub struct Prepared {
    /// Switches; cannot fail.
    pub commit: Box<dyn FnOnce()>,
    /// Forgets about it.
    pub abort: Box<dyn FnOnce()>,
}

/// What a node was before.
struct Before {
    node: NodeId,
    name: String,
    flags: NodeFlags,
    common: Common,
    config: Arc<dyn Any + Send + Sync>,
    edges: Vec<Option<NodeId>>,
    /// Opens it with its old options, once it has been closed.
    open: Option<OpenFn>,
    closed: bool,
    switched: bool,
}

impl Graph {
    /// Applies new options to several nodes, all or nothing. Nodes are drained and flushed first.
    pub async fn reopen(self: &Rc<Graph>, items: Vec<Reopen>) -> Result<(), Error> {
        self.change.acquire(1).await;
        let roots: Arc<[RootId]> = self.state.borrow().roots.keys().copied().collect();
        let drained = self.drain(roots).await;
        let mut before = Vec::new();
        let result = self.reopen_all(items, &mut before).await;
        if result.is_err() {
            self.put_back(before).await;
        }
        // children that were let go
        let collected = self.collect().await;
        self.resume(drained).await;
        self.change.release(1);
        result.and(collected)
    }

    async fn reopen_all(
        self: &Rc<Graph>,
        mut items: Vec<Reopen>,
        before: &mut Vec<Before>,
    ) -> Result<(), Error> {
        let mut prepared = Vec::new();
        let mut result = Ok(());
        for item in &mut items {
            result = self.prepare_one(item, before, &mut prepared).await;
            if result.is_err() {
                break;
            }
        }
        if result.is_ok() {
            result = self.refresh_perms().await;
        }
        if let Err(e) = result {
            for (_, p) in prepared {
                (p.abort)();
            }
            return Err(e);
        }
        for (at, p) in prepared {
            (p.commit)();
            before[at].switched = true;
        }
        self.install().await;
        // children stand behind their parents in the list
        for (item, before) in items.into_iter().zip(before.iter_mut()).rev() {
            if let Some((open, _)) = item.open {
                self.open_again(before.node, open, &mut before.closed).await?;
            }
        }
        Ok(())
    }

    /// Sets flags and edges, and has the driver prepare.
    async fn prepare_one(
        self: &Rc<Graph>,
        item: &mut Reopen,
        before: &mut Vec<Before>,
        prepared: &mut Vec<(usize, Prepared)>,
    ) -> Result<(), Error> {
        let id = self.find(&item.name).ok_or_else(|| missing(&item.name))?;
        let flushed = path::flush_node(id).await;
        flushed.map_err(|e| Error::io(e, format!("Flushing node '{}' failed", item.name)))?;
        let driver = self.change_node(id, item, before)?;
        if let Some((open, undo)) = item.open.take() {
            if let Some(b) = before.last_mut() {
                b.open = Some(undo);
            }
            // only its new half is needed from here on
            item.open = Some((open, Box::new(|_| Box::pin(async { Err(Error::from(Errno::EINVAL)) }))));
            return Ok(());
        }
        if !driver.supports_reopen() {
            let (format, name) = (driver.name(), &item.name);
            let text =
                format!("Block format '{format}' used by node '{name}' does not support reopening files");
            return Err(Error::new(Errno::ENOTSUP, text));
        }
        prepared.push((before.len() - 1, driver.reopen_prepare(item).await?));
        Ok(())
    }

    fn change_node(
        &self,
        id: NodeId,
        item: &Reopen,
        before: &mut Vec<Before>,
    ) -> Result<Arc<dyn Driver>, Error> {
        let mut state = self.state.borrow_mut();
        let writers = state.cumulated(id).0 & (perm::WRITE | perm::WRITE_UNCHANGED) != 0;
        let node = state.nodes.get_mut(&id).ok_or_else(|| missing(&item.name))?;
        // parents come first in the list: what they need is already what they will need
        if item.flags.read_only && !node.flags.read_only && writers && !item.common.auto_read_only {
            let text = format!("Read-only block node '{}' cannot support read-write users", item.name);
            return Err(Error::new(Errno::EPERM, text));
        }
        before.push(Before {
            node: id,
            name: item.name.clone(),
            flags: node.flags,
            common: node.common,
            config: node.config.clone(),
            edges: node.edges.iter().map(|e| e.node).collect(),
            open: None,
            closed: false,
            switched: false,
        });
        (node.flags, node.common, node.config) = (item.flags, item.common, item.config.clone());
        for edge in node.edges.iter_mut().filter(|e| item.detach.contains(&e.name)) {
            edge.node = None;
        }
        Ok(node.driver.clone())
    }

    /// Closes a node's owner and opens its driver again, on the same edges.
    async fn open_again(self: &Rc<Graph>, id: NodeId, open: OpenFn, closed: &mut bool) -> Result<(), Error> {
        let (home, has_owner, held) = {
            let state = self.state.borrow();
            let n = state.nodes.get(&id).ok_or(Errno::ENOMEDIUM)?;
            (n.home, n.has_owner, n.held)
        };
        if has_owner && !*closed {
            *closed = true;
            close_owner(id, home).await?;
        }
        let cx = OpenCx::again(self, id).ok_or(Errno::ENOMEDIUM)?;
        let opened = open(cx.clone()).await?;
        put_in_place(&cx, opened, held).await?;
        self.refresh_perms().await?;
        self.install().await;
        Ok(())
    }

    /// Undoes a reopen that failed.
    async fn put_back(self: &Rc<Graph>, before: Vec<Before>) {
        for b in &before {
            if let Some(n) = self.state.borrow_mut().nodes.get_mut(&b.node) {
                (n.flags, n.common, n.config) = (b.flags, b.common, b.config.clone());
                for (i, edge) in n.edges.iter_mut().enumerate() {
                    edge.node = b.edges.get(i).copied().flatten();
                }
            }
        }
        for b in before.into_iter().rev() {
            let driver = self.state.borrow().nodes.get(&b.node).map(|n| n.driver.clone());
            if let (true, Some(driver)) = (b.switched, driver) {
                let (name, flags, common, config) = (b.name, b.flags, b.common, b.config);
                let old = Reopen { name, flags, common, config, open: None, detach: Vec::new() };
                if let Ok(p) = driver.reopen_prepare(&old).await {
                    (p.commit)();
                }
            }
            if let (true, Some(open)) = (b.closed, b.open) {
                // it was open with these options a moment ago; if that fails now, the node answers with errors
                let mut closed = true;
                let _ = self.open_again(b.node, open, &mut closed).await;
            }
        }
        let _ = self.refresh_perms().await;
        self.install().await;
    }
}

fn missing(name: &str) -> Error {
    Error::new(Errno::ENODEV, format!("Failed to find node with node-name='{name}'"))
}
