//! Micro-benchmarks of the engine: what one step costs, on one core, without a device.
//!
//! `cargo bench -p ringblock-bench`

use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use ringblock_bench::node::{Below, leaf, limited};
use ringblock_engine::core::{Core, yield_now};
use ringblock_engine::driver::LocalFuture;
use ringblock_engine::mem::Buf;
use ringblock_engine::throttle::{Config as Limits, DEFAULT_WEIGHT, Group, Kind, Member};
use ringblock_engine::{Config, Engine};

/// Times a body that runs on a core and does `n` steps.
fn on_core<F>(c: &mut Criterion, engine: &Engine, name: &str, body: F)
where
    F: Fn(u64) -> LocalFuture<'static, Duration> + Send + Clone + 'static,
{
    c.bench_function(name, |b| {
        b.iter_custom(|n| {
            let body = body.clone();
            engine.run(0, move || body(n))
        })
    });
}

fn engine(c: &mut Criterion) {
    let engine = Engine::start(&Config { cores: 1, ..Config::default() }).expect("start");
    let root = engine.run(0, || Box::pin(leaf(Below::Null))).expect("open");

    on_core(c, &engine, "request: 4 KiB read of a null node", move |n| {
        Box::pin(async move {
            let mut buf = Buf::zeroed(4096);
            let start = Instant::now();
            for i in 0..n {
                buf = root.read(i % 1024 * 4096, buf).await.1;
            }
            start.elapsed()
        })
    });

    on_core(c, &engine, "executor: spawn, run and retire a task", |n| {
        Box::pin(async move {
            let core = Core::current();
            let start = Instant::now();
            for i in 0..n {
                core.spawn(async move {
                    std::hint::black_box(i);
                });
                if i.is_multiple_of(64) {
                    yield_now().await;
                }
            }
            start.elapsed()
        })
    });

    on_core(c, &engine, "turn: yield, with nothing else to do", |n| {
        Box::pin(async move {
            let start = Instant::now();
            for _ in 0..n {
                yield_now().await;
            }
            start.elapsed()
        })
    });

    on_core(c, &engine, "memory: take and return a 4 KiB buffer", |n| {
        Box::pin(async move {
            let start = Instant::now();
            for _ in 0..n {
                std::hint::black_box(Buf::new(4096));
            }
            start.elapsed()
        })
    });
}

/// What limits cost a request: none at all, a group without limits, one whose limits allow everything, and two of them.
fn throttle(c: &mut Criterion) {
    let engine = Engine::start(&Config { cores: 1, ..Config::default() }).expect("start");
    let mut high = Limits::default();
    high.rates[Kind::OpsTotal as usize].avg = 1e12;
    high.rates[Kind::BpsTotal as usize].avg = 1e15;
    let cases = [
        ("no group", None),
        ("a group without limits", Some(Limits::default())),
        ("high limits", Some(high)),
    ];
    for (name, limits) in cases {
        let member = limits.map(|l| Member::join(&Group::new(name, l), DEFAULT_WEIGHT));
        let root = engine.run(0, || Box::pin(limited(Below::Null, member))).expect("open");
        on_core(c, &engine, &format!("throttle: 4 KiB read of a null node, {name}"), move |n| {
            Box::pin(async move {
                let mut buf = Buf::zeroed(4096);
                let start = Instant::now();
                for i in 0..n {
                    buf = root.read(i % 1024 * 4096, buf).await.1;
                }
                start.elapsed()
            })
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(2)).sample_size(20);
    targets = engine, throttle
}
criterion_main!(benches);
