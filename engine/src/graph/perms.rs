//! Permissions: what each user of a node needs and lets others do, cumulated down the graph (reference, part 5 item 4).
//!
//! ```text
//!   roots and parents of a node ─► (perm = OR, shared = AND) ─► rule of each edge's role ─► child
//! ```
//!
//! Invariant: no edge or root uses what another one on the same node does not share; drivers hold (locks, descriptors)
//! exactly the cumulated permissions of their node, changed by prepare → commit, all drivers or none.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::{Edge, Graph, Node, NodeId, State};
use crate::driver::{Role, perm::*};
use crate::error::{Errno, Error};
use crate::path::RootId;

/// Permissions (used, shared) of a node, over all its users.
type Cumulated = (u8, u8);

/// One user of a node.
struct User {
    perm: u8,
    shared: u8,
    who: Who,
}

/// Who that is: a root, or the edge of a node by its index.
#[derive(Clone, Copy)]
enum Who {
    Root(RootId),
    Edge(NodeId, usize),
}

/// The users of every node, and what they ask of it together. Made in one walk, as a chain of nodes may be long.
pub(super) struct Perms {
    users: BTreeMap<NodeId, Vec<User>>,
    cumulated: BTreeMap<NodeId, Cumulated>,
}

impl Perms {
    /// OR of what the users of a node use, AND of what they share.
    pub(super) fn of(&self, id: NodeId) -> Cumulated {
        self.cumulated.get(&id).copied().unwrap_or((0, ALL))
    }
}

impl State {
    /// What an edge asks of the child, given what the parent's own users ask of the parent.
    pub(super) fn edge(&self, parent: &Node, edge: &Edge, users: Cumulated) -> Cumulated {
        let (perm, shared) = self.of_role(parent, edge.role, users);
        (perm | edge.extra.0, shared & !edge.extra.1)
    }

    fn of_role(&self, parent: &Node, role: Role, (perm, shared): Cumulated) -> Cumulated {
        let writable = !parent.flags.read_only;
        match role {
            Role::Filtered => (perm, shared),
            Role::Cow => {
                let writers = if shared & WRITE != 0 { WRITE | RESIZE } else { 0 };
                (perm & CONSISTENT_READ, writers | CONSISTENT_READ | WRITE_UNCHANGED)
            }
            Role::Image => {
                // a writable format may write its metadata at any time, and cannot stand other writers
                let write = if writable { WRITE | RESIZE } else { 0 };
                let force = parent.common.force_share && !writable;
                let shared = if force { ALL } else { ALL & !(WRITE | RESIZE) };
                (perm | CONSISTENT_READ | write, shared)
            }
            Role::Data => {
                let mut p = perm | CONSISTENT_READ;
                if p & (WRITE | WRITE_UNCHANGED) != 0 {
                    p |= WRITE | RESIZE;
                }
                let force = parent.common.force_share && !writable;
                (p, if force { ALL } else { ALL & !(WRITE | RESIZE) })
            }
        }
    }

    /// Looks at all nodes, parents before children.
    pub(super) fn perms(&self) -> Perms {
        let mut users: BTreeMap<NodeId, Vec<User>> = BTreeMap::new();
        for (id, r) in &self.roots {
            let user = User { perm: r.perm, shared: r.shared, who: Who::Root(*id) };
            users.entry(r.node).or_default().push(user);
        }
        let mut parents: BTreeMap<NodeId, usize> = self.nodes.keys().map(|id| (*id, 0)).collect();
        for child in self.nodes.values().flat_map(|n| &n.edges).filter_map(|e| e.node) {
            *parents.entry(child).or_default() += 1;
        }
        let mut ready: Vec<NodeId> = parents.iter().filter(|(_, n)| **n == 0).map(|(id, _)| *id).collect();
        let mut cumulated = BTreeMap::new();
        while let Some(id) = ready.pop() {
            let of: &[User] = users.get(&id).map_or(&[], Vec::as_slice);
            let sum = of.iter().fold((0, ALL), |(p, s), u| (p | u.perm, s & u.shared));
            cumulated.insert(id, sum);
            let Some(node) = self.nodes.get(&id) else { continue };
            for (ix, e) in node.edges.iter().enumerate() {
                let Some(child) = e.node else { continue };
                let (perm, shared) = self.edge(node, e, sum);
                users.entry(child).or_default().push(User { perm, shared, who: Who::Edge(id, ix) });
                if let Some(left) = parents.get_mut(&child) {
                    *left -= 1;
                    if *left == 0 {
                        ready.push(child);
                    }
                }
            }
        }
        Perms { users, cumulated }
    }

    /// How a user is called in messages, and the name of its edge.
    fn names_of(&self, who: Who) -> (String, &str) {
        match who {
            Who::Root(id) => (self.roots.get(&id).map(|r| r.user.clone()).unwrap_or_default(), "root"),
            Who::Edge(id, ix) => match self.nodes.get(&id) {
                Some(n) => (format!("node '{}'", n.name), n.edges.get(ix).map_or("", |e| e.name)),
                None => (String::new(), ""),
            },
        }
    }

    fn conflict(&self, perms: &Perms, id: NodeId, node: &Node) -> Result<(), Error> {
        let users: &[User] = perms.users.get(&id).map_or(&[], Vec::as_slice);
        for a in users {
            for b in users.iter().filter(|b| !std::ptr::eq(*b, a)) {
                let clash = a.perm & !b.shared;
                if clash != 0 {
                    let ((a, ah), (b, bh)) = (self.names_of(a.who), self.names_of(b.who));
                    let text = format!(
                        "Permission conflict on node '{n}': permissions '{p}' are both required by {a} (uses node '{n}' as '{ah}' child) and unshared by {b} (uses node '{n}' as '{bh}' child).",
                        n = node.name,
                        p = names(clash),
                    );
                    return Err(Error::new(Errno::EPERM, text));
                }
            }
        }
        let (perm, _) = perms.of(id);
        if node.flags.read_only && perm & (WRITE | WRITE_UNCHANGED) != 0 {
            return Err(Error::new(Errno::EPERM, "Block node is read-only"));
        }
        // only a resize asks for this alone
        if node.flags.read_only && perm & RESIZE != 0 {
            return Err(Error::new(Errno::EACCES, "Image is read-only"));
        }
        Ok(())
    }
}

fn names(bits: u8) -> String {
    let all = [
        (CONSISTENT_READ, "consistent read"),
        (WRITE, "write"),
        (WRITE_UNCHANGED, "write unchanged"),
        (RESIZE, "resize"),
    ];
    all.iter().filter(|(b, _)| bits & b != 0).map(|(_, n)| *n).collect::<Vec<_>>().join(", ")
}

impl Graph {
    /// Makes every driver hold what the graph as it is now asks for; all of them, or none and an error.
    pub(super) async fn refresh_perms(self: &Rc<Graph>) -> Result<(), Error> {
        let wanted: Vec<(NodeId, Cumulated, Cumulated)> = {
            let state = self.state.borrow();
            let mut wanted = Vec::new();
            let perms = state.perms();
            for (id, n) in &state.nodes {
                state.conflict(&perms, *id, n)?;
                let (perm, mut shared) = perms.of(*id);
                if n.common.force_share {
                    shared = ALL;
                }
                wanted.push((*id, (perm, shared), n.held));
            }
            wanted
        };
        let mut prepared = Vec::new();
        for (id, want, held) in wanted {
            if want == held {
                continue;
            }
            let driver = match self.state.borrow().nodes.get(&id) {
                Some(n) => n.driver.clone(),
                None => continue,
            };
            if let Err(e) = driver.set_perm_prepare(want.0, want.1).await {
                for (_, d, _) in &prepared {
                    let d: &std::sync::Arc<dyn crate::driver::Driver> = d;
                    d.set_perm_abort();
                }
                return Err(e);
            }
            prepared.push((id, driver, want));
        }
        for (id, driver, want) in prepared {
            driver.set_perm_commit();
            if let Some(n) = self.state.borrow_mut().nodes.get_mut(&id) {
                n.held = want;
            }
        }
        Ok(())
    }
}
