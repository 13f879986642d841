//! Changing the options of open nodes: `blockdev-reopen` (reference, part 5 item 18).
//!
//! All roots are drained, so nothing is in flight. A driver either switches by itself ([`Driver::reopen_prepare`]), or, a
//! format whose state hangs together with its tables, writes everything back and is opened again on the same edges. The
//! old instance stays until the new one is there, so a node that cannot be opened again goes on as it was.
//!
//! ```text
//!   flags and edges ─► reopen_prepare of each ─► permissions ─► commit of each ─► write back, open again, replace
//!        └ any failure: flags, edges, permissions and options go back to what they were
//! ```

use std::any::Any;
use std::rc::Rc;
use std::sync::Arc;

use super::open::{OpenCx, put_in_place};
use super::{Common, Graph, NodeFlags, NodeId, owner_writes_back};
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
    /// Opens it with its old options, once it has been opened with the new ones.
    open: Option<OpenFn>,
    reopened: bool,
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
        // All nodes are as they will be before any is judged: the order of the list does not matter.
        for item in &items {
            self.change_node(item, before)?;
        }
        self.check_writers(&items, before)?;
        let mut prepared = Vec::new();
        let mut result = Ok(());
        for (at, item) in items.iter_mut().enumerate() {
            result = self.prepare_one(at, item, before, &mut prepared).await;
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
                self.open_again(before.node, open).await?;
                before.reopened = true;
            }
        }
        Ok(())
    }

    /// Has the driver prepare, after a flush.
    async fn prepare_one(
        self: &Rc<Graph>,
        at: usize,
        item: &mut Reopen,
        before: &mut [Before],
        prepared: &mut Vec<(usize, Prepared)>,
    ) -> Result<(), Error> {
        let id = self.find(&item.name).ok_or_else(|| missing(&item.name))?;
        let flushed = path::flush_node(id).await;
        flushed.map_err(|e| Error::io(e, format!("Flushing node '{}' failed", item.name)))?;
        if let Some((open, undo)) = item.open.take() {
            before[at].open = Some(undo);
            // only its new half is needed from here on
            item.open = Some((open, Box::new(|_| Box::pin(async { Err(Error::from(Errno::EINVAL)) }))));
            return Ok(());
        }
        let driver = self.state.borrow().nodes.get(&id).map(|n| n.driver.clone());
        let driver: Arc<dyn Driver> = driver.ok_or_else(|| missing(&item.name))?;
        if !driver.supports_reopen() {
            let (format, name) = (driver.name(), &item.name);
            let text =
                format!("Block format '{format}' used by node '{name}' does not support reopening files");
            return Err(Error::new(Errno::ENOTSUP, text));
        }
        prepared.push((at, driver.reopen_prepare(item).await?));
        Ok(())
    }

    /// Sets flags and edges.
    fn change_node(&self, item: &Reopen, before: &mut Vec<Before>) -> Result<(), Error> {
        let id = self.find(&item.name).ok_or_else(|| missing(&item.name))?;
        let mut state = self.state.borrow_mut();
        let node = state.nodes.get_mut(&id).ok_or_else(|| missing(&item.name))?;
        before.push(Before {
            node: id,
            name: item.name.clone(),
            flags: node.flags,
            common: node.common,
            config: node.config.clone(),
            edges: node.edges.iter().map(|e| e.node).collect(),
            open: None,
            reopened: false,
            switched: false,
        });
        (node.flags, node.common, node.config) = (item.flags, item.common, item.config.clone());
        for edge in node.edges.iter_mut().filter(|e| item.detach.contains(&e.name)) {
            edge.node = None;
        }
        Ok(())
    }

    /// A node that becomes read-only has no users that write.
    fn check_writers(&self, items: &[Reopen], before: &[Before]) -> Result<(), Error> {
        let perms = self.state.borrow().perms();
        for (item, b) in items.iter().zip(before) {
            let writers = perms.of(b.node).0 & (perm::WRITE | perm::WRITE_UNCHANGED) != 0;
            if item.flags.read_only && !b.flags.read_only && writers {
                let text = format!("Read-only block node '{}' cannot support read-write users", item.name);
                return Err(Error::new(Errno::EPERM, text));
            }
        }
        Ok(())
    }

    /// Opens a node's driver again, on the same edges; the old one is replaced if that succeeds.
    async fn open_again(self: &Rc<Graph>, id: NodeId, open: OpenFn) -> Result<(), Error> {
        let (home, has_owner, held) = {
            let state = self.state.borrow();
            let n = state.nodes.get(&id).ok_or(Errno::ENOMEDIUM)?;
            (n.home, n.has_owner, n.held)
        };
        if has_owner {
            owner_writes_back(id, home).await?;
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
        // the last first: a node may be in the list twice
        for b in before.iter().rev() {
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
            if let (true, Some(open)) = (b.reopened, b.open) {
                // it was open with these options a moment ago; if that fails now, it goes on with the new ones
                let _ = self.open_again(b.node, open).await;
            }
        }
        let _ = self.refresh_perms().await;
        self.install().await;
    }
}

fn missing(name: &str) -> Error {
    Error::new(Errno::ENODEV, format!("Failed to find node with node-name='{name}'"))
}
