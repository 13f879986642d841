//! Opening a tree of nodes: bottom up, all or nothing.
//!
//! ```text
//!   NodeSpec ─► reserve an id, a placeholder enters the view ─► spec.open(OpenCx)
//!                                                                 ├ open_child("file", …) ─► recursion, edge, permissions
//!                                                                 └ reads its metadata through Child
//!             ─► Opened: owner made on the home core, driver replaces the placeholder ─► Install
//!   failure: everything opened on the way is closed again
//! ```

use std::any::Any;
use std::rc::Rc;
use std::sync::Arc;

use super::{DetectZeroes, Edge, Graph, NODES_MAX, Node, NodeFlags, NodeId};
use crate::core::Core;
use crate::driver::{ChildIx, Driver, Kind, LocalFuture, OpenFn, Opened, Role};
use crate::error::{Errno, Error};
use crate::path::Child;

/// Depth of a tree of nodes.
pub(super) const DEPTH_MAX: usize = 200;

/// Options that every node has (reference, part 2.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Common {
    /// Writes are refused.
    pub read_only: bool,
    /// Falls back to read-only where the host forbids writing, and opens read-write only while somebody writes.
    pub auto_read_only: bool,
    /// Takes no locks that would keep writers away; read-only nodes only.
    pub force_share: bool,
    /// O_DIRECT.
    pub direct: bool,
    /// Flushes stop here.
    pub no_flush: bool,
    /// Discards are passed on.
    pub discard: bool,
    /// Zero detection.
    pub detect_zeroes: DetectZeroes,
}

impl Common {
    /// What an implicitly opened child of this node inherits: cache settings and read-only; discards pass (the parent
    /// decides, reference seed row 36).
    pub fn for_child(&self, role: Role) -> Common {
        Common {
            read_only: self.read_only || role == Role::Cow,
            auto_read_only: false,
            discard: true,
            detect_zeroes: DetectZeroes::Off,
            ..*self
        }
    }

    /// The part the data path looks at.
    pub fn flags(&self) -> NodeFlags {
        NodeFlags {
            read_only: self.read_only,
            no_flush: self.no_flush,
            discard: self.discard,
            detect_zeroes: self.detect_zeroes,
        }
    }
}

/// A node to be opened.
pub struct NodeSpec {
    /// Name; a node without one gets a generated name that users cannot type (`#block7`).
    pub name: Option<String>,
    /// Options every node has.
    pub common: Common,
    /// Home core; `None` lets the engine choose.
    pub home: Option<usize>,
    /// The driver's typed options, kept for reopening and queries.
    pub config: Arc<dyn Any + Send + Sync>,
    /// Opens the driver.
    pub open: OpenFn,
}

/// A child to be opened, or one that exists.
pub enum ChildSpec {
    /// Opened together with its parent, and closed with it.
    Inline(Box<NodeSpec>),
    /// A node by name.
    Reference(String),
}

/// What a driver's open function works with.
#[derive(Clone)]
pub struct OpenCx {
    graph: Rc<Graph>,
    node: NodeId,
    depth: usize,
    /// The node was open before: its edges are there.
    again: bool,
    /// Options every node has.
    pub common: Common,
    /// The node's name.
    pub name: String,
    /// The node's home core.
    pub home: usize,
}

impl OpenCx {
    /// The node's number.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Opens or finds a child and links it as the next edge. Its permissions (locks) are in force on return.
    pub fn open_child(
        &self,
        edge: &'static str,
        role: Role,
        spec: ChildSpec,
    ) -> LocalFuture<'static, Result<Child, Error>> {
        self.open_child_taking(edge, role, spec, 0, 0)
    }

    /// As [`OpenCx::open_child`]; the edge uses the permissions `take`, and lets nobody use `keep`, whatever its role.
    pub fn open_child_taking(
        &self,
        edge: &'static str,
        role: Role,
        spec: ChildSpec,
        take: u8,
        keep: u8,
    ) -> LocalFuture<'static, Result<Child, Error>> {
        let cx = self.clone();
        Box::pin(async move {
            let there = cx.edge(edge);
            let child = match (spec, there) {
                // reopening: what is described in place is reopened as a node of its own
                (ChildSpec::Inline(_), Some((ix, Some(_)))) if cx.again => {
                    return Ok(Child::new(cx.node, ix));
                }
                (ChildSpec::Inline(spec), _) => open_tree(&cx.graph, *spec, cx.depth + 1, false).await?,
                (ChildSpec::Reference(name), _) => cx.referenced(&name)?,
            };
            let new = Edge { name: edge, role, node: Some(child), extra: (take, keep) };
            let ix = cx.link(new, there.map(|(ix, _)| ix))?;
            cx.graph.refresh_perms().await?;
            cx.graph.install().await;
            Ok(Child::new(cx.node, ix))
        })
    }

    /// The edge of this name, if the node has it.
    fn edge(&self, name: &str) -> Option<(ChildIx, Option<NodeId>)> {
        let state = self.graph.state.borrow();
        let edges = &state.nodes.get(&self.node)?.edges;
        let at = edges.iter().position(|e| e.name == name)?;
        Some((ChildIx::try_from(at).ok()?, edges[at].node))
    }

    fn referenced(&self, name: &str) -> Result<NodeId, Error> {
        let id = self.graph.lookup(name)?;
        if self.graph.state.borrow().reaches(id, self.node) {
            let text = format!("Making '{name}' a child of '{}' would create a cycle", self.name);
            return Err(Error::invalid(text));
        }
        Ok(id)
    }

    fn link(&self, edge: Edge, at: Option<ChildIx>) -> Result<ChildIx, Error> {
        let mut state = self.graph.state.borrow_mut();
        let me = state.nodes.get_mut(&self.node).ok_or(Errno::ENOMEDIUM)?;
        if let Some(ix) = at.filter(|_| self.again) {
            me.edges[usize::from(ix)].node = edge.node;
            return Ok(ix);
        }
        me.edges.push(edge);
        ChildIx::try_from(me.edges.len() - 1).map_err(|_| Error::invalid("Too many children"))
    }

    /// Makes the node read-only: for formats that cannot write, and for `auto-read-only`.
    pub fn set_read_only(&self) {
        if let Some(n) = self.graph.state.borrow_mut().nodes.get_mut(&self.node) {
            n.common.read_only = true;
            n.flags.read_only = true;
        }
    }
}

/// Stands in the view for a node that is being opened.
struct Opening;

impl Driver for Opening {
    fn name(&self) -> &'static str {
        "opening"
    }
    fn size(&self) -> u64 {
        0
    }
    fn kind(&self) -> Kind<'_> {
        Kind::Full
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn check_name(graph: &Graph, name: &str) -> Result<(), Error> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphabetic());
    if !first || !bytes.all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
        return Err(Error::invalid(format!("Invalid node-name: '{name}'")));
    }
    if name.len() > 31 {
        return Err(Error::invalid("Node name too long"));
    }
    if graph.find(name).is_some() {
        return Err(Error::new(Errno::EEXIST, format!("Duplicate nodes with node-name='{name}'")));
    }
    Ok(())
}

/// Opens a node and its children. On failure everything opened on the way is closed again.
pub(super) fn open_tree(
    graph: &Rc<Graph>,
    spec: NodeSpec,
    depth: usize,
    top: bool,
) -> LocalFuture<'static, Result<NodeId, Error>> {
    let graph = graph.clone();
    Box::pin(async move {
        let result = open_node(&graph, spec, depth).await;
        if result.is_err() && top {
            // placeholders and children of the failed tree are held by nobody
            let _ = graph.collect().await;
        }
        result
    })
}

async fn open_node(graph: &Rc<Graph>, spec: NodeSpec, depth: usize) -> Result<NodeId, Error> {
    if depth > DEPTH_MAX {
        return Err(Error::new(
            Errno(libc::ELOOP),
            format!("More than {DEPTH_MAX} nodes on top of each other"),
        ));
    }
    if let Some(name) = &spec.name {
        check_name(graph, name)?;
    }
    let cx = reserve(graph, &spec, depth)?;
    let guard = Reserved { graph: graph.clone(), node: cx.node, done: false };
    graph.install().await;
    let opened = (spec.open)(cx.clone()).await?;
    put_in_place(&cx, opened, (0, crate::driver::perm::ALL)).await?;
    graph.refresh_perms().await?;
    graph.install().await;
    guard.keep();
    Ok(cx.node)
}

impl OpenCx {
    /// For opening a node again whose edges are there; its roots are drained.
    pub(super) fn again(graph: &Rc<Graph>, node: NodeId) -> Option<OpenCx> {
        let state = graph.state.borrow();
        let n = state.nodes.get(&node)?;
        let (common, name, home) = (n.common, n.name.clone(), n.home);
        Some(OpenCx { graph: graph.clone(), node, depth: 0, again: true, common, name, home })
    }
}

/// Makes the owner on its home core, and the driver that of the node, in place of what was there. `held` are the permissions
/// the driver has.
pub(super) async fn put_in_place(cx: &OpenCx, opened: Opened, held: (u8, u8)) -> Result<(), Error> {
    let has_owner = opened.owner.is_some();
    let (id, make) = (cx.node, opened.owner);
    let set = move || -> LocalFuture<'static, ()> {
        Box::pin(async move {
            let core = Core::current();
            let owner = make.map(|make| make());
            let before = match &owner {
                Some(owner) => core.owners.borrow_mut().insert(id, owner.clone()),
                None => core.owners.borrow_mut().remove(&id),
            };
            drop(before);
            if let Some(owner) = owner {
                core.spawn(housekeeping(id, Rc::downgrade(&owner)));
            }
        })
    };
    Core::current().call(cx.home, set).await;
    let mut state = cx.graph.state.borrow_mut();
    let node = state.nodes.get_mut(&cx.node).ok_or(Errno::ENOMEDIUM)?;
    node.driver = opened.driver;
    node.has_owner = has_owner;
    node.held = held;
    Ok(())
}

/// A node that failed to open gives up its name at once; `collect` then closes it.
struct Reserved {
    graph: Rc<Graph>,
    node: NodeId,
    done: bool,
}

impl Reserved {
    fn keep(mut self) {
        self.done = true;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.done
            && let Some(n) = self.graph.state.borrow_mut().nodes.get_mut(&self.node)
        {
            n.name = format!("#failed{}", self.node.0);
        }
    }
}

fn reserve(graph: &Rc<Graph>, spec: &NodeSpec, depth: usize) -> Result<OpenCx, Error> {
    let mut state = graph.state.borrow_mut();
    if state.nodes.len() >= NODES_MAX {
        return Err(Error::new(Errno::ENOMEM, format!("More than {NODES_MAX} nodes")));
    }
    let name = spec.name.clone().unwrap_or_else(|| {
        state.generated += 1;
        format!("#block{:03}", state.generated)
    });
    let count = Core::current().count();
    let home = spec.home.unwrap_or_else(|| {
        let next = graph.next_home.get();
        graph.next_home.set(next + 1);
        next
    }) % count;
    let node = (0..).map(NodeId).find(|id| !state.nodes.contains_key(id)).ok_or(Errno::ENOMEM)?;
    let entry = Node {
        name: name.clone(),
        driver: Arc::new(Opening),
        edges: Vec::new(),
        monitor: false,
        flags: spec.common.flags(),
        common: spec.common,
        home,
        has_owner: false,
        serial: Arc::default(),
        config: spec.config.clone(),
        held: (0, crate::driver::perm::ALL),
    };
    state.nodes.insert(node, entry);
    Ok(OpenCx { graph: graph.clone(), node, depth, again: false, common: spec.common, name, home })
}

/// Calls an owner's periodic work while the node exists.
async fn housekeeping(id: NodeId, owner: std::rc::Weak<dyn crate::driver::Owner>) {
    let _ = id;
    loop {
        crate::timer::Sleep::ns(1_000_000_000).await;
        let Some(owner) = owner.upgrade() else { return };
        owner.tick();
    }
}
