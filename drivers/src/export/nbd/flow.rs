//! The way out of a connection: replies collect in a batch while the one before is being sent, and what a
//! client may have in flight is counted.
//!
//! Invariants:
//! - A request holds its share of the budget from admission until its reply has been sent, so a client that
//!   does not read its replies is soon not read from either; nobody else is affected.
//! - The budget bounds a batch: requests in flight times two parts is below the kernel's limit of vectors.
//! - After an error of the socket replies are dropped, requests run to their end, and the socket is shut.
//!
//! ```text
//! reader ── admit ──► request tasks ── reply ──► [batch filling] ⇄ [batch in sendmsg] ── release ──► reader
//! ```

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Context, Poll, Waker};

use ringblock_engine::mem::Buf;
use ringblock_engine::net::Socket;
use ringblock_engine::ring::SendBatch;

/// Requests a connection may have in flight.
pub(super) const REQUESTS_MAX: usize = 256;
/// Bytes of data a connection may have in flight; a single request may be larger, then it is alone.
pub(super) const BYTES_MAX: usize = 16 << 20;

/// One waiter of this core.
#[derive(Default)]
struct Waiter(Cell<Option<Waker>>);

impl Waiter {
    fn wait(&self, cx: &mut Context<'_>) {
        self.0.set(Some(cx.waker().clone()));
    }
    fn wake(&self) {
        if let Some(w) = self.0.take() {
            w.wake();
        }
    }
}

#[derive(Default)]
struct Filling {
    batch: Box<SendBatch>,
    head: Vec<u8>,
    requests: usize,
    bytes: usize,
}

/// The outgoing half of a connection.
pub(super) struct Flow {
    stream: Socket,
    filling: RefCell<Filling>,
    requests: Cell<usize>,
    bytes: Cell<usize>,
    /// The reader still admits.
    open: Cell<bool>,
    broken: Cell<bool>,
    reader: Waiter,
    sender: Waiter,
}

impl Flow {
    pub(super) fn new(stream: Socket) -> Flow {
        Flow {
            stream,
            filling: RefCell::default(),
            requests: Cell::new(0),
            bytes: Cell::new(0),
            open: Cell::new(true),
            broken: Cell::new(false),
            reader: Waiter::default(),
            sender: Waiter::default(),
        }
    }

    /// Waits until a request that moves `bytes` may be taken on. The one reader calls it.
    pub(super) async fn admit(&self, bytes: usize) {
        poll_fn(|cx| {
            let have = self.bytes.get();
            let fits = have == 0 || have.saturating_add(bytes) <= BYTES_MAX;
            if self.requests.get() >= REQUESTS_MAX || !fits {
                self.reader.wait(cx);
                return Poll::Pending;
            }
            self.requests.set(self.requests.get() + 1);
            self.bytes.set(have.saturating_add(bytes));
            Poll::Ready(())
        })
        .await
    }

    /// Queues the one reply of a request that was admitted with `bytes`.
    pub(super) fn reply(&self, bytes: usize, data: Option<Buf>, encode: impl FnOnce(&mut Vec<u8>)) {
        let mut filling = self.filling.borrow_mut();
        let f = &mut *filling;
        f.head.clear();
        encode(&mut f.head);
        f.batch.push_bytes(&f.head);
        if let Some(data) = data {
            f.batch.push_buf(data);
        }
        f.requests += 1;
        f.bytes += bytes;
        drop(filling);
        self.sender.wake();
    }

    /// The reader takes no more requests; the sender ends when the last reply is out.
    pub(super) fn close(&self) {
        self.open.set(false);
        self.sender.wake();
    }

    /// Whether the socket has failed.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.get()
    }

    /// Sends batch after batch until the connection is closed and everything is out.
    pub(super) async fn run(&self) {
        let mut spare: Box<SendBatch> = Box::default();
        loop {
            let Some((requests, bytes)) = self.next(&mut spare).await else {
                return;
            };
            if !self.broken.get() {
                let (result, back) = self.stream.send(spare).await;
                spare = back;
                if result.is_err() {
                    self.broken.set(true);
                    self.stream.shutdown();
                }
            }
            spare.clear();
            self.requests.set(self.requests.get() - requests);
            self.bytes.set(self.bytes.get() - bytes);
            self.reader.wake();
        }
    }

    /// Swaps the filled batch for the empty one, when there is something in it. `None` at the end.
    async fn next(&self, spare: &mut Box<SendBatch>) -> Option<(usize, usize)> {
        poll_fn(|cx| {
            let mut filling = self.filling.borrow_mut();
            let f = &mut *filling;
            if f.requests > 0 {
                std::mem::swap(&mut f.batch, spare);
                let share = (std::mem::take(&mut f.requests), std::mem::take(&mut f.bytes));
                return Poll::Ready(Some(share));
            }
            if !self.open.get() && self.requests.get() == 0 {
                return Poll::Ready(None);
            }
            self.sender.wait(cx);
            Poll::Pending
        })
        .await
    }
}
