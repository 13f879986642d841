//! Prints IOPS and CPU per request of the engine's hot path on one core: `hotpath null|FILE [read|write] [depth] [direct]`.
use ringblock_bench::load::{Load, run};
use ringblock_bench::node::{Below, leaf};
use ringblock_engine::{Config, Engine};

fn cpu() -> (f64, f64) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let field = |n: usize| {
        stat.rsplit(')').next().and_then(|s| s.split_whitespace().nth(n)).and_then(|s| s.parse().ok())
    };
    (field(11).unwrap_or(0.0) / 100.0, field(12).unwrap_or(0.0) / 100.0)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let path = args.get(1).map_or("null", String::as_str);
    let write = args.get(2).is_some_and(|a| a == "write");
    let depth = args.get(3).and_then(|a| a.parse().ok()).unwrap_or(64);
    let direct = args.get(4).is_some_and(|a| a == "direct");
    let below = match path {
        "null" => Below::Null,
        p => Below::File { path: p.into(), direct },
    };
    let engine = Engine::start(&Config { cores: 1, ..Config::default() }).expect("start");
    let before = cpu();
    let (n, ns) = engine.run(0, move || {
        Box::pin(async move {
            let root = leaf(below).await.expect("open");
            run(root, Load { write, size: 4096, depth, duration: 2_000_000_000 }).await
        })
    });
    let after = cpu();
    let million = n as f64 / 1e6;
    println!(
        "{path} {} depth {depth}: {:.0} IOPS, {:.3} us user + {:.3} us system each",
        if write { "write" } else { "read" },
        n as f64 * 1e9 / ns as f64,
        (after.0 - before.0) / million,
        (after.1 - before.1) / million
    );
}
