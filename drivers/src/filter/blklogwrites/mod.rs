//! `blklogwrites`: everything that changes a node, written into a log that can be replayed to any moment of the run.
//!
//! ```text
//!   write ─► file ─► completed ─► entry + data ─► answer           flush: place of the entry ─► file flush ─► entry ─► answer
//! ```
//!
//! The log has to say what a power cut may leave. A write is certain to survive only if it *completed* before a flush was
//! *submitted* and that flush succeeded (rule D1 of the crash model), so the order of the entries is made to say just that:
//!
//! - A write's entry gets its place after the write has completed, and before whoever asked for it is told.
//! - A flush's entry gets its place before the flush is passed on. So what stands before it in the log had completed when
//!   it was submitted, on whatever core. What completes while it is under way comes after it, although it may have been
//!   caught: the log promises less than the disk may have kept, never more. Nobody above can have relied on more, for
//!   nobody has been told of a write that has no place yet.
//! - A flush that failed promises nothing: a mark stands in its place.
//! - A write that failed may have left anything; what is found there afterwards is logged.
//!
//! Requests that overlap wait for each other (`order`), so the last entry of a sector is what the sector has in the end,
//! and replaying the whole log gives the file as it is. Sectors that a request changes in part are logged whole, read back
//! under the same guard. Zero writes are logged as data, sparse where the log's file can be; discards without data, whole
//! sectors only. The format knows no changes of size: a mark notes those. The log and the peer's can continue each other.

pub mod format;
mod log;

use format::{Entry, Mark, Times, flag};
use log::{Body, Log};
use ringblock_engine::core::Core;
use ringblock_engine::driver::{Driver, Kind, LocalFuture, Op, Opened, Preallocation, Request, Role, Status};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::{ChildSpec, OpenCx};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::{Child, Serial};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Sector size of a new log where none is given.
pub const SECTOR_SIZE: u32 = 512;
/// After how many entries the super block is written where nothing is given.
pub const INTERVAL: u64 = 4096;
/// What is read back is read in pieces of this size.
const PIECE: u64 = 1 << 20;

/// What a node is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Sector size of a new log.
    pub sector_size: u32,
    /// Goes on with the log that is there.
    pub append: bool,
    /// After how many entries the super block is written.
    pub interval: u64,
}

/// A node whose changes are logged.
pub struct LogWrites {
    file: Child,
    log: Log,
    /// Ranges that are being changed, in bytes of the node.
    order: Arc<Serial>,
    /// Something was logged since the last flush.
    unflushed: AtomicBool,
    clock: u64,
}

/// Opens a node on `file` that logs into `log`.
pub async fn open(cx: OpenCx, config: Config, file: ChildSpec, log: ChildSpec) -> Result<Opened, Error> {
    if config.interval == 0 {
        return Err(Error::invalid("Invalid log superblock update interval 0"));
    }
    let file = cx.open_child("file", Role::Filtered, file).await?;
    let log = cx.open_child("log", Role::Image, log).await?;
    let log = match config.append {
        true => Log::append_to(log, config.sector_size, config.interval).await?,
        false => Log::new(log, config.sector_size, config.interval)?,
    };
    let unflushed = AtomicBool::new(false);
    let driver = LogWrites { file, log, order: Arc::default(), unflushed, clock: clock() };
    Ok(Opened { driver: Arc::new(driver), owner: None })
}

/// What the core's clock, which does not jump, has to be added to for nanoseconds since 1970: of several readings the one
/// that took the least time, for a thread may be stopped between two clocks.
fn clock() -> u64 {
    let core = Core::current();
    let read = |_| {
        let before = core.now_exact();
        let wall = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let took = core.now_exact() - before;
        let wall = wall.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(0));
        (took, wall.saturating_sub(before))
    };
    (0..16).map(read).min().map_or(0, |(_, clock)| clock)
}

impl LogWrites {
    fn now(&self) -> u64 {
        self.clock.saturating_add(Core::current().now_exact())
    }

    /// The whole sectors of the log around a range.
    fn around(&self, range: &Range<u64>) -> Result<Range<u64>, Errno> {
        let sector = self.log.sector;
        let end = range.end.checked_next_multiple_of(sector).ok_or(Errno::EINVAL)?;
        Ok(range.start - range.start % sector..end)
    }

    /// Logs a range that is whole sectors. The buffer comes back.
    async fn note(
        &self,
        range: &Range<u64>,
        flags: u64,
        times: Times,
        body: Option<Body>,
    ) -> Result<Option<Buf>, Errno> {
        let sector = self.log.sector;
        let sectors = (range.end - range.start) / sector;
        let entry = Entry { sector: range.start / sector, sectors, flags, data_len: 0 };
        let place = self.log.place(entry.data_sectors()).await?;
        self.unflushed.store(true, Ordering::Relaxed);
        let back = self.log.write(place, entry, times, "", body).await?;
        if flags & flag::FUA != 0 {
            // durable is durable: a log that is cut off here has it
            self.log.settle(place).await?;
        }
        Ok(back)
    }

    /// Logs what a range, whole sectors, has now. What cannot be read cannot be logged.
    async fn note_found(&self, range: &Range<u64>, flags: u64, times: Times) -> Result<(), Errno> {
        let piece = PIECE.max(self.log.sector);
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + piece);
            let (found, data) = self.file.read(at, Buf::zeroed((end - at) as usize)).await;
            if let Err(e) = found {
                self.log.fail(e);
                return Err(e);
            }
            self.note(&(at..end), flags, times, Some(Body::Data(data))).await?;
            at = end;
        }
        Ok(())
    }

    async fn write(&self, req: &mut Request) -> Result<(), Errno> {
        let buf = req.buf.take().ok_or(Errno::EINVAL)?;
        let range = range(req)?;
        let whole = self.around(&range)?;
        let _turn = self.order.reserve(whole.clone()).await;
        let began = self.now();
        let (written, buf) = self.file.write(req.offset, buf, req.flags).await;
        let times = Times { began, ended: self.now() };
        let flags = if req.flags.fua && written.is_ok() { flag::FUA } else { 0 };
        if written.is_ok() && whole == range {
            req.buf = self.note(&range, flags, times, Some(Body::Data(buf))).await?;
            return Ok(());
        }
        req.buf = Some(buf);
        let noted = self.note_found(&whole, flags, times).await;
        written.and(noted)
    }

    async fn zero(&self, req: &Request) -> Result<(), Errno> {
        let range = range(req)?;
        let whole = self.around(&range)?;
        let _turn = self.order.reserve(whole.clone()).await;
        let began = self.now();
        let zeroed = self.file.write_zeroes(req.offset, req.len, req.flags).await;
        let times = Times { began, ended: self.now() };
        if zeroed.is_err() {
            // refused, perhaps, after part of it was done
            return self.note_found(&whole, 0, times).await.and(zeroed);
        }
        let flags = if req.flags.fua { flag::FUA } else { 0 };
        let inner = self.inside(&range);
        if inner.is_empty() {
            return self.note_found(&whole, flags, times).await;
        }
        self.note_found(&(whole.start..inner.start), flags, times).await?;
        let zeroes = Body::Zeroes(inner.end - inner.start);
        self.note(&inner, flags, times, Some(zeroes)).await?;
        self.note_found(&(inner.end..whole.end), flags, times).await
    }

    /// The whole sectors inside a range.
    fn inside(&self, range: &Range<u64>) -> Range<u64> {
        let sector = self.log.sector;
        let start = range.start.checked_next_multiple_of(sector).unwrap_or(range.end);
        start..(range.end - range.end % sector).max(start)
    }

    async fn discard(&self, req: &Request) -> Result<(), Errno> {
        let inner = self.inside(&range(req)?);
        if inner.is_empty() {
            return Ok(());
        }
        let _turn = self.order.reserve(inner.clone()).await;
        let began = self.now();
        let done = self.file.discard(inner.start, inner.end - inner.start).await;
        let times = Times { began, ended: self.now() };
        match done {
            Ok(()) => self.note(&inner, flag::DISCARD, times, None).await.map(drop),
            Err(e) => self.note_found(&inner, 0, times).await.and(Err(e)),
        }
    }

    async fn flush(&self) -> Result<(), Errno> {
        self.unflushed.store(false, Ordering::Relaxed);
        // everything that has completed has its place already
        let place = self.log.place(0).await?;
        let began = self.now();
        let done = self.file.flush().await;
        let times = Times { began, ended: self.now() };
        match done {
            Ok(()) => {
                let entry = Entry { flags: flag::FLUSH, ..Entry::default() };
                self.log.write(place, entry, times, "", None).await?;
            }
            Err(_) => self.mark(place, Mark::FlushFailed).await?,
        }
        self.log.settle(place).await?;
        done
    }

    async fn mark(&self, place: log::Place, mark: Mark) -> Result<(), Errno> {
        let text = mark.text();
        let room = self.log.sector as usize - format::ENTRY_BYTES;
        let entry = Entry { flags: flag::MARK, data_len: text.len().min(room) as u64, ..Entry::default() };
        self.log.write(place, entry, Times::default(), &text, None).await.map(drop)
    }

    async fn resize(&self, size: u64, prealloc: Preallocation) -> Result<(), Error> {
        self.file.truncate(size, prealloc).await?;
        let noted = async {
            let place = self.log.place(0).await?;
            self.unflushed.store(true, Ordering::Relaxed);
            self.mark(place, Mark::Length(size)).await
        };
        noted.await.map_err(|e| Error::io(e, "Could not write the log"))
    }
}

fn range(req: &Request) -> Result<Range<u64>, Errno> {
    let end = req.offset.checked_add(req.len).filter(|e| i64::try_from(*e).is_ok());
    Ok(req.offset..end.ok_or(Errno::EINVAL)?)
}

impl Driver for LogWrites {
    fn name(&self) -> &'static str {
        "blklogwrites"
    }

    fn size(&self) -> u64 {
        self.file.size().unwrap_or(0)
    }

    fn kind(&self) -> Kind<'_> {
        Kind::Full
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn submit(&self, mut req: Request) -> LocalFuture<'_, (Result<(), Errno>, Request)> {
        Box::pin(async move {
            let done = match req.op {
                Op::Read => return super::pass(&self.file, req).await,
                Op::Write => self.write(&mut req).await,
                Op::WriteZeroes => self.zero(&req).await,
                Op::Discard => self.discard(&req).await,
                Op::Flush => self.flush().await,
            };
            (done, req)
        })
    }

    fn status(&self, range: Range<u64>, want_zero: bool) -> LocalFuture<'_, Result<Status, Errno>> {
        Box::pin(async move { self.file.status(range, want_zero).await })
    }

    fn truncate(&self, size: u64, prealloc: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.resize(size, prealloc))
    }

    /// The last entries are counted; what no flush covers is flushed, as the peer does when it closes a node.
    fn close(&self) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            // nobody is left who could be told of a failure; the log is then as long as its super block says
            if self.unflushed.load(Ordering::Relaxed) {
                let _ = self.flush().await;
            }
            let _ = self.log.finish().await;
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
