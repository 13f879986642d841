//! What a disk under concurrent, possibly interrupted load may contain.
//!
//! Every write carries a value of its own in every sector, so each sector read back names the operation that
//! it came from. Operations carry the times of their start and end on one logical clock.
//!
//! The rule (crash contract I10): a sector may hold the value of operation A unless a *settled* operation B
//! on that sector started after A ended. Settled means: completed before a completed flush began, or FUA;
//! after a clean end, and for reads, completed is enough. A trim is advice: its zeroes may appear, but it
//! supersedes nothing.
//!
//! ```text
//!  A: ├──────┤                     B settled, started after A ended → A's value must not be seen
//!  B:          ├────┤
//!  C:             ├──────┤         C overlaps B → B's and C's values are both allowed
//! ```

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The unit of the rule, in bytes.
pub const SECTOR: u64 = 512;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A handle of an operation that has begun.
#[derive(Debug, Clone, Copy)]
pub struct OpId(usize);

/// The model; shared by the threads that drive connections.
#[derive(Debug)]
pub struct Model {
    inner: Mutex<Inner>,
}

/// How the disk came to rest before [`Model::check`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Everything completed and was closed cleanly: completed operations count as settled.
    CleanEnd,
    /// The server was killed: only flushed and FUA operations are settled.
    Crash,
}

#[derive(Debug)]
struct Inner {
    /// Which model of this process: one made from an earlier one's values must not write the same values.
    number: u64,
    clock: u64,
    base: Vec<u64>,
    ops: Vec<Op>,
    by_sector: Vec<Vec<u32>>,
    /// The latest start of a completed flush.
    flushed: u64,
}

#[derive(Debug, Clone, Copy)]
struct Op {
    start: u64,
    end: u64,
    value: u64,
    binding: bool,
    fua: bool,
}

impl Model {
    /// A disk of `bytes` bytes that reads as zeroes.
    pub fn zeroed(bytes: u64) -> Self {
        Self::with_values(vec![0; (bytes / SECTOR) as usize])
    }

    /// A disk whose sectors hold `values` (0: zeroes; else as [`fill`] writes them).
    pub fn with_values(values: Vec<u64>) -> Self {
        let by_sector = vec![Vec::new(); values.len()];
        let number = u64::from(NUMBER.fetch_add(1, Ordering::Relaxed) & 0xffff);
        let inner = Inner { number, clock: 1, base: values, ops: Vec::new(), by_sector, flushed: 0 };
        Self { inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.lock().base.len() as u64 * SECTOR
    }

    /// Begins a write; returns its handle and the payload to send. Offset and length in bytes, whole sectors.
    pub fn write(&self, offset: u64, len: u64, fua: bool) -> (OpId, Vec<u8>) {
        let mut inner = self.lock();
        // The top keeps a word from being zero, the middle tells models apart, the low half tells writes apart.
        let value = (0x5242 << 48) | (inner.number << 32) | inner.ops.len() as u64;
        let id = inner.begin(offset, len, value, true, fua);
        let mut data = vec![0; len as usize];
        fill(&mut data, offset, value);
        (id, data)
    }

    /// Begins a write of zeroes.
    pub fn zero(&self, offset: u64, len: u64, fua: bool) -> OpId {
        self.lock().begin(offset, len, 0, true, fua)
    }

    /// Begins a trim.
    pub fn trim(&self, offset: u64, len: u64) -> OpId {
        self.lock().begin(offset, len, 0, false, false)
    }

    /// The operation was reported done.
    pub fn done(&self, id: OpId) {
        let mut inner = self.lock();
        let now = inner.tick();
        inner.ops[id.0].end = now;
    }

    /// Begins a flush or a read; returns its time.
    pub fn now(&self) -> u64 {
        self.lock().tick()
    }

    /// The flush that began at `start` was reported done.
    pub fn flushed(&self, start: u64) {
        let mut inner = self.lock();
        inner.flushed = inner.flushed.max(start);
    }

    /// The server was killed, and another goes on with what it left: a later flush settles nothing of what was not
    /// settled then, and nothing of it can come any more that a later write would not supersede.
    pub fn crashed(&self) {
        let mut inner = self.lock();
        let (now, flushed) = (inner.tick(), inner.flushed);
        for op in &mut inner.ops {
            op.binding &= op.settled(flushed);
            op.end = op.end.min(now);
        }
    }

    /// Checks what a read that began at `start` has just returned. Words, not sectors, are judged: a read
    /// may see half of a write that runs beside it.
    pub fn check_read(&self, start: u64, offset: u64, data: &[u8]) -> Result<(), String> {
        let inner = self.lock();
        for (i, bytes) in data.chunks(SECTOR as usize).enumerate() {
            let sector = offset / SECTOR + i as u64;
            let settled = |op: &Op| op.end < start;
            let allowed = inner.allowed(sector, settled);
            for (w, word) in words(bytes).enumerate() {
                let value = decode(word, sector, w as u64);
                if !allowed.contains(&value) {
                    return Err(inner.complain(sector, value, &allowed));
                }
            }
        }
        Ok(())
    }

    /// Checks the whole disk at rest; returns the value found in each sector, the start of a next round.
    pub fn check(&self, disk: &[u8], after: After) -> Result<Vec<u64>, String> {
        let inner = self.lock();
        if disk.len() as u64 != inner.base.len() as u64 * SECTOR {
            return Err(format!("{} bytes, but the disk has {} sectors", disk.len(), inner.base.len()));
        }
        let flushed = inner.flushed;
        let settled = |op: &Op| match after {
            After::CleanEnd => op.end != u64::MAX,
            After::Crash => op.settled(flushed),
        };
        let mut found = Vec::with_capacity(inner.base.len());
        for (sector, bytes) in (0u64..).zip(disk.chunks(SECTOR as usize)) {
            let value = sector_value(bytes, sector)?;
            let allowed = inner.allowed(sector, settled);
            if !allowed.contains(&value) {
                return Err(inner.complain(sector, value, &allowed));
            }
            found.push(value);
        }
        Ok(found)
    }
}

impl Op {
    /// Whether a crash cannot take it away, if the latest completed flush began at `flushed`.
    fn settled(&self, flushed: u64) -> bool {
        self.end < flushed || (self.fua && self.end != u64::MAX)
    }
}

impl Inner {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn begin(&mut self, offset: u64, len: u64, value: u64, binding: bool, fua: bool) -> OpId {
        assert!(offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR), "whole sectors: {offset} {len}");
        let start = self.tick();
        let id = self.ops.len();
        self.ops.push(Op { start, end: u64::MAX, value, binding, fua });
        for sector in offset / SECTOR..(offset + len) / SECTOR {
            self.by_sector[sector as usize].push(id as u32);
        }
        OpId(id)
    }

    /// The values that `sector` may hold.
    fn allowed(&self, sector: u64, settled: impl Fn(&Op) -> bool) -> Vec<u64> {
        let ops = || self.by_sector[sector as usize].iter().map(|&i| &self.ops[i as usize]);
        let last = ops().filter(|op| op.binding && settled(op)).map(|op| op.start).max().unwrap_or(0);
        let mut values: Vec<u64> = ops().filter(|op| op.end >= last).map(|op| op.value).collect();
        if last == 0 {
            values.push(self.base[sector as usize]);
        }
        values
    }

    fn complain(&self, sector: u64, value: u64, allowed: &[u64]) -> String {
        let ops: Vec<String> = self.by_sector[sector as usize]
            .iter()
            .map(|&i| {
                let op = &self.ops[i as usize];
                let kind = if op.binding { "write" } else { "trim" };
                format!(
                    "  {kind} {:#x}: began {}, ended {}, fua {}",
                    op.value, op.start, op.end as i64, op.fua
                )
            })
            .collect();
        format!(
            "sector {sector} (byte {:#x}) holds {value:#x}; allowed are {allowed:#x?}\nbefore: {:#x}, flushed up to {}\n{}",
            sector * SECTOR,
            self.base[sector as usize],
            self.flushed,
            ops.join("\n")
        )
    }
}

/// Writes `value` into `data`, which starts at byte `offset` of the disk, so that each word also tells its
/// place.
pub fn fill(data: &mut [u8], offset: u64, value: u64) {
    for (i, chunk) in data.chunks_mut(8).enumerate() {
        let sector = offset / SECTOR + i as u64 / 64;
        chunk.copy_from_slice(&(value ^ place(sector, i as u64 % 64)).to_le_bytes());
    }
}

fn place(sector: u64, word: u64) -> u64 {
    (sector * 64 + word).wrapping_mul(0x0000_9E37_79B9_7F4B) & 0x0000_ffff_ffff_ffff
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().expect("8 bytes")))
}

fn decode(word: u64, sector: u64, index: u64) -> u64 {
    if word == 0 { 0 } else { word ^ place(sector, index) }
}

/// The one value that the whole sector holds.
fn sector_value(bytes: &[u8], sector: u64) -> Result<u64, String> {
    let mut values = words(bytes).enumerate().map(|(i, w)| decode(w, sector, i as u64));
    let first = values.next().unwrap_or(0);
    match values.find(|&v| v != first) {
        None => Ok(first),
        Some(other) => Err(format!(
            "sector {sector} (byte {:#x}) is a mixture or foreign data: {first:#x} and {other:#x}",
            sector * SECTOR
        )),
    }
}

#[cfg(test)]
mod tests {
    //! The oracle must be shown wrong disks: each test plants one and expects the complaint.
    use super::*;

    fn disk_with(offset: u64, data: &[u8]) -> Vec<u8> {
        let mut disk = vec![0; 8192];
        disk[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        disk
    }

    /// Goal: flushed data may not vanish in a crash, unflushed data may. Method: one write, both ways.
    #[test]
    fn a_crash_may_lose_only_what_was_not_flushed() {
        let model = Model::zeroed(8192);
        let (id, data) = model.write(1024, 1024, false);
        model.done(id);
        assert!(model.check(&disk_with(1024, &data), After::Crash).is_ok());
        assert!(model.check(&vec![0; 8192], After::Crash).is_ok());
        assert!(model.check(&vec![0; 8192], After::CleanEnd).is_err());
        let start = model.now();
        model.flushed(start);
        assert!(model.check(&disk_with(1024, &data), After::Crash).is_ok());
        assert!(model.check(&vec![0; 8192], After::Crash).is_err());
    }

    /// Goal: a flush covers only what completed before it began; FUA covers itself. Method: interleave them.
    #[test]
    fn a_flush_covers_what_ended_before_it_began() {
        let model = Model::zeroed(8192);
        let (early, _) = model.write(0, 512, false);
        let start = model.now();
        model.done(early);
        model.flushed(start);
        assert!(model.check(&vec![0; 8192], After::Crash).is_ok());
        let (fua, _) = model.write(512, 512, true);
        model.done(fua);
        assert!(model.check(&vec![0; 8192], After::Crash).is_err());
    }

    /// Goal: what one crash may have lost stays lost for the next, whatever is flushed in between. Method: an unflushed
    /// write, a crash, a flush, a crash.
    #[test]
    fn a_later_flush_does_not_bring_back_what_a_crash_took() {
        let model = Model::zeroed(8192);
        let (lost, data) = model.write(0, 512, false);
        model.done(lost);
        let (never_done, other) = model.write(512, 512, true);
        model.crashed();
        let start = model.now();
        model.flushed(start);
        let _ = never_done;
        for disk in [vec![0; 8192], disk_with(0, &data), disk_with(512, &other)] {
            assert!(model.check(&disk, After::Crash).is_ok());
        }
        let (kept, new) = model.write(512, 512, true);
        model.done(kept);
        assert!(model.check(&disk_with(512, &new), After::Crash).is_ok());
        assert!(model.check(&disk_with(512, &other), After::Crash).is_err(), "it came back");
    }

    /// Goal: writes side by side may settle either way, but never mixed, misplaced or foreign.
    /// Method: two overlapping writes in time, then disks with each, a mixture, and a shifted copy.
    #[test]
    fn values_are_whole_and_in_their_place() {
        let model = Model::zeroed(8192);
        let (a, data_a) = model.write(0, 1024, false);
        let (b, data_b) = model.write(0, 1024, false);
        model.done(a);
        model.done(b);
        assert!(model.check(&disk_with(0, &data_a), After::CleanEnd).is_ok());
        let mut by_sector = data_b.clone();
        by_sector[..512].copy_from_slice(&data_a[..512]);
        assert!(model.check(&disk_with(0, &by_sector), After::CleanEnd).is_ok());
        let mut torn = data_b.clone();
        torn[..256].copy_from_slice(&data_a[..256]);
        assert!(model.check(&disk_with(0, &torn), After::CleanEnd).is_err());
        let mut moved = data_b;
        moved.rotate_left(512);
        assert!(model.check(&disk_with(0, &moved), After::CleanEnd).is_err());
    }

    /// Goal: an overwritten value may not come back. Method: two writes in sequence, read the first.
    #[test]
    fn a_superseded_value_is_refused() {
        let model = Model::zeroed(8192);
        let (a, data_a) = model.write(0, 512, false);
        model.done(a);
        let (b, data_b) = model.write(0, 512, false);
        let start = model.now();
        assert!(model.check_read(start, 0, &data_a).is_ok());
        model.done(b);
        let start = model.now();
        assert!(model.check_read(start, 0, &data_a).is_err());
        assert!(model.check_read(start, 0, &data_b).is_ok());
        let zero = model.zero(0, 512, false);
        model.done(zero);
        assert!(model.check(&disk_with(0, &data_b), After::CleanEnd).is_err());
        let trim = model.trim(0, 512);
        model.done(trim);
        assert!(model.check(&vec![0; 8192], After::CleanEnd).is_ok());
    }
}
