//! Memory for I/O: aligned buffers, from a pool per core that is registered with the core's ring.
//!
//! A [`Buf`] is a uniquely owned, 4096-aligned piece of memory. It is plain `&[u8]` to its owner; while the kernel works
//! on it, it lives in the operation's slab entry and nobody has it (see [`crate::ring`]). Its content is always
//! initialised memory, but not always zero: whoever reads into it writes all of it.
//!
//! Invariants: a piece of an arena has exactly one `Buf`; the arena outlives its pieces (`Arc`); a piece goes back to the
//! core it came from, directly or through the arena's return queue.
//!
//! ```text
//!   Buf::new(len) ── fits a class and the pool has room ──► arena piece (registered, ReadFixed/WriteFixed)
//!                 └─ otherwise ──────────────────────────► heap; large pieces recycled by the core, bounded
//! ```

use std::alloc::{self, Layout};
use std::cell::RefCell;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

/// Alignment of every buffer, in bytes: enough for O_DIRECT on any device we know.
pub const ALIGN: usize = 4096;
/// Smallest and largest arena piece, as powers of two: 4 KiB to 256 KiB.
const CLASS_MIN: u32 = 12;
const CLASSES: usize = 7;

/// Heap pieces above the largest arena class are mapped one by one (so that memory nobody has touched costs nothing,
/// whatever a client announces) and kept for reuse up to this many bytes a core.
const SPARE_BYTES: usize = 8 << 20;
/// Sizes that are kept, as powers of two: up to 8 MiB.
const SPARE_CLASSES: usize = 24;

/// One core's registered memory.
pub(crate) struct Arena {
    base: NonNull<u8>,
    size: usize,
    /// Pieces dropped on other threads: (offset, class), bounded by the number of pieces that can exist.
    returned: ArrayQueue<(u32, u8)>,
}

// SAFETY: the arena itself is an address range; access to the bytes is through `Buf`, which owns its piece uniquely.
unsafe impl Send for Arena {}
// SAFETY: as above; `returned` is a concurrent queue.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `size` bytes (rounded up to 256 KiB). The pages are touched first when they are used or registered.
    pub(crate) fn new(size: usize) -> Option<Arc<Arena>> {
        let size = size.next_multiple_of(ALIGN << (CLASSES - 1));
        let layout = Layout::from_size_align(size, ALIGN).ok().filter(|l| l.size() > 0)?;
        // SAFETY: the layout's size is not zero.
        let base = NonNull::new(unsafe { alloc::alloc_zeroed(layout) })?;
        Some(Arc::new(Arena { base, size, returned: ArrayQueue::new(size / ALIGN) }))
    }

    /// Start and length, for registering with a ring.
    pub(crate) fn range(&self) -> (*mut u8, usize) {
        (self.base.as_ptr(), self.size)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let layout = Layout::from_size_align(self.size, ALIGN).expect("the layout it was made with");
        // SAFETY: allocated in `new` with this layout; no `Buf` is left, each holds an `Arc` of the arena.
        unsafe { alloc::dealloc(self.base.as_ptr(), layout) }
    }
}

/// The pool of the current thread: free pieces by class.
struct Pool {
    arena: Arc<Arena>,
    free: [Vec<u32>; CLASSES],
    bump: usize,
    spare: Spare,
}

/// Mapped pieces that were dropped, by the power of two of their size.
#[derive(Default)]
struct Spare {
    free: [Vec<NonNull<u8>>; SPARE_CLASSES],
    bytes: usize,
}

impl Spare {
    fn take(&mut self, cap: usize) -> Option<NonNull<u8>> {
        let ptr = self.free.get_mut(cap.trailing_zeros() as usize)?.pop()?;
        self.bytes -= cap;
        Some(ptr)
    }

    /// False if there is no room for it.
    fn give(&mut self, ptr: NonNull<u8>, cap: usize) -> bool {
        let Some(free) = self.free.get_mut(cap.trailing_zeros() as usize) else { return false };
        if self.bytes + cap > SPARE_BYTES {
            return false;
        }
        self.bytes += cap;
        free.push(ptr);
        true
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        for (class, free) in self.free.iter().enumerate() {
            free.iter().for_each(|&ptr| unmap(ptr, 1 << class));
        }
    }
}

/// Fresh zeroed pages, not touched yet.
fn map(cap: usize) -> NonNull<u8> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
    let ptr = unsafe { libc::mmap(std::ptr::null_mut(), cap, prot, flags, -1, 0) };
    match NonNull::new(ptr.cast::<u8>()) {
        Some(ptr) if ptr.as_ptr().cast() != libc::MAP_FAILED => ptr,
        _ => alloc::handle_alloc_error(Layout::from_size_align(cap, ALIGN).unwrap_or(Layout::new::<u8>())),
    }
}

fn unmap(ptr: NonNull<u8>, cap: usize) {
    // SAFETY: callers pass a whole mapping made by `map` with this size, which nobody else has.
    unsafe { libc::munmap(ptr.as_ptr().cast(), cap) };
}

thread_local! {
    static POOL: RefCell<Option<Pool>> = const { RefCell::new(None) };
}

/// Gives the current thread a pool on `arena`; `None` takes it away.
pub(crate) fn set_pool(arena: Option<Arc<Arena>>) {
    POOL.set(arena.map(|arena| Pool { arena, free: Default::default(), bump: 0, spare: Spare::default() }));
}

impl Pool {
    fn take(&mut self, class: usize) -> Option<u32> {
        if let Some(off) = self.free[class].pop() {
            return Some(off);
        }
        while let Some((off, class)) = self.arena.returned.pop() {
            self.free[class as usize].push(off);
        }
        if let Some(off) = self.free[class].pop() {
            return Some(off);
        }
        let size = 1usize << (CLASS_MIN as usize + class);
        let at = self.bump.next_multiple_of(size);
        if at + size > self.arena.size {
            return self.split(class);
        }
        // what the rounding skipped becomes 4 KiB pieces
        let mut skipped = self.bump;
        while skipped < at {
            self.free[0].push(skipped as u32);
            skipped += ALIGN;
        }
        self.bump = at + size;
        Some(at as u32)
    }

    /// Splits a larger free piece.
    fn split(&mut self, class: usize) -> Option<u32> {
        let from = (class + 1..CLASSES).find(|&c| !self.free[c].is_empty())?;
        let off = self.free[from].pop()?;
        for c in class..from {
            self.free[c].push(off + (1u32 << (CLASS_MIN as usize + c)));
        }
        Some(off)
    }
}

enum Home {
    Heap,
    Mapped,
    Arena(Arc<Arena>, u8),
}

/// A uniquely owned, aligned buffer of `len` bytes.
pub struct Buf {
    ptr: NonNull<u8>,
    len: usize,
    cap: usize,
    home: Home,
}

// SAFETY: a `Buf` owns its memory uniquely, as a `Vec<u8>` does.
unsafe impl Send for Buf {}
// SAFETY: shared access is read-only.
unsafe impl Sync for Buf {}

impl Buf {
    /// A buffer of `len` bytes with unspecified content, from the core's pool where it has room.
    pub fn new(len: usize) -> Buf {
        let bits = len.max(1).next_power_of_two().trailing_zeros().max(CLASS_MIN);
        let class = (bits - CLASS_MIN) as usize;
        if class < CLASSES {
            let piece = POOL.with_borrow_mut(|pool| {
                let pool = pool.as_mut()?;
                pool.take(class).map(|off| (off, pool.arena.clone()))
            });
            if let Some((off, arena)) = piece {
                // SAFETY: `off` is inside the arena (see `take`), so the sum stays in its allocation.
                let ptr = unsafe { arena.base.add(off as usize) };
                return Buf { ptr, len, cap: 1 << bits, home: Home::Arena(arena, class as u8) };
            }
        }
        if class < CLASSES { Buf::heap(len) } else { Buf::mapped(len) }
    }

    /// A zeroed buffer.
    pub fn zeroed(len: usize) -> Buf {
        let mut buf = Buf::new(len);
        if !matches!(buf.home, Home::Heap) {
            buf.fill(0);
        }
        buf
    }

    /// A buffer with this content.
    pub fn from_slice(data: &[u8]) -> Buf {
        let mut buf = Buf::new(data.len());
        buf.copy_from_slice(data);
        buf
    }

    fn mapped(len: usize) -> Buf {
        let cap = len.next_power_of_two();
        let spare = POOL.with_borrow_mut(|p| p.as_mut()?.spare.take(cap));
        Buf { ptr: spare.unwrap_or_else(|| map(cap)), len, cap, home: Home::Mapped }
    }

    fn heap(len: usize) -> Buf {
        let cap = len.max(1).next_multiple_of(ALIGN);
        let layout = Layout::from_size_align(cap, ALIGN).expect("lengths are bounded far below isize::MAX");
        // SAFETY: `cap` is at least ALIGN.
        let ptr = unsafe { alloc::alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { alloc::handle_alloc_error(layout) };
        Buf { ptr, len, cap, home: Home::Heap }
    }

    /// Bytes it can hold without another allocation.
    pub fn capacity(&self) -> usize {
        self.cap
    }

    /// Changes the length, up to the capacity. Bytes that come into view are initialised, with unspecified content.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.cap, "buffer of {} bytes set to {len}", self.cap);
        self.len = len;
    }

    /// Whether all bytes are zero.
    pub fn is_zero(&self) -> bool {
        is_zero(self)
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Whether this piece is in the arena registered with the current thread's ring.
    pub(crate) fn is_registered(&self) -> bool {
        match &self.home {
            Home::Heap | Home::Mapped => false,
            Home::Arena(arena, _) => {
                POOL.with_borrow(|p| p.as_ref().is_some_and(|p| Arc::ptr_eq(&p.arena, arena)))
            }
        }
    }
}

/// Whether all bytes are zero; compares 16 bytes at a time.
pub fn is_zero(data: &[u8]) -> bool {
    // SAFETY: every bit pattern is a valid u128.
    let (head, middle, tail) = unsafe { data.align_to::<u128>() };
    head.iter().all(|&b| b == 0) && middle.iter().all(|&w| w == 0) && tail.iter().all(|&b| b == 0)
}

impl std::ops::Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr..ptr+len` is initialised memory owned by this buffer; the kernel has it only while the buffer is
        // inside a slab entry, where nobody can call this.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `&mut self` is unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        match &self.home {
            Home::Heap => {
                let layout = Layout::from_size_align(self.cap, ALIGN).expect("the layout it was made with");
                // SAFETY: allocated in `heap` with this layout, and owned uniquely.
                unsafe { alloc::dealloc(self.ptr.as_ptr(), layout) }
            }
            Home::Mapped => {
                let (ptr, cap) = (self.ptr, self.cap);
                let kept = POOL.try_with(|p| p.borrow_mut().as_mut().is_some_and(|p| p.spare.give(ptr, cap)));
                if kept != Ok(true) {
                    unmap(ptr, cap);
                }
            }
            Home::Arena(arena, class) => {
                let off = (self.ptr.as_ptr() as usize - arena.base.as_ptr() as usize) as u32;
                let local = POOL.try_with(|p| match p.borrow_mut().as_mut() {
                    Some(p) if Arc::ptr_eq(&p.arena, arena) => {
                        p.free[*class as usize].push(off);
                        true
                    }
                    _ => false,
                });
                if local != Ok(true) {
                    // never full: it has a place for every piece of the arena
                    let _ = arena.returned.push((off, *class));
                }
            }
        }
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: pieces never overlap and all come back. Method: fill an arena with mixed sizes, write a stamp into each,
    /// check the stamps, drop half on another thread, and fill it again.
    #[test]
    fn arena_pieces_are_disjoint_and_return() {
        let arena = Arena::new(1 << 20).unwrap();
        set_pool(Some(arena.clone()));
        for round in 0..3u8 {
            let mut bufs = Vec::new();
            for i in 0..300usize {
                let mut b = Buf::new([512, 4096, 20_000, 65_536][i % 4]);
                b.fill(i as u8 ^ round);
                bufs.push((i, b));
            }
            let in_arena = bufs.iter().filter(|(_, b)| b.is_registered()).count();
            assert!(in_arena > 20, "{in_arena} pieces from the arena in round {round}");
            for (i, b) in &bufs {
                assert!(b.iter().all(|&x| x == *i as u8 ^ round));
                assert_eq!(b.as_ptr() as usize % ALIGN, 0);
            }
            let half = bufs.split_off(150);
            std::thread::spawn(move || drop(half)).join().unwrap();
        }
        set_pool(None);
        assert_eq!(Arc::strong_count(&arena), 1);
    }

    /// Goal: large pieces are recycled, within the bound, and a zeroed one is zero all the same. Method: stamp, drop
    /// and take again; drop more than may be kept; drop without a pool.
    #[test]
    fn large_pieces_are_recycled() {
        set_pool(Arena::new(1 << 20));
        let mut b = Buf::new((1 << 20) - 7);
        b.fill(7);
        let at = b.as_ptr();
        drop(b);
        let b = Buf::zeroed(600_000);
        assert!(b.as_ptr() == at && b.is_zero() && b.capacity() == 1 << 20);
        drop((b, (0..20).map(|_| Buf::new(1 << 20)).collect::<Vec<_>>(), Buf::new(100 << 20)));
        POOL.with_borrow(|p| assert_eq!(p.as_ref().map(|p| p.spare.bytes), Some(SPARE_BYTES)));
        let last = Buf::new(3 << 20);
        set_pool(None);
        drop(last);
        assert!(Buf::new(5 << 20).is_zero());
    }

    /// Goal: the zero test sees every byte. Method: one non-zero byte at each position of an unaligned slice.
    #[test]
    fn zero_test_sees_every_byte() {
        let mut b = Buf::zeroed(100);
        assert!(b.is_zero());
        for i in 1..100 {
            b[i] = 1;
            assert!(!is_zero(&b[1..]));
            b[i] = 0;
        }
    }
}
