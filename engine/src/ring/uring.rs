//! The kernel's io_uring as a core uses it: one issuer, deferred task work, registered files and arena.
//!
//! ```text
//!   push ─► SQ ─┐ full: backlog (bounded by the slab)
//!   submit ─────┴─► io_uring_enter(to_submit, min_complete, GETEVENTS, timeout)   one syscall per turn
//!   reap ◄─ CQ
//! ```
//!
//! Set-up tries `SINGLE_ISSUER | DEFER_TASKRUN | COOP_TASKRUN | SUBMIT_ALL` with a larger CQ, and falls back to fewer
//! flags where the kernel does not know one (tested by forcing each step).

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};

use super::{Backend, CANCEL_TAG, Cqe, RawOp, WAKE_TAG};

/// Submission queue entries.
const SQ: u32 = 512;
/// Completion queue entries: every slab entry may complete at once without overflow.
const CQ: u32 = 16384;
/// Registered file slots.
pub(crate) const FILES_MAX: u32 = 4096;

/// How far set-up had to fall back; 0 is the full set of flags.
pub(super) const LEVELS: u32 = 3;

/// One io_uring.
pub(crate) struct Uring {
    ring: IoUring,
    backlog: VecDeque<squeue::Entry>,
    wake_fd: i32,
    wake_armed: bool,
    /// Registered files are in use; otherwise plain descriptors are looked up here.
    fixed_files: bool,
    fds: Vec<i32>,
    fixed_buffers: bool,
    unsubmitted: bool,
}

impl Uring {
    /// Sets up a ring at the best level the kernel knows, with `arena` registered if it can be.
    pub(crate) fn new(wake_fd: i32, arena: Option<(*mut u8, usize)>) -> io::Result<Uring> {
        let mut last = io::Error::from_raw_os_error(libc::ENOSYS);
        for level in 0..LEVELS {
            match Uring::at_level(level, wake_fd, arena) {
                Ok(ring) => return Ok(ring),
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => last = e,
                Err(e) => return Err(e),
            }
        }
        Err(last)
    }

    pub(super) fn at_level(level: u32, wake_fd: i32, arena: Option<(*mut u8, usize)>) -> io::Result<Uring> {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(CQ).setup_clamp();
        if level < 2 {
            builder.setup_submit_all().setup_coop_taskrun();
        }
        if level < 1 {
            builder.setup_single_issuer().setup_defer_taskrun();
        }
        let ring = builder.build(SQ)?;
        let fixed_files = ring.submitter().register_files_sparse(FILES_MAX).is_ok();
        let fixed_buffers = arena.is_some_and(|(ptr, len)| {
            let iov = libc::iovec { iov_base: ptr.cast(), iov_len: len };
            // SAFETY: the arena outlives the ring: the core drops its ring before it lets go of the arena.
            unsafe { ring.submitter().register_buffers(&[iov]) }.is_ok()
        });
        Ok(Uring {
            ring,
            backlog: VecDeque::new(),
            wake_fd,
            wake_armed: false,
            fixed_files,
            fds: Vec::new(),
            fixed_buffers,
            unsubmitted: false,
        })
    }

    fn target(&self, slot: u32) -> Target {
        match self.fixed_files {
            true => Target::Fixed(types::Fixed(slot)),
            false => Target::Fd(types::Fd(self.fds.get(slot as usize).copied().unwrap_or(-1))),
        }
    }

    fn queue(&mut self, entry: squeue::Entry) {
        self.unsubmitted = true;
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        // SAFETY: the entry's memory is owned by a slab entry (or is none) until its terminal completion.
        if unsafe { self.ring.submission().push(&entry) }.is_ok() {
            return;
        }
        let _ = self.ring.submit();
        // SAFETY: as above.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    fn refill(&mut self) {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `queue`.
            if unsafe { self.ring.submission().push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    fn arm_wake(&mut self) {
        if !self.wake_armed {
            self.wake_armed = true;
            let poll = opcode::PollAdd::new(types::Fd(self.wake_fd), libc::POLLIN as u32).build();
            self.queue(poll.user_data(WAKE_TAG));
        }
    }
}

enum Target {
    Fixed(types::Fixed),
    Fd(types::Fd),
}

/// Builds an opcode on a registered file or a plain descriptor.
macro_rules! on {
    ($target:expr, |$fd:ident| $make:expr) => {
        match $target {
            Target::Fixed($fd) => $make,
            Target::Fd($fd) => $make,
        }
    };
}

impl Backend for Uring {
    fn push(&mut self, op: RawOp, user_data: u64) {
        let entry = match op {
            RawOp::Read { file, ptr, len, off, fixed } if fixed && self.fixed_buffers => {
                on!(self.target(file), |fd| opcode::ReadFixed::new(fd, ptr, len, 0).offset(off).build())
            }
            RawOp::Read { file, ptr, len, off, .. } => {
                on!(self.target(file), |fd| opcode::Read::new(fd, ptr, len).offset(off).build())
            }
            RawOp::Write { file, ptr, len, off, fixed, dsync } => {
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                if fixed && self.fixed_buffers {
                    on!(self.target(file), |fd| opcode::WriteFixed::new(fd, ptr, len, 0)
                        .offset(off)
                        .rw_flags(flags)
                        .build())
                } else {
                    on!(self.target(file), |fd| opcode::Write::new(fd, ptr, len)
                        .offset(off)
                        .rw_flags(flags)
                        .build())
                }
            }
            RawOp::Fdatasync { file } => {
                on!(self.target(file), |fd| opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build())
            }
            RawOp::Fallocate { file, mode, off, len } => {
                on!(self.target(file), |fd| opcode::Fallocate::new(fd, len).offset(off).mode(mode).build())
            }
            RawOp::Ftruncate { file, len } => {
                on!(self.target(file), |fd| opcode::Ftruncate::new(fd, len).build())
            }
            RawOp::Recv { fd, ptr, len } => opcode::Recv::new(types::Fd(fd), ptr, len).build(),
            RawOp::SendMsg { fd, msg } => opcode::SendMsg::new(types::Fd(fd), msg)
                .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32)
                .build(),
            RawOp::Accept { fd } => {
                opcode::Accept::new(types::Fd(fd), std::ptr::null_mut(), std::ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
        };
        self.queue(entry.user_data(user_data));
    }

    fn submit(&mut self, wait: Option<Duration>) {
        self.arm_wake();
        self.refill();
        // what is still behind must not wait for completions that may never come
        let wait = wait.filter(|_| self.backlog.is_empty());
        let result = match wait {
            Some(time) => {
                let spec = types::Timespec::from(time);
                let args = types::SubmitArgs::new().timespec(&spec);
                self.ring.submitter().submit_with_args(1, &args)
            }
            // GETEVENTS without waiting: deferred completions are only posted when the task asks for them
            None => {
                let to_submit = self.ring.submission().len() as u32;
                // SAFETY: no argument memory is passed; queued entries are covered by `queue`.
                unsafe {
                    self.ring.submitter().enter::<libc::sigset_t>(
                        to_submit,
                        0,
                        sys::IORING_ENTER_GETEVENTS,
                        None,
                    )
                }
            }
        };
        // EBUSY: completions must be reaped first; EINTR and ETIME: nothing arrived. The next turn submits again.
        self.unsubmitted = result.is_err() && !self.ring.submission().is_empty();
    }

    fn reap(&mut self) -> Option<Cqe> {
        let cqe = self.ring.completion().next()?;
        if cqe.user_data() == WAKE_TAG {
            self.wake_armed = false;
        }
        Some(Cqe { user_data: cqe.user_data(), res: cqe.result() })
    }

    fn cancel(&mut self, user_data: u64) {
        self.queue(opcode::AsyncCancel::new(user_data).build().user_data(CANCEL_TAG));
    }

    fn cancel_all(&mut self) {
        let cancel = types::CancelBuilder::any();
        let _ = self.ring.submitter().register_sync_cancel(Some(types::Timespec::new()), cancel);
    }

    fn set_file(&mut self, slot: u32, fd: i32) {
        if self.fixed_files {
            let _ = self.ring.submitter().register_files_update(slot, &[fd]);
        }
        let at = slot as usize;
        if self.fds.len() <= at {
            self.fds.resize(at + 1, -1);
        }
        self.fds[at] = fd;
    }
}

mod sys {
    /// `IORING_ENTER_GETEVENTS` of io_uring_enter(2).
    pub(super) const IORING_ENTER_GETEVENTS: u32 = 1;
}
