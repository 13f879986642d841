//! blockdev-add, blockdev-del, block_resize: what the reference says of them, and how they are drawn.

use ringblock_tests::Rng;
use serde_json::{Value, json};

use super::files::{Content, Files, SECTOR};
use super::graph::{Common, Driver, Edge, Graph, Key, Node, RESIZE, Role};
use super::world::{Answer, Refusal, World, refuse, skip};

/// How deep options may describe nodes in nodes.
const DEPTH: u32 = 8;

pub(super) fn flag(v: &Value, name: &str, default: bool) -> bool {
    v[name].as_bool().unwrap_or(default)
}

pub(super) fn text<'a>(v: &'a Value, name: &str) -> &'a str {
    v[name].as_str().unwrap_or("")
}

impl Common {
    /// The options that every node has, over what is inherited.
    pub(super) fn of(v: &Value, from: Common) -> Result<Common, Refusal> {
        let common = Common {
            read_only: flag(v, "read-only", from.read_only),
            auto_read_only: flag(v, "auto-read-only", from.auto_read_only),
            direct: flag(&v["cache"], "direct", from.direct),
            no_flush: flag(&v["cache"], "no-flush", from.no_flush),
            discard: v["discard"].as_str().map_or(from.discard, |d| d == "unmap"),
            detect: match v["detect-zeroes"].as_str() {
                None => from.detect,
                Some("on") => 1,
                Some("unmap") => 2,
                Some(_) => 0,
            },
        };
        if common.detect == 2 && !common.discard {
            return refuse("setting detect-zeroes to unmap is not allowed");
        }
        Ok(common)
    }

    /// What a child in place takes over.
    pub(super) fn inherited(self, role: Role) -> Common {
        Common { read_only: self.read_only || role == Role::Cow, discard: true, detect: 0, ..self }
    }
}

/// Whether a name may be given.
pub(super) fn is_id(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

/// Opens what options describe.
pub(super) fn open(
    g: &mut Graph,
    files: &Files,
    v: &Value,
    from: Common,
    depth: u32,
) -> Result<Key, Refusal> {
    if depth > DEPTH {
        return skip();
    }
    let common = Common::of(v, from)?;
    let name = v["node-name"].as_str().map(str::to_owned);
    if let Some(name) = &name {
        if !is_id(name) {
            return refuse("Invalid node-name");
        }
        if g.find(name).is_some() {
            return refuse("Duplicate nodes with node-name=");
        }
    }
    let key = g.next;
    g.next += 1;
    let driver = match text(v, "driver") {
        "file" => match files.find(text(v, "filename")) {
            Some(file) => Driver::File(file),
            None => return refuse("No such file or directory"),
        },
        "null-co" => Driver::Null { size: v["size"].as_u64().unwrap_or(1 << 30) },
        "raw" => Driver::Raw { offset: v["offset"].as_u64().unwrap_or(0), size: v["size"].as_u64() },
        "qcow2" => Driver::Qcow2,
        _ => return skip(),
    };
    let node = Node {
        name,
        driver: driver.clone(),
        common,
        monitor: false,
        edges: Vec::new(),
        len: None,
        options: v.clone(),
    };
    g.nodes.insert(key, node);
    match driver {
        Driver::Raw { offset, size } => {
            let role = if offset == 0 && size.is_none() { Role::Filtered } else { Role::Data };
            link(g, files, key, "file", role, &v["file"], depth)?;
            agreed(g)?;
            window(g, files, key)?;
        }
        Driver::Qcow2 => open_qcow2(g, files, key, v, depth)?,
        Driver::File(_) | Driver::Null { .. } => {}
    }
    Ok(key)
}

/// Links a child, opening it if it is described in place.
pub(super) fn link(
    g: &mut Graph,
    files: &Files,
    parent: Key,
    edge: &'static str,
    role: Role,
    of: &Value,
    depth: u32,
) -> Result<Key, Refusal> {
    let child = match of.as_str() {
        Some(name) => match g.find(name) {
            None => return refuse("Cannot find device="),
            Some(child) if g.reaches(child, parent) => return refuse("would create a cycle"),
            Some(child) => child,
        },
        None => {
            let from = g.nodes[&parent].common.inherited(role);
            open(g, files, of, from, depth + 1)?
        }
    };
    if let Some(node) = g.nodes.get_mut(&parent) {
        node.edges.retain(|e| e.name != edge);
        node.edges.push(Edge { name: edge, role, child });
    }
    Ok(child)
}

/// Whether a raw node's window lies in its file; if so, what it shows.
pub(super) fn window(g: &mut Graph, files: &Files, key: Key) -> Result<(), Refusal> {
    let Driver::Raw { offset, size } = g.nodes[&key].driver else { return Ok(()) };
    let real = g.child(key, "file").and_then(|c| files.size(g, c));
    let len = match (real, size) {
        // Of an image as it is stored only the format knows the size.
        (None, None) if offset == 0 => None,
        (None, _) => return skip(),
        (Some(real), _) if offset > real => {
            return refuse("cannot be greater than size of the containing file");
        }
        (Some(real), Some(size)) if size > real - offset => {
            return refuse("has to be smaller or equal to the");
        }
        (_, Some(size)) if !size.is_multiple_of(SECTOR) => {
            return refuse("Specified size is not multiple of 512");
        }
        (_, Some(size)) => Some(size),
        (Some(real), None) => Some(real - offset),
    };
    if let Some(node) = g.nodes.get_mut(&key) {
        node.len = len;
    }
    Ok(())
}

/// What is said of permissions that contradict each other, and of writers of what is read-only.
pub(super) const CONFLICTS: [&str; 3] = ["Permission conflict on node", "ead-only", "lock"];

/// Permissions are in force as soon as a child is there.
pub(super) fn agreed(g: &Graph) -> Result<(), Refusal> {
    match g.conflict() {
        None => Ok(()),
        // Where several are true nothing says which is told.
        Some(_) => Err(Refusal::Text(CONFLICTS.map(str::to_owned).to_vec())),
    }
}

fn open_qcow2(g: &mut Graph, files: &Files, key: Key, v: &Value, depth: u32) -> Result<(), Refusal> {
    let file = link(g, files, key, "file", Role::Image, &v["file"], depth)?;
    agreed(g)?;
    let Some(image) = files.stored(g, file).and_then(|f| files.image(f)) else {
        return refuse("Image is not in qcow2 format");
    };
    match (image.data_file, v.get("data-file")) {
        (Some(_), None) => return refuse("'data-file' is required for this image"),
        (None, Some(_)) => return refuse("'data-file' can only be set"),
        (Some(data), Some(of)) => {
            let child = link(g, files, key, "data-file", Role::Data, of, depth)?;
            agreed(g)?;
            if g.nodes[&child].driver != Driver::File(data) {
                return skip();
            }
        }
        (None, None) => {}
    }
    match v.get("backing") {
        Some(Value::Null) => {}
        Some(of) => drop(link(g, files, key, "backing", Role::Cow, of, depth)?),
        None => {
            if let Some((file, format)) = image.backing {
                named_backing(g, files, key, file, format, depth)?;
            }
        }
    }
    Ok(())
}

/// The backing image that an image names: read-only, and of nobody else.
fn named_backing(
    g: &mut Graph,
    files: &Files,
    key: Key,
    file: usize,
    format: &str,
    depth: u32,
) -> Result<(), Refusal> {
    let options = json!({"driver": format, "file": {"driver": "file", "filename": files.0[file].path}});
    let from = Common { auto_read_only: false, ..g.nodes[&key].common.inherited(Role::Cow) };
    let child = open(g, files, &options, from, depth + 1)?;
    if let Some(node) = g.nodes.get_mut(&key) {
        node.edges.push(Edge { name: "backing", role: Role::Cow, child });
    }
    Ok(())
}

/// Options that contradict each other are told before anything is opened.
fn sound(v: &Value, from: Common) -> Answer {
    let common = Common::of(v, from)?;
    let edges = [("file", Role::Image), ("data-file", Role::Data), ("backing", Role::Cow)];
    let mut inner = edges.iter().filter(|(edge, _)| v[*edge].is_object());
    inner.try_for_each(|(edge, role)| sound(&v[*edge], common.inherited(*role)))
}

pub(super) fn blockdev_add(w: &mut World, args: &Value) -> Answer {
    if args["node-name"].is_null() {
        return refuse("'node-name' must be specified for the root node");
    }
    sound(args, Common::default())?;
    let key = open(&mut w.graph, &w.files, args, Common::default(), 0)?;
    agreed(&w.graph)?;
    if let Some(node) = w.graph.nodes.get_mut(&key) {
        node.monitor = true;
    }
    Ok(())
}

pub(super) fn blockdev_del(w: &mut World, args: &Value) -> Answer {
    let g = &mut w.graph;
    let Some(key) = g.find(text(args, "node-name")) else {
        return refuse("Failed to find node with node-name=");
    };
    if !g.roots(key).is_empty() {
        return refuse("is in use");
    }
    if !g.nodes[&key].monitor {
        return refuse("is not owned by the monitor");
    }
    if g.parents(key).next().is_some() {
        return refuse("is in use");
    }
    if let Some(node) = g.nodes.get_mut(&key) {
        node.monitor = false;
    }
    g.collect();
    Ok(())
}

/// Why a node keeps its size, whatever is asked.
const BUSY: [&str; 2] = ["Permission conflict on node", "Image is read-only"];

pub(super) fn block_resize(w: &mut World, args: &Value) -> Answer {
    match resize(w, args) {
        // Where both are true nothing says which is told.
        Err(Refusal::Text(texts)) if texts.iter().any(|t| BUSY.contains(&t.as_str())) => {
            Err(Refusal::Text(BUSY.map(str::to_owned).to_vec()))
        }
        other => other,
    }
}

fn resize(w: &mut World, args: &Value) -> Answer {
    let Some(key) = w.graph.find(text(args, "node-name")) else { return refuse("Cannot find device=") };
    let Some(size) = args["size"].as_u64() else { return refuse("expects a >0 size") };
    if w.graph.cumulated(key).1 & RESIZE == 0 {
        return refuse("Permission conflict on node");
    }
    // Down to the file it lives in, all must stand it.
    let (mut at, mut size_there, mut chain) = (key, size, vec![key]);
    while let Driver::Raw { offset, .. } = w.graph.nodes[&at].driver {
        let Some(child) = w.graph.child(at, "file") else { return skip() };
        let others =
            |(parent, e): (Key, &Edge)| parent != at && w.graph.through(parent, e.role).1 & RESIZE == 0;
        if !w.graph.roots(child).is_empty() || w.graph.parents(child).any(others) {
            return refuse("Permission conflict on node");
        }
        (at, size_there) = (child, size_there.saturating_add(offset));
        chain.push(at);
    }
    let data = w.graph.child(at, "data-file");
    let minds = |k: Key| {
        let parents = w.graph.parents(k).filter(|(parent, _)| *parent != at);
        !w.graph.roots(k).is_empty()
            || parents.map(|(p, e)| w.graph.through(p, e.role).1).any(|s| s & RESIZE == 0)
    };
    if data.is_some_and(minds) {
        return refuse("Permission conflict on node");
    }
    if chain.iter().chain(&data).any(|k| w.graph.nodes[k].common.read_only) {
        return refuse("Image is read-only");
    }
    if chain.iter().any(|k| matches!(w.graph.nodes[k].driver, Driver::Raw { size: Some(_), .. })) {
        return refuse("Cannot resize fixed-size raw disks");
    }
    resizable(w, at, size_there, &chain)?;
    w.files.resize(&w.graph, at, size_there);
    chain.iter().rev().try_for_each(|k| window(&mut w.graph, &w.files, *k))
}

/// Whether the node at the end of a chain can have another size, and nobody else loses sight of what it shows.
fn resizable(w: &World, key: Key, size: u64, chain: &[Key]) -> Answer {
    let g = &w.graph;
    match g.nodes[&key].driver {
        Driver::Null { .. } => return refuse("does not support resize"),
        Driver::Qcow2 if !size.is_multiple_of(SECTOR) => {
            return refuse("The new size must be a multiple of 512");
        }
        Driver::Qcow2 => match w.files.can_hide(g, key, size) {
            Some(true) => {}
            Some(false) => return refuse("Operation not supported"),
            None => return skip(),
        },
        Driver::File(f) => {
            let twice = g.nodes.iter().any(|(k, n)| *k != key && n.driver == Driver::File(f));
            // What is stored there is only known above.
            if twice || !matches!(w.files.0[f].content, Content::Bytes(_)) {
                return skip();
            }
        }
        _ => {}
    }
    let outside = |k: Key| match (&g.nodes[&k].driver, g.nodes[&k].len) {
        // It would go by the size of before, until something has it look again.
        (Driver::Raw { size: None, .. }, _) => true,
        (Driver::Raw { offset, .. }, Some(len)) => offset + len > size,
        _ => false,
    };
    let loses = g.nodes.keys().any(|k| !chain.contains(k) && g.reaches(*k, key) && outside(*k));
    if loses || !size.is_multiple_of(SECTOR) || size > super::world::LARGEST { skip() } else { Ok(()) }
}

/// Options of any node, drawn.
pub(super) fn draw_common(rng: &mut Rng, v: &mut Value) {
    if rng.chance(15) {
        v["read-only"] = json!(true);
    }
    if rng.chance(4) {
        v["auto-read-only"] = json!(true);
    }
    if rng.chance(50) {
        v["discard"] = json!(*rng.pick(&["unmap", "unmap", "ignore"]));
    }
    if rng.chance(12) {
        v["detect-zeroes"] = json!(*rng.pick(&["off", "on", "unmap"]));
    }
    if rng.chance(10) {
        v["cache"] = json!({"no-flush": rng.chance(30), "direct": rng.chance(50)});
    }
}

/// A name: mostly free, sometimes taken.
fn draw_name(rng: &mut Rng, g: &Graph) -> String {
    let any = format!("n{}", rng.below(12));
    if g.find(&any).is_some() && !rng.chance(5) { format!("n{}", rng.below(12)) } else { any }
}

pub(super) fn draw_node(rng: &mut Rng, g: &Graph) -> String {
    let named: Vec<&String> = g.nodes.values().filter_map(|n| n.name.as_ref()).collect();
    if named.is_empty() || rng.chance(5) {
        format!("n{}", rng.below(12))
    } else {
        (*rng.pick(&named)).clone()
    }
}

fn draw_file(rng: &mut Rng, w: &World, file: usize) -> Value {
    let mut v = json!({"driver": "file", "filename": w.files.0[file].path});
    if rng.chance(30) {
        draw_common(rng, &mut v);
    }
    if rng.chance(25) {
        v["node-name"] = json!(draw_name(rng, &w.graph));
    }
    v
}

/// Whether a file is open as some node.
fn in_use(w: &World, file: usize) -> bool {
    w.graph.nodes.values().any(|n| n.driver == Driver::File(file))
}

/// Nodes that hold files, files, and what is on top of them.
pub(super) fn draw_add(rng: &mut Rng, w: &World) -> Option<Value> {
    let name = draw_name(rng, &w.graph);
    let file = rng.below(w.files.0.len() as u64) as usize;
    if in_use(w, file) && !rng.chance(2) {
        return draw_filter(rng, w, &name);
    }
    let mut v = match &w.files.0[file].content {
        Content::Opaque => return None,
        Content::Bytes(_) if rng.chance(50) => json!({"driver": "raw", "file": draw_file(rng, w, file)}),
        Content::Image(image) if rng.chance(90) => {
            let mut v = json!({"driver": "qcow2", "file": draw_file(rng, w, file)});
            if let Some(data) = image.data_file.filter(|_| !rng.chance(5)) {
                v["data-file"] = draw_file(rng, w, data);
            }
            draw_backing(rng, w, file, &mut v);
            v
        }
        _ => json!({"driver": "file", "filename": w.files.0[file].path}),
    };
    draw_common(rng, &mut v);
    v["node-name"] = json!(name);
    Some(v)
}

/// The option `backing`: what the image names, nothing, a node.
pub(super) fn draw_backing(rng: &mut Rng, w: &World, file: usize, v: &mut Value) {
    let busy = w.files.image(file).and_then(|i| i.backing).is_some_and(|(b, _)| in_use(w, b));
    match rng.below(10) {
        0..5 if !busy => {}
        5 => v["backing"] = Value::Null,
        6 => {
            let nothing = json!({"driver": "null-co", "read-zeroes": true, "size": draw_size(rng)});
            v["backing"] = json!({"driver": "raw", "file": nothing});
        }
        _ => v["backing"] = json!(draw_node(rng, &w.graph)),
    }
}

/// A node on another node, or on nothing.
fn draw_filter(rng: &mut Rng, w: &World, name: &str) -> Option<Value> {
    let mut v = json!({"driver": "null-co", "read-zeroes": true, "size": draw_size(rng)});
    if rng.chance(85) && !w.graph.nodes.is_empty() {
        let on = draw_node(rng, &w.graph);
        let stored = w.graph.find(&on).and_then(|k| w.files.stored(&w.graph, k));
        v = json!({"driver": if stored.is_some() && rng.chance(80) { "qcow2" } else { "raw" }, "file": on});
        if v["driver"] == "raw" && rng.chance(50) {
            v["offset"] = json!(rng.below(64) * SECTOR);
        }
        if v["driver"] == "raw" && rng.chance(25) {
            v["size"] = json!(rng.below(100) * SECTOR + u64::from(rng.chance(5)));
        }
        if let (Some(file), "qcow2") = (stored, text(&v, "driver")) {
            draw_backing(rng, w, file, &mut v);
        }
    }
    draw_common(rng, &mut v);
    v["node-name"] = json!(name);
    Some(v)
}

fn draw_size(rng: &mut Rng) -> u64 {
    rng.below(400) * SECTOR
}

pub(super) fn draw_del(rng: &mut Rng, w: &World) -> Option<Value> {
    Some(json!({"node-name": draw_node(rng, &w.graph)}))
}

pub(super) fn draw_resize(rng: &mut Rng, w: &World) -> Option<Value> {
    let node = draw_node(rng, &w.graph);
    let size = match rng.below(20) {
        0 => json!(-1),
        1 => json!(rng.below(1 << 18)),
        _ => json!(rng.below(super::world::LARGEST / SECTOR) * SECTOR),
    };
    Some(json!({"node-name": node, "size": size}))
}
