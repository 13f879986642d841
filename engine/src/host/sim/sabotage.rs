//! Targeted faults: the n-th operation of a run fails thus, once, or from then on until healed.
//!
//! ```text
//!   a run without a trap ─► log: number, kind, file, place, phase ─► one of them is chosen ─► Trap
//!   the same run again ─ the operation with that number ─► harm; lasting: all of its kind on its file, until heal()
//! ```
//!
//! Invariants: operations are counted when they are submitted, so up to the trap's first effect the number of an operation
//! depends on the seed alone; a world without a saboteur pays nothing.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::error::Errno;
use crate::ring::RawOp;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OpKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Makes writes durable.
    Fdatasync,
    /// Allocates, zeroes, punches.
    Fallocate,
    /// Changes the length.
    Ftruncate,
}

impl OpKind {
    pub(super) fn of(op: &RawOp) -> Option<OpKind> {
        match op {
            RawOp::Read { .. } => Some(OpKind::Read),
            RawOp::Write { .. } => Some(OpKind::Write),
            RawOp::Fdatasync { .. } => Some(OpKind::Fdatasync),
            RawOp::Fallocate { .. } => Some(OpKind::Fallocate),
            RawOp::Ftruncate { .. } => Some(OpKind::Ftruncate),
            _ => None,
        }
    }
}

/// What happens to an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// It fails. `EINTR` and `EAGAIN` are without any effect; of data written each sector is old or new (D5); a failed
    /// flush makes nothing durable, for ever (D4).
    Error(Errno),
    /// A transfer ends in the middle.
    Short,
    /// It takes this much longer, in ns.
    Stall(u64),
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// The number of the operation, from 0.
    pub at: u64,
    /// What happens.
    pub harm: Harm,
    /// It happens to all later operations of the same kind on the same file too, until healed.
    pub lasting: bool,
}

/// An operation that was submitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submitted {
    /// What it does.
    pub kind: OpKind,
    /// The number of the file.
    pub disk: i32,
    /// Where; 0 for a flush.
    pub off: u64,
    /// How many bytes; 0 for a flush.
    pub len: u64,
}

#[derive(Debug, Default)]
struct State {
    trap: Option<Trap>,
    /// What a lasting trap has caught.
    caught: Option<(OpKind, i32)>,
    healed: bool,
    count: u64,
    hits: u64,
    log: Option<Vec<Submitted>>,
}

/// Counts operations, and harms those it was told to.
#[derive(Debug, Default)]
pub struct Saboteur(Mutex<State>);

impl Saboteur {
    /// One that harms nothing and writes down what is submitted.
    pub fn watching() -> Arc<Saboteur> {
        Arc::new(Saboteur(Mutex::new(State { log: Some(Vec::new()), ..State::default() })))
    }

    /// One with a trap.
    pub fn with(trap: Trap) -> Arc<Saboteur> {
        Arc::new(Saboteur(Mutex::new(State { trap: Some(trap), ..State::default() })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What was submitted since the last call.
    pub fn take_log(&self) -> Vec<Submitted> {
        self.lock().log.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Operations harmed so far.
    pub fn hits(&self) -> u64 {
        self.lock().hits
    }

    /// Nothing is harmed any more.
    pub fn heal(&self) {
        self.lock().healed = true;
    }

    /// Whether something may be harmed yet.
    pub fn is_armed(&self) -> bool {
        let s = self.lock();
        s.trap.is_some_and(|t| !s.healed && (t.lasting || s.hits == 0))
    }

    /// An operation is submitted: what happens to it.
    pub(super) fn meet(&self, op: &RawOp, disk: i32) -> Option<Harm> {
        let kind = OpKind::of(op)?;
        let mut s = self.lock();
        let number = s.count;
        s.count += 1;
        if let Some(log) = &mut s.log {
            let (off, len) = place(op);
            log.push(Submitted { kind, disk, off, len });
        }
        let trap = s.trap.filter(|_| !s.healed)?;
        if number == trap.at && trap.lasting {
            s.caught = Some((kind, disk));
        }
        let hit = number == trap.at || s.caught == Some((kind, disk));
        s.hits += u64::from(hit);
        hit.then_some(trap.harm)
    }
}

fn place(op: &RawOp) -> (u64, u64) {
    match *op {
        RawOp::Read { off, len, .. } | RawOp::Write { off, len, .. } => (off, len.into()),
        RawOp::Fallocate { off, len, .. } => (off, len),
        RawOp::Ftruncate { len, .. } => (len, 0),
        _ => (0, 0),
    }
}
