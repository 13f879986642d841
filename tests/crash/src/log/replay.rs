//! A log of dm-log-writes, read and made a recording.
//!
//! ```text
//!   bytes ─► items, in the log's order ─► events: submitted, completed, flush … by their times, or by their order ─► Recording
//! ```
//!
//! Entries of ours say when a request was passed on and when it completed; then the events have those times, and requests of
//! guests, noted with the same clock, find their place among them. Entries of other programs have only their order: each
//! write completes where it stands, and a flush covers what stands before it.

use std::path::PathBuf;

use ringblock_drivers::filter::blklogwrites::format::{ENTRY_BYTES, Entry, Mark, Super, Times, flag};
use ringblock_engine::host::sim::{Change, Event};

use crate::record::{Recording, Roles};

/// The name of the image in recordings.
pub(super) const IMAGE: &str = "/img";

/// What an entry means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// Bytes at an offset; whether they were durable at once.
    Data(u64, Vec<u8>, bool),
    /// A range that nobody needs.
    Discard(std::ops::Range<u64>),
    /// A flush, and whether it succeeded.
    Flush(bool),
    /// A new length of the file.
    Length(u64),
}

/// One entry.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) what: What,
    pub(super) times: Option<Times>,
}

/// A log.
#[derive(Clone, Debug, Default)]
pub(super) struct Log {
    pub(super) items: Vec<Item>,
}

impl Log {
    /// Reads all entries that the super block counts.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn parse(bytes: &[u8]) -> Result<Log, String> {
        let head = Super::parse(bytes).map_err(|e| e.message)?.ok_or("the log is empty")?;
        let sector = u64::from(head.sector_size);
        let part = |at: u64, len: u64| {
            let end = at.checked_add(len).filter(|e| *e <= bytes.len() as u64)?;
            bytes.get(at as usize..end as usize)
        };
        let (mut at, mut items) = (sector, Vec::new());
        for number in 0..head.entries {
            let short = || format!("entry {number} lies beyond the end of the log");
            let own = part(at, sector).ok_or_else(short)?;
            let entry = Entry::parse(own, number).map_err(|e| e.message)?;
            let len = entry.data_sectors().checked_mul(sector).ok_or_else(short)?;
            let off = entry.sector.checked_mul(sector).ok_or_else(short)?;
            // what a sparse file lacks at its end reads as zeroes
            let data = part(at + sector, len).ok_or_else(short)?;
            at += sector + len;
            let what = if entry.flags & flag::MARK != 0 {
                let text = own.get(ENTRY_BYTES..).and_then(|t| t.get(..entry.data_len as usize));
                match text.and_then(Mark::parse) {
                    Some(Mark::FlushFailed) => What::Flush(false),
                    Some(Mark::Length(n)) => What::Length(n),
                    None => continue,
                }
            } else if entry.flags & flag::DISCARD != 0 {
                let end = entry.sectors.checked_mul(sector).and_then(|n| n.checked_add(off));
                What::Discard(off..end.ok_or_else(short)?)
            } else if len > 0 {
                What::Data(off, data.to_vec(), entry.flags & flag::FUA != 0)
            } else if entry.flags & flag::FLUSH != 0 {
                What::Flush(true)
            } else {
                continue;
            };
            items.push(Item { what, times: Times::parse(own) });
        }
        Ok(Log { items })
    }

    /// Whether all entries but marks have times.
    pub(super) fn is_timed(&self) -> bool {
        let needs = |w: &What| !matches!(w, What::Flush(false) | What::Length(_));
        self.items.iter().all(|i| i.times.is_some() || !needs(&i.what))
    }

    /// Flushes that succeeded.
    pub(super) fn flushes(&self) -> usize {
        self.items.iter().filter(|i| i.what == What::Flush(true)).count()
    }

    /// The file after all entries, one after another.
    pub(super) fn image(&self, base: &[u8]) -> Vec<u8> {
        let mut image = base.to_vec();
        for item in &self.items {
            match &item.what {
                What::Data(off, data, _) => {
                    let (from, end) = (*off as usize, *off as usize + data.len());
                    image.resize(image.len().max(end), 0);
                    image[from..end].copy_from_slice(data);
                }
                What::Discard(range) => {
                    let len = image.len();
                    image[(range.start as usize).min(len)..(range.end as usize).min(len)].fill(0);
                }
                What::Length(len) => image.resize(*len as usize, 0),
                What::Flush(_) => {}
            }
        }
        image
    }

    /// The recording of a run that began with the file `base`; `guests` are requests of guests with their times.
    pub(super) fn recording(&self, base: Vec<u8>, sectors: usize, guests: &[(u64, Event)]) -> Recording {
        let roles = Roles { image: IMAGE.into(), data: None, backing: None, sectors };
        let mut line = Line::default();
        let timed = self.is_timed();
        let mut length = base.len() as u64;
        for (i, item) in self.items.iter().enumerate() {
            let by_order = Times { began: 2 * i as u64, ended: 2 * i as u64 + 1 };
            let times = if timed { item.times.unwrap_or_else(|| line.latest()) } else { by_order };
            line.item(i as u64 + 1, &item.what, times, &mut length);
        }
        if timed {
            guests.iter().for_each(|(at, event)| line.add(*at, 1, event.clone()));
        }
        let events = line.finish();
        Recording { unit: 512, roles, files: vec![(PathBuf::from(IMAGE), base)], events, start: 0, trace: 0 }
    }
}

/// Events with their times. At the same time, what ends comes before what begins.
#[derive(Default)]
struct Line(Vec<(u64, u8, Event)>);

impl Line {
    fn add(&mut self, at: u64, class: u8, event: Event) {
        self.0.push((at, class, event));
    }

    /// The time of a mark: right behind the entries before it, which are done.
    fn latest(&self) -> Times {
        let last = self.0.iter().map(|e| e.0).max().unwrap_or(0);
        Times { began: last + 1, ended: last + 2 }
    }

    fn item(&mut self, id: u64, what: &What, times: Times, length: &mut u64) {
        let (began, ended) = (times.began, times.ended.max(times.began + 1));
        let (change, durable) = match what {
            What::Flush(ok) => {
                self.add(began, 1, Event::FlushSubmitted { disk: 0, id });
                return self.add(ended, 0, Event::FlushCompleted { disk: 0, id, ok: *ok });
            }
            What::Data(off, data, durable) => {
                *length = (*length).max(off + data.len() as u64);
                (Change::Data(*off, data.clone()), *durable)
            }
            // behind the end there is nothing to discard
            What::Discard(r) => (Change::Zero(r.start.min(*length)..r.end.min(*length), true), false),
            What::Length(len) => {
                *length = *len;
                (Change::Len(*len), false)
            }
        };
        let kept = if let Change::Data(_, data) = &change { data.len() as u64 } else { 0 };
        self.add(began, 1, Event::Submitted { disk: 0, id, change });
        self.add(ended, 0, Event::Completed { disk: 0, id, kept, durable });
    }

    fn finish(mut self) -> Vec<Event> {
        self.0.sort_by_key(|e| (e.0, e.1));
        self.0.into_iter().map(|e| e.2).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(entries: &[(Entry, Option<Times>, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        Super { entries: entries.len() as u64, sector_size: 512 }.put(&mut bytes);
        for (entry, times, data) in entries {
            let mut own = [0; 512];
            entry.put(&mut own);
            times.iter().for_each(|t| t.put(&mut own));
            bytes.extend_from_slice(&own);
            bytes.extend_from_slice(data);
        }
        bytes
    }

    fn write(sector: u64, byte: u8, times: Option<Times>) -> (Entry, Option<Times>, Vec<u8>) {
        (Entry { sector, sectors: 1, ..Entry::default() }, times, vec![byte; 512])
    }

    /// Goal: entries become the file and the events they stand for. Method: a log without times, and one whose write
    /// ended while a flush was under way.
    #[test]
    fn order_and_times() {
        let flush = |times| (Entry { flags: flag::FLUSH, ..Entry::default() }, times, Vec::new());
        let bytes = log(&[write(0, 1, None), flush(None), write(2, 2, None)]);
        let plain = Log::parse(&bytes).unwrap();
        assert!(!plain.is_timed());
        let image = plain.image(&[9; 512]);
        assert_eq!((image[0], image[512], image[1024], image.len()), (1, 0, 2, 1536));
        let events = plain.recording(vec![0; 512], 1, &[]).events;
        assert!(matches!(events[1], Event::Completed { id: 1, .. }));
        assert!(matches!(events[2], Event::FlushSubmitted { .. }));

        let t = |began, ended| Some(Times { began, ended });
        let bytes = log(&[flush(t(5, 9)), write(0, 1, t(1, 7))]);
        let events = Log::parse(&bytes).unwrap().recording(vec![0; 512], 1, &[]).events;
        let flushed = events.iter().position(|e| matches!(e, Event::FlushSubmitted { .. })).unwrap();
        let written = events.iter().position(|e| matches!(e, Event::Completed { .. })).unwrap();
        assert!(flushed < written, "not covered by the flush");
    }

    /// Goal: a log that ends too early is refused. Method: every shorter length.
    #[test]
    fn short_logs() {
        let bytes = log(&[write(0, 1, None), write(1, 1, None)]);
        assert!(Log::parse(&bytes).is_ok());
        for len in 0..bytes.len() {
            assert!(Log::parse(&bytes[..len]).is_err(), "{len}");
        }
    }
}
