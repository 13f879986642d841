//! Whether the history of one register can be explained by some order of its operations: linearizability, decided exactly.
//!
//! A register is one cell of a disk. Data written is unique, zeroes are not, and an operation that failed or was only advice
//! may have changed the register or not. The decision follows the history in time and keeps every state the register could
//! be in; an operation is put into the order at the last moment, when something that returns needs it.
//!
//! ```text
//!   time ─►   |--- write 7 ----------------|         states after each return:
//!                 |- read 0 -|  |- read 7 -|          {0}   {0}   {7: forced by the read}
//!                     |- zero --|
//! ```
//!
//! Why the last moment is enough: a write that nobody has read yet can always be moved later; one that must end is either the
//! register's value from now on, or stands just before a write that was put into the order since it began (nobody saw it).
//! The tests compare the decision with trying every order.

/// The end of an operation that never returned: it may take effect at any time.
pub const NEVER: u64 = u64::MAX;
/// Operations on one register at the same time, at most.
const OPEN_MAX: usize = 64;
/// States kept, at most.
const STATES_MAX: usize = 50_000;

/// What an operation did to the register. The value 0 stands for zeroes; all others are written at most once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    /// It found this.
    Read(u64),
    /// It wrote this.
    Write(u64),
    /// It may have written this, or nothing.
    Maybe(u64),
}

/// One operation on the register.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// What it did.
    pub act: Act,
    /// When it began. All times of a history differ.
    pub start: u64,
    /// When it ended, or [`NEVER`].
    pub end: u64,
}

/// Why no order explains a history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// A read found data that nobody wrote to this register.
    Phantom,
    /// When this operation returned, nothing could explain it any more.
    NoOrder,
    /// Too many operations at once to decide.
    Undecided,
}

/// An operation that has begun and not ended.
#[derive(Clone, Copy)]
struct Open {
    event: usize,
    start: u64,
    act: Act,
}

/// A state the register may be in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    value: u64,
    /// Open operations that have their place in the order, by slot.
    placed: u64,
    /// When the last write was put into the order.
    since: u64,
}

struct Search<'a> {
    events: &'a [Event],
    open: [Option<Open>; OPEN_MAX],
    states: Vec<State>,
    next: Vec<State>,
    /// A zeroing that never returned: zeroes may come at any time. Lenient: more than once.
    free_zero: bool,
}

/// Decides about a register that held `initial`. The error is the index of the operation that cannot be explained.
pub fn check(initial: u64, events: &[Event]) -> Result<(), (usize, Why)> {
    let mut last_read = std::collections::HashMap::new();
    for (i, e) in events.iter().enumerate() {
        if let Act::Read(v) = e.act
            && e.end != NEVER
        {
            let last = last_read.entry(v).or_insert((0, i));
            last.0 = e.end.max(last.0);
        }
    }
    let known = |v: u64| v == 0 || v == initial;
    let written: std::collections::HashSet<u64> = events.iter().filter_map(|e| e.act.written()).collect();
    let phantom = last_read.iter().filter(|(v, _)| !known(**v) && !written.contains(v)).map(|(_, r)| r.1);
    if let Some(at) = phantom.min() {
        return Err((at, Why::Phantom));
    }
    let mut points = Vec::with_capacity(2 * events.len());
    for (i, e) in events.iter().enumerate() {
        let read_last = e.act.written().map(|v| last_read.get(&v).map_or(0, |r| r.0));
        let end = match e.act {
            Act::Read(_) if e.end == NEVER => continue,
            // what may have been written and was not seen explains nothing
            Act::Maybe(_) if read_last == Some(0) => continue,
            Act::Maybe(v) if e.end == NEVER && v == 0 => NEVER,
            // after its last read it explains nothing more
            Act::Maybe(_) => e.end.min(read_last.unwrap_or(0).saturating_add(1)),
            _ => e.end,
        };
        points.push((e.start, 0, i));
        if end != NEVER {
            // a point just after the read's own: reads end first
            points.push((end.max(e.start), if end == e.end { 0 } else { 1 }, i));
        }
    }
    points.sort_unstable();
    let state = State { value: initial, placed: 0, since: 0 };
    let mut search =
        Search { events, open: [None; OPEN_MAX], states: vec![state], next: Vec::new(), free_zero: false };
    let mut begun = vec![u8::MAX; events.len()];
    for (time, _, i) in points {
        match begun[i] {
            u8::MAX => begun[i] = search.begin(i)?,
            slot => search.end(slot, time)?,
        }
    }
    Ok(())
}

impl Act {
    fn written(self) -> Option<u64> {
        match self {
            Act::Write(v) | Act::Maybe(v) => Some(v),
            Act::Read(_) => None,
        }
    }
}

impl Search<'_> {
    /// Gives the operation a slot; reads of the present value find it at once.
    fn begin(&mut self, event: usize) -> Result<u8, (usize, Why)> {
        let e = self.events[event];
        if e.act == Act::Maybe(0) && e.end == NEVER {
            self.free_zero = true;
            return Ok(0);
        }
        let slot = self.open.iter().position(Option::is_none).ok_or((event, Why::Undecided))?;
        self.open[slot] = Some(Open { event, start: e.start, act: e.act });
        if let Act::Read(v) = e.act {
            let at_once = self.states.iter_mut().filter(|s| s.value == v);
            at_once.for_each(|s| s.placed |= 1 << slot);
        }
        Ok(slot as u8)
    }

    fn end(&mut self, slot: u8, now: u64) -> Result<(), (usize, Why)> {
        let Some(open) = self.open[usize::from(slot)] else { return Ok(()) };
        let bit = 1u64 << slot;
        let states = std::mem::take(&mut self.states);
        let mut next = std::mem::take(&mut self.next);
        next.clear();
        for s in &states {
            let placed = s.placed & bit != 0;
            match open.act {
                _ if placed => next.push(*s),
                Act::Maybe(_) => {
                    next.push(*s);
                    // now or never, if somebody still looks at it
                    if now == self.events[open.event].end {
                        self.reach(*s, now, &mut next, &|_, at| at == usize::from(slot));
                    }
                }
                Act::Read(v) => {
                    self.reach(*s, now, &mut next, &|o, _| o == Act::Write(v) || o == Act::Maybe(v))
                }
                Act::Write(_) => {
                    if s.since > open.start {
                        next.push(*s);
                    }
                    self.reach(*s, now, &mut next, &|_, at| at == usize::from(slot));
                }
            }
            if next.len() > STATES_MAX {
                return Err((open.event, Why::Undecided));
            }
        }
        self.open[usize::from(slot)] = None;
        for s in &mut next {
            s.placed &= !bit;
        }
        // of equal states the one with the latest write explains most
        next.sort_unstable();
        next.reverse();
        next.dedup_by(|a, b| a.value == b.value && a.placed == b.placed);
        self.states = next;
        self.next = states;
        if self.states.is_empty() { Err((open.event, Why::NoOrder)) } else { Ok(()) }
    }

    /// All states after putting one wanted write into the order, and before it others that some open read still misses.
    fn reach(&self, s: State, now: u64, out: &mut Vec<State>, wanted: &dyn Fn(Act, usize) -> bool) {
        if out.len() > STATES_MAX {
            return;
        }
        if self.free_zero && wanted(Act::Write(0), OPEN_MAX) {
            out.push(self.place(s, None, 0, now));
        }
        for (at, open) in self.open.iter().enumerate() {
            let Some(open) = open else { continue };
            let Some(v) = open.act.written() else { continue };
            if s.placed & 1 << at != 0 {
                continue;
            }
            if wanted(open.act, at) {
                out.push(self.place(s, Some(at), v, now));
            } else if self.is_missed(s, v) {
                self.reach(self.place(s, Some(at), v, now), now, out, wanted);
            }
        }
        if self.free_zero && s.value != 0 && self.is_missed(s, 0) {
            self.reach(self.place(s, None, 0, now), now, out, wanted);
        }
    }

    fn is_missed(&self, s: State, v: u64) -> bool {
        let reads = |(at, o): (usize, &Option<Open>)| {
            o.is_some_and(|o| o.act == Act::Read(v)) && s.placed & 1 << at == 0
        };
        self.open.iter().enumerate().any(reads)
    }

    /// The state after this write, with every open read of its value satisfied.
    fn place(&self, s: State, slot: Option<usize>, value: u64, now: u64) -> State {
        let mut placed = s.placed | slot.map_or(0, |at| 1 << at);
        for (at, o) in self.open.iter().enumerate() {
            if o.is_some_and(|o| o.act == Act::Read(value)) {
                placed |= 1 << at;
            }
        }
        State { value, placed, since: now }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringblock_engine::host::sim::Rng;

    fn event(act: Act, start: u64, end: u64) -> Event {
        Event { act, start, end }
    }

    /// The same decision by trying every order of the operations.
    fn by_force(value: u64, left: &[Event]) -> bool {
        let must = |e: &Event| match e.act {
            Act::Read(_) => e.end != NEVER,
            Act::Write(_) => true,
            Act::Maybe(_) => false,
        };
        if !left.iter().any(must) {
            return true;
        }
        let first_end = left.iter().filter(|e| must(e)).map(|e| e.end).min().unwrap_or(NEVER);
        (0..left.len()).any(|i| {
            let e = left[i];
            // it would have to stand before one that ended before it began; what may be nothing must come in time, too
            if e.start > first_end {
                return false;
            }
            let mut rest = left.to_vec();
            rest.remove(i);
            // an operation that may be nothing and is over is out
            let in_time = |r: &Event| matches!(r.act, Act::Maybe(_)) && r.end < e.start;
            rest.retain(|r| !in_time(r));
            match e.act {
                Act::Read(v) => v == value && by_force(value, &rest),
                Act::Write(v) | Act::Maybe(v) => by_force(v, &rest),
            }
        })
    }

    /// Goal: the decision is exact. Method: small random histories, most of them nearly explicable, compared with all orders.
    #[test]
    fn agrees_with_every_order() {
        let (mut good, mut bad) = (0, 0);
        for seed in 0..60_000 {
            let mut rng = Rng::new(seed);
            let n = 2 + rng.below(6);
            let mut times: Vec<u64> = (1..=2 * n).collect();
            for i in (1..times.len()).rev() {
                // mostly short operations
                let j = i.saturating_sub(rng.below(5) as usize);
                times.swap(i, j);
            }
            let mut events = Vec::new();
            for i in 0..n {
                let (a, b) = (times[2 * i as usize], times[2 * i as usize + 1]);
                let value = if rng.chance(400) { 0 } else { 10 + i };
                let act = match rng.below(8) {
                    0..=2 => Act::Write(value),
                    3 => Act::Maybe(value),
                    _ => Act::Read(0),
                };
                let never = matches!(act, Act::Maybe(v) if v != 0) && rng.chance(300);
                events.push(event(act, a.min(b), if never { NEVER } else { a.max(b) }));
            }
            let values: Vec<u64> = events.iter().filter_map(|e| e.act.written()).chain([0, 3]).collect();
            for e in &mut events {
                if let Act::Read(v) = &mut e.act {
                    *v = rng.pick(&values);
                }
            }
            let want = by_force(3, &events);
            let got = check(3, &events);
            assert_eq!(got.is_ok(), want, "seed {seed}: {got:?} {events:#?}");
            if want { good += 1 } else { bad += 1 }
        }
        assert!(good > 5_000 && bad > 5_000, "{good} {bad}");
    }

    /// Goal: each kind of violation is caught, where it is seen. Method: by hand.
    #[test]
    fn violations_are_caught() {
        use Act::*;
        let cases: &[(&str, Vec<Event>, usize)] = &[
            ("stale read", vec![event(Write(1), 1, 2), event(Write(2), 3, 4), event(Read(1), 5, 6)], 2),
            (
                "new-old inversion",
                vec![event(Write(1), 1, 10), event(Read(1), 2, 3), event(Read(9), 4, 5)],
                2,
            ),
            ("lost write", vec![event(Write(1), 1, 2), event(Read(9), 3, 4)], 1),
            ("lost zeroes", vec![event(Write(0), 1, 2), event(Read(9), 3, 4)], 1),
            ("zeroes from nowhere", vec![event(Write(1), 1, 2), event(Read(0), 3, 4)], 1),
            (
                "zeroes from before",
                vec![event(Write(0), 1, 2), event(Write(1), 3, 4), event(Read(0), 5, 6)],
                2,
            ),
            ("phantom", vec![event(Read(5), 1, 2)], 0),
            ("a read before its write", vec![event(Read(5), 1, 2), event(Write(5), 3, 4)], 0),
            (
                "a discard that undoes itself",
                vec![event(Maybe(0), 1, 10), event(Read(0), 2, 3), event(Read(9), 4, 5)],
                2,
            ),
            (
                "a failed write that comes late",
                vec![event(Maybe(1), 1, 2), event(Write(2), 3, 4), event(Read(1), 5, 6)],
                2,
            ),
            (
                "two reads that disagree about the order of two writes",
                vec![
                    event(Write(1), 1, 10),
                    event(Write(2), 2, 11),
                    event(Read(1), 3, 4),
                    event(Read(2), 5, 6),
                    event(Read(1), 7, 8),
                ],
                4,
            ),
        ];
        for (name, events, at) in cases {
            let got = check(9, events);
            assert!(matches!(got, Err((i, w)) if i == *at && w != Why::Undecided), "{name}: {got:?}");
        }
    }

    /// Goal: what an order explains is accepted, however odd it looks. Method: by hand.
    #[test]
    fn odd_histories_are_accepted() {
        use Act::*;
        let cases: &[(&str, Vec<Event>)] = &[
            ("a read of what is being written", vec![event(Write(1), 1, 10), event(Read(1), 2, 3)]),
            (
                "a write that nobody saw",
                vec![event(Write(1), 1, 10), event(Write(2), 2, 3), event(Read(2), 11, 12)],
            ),
            (
                "the later write loses",
                vec![event(Write(1), 1, 10), event(Write(2), 3, 4), event(Read(1), 11, 12)],
            ),
            (
                "two writes, seen in turn by reads that overlap",
                vec![
                    event(Write(1), 1, 20),
                    event(Write(2), 2, 21),
                    event(Read(2), 3, 8),
                    event(Read(1), 4, 7),
                    event(Read(2), 9, 10),
                ],
            ),
            ("a failed write that was done", vec![event(Maybe(1), 1, 2), event(Read(1), 3, 4)]),
            ("a failed write that was not", vec![event(Maybe(1), 1, 2), event(Read(9), 3, 4)]),
            (
                "a write without an answer that lands late",
                vec![
                    event(Maybe(1), 1, NEVER),
                    event(Write(2), 3, 4),
                    event(Read(2), 5, 6),
                    event(Read(1), 7, 8),
                ],
            ),
            (
                "zeroes without an answer",
                vec![
                    event(Maybe(0), 1, NEVER),
                    event(Write(2), 3, 4),
                    event(Read(2), 5, 6),
                    event(Read(0), 7, 8),
                ],
            ),
            ("a discard that did nothing", vec![event(Maybe(0), 1, 2), event(Read(9), 3, 4)]),
        ];
        for (name, events) in cases {
            assert_eq!(check(9, events), Ok(()), "{name}");
        }
    }
}
