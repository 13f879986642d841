//! A group: limits that several members share, and the queues of those who wait for them.
//!
//! ```text
//!   admit(now) ─ allowed, nobody waits ─► charged
//!        └ else entry in the queue; the first of a queue is `armed`: its future runs a timer
//!   timer ─► serve: charge and wake as many as are allowed; the next one that is not is armed, and woken to run its timer
//! ```
//!
//! Invariants: a queue that is not empty has an armed entry, and that entry's task has been woken since it became so; an
//! entry lives until its future has seen the outcome or is dropped.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::task::Waker;

use hdrhistogram::Histogram;
use slab::Slab;
use smallvec::SmallVec;

use super::bucket::{Buckets, Config};
use super::member::{MemberStats, Outcome};
use super::queue::{LaneId, Queue};

/// Number of an entry among those that wait in a group.
pub(super) type Key = usize;

/// A request that waits.
struct Entry {
    lane: LaneId,
    write: bool,
    bytes: u64,
    /// Whose it is, so that all of one user can be let go.
    tag: u64,
    since: u64,
    outcome: Option<Outcome>,
    waker: Waker,
}

/// What the group knows of a member.
struct Seat {
    /// Limits do not apply while it is not 0.
    exempt: u32,
    /// Another member takes its place: nobody waits here any more.
    retired: bool,
    waits: Histogram<u64>,
}

/// Everything under the group's lock.
#[derive(Default)]
pub(super) struct State {
    buckets: Buckets,
    entries: Slab<Entry>,
    queues: [Queue<Key>; 2],
    /// Whose timer runs, by direction.
    armed: [Option<Key>; 2],
    seats: Slab<Seat>,
    /// Tasks to wake as soon as the lock is free: waking may ring another core's bell.
    woken: SmallVec<[Waker; 8]>,
}

/// What became of a look at the limits.
pub(super) enum Look {
    /// The request may go, or is let go.
    Done(Outcome),
    /// It waits; somebody wakes it.
    Wait(Key),
    /// It waits, and is woken at this time by its own timer.
    WaitUntil(Key, u64),
}

/// Limits that several members share.
pub struct Group {
    name: String,
    limited: [AtomicBool; 2],
    state: Mutex<State>,
}

impl Group {
    /// A group with these limits and empty buckets. Its name is for people.
    pub fn new(name: impl Into<String>, config: Config) -> Arc<Group> {
        let group = Group { name: name.into(), limited: Default::default(), state: Mutex::default() };
        group.set(config);
        Arc::new(group)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Does something under the lock, then wakes whom it concerns.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.lock();
        let result = f(&mut state);
        let woken = std::mem::take(&mut state.woken);
        drop(state);
        woken.iter().for_each(Waker::wake_by_ref);
        result
    }

    /// Replaces the limits and empties the buckets. Who waits is looked at anew.
    pub fn set(&self, config: Config) {
        self.with(|s| {
            s.buckets = Buckets::new(config);
            for write in [false, true] {
                self.limited[usize::from(write)].store(config.limits(write), Ordering::Relaxed);
                s.wake_armed(write);
            }
        });
    }

    /// The limits in force.
    pub fn config(&self) -> Config {
        self.lock().buckets.config()
    }

    /// Number of members.
    pub fn members(&self) -> usize {
        self.lock().seats.len()
    }

    /// Whether requests of this direction have to ask. Without limits this is all that a request pays.
    #[inline]
    pub(super) fn is_limited(&self, write: bool) -> bool {
        self.limited[usize::from(write)].load(Ordering::Relaxed)
    }
}

impl State {
    pub(super) fn join(&mut self, weight: u32) -> LaneId {
        let waits = Histogram::new(3).expect("a valid precision");
        let id = self.seats.insert(Seat { exempt: 0, retired: false, waits });
        self.queues.iter_mut().for_each(|q| q.open(id, weight));
        id
    }

    pub(super) fn leave(&mut self, lane: LaneId) {
        self.let_go(lane, |_| true, Outcome::Released);
        self.queues.iter_mut().for_each(|q| q.close(lane));
        self.seats.try_remove(lane);
    }

    pub(super) fn retire(&mut self, lane: LaneId) {
        if let Some(seat) = self.seats.get_mut(lane) {
            seat.retired = true;
        }
        self.let_go(lane, |_| true, Outcome::Released);
    }

    pub(super) fn set_weight(&mut self, lane: LaneId, weight: u32) {
        self.queues.iter_mut().for_each(|q| q.set_weight(lane, weight));
    }

    /// A request's first look.
    pub(super) fn arrive(
        &mut self,
        lane: LaneId,
        write: bool,
        bytes: u64,
        tag: u64,
        now: u64,
        waker: &Waker,
    ) -> Look {
        let side = usize::from(write);
        match self.seats.get(lane) {
            Some(seat) if seat.exempt > 0 => return Look::Done(Outcome::Allowed),
            Some(seat) if !seat.retired => {}
            _ => return Look::Done(Outcome::Released),
        }
        if self.queues[side].is_empty() && self.buckets.wait(now, write) == 0 {
            self.buckets.charge(write, bytes);
            return Look::Done(Outcome::Allowed);
        }
        let entry = Entry { lane, write, bytes, tag, since: now, outcome: None, waker: waker.clone() };
        let key = self.entries.insert(entry);
        self.queues[side].push(lane, key);
        self.arm(write);
        self.look(key, now, waker)
    }

    /// A waiting request looks again.
    pub(super) fn look(&mut self, key: Key, now: u64, waker: &Waker) -> Look {
        let Some(entry) = self.entries.get_mut(key) else { return Look::Done(Outcome::Released) };
        if !entry.waker.will_wake(waker) {
            entry.waker.clone_from(waker);
        }
        let write = entry.write;
        if entry.outcome.is_none() && self.armed[usize::from(write)] == Some(key) {
            let wait = self.serve(write, now);
            if self.armed[usize::from(write)] == Some(key) {
                return Look::WaitUntil(key, now + wait);
            }
        }
        match self.entries[key].outcome {
            Some(outcome) => {
                self.entries.remove(key);
                Look::Done(outcome)
            }
            None => Look::Wait(key),
        }
    }

    /// Admits whoever may go. Returns how long the next one has to wait, in ns; it is armed.
    fn serve(&mut self, write: bool, now: u64) -> u64 {
        let side = usize::from(write);
        let before = self.armed[side].take();
        while let Some(key) = self.queues[side].first() {
            let wait = self.buckets.wait(now, write);
            if wait > 0 {
                self.armed[side] = Some(key);
                if before != Some(key) {
                    self.wake(key);
                }
                return wait;
            }
            self.queues[side].serve();
            if before != Some(key) {
                self.wake(key);
            }
            let entry = &mut self.entries[key];
            entry.outcome = Some(Outcome::Allowed);
            self.buckets.charge(write, entry.bytes);
            if let Some(seat) = self.seats.get_mut(entry.lane) {
                seat.waits.saturating_record(now.saturating_sub(entry.since));
            }
        }
        0
    }

    /// Makes sure that somebody runs a timer.
    fn arm(&mut self, write: bool) {
        let side = usize::from(write);
        if self.armed[side].is_none() {
            self.armed[side] = self.queues[side].first();
            self.wake_armed(write);
        }
    }

    fn wake_armed(&mut self, write: bool) {
        if let Some(key) = self.armed[usize::from(write)] {
            self.wake(key);
        }
    }

    fn wake(&mut self, key: Key) {
        self.woken.push(self.entries[key].waker.clone());
    }

    /// A request's future is dropped.
    pub(super) fn give_up(&mut self, key: Key) {
        let Some(entry) = self.entries.try_remove(key) else { return };
        if entry.outcome.is_some() {
            return;
        }
        self.queues[usize::from(entry.write)].remove(entry.lane, key);
        self.disarm(entry.write, key);
    }

    fn disarm(&mut self, write: bool, key: Key) {
        if self.armed[usize::from(write)] == Some(key) {
            self.armed[usize::from(write)] = None;
            self.arm(write);
        }
    }

    /// Ends the wait of a member's requests, of these tags, without a charge.
    pub(super) fn let_go(&mut self, lane: LaneId, tags: impl Fn(u64) -> bool, outcome: Outcome) {
        for write in [false, true] {
            let side = usize::from(write);
            let entries = &self.entries;
            for key in self.queues[side].take(lane, |k| tags(entries[k].tag)) {
                self.entries[key].outcome = Some(outcome);
                self.wake(key);
                self.disarm(write, key);
            }
        }
    }

    /// Limits stop applying to a member, or do again.
    pub(super) fn exempt(&mut self, lane: LaneId, on: bool) {
        let Some(seat) = self.seats.get_mut(lane) else { return };
        debug_assert!(on || seat.exempt > 0, "exemptions are balanced");
        seat.exempt = if on { seat.exempt + 1 } else { seat.exempt.saturating_sub(1) };
        if on {
            self.let_go(lane, |_| true, Outcome::Allowed);
        }
    }

    pub(super) fn stats(&self, lane: LaneId) -> MemberStats {
        let waiting = |write: bool| self.queues[usize::from(write)].waiting(lane) as u64;
        let waits = self.seats.get(lane).map(|s| s.waits.clone());
        MemberStats { waiting_reads: waiting(false), waiting_writes: waiting(true), waits }
    }
}

/// The groups of an engine, by name. A group lives as long as somebody holds it.
#[derive(Default)]
pub struct Groups(Mutex<BTreeMap<String, Weak<Group>>>);

impl Groups {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Weak<Group>>> {
        let mut groups = self.0.lock().unwrap_or_else(|e| e.into_inner());
        groups.retain(|_, g| g.strong_count() > 0);
        groups
    }

    /// The group of this name, if there is one.
    pub fn find(&self, name: &str) -> Option<Arc<Group>> {
        self.lock().get(name).and_then(Weak::upgrade)
    }

    /// Adds a group. False if there is one of that name.
    pub fn add(&self, group: &Arc<Group>) -> bool {
        let mut groups = self.lock();
        if groups.get(group.name()).is_some_and(|g| g.strong_count() > 0) {
            return false;
        }
        groups.insert(group.name().to_owned(), Arc::downgrade(group));
        true
    }

    /// The group of this name; a new one without limits if there is none.
    pub fn find_or_add(&self, name: &str) -> Arc<Group> {
        let mut groups = self.lock();
        if let Some(found) = groups.get(name).and_then(Weak::upgrade) {
            return found;
        }
        let group = Group::new(name, Config::default());
        groups.insert(name.to_owned(), Arc::downgrade(&group));
        group
    }

    /// All groups.
    pub fn all(&self) -> Vec<Arc<Group>> {
        self.lock().values().filter_map(Weak::upgrade).collect()
    }
}
