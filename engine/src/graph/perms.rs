//! Permissions: what each user of a node needs and lets others do, cumulated down the graph (reference, part 5 item 4).
//!
//! ```text
//!   roots and parents of a node ─► (perm = OR, shared = AND) ─► rule of each edge's role ─► child
//! ```
//!
//! Invariant: no edge or root uses what another one on the same node does not share; drivers hold (locks, descriptors)
//! exactly the cumulated permissions of their node, changed by prepare → commit, all drivers or none.

use std::rc::Rc;

use super::{Edge, Graph, Node, NodeId, State};
use crate::driver::{Role, perm::*};
use crate::error::{Errno, Error};

/// Permissions (used, shared) of a node, over all its users.
type Cumulated = (u8, u8);

/// One user of a node.
struct User {
    perm: u8,
    shared: u8,
    who: String,
    how: String,
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

    fn users(&self, id: NodeId) -> Vec<User> {
        let mut users = Vec::new();
        for r in self.roots.values().filter(|r| r.node == id) {
            users.push(User { perm: r.perm, shared: r.shared, who: r.user.clone(), how: "root".to_owned() });
        }
        for (pid, p) in &self.nodes {
            for e in p.edges.iter().filter(|e| e.node == Some(id)) {
                let (perm, shared) = self.edge(p, e, self.cumulated(*pid));
                users.push(User { perm, shared, who: format!("node '{}'", p.name), how: e.name.to_owned() });
            }
        }
        users
    }

    /// OR of what the users of a node use, AND of what they share.
    pub(super) fn cumulated(&self, id: NodeId) -> (u8, u8) {
        self.users(id).iter().fold((0, ALL), |(p, s), u| (p | u.perm, s & u.shared))
    }

    fn conflict(&self, id: NodeId, node: &Node) -> Result<(), Error> {
        let users = self.users(id);
        for a in &users {
            for b in users.iter().filter(|b| !std::ptr::eq(*b, a)) {
                let clash = a.perm & !b.shared;
                if clash != 0 {
                    let text = format!(
                        "Permission conflict on node '{n}': permissions '{p}' are both required by {a} (uses node '{n}' as '{ah}' child) and unshared by {b} (uses node '{n}' as '{bh}' child).",
                        n = node.name,
                        p = names(clash),
                        a = a.who,
                        ah = a.how,
                        b = b.who,
                        bh = b.how
                    );
                    return Err(Error::new(Errno::EPERM, text));
                }
            }
        }
        let (perm, _) = self.cumulated(id);
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
            for (id, n) in &state.nodes {
                state.conflict(*id, n)?;
                let (perm, mut shared) = state.cumulated(*id);
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
