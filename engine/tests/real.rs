//! The engine on the machine's own io_uring: requests, executor, timers, inboxes, barriers, teardown.
#![cfg(not(loom))]

mod support;

use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ringblock_engine::core::Core;
use ringblock_engine::graph::Graph;
use ringblock_engine::mem::Buf;
use ringblock_engine::net::{Listener, Socket};
use ringblock_engine::ring::SendBatch;
use ringblock_engine::sync::{Event, oneshot};
use ringblock_engine::timer::Sleep;
use ringblock_engine::{Config, Engine, epoch};
use support::*;

/// A file that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(len: u64) -> Scratch {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("rb-engine-{}-{n}", std::process::id()));
        std::fs::File::create(&path).expect("create").set_len(len).expect("set_len");
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn engine(cores: usize) -> Engine {
    Engine::start(&Config { cores, pin: false, ..Config::default() }).expect("an engine")
}

fn shutdown(engine: &Engine) {
    let done = engine.run(0, || Box::pin(async { Graph::current().shutdown().await }));
    done.expect("shutdown");
}

/// Goal: what is written through a root is read back, on a plain leaf, on one that needs read-modify-write, and on an
/// image that allocates. Method: random I/O of two cores on stripes of their own that share blocks and clusters.
#[test]
fn random_io_matches_the_model() {
    for (kind, align) in [("leaf", 1), ("leaf", 4096), ("table", 1), ("table", 512)] {
        let file = Scratch::new(1 << 20);
        let engine = engine(2);
        let path = file.0.clone();
        let work = move || -> ringblock_engine::driver::LocalFuture<'static, ()> {
            Box::pin(async move {
                let size = 1 << 20;
                let root = match kind {
                    "leaf" => add_and_attach(leaf_spec(Some("n"), &path, size, align)).await,
                    _ => add_and_attach(table_spec("n", &path, size, 16384, 1, align)).await,
                };
                on_all_cores(move |index| {
                    Box::pin(async move {
                        // not aligned to anything: the two cores share blocks in the middle
                        let half = 300_001;
                        churn(root, index as u64 * half, half, 600, 7 + index as u64).await;
                    })
                })
                .await;
                let stats = root.stats().await;
                assert!(stats.get(ringblock_engine::path::OpClass::Read).ops > 100);
            })
        };
        engine.run(0, work);
        shutdown(&engine);
    }
}

/// Goal: a task's waker outlives the task without harm, and wakes the right one after its place is reused.
/// Method: keep wakers of finished tasks, fill their places with others, wake the old ones from another core.
#[test]
fn stale_wakers_touch_nobody() {
    let engine = engine(2);
    let work = || -> ringblock_engine::driver::LocalFuture<'static, ()> {
        Box::pin(async {
            let core = Core::current();
            for _ in 0..50 {
                let mut wakers = Vec::new();
                for _ in 0..20 {
                    let join = core
                        .spawn_join(std::future::poll_fn(|cx| std::task::Poll::Ready(cx.waker().clone())));
                    wakers.push(join.await.expect("it ran"));
                }
                let polls = Rc::new(Cell::new(0));
                for _ in 0..20 {
                    let polls = polls.clone();
                    core.spawn(std::future::poll_fn(move |_| {
                        polls.set(polls.get() + 1);
                        std::task::Poll::<()>::Pending
                    }));
                }
                let wake = move || -> ringblock_engine::driver::LocalFuture<'static, ()> {
                    Box::pin(async move { wakers.into_iter().for_each(std::task::Waker::wake) })
                };
                core.call(1, wake).await.expect("core 1 runs");
                Sleep::ns(100_000).await;
                assert_eq!(polls.get(), 20, "each new task was polled once, by its spawn");
            }
        })
    };
    engine.run(0, work);
}

/// Goal: wake-ups between cores are never lost, also through an inbox that overflows. Method: ping-pong over one-shots
/// from many tasks at once, more than an inbox holds.
#[test]
fn calls_between_cores_survive_a_full_inbox() {
    let engine = engine(2);
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let work = move || -> ringblock_engine::driver::LocalFuture<'static, ()> {
        Box::pin(async move {
            let core = Core::current();
            let mut joins = Vec::new();
            for i in 0..20_000usize {
                let count = counted.clone();
                joins.push(core.spawn_join(async move {
                    let call = move || -> ringblock_engine::driver::LocalFuture<'static, usize> {
                        Box::pin(async move {
                            count.fetch_add(1, Ordering::Relaxed);
                            i
                        })
                    };
                    Core::current().call(1, call).await
                }));
            }
            for (i, j) in joins.into_iter().enumerate() {
                assert_eq!(j.await, Some(Some(i)));
            }
        })
    };
    engine.run(0, work);
    assert_eq!(count.load(Ordering::Relaxed), 20_000);
    // and from a thread that is no core
    let mut last = None;
    for i in 0..10_000usize {
        last = Some(engine.spawn_on(1, move || Box::pin(async move { i })));
    }
    assert_eq!(ringblock_engine::sync::block_on(last.expect("some")), Some(9_999));
}

/// Goal: no timer fires early, and a dropped one does not fire. Method: sleeps until times counted from one moment and for
/// times counted from each one's own. (Their order is `timer::tests::order`'s: here a busy machine may let all pass at once.)
#[test]
fn timers_never_fire_early() {
    let engine = engine(1);
    let fired = engine.run(0, || {
        Box::pin(async {
            let fired = Rc::new(std::cell::Cell::new(0));
            let core = Core::current();
            let base = core.now_exact();
            let mut joins = Vec::new();
            for ms in [30u64, 10, 20, 5] {
                let fired = fired.clone();
                joins.push(core.spawn_join(async move {
                    // a turn that has lasted a while already must not shorten the sleep
                    std::thread::sleep(Duration::from_millis(2));
                    let started = Instant::now();
                    Sleep::ns(1_000_000).await;
                    assert!(started.elapsed() >= Duration::from_millis(1), "early");
                    Sleep::until(base + ms * 1_000_000).await;
                    assert!(Core::current().now_exact() >= base + ms * 1_000_000, "early");
                    fired.set(fired.get() + 1);
                }));
            }
            let polled = {
                let mut never = Box::pin(Sleep::ns(1_000_000));
                std::future::poll_fn(|cx| {
                    let _ = std::future::Future::poll(never.as_mut(), cx);
                    std::task::Poll::Ready(())
                })
                .await;
                never
            };
            drop(polled);
            for j in joins {
                j.await.expect("fired");
            }
            fired.get()
        })
    });
    assert_eq!(fired, 4);
}

/// Goal: a tick under load ends only when older I/O has, and does not starve. Method: readers on two cores publish a
/// generation while pinned; after a tick nobody may still show an older one.
#[test]
fn ticks_under_load() {
    let file = Scratch::new(1 << 20);
    let engine = engine(2);
    let path = file.0.clone();
    let work = move || -> ringblock_engine::driver::LocalFuture<'static, ()> {
        Box::pin(async move {
            let root = add_and_attach(leaf_spec(Some("n"), &path, 1 << 20, 1)).await;
            let generation = Arc::new(AtomicU64::new(0));
            let oldest: Arc<Vec<AtomicU64>> = Arc::new((0..8).map(|_| AtomicU64::new(u64::MAX)).collect());
            let stop = Arc::new(AtomicBool::new(false));
            let core = Core::current();
            let mut joins = Vec::new();
            for task in 0..8usize {
                let (g, o, s) = (generation.clone(), oldest.clone(), stop.clone());
                joins.push(core.spawn_join(async move {
                    let body = move || -> ringblock_engine::driver::LocalFuture<'static, ()> {
                        Box::pin(async move {
                            let mut rng = Rng(task as u64);
                            while !s.load(Ordering::Relaxed) {
                                {
                                    let _pin = Core::current().pin();
                                    o[task].store(g.load(Ordering::SeqCst), Ordering::SeqCst);
                                    let off = rng.below(255) * 4096;
                                    root.read(off, Buf::new(4096)).await.0.expect("read");
                                    o[task].store(u64::MAX, Ordering::SeqCst);
                                }
                                ringblock_engine::core::yield_now().await;
                            }
                        })
                    };
                    Core::current().call(task % 2, body).await
                }));
            }
            for g in 1..=300u64 {
                generation.store(g, Ordering::SeqCst);
                epoch::tick().await;
                for o in oldest.iter() {
                    let seen = o.load(Ordering::SeqCst);
                    assert!(seen >= g, "a pin of generation {seen} outlived tick {g}");
                }
            }
            stop.store(true, Ordering::Relaxed);
            for j in joins {
                j.await.expect("ended").expect("core runs");
            }
        })
    };
    engine.run(0, work);
    shutdown(&engine);
}

/// Goal: an engine stops with everything still in flight, and gives every descriptor back. Method: drop it while tasks
/// read, sleep, wait for a client and for a peer, without closing the graph; count the process' descriptors.
#[test]
fn teardown_with_operations_in_flight() {
    let file = Scratch::new(1 << 20);
    let name = file.0.file_name().expect("a name").to_owned();
    let open = || {
        let fds = std::fs::read_dir("/proc/self/fd").expect("proc");
        fds.filter_map(|e| std::fs::read_link(e.ok()?.path()).ok())
            .filter(|t| t.file_name().is_some_and(|n| n == name))
            .count()
    };
    for round in 0..10 {
        let engine = engine(2);
        let path = file.0.clone();
        let (listener, peer) = {
            let l = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
            let pair = std::os::unix::net::UnixStream::pair().expect("pair");
            (l, pair)
        };
        let (end, other) = peer;
        let watched = end.try_clone().expect("clone");
        let work = move || -> ringblock_engine::driver::LocalFuture<'static, ()> {
            Box::pin(async move {
                let root = add_and_attach(table_spec("n", &path, 1 << 20, 4096, 1, 1)).await;
                let core = Core::current();
                for i in 0..200u64 {
                    core.spawn(async move {
                        loop {
                            let call = move || -> ringblock_engine::driver::LocalFuture<'static, bool> {
                                Box::pin(async move {
                                    root.write(i * 4096, Buf::zeroed(4096), Default::default())
                                        .await
                                        .0
                                        .is_ok()
                                })
                            };
                            // once the other core has stopped, writes fail at once: going on would never yield
                            if Core::current().call((i % 2) as usize, call).await != Some(true) {
                                return;
                            }
                        }
                    });
                }
                core.spawn(async move {
                    let listener = Listener::new(listener.into());
                    let _ = listener.accept().await;
                });
                core.spawn(async move {
                    let socket = Socket::new(end.into());
                    let _ = socket.recv(Buf::new(100), 0, 100).await;
                });
                Sleep::ns(round * 300_000).await;
            })
        };
        engine.run(0, work);
        drop(engine);
        drop((other, watched));
        assert_eq!(open(), 0, "round {round}: the image is closed");
    }
}

/// Goal: a connection accepted for a future that is gone is closed, whether it arrives before or after the future goes.
/// Method: connect, drop the accept (finished and not looked at, or pending), and see the end of the stream.
#[test]
fn orphaned_accepts_close_their_connection() {
    for late in [false, true] {
        let engine = engine(1);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let (tx, rx) = oneshot::<()>();
        let (connected, wait) = oneshot::<()>();
        let done = engine.spawn_on(0, move || {
            Box::pin(async move {
                let listener = Listener::new(listener.into());
                let mut accept = Box::pin(listener.accept());
                std::future::poll_fn(|cx| {
                    let _ = std::future::Future::poll(accept.as_mut(), cx);
                    std::task::Poll::Ready(())
                })
                .await;
                if late {
                    // cancelled by now, or accepted for nobody
                    drop(accept);
                    tx.send(());
                    wait.await;
                } else {
                    tx.send(());
                    wait.await;
                    // completed in the slab, never polled
                    Sleep::ns(20_000_000).await;
                    drop(accept);
                }
                drop(listener);
            })
        });
        ringblock_engine::sync::block_on(rx);
        let client = std::net::TcpStream::connect(address).expect("connect");
        connected.send(());
        ringblock_engine::sync::block_on(done);
        client.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
        let got = std::io::Read::read(&mut &client, &mut [0u8; 1]);
        let ended = matches!(&got, Ok(0))
            || matches!(&got, Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset);
        assert!(ended, "late {late}: the peer sees the end, not {got:?} on fd {}", client.as_raw_fd());
    }
}

/// Goal: many operations that never complete do not keep others out. Method: more pending receives than the submission
/// queue holds, then ordinary I/O, then data for all of them.
#[test]
fn more_receives_than_the_submission_queue_holds() {
    let engine = engine(1);
    let pairs: Vec<_> = (0..700).map(|_| std::os::unix::net::UnixStream::pair().expect("pair")).collect();
    let (ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let got = engine.spawn_on(0, move || {
        Box::pin(async move {
            let core = Core::current();
            let joins: Vec<_> = ours
                .into_iter()
                .map(|end| {
                    core.spawn_join(async move {
                        let socket = Socket::new(end.into());
                        let (n, buf) = socket.recv(Buf::new(16), 0, 16).await;
                        let mut batch = Box::<SendBatch>::default();
                        batch.push_bytes(&buf[..n.expect("recv")]);
                        batch.push_buf(Buf::from_slice(b"!"));
                        socket.send(batch).await.0.expect("send")
                    })
                })
                .collect();
            let mut sum = 0;
            for j in joins {
                sum += j.await.expect("ended");
            }
            sum
        })
    });
    for end in &theirs {
        std::io::Write::write_all(&mut &*end, b"hello").expect("write");
    }
    for end in &theirs {
        let mut echo = [0u8; 6];
        std::io::Read::read_exact(&mut &*end, &mut echo).expect("read");
        assert_eq!(&echo, b"hello!");
    }
    assert_eq!(ringblock_engine::sync::block_on(got), Some(700 * 6));
}

/// Goal: an event wakes all who wait, and the mutex hands over in order, among tasks of one core.
#[test]
fn local_synchronisation() {
    let engine = engine(1);
    let order = engine.run(0, || {
        Box::pin(async {
            let core = Core::current();
            let (event, mutex) =
                (Rc::new(Event::default()), Rc::new(ringblock_engine::sync::Mutex::new(Vec::new())));
            let mut joins = Vec::new();
            for i in 0..10 {
                let (event, mutex) = (event.clone(), mutex.clone());
                joins.push(core.spawn_join(async move {
                    event.wait().await;
                    let mut list = mutex.lock().await;
                    Sleep::ns(50_000).await;
                    list.push(i);
                }));
            }
            ringblock_engine::core::yield_now().await;
            event.notify();
            for j in joins {
                j.await.expect("ended");
            }
            mutex.lock().await.clone()
        })
    });
    assert_eq!(order, (0..10).collect::<Vec<_>>());
}
