//! The op slab against a backend that does what it is told, and the kernel's ring at every level of set-up.

use super::*;
use crate::engine::EngineShared;
use crate::host::{Clock, Host};
use crate::inbox::CoreShared;
use crate::pool::Pool;
use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;

/// What the scripted backend holds.
#[derive(Default)]
struct Script {
    pushed: Vec<(RawOp, u64)>,
    done: std::collections::VecDeque<Cqe>,
    cancelled: Vec<u64>,
    cancels_all: u32,
    closed: bool,
}

struct Scripted(Rc<RefCell<Script>>);

impl Backend for Scripted {
    fn push(&mut self, op: RawOp, user_data: u64) {
        self.0.borrow_mut().pushed.push((op, user_data));
    }
    fn submit(&mut self, _wait: Option<Duration>) {}
    fn reap(&mut self) -> Option<Cqe> {
        self.0.borrow_mut().done.pop_front()
    }
    fn cancel(&mut self, user_data: u64) {
        self.0.borrow_mut().cancelled.push(user_data);
    }
    fn cancel_all(&mut self) {
        // the kernel answers in its own time: only the second request finds everything finished
        let mut s = self.0.borrow_mut();
        s.cancels_all += 1;
        if s.cancels_all > 1 {
            let all = std::mem::take(&mut s.pushed);
            s.done.extend(all.iter().map(|p| Cqe { user_data: p.1, res: -libc::ECANCELED }));
        }
    }
    fn set_file(&mut self, _slot: FileSlot, _fd: i32) {}
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.0.borrow_mut().closed = true;
    }
}

fn core_with(backend: Box<dyn Backend>) -> Rc<Core> {
    let shared = Arc::new(CoreShared::new(0).expect("an eventfd"));
    let engine = Arc::new(EngineShared {
        cores: vec![shared.clone()],
        pool: Pool::inline(),
        host: Host::Linux,
        slots: Default::default(),
        listener: Default::default(),
        groups: Default::default(),
    });
    Core::new(shared, 1023, engine, backend, Clock::Real(std::time::Instant::now()))
}

fn scripted() -> (Rc<Core>, Rc<RefCell<Script>>) {
    let script = Rc::new(RefCell::new(Script::default()));
    (core_with(Box::new(Scripted(script.clone()))), script)
}

fn poll<F: Future + ?Sized>(f: &mut Pin<Box<F>>) -> Poll<F::Output> {
    f.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

fn read(len: usize) -> Pin<Box<impl Future<Output = (Result<(), Errno>, Buf)>>> {
    let segs = smallvec::smallvec![Seg { file: 0, off: 0, pos: 0, len: len as u32 }];
    Box::pin(transfer(Dir::Read, Buf::zeroed(len), segs, Some(Core::current().pin())))
}

fn pointer(op: &RawOp) -> *mut u8 {
    match *op {
        RawOp::Read { ptr, .. } | RawOp::Recv { ptr, .. } => ptr,
        _ => panic!("not a read"),
    }
}

/// Writes where the kernel would, through the pointer it was given.
fn kernel_writes(op: &RawOp, len: usize) {
    // SAFETY: the entry keeps the memory alive until its terminal completion; the address sanitizer checks just that.
    unsafe { std::ptr::write_bytes(pointer(op), 0xa5, len) };
}

/// Goal: memory handed to the kernel outlives a future that is dropped or forgotten, the pin too, and the entry is freed
/// by the terminal completion and not before. Method: write through the pointers afterwards, count slab entries.
#[test]
fn dropped_and_forgotten_futures_leave_their_memory() {
    let (core, script) = scripted();
    core.enter(|| {
        for forget in [false, true] {
            let mut future = read(8192);
            assert!(poll(&mut future).is_pending());
            match forget {
                true => std::mem::forget(future),
                false => drop(future),
            }
            let (op, data) = script.borrow_mut().pushed.pop().expect("submitted");
            kernel_writes(&op, 8192);
            assert_eq!(core.ring.borrow().in_flight(), 1);
            assert!(core.epochs.has_pins());
            // a short transfer is not the end: the rest is asked for, orphan or not
            script.borrow_mut().done.push_back(Cqe { user_data: data, res: 4096 });
            core.enter_ring(None);
            assert!(core.epochs.has_pins());
            let (rest, data) = script.borrow_mut().pushed.pop().expect("resumed");
            kernel_writes(&rest, 4096);
            script.borrow_mut().done.push_back(Cqe { user_data: data, res: 4096 });
            core.enter_ring(None);
            assert!(!core.epochs.has_pins());
            assert_eq!(core.ring.borrow().in_flight(), 0);
            assert_eq!(
                core.ring.borrow().slab.is_empty(),
                !forget,
                "a forgotten future keeps its finished entry"
            );
        }
    });
}

/// Goal: a slab key is not reused while the kernel still owes a completion for it. Method: drop one future, start another,
/// complete both in either order.
#[test]
fn keys_are_not_reused_early() {
    let (core, script) = scripted();
    core.enter(|| {
        let mut first = read(4096);
        assert!(poll(&mut first).is_pending());
        drop(first);
        let mut second = read(4096);
        assert!(poll(&mut second).is_pending());
        let (a, b) = (script.borrow().pushed[0].1, script.borrow().pushed[1].1);
        assert_ne!(a, b);
        script.borrow_mut().done.push_back(Cqe { user_data: a, res: -libc::EIO });
        core.enter_ring(None);
        assert!(poll(&mut second).is_pending(), "the orphan's error is nobody's");
        script.borrow_mut().done.push_back(Cqe { user_data: b, res: 4096 });
        core.enter_ring(None);
        assert!(matches!(poll(&mut second), Poll::Ready((Ok(()), _))));
        assert!(core.ring.borrow().slab.is_empty());
    });
}

/// Goal: transfers are resumed, EINTR and EAGAIN retried a bounded number of times, after a while with waits in between, the
/// end of a file reads as zeroes and stops a write. Method: scripted results.
#[test]
fn partial_results_are_completed() {
    let (core, script) = scripted();
    let answer = |res: i32| {
        let (op, user_data) = script.borrow_mut().pushed.pop().expect("submitted");
        script.borrow_mut().done.push_back(Cqe { user_data, res });
        core.enter_ring(None);
        op
    };
    core.enter(|| {
        let mut future = read(4096);
        assert!(poll(&mut future).is_pending());
        let op = answer(-libc::EINTR);
        kernel_writes(&op, 100);
        answer(100);
        answer(-libc::EAGAIN);
        let op = answer(0);
        assert!(matches!(op, RawOp::Read { off: 100, len: 3996, .. }));
        let Poll::Ready((Ok(()), buf)) = poll(&mut future) else { panic!("finished") };
        assert!(buf[..100].iter().all(|&b| b == 0xa5) && crate::mem::is_zero(&buf[100..]));

        let segs = smallvec::smallvec![Seg { file: 0, off: 0, pos: 0, len: 512 }];
        let mut write = Box::pin(transfer(Dir::Write { dsync: false }, Buf::zeroed(512), segs, None));
        assert!(poll(&mut write).is_pending());
        answer(0);
        assert!(matches!(poll(&mut write), Poll::Ready((Err(Errno::ENOSPC), _))));

        let mut future = read(4096);
        assert!(poll(&mut future).is_pending());
        let mut waits = 0;
        for n in 0..RETRIES {
            let began = core.now_exact();
            answer(-libc::EAGAIN);
            assert!(poll(&mut future).is_pending());
            let earliest = core.ring.borrow().earliest();
            assert_eq!(earliest.is_some(), n >= RETRIES_AT_ONCE, "retry {n}");
            assert_eq!(core.next_alarm(), earliest);
            if let Some(at) = earliest {
                assert!(at - began >= BACK_OFF_NS.0 && script.borrow().pushed.is_empty());
                waits += at - began;
                core.ring.borrow_mut().resume(at - 1);
                assert!(script.borrow().pushed.is_empty(), "not before its time");
                core.ring.borrow_mut().resume(at);
            }
        }
        assert!((500_000_000..3_000_000_000).contains(&waits), "{waits} ns in all");
        answer(-libc::EAGAIN);
        assert!(matches!(poll(&mut future), Poll::Ready((Err(Errno::EAGAIN), _))), "believed in the end");
    });
}

/// Goal: pieces do not use up each other's retries. Method: a transfer of many pieces of which each is refused once.
#[test]
fn every_piece_has_retries_of_its_own() {
    let (core, script) = scripted();
    core.enter(|| {
        let segs: Segs =
            (0..100).map(|i| Seg { file: 0, off: i * 512, pos: i as u32 * 512, len: 512 }).collect();
        let mut future = Box::pin(transfer(Dir::Read, Buf::zeroed(100 * 512), segs, None));
        assert!(poll(&mut future).is_pending());
        for res in [-libc::EAGAIN, 512] {
            let all = std::mem::take(&mut script.borrow_mut().pushed);
            assert_eq!(all.len(), 100);
            script.borrow_mut().done.extend(all.iter().map(|p| Cqe { user_data: p.1, res }));
            core.enter_ring(None);
        }
        assert!(matches!(poll(&mut future), Poll::Ready((Ok(()), _))));
    });
}

/// Goal: a ring that is shut down does not wait for what backs off. Method: an operation that is refused for ever.
#[test]
fn shutting_down_ends_what_backs_off() {
    let (core, script) = scripted();
    core.enter(|| {
        let mut future = read(512);
        assert!(poll(&mut future).is_pending());
        for _ in 0..=RETRIES_AT_ONCE {
            let (_, user_data) = script.borrow_mut().pushed.pop().expect("submitted");
            script.borrow_mut().done.push_back(Cqe { user_data, res: -libc::EAGAIN });
            core.enter_ring(None);
        }
        assert!(core.ring.borrow().earliest().is_some());
        core.ring.borrow_mut().shutdown();
        assert_eq!((core.ring.borrow().in_flight(), core.ring.borrow().earliest()), (0, None));
    });
}

/// Goal: with the slab full further operations wait, hold nothing in the kernel, and go on when an entry is freed by any of
/// the ways there are. Method: fill the slab; free one entry by completion, by dropping a finished one, by an orphan.
#[test]
fn a_full_slab_makes_others_wait() {
    struct Count(std::sync::atomic::AtomicU32);
    impl std::task::Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }
    let (core, script) = scripted();
    core.enter(|| {
        let mut all: std::collections::VecDeque<_> = (0..OPS_MAX)
            .map(|_| {
                let mut f = read(1);
                assert!(poll(&mut f).is_pending());
                f
            })
            .collect();
        for way in 0..3 {
            let count = Arc::new(Count(Default::default()));
            let waker = Waker::from(count.clone());
            let mut late = read(1);
            let pushed = script.borrow().pushed.len();
            assert!(late.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            assert_eq!(script.borrow().pushed.len(), pushed, "not submitted");
            let mut first = all.pop_front().expect("one is left");
            let user_data = script.borrow_mut().pushed.remove(0).1;
            script.borrow_mut().done.push_back(Cqe { user_data, res: 1 });
            match way {
                0 => {
                    core.enter_ring(None);
                    assert!(poll(&mut first).is_ready());
                }
                1 => {
                    core.enter_ring(None);
                    drop(first);
                }
                _ => {
                    drop(first);
                    core.enter_ring(None);
                }
            }
            assert_eq!(count.0.load(std::sync::atomic::Ordering::Relaxed), 1, "way {way} wakes who waits");
            assert!(poll(&mut late).is_pending());
            assert_eq!(script.borrow().pushed.len(), pushed, "submitted now");
            all.push_back(late);
        }
        drop(all);
        core.ring.borrow_mut().shutdown();
    });
}

/// Goal: shutdown waits for the kernel to let go of everything, whatever became of the futures, and the ring closes before
/// the slab is freed. Method: a backend that cancels only when asked twice, and says when it is closed.
#[test]
fn shutdown_drains_first() {
    let (core, script) = scripted();
    let freed = Rc::new(Cell::new(false));
    core.enter(|| {
        let mut kept = read(4096);
        assert!(poll(&mut kept).is_pending());
        let mut dropped = read(4096);
        assert!(poll(&mut dropped).is_pending());
        drop(dropped);
        let mut recv = Box::pin(recv(0, Buf::zeroed(64), 0, 64));
        assert!(poll(&mut recv).is_pending());
        drop(recv);
        assert_eq!(script.borrow().cancelled.len(), 1, "a receive may wait for ever: it is cancelled");
        core.teardown();
        assert!(script.borrow().cancels_all >= 2);
        assert_eq!(core.ring.borrow().in_flight(), 0);
        assert!(!script.borrow().closed);
        assert!(matches!(poll(&mut kept), Poll::Ready((Err(Errno::ECANCELED), _))));
        freed.set(true);
    });
    drop(core);
    assert!(freed.get() && script.borrow().closed);
}

fn turn_until<T>(core: &Rc<Core>, future: &mut Pin<Box<dyn Future<Output = T>>>) -> T {
    for _ in 0..1000 {
        if let Poll::Ready(v) = poll(future) {
            return v;
        }
        core.enter_ring(Some(Duration::from_millis(10)));
    }
    panic!("no completion");
}

/// Goal: every level of set-up that an older kernel would force carries the same operations, with more of them than the
/// queue holds. Method: force each level; write, read, flush, allocate and truncate a file.
#[test]
fn every_level_of_set_up_works() {
    for level in 0..uring::LEVELS {
        let bell = CoreShared::new(0).expect("an eventfd");
        let arena = crate::mem::Arena::new(1 << 20).expect("memory");
        let ring = Uring::at_level(level, bell.wake_fd(), Some(arena.range()))
            .expect("this kernel knows every level");
        crate::mem::set_pool(Some(arena));
        let core = core_with(Box::new(ring));
        let file = crate::host::linux::probe::memory_file(c"level", 0).expect("memfd");
        core.ring.borrow_mut().set_file(3, file.as_raw_fd());
        core.enter(|| {
            let work: Pin<Box<dyn Future<Output = ()>>> = Box::pin(async {
                plain(RawOp::Ftruncate { file: 3, len: 1 << 20 }).await.expect("truncate");
                let mut ops: Vec<_> = (0..1024u64)
                    .map(|i| {
                        let mut buf = Buf::new(512);
                        buf.fill(i as u8 | 1);
                        let segs = smallvec::smallvec![Seg { file: 3, off: i * 1024, pos: 0, len: 512 }];
                        Box::pin(transfer(Dir::Write { dsync: i % 2 == 0 }, buf, segs, None))
                    })
                    .collect();
                std::future::poll_fn(|cx| {
                    ops.retain_mut(|op| match op.as_mut().poll(cx) {
                        Poll::Ready((result, _)) => {
                            result.expect("write");
                            false
                        }
                        Poll::Pending => true,
                    });
                    if ops.is_empty() { Poll::Ready(()) } else { Poll::Pending }
                })
                .await;
                plain(RawOp::Fdatasync { file: 3 }).await.expect("flush");
                let segs = smallvec::smallvec![
                    Seg { file: 3, off: 7 * 1024, pos: 0, len: 512 },
                    Seg { file: 3, off: 9 * 1024, pos: 512, len: 512 }
                ];
                let (result, buf) = transfer(Dir::Read, Buf::new(1024), segs, None).await;
                result.expect("read");
                assert!(buf[..512].iter().all(|&b| b == 7) && buf[512..].iter().all(|&b| b == 9));
                let punch = RawOp::Fallocate { file: 3, mode: 3, off: 0, len: 8 << 10 };
                plain(punch).await.expect("punch");
            });
            turn_until(&core, &mut { work });
            core.ring.borrow_mut().set_file(3, -1);
            let gone: Pin<Box<dyn Future<Output = _>>> = Box::pin(plain(RawOp::Fdatasync { file: 3 }));
            assert_eq!(turn_until(&core, &mut { gone }), Err(Errno::EBADF), "level {level}");
            core.teardown();
        });
        drop(core);
        crate::mem::set_pool(None);
    }
}

/// Goal: a submission queue that the kernel refuses to take is kept and sent later, in order. Method: more pushes than the
/// completion queue holds without reaping, so that the ring overflows.
#[test]
fn completions_beyond_the_queue_are_not_lost() {
    let bell = CoreShared::new(0).expect("an eventfd");
    let core = core_with(Box::new(Uring::at_level(0, bell.wake_fd(), None).expect("a ring")));
    let file = crate::host::linux::probe::memory_file(c"many", 4096).expect("memfd");
    core.ring.borrow_mut().set_file(0, file.as_raw_fd());
    core.enter(|| {
        // 8192 entries of 5 pieces: more completions than the queue has places
        let mut all: Vec<_> = (0..OPS_MAX)
            .map(|_| {
                let segs: Segs = (0..5).map(|p| Seg { file: 0, off: 0, pos: p, len: 1 }).collect();
                let mut f = Box::pin(transfer(Dir::Read, Buf::zeroed(5), segs, None));
                assert!(poll(&mut f).is_pending());
                f
            })
            .collect();
        for _ in 0..10_000 {
            core.enter_ring(Some(Duration::from_millis(1)));
            all.retain_mut(|f| poll(f).is_pending());
            if all.is_empty() {
                break;
            }
        }
        assert!(all.is_empty(), "{} operations never completed", all.len());
        core.teardown();
    });
}
