//! What a guest may find on its disk: per sector, the values it wrote and that nothing has settled since.
//!
//! ```text
//!   sector:  [old, sure] [A, sure] [B, in flight]      read (nobody writes): A      after a crash: old, A or B
//!   flush ok (began after A completed)  ─►  [A, sure] [B, …]
//! ```
//!
//! Rules G1 and G2 of the crash contract: flushed data survives; a sector holds what was flushed last or something
//! written to that very sector since, never a third value. Each sector written carries a number of its own, so data of
//! another sector or of an older generation is recognised.

use std::ops::Range;
use std::sync::Arc;

use super::{Event, Journal, SECTOR};
use crate::error::Errno;

/// One value a sector may have. Every request has a stamp of its own, whatever it writes.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    stamp: u64,
    zero: bool,
    sure: bool,
}

impl Candidate {
    fn word(&self, sector: usize) -> u64 {
        if self.zero { 0 } else { self.stamp << 24 | (sector as u64 & 0xff_ffff) }
    }
}

/// The permitted values of every sector of a disk.
#[derive(Clone, Debug)]
pub struct Oracle {
    sectors: Vec<Vec<Candidate>>,
    stamps: u64,
    wild: Range<usize>,
    journal: Option<Arc<Journal>>,
}

/// A flush that has begun: the newest certain value of each sector that is not settled.
pub struct Flush(Vec<(usize, u64)>, u64);

impl Oracle {
    /// A disk of zeroes.
    pub fn new(sectors: usize) -> Oracle {
        Oracle {
            sectors: vec![vec![Candidate { stamp: 0, zero: true, sure: true }]; sectors],
            stamps: 0,
            wild: 0..0,
            journal: None,
        }
    }

    /// Everything that guests ask for from now on, and what they are told, is written down there.
    pub fn set_journal(&mut self, journal: Option<Arc<Journal>>) {
        self.journal = journal;
    }

    fn note(&self, event: Event) {
        if let Some(journal) = &self.journal {
            journal.add(event);
        }
    }

    /// Sectors that several guests change at the same time: any of their values may be there, but nobody else's.
    pub fn set_wild(&mut self, wild: Range<usize>) {
        self.wild = wild;
    }

    /// Those sectors.
    pub fn wild(&self) -> Range<usize> {
        self.wild.clone()
    }

    /// Number of sectors.
    pub fn len(&self) -> usize {
        self.sectors.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// The disk has another size now; what was not there before reads as zeroes.
    pub fn set_len(&mut self, sectors: usize) {
        self.sectors.resize_with(sectors, || vec![Candidate { stamp: 0, zero: true, sure: true }]);
        self.wild.end = self.wild.end.min(sectors);
    }

    /// A write of new data to whole sectors begins: fills the buffer with it. The stamp is for [`Oracle::wrote`].
    pub fn write(&mut self, first: usize, buf: &mut [u8]) -> u64 {
        let stamp = self.begin(first..first + buf.len() / SECTOR as usize, false);
        for (i, sector) in buf.chunks_mut(SECTOR as usize).enumerate() {
            let word = Candidate { stamp, zero: false, sure: false }.word(first + i).to_le_bytes();
            sector.chunks_mut(8).for_each(|w| w.copy_from_slice(&word));
        }
        stamp
    }

    /// A write of zeroes begins.
    pub fn zero(&mut self, range: Range<usize>) -> u64 {
        self.begin(range, true)
    }

    fn begin(&mut self, range: Range<usize>, zero: bool) -> u64 {
        self.stamps += 1;
        let stamp = self.stamps;
        self.note(Event::GuestBegan { stamp, first: range.start, count: range.len(), zero });
        for at in range.filter(|at| !self.wild.contains(at)) {
            self.sectors[at].push(Candidate { stamp, zero, sure: false });
        }
        stamp
    }

    /// A write has ended. After a failed one, or a discard, the old value may still be there.
    pub fn wrote(&mut self, range: Range<usize>, stamp: u64, sure: bool) {
        self.note(Event::GuestEnded { stamp, sure, durable: false });
        self.ended(range, stamp, sure);
    }

    /// A write that is durable when it ends has ended.
    pub fn wrote_through(&mut self, range: Range<usize>, stamp: u64, sure: bool) {
        self.note(Event::GuestEnded { stamp, sure, durable: sure });
        self.ended(range.clone(), stamp, sure);
        for s in &mut self.sectors[range] {
            if let Some(at) = s.iter().rposition(|c| c.stamp == stamp && c.sure) {
                s.drain(..at);
            }
        }
    }

    fn ended(&mut self, range: Range<usize>, stamp: u64, sure: bool) {
        let there = range.start.min(self.sectors.len())..range.end.min(self.sectors.len());
        for s in &mut self.sectors[there] {
            if let Some(c) = s.iter_mut().rev().find(|c| c.stamp == stamp) {
                c.sure = sure;
            }
        }
    }

    /// A flush begins.
    pub fn flush(&mut self) -> Flush {
        self.stamps += 1;
        self.note(Event::GuestFlushBegan { id: self.stamps });
        let open = self.sectors.iter().enumerate().filter(|(_, s)| s.len() > 1);
        let newest = open.filter_map(|(i, s)| Some((i, s.iter().rev().find(|c| c.sure)?.stamp)));
        Flush(newest.collect(), self.stamps)
    }

    /// A flush has succeeded. One that failed settles nothing.
    pub fn flushed(&mut self, flush: Flush) {
        self.note(Event::GuestFlushed { id: flush.1 });
        for (i, stamp) in flush.0 {
            let Some(s) = self.sectors.get_mut(i) else { continue };
            if let Some(at) = s.iter().rposition(|c| c.stamp == stamp && c.sure) {
                s.drain(..at);
            }
        }
    }

    /// Checks data that was read while nobody wrote to it.
    pub fn check_read(&self, first: usize, data: &[u8]) -> Result<(), String> {
        self.check(first, data, |s| {
            let newest = s.iter().rposition(|c| c.sure).unwrap_or(0);
            &s[newest..]
        })
    }

    /// Checks data that was read while others wrote: nothing that was never written to these sectors.
    pub fn check_any(&self, first: usize, data: &[u8]) -> Result<(), String> {
        self.check(first, data, |_| &[])
    }

    /// Checks data that was found after a crash.
    pub fn check_crash(&self, first: usize, data: &[u8]) -> Result<(), String> {
        self.check(first, data, |s| s)
    }

    fn check(
        &self,
        first: usize,
        data: &[u8],
        allowed: impl Fn(&[Candidate]) -> &[Candidate],
    ) -> Result<(), String> {
        for (i, sector) in data.chunks(SECTOR as usize).enumerate() {
            let at = first + i;
            let allowed = allowed(&self.sectors[at]);
            let have: [u8; 8] = sector[..8].try_into().map_err(|_| "a sector of less than 8 bytes")?;
            let have = u64::from_le_bytes(have);
            let uniform = sector.chunks(8).all(|w| w == have.to_le_bytes());
            let plausible = have == 0 || (have & 0xff_ffff == at as u64 && have >> 24 <= self.stamps);
            let weak = allowed.is_empty() || self.wild.contains(&at);
            let known = allowed.iter().any(|c| c.word(at) == have);
            if !uniform || !(known || weak && plausible) {
                return Err(format!(
                    "sector {at}: found {}, allowed {:?}",
                    self.describe(have, uniform),
                    allowed.iter().map(|c| if c.zero { 0 } else { c.stamp }).collect::<Vec<_>>()
                ));
            }
        }
        Ok(())
    }

    fn describe(&self, have: u64, uniform: bool) -> String {
        if !uniform {
            return "a mixture".to_owned();
        }
        let (stamp, sector) = (have >> 24, have & 0xff_ffff);
        match have {
            0 => "zeroes".to_owned(),
            _ if stamp <= self.stamps => format!("stamp {stamp} of sector {sector}"),
            _ => format!("{have:#x}"),
        }
    }
}

/// Whether a request's error is one that injected faults explain.
pub fn is_injected(e: Errno) -> bool {
    matches!(e, Errno::EIO | Errno::ENOSPC)
}
