//! The bounded queue between what is said to a client and its connection.
//!
//! Answers wait for room: only their own client's thread does, so a client that does not read stops being served and
//! nobody else notices. Events do not wait: a client so far behind that the queue is full is disconnected, because a
//! control program that misses events without knowing is worse off than one that has to connect again.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Beyond this many bytes answers wait.
const SOFT: usize = 256 << 10;
/// Beyond this many bytes events overflow.
const HARD: usize = 1 << 20;

#[derive(Default)]
struct State {
    queue: VecDeque<Arc<str>>,
    bytes: usize,
    writing: bool,
    closed: bool,
}

/// A queue of output.
#[derive(Default)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues an answer; waits while the queue is over its soft bound. False if the client is gone.
    pub(crate) fn send(&self, text: Arc<str>) -> bool {
        let mut s = self.lock();
        while s.bytes > SOFT && !s.closed {
            s = self.changed.wait(s).unwrap_or_else(PoisonError::into_inner);
        }
        self.push(s, text)
    }

    /// Queues an event without waiting. False if the client is gone or too far behind.
    pub(crate) fn offer(&self, text: Arc<str>) -> bool {
        let s = self.lock();
        s.bytes.saturating_add(text.len()) <= HARD && self.push(s, text)
    }

    fn push(&self, mut s: MutexGuard<'_, State>, text: Arc<str>) -> bool {
        if s.closed {
            return false;
        }
        s.bytes += text.len();
        s.queue.push_back(text);
        drop(s);
        self.changed.notify_all();
        true
    }

    /// The next text to write; waits for one. `None` when closed and empty.
    pub(crate) fn next(&self) -> Option<Arc<str>> {
        let mut s = self.lock();
        s.writing = false;
        self.changed.notify_all();
        loop {
            if let Some(text) = s.queue.pop_front() {
                s.bytes -= text.len();
                s.writing = true;
                drop(s);
                self.changed.notify_all();
                return Some(text);
            }
            if s.closed {
                return None;
            }
            s = self.changed.wait(s).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes nothing more in; what is queued may still be written.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Drops what is queued and takes nothing more in.
    pub(crate) fn abandon(&self) {
        let mut s = self.lock();
        (s.closed, s.bytes) = (true, 0);
        s.queue.clear();
        drop(s);
        self.changed.notify_all();
    }

    /// Waits until everything queued is written, for at most `limit`.
    pub(crate) fn drain(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut s = self.lock();
        while s.writing || !s.queue.is_empty() {
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                return;
            };
            s = self.changed.wait_timeout(s, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: bounds. Method: fill with events until refused; an answer waits until the writer took enough.
    #[test]
    fn bounded() {
        let outbox = Arc::new(Outbox::default());
        let kib: Arc<str> = "x".repeat(1024).into();
        let taken = (0..4096).take_while(|_| outbox.offer(kib.clone())).count();
        assert_eq!(taken, HARD / 1024);
        let waiting = std::thread::spawn({
            let (outbox, kib) = (outbox.clone(), kib.clone());
            move || outbox.send(kib)
        });
        for _ in 0..taken {
            assert!(outbox.next().is_some());
        }
        assert!(waiting.join().unwrap());
        outbox.close();
        assert!(outbox.next().is_some());
        assert!(outbox.next().is_none());
        assert!(!outbox.send(kib.clone()) && !outbox.offer(kib));
    }
}
