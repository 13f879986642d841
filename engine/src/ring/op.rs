//! What a core asks of its ring, in a form that the kernel's ring and the simulator's both understand.
//!
//! A [`RawOp`] holds raw pointers. It is made only in this module's parent, from a slab entry that keeps the memory
//! alive until the terminal completion; nothing else constructs one.

/// A file as a ring knows it: its slot in the registered file table of every core's ring.
pub(crate) type FileSlot = u32;

/// One submission. Lengths are in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RawOp {
    /// Read into `ptr`; `fixed` if the memory is in the ring's registered arena.
    Read { file: FileSlot, ptr: *mut u8, len: u32, off: u64, fixed: bool },
    /// Write from `ptr`; `dsync` is RWF_DSYNC.
    Write { file: FileSlot, ptr: *const u8, len: u32, off: u64, fixed: bool, dsync: bool },
    /// fdatasync.
    Fdatasync { file: FileSlot },
    /// fallocate(2) with this mode.
    Fallocate { file: FileSlot, mode: i32, off: u64, len: u64 },
    /// ftruncate(2).
    Ftruncate { file: FileSlot, len: u64 },
    /// recv(2) on a plain descriptor.
    Recv { fd: i32, ptr: *mut u8, len: u32 },
    /// sendmsg(2) on a plain descriptor; the message lives in the slab entry.
    SendMsg { fd: i32, msg: *const libc::msghdr },
    /// accept4(2) with SOCK_CLOEXEC.
    Accept { fd: i32 },
}
