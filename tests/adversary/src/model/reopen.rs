//! blockdev-reopen: a list of nodes with all their options anew, all of them or none.

use ringblock_tests::Rng;
use serde_json::{Value, json};

use super::files::{Files, SECTOR};
use super::graph::{Common, Driver, Graph, Key, Role};
use super::nodes::{draw_backing, draw_common, flag, link, text, window};
use super::world::{Answer, Refusal, World, refuse, skip};

/// Why a list may be refused. Lists often have several faults, and nothing says which is told first.
const FAULTS: [&str; 14] = [
    "node-name not specified",
    "Failed to find node with node-name=",
    "Cannot find device=",
    "Cannot change the option '",
    "Changing the '",
    "backing is missing for",
    "would create a cycle",
    "'data-file' ",
    "cannot be greater than size of the containing file",
    "has to be smaller or equal to the",
    "setting detect-zeroes to unmap is not allowed",
    "Permission conflict on node",
    "ead-only",
    "lock",
];

pub(super) fn blockdev_reopen(w: &mut World, args: &Value) -> Answer {
    let list = args["options"].as_array().cloned().unwrap_or_default();
    match all(w, &list) {
        Err(Refusal::Text(mut texts)) => {
            texts.extend(FAULTS.iter().map(|f| (*f).to_owned()));
            Err(Refusal::Text(texts))
        }
        other => other,
    }
}

fn all(w: &mut World, list: &[Value]) -> Answer {
    if twice(list) {
        return skip();
    }
    // What is let go is gone for the whole list.
    for options in list.iter().filter(|v| v.get("backing") == Some(&Value::Null)) {
        if let Some(key) = w.graph.find(text(options, "node-name"))
            && let Some(node) = w.graph.nodes.get_mut(&key)
        {
            node.edges.retain(|e| e.name != "backing");
        }
    }
    for options in list {
        let name = text(options, "node-name");
        if name.is_empty() {
            return refuse("node-name not specified");
        }
        let Some(key) = w.graph.find(name) else { return refuse("Failed to find node with node-name=") };
        match one(&mut w.graph, &w.files, key, options, Common::default()) {
            // The list as a whole may have none.
            Err(Refusal::Text(t)) if list.len() > 1 && t == ["would create a cycle"] => return skip(),
            other => other?,
        }
    }
    if let Some(conflict) = w.graph.conflict() {
        return refuse(conflict);
    }
    w.graph.collect();
    Ok(())
}

/// Whether a node is in the list by itself and in place in another's options as well: which of the two wins is nobody's wish.
fn twice(list: &[Value]) -> bool {
    fn names<'a>(v: &'a Value, all: &mut Vec<&'a str>) {
        all.extend(v["node-name"].as_str());
        for edge in ["file", "data-file", "backing"] {
            if v[edge].is_object() {
                names(&v[edge], all);
            }
        }
    }
    let mut all = Vec::new();
    list.iter().for_each(|v| names(v, &mut all));
    all.sort_unstable();
    all.windows(2).any(|w| w[0] == w[1])
}

fn one(g: &mut Graph, files: &Files, key: Key, v: &Value, from: Common) -> Result<(), Refusal> {
    let node = &g.nodes[&key];
    let driver = match &node.driver {
        Driver::File(_) => "file",
        Driver::Null { .. } => "null-co",
        Driver::Raw { .. } => "raw",
        Driver::Qcow2 => "qcow2",
    };
    if text(v, "driver") != driver {
        return refuse("Cannot change the option 'driver'");
    }
    if v["node-name"].as_str().is_some_and(|n| node.name.as_deref() != Some(n)) {
        return refuse("Cannot change the option 'node-name'");
    }
    let common = Common::of(v, from)?;
    // A window on a window that changes with it is too much for anybody.
    let above_raw = g.parents(key).any(|(k, _)| matches!(g.nodes[&k].driver, Driver::Raw { .. }));
    let before = node.driver.clone();
    let mut new = node.driver.clone();
    match &mut new {
        Driver::File(file) if files.find(text(v, "filename")) != Some(*file) => {
            return refuse("Cannot change the option 'filename'");
        }
        Driver::Null { size } if v["size"].as_u64() != Some(*size) => {
            return refuse("Cannot change the option 'size'");
        }
        Driver::Null { .. } if !flag(v, "read-zeroes", false) => {
            return refuse("Cannot change the option 'read-zeroes'");
        }
        Driver::Raw { offset, size } => {
            let (o, s) = (v["offset"].as_u64().unwrap_or(0), v["size"].as_u64());
            if (o == 0 && s.is_none()) != (*offset == 0 && size.is_none()) {
                return refuse("Cannot change the option '");
            }
            (*offset, *size) = (o, s);
        }
        _ => {}
    }
    if let Some(node) = g.nodes.get_mut(&key) {
        (node.common, node.driver, node.options) = (common, new, v.clone());
    }
    children(g, files, key, v, common)?;
    if before != g.nodes[&key].driver && above_raw {
        return skip();
    }
    window(g, files, key)
}

fn children(g: &mut Graph, files: &Files, key: Key, v: &Value, common: Common) -> Result<(), Refusal> {
    let format = g.nodes[&key].driver == Driver::Qcow2;
    let edges: &[(&str, Role)] = match g.nodes[&key].driver {
        Driver::Raw { .. } => &[("file", Role::Data)],
        Driver::Qcow2 => &[("file", Role::Image), ("data-file", Role::Data)],
        _ => &[],
    };
    for (edge, _) in edges {
        let there = g.child(key, edge);
        match (v.get(*edge), there) {
            (None, None) => {}
            (None, Some(_)) => return if format { refuse("'data-file' is required") } else { skip() },
            (Some(Value::String(name)), Some(child)) => {
                if g.nodes[&child].name.as_ref() != Some(name) {
                    // another file is another image
                    return if format { skip() } else { refuse("Changing the '") };
                }
            }
            (Some(of), Some(child)) => {
                // in place: what it inherits comes from the parent's new options
                let role = if *edge == "file" && format { Role::Image } else { Role::Data };
                one(g, files, child, of, common.inherited(role))?;
            }
            (Some(_), None) => return refuse("'data-file' can only be set"),
        }
    }
    if format { backing(g, files, key, v, common) } else { Ok(()) }
}

fn backing(g: &mut Graph, files: &Files, key: Key, v: &Value, common: Common) -> Result<(), Refusal> {
    let there = g.child(key, "backing");
    let names = g.child(key, "file").and_then(|f| files.stored(g, f)).and_then(|f| files.image(f)?.backing);
    match v.get("backing") {
        None if there.is_some() || names.is_some() => refuse("backing is missing for"),
        None => Ok(()),
        Some(Value::Null) => {
            if let Some(node) = g.nodes.get_mut(&key) {
                node.edges.retain(|e| e.name != "backing");
            }
            Ok(())
        }
        Some(of @ Value::Object(_)) if there.is_some() => match there {
            Some(child) => one(g, files, child, of, common.inherited(Role::Cow)),
            None => Ok(()),
        },
        Some(of) => link(g, files, key, "backing", Role::Cow, of, 0).map(drop),
    }
}

/// The options of some nodes as they were given last, changed here and there.
pub(super) fn draw(rng: &mut Rng, w: &World) -> Option<Value> {
    let mut list = Vec::new();
    for _ in 0..1 + rng.below(3) {
        let name = super::nodes::draw_node(rng, &w.graph);
        let key = w.graph.find(&name)?;
        if list.iter().any(|v: &Value| text(v, "node-name") == name) {
            continue;
        }
        list.push(changed(rng, w, key));
    }
    Some(json!({"options": list}))
}

fn changed(rng: &mut Rng, w: &World, key: Key) -> Value {
    let node = &w.graph.nodes[&key];
    let mut v = node.options.clone();
    if rng.chance(60) {
        for option in ["read-only", "auto-read-only", "discard", "detect-zeroes", "cache"] {
            v.as_object_mut().map(|o| o.remove(option));
        }
        draw_common(rng, &mut v);
    }
    match node.driver {
        Driver::Raw { .. } => {
            if rng.chance(40) {
                v["offset"] = json!(rng.below(64) * SECTOR);
            }
            if v.get("size").is_some() && rng.chance(40) {
                v["size"] = json!(rng.below(100) * SECTOR);
            }
        }
        Driver::Qcow2
            if w.graph.child(key, "backing").is_some() && v.get("backing").is_none() || rng.chance(40) =>
        {
            match w.graph.child(key, "file").and_then(|f| w.files.stored(&w.graph, f)) {
                Some(file) => draw_backing(rng, w, file, &mut v),
                None => v["backing"] = Value::Null,
            }
        }
        Driver::Null { .. } if rng.chance(5) => v["size"] = json!(512),
        _ => {}
    }
    v
}
