//! The block-copy engine: copies one or several sources into a target, many pieces at a time.
//!
//! ```text
//!   status of the source ─► Skip (target has it by itself) │ Zero │ Data ─► pieces of `chunk` bytes
//!      a permit each (`workers`) ─► read ─► runs of zeroes ─► [its turn, if in order] ─► write ─► progress
//! ```
//!
//! Invariants: at most `workers` pieces are in flight, so memory is bounded by `workers · chunk`; the first error stops the
//! copy, and what was started is waited for; with `ordered`, writes of pieces begin in order of their offset (and overlap).

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;

use ringblock_engine::core::Core;
use ringblock_engine::driver::Flags;
use ringblock_engine::error::Errno;
use ringblock_engine::graph::NodeId;
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use ringblock_engine::sync::{Event, Semaphore};
use ringblock_engine::throttle::Member;

use crate::zeroes::runs;

/// Largest piece that zeroes are written in.
const ZEROES_MAX: u64 = 1 << 30;

/// Where data comes from.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The node.
    pub root: Root,
    /// Where to begin in it, bytes.
    pub from: u64,
    /// Where to end in it, bytes.
    pub len: u64,
    /// Where its offset 0 goes in the target.
    pub at: u64,
}

/// How to copy.
#[derive(Clone)]
pub struct Options {
    /// Pieces in flight.
    pub workers: usize,
    /// Bytes of a piece of data; a multiple of the target's cluster size.
    pub chunk: usize,
    /// Data is searched for zeroes in blocks of this size, which are not written; 0 writes everything.
    pub sparse: usize,
    /// The target reads as zeroes where nothing was written.
    pub target_is_zero: bool,
    /// What the source does not have above this node, the target has by itself (a common backing file).
    pub base: Option<NodeId>,
    /// Leaves out what no layer of the source has allocated above `base`, even without a base.
    pub skip_unallocated: bool,
    /// Target clusters are written compressed; their size in bytes.
    pub compress: Option<u64>,
    /// Writes are issued in order of their offset.
    pub ordered: bool,
    /// Bytes per second.
    pub rate: Option<Arc<Member>>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            workers: 8,
            chunk: 2 << 20,
            sparse: 4096,
            target_is_zero: false,
            base: None,
            skip_unallocated: false,
            compress: None,
            ordered: false,
            rate: None,
        }
    }
}

/// Why a copy failed: what was being done, where, and the error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// What was being done.
    pub doing: Doing,
    /// Offset in the source or target, in bytes.
    pub offset: u64,
    /// The error.
    pub errno: Errno,
}

/// Steps of a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Doing {
    /// Asking the source what it has.
    Status,
    /// Reading the source.
    Read,
    /// Writing the target.
    Write,
}

/// What a range of the source is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Data,
    Zero,
    Skip,
}

/// One copy; `done` is called with the number of bytes dealt with so far.
pub struct BlockCopy {
    target: Root,
    options: Options,
    progress: Box<dyn Fn(u64)>,
    permits: Semaphore,
    /// Pieces in flight.
    flying: Cell<usize>,
    landed: Event,
    /// Number of the piece whose turn to write it is.
    turn: Cell<u64>,
    turns: Event,
    failure: RefCell<Option<Failure>>,
    bytes: Cell<u64>,
}

impl BlockCopy {
    /// A copy into `target`, which is large enough for all sources.
    pub fn new(target: Root, options: Options, progress: Box<dyn Fn(u64)>) -> Rc<BlockCopy> {
        Rc::new(BlockCopy {
            target,
            permits: Semaphore::new(options.workers.max(1)),
            options,
            progress,
            flying: Cell::new(0),
            landed: Event::default(),
            turn: Cell::new(0),
            turns: Event::default(),
            failure: RefCell::new(None),
            bytes: Cell::new(0),
        })
    }

    /// Copies the sources one after the other. Errors: the first one that happened.
    pub async fn run(self: &Rc<BlockCopy>, sources: &[Source]) -> Result<(), Failure> {
        let mut number = 0;
        for source in sources {
            if let Err(e) = self.source(source, &mut number).await {
                self.fail(e);
            }
            if self.failure.borrow().is_some() {
                break;
            }
        }
        while self.flying.get() > 0 {
            self.landed.wait().await;
        }
        self.failure.borrow().map_or(Ok(()), Err)
    }

    fn fail(&self, failure: Failure) {
        self.failure.borrow_mut().get_or_insert(failure);
        self.turns.notify();
    }

    async fn source(self: &Rc<BlockCopy>, source: &Source, number: &mut u64) -> Result<(), Failure> {
        let mut at = source.from;
        while at < source.len && self.failure.borrow().is_none() {
            let (class, len) = self.classify(source, at).await?;
            let end = at + len;
            while at < end && self.failure.borrow().is_none() {
                let piece = self.piece(class, source.at + at, end - at);
                self.start(*source, class, at..at + piece, *number).await;
                *number += 1;
                at += piece;
            }
        }
        Ok(())
    }

    /// What the source has at `at`, and for how long.
    async fn classify(&self, source: &Source, at: u64) -> Result<(Class, u64), Failure> {
        let above = source.root.status_above(self.options.base, at..source.len, true).await;
        let above = above.map_err(|errno| Failure { doing: Doing::Status, offset: at, errno })?;
        let s = above.status;
        let class = match s {
            _ if s.zero && s.allocated => Class::Zero,
            _ if !s.allocated && !s.zero && self.options.skip_unallocated => Class::Skip,
            _ if s.zero || !s.data && !s.allocated => Class::Zero,
            _ => Class::Data,
        };
        let mut len = s.len.max(1);
        if let Some(cluster) = self.options.compress {
            // whole clusters: one that is zero only in part is data
            let to = source.at + at;
            let whole = (to + len) / cluster * cluster;
            let rest = source.len - at;
            len = if len == rest {
                len
            } else if whole > to {
                whole - to
            } else {
                return Ok((Class::Data, (cluster - to % cluster).min(rest)));
            };
        }
        Ok((class, len.min(source.len - at)))
    }

    /// Bytes of the next piece.
    fn piece(&self, class: Class, to: u64, left: u64) -> u64 {
        match (class, self.options.compress) {
            (Class::Zero | Class::Skip, _) => left.min(ZEROES_MAX),
            (Class::Data, Some(cluster)) => left.min(cluster - to % cluster),
            (Class::Data, None) => {
                let chunk = self.options.chunk as u64;
                left.min(chunk - to % chunk)
            }
        }
    }

    async fn start(self: &Rc<BlockCopy>, source: Source, class: Class, range: Range<u64>, number: u64) {
        self.permits.acquire(1).await;
        self.flying.set(self.flying.get() + 1);
        let this = self.clone();
        Core::current().spawn(async move {
            if let Err(failure) = this.copy(&source, class, range.clone(), number).await {
                this.fail(failure);
            }
            this.bytes.set(this.bytes.get() + (range.end - range.start));
            (this.progress)(this.bytes.get());
            this.flying.set(this.flying.get() - 1);
            this.permits.release(1);
            this.landed.notify();
        });
    }

    async fn copy(
        &self,
        source: &Source,
        class: Class,
        range: Range<u64>,
        number: u64,
    ) -> Result<(), Failure> {
        let len = range.end - range.start;
        let to = source.at + range.start;
        let mut data = None;
        let mut result = Ok(());
        if class == Class::Data {
            self.wait_for_rate(len).await;
            let (read, buf) = source.root.read(range.start, Buf::new(len as usize)).await;
            match read {
                Ok(()) => data = Some(buf),
                Err(errno) => result = Err(Failure { doing: Doing::Read, offset: range.start, errno }),
            }
        }
        self.wait_turn(number).await;
        let write = async {
            match (result, data) {
                (Err(e), _) => Err(e),
                _ if self.failure.borrow().is_some() => Ok(()),
                (_, Some(buf)) => self.write(to, buf).await,
                _ if class == Class::Zero => self.zero(to, len).await,
                _ => Ok(()),
            }
        };
        begun(write, || self.pass(number)).await
    }

    /// The next piece may begin to write.
    fn pass(&self, number: u64) {
        self.turn.set(self.turn.get().max(number + 1));
        if self.options.ordered {
            self.turns.notify();
        }
    }

    async fn wait_for_rate(&self, bytes: u64) {
        if let Some(member) = &self.options.rate {
            // nobody lets it go early
            member.admit(true, bytes, 0).await;
        }
    }

    async fn wait_turn(&self, number: u64) {
        while self.options.ordered && self.turn.get() < number && self.failure.borrow().is_none() {
            self.turns.wait().await;
        }
    }

    async fn zero(&self, to: u64, len: u64) -> Result<(), Failure> {
        if self.options.target_is_zero && self.options.sparse > 0 {
            return Ok(());
        }
        let flags = Flags { may_unmap: self.options.sparse > 0, ..Flags::NONE };
        if self.options.sparse > 0 {
            let done = self.target.write_zeroes(to, len, flags).await;
            return done.map_err(|errno| Failure { doing: Doing::Write, offset: to, errno });
        }
        // fully allocated: zeroes are data
        let mut at = 0;
        let mut buf = Buf::zeroed(len.min(self.options.chunk as u64) as usize);
        while at < len {
            buf.set_len((len - at).min(self.options.chunk as u64) as usize);
            let n = buf.len() as u64;
            let (done, back) = self.target.write(to + at, buf, Flags::NONE).await;
            done.map_err(|errno| Failure { doing: Doing::Write, offset: to + at, errno })?;
            buf = back;
            at += n;
        }
        Ok(())
    }

    async fn write(&self, to: u64, buf: Buf) -> Result<(), Failure> {
        let failed = |offset| move |errno| Failure { doing: Doing::Write, offset, errno };
        if self.options.compress.is_some() {
            if buf.is_zero() && self.options.sparse > 0 {
                return self.zero(to, buf.len() as u64).await;
            }
            let flags = Flags { compressed: true, ..Flags::NONE };
            return self.target.write(to, buf, flags).await.0.map_err(failed(to));
        }
        if self.options.sparse == 0 {
            return self.target.write(to, buf, Flags::NONE).await.0.map_err(failed(to));
        }
        let found = runs(&buf, to, self.options.sparse);
        if let [(_, false)] = found[..] {
            return self.target.write(to, buf, Flags::NONE).await.0.map_err(failed(to));
        }
        for (range, zero) in found {
            let at = to + range.start as u64;
            if zero {
                self.zero(at, range.len() as u64).await?;
            } else {
                let piece = Buf::from_slice(&buf[range]);
                self.target.write(at, piece, Flags::NONE).await.0.map_err(failed(at))?;
            }
        }
        Ok(())
    }
}

/// Runs a future, and calls `after` as soon as it has begun.
async fn begun<T>(future: impl Future<Output = T>, after: impl FnOnce()) -> T {
    let mut future = pin!(future);
    let mut after = Some(after);
    poll_fn(|cx| {
        let polled = future.as_mut().poll(cx);
        if let Some(after) = after.take() {
            after();
        }
        polled
    })
    .await
}
