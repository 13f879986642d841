//! The daemon: what the control pipe commands, and how a process serves.
//!
//! Invariants:
//! * a command that fails leaves nothing behind;
//! * the data path is never touched from here: threads of the control pipe parse, wait and answer;
//! * stopping closes exports first, then nodes (flushing them), and only then lets the last clients of the pipe go.
//!
//! ```text
//! command line ─┐
//! QMP clients ──┴─► Daemon ─► Storage (graph, core 0)      nodes, queries
//!                     ├─────► Exports, NbdServer            exports
//!                     └─────► Events ─► QMP clients         news of exports and of the engine
//! ```

mod chardev;
mod events;
mod exports;
mod live;
mod nodes;
mod objects;
mod query;
mod run;
mod simple;

use crate::qmp::dispatch::{Call, Registry};
use crate::qmp::events::Events;
use crate::qmp::introspect;
use crate::{Config, Error, Storage};
use ringblock_drivers::export::Exports;
use ringblock_drivers::export::nbd::NbdServer;
use ringblock_drivers::options::types::Empty;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use run::run;

/// Why the daemon stops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// A client of the control pipe said so.
    Quit,
    /// A signal came.
    Signal,
}

/// The state behind the control pipe.
pub struct Daemon {
    storage: Storage,
    events: Events,
    exports: Arc<Exports>,
    nbd: Mutex<Option<Arc<NbdServer>>>,
    objects: Mutex<objects::Objects>,
    stop: Mutex<Option<Stop>>,
    stopped: Condvar,
}

impl Daemon {
    /// Starts an engine without nodes. `cores` 0 takes all there are.
    pub fn start(cores: usize) -> Result<Arc<Daemon>, Error> {
        let storage = Storage::start(&Config { cores, ..Config::default() })?;
        let events = Events::default();
        let told = events.clone();
        let exports = Exports::new(move |id| {
            told.emit("BLOCK_EXPORT_DELETED", &events::BlockExportDeleted { id: id.to_owned() });
        });
        events::forward(&storage, &events)?;
        Ok(Arc::new(Daemon {
            storage,
            events,
            exports,
            nbd: Mutex::default(),
            objects: Mutex::default(),
            stop: Mutex::default(),
            stopped: Condvar::new(),
        }))
    }

    /// All commands and events of the control pipe.
    pub fn registry() -> Registry<Daemon> {
        let mut registry = Registry::default();
        introspect::register(&mut registry);
        nodes::register(&mut registry);
        objects::register(&mut registry);
        query::register(&mut registry);
        exports::register(&mut registry);
        events::register(&mut registry);
        registry.command("quit", |call: &Call<'_, Daemon>, _: Empty| {
            call.context.stop(Stop::Quit);
            Ok(Empty {})
        });
        registry
    }

    /// The place where events are told.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Engine and graph; refused when the daemon is on its way out.
    pub fn storage(&self) -> Result<&Storage, Error> {
        match *lock(&self.stop) {
            Some(_) => Err(Error::invalid("The daemon is shutting down")),
            None => Ok(&self.storage),
        }
    }

    /// Asks the daemon to stop; returns at once.
    pub fn stop(&self, why: Stop) {
        lock(&self.stop).get_or_insert(why);
        self.stopped.notify_all();
    }

    /// Waits until somebody asks the daemon to stop, at most for `limit`.
    pub fn wait(&self, limit: Option<Duration>) -> Option<Stop> {
        let asked = lock(&self.stop);
        match limit {
            Some(limit) => {
                let wait = self.stopped.wait_timeout_while(asked, limit, |s| s.is_none());
                *wait.unwrap_or_else(PoisonError::into_inner).0
            }
            None => *self.stopped.wait_while(asked, |s| s.is_none()).unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Closes exports, then nodes. Everything that clients were told is written is durable when this returns `Ok`.
    pub fn close(&self) -> Result<(), Error> {
        self.stop(Stop::Quit);
        // Its error is that no server runs.
        let _ = self.nbd_server_stop();
        let closed = self.storage.close_all();
        events::stop_forwarding(&self.storage);
        closed
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringblock_drivers::options::Value;
    use serde_json::json;

    struct Pipe {
        daemon: Arc<Daemon>,
        registry: Registry<Daemon>,
    }

    impl Pipe {
        fn new() -> Pipe {
            Pipe { daemon: Daemon::start(1).unwrap(), registry: Daemon::registry() }
        }

        fn run(&self, name: &str, args: Value) -> Value {
            self.registry.run(&self.daemon, name, &args).unwrap_or_else(|e| Value::from(e.message))
        }
    }

    fn folder(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("ringblock-daemon-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    /// Goal: adds are all-or-nothing and names are free again. Method: fail at every level, then add by the same name.
    #[test]
    fn failed_adds_leave_nothing() {
        let p = Pipe::new();
        let none = p.run("query-named-block-nodes", json!({}));
        for (args, want) in [
            (json!({"driver": "null-co"}), "'node-name' must be specified for the root node"),
            (json!({"driver": "null-co", "node-name": "1"}), "Invalid node-name: '1'"),
            (
                json!({"driver": "raw", "node-name": "n", "offset": 2048,
                       "file": {"driver": "null-co", "node-name": "f", "size": 1024}}),
                "Offset (2048) cannot be greater than size of the containing file (1024)",
            ),
            (
                json!({"driver": "qcow2", "node-name": "n",
                       "file": {"driver": "null-co", "node-name": "f", "read-zeroes": true}}),
                "Image is not in qcow2 format",
            ),
            (
                json!({"driver": "raw", "node-name": "n", "file": {"driver": "file", "filename": "/nope"}}),
                "Could not open '/nope': No such file or directory",
            ),
        ] {
            assert_eq!(p.run("blockdev-add", args), want);
            assert_eq!(p.run("query-named-block-nodes", json!({})), none);
        }
        let file = json!({"driver": "null-co", "node-name": "f"});
        assert_eq!(
            p.run("blockdev-add", json!({"driver": "raw", "node-name": "n", "file": file})),
            json!({})
        );
        assert_eq!(p.run("blockdev-del", json!({"node-name": "f"})), "Node f is not owned by the monitor");
        assert_eq!(p.run("blockdev-del", json!({"node-name": "n"})), json!({}));
        assert_eq!(p.run("query-named-block-nodes", json!({})), none);
        p.daemon.close().unwrap();
        assert_eq!(p.run("blockdev-add", file), "The daemon is shutting down");
    }

    /// Goal: an export's life. Method: server, export, mistakes, graph and counters, removal, and the end of the server.
    #[test]
    fn exports_live_and_go() {
        let p = Pipe::new();
        let socket = folder("exports").join("nbd.sock");
        let server = json!({"addr": {"type": "unix", "data": {"path": socket}}});
        p.run("blockdev-add", json!({"driver": "null-co", "node-name": "n", "size": 1048576}));
        let export = json!({"type": "nbd", "id": "e", "node-name": "n", "writable": true});
        assert_eq!(p.run("block-export-add", export.clone()), "NBD server not running");
        assert_eq!(p.run("nbd-server-start", server.clone()), json!({}));
        assert_eq!(p.run("nbd-server-start", server), "NBD server already running");
        assert_eq!(p.run("block-export-add", export.clone()), json!({}));
        assert_eq!(p.run("block-export-add", export.clone()), "Block export id 'e' is already in use");
        assert_eq!(
            p.run("query-block-exports", json!({})),
            json!([{"id": "e", "type": "nbd", "node-name": "n", "shutting-down": false}])
        );
        assert_eq!(p.run("blockdev-del", json!({"node-name": "n"})), "Node n is in use");
        let resize = p.run("block_resize", json!({"node-name": "n", "size": 512}));
        assert!(resize.as_str().unwrap().starts_with("Permission conflict on node 'n'"), "{resize}");
        let graph = p.run("x-debug-query-block-graph", json!({}));
        assert_eq!(graph["edges"][0]["perm"], json!(["consistent-read", "write"]));
        let stats = p.run("query-blockstats", json!({"query-nodes": true}));
        assert_eq!((&stats[0]["node-name"], &stats[0]["stats"]["rd_operations"]), (&json!("n"), &json!(0)));
        assert_eq!(p.run("block-export-del", json!({"id": "e"})), json!({}));
        assert_eq!(p.run("block-export-add", export), json!({}), "the id is free again");
        assert_eq!(p.run("nbd-server-stop", json!({})), json!({}));
        assert_eq!(p.run("query-block-exports", json!({})), json!([]));
        let unknown = "Cannot find device='' nor node-name='zz'";
        assert_eq!(p.run("block_resize", json!({"node-name": "zz", "size": -1})), unknown);
        let unknown = "Cannot find device='zz' nor node-name=''";
        assert_eq!(p.run("block_resize", json!({"device": "zz", "size": 512})), unknown);
        let resize = p.run("block_resize", json!({"node-name": "n", "size": -1}));
        assert_eq!(resize, "Parameter 'size' expects a >0 size");
        let unknown = "Cannot find device='zz' nor node-name='zz'";
        assert_eq!(p.run("nbd-server-add", json!({"device": "zz", "name": "9"})), unknown);
        assert!(!socket.exists());
        p.daemon.close().unwrap();
    }

    /// Goal: the size of what is read-only stays. Method: a file, and a raw node on a read-only file.
    #[test]
    fn read_only_nodes_are_not_resized() {
        let p = Pipe::new();
        let path = folder("read-only").join("f");
        std::fs::write(&path, [7; 4096]).unwrap();
        let file = json!({"driver": "file", "node-name": "f", "filename": path, "read-only": true});
        assert_eq!(p.run("blockdev-add", file), json!({}));
        assert_eq!(p.run("blockdev-add", json!({"driver": "raw", "node-name": "r", "file": "f"})), json!({}));
        let before = p.run("x-debug-query-block-graph", json!({}));
        for node in ["f", "r"] {
            let resize = p.run("block_resize", json!({"node-name": node, "size": 512}));
            assert_eq!(resize, "Image is read-only");
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096);
        }
        assert_eq!(p.run("x-debug-query-block-graph", json!({})), before);
        p.daemon.close().unwrap();
    }

    /// A small image in a folder of its own; its path.
    fn image(folder_name: &str, backing: Option<&str>) -> std::path::PathBuf {
        use ringblock_drivers::format::qcow2::create::{CreateOptions, create};
        let path = folder(folder_name).join("q");
        let backing_file = backing.map(str::to_owned);
        let new = create(&CreateOptions {
            size: 65536,
            backing_format: backing.map(|_| "raw".to_owned()),
            backing_file,
            ..CreateOptions::default()
        })
        .unwrap();
        let mut bytes = vec![0; new.file_size as usize];
        for (at, part) in new.writes() {
            bytes[at.0 as usize..at.0 as usize + part.len()].copy_from_slice(&part);
        }
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Goal: read-only is read-only, with auto-read-only as well. Method: a format that would write, on such a file.
    #[test]
    fn read_only_wins_over_auto_read_only() {
        let p = Pipe::new();
        let path = image("auto", None);
        let file = json!({"driver": "file", "node-name": "f", "filename": path, "read-only": true, "auto-read-only": true});
        assert_eq!(p.run("blockdev-add", file), json!({}));
        let format = |read_only: bool| json!({"driver": "qcow2", "node-name": "q", "file": "f", "read-only": read_only});
        assert_eq!(p.run("blockdev-add", format(false)), "Block node is read-only");
        assert_eq!(p.run("blockdev-add", format(true)), json!({}));
        p.daemon.close().unwrap();
    }

    /// Goal: an image that names a backing file is reopened only with a word about it. Method: opened without one,
    /// reopened without a word, and with.
    #[test]
    fn reopen_asks_for_the_backing_file_that_the_image_names() {
        let p = Pipe::new();
        let path = image("names-backing", Some("below"));
        let file = json!({"driver": "file", "node-name": "f", "filename": path});
        assert_eq!(p.run("blockdev-add", file), json!({}));
        let node = json!({"driver": "qcow2", "node-name": "q", "file": "f", "backing": null});
        assert_eq!(p.run("blockdev-add", node.clone()), json!({}));
        let silent = json!({"driver": "qcow2", "node-name": "q", "file": "f"});
        assert_eq!(p.run("blockdev-reopen", json!({"options": [silent]})), "backing is missing for 'q'");
        assert_eq!(p.run("blockdev-reopen", json!({"options": [node]})), json!({}));
        p.daemon.close().unwrap();
    }

    /// Goal: a list is judged as a whole, in whatever order. Method: a format and its file become read-only, the file
    /// first; alone it cannot.
    #[test]
    fn reopen_in_any_order() {
        let p = Pipe::new();
        let path = image("order", None);
        let file = |ro: bool| json!({"driver": "file", "node-name": "f", "filename": path, "read-only": ro});
        let format = |ro: bool| json!({"driver": "qcow2", "node-name": "q", "file": "f", "read-only": ro});
        let reopen = |list: Value| p.run("blockdev-reopen", json!({"options": list}));
        assert_eq!(p.run("blockdev-add", file(false)), json!({}));
        assert_eq!(p.run("blockdev-add", format(false)), json!({}));
        let before = p.run("query-named-block-nodes", json!({}));
        assert_eq!(reopen(json!([file(true)])), "Read-only block node 'f' cannot support read-write users");
        assert_eq!(p.run("query-named-block-nodes", json!({})), before);
        assert_eq!(reopen(json!([file(true), format(true)])), json!({}));
        assert_eq!(reopen(json!([format(false), file(false)])), json!({}));
        assert_eq!(p.run("query-named-block-nodes", json!({})), before);
        p.daemon.close().unwrap();
    }

    /// Goal: a growth that is refused has not begun: version 2 cannot hide a longer backing file. Method: the image's bytes.
    #[test]
    fn a_refused_growth_changes_nothing() {
        let p = Pipe::new();
        let path = image("growth", None);
        let mut old = std::fs::read(&path).unwrap();
        // version 2 has a shorter header; the last cluster is not whole
        old[4..8].copy_from_slice(&2u32.to_be_bytes());
        old[24..32].copy_from_slice(&4096u64.to_be_bytes());
        std::fs::write(&path, &old).unwrap();
        let below = path.with_file_name("below");
        std::fs::write(&below, vec![7; 1 << 20]).unwrap();
        let file = json!({"driver": "file", "filename": path});
        let node = json!({"driver": "qcow2", "node-name": "q", "file": file,
                          "backing": {"driver": "file", "filename": below}});
        assert_eq!(p.run("blockdev-add", node), json!({}));
        let grown = p.run("block_resize", json!({"node-name": "q", "size": 1 << 20}));
        assert!(grown.as_str().unwrap().contains("Operation not supported"), "{grown}");
        p.daemon.close().unwrap();
        assert!(std::fs::read(&path).unwrap() == old, "the image has changed");
    }

    /// Goal: introspection covers every command. Method: names of both lists.
    #[test]
    fn schema_lists_all_commands() {
        let p = Pipe::new();
        let commands = p.run("query-commands", json!({}));
        let schema = p.run("query-qmp-schema", json!({}));
        let in_schema = |name: &Value| {
            schema.as_array().unwrap().iter().any(|e| e["meta-type"] == "command" && e["name"] == *name)
        };
        assert!(commands.as_array().unwrap().iter().all(|c| in_schema(&c["name"])));
        p.daemon.close().unwrap();
    }
}
