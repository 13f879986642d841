//! A closed-loop load: `depth` requests in flight on the current core until the time is up.

use std::cell::Cell;
use std::rc::Rc;

use ringblock_engine::core::Core;
use ringblock_engine::driver::Flags;
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Write instead of reading.
    pub write: bool,
    /// Bytes per request.
    pub size: usize,
    /// Requests in flight.
    pub depth: usize,
    /// Nanoseconds.
    pub duration: u64,
}

/// Runs the load; returns requests completed and the nanoseconds it took.
pub async fn run(root: Root, load: Load) -> (u64, u64) {
    let core = Core::current();
    let start = core.now_exact();
    let count = Rc::new(Cell::new(0u64));
    let mut tasks = Vec::new();
    for i in 0..load.depth {
        let count = count.clone();
        tasks.push(
            core.spawn_join(async move { one(root, load, start + load.duration, i as u64, &count).await }),
        );
    }
    for t in tasks {
        t.await;
    }
    (count.get(), core.now_exact() - start)
}

async fn one(root: Root, load: Load, until: u64, seed: u64, count: &Cell<u64>) {
    let core = Core::current();
    let blocks = root.size().unwrap_or(0) / load.size as u64;
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut buf = Buf::zeroed(load.size);
    let mut turns = 0u32;
    while blocks > 0 && core.now() < until {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        let off = x % blocks * load.size as u64;
        let (result, back) = match load.write {
            false => root.read(off, buf).await,
            true => root.write(off, buf, Flags::NONE).await,
        };
        buf = back;
        if result.is_err() {
            return;
        }
        count.set(count.get() + 1);
        turns += 1;
        if turns.is_multiple_of(64) {
            // a node that answers at once must not keep the core from its other work
            ringblock_engine::core::yield_now().await;
        }
    }
}
