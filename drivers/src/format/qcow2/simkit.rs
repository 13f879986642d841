//! Test helpers: a file in memory with a log of what was submitted and completed when, a scheduler that picks the next
//! task from a seed, and guests that use an image as the engine would.
//!
//! ```text
//! guests ─► Disk (lookup, claim, commit) ─► SimFile: apply + log ─► crash_image(time, random): what a power cut leaves
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use ringblock_engine::driver::{Access, Extents, LocalFuture, Lookup, Map, Target};
use ringblock_engine::mem::Buf;
use ringblock_engine::{Errno, Error};

use super::entry::EntryFormat;
use super::io::{Runtime, Store};
use super::map::Shared;
use super::open::{read_header, read_table};
use super::options::CacheOptions;
use super::owner::{Files, Image, Parts, Settings};
use super::testkit::Random;

/// One write in the log: submitted at `s`, completed at `c` (`u64::MAX`: never).
struct Logged {
    s: u64,
    c: u64,
    at: u64,
    data: Vec<u8>,
}

/// Time and tasks of one simulated core.
pub(super) struct Sim {
    now: Cell<u64>,
    random: RefCell<Random>,
    tasks: RefCell<Vec<LocalFuture<'static, ()>>>,
    pins: RefCell<BTreeSet<u64>>,
}

impl Sim {
    pub(super) fn new(seed: u64) -> Rc<Sim> {
        Rc::new(Sim {
            now: Cell::new(0),
            random: RefCell::new(Random::new(seed)),
            tasks: RefCell::default(),
            pins: RefCell::default(),
        })
    }

    /// The next moment.
    pub(super) fn stamp(&self) -> u64 {
        self.now.set(self.now.get() + 1);
        self.now.get()
    }

    pub(super) fn below(&self, n: u64) -> u64 {
        self.random.borrow_mut().below(n)
    }

    /// Runs `main` and everything spawned meanwhile, in random order; returns when `main` is done.
    pub(super) fn run<T: 'static>(self: &Rc<Sim>, main: impl Future<Output = T> + 'static) -> T {
        let result = Rc::new(RefCell::new(None));
        let slot = result.clone();
        self.tasks.borrow_mut().push(Box::pin(async move {
            let value = main.await;
            *slot.borrow_mut() = Some(value);
        }));
        for _ in 0..50_000_000u64 {
            if let Some(value) = result.borrow_mut().take() {
                return value;
            }
            let n = self.tasks.borrow().len() as u64;
            let at = self.below(n) as usize;
            let mut task = self.tasks.borrow_mut().swap_remove(at);
            if task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
                self.tasks.borrow_mut().push(task);
            }
        }
        panic!("a deadlock");
    }

    /// Lets other tasks go first, some random number of times.
    async fn pause(&self) {
        let mut left = self.below(4);
        poll_fn(|_| {
            if left == 0 {
                return Poll::Ready(());
            }
            left -= 1;
            Poll::Pending
        })
        .await;
    }
}

/// The simulated core's services.
pub(super) struct SimRuntime(pub(super) Rc<Sim>);

impl Runtime for SimRuntime {
    fn tick(&self) -> LocalFuture<'_, ()> {
        let before: Vec<u64> = self.0.pins.borrow().iter().copied().collect();
        Box::pin(poll_fn(move |_| {
            let pins = self.0.pins.borrow();
            if before.iter().any(|p| pins.contains(p)) { Poll::Pending } else { Poll::Ready(()) }
        }))
    }

    fn spawn(&self, task: LocalFuture<'static, ()>) {
        self.0.tasks.borrow_mut().push(task);
    }
}

/// A file in memory.
pub(super) struct SimFile {
    sim: Rc<Sim>,
    initial: Vec<u8>,
    now: RefCell<Vec<u8>>,
    writes: RefCell<Vec<Logged>>,
    /// (submitted, completed) of flushes that succeeded.
    flushes: RefCell<Vec<(u64, u64)>>,
    /// One in so many writes fails, torn; 0 never.
    pub(super) write_fails: Cell<u64>,
    pub(super) flush_fails: Cell<bool>,
}

impl SimFile {
    pub(super) fn new(sim: &Rc<Sim>, initial: Vec<u8>) -> Rc<SimFile> {
        Rc::new(SimFile {
            sim: sim.clone(),
            now: RefCell::new(initial.clone()),
            initial,
            writes: RefCell::default(),
            flushes: RefCell::default(),
            write_fails: Cell::new(0),
            flush_fails: Cell::new(false),
        })
    }

    pub(super) fn content(&self) -> Vec<u8> {
        self.now.borrow().clone()
    }

    /// What a power cut at `time` may leave: all that a completed flush covers, and of the rest any subset of sectors, in
    /// any order.
    pub(super) fn crash_image(&self, time: u64, random: &mut Random) -> Vec<u8> {
        let covered = self.flushes.borrow().iter().filter(|f| f.1 <= time).map(|f| f.0).max().unwrap_or(0);
        let mut image = self.initial.clone();
        let writes = self.writes.borrow();
        let mut durable: Vec<&Logged> = writes.iter().filter(|w| w.c < covered).collect();
        durable.sort_by_key(|w| w.c);
        durable.iter().for_each(|w| land(&mut image, w.at, &w.data));
        // Two writes to one sector land in order if the first completed before the second was submitted: each takes effect
        // at some moment in between.
        let mut rest: Vec<(u64, &Logged)> = Vec::new();
        for w in writes.iter().filter(|w| w.c >= covered && w.s <= time) {
            rest.push((2 * w.s + random.below(2 * (w.c.min(time + 1) - w.s) + 1), w));
        }
        rest.sort_by_key(|(moment, _)| *moment);
        let style = random.below(4);
        for (_, w) in rest {
            match (style, random.below(3)) {
                (0, _) | (1, 0) => {}
                (1, _) | (2, 0) => land(&mut image, w.at, &w.data),
                _ => torn(&mut image, w.at, &w.data, random),
            }
        }
        image
    }
}

fn land(image: &mut Vec<u8>, at: u64, data: &[u8]) {
    let (at, end) = (at as usize, at as usize + data.len());
    if image.len() < end {
        image.resize(end, 0);
    }
    image[at..end].copy_from_slice(data);
}

/// Any subset of the sectors.
fn torn(image: &mut Vec<u8>, at: u64, data: &[u8], random: &mut Random) {
    let mut pos = 0;
    while pos < data.len() {
        let n = (512 - (at as usize + pos) % 512).min(data.len() - pos);
        if random.below(2) == 0 {
            land(image, at + pos as u64, &data[pos..pos + n]);
        }
        pos += n;
    }
}

impl Store for SimFile {
    fn read(&self, off: u64, mut buf: Buf) -> LocalFuture<'_, (Result<(), Errno>, Buf)> {
        Box::pin(async move {
            self.sim.pause().await;
            buf.fill(0);
            let now = self.now.borrow();
            let there = now.len().saturating_sub(off as usize).min(buf.len());
            if there > 0 {
                buf[..there].copy_from_slice(&now[off as usize..off as usize + there]);
            }
            (Ok(()), buf)
        })
    }

    fn write(&self, off: u64, buf: Buf) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move {
            let s = self.sim.stamp();
            let at = self.writes.borrow().len();
            self.writes.borrow_mut().push(Logged { s, c: u64::MAX, at: off, data: buf.to_vec() });
            self.sim.pause().await;
            let fails = self.write_fails.get();
            if fails > 0 && self.sim.below(fails) == 0 {
                torn(&mut self.now.borrow_mut(), off, &buf, &mut self.sim.random.borrow_mut());
                // What did land is settled now (D5): nothing of this write comes later.
                let mut now = self.now.borrow_mut();
                let end = off as usize + buf.len();
                if now.len() < end {
                    now.resize(end, 0);
                }
                let mut writes = self.writes.borrow_mut();
                writes[at].data.copy_from_slice(&now[off as usize..end]);
                writes[at].c = self.sim.stamp();
                return Err(Errno::ENOSPC);
            }
            land(&mut self.now.borrow_mut(), off, &buf);
            self.writes.borrow_mut()[at].c = self.sim.stamp();
            Ok(())
        })
    }

    fn zero(&self, off: u64, len: u64, _unmap: bool) -> LocalFuture<'_, Result<(), Errno>> {
        self.write(off, Buf::zeroed(len as usize))
    }

    fn discard(&self, off: u64, len: u64) -> LocalFuture<'_, Result<(), Errno>> {
        // What is there afterwards must not matter to anybody.
        let len = len.min((self.now.borrow().len() as u64).saturating_sub(off));
        let mut junk = Buf::new(len as usize);
        junk.fill(0xdd);
        self.write(off, junk)
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move {
            let s = self.sim.stamp();
            self.sim.pause().await;
            if self.flush_fails.get() {
                return Err(Errno::EIO);
            }
            self.flushes.borrow_mut().push((s, self.sim.stamp()));
            Ok(())
        })
    }

    fn size(&self) -> Result<u64, Errno> {
        Ok(self.now.borrow().len() as u64)
    }

    fn truncate(&self, size: u64) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move {
            self.now.borrow_mut().resize(size as usize, 0);
            Ok(())
        })
    }
}

/// The files of an image.
#[derive(Clone)]
pub(super) struct SimFiles {
    pub(super) file: Rc<SimFile>,
    pub(super) below: Option<Rc<SimFile>>,
    pub(super) data: Option<Rc<SimFile>>,
}

impl SimFiles {
    pub(super) fn one(file: Rc<SimFile>) -> SimFiles {
        SimFiles { file, below: None, data: None }
    }
}

/// An open image and what the engine would do with it.
pub(super) struct Disk {
    pub(super) image: Rc<Image>,
    pub(super) shared: Arc<Shared>,
    pub(super) file: Rc<SimFile>,
    pub(super) below: Option<Rc<SimFile>>,
    /// The external data file.
    pub(super) data: Option<Rc<SimFile>>,
    pub(super) sim: Rc<Sim>,
}

struct Pin<'a>(&'a Sim, u64);

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.0.pins.borrow_mut().remove(&self.1);
    }
}

impl Disk {
    /// Opens the image in a file.
    pub(super) async fn open(sim: &Rc<Sim>, files: SimFiles, frames: Option<u32>) -> Rc<Disk> {
        Disk::try_open(sim, files, frames).await.unwrap()
    }

    /// The same for an image that may be broken.
    pub(super) async fn try_open(
        sim: &Rc<Sim>,
        files: SimFiles,
        frames: Option<u32>,
    ) -> Result<Rc<Disk>, Error> {
        let SimFiles { file, below, data } = files;
        let header = read_header(&*file).await?;
        let g = header.geometry()?;
        let sizes = CacheOptions::default().sizes(&g, header.size)?;
        let l1 = read_table(&*file, header.l1_offset, u64::from(header.l1_size) * 8, "L1").await?;
        let bytes = u64::from(header.reftable_clusters) << g.cluster_bits;
        let reftable = read_table(&*file, header.reftable_offset, bytes, "refcounts").await?;
        let format = EntryFormat::of(&header, g);
        let frames = frames.unwrap_or(sizes.frames);
        let shared = Arc::new(Shared::new(
            format,
            header.size,
            frames,
            if data.is_some() { 2 } else { 0 },
            below.as_ref().map(|_| 1),
        ));
        let settings = Settings {
            read_only: false,
            refcount_cache: 0,
            pass_discard: true,
            clean_interval: 0,
            data_child: if data.is_some() { 2 } else { 0 },
        };
        let file_size = file.size()?;
        let parts = Parts { shared: shared.clone(), header, geometry: g, l1, reftable, file_size, settings };
        let store = |f: &Rc<SimFile>| -> Rc<dyn Store> { f.clone() };
        let files =
            Files { file: store(&file), data: data.as_ref().map(store), below: below.as_ref().map(store) };
        let image = Image::new(parts, files, Rc::new(SimRuntime(sim.clone())));
        Ok(Rc::new(Disk { image, shared, file, below, data, sim: sim.clone() }))
    }

    fn pin(&self) -> Pin<'_> {
        let id = self.sim.stamp();
        self.sim.pins.borrow_mut().insert(id);
        Pin(&self.sim, id)
    }

    /// Where guest data is.
    fn data(&self) -> &SimFile {
        self.data.as_ref().unwrap_or(&self.file)
    }

    /// Reads a range.
    pub(super) async fn read(&self, range: Range<u64>) -> Result<Vec<u8>, Errno> {
        let mut out = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let pin = self.pin();
            let mut extents = Extents::new();
            match self.shared.lookup(Access::Read, at..range.end, &mut extents) {
                Lookup::Hit => {}
                Lookup::Miss(key) => {
                    drop(pin);
                    self.image.fault(super::geometry::SliceIndex(key)).await?;
                    continue;
                }
                Lookup::Bad(e) => return Err(e),
                other => panic!("read: {other:?}"),
            }
            for e in extents.as_slice() {
                let n = e.len as usize;
                match (e.target, &self.below) {
                    (Target::Data { off, .. }, _) => {
                        out.extend_from_slice(&self.data().read(off, Buf::new(n)).await.1)
                    }
                    (Target::Below { off, .. }, Some(b)) => {
                        out.extend_from_slice(&b.read(off, Buf::new(n)).await.1)
                    }
                    (Target::Encoded { cookie }, _) => {
                        let cluster = self.unpack(cookie).await?;
                        let skip = (at % cluster.len() as u64) as usize;
                        out.extend_from_slice(&cluster[skip..skip + n]);
                    }
                    _ => out.resize(out.len() + n, 0),
                }
                at += e.len;
            }
        }
        Ok(out)
    }

    async fn unpack(&self, cookie: u64) -> Result<Vec<u8>, Errno> {
        let format = self.shared.format();
        let Ok(super::entry::L2Entry::Compressed(p)) = format.decode(cookie.into()) else {
            return Err(Errno::EIO);
        };
        let bytes = self.file.read(p.at.0, Buf::new(p.len as usize)).await.1;
        let mut cluster = vec![0; format.geometry.cluster_size() as usize];
        let kind = self.image.header.borrow().compression;
        super::compress::unpack(kind, &bytes, &mut cluster)?;
        Ok(cluster)
    }

    /// Writes a range, as the engine does.
    pub(super) async fn write(&self, at: u64, data: &[u8]) -> Result<(), Errno> {
        let end = at + data.len() as u64;
        let mut pos = at;
        while pos < end {
            let pin = self.pin();
            let mut extents = Extents::new();
            match self.shared.lookup(Access::Write, pos..end, &mut extents) {
                Lookup::Hit => {
                    for e in extents.as_slice() {
                        let Target::Data { off, .. } = e.target else { panic!("write to {e:?}") };
                        let part = &data[(pos - at) as usize..(pos - at + e.len) as usize];
                        self.data().write(off, Buf::from_slice(part)).await?;
                        pos += e.len;
                    }
                }
                Lookup::Miss(key) => {
                    drop(pin);
                    self.image.fault(super::geometry::SliceIndex(key)).await?;
                }
                Lookup::NeedsClaim { len } => {
                    drop(pin);
                    pos += self.write_claimed(pos..pos + len, &data[(pos - at) as usize..]).await?;
                }
                Lookup::Bad(e) => return Err(e),
            }
        }
        Ok(())
    }

    async fn write_claimed(&self, range: Range<u64>, data: &[u8]) -> Result<u64, Errno> {
        let grant = self.image.claim(range).await?;
        let n = grant.guest.end - grant.guest.start;
        let mut all = self.read(grant.guest.start - grant.head..grant.guest.start).await?;
        all.extend_from_slice(&data[..n as usize]);
        let size = self.shared.size();
        let there = (grant.guest.end + grant.tail).min(size).max(grant.guest.end);
        all.extend(self.read(grant.guest.end..there).await?);
        all.resize((grant.head + n + grant.tail) as usize, 0);
        let mut pos = 0;
        for seg in &grant.segs {
            let part = &all[pos..pos + seg.len as usize];
            let pin = self.pin();
            let result = self.data().write(seg.off, Buf::from_slice(part)).await;
            drop(pin);
            if let Err(e) = result {
                self.image.abort(&grant);
                return Err(e);
            }
            pos += seg.len as usize;
        }
        assert_eq!(pos, all.len());
        self.image.commit(&grant)?;
        Ok(n)
    }
}
