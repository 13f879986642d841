//! The arithmetic of limits: six leaky buckets (reference, part 1.7).
//!
//! ```text
//!   {bps, iops} × {total, read, write}: level leaks at `avg` per second; over capacity ⇒ wait
//!   capacity = max ? max · length : avg / 10          request of n bytes = max(1, n / iops_size) operations
//! ```
//!
//! Invariant: a request is charged after it is allowed, by its full size, exactly once.

/// One bucket's configuration, in units (bytes or operations) per second.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rate {
    /// Sustained rate; 0 is no limit.
    pub avg: f64,
    /// Burst rate; 0 is none.
    pub max: f64,
    /// How long a burst may last, in seconds, at least 1.
    pub length: f64,
}

impl Default for Rate {
    fn default() -> Rate {
        Rate { avg: 0.0, max: 0.0, length: 1.0 }
    }
}

/// Limits of a group, indexed by [`Kind`].
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Config {
    /// The six rates.
    pub rates: [Rate; 6],
    /// Bytes that count as one operation; 0 counts every request once.
    pub iops_size: u64,
}

/// Index of a bucket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Bytes, both directions.
    BpsTotal = 0,
    /// Bytes read.
    BpsRead = 1,
    /// Bytes written.
    BpsWrite = 2,
    /// Operations, both directions.
    OpsTotal = 3,
    /// Read operations.
    OpsRead = 4,
    /// Write operations.
    OpsWrite = 5,
}

/// The largest rate, and the largest product of a burst rate and its length (reference, part 1.7).
const RATE_MAX: f64 = 1e15;

const READ: [Kind; 4] = [Kind::BpsTotal, Kind::OpsTotal, Kind::BpsRead, Kind::OpsRead];
const WRITE: [Kind; 4] = [Kind::BpsTotal, Kind::OpsTotal, Kind::BpsWrite, Kind::OpsWrite];

impl Config {
    /// Whether the numbers make sense together; the text is the peer's, and so is the order in which it looks.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        let both = |of: fn(&Rate) -> f64| {
            [0, 3].iter().any(|&at| {
                let [total, read, write] = [0, 1, 2].map(|i| of(&self.rates[at + i]) > 0.0);
                total && (read || write)
            })
        };
        if both(|r| r.avg) || both(|r| r.max) {
            return Err("bps/iops/max total values and read/write values cannot be used at the same time");
        }
        if self.iops_size > 0 && self.rates[3..].iter().all(|r| r.avg <= 0.0) {
            return Err("iops size requires an iops value to be set");
        }
        self.rates.iter().try_for_each(Rate::check)
    }

    /// Whether requests of this direction may have to wait.
    pub fn limits(&self, write: bool) -> bool {
        kinds(write).iter().any(|&k| self.rates[k as usize].avg > 0.0)
    }

    /// Operations that a request of so many bytes counts as.
    fn operations(&self, bytes: u64) -> f64 {
        if self.iops_size > 0 { (bytes as f64 / self.iops_size as f64).max(1.0) } else { 1.0 }
    }
}

impl Rate {
    fn check(&self) -> Result<(), &'static str> {
        if [self.avg, self.max].iter().any(|v| !(0.0..=RATE_MAX).contains(v)) {
            return Err("bps/iops/max values must be within [0, 1000000000000000]");
        }
        if self.length < 1.0 {
            return Err("the burst length cannot be 0");
        }
        if self.length > 1.0 && self.max <= 0.0 {
            return Err("burst length set without burst rate");
        }
        if self.max > 0.0 && self.length > RATE_MAX / self.max {
            return Err("burst length too high for this burst rate");
        }
        if self.max > 0.0 && self.avg <= 0.0 {
            return Err("bps_max/iops_max require corresponding bps/iops values");
        }
        if self.max > 0.0 && self.max < self.avg {
            return Err("bps_max/iops_max cannot be lower than bps/iops");
        }
        Ok(())
    }
}

fn kinds(write: bool) -> &'static [Kind; 4] {
    if write { &WRITE } else { &READ }
}

#[derive(Clone, Copy, Default)]
struct Bucket {
    level: f64,
    burst: f64,
}

/// Limits, and how full the buckets are.
#[derive(Clone, Default)]
pub(super) struct Buckets {
    config: Config,
    buckets: [Bucket; 6],
    leaked_at: u64,
}

impl Buckets {
    /// Empty ones.
    pub(super) fn new(config: Config) -> Buckets {
        Buckets { config, ..Buckets::default() }
    }

    pub(super) fn config(&self) -> Config {
        self.config
    }

    /// Nanoseconds from `now` until a request of this direction is allowed; 0: it is.
    pub(super) fn wait(&mut self, now: u64, write: bool) -> u64 {
        self.leak(now);
        let wait = kinds(write).iter().map(|&k| self.wait_for(k)).fold(0.0, f64::max);
        (wait * 1e9).ceil() as u64
    }

    /// Counts a request that is allowed.
    pub(super) fn charge(&mut self, write: bool, bytes: u64) {
        let ops = self.config.operations(bytes);
        for &k in kinds(write) {
            let units = if (k as usize) < Kind::OpsTotal as usize { bytes as f64 } else { ops };
            self.buckets[k as usize].level += units;
            self.buckets[k as usize].burst += units;
        }
    }

    fn leak(&mut self, now: u64) {
        let dt = now.saturating_sub(self.leaked_at) as f64 / 1e9;
        self.leaked_at = self.leaked_at.max(now);
        for (b, r) in self.buckets.iter_mut().zip(&self.config.rates) {
            b.level = (b.level - r.avg * dt).max(0.0);
            b.burst = if r.length > 1.0 { (b.burst - r.max * dt).max(0.0) } else { 0.0 };
        }
    }

    /// Seconds until the bucket allows another request.
    fn wait_for(&self, kind: Kind) -> f64 {
        let (b, r) = (&self.buckets[kind as usize], &self.config.rates[kind as usize]);
        if r.avg <= 0.0 {
            return 0.0;
        }
        let capacity = if r.max > 0.0 { r.max * r.length } else { r.avg / 10.0 };
        let extra = b.level - capacity;
        if extra > 0.0 {
            return extra / r.avg;
        }
        let burst = b.burst - r.max / 10.0;
        if r.length > 1.0 && burst > 0.0 { burst / r.max } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Time in seconds until `n` operations of 4 KiB were admitted, one after the other.
    fn time_for(n: u32, rate: Rate) -> f64 {
        let mut config = Config::default();
        config.rates[Kind::OpsTotal as usize] = rate;
        let mut buckets = Buckets::new(config);
        let mut now = 0;
        for _ in 0..n {
            loop {
                match buckets.wait(now, false) {
                    0 => break,
                    wait => now += wait,
                }
            }
            buckets.charge(false, 4096);
        }
        now as f64 / 1e9
    }

    /// Goal: the rates measured on the peer (reference, part 1.7, "checked numbers"). Method: virtual time.
    #[test]
    fn rates_are_those_of_the_reference() {
        let rate = |avg, max, length| Rate { avg, max, length };
        for (n, r, want) in [
            (55, rate(50.0, 0.0, 1.0), 1.0),
            (155, rate(50.0, 0.0, 1.0), 3.0),
            (200, rate(50.0, 200.0, 1.0), 0.0),
            (400, rate(50.0, 200.0, 1.0), 4.0),
            (100, rate(50.0, 200.0, 2.0), 0.4),
            (400, rate(50.0, 200.0, 2.0), 1.9),
            (200, rate(200.0, 0.0, 1.0), 0.9),
        ] {
            let got = time_for(n, r);
            assert!((got - want).abs() <= 0.15, "{n} operations at {r:?}: {got} s, expected {want} s");
        }
    }

    /// Goal: contradictions are told in the peer's order and words. Method: one of each, and pairs of them.
    #[test]
    fn contradictions() {
        let with = |list: &[(Kind, Rate)], iops_size| {
            let mut c = Config { iops_size, ..Config::default() };
            list.iter().for_each(|(k, r)| c.rates[*k as usize] = *r);
            c.check()
        };
        let avg = |avg| Rate { avg, ..Rate::default() };
        let rate = |avg, max, length| Rate { avg, max, length };
        let both = Err("bps/iops/max total values and read/write values cannot be used at the same time");
        assert_eq!(with(&[], 0), Ok(()));
        assert_eq!(with(&[(Kind::BpsTotal, avg(1.0)), (Kind::BpsWrite, avg(1.0))], 512), both);
        let max = rate(0.0, 5.0, 1.0);
        assert_eq!(with(&[(Kind::OpsTotal, max), (Kind::OpsRead, max)], 0), both);
        assert_eq!(with(&[(Kind::BpsTotal, avg(1.0)), (Kind::OpsRead, avg(1.0))], 512), Ok(()));
        assert_eq!(
            with(&[(Kind::BpsTotal, avg(1.0))], 512),
            Err("iops size requires an iops value to be set")
        );
        let one = |r| with(&[(Kind::BpsRead, r)], 0);
        let range = Err("bps/iops/max values must be within [0, 1000000000000000]");
        assert_eq!((one(avg(1e15)), one(avg(1e15 + 1.0)), one(rate(1.0, 2e15, 1.0))), (Ok(()), range, range));
        assert_eq!(one(avg(-1.0)), range);
        assert_eq!(one(rate(1.0, 0.0, 0.0)), Err("the burst length cannot be 0"));
        assert_eq!(one(rate(1.0, 0.0, 2.0)), Err("burst length set without burst rate"));
        assert_eq!(one(rate(1.0, 1e15, 2.0)), Err("burst length too high for this burst rate"));
        assert_eq!(one(rate(0.0, 5.0, 1.0)), Err("bps_max/iops_max require corresponding bps/iops values"));
        assert_eq!(one(rate(5.0, 4.0, 1.0)), Err("bps_max/iops_max cannot be lower than bps/iops"));
        assert_eq!(one(rate(5.0, 5.0, 10.0)), Ok(()));
    }
}
