//! Roots: where requests enter the graph (an export, a job, a tool). Admission, limits and accounting live here.
//!
//! ```text
//!   request ─► throttle (holds nothing) ─► gate: closed while the graph changes ─► path ─► accounting ─► leave gate
//! ```
//!
//! Invariants: `inflight` counts what has passed the gate on this core and nothing else; a drain is done when every core
//! counts zero behind a closed gate.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use super::party::{Party, tag};
use super::read::{read_fast, read_node};
use super::stats::{OpClass, OpStats, Snapshot};
use super::status::{Above, status_above, status_node};
use super::write::{write_fast, write_node};
use super::zero::{discard_node, flush_node, zeroes_node};
use crate::core::{Core, yield_now};
use crate::driver::{Flags, Limits, LocalFuture, Status};
use crate::error::Errno;
use crate::graph::{DetectZeroes, NodeFlags, NodeId};
use crate::mem::Buf;
use crate::sync::Event;
use crate::throttle::Outcome;

/// Number of a root in the engine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RootId(pub(crate) u32);

/// A root's state on one core.
pub(crate) struct RootLocal {
    closed: Cell<u32>,
    inflight: Cell<u32>,
    changed: Event,
    stats: RefCell<[OpStats; OpClass::COUNT]>,
    /// Where the highest write that succeeded ended.
    highest_write: Cell<u64>,
}

impl Default for RootLocal {
    fn default() -> RootLocal {
        RootLocal {
            closed: Cell::new(0),
            inflight: Cell::new(0),
            changed: Event::default(),
            stats: RefCell::default(),
            highest_write: Cell::new(0),
        }
    }
}

impl RootLocal {
    pub(crate) fn close(&self) {
        self.closed.set(self.closed.get() + 1);
    }

    pub(crate) fn open(&self) {
        debug_assert!(self.closed.get() > 0, "drains are balanced");
        self.closed.set(self.closed.get().saturating_sub(1));
        if self.closed.get() == 0 {
            self.changed.notify();
        }
    }

    pub(crate) async fn idle(&self) {
        while self.inflight.get() > 0 {
            self.changed.wait().await;
        }
    }

    async fn enter(&self) {
        while self.closed.get() > 0 {
            self.changed.wait().await;
        }
        self.inflight.set(self.inflight.get() + 1);
    }
}

/// A request that is in flight; leaving is automatic.
struct InFlight(Rc<RootLocal>);

impl Drop for InFlight {
    fn drop(&mut self) {
        let local = &self.0;
        local.inflight.set(local.inflight.get() - 1);
        if local.closed.get() > 0 && local.inflight.get() == 0 {
            local.changed.notify();
        }
    }
}

/// A handle on a root, for tasks of any core. It does not keep the root alive: whoever attached it detaches it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Root {
    id: RootId,
}

/// Leave to do one request. It is got before anything is held for the request, and used up by it.
#[must_use]
#[derive(Debug)]
pub struct Permit {
    /// When the request asked.
    started: u64,
}

/// What a request needs to know of its root, read once after the gate.
struct Entry {
    core: Rc<Core>,
    root: RootId,
    started: u64,
    node: NodeId,
    size: u64,
    writable: bool,
    flags: NodeFlags,
    /// The settings of throttle nodes that the request has passed.
    above: NodeFlags,
    gate: InFlight,
}

impl Root {
    pub(crate) fn new(id: RootId) -> Root {
        Root { id }
    }

    /// Its number.
    pub fn id(&self) -> RootId {
        self.id
    }

    /// Waits until the limits allow a request of `bytes`, a read or a change. Whoever holds something for a request (a
    /// buffer, a place to receive it) asks first and gets it then. Dropping the future gives the place in the queue up.
    ///
    /// # Errors
    /// `ENOMEDIUM` if the root is gone.
    #[inline]
    pub async fn admit(&self, write: bool, bytes: u64) -> Result<Permit, Errno> {
        self.admit_for(None, write, bytes).await
    }

    #[inline]
    pub(super) async fn admit_for(
        &self,
        party: Option<&Party>,
        write: bool,
        bytes: u64,
    ) -> Result<Permit, Errno> {
        let core = Core::current();
        let started = core.now();
        let limited = core.view.borrow().root(self.id)?.is_limited(write);
        if limited {
            self.wait_for_limits(party, write, bytes).await?;
        }
        Ok(Permit { started })
    }

    #[cold]
    fn wait_for_limits<'a>(
        &self,
        party: Option<&'a Party>,
        write: bool,
        bytes: u64,
    ) -> LocalFuture<'a, Result<(), Errno>> {
        let root = *self;
        Box::pin(async move {
            let tag = party.map_or(tag(root, 0), Party::tag);
            'anew: loop {
                let limits = Core::current().view.borrow().root(root.id)?.limits.clone();
                for member in &limits {
                    party.map_or(Ok(()), |p| p.waits_at(member))?;
                    if member.admit(write, bytes, tag).await == Outcome::Released {
                        // the party leaves, or the graph is about to change, or has changed
                        if party.is_some_and(Party::has_left) {
                            return Err(Errno::ESHUTDOWN);
                        }
                        yield_now().await;
                        continue 'anew;
                    }
                }
                return Ok(());
            }
        })
    }

    /// For what is never limited.
    fn free(&self) -> Permit {
        Permit { started: Core::current().now() }
    }

    #[inline]
    async fn enter(&self, permit: Permit) -> Result<Entry, Errno> {
        let core = Core::current();
        let local = core.root(self.id);
        local.enter().await;
        let gate = InFlight(local);
        let (node, size, writable, flags, above) = {
            let view = core.view.borrow();
            let root = view.root(self.id)?;
            let node = view.node(root.node)?;
            (root.node, node.driver.size(), root.writable, node.flags, root.above)
        };
        Ok(Entry { core, root: self.id, started: permit.started, node, size, writable, flags, above, gate })
    }

    /// Size of the node in bytes.
    pub fn size(&self) -> Result<u64, Errno> {
        let core = Core::current();
        let view = core.view.borrow();
        Ok(view.node(view.root(self.id)?.node)?.driver.size())
    }

    /// Alignments and bounds, merged down the chain.
    pub fn limits(&self) -> Result<Limits, Errno> {
        let core = Core::current();
        let view = core.view.borrow();
        Ok(view.node(view.root(self.id)?.node)?.limits)
    }

    /// The node the root is attached to now.
    pub fn node(&self) -> Result<NodeId, Errno> {
        let core = Core::current();
        let view = core.view.borrow();
        Ok(view.root(self.id)?.attached)
    }

    /// Fills the buffer from `off`. `EIO` if the range is not inside the node.
    pub async fn read(&self, off: u64, buf: Buf) -> (Result<(), Errno>, Buf) {
        match self.admit(false, buf.len() as u64).await {
            Ok(permit) => self.read_admitted(permit, off, buf).await,
            Err(e) => (Err(e), buf),
        }
    }

    /// [`Root::read`] of a request that the limits have allowed.
    pub async fn read_admitted(&self, permit: Permit, off: u64, buf: Buf) -> (Result<(), Errno>, Buf) {
        let len = buf.len() as u64;
        let entry = match self.enter(permit).await {
            Ok(e) => e,
            Err(e) => return (Err(e), buf),
        };
        if !inside(off, len, entry.size) {
            return (entry.finish(OpClass::Read, len, Err(Errno::EIO)), buf);
        }
        let (result, buf) = match read_fast(&entry.core, entry.node, off, buf).await {
            Ok(done) => done,
            Err(buf) => read_node(entry.node, off, buf).await,
        };
        (entry.finish(OpClass::Read, len, result), buf)
    }

    /// Writes the buffer at `off`. `EPERM` on a read-only root, `ENOSPC` if the range is not inside the node.
    pub async fn write(&self, off: u64, buf: Buf, flags: Flags) -> (Result<(), Errno>, Buf) {
        match self.admit(true, buf.len() as u64).await {
            Ok(permit) => self.write_admitted(permit, off, buf, flags).await,
            Err(e) => (Err(e), buf),
        }
    }

    /// [`Root::write`] of a request that the limits have allowed.
    pub async fn write_admitted(
        &self,
        permit: Permit,
        off: u64,
        buf: Buf,
        flags: Flags,
    ) -> (Result<(), Errno>, Buf) {
        let len = buf.len() as u64;
        let entry = match self.enter(permit).await {
            Ok(e) => e,
            Err(e) => return (Err(e), buf),
        };
        if let Err(e) = entry.check_write(off, len) {
            return (entry.finish(OpClass::Write, len, Err(e)), buf);
        }
        let (result, buf) = entry.write(off, buf, flags).await;
        if result.is_ok() {
            let highest = &entry.gate.0.highest_write;
            highest.set(highest.get().max(off + len));
        }
        (entry.finish(OpClass::Write, len, result), buf)
    }

    /// Makes a range read as zeroes. Errors as for [`Root::write`]; `ENOTSUP` with `no_fallback` if it would be slow.
    pub async fn write_zeroes(&self, off: u64, len: u64, flags: Flags) -> Result<(), Errno> {
        self.write_zeroes_admitted(self.admit(true, len).await?, off, len, flags).await
    }

    /// [`Root::write_zeroes`] of a request that the limits have allowed.
    pub async fn write_zeroes_admitted(
        &self,
        permit: Permit,
        off: u64,
        len: u64,
        flags: Flags,
    ) -> Result<(), Errno> {
        let entry = self.enter(permit).await?;
        let flags = Flags { may_unmap: flags.may_unmap && entry.above.discard, ..flags };
        let result = match entry.check_write(off, len) {
            Ok(()) if len > 0 => zeroes_node(entry.node, off, len, flags).await,
            other => other,
        };
        entry.finish(OpClass::Unmap, len, result)
    }

    /// Advice that a range is not needed.
    pub async fn discard(&self, off: u64, len: u64) -> Result<(), Errno> {
        self.discard_admitted(self.admit(true, len).await?, off, len).await
    }

    /// [`Root::discard`] of a request that the limits have allowed.
    pub async fn discard_admitted(&self, permit: Permit, off: u64, len: u64) -> Result<(), Errno> {
        let entry = self.enter(permit).await?;
        let result = match entry.check_write(off, len) {
            Ok(()) if !entry.above.discard => Ok(()),
            Ok(()) => discard_node(entry.node, off, len).await,
            Err(e) => Err(e),
        };
        entry.finish(OpClass::Unmap, len, result)
    }

    /// Makes durable whatever completed before. Never throttled.
    pub async fn flush(&self) -> Result<(), Errno> {
        let entry = self.enter(self.free()).await?;
        let result =
            if entry.writable && !entry.above.no_flush { flush_node(entry.node).await } else { Ok(()) };
        entry.finish(OpClass::Flush, 0, result)
    }

    /// Block status of the beginning of a range, in the node itself.
    pub async fn status(&self, range: Range<u64>, want_zero: bool) -> Result<Status, Errno> {
        let entry = self.enter(self.free()).await?;
        if range.is_empty() || range.end > entry.size {
            return Err(Errno::EINVAL);
        }
        status_node(entry.node, range, want_zero).await
    }

    /// Block status of the beginning of a range through the backing chain, down to and without `base`.
    pub async fn status_above(
        &self,
        base: Option<NodeId>,
        range: Range<u64>,
        want_zero: bool,
    ) -> Result<Above, Errno> {
        let entry = self.enter(self.free()).await?;
        if range.is_empty() || range.end > entry.size {
            return Err(Errno::EINVAL);
        }
        status_above(entry.node, base, range, want_zero).await
    }

    /// Counters and latencies of all cores together.
    pub async fn stats(&self) -> Snapshot {
        let core = Core::current();
        let (mut sum, id) = (Snapshot::default(), self.id);
        for index in 0..core.count() {
            let one = core.call(index, move || {
                Box::pin(async move {
                    let local = Core::current().root(id);
                    let stats = local.stats.borrow();
                    Snapshot::of(&stats, local.highest_write.get())
                })
            });
            if let Some(one) = one.await {
                sum.add(&one);
            }
        }
        sum
    }
}

impl Entry {
    fn check_write(&self, off: u64, len: u64) -> Result<(), Errno> {
        if !self.writable || self.flags.read_only || self.above.read_only {
            return Err(Errno::EPERM);
        }
        if inside(off, len, self.size) { Ok(()) } else { Err(Errno::ENOSPC) }
    }

    async fn write(&self, off: u64, buf: Buf, flags: Flags) -> (Result<(), Errno>, Buf) {
        let detect = self.flags.detect_zeroes.max(self.above.detect_zeroes);
        if detect != DetectZeroes::Off && !flags.compressed && !buf.is_empty() && buf.is_zero() {
            let may_unmap = detect == DetectZeroes::Unmap;
            let flags = Flags { may_unmap, ..flags };
            return (zeroes_node(self.node, off, buf.len() as u64, flags).await, buf);
        }
        if flags != Flags::NONE {
            return write_node(self.node, off, buf, flags).await;
        }
        match write_fast(&self.core, self.node, off, buf, false).await {
            Ok(done) => done,
            Err(buf) => write_node(self.node, off, buf, flags).await,
        }
    }

    fn finish(self, class: OpClass, bytes: u64, result: Result<(), Errno>) -> Result<(), Errno> {
        let ns = self.core.now().saturating_sub(self.started);
        self.gate.0.stats.borrow_mut()[class as usize].record(bytes, ns, result.is_ok());
        if let Err(errno) = result {
            self.report(class, errno);
        }
        result
    }

    #[cold]
    fn report(&self, class: OpClass, errno: Errno) {
        // A refusal is an answer and not a fault of the storage.
        if !matches!(errno, Errno::EPERM | Errno::ENOTSUP) {
            self.core.emit(crate::event::Event::IoError { root: self.root, class, errno });
        }
    }
}

fn inside(off: u64, len: u64, size: u64) -> bool {
    off.checked_add(len).is_some_and(|end| end <= size)
}
