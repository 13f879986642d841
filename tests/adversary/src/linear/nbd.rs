//! Several NBD connections to a server on its unix socket as a source of histories, with connections cut in mid-flight.
//!
//! ```text
//!   client thread: up to 8 requests in flight ─► replies in any order ─► written down
//!                  └ cut: requests without a reply may take effect until the export is gone, or never
//! ```
//!
//! What a cut connection asked for ends when its export has been removed: the server has then run or dropped every request.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringblock::daemon::Daemon;
use ringblock::qmp::dispatch::Registry;
use ringblock_engine::host::sim::Rng;
use ringblock_tests::nbd::{self, Nbd};
use serde_json::{Value, json};

use super::client::{Request, draw};
use super::history::{self, Clock, Fate, Kind, Looked, Op, Rules};
use super::real::{Scratch, shape};
use super::register::NEVER;
use super::shape::Shape;

/// Requests of one session.
pub(super) const REQUESTS: u64 = 6_000;
/// Requests of one connection at the same time.
const DEPTH: usize = 8;
/// Connections at the same time.
const CLIENTS: u32 = 5;

/// A daemon in this process.
struct Server {
    daemon: Arc<Daemon>,
    registry: Registry<Daemon>,
}

impl Server {
    fn start() -> Result<Server, String> {
        let daemon = Daemon::start(3).map_err(|e| e.to_string())?;
        Ok(Server { daemon, registry: Daemon::registry() })
    }

    fn run(&self, name: &str, args: Value) -> Result<Value, String> {
        self.registry.run(&self.daemon, name, &args).map_err(|e| format!("{name}: {e}"))
    }

    fn export(&self) -> Result<(), String> {
        let args = json!({"type": "nbd", "id": "e", "node-name": "n", "name": "d", "writable": true});
        self.run("block-export-add", args).map(drop)
    }

    /// Removes the export and waits until it is gone.
    fn withdraw(&self) -> Result<(), String> {
        self.run("block-export-del", json!({"id": "e", "mode": "hard"}))?;
        let began = Instant::now();
        while self.run("query-block-exports", json!({}))? != json!([]) {
            if began.elapsed() > Duration::from_secs(30) {
                return Err("the export is not gone after 30 s".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its own errors were told where they mattered.
        let _ = self.daemon.close();
    }
}

/// Runs one session and checks it. The second number counts connections that were cut.
pub(super) fn run(seed: u64) -> Result<(Looked, u64), String> {
    let (shape, direct) = shape(seed);
    let shape = Arc::new(Shape { packed: 0, ..shape });
    let scratch = Scratch::new(direct)?;
    scratch.fill(&shape)?;
    let server = Server::start()?;
    server.run("blockdev-add", shape.node(scratch.path(), direct))?;
    let socket = scratch.path().join("nbd").to_string_lossy().into_owned();
    let addr = json!({"type": "unix", "data": {"path": socket}});
    server.run("nbd-server-start", json!({"addr": addr}))?;
    let clock = Arc::new(Clock::default());
    let (mut ops, mut cuts) = (Vec::new(), 0);
    for round in 0..3 {
        server.export()?;
        let mut done = clients(&shape, &clock, &socket, seed ^ round << 48)?;
        cuts += done.1;
        server.withdraw()?;
        let gone = clock.tick();
        for op in &mut done.0 {
            if op.fate == Fate::Lost(NEVER) {
                op.fate = Fate::Lost(gone);
            }
        }
        ops.extend(done.0);
    }
    server.export()?;
    read_all(&shape, &clock, &socket, &mut ops)?;
    server.withdraw()?;
    server.run("blockdev-del", json!({"node-name": "n"}))?;
    server.run("blockdev-add", shape.node(scratch.path(), direct))?;
    server.export()?;
    read_all(&shape, &clock, &socket, &mut ops)?;
    server.withdraw()?;
    let rules = Rules { torn_while_changing: true };
    Ok((history::check(&shape.grid, &shape.initial(), &ops, rules)?, cuts))
}

fn clients(
    shape: &Arc<Shape>,
    clock: &Arc<Clock>,
    socket: &str,
    seed: u64,
) -> Result<(Vec<Op>, u64), String> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CLIENTS)
            .map(|index| {
                let rng = Rng::new(seed ^ u64::from(index + 1) << 24);
                let client = Client { index, shape, clock, socket, rng, ops: Vec::new(), cuts: 0 };
                scope.spawn(move || client.run(REQUESTS / 3 / u64::from(CLIENTS)))
            })
            .collect();
        let (mut ops, mut cuts) = (Vec::new(), 0);
        for t in threads {
            let done = t.join().map_err(|p| format!("panic: {}", crate::panic_text(&*p)))??;
            ops.extend(done.0);
            cuts += done.1;
        }
        Ok((ops, cuts))
    })
}

/// One thread and its connections, one after another.
struct Client<'a> {
    index: u32,
    shape: &'a Shape,
    clock: &'a Clock,
    socket: &'a str,
    rng: Rng,
    ops: Vec<Op>,
    cuts: u64,
}

impl Client<'_> {
    fn run(mut self, mut left: u64) -> Result<(Vec<Op>, u64), String> {
        while left > 0 {
            // every now and then a connection of a few requests only
            let few = self.rng.chance(700);
            let n = if few { 1 + self.rng.below(200) } else { left }.min(left);
            self.connection(n, few).map_err(|e| format!("client {}: {e}", self.index))?;
            left -= n;
        }
        Ok((self.ops, self.cuts))
    }

    /// Makes `n` requests; with `cut` the end comes without waiting for the last replies.
    fn connection(&mut self, mut n: u64, cut: bool) -> std::io::Result<()> {
        let mut nbd = Nbd::connect(self.socket, "d")?;
        let mut flying: HashMap<u64, (u64, Request)> = HashMap::new();
        let depth = 1 + self.rng.below(DEPTH as u64) as usize;
        while n > 0 || !flying.is_empty() {
            if n > 0 && flying.len() < depth {
                let r = draw(&self.shape.grid, &self.shape.mix, &mut self.rng);
                let id = self.clock.tick();
                flying.insert(submit(&mut nbd, &self.shape.grid, id, r)?, (id, r));
                n -= 1;
                continue;
            }
            if n == 0 && cut {
                break;
            }
            self.reply(&mut nbd, &mut flying)?;
        }
        if cut {
            self.cuts += 1;
            drop(nbd);
            let lost =
                flying.into_values().map(|(id, r)| record(id, NEVER, self.index, r, Fate::Lost(NEVER)));
            self.ops.extend(lost);
        } else {
            nbd.close();
        }
        Ok(())
    }

    fn reply(&mut self, nbd: &mut Nbd, flying: &mut HashMap<u64, (u64, Request)>) -> std::io::Result<()> {
        let (cookie, error) = nbd.reply()?;
        let other = || std::io::Error::other(format!("a reply to cookie {cookie}, which is not in flight"));
        let (id, r) = flying.remove(&cookie).ok_or_else(other)?;
        if error != 0 {
            return Err(std::io::Error::other(format!("{r:?}: error {error}")));
        }
        let op = receive(nbd, self.shape, self.clock, self.index, id, r)?;
        self.ops.push(op);
        Ok(())
    }
}

fn record(id: u64, end: u64, client: u32, r: Request, fate: Fate) -> Op {
    Op {
        id,
        end,
        client,
        kind: r.kind,
        first: r.first,
        count: r.count,
        fate,
        found: Box::default(),
        bad: Vec::new(),
    }
}

fn submit(nbd: &mut Nbd, grid: &history::Grid, id: u64, r: Request) -> std::io::Result<u64> {
    let fua = if r.fua { nbd::FLAG_FUA } else { 0 };
    let no_hole = if r.unmap { 0 } else { nbd::FLAG_NO_HOLE };
    let len = r.len as u32;
    let mut data =
        vec![0; if matches!(r.kind, Kind::Write | Kind::WriteZeroBuffer) { r.len as usize } else { 0 }];
    if r.kind == Kind::Write {
        grid.fill(id, r.off, &mut data);
    }
    match r.kind {
        Kind::Read => nbd.submit(nbd::READ, 0, r.off, len, &[]),
        Kind::Write | Kind::WriteZeroBuffer => nbd.submit(nbd::WRITE, fua, r.off, len, &data),
        Kind::Zero => nbd.submit(nbd::WRITE_ZEROES, fua | no_hole, r.off, len, &[]),
        Kind::Discard => nbd.submit(nbd::TRIM, fua, r.off, len, &[]),
        Kind::Flush => nbd.submit(nbd::FLUSH, 0, 0, 0, &[]),
    }
}

/// Takes a reply's data and writes the operation down.
fn receive(
    nbd: &mut Nbd,
    shape: &Shape,
    clock: &Clock,
    client: u32,
    id: u64,
    r: Request,
) -> std::io::Result<Op> {
    let mut op = record(id, 0, client, r, Fate::Done);
    if r.kind == Kind::Read {
        let mut data = vec![0; r.len as usize];
        nbd.payload(&mut data)?;
        op.found = shape.grid.decode(r.first, r.count, r.off, &data, &mut op.bad);
    }
    op.end = clock.tick();
    Ok(op)
}

fn read_all(shape: &Shape, clock: &Clock, socket: &str, ops: &mut Vec<Op>) -> Result<(), String> {
    let told = |e: std::io::Error| format!("reading all: {e}");
    let mut nbd = Nbd::connect(socket, "d").map_err(told)?;
    let mut first = 0;
    while first < shape.grid.cells {
        let count = (shape.grid.cells - first).min(128);
        let (off, len) = shape.grid.bytes(first, count);
        let r = Request { kind: Kind::Read, first, count, off, len, fua: false, unmap: false };
        let id = clock.tick();
        submit(&mut nbd, &shape.grid, id, r).map_err(told)?;
        match nbd.reply().map_err(told)?.1 {
            0 => ops.push(receive(&mut nbd, shape, clock, u32::MAX, id, r).map_err(told)?),
            e => return Err(format!("reading all: error {e}")),
        }
        first += count;
    }
    nbd.close();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: connections of one export see one disk, also when some are cut. Method: some sessions.
    #[test]
    fn sessions() {
        for seed in 0..3 {
            let (looked, cuts) = run(seed).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            assert!(looked.ops >= REQUESTS && cuts > 0);
        }
    }
}
