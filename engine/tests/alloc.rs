//! The hot path allocates nothing: heap allocations of a core's thread are counted while requests run.
#![cfg(not(loom))]

mod support;

use std::cell::Cell;

use ringblock_engine::core::Core;
use ringblock_engine::driver::{Flags, LocalFuture};
use ringblock_engine::heap::Counting;
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use ringblock_engine::{Config, Engine};
use support::*;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SIZE: u64 = 1 << 20;

/// `rounds` requests at depth 16, each a task of its own, as an export issues them.
async fn load(root: Root, rounds: u64, write: bool) {
    let core = Core::current();
    let live = std::rc::Rc::new(Cell::new(0u64));
    let mut rng = Rng(5);
    for _ in 0..rounds {
        while live.get() >= 16 {
            ringblock_engine::core::yield_now().await;
        }
        live.set(live.get() + 1);
        let off = rng.below(SIZE / 4096) * 4096;
        let live = live.clone();
        core.spawn(async move {
            let buf = Buf::new(4096);
            let (result, _buf) = match write {
                true => root.write(off, buf, Flags::NONE).await,
                false => root.read(off, buf).await,
            };
            result.expect("the request succeeds");
            live.set(live.get() - 1);
        });
    }
    while live.get() > 0 {
        ringblock_engine::core::yield_now().await;
    }
}

/// Goal: a read or an in-place write of a plain leaf and of an allocated mapped image costs no heap allocation, spawning
/// its task included. Method: count the thread's allocations over thousands of requests after warming up.
#[test]
fn hot_path_does_not_allocate() {
    let path = std::env::temp_dir().join(format!("rb-alloc-{}", std::process::id()));
    for table in [false, true] {
        std::fs::File::create(&path).expect("create").set_len(SIZE).expect("set_len");
        let config = Config { cores: 1, pin: false, ..Config::default() };
        let engine = Engine::start(&config).expect("an engine");
        let path = path.clone();
        let work = move || -> LocalFuture<'static, [u64; 2]> {
            Box::pin(async move {
                let spec = match table {
                    true => table_spec("n", &path, SIZE, 65536, 0, 1),
                    false => leaf_spec(Some("n"), &path, SIZE, 1),
                };
                let root = add_and_attach(spec).await;
                // everything allocated, every list at its working size
                root.write(0, Buf::zeroed(SIZE as usize), Flags::NONE).await.0.expect("fill");
                let mut counts = [0; 2];
                for (i, write) in [false, true].into_iter().enumerate() {
                    load(root, 500, write).await;
                    let before = Counting::of_thread();
                    load(root, 5000, write).await;
                    counts[i] = Counting::of_thread() - before;
                }
                counts
            })
        };
        let counts = engine.run(0, work);
        // one for the counter that `load` itself shares with its tasks
        assert_eq!(counts, [1, 1], "allocations in 5000 reads and 5000 writes, table {table}");
    }
    let _ = std::fs::remove_file(path);
}
