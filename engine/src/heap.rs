//! A heap that counts: what tests and benches use to show that a path allocates nothing.
//!
//! ```text
//!   #[global_allocator] static HEAP: Counting = Counting;     allocate ─► system, and two counters
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// The system's allocator, with every allocation counted.
pub struct Counting;

thread_local! {
    static OF_THREAD: Cell<u64> = const { Cell::new(0) };
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
}

// SAFETY: passes everything on to the system's allocator; the counters are an atomic and a thread-local without a
// destructor, so counting neither allocates nor outlives its thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        OF_THREAD.with(|c| c.set(c.get() + 1));
        OF_ALL.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}
