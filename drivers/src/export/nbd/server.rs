//! The NBD server: listeners, the catalogue of exports, and the clients that are there.
//!
//! Invariants:
//! - A name belongs to at most one export, from its reservation on.
//! - At most `max_connections` clients at once, those in the option phase included; when there is no room
//!   nobody is accepted, the kernel's queue holds them.
//! - Each client transmits on one core, that of its export's iothread or the one whose turn it was; nothing of
//!   its data crosses to another.
//! - The locks here are held for a look-up, never across an await or a foreign call.
//!
//! ```text
//! accept (one task a listener) ──► next core ──► negotiate ──► bind to export ──┬──────────────────► transmit ──► leave
//!                                                                               └► core of iothread ─┘
//! ```

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Poll, Waker};

use ringblock_engine::core::Core;
use ringblock_engine::driver::{LocalFuture, perm};
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::host::linux::net::{Listener, set_nodelay};
use ringblock_engine::net::{self, Socket};
use ringblock_engine::path::Party;
use ringblock_engine::sync::{Receiver, Sender, oneshot};
use ringblock_engine::timer::Sleep;
use ringblock_engine::{Engine, Errno, Error};

use super::connection::{self, Entered, Input};
use super::export::{Gone, NbdExport, NbdExportOptions};
use super::handshake::{Catalogue, ExportInfo, Negotiated};
use super::transmission::Session;
use super::wire::MAX_STRING;
use crate::export::Exports;
use crate::options::export::NbdServerOptionsBase;

/// How a server treats its clients.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServerConfig {
    /// Clients at once; 0: no limit. With 1 the multi-conn flag is not offered.
    pub max_connections: u32,
    /// Seconds a client has for the option phase; 0: no limit.
    pub handshake_seconds: u32,
    /// The cores that serve clients, in turn; empty: all.
    pub cores: Vec<usize>,
}

impl Default for ServerConfig {
    fn default() -> ServerConfig {
        ServerConfig { max_connections: 100, handshake_seconds: 10, cores: Vec::new() }
    }
}

impl ServerConfig {
    /// From the typed options of `nbd-server-start`, but for the address ([`crate::export::listen`]).
    pub fn from_typed(options: &NbdServerOptionsBase) -> ServerConfig {
        let default = ServerConfig::default();
        ServerConfig {
            max_connections: options.max_connections.unwrap_or(default.max_connections),
            handshake_seconds: options.handshake_max_seconds.unwrap_or(default.handshake_seconds),
            cores: Vec::new(),
        }
    }
}

/// A pause after an accept that failed for want of something, in ns.
const ACCEPT_PAUSE: u64 = 100_000_000;

struct Conn {
    stream: Socket,
    bound: Option<Bound>,
}

/// What a client has chosen, and in whose name it asks that export's limits.
#[derive(Clone)]
struct Bound {
    export: Arc<NbdExport>,
    party: Arc<Party>,
}

impl Conn {
    fn cut(&self) {
        self.stream.shutdown();
        if let Some(bound) = &self.bound {
            bound.party.leave();
        }
    }
}

#[derive(Default)]
struct Conns {
    live: BTreeMap<u64, Conn>,
    next: u64,
    stopping: bool,
    /// Accept tasks that wait for room.
    room: Vec<Waker>,
    /// Who waits for the last client to leave.
    empty: Vec<Sender<()>>,
}

/// What the tasks of a server share.
pub(super) struct Shared {
    config: ServerConfig,
    /// `None` is a name that is reserved.
    exports: Mutex<BTreeMap<String, Option<Arc<NbdExport>>>>,
    conns: Mutex<Conns>,
    turn: AtomicUsize,
}

/// A running server. Dropping it closes the listeners and cuts the clients; its exports are the caller's to
/// remove first ([`crate::export::Exports::remove_all`]).
pub struct NbdServer {
    shared: Arc<Shared>,
    listeners: Mutex<Vec<Listener>>,
}

/// A name that nobody else can take while this lives.
struct NameReservation {
    shared: Arc<Shared>,
    name: String,
    published: bool,
}

impl NbdServer {
    /// Starts accepting on these listeners; one task for each, spread over the cores.
    ///
    /// # Errors
    /// "Core n does not exist" for a core of the configuration that the engine does not have.
    pub fn start(
        engine: &Engine,
        config: ServerConfig,
        listeners: Vec<Listener>,
    ) -> Result<NbdServer, Error> {
        let count = engine.cores();
        if let Some(bad) = config.cores.iter().find(|c| **c >= count) {
            return Err(Error::invalid(format!("Core {bad} does not exist")));
        }
        let mut config = config;
        if config.cores.is_empty() {
            config.cores = (0..count).collect();
        }
        let shared = Arc::new(Shared {
            config,
            exports: Mutex::default(),
            conns: Mutex::default(),
            turn: AtomicUsize::new(0),
        });
        for (i, fd) in listeners.iter().flat_map(Listener::fds).enumerate() {
            let fd = fd
                .try_clone_to_owned()
                .map_err(|e| Error::io(Errno::of(&e), "Could not duplicate a listener"))?;
            let core = shared.config.cores[i % shared.config.cores.len()];
            let shared = shared.clone();
            drop(engine.spawn_on(core, move || Box::pin(accept(shared, fd))));
        }
        Ok(NbdServer { shared, listeners: Mutex::new(listeners) })
    }

    /// The TCP addresses bound; empty for unix sockets.
    pub fn local_addrs(&self) -> Vec<SocketAddr> {
        self.listeners().iter().flat_map(|l| l.local_addrs().to_vec()).collect()
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Listener>> {
        self.listeners.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Adds an export: all of it, or none. Runs on core 0, where the graph is.
    ///
    /// # Errors
    /// Those of [`Exports::reserve`] and of attaching to the node; "Cannot export read-only node as
    /// writable"; "NBD server already has export named 'x'", "export name 'x' too long",
    /// "description 'x' too long"; "Core n does not exist" for that of the iothread.
    pub async fn add(&self, exports: &Arc<Exports>, options: NbdExportOptions) -> Result<(), Error> {
        let id = exports.reserve(&options.id)?;
        let (core, graph) = (Core::current(), Graph::current());
        let node = &options.node_name;
        if graph.lookup(node).is_err() {
            let text = format!("Cannot find device='' nor node-name='{node}'");
            return Err(Error::new(Errno::ENODEV, text));
        }
        let iothread = options.iothread.clone();
        if let Some(bad) = iothread.as_ref().map(|t| t.core).filter(|c| *c >= core.count()) {
            return Err(Error::invalid(format!("Core {bad} does not exist")));
        }
        let name = options.name.as_ref().unwrap_or(node).clone();
        let name = self.reserve(name, options.description.as_deref())?;
        let writes = if options.writable { perm::WRITE } else { 0 };
        let spec = RootSpec {
            node: node.clone(),
            perm: perm::CONSISTENT_READ | writes,
            // A size clients have been told must not change under them.
            shared: perm::ALL & !perm::RESIZE,
            // What the peer calls every export in its texts.
            user: "an unnamed block device".into(),
            throttle: None,
        };
        let root = graph.attach(spec).await.map_err(|e| match e.errno {
            Errno::EACCES if options.writable => {
                Error::new(e.errno, "Cannot export read-only node as writable")
            }
            _ => e,
        })?;
        let ((release, released), (closing, closes)) = (oneshot::<Gone>(), oneshot::<()>());
        core.spawn(async move {
            closes.await;
            // its clients are cut: what they left behind must not wait for limits
            graph.hurry(root);
            let gone = released.await;
            // The node is given back whatever its closing says: that is reported where it was written to.
            let _ = graph.detach(root).await;
            drop(iothread);
            if let Some(gone) = gone {
                gone();
            }
        });
        let server = Arc::downgrade(&self.shared);
        let export = NbdExport::new(name.name.clone(), options, root, server, closing, release);
        // The id first: who connects at once can be cut again.
        id.publish(export.clone());
        name.publish(export);
        Ok(())
    }

    fn reserve(&self, name: String, description: Option<&str>) -> Result<NameReservation, Error> {
        let too_long = |what: &str, s: &str| Error::invalid(format!("{what} '{s}' too long"));
        if name.len() > MAX_STRING {
            return Err(too_long("export name", &name));
        }
        if let Some(d) = description.filter(|d| d.len() > MAX_STRING) {
            return Err(too_long("description", d));
        }
        let mut exports = self.shared.exports();
        if exports.contains_key(&name) {
            return Err(Error::invalid(format!("NBD server already has export named '{name}'")));
        }
        exports.insert(name.clone(), None);
        Ok(NameReservation { shared: self.shared.clone(), name, published: false })
    }

    /// Serves a client that is connected already. For tasks of a core.
    pub fn serve(&self, client: OwnedFd) {
        take_on(&self.shared, &Core::current(), Socket::new(client));
    }

    /// Clients connected now.
    pub fn connections(&self) -> usize {
        self.shared.conns().live.len()
    }

    /// Closes the listeners, cuts all clients and waits until they are gone.
    pub async fn stop(&self) {
        if let Some(gone) = self.close() {
            gone.await;
        }
    }

    fn close(&self) -> Option<Receiver<()>> {
        for listener in self.listeners().drain(..) {
            listener.fds().for_each(net::shutdown);
        }
        let mut conns = self.shared.conns();
        conns.stopping = true;
        conns.room.drain(..).for_each(Waker::wake);
        conns.live.values().for_each(Conn::cut);
        if conns.live.is_empty() {
            return None;
        }
        let (tx, rx) = oneshot();
        conns.empty.push(tx);
        Some(rx)
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.close();
    }
}

impl NameReservation {
    fn publish(mut self, export: Arc<NbdExport>) {
        self.published = true;
        self.shared.exports().insert(self.name.clone(), Some(export));
    }
}

impl Drop for NameReservation {
    fn drop(&mut self) {
        if !self.published {
            self.shared.exports().remove(&self.name);
        }
    }
}

impl Shared {
    fn exports(&self) -> MutexGuard<'_, BTreeMap<String, Option<Arc<NbdExport>>>> {
        self.exports.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn conns(&self) -> MutexGuard<'_, Conns> {
        self.conns.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn get(&self, name: &[u8]) -> Option<Arc<NbdExport>> {
        self.exports().get(std::str::from_utf8(name).ok()?)?.clone()
    }

    /// Takes an export out of the catalogue and cuts its clients.
    pub(super) fn forget(&self, export: &Arc<NbdExport>) {
        let mut exports = self.exports();
        if exports.get(export.name()).is_some_and(|e| e.as_ref().is_some_and(|e| Arc::ptr_eq(e, export))) {
            exports.remove(export.name());
        }
        drop(exports);
        let conns = self.conns();
        let of = |c: &&Conn| c.bound.as_ref().is_some_and(|b| Arc::ptr_eq(&b.export, export));
        conns.live.values().filter(of).for_each(Conn::cut);
    }

    /// Waits until one more client may come; false if the server stops.
    async fn room(&self) -> bool {
        let max = self.config.max_connections as usize;
        poll_fn(|cx| {
            let mut conns = self.conns();
            if conns.stopping {
                return Poll::Ready(false);
            }
            if max == 0 || conns.live.len() < max {
                return Poll::Ready(true);
            }
            conns.room.push(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl Catalogue for Shared {
    fn find(&self, name: &[u8]) -> Option<ExportInfo> {
        self.get(name).map(|e| e.info(self.config.max_connections != 1))
    }
    fn all(&self) -> Vec<ExportInfo> {
        self.exports().values().flatten().map(|e| e.listed()).collect()
    }
    fn count(&self) -> usize {
        self.exports().len()
    }
}

/// A client's place in the table; leaving is automatic.
struct Place {
    shared: Arc<Shared>,
    id: u64,
}

impl Place {
    /// `None` if there is no room after all, or the server stops.
    fn take(shared: &Arc<Shared>, stream: &Socket) -> Option<Place> {
        let mut conns = shared.conns();
        let max = shared.config.max_connections as usize;
        if conns.stopping || (max != 0 && conns.live.len() >= max) {
            return None;
        }
        let id = conns.next;
        conns.next += 1;
        conns.live.insert(id, Conn { stream: stream.clone(), bound: None });
        Some(Place { shared: shared.clone(), id })
    }

    /// Ties the client to its export; `None` if that is gone, or going.
    fn bind(&self, name: &str) -> Option<Bound> {
        let export = self.shared.get(name.as_bytes())?;
        let mut conns = self.shared.conns();
        let conn = conns.live.get_mut(&self.id)?;
        // Under the lock: a removal either sees this client in the table or is seen by it.
        if !export.bind() {
            return None;
        }
        let bound = Bound { party: Party::new(export.root()), export };
        conn.bound = Some(bound.clone());
        Some(bound)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let bound = self.shared.conns().live.get_mut(&self.id).and_then(|c| c.bound.take());
        // First out of the export, then out of the table: who sees no clients finds no export in use.
        if let Some(bound) = bound {
            bound.export.unbind();
        }
        let mut conns = self.shared.conns();
        conns.live.remove(&self.id);
        conns.room.drain(..).for_each(Waker::wake);
        let empty = if conns.live.is_empty() { std::mem::take(&mut conns.empty) } else { Vec::new() };
        drop(conns);
        empty.into_iter().for_each(|e| e.send(()));
    }
}

/// Accepts clients on one listener until the server stops.
async fn accept(shared: Arc<Shared>, listener: OwnedFd) {
    let listener = net::Listener::new(listener);
    let core = Core::current();
    while shared.room().await {
        let fd = match listener.accept().await {
            Ok(fd) => fd,
            Err(Errno::EINVAL | Errno::EBADF | Errno::ENOTSUP) => return,
            Err(_) => {
                // Out of descriptors or memory, or a client that is gone already.
                Sleep::ns(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Harmless where it does not apply.
        let _ = set_nodelay(fd.as_fd());
        take_on(&shared, &core, Socket::new(fd));
    }
}

/// Serves a client on the core whose turn it is; it is cut at once if there is no room for it.
fn take_on(shared: &Arc<Shared>, core: &Rc<Core>, stream: Socket) {
    let Some(place) = Place::take(shared, &stream) else { return };
    let turn = shared.turn.fetch_add(1, Ordering::Relaxed);
    let target = shared.config.cores[turn % shared.config.cores.len()];
    let here = core.clone();
    core.spawn(async move {
        here.call(target, move || Box::pin(client(place, stream))).await;
    });
}

/// The whole life of one client: the option phase here, the rest on the core that its export is tied to, if any.
async fn client(place: Place, stream: Socket) {
    let shared: Arc<Shared> = place.shared.clone();
    let limit = u64::from(shared.config.handshake_seconds) * 1_000_000_000;
    let entered = connection::negotiate(&stream, &*shared, limit, |name| place.bind(name)).await;
    let Some(Entered { negotiated, input, bound }) = entered else { return };
    let core = Core::current();
    match bound.export.core().filter(|c| *c != core.index) {
        None => serve(place, stream, bound, &negotiated, input).await,
        Some(target) => {
            // Nothing is in flight on the socket now; what has been received beyond the option phase goes along.
            let ahead = input.into_bytes();
            let rest = move || -> LocalFuture<'static, ()> {
                Box::pin(async move {
                    let input = Input::with(stream.clone(), &ahead);
                    serve(place, stream, bound, &negotiated, input).await;
                })
            };
            core.call(target, rest).await;
        }
    }
}

/// The transmission phase of a client, on this core. Its place in the table is given up at the end.
async fn serve(place: Place, stream: Socket, bound: Bound, negotiated: &Negotiated, input: Input) {
    let session = Session::new(negotiated);
    let client = connection::client(stream, bound.party, bound.export.writethrough());
    connection::transmit(client, session, input).await;
    drop(place);
}
