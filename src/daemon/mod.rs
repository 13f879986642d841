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
            stop: Mutex::default(),
            stopped: Condvar::new(),
        }))
    }

    /// All commands and events of the control pipe.
    pub fn registry() -> Registry<Daemon> {
        let mut registry = Registry::default();
        introspect::register(&mut registry);
        nodes::register(&mut registry);
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
