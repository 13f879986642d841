//! Bytes of a QMP client, through framing and session to the commands of a real daemon with one core. Every message has one
//! answer, the daemon still answers afterwards, and everything that was made can be taken away again.
//!
//! ```text
//!   bytes ─► Session ─► Fence ─► the daemon's own commands      drivers: those without files; sockets: one in a folder
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Target;
use crate::Outcome;
use ringblock::daemon::Daemon;
use ringblock::qmp::dispatch::{Call, Registry};
use ringblock::qmp::session::Session;
use ringblock_drivers::options::Value;
use ringblock_engine::error::Error;
use serde_json::{Map, json};

pub(super) const TARGET: Target = Target {
    name: "qmp_commands",
    run,
    seeds,
    words: &[
        b"{'execute':'",
        b"','arguments':{",
        b"'id':",
        b"'node-name':'n'",
        b"'driver':'null-co'",
        b"'driver':'raw'",
        b"'driver':'qcow2'",
        b"'file':'n'",
        b"'file':{'driver':'null-co'}",
        b"'size':",
        b"blockdev-add",
        b"blockdev-del",
        b"blockdev-reopen",
        b"block_resize",
        b"block-export-add",
        b"block-export-del",
        b"nbd-server-start",
        b"nbd-server-stop",
        b"nbd-server-add",
        b"nbd-server-remove",
        b"object-add",
        b"object-del",
        b"qom-list",
        b"qom-get",
        b"query-block-exports",
        b"query-blockstats",
        b"query-named-block-nodes",
        b"query-qmp-schema",
        b"query-commands",
        b"x-debug-query-block-graph",
        b"'options':[{",
        b"'type':'nbd','id':'e'",
        b"'writable':true",
        b"exec-oob",
        b"}}",
        b"'addr':{'type':'unix','path':'s'}",
        b"'qom-type':'iothread'",
        b"'iothread':'io0'",
        b"'read-only':true",
        b"n2",
        b"'backing':'n'",
        b"'backing':null",
        b"'mode':'hard'",
    ],
    longest: 4096,
    share: 20_000,
};

/// Commands with long answers that are the same each time: after the first of an execution they are only parsed.
const LONG: [&str; 1] = ["query-qmp-schema"];

/// What stands between the session and the daemon.
struct Fence {
    daemon: Arc<Daemon>,
    registry: Registry<Daemon>,
    folder: PathBuf,
    seen: Mutex<Seen>,
}

/// What happened to the daemon since it was last empty.
#[derive(Default)]
struct Seen {
    changed: bool,
    quit: bool,
    long: bool,
    results: Vec<(&'static str, Result<(), String>)>,
}

impl Fence {
    fn start() -> Arc<Fence> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("ringblock-fuzz-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder of our own");
        let daemon = Daemon::start(1).expect("an engine with one core");
        Arc::new(Fence { daemon, registry: Daemon::registry(), folder, seen: Mutex::default() })
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a command, if it cannot reach beyond the fence.
    fn command(&self, name: &'static str, args: Value) -> Result<Value, Error> {
        let result = self.inside(name, args);
        let told = result.as_ref().map(drop).map_err(|e| e.message.clone());
        self.seen().results.push((name, told));
        result
    }

    fn inside(&self, name: &'static str, mut args: Value) -> Result<Value, Error> {
        if name == "quit" {
            self.seen().quit = true;
            return Ok(json!({}));
        }
        if LONG.contains(&name) && std::mem::replace(&mut self.seen().long, true) {
            return Ok(json!({}));
        }
        if !drivers_are_harmless(&args) {
            return Err(Error::invalid("a driver that opens files"));
        }
        if name == "nbd-server-start" && !self.move_socket(&mut args) {
            return Err(Error::invalid("a socket somewhere else"));
        }
        if !name.starts_with("query-") && !name.starts_with("qom-") {
            self.seen().changed = true;
        }
        self.registry.run(&self.daemon, name, &args)
    }

    /// A unix socket is made in our folder, whatever its path was; there are no others.
    fn move_socket(&self, args: &mut Value) -> bool {
        let path = Value::from(self.folder.join("s").to_string_lossy());
        let Some(addr) = args.get_mut("addr").and_then(Value::as_object_mut) else { return true };
        let is_unix = addr.get("type").is_none_or(|t| t == "unix" || !t.is_string());
        if let Some(text @ Value::String(_)) = addr.get_mut("path") {
            *text = path.clone();
        }
        if let Some(text @ Value::String(_)) = addr.get_mut("data").and_then(|d| d.get_mut("path")) {
            *text = path;
        }
        is_unix
    }

    fn ask(&self, name: &str, args: Value) -> Result<Value, Error> {
        self.registry.run(&self.daemon, name, &args)
    }

    /// Takes away everything that commands have made.
    fn clear(&self) {
        // its error is that there is none
        let _ = self.ask("nbd-server-stop", json!({}));
        assert_eq!(self.ask("query-block-exports", json!({})), Ok(json!([])), "all exports are gone");
        let storage = self.daemon.storage().expect("it has not stopped");
        storage.close_all().expect("nothing here can fail to close");
        assert_eq!(self.ask("query-named-block-nodes", json!({})), Ok(json!([])), "all nodes are gone");
        let list = self.ask("qom-list", json!({"path": "/objects"})).expect("objects");
        for object in list.as_array().into_iter().flatten().filter(|o| o["type"] == "child<iothread>") {
            self.ask("object-del", json!({"id": object["name"]})).expect("nobody uses it any more");
        }
        assert!(!self.folder.join("s").exists(), "the socket is gone");
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        let _ = self.daemon.close();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// No node below opens a file: drivers of files are nowhere, and nothing can name one in an image either, because there are
/// no images.
fn drivers_are_harmless(args: &Value) -> bool {
    let harmless = ["null-co", "null-aio", "raw", "qcow2"];
    match args {
        Value::Object(map) => map.iter().all(|(key, value)| {
            let is_driver = key == "driver" && value.as_str().is_some_and(|d| !harmless.contains(&d));
            !is_driver && drivers_are_harmless(value)
        }),
        Value::Array(list) => list.iter().all(drivers_are_harmless),
        _ => true,
    }
}

/// The daemon's commands, behind the fence.
fn fenced() -> Registry<Fence> {
    let mut registry = Registry::default();
    for (name, _) in Daemon::registry().commands() {
        registry.command(name, move |call: &Call<'_, Fence>, args: Value| call.context.command(name, args));
    }
    registry
}

/// A fence and the commands behind it; starting a daemon takes longer than an execution.
type Rig = (Arc<Fence>, Arc<Registry<Fence>>);

thread_local! {
    static RIG: std::cell::RefCell<Option<Rig>> = const { std::cell::RefCell::new(None) };
}

fn run(data: &[u8]) -> Outcome {
    // one that panics leaves no rig behind
    let (fence, registry) = RIG.take().unwrap_or_else(|| (Fence::start(), Arc::new(fenced())));
    let mut session = Session::new(registry.clone(), fence.clone());
    let mut out = Outcome::default();
    let (mut answers, mut asked) = (0u64, 0u64);
    // where two commands are in one piece, nothing is different
    for piece in data.split_inclusive(|b| *b == b'\n') {
        session.feed(piece, &mut |answer, _| {
            answers += 1;
            tell(&answer, &mut out);
        });
        if fence.seen().quit {
            break;
        }
    }
    let seen = std::mem::take(&mut *fence.seen());
    for (name, result) in &seen.results {
        asked += 1;
        out.result(name, result);
    }
    assert!(asked <= answers, "{asked} commands and {answers} answers");
    out.kind("quit", seen.quit.into());
    if seen.changed {
        fence.clear();
    }
    assert!(fence.ask("query-version", json!({})).is_ok());
    RIG.set(Some((fence, registry)));
    out
}

/// An answer is a return or an error of a known class.
fn tell(answer: &Value, out: &mut Outcome) {
    let map: &Map<String, Value> = answer.as_object().expect("an answer is an object");
    assert!(map.contains_key("return") != map.contains_key("error"), "{answer}");
    if let Some(error) = map.get("error") {
        let classes = ["GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound"];
        let class = error["class"].as_str().expect("a class");
        assert!(classes.contains(&class), "{class}");
        out.text(class, error["desc"].as_str().expect("a text"));
    }
    out.kind("id", map.contains_key("id").into());
}

/// Sessions as clients have them; between them every command.
fn seeds() -> Vec<Vec<u8>> {
    let hello = "{'execute':'qmp_capabilities'}\n";
    let mut list: Vec<String> = [
        "{'execute':'qmp_capabilities','arguments':{'enable':['oob']},'id':1}\n{'exec-oob':'query-version'}\n",
        "{'execute':'blockdev-add','arguments':{'driver':'null-co','node-name':'n','size':1048576}}
         {'execute':'blockdev-add','arguments':{'driver':'raw','node-name':'n2','file':'n','offset':512}}
         {'execute':'query-named-block-nodes'}{'execute':'x-debug-query-block-graph'}
         {'execute':'blockdev-reopen','arguments':{'options':[{'driver':'raw','node-name':'n2','file':'n'}]}}
         {'execute':'block_resize','arguments':{'node-name':'n','size':4096}}
         {'execute':'blockdev-del','arguments':{'node-name':'n2'}}{'execute':'blockdev-del','arguments':{'node-name':'n'}}",
        "{'execute':'blockdev-add','arguments':{'driver':'null-aio','node-name':'n','size':1048576}}
         {'execute':'object-add','arguments':{'qom-type':'iothread','id':'io0'}}
         {'execute':'nbd-server-start','arguments':{'addr':{'type':'unix','data':{'path':'s'}}}}
         {'execute':'block-export-add','arguments':{'type':'nbd','id':'e','node-name':'n','iothread':'io0','writable':true}}
         {'execute':'query-block-exports'}{'execute':'query-blockstats','arguments':{'query-nodes':true}}
         {'execute':'block-export-del','arguments':{'id':'e','mode':'hard'}}
         {'execute':'nbd-server-add','arguments':{'device':'n','name':'x'}}
         {'execute':'nbd-server-remove','arguments':{'name':'x'}}
         {'execute':'nbd-server-stop'}{'execute':'object-del','arguments':{'id':'io0'}}{'execute':'quit'}",
        "{'execute':'qom-list','arguments':{'path':'/'}}{'execute':'qom-get','arguments':{'path':'/objects','property':'type'}}",
        "{'execute':'blockdev-add','arguments':{'driver':'qcow2','node-name':'n','file':{'driver':'null-co'},'backing':null}}",
    ]
    .iter()
    .map(|s| format!("{hello}{s}"))
    .collect();
    let commands: BTreeMap<&str, ()> = Daemon::registry().commands().map(|(n, _)| (n, ())).collect();
    list.extend(commands.keys().map(|name| format!("{hello}{{'execute':'{name}'}}")));
    list.into_iter().map(String::into_bytes).collect()
}
