//! Small drivers for tests of the engine alone: a file as it is, and a mapped image whose table lives in memory.
//!
//! ```text
//!   [table]  guest cluster ─► host cluster     lookup: Hit | Miss (a group not loaded yet) | NeedsClaim
//!      └── file ─► [leaf] ─► host::File
//! ```

#![allow(dead_code, unreachable_pub)]

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ringblock_engine::core::Core;
use ringblock_engine::driver::*;
use ringblock_engine::epoch;
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::{ChildSpec, Common, Graph, NodeSpec, RootSpec};
use ringblock_engine::host::{Access as HostAccess, Expect, File, OpenOptions};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::{Child, Root};
use ringblock_engine::sync::Event;

/// FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE of fallocate(2).
const PUNCH: i32 = 3;

/// A host file as a node of fixed size.
pub struct FileLeaf {
    leaf: Leaf,
    size: u64,
    align: u32,
}

impl Driver for FileLeaf {
    fn name(&self) -> &'static str {
        "leaf"
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn limits(&self) -> Limits {
        Limits { request_alignment: self.align, ..Limits::default() }
    }
    fn kind(&self) -> Kind<'_> {
        Kind::Leaf(&self.leaf)
    }
    fn submit(&self, req: Request) -> LocalFuture<'_, (Result<(), Errno>, Request)> {
        Box::pin(async move {
            let Leaf::File(file) = &self.leaf else { return (Err(Errno::EIO), req) };
            let result = match req.op {
                Op::WriteZeroes | Op::Discard => file.fallocate(PUNCH, req.offset, req.len, None).await,
                Op::Flush => file.fdatasync().await,
                _ => Err(Errno::EIO),
            };
            (result, req)
        })
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Common options of test nodes: discards pass.
pub fn common() -> Common {
    Common { discard: true, ..Common::default() }
}

/// A leaf node on a file; `align` forces a request alignment, to exercise read-modify-write.
pub fn leaf_spec(name: Option<&str>, path: &Path, size: u64, align: u32) -> NodeSpec {
    let path = path.to_owned();
    NodeSpec {
        name: name.map(str::to_owned),
        common: common(),
        home: None,
        config: Arc::new(()),
        open: Box::new(move |_cx| {
            Box::pin(async move {
                let opts =
                    OpenOptions { expect: Expect::Regular, access: HostAccess::ReadWrite, direct: false };
                let file = File::open(&path, opts).await?;
                let driver = Arc::new(FileLeaf { leaf: Leaf::File(file), size, align });
                Ok(Opened { driver, owner: None })
            })
        }),
    }
}

const FREE: u64 = 0;
/// Clusters whose entries are loaded together.
const GROUP: u64 = 32;

/// What all cores see of a table image.
pub struct Table {
    size: u64,
    cluster: u64,
    /// Host cluster + 1; `FREE` reads as zeroes.
    map: Vec<AtomicU64>,
    loaded: Vec<AtomicBool>,
}

impl Table {
    fn entry(&self, at: u64) -> u64 {
        self.map[(at / self.cluster) as usize].load(Ordering::Acquire)
    }
}

impl Map for Table {
    fn lookup(&self, access: Access, range: Range<u64>, out: &mut Extents) -> Lookup {
        let mut at = range.start;
        while at < range.end {
            let n = (self.cluster - at % self.cluster).min(range.end - at);
            let group = at / self.cluster / GROUP;
            if !self.loaded[group as usize].load(Ordering::Acquire) {
                return if out.covered() > 0 { Lookup::Hit } else { Lookup::Miss(group) };
            }
            let target = match self.entry(at) {
                FREE if access == Access::Write => {
                    return if out.covered() > 0 { Lookup::Hit } else { Lookup::NeedsClaim { len: n } };
                }
                FREE => Target::Hole { keeps: None },
                host => Target::Data { child: 0, off: (host - 1) * self.cluster + at % self.cluster },
            };
            if !out.push(n, target) {
                break;
            }
            at += n;
        }
        Lookup::Hit
    }
}

/// The node.
pub struct TableDriver(Arc<Table>);

impl Driver for TableDriver {
    fn name(&self) -> &'static str {
        "table"
    }
    fn size(&self) -> u64 {
        self.0.size
    }
    fn limits(&self) -> Limits {
        let c = self.0.cluster as u32;
        Limits { punch_alignment: c, cluster_size: c, ..Limits::default() }
    }
    fn kind(&self) -> Kind<'_> {
        Kind::Map(&*self.0)
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct TableOwner {
    table: Arc<Table>,
    file: Child,
    busy: RefCell<BTreeSet<u64>>,
    changed: Event,
    next: Cell<u64>,
    free: RefCell<Vec<u64>>,
    grants: RefCell<BTreeMap<u64, (u64, u64)>>,
    ids: Cell<u64>,
}

impl TableOwner {
    async fn take(&self, clusters: Range<u64>) {
        while clusters.clone().any(|c| self.busy.borrow().contains(&c)) {
            self.changed.wait().await;
        }
        self.busy.borrow_mut().extend(clusters);
    }

    fn release(&self, clusters: Range<u64>) {
        self.busy.borrow_mut().retain(|c| !clusters.contains(c));
        self.changed.notify();
    }

    fn allocate(&self) -> u64 {
        self.free.borrow_mut().pop().unwrap_or_else(|| {
            self.next.set(self.next.get() + 1);
            self.next.get() - 1
        })
    }

    fn end_grant(&self, grant: &Grant) -> (u64, u64) {
        let (guest, host) = self.grants.borrow_mut().remove(&grant.id).expect("a grant ends once");
        self.release(guest..guest + 1);
        (guest, host)
    }
}

impl Owner for TableOwner {
    fn fault(&self, key: u64) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move {
            // as a format would: a read on the way
            self.file.read(0, Buf::new(512)).await.0?;
            self.table.loaded[key as usize].store(true, Ordering::Release);
            Ok(())
        })
    }

    fn claim(&self, range: Range<u64>) -> LocalFuture<'_, Result<Grant, Errno>> {
        Box::pin(async move {
            let c = self.table.cluster;
            let guest = range.start / c;
            self.take(guest..guest + 1).await;
            let end = range.end.min((guest + 1) * c);
            // an earlier claim may have filled it meanwhile
            let host = match self.table.entry(range.start) {
                FREE => self.allocate(),
                host => host - 1,
            };
            let id = self.ids.replace(self.ids.get() + 1);
            self.grants.borrow_mut().insert(id, (guest, host));
            let (head, tail) = (range.start - guest * c, (guest + 1) * c - end);
            let segs = [GrantSeg { child: 0, off: host * c, len: c }].into_iter().collect();
            Ok(Grant { id, guest: range.start..end, head, tail, segs })
        })
    }

    fn commit(&self, grant: Grant) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move {
            let (guest, host) = self.end_grant(&grant);
            self.table.map[guest as usize].store(host + 1, Ordering::Release);
            Ok(())
        })
    }

    fn abort(&self, grant: Grant) {
        let (guest, host) = self.end_grant(&grant);
        if self.table.map[guest as usize].load(Ordering::Relaxed) == FREE {
            self.free.borrow_mut().push(host);
        }
    }

    fn punch(&self, range: Range<u64>, _kind: Punch) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move {
            let c = self.table.cluster;
            let clusters = range.start / c..range.end.div_ceil(c);
            self.take(clusters.clone()).await;
            let old: Vec<u64> = clusters
                .clone()
                .map(|g| self.table.map[g as usize].swap(FREE, Ordering::AcqRel))
                .filter(|&h| h != FREE)
                .collect();
            // I4: whoever looked the clusters up before has finished when this returns
            epoch::tick().await;
            self.free.borrow_mut().extend(old.iter().map(|h| h - 1));
            self.release(clusters);
            Ok(())
        })
    }

    fn write_compressed(&self, _off: u64, data: Buf) -> LocalFuture<'_, (Result<(), Errno>, Buf)> {
        Box::pin(async move { (Err(Errno::ENOTSUP), data) })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move { self.file.flush().await })
    }

    fn truncate(&self, _size: u64, _p: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move { Err(Error::from(Errno::ENOTSUP)) })
    }

    fn close(&self) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move { self.file.flush().await })
    }
}

/// A table node above a leaf. `home` is its home core.
pub fn table_spec(
    name: &str,
    path: &Path,
    size: u64,
    cluster: u64,
    home: usize,
    leaf_align: u32,
) -> NodeSpec {
    let path: PathBuf = path.to_owned();
    NodeSpec {
        name: Some(name.to_owned()),
        common: common(),
        home: Some(home),
        config: Arc::new(()),
        open: Box::new(move |cx| {
            Box::pin(async move {
                let leaf = leaf_spec(None, &path, u64::MAX / 2, leaf_align);
                let file = cx.open_child("file", Role::Image, ChildSpec::Inline(Box::new(leaf))).await?;
                let clusters = size.div_ceil(cluster);
                let table = Arc::new(Table {
                    size,
                    cluster,
                    map: (0..clusters).map(|_| AtomicU64::new(FREE)).collect(),
                    loaded: (0..clusters.div_ceil(GROUP)).map(|_| AtomicBool::new(false)).collect(),
                });
                let driver = Arc::new(TableDriver(table.clone()));
                let owner: OwnerFn = Box::new(move || {
                    Rc::new(TableOwner {
                        table,
                        file,
                        busy: RefCell::default(),
                        changed: Event::default(),
                        next: Cell::new(0),
                        free: RefCell::default(),
                        grants: RefCell::default(),
                        ids: Cell::new(0),
                    })
                });
                Ok(Opened { driver, owner: Some(owner) })
            })
        }),
    }
}

/// Adds a node on core 0 and attaches a read-write root to it.
pub async fn add_and_attach(spec: NodeSpec) -> Root {
    let graph = Graph::current();
    let node = graph.add(spec).await.expect("the node opens");
    let user = "the test".to_owned();
    let root = RootSpec { node, perm: perm::ALL & !perm::RESIZE, shared: perm::ALL, user, throttle: None };
    graph.attach(root).await.expect("the root attaches")
}

/// A small deterministic generator (splitmix64).
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

/// Random guest I/O on a stripe `[base, base + len)` of a root, checked against a model. Every read is compared.
pub async fn churn(root: Root, base: u64, len: u64, ops: u32, seed: u64) {
    let mut rng = Rng(seed);
    let mut model = vec![0u8; len as usize];
    for i in 0..ops {
        let off = rng.below(len - 1);
        let n = 1 + rng.below((len - off).min(20_000));
        let (off, n) = if rng.below(3) == 0 { (off, n) } else { (off & !511, n.next_multiple_of(512)) };
        let n = n.min(len - off);
        let range = off as usize..(off + n) as usize;
        match rng.below(20) {
            0..=8 => {
                let mut buf = Buf::new(n as usize);
                let stamp = (seed as u8) ^ (i as u8);
                for (j, b) in buf.iter_mut().enumerate() {
                    *b = stamp.wrapping_add((j / 7) as u8) | 1;
                }
                model[range].copy_from_slice(&buf);
                root.write(base + off, buf, Flags::NONE).await.0.expect("write");
            }
            9..=10 => {
                model[range].fill(0);
                let flags = Flags { may_unmap: rng.below(2) == 0, ..Flags::NONE };
                root.write_zeroes(base + off, n, flags).await.expect("zeroes");
            }
            11 => root.flush().await.expect("flush"),
            _ => {
                let (result, buf) = root.read(base + off, Buf::new(n as usize)).await;
                result.expect("read");
                if let Some(at) = (0..n as usize).find(|&j| buf[j] != model[range.start + j]) {
                    let (have, want) = (buf[at], model[range.start + at]);
                    panic!("seed {seed} op {i}: byte {} is {have}, not {want}", base + off + at as u64);
                }
            }
        }
    }
    let (result, buf) = root.read(base, Buf::new(len as usize)).await;
    result.expect("read");
    assert!(buf[..] == model[..], "seed {seed}: contents at the end");
}

/// Runs something on every core and waits for all.
pub async fn on_all_cores<M>(make: M)
where
    M: Fn(usize) -> LocalFuture<'static, ()> + Send + Sync + Clone + 'static,
{
    let core = Core::current();
    let mut waits = Vec::new();
    for index in 0..core.count() {
        let make = make.clone();
        waits.push(core.spawn_join(async move {
            Core::current().call(index, move || make(index)).await.expect("the core runs");
        }));
    }
    for w in waits {
        w.await.expect("the task finishes");
    }
}
