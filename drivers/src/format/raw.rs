//! `raw`: the bytes of another node, or a window of them.
//!
//! Invariants:
//! - A window lies inside its file: `offset + size` never exceeds the file's size at open.
//! - A node whose format was guessed never writes anything to block 0 that would make the next guess another one.
//!
//! ```text
//! guest 0 ─────────────► size          lookup: file offset = guest offset + `offset`
//!        └ offset ┐
//! file 0 ─────────┴────────────────►   flush, zero, discard: the engine passes them on the same way
//! ```

use super::probe;
use crate::options::blockdev::{BlockdevDriver, BlockdevOptions, BlockdevOptionsRaw};
use ringblock_engine::debug::DebugEvent;
use ringblock_engine::driver::{
    Access, Driver, Extents, Kind, Limits, LocalFuture, Lookup, Map, Op, Opened, Preallocation, Request,
    Role, Status, Target,
};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::{ChildSpec, OpenCx, Prepared, Reopen};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Child;
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Sector size in which windows and lengths are counted.
const SECTOR: u64 = 512;

/// What a raw node is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RawConfig {
    /// Where the bytes begin in the file.
    pub offset: u64,
    /// How many there are; `None` for all that follow.
    pub size: Option<u64>,
    /// Nobody named the format, it was guessed: block 0 is guarded.
    pub probed: bool,
}

/// Stands for "no size given" in [`Window::fixed`].
const ALL_OF_IT: u64 = u64::MAX;

/// The window as it is now. Changes only while the node is drained.
struct Window {
    offset: AtomicU64,
    fixed: AtomicU64,
    size: AtomicU64,
}

impl Window {
    fn new(config: &RawConfig, size: u64) -> Window {
        let fixed = AtomicU64::new(config.size.unwrap_or(ALL_OF_IT));
        Window { offset: AtomicU64::new(config.offset), fixed, size: AtomicU64::new(size) }
    }

    #[inline]
    fn offset(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }

    fn set(&self, config: &RawConfig, size: u64) {
        self.offset.store(config.offset, Ordering::Relaxed);
        self.fixed.store(config.size.unwrap_or(ALL_OF_IT), Ordering::Relaxed);
        self.size.store(size, Ordering::Relaxed);
    }

    fn config(&self) -> RawConfig {
        let fixed = self.fixed.load(Ordering::Relaxed);
        RawConfig { offset: self.offset(), size: (fixed != ALL_OF_IT).then_some(fixed), probed: false }
    }
}

/// A window on another node.
pub struct RawDriver {
    probed: bool,
    file: Child,
    filename: String,
    window: Arc<Window>,
}

impl RawConfig {
    /// The window that options describe.
    pub fn of(options: &BlockdevOptionsRaw) -> RawConfig {
        RawConfig {
            offset: options.offset.map_or(0, |s| s.0),
            size: options.size.map(|s| s.0),
            probed: false,
        }
    }

    fn is_whole(&self) -> bool {
        self.offset == 0 && self.size.is_none()
    }
}

/// Opens a raw node on `file`.
pub async fn open(cx: OpenCx, config: RawConfig, file: ChildSpec) -> Result<Opened, Error> {
    // A window is not the whole of its file, so its users' permissions do not simply pass through.
    let whole = config.is_whole();
    let file = cx.open_child("file", if whole { Role::Filtered } else { Role::Data }, file).await?;
    let size = window(&config, file.size()?)?;
    let filename = if whole { file.filename()? } else { String::new() };
    let window = Arc::new(Window::new(&config, size));
    let driver = RawDriver { probed: config.probed, file, filename, window };
    Ok(Opened { driver: Arc::new(driver), owner: None })
}

/// The size of the window in a file of `real` bytes.
fn window(config: &RawConfig, real: u64) -> Result<u64, Error> {
    let offset = config.offset;
    let Some(left) = real.checked_sub(offset) else {
        let text = format!("Offset ({offset}) cannot be greater than size of the containing file ({real})");
        return Err(Error::invalid(text));
    };
    let Some(size) = config.size else {
        return Ok(left.checked_next_multiple_of(SECTOR).unwrap_or(left));
    };
    if size > left {
        return Err(Error::invalid(format!(
            "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the containing file ({real})"
        )));
    }
    if !size.is_multiple_of(SECTOR) {
        return Err(Error::invalid("Specified size is not multiple of 512"));
    }
    Ok(size)
}

impl Map for RawDriver {
    #[inline]
    fn lookup(&self, _access: Access, range: Range<u64>, out: &mut Extents) -> Lookup {
        match self.window.offset().checked_add(range.start) {
            Some(off) => {
                out.push(range.end - range.start, Target::Data { child: self.file.ix(), off });
                Lookup::Hit
            }
            None => Lookup::Bad(Errno::EFBIG),
        }
    }
}

impl RawDriver {
    fn at(&self, offset: u64) -> Result<u64, Errno> {
        self.window.offset().checked_add(offset).ok_or(Errno::EFBIG)
    }

    /// Answers a request of a guarded node.
    async fn guarded(&self, req: &mut Request) -> Result<(), Errno> {
        let at = self.at(req.offset)?;
        match req.op {
            Op::Read | Op::Write => {
                let buf = req.buf.take().ok_or(Errno::EINVAL)?;
                if req.op == Op::Write
                    && let Err(e) = self.guard(req.offset, &buf).await
                {
                    req.buf = Some(buf);
                    return Err(e);
                }
                self.file
                    .event(if req.op == Op::Read { DebugEvent::ReadAio } else { DebugEvent::WriteAio })
                    .await;
                let (done, buf) = match req.op {
                    Op::Read => self.file.read(at, buf).await,
                    _ => self.file.write(at, buf, req.flags).await,
                };
                req.buf = Some(buf);
                done
            }
            Op::WriteZeroes => self.file.write_zeroes(at, req.len, req.flags).await,
            Op::Discard => self.file.discard(at, req.len).await,
            Op::Flush => self.file.flush().await,
        }
    }

    /// `EPERM` if block 0 would no longer look raw.
    async fn guard(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let Ok(skip) = usize::try_from(offset) else {
            return Ok(());
        };
        if skip >= probe::HEAD || data.is_empty() {
            return Ok(());
        }
        let mut head = Buf::zeroed(probe::HEAD);
        if skip > 0 || data.len() < probe::HEAD {
            let (done, old) = self.file.read(self.at(0)?, head).await;
            done?;
            head = old;
        }
        let n = data.len().min(probe::HEAD - skip);
        head[skip..skip + n].copy_from_slice(&data[..n]);
        if probe::probe(&head) == "raw" { Ok(()) } else { Err(Errno::EPERM) }
    }

    async fn resize(&self, size: u64, prealloc: Preallocation) -> Result<(), Error> {
        let config = self.window.config();
        if config.size.is_some() {
            return Err(Error::new(Errno::ENOTSUP, "Cannot resize fixed-size raw disks"));
        }
        let end = config.offset.checked_add(size).filter(|e| i64::try_from(*e).is_ok());
        let end = end.ok_or_else(|| Error::invalid("Disk size too large for the chosen offset"))?;
        self.file.truncate(end, prealloc).await?;
        self.window.set(&config, window(&config, self.file.size()?)?);
        Ok(())
    }
}

impl RawDriver {
    /// The window may change; whether it is the whole file may not, since that decides how permissions pass.
    fn reopen(&self, new: &Reopen) -> Result<Prepared, Error> {
        let options = match new.config.downcast_ref::<BlockdevOptions>().map(|o| &o.driver) {
            Some(BlockdevDriver::Raw(o)) => o,
            _ => return Err(Error::invalid("Cannot change the option 'driver'")),
        };
        let (config, old) = (RawConfig::of(options), self.window.config());
        if config.is_whole() != old.is_whole() {
            let name = if config.offset != old.offset { "offset" } else { "size" };
            return Err(Error::invalid(format!("Cannot change the option '{name}'")));
        }
        let size = window(&config, self.file.size()?)?;
        let at = self.window.clone();
        Ok(Prepared { commit: Box::new(move || at.set(&config, size)), abort: Box::new(|| {}) })
    }
}

impl Driver for RawDriver {
    fn name(&self) -> &'static str {
        "raw"
    }

    #[inline]
    fn size(&self) -> u64 {
        self.window.size.load(Ordering::Relaxed)
    }

    fn limits(&self) -> Limits {
        // Only whole sectors, so that a guarded write shows all of block 0 or none of it.
        let request_alignment = if self.probed { SECTOR as u32 } else { 1 };
        Limits { request_alignment, ..Limits::default() }
    }

    #[inline]
    fn kind(&self) -> Kind<'_> {
        if self.probed { Kind::Full } else { Kind::Map(self) }
    }

    fn submit(&self, mut req: Request) -> LocalFuture<'_, (Result<(), Errno>, Request)> {
        Box::pin(async move { (self.guarded(&mut req).await, req) })
    }

    /// Only asked of a guarded node: the engine looks through the others by itself.
    fn status(&self, range: Range<u64>, want_zero: bool) -> LocalFuture<'_, Result<Status, Errno>> {
        Box::pin(async move {
            let (from, to) = (self.at(range.start)?, self.at(range.end)?);
            let mut status = self.file.status(from..to, want_zero).await?;
            status.offset = status.offset.map(|_| from);
            Ok(status)
        })
    }

    fn truncate(&self, size: u64, prealloc: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.resize(size, prealloc))
    }

    fn filename(&self) -> String {
        self.filename.clone()
    }

    fn supports_reopen(&self) -> bool {
        true
    }

    fn reopen_prepare<'a>(&'a self, new: &'a Reopen) -> LocalFuture<'a, Result<Prepared, Error>> {
        Box::pin(async move { self.reopen(new) })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(offset: u64, size: Option<u64>) -> RawConfig {
        RawConfig { offset, size, probed: false }
    }

    /// Goal: windows that do not fit are refused with the known texts, the others have the right size.
    #[test]
    fn windows() {
        let text = |c, real| window(&c, real).expect_err("refused").message;
        assert_eq!(window(&at(0, None), 1 << 20), Ok(1 << 20));
        assert_eq!(window(&at(513, None), 1 << 20), Ok((1 << 20) - 512));
        assert_eq!(window(&at(512, Some(512)), 1024), Ok(512));
        assert_eq!(
            text(at(2000000, None), 1048576),
            "Offset (2000000) cannot be greater than size of the containing file (1048576)"
        );
        assert_eq!(
            text(at(512, Some(1024)), 1024),
            "The sum of offset (512) and size (1024) has to be smaller or equal to the  actual size of the containing file (1024)"
        );
        assert_eq!(text(at(0, Some(513)), 1024), "Specified size is not multiple of 512");
        assert!(window(&at(u64::MAX, Some(u64::MAX)), 1024).is_err());
    }
}
