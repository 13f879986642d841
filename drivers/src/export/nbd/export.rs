//! One NBD export: what it shows, who uses it, and how it goes.
//!
//! Invariants:
//! - A client is counted from the moment it is bound until its last reply is out; the node is released only
//!   when the count is zero and no client can come any more.
//! - `gone` is called once.
//!
//! ```text
//! bind ──► clients + 1 ──► … ──► unbind ──► clients - 1 ─┐
//! shut_down ──► closing, clients cut ────────────────────┴─ closing and 0 ──► release ──► gone
//! ```

use std::sync::{Arc, Mutex, MutexGuard, Weak};

use ringblock_engine::path::Root;
use ringblock_engine::sync::Sender;

use super::handshake::ExportInfo;
use super::server::Shared;
use super::wire::{MAX_PAYLOAD, flag};
use crate::export::{Export, IoThread};
use crate::options::export::{BlockExportOptionsBase, BlockExportOptionsNbd};

/// What is called when the node has been given back.
pub(super) type Gone = Box<dyn FnOnce() + Send>;

/// What to show and how.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NbdExportOptions {
    /// The export's id.
    pub id: String,
    /// The node to show.
    pub node_name: String,
    /// The name clients ask for; the node's name if there is none.
    pub name: Option<String>,
    /// A text for people.
    pub description: Option<String>,
    /// Clients may write.
    pub writable: bool,
    /// Every write is durable before its reply.
    pub writethrough: bool,
    /// Offer `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// The iothread whose core serves the clients; none for the server's cores in turn.
    pub iothread: Option<Arc<IoThread>>,
}

impl NbdExportOptions {
    /// From the typed options of `block-export-add`; `iothread` is the one that they name, if they do.
    pub fn from_typed(
        base: &BlockExportOptionsBase,
        nbd: &BlockExportOptionsNbd,
        iothread: Option<Arc<IoThread>>,
    ) -> NbdExportOptions {
        NbdExportOptions {
            id: base.id.clone(),
            node_name: base.node_name.clone(),
            name: nbd.name.clone(),
            description: nbd.description.clone(),
            writable: base.writable == Some(true),
            writethrough: base.writethrough == Some(true),
            allocation_depth: nbd.allocation_depth == Some(true),
            iothread,
        }
    }
}

struct State {
    clients: usize,
    closing: bool,
    /// Told when the clients are cut.
    cut: Option<Sender<()>>,
    release: Option<Sender<Gone>>,
    gone: Option<Gone>,
}

/// An export of the NBD server.
pub struct NbdExport {
    name: String,
    options: NbdExportOptions,
    core: Option<usize>,
    root: Root,
    server: Weak<Shared>,
    state: Mutex<State>,
}

impl NbdExport {
    pub(super) fn new(
        name: String,
        mut options: NbdExportOptions,
        root: Root,
        server: Weak<Shared>,
        cut: Sender<()>,
        release: Sender<Gone>,
    ) -> Arc<NbdExport> {
        let state = State { clients: 0, closing: false, cut: Some(cut), release: Some(release), gone: None };
        // The last client may outlive the export by a moment, and must not hold the iothread then.
        let core = options.iothread.take().map(|t| t.core);
        Arc::new(NbdExport { name, options, core, root, server, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The name clients ask for.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The root requests enter at.
    pub fn root(&self) -> Root {
        self.root
    }

    /// The core that serves its clients, if it is tied to one.
    pub fn core(&self) -> Option<usize> {
        self.core
    }

    pub(super) fn writethrough(&self) -> bool {
        self.options.writethrough
    }

    /// What a new client is told. Runs on a core.
    pub(super) fn info(&self, multi_conn: bool) -> ExportInfo {
        let writes = flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        let flags = flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_CACHE
            | if multi_conn { flag::CAN_MULTI_CONN } else { 0 }
            | if self.options.writable { writes } else { flag::READ_ONLY };
        // A root that has just lost its node shows nothing; its clients are on their way out.
        let size = self.root.size().unwrap_or(0);
        let align = self.root.limits().map_or(1, |l| l.request_alignment);
        ExportInfo {
            name: self.name.clone(),
            description: self.options.description.clone(),
            size: size - size % 512,
            flags,
            block_min: 1,
            block_preferred: align.clamp(4096, MAX_PAYLOAD),
            depth: self.options.allocation_depth,
        }
    }

    pub(super) fn listed(&self) -> ExportInfo {
        ExportInfo {
            name: self.name.clone(),
            description: self.options.description.clone(),
            size: 0,
            flags: 0,
            block_min: 1,
            block_preferred: 4096,
            depth: false,
        }
    }

    /// Counts a client in; false if it comes too late.
    pub(super) fn bind(&self) -> bool {
        let mut s = self.state();
        if !s.closing {
            s.clients += 1;
        }
        !s.closing
    }

    /// Counts a client out.
    pub(super) fn unbind(&self) {
        self.state().clients -= 1;
        self.end_if_idle();
    }

    fn end_if_idle(&self) {
        let mut s = self.state();
        if !s.closing || s.clients > 0 {
            return;
        }
        let ends = (s.release.take(), s.gone.take());
        drop(s);
        if let (Some(release), Some(gone)) = ends {
            release.send(gone);
        }
    }
}

impl Export for NbdExport {
    fn kind(&self) -> &'static str {
        "nbd"
    }

    fn node_name(&self) -> String {
        self.options.node_name.clone()
    }

    fn in_use(&self) -> bool {
        self.state().clients > 0
    }

    fn shut_down(self: Arc<Self>, gone: Box<dyn FnOnce() + Send>) {
        let cut = {
            let mut s = self.state();
            s.closing = true;
            s.gone = Some(gone);
            s.cut.take()
        };
        if let Some(server) = self.server.upgrade() {
            server.forget(&self);
        }
        if let Some(cut) = cut {
            cut.send(());
        }
        self.end_if_idle();
    }
}
