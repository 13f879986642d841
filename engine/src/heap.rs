//! A heap that counts: what tests and benches use to show that a path allocates nothing, and fuzzing to bound memory.
//!
//! ```text
//!   #[global_allocator] static HEAP: Counting = Counting;     allocate ─► system, and the counters
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// The system's allocator, with every allocation counted.
pub struct Counting;

thread_local! {
    static OF_THREAD: Cell<u64> = const { Cell::new(0) };
    /// Bytes allocated less bytes given back, of this thread: what another gave back counts there.
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}
static OF_ALL: AtomicU64 = AtomicU64::new(0);

impl Counting {
    /// Allocations of the calling thread so far.
    pub fn of_thread() -> u64 {
        OF_THREAD.with(Cell::get)
    }

    /// Allocations of all threads so far.
    pub fn of_all() -> u64 {
        OF_ALL.load(Ordering::Relaxed)
    }

    /// Runs something; its value, and the most bytes that this thread had meanwhile beyond what it had before.
    pub fn peak_of<T>(run: impl FnOnce() -> T) -> (T, u64) {
        let before = LIVE.with(Cell::get);
        PEAK.with(|p| p.set(before));
        let value = run();
        (value, PEAK.with(Cell::get).saturating_sub(before).max(0) as u64)
    }
}

fn count() {
    OF_THREAD.with(|c| c.set(c.get() + 1));
    OF_ALL.fetch_add(1, Ordering::Relaxed);
}

fn change(bytes: i64) {
    let live = LIVE.with(|l| {
        l.set(l.get() + bytes);
        l.get()
    });
    PEAK.with(|p| p.set(p.get().max(live)));
}

// SAFETY: passes everything on to the system's allocator; the counters are an atomic and thread-locals without a
// destructor, so counting neither allocates nor outlives its thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        change(layout.size() as i64);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        change(layout.size() as i64);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        change(new_size as i64 - layout.size() as i64);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        change(-(layout.size() as i64));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}
