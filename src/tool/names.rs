//! File names and image options as users type them, made into option trees.
//!
//! A name may be a plain path, `PROTOCOL:PATH` (only where no `/` comes before the colon), or `json:{…}`; with
//! `--image-opts` it is `key=value,…`. Every form becomes one tree whose scalars are strings; what the user left out
//! (the protocol of a path, the format of an image) is filled in here or found by probing.
//!
//! Invariant: nothing here is used for names that stand inside images; those are plain paths (see the qcow2 driver).
//!
//! ```text
//! "a.qcow2", format "qcow2"        ─► {driver: qcow2, file: {driver: file, filename: a.qcow2}}
//! "driver=raw,file.filename=/dev/x" ─► {driver: raw, file: {driver: host_device, filename: /dev/x}}
//! ```

use ringblock_drivers::options::{Map, Mode, Value, json, keyval};
use ringblock_engine::Error;
use std::os::unix::fs::FileTypeExt;

/// Drivers that need no format above and no file below.
const PROTOCOLS: &[&str] = &["file", "host_device", "null-co", "null-aio"];
/// Filters, with the names of their children.
const FILTERS: &[(&str, &[&str])] =
    &[("blkdebug", &["image"]), ("blklogwrites", &["file", "log"]), ("blkverify", &["raw", "test"])];
/// All edges that a file or a filter may stand at.
const EDGES: &[&str] = &["file", "data-file", "image", "log", "raw", "test"];
/// Formats that take a `file` child.
const FORMATS: &[&str] = &["raw", "qcow2"];

/// The protocol that a name begins with, and the rest.
fn protocol(name: &str) -> Option<(&str, &str)> {
    let at = name.find([':', '/'])?;
    name[at..].strip_prefix(':').map(|rest| (&name[..at], rest))
}

/// Options of the protocol node for a name.
pub fn protocol_node(name: &str) -> Result<Value, Error> {
    let (driver, path) = match protocol(name) {
        Some(("file", path)) => (None, path),
        Some(("host_device", path)) => (Some("host_device"), path),
        Some(("blkdebug", rest)) => return blkdebug_node(rest),
        Some(("blkverify", rest)) => return blkverify_node(rest),
        Some((other, _)) => return Err(Error::invalid(format!("Unknown protocol '{other}'"))),
        None => (None, name),
    };
    let driver = driver.unwrap_or_else(|| driver_for(path));
    Ok(object([("driver", driver.into()), ("filename", path.into())]))
}

/// `blkdebug:CONFIG:IMAGE`, without the prefix; both may be empty, and the image may have a prefix of its own.
fn blkdebug_node(rest: &str) -> Result<Value, Error> {
    let Some((config, image)) = rest.split_once(':') else {
        return Err(Error::invalid("blkdebug requires both config file and image path"));
    };
    let mut node = object([("driver", "blkdebug".into()), ("image", protocol_node(image)?)]);
    if let (false, Some(map)) = (config.is_empty(), node.as_object_mut()) {
        map.insert("config".into(), config.into());
    }
    Ok(node)
}

/// `blkverify:RAW:TEST`, without the prefix; the second may have a prefix of its own.
fn blkverify_node(rest: &str) -> Result<Value, Error> {
    let Some((raw, test)) = rest.split_once(':') else {
        return Err(Error::invalid("blkverify requires raw copy and original image path"));
    };
    let (raw, test) = (protocol_node(raw)?, protocol_node(test)?);
    Ok(object([("driver", "blkverify".into()), ("raw", raw), ("test", test)]))
}

/// The path of a plain or `file:` name, if the name is one.
pub fn plain_path(name: &str) -> Result<&str, Error> {
    match protocol(name) {
        None => Ok(name),
        Some(("file" | "host_device", path)) => Ok(path),
        Some((filter @ ("blkdebug" | "blkverify"), _)) => {
            Err(Error::invalid(format!("Protocol driver '{filter}' does not support image creation")))
        }
        Some((other, _)) => Err(Error::invalid(format!("Unknown protocol '{other}'"))),
    }
}

/// Block and character devices have a driver of their own.
fn driver_for(path: &str) -> &'static str {
    let device = std::fs::metadata(path).map(|m| m.file_type());
    match device {
        Ok(t) if t.is_block_device() || t.is_char_device() => "host_device",
        _ => "file",
    }
}

fn object<const N: usize>(members: [(&str, Value); N]) -> Value {
    Value::Object(members.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
}

/// The tree for a name with or without a format; without one the tree has no `driver` yet.
pub fn from_name(name: &str, format: Option<&str>) -> Result<Value, Error> {
    if let Some(text) = name.strip_prefix("json:") {
        let tree = json::parse(text).map_err(|e| e.context("Could not parse the JSON options"))?;
        if !tree.is_object() {
            return Err(Error::invalid("Invalid JSON object given"));
        }
        return complete(strings(tree), format);
    }
    if format == Some("blkdebug") {
        return match protocol(name) {
            Some(("blkdebug", _)) => protocol_node(name),
            _ => Ok(object([("driver", "blkdebug".into()), ("image", protocol_node(name)?)])),
        };
    }
    if let Some(format) = format
        && PROTOCOLS.contains(&format)
    {
        let path = plain_path(name)?;
        return Ok(object([("driver", format.into()), ("filename", path.into())]));
    }
    let mut tree = object([("file", protocol_node(name)?)]);
    if let (Some(format), Some(map)) = (format, tree.as_object_mut()) {
        known_driver(format)?;
        map.insert("driver".into(), format.into());
    }
    Ok(tree)
}

/// The tree for `--image-opts`; a text without `=` names a node, and a tool has none.
pub fn from_options(text: &str) -> Result<Value, Error> {
    if !text.contains('=') && !text.starts_with('{') {
        let message = format!("Cannot find device='{text}' nor node-name='{text}'");
        return Err(Error::invalid(message));
    }
    let (tree, mode) = keyval::parse_either(text, None)?;
    complete(if mode == Mode::Json { strings(tree) } else { tree }, None)
}

fn known_driver(name: &str) -> Result<(), Error> {
    if PROTOCOLS.contains(&name) || FORMATS.contains(&name) || FILTERS.iter().any(|f| f.0 == name) {
        return Ok(());
    }
    Err(Error::invalid(format!("Unknown driver '{name}'")))
}

/// Fills in what a tree of a user lacks.
fn complete(mut tree: Value, format: Option<&str>) -> Result<Value, Error> {
    let map = tree.as_object_mut().ok_or_else(|| Error::invalid("Invalid JSON object given"))?;
    if let (Some(format), None) = (format, map.get("driver")) {
        map.insert("driver".into(), format.into());
    }
    match map.get("driver").and_then(Value::as_str) {
        Some(driver) => {
            known_driver(driver)?;
            let format: &[&str] = if FORMATS.contains(&driver) { &["file"] } else { &[] };
            let edges = FILTERS.iter().find(|f| f.0 == driver).map_or(format, |f| f.1);
            if let Some(edge) = edges.iter().find(|e| !map.contains_key(**e)) {
                return Err(Error::invalid(format!("A block device must be specified for \"{edge}\"")));
            }
        }
        None if !map.contains_key("file") => {
            return Err(Error::invalid("Must specify either driver or file"));
        }
        None => {}
    }
    for edge in EDGES {
        if let Some(child) = map.get_mut(*edge) {
            complete_file(child)?;
        }
    }
    Ok(tree)
}

/// A `file` child may be only a file name, whose protocol is then looked for in it.
fn complete_file(child: &mut Value) -> Result<(), Error> {
    let Value::Object(map) = child else { return Ok(()) };
    if map.contains_key("driver") {
        if EDGES.iter().any(|e| map.contains_key(*e)) {
            let taken = std::mem::take(map);
            *child = complete(Value::Object(taken), None)?;
        }
        return Ok(());
    }
    let Some(name) = map.get("filename").and_then(Value::as_str) else {
        return Err(Error::invalid("Must specify either driver or file"));
    };
    let Value::Object(found) = protocol_node(name)? else { return Ok(()) };
    for (key, value) in found {
        map.insert(key, value);
    }
    Ok(())
}

/// Scalars as strings, so that JSON and `key=value` trees are read the same way. `null` stays.
pub fn strings(tree: Value) -> Value {
    match tree {
        Value::Bool(b) => Value::from(if b { "on" } else { "off" }),
        Value::Number(n) => Value::from(n.to_string()),
        Value::Array(items) => Value::Array(items.into_iter().map(strings).collect()),
        Value::Object(map) => {
            Value::Object(map.into_iter().map(|(k, v)| (k, strings(v))).collect::<Map<_, _>>())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Goal: each form of a name gives its tree. Method: a table.
    #[test]
    fn names() {
        let file = |name: &str| json!({"driver": "file", "filename": name});
        for (name, format, want) in [
            ("a", None, json!({"file": file("a")})),
            ("a", Some("raw"), json!({"file": file("a"), "driver": "raw"})),
            ("file:a", Some("qcow2"), json!({"file": file("a"), "driver": "qcow2"})),
            ("./a:b", None, json!({"file": file("./a:b")})),
            ("a", Some("file"), file("a")),
            (
                "blkdebug:c:./a:b",
                Some("raw"),
                json!({"driver": "raw", "file": {"driver": "blkdebug", "config": "c", "image": file("./a:b")}}),
            ),
            (
                "blkverify:a:file:b",
                Some("raw"),
                json!({"driver": "raw", "file": {"driver": "blkverify", "raw": file("a"), "test": file("b")}}),
            ),
            ("blkdebug::file:a", Some("blkdebug"), json!({"driver": "blkdebug", "image": file("a")})),
            ("/dev/null", None, json!({"file": {"driver": "host_device", "filename": "/dev/null"}})),
            (
                "json:{'driver':'raw','offset':512,'file':{'filename':'a'}}",
                None,
                json!({"driver": "raw", "offset": "512", "file": {"filename": "a", "driver": "file"}}),
            ),
        ] {
            assert_eq!(from_name(name, format), Ok(want), "{name}");
        }
        let opts = from_options("driver=qcow2,file.filename=a,backing.driver=raw,backing.file.filename=b");
        assert_eq!(opts.map(|t| t["file"]["driver"].clone()), Ok("file".into()));
    }

    /// Goal: texts of qemu-img for bad names. Method: recorded from it.
    #[test]
    fn bad_names() {
        for (name, want) in [
            ("foo:bar", "Unknown protocol 'foo'"),
            ("nbd:x", "Unknown protocol 'nbd'"),
            ("blkverify:x", "blkverify requires raw copy and original image path"),
            ("blkdebug:x", "blkdebug requires both config file and image path"),
            ("json:{'driver':'bad','file':{'filename':'a'}}", "Unknown driver 'bad'"),
            ("json:[]", "Invalid JSON object given"),
        ] {
            assert_eq!(from_name(name, None).unwrap_err().message, want, "{name}");
        }
        for (opts, want) in [
            ("a.qcow2", "Cannot find device='a.qcow2' nor node-name='a.qcow2'"),
            ("driver=blkdebug", "A block device must be specified for \"image\""),
            ("driver=qcow2", "A block device must be specified for \"file\""),
            ("driver=blklogwrites,file.filename=a", "A block device must be specified for \"log\""),
            ("driver=blkverify,test.filename=a", "A block device must be specified for \"raw\""),
            ("filename=a", "Must specify either driver or file"),
        ] {
            assert_eq!(from_options(opts).unwrap_err().message, want, "{opts}");
        }
    }
}
