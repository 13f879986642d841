//! The simulator's kernel: one queue of operations per core, completed in a seeded order with seeded faults.
//!
//! ```text
//!   SimRing::push ─► queued ─ submit ─► flying (due at now + latency) ─ clock ─► done ─ reap, in any order ─► Ring
//!                              └ Disk::begin                           └ Disk::finish | fail, or an error, or a part
//! ```
//!
//! Invariants: an operation's data is copied at submission and lands at completion, and its memory is touched only in
//! between; every operation gets exactly one completion; all choices come from the world's generator.
//!
//! Sockets are real ones, connected to another end in the same thread: an operation that would block stays in flight.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::disk::{Change, Disk, Disks};
use super::sabotage::{Harm, Saboteur};
use super::{Faults, Rng};
use crate::error::Errno;
use crate::host::linux::{FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE};
use crate::ring::{Backend, CANCEL_TAG, Cqe, FileSlot, RawOp};

/// One operation in flight.
struct Flying {
    op: RawOp,
    user_data: u64,
    disk: Option<Arc<Disk>>,
    /// Its change in the disk's log, or the start of a flush.
    token: u64,
    harm: Option<Harm>,
    /// How often its socket was not ready.
    waits: u32,
}

/// One core's part.
#[derive(Default)]
pub(super) struct Queue {
    queued: Vec<(RawOp, u64)>,
    done: Vec<Cqe>,
    slots: BTreeMap<FileSlot, i32>,
}

/// What all cores of a world share.
pub(super) struct Kernel {
    pub(super) rng: Rng,
    pub(super) time: Arc<AtomicU64>,
    pub(super) disks: Arc<Disks>,
    pub(super) faults: Faults,
    pub(super) saboteur: Option<Arc<Saboteur>>,
    queues: Vec<Queue>,
    /// By due time, then a random number, then order of submission.
    flying: BTreeMap<(u64, u64, u64), (usize, Flying)>,
    count: u64,
    /// Everything that happened, in one number.
    trace: u64,
    pub(super) completions: u64,
}

impl Kernel {
    pub(super) fn new(rng: Rng, cores: usize, disks: Arc<Disks>, faults: Faults) -> Kernel {
        Kernel {
            rng,
            time: Arc::default(),
            disks,
            faults,
            saboteur: None,
            queues: (0..cores).map(|_| Queue::default()).collect(),
            flying: BTreeMap::new(),
            count: 0,
            trace: 0xcbf2_9ce4_8422_2325,
            completions: 0,
        }
    }

    pub(super) fn now(&self) -> u64 {
        self.time.load(Ordering::Relaxed)
    }

    /// Adds to the trace.
    pub(super) fn note(&mut self, what: u64) {
        self.trace = (self.trace ^ what).wrapping_mul(0x100_0000_01b3).rotate_left(23);
    }

    pub(super) fn trace(&self) -> u64 {
        self.trace
    }

    /// Whether the core's ring has something to hand over or to report.
    pub(super) fn is_busy(&self, core: usize) -> bool {
        let q = &self.queues[core];
        !q.queued.is_empty() || !q.done.is_empty()
    }

    /// When the next operation completes.
    pub(super) fn next_due(&self) -> Option<u64> {
        self.flying.first_key_value().map(|(k, _)| k.0)
    }

    fn submit(&mut self, core: usize) {
        for (op, user_data) in std::mem::take(&mut self.queues[core].queued) {
            let slot = match op {
                RawOp::Read { file, .. } | RawOp::Write { file, .. } => Some(file),
                RawOp::Fdatasync { file } | RawOp::Fallocate { file, .. } => Some(file),
                RawOp::Ftruncate { file, .. } => Some(file),
                _ => None,
            };
            let id = slot.and_then(|s| self.queues[core].slots.get(&s).copied());
            let disk = id.and_then(|id| self.disks.by_id(id));
            let token = disk.as_ref().map_or(0, |d| begin(&op, d));
            let harm = self.saboteur.as_ref().zip(id).and_then(|(s, id)| s.meet(&op, id));
            self.fly(core, Flying { op, user_data, disk, token, harm, waits: 0 });
        }
    }

    /// One that waits for a socket is tried again after longer and longer pauses, so that waiting for ever ends soon.
    fn fly(&mut self, core: usize, flying: Flying) {
        let stall = if let Some(Harm::Stall(ns)) = flying.harm { ns } else { 0 };
        let due = self.now() + (self.latency() << flying.waits.min(12)) + stall;
        let tie = self.rng.next();
        self.count += 1;
        self.flying.insert((due, tie, self.count), (core, flying));
    }

    fn latency(&mut self) -> u64 {
        let (low, high) = self.faults.latency_ns;
        let base = self.rng.between(low, high);
        if self.rng.chance(self.faults.stalled) { base + self.faults.stall_ns } else { base }
    }

    /// Completes what is due.
    pub(super) fn complete_due(&mut self) {
        while let Some(entry) = self.flying.first_entry() {
            if entry.key().0 > self.time.load(Ordering::Relaxed) {
                return;
            }
            let (core, mut flying) = entry.remove();
            match self.carry_out(&flying) {
                res if is_of_socket(&flying.op) && res == -libc::EAGAIN => {
                    flying.waits += 1;
                    self.fly(core, flying);
                }
                res => self.finish(core, flying.user_data, res),
            }
        }
    }

    fn finish(&mut self, core: usize, user_data: u64, res: i32) {
        let now = self.now();
        for part in [now, core as u64, user_data, res as u32 as u64] {
            self.note(part);
        }
        self.completions += 1;
        self.queues[core].done.push(Cqe { user_data, res });
    }

    fn carry_out(&mut self, f: &Flying) -> i32 {
        if is_of_socket(&f.op) {
            return self.socket(&f.op);
        }
        let Some(disk) = &f.disk else { return -libc::EBADF };
        let aligned = match f.op {
            // at the end of a file there is nothing to transfer, aligned or not
            RawOp::Read { ptr, len, off, .. } => {
                off >= disk.len() || disk.takes(ptr.cast_const(), len.into(), off)
            }
            RawOp::Write { ptr, len, off, .. } => disk.takes(ptr, len.into(), off),
            _ => true,
        };
        if !aligned {
            disk.forget(f.token);
            return -libc::EINVAL;
        }
        if let Some(Harm::Error(e)) = f.harm {
            return self.harm(f, disk, e);
        }
        if self.rng.chance(self.faults.interrupted) {
            if is_change(&f.op) {
                disk.forget(f.token);
            }
            return -self.rng.pick(&[libc::EINTR, libc::EAGAIN]);
        }
        match f.op {
            RawOp::Read { ptr, len, off, .. } => self.read(disk, ptr, cut_short(f.harm, disk, len), off),
            RawOp::Write { off, len, dsync, .. } => {
                self.write(disk, f.token, off, cut_short(f.harm, disk, len), dsync)
            }
            RawOp::Fdatasync { .. } => {
                let ok = !self.rng.chance(self.faults.flush_error);
                disk.flushed(f.token, ok);
                if ok { 0 } else { -libc::EIO }
            }
            RawOp::Fallocate { mode, .. } => {
                self.change(disk, f.token, self.faults.refused_fallocate.contains(&mode))
            }
            RawOp::Ftruncate { .. } => self.change(disk, f.token, false),
            _ => -libc::ENOSYS,
        }
    }

    /// The operation fails with this error.
    fn harm(&mut self, f: &Flying, disk: &Disk, e: Errno) -> i32 {
        match f.op {
            _ if matches!(e, Errno::EINTR | Errno::EAGAIN) => disk.forget(f.token),
            RawOp::Write { .. } => {
                let mut rng = self.rng.fork();
                disk.fail(f.token, &mut rng);
            }
            RawOp::Fdatasync { .. } => disk.flushed(f.token, false),
            _ => disk.forget(f.token),
        }
        -e.0
    }

    /// Sockets are the host's own, and the other end is in the same world; only how much goes at once is simulated.
    fn socket(&mut self, op: &RawOp) -> i32 {
        let done = match *op {
            RawOp::Recv { fd, ptr, len } => {
                let short = len > 1 && self.rng.chance(self.faults.short);
                let len = if short { 1 + self.rng.below(u64::from(len)) as u32 } else { len };
                // SAFETY: the slab entry that made this operation keeps `len` bytes at `ptr` alive until the terminal
                // completion, which has not been reported yet.
                unsafe { libc::recv(fd, ptr.cast(), len as usize, libc::MSG_DONTWAIT) }
            }
            // SAFETY: message, vectors and data live in the slab entry that made this operation, as above.
            RawOp::SendMsg { fd, msg } => unsafe {
                libc::sendmsg(fd, msg, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
            },
            _ => return -libc::ENOSYS,
        };
        if done < 0 { -Errno::of(&std::io::Error::last_os_error()).0 } else { done as i32 }
    }

    fn read(&mut self, disk: &Disk, ptr: *mut u8, len: u32, off: u64) -> i32 {
        if self.rng.chance(self.faults.read_error) {
            return -libc::EIO;
        }
        let mut data = vec![0; len as usize];
        let there = disk.read(off, &mut data);
        let n = self.part(disk, there as u64, off) as usize;
        // SAFETY: the slab entry that made this operation keeps the memory at `ptr` alive, for `len >= n` bytes, until the
        // terminal completion, which has not been reported yet.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), ptr, n) };
        n as i32
    }

    /// How much of a transfer is done in one go: all of it, or up to a boundary of sectors, or of the disk's blocks, inside.
    fn part(&mut self, disk: &Disk, len: u64, off: u64) -> u64 {
        let unit = super::disk::SECTOR.max(disk.limits().request_align.into());
        let first = unit - off % unit;
        if len <= first || !self.rng.chance(self.faults.short) {
            return len;
        }
        let units = (len - first).div_ceil(unit);
        first + self.rng.below(units) * unit
    }

    fn write(&mut self, disk: &Disk, token: u64, off: u64, len: u32, dsync: bool) -> i32 {
        let full = self.faults.capacity.is_some_and(|c| {
            let grows = off + u64::from(len) > disk.len();
            grows && disk.allocated() + u64::from(len) > c
        });
        if full || self.rng.chance(self.faults.no_space) {
            disk.forget(token);
            return -libc::ENOSPC;
        }
        if self.rng.chance(self.faults.write_error) {
            let mut rng = self.rng.fork();
            disk.fail(token, &mut rng);
            return -libc::EIO;
        }
        let n = self.part(disk, u64::from(len), off);
        disk.finish(token, n, dsync);
        n as i32
    }

    fn change(&mut self, disk: &Disk, token: u64, refused: bool) -> i32 {
        if refused || token == 0 {
            disk.forget(token);
            return -libc::ENOTSUP;
        }
        if self.rng.chance(self.faults.write_error) {
            disk.forget(token);
            return -libc::EIO;
        }
        disk.finish(token, 0, false);
        0
    }

    fn cancel_all(&mut self, core: usize) {
        for (_, user_data) in std::mem::take(&mut self.queues[core].queued) {
            self.finish(core, user_data, -libc::ECANCELED);
        }
        let mine: Vec<_> = self.flying.iter().filter(|(_, f)| f.0 == core).map(|(k, _)| *k).collect();
        for key in mine {
            if let Some((core, f)) = self.flying.remove(&key) {
                self.finish(core, f.user_data, -libc::ECANCELED);
            }
        }
    }
}

/// The length of a transfer that ends in the middle of its sectors, or of the disk's blocks, where it is long enough.
fn cut_short(harm: Option<Harm>, disk: &Disk, len: u32) -> u32 {
    let unit = disk.limits().request_align.max(super::disk::SECTOR as u32);
    match harm {
        Some(Harm::Short) if len > unit => (len / 2).next_multiple_of(unit).min(len - unit),
        _ => len,
    }
}

fn is_of_socket(op: &RawOp) -> bool {
    matches!(op, RawOp::Recv { .. } | RawOp::SendMsg { .. })
}

fn is_change(op: &RawOp) -> bool {
    matches!(op, RawOp::Write { .. } | RawOp::Fallocate { .. } | RawOp::Ftruncate { .. })
}

/// Books an operation with its disk. 0 is an operation that the disk does not know.
fn begin(op: &RawOp, disk: &Disk) -> u64 {
    match *op {
        RawOp::Write { ptr, len, off, .. } => {
            // SAFETY: the slab entry that made this operation keeps `len` initialised bytes at `ptr` alive until the terminal
            // completion, and nobody writes to them meanwhile.
            let data = unsafe { std::slice::from_raw_parts(ptr, len as usize) }.to_vec();
            disk.begin(Change::Data(off, data))
        }
        RawOp::Fallocate { mode, off, len, .. } => {
            fallocate(mode, off, len, disk.len()).map_or(0, |c| disk.begin(c))
        }
        RawOp::Ftruncate { len, .. } => disk.begin(Change::Len(len)),
        RawOp::Fdatasync { .. } => disk.flush(),
        _ => 0,
    }
}

/// What fallocate(2) does in this mode; `None` for modes that are not simulated.
fn fallocate(mode: i32, off: u64, len: u64, size: u64) -> Option<Change> {
    let end = off.checked_add(len)?;
    let within = off..end.min(size).max(off);
    match mode {
        0 if end > size => Some(Change::Zero(size..end, true)),
        m if m == 0 || m == FALLOC_KEEP_SIZE => Some(Change::Zero(0..0, false)),
        m if m == FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE => Some(Change::Zero(within, true)),
        m if m == FALLOC_ZERO_RANGE => Some(Change::Zero(off..end, false)),
        m if m == FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE => Some(Change::Zero(within, false)),
        _ => None,
    }
}

/// A core's ring in the simulator.
pub(super) struct SimRing {
    pub(super) kernel: Rc<RefCell<Kernel>>,
    pub(super) core: usize,
}

impl Backend for SimRing {
    fn push(&mut self, op: RawOp, user_data: u64) {
        self.kernel.borrow_mut().queues[self.core].queued.push((op, user_data));
    }

    fn submit(&mut self, _wait: Option<Duration>) {
        self.kernel.borrow_mut().submit(self.core);
    }

    fn reap(&mut self) -> Option<Cqe> {
        let mut k = self.kernel.borrow_mut();
        let n = k.queues[self.core].done.len();
        if n == 0 {
            return None;
        }
        let at = k.rng.index(n);
        Some(k.queues[self.core].done.swap_remove(at))
    }

    fn cancel(&mut self, _user_data: u64) {
        // files finish by themselves; the answer means nothing
        let mut k = self.kernel.borrow_mut();
        k.queues[self.core].done.push(Cqe { user_data: CANCEL_TAG, res: -Errno::ENOENT.0 });
    }

    fn cancel_all(&mut self) {
        self.kernel.borrow_mut().cancel_all(self.core);
    }

    fn set_file(&mut self, slot: FileSlot, fd: i32) {
        let slots = &mut self.kernel.borrow_mut().queues[self.core].slots;
        if fd < 0 {
            slots.remove(&slot)
        } else {
            slots.insert(slot, fd)
        };
    }
}
