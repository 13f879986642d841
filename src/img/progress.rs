//! `-p`: how far a long command is, on one line.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::tool::out;

/// A progress line; silent unless asked for.
#[derive(Clone)]
pub(super) struct Progress {
    on: bool,
    total: u64,
    /// Hundredths of a percent that were shown last.
    shown: Arc<AtomicU64>,
}

impl Progress {
    /// A line for `total` bytes, at 0.
    pub(super) fn new(on: bool, total: u64) -> Progress {
        let progress = Progress { on, total, shown: Arc::default() };
        progress.show(0);
        progress
    }

    /// `done` bytes are dealt with. Printed when a whole percent has passed.
    pub(super) fn at(&self, done: u64) {
        let now = if self.total == 0 {
            10_000
        } else {
            (done.min(self.total) as u128 * 10_000 / self.total as u128) as u64
        };
        if now >= self.shown.load(Relaxed) + 100 {
            self.show(now);
        }
    }

    fn show(&self, hundredths: u64) {
        self.shown.store(hundredths, Relaxed);
        if self.on {
            out(&format!("    ({}.{:02}/100%)\r", hundredths / 100, hundredths % 100));
        }
    }

    /// It is done, or it failed: the line ends.
    pub(super) fn end(&self, ok: bool) {
        if ok {
            self.show(10_000);
        }
        self.newline();
    }

    /// Everything is done, unless that was said already.
    pub(super) fn full(&self) {
        if self.shown.load(Relaxed) < 10_000 {
            self.show(10_000);
        }
    }

    /// Ends the line.
    pub(super) fn newline(&self) {
        if self.on {
            out("\n");
        }
    }
}
