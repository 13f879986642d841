//! Goal: requests are admitted at exactly the times that the reference's formulas give (part 1.7), in the order that it
//! gives, for any limits. Method: thousands of random configurations and loads; the group under a clock of the test's own
//! against a second implementation of the formulas in whole numbers, which shares no code with the first.

use std::collections::VecDeque;
use std::task::Waker;

use super::bucket::{Config, Rate};
use super::group::{Group, Look};
use super::member::{DEFAULT_WEIGHT, Outcome};
use crate::host::sim::Rng;

/// A request of the load.
#[derive(Clone, Copy, Debug)]
struct Request {
    at: u64,
    member: usize,
    write: bool,
    bytes: u64,
}

/// The formulas, in units of 1e-9: a rate of n per second leaks n of them in a nanosecond.
struct Model {
    config: Config,
    level: [i128; 6],
    burst: [i128; 6],
    at: u64,
}

/// Who waits in one direction: members in rounds. One that comes to wait is as far as the one served last.
struct Side {
    queues: Vec<VecDeque<usize>>,
    /// Per member: the round it is in, and when it was served last.
    round: Vec<(u64, u64)>,
    now: u64,
    served: u64,
}

impl Side {
    fn new(members: usize) -> Side {
        Side { queues: vec![VecDeque::new(); members], round: vec![(0, 0); members], now: 0, served: 0 }
    }

    fn first(&self) -> Option<usize> {
        (0..self.queues.len()).filter(|&m| !self.queues[m].is_empty()).min_by_key(|&m| (self.round[m], m))
    }

    fn push(&mut self, member: usize, request: usize) {
        if self.queues[member].is_empty() {
            self.round[member].0 = self.round[member].0.max(self.now);
        }
        self.queues[member].push_back(request);
    }

    fn serve(&mut self, member: usize) -> usize {
        self.now = self.round[member].0;
        self.served += 1;
        self.round[member] = (self.now + 1, self.served);
        self.queues[member].pop_front().expect("it waits")
    }
}

const NANO: i128 = 1_000_000_000;

impl Model {
    fn buckets(write: bool) -> [usize; 4] {
        if write { [0, 2, 3, 5] } else { [0, 1, 3, 4] }
    }

    fn wait(&mut self, now: u64, write: bool) -> u64 {
        let dt = i128::from(now - self.at);
        self.at = now;
        for (i, r) in self.config.rates.iter().enumerate() {
            self.level[i] = (self.level[i] - r.avg as i128 * dt).max(0);
            self.burst[i] = if r.length > 1.0 { (self.burst[i] - r.max as i128 * dt).max(0) } else { 0 };
        }
        let one = |i: usize| {
            let r = self.config.rates[i];
            let (avg, max, length) = (r.avg as i128, r.max as i128, r.length as i128);
            let up = |extra: i128, rate: i128| if extra > 0 { (extra + rate - 1) / rate } else { 0 };
            if avg == 0 {
                return 0;
            }
            let capacity = if max > 0 { max * length * NANO } else { avg * NANO / 10 };
            match up(self.level[i] - capacity, avg) {
                0 if length > 1 => up(self.burst[i] - max * NANO / 10, max),
                wait => wait,
            }
        };
        Model::buckets(write).into_iter().map(one).max().unwrap_or(0) as u64
    }

    fn charge(&mut self, r: &Request) {
        let size = i128::from(self.config.iops_size);
        let bytes = i128::from(r.bytes) * NANO;
        let ops = if size > 0 { (bytes / size).max(NANO) } else { NANO };
        for i in Model::buckets(r.write) {
            let units = if i < 3 { bytes } else { ops };
            self.level[i] += units;
            self.burst[i] += units;
        }
    }

    /// When each request of the load is admitted.
    fn run(config: Config, load: &[Request], members: usize) -> Vec<u64> {
        let mut m = Model { config, level: [0; 6], burst: [0; 6], at: 0 };
        let mut times = vec![u64::MAX; load.len()];
        let mut sides = [Side::new(members), Side::new(members)];
        let (mut now, mut next) = (0, 0);
        while next < load.len() || sides.iter().any(|s| s.first().is_some()) {
            let waits = [false, true].map(|w| match sides[usize::from(w)].first() {
                Some(_) => now + m.wait(now, w),
                None => u64::MAX,
            });
            let arrival = load.get(next).map_or(u64::MAX, |r| r.at);
            now = waits[0].min(waits[1]).min(arrival);
            for write in [false, true] {
                let side = &mut sides[usize::from(write)];
                while let Some(member) = side.first()
                    && m.wait(now, write) == 0
                {
                    let i = side.serve(member);
                    m.charge(&load[i]);
                    times[i] = now;
                }
            }
            while let Some(r) = load.get(next).filter(|r| r.at == now) {
                let side = &mut sides[usize::from(r.write)];
                if side.first().is_none() && m.wait(now, r.write) == 0 {
                    m.charge(r);
                    times[next] = now;
                } else {
                    side.push(r.member, next);
                }
                next += 1;
            }
        }
        times
    }
}

/// The same load through a group, whose waiting requests are looked at whenever anything happens.
fn group(config: Config, load: &[Request], members: usize) -> Vec<u64> {
    let group = Group::new("g", config);
    let lanes: Vec<_> = (0..members).map(|_| group.with(|s| s.join(DEFAULT_WEIGHT))).collect();
    let mut times = vec![u64::MAX; load.len()];
    let mut waiting: Vec<(usize, usize)> = Vec::new();
    let (mut now, mut next) = (0, 0);
    loop {
        let mut timer;
        loop {
            let before = waiting.len();
            timer = u64::MAX;
            // reads first, as in the model
            waiting.sort_by_key(|&(_, i)| load[i].write);
            waiting.retain(|&(key, i)| match group.with(|s| s.look(key, now, Waker::noop())) {
                Look::Done(outcome) => {
                    assert_eq!(outcome, Outcome::Allowed);
                    times[i] = now;
                    false
                }
                Look::Wait(_) => true,
                Look::WaitUntil(_, at) => {
                    timer = timer.min(at);
                    true
                }
            });
            if waiting.len() == before {
                break;
            }
        }
        while let Some(r) = load.get(next).filter(|r| r.at == now) {
            match group.with(|s| s.arrive(lanes[r.member], r.write, r.bytes, 0, now, Waker::noop())) {
                Look::Done(_) => times[next] = now,
                Look::Wait(key) => waiting.push((key, next)),
                Look::WaitUntil(key, at) => {
                    timer = timer.min(at);
                    waiting.push((key, next));
                }
            }
            next += 1;
        }
        let arrival = load.get(next).map_or(u64::MAX, |r| r.at);
        if waiting.is_empty() && arrival == u64::MAX {
            return times;
        }
        now = timer.min(arrival);
        assert_ne!(now, u64::MAX, "somebody waits and no timer runs");
    }
}

/// Limits at random that make sense together.
fn limits(rng: &mut Rng) -> Config {
    loop {
        let mut config = Config::default();
        for (i, rate) in config.rates.iter_mut().enumerate() {
            if !rng.chance(400) {
                continue;
            }
            let high = rng.pick(&[1, 1, 10, 100, 1000]);
            let avg = if i < 3 { rng.between(1 << 16, 2 << 20) } else { rng.between(20, 200) } * high;
            let avg = avg as f64;
            *rate = Rate { avg, ..Rate::default() };
            if rng.chance(500) {
                rate.max = (avg * rng.between(1, 8) as f64).round();
                rate.length = rng.pick(&[1.0, 1.0, 2.0, 5.0]);
            }
        }
        if rng.chance(300) {
            config.iops_size = rng.pick(&[512, 4096, 65_536]);
        }
        if config.check().is_ok() {
            return config;
        }
    }
}

#[test]
fn admission_times_are_those_of_the_formulas() {
    let mut waited = 0u64;
    for seed in 0..3000 {
        let mut rng = Rng::new(seed);
        let (config, members) = (limits(&mut rng), rng.between(1, 6) as usize);
        let mut at = 0;
        let load: Vec<Request> = (0..rng.between(20, 300))
            .map(|_| {
                if rng.chance(300) {
                    let gap = rng.pick(&[1_000, 1_000_000, 30_000_000]);
                    at += rng.below(gap);
                }
                let bytes = rng.pick(&[512, 4096, 4096, 65_536, 1 << 20]);
                Request { at, member: rng.index(members), write: rng.chance(500), bytes }
            })
            .collect();
        let (want, got) = (Model::run(config, &load, members), group(config, &load, members));
        for (i, (w, g)) in want.iter().zip(&got).enumerate() {
            waited += u64::from(*w > load[i].at);
            // a rate of 1e9 and a level of 1e10 in floating point: less than a tenth of a microsecond
            assert!(
                w.abs_diff(*g) <= 100,
                "seed {seed}, request {i} {:?}: at {g}, expected {w}, {config:?}",
                load[i]
            );
        }
    }
    assert!(waited > 50_000, "{waited} requests had to wait");
}
