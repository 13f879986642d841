//! The write side of an open image: one object on the image's home core that alone changes its metadata (I1).
//!
//! Each part of the work has a file of its own; this one holds the state they share and the answers to the engine.
//!
//! ```text
//!   engine ─► fault ─► fault.rs            claim, commit, abort ─► claim.rs ─► alloc.rs ─► refcounts.rs
//!          ─► punch ─► discard.rs          flush, close ─► writeback.rs ─► limbo.rs
//!          ─► truncate ─► resize.rs        write_compressed ─► compressed.rs
//! ```

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use ringblock_engine::debug::DebugEvent;
use ringblock_engine::driver::{ChildIx, Grant, LocalFuture, Owner, Preallocation, Punch};
use ringblock_engine::mem::Buf;
use ringblock_engine::sync::{Event, Mutex};
use ringblock_engine::{Errno, Error};

use super::alloc::Alloc;
use super::claim::Live;
use super::claims::Claims;
use super::entry::OFFSET_MASK;
use super::frames::Frames;
use super::geometry::{Geometry, HostCluster, SliceIndex};
use super::header::{Header, incompatible};
use super::io::{Runtime, Store, raise};
use super::limbo::Limbo;
use super::map::Shared;
use super::refcounts::Refcounts;
use super::tables::Table;
use super::writeback::Group;

/// Settings that the write side needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    /// Nothing may be changed.
    pub(super) read_only: bool,
    /// Bytes of refcount blocks to keep.
    pub(super) refcount_cache: u64,
    /// Freed clusters are discarded in the file.
    pub(super) pass_discard: bool,
    /// Unused slices leave the cache after this many seconds; 0 never.
    pub(super) clean_interval: u32,
    /// Child index of the guest data.
    pub(super) data_child: ChildIx,
}

/// What an image consists of when it is opened.
pub(super) struct Parts {
    pub(super) shared: Arc<Shared>,
    pub(super) header: Header,
    pub(super) geometry: Geometry,
    pub(super) l1: Vec<u64>,
    pub(super) reftable: Vec<u64>,
    /// Bytes of the image file.
    pub(super) file_size: u64,
    pub(super) settings: Settings,
}

/// The files below an image.
pub(super) struct Files {
    /// The image file.
    pub(super) file: Rc<dyn Store>,
    /// The external data file.
    pub(super) data: Option<Rc<dyn Store>>,
    /// The backing file.
    pub(super) below: Option<Rc<dyn Store>>,
}

/// An open image on its home core.
pub(super) struct Image {
    pub(super) shared: Arc<Shared>,
    pub(super) geometry: Geometry,
    pub(super) options: Settings,
    pub(super) file: Rc<dyn Store>,
    /// The external data file.
    pub(super) data: Option<Rc<dyn Store>>,
    pub(super) runtime: Rc<dyn Runtime>,
    pub(super) header: RefCell<Header>,
    pub(super) l1: Table,
    pub(super) refcounts: Refcounts,
    /// Host clusters of the header, the tables and the blocks of the active image.
    pub(super) metadata: RefCell<HashSet<u64>>,
    pub(super) frames: Frames,
    pub(super) faults: RefCell<HashMap<SliceIndex, Rc<Event>>>,
    pub(super) claims: Rc<Claims>,
    pub(super) live: RefCell<HashMap<u64, Live>>,
    pub(super) alloc: RefCell<Alloc>,
    pub(super) limbo: RefCell<Limbo>,
    pub(super) reaped: Event,
    /// Clusters that could not be given back.
    pub(super) leaked: Cell<u64>,
    /// Changing L1 entries, one at a time.
    pub(super) tables_turn: Mutex<()>,
    pub(super) group: Group,
    /// Where the next compressed cluster may be packed: byte offset, and the end of its cluster.
    pub(super) packing: Mutex<Option<Range<u64>>>,
    /// The cluster with that place, unless it was freed.
    pub(super) packing_in: Cell<Option<HostCluster>>,
    /// The backing file, to know how far it reaches.
    pub(super) below: Option<Rc<dyn Store>>,
    poison: Cell<Option<Errno>>,
    /// A write of the header failed: the disk has the old one or the new one (D5) until the header is written again.
    header_unsure: Cell<bool>,
    corrupt_text: RefCell<Option<String>>,
    idle_seconds: Cell<u32>,
}

impl Image {
    pub(super) fn new(parts: Parts, files: Files, runtime: Rc<dyn Runtime>) -> Rc<Image> {
        let Files { file, data, .. } = files;
        let Parts { shared, header, geometry: g, l1, reftable, file_size, settings } = parts;
        let end = g.clusters_for(file_size);
        let mut metadata = HashSet::new();
        metadata.insert(0);
        let mut table = |at: u64, bytes: u64| {
            let first = at >> g.cluster_bits;
            metadata.extend(first..first + g.clusters_for(bytes));
        };
        table(header.l1_offset.0, l1.len() as u64 * 8);
        table(header.reftable_offset.0, reftable.len() as u64 * 8);
        let named = l1
            .iter()
            .map(|e| e & OFFSET_MASK)
            .chain(reftable.iter().map(|e| e & !super::entry::REFTABLE_RESERVED));
        metadata.extend(named.filter(|&at| at != 0).map(|at| at >> g.cluster_bits));
        Rc::new(Image {
            refcounts: Refcounts::new(g, file.clone(), reftable, settings.refcount_cache),
            l1: Table::new(l1, g.cluster_size()),
            frames: Frames::new(shared.frame_count()),
            alloc: RefCell::new(Alloc::new(end)),
            metadata: RefCell::new(metadata),
            header: RefCell::new(header),
            geometry: g,
            options: settings,
            shared,
            file,
            data,
            runtime,
            faults: RefCell::default(),
            claims: Rc::default(),
            live: RefCell::default(),
            limbo: RefCell::default(),
            reaped: Event::default(),
            leaked: Cell::new(0),
            tables_turn: Mutex::new(()),
            group: Group::default(),
            packing: Mutex::new(None),
            packing_in: Cell::new(None),
            below: files.below,
            poison: Cell::new(None),
            header_unsure: Cell::new(false),
            corrupt_text: RefCell::new(None),
            idle_seconds: Cell::new(0),
        })
    }

    /// Whether guest data lives in an external file.
    pub(super) fn external(&self) -> bool {
        self.data.is_some()
    }

    /// Where guest data lives.
    pub(super) fn data_store(&self) -> &Rc<dyn Store> {
        self.data.as_ref().unwrap_or(&self.file)
    }

    /// The error that every change gets once the metadata on disk is unknown (I9).
    pub(super) fn poisoned(&self) -> Result<(), Errno> {
        self.poison.get().map_or(Ok(()), Err)
    }

    /// Refuses all further changes. Returns the error for convenience.
    pub(super) fn set_poison(&self, e: Errno) -> Errno {
        if self.poison.get().is_none() {
            self.poison.set(Some(e));
        }
        e
    }

    /// Changes are allowed.
    pub(super) fn writable(&self) -> Result<(), Errno> {
        if self.options.read_only { Err(Errno::EROFS) } else { self.poisoned() }
    }

    /// An impossible state was met: nothing is changed any more, and a writable image gets the corrupt bit.
    pub(super) fn set_corrupt(self: &Rc<Self>, what: &str) {
        if self.corrupt_text.borrow().is_some() {
            return;
        }
        *self.corrupt_text.borrow_mut() = Some(what.to_owned());
        let was_writable = self.writable().is_ok();
        self.runtime.corrupt(what, was_writable);
        self.set_poison(Errno::EIO);
        if was_writable && self.header.borrow().version >= 3 {
            self.header.borrow_mut().incompatible |= incompatible::CORRUPT;
            let image = self.clone();
            self.runtime.spawn(Box::pin(async move {
                // Best effort: the image is unusable here in any case.
                let _ = image.write_header_durable().await;
            }));
        }
    }

    /// A point of the update sequence is reached.
    pub(super) async fn event(&self, event: DebugEvent) {
        raise(&*self.file, event).await;
    }

    /// Writes the header as it stands in memory.
    pub(super) async fn write_header(&self) -> Result<(), Errno> {
        let bytes = self.header.borrow().serialise().map_err(|e| e.errno)?;
        let mut buf = Buf::zeroed(bytes.len().next_multiple_of(512));
        buf[..bytes.len()].copy_from_slice(&bytes);
        let done = self.file.write(0, buf).await;
        self.header_unsure.set(done.is_err());
        done
    }

    /// Whether the disk may have another header than memory.
    pub(super) fn is_header_unsure(&self) -> bool {
        self.header_unsure.get()
    }

    /// Makes a failed write of the header good. Whatever either header names is left alone until this has succeeded.
    pub(super) async fn settle_header(&self) -> Result<(), Errno> {
        if self.header_unsure.get() {
            self.write_header_durable().await?;
        }
        Ok(())
    }

    /// Writes the header and makes it durable.
    pub(super) async fn write_header_durable(&self) -> Result<(), Errno> {
        self.write_header().await?;
        self.barrier().await
    }

    /// A flush of the image file. A failed one leaves the disk's content unknown for ever, so the image is poisoned.
    pub(super) async fn barrier(&self) -> Result<(), Errno> {
        self.event(DebugEvent::FlushToDisk).await;
        self.file.flush().await.map_err(|e| self.set_poison(e))
    }
}

/// The engine's handle.
pub(super) struct Qcow2Owner(pub(super) Rc<Image>);

impl Owner for Qcow2Owner {
    fn fault(&self, key: u64) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(self.0.fault(SliceIndex(key)))
    }

    fn claim(&self, range: Range<u64>) -> LocalFuture<'_, Result<Grant, Errno>> {
        Box::pin(self.0.claim(range))
    }

    fn commit(&self, grant: Grant) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move { self.0.commit(&grant) })
    }

    fn abort(&self, grant: Grant) {
        self.0.abort(&grant);
    }

    fn punch(&self, range: Range<u64>, kind: Punch) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(self.0.punch(range, kind))
    }

    fn write_compressed(&self, off: u64, data: Buf) -> LocalFuture<'_, (Result<(), Errno>, Buf)> {
        Box::pin(async move {
            let result = self.0.write_compressed(off, &data).await;
            (result, data)
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(self.0.flush())
    }

    fn truncate(&self, size: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.0.truncate(size, preallocation))
    }

    fn close(&self) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(self.0.close())
    }

    fn tick(&self) {
        let image = &self.0;
        let seconds = image.idle_seconds.get() + 1;
        let interval = image.options.clean_interval;
        image.idle_seconds.set(if interval > 0 && seconds >= interval {
            image.frames.sweep(&image.shared);
            0
        } else {
            seconds
        });
    }
}
