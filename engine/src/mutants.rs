//! Ordering mutants: named places where one barrier, quarantine, pin or rule can be left out, to show that the
//! adversaries notice (the proof that the proof can fail).
//!
//! Invariants: without the cargo feature `mutants` every place is a compile-time `false`; at most one mutant is alive on a
//! thread at a time; every name in [`MUTANTS`] stands at exactly one place in the code (a test of `ringblock-crash` reads
//! the sources), and a name that is not in the table does not compile.
//!
//! ```text
//!   crash mutants ─► with("limbo-tick", || hunt()) ─► simulator (one thread) ─► if !mutant!("limbo-tick") { tick().await }
//! ```

/// All mutants: the name, and what it leaves out.
pub const MUTANTS: &[(&str, &str)] = &[
    // the group commit
    ("data-file-flush", "rule 9: the data file's flush before the qcow2 file's"),
    ("counters-first", "rule 1: counters are written before the pointers that rely on them"),
    ("flush-before-pointers", "rules 1, 3, 4: data, counters and new tables are durable before L2 and L1"),
    ("flush-before-reftable", "rule 2: new refcount blocks are durable before the table that names them"),
    ("flush-after-reftable", "rule 2: the refcount table is durable before L2 entries that rely on it"),
    ("flush-after-pointers", "G1, rule 5: L2 and L1 are durable before the flush is acknowledged"),
    ("flush-own-group", "G1: a flush waits for a group that began after it, not for one on its way"),
    ("sticky-file-flush", "rule 10: after a failed flush of a file no flush of it succeeds any more"),
    ("failed-slices-dirty", "G1: slices whose write failed are written again"),
    ("failed-unlinks-wait", "rule 5: clusters of a group that failed stay in limbo"),
    ("close-flushes", "closing makes durable what was written in place"),
    // freed clusters
    ("limbo-durable", "I4: a cluster is free only when its unlink is durable"),
    ("limbo-tick", "I4: a cluster is free only when older transfers have ended"),
    ("discard-under-lock", "I4: a freed cluster is discarded before it can be handed out"),
    ("packing-ends", "rule 6: nothing is packed into a cluster that was freed"),
    // claims
    ("claims-wait", "I5: overlapping claims wait for each other"),
    ("punch-claims", "I5: zeroing and discarding claim their clusters"),
    ("in-place-copied", "I7: only clusters with COPIED are overwritten in place"),
    ("own-table", "I7: a shared L2 table is copied before it is changed"),
    ("new-table-content", "rule 3: a new L2 table is written before L1 names it"),
    ("copy-head", "rule 4: what precedes the guest's data in its cluster is copied"),
    ("copy-tail", "rule 4: what follows it is copied"),
    ("zero-fill", "G2: reused clusters are zeroed around the guest's data"),
    ("fresh-behind-end", "G2: only clusters behind the end of the file count as never used"),
    ("publish-after-data", "I2: an L2 entry is published after the data is written"),
    // the allocator and the counters
    ("reserve-counts", "rule 1: clusters are counted when they are reserved"),
    ("fresh-moves-on", "G2: clusters handed out once are not taken for never used again"),
    ("evicted-block", "rule 1: a changed refcount block is written before it leaves the cache"),
    ("grown-table-barrier", "rule 2: a larger refcount table is durable before the header names it"),
    (
        "grown-table-counters",
        "rule 2: the blocks that count a larger table are written before the header names it",
    ),
    ("grown-table-header", "rule 2: the header is durable before the old refcount table is free"),
    ("packed-counts", "rule 6: every packed cluster counts in the host clusters it touches"),
    // resizing
    ("moved-l1-barrier", "rule 3: a moved L1 table and its counters are durable before the header names it"),
    ("tail-cleared", "G2: what lies behind the old end of the disk is cleared before it can be seen"),
    ("below-hidden", "G2: a longer backing file does not show through behind the old end"),
    // opening
    ("bitmaps-in-use", "rule 8: bitmaps are marked as in use before the first write"),
    ("bitmaps-in-use-barrier", "rule 8: durably so"),
    ("autoclear-first", "unknown autoclear bits are cleared before the first write"),
    ("dirty-repaired", "rule 7: a dirty image is repaired before it is written"),
    // repair
    (
        "rebuild-behind-references",
        "rule 7: new structures lie behind the highest reference, not the end of the file",
    ),
    ("rebuild-barrier", "rule 2: rebuilt counters are durable before the header names them"),
    ("repair-barrier", "rule 7: counters are right, durably, before the dirty bit goes"),
    // the engine
    ("pin-reads", "I3: a read keeps its clusters from being reused"),
    ("pin-writes", "I3: a write in place keeps its clusters from being reused"),
    ("fua-flushes", "G1: a write with FUA is durable when it ends"),
    ("serial-tick", "a read-modify-write waits for the transfers already on their way"),
    ("serial-wait", "a transfer waits for a read-modify-write of its blocks"),
    ("rmw-read-error", "a read-modify-write that cannot read fails"),
    ("drain-waits", "a drain waits for the requests in flight"),
];

/// The number of a mutant; a name that is not in the table does not compile.
#[doc(hidden)]
pub const fn index(name: &str) -> usize {
    let mut i = 0;
    while i < MUTANTS.len() {
        if same(MUTANTS[i].0.as_bytes(), name.as_bytes()) {
            return i;
        }
        i += 1;
    }
    panic!("no such mutant");
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

/// Whether the mutant of this name is alive on this thread: `false`, known at compile time, without the feature.
#[macro_export]
macro_rules! mutant {
    ($name:literal) => {
        $crate::mutants::is_alive(const { $crate::mutants::index($name) })
    };
}

#[cfg(not(feature = "mutants"))]
#[doc(hidden)]
#[inline(always)]
pub const fn is_alive(_index: usize) -> bool {
    false
}

#[cfg(feature = "mutants")]
pub use alive::{is_alive, with};

#[cfg(feature = "mutants")]
mod alive {
    use super::{MUTANTS, index};
    use std::cell::Cell;

    thread_local!(static ALIVE: Cell<usize> = const { Cell::new(usize::MAX) });

    #[doc(hidden)]
    #[inline]
    pub fn is_alive(index: usize) -> bool {
        ALIVE.get() == index
    }

    /// Runs `f` with a mutant alive on this thread; `None` is the code as it should be. Panics on an unknown name.
    pub fn with<T>(name: Option<&str>, f: impl FnOnce() -> T) -> T {
        struct Back(usize);
        impl Drop for Back {
            fn drop(&mut self) {
                ALIVE.set(self.0);
            }
        }
        let number = name.map_or(usize::MAX, index);
        debug_assert!(name.is_none() || number < MUTANTS.len());
        let _back = Back(ALIVE.replace(number));
        f()
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        /// Goal: a mutant lives inside `with` only, and alone. Method: nested, and looked at on the way.
        #[test]
        fn lives_inside_only() {
            assert!(!crate::mutant!("limbo-tick"));
            with(Some("limbo-tick"), || {
                assert!(crate::mutant!("limbo-tick") && !crate::mutant!("limbo-durable"));
                with(None, || assert!(!crate::mutant!("limbo-tick")));
                assert!(crate::mutant!("limbo-tick"));
            });
            assert!(!crate::mutant!("limbo-tick"));
        }
    }
}
