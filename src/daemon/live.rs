//! The live line of a server on a terminal: rate and latency of the last second.
//!
//! Counters are per root and only ever grow; the line shows the difference to a second ago.

use super::Daemon;
use ringblock_engine::path::{OpClass, RootId, Snapshot};
use std::collections::HashMap;
use std::io::Write;
use std::time::Instant;

const CLASSES: [OpClass; 4] = [OpClass::Read, OpClass::Write, OpClass::Flush, OpClass::Unmap];

/// What was shown last.
#[derive(Default)]
pub(super) struct Live {
    before: HashMap<RootId, Snapshot>,
    at: Option<Instant>,
    shown: bool,
}

/// The last second.
#[derive(Default)]
struct Delta {
    ops: u64,
    bytes: u64,
    failed: u64,
    p50: u64,
    p99: u64,
}

impl Live {
    /// Writes the line.
    pub(super) fn tick(&mut self, daemon: &Daemon) {
        let Ok(storage) = daemon.storage() else { return };
        let roots = storage.info().roots;
        let seconds = self.at.replace(Instant::now()).map_or(1.0, |t| t.elapsed().as_secs_f64()).max(0.001);
        let now: HashMap<_, _> = roots.iter().map(|r| (r.root.id(), storage.stats(r.root))).collect();
        let delta = self.delta(&now);
        self.before = now;
        let mut line = format!(
            "{:>9.0} IOPS {:>9.1} MB/s   p50 {:>8}   p99 {:>8}",
            delta.ops as f64 / seconds,
            delta.bytes as f64 / seconds / 1e6,
            time(delta.p50),
            time(delta.p99),
        );
        if delta.failed > 0 {
            line += &format!("   {} failed", delta.failed);
        }
        self.shown = true;
        // A terminal that is gone is none of our business.
        let mut out = std::io::stdout().lock();
        let _ = write!(out, "\r{line}\x1b[K");
        let _ = out.flush();
    }

    /// Leaves the line behind.
    pub(super) fn end(&self) {
        if self.shown {
            println!();
        }
        println!("Stopping.");
    }

    fn delta(&self, now: &HashMap<RootId, Snapshot>) -> Delta {
        let mut d = Delta::default();
        let mut latency = None;
        for (id, snapshot) in now {
            for class in CLASSES {
                let new = snapshot.get(class);
                let mut fresh = new.latency.clone();
                let (mut ops, mut bytes, mut failed) = (new.ops, new.bytes, new.failed);
                if let Some(old) = self.before.get(id).map(|s| s.get(class)) {
                    // Bounds are the same, and counters of a root only grow; a reused number starts again.
                    let _ = fresh.subtract(&old.latency);
                    ops = ops.saturating_sub(old.ops);
                    bytes = bytes.saturating_sub(old.bytes);
                    failed = failed.saturating_sub(old.failed);
                }
                (d.ops, d.bytes, d.failed) = (d.ops + ops, d.bytes + bytes, d.failed + failed);
                match &mut latency {
                    None => latency = Some(fresh),
                    Some(all) => {
                        let _ = all.add(&fresh);
                    }
                }
            }
        }
        if let Some(all) = latency {
            (d.p50, d.p99) = (all.value_at_quantile(0.5), all.value_at_quantile(0.99));
        }
        d
    }
}

/// Nanoseconds for people.
fn time(ns: u64) -> String {
    match ns {
        0 => "-".into(),
        1..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.1} s", ns as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: three digits at most before the unit changes. Method: the edges.
    #[test]
    fn times() {
        assert_eq!(time(0), "-");
        assert_eq!(time(999), "999 ns");
        assert_eq!(time(1_500), "1.5 us");
        assert_eq!(time(2_340_000), "2.3 ms");
        assert_eq!(time(12_000_000_000), "12.0 s");
    }
}
