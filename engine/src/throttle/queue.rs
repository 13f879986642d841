//! Who waits in one direction of a group, and who is next: members in turn, by weight; a member's requests in order.
//!
//! ```text
//!   lanes: [ A: r1 r4 r5 ] time 3        next = the waiting lane with the least time, longest not served among equals
//!          [ B: r2 ]       time 2  ◄──   served: time += SCALE / weight
//!          [ C: ]          idle          a lane that was idle enters at the time of the lane served last
//! ```
//!
//! Invariants: `ready` has exactly the lanes that wait; with equal weights it is a round robin; a lane gains nothing by
//! having been idle.

use std::collections::{BTreeSet, VecDeque};

/// The time that a member of weight 1 pays for a request.
const SCALE: u64 = 1 << 20;

/// The number of a lane; a member has the same one in both directions.
pub(super) type LaneId = usize;

#[derive(Default)]
struct Lane<T> {
    step: u64,
    time: u64,
    served: u64,
    waiting: VecDeque<T>,
}

/// The requests that wait in one direction.
pub(super) struct Queue<T> {
    lanes: Vec<Option<Lane<T>>>,
    /// (time, last served, lane) of every lane that waits.
    ready: BTreeSet<(u64, u64, LaneId)>,
    time: u64,
    count: u64,
}

impl<T> Default for Queue<T> {
    fn default() -> Queue<T> {
        Queue { lanes: Vec::new(), ready: BTreeSet::new(), time: 0, count: 0 }
    }
}

impl<T: Copy + PartialEq> Queue<T> {
    /// Adds an empty lane.
    pub(super) fn open(&mut self, id: LaneId, weight: u32) {
        if self.lanes.len() <= id {
            self.lanes.resize_with(id + 1, || None);
        }
        let step = (SCALE / u64::from(weight.max(1))).max(1);
        self.lanes[id] = Some(Lane { step, time: self.time, served: 0, waiting: VecDeque::new() });
    }

    /// Changes what a lane pays from now on.
    pub(super) fn set_weight(&mut self, id: LaneId, weight: u32) {
        if let Some(lane) = self.lane(id) {
            lane.step = (SCALE / u64::from(weight.max(1))).max(1);
        }
    }

    /// Removes a lane; nobody waits there.
    pub(super) fn close(&mut self, id: LaneId) {
        debug_assert_eq!(self.waiting(id), 0, "its requests are gone first");
        if let Some(place) = self.lanes.get_mut(id) {
            *place = None;
        }
    }

    fn lane(&mut self, id: LaneId) -> Option<&mut Lane<T>> {
        self.lanes.get_mut(id)?.as_mut()
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }

    /// Requests of a lane that wait.
    pub(super) fn waiting(&self, id: LaneId) -> usize {
        self.lanes.get(id).and_then(Option::as_ref).map_or(0, |l| l.waiting.len())
    }

    /// Puts a request at the end of its lane.
    pub(super) fn push(&mut self, id: LaneId, request: T) {
        let now = self.time;
        let Some(lane) = self.lane(id) else { return };
        lane.waiting.push_back(request);
        if lane.waiting.len() == 1 {
            lane.time = lane.time.max(now);
            let key = (lane.time, lane.served, id);
            self.ready.insert(key);
        }
    }

    /// Who is next.
    pub(super) fn first(&self) -> Option<T> {
        let (_, _, id) = self.ready.first()?;
        self.lanes.get(*id)?.as_ref()?.waiting.front().copied()
    }

    /// Takes who is next out, as served.
    pub(super) fn serve(&mut self) -> Option<T> {
        let (time, _, id) = self.ready.pop_first()?;
        self.time = time;
        self.count += 1;
        let count = self.count;
        let lane = self.lane(id)?;
        let request = lane.waiting.pop_front();
        lane.time = time + lane.step;
        lane.served = count;
        if !lane.waiting.is_empty() {
            let key = (lane.time, lane.served, id);
            self.ready.insert(key);
        }
        request
    }

    /// Takes a request out that gave up.
    pub(super) fn remove(&mut self, id: LaneId, request: T) {
        let Some(lane) = self.lane(id) else { return };
        let Some(at) = lane.waiting.iter().position(|r| *r == request) else { return };
        lane.waiting.remove(at);
        if lane.waiting.is_empty() {
            let key = (lane.time, lane.served, id);
            self.ready.remove(&key);
        }
    }

    /// Takes the requests of a lane out that match, in order.
    pub(super) fn take(&mut self, id: LaneId, matches: impl Fn(T) -> bool) -> Vec<T> {
        let Some(lane) = self.lane(id) else { return Vec::new() };
        let (out, left): (VecDeque<T>, VecDeque<T>) = lane.waiting.iter().partition(|r| matches(**r));
        lane.waiting = left;
        if lane.waiting.is_empty() {
            let key = (lane.time, lane.served, id);
            self.ready.remove(&key);
        }
        out.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(queue: &mut Queue<u32>, n: usize) -> Vec<u32> {
        (0..n).filter_map(|_| queue.serve()).collect()
    }

    /// Goal: equal members are served in turn, whoever came first, and one that was idle gets no more than its turn.
    /// Method: three lanes; a long one, two short ones that come later.
    #[test]
    fn in_turn() {
        let mut q = Queue::default();
        (0..3).for_each(|id| q.open(id, 100));
        for r in [0, 1, 2, 3, 4, 5, 6, 7] {
            q.push(0, r);
        }
        assert_eq!(order(&mut q, 3), [0, 1, 2]);
        for r in [10, 11, 12] {
            q.push(1, r);
        }
        q.push(2, 20);
        assert_eq!(q.first(), Some(10));
        assert_eq!(order(&mut q, 9), [10, 20, 3, 11, 4, 12, 5, 6, 7]);
        assert!(q.is_empty() && q.serve().is_none());
    }

    /// Goal: shares follow the weights. Method: three lanes that always wait, a thousand requests.
    #[test]
    fn by_weight() {
        let mut q = Queue::default();
        let weights = [100, 200, 700];
        for (id, w) in weights.iter().enumerate() {
            q.open(id, *w);
            (0..2).for_each(|_| q.push(id, id as u32));
        }
        let mut got = [0; 3];
        for _ in 0..1000 {
            let id = q.serve().unwrap() as usize;
            got[id] += 1;
            q.push(id, id as u32);
        }
        assert!(got.iter().zip(weights).all(|(g, w): (&u32, u32)| g.abs_diff(w) <= 2), "{got:?}");
    }

    /// Goal: whoever gives up is gone, and its lane with it. Method: take one from the middle, the rest by a test.
    #[test]
    fn giving_up() {
        let mut q = Queue::default();
        q.open(0, 1);
        q.open(1, 1);
        for r in 0..4 {
            q.push(0, r);
        }
        q.push(1, 9);
        q.remove(0, 2);
        assert_eq!(q.take(0, |r| r < 2), [0, 1]);
        q.remove(1, 9);
        assert_eq!((q.waiting(0), q.waiting(1)), (1, 0));
        assert_eq!(order(&mut q, 5), [3]);
        q.close(0);
        q.close(1);
        assert!(q.is_empty());
    }
}
