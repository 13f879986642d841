//! The reference's block graph: nodes, edges, users, permissions. Written from the rules alone, as plainly as they can be
//! written: everything is worked out anew each time.
//!
//! ```text
//!   user (export, disk) ─► node ─ edge "file" ─► node …      held by: the monitor, a parent, a user
//! ```

use std::collections::BTreeMap;

use serde_json::Value;

/// Permissions, as bits.
pub(super) const READ: u8 = 1;
pub(super) const WRITE: u8 = 2;
pub(super) const UNCHANGED: u8 = 4;
pub(super) const RESIZE: u8 = 8;
pub(super) const ALL: u8 = 15;

/// Number of a node; never used again.
pub(super) type Key = u32;

/// Options that every node has.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct Common {
    pub(super) read_only: bool,
    pub(super) auto_read_only: bool,
    pub(super) direct: bool,
    pub(super) no_flush: bool,
    pub(super) discard: bool,
    /// 0 off, 1 on, 2 unmap.
    pub(super) detect: u8,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Driver {
    /// A file of the host, by its number in `Files`.
    File(usize),
    Null {
        size: u64,
    },
    Raw {
        offset: u64,
        size: Option<u64>,
    },
    Qcow2,
}

/// What a parent uses a child for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// All its users' permissions pass.
    Filtered,
    /// Tables and data of a format.
    Image,
    /// Guest data alone.
    Data,
    /// A backing image.
    Cow,
}

#[derive(Clone, Debug)]
pub(super) struct Edge {
    pub(super) name: &'static str,
    pub(super) role: Role,
    pub(super) child: Key,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    /// `None`: the engine makes up a name.
    pub(super) name: Option<String>,
    pub(super) driver: Driver,
    pub(super) common: Common,
    pub(super) monitor: bool,
    pub(super) edges: Vec<Edge>,
    /// Of a raw node: the size that it shows, which follows its file only when it is opened, reopened or resized itself.
    pub(super) len: Option<u64>,
    /// As it was asked for last.
    pub(super) options: Value,
}

/// An export of the NBD server.
#[derive(Clone, Debug)]
pub(super) struct Export {
    pub(super) node: Key,
    /// For clients.
    pub(super) name: String,
    pub(super) writable: bool,
    pub(super) iothread: Option<String>,
}

/// Somebody who sends requests.
#[derive(Clone, Debug)]
pub(super) enum User {
    /// Over NBD, to the export of this id.
    Client { export: String, size: u64 },
    /// In the process.
    Disk { node: Key, writable: bool },
}

/// The whole of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Graph {
    pub(super) nodes: BTreeMap<Key, Node>,
    pub(super) server: bool,
    pub(super) exports: BTreeMap<String, Export>,
    /// Objects.
    pub(super) threads: Vec<String>,
    /// By slot.
    pub(super) users: BTreeMap<usize, User>,
    pub(super) next: Key,
}

impl Graph {
    pub(super) fn find(&self, name: &str) -> Option<Key> {
        self.nodes.iter().find(|(_, n)| n.name.as_deref() == Some(name)).map(|(k, _)| *k)
    }

    pub(super) fn child(&self, key: Key, edge: &str) -> Option<Key> {
        self.nodes[&key].edges.iter().find(|e| e.name == edge).map(|e| e.child)
    }

    /// Parents and the edges they use.
    pub(super) fn parents(&self, key: Key) -> impl Iterator<Item = (Key, &Edge)> {
        self.nodes
            .iter()
            .flat_map(move |(k, n)| n.edges.iter().filter(move |e| e.child == key).map(|e| (*k, e)))
    }

    /// Roots on a node: what each uses. All let others do everything but resize.
    pub(super) fn roots(&self, key: Key) -> Vec<u8> {
        let perm = |writable: bool| READ | if writable { WRITE } else { 0 };
        let exports = self.exports.values().filter(|e| e.node == key).map(|e| perm(e.writable));
        let disks = self.users.values().filter_map(|u| match u {
            User::Disk { node, writable } if *node == key => Some(perm(*writable)),
            _ => None,
        });
        exports.chain(disks).collect()
    }

    /// The clients of an export.
    pub(super) fn clients(&self, id: &str) -> usize {
        self.users.values().filter(|u| matches!(u, User::Client { export, .. } if export == id)).count()
    }

    pub(super) fn reaches(&self, from: Key, to: Key) -> bool {
        from == to || self.nodes[&from].edges.iter().any(|e| self.reaches(e.child, to))
    }

    /// Drops what nobody holds.
    pub(super) fn collect(&mut self) {
        loop {
            let free =
                |k: Key, n: &Node| !n.monitor && self.parents(k).next().is_none() && self.roots(k).is_empty();
            let Some(key) = self.nodes.iter().find(|(k, n)| free(**k, n)).map(|(k, _)| *k) else { return };
            self.nodes.remove(&key);
        }
    }

    /// What all users of a node use, and what all of them let others do.
    pub(super) fn cumulated(&self, key: Key) -> (u8, u8) {
        self.uses(key).iter().fold((0, ALL), |(p, s), u| (p | u.0, s & u.1))
    }

    fn uses(&self, key: Key) -> Vec<(u8, u8)> {
        let mut all: Vec<(u8, u8)> = self.roots(key).into_iter().map(|p| (p, ALL & !RESIZE)).collect();
        all.extend(self.parents(key).map(|(parent, edge)| self.through(parent, edge.role)));
        all
    }

    /// What an edge uses of its child, and shares.
    pub(super) fn through(&self, parent: Key, role: Role) -> (u8, u8) {
        let (perm, shared) = self.cumulated(parent);
        match role {
            Role::Filtered => (perm, shared),
            Role::Cow if shared & WRITE != 0 => (perm & READ, ALL),
            Role::Cow => (perm & READ, READ | UNCHANGED),
            Role::Image if self.nodes[&parent].common.read_only => (perm | READ, READ | UNCHANGED),
            Role::Image => (perm | READ | WRITE | RESIZE, READ | UNCHANGED),
            Role::Data if perm & (WRITE | UNCHANGED) != 0 => (perm | READ | WRITE | RESIZE, READ | UNCHANGED),
            Role::Data => (perm | READ, READ | UNCHANGED),
        }
    }

    /// Why the graph cannot be as it is.
    pub(super) fn conflict(&self) -> Option<&'static str> {
        for (key, node) in &self.nodes {
            let uses = self.uses(*key);
            for (i, a) in uses.iter().enumerate() {
                for (j, b) in uses.iter().enumerate() {
                    if i != j && a.0 & !b.1 != 0 {
                        return Some("Permission conflict on node");
                    }
                }
            }
            if node.common.read_only && self.cumulated(*key).0 & (WRITE | UNCHANGED) != 0 {
                return Some("ead-only");
            }
        }
        self.lock_conflict()
    }

    /// Two nodes on one file are to each other what two processes would be.
    fn lock_conflict(&self) -> Option<&'static str> {
        let files: Vec<(Key, usize)> = self
            .nodes
            .iter()
            .filter_map(|(k, n)| match n.driver {
                Driver::File(f) => Some((*k, f)),
                _ => None,
            })
            .collect();
        for (a, file) in &files {
            for (b, other) in &files {
                if a != b && file == other && self.cumulated(*a).0 & !self.cumulated(*b).1 != 0 {
                    return Some("lock");
                }
            }
        }
        None
    }

    /// A name that the listings and this graph have in common: what the engine makes up is told by its place.
    pub(super) fn label(&self, key: Key) -> String {
        match &self.nodes[&key].name {
            Some(name) => name.clone(),
            None => match self.parents(key).next() {
                Some((parent, edge)) => format!("{}/{}", self.label(parent), edge.name),
                None => "?".into(),
            },
        }
    }
}
