//! What the control pipe can ask of the graph.

use std::any::Any;
use std::rc::Rc;
use std::sync::Arc;

use super::{Common, Graph, NodeFlags, NodeId};
use crate::driver::{Driver, Limits};
use crate::path::{Root, RootId};

/// One edge.
#[derive(Clone, Debug)]
pub struct EdgeInfo {
    /// Its name: "file", "backing".
    pub name: &'static str,
    /// The child's number.
    pub node: NodeId,
    /// The child's name.
    pub child: String,
    /// Permissions used and shared.
    pub perms: (u8, u8),
}

/// One node.
#[derive(Clone)]
pub struct NodeInfo {
    /// Its number.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Its driver.
    pub driver: Arc<dyn Driver>,
    /// Options every node has.
    pub common: Common,
    /// What the data path looks at.
    pub flags: NodeFlags,
    /// The driver's own options.
    pub config: Arc<dyn Any + Send + Sync>,
    /// Limits merged with those below.
    pub limits: Limits,
    /// Home core.
    pub home: usize,
    /// Whether blockdev-add made it.
    pub monitor: bool,
    /// Permissions used and shared, cumulated over its users.
    pub perms: (u8, u8),
    /// Its children.
    pub edges: Vec<EdgeInfo>,
}

/// One root.
#[derive(Clone, Debug)]
pub struct RootInfo {
    /// The root.
    pub root: Root,
    /// Who it is.
    pub user: String,
    /// Its node's name.
    pub node: String,
    /// Permissions used and shared.
    pub perms: (u8, u8),
}

/// The whole graph.
#[derive(Clone, Default)]
pub struct GraphInfo {
    /// Nodes in order of their numbers.
    pub nodes: Vec<NodeInfo>,
    /// Roots in order of their numbers.
    pub roots: Vec<RootInfo>,
}

impl Graph {
    /// A copy of what there is.
    pub fn info(self: &Rc<Graph>) -> GraphInfo {
        let state = self.state.borrow();
        let perms = state.perms();
        let name = |id: NodeId| state.nodes.get(&id).map_or_else(String::new, |n| n.name.clone());
        let nodes = state.nodes.iter().map(|(id, n)| NodeInfo {
            id: *id,
            name: n.name.clone(),
            driver: n.driver.clone(),
            common: n.common,
            flags: n.flags,
            config: n.config.clone(),
            limits: state.limits(*id, 0),
            home: n.home,
            monitor: n.monitor,
            perms: perms.of(*id),
            edges: (n.edges.iter())
                .filter_map(|e| {
                    let perms = state.edge(n, e, perms.of(*id));
                    e.node.map(|node| EdgeInfo { name: e.name, node, child: name(node), perms })
                })
                .collect(),
        });
        let root = |(id, r): (&RootId, &super::RootNode)| RootInfo {
            root: Root::new(*id),
            user: r.user.clone(),
            node: name(r.node),
            perms: (r.perm, r.shared),
        };
        GraphInfo { nodes: nodes.collect(), roots: state.roots.iter().map(root).collect() }
    }
}
