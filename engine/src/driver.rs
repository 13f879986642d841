//! What a driver is to the engine: the contract between the block graph and those who fill it.
//!
//! Formats **translate**, the engine **transfers**. A format hands out a [`Map`] (read side: shared by all cores, no
//! lock, no await, no allocation) and an [`Owner`] (write side: one task-local object on the image's home core). A
//! protocol hands out a [`Leaf`], which the engine reads and writes through the core's ring without calling the driver.
//! Whatever is neither answers requests itself through [`Driver::submit`].
//!
//! ```text
//!              request ──► engine::path
//!                 Map ─────────┤ lookup(range) → extents            any core, synchronous
//!                 Leaf ────────┤ one SQE per extent                 any core
//!                 Owner ───────┤ fault, claim → commit, punch, flush   home core only
//!                 Driver ──────┘ everything else                    any core, boxed future
//! ```
//!
//! Invariants (DESIGN §5): only the owner changes metadata (I1); an extent becomes visible at `commit`, after its data
//! completed (I2); one live claim per guest cluster, later ones wait in order (I5); a cluster freed is reused only when
//! its unlink is durable and an epoch barrier has passed (I4).

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use crate::debug::DebugEvent;
use crate::error::{Errno, Error};
use crate::graph::{OpenCx, Prepared, Reopen};
use crate::host::File;
use crate::mem::Buf;
use smallvec::SmallVec;

/// A future that stays on the core that made it.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Index of a child edge in [`OpenCx::open_child`] order; 0 is the first child opened.
pub type ChildIx = u8;

/// What a lookup is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Where to read from.
    Read,
    /// Where to overwrite in place; anything else needs a claim.
    Write,
    /// Block status: as `Read`, but zero extents report the host offset they keep, and compressed ones theirs.
    Status,
}

/// Where one piece of a guest range lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// Plain bytes at `off` of child `child`.
    Data {
        /// Which child edge.
        child: ChildIx,
        /// Byte offset in that child.
        off: u64,
    },
    /// Not allocated here: what child `child` (the backing edge) has at `off`; zeroes past its end.
    Below {
        /// Which child edge.
        child: ChildIx,
        /// Byte offset in that child.
        off: u64,
    },
    /// Explicitly zero in this node; `keeps` is the preallocated host offset, if there is one.
    Zero {
        /// Host offset in child `child` that the zero cluster keeps allocated.
        keeps: Option<(ChildIx, u64)>,
    },
    /// Not allocated and nothing below: reads as zeroes; `keeps` as for [`Target::Zero`] (a subcluster that is not
    /// allocated, in a cluster that is).
    Hole {
        /// Host offset in child `child` that belongs to it.
        keeps: Option<(ChildIx, u64)>,
    },
    /// Needs [`Driver::read_encoded`], with this cookie (compressed or encrypted data).
    Encoded {
        /// The driver's own description of the data (for qcow2: the L2 entry).
        cookie: u64,
    },
}

/// One piece of a translated range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// Where they are.
    pub target: Target,
}

/// How many extents one lookup hands out at most; the caller comes back for the rest.
pub const EXTENTS_MAX: usize = 16;

/// A bounded list of extents that follow each other, filled by [`Map::lookup`]. Lives on the stack.
#[derive(Debug, Default)]
pub struct Extents {
    list: SmallVec<[Extent; EXTENTS_MAX]>,
    covered: u64,
}

impl Extents {
    /// An empty list.
    pub fn new() -> Extents {
        Extents::default()
    }

    /// Appends `len` bytes at `target`, merging with the last extent where the two are contiguous.
    /// Returns false, and changes nothing, when the list is full.
    #[inline]
    pub fn push(&mut self, len: u64, target: Target) -> bool {
        if let Some(last) = self.list.last_mut()
            && continues(last, &target)
        {
            last.len += len;
        } else if self.list.len() == EXTENTS_MAX {
            return false;
        } else {
            self.list.push(Extent { len, target });
        }
        self.covered += len;
        true
    }

    /// Bytes covered from the start of the range.
    #[inline]
    pub fn covered(&self) -> u64 {
        self.covered
    }

    /// The extents in order.
    #[inline]
    pub fn as_slice(&self) -> &[Extent] {
        &self.list
    }

    /// Empties the list.
    pub fn clear(&mut self) {
        self.list.clear();
        self.covered = 0;
    }
}

fn continues(last: &Extent, next: &Target) -> bool {
    match (last.target, *next) {
        (Target::Data { child: a, off: x }, Target::Data { child: b, off: y }) => a == b && x + last.len == y,
        (Target::Below { child: a, off: x }, Target::Below { child: b, off: y }) => {
            a == b && x + last.len == y
        }
        (Target::Zero { keeps: a }, Target::Zero { keeps: b })
        | (Target::Hole { keeps: a }, Target::Hole { keeps: b }) => match (a, b) {
            (None, None) => true,
            (Some((a, x)), Some((b, y))) => a == b && x + last.len == y,
            _ => false,
        },
        _ => false,
    }
}

/// The answer of [`Map::lookup`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// `out` covers at least the first byte of the range, and as much of the rest as was at hand.
    Hit,
    /// The first byte needs metadata that is not in memory: [`Owner::fault`] with this key, then look again.
    Miss(u64),
    /// (`Access::Write` only) the first `len` bytes cannot be written in place: [`Owner::claim`] them.
    NeedsClaim {
        /// Bytes from the start of the range, at least 1.
        len: u64,
    },
    /// The metadata is broken; the request fails with this error.
    Bad(Errno),
}

/// Read side of a format. Shared by all cores, lock-free, never awaits, never allocates.
pub trait Map: Send + Sync {
    /// Translates the beginning of `range` (never empty, always inside the node's size), see [`Lookup`].
    fn lookup(&self, access: Access, range: Range<u64>, out: &mut Extents) -> Lookup;
}

/// One piece of host space in a [`Grant`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GrantSeg {
    /// Which child holds the data.
    pub child: ChildIx,
    /// Byte offset in that child.
    pub off: u64,
    /// Bytes.
    pub len: u64,
}

/// The right to write one guest range into host space that nobody sees yet.
///
/// The engine writes `[guest.start - head, guest.end + tail)` into `segs` in order: `head` and `tail` bytes are what the
/// node reads there now (copy-on-write; the engine reads them through the node itself, whose old mapping is still in
/// force), the middle is the guest's data. Then it calls [`Owner::commit`], or [`Owner::abort`] if a transfer failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Grant {
    /// The owner's key for this claim.
    pub id: u64,
    /// The part of the requested range that this grant covers, from its start; never empty.
    pub guest: Range<u64>,
    /// Old bytes to copy in front of the guest's.
    pub head: u64,
    /// Old bytes to copy behind the guest's.
    pub tail: u64,
    /// Host space for head, guest data and tail, in guest order; lengths add up to the whole.
    pub segs: SmallVec<[GrantSeg; 2]>,
}

/// What [`Owner::punch`] does to whole clusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Punch {
    /// Afterwards the range reads as zeroes. With `unmap` the space may be given back.
    Zero {
        /// Whether clusters may be deallocated.
        unmap: bool,
    },
    /// Advice that the content is not needed; must never expose the backing file's data (reference, part 5 item 20).
    Discard,
}

/// How to preallocate when a node grows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The format's tables only.
    Metadata,
    /// Space, by fallocate.
    Falloc,
    /// Space, by writing zeroes.
    Full,
}

/// Write side of a format. One per image, on its home core; `!Send`.
///
/// All methods may be called concurrently (each returned future is a coroutine of the home core); the implementation
/// serialises what must be serialised. Futures are run to completion.
pub trait Owner {
    /// Loads the metadata behind a [`Lookup::Miss`] key; concurrent faults on one key are one read.
    fn fault(&self, key: u64) -> LocalFuture<'_, Result<(), Errno>>;
    /// Reserves host space for the beginning of a guest range; waits for a live claim that overlaps.
    fn claim(&self, range: Range<u64>) -> LocalFuture<'_, Result<Grant, Errno>>;
    /// Publishes a grant whose data is written: later lookups see it. May wait for room in the metadata cache.
    fn commit(&self, grant: Grant) -> LocalFuture<'_, Result<(), Errno>>;
    /// Gives a grant back. Its clusters go to limbo, never straight to the free pool.
    fn abort(&self, grant: Grant);
    /// Zeroes or discards a range aligned to [`Limits::punch_alignment`] (or ending at the node's end).
    fn punch(&self, range: Range<u64>, kind: Punch) -> LocalFuture<'_, Result<(), Errno>>;
    /// Writes one cluster compressed (`ENOTSUP` where the format cannot). `off` is cluster-aligned; `data` is one
    /// cluster, or less at the end of the node. The cluster must be unallocated.
    fn write_compressed(&self, off: u64, data: Buf) -> LocalFuture<'_, (Result<(), Errno>, Buf)>;
    /// Everything committed so far, and the data below it, is durable when this returns `Ok`.
    fn flush(&self) -> LocalFuture<'_, Result<(), Errno>>;
    /// Changes the virtual size. Roots are drained.
    fn truncate(&self, size: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<(), Error>>;
    /// Writes everything back and marks the image clean. Roots are drained; nothing is called afterwards.
    fn close(&self) -> LocalFuture<'_, Result<(), Errno>>;
    /// Periodic work (cache cleaning), about once a second while the node exists.
    fn tick(&self) {}
}

/// Requests a driver answers itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Fill the buffer from `offset`.
    Read,
    /// Write the buffer to `offset`.
    Write,
    /// Make `len` bytes read as zeroes.
    WriteZeroes,
    /// Advice that `len` bytes are not needed.
    Discard,
    /// Make completed writes durable.
    Flush,
}

/// Modifiers of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flags {
    /// The data is durable when the request completes.
    pub fua: bool,
    /// Zeroing may give the space back.
    pub may_unmap: bool,
    /// Zeroing must fail with `ENOTSUP` rather than write zeroes slowly.
    pub no_fallback: bool,
    /// Write the data compressed.
    pub compressed: bool,
}

impl Flags {
    /// No modifier.
    pub const NONE: Flags = Flags { fua: false, may_unmap: false, no_fallback: false, compressed: false };
    /// Only FUA.
    pub const FUA: Flags = Flags { fua: true, may_unmap: false, no_fallback: false, compressed: false };
}

/// One request on its way through a node. Reads and writes carry `len` bytes in `buf`.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// Byte offset.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Modifiers.
    pub flags: Flags,
    /// The data of reads and writes.
    pub buf: Option<Buf>,
}

/// A block status extent (reference, part 5 item 10).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status {
    /// Bytes.
    pub len: u64,
    /// Backed by real storage.
    pub data: bool,
    /// Known to read as zeroes.
    pub zero: bool,
    /// This layer decides the content.
    pub allocated: bool,
    /// Stored compressed or encrypted: no raw bytes.
    pub encoded: bool,
    /// Offset of the raw bytes in the file below, where there are any.
    pub offset: Option<u64>,
}

/// Alignments and bounds of a node; the engine merges them down the chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Offsets and lengths of reads and writes are multiples of this; power of two.
    pub request_alignment: u32,
    /// Buffers start at multiples of this; power of two, at most 4096.
    pub memory_alignment: u32,
    /// Largest read or write in bytes.
    pub max_transfer: u32,
    /// [`Owner::punch`], or zeroing and discarding of a driver, works on multiples of this (a format's cluster or
    /// subcluster size; 1 for a file). Power of two.
    pub punch_alignment: u32,
    /// A format's cluster size, 0 where there is none.
    pub cluster_size: u32,
    /// For [`Kind::Full`]: `WriteZeroes` works on multiples of this, and on `max_zero` bytes at most (0: no bound).
    pub zero_alignment: u32,
    /// See `zero_alignment`.
    pub max_zero: u64,
    /// For [`Kind::Full`]: `Discard` likes multiples of this best (what is left over comes apart), and gets `max_discard` bytes at most (0: no bound).
    pub discard_alignment: u32,
    /// See `discard_alignment`.
    pub max_discard: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            request_alignment: 1,
            memory_alignment: 1,
            max_transfer: 1 << 30,
            punch_alignment: 1,
            cluster_size: 0,
            zero_alignment: 1,
            max_zero: 0,
            discard_alignment: 1,
            max_discard: 0,
        }
    }
}

/// A node that the ring itself can read and write.
#[derive(Clone)]
pub enum Leaf {
    /// Bytes of a host file, node offset = file offset. Reads past its end give zeroes.
    File(File),
    /// Nothing behind it.
    Null {
        /// Reads fill the buffer with zeroes.
        read_zeroes: bool,
        /// Every request takes this long.
        latency_ns: u64,
    },
}

/// How the engine moves a driver's data.
pub enum Kind<'a> {
    /// Through the ring.
    Leaf(&'a Leaf),
    /// By translation.
    Map(&'a dyn Map),
    /// Through [`Driver::submit`].
    Full,
}

/// Permissions on a node (reference, part 5 item 4), as bits.
pub mod perm {
    /// The content stays what was written.
    pub const CONSISTENT_READ: u8 = 1;
    /// May change the content.
    pub const WRITE: u8 = 2;
    /// May write what is already there.
    pub const WRITE_UNCHANGED: u8 = 4;
    /// May change the size.
    pub const RESIZE: u8 = 8;
    /// All of them.
    pub const ALL: u8 = 15;
}

/// What a child is to its parent; decides permissions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The only child of a filter: permissions pass through.
    Filtered,
    /// Data and metadata of a format (`file`).
    Image,
    /// Data only (`data-file`).
    Data,
    /// What shows through where nothing is allocated (`backing`).
    Cow,
}

/// One instance of a driver: a node's behaviour. Shared by all cores.
///
/// Methods returning futures run on the calling core (`submit`, `read_encoded`, `status`) or on the graph's core
/// (`set_perm_*`, `info`).
pub trait Driver: Send + Sync {
    /// The driver's name: "qcow2".
    fn name(&self) -> &'static str;

    /// Current size in bytes.
    fn size(&self) -> u64;

    /// Alignments and bounds of this node alone.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// How data moves.
    fn kind(&self) -> Kind<'_>;

    /// The node has one child of [`Role::Filtered`], whose content is its own: block status, backing chains and debug
    /// events are looked for below it.
    fn is_filter(&self) -> bool {
        false
    }

    /// The node hears debug events ([`Driver::debug_event`]). Does not change while it is open.
    fn listens(&self) -> bool {
        false
    }

    /// A parent reached this point of its work; it goes on when the future is done.
    fn debug_event(&self, _event: DebugEvent) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    /// Answers a request: all of them for [`Kind::Full`]; `WriteZeroes`, `Discard` and `Flush` for [`Kind::Leaf`].
    /// Never called for [`Kind::Map`].
    fn submit(&self, req: Request) -> LocalFuture<'_, (Result<(), Errno>, Request)> {
        Box::pin(async move { (Err(Errno::ENOTSUP), req) })
    }

    /// Fills the buffer with what the node has at guest offset `guest`, which `cookie` describes (see
    /// [`Target::Encoded`]); the buffer does not reach past that extent. An epoch pin is held meanwhile.
    fn read_encoded(&self, _cookie: u64, _guest: u64, buf: Buf) -> LocalFuture<'_, (Result<(), Errno>, Buf)> {
        Box::pin(async move { (Err(Errno::ENOTSUP), buf) })
    }

    /// Whether block status looks through allocated data to holes of the file below: for images with preallocated
    /// metadata, where an allocated cluster says little (reference, part 5 item 10).
    fn status_recurses(&self) -> bool {
        false
    }

    /// Block status of the beginning of a range, for drivers that are not [`Kind::Map`]. `want_zero` false allows a
    /// coarse answer.
    fn status(&self, range: Range<u64>, _want_zero: bool) -> LocalFuture<'_, Result<Status, Errno>> {
        let len = range.end - range.start;
        let at = Some(range.start);
        Box::pin(async move {
            Ok(Status { len, data: true, zero: false, allocated: true, encoded: false, offset: at })
        })
    }

    /// Changes the size, for drivers that are not [`Kind::Map`].
    fn truncate(&self, _size: u64, _prealloc: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async { Err(Error::new(Errno::ENOTSUP, "Image format driver does not support resize")) })
    }

    /// Gets ready to hold these cumulated permissions (locks, a writable descriptor). Exactly one of `set_perm_commit`
    /// and `set_perm_abort` follows.
    fn set_perm_prepare(&self, _perm: u8, _shared: u8) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async { Ok(()) })
    }

    /// Takes the prepared permissions.
    fn set_perm_commit(&self) {}

    /// Drops the prepared permissions.
    fn set_perm_abort(&self) {}

    /// The file name a user would know the node by; empty where there is none.
    fn filename(&self) -> String {
        String::new()
    }

    /// Whether the node may be reopened with other options ([`Driver::reopen_prepare`]).
    fn supports_reopen(&self) -> bool {
        false
    }

    /// Gets ready to switch to new options; the node is drained and flushed. Called only if
    /// [`Driver::supports_reopen`].
    fn reopen_prepare<'a>(&'a self, _new: &'a Reopen) -> LocalFuture<'a, Result<Prepared, Error>> {
        Box::pin(async { Err(Error::from(Errno::ENOTSUP)) })
    }

    /// Releases what the driver holds. Roots are drained and the owner is closed; nothing is called afterwards.
    fn close(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }

    /// For downcasting to driver-specific information (`ImageInfoSpecific`, check, create).
    fn as_any(&self) -> &dyn std::any::Any;
}

/// Makes the owner on the home core.
pub type OwnerFn = Box<dyn FnOnce() -> Rc<dyn Owner> + Send>;

/// What an open function gives back.
pub struct Opened {
    /// The node's behaviour.
    pub driver: Arc<dyn Driver>,
    /// For [`Kind::Map`] drivers that have a write side.
    pub owner: Option<OwnerFn>,
}

/// Opens a driver: runs on the graph's core, opens children through the context, reads what it needs through them.
pub type OpenFn = Box<dyn FnOnce(OpenCx) -> LocalFuture<'static, Result<Opened, Error>> + Send>;
