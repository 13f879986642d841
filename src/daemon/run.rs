//! A serving process from its first option to its last flush.
//!
//! ```text
//! fork (--daemonize) ─► signals ─► engine ─► steps in order ─► pid file ─► parent may go ─► serve ─► close ─► end
//! ```
//!
//! A failing step ends the process; what was opened before is closed again in order. A second signal while closing
//! ends the process at once.

use super::chardev::Chardev;
use super::live::Live;
use super::{Daemon, Stop, simple};
use crate::Error;
use crate::cli::{Action, Serve, Step};
use crate::qmp::server::Server;
use ringblock_engine::host::linux::daemon::{Forked, PidFile, Ready, fork};
use ringblock_engine::host::linux::net::Listener;
use ringblock_engine::host::linux::signals::Signals;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What a running daemon holds until it ends.
pub(super) struct Serving {
    pub(super) daemon: Arc<Daemon>,
    pub(super) server: Server<Daemon>,
    /// Sockets of monitors; their files go when these do.
    pub(super) monitors: Vec<Listener>,
    /// The image of the simple form, locked against a second server.
    pub(super) image: Option<File>,
    chardevs: BTreeMap<String, Option<Chardev>>,
}

/// Serves until told to stop. `program` stands before error texts.
pub fn run(program: &str, serve: &Serve) -> ExitCode {
    let ready = match serve.daemonize.then(fork).transpose() {
        Ok(None) => None,
        Ok(Some(Forked::Parent(status))) => return ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Ok(Some(Forked::Child(ready))) => Some(ready),
        Err(e) => return fail(program, &e),
    };
    match serve_all(serve, ready) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(program, &e),
    }
}

fn fail(program: &str, e: &Error) -> ExitCode {
    eprintln!("{program}: {e}");
    ExitCode::FAILURE
}

fn serve_all(serve: &Serve, ready: Option<Ready>) -> Result<(), Error> {
    // Before any thread is made, so that all have the signals blocked.
    let signals = Signals::take().map_err(|e| Error::io(e, "Could not take signals"))?;
    let daemon = Daemon::start(serve.cores)?;
    let up = Arc::new(AtomicBool::new(false));
    watch_signals(signals, daemon.clone(), up.clone())?;
    let server = Server::new(Daemon::registry(), daemon.clone(), daemon.events().clone());
    let mut serving =
        Serving { daemon, server, monitors: Vec::new(), image: None, chardevs: BTreeMap::new() };
    let result = match bring_up(serve, &mut serving) {
        Ok(pidfile) => {
            up.store(true, Ordering::Release);
            let announced = ready.map_or(Ok(()), Ready::announce);
            if announced.is_ok() {
                wait(&serving.daemon, serve);
            }
            announced.map(|()| pidfile)
        }
        Err(e) => Err(e),
    };
    let closed = serving.daemon.close();
    serving.server.stop();
    let pidfile = result?;
    drop(pidfile);
    closed
}

fn bring_up(serve: &Serve, serving: &mut Serving) -> Result<Option<PidFile>, Error> {
    if serve.steps.is_empty() && serve.simple_form {
        simple::bring_up(&serve.simple, serving)?;
    }
    for step in &serve.steps {
        serving.execute(step).map_err(|e| e.context(&step.written))?;
    }
    serve.pidfile.as_deref().map(PidFile::create).transpose()
}

impl Serving {
    fn execute(&mut self, step: &Step) -> Result<(), Error> {
        match &step.action {
            Action::Blockdev(o) => self.daemon.blockdev_add((**o).clone()),
            Action::Object(o) => self.daemon.object_add(o.clone()),
            Action::NbdServer(o) => self.daemon.nbd_server_start(o),
            Action::Export(o) => self.daemon.block_export_add((**o).clone()),
            Action::Chardev(o) => {
                let id = &o.base.id;
                if self.chardevs.contains_key(id) {
                    return Err(Error::invalid(format!("Chardev with id '{id}' already exists")));
                }
                self.chardevs.insert(id.clone(), Some(Chardev::open(o)?));
                Ok(())
            }
            Action::Monitor(o) => {
                let id = &o.chardev;
                let Some(place) = self.chardevs.get_mut(id) else {
                    return Err(Error::invalid(format!("chardev \"{id}\" not found")));
                };
                let Some(chardev) = place.take() else {
                    return Err(Error::invalid(format!("chardev \"{id}\" is already in use")));
                };
                let listener = chardev.serve(&self.server, o.pretty.unwrap_or(false))?;
                self.monitors.extend(listener);
                Ok(())
            }
        }
    }
}

/// Turns the first signal into an orderly stop, and the second into the end.
///
/// While things are still coming up the main thread may wait for a monitor's first client, so it cannot be told.
fn watch_signals(signals: Signals, daemon: Arc<Daemon>, up: Arc<AtomicBool>) -> Result<(), Error> {
    let body = move || {
        let mut told = false;
        loop {
            match signals.wait(None) {
                Ok(Some(_)) if !told && up.load(Ordering::Acquire) => {
                    daemon.stop(Stop::Signal);
                    told = true;
                }
                Ok(Some(signal)) => {
                    if !told {
                        // Its errors have nobody to go to.
                        let _ = daemon.close();
                    }
                    std::process::exit(128 + signal.number());
                }
                Ok(None) => {}
                Err(_) => return,
            }
        }
    };
    let thread = std::thread::Builder::new().name("rb-signals".into()).spawn(body);
    thread.map(drop).map_err(|e| Error::io(crate::Errno::of(&e), "Could not start a thread"))
}

/// Waits for the end; on a terminal, with a line that tells what is going on.
fn wait(daemon: &Arc<Daemon>, serve: &Serve) {
    let talkative = serve.simple_form && !serve.daemonize && std::io::stdout().is_terminal();
    if !talkative {
        daemon.wait(None);
        return;
    }
    let mut live = Live::default();
    while daemon.wait(Some(Duration::from_secs(1))).is_none() {
        live.tick(daemon);
    }
    live.end();
}
