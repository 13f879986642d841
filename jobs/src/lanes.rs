//! One copy on all cores: the target is dealt out in stripes, and every core copies the ones it gets.
//!
//! ```text
//!   0 ── stripe ─┬─ stripe ─┬─ stripe ─┬─ …          next (shared counter)
//!              lane 0     lane 1     lane 2          each a BlockCopy on its core, several lanes a core
//! ```
//!
//! Invariants: a stripe is copied by one lane; stripes begin at multiples of [`STRIPE`], which every cluster size
//! divides, so no cluster is written by two; the first error stops all lanes, what was started is waited for.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ringblock_engine::core::Core;
use ringblock_engine::path::Root;

use crate::copy::{BlockCopy, Failure, Options, Source};

/// Bytes that a lane takes at once.
pub const STRIPE: u64 = 32 << 20;
/// Lanes of one core, so that it has something to do while one of them finishes a stripe.
const LANES: usize = 2;

/// Told how many bytes are dealt with so far, from any core.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

struct Shared {
    target: Root,
    options: Options,
    sources: Vec<Source>,
    end: u64,
    next: AtomicU64,
    done: AtomicU64,
    stop: AtomicBool,
    failure: Mutex<Option<Failure>>,
    progress: Progress,
}

/// Copies `sources` into `target` on all cores of the engine, in no particular order. Call on a core.
pub async fn copy_on_all_cores(
    target: Root,
    options: Options,
    sources: Vec<Source>,
    progress: Progress,
) -> Result<(), Failure> {
    let core = Core::current();
    let lanes = core.count() * LANES;
    let workers = options.workers.div_ceil(lanes);
    let shared = Arc::new(Shared {
        target,
        options: Options { workers, ordered: false, ..options },
        end: sources.iter().map(|s| s.at.saturating_add(s.len)).max().unwrap_or(0),
        sources,
        next: AtomicU64::new(0),
        done: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        failure: Mutex::default(),
        progress,
    });
    let mut running = Vec::with_capacity(lanes);
    for lane in 0..lanes {
        let (shared, caller) = (shared.clone(), core.clone());
        let index = (core.index + lane) % core.count();
        running.push(core.spawn_join(async move {
            caller.call(index, move || Box::pin(run_lane(shared))).await;
        }));
    }
    for lane in running {
        lane.await;
    }
    let failure = *shared.failure.lock().unwrap_or_else(|e| e.into_inner());
    failure.map_or(Ok(()), Err)
}

async fn run_lane(shared: Arc<Shared>) {
    while !shared.stop.load(Ordering::Relaxed) {
        let start = shared.next.fetch_add(STRIPE, Ordering::Relaxed);
        if start >= shared.end {
            return;
        }
        let parts = stripe(&shared.sources, start, start.saturating_add(STRIPE));
        let (told, counter) = (Cell::new(0), shared.clone());
        let progress = move |n: u64| {
            let more = n - told.replace(n);
            (counter.progress)(counter.done.fetch_add(more, Ordering::Relaxed) + more);
        };
        let copy = BlockCopy::new(shared.target, shared.options.clone(), Box::new(progress));
        if let Err(failure) = copy.run(&parts).await {
            shared.stop.store(true, Ordering::Relaxed);
            shared.failure.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(failure);
        }
    }
}

/// The parts of the sources that go to `start..end` of the target.
fn stripe(sources: &[Source], start: u64, end: u64) -> Vec<Source> {
    let part = |s: &Source| {
        let from = s.from.max(start.saturating_sub(s.at));
        let len = s.len.min(end.saturating_sub(s.at));
        (from < len).then_some(Source { from, len, ..*s })
    };
    sources.iter().filter_map(part).collect()
}
