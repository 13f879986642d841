//! The machine's own ring as a source of histories: the same sessions on a running engine, with files in the page cache and
//! around it. Only what is drawn repeats from a seed; the order of things does not.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ringblock_engine::graph::Graph;
use ringblock_engine::host::sim::Rng;
use ringblock_engine::{Config, Engine};

use super::history::{self, Looked, Rules};
use super::session::Session;
use super::shape::Shape;

/// Requests of one session.
pub(super) const REQUESTS: u64 = 10_000;

/// A folder that goes away with its session.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    /// On a disk, or in memory where that is to be had.
    pub(super) fn new(disk: bool) -> Result<Scratch, String> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let memory = Path::new("/dev/shm");
        let parent = if disk || !memory.is_dir() { std::env::temp_dir() } else { memory.to_owned() };
        let name = format!("rb-linear-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        std::fs::create_dir_all(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Scratch(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Puts the shape's files there.
    pub(super) fn fill(&self, shape: &Shape) -> Result<(), String> {
        for (name, data) in shape.files()? {
            std::fs::write(self.0.join(name), data).map_err(|e| format!("{name}: {e}"))?;
        }
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is no business of a history.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The shape of a seed for a real disk, and whether it passes by the page cache.
pub(super) fn shape(seed: u64) -> (Shape, bool) {
    let mut shape = Shape::of(seed);
    let mut rng = Rng::new(seed ^ 0x4ea1);
    // the machine's disk has no faults to inject; flushes there take their time
    shape.failing = false;
    let direct = rng.chance(250);
    if direct {
        (shape.mix.flushes, shape.mix.fua) = (1, 3);
    }
    shape.clients += 8;
    (shape, direct)
}

/// Runs one session on a running engine and checks it.
pub(super) fn run(engine: &Engine, seed: u64) -> Result<(Looked, u64), String> {
    let (shape, direct) = shape(seed);
    let scratch = Scratch::new(direct)?;
    scratch.fill(&shape)?;
    let (shape, dir) = (Arc::new(shape), scratch.path().to_owned());
    let of = shape.clone();
    let session = engine.run(0, move || {
        Box::pin(async move {
            let mut session = Session::open(of, &dir, direct, seed).await?;
            let worked = match session.work(REQUESTS, seed).await {
                Ok(()) => session.finish().await,
                Err(e) => Err(e),
            };
            if worked.is_err() {
                // the next session finds a graph without nodes
                let _ = Graph::current().shutdown().await;
            }
            worked.map(|()| (session.initial, session.ops, session.disturbances))
        })
    });
    let (initial, ops, disturbances) = session?;
    let rules = Rules { torn_while_changing: true };
    Ok((history::check(&shape.grid, &initial, &ops, rules)?, disturbances))
}

/// An engine for sessions.
pub(super) fn engine(cores: usize) -> Result<Engine, String> {
    Engine::start(&Config { cores, pin: false, ..Config::default() }).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the real ring is linearizable too. Method: some sessions on three cores.
    #[test]
    fn sessions() {
        let engine = engine(3).unwrap();
        for seed in 0..4 {
            let (looked, _) = run(&engine, seed).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            assert!(looked.ops >= REQUESTS);
        }
    }
}
