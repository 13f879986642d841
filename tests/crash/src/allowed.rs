//! What a guest may find on its disk after a power cut: per sector, the values that no durable one has replaced.
//!
//! ```text
//!   write A ─ ended ─ flush began ─ ended: A is durable          what ended before A began may not be found any more
//!                 └ write B began: A or B, until B is durable
//! ```
//!
//! Rules G1 and G2 of the crash contract, from the events of a journal alone. A value that the sector had earlier is "lost
//! data", any other wrong value is "alien".

use std::collections::BTreeMap;

use ringblock_engine::host::sim::Event;

/// Bytes of a sector of the guest's disk.
pub const SECTOR: usize = 512;

/// A value that a sector may have.
#[derive(Clone, Copy, Debug)]
struct Value {
    stamp: u64,
    word: u64,
    began: usize,
    /// `usize::MAX`: not yet.
    ended: usize,
    sure: bool,
    durable: bool,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    first: usize,
    count: usize,
}

/// How a sector is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// It has an older value than what is durable.
    Lost(String),
    /// It has a value that was never written to it.
    Alien(String),
}

/// The permitted values of a disk at one moment of a run.
#[derive(Clone, Debug)]
pub struct Allowed {
    sectors: Vec<Vec<Value>>,
    /// Words that a sector had and may not have any more, newest last; at most [`PAST`].
    past: Vec<Vec<u64>>,
    running: BTreeMap<u64, Request>,
    flushes: BTreeMap<u64, usize>,
    sizes: Vec<usize>,
    version: u64,
}

/// Old values remembered for each sector, to tell lost data from alien data.
const PAST: usize = 32;

impl Allowed {
    /// A disk of zeroes of this many sectors, that may grow.
    pub fn new(sectors: usize) -> Allowed {
        Allowed {
            sectors: vec![vec![Value::zeroes()]; sectors],
            past: vec![Vec::new(); sectors],
            running: BTreeMap::new(),
            flushes: BTreeMap::new(),
            sizes: vec![sectors],
            version: 0,
        }
    }

    /// Changes whenever something that was permitted no longer is.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The sizes that the disk may have, in sectors.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// The largest size so far, in sectors.
    pub fn largest(&self) -> usize {
        self.sectors.len()
    }

    /// Event number `at`, counted from 1, happens. Events of disks mean nothing here.
    pub fn step(&mut self, at: usize, event: &Event) {
        match *event {
            Event::GuestBegan { stamp, first, count, zero } => {
                self.running.insert(stamp, Request { first, count });
                self.reach(first + count);
                for s in first..first + count {
                    let word = if zero { 0 } else { stamp << 24 | (s as u64 & 0xff_ffff) };
                    let value =
                        Value { stamp, word, began: at, ended: usize::MAX, sure: false, durable: false };
                    self.sectors[s].push(value);
                }
            }
            Event::GuestEnded { stamp, sure, durable } => self.ended(at, stamp, sure, durable),
            Event::GuestFlushBegan { id } => {
                self.flushes.insert(id, at);
            }
            Event::GuestFlushed { id } => {
                let Some(began) = self.flushes.remove(&id) else { return };
                self.version += 1;
                for s in 0..self.sectors.len() {
                    self.settle(s, |v| v.ended < began);
                }
            }
            Event::Resize { sectors, settled } => self.resize(at, sectors, settled),
            _ => {}
        }
    }

    fn reach(&mut self, sectors: usize) {
        if self.sectors.len() < sectors {
            self.sectors.resize_with(sectors, || vec![Value::zeroes()]);
            self.past.resize_with(sectors, Vec::new);
        }
    }

    fn ended(&mut self, at: usize, stamp: u64, sure: bool, durable: bool) {
        let Some(request) = self.running.remove(&stamp) else { return };
        for s in request.first..request.first + request.count {
            if let Some(v) = self.sectors[s].iter_mut().find(|v| v.stamp == stamp) {
                (v.ended, v.sure) = (at, sure);
            }
            if durable {
                self.settle(s, |v| v.stamp == stamp);
            }
        }
        self.version += u64::from(durable);
    }

    /// The values that `which` selects are durable, if they are certain; what they replaced is not permitted any more.
    fn settle(&mut self, sector: usize, which: impl Fn(&Value) -> bool) {
        let list = &mut self.sectors[sector];
        if list.len() < 2 {
            return;
        }
        list.iter_mut().filter(|v| v.sure && which(v)).for_each(|v| v.durable = true);
        let newest = list.iter().filter(|v| v.durable).map(|v| v.began).max().unwrap_or(0);
        let past = &mut self.past[sector];
        list.retain(|v| {
            let stays = v.ended >= newest;
            if !stays {
                past.push(v.word);
            }
            stays
        });
        let over = past.len().saturating_sub(PAST);
        past.drain(..over);
    }

    /// What is cut off reads as zeroes if the disk grows again; until it is settled both are possible.
    fn resize(&mut self, at: usize, sectors: usize, settled: bool) {
        self.version += 1;
        self.reach(sectors);
        if settled {
            // a resize that failed has cut nothing off
            for list in &mut self.sectors[..sectors] {
                list.retain(|v| !v.is_pending());
            }
            for s in sectors..self.sectors.len() {
                let gone = std::mem::replace(&mut self.sectors[s], vec![Value::zeroes()]);
                self.past[s].extend(gone.iter().map(|v| v.word).filter(|&w| w != 0));
            }
            self.sizes = vec![sectors];
            return;
        }
        for s in sectors..self.sectors.len() {
            self.sectors[s].push(Value { began: at, ended: usize::MAX, durable: false, ..Value::zeroes() });
        }
        self.sizes.push(sectors);
    }

    /// Compares what the guest reads, from its first sector on, with what it may find.
    pub fn check(&self, data: &[u8]) -> Result<(), Wrong> {
        for (at, (sector, values)) in data.chunks_exact(SECTOR).zip(&self.sectors).enumerate() {
            let mut first = [0; 8];
            first.copy_from_slice(&sector[..8]);
            let word = u64::from_le_bytes(first);
            let uniform = sector[8..] == sector[..SECTOR - 8];
            if !uniform || !values.iter().any(|v| v.word == word) {
                return Err(self.wrong(at, word, uniform));
            }
        }
        Ok(())
    }

    fn wrong(&self, at: usize, word: u64, uniform: bool) -> Wrong {
        let name = |w: u64| match (w, w & 0xff_ffff == at as u64 & 0xff_ffff) {
            (0, _) => "zeroes".to_owned(),
            (_, true) => format!("its value {}", w >> 24),
            (_, false) => format!("value {} of sector {}", w >> 24, w & 0xff_ffff),
        };
        let values: Vec<String> = self.sectors[at].iter().map(|v| name(v.word)).collect();
        let found = if uniform { name(word) } else { "a mixture".to_owned() };
        let text = format!("sector {at}: found {found}, permitted {}", values.join(", "));
        if uniform && self.past[at].contains(&word) { Wrong::Lost(text) } else { Wrong::Alien(text) }
    }
}

impl Value {
    /// What a resize that is not settled may leave.
    fn is_pending(&self) -> bool {
        self.stamp == 0 && self.ended == usize::MAX
    }

    fn zeroes() -> Value {
        Value { stamp: 0, word: 0, began: 0, ended: 0, sure: true, durable: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(word: u64) -> Vec<u8> {
        word.to_le_bytes().repeat(SECTOR / 8)
    }

    fn write(a: &mut Allowed, at: usize, stamp: u64) {
        a.step(at, &Event::GuestBegan { stamp, first: 0, count: 1, zero: false });
    }

    fn ended(a: &mut Allowed, at: usize, stamp: u64, durable: bool) {
        a.step(at, &Event::GuestEnded { stamp, sure: true, durable });
    }

    /// Goal: old or new before a flush, new after it, never a third. Method: one sector, two writes, two flushes.
    #[test]
    fn a_flush_settles_what_ended_before_it_began() {
        let mut a = Allowed::new(1);
        let word = |stamp: u64| stamp << 24;
        write(&mut a, 1, 7);
        assert_eq!(a.check(&disk(0)), Ok(()));
        assert_eq!(a.check(&disk(word(7))), Ok(()));
        a.step(2, &Event::GuestFlushBegan { id: 8 });
        ended(&mut a, 3, 7, false);
        a.step(4, &Event::GuestFlushed { id: 8 });
        assert_eq!(a.check(&disk(0)), Ok(()), "the flush began before the write ended");
        a.step(5, &Event::GuestFlushBegan { id: 9 });
        write(&mut a, 6, 10);
        a.step(7, &Event::GuestFlushed { id: 9 });
        assert!(matches!(a.check(&disk(0)), Err(Wrong::Lost(_))));
        assert_eq!(a.check(&disk(word(7))), Ok(()));
        assert_eq!(a.check(&disk(word(10))), Ok(()));
        assert!(matches!(a.check(&disk(word(3))), Err(Wrong::Alien(_))));
        assert!(matches!(a.check(&disk(word(7) | 5)), Err(Wrong::Alien(_))), "of another sector");
        let mut mixed = disk(word(7));
        mixed[256..].fill(0);
        assert!(matches!(a.check(&mixed), Err(Wrong::Alien(_))));
    }

    /// Goal: a durable write settles at once; a concurrent one may still win. Method: two overlapping writes, one durable.
    #[test]
    fn durable_writes_and_concurrent_ones() {
        let mut a = Allowed::new(1);
        write(&mut a, 1, 1);
        write(&mut a, 2, 2);
        ended(&mut a, 3, 2, true);
        assert_eq!(a.check(&disk(1 << 24)), Ok(()), "began before the durable one ended, and has not ended");
        assert!(matches!(a.check(&disk(0)), Err(Wrong::Alien(_) | Wrong::Lost(_))));
    }

    /// Goal: what a shrink cut off never comes back. Method: write, shrink, grow.
    #[test]
    fn cut_off_data_stays_away() {
        let mut a = Allowed::new(2);
        a.step(1, &Event::GuestBegan { stamp: 5, first: 1, count: 1, zero: false });
        a.step(2, &Event::GuestEnded { stamp: 5, sure: true, durable: true });
        a.step(3, &Event::Resize { sectors: 1, settled: false });
        assert_eq!(a.sizes(), [2, 1]);
        let both = [disk(0), disk(5 << 24 | 1)].concat();
        assert_eq!(a.check(&both), Ok(()));
        a.step(4, &Event::Resize { sectors: 1, settled: true });
        a.step(5, &Event::Resize { sectors: 2, settled: true });
        assert!(matches!(a.check(&both), Err(Wrong::Lost(_))));
        assert_eq!(a.check(&[disk(0), disk(0)].concat()), Ok(()));
    }

    /// Goal: what a failed shrink left stays. Method: write, a shrink that does not take place, a flush.
    #[test]
    fn a_failed_shrink_cuts_nothing_off() {
        let mut a = Allowed::new(2);
        a.step(1, &Event::GuestBegan { stamp: 5, first: 1, count: 1, zero: false });
        a.step(2, &Event::GuestEnded { stamp: 5, sure: true, durable: false });
        a.step(3, &Event::Resize { sectors: 1, settled: false });
        a.step(4, &Event::GuestFlushBegan { id: 6 });
        a.step(5, &Event::GuestFlushed { id: 6 });
        let (old, cut) = ([disk(0), disk(5 << 24 | 1)].concat(), [disk(0), disk(0)].concat());
        assert_eq!((a.check(&old), a.check(&cut)), (Ok(()), Ok(())), "not settled");
        a.step(6, &Event::Resize { sectors: 2, settled: true });
        assert_eq!(a.check(&old), Ok(()));
        assert!(a.check(&cut).is_err(), "the write was flushed");
    }
}
