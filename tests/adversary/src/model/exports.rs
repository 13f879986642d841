//! The NBD server, its exports, the objects.

use ringblock_tests::Rng;
use serde_json::{Value, json};

use super::graph::{Export, READ, RESIZE, User, WRITE};
use super::nodes::{agreed, draw_node, flag, is_id, text};
use super::world::{Answer, World, refuse};

pub(super) fn server_start(w: &mut World, _: &Value) -> Answer {
    if w.graph.server {
        return refuse("NBD server already running");
    }
    w.graph.server = true;
    Ok(())
}

pub(super) fn server_stop(w: &mut World, _: &Value) -> Answer {
    if !w.graph.server {
        return refuse("NBD server not running");
    }
    w.graph.server = false;
    for id in w.graph.exports.keys().cloned().collect::<Vec<_>>() {
        remove(w, &id);
    }
    Ok(())
}

fn remove(w: &mut World, id: &str) {
    w.graph.exports.remove(id);
    w.graph.users.retain(|_, u| !matches!(u, User::Client { export, .. } if export == id));
    w.graph.collect();
}

pub(super) fn export_add(w: &mut World, args: &Value) -> Answer {
    let node = text(args, "node-name");
    let name = args["name"].as_str().unwrap_or(node);
    add(w, text(args, "id"), node, name, flag(args, "writable", false), args["iothread"].as_str())
}

/// The older command: the name is the id as well, and a read-only node is exported read-only.
pub(super) fn server_add(w: &mut World, args: &Value) -> Answer {
    let node = text(args, "device");
    let Some(key) = w.graph.find(node) else { return refuse("Cannot find device=") };
    let name = args["name"].as_str().unwrap_or(node);
    let writable = flag(args, "writable", false) && !w.graph.nodes[&key].common.read_only;
    add(w, name, node, name, writable, None)
}

fn add(w: &mut World, id: &str, node: &str, name: &str, writable: bool, iothread: Option<&str>) -> Answer {
    let g = &mut w.graph;
    if !is_id(id) {
        return refuse("Invalid block export id");
    }
    if g.exports.contains_key(id) {
        return refuse("is already in use");
    }
    let Some(key) = g.find(node) else { return refuse("Cannot find device=") };
    if let Some(thread) = iothread.filter(|t| !g.threads.iter().any(|o| o == t)) {
        return refuse(&format!("iothread \"{thread}\" not found"));
    }
    if !g.server {
        return refuse("NBD server not running");
    }
    if g.exports.values().any(|e| e.name == name) {
        return refuse("NBD server already has export named");
    }
    if writable && g.nodes[&key].common.read_only {
        return refuse("Cannot export read-only node as writable");
    }
    let iothread = iothread.map(str::to_owned);
    g.exports.insert(id.to_owned(), Export { node: key, name: name.to_owned(), writable, iothread });
    agreed(g)
}

pub(super) fn export_del(w: &mut World, args: &Value) -> Answer {
    del(w, text(args, "id"), text(args, "mode") == "hard")
}

pub(super) fn server_remove(w: &mut World, args: &Value) -> Answer {
    del(w, text(args, "name"), text(args, "mode") == "hard")
}

fn del(w: &mut World, id: &str, hard: bool) -> Answer {
    if !w.graph.exports.contains_key(id) {
        return refuse("is not found");
    }
    if !hard && w.graph.clients(id) > 0 {
        return refuse("still in use");
    }
    remove(w, id);
    Ok(())
}

pub(super) fn object_add(w: &mut World, args: &Value) -> Answer {
    let id = text(args, "id");
    if !is_id(id) {
        return refuse("expects an identifier");
    }
    if w.graph.threads.iter().any(|t| t == id) {
        return refuse("attempt to add duplicate property");
    }
    w.graph.threads.push(id.to_owned());
    Ok(())
}

pub(super) fn object_del(w: &mut World, args: &Value) -> Answer {
    let id = text(args, "id");
    if !w.graph.threads.iter().any(|t| t == id) {
        return refuse("not found");
    }
    if w.graph.exports.values().any(|e| e.iothread.as_deref() == Some(id)) {
        return refuse("is in use, can not be deleted");
    }
    w.graph.threads.retain(|t| t != id);
    Ok(())
}

/// What an export or a disk uses of its node, and shares.
pub(super) fn root_perms(writable: bool) -> (u8, u8) {
    (READ | if writable { WRITE } else { 0 }, super::graph::ALL & !RESIZE)
}

fn draw_id(rng: &mut Rng) -> String {
    if rng.chance(2) { "0e".into() } else { format!("e{}", rng.below(5)) }
}

pub(super) fn draw_start(_: &mut Rng, w: &World) -> Option<Value> {
    Some(json!({"addr": {"type": "unix", "data": {"path": w.socket}}, "max-connections": 20}))
}

pub(super) fn draw_stop(rng: &mut Rng, w: &World) -> Option<Value> {
    (!w.graph.server || rng.chance(40)).then(|| json!({}))
}

pub(super) fn draw_export(rng: &mut Rng, w: &World) -> Option<Value> {
    let mut v = json!({"type": "nbd", "id": draw_id(rng), "node-name": draw_node(rng, &w.graph)});
    if rng.chance(70) {
        v["writable"] = json!(rng.chance(85));
    }
    if rng.chance(60) {
        v["name"] = json!(format!("x{}", rng.below(6)));
    }
    if rng.chance(25) {
        v["iothread"] = json!(format!("io{}", rng.below(3)));
    }
    if rng.chance(10) {
        v["writethrough"] = json!(true);
    }
    Some(v)
}

pub(super) fn draw_server_add(rng: &mut Rng, w: &World) -> Option<Value> {
    let mut v = json!({"device": draw_node(rng, &w.graph), "writable": rng.chance(70)});
    if rng.chance(70) {
        v["name"] = json!(draw_id(rng));
    }
    Some(v)
}

fn draw_mode(rng: &mut Rng, name: &str) -> Value {
    let mut v = json!({ name: draw_id(rng) });
    if rng.chance(50) {
        v["mode"] = json!(*rng.pick(&["safe", "hard"]));
    }
    v
}

pub(super) fn draw_export_del(rng: &mut Rng, _: &World) -> Option<Value> {
    Some(draw_mode(rng, "id"))
}

pub(super) fn draw_server_remove(rng: &mut Rng, _: &World) -> Option<Value> {
    Some(draw_mode(rng, "name"))
}

pub(super) fn draw_object_add(rng: &mut Rng, _: &World) -> Option<Value> {
    Some(json!({"qom-type": "iothread", "id": format!("io{}", rng.below(3))}))
}

pub(super) fn draw_object_del(rng: &mut Rng, _: &World) -> Option<Value> {
    Some(json!({"id": format!("io{}", rng.below(3))}))
}
