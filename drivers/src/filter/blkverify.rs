//! `blkverify`: two nodes that must always be the same: a driver under test, and a simple one to compare it with.
//!
//! ```text
//!   write, zeroes ─► test and raw, both            read ─► both ─► compared ─► the data, or EIO and a message
//! ```
//!
//! The peer prints what differs and ends its process. Here the process may be a daemon with other disks in it, which are
//! none the worse; so the request fails with `EIO`, whose user sees `BLOCK_IO_ERROR` as for any failing disk, and the
//! program hears of it ([`Event::Mismatch`]): the daemon and the tools print the peer's words, and `io` ends there, with
//! status 1, like the peer's.
//!
//! - Requests that overlap wait for each other: otherwise two writes could land in one order here and in the other there,
//!   and a read meet the one before a write and the other after it.
//! - Results must be the same as well; a failure of only one of the two is a mismatch.
//! - Discards go no further: what is read after one is nobody's promise, so there would be nothing to compare.
//! - `raw` is the one shown through: block status is its. The node is as long as `test`, and `raw` may be longer.

use ringblock_engine::core::Core;
use ringblock_engine::driver::{Driver, Kind, LocalFuture, Op, Opened, Preallocation, Request, Role, Status};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::event::Event;
use ringblock_engine::graph::{ChildSpec, OpenCx};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::{Child, Serial};
use std::any::Any;
use std::future::Future;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

/// A node that compares two.
pub struct Verify {
    name: String,
    raw: Child,
    test: Child,
    /// Ranges that are being read or written.
    order: Arc<Serial>,
}

/// Opens a node that compares `test` with `raw`.
pub async fn open(cx: OpenCx, test: ChildSpec, raw: ChildSpec) -> Result<Opened, Error> {
    let raw = cx.open_child("raw", Role::Filtered, raw).await?;
    let test = cx.open_child("test", Role::Data, test).await?;
    let (is, least) = (raw.size()?, test.size()?);
    if is < least {
        let text = format!("'raw' ({is} bytes) is smaller than 'test' ({least} bytes)");
        return Err(Error::invalid(text));
    }
    let driver = Verify { name: cx.name.clone(), raw, test, order: Arc::default() };
    Ok(Opened { driver: Arc::new(driver), owner: None })
}

impl Verify {
    /// Says what differs; the request fails.
    fn mismatch(&self, what: &str, range: &Range<u64>, how: String) -> Errno {
        let (offset, bytes) = (range.start, range.end - range.start);
        let text = format!("blkverify: {what} offset={offset} bytes={bytes} {how}");
        Core::current().emit(Event::Mismatch { node: self.name.clone(), text });
        Errno::EIO
    }

    /// Both results, which must be the same.
    fn same(
        &self,
        what: &str,
        range: &Range<u64>,
        raw: Result<(), Errno>,
        test: Result<(), Errno>,
    ) -> Result<(), Errno> {
        let number = |r: Result<(), Errno>| r.err().map_or(0, |e| -e.0);
        if raw == test {
            return raw;
        }
        let how = format!("return value mismatch {} != {}", number(raw), number(test));
        Err(self.mismatch(what, range, how))
    }

    async fn read(&self, req: &mut Request, range: &Range<u64>) -> Result<(), Errno> {
        let buf = req.buf.take().ok_or(Errno::EINVAL)?;
        let other = Buf::new(buf.len());
        let ((raw, mut buf), (test, other)) =
            both(self.raw.read(req.offset, buf), self.test.read(req.offset, other)).await;
        let mut done = self.same("read", range, raw, test);
        if done.is_ok()
            && let Some(at) = buf.iter().zip(other.iter()).position(|(a, b)| a != b)
        {
            let how = format!("contents mismatch at offset {}", range.start + at as u64);
            done = Err(self.mismatch("read", range, how));
        }
        if done.is_err() {
            // neither of the two is to be taken for the truth
            buf.fill(0);
        }
        req.buf = Some(buf);
        done
    }

    async fn write(&self, req: &mut Request, range: &Range<u64>) -> Result<(), Errno> {
        let buf = req.buf.take().ok_or(Errno::EINVAL)?;
        let other = Buf::from_slice(&buf);
        let ((raw, buf), (test, _)) =
            both(self.raw.write(req.offset, buf, req.flags), self.test.write(req.offset, other, req.flags))
                .await;
        req.buf = Some(buf);
        self.same("write", range, raw, test)
    }

    async fn zero(&self, req: &Request, range: &Range<u64>) -> Result<(), Errno> {
        // one of the two may have no quick way: then neither takes it
        let flags = ringblock_engine::driver::Flags { no_fallback: false, ..req.flags };
        if req.flags.no_fallback {
            return Err(Errno::ENOTSUP);
        }
        let (raw, test) = both(
            self.raw.write_zeroes(req.offset, req.len, flags),
            self.test.write_zeroes(req.offset, req.len, flags),
        )
        .await;
        self.same("write_zeroes", range, raw, test)
    }

    async fn flush(&self) -> Result<(), Errno> {
        let (raw, test) = both(self.raw.flush(), self.test.flush()).await;
        raw.and(test)
    }

    async fn resize(&self, size: u64, prealloc: Preallocation) -> Result<(), Error> {
        // the one that may refuse goes first, but `raw` must never be the shorter one
        if size < self.test.size()? {
            self.test.truncate(size, prealloc).await?;
            return self.raw.truncate(size, prealloc).await;
        }
        self.raw.truncate(size, prealloc).await?;
        self.test.truncate(size, prealloc).await
    }
}

/// Both results of two futures that run side by side.
async fn both<A, B>(a: impl Future<Output = A>, b: impl Future<Output = B>) -> (A, B) {
    let (mut a, mut b) = (pin!(a), pin!(b));
    let (mut of_a, mut of_b) = (None, None);
    std::future::poll_fn(|cx| {
        if of_a.is_none()
            && let Poll::Ready(done) = a.as_mut().poll(cx)
        {
            of_a = Some(done);
        }
        if of_b.is_none()
            && let Poll::Ready(done) = b.as_mut().poll(cx)
        {
            of_b = Some(done);
        }
        match (of_a.take(), of_b.take()) {
            (Some(a), Some(b)) => Poll::Ready((a, b)),
            (a, b) => {
                (of_a, of_b) = (a, b);
                Poll::Pending
            }
        }
    })
    .await
}

impl Driver for Verify {
    fn name(&self) -> &'static str {
        "blkverify"
    }

    fn size(&self) -> u64 {
        self.test.size().unwrap_or(0)
    }

    fn kind(&self) -> Kind<'_> {
        Kind::Full
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn submit(&self, mut req: Request) -> LocalFuture<'_, (Result<(), Errno>, Request)> {
        Box::pin(async move {
            let Some(end) = req.offset.checked_add(req.len) else { return (Err(Errno::EINVAL), req) };
            let range = req.offset..end;
            let _turn = match req.op {
                Op::Flush | Op::Discard => None,
                _ => Some(self.order.reserve(range.clone()).await),
            };
            let done = match req.op {
                Op::Read => self.read(&mut req, &range).await,
                Op::Write => self.write(&mut req, &range).await,
                Op::WriteZeroes => self.zero(&req, &range).await,
                Op::Discard => Err(Errno::ENOTSUP),
                Op::Flush => self.flush().await,
            };
            (done, req)
        })
    }

    fn status(&self, range: Range<u64>, want_zero: bool) -> LocalFuture<'_, Result<Status, Errno>> {
        Box::pin(async move { self.raw.status(range, want_zero).await })
    }

    fn truncate(&self, size: u64, prealloc: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.resize(size, prealloc))
    }

    /// The short form in which the peer names such a node.
    fn filename(&self) -> String {
        let name = |child: &Child| child.filename().unwrap_or_default();
        match (name(&self.raw), name(&self.test)) {
            (raw, test) if raw.is_empty() || test.is_empty() => String::new(),
            (raw, test) => format!("blkverify:{raw}:{test}"),
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
