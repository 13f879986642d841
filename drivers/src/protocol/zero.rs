//! Zeroing and discarding parts of a host file: which fallocate to use, and what to do where it is refused.
//!
//! ```text
//! zero, may unmap:  punch hole ─────────────┐ refused
//! zero:             zero range ─ refused ─► punch + allocate ─ refused ─► ENOTSUP: the engine writes zeroes
//! discard:          punch hole (file) | BLKDISCARD (device) ─ refused ─► ENOTSUP: ignored
//! ```
//!
//! What a file system refuses once is not tried again. A range reaching past the end of a file is never handed to
//! an operation that cannot extend it.

use ringblock_engine::core::Core;
use ringblock_engine::driver::Flags;
use ringblock_engine::error::Errno;
use ringblock_engine::host::File;
use ringblock_engine::host::linux::open::FileKind;
use ringblock_engine::host::linux::probe::{self, Capabilities, HostOp};
use ringblock_engine::host::linux::{FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE};
use std::ops::Range;

/// Ways to zero and discard on one file, with what has been learnt about them.
pub(super) struct ZeroOps {
    kind: FileKind,
    caps: Capabilities,
}

impl ZeroOps {
    pub(super) fn new(kind: FileKind) -> ZeroOps {
        ZeroOps { kind, caps: Capabilities::default() }
    }

    /// Makes the range read as zeroes. `ENOTSUP` if the host can only do it by writing.
    pub(super) async fn write_zeroes(
        &self,
        file: &File,
        range: Range<u64>,
        size: u64,
        flags: Flags,
    ) -> Result<(), Errno> {
        let extends = range.end > size;
        if flags.may_unmap && !extends {
            match self.punch(file, &range).await {
                Err(Errno::ENOTSUP) => {}
                done => return done,
            }
        }
        // On a device the kernel may write zeroes by itself: right, but not fast.
        if self.kind != FileKind::Regular && flags.no_fallback {
            return Err(Errno::ENOTSUP);
        }
        // A device cannot be extended and some kernels want that said.
        let keep = if self.kind == FileKind::Regular { 0 } else { FALLOC_KEEP_SIZE };
        match self.attempt(file, HostOp::ZeroRange, FALLOC_ZERO_RANGE | keep, &range).await {
            Err(Errno::ENOTSUP) => {}
            done => return done,
        }
        if self.kind != FileKind::Regular || extends {
            return Err(Errno::ENOTSUP);
        }
        // The order matters: after the punch the range reads as zeroes, whatever becomes of the space.
        self.punch(file, &range).await?;
        self.attempt(file, HostOp::Allocate, 0, &range).await
    }

    /// Gives the space of the range back. `ENOTSUP` if the host cannot.
    pub(super) async fn discard(&self, file: &File, range: Range<u64>) -> Result<(), Errno> {
        if self.kind != FileKind::Block {
            return self.punch(file, &range).await;
        }
        // Unaligned ends are dropped: a discard is advice.
        let (start, end) = (range.start.next_multiple_of(512), range.end - range.end % 512);
        if start >= end {
            return Ok(());
        }
        let file = file.clone();
        Core::current()
            .blocking(move || {
                file.host().map_or(Err(Errno::ENOTSUP), |f| probe::discard_device(f, start, end - start))
            })
            .await
    }

    async fn punch(&self, file: &File, range: &Range<u64>) -> Result<(), Errno> {
        self.attempt(file, HostOp::PunchHole, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, range).await
    }

    async fn attempt(&self, file: &File, op: HostOp, mode: i32, range: &Range<u64>) -> Result<(), Errno> {
        if !self.caps.may_try(op) {
            return Err(Errno::ENOTSUP);
        }
        match file.fallocate(mode, range.start, range.end - range.start, None).await {
            Err(e) if self.caps.note_error(op, e) => Err(Errno::ENOTSUP),
            // Not aligned to the device's sectors, or not for this range: write zeroes this time.
            Err(Errno::EINVAL) => Err(Errno::ENOTSUP),
            done => done,
        }
    }
}
