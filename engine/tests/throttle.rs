//! Limits through roots and cores, in the simulator: on its clock rates, shares and waits are exact, and instant.
#![cfg(not(loom))]

mod support;

use std::path::Path;
use std::sync::{Arc, Mutex};

use ringblock_engine::core::Core;
use ringblock_engine::driver::{Flags, LocalFuture, perm};
use ringblock_engine::error::Errno;
use ringblock_engine::graph::{Graph, RootSpec};
use ringblock_engine::host::sim::{Image, Rng, Setup, World};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::{Party, Root};
use ringblock_engine::throttle::{Config, DEFAULT_WEIGHT, Group, Kind, Member, Rate};
use ringblock_engine::timer::Sleep;
use support::*;

const SIZE: u64 = 1 << 20;
const SECOND: u64 = 1_000_000_000;

fn world(seed: u64, cores: usize) -> World {
    let mut image = Image::default();
    image.set_len(SIZE);
    World::new(Setup::new(seed, cores).file("/disk", image))
}

fn limit(kind: Kind, avg: f64) -> Config {
    let mut config = Config::default();
    config.rates[kind as usize] = Rate { avg, ..Rate::default() };
    config
}

async fn root(throttle: Option<Arc<Member>>) -> Root {
    let graph = Graph::current();
    let node = match graph.lookup("n") {
        Ok(_) => "n".to_owned(),
        Err(_) => graph.add(leaf_spec(Some("n"), Path::new("/disk"), SIZE, 1)).await.expect("the node opens"),
    };
    let user = "the test".to_owned();
    let spec =
        RootSpec { node, perm: perm::CONSISTENT_READ | perm::WRITE, shared: perm::ALL, user, throttle };
    graph.attach(spec).await.expect("the root attaches")
}

/// Reads on `lanes` tasks of every core until `until`; adds what was admitted to `count`.
async fn readers(root: Root, lanes: usize, until: u64, count: Arc<Mutex<u64>>) {
    let core = Core::current();
    let mut joins = Vec::new();
    for index in (0..core.count()).flat_map(|c| std::iter::repeat_n(c, lanes)) {
        let count = count.clone();
        let call = move || -> LocalFuture<'static, ()> {
            Box::pin(async move {
                loop {
                    let permit = root.admit(false, 4096).await.expect("the root is there");
                    if Core::current().now_exact() > until {
                        return;
                    }
                    *count.lock().expect("no panic") += 1;
                    root.read_admitted(permit, 0, Buf::new(4096)).await.0.expect("a read");
                }
            })
        };
        joins.push(core.spawn_join(async move { Core::current().call(index, call).await }));
    }
    for j in joins {
        j.await.expect("ended").expect("the core runs");
    }
}

/// Goal: a group has its rate, whatever number of cores and members share it. Method: groups of 100 to 200,000 operations
/// a second over 1 to 8 cores; in ten seconds, the rate and the tenth of a second that may be ahead, to a request.
#[test]
fn rates_over_cores() {
    for (cores, avg, seconds) in [(1, 100.0, 10), (2, 1000.0, 10), (5, 20_000.0, 2), (8, 200_000.0, 1)] {
        for members in [1, 3] {
            let mut world = world(cores as u64, cores);
            let counts = world.run(move || {
                Box::pin(async move {
                    let group = Group::new("g", limit(Kind::OpsTotal, avg));
                    let (until, core) = (Core::current().now_exact() + seconds * SECOND, Core::current());
                    let mut joins = Vec::new();
                    let counts: Vec<_> = (0..members).map(|_| Arc::new(Mutex::new(0))).collect();
                    for count in &counts {
                        let root = root(Some(Member::join(&group, DEFAULT_WEIGHT))).await;
                        joins.push(core.spawn_join(readers(root, 8, until, count.clone())));
                    }
                    for j in joins {
                        j.await.expect("ended");
                    }
                    Graph::current().shutdown().await.expect("it closes");
                    counts.iter().map(|c| *c.lock().expect("no panic")).collect::<Vec<u64>>()
                })
            });
            let total: u64 = counts.iter().sum();
            let want = avg * seconds as f64 + avg / 10.0;
            let what = format!("{cores} cores, {members} members at {avg}: {counts:?}, expected {want}");
            // the last admission may lie a turn of all cores behind its time
            assert!((total as f64 - want).abs() <= 2.0 + avg * 100e-6, "{what}");
            let (low, high) = (counts.iter().min(), counts.iter().max());
            let equal = low.zip(high).is_some_and(|(l, h)| h - l <= 2 + h / 100);
            assert!(equal, "{what}");
        }
    }
}

/// Goal: shares follow the weights, and the least of them is served. Method: weights of 100, 300 and 600 on two cores.
#[test]
fn weights() {
    let mut world = world(7, 2);
    let counts = world.run(|| {
        Box::pin(async {
            let group = Group::new("g", limit(Kind::OpsRead, 1000.0));
            let (until, core) = (Core::current().now_exact() + 10 * SECOND, Core::current());
            let (mut joins, mut counts) = (Vec::new(), Vec::new());
            for weight in [100, 300, 600] {
                let (root, count) =
                    (root(Some(Member::join(&group, weight))).await, Arc::new(Mutex::new(0u64)));
                counts.push(count.clone());
                joins.push(core.spawn_join(readers(root, 16, until, count)));
            }
            for j in joins {
                j.await.expect("ended");
            }
            Graph::current().shutdown().await.expect("it closes");
            counts.iter().map(|c| *c.lock().expect("no panic")).collect::<Vec<u64>>()
        })
    });
    let total: u64 = counts.iter().sum();
    for (count, weight) in counts.iter().zip([100, 300, 600]) {
        let want = total * weight / 1000;
        assert!(count.abs_diff(want) <= want * 3 / 100, "{counts:?}");
    }
}

/// Goal: limits change under load at once, to none and back. Method: one operation a second with many waiting; then none,
/// then one again, with the clock in view.
#[test]
fn changed_under_load() {
    let mut world = world(3, 3);
    world.run(|| {
        Box::pin(async {
            let group = Group::new("g", limit(Kind::OpsTotal, 1.0));
            let root = root(Some(Member::join(&group, DEFAULT_WEIGHT))).await;
            let (core, count) = (Core::current(), Arc::new(Mutex::new(0u64)));
            let start = core.now_exact();
            let join = core.spawn_join(readers(root, 4, start + 30 * SECOND, count.clone()));
            Sleep::until(start + 10 * SECOND).await;
            let first = *count.lock().expect("no panic");
            assert!((10..=12).contains(&first), "{first}");
            group.set(limit(Kind::OpsTotal, 500.0));
            Sleep::until(start + 11 * SECOND).await;
            let second = *count.lock().expect("no panic") - first;
            assert!((545..=555).contains(&second), "{second}");
            group.set(Config::default());
            Sleep::until(start + 12 * SECOND).await;
            assert!(*count.lock().expect("no panic") > 10_000, "no limits");
            group.set(limit(Kind::OpsTotal, 1000.0));
            join.await.expect("ended");
            Graph::current().shutdown().await.expect("it closes");
        })
    });
}

/// Goal: a drain does not wait for what limits hold back, a root that goes lets its waiting requests fail at once, and
/// others on the same group go on. Method: an operation in ten seconds; resize and detach under it, timed.
#[test]
fn drains_and_detaches() {
    let mut world = world(5, 2);
    world.run(|| {
        Box::pin(async {
            let group = Group::new("g", limit(Kind::OpsTotal, 0.1));
            let member = Member::join(&group, DEFAULT_WEIGHT);
            let (a, b) = (root(Some(member.clone())).await, root(Some(member.clone())).await);
            let core = Core::current();
            let start = core.now_exact();
            let read = |root: Root| async move { root.read(0, Buf::new(512)).await.0 };
            assert_eq!(read(a).await, Ok(()), "the first is free");
            let (of_a, of_b) = (core.spawn_join(read(a)), core.spawn_join(read(b)));
            // as if a size were changed: every root is drained and goes on
            let graph = Graph::current();
            let other = root(None).await;
            graph.detach(other).await.expect("it goes");
            Sleep::ns(SECOND / 100).await;
            assert_eq!((member.stats().waiting_reads, member.stats().waiting_writes), (2, 0));
            graph.detach(a).await.expect("it goes");
            assert_eq!(of_a.await, Some(Err(Errno::ENOMEDIUM)));
            assert!(core.now_exact() < start + SECOND, "nobody waited for a limit");
            assert_eq!(of_b.await, Some(Ok(())));
            assert!(core.now_exact() >= start + 9 * SECOND, "it was charged");
            assert_eq!(member.stats().waits.map(|w| w.len()), Some(1));
            graph.shutdown().await.expect("it closes");
        })
    });
}

/// Goal: a party that leaves takes its waiting requests along, uncharged; a later one of it is refused. Method: two parties
/// on one root.
#[test]
fn parties_leave() {
    let mut world = world(6, 1);
    world.run(|| {
        Box::pin(async {
            let group = Group::new("g", limit(Kind::BpsWrite, 1000.0));
            let root = root(Some(Member::join(&group, DEFAULT_WEIGHT))).await;
            let (a, b) = (Party::new(root), Party::new(root));
            let core = Core::current();
            let start = core.now_exact();
            let write = |p: Arc<Party>| async move {
                let permit = p.admit(true, 1000).await?;
                p.root().write_admitted(permit, 0, Buf::zeroed(512), Flags::NONE).await.0
            };
            assert_eq!(write(a.clone()).await, Ok(()));
            let waiting: Vec<_> = (0..3).map(|_| core.spawn_join(write(a.clone()))).collect();
            let other = core.spawn_join(write(b.clone()));
            Sleep::ns(1000).await;
            a.leave();
            for w in waiting {
                assert_eq!(w.await, Some(Err(Errno::ESHUTDOWN)));
            }
            assert_eq!(other.await, Some(Ok(())));
            let took = core.now_exact() - start;
            assert!((9 * SECOND / 10..SECOND).contains(&took), "{took} ns: only one was charged before it");
            assert_eq!(write(a).await, Err(Errno::ESHUTDOWN));
            Graph::current().shutdown().await.expect("it closes");
        })
    });
}

/// Goal: whoever stops waiting gives the turn on. Method: requests dropped at random while they wait, first in line or not;
/// the rest is served in time.
#[test]
fn dropped_while_waiting() {
    for seed in 0..40 {
        let mut world = world(seed, 2);
        world.run(move || {
            Box::pin(async move {
                let group = Group::new("g", limit(Kind::OpsTotal, 100.0));
                let member = Member::join(&group, DEFAULT_WEIGHT);
                let (core, mut rng) = (Core::current(), Rng::new(seed));
                let start = core.now_exact();
                let mut served = Vec::new();
                for _ in 0..60 {
                    let (m, write) = (member.clone(), rng.chance(500));
                    if rng.chance(500) {
                        served.push(core.spawn_join(async move { m.admit(write, 1, 0).await }));
                        continue;
                    }
                    let patience = rng.below(SECOND / 5);
                    core.spawn(async move {
                        let mut admit = Box::pin(m.admit(write, 1, 0));
                        let mut sleep = Box::pin(Sleep::ns(patience));
                        std::future::poll_fn(|cx| {
                            let done = std::future::Future::poll(admit.as_mut(), cx).is_ready();
                            if done || std::future::Future::poll(sleep.as_mut(), cx).is_ready() {
                                return std::task::Poll::Ready(());
                            }
                            std::task::Poll::Pending
                        })
                        .await;
                    });
                }
                for s in served {
                    s.await.expect("served");
                }
                assert!(core.now_exact() - start < SECOND, "seed {seed}");
            })
        });
    }
}
