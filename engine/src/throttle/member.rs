//! A member of a group: a device's backend or a throttle node, on whose behalf requests are admitted.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use hdrhistogram::Histogram;

use super::group::{Group, Key, Look};
use super::queue::LaneId;
use crate::core::Core;
use crate::timer::Sleep;

/// The weight of a member that names none.
pub const DEFAULT_WEIGHT: u32 = 100;
/// The largest weight.
pub const WEIGHT_MAX: u32 = 10_000;

/// How an admission ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The request may go.
    Allowed,
    /// It was let go uncharged, because its user or its member is gone or has other limits now: look anew.
    Released,
}

/// What waits, and how long requests had to.
#[derive(Clone, Debug)]
pub struct MemberStats {
    /// Reads that wait now.
    pub waiting_reads: u64,
    /// Writes, write-zeroes and discards that wait now.
    pub waiting_writes: u64,
    /// Nanoseconds that requests waited; those that did not wait are not in it.
    pub waits: Option<Histogram<u64>>,
}

/// A member; it leaves its group when it is dropped.
pub struct Member {
    group: Arc<Group>,
    lane: LaneId,
    weight: AtomicU32,
}

impl Member {
    /// Joins a group. `weight` from 1 to [`WEIGHT_MAX`] is its share beside the other members.
    pub fn join(group: &Arc<Group>, weight: u32) -> Arc<Member> {
        let lane = group.with(|s| s.join(weight));
        Arc::new(Member { group: group.clone(), lane, weight: AtomicU32::new(weight) })
    }

    /// Its group.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Its weight.
    pub fn weight(&self) -> u32 {
        self.weight.load(Ordering::Relaxed)
    }

    /// Changes its weight.
    pub fn set_weight(&self, weight: u32) {
        self.weight.store(weight, Ordering::Relaxed);
        self.group.with(|s| s.set_weight(self.lane, weight));
    }

    /// Whether requests of this direction have to ask at all.
    #[inline]
    pub fn is_limited(&self, write: bool) -> bool {
        self.group.is_limited(write)
    }

    /// Waits until the limits allow a request. Dropping the future gives its place up. `tag` says whose it is, for
    /// [`Member::release`].
    pub fn admit(self: &Arc<Self>, write: bool, bytes: u64, tag: u64) -> Admit {
        Admit { member: self.clone(), write, bytes, tag, key: None, timer: None }
    }

    /// Lets the waiting requests with these tags go.
    pub fn release(&self, tags: impl Fn(u64) -> bool) {
        self.group.with(|s| s.let_go(self.lane, tags, Outcome::Released));
    }

    /// Another member takes its place: whoever waits here, or comes here, looks anew.
    pub fn retire(&self) {
        self.group.with(|s| s.retire(self.lane));
    }

    /// From now on limits do not apply to this member (`true`), or do again. Calls nest.
    pub fn exempt(&self, on: bool) {
        self.group.with(|s| s.exempt(self.lane, on));
    }

    /// What waits now, and how long requests had to wait so far.
    pub fn stats(&self) -> MemberStats {
        self.group.with(|s| s.stats(self.lane))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.group.with(|s| s.leave(self.lane));
    }
}

/// The future of [`Member::admit`].
pub struct Admit {
    member: Arc<Member>,
    write: bool,
    bytes: u64,
    tag: u64,
    key: Option<Key>,
    timer: Option<Sleep>,
}

impl Admit {
    fn look(&mut self, now: u64, cx: &Context<'_>) -> Look {
        let (lane, waker) = (self.member.lane, cx.waker());
        self.member.group.with(|s| match self.key {
            Some(key) => s.look(key, now, waker),
            None => s.arrive(lane, self.write, self.bytes, self.tag, now, waker),
        })
    }
}

impl Future for Admit {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        loop {
            let now = Core::current().now_exact();
            match self.look(now, cx) {
                Look::Done(outcome) => {
                    self.key = None;
                    return Poll::Ready(outcome);
                }
                Look::Wait(key) => {
                    (self.key, self.timer) = (Some(key), None);
                    return Poll::Pending;
                }
                Look::WaitUntil(key, at) => {
                    let mut timer = Sleep::until(at);
                    let due = Pin::new(&mut timer).poll(cx).is_ready();
                    (self.key, self.timer) = (Some(key), Some(timer));
                    if !due {
                        return Poll::Pending;
                    }
                }
            }
        }
    }
}

impl Drop for Admit {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.member.group.with(|s| s.give_up(key));
        }
    }
}
