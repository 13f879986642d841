//! The executor of a core: tasks that never leave it, woken by plain integers.
//!
//! A waker is a packed number (core slot, task index, generation): cloning and dropping it costs nothing and it owns
//! nothing, so it can outlive its task without harm: a stale generation is ignored. Woken on its own core it is one push
//! to the run queue; woken elsewhere it is a message to the core's inbox.
//!
//! A task's memory is recycled by size, so that spawning a request per NBD command allocates nothing in steady state.
//!
//! ```text
//!   spawn ─► slab[index] = (generation, future) ─► run queue ─► poll ─┬─ Ready: memory to the free list, generation + 1
//!                                                       ▲             └─ Pending: waits for its waker
//!                                                       └──── wake ◄── (slot | index | generation)
//! ```
//!
//! Invariants: a task is in the run queue at most once (`queued`); it is polled only on its core; its future is dropped
//! before its memory is reused.

use std::alloc::{self, Layout};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};

use crate::core::Core;
use crate::inbox::{CoreShared, Msg};

const SLOT_BITS: u32 = 10;
const INDEX_BITS: u32 = 22;
/// Tasks a core can hold.
pub(crate) const TASKS_MAX: usize = 1 << INDEX_BITS;

/// Process-wide table of cores, so that a waker is only a number. Slots are reused.
static SLOTS: Mutex<Vec<Option<Arc<CoreShared>>>> = Mutex::new(Vec::new());

pub(crate) fn claim_slot(shared: Arc<CoreShared>) -> Option<u16> {
    let mut slots = SLOTS.lock().unwrap_or_else(|e| e.into_inner());
    let at = slots.iter().position(Option::is_none).unwrap_or(slots.len());
    if at >= 1 << SLOT_BITS {
        return None;
    }
    if at == slots.len() {
        slots.push(None);
    }
    slots[at] = Some(shared);
    Some(at as u16)
}

pub(crate) fn release_slot(slot: u16) {
    SLOTS.lock().unwrap_or_else(|e| e.into_inner())[slot as usize] = None;
}

fn pack(slot: u16, index: usize, generation: u32) -> usize {
    (u64::from(slot) | (index as u64) << SLOT_BITS | u64::from(generation) << (SLOT_BITS + INDEX_BITS))
        as usize
}

static VTABLE: RawWakerVTable =
    RawWakerVTable::new(|data| RawWaker::new(data, &VTABLE), wake_packed, wake_packed, |_| {});

fn waker(packed: usize) -> Waker {
    // SAFETY: the vtable's functions treat the data as a number and never as an address; all are thread-safe.
    unsafe { Waker::from_raw(RawWaker::new(std::ptr::without_provenance(packed), &VTABLE)) }
}

fn wake_packed(data: *const ()) {
    let packed = data.addr();
    let slot = packed & ((1 << SLOT_BITS) - 1);
    let local = Core::try_with_current(|core| core.slot as usize == slot && core.exec.enqueue(packed))
        .unwrap_or(false);
    if local {
        return;
    }
    let target = SLOTS.lock().unwrap_or_else(|e| e.into_inner()).get(slot).cloned().flatten();
    if let Some(target) = target {
        Core::send_from_anywhere(&target, Msg::Wake(packed as u64));
    }
}

struct VTable {
    poll: unsafe fn(NonNull<u8>, &mut Context<'_>) -> Poll<()>,
    drop: unsafe fn(NonNull<u8>),
    layout: Layout,
}

unsafe fn poll_raw<F: Future<Output = ()>>(ptr: NonNull<u8>, cx: &mut Context<'_>) -> Poll<()> {
    // SAFETY: the caller passes a live, pinned-in-place F (see `RawTask`).
    unsafe { Pin::new_unchecked(ptr.cast::<F>().as_mut()).poll(cx) }
}

unsafe fn drop_raw<F>(ptr: NonNull<u8>) {
    // SAFETY: the caller passes a live F and never uses it again.
    unsafe { ptr.cast::<F>().drop_in_place() }
}

trait HasVTable {
    const VTABLE: VTable;
}

impl<F: Future<Output = ()>> HasVTable for F {
    const VTABLE: VTable = VTable { poll: poll_raw::<F>, drop: drop_raw::<F>, layout: Memory::layout::<F>() };
}

/// A future in recycled memory. It is never moved from `spawn` to its drop.
struct RawTask {
    ptr: NonNull<u8>,
    vtable: &'static VTable,
}

/// Free task memory by size class of 64 bytes; larger tasks are not recycled.
#[derive(Default)]
struct Memory {
    free: Vec<Vec<NonNull<u8>>>,
}

const CLASS: usize = 64;
const CLASSES: usize = 128;
/// Free pieces kept per class.
const KEEP: usize = 1024;

impl Memory {
    const fn layout<F>() -> Layout {
        let size = size_of::<F>().next_multiple_of(CLASS);
        let size = if size == 0 { CLASS } else { size };
        let align = if align_of::<F>() > CLASS { align_of::<F>() } else { CLASS };
        match Layout::from_size_align(size, align) {
            Ok(l) => l,
            Err(_) => panic!("a future larger than the address space"),
        }
    }

    fn take(&mut self, layout: Layout) -> NonNull<u8> {
        let class = layout.size() / CLASS;
        if layout.align() == CLASS
            && let Some(ptr) = self.free.get_mut(class).and_then(Vec::pop)
        {
            return ptr;
        }
        // SAFETY: the layout's size is at least CLASS.
        let ptr = unsafe { alloc::alloc(layout) };
        NonNull::new(ptr).unwrap_or_else(|| alloc::handle_alloc_error(layout))
    }

    fn give(&mut self, ptr: NonNull<u8>, layout: Layout) {
        let class = layout.size() / CLASS;
        if layout.align() == CLASS && class < CLASSES {
            if self.free.len() <= class {
                self.free.resize_with(class + 1, Vec::new);
            }
            if self.free[class].len() < KEEP {
                self.free[class].push(ptr);
                return;
            }
        }
        // SAFETY: allocated in `take` with this layout, and free.
        unsafe { alloc::dealloc(ptr.as_ptr(), layout) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (class, list) in self.free.iter().enumerate() {
            for ptr in list {
                let layout =
                    Layout::from_size_align(class * CLASS, CLASS).expect("a class has a valid layout");
                // SAFETY: allocated in `take` with this layout, and free.
                unsafe { alloc::dealloc(ptr.as_ptr(), layout) }
            }
        }
    }
}

#[derive(Default)]
struct Place {
    generation: u32,
    queued: bool,
    /// Taken out while it is polled.
    task: Option<RawTask>,
}

/// A core's tasks and run queue.
pub(crate) struct Exec {
    slot: u16,
    places: RefCell<Vec<Place>>,
    free: RefCell<Vec<u32>>,
    run: RefCell<VecDeque<u32>>,
    memory: RefCell<Memory>,
    live: Cell<usize>,
    closing: Cell<bool>,
}

impl Exec {
    pub(crate) fn new(slot: u16) -> Exec {
        Exec {
            slot,
            places: RefCell::default(),
            free: RefCell::default(),
            run: RefCell::new(VecDeque::with_capacity(1024)),
            memory: RefCell::default(),
            live: Cell::new(0),
            closing: Cell::new(false),
        }
    }

    /// Adds a task; it runs in this turn or the next. During teardown the future is dropped instead.
    pub(crate) fn spawn<F: Future<Output = ()> + 'static>(&self, future: F) {
        if self.closing.get() || self.live.get() >= TASKS_MAX {
            return;
        }
        let layout = <F as HasVTable>::VTABLE.layout;
        let ptr = self.memory.borrow_mut().take(layout);
        // SAFETY: fresh memory of F's size and alignment.
        unsafe { ptr.cast::<F>().write(future) };
        let task = RawTask { ptr, vtable: &<F as HasVTable>::VTABLE };
        let mut places = self.places.borrow_mut();
        let index = self.free.borrow_mut().pop().unwrap_or_else(|| {
            places.push(Place::default());
            places.len() as u32 - 1
        });
        let place = &mut places[index as usize];
        place.task = Some(task);
        place.queued = true;
        self.run.borrow_mut().push_back(index);
        self.live.set(self.live.get() + 1);
    }

    /// Puts a woken task into the run queue, if it still is the one that was meant.
    pub(crate) fn enqueue(&self, packed: usize) -> bool {
        let packed = packed as u64;
        let index = (packed >> SLOT_BITS) as usize & (TASKS_MAX - 1);
        let generation = (packed >> (SLOT_BITS + INDEX_BITS)) as u32;
        let mut places = self.places.borrow_mut();
        if let Some(place) = places.get_mut(index)
            && place.generation == generation
            && !place.queued
        {
            place.queued = true;
            self.run.borrow_mut().push_back(index as u32);
        }
        true
    }

    pub(crate) fn has_work(&self) -> bool {
        !self.run.borrow().is_empty()
    }

    /// Rotates the run queue, for the simulator's choice of the next task.
    pub(crate) fn rotate(&self, by: usize) {
        let mut run = self.run.borrow_mut();
        if !run.is_empty() {
            let by = by % run.len();
            run.rotate_left(by);
        }
    }

    /// Polls one ready task. False if there was none.
    pub(crate) fn run_one(&self) -> bool {
        let Some(index) = self.run.borrow_mut().pop_front() else {
            return false;
        };
        let (task, packed) = {
            let mut places = self.places.borrow_mut();
            let place = &mut places[index as usize];
            place.queued = false;
            (place.task.take(), pack(self.slot, index as usize, place.generation))
        };
        let Some(task) = task else { return true };
        let waker = waker(packed);
        // SAFETY: the task is live, taken out of its place so that nobody else polls or drops it meanwhile.
        let done = unsafe { (task.vtable.poll)(task.ptr, &mut Context::from_waker(&waker)) }.is_ready();
        if done {
            self.retire(index, task);
        } else {
            self.places.borrow_mut()[index as usize].task = Some(task);
        }
        true
    }

    fn retire(&self, index: u32, task: RawTask) {
        // SAFETY: live, and in nobody else's hands.
        unsafe { (task.vtable.drop)(task.ptr) };
        self.memory.borrow_mut().give(task.ptr, task.vtable.layout);
        let mut places = self.places.borrow_mut();
        let place = &mut places[index as usize];
        place.generation = place.generation.wrapping_add(1);
        self.free.borrow_mut().push(index);
        self.live.set(self.live.get() - 1);
    }

    /// Drops all tasks, for teardown: their operations become orphans of the ring.
    pub(crate) fn clear(&self) {
        self.closing.set(true);
        loop {
            let next = {
                let mut places = self.places.borrow_mut();
                let at = places.iter().position(|p| p.task.is_some());
                at.and_then(|i| places[i].task.take().map(|t| (i as u32, t)))
            };
            let Some((index, task)) = next else { break };
            self.retire(index, task);
        }
        self.run.borrow_mut().clear();
    }
}
