//! The listings of the control pipe against the reference.
//!
//! ```text
//!   query-named-block-nodes, x-debug-query-block-graph,   ─► sorted lines ─┐
//!   query-block-exports, query-block, -blockstats, qom-list                ├─ equal?
//!   the reference                                          ─► sorted lines ┘
//! ```
//!
//! Nodes whose names the engine makes up are told by their place: `n0/file`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::exports::root_perms;
use super::graph::{Driver, READ, RESIZE, UNCHANGED, WRITE};
use super::nodes::text;
use super::world::World;

/// The answers of all queries.
pub(super) struct Listing {
    nodes: Value,
    graph: Value,
    exports: Value,
    devices: Value,
    stats: Value,
    objects: Value,
}

impl Listing {
    /// Asks.
    pub(super) fn ask(run: impl Fn(&str, &Value) -> Result<Value, String>) -> Result<Listing, String> {
        Ok(Listing {
            nodes: run("query-named-block-nodes", &json!({"flat": true}))?,
            graph: run("x-debug-query-block-graph", &json!({}))?,
            exports: run("query-block-exports", &json!({}))?,
            devices: run("query-block", &json!({}))?,
            stats: run("query-blockstats", &json!({"query-nodes": true}))?,
            objects: run("qom-list", &json!({"path": "/objects"}))?,
        })
    }

    /// What a command that was refused must leave as it was: everything but what is counted and what takes space.
    pub(super) fn trace(&self) -> Vec<Value> {
        let mut nodes = self.nodes.clone();
        for node in nodes.as_array_mut().into_iter().flatten() {
            node["image"]["actual-size"] = Value::Null;
            // A file grows with its image whenever a guest writes.
            if node["drv"] == "file" || node["drv"] == "raw" {
                node["image"]["virtual-size"] = Value::Null;
            }
        }
        let stats: Vec<&Value> = list(&self.stats).map(|s| &s["node-name"]).collect();
        vec![nodes, self.graph.clone(), self.exports.clone(), self.objects.clone(), json!(stats)]
    }

    /// Nothing is left: no nodes, no users, no exports.
    pub(super) fn is_empty(&self) -> bool {
        [&self.nodes, &self.graph["nodes"], &self.exports].iter().all(|v| list(v).next().is_none())
    }

    /// An export is on its way out.
    pub(super) fn is_leaving(&self) -> bool {
        list(&self.exports).any(|e| e["shutting-down"] == true)
    }

    /// The names by place of the nodes that the engine named.
    fn labels(&self) -> BTreeMap<String, String> {
        let by_id: BTreeMap<u64, &str> =
            list(&self.graph["nodes"]).map(|n| (n["id"].as_u64().unwrap_or(0), text(n, "name"))).collect();
        let parent = |name: &str| {
            let edge = list(&self.graph["edges"])
                .find(|e| e["child"].as_u64().and_then(|c| by_id.get(&c)).is_some_and(|n| *n == name))?;
            Some((*by_id.get(&edge["parent"].as_u64()?)?, text(edge, "name")))
        };
        let label = |name: &str| {
            let (mut at, mut tail) = (name.to_owned(), String::new());
            while at.starts_with('#') {
                let Some((up, edge)) = parent(&at) else { return format!("?{tail}") };
                tail = format!("/{edge}{tail}");
                at = up.to_owned();
            }
            at + &tail
        };
        by_id.values().map(|name| ((*name).to_owned(), label(name))).collect()
    }

    /// As sorted lines; `sizeless` are the nodes whose size the reference does not know.
    fn lines(&self, sizeless: &BTreeSet<String>) -> Vec<String> {
        let labels = self.labels();
        let label = |name: &str| labels.get(name).cloned().unwrap_or_else(|| name.to_owned());
        let mut lines = Vec::new();
        for n in list(&self.nodes) {
            let (node, size) = (label(text(n, "node-name")), &n["image"]["virtual-size"]);
            let size = if sizeless.contains(&node) { "?".into() } else { size.to_string() };
            lines.push(format!(
                "node {node} {} ro {} size {size} detect {} direct {} no-flush {} depth {}",
                text(n, "drv"),
                n["ro"],
                text(n, "detect_zeroes"),
                n["cache"]["direct"],
                n["cache"]["no-flush"],
                n["backing_file_depth"]
            ));
        }
        let names: BTreeMap<u64, String> = list(&self.graph["nodes"])
            .map(|n| (n["id"].as_u64().unwrap_or(0), label(text(n, "name"))))
            .collect();
        let name = |v: &Value| v.as_u64().and_then(|id| names.get(&id).cloned()).unwrap_or_default();
        for e in list(&self.graph["edges"]) {
            let (parent, child) = (name(&e["parent"]), name(&e["child"]));
            let (edge, perm, shared) = (text(e, "name"), &e["perm"], &e["shared-perm"]);
            lines.push(format!("edge {parent} -{edge}-> {child} {perm} {shared}"));
        }
        lines.extend(list(&self.stats).map(|s| format!("stats {}", label(text(s, "node-name")))));
        for e in list(&self.exports) {
            lines.push(format!(
                "export {} of {} leaving {}",
                text(e, "id"),
                text(e, "node-name"),
                e["shutting-down"]
            ));
        }
        let threads = list(&self.objects).map(|o| text(o, "name")).filter(|n| *n != "type");
        lines.extend(threads.map(|t| format!("object {t}")));
        lines.extend(list(&self.devices).map(|d| format!("device {d}")));
        lines.sort();
        lines
    }

    /// What is not as the reference has it.
    pub(super) fn compare(&self, w: &World) -> Result<(), String> {
        let g = &w.graph;
        let sizeless = g.nodes.keys().filter(|k| w.files.size(g, **k).is_none()).map(|k| g.label(*k));
        let (found, wanted) = (self.lines(&sizeless.collect()), expected(w));
        if found == wanted {
            return Ok(());
        }
        let only = |a: &[String], b: &[String]| -> Vec<String> {
            let mut b = b.to_vec();
            a.iter()
                .filter(|line| match b.iter().position(|o| o == *line) {
                    Some(at) => {
                        b.remove(at);
                        false
                    }
                    None => true,
                })
                .cloned()
                .collect()
        };
        let (engine, reference) =
            (only(&found, &wanted).join("\n    "), only(&wanted, &found).join("\n    "));
        Err(format!("listings differ\n  engine:\n    {engine}\n  reference:\n    {reference}"))
    }
}

fn list(v: &Value) -> impl Iterator<Item = &Value> {
    v.as_array().into_iter().flatten()
}

fn permissions(bits: u8) -> Value {
    let all =
        [(READ, "consistent-read"), (WRITE, "write"), (UNCHANGED, "write-unchanged"), (RESIZE, "resize")];
    all.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect()
}

/// The reference, as lines of the same form.
fn expected(w: &World) -> Vec<String> {
    let g = &w.graph;
    let mut lines = Vec::new();
    let root = |(perm, shared): (u8, u8), child: &str| {
        format!("edge  -root-> {child} {} {}", permissions(perm), permissions(shared))
    };
    for (key, n) in &g.nodes {
        let label = g.label(*key);
        let driver = match n.driver {
            Driver::File(_) => "file",
            Driver::Null { .. } => "null-co",
            Driver::Raw { .. } => "raw",
            Driver::Qcow2 => "qcow2",
        };
        let mut depth = 0;
        let mut below = g.child(*key, "backing");
        while let Some(b) = below {
            (depth, below) = (depth + 1, g.child(b, "backing"));
        }
        // of an image as it is stored the reference does not know the size
        let size = w.files.size(g, *key);
        lines.push(format!(
            "node {label} {driver} ro {} size {} detect {} direct {} no-flush {} depth {depth}",
            n.common.read_only,
            size.map_or("?".into(), |s| s.to_string()),
            ["off", "on", "unmap"][usize::from(n.common.detect.min(2))],
            n.common.direct,
            n.common.no_flush
        ));
        lines.push(format!("stats {label}"));
        for e in &n.edges {
            let (perm, shared) = g.through(*key, e.role);
            let (child, perm, shared) = (g.label(e.child), permissions(perm), permissions(shared));
            lines.push(format!("edge {label} -{}-> {child} {perm} {shared}", e.name));
        }
        lines.extend(g.roots(*key).iter().map(|perm| root(root_perms(perm & WRITE != 0), &label)));
    }
    for (id, e) in &g.exports {
        lines.push(format!("export {id} of {} leaving false", g.label(e.node)));
    }
    lines.extend(g.threads.iter().map(|t| format!("object {t}")));
    lines.sort();
    lines
}
