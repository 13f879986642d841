//! Accounting of a root on a core: counters and a latency histogram per kind of request, merged when asked for.

use hdrhistogram::Histogram;

/// Kinds of requests that are counted apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpClass {
    /// Reads.
    Read = 0,
    /// Writes.
    Write = 1,
    /// Flushes.
    Flush = 2,
    /// Discards and write-zeroes.
    Unmap = 3,
}

impl OpClass {
    /// How many there are.
    pub const COUNT: usize = 4;
}

/// Latencies above this are counted as this: ten minutes, in ns.
const LONGEST: u64 = 600_000_000_000;

/// Counters of one kind of request.
#[derive(Clone, Debug)]
pub struct OpStats {
    /// Requests completed without error.
    pub ops: u64,
    /// Bytes of those.
    pub bytes: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Sum of the latencies of completed requests in ns.
    pub total_ns: u64,
    /// Latencies in ns from admission to completion, two significant digits.
    pub latency: Histogram<u32>,
}

impl Default for OpStats {
    fn default() -> OpStats {
        let latency = Histogram::new_with_bounds(128, LONGEST, 2).expect("constant bounds are valid");
        OpStats { ops: 0, bytes: 0, failed: 0, total_ns: 0, latency }
    }
}

impl OpStats {
    pub(crate) fn record(&mut self, bytes: u64, ns: u64, ok: bool) {
        if !ok {
            self.failed += 1;
            return;
        }
        self.ops += 1;
        self.bytes += bytes;
        self.total_ns += ns;
        self.latency.saturating_record(ns);
    }

    fn add(&mut self, other: &OpStats) {
        self.ops += other.ops;
        self.bytes += other.bytes;
        self.failed += other.failed;
        self.total_ns += other.total_ns;
        // the bounds are the same constants
        let _ = self.latency.add(&other.latency);
    }
}

/// The counters of a root, of one core or of all.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    ops: [OpStats; OpClass::COUNT],
    highest_write: u64,
}

impl Snapshot {
    pub(crate) fn of(ops: &[OpStats; OpClass::COUNT], highest_write: u64) -> Snapshot {
        Snapshot { ops: ops.clone(), highest_write }
    }

    /// Where the highest write that succeeded ended, in bytes.
    pub fn highest_write(&self) -> u64 {
        self.highest_write
    }

    /// The counters of one kind.
    pub fn get(&self, class: OpClass) -> &OpStats {
        &self.ops[class as usize]
    }

    pub(crate) fn add(&mut self, other: &Snapshot) {
        for (a, b) in self.ops.iter_mut().zip(&other.ops) {
            a.add(b);
        }
        self.highest_write = self.highest_write.max(other.highest_write);
    }
}
