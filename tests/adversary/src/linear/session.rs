//! One session: a node is opened, clients work on every core, somebody disturbs them, and in the end everything is read,
//! closed, opened again and read again. The same code runs in the simulator and on the real ring.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::from_json;
use ringblock_engine::core::Core;
use ringblock_engine::driver::{Flags, LocalFuture, Preallocation, perm};
use ringblock_engine::error::Error;
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::host::sim::Rng;
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use ringblock_engine::timer::Sleep;
use serde_json::{Value, json};

use super::client::{Client, Stop, read_all};
use super::history::{Clock, Op};
use super::shape::{PACKED, Shape};

/// A disk that is open, and what is known of it.
pub(super) struct Session {
    shape: Arc<Shape>,
    dir: PathBuf,
    direct: bool,
    roots: Vec<Root>,
    clock: Arc<Clock>,
    /// The values of all cells at the beginning.
    pub(super) initial: Vec<u64>,
    /// What has been done.
    pub(super) ops: Vec<Op>,
    /// How often somebody disturbed.
    pub(super) disturbances: u64,
}

async fn add(node: &Value) -> Result<(), Error> {
    let options: BlockdevOptions = from_json(node)?;
    Graph::current().add(open::node(options)?).await.map(drop)
}

async fn attach() -> Result<Root, Error> {
    let spec = RootSpec {
        node: "n".into(),
        perm: perm::CONSISTENT_READ | perm::WRITE,
        shared: perm::ALL,
        user: "a client".into(),
        throttle: None,
    };
    Graph::current().attach(spec).await
}

async fn reopen(node: &Value) -> Result<(), Error> {
    let graph = Graph::current();
    let options = vec![from_json::<BlockdevOptions>(node)?];
    graph.reopen(open::reopen(options, &graph.info())?).await
}

impl Session {
    /// Opens the node on core 0, and puts compressed clusters into it.
    pub(super) async fn open(
        shape: Arc<Shape>,
        dir: &Path,
        direct: bool,
        seed: u64,
    ) -> Result<Session, String> {
        let told = |e: Error| format!("opening: {e}");
        add(&shape.node(dir, direct)).await.map_err(told)?;
        let mut rng = Rng::new(seed ^ 0x0be9);
        let mut roots = vec![attach().await.map_err(told)?];
        if rng.chance(400) {
            roots.push(attach().await.map_err(told)?);
        }
        let mut initial = shape.initial();
        let cluster = shape.image.as_ref().map_or(0, |o| o.cluster_size);
        for at in (0..shape.grid.size()).step_by(cluster.max(1) as usize).take_while(|_| shape.packed > 0) {
            if rng.chance(shape.packed) {
                let mut buf = Buf::new(cluster as usize);
                shape.grid.fill(PACKED, at, &mut buf);
                let flags = Flags { compressed: true, ..Flags::NONE };
                roots[0].write(at, buf, flags).await.0.map_err(|e| format!("compressing: {e}"))?;
                let cells = (at / shape.grid.stride) as usize..((at + cluster) / shape.grid.stride) as usize;
                initial[cells].fill(PACKED);
            }
        }
        let (dir, clock) = (dir.to_owned(), Arc::new(Clock::default()));
        Ok(Session { shape, dir, direct, roots, clock, initial, ops: Vec::new(), disturbances: 0 })
    }

    /// Clients on every core, this many requests in all.
    pub(super) async fn work(&mut self, requests: u64, seed: u64) -> Result<(), String> {
        let core = Core::current();
        let each = requests.div_ceil(u64::from(self.shape.clients));
        let mut joins = Vec::new();
        for index in 0..self.shape.clients {
            let root = self.roots[index as usize % self.roots.len()];
            let (shape, clock) = (self.shape.clone(), self.clock.clone());
            let client = Client { index, shape, root, clock, requests: each };
            let rng = Rng::new(seed ^ u64::from(index + 1) << 32);
            let call = move || -> LocalFuture<'static, Result<Vec<Op>, String>> { Box::pin(client.run(rng)) };
            let on = index as usize % core.count();
            joins.push(core.spawn_join(async move { Core::current().call(on, call).await }));
        }
        let stop: Stop = Rc::new(Cell::new(false));
        let disturber = self.shape.disturbed.then(|| {
            let node = self.shape.node(&self.dir, self.direct);
            core.spawn_join(disturb(self.shape.clone(), node, stop.clone(), Rng::new(seed ^ 0xd157)))
        });
        let mut result = Ok(());
        for j in joins {
            match j.await.flatten() {
                Some(Ok(ops)) => self.ops.extend(ops),
                Some(Err(e)) => result = Err(e),
                None => result = Err("a core has stopped".into()),
            }
        }
        stop.set(true);
        if let Some(disturber) = disturber {
            self.disturbances += disturber.await.ok_or("the disturber has ended")??;
        }
        result
    }

    /// Reads everything; without faults also closes, opens again and reads again.
    pub(super) async fn finish(&mut self) -> Result<(), String> {
        let grid = self.shape.grid;
        let roots = self.roots.clone();
        read_all(roots[roots.len() - 1], &grid, &self.clock, &mut self.ops).await?;
        let closed = Graph::current().shutdown().await;
        if self.shape.failing {
            return Ok(());
        }
        closed.map_err(|e| format!("closing: {e}"))?;
        let again = |e: Error| format!("opening again: {e}");
        add(&self.shape.node(&self.dir, self.direct)).await.map_err(again)?;
        let root = attach().await.map_err(again)?;
        read_all(root, &grid, &self.clock, &mut self.ops).await?;
        Graph::current().shutdown().await.map_err(|e| format!("closing: {e}"))
    }
}

/// Until told to stop: grows and shrinks the disk beyond what the clients use, opens it again with other caches, attaches
/// and detaches roots, adds and deletes other nodes.
async fn disturb(shape: Arc<Shape>, node: Value, stop: Stop, mut rng: Rng) -> Result<u64, String> {
    let graph = Graph::current();
    let mut count = 0;
    while !stop.get() {
        Sleep::ns(rng.between(100_000, 3_000_000)).await;
        let what = rng.below(4);
        let result = match what {
            0 => {
                let size = shape.grid.size() + (rng.below(4) << 16);
                graph.resize("n", size, Preallocation::Off).await
            }
            1 => {
                let mut node = node.clone();
                if let (Some(map), true) = (node.as_object_mut(), shape.image.is_some()) {
                    map.insert("l2-cache-size".into(), json!(rng.pick(&[4096, 65536, 1 << 20])));
                }
                reopen(&node).await
            }
            2 => match attach().await {
                Ok(root) => {
                    Sleep::ns(rng.below(500_000)).await;
                    graph.detach(root).await
                }
                Err(e) => Err(e),
            },
            _ => {
                let other = json!({"driver": "null-co", "node-name": "other"});
                match add(&other).await {
                    Ok(()) => graph.del("other").await,
                    Err(e) => Err(e),
                }
            }
        };
        result.map_err(|e| format!("disturbance {what}: {e}"))?;
        count += 1;
    }
    Ok(count)
}
