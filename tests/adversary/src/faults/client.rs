//! One client under faults: what it asks for, which errors it may be told, and what it reads.
//!
//! Invariants: an error is accepted only while a fault is in force (or struck meanwhile), and only the fault's own; a fault
//! that the engine has to hide is never an error; everything read is what the oracle allows.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use ringblock_crash::Tape;
use ringblock_engine::core::Core;
use ringblock_engine::driver::Flags;
use ringblock_engine::error::Errno;
use ringblock_engine::host::sim::{Harm, Rng, SECTOR, Saboteur, lock};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;

/// The fault of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    /// What happens.
    pub(super) harm: Harm,
    /// From then on, until healed.
    pub(super) lasting: bool,
    /// It strikes flushes of a file.
    pub(super) flushes: bool,
}

impl Fault {
    /// The error that requests may report.
    pub(super) fn told(&self) -> Option<Errno> {
        match self.harm {
            Harm::Error(e @ (Errno::EINTR | Errno::EAGAIN)) => Some(e).filter(|_| self.lasting),
            Harm::Error(e) => Some(e),
            Harm::Short | Harm::Stall(_) => None,
        }
    }
}

/// How requests ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Requests and operations.
    pub(super) requests: u64,
    /// Of these, failed with the fault's error.
    pub(super) failed: u64,
    /// Flushes that failed.
    pub(super) flushes_failed: u64,
}

/// Longest time that one request or operation may take, in virtual ns, for each operation that was stalled or backs off.
const PATIENCE_NS: u64 = 40_000_000_000;

/// What all clients of a run share.
pub(super) struct Shared {
    /// Where guests' requests are written down.
    pub(super) tape: Tape,
    /// Who harms operations.
    pub(super) saboteur: Arc<Saboteur>,
    /// The fault; none while a run is only watched.
    pub(super) fault: Option<Fault>,
    /// Requests so far.
    pub(super) counts: Cell<Counts>,
    /// A flush of a file has failed since the image was opened: until it is opened again no flush may succeed.
    pub(super) poisoned: Cell<bool>,
    /// The image was closed with an error: what was not flushed may be gone.
    pub(super) shaken: Cell<bool>,
    /// Errors in words, the last few.
    pub(super) said: RefCell<Vec<String>>,
}

/// A moment at which something was asked for.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    hits: u64,
    armed: bool,
    at: u64,
    poisoned: bool,
}

impl Shared {
    /// Something is asked for.
    pub(super) fn ask(&self) -> Asked {
        Asked {
            hits: self.saboteur.hits(),
            armed: self.saboteur.is_armed() && self.saboteur.hits() > 0,
            at: Core::current().now_exact(),
            poisoned: self.poisoned.get(),
        }
    }

    /// Its answer: whether it succeeded. Panics if it may not end so.
    pub(super) fn answer(&self, what: &str, asked: Asked, result: Result<(), Errno>) -> bool {
        let mut c = self.counts.get();
        c.requests += 1;
        let hits = self.saboteur.hits();
        let struck = hits > asked.hits;
        if struck && self.fault.is_some_and(|f| f.flushes && f.told().is_some()) {
            self.poisoned.set(true);
        }
        let took = Core::current().now_exact() - asked.at;
        assert!(took <= PATIENCE_NS * (1 + hits - asked.hits), "HANG: {what} took {} ms", took / 1_000_000);
        let Err(e) = result else {
            self.counts.set(c);
            return true;
        };
        let excused = struck || asked.armed || asked.poisoned || self.poisoned.get();
        let told = self.fault.and_then(|f| f.told());
        assert!(
            excused && told == Some(e),
            "ERROR: {what} failed with {e:?}; the fault says {told:?}, struck {struck}"
        );
        c.failed += 1;
        c.flushes_failed += u64::from(what == "flush");
        self.counts.set(c);
        self.said.borrow_mut().push(format!("{what}: {e}"));
        false
    }
}

/// A client of one root.
#[derive(Clone)]
pub(super) struct Client {
    /// Its root.
    pub(super) root: Root,
    /// What it shares with others.
    pub(super) shared: Rc<Shared>,
}

fn bytes(range: &Range<usize>) -> (u64, u64) {
    (range.start as u64 * SECTOR, range.len() as u64 * SECTOR)
}

impl Client {
    /// Reads sectors and looks at them.
    pub(super) async fn read(&self, range: Range<usize>) {
        let (off, len) = bytes(&range);
        let asked = self.shared.ask();
        let (result, buf) = self.root.read(off, Buf::new(len as usize)).await;
        if self.shared.answer("read", asked, result) {
            let oracle = lock(&self.shared.tape.oracle);
            let checked = match self.shared.shaken.get() {
                true => oracle.check_crash(range.start, &buf),
                false => oracle.check_read(range.start, &buf),
            };
            checked.unwrap_or_else(|e| panic!("CORRUPT: read: {e}"));
        }
    }

    /// Writes sectors.
    pub(super) async fn write(&self, range: Range<usize>, fua: bool) {
        let (off, len) = bytes(&range);
        let mut buf = Buf::new(len as usize);
        let stamp = lock(&self.shared.tape.oracle).write(range.start, &mut buf);
        let flags = Flags { fua, ..Flags::NONE };
        let asked = self.shared.ask();
        let (result, _) = self.root.write(off, buf, flags).await;
        let ok = self.shared.answer("write", asked, result);
        assert!(!(ok && fua && asked.poisoned), "FALSE FLUSH: a durable write after a failed flush");
        let mut oracle = lock(&self.shared.tape.oracle);
        if fua { oracle.wrote_through(range, stamp, ok) } else { oracle.wrote(range, stamp, ok) }
    }

    /// Writes a cluster compressed; where plain data is, that may be refused.
    pub(super) async fn compressed(&self, range: Range<usize>) {
        let (off, len) = bytes(&range);
        let mut buf = Buf::new(len as usize);
        let stamp = lock(&self.shared.tape.oracle).write(range.start, &mut buf);
        let flags = Flags { compressed: true, ..Flags::NONE };
        let asked = self.shared.ask();
        let (result, _) = self.root.write(off, buf, flags).await;
        let excused = asked.armed || asked.poisoned || self.shared.saboteur.hits() > asked.hits;
        let told = excused && self.shared.fault.and_then(|f| f.told()) == Some(Errno::EIO);
        let refused = result == Err(Errno::EIO) && !told;
        let ok = !refused && self.shared.answer("compressed write", asked, result);
        lock(&self.shared.tape.oracle).wrote(range, stamp, ok);
    }

    /// Writes zeroes.
    pub(super) async fn zeroes(&self, range: Range<usize>, may_unmap: bool) {
        let (off, len) = bytes(&range);
        let stamp = lock(&self.shared.tape.oracle).zero(range.clone());
        let asked = self.shared.ask();
        let result = self.root.write_zeroes(off, len, Flags { may_unmap, ..Flags::NONE }).await;
        let ok = self.shared.answer("write zeroes", asked, result);
        lock(&self.shared.tape.oracle).wrote(range, stamp, ok);
    }

    /// Discards, which is advice.
    pub(super) async fn discard(&self, range: Range<usize>) {
        let (off, len) = bytes(&range);
        let stamp = lock(&self.shared.tape.oracle).zero(range.clone());
        let asked = self.shared.ask();
        let result = self.root.discard(off, len).await;
        self.shared.answer("discard", asked, result);
        lock(&self.shared.tape.oracle).wrote(range, stamp, false);
    }

    /// Flushes.
    pub(super) async fn flush(&self) -> bool {
        let flush = lock(&self.shared.tape.oracle).flush();
        let asked = self.shared.ask();
        let result = self.root.flush().await;
        let ok = self.shared.answer("flush", asked, result);
        assert!(!(ok && asked.poisoned), "FALSE FLUSH: a flush after a failed flush");
        if ok {
            lock(&self.shared.tape.oracle).flushed(flush);
        }
        ok
    }

    /// Some requests to sectors of its own, and sometimes to those of everybody.
    pub(super) async fn some(&self, own: Range<usize>, requests: u64, mut rng: Rng) {
        for _ in 0..requests {
            let first = own.start + rng.index(own.len());
            let range = first..first + 1 + rng.index(own.end - first);
            match rng.below(8) {
                0 | 1 => self.read(range).await,
                2..=4 => self.write(range, rng.chance(100)).await,
                5 => self.zeroes(range, rng.chance(500)).await,
                6 => self.discard(range).await,
                _ => drop(self.flush().await),
            }
        }
    }
}
