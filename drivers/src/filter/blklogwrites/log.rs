//! Appending to the log, from several cores at once.
//!
//! An entry first gets its place, then is written, and counts once everything before it is written too.
//!
//! ```text
//!   places:   0 … done │ written, or still being written │ next
//!   on disk:  counted ≤ done                super block: nr_entries = counted
//! ```
//!
//! Invariants: the super block counts only entries that are written and durable, all before them included; it is taken
//! back to none before the first entry replaces those of an older log. An entry that could not be written makes all later
//! ones impossible: a log with a gap is none, so requests fail from then on.

use super::format::{ENTRY_BYTES, Entry, Super, Times, check_sector_size};
use ringblock_engine::driver::Flags;
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::{Child, Serial};
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Poll, Waker};

/// The log of one node.
pub(super) struct Log {
    child: Child,
    /// Bytes of a sector.
    pub(super) sector: u64,
    interval: u64,
    state: Mutex<State>,
    /// Whoever writes the super block holds it.
    turn: Arc<Serial>,
}

#[derive(Default)]
struct State {
    /// Sector of the next entry.
    next: u64,
    /// Entries that have a place.
    entries: u64,
    /// Entries that are written without a gap.
    done: u64,
    /// Written ones behind a gap.
    ahead: BTreeSet<u64>,
    /// Entries that the super block counts.
    counted: u64,
    /// The super block is of this log.
    begun: bool,
    failed: Option<Errno>,
    waiting: Vec<Waker>,
}

/// An entry's place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    number: u64,
    sector: u64,
}

/// What follows an entry.
pub(super) enum Body {
    /// These sectors.
    Data(Buf),
    /// So many bytes of zeroes.
    Zeroes(u64),
}

impl Log {
    /// A new log. What is there is replaced with the first entry.
    pub(super) fn new(child: Child, sector_size: u32, interval: u64) -> Result<Log, Error> {
        check_sector_size(sector_size)?;
        let state = Mutex::new(State { next: 1, ..State::default() });
        Ok(Log { child, sector: u64::from(sector_size), interval, state, turn: Arc::default() })
    }

    /// Goes on with a log that is there; an empty file begins a new one.
    pub(super) async fn append_to(child: Child, sector_size: u32, interval: u64) -> Result<Log, Error> {
        let head = read(&child, 0, 512).await?;
        let Some(old) = Super::parse(&head)? else {
            return Log::new(child, sector_size, interval);
        };
        let log = Log::new(child, old.sector_size, interval)?;
        let next = log.end_of(old.entries).await?;
        let n = old.entries;
        *log.lock() = State { next, entries: n, done: n, counted: n, begun: true, ..State::default() };
        Ok(log)
    }

    /// The sector behind the last of `entries` entries.
    async fn end_of(&self, entries: u64) -> Result<u64, Error> {
        let size = self.child.size()?;
        let mut next = 1u64;
        for number in 0..entries {
            let beyond = || Error::invalid(format!("Log entry {number} lies beyond the end of the log"));
            let at = next.checked_mul(self.sector).filter(|at| at + ENTRY_BYTES as u64 <= size);
            let entry = Entry::parse(&read(&self.child, at.ok_or_else(beyond)?, ENTRY_BYTES).await?, number)?;
            let end = entry.data_sectors().checked_add(next + 1);
            next = end.filter(|e| e.checked_mul(self.sector).is_some_and(fits)).ok_or_else(beyond)?;
        }
        Ok(next)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether there are entries that the super block does not count.
    pub(super) fn is_behind(&self) -> bool {
        let state = self.lock();
        state.failed.is_none() && state.counted < state.done
    }

    /// A place for an entry with so many sectors of data behind it.
    pub(super) async fn place(&self, sectors: u64) -> Result<Place, Errno> {
        if !self.lock().begun {
            self.begin().await?;
        }
        let mut state = self.lock();
        if let Some(e) = state.failed {
            return Err(e);
        }
        let sector = state.next;
        let end = sectors.checked_add(sector + 1).filter(|e| e.checked_mul(self.sector).is_some_and(fits));
        state.next = end.ok_or(Errno::EFBIG)?;
        state.entries += 1;
        Ok(Place { number: state.entries - 1, sector })
    }

    /// Before the first entry: the super block of a log without entries.
    async fn begin(&self) -> Result<(), Errno> {
        let _turn = self.turn.reserve(0..1).await;
        if self.lock().begun {
            return Ok(());
        }
        self.put_super(0).await?;
        self.lock().begun = true;
        Ok(())
    }

    /// Writes an entry to its place. The buffer comes back.
    pub(super) async fn write(
        &self,
        place: Place,
        entry: Entry,
        times: Times,
        text: &str,
        body: Option<Body>,
    ) -> Result<Option<Buf>, Errno> {
        let mut head = Buf::zeroed(self.sector as usize);
        entry.put(&mut head);
        if text.is_empty() {
            times.put(&mut head);
        } else {
            let room = head.len() - ENTRY_BYTES;
            let text = &text.as_bytes()[..text.len().min(room)];
            head[ENTRY_BYTES..ENTRY_BYTES + text.len()].copy_from_slice(text);
        }
        let at = place.sector * self.sector;
        let (result, back) = match body {
            None => (Ok(()), None),
            Some(Body::Zeroes(len)) => {
                (self.child.write_zeroes(at + self.sector, len, Flags::NONE).await, None)
            }
            Some(Body::Data(data)) => {
                let (result, data) = self.child.write(at + self.sector, data, Flags::NONE).await;
                (result, Some(data))
            }
        };
        let result = match result {
            Ok(()) => self.child.write(at, head, Flags::NONE).await.0,
            failed => failed,
        };
        match result {
            Ok(()) => self.written(place),
            Err(e) => self.fail(e),
        }
        result?;
        if self.is_due() {
            self.count(0).await?;
        }
        Ok(back)
    }

    fn written(&self, place: Place) {
        let mut state = self.lock();
        state.ahead.insert(place.number);
        let from = state.done;
        while state.ahead.first() == Some(&state.done) {
            state.ahead.pop_first();
            state.done += 1;
        }
        if state.done > from {
            wake(state);
        }
    }

    /// From now on there is a gap.
    pub(super) fn fail(&self, errno: Errno) {
        let mut state = self.lock();
        state.failed.get_or_insert(errno);
        wake(state);
    }

    fn is_due(&self) -> bool {
        let state = self.lock();
        state.done - state.counted >= self.interval
    }

    /// Waits until everything up to an entry is written, and has the super block count it.
    pub(super) async fn settle(&self, place: Place) -> Result<(), Errno> {
        poll_fn(|cx| {
            let mut state = self.lock();
            match state.failed {
                Some(e) => Poll::Ready(Err(e)),
                None if state.done > place.number => Poll::Ready(Ok(())),
                None => {
                    state.waiting.push(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await?;
        self.count(place.number + 1).await
    }

    /// Has the super block count what is written; there is nothing to do if it counts `enough` (0: whatever is due).
    async fn count(&self, enough: u64) -> Result<(), Errno> {
        let _turn = self.turn.reserve(0..1).await;
        let (done, counted) = {
            let state = self.lock();
            (state.done, state.counted)
        };
        if done == counted || enough > 0 && counted >= enough || enough == 0 && !self.is_due() {
            return Ok(());
        }
        let durable = match self.child.flush().await {
            Ok(()) => self.put_super(done).await,
            failed => failed,
        };
        match durable {
            Ok(()) => self.lock().counted = done,
            Err(e) => self.fail(e),
        }
        durable
    }

    /// At the end: the super block counts everything.
    pub(super) async fn finish(&self) -> Result<(), Errno> {
        let all = self.lock().done;
        if self.is_behind() { self.count(all).await } else { Ok(()) }
    }

    async fn put_super(&self, entries: u64) -> Result<(), Errno> {
        let mut head = Buf::zeroed(self.sector.max(super::format::SUPER_BYTES as u64) as usize);
        Super { entries, sector_size: self.sector as u32 }.put(&mut head);
        self.child.write(0, head, Flags::FUA).await.0
    }
}

fn wake(mut state: MutexGuard<'_, State>) {
    let waiting = std::mem::take(&mut state.waiting);
    drop(state);
    waiting.into_iter().for_each(Waker::wake);
}

fn fits(offset: u64) -> bool {
    i64::try_from(offset).is_ok()
}

/// Reads bytes that may lie behind the end, where there are zeroes.
async fn read(child: &Child, at: u64, len: usize) -> Result<Buf, Error> {
    let (done, buf) = child.read(at, Buf::zeroed(len)).await;
    done.map_err(|e| Error::io(e, "Could not read the log"))?;
    Ok(buf)
}
