//! The library's front door: start an engine, open nodes from typed options, do I/O from any thread.
//!
//! The daemon is written on this and on nothing else, so an embedder can do all that it does.
//!
//! Invariants:
//! * every change of the graph is all-or-nothing; after a failure the name is free again;
//! * a [`Disk`] is one user of its node with its own permissions and counters, until it is closed or dropped;
//! * nothing here may be called on a core's own thread: tasks of cores use [`Root`] (see [`Disk::root`]).
//!
//! ```text
//! any thread ─► Storage ── on_graph(closure) ─► core 0: graph        add, del, resize, info
//!                  └ open ─► Disk ── read/write ─► its core: Root     blocking, or a future for any executor
//! ```

use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_engine::driver::{Flags, LocalFuture, Preallocation, perm};
use ringblock_engine::graph::{Graph, GraphInfo, RootSpec};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::{Root, Snapshot};
use ringblock_engine::sync::block_on;
use ringblock_engine::{Config, Engine, Errno, Error};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A running engine with its block graph. Clones are handles on the same one; it stops with the last of them.
#[derive(Clone)]
pub struct Storage {
    engine: Engine,
    next_core: Arc<AtomicUsize>,
}

impl Storage {
    /// Starts the cores. Errors: no io_uring (`ENOSYS`, `EPERM`), no memory, no threads.
    pub fn start(config: &Config) -> Result<Storage, Error> {
        Ok(Storage { engine: Engine::start(config)?, next_core: Arc::default() })
    }

    /// The engine, for servers that run on its cores.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Number of cores.
    pub fn cores(&self) -> usize {
        self.engine.cores()
    }

    /// Runs a task beside the graph, on core 0, and waits for it.
    pub fn on_graph<T, F>(&self, f: F) -> T
    where
        T: Send + 'static,
        F: FnOnce(Rc<Graph>) -> LocalFuture<'static, T> + Send + 'static,
    {
        self.engine.run(0, move || f(Graph::current()))
    }

    /// Opens a node and the nodes in its options; gives its name. All or nothing.
    ///
    /// Errors name the node or file, as `blockdev-add` does.
    pub fn add(&self, options: BlockdevOptions) -> Result<String, Error> {
        let spec = open::node(options)?;
        self.on_graph(move |graph| Box::pin(async move { graph.add(spec).await }))
    }

    /// Closes a node made by [`Storage::add`], with everything that only it used. Errors: as `blockdev-del`.
    pub fn del(&self, name: &str) -> Result<(), Error> {
        let name = name.to_owned();
        self.on_graph(move |graph| Box::pin(async move { graph.del(&name).await }))
    }

    /// Changes the size of a node, in bytes.
    pub fn resize(&self, name: &str, size: u64) -> Result<(), Error> {
        let name = name.to_owned();
        self.on_graph(move |graph| {
            Box::pin(async move { graph.resize(&name, size, Preallocation::Off).await })
        })
    }

    /// All nodes, edges and roots as they are now. The drivers in it are for tasks of cores: elsewhere only their names
    /// may be asked for.
    pub fn info(&self) -> GraphInfo {
        self.on_graph(|graph| Box::pin(async move { graph.info() }))
    }

    /// Attaches to a node, for reading or for both. The disk's requests run on one core, taken in turn.
    ///
    /// Errors: no such node, "Block node is read-only", a conflict with another user of the node.
    pub fn open(&self, node: &str, writable: bool) -> Result<Disk, Error> {
        let write = if writable { perm::WRITE } else { 0 };
        let spec = RootSpec {
            node: node.to_owned(),
            perm: perm::CONSISTENT_READ | write,
            shared: perm::ALL & !perm::RESIZE,
            user: "an embedded disk".into(),
            throttle: None,
        };
        let (root, size) = self.on_graph(move |graph| {
            Box::pin(async move {
                let root = graph.attach(spec).await?;
                let size = root.size().map_err(Error::from);
                Ok::<_, Error>((root, size?))
            })
        })?;
        let core = self.next_core.fetch_add(1, Ordering::Relaxed) % self.cores();
        Ok(Disk { storage: self.clone(), root, core, size, open: true })
    }

    /// Closes every root and node, flushing what is written. The engine itself goes on.
    ///
    /// Errors: the first that closing gave; everything is closed all the same.
    pub fn close_all(&self) -> Result<(), Error> {
        self.on_graph(|graph| Box::pin(async move { graph.shutdown().await }))
    }

    /// Counters of a root, of all cores together.
    pub fn stats(&self, root: Root) -> Snapshot {
        self.engine.run(0, move || Box::pin(async move { root.stats().await }))
    }
}

/// An open node: reads and writes from any thread, blocking or as futures for any executor.
///
/// Offsets and lengths are bytes, of any alignment (multiples of the node's request alignment are fastest).
/// Requests to a range beyond the size fail, reads with `EIO`, writes with `ENOSPC`.
pub struct Disk {
    storage: Storage,
    root: Root,
    core: usize,
    size: u64,
    open: bool,
}

impl Disk {
    /// Size in bytes. It cannot change while the disk is open.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// For tasks on the engine's cores ([`Engine::spawn_on`]): the fastest way in, without a hop.
    pub fn root(&self) -> Root {
        self.root
    }

    /// The core that this disk's requests run on.
    pub fn core(&self) -> usize {
        self.core
    }

    /// Moves this disk's requests to another core (taken modulo their number).
    pub fn on_core(mut self, core: usize) -> Disk {
        self.core = core % self.storage.cores();
        self
    }

    /// Fills a buffer from `off` and gives it back; its length is what is read.
    pub fn read(&self, off: u64, buf: Buf) -> impl Future<Output = Result<Buf, Errno>> + Send + 'static {
        let root = self.root;
        self.submit(move || {
            Box::pin(async move {
                let (result, buf) = root.read(off, buf).await;
                result.map(|()| buf)
            })
        })
    }

    /// Writes a buffer at `off` and gives it back. It is durable after the next [`Disk::flush`].
    pub fn write(&self, off: u64, buf: Buf) -> impl Future<Output = Result<Buf, Errno>> + Send + 'static {
        let root = self.root;
        self.submit(move || {
            Box::pin(async move {
                let (result, buf) = root.write(off, buf, Flags::NONE).await;
                result.map(|()| buf)
            })
        })
    }

    /// Makes `len` bytes at `off` read as zeroes; with `unmap` the space may be given back.
    pub fn write_zeroes(
        &self,
        off: u64,
        len: u64,
        unmap: bool,
    ) -> impl Future<Output = Result<(), Errno>> + Send + 'static {
        let root = self.root;
        let flags = Flags { may_unmap: unmap, ..Flags::NONE };
        self.submit(move || Box::pin(async move { root.write_zeroes(off, len, flags).await }))
    }

    /// Tells that `len` bytes at `off` are not needed; takes effect on nodes opened with `discard=unmap`.
    pub fn discard(&self, off: u64, len: u64) -> impl Future<Output = Result<(), Errno>> + Send + 'static {
        let root = self.root;
        self.submit(move || Box::pin(async move { root.discard(off, len).await }))
    }

    /// Makes every write that completed before durable.
    pub fn flush(&self) -> impl Future<Output = Result<(), Errno>> + Send + 'static {
        let root = self.root;
        self.submit(move || Box::pin(async move { root.flush().await }))
    }

    /// Fills `data` from `off`, waiting for it. Copies once.
    pub fn read_at(&self, data: &mut [u8], off: u64) -> Result<(), Errno> {
        let buf = block_on(self.read(off, Buf::new(data.len())))?;
        data.copy_from_slice(&buf);
        Ok(())
    }

    /// Writes `data` at `off`, waiting for it. Copies once.
    pub fn write_at(&self, data: &[u8], off: u64) -> Result<(), Errno> {
        block_on(self.write(off, Buf::from_slice(data))).map(drop)
    }

    /// [`Disk::flush`], waiting for it.
    pub fn flush_now(&self) -> Result<(), Errno> {
        block_on(self.flush())
    }

    /// Counters and latencies of this disk.
    pub fn stats(&self) -> Snapshot {
        self.storage.stats(self.root)
    }

    /// Detaches from the node after the requests under way; the node stays if it was added by name.
    pub fn close(mut self) -> Result<(), Error> {
        self.open = false;
        let root = self.root;
        self.storage.on_graph(move |graph| Box::pin(async move { graph.detach(root).await }))
    }

    fn submit<T, F>(&self, f: F) -> impl Future<Output = Result<T, Errno>> + Send + 'static
    where
        T: Send + 'static,
        F: FnOnce() -> LocalFuture<'static, Result<T, Errno>> + Send + 'static,
    {
        let done = self.storage.engine.spawn_on(self.core, f);
        // Nothing comes back only if the core has stopped.
        async move { done.await.unwrap_or(Err(Errno::ESHUTDOWN)) }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        let root = self.root;
        // Not waited for: who wants to know how closing went calls `close`.
        drop(self.storage.engine.spawn_on(0, move || {
            Box::pin(async move {
                let _ = Graph::current().detach(root).await;
            })
        }));
    }
}
