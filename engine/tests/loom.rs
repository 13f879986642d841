//! Models of everything that two threads of the engine share without a channel between them, run in every interleaving
//! that the memory model allows (up to the bound on preemptions).
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test -p ringblock-engine --test loom --release`.
#![cfg(loom)]

use loom::future::block_on;
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use ringblock_engine::inbox::Parking;
use ringblock_engine::serial::Serial;
use ringblock_engine::sync::{Countdown, oneshot};

/// Bounded preemptions: three find practically every bug (loom's documentation) and end in seconds.
fn model(f: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(f);
}

/// An eventfd with a ring polled on it.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    wait: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.wait.notify_one();
    }

    fn sleep(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.wait.wait(rung).unwrap();
        }
        *rung = false;
    }
}

/// A queue without a lock, as weak as the engine's: one place per sender, which it alone writes.
struct Inbox {
    places: [AtomicBool; 2],
    parking: Parking,
    bell: Bell,
}

impl Inbox {
    fn new() -> Inbox {
        let places = [AtomicBool::new(false), AtomicBool::new(false)];
        Inbox { places, parking: Parking::default(), bell: Bell::default() }
    }

    fn send(&self, sender: usize) {
        self.places[sender].store(true, Ordering::Release);
        if self.parking.must_wake() {
            self.bell.ring();
        }
    }

    /// The core's loop: takes messages, and sleeps when it has announced that and found nothing new.
    fn receive(&self) {
        let mut taken = [false; 2];
        let new = |taken: &[bool; 2]| (0..2).find(|&i| !taken[i] && self.places[i].load(Ordering::Acquire));
        while taken != [true; 2] {
            if let Some(i) = new(&taken) {
                taken[i] = true;
                continue;
            }
            self.parking.prepare();
            if new(&taken).is_none() {
                self.bell.sleep();
            }
            self.parking.unpark();
        }
    }
}

/// Goal: no wake-up is lost. Method: two senders, a core that sleeps whenever it may; a lost wake-up is a deadlock, which
/// loom reports.
#[test]
fn loom_parking_loses_no_wake_up() {
    model(|| {
        let inbox = Arc::new(Inbox::new());
        let senders: Vec<_> = (0..2)
            .map(|i| {
                let inbox = inbox.clone();
                thread::spawn(move || inbox.send(i))
            })
            .collect();
        inbox.receive();
        senders.into_iter().for_each(|s| s.join().unwrap());
    });
}

/// Goal: whoever waits for a countdown is woken by the last acknowledgement and sees everything the acknowledging threads
/// did. Method: two of them, each writes before it acknowledges.
#[test]
fn loom_countdown_ends_after_all_acknowledged() {
    model(|| {
        let done = Arc::new(Countdown::new(2));
        let work = Arc::new(AtomicUsize::new(0));
        let cores: Vec<_> = (0..2)
            .map(|_| {
                let (done, work) = (done.clone(), work.clone());
                thread::spawn(move || {
                    work.fetch_add(1, Ordering::Relaxed);
                    done.ack();
                })
            })
            .collect();
        block_on(done.wait());
        assert_eq!(work.load(Ordering::Relaxed), 2);
        cores.into_iter().for_each(|c| c.join().unwrap());
    });
}

/// Goal: a value sent is received, and a sender that is dropped ends the wait. Method: both, against a waiting receiver.
#[test]
fn loom_oneshot_delivers_or_closes() {
    for send in [true, false] {
        model(move || {
            let (tx, rx) = oneshot::<u32>();
            let thread = thread::spawn(move || {
                if send {
                    tx.send(7);
                }
            });
            assert_eq!(block_on(rx), send.then_some(7));
            thread.join().unwrap();
        });
    }
}

/// The other core of the serialisation model: an inbox of ticks, `None` once it has nothing left to do.
struct Ticks(Mutex<Option<Vec<Arc<Countdown>>>>);

impl Ticks {
    /// Between two pieces of work, with nothing pinned: acknowledges what has arrived.
    fn turn(&self) {
        let arrived = self.0.lock().unwrap().as_mut().map(std::mem::take);
        arrived.into_iter().flatten().for_each(|t| t.ack());
    }

    fn leave(&self) {
        let arrived = self.0.lock().unwrap().take();
        arrived.into_iter().flatten().for_each(|t| t.ack());
    }

    /// An epoch tick over the other core.
    fn tick(&self) {
        let done = Arc::new(Countdown::new(1));
        match self.0.lock().unwrap().as_mut() {
            Some(list) => list.push(done.clone()),
            None => return,
        }
        block_on(done.wait());
    }
}

/// Goal: a read-modify-write of a block loses nobody's write. Method: one core takes the range, ticks, reads both sectors,
/// changes its own and writes both; the other tests `active` and writes its sector at once if it may (the hot path), and
/// otherwise when the range is free. Sectors are plain loads and stores.
#[test]
fn loom_serialised_write_loses_nothing() {
    model(|| {
        let serial = std::sync::Arc::new(Serial::default());
        let ticks = Arc::new(Ticks(Mutex::new(Some(Vec::new()))));
        let sectors = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
        let other = {
            let (serial, ticks, sectors) = (serial.clone(), ticks.clone(), sectors.clone());
            thread::spawn(move || {
                ticks.turn();
                // test, pin, submit: no turn in between
                while serial.is_busy(&(1..2)) {
                    ticks.turn();
                    thread::yield_now();
                }
                sectors[1].store(1, Ordering::Relaxed);
                ticks.leave();
            })
        };
        let ticket = block_on(serial.reserve(0..2));
        ticks.tick();
        let old = sectors[1].load(Ordering::Relaxed);
        sectors[0].store(1, Ordering::Relaxed);
        sectors[1].store(old, Ordering::Relaxed);
        drop(ticket);
        other.join().unwrap();
        assert_eq!(sectors[1].load(Ordering::Relaxed), 1);
    });
}

/// Goal: overlapping ranges are held one at a time, and the next one waiting is woken. Method: two threads that each check
/// that they are alone.
#[test]
fn loom_serialised_ranges_exclude_each_other() {
    model(|| {
        let serial = std::sync::Arc::new(Serial::default());
        let inside = Arc::new(AtomicUsize::new(0));
        let body = |serial: std::sync::Arc<Serial>, inside: Arc<AtomicUsize>| {
            let ticket = block_on(serial.reserve(0..2));
            assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
            inside.fetch_sub(1, Ordering::Relaxed);
            drop(ticket);
        };
        let other = {
            let (serial, inside) = (serial.clone(), inside.clone());
            thread::spawn(move || body(serial, inside))
        };
        body(serial, inside);
        other.join().unwrap();
    });
}
