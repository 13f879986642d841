//! Enumerating the crash states of a recording and having each judged.
//!
//! ```text
//!   events ─► cut ─► subsets of the open writes × {whole, torn prefix, torn sectors} × {lengths kept, lost} ─► judge
//! ```
//!
//! A cut lies before every host flush and durable write completes (most is open then: whatever could be found earlier since
//! the last one is among its states), after every flush that a guest was told of, after every operation, and at random
//! moments. Up to `bits` open writes all subsets are taken, in Gray-code order; beyond, all prefixes, all but one, one
//! alone, pairs, and random ones. A state that was judged already since the guest's last durable change is not judged again.

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Instant;

use ringblock_engine::host::sim::{Event, Rng};

use crate::allowed::Allowed;
use crate::cut::{Cut, Lengths};
use crate::judge::{Bad, Judge, State};
use crate::medium::Medium;
use crate::record::Recording;
use crate::spot::{self, Spot};

/// How much of a recording is enumerated.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// All subsets of up to this many open writes.
    pub bits: u32,
    /// Beyond: so many random subsets.
    pub random: u32,
    /// Beyond: at most so many pairs.
    pub pairs: u32,
    /// Random moments, per thousand completions.
    pub moments: u32,
    /// Distinct states at most.
    pub states: u64,
    /// End with the first failure.
    pub first: bool,
    /// No cuts before so many events.
    pub from: usize,
    /// Not beyond this moment.
    pub until: Option<Instant>,
    /// Where the choices come from.
    pub seed: u64,
}

impl Budget {
    /// Everything that the crash reference asks for.
    pub fn full(seed: u64) -> Budget {
        Budget { bits: 12, random: 4096, ..Budget::quick(seed) }
    }

    /// The same with fewer subsets where many writes are open.
    pub fn quick(seed: u64) -> Budget {
        Budget {
            bits: 8,
            random: 150,
            pairs: 100,
            moments: 10,
            states: u64::MAX,
            first: false,
            from: 0,
            until: None,
            seed,
        }
    }
}

/// What an enumeration came to.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// States built.
    pub visited: u64,
    /// Of these, different from all others since the guest's last durable change: these were judged.
    pub distinct: u64,
    /// Moments looked at.
    pub cuts: u64,
    /// Of these, with all subsets.
    pub exhausted: u64,
    /// Most writes open at one moment.
    pub widest: usize,
    /// Most clusters leaked in one state.
    pub leaks: u32,
    /// States with wrong refcounts under the dirty bit.
    pub dirty: u64,
    /// States that are corrupt.
    pub corrupt: u64,
    /// States without data that was flushed.
    pub lost: u64,
    /// States with a value that was never written to its sector.
    pub alien: u64,
    /// The first failures, as found.
    pub failures: Vec<(Spot, Bad)>,
}

/// Failures that are kept.
const KEPT: usize = 4;

impl Tally {
    /// Whether all is well.
    pub fn is_good(&self) -> bool {
        self.corrupt + self.lost + self.alien == 0 && self.failures.is_empty()
    }

    /// Adds the figures of another one.
    pub fn add(&mut self, other: &Tally) {
        self.visited += other.visited;
        self.distinct += other.distinct;
        self.cuts += other.cuts;
        self.exhausted += other.exhausted;
        self.widest = self.widest.max(other.widest);
        self.leaks = self.leaks.max(other.leaks);
        self.dirty += other.dirty;
        self.corrupt += other.corrupt;
        self.lost += other.lost;
        self.alien += other.alien;
        let room = KEPT.saturating_sub(self.failures.len());
        self.failures.extend(other.failures.iter().take(room).cloned());
    }

    fn fail(&mut self, spot: impl FnOnce() -> Spot, bad: Bad) {
        match bad {
            Bad::Lost(_) => self.lost += 1,
            Bad::Alien(_) => self.alien += 1,
            Bad::Corrupt(_) | Bad::Panic(_) => self.corrupt += 1,
        }
        if self.failures.len() < KEPT {
            self.failures.push((spot(), bad));
        }
    }
}

/// Numbers of states are random already.
#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.0 = self.0 << 8 | u64::from(b));
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = n;
    }
}

/// A walk through a recording that stops at its cuts.
pub(crate) struct Walk<'a> {
    pub(crate) recording: &'a Recording,
    pub(crate) medium: Medium,
    pub(crate) allowed: Allowed,
    /// Events that have happened.
    pub(crate) at: usize,
    rng: Rng,
    moments: u32,
    /// Something has happened to the files since the last cut.
    fresh: bool,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(recording: &'a Recording, moments: u32, seed: u64) -> Walk<'a> {
        let mut walk = Walk {
            recording,
            medium: Medium::new(&recording.files, recording.unit),
            allowed: Allowed::new(recording.roles.sectors),
            at: 0,
            rng: Rng::new(seed),
            moments,
            fresh: false,
        };
        walk.go_to(recording.start);
        walk
    }

    /// The next event happens. False at the end.
    fn step(&mut self) -> bool {
        let Some(event) = self.recording.events.get(self.at) else { return false };
        self.at += 1;
        self.medium.step(self.at, event);
        self.allowed.step(self.at, event);
        self.fresh |= matches!(event, Event::Submitted { .. } | Event::GuestFlushed { .. })
            || matches!(event, Event::GuestEnded { durable: true, .. } | Event::Resize { .. });
        true
    }

    /// Goes on to the next cut. False at the end.
    pub(crate) fn next_cut(&mut self) -> bool {
        loop {
            if !self.step() {
                return false;
            }
            let last = &self.recording.events[self.at - 1];
            let cut = match (last, self.recording.events.get(self.at)) {
                (_, None) => true,
                (_, Some(next)) if self.medium.settles(next) => true,
                (Event::GuestFlushed { .. } | Event::GuestEnded { durable: true, .. }, _) => true,
                (Event::Operation { ok: Some(_), .. } | Event::Resize { .. }, _) => true,
                (Event::Completed { .. }, _) => self.rng.chance(self.moments),
                _ => false,
            };
            if cut && self.fresh {
                self.fresh = false;
                return true;
            }
        }
    }

    /// Goes on until `at` events have happened.
    pub(crate) fn go_to(&mut self, at: usize) {
        while self.at < at && self.step() {}
    }

    /// Loads the present moment.
    pub(crate) fn load(&self, cut: &mut Cut) {
        cut.load(&self.medium, self.at, &mut Rng::new(self.at as u64));
    }

    pub(crate) fn paths(&self) -> Vec<std::path::PathBuf> {
        self.medium.files.iter().map(|f| f.path.clone()).collect()
    }
}

/// Enumerates a recording.
pub fn enumerate(recording: &Recording, budget: &Budget, judge: &mut dyn Judge) -> Tally {
    let mut walk = Walk::new(recording, budget.moments, budget.seed);
    let mut e = Explorer {
        budget,
        judge,
        tally: Tally::default(),
        seen: HashSet::default(),
        version: 0,
        rng: Rng::new(budget.seed ^ 0x5eed),
        over: false,
    };
    let mut cut = Cut::default();
    walk.go_to(budget.from);
    while !e.over && walk.next_cut() {
        walk.load(&mut cut);
        if walk.allowed.version() != e.version {
            e.version = walk.allowed.version();
            e.seen.clear();
        }
        let paths = walk.paths();
        e.explore(&mut cut, &Context { paths: &paths, allowed: &walk.allowed, recording });
    }
    e.tally
}

struct Context<'a> {
    paths: &'a [std::path::PathBuf],
    allowed: &'a Allowed,
    recording: &'a Recording,
}

struct Explorer<'a> {
    budget: &'a Budget,
    judge: &'a mut dyn Judge,
    tally: Tally,
    seen: HashSet<u64, BuildHasherDefault<Same>>,
    version: u64,
    rng: Rng,
    over: bool,
}

impl Explorer<'_> {
    fn explore(&mut self, cut: &mut Cut, cx: &Context<'_>) {
        let n = cut.open_writes();
        self.tally.cuts += 1;
        self.tally.widest = self.tally.widest.max(n);
        self.vary(cut, cx, None);
        if n as u32 <= self.budget.bits {
            self.tally.exhausted += 1;
            for i in 1u64..1 << n {
                let flipped = i.trailing_zeros() as usize;
                cut.set(flipped, !cut.writes[flipped].landed);
                self.vary(cut, cx, Some(flipped));
                if self.over {
                    return;
                }
            }
            return;
        }
        self.prefixes(cut, cx);
        self.nearly(cut, cx);
        self.pairs(cut, cx);
        self.random(cut, cx);
    }

    fn prefixes(&mut self, cut: &mut Cut, cx: &Context<'_>) {
        for w in 0..cut.open_writes() {
            cut.set(w, true);
            self.vary(cut, cx, Some(w));
        }
    }

    /// All but one, and one alone.
    fn nearly(&mut self, cut: &mut Cut, cx: &Context<'_>) {
        for w in 0..cut.open_writes() {
            cut.set(w, false);
            self.vary(cut, cx, None);
            cut.set(w, true);
        }
        cut.clear();
        for w in 0..cut.open_writes() {
            cut.set(w, true);
            self.vary(cut, cx, Some(w));
            cut.set(w, false);
        }
    }

    fn pairs(&mut self, cut: &mut Cut, cx: &Context<'_>) {
        let n = cut.open_writes();
        let all = n * (n - 1) / 2;
        let some = (self.budget.pairs as usize).min(all);
        for i in 0..some {
            let (a, b) = if some == all { pair(i) } else { pair(self.rng.index(all)) };
            cut.set(a, true);
            cut.set(b, true);
            self.vary(cut, cx, Some(b));
            cut.set(a, false);
            cut.set(b, false);
        }
    }

    /// Few, half, or most of them.
    fn random(&mut self, cut: &mut Cut, cx: &Context<'_>) {
        for _ in 0..self.budget.random {
            let share = self.rng.pick(&[100, 300, 500, 500, 700, 900]);
            let mut last = None;
            for w in 0..cut.open_writes() {
                let lands = self.rng.chance(share);
                cut.set(w, lands);
                if lands && (last.is_none() || self.rng.chance(300)) {
                    last = Some(w);
                }
            }
            self.vary(cut, cx, last);
            if self.over {
                return;
            }
        }
    }

    /// The present subset whole, and torn: the write `tear` if it landed and has sectors, or another one.
    fn vary(&mut self, cut: &mut Cut, cx: &Context<'_>, tear: Option<usize>) {
        self.lengths(cut, cx);
        let torn =
            |cut: &Cut, w: usize| cut.writes[w].landed && cut.writes[w].tears && cut.writes[w].count > 1;
        let chosen = tear.filter(|&w| torn(cut, w)).or_else(|| {
            let start = self.rng.index(cut.open_writes().max(1));
            let n = cut.open_writes();
            (0..n).map(|i| (start + i) % n).find(|&w| torn(cut, w))
        });
        let Some(w) = chosen else { return };
        let count = cut.writes[w].count;
        let keep = 1 + self.rng.index(count - 1);
        for p in keep..count {
            cut.set_part(w, p, false);
        }
        self.one_length(cut, cx);
        for p in 0..count {
            let lands = self.rng.chance(500);
            cut.set_part(w, p, lands);
        }
        self.one_length(cut, cx);
        cut.set(w, true);
    }

    fn lengths(&mut self, cut: &mut Cut, cx: &Context<'_>) {
        if !cut.lengths_matter() {
            return self.visit(cut, cx, Lengths::Kept);
        }
        self.visit(cut, cx, Lengths::Kept);
        self.visit(cut, cx, Lengths::Lost);
        if self.rng.chance(250) {
            self.visit(cut, cx, Lengths::Landed);
        }
    }

    fn one_length(&mut self, cut: &mut Cut, cx: &Context<'_>) {
        let lengths = match cut.lengths_matter() {
            true => self.rng.pick(&[Lengths::Kept, Lengths::Kept, Lengths::Lost, Lengths::Landed]),
            false => Lengths::Kept,
        };
        self.visit(cut, cx, lengths);
    }

    fn visit(&mut self, cut: &mut Cut, cx: &Context<'_>, lengths: Lengths) {
        if self.over {
            return;
        }
        cut.set_lengths(lengths);
        self.tally.visited += 1;
        if !self.seen.insert(cut.number()) {
            return;
        }
        self.tally.distinct += 1;
        let state = State { cut, paths: cx.paths, allowed: cx.allowed, recording: cx.recording };
        match self.judge.judge(&state) {
            Ok(good) => {
                self.tally.leaks = self.tally.leaks.max(good.leaks);
                self.tally.dirty += u64::from(good.dirty);
            }
            Err(bad) => {
                self.tally.fail(|| spot::of(cut, lengths), bad);
                self.over |= self.budget.first;
            }
        }
        self.over |= self.tally.distinct >= self.budget.states;
        if self.tally.distinct & 0xff == 0 {
            self.over |= self.budget.until.is_some_and(|t| Instant::now() >= t);
        }
    }
}

/// The `i`th of the pairs (0, 1), (0, 2), (1, 2), (0, 3), …
fn pair(i: usize) -> (usize, usize) {
    let mut b = (((8 * i + 1) as f64).sqrt() as usize).div_ceil(2).max(1);
    while b * (b - 1) / 2 > i {
        b -= 1;
    }
    while (b + 1) * b / 2 <= i {
        b += 1;
    }
    (i - b * (b - 1) / 2, b)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: pairs are all different. Method: the first of them.
    #[test]
    fn pairs_in_order() {
        let first: Vec<_> = (0..6).map(pair).collect();
        assert_eq!(first, [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]);
        assert_eq!(pair(100 * 99 / 2 - 1), (98, 99));
    }
}
