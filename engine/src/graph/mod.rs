//! The block graph: nodes, named edges, roots, permissions, and how all of it changes (DESIGN §6).
//!
//! The graph lives on core 0 as an ordinary object; the data path sees only [`View`]s of it. A change is: **prepare**
//! (fallible, no effects) → **quiesce** the roots above → **commit** (infallible) + `Install` → resume. One change at a
//! time ([`Graph::change`] is the lock); a failure leaves no trace.
//!
//! ```text
//!   root (export) ──► [qcow2 "disk"] ── file ───► [file "f0"]
//!                          └── backing ─► [qcow2 "base"] ── file ─► [file]
//!   owners: monitor (blockdev-add) · parents (edges) · roots — a node without any is closed
//! ```

mod open;
mod perms;
mod query;
mod reopen;
mod view;

pub use open::{ChildSpec, Common, NodeSpec, OpenCx};
pub use query::{EdgeInfo, GraphInfo, NodeInfo, RootInfo};
pub use reopen::{Prepared, Reopen};
pub use view::{DetectZeroes, NodeFlags};
pub(crate) use view::{NodeView, RootView, View};

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use crate::core::Core;
use crate::driver::{Driver, Kind, Limits, Preallocation, Role, perm};
use crate::epoch::{Barrier, barrier};
use crate::error::{Errno, Error};
use crate::path::{self, Root, RootId, Serial};
use crate::sync;
use crate::throttle::Member;
use smallvec::SmallVec;

/// Number of a node in the engine; reused after the node is gone.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeId(pub(crate) u32);

/// Nodes an engine holds at most.
pub const NODES_MAX: usize = 4096;

struct Edge {
    name: &'static str,
    role: Role,
    node: Option<NodeId>,
    /// Permissions used and withheld from others beyond what the role says.
    extra: (u8, u8),
}

struct Node {
    name: String,
    driver: Arc<dyn Driver>,
    edges: Vec<Edge>,
    /// Held by blockdev-add until blockdev-del.
    monitor: bool,
    /// Being opened or reopened: its parents and users cannot use it yet.
    flags: NodeFlags,
    common: Common,
    home: usize,
    has_owner: bool,
    serial: Arc<Serial>,
    config: Arc<dyn Any + Send + Sync>,
    /// Cumulated permissions the driver holds now.
    held: (u8, u8),
}

impl Node {
    /// The child whose content it shows, if it is a filter.
    fn filtered(&self) -> Option<NodeId> {
        let edge = self.edges.iter().find(|e| e.role == Role::Filtered);
        edge.filter(|_| self.driver.is_filter()).and_then(|e| e.node)
    }
}

struct RootNode {
    node: NodeId,
    perm: u8,
    shared: u8,
    user: String,
    writable: bool,
    throttle: Option<Arc<Member>>,
    /// Members below that let everything pass because this root is on its way out.
    exempt: Vec<Arc<Member>>,
}

#[derive(Default)]
struct State {
    nodes: BTreeMap<NodeId, Node>,
    roots: BTreeMap<RootId, RootNode>,
    generated: u64,
}

/// The block graph of an engine. Lives on core 0; every method is called there.
pub struct Graph {
    state: RefCell<State>,
    change: sync::Semaphore,
    next_home: Cell<usize>,
}

impl Default for Graph {
    fn default() -> Graph {
        Graph { state: RefCell::default(), change: sync::Semaphore::new(1), next_home: Cell::new(0) }
    }
}

/// Roots that are drained, and the members of throttle nodes below them that let everything pass meanwhile.
struct Drained {
    roots: Arc<[RootId]>,
    exempt: Vec<Arc<Member>>,
}

/// What a new root asks for.
pub struct RootSpec {
    /// Name of the node.
    pub node: String,
    /// Permissions it uses, as bits of [`perm`].
    pub perm: u8,
    /// Permissions it lets others use.
    pub shared: u8,
    /// Who it is, for error texts: "block device 'e0'".
    pub user: String,
    /// Limits of its own.
    pub throttle: Option<Arc<Member>>,
}

impl Graph {
    /// The graph of the engine; call on core 0.
    pub fn current() -> Rc<Graph> {
        let core = Core::current();
        assert_eq!(core.index, 0, "the graph lives on core 0");
        core.local()
    }

    fn find(&self, name: &str) -> Option<NodeId> {
        self.state.borrow().nodes.iter().find(|(_, n)| n.name == name).map(|(id, _)| *id)
    }

    /// The node with this name. Error text as QEMU's commands give it.
    pub fn lookup(&self, name: &str) -> Result<NodeId, Error> {
        self.find(name).ok_or_else(|| {
            Error::new(Errno::ENODEV, format!("Cannot find device='{name}' nor node-name='{name}'"))
        })
    }

    /// Builds a node and its inline children; it belongs to the monitor until [`Graph::del`]. All or nothing.
    pub async fn add(self: &Rc<Graph>, spec: NodeSpec) -> Result<String, Error> {
        self.change.acquire(1).await;
        let result = self.add_locked(spec).await;
        self.change.release(1);
        result
    }

    async fn add_locked(self: &Rc<Graph>, spec: NodeSpec) -> Result<String, Error> {
        let id = open::open_tree(self, spec, 0, true).await?;
        let mut state = self.state.borrow_mut();
        let node = state.nodes.get_mut(&id).ok_or(Errno::ENOMEDIUM)?;
        node.monitor = true;
        Ok(node.name.clone())
    }

    /// Drops the monitor's hold on a node, which closes it and what it alone used. Errors as `blockdev-del`'s.
    pub async fn del(self: &Rc<Graph>, name: &str) -> Result<(), Error> {
        self.change.acquire(1).await;
        let result = self.del_locked(name).await;
        self.change.release(1);
        result
    }

    async fn del_locked(self: &Rc<Graph>, name: &str) -> Result<(), Error> {
        let missing = || Error::new(Errno::ENODEV, format!("Failed to find node with node-name='{name}'"));
        let id = self.find(name).ok_or_else(missing)?;
        {
            let mut state = self.state.borrow_mut();
            if state.roots.values().any(|r| r.node == id) {
                return Err(Error::new(Errno::EBUSY, format!("Node {name} is in use")));
            }
            let has_parents = state.has_parents(id);
            let node = state.nodes.get_mut(&id).ok_or_else(missing)?;
            if !node.monitor {
                return Err(Error::new(Errno::EBUSY, format!("Node {name} is not owned by the monitor")));
            }
            if has_parents {
                return Err(Error::new(Errno::EBUSY, format!("Block device {name} is in use")));
            }
            node.monitor = false;
        }
        self.collect().await
    }

    /// Closes every node that nobody holds, parents first. The first error is reported; nodes go all the same.
    async fn collect(self: &Rc<Graph>) -> Result<(), Error> {
        let mut result = Ok(());
        loop {
            let next = self.state.borrow().unheld();
            let Some(id) = next else { break };
            let closed = self.close_node(id).await;
            if result.is_ok() {
                result = closed;
            }
        }
        let perms = self.refresh_perms().await;
        self.install().await;
        result.and(perms)
    }

    async fn close_node(self: &Rc<Graph>, id: NodeId) -> Result<(), Error> {
        let (driver, home, has_owner, name) = {
            let state = self.state.borrow();
            let Some(n) = state.nodes.get(&id) else {
                return Ok(());
            };
            (n.driver.clone(), n.home, n.has_owner, n.name.clone())
        };
        // What is written back now must not wait for limits below.
        let exempt = self.state.borrow().members_from(id);
        exempt.iter().for_each(|m| m.exempt(true));
        let result = if has_owner { close_owner(id, home).await } else { Ok(()) };
        driver.close().await;
        exempt.iter().for_each(|m| m.exempt(false));
        self.state.borrow_mut().nodes.remove(&id);
        result.map_err(|e| Error::io(e, format!("Closing node '{name}' failed")))
    }

    /// Attaches a root. All or nothing.
    pub async fn attach(self: &Rc<Graph>, spec: RootSpec) -> Result<Root, Error> {
        self.change.acquire(1).await;
        let result = self.attach_locked(spec).await;
        self.change.release(1);
        result
    }

    async fn attach_locked(self: &Rc<Graph>, spec: RootSpec) -> Result<Root, Error> {
        let node = self.lookup(&spec.node)?;
        let id = {
            let mut state = self.state.borrow_mut();
            let writable = spec.perm & (perm::WRITE | perm::WRITE_UNCHANGED) != 0;
            if writable && state.nodes.get(&node).is_some_and(|n| n.flags.read_only) {
                return Err(Error::new(Errno::EACCES, "Block node is read-only"));
            }
            let id = (0..).map(RootId).find(|id| !state.roots.contains_key(id)).ok_or(Errno::ENOMEM)?;
            let (perm, shared, user, throttle) = (spec.perm, spec.shared, spec.user, spec.throttle);
            let root = RootNode { node, perm, shared, user, writable, throttle, exempt: Vec::new() };
            state.roots.insert(id, root);
            id
        };
        if let Err(e) = self.refresh_perms().await {
            self.state.borrow_mut().roots.remove(&id);
            let _ = self.refresh_perms().await;
            return Err(e);
        }
        self.install().await;
        Ok(Root::new(id))
    }

    /// Lets the requests of a root that is about to be detached pass the throttle nodes below formats and filters.
    pub fn hurry(&self, root: Root) {
        let exempt = self.state.borrow().members_below(&[root.id()]);
        exempt.iter().for_each(|m| m.exempt(true));
        if let Some(r) = self.state.borrow_mut().roots.get_mut(&root.id()) {
            r.exempt.extend(exempt);
        }
    }

    /// Detaches a root after its requests are done; closes the node if nobody else holds it.
    pub async fn detach(self: &Rc<Graph>, root: Root) -> Result<(), Error> {
        self.change.acquire(1).await;
        let drained = self.drain(Arc::new([root.id()])).await;
        let limits = self.state.borrow().limits_of(root.id());
        let gone = self.state.borrow_mut().roots.remove(&root.id());
        gone.iter().flat_map(|r| &r.exempt).for_each(|m| m.exempt(false));
        let result = self.collect().await;
        // waiters find the root gone, those behind limits too
        self.resume(drained).await;
        limits.iter().for_each(|m| m.release(|tag| path::is_of(tag, root.id())));
        let core = Core::current();
        for index in 0..core.count() {
            let id = root.id();
            core.call(index, move || Box::pin(async move { Core::current().forget_root(id) })).await;
        }
        self.change.release(1);
        result
    }

    /// Changes a node's size, with the roots above it drained.
    pub async fn resize(
        self: &Rc<Graph>,
        name: &str,
        size: u64,
        prealloc: Preallocation,
    ) -> Result<(), Error> {
        let spec = RootSpec {
            node: name.to_owned(),
            perm: perm::RESIZE,
            shared: perm::ALL,
            user: "an unnamed block device".to_owned(),
            throttle: None,
        };
        let temporary = self.attach(spec).await?;
        self.change.acquire(1).await;
        let node = self.lookup(name);
        let result = match node {
            Ok(node) => {
                let drained = self.drain(self.roots_above(node)).await;
                let result = path_truncate(node, size, prealloc).await;
                self.install().await;
                self.resume(drained).await;
                result
            }
            Err(e) => Err(e),
        };
        self.change.release(1);
        let detached = self.detach(temporary).await;
        result.and(detached)
    }

    /// Waits until nothing of these roots is in flight, and keeps it so. What throttle nodes on the way hold back is let
    /// through: limits at a root hold nothing, so only those below a format or a filter matter.
    async fn drain(&self, roots: Arc<[RootId]>) -> Drained {
        let exempt = self.state.borrow().members_below(&roots);
        exempt.iter().for_each(|m| m.exempt(true));
        barrier(Barrier::Drain(roots.clone())).await;
        Drained { roots, exempt }
    }

    async fn resume(&self, drained: Drained) {
        drained.exempt.iter().for_each(|m| m.exempt(false));
        barrier(Barrier::Resume(drained.roots)).await;
    }

    /// All roots whose requests may reach a node.
    fn roots_above(&self, node: NodeId) -> Arc<[RootId]> {
        let state = self.state.borrow();
        state.roots.iter().filter(|(_, r)| state.reaches(r.node, node)).map(|(id, _)| *id).collect()
    }

    /// Sends the current state of the graph to every core.
    async fn install(self: &Rc<Graph>) {
        let view = self.state.borrow().view();
        barrier(Barrier::Install(Arc::new(view))).await;
    }

    /// Closes everything: roots first, then nodes. For the end of the engine.
    pub async fn shutdown(self: &Rc<Graph>) -> Result<(), Error> {
        let roots: Vec<RootId> = self.state.borrow().roots.keys().copied().collect();
        let mut result = Ok(());
        for id in roots {
            result = result.and(self.detach(Root::new(id)).await);
        }
        self.change.acquire(1).await;
        for node in self.state.borrow_mut().nodes.values_mut() {
            node.monitor = false;
        }
        result = result.and(self.collect().await);
        self.change.release(1);
        result
    }
}

/// Has an owner write everything back. It may go on afterwards.
async fn owner_writes_back(id: NodeId, home: usize) -> Result<(), Errno> {
    let close = move || -> crate::driver::LocalFuture<'static, Result<(), Errno>> {
        Box::pin(async move {
            match Core::current().owner(id) {
                Some(owner) => owner.close().await,
                None => Ok(()),
            }
        })
    };
    Core::current().call(home, close).await.unwrap_or(Err(Errno::ESHUTDOWN))
}

/// Has an owner write everything back, and lets go of it.
async fn close_owner(id: NodeId, home: usize) -> Result<(), Errno> {
    let closed = owner_writes_back(id, home).await;
    let forget = move || -> crate::driver::LocalFuture<'static, ()> {
        Box::pin(async move { drop(Core::current().owners.borrow_mut().remove(&id)) })
    };
    Core::current().call(home, forget).await;
    closed
}

async fn path_truncate(node: NodeId, size: u64, prealloc: Preallocation) -> Result<(), Error> {
    path::truncate_node(node, size, prealloc).await
}

impl State {
    fn has_parents(&self, id: NodeId) -> bool {
        self.nodes.values().any(|n| n.edges.iter().any(|e| e.node == Some(id)))
    }

    fn reaches(&self, from: NodeId, to: NodeId) -> bool {
        from == to
            || self
                .nodes
                .get(&from)
                .is_some_and(|n| n.edges.iter().filter_map(|e| e.node).any(|c| self.reaches(c, to)))
    }

    /// A node that nobody holds.
    fn unheld(&self) -> Option<NodeId> {
        let children = self.nodes.values().flat_map(|n| &n.edges).filter_map(|e| e.node);
        let held: BTreeSet<NodeId> = children.chain(self.roots.values().map(|r| r.node)).collect();
        self.nodes.iter().find(|(id, n)| !n.monitor && !held.contains(id)).map(|(id, _)| *id)
    }

    fn view(&self) -> View {
        let mut view = View::default();
        let last = self.nodes.keys().next_back().map_or(0, |id| id.0 as usize + 1);
        view.nodes.resize_with(last, || None);
        for (id, n) in &self.nodes {
            view.nodes[id.0 as usize] = Some(Arc::new(NodeView {
                id: *id,
                driver: n.driver.clone(),
                children: n.edges.iter().map(|e| e.node).collect(),
                home: n.home,
                has_owner: n.has_owner,
                flags: n.flags,
                limits: self.limits(*id, 0),
                serial: n.serial.clone(),
                filtered: n.filtered(),
                listens: self.listens(n),
            }));
        }
        let last = self.roots.keys().next_back().map_or(0, |id| id.0 as usize + 1);
        view.roots.resize_with(last, || None);
        for (id, r) in &self.roots {
            let (node, limits, above) = self.entry(r);
            let root = RootView { attached: r.node, node, writable: r.writable, limits, above };
            view.roots[id.0 as usize] = Some(root);
        }
        view
    }

    /// Whether somebody hears a debug event that is raised at a node.
    fn listens(&self, n: &Node) -> bool {
        n.driver.listens() || n.filtered().and_then(|c| self.nodes.get(&c)).is_some_and(|c| self.listens(c))
    }

    /// Where a root's requests go once they are admitted, and by whom: throttle nodes at the top limit at the root, so
    /// that nothing is held meanwhile.
    fn entry(&self, root: &RootNode) -> (NodeId, SmallVec<[Arc<Member>; 1]>, NodeFlags) {
        let mut limits: SmallVec<[Arc<Member>; 1]> = root.throttle.iter().cloned().collect();
        let (mut at, mut above) = (root.node, NodeFlags::NEUTRAL);
        while let Some(n) = self.nodes.get(&at)
            && let Some(member) = n.driver.throttle()
            && let Some(below) = n.edges.first().and_then(|e| e.node)
        {
            limits.push(member);
            above = above.and(n.flags);
            at = below;
        }
        (at, limits, above)
    }

    /// The members of the throttle nodes that requests of these roots may pass.
    fn members_below(&self, roots: &[RootId]) -> Vec<Arc<Member>> {
        let below =
            |id: NodeId| roots.iter().any(|r| self.roots.get(r).is_some_and(|r| self.reaches(r.node, id)));
        self.members(below)
    }

    /// The members of a node and of those below it.
    fn members_from(&self, top: NodeId) -> Vec<Arc<Member>> {
        self.members(|id| self.reaches(top, id))
    }

    fn members(&self, of: impl Fn(NodeId) -> bool) -> Vec<Arc<Member>> {
        let members = self.nodes.iter().filter_map(|(id, n)| Some((*id, n.driver.throttle()?)));
        members.filter(|(id, _)| of(*id)).map(|(_, m)| m).collect()
    }

    fn limits_of(&self, root: RootId) -> SmallVec<[Arc<Member>; 1]> {
        self.roots.get(&root).map(|r| self.entry(r).1).unwrap_or_default()
    }

    /// A node's limits merged with those of the children its data goes to (reference, part 5 item 22).
    fn limits(&self, id: NodeId, depth: usize) -> Limits {
        let Some(n) = self.nodes.get(&id) else {
            return Limits::default();
        };
        let mut limits = n.driver.limits();
        if depth > open::DEPTH_MAX || matches!(n.driver.kind(), Kind::Leaf(_)) {
            return limits;
        }
        for e in n.edges.iter().filter(|e| e.role != Role::Cow) {
            if let Some(child) = e.node {
                let c = self.limits(child, depth + 1);
                limits.request_alignment = limits.request_alignment.max(c.request_alignment);
                limits.memory_alignment = limits.memory_alignment.max(c.memory_alignment);
                limits.max_transfer = limits.max_transfer.min(c.max_transfer);
                if e.role == Role::Filtered {
                    limits.punch_alignment = limits.punch_alignment.max(c.punch_alignment);
                    limits.cluster_size = limits.cluster_size.max(c.cluster_size);
                }
            }
        }
        limits
    }
}
