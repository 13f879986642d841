//! The ring of a core: operations whose memory cannot be freed under the kernel's hands.
//!
//! Every operation is an entry in a slab. The entry owns all that the kernel may touch (buffer, message headers) and the
//! epoch pin until the **terminal** completion of its last submission. The future of an operation holds only the
//! entry's key: dropping, forgetting or cancelling it orphans the entry, which is freed when the kernel is done.
//!
//! ```text
//!   future ── key ──► slab entry { payload: Buf…, left, waker, pin }      kernel ◄── RawOp (pointers into the payload)
//!     │ drop                 │ last CQE
//!     ▼                      ▼
//!   orphan: stays        done: wakes the future, or is freed if orphaned
//! ```
//!
//! Invariants
//! - An entry is removed only when `left == 0`: no submission of it is in the kernel or in the backlog.
//! - A slab key is reused only after removal, so a completion always finds the entry it belongs to.
//! - Payload memory is on the heap or in an arena: moving the slab does not move it.
//! - The ring drains before it closes ([`Ring::shutdown`]) and closes before the slab is freed (field order of [`Ring`]).
//!
//! Short transfers are resumed, EINTR and EAGAIN retried a bounded number of times with growing waits, reads past the end
//! filled with zeroes, here, so that nobody above ever sees a partial transfer.

mod op;
mod send;
#[cfg(test)]
mod tests;
mod uring;

pub(crate) use op::{FileSlot, RawOp};
pub use send::SendBatch;
pub(crate) use uring::{FILES_MAX, Uring};

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use slab::Slab;
use smallvec::SmallVec;

use crate::core::Core;
use crate::epoch::Pin as EpochPin;
use crate::error::Errno;
use crate::mem::Buf;

/// Operations in flight per core; further ones wait for a place.
pub const OPS_MAX: usize = 8192;
/// How often a piece is submitted again after EINTR or EAGAIN: so often at once, then after waits that double …
const RETRIES_AT_ONCE: u32 = 8;
/// … up to so often in all, which takes about a second; then the error is believed.
const RETRIES: u32 = 28;
/// The first wait, and the longest.
const BACK_OFF_NS: (u64, u64) = (100_000, 100_000_000);
/// Largest length of one submission; longer pieces go out in parts, as short transfers do.
const SQE_MAX: u32 = 1 << 30;

/// One piece of a transfer: `len` bytes of the buffer from `pos`, at `off` of `file`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seg {
    pub(crate) file: FileSlot,
    pub(crate) off: u64,
    pub(crate) pos: u32,
    pub(crate) len: u32,
}

/// The pieces of one transfer; four of them need no allocation.
pub(crate) type Segs = SmallVec<[Seg; 4]>;

/// Which way data goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Dir {
    Read,
    Write { dsync: bool },
}

/// What an entry owns.
pub(crate) enum Payload {
    /// A read or write of one buffer in pieces.
    Transfer { dir: Dir, buf: Buf, segs: Segs },
    /// recv into this buffer.
    Recv(Buf),
    /// sendmsg of a batch.
    Send(Box<SendBatch>),
    /// An operation without memory.
    Plain,
}

struct Entry {
    payload: Payload,
    left: u32,
    /// Of all pieces together.
    retries: u32,
    orphan: bool,
    error: Option<Errno>,
    /// Result of operations that are not transfers.
    result: u32,
    waker: Option<Waker>,
    pin: Option<EpochPin>,
    /// For `Plain`, `Recv` and `Send`: what to submit again after EINTR.
    raw: Option<RawOp>,
}

/// One completion.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cqe {
    pub(crate) user_data: u64,
    pub(crate) res: i32,
}

/// The user data of the wake-up poll; no entry has it.
pub(crate) const WAKE_TAG: u64 = u64::MAX;
/// The user data of cancellations; their own completions mean nothing.
pub(crate) const CANCEL_TAG: u64 = u64::MAX - 1;

fn user_data(key: usize, seg: usize) -> u64 {
    (key as u64) | (seg as u64) << 32
}

/// What carries out operations: the kernel's ring, or the simulator's.
pub(crate) trait Backend {
    /// Queues a submission; keeps it in a backlog of its own if the kernel's queue is full.
    fn push(&mut self, op: RawOp, user_data: u64);
    /// Hands over what is queued; with `wait`, sleeps until a completion or until that time has passed.
    fn submit(&mut self, wait: Option<Duration>);
    /// Takes the next completion.
    fn reap(&mut self) -> Option<Cqe>;
    /// Asks for the cancellation of one submission.
    fn cancel(&mut self, user_data: u64);
    /// Asks for the cancellation of everything in flight.
    fn cancel_all(&mut self);
    /// Puts a descriptor into a slot of the registered file table; -1 empties it.
    fn set_file(&mut self, slot: FileSlot, fd: i32);
}

/// A core's ring with its slab. The backend is dropped (the ring closed) before the slab.
pub(crate) struct Ring {
    backend: Box<dyn Backend>,
    slab: Slab<Entry>,
    waiting: Vec<Waker>,
    /// What backs off: when it is submitted again, and its user data. Part of the entry's operations in flight.
    later: Vec<(u64, RawOp, u64)>,
}

impl Ring {
    pub(crate) fn new(backend: Box<dyn Backend>) -> Ring {
        Ring { backend, slab: Slab::with_capacity(256), waiting: Vec::new(), later: Vec::new() }
    }

    /// When something that backs off is to be submitted again, in ns of the core's clock.
    pub(crate) fn earliest(&self) -> Option<u64> {
        self.later.iter().map(|l| l.0).min()
    }

    /// Submits again what has backed off until now.
    pub(crate) fn resume(&mut self, now: u64) {
        for (_, op, user_data) in self.later.extract_if(.., |l| l.0 <= now) {
            self.backend.push(op, user_data);
        }
    }

    /// Operations whose last completion has not arrived.
    pub(crate) fn in_flight(&self) -> usize {
        self.slab.iter().filter(|(_, e)| e.left > 0).count()
    }

    fn insert(&mut self, payload: Payload, raw: Option<RawOp>, pin: Option<EpochPin>) -> usize {
        let entry = Entry {
            payload,
            left: 0,
            retries: 0,
            orphan: false,
            error: None,
            result: 0,
            waker: None,
            pin,
            raw,
        };
        let key = self.slab.insert(entry);
        let entry = &mut self.slab[key];
        match (&entry.payload, raw) {
            (Payload::Transfer { dir, buf, segs }, _) => {
                entry.left = segs.len() as u32;
                for (i, seg) in segs.iter().enumerate() {
                    self.backend.push(transfer_op(*dir, buf, seg), user_data(key, i));
                }
            }
            (_, Some(raw)) => {
                entry.left = 1;
                self.backend.push(raw, user_data(key, 0));
            }
            (_, None) => {}
        }
        key
    }

    /// See [`Backend::set_file`].
    pub(crate) fn set_file(&mut self, slot: FileSlot, fd: i32) {
        self.backend.set_file(slot, fd);
    }

    pub(crate) fn submit(&mut self, wait: Option<Duration>) {
        self.backend.submit(wait);
    }

    /// Handles all completions at hand; wakers go to `woken`, payloads to free to `trash`, so that neither runs foreign
    /// code while the ring is borrowed. What has to wait before it is tried again does so from `now` on. Returns whether
    /// the wake-up poll fired.
    pub(crate) fn reap(&mut self, now: u64, woken: &mut Vec<Waker>, trash: &mut Vec<Payload>) -> bool {
        let mut bell = false;
        while let Some(cqe) = self.backend.reap() {
            if cqe.user_data == WAKE_TAG {
                bell = true;
                continue;
            }
            if cqe.user_data == CANCEL_TAG {
                continue;
            }
            let key = (cqe.user_data & 0xffff_ffff) as usize;
            let seg = (cqe.user_data >> 32) as usize;
            let Some(entry) = self.slab.get_mut(key) else {
                debug_assert!(false, "completion for an entry that is gone");
                continue;
            };
            if let Some(again) = complete(entry, seg, cqe.res) {
                match back_off(entry, cqe.res) {
                    0 => self.backend.push(again, cqe.user_data),
                    wait => self.later.push((now + wait, again, cqe.user_data)),
                }
                continue;
            }
            entry.left -= 1;
            if entry.left == 0 {
                // I3: the pin ends with the last completion, not when somebody looks at the result
                entry.pin = None;
                if entry.orphan {
                    entry.close_accepted();
                    trash.push(self.slab.remove(key).payload);
                    woken.append(&mut self.waiting);
                } else if let Some(waker) = entry.waker.take() {
                    woken.push(waker);
                }
            }
        }
        bell
    }

    /// Takes a finished entry apart; `None` while it is in flight.
    fn finish(&mut self, key: usize, waker: &Waker) -> Option<(Result<u32, Errno>, Payload)> {
        let entry = &mut self.slab[key];
        if entry.left > 0 {
            match &mut entry.waker {
                Some(w) => w.clone_from(waker),
                none => *none = Some(waker.clone()),
            }
            return None;
        }
        let entry = self.slab.remove(key);
        for w in self.waiting.drain(..) {
            w.wake();
        }
        Some((entry.error.map_or(Ok(entry.result), Err), entry.payload))
    }

    /// The future is gone: free the entry now, or when the kernel is done.
    fn abandon(&mut self, key: usize) -> Option<Payload> {
        let entry = &mut self.slab[key];
        if entry.left == 0 {
            let entry = self.slab.remove(key);
            entry.close_accepted();
            for w in self.waiting.drain(..) {
                w.wake();
            }
            return Some(entry.payload);
        }
        entry.orphan = true;
        entry.waker = None;
        // what waits for a peer may wait for ever: files finish by themselves
        if matches!(entry.raw, Some(RawOp::Accept { .. } | RawOp::Recv { .. })) {
            self.backend.cancel(user_data(key, 0));
        }
        None
    }

    /// Cancels everything and waits until the kernel has let go of every entry.
    pub(crate) fn shutdown(&mut self) {
        let (mut woken, mut trash) = (Vec::new(), Vec::new());
        while self.in_flight() > 0 {
            // the kernel is asked once more, and says that it is cancelled
            self.resume(u64::MAX);
            self.backend.cancel_all();
            self.backend.submit(Some(Duration::from_millis(20)));
            self.reap(0, &mut woken, &mut trash);
        }
    }
}

impl Entry {
    /// Pieces that share the retries.
    fn pieces(&self) -> u32 {
        match &self.payload {
            Payload::Transfer { segs, .. } => segs.len().max(1) as u32,
            _ => 1,
        }
    }

    /// The entry is freed with nobody to take its result: a connection that was accepted for nobody is closed.
    fn close_accepted(&self) {
        if matches!(self.raw, Some(RawOp::Accept { .. })) && self.error.is_none() {
            let fd = self.result as i32;
            // SAFETY: the kernel made this descriptor for an operation whose future is gone, so nobody else owns it.
            drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) });
        }
    }
}

fn transfer_op(dir: Dir, buf: &Buf, seg: &Seg) -> RawOp {
    let end = seg.pos as usize + seg.len as usize;
    assert!(end <= buf.capacity(), "segment ends at {end} of a buffer of {}", buf.capacity());
    let (file, off, len, fixed) = (seg.file, seg.off, seg.len.min(SQE_MAX), buf.is_registered());
    // SAFETY: `pos` is inside the buffer's capacity (asserted), so the sum stays in its allocation.
    let ptr = unsafe { buf.as_ptr().add(seg.pos as usize) };
    match dir {
        Dir::Read => RawOp::Read { file, ptr, len, off, fixed },
        Dir::Write { dsync } => RawOp::Write { file, ptr, len, off, fixed, dsync },
    }
}

/// How long a submission that was refused waits before its next try.
fn back_off(entry: &Entry, res: i32) -> u64 {
    let waits = (entry.retries / entry.pieces()).saturating_sub(RETRIES_AT_ONCE);
    match waits.checked_sub(1) {
        Some(n) if res < 0 => (BACK_OFF_NS.0 << n).min(BACK_OFF_NS.1),
        _ => 0,
    }
}

/// Books one completion. `Some` is what has to be submitted again under the same user data.
fn complete(entry: &mut Entry, index: usize, res: i32) -> Option<RawOp> {
    let res = match Errno::check(res) {
        Err(Errno::EINTR | Errno::EAGAIN) if entry.retries < RETRIES * entry.pieces() && !entry.orphan => {
            entry.retries += 1;
            return match &entry.payload {
                Payload::Transfer { dir, buf, segs } => Some(transfer_op(*dir, buf, &segs[index])),
                _ => entry.raw,
            };
        }
        Err(e) => {
            entry.error.get_or_insert(e);
            return None;
        }
        Ok(n) => n,
    };
    match &mut entry.payload {
        Payload::Transfer { dir, buf, segs } => {
            let seg = &mut segs[index];
            let n = res.min(seg.len);
            (seg.pos, seg.len, seg.off) = (seg.pos + n, seg.len - n, seg.off + u64::from(n));
            if seg.len == 0 {
                return None;
            }
            if n > 0 {
                return Some(transfer_op(*dir, buf, seg));
            }
            match dir {
                Dir::Read => {
                    // end of file: what is not there reads as zeroes
                    let (from, to) = (seg.pos as usize, (seg.pos + seg.len) as usize);
                    let len = buf.len();
                    buf.set_len(len.max(to));
                    buf[from..to].fill(0);
                    buf.set_len(len);
                }
                Dir::Write { .. } => {
                    entry.error.get_or_insert(Errno::ENOSPC);
                }
            }
            None
        }
        Payload::Send(batch) => {
            entry.result = entry.result.saturating_add(res);
            if batch.advance(res as usize)
                && res > 0
                && let Some(RawOp::SendMsg { fd, .. }) = entry.raw
            {
                return Some(RawOp::SendMsg { fd, msg: batch.msg() });
            }
            None
        }
        _ => {
            entry.result = res;
            None
        }
    }
}

enum State {
    Init(Payload, Option<RawOp>, Option<EpochPin>),
    Live(usize),
    Done,
}

/// An operation as a future. It is submitted when first polled; dropping it afterwards orphans it.
pub(crate) struct Operation {
    core: std::rc::Rc<Core>,
    state: State,
}

impl Operation {
    pub(crate) fn new(payload: Payload, raw: Option<RawOp>, pin: Option<EpochPin>) -> Operation {
        Operation { core: Core::current(), state: State::Init(payload, raw, pin) }
    }
}

impl Future for Operation {
    type Output = (Result<u32, Errno>, Payload);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut ring = this.core.ring.borrow_mut();
        if let State::Init(..) = this.state {
            if ring.slab.len() >= OPS_MAX {
                ring.waiting.push(cx.waker().clone());
                return Poll::Pending;
            }
            if let State::Init(payload, raw, pin) = std::mem::replace(&mut this.state, State::Done) {
                this.state = State::Live(ring.insert(payload, raw, pin));
            }
        }
        let State::Live(key) = this.state else { panic!("operation polled after completion") };
        match ring.finish(key, cx.waker()) {
            None => Poll::Pending,
            Some(done) => {
                this.state = State::Done;
                Poll::Ready(done)
            }
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if let State::Live(key) = self.state {
            let _payload = RefCell::borrow_mut(&self.core.ring).abandon(key);
        }
    }
}

/// Reads or writes one buffer in pieces, all in flight together.
pub(crate) async fn transfer(
    dir: Dir,
    buf: Buf,
    segs: Segs,
    pin: Option<EpochPin>,
) -> (Result<(), Errno>, Buf) {
    if segs.is_empty() {
        return (Ok(()), buf);
    }
    match Operation::new(Payload::Transfer { dir, buf, segs }, None, pin).await {
        (res, Payload::Transfer { buf, .. }) => (res.map(drop), buf),
        _ => unreachable!("a transfer entry keeps its payload"),
    }
}

/// An operation without memory of its own.
pub(crate) async fn plain(raw: RawOp) -> Result<u32, Errno> {
    Operation::new(Payload::Plain, Some(raw), None).await.0
}

/// Receives into `buf[pos..]` (up to the capacity); the number of bytes, 0 at the end of the stream.
pub(crate) async fn recv(fd: i32, buf: Buf, pos: usize, len: usize) -> (Result<usize, Errno>, Buf) {
    assert!(pos + len <= buf.capacity() && len > 0);
    // SAFETY: `pos` is inside the buffer's capacity (asserted).
    let ptr = unsafe { buf.as_ptr().add(pos) };
    let raw = RawOp::Recv { fd, ptr, len: len as u32 };
    match Operation::new(Payload::Recv(buf), Some(raw), None).await {
        (res, Payload::Recv(buf)) => (res.map(|n| n as usize), buf),
        _ => unreachable!("a receive entry keeps its payload"),
    }
}

/// Sends a whole batch; it comes back, for reuse.
pub(crate) async fn send(fd: i32, mut batch: Box<SendBatch>) -> (Result<usize, Errno>, Box<SendBatch>) {
    batch.arm();
    let raw = RawOp::SendMsg { fd, msg: batch.msg() };
    match Operation::new(Payload::Send(batch), Some(raw), None).await {
        (res, Payload::Send(batch)) => (res.map(|n| n as usize), batch),
        _ => unreachable!("a send entry keeps its payload"),
    }
}
