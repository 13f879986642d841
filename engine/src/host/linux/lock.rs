//! Image locks: open-file-description locks on the bytes that other users of disk images agree on.
//!
//! Byte `100 + bit` is read-locked by whoever *uses* a permission, byte `200 + bit` by whoever does *not share* it
//! (observable with any lock listing; libvirt uses byte 0). A conflict is found by asking for a write lock on the
//! opposite byte. Locks belong to the open file description, so closing a duplicate drops nothing and two
//! descriptions conflict even inside one process.
//!
//! Invariants:
//! - Between [`ImageLock::prepare`] and its end the union of old and new locks is held: neither outcome has a moment
//!   without its locks.
//! - A failed prepare leaves exactly the locks of before.
//!
//! ```text
//! held(old) ─ prepare(new) ─► held(old ∪ new), checked ─┬ commit ─► held(new)
//!                                                       └ abort, drop ─► held(old)
//! ```

use super::sys::{last, retry};
use crate::error::{Errno, Error};
use std::os::fd::{AsRawFd, OwnedFd};

const USED: i64 = 100;
const UNSHARED: i64 = 200;

/// A set of the four permissions that have a lock byte.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct LockPerms(u8);

impl LockPerms {
    /// Nothing.
    pub const NONE: LockPerms = LockPerms(0);
    /// Contents read now stay what they are unless a sharing writer changes them.
    pub const CONSISTENT_READ: LockPerms = LockPerms(1);
    /// Change contents.
    pub const WRITE: LockPerms = LockPerms(2);
    /// Write what is there already (allocate, move).
    pub const WRITE_UNCHANGED: LockPerms = LockPerms(4);
    /// Change the length.
    pub const RESIZE: LockPerms = LockPerms(8);
    /// All four.
    pub const ALL: LockPerms = LockPerms(15);

    /// The set with these bits (bit 0 consistent read, 1 write, 2 write unchanged, 3 resize); others are dropped.
    pub const fn from_bits(bits: u8) -> LockPerms {
        LockPerms(bits & 15)
    }
    /// Both sets.
    pub const fn and(self, other: LockPerms) -> LockPerms {
        LockPerms(self.0 | other.0)
    }
    /// What is in both.
    pub const fn common(self, other: LockPerms) -> LockPerms {
        LockPerms(self.0 & other.0)
    }
    /// What is not in this set.
    pub const fn complement(self) -> LockPerms {
        LockPerms(!self.0 & 15)
    }
    /// Whether all of `other` is in this set.
    pub const fn contains(self, other: LockPerms) -> bool {
        self.0 & other.0 == other.0
    }
    const fn has_bit(self, bit: i64) -> bool {
        self.0 >> bit & 1 != 0
    }
}

fn name(bit: i64) -> &'static str {
    ["consistent read", "write", "write unchanged", "resize"].get(bit as usize).copied().unwrap_or("?")
}

/// The option `locking`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Locking {
    /// Lock if the kernel can.
    #[default]
    Auto,
    /// Lock, and fail if the kernel cannot.
    On,
    /// Do not lock.
    Off,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Held {
    used: LockPerms,
    unshared: LockPerms,
}

const NOTHING: Held = Held { used: LockPerms::NONE, unshared: LockPerms::NONE };

/// The locks of one node on its file. Dropping it releases them.
#[derive(Debug)]
pub struct ImageLock {
    /// A description kept for the locks alone, so that I/O descriptors can be swapped freely.
    fd: Option<OwnedFd>,
    held: Held,
    pending: Option<Held>,
}

impl ImageLock {
    /// Locks through `fd`: a descriptor of a description that nobody else locks with, readable.
    ///
    /// `Locking::On` fails where the kernel has no such locks; `Auto` then goes without.
    pub fn new(fd: OwnedFd, locking: Locking) -> Result<ImageLock, Error> {
        let fd = match locking {
            Locking::Off => None,
            Locking::Auto | Locking::On => match test(&fd, USED) {
                Err(Errno::EINVAL) if locking == Locking::Auto => None,
                Err(Errno::EINVAL) => {
                    let text = "File locking requested but OFD locking syscall is unavailable";
                    return Err(Error::new(Errno::ENOTSUP, text));
                }
                _ => Some(fd),
            },
        };
        Ok(ImageLock { fd, held: NOTHING, pending: None })
    }

    /// Takes the locks for the permissions to come and looks for conflicts with other users of the file.
    ///
    /// Errors: `Failed to get "write" lock` (somebody does not share it), `Failed to get shared "write" lock`
    /// (somebody uses what is not to be shared). End it with [`commit`](Self::commit) or [`abort`](Self::abort);
    /// a second prepare replaces the first.
    pub fn prepare(&mut self, used: LockPerms, shared: LockPerms) -> Result<(), Error> {
        self.abort();
        let new = Held { used, unshared: shared.complement() };
        let Some(fd) = &self.fd else {
            self.pending = Some(new);
            return Ok(());
        };
        let both =
            Held { used: self.held.used.and(new.used), unshared: self.held.unshared.and(new.unshared) };
        let done = apply(fd, self.held, both).and_then(|()| check_conflicts(fd, new));
        match done {
            Ok(()) => {
                self.pending = Some(new);
                Ok(())
            }
            Err(e) => {
                release(fd, self.held);
                Err(e)
            }
        }
    }

    /// Keeps the prepared locks and drops the others. Without a prepare it does nothing.
    pub fn commit(&mut self) {
        if let Some(new) = self.pending.take() {
            if let Some(fd) = &self.fd {
                release(fd, new);
            }
            self.held = new;
        }
    }

    /// Back to the locks of before the prepare. Without a prepare it does nothing.
    pub fn abort(&mut self) {
        if self.pending.take().is_some()
            && let Some(fd) = &self.fd
        {
            release(fd, self.held);
        }
    }

    /// Whether locks are really taken (false with `locking=off` or a kernel without them).
    pub fn active(&self) -> bool {
        self.fd.is_some()
    }

    /// The permissions held as used and as unshared.
    pub fn held(&self) -> (LockPerms, LockPerms) {
        (self.held.used, self.held.unshared)
    }
}

impl Drop for ImageLock {
    /// The description may be shared with descriptors that live on a little longer, so closing is not enough.
    fn drop(&mut self) {
        if let Some(fd) = &self.fd {
            release(fd, NOTHING);
        }
    }
}

fn apply(fd: &OwnedFd, have: Held, want: Held) -> Result<(), Error> {
    for bit in 0..4 {
        for (base, have, want) in [(USED, have.used, want.used), (UNSHARED, have.unshared, want.unshared)] {
            if want.has_bit(bit) && !have.has_bit(bit) {
                set(fd, base + bit, libc::F_RDLCK)
                    .map_err(|e| Error::io(e, format!("Failed to lock byte {}", base + bit)))?;
            }
        }
    }
    Ok(())
}

/// Unlocks every byte that is not in `keep`. Unlocking can only fail for lack of memory when a range is split; the
/// lock then stays until the file is closed, which is safe.
fn release(fd: &OwnedFd, keep: Held) {
    for bit in 0..4 {
        for (base, keep) in [(USED, keep.used), (UNSHARED, keep.unshared)] {
            if !keep.has_bit(bit) {
                let _ = set(fd, base + bit, libc::F_UNLCK);
            }
        }
    }
}

fn check_conflicts(fd: &OwnedFd, new: Held) -> Result<(), Error> {
    for bit in 0..4 {
        if new.used.has_bit(bit) {
            test(fd, UNSHARED + bit)
                .map_err(|e| Error::new(e, format!("Failed to get \"{}\" lock", name(bit))))?;
        }
        if new.unshared.has_bit(bit) {
            test(fd, USED + bit)
                .map_err(|e| Error::new(e, format!("Failed to get shared \"{}\" lock", name(bit))))?;
        }
    }
    Ok(())
}

/// The hint that tools print below a lock error.
pub const LOCK_HINT: &str = "Is another process using the image";

fn flock(kind: libc::c_int, byte: i64) -> libc::flock64 {
    // SAFETY: flock64 is plain integers, for which all zeroes is a valid value.
    let mut l: libc::flock64 = unsafe { std::mem::zeroed() };
    l.l_type = kind as libc::c_short;
    l.l_whence = libc::SEEK_SET as libc::c_short;
    l.l_start = byte;
    l.l_len = 1;
    l
}

fn set(fd: &OwnedFd, byte: i64, kind: libc::c_int) -> Result<(), Errno> {
    let l = flock(kind, byte);
    // SAFETY: `l` is a whole flock64 and lives across the call.
    retry(|| unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const l) }).map(drop)
}

/// `EAGAIN` if another description holds any lock on the byte.
fn test(fd: &OwnedFd, byte: i64) -> Result<(), Errno> {
    let mut l = flock(libc::F_WRLCK, byte);
    loop {
        // SAFETY: `l` is a whole flock64 that the kernel may write to; it lives across the call.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut l) } == 0 {
            let free = libc::c_int::from(l.l_type) == libc::F_UNLCK;
            return if free { Ok(()) } else { Err(Errno::EAGAIN) };
        }
        match last() {
            Errno::EINTR => {}
            e => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sys::testdir::TestDir;
    use super::*;
    use std::path::Path;

    fn lock(p: &Path) -> ImageLock {
        let f = std::fs::OpenOptions::new().read(true).write(true).open(p).expect("open");
        ImageLock::new(f.into(), Locking::On).expect("lock")
    }

    /// The bytes that some description other than `probe`'s holds.
    fn bytes(p: &Path) -> Vec<i64> {
        let f: OwnedFd = std::fs::File::open(p).expect("open").into();
        (0..300).filter(|b| test(&f, *b) == Err(Errno::EAGAIN)).collect()
    }

    const RW: LockPerms = LockPerms(1 | 2 | 8);
    const SHARE_READERS: LockPerms = LockPerms(1 | 4);

    /// Goal: the bytes on disk are the agreed ones. Method: a writer that shares reading, as a format driver takes
    /// on its file: 100, 101, 103, 201, 203; then a reader; then nothing.
    #[test]
    fn bytes_are_the_agreed_ones() {
        let t = TestDir::new();
        let p = t.file("f", 512);
        let mut l = lock(&p);
        l.prepare(RW, SHARE_READERS).expect("free");
        l.commit();
        assert_eq!(bytes(&p), [100, 101, 103, 201, 203]);
        l.prepare(LockPerms::CONSISTENT_READ, SHARE_READERS).expect("own");
        assert_eq!(bytes(&p), [100, 101, 103, 201, 203], "old locks stay until the commit");
        l.commit();
        assert_eq!(bytes(&p), [100, 201, 203]);
        l.prepare(LockPerms::NONE, LockPerms::ALL).expect("own");
        l.commit();
        assert_eq!(bytes(&p), [] as [i64; 0]);
    }

    /// Goal: a conflict is refused with the known text and leaves the locks of before; abort does too.
    #[test]
    fn conflict_changes_nothing() {
        let t = TestDir::new();
        let p = t.file("f", 512);
        let (mut a, mut b) = (lock(&p), lock(&p));
        a.prepare(RW, SHARE_READERS).expect("free");
        a.commit();
        let e = b.prepare(RW, SHARE_READERS).expect_err("two writers");
        assert_eq!(e.message, "Failed to get \"write\" lock");
        assert_eq!(b.held(), (LockPerms::NONE, LockPerms::NONE));
        let e = b.prepare(LockPerms::CONSISTENT_READ, SHARE_READERS).expect_err("a writer is there");
        assert_eq!(e.message, "Failed to get shared \"write\" lock");
        b.prepare(LockPerms::CONSISTENT_READ, LockPerms::ALL).expect("shares everything");
        b.abort();
        assert_eq!(bytes(&p), [100, 101, 103, 201, 203]);
        drop(a);
        assert_eq!(bytes(&p), [] as [i64; 0]);
        b.prepare(RW, SHARE_READERS).expect("free again");
    }

    /// Goal: locking=off takes nothing and finds no conflict.
    #[test]
    fn off_is_off() {
        let t = TestDir::new();
        let p = t.file("f", 512);
        let mut a = lock(&p);
        a.prepare(RW, LockPerms::NONE).expect("free");
        let f = std::fs::File::open(&p).expect("open");
        let mut off = ImageLock::new(f.into(), Locking::Off).expect("off");
        off.prepare(RW, LockPerms::NONE).expect("not looked at");
        off.commit();
        assert!(!off.active() && off.held().0 == RW);
    }

    /// Goal: a live qemu-io and this code exclude each other on one image. Method: qemu-io holds a qcow2 open for
    /// writing; our writer is refused, our sharing reader is not; then we hold it and qemu-io is refused.
    #[test]
    fn excludes_a_live_qemu_process() {
        use std::process::{Command, Stdio};
        let t = TestDir::new();
        let p = t.path("q.qcow2");
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&p).arg("1M").status();
        assert!(made.expect("qemu-img (Debian package qemu-utils) is needed").success());
        let mut peer = Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .arg(&p)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("qemu-io");
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while bytes(&p).is_empty() && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        assert_eq!(bytes(&p), [100, 101, 103, 201, 203]);
        let mut l = lock(&p);
        assert_eq!(l.prepare(RW, SHARE_READERS).expect_err("busy").message, "Failed to get \"write\" lock");
        assert!(l.prepare(LockPerms::CONSISTENT_READ, LockPerms::ALL).is_ok());
        l.abort();
        drop(peer.stdin.take());
        assert!(peer.wait().expect("wait").success());
        l.prepare(RW, SHARE_READERS).expect("the peer is gone");
        l.commit();
        let out =
            Command::new("qemu-io").args(["-f", "qcow2", "-c", "length"]).arg(&p).output().expect("qemu-io");
        let err = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && err.contains("Failed to get \"write\" lock"), "{err}");
    }
}
