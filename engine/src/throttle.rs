//! I/O limits: six leaky buckets per group, asked at admission (reference, part 1.7).
//!
//! ```text
//!   {bps, iops} × {total, read, write}: level leaks at `avg` per second; over capacity ⇒ wait
//!   capacity = max ? max · length : avg / 10          request of n bytes = max(1, n / iops_size) operations
//! ```
//!
//! Invariant: a request is charged after it is allowed, by its full size, exactly once.

use std::sync::Mutex;

/// One bucket's configuration, in units (bytes or operations) per second.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Rate {
    /// Sustained rate; 0 is no limit.
    pub avg: f64,
    /// Burst rate; 0 is none.
    pub max: f64,
    /// How long a burst may last, in seconds, at least 1.
    pub length: f64,
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

#[derive(Clone, Copy, Default)]
struct Bucket {
    level: f64,
    burst: f64,
}

struct State {
    config: Config,
    buckets: [Bucket; 6],
    leaked_at: u64,
}

/// Limits that several roots share.
pub struct Group {
    state: Mutex<State>,
}

impl Group {
    /// A group with these limits and empty buckets.
    pub fn new(config: Config) -> Group {
        Group { state: Mutex::new(State { config, buckets: Default::default(), leaked_at: 0 }) }
    }

    /// Replaces the limits and empties the buckets.
    pub fn set(&self, config: Config) {
        let mut s = self.state.lock().unwrap_or_else(|e| e.into_inner());
        s.config = config;
        s.buckets = Default::default();
    }

    /// The limits in force.
    pub fn config(&self) -> Config {
        self.state.lock().unwrap_or_else(|e| e.into_inner()).config
    }

    /// Charges a request if the limits allow it at `now` (ns), or says when to ask again.
    pub fn admit(&self, now: u64, write: bool, bytes: u64) -> Result<(), u64> {
        let mut s = self.state.lock().unwrap_or_else(|e| e.into_inner());
        s.leak(now);
        let kinds = match write {
            false => [Kind::BpsTotal, Kind::OpsTotal, Kind::BpsRead, Kind::OpsRead],
            true => [Kind::BpsTotal, Kind::OpsTotal, Kind::BpsWrite, Kind::OpsWrite],
        };
        let wait = kinds.iter().map(|&k| s.wait(k)).fold(0.0, f64::max);
        if wait > 0.0 {
            return Err(now + (wait * 1e9).ceil() as u64);
        }
        let ops =
            if s.config.iops_size > 0 { (bytes as f64 / s.config.iops_size as f64).max(1.0) } else { 1.0 };
        for k in kinds {
            let units = if (k as usize) < Kind::OpsTotal as usize { bytes as f64 } else { ops };
            s.buckets[k as usize].level += units;
            s.buckets[k as usize].burst += units;
        }
        Ok(())
    }
}

impl State {
    fn leak(&mut self, now: u64) {
        let dt = now.saturating_sub(self.leaked_at) as f64 / 1e9;
        self.leaked_at = self.leaked_at.max(now);
        for (b, r) in self.buckets.iter_mut().zip(&self.config.rates) {
            b.level = (b.level - r.avg * dt).max(0.0);
            b.burst = if r.length > 1.0 { (b.burst - r.max * dt).max(0.0) } else { 0.0 };
        }
    }

    /// Seconds until the bucket allows another request.
    fn wait(&self, kind: Kind) -> f64 {
        let (b, r) = (&self.buckets[kind as usize], &self.config.rates[kind as usize]);
        if r.avg <= 0.0 {
            return 0.0;
        }
        let capacity = if r.max > 0.0 { r.max * r.length.max(1.0) } else { r.avg / 10.0 };
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
        let group = Group::new(config);
        let mut now = 0;
        for _ in 0..n {
            while let Err(until) = group.admit(now, false, 4096) {
                assert!(until > now);
                now = until;
            }
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
}
