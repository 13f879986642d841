//! Limits as options write them, and the limits they mean.
//!
//! ```text
//!   limits.iops-total=100   x-iops-total=100   {"limits": {"iops-total": 100}}  ─► ThrottleLimits ─► throttle::Config
//! ```

use ringblock_engine::error::Error;
use ringblock_engine::throttle::{Config, Kind};

crate::qapi! {
    /// Limits.
    struct ThrottleLimits: Default {
        /// Operations per second (default: 0, no limit).
        iops_total: Option<i64> = "iops-total",
        /// Operations per second in a burst (default: 0, no burst).
        iops_total_max: Option<i64> = "iops-total-max",
        /// How long such a burst may last, in seconds (default: 1).
        iops_total_max_length: Option<i64> = "iops-total-max-length",
        /// Reads per second (default: 0, no limit).
        iops_read: Option<i64> = "iops-read",
        /// Reads per second in a burst (default: 0, no burst).
        iops_read_max: Option<i64> = "iops-read-max",
        /// How long such a burst may last, in seconds (default: 1).
        iops_read_max_length: Option<i64> = "iops-read-max-length",
        /// Writes per second (default: 0, no limit).
        iops_write: Option<i64> = "iops-write",
        /// Writes per second in a burst (default: 0, no burst).
        iops_write_max: Option<i64> = "iops-write-max",
        /// How long such a burst may last, in seconds (default: 1).
        iops_write_max_length: Option<i64> = "iops-write-max-length",
        /// Bytes per second (default: 0, no limit).
        bps_total: Option<i64> = "bps-total",
        /// Bytes per second in a burst (default: 0, no burst).
        bps_total_max: Option<i64> = "bps-total-max",
        /// How long such a burst may last, in seconds (default: 1).
        bps_total_max_length: Option<i64> = "bps-total-max-length",
        /// Bytes read per second (default: 0, no limit).
        bps_read: Option<i64> = "bps-read",
        /// Bytes read per second in a burst (default: 0, no burst).
        bps_read_max: Option<i64> = "bps-read-max",
        /// How long such a burst may last, in seconds (default: 1).
        bps_read_max_length: Option<i64> = "bps-read-max-length",
        /// Bytes written per second (default: 0, no limit).
        bps_write: Option<i64> = "bps-write",
        /// Bytes written per second in a burst (default: 0, no burst).
        bps_write_max: Option<i64> = "bps-write-max",
        /// How long such a burst may last, in seconds (default: 1).
        bps_write_max_length: Option<i64> = "bps-write-max-length",
        /// Bytes that count as one operation (default: 0, every request is one).
        iops_size: Option<i64> = "iops-size",
    }

    /// A group of nodes that share limits.
    struct ThrottleGroupProperties: Default {
        /// The limits.
        limits: Option<ThrottleLimits> = "limits",
        /// Operations per second (default: 0, no limit).
        x_iops_total: Option<i64> = "x-iops-total" ["unstable"],
        /// Operations per second in a burst (default: 0, no burst).
        x_iops_total_max: Option<i64> = "x-iops-total-max" ["unstable"],
        /// How long such a burst may last, in seconds (default: 1).
        x_iops_total_max_length: Option<i64> = "x-iops-total-max-length" ["unstable"],
        /// Reads per second (default: 0, no limit).
        x_iops_read: Option<i64> = "x-iops-read" ["unstable"],
        /// Reads per second in a burst (default: 0, no burst).
        x_iops_read_max: Option<i64> = "x-iops-read-max" ["unstable"],
        /// How long such a burst may last, in seconds (default: 1).
        x_iops_read_max_length: Option<i64> = "x-iops-read-max-length" ["unstable"],
        /// Writes per second (default: 0, no limit).
        x_iops_write: Option<i64> = "x-iops-write" ["unstable"],
        /// Writes per second in a burst (default: 0, no burst).
        x_iops_write_max: Option<i64> = "x-iops-write-max" ["unstable"],
        /// How long such a burst may last, in seconds (default: 1).
        x_iops_write_max_length: Option<i64> = "x-iops-write-max-length" ["unstable"],
        /// Bytes per second (default: 0, no limit).
        x_bps_total: Option<i64> = "x-bps-total" ["unstable"],
        /// Bytes per second in a burst (default: 0, no burst).
        x_bps_total_max: Option<i64> = "x-bps-total-max" ["unstable"],
        /// How long such a burst may last, in seconds (default: 1).
        x_bps_total_max_length: Option<i64> = "x-bps-total-max-length" ["unstable"],
        /// Bytes read per second (default: 0, no limit).
        x_bps_read: Option<i64> = "x-bps-read" ["unstable"],
        /// Bytes read per second in a burst (default: 0, no burst).
        x_bps_read_max: Option<i64> = "x-bps-read-max" ["unstable"],
        /// How long such a burst may last, in seconds (default: 1).
        x_bps_read_max_length: Option<i64> = "x-bps-read-max-length" ["unstable"],
        /// Bytes written per second (default: 0, no limit).
        x_bps_write: Option<i64> = "x-bps-write" ["unstable"],
        /// Bytes written per second in a burst (default: 0, no burst).
        x_bps_write_max: Option<i64> = "x-bps-write-max" ["unstable"],
        /// How long such a burst may last, in seconds (default: 1).
        x_bps_write_max_length: Option<i64> = "x-bps-write-max-length" ["unstable"],
        /// Bytes that count as one operation (default: 0, every request is one).
        x_iops_size: Option<i64> = "x-iops-size" ["unstable"],
    }
}

/// The longest burst, in seconds.
const LENGTH_MAX: i64 = u32::MAX as i64;

/// The three options of one bucket.
type Triple = (&'static str, Kind, [Option<i64>; 3]);

impl ThrottleLimits {
    fn triples(&self) -> [Triple; 6] {
        [
            (
                "iops-total",
                Kind::OpsTotal,
                [self.iops_total, self.iops_total_max, self.iops_total_max_length],
            ),
            ("iops-read", Kind::OpsRead, [self.iops_read, self.iops_read_max, self.iops_read_max_length]),
            (
                "iops-write",
                Kind::OpsWrite,
                [self.iops_write, self.iops_write_max, self.iops_write_max_length],
            ),
            ("bps-total", Kind::BpsTotal, [self.bps_total, self.bps_total_max, self.bps_total_max_length]),
            ("bps-read", Kind::BpsRead, [self.bps_read, self.bps_read_max, self.bps_read_max_length]),
            ("bps-write", Kind::BpsWrite, [self.bps_write, self.bps_write_max, self.bps_write_max_length]),
        ]
    }

    /// These limits where given, others as they were in `before`.
    ///
    /// # Errors
    /// Numbers out of range or that contradict each other, in the peer's words.
    pub fn over(&self, before: &Config) -> Result<Config, Error> {
        let mut config = *before;
        for (name, kind, [avg, max, length]) in self.triples() {
            let rate = &mut config.rates[kind as usize];
            let set = |to: &mut f64, from: Option<i64>| from.into_iter().for_each(|n| *to = n as f64);
            set(&mut rate.avg, avg);
            set(&mut rate.max, max);
            set(&mut rate.length, length);
            if length.is_some_and(|n| n > LENGTH_MAX) {
                let text = format!("{name}-max-length value must be in the range [0, {LENGTH_MAX}]");
                return Err(Error::invalid(text));
            }
        }
        if let Some(size) = self.iops_size {
            config.iops_size =
                u64::try_from(size).map_err(|_| Error::invalid("iops-size cannot be negative"))?;
        }
        config.check().map_err(Error::invalid)?;
        Ok(config)
    }

    /// All limits in force.
    pub fn of(config: &Config) -> ThrottleLimits {
        let number = |n: f64| Some(n as i64);
        let rate = |kind: Kind| config.rates[kind as usize];
        let (avg, max) = (|k| number(rate(k).avg), |k| number(rate(k).max));
        let length = |k| number(rate(k).length);
        ThrottleLimits {
            iops_total: avg(Kind::OpsTotal),
            iops_total_max: max(Kind::OpsTotal),
            iops_total_max_length: length(Kind::OpsTotal),
            iops_read: avg(Kind::OpsRead),
            iops_read_max: max(Kind::OpsRead),
            iops_read_max_length: length(Kind::OpsRead),
            iops_write: avg(Kind::OpsWrite),
            iops_write_max: max(Kind::OpsWrite),
            iops_write_max_length: length(Kind::OpsWrite),
            bps_total: avg(Kind::BpsTotal),
            bps_total_max: max(Kind::BpsTotal),
            bps_total_max_length: length(Kind::BpsTotal),
            bps_read: avg(Kind::BpsRead),
            bps_read_max: max(Kind::BpsRead),
            bps_read_max_length: length(Kind::BpsRead),
            bps_write: avg(Kind::BpsWrite),
            bps_write_max: max(Kind::BpsWrite),
            bps_write_max_length: length(Kind::BpsWrite),
            iops_size: i64::try_from(config.iops_size).ok(),
        }
    }
}

impl ThrottleGroupProperties {
    /// What the single properties say.
    fn single(&self) -> ThrottleLimits {
        ThrottleLimits {
            iops_total: self.x_iops_total,
            iops_total_max: self.x_iops_total_max,
            iops_total_max_length: self.x_iops_total_max_length,
            iops_read: self.x_iops_read,
            iops_read_max: self.x_iops_read_max,
            iops_read_max_length: self.x_iops_read_max_length,
            iops_write: self.x_iops_write,
            iops_write_max: self.x_iops_write_max,
            iops_write_max_length: self.x_iops_write_max_length,
            bps_total: self.x_bps_total,
            bps_total_max: self.x_bps_total_max,
            bps_total_max_length: self.x_bps_total_max_length,
            bps_read: self.x_bps_read,
            bps_read_max: self.x_bps_read_max,
            bps_read_max_length: self.x_bps_read_max_length,
            bps_write: self.x_bps_write,
            bps_write_max: self.x_bps_write_max,
            bps_write_max_length: self.x_bps_write_max_length,
            iops_size: self.x_iops_size,
        }
    }

    /// The limits of a new group.
    ///
    /// # Errors
    /// Those of [`ThrottleLimits::over`].
    pub fn config(&self) -> Result<Config, Error> {
        let single = self.single();
        for (name, _, values) in single.triples() {
            if values.into_iter().flatten().any(|n| n < 0) {
                return Err(Error::invalid("Property values cannot be negative"));
            }
            if values[2].is_some_and(|n| n > LENGTH_MAX) {
                let text = format!("x-{name}-max-length value must be in the range [0, {LENGTH_MAX}]");
                return Err(Error::invalid(text));
            }
        }
        // each part alone may look contradictory; what counts is the whole
        let all = self.limits.as_ref().map_or(single.clone(), |limits| single.or(limits));
        all.over(&Config::default())
    }
}

impl ThrottleLimits {
    /// What is given here, else what is given there.
    fn or(&self, other: &ThrottleLimits) -> ThrottleLimits {
        ThrottleLimits {
            iops_total: self.iops_total.or(other.iops_total),
            iops_total_max: self.iops_total_max.or(other.iops_total_max),
            iops_total_max_length: self.iops_total_max_length.or(other.iops_total_max_length),
            iops_read: self.iops_read.or(other.iops_read),
            iops_read_max: self.iops_read_max.or(other.iops_read_max),
            iops_read_max_length: self.iops_read_max_length.or(other.iops_read_max_length),
            iops_write: self.iops_write.or(other.iops_write),
            iops_write_max: self.iops_write_max.or(other.iops_write_max),
            iops_write_max_length: self.iops_write_max_length.or(other.iops_write_max_length),
            bps_total: self.bps_total.or(other.bps_total),
            bps_total_max: self.bps_total_max.or(other.bps_total_max),
            bps_total_max_length: self.bps_total_max_length.or(other.bps_total_max_length),
            bps_read: self.bps_read.or(other.bps_read),
            bps_read_max: self.bps_read_max.or(other.bps_read_max),
            bps_read_max_length: self.bps_read_max_length.or(other.bps_read_max_length),
            bps_write: self.bps_write.or(other.bps_write),
            bps_write_max: self.bps_write_max.or(other.bps_write_max),
            bps_write_max_length: self.bps_write_max_length.or(other.bps_write_max_length),
            iops_size: self.iops_size.or(other.iops_size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{Qapi, from_arg, from_json};
    use serde_json::json;

    /// Goal: both spellings mean the same; what is set over limits replaces only what it names. Method: read, convert, and
    /// write back.
    #[test]
    fn spellings() {
        let json = json!({"limits": {"iops-total": 100, "iops-total-max": 200, "iops-total-max-length": 3, "bps-read": 5}});
        let a: ThrottleGroupProperties = from_json(&json).unwrap();
        let text = "limits.iops-total=100,x-iops-total-max=200,x-iops-total-max-length=3,limits.bps-read=5";
        let b: ThrottleGroupProperties = from_arg(text, None).unwrap();
        assert_eq!(a.config().unwrap(), b.config().unwrap());
        let more =
            ThrottleLimits { iops_total_max: Some(0), iops_total_max_length: Some(1), ..Default::default() };
        let all = ThrottleLimits::of(&more.over(&a.config().unwrap()).unwrap()).write();
        assert_eq!(
            (&all["iops-total"], &all["iops-total-max"], &all["bps-read"]),
            (&100.into(), &0.into(), &5.into())
        );
        assert_eq!((&all["bps-write-max-length"], &all["iops-size"]), (&1.into(), &0.into()));
    }

    /// Goal: contradictions are found in the whole, not in its parts. Method: a burst whose rate stands elsewhere, and
    /// some that are wrong.
    #[test]
    fn contradictions() {
        let text = |arg: &str| {
            let p: ThrottleGroupProperties = from_arg(arg, None).unwrap();
            p.config().map(|_| ()).map_err(|e| e.message)
        };
        assert_eq!(text("limits.bps-total-max=10,x-bps-total=5"), Ok(()));
        let range = "bps/iops/max values must be within [0, 1000000000000000]";
        assert_eq!(text("limits.bps-total=-1"), Err(range.into()));
        assert_eq!(text("x-bps-total-max-length=0"), Err("the burst length cannot be 0".into()));
        assert_eq!(text("x-iops-size=512"), Err("iops size requires an iops value to be set".into()));
    }
}
