//! The log on disk: the format of the kernel's dm-log-writes target, version 1, in little-endian.
//!
//! ```text
//!   sector 0      super block: magic, version, number of entries, sector size
//!   sector 1      entry: sector, sectors, flags, bytes of a mark      (padded to a sector; a mark's bytes stand inside it)
//!   sector 2 …    its data, `sectors` of them; none after a discard
//!   …             the next entry
//! ```
//!
//! In the padding of an entry, which readers skip, this program notes when the request was passed on and when it had
//! completed ([`Times`]). The order of the entries alone is what the format promises; the times say more.

use ringblock_engine::error::Error;

/// The super block's magic number.
pub const MAGIC: u64 = 0x006a_7366_7773_6872;
/// The version of the format.
pub const VERSION: u64 = 1;
/// Bytes of the super block that mean something.
pub const SUPER_BYTES: usize = 28;
/// Bytes of an entry that mean something to everybody.
pub const ENTRY_BYTES: usize = 32;
/// Where a text of this program begins a mark.
const MARK_PREFIX: &str = "ringblock: ";
/// Announces the times in an entry's padding.
const TIMES: u64 = u64::from_le_bytes(*b"rb-times");
const TIMES_AT: usize = 40;

/// Flags of an entry.
pub mod flag {
    /// A flush; has no data of its own here.
    pub const FLUSH: u64 = 1;
    /// A write that was durable when it completed.
    pub const FUA: u64 = 2;
    /// A discard; has no data.
    pub const DISCARD: u64 = 4;
    /// A remark; `data_len` bytes of it stand behind the entry, in the same sector.
    pub const MARK: u64 = 8;
    /// All of them.
    pub const ALL: u64 = FLUSH | FUA | DISCARD | MARK;
}

/// The super block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Super {
    /// Entries that are there.
    pub entries: u64,
    /// Bytes of a sector of the log, which is also the unit of the entries.
    pub sector_size: u32,
}

impl Super {
    /// Reads it; `None` if nothing but zeroes is there. Errors as the peer's.
    pub fn parse(head: &[u8]) -> Result<Option<Super>, Error> {
        let head = head.get(..SUPER_BYTES).ok_or_else(|| Error::invalid("The log is too short"))?;
        if head.iter().all(|&b| b == 0) {
            return Ok(None);
        }
        if u64_at(head, 0) != MAGIC {
            return Err(Error::invalid("Invalid log superblock magic"));
        }
        if u64_at(head, 8) != VERSION {
            return Err(Error::invalid(format!("Unsupported log version {}", u64_at(head, 8))));
        }
        let size: [u8; 4] = [head[24], head[25], head[26], head[27]];
        let sector_size = u32::from_le_bytes(size);
        check_sector_size(sector_size)?;
        Ok(Some(Super { entries: u64_at(head, 16), sector_size }))
    }

    /// Writes it into the beginning of a sector of zeroes.
    pub fn put(&self, to: &mut [u8]) {
        to[..8].copy_from_slice(&MAGIC.to_le_bytes());
        to[8..16].copy_from_slice(&VERSION.to_le_bytes());
        to[16..24].copy_from_slice(&self.entries.to_le_bytes());
        to[24..28].copy_from_slice(&self.sector_size.to_le_bytes());
    }
}

/// A power of two that an entry fits into, below 16 MiB.
pub fn check_sector_size(size: u32) -> Result<(), Error> {
    if size.is_power_of_two() && (ENTRY_BYTES as u32..1 << 24).contains(&size) {
        return Ok(());
    }
    Err(Error::invalid(format!("Invalid log sector size {size}")))
}

/// One entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Entry {
    /// Where, in sectors of the log's size.
    pub sector: u64,
    /// How many of them.
    pub sectors: u64,
    /// Bits of [`flag`].
    pub flags: u64,
    /// Bytes of a mark.
    pub data_len: u64,
}

/// When a request was passed on, and when it had completed, in nanoseconds since 1970.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Times {
    /// Just before it was passed on.
    pub began: u64,
    /// Just after it had completed.
    pub ended: u64,
}

impl Entry {
    /// Reads it.
    ///
    /// # Panics
    /// Never, if `from` has [`ENTRY_BYTES`].
    pub fn parse(from: &[u8], number: u64) -> Result<Entry, Error> {
        let flags = u64_at(from, 16);
        if flags & !flag::ALL != 0 {
            return Err(Error::invalid(format!("Invalid flags {flags:#x} in log entry {number}")));
        }
        Ok(Entry { sector: u64_at(from, 0), sectors: u64_at(from, 8), flags, data_len: u64_at(from, 24) })
    }

    /// Writes it into the beginning of a sector of zeroes.
    pub fn put(&self, to: &mut [u8]) {
        for (at, n) in [self.sector, self.sectors, self.flags, self.data_len].iter().enumerate() {
            to[at * 8..at * 8 + 8].copy_from_slice(&n.to_le_bytes());
        }
    }

    /// Sectors of data that follow.
    pub fn data_sectors(&self) -> u64 {
        if self.flags & (flag::DISCARD | flag::MARK) != 0 { 0 } else { self.sectors }
    }
}

impl Times {
    /// Writes them into an entry's sector, if there is room.
    pub fn put(&self, sector: &mut [u8]) {
        if sector.len() >= TIMES_AT + 24 {
            for (i, n) in [TIMES, self.began, self.ended].iter().enumerate() {
                sector[TIMES_AT + i * 8..TIMES_AT + i * 8 + 8].copy_from_slice(&n.to_le_bytes());
            }
        }
    }

    /// Reads them from an entry's sector. Entries of other programs have none, and marks keep their text there.
    pub fn parse(sector: &[u8]) -> Option<Times> {
        let there = sector.len() >= TIMES_AT + 24 && u64_at(sector, TIMES_AT) == TIMES;
        let times = || Times { began: u64_at(sector, TIMES_AT + 8), ended: u64_at(sector, TIMES_AT + 16) };
        there.then(times)
    }
}

/// What this program says in marks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mark {
    /// A flush stood here, and failed.
    FlushFailed,
    /// The file below has this length from now on.
    Length(u64),
}

impl Mark {
    /// The text.
    pub fn text(&self) -> String {
        match self {
            Mark::FlushFailed => format!("{MARK_PREFIX}flush failed"),
            Mark::Length(n) => format!("{MARK_PREFIX}length {n}"),
        }
    }

    /// Reads it from a mark's bytes; marks of other programs mean nothing here.
    pub fn parse(text: &[u8]) -> Option<Mark> {
        match std::str::from_utf8(text).ok()?.strip_prefix(MARK_PREFIX)? {
            "flush failed" => Some(Mark::FlushFailed),
            other => other.strip_prefix("length ")?.parse().ok().map(Mark::Length),
        }
    }
}

fn u64_at(from: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&from[at..at + 8]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: what is written is read back, and what is wrong is refused with the peer's words. Method: both ways.
    #[test]
    fn super_blocks() {
        let head = |s: Super| {
            let mut b = [0; 512];
            s.put(&mut b);
            b
        };
        let s = Super { entries: 7, sector_size: 4096 };
        assert_eq!(Super::parse(&head(s)), Ok(Some(s)));
        assert_eq!(Super::parse(&[0; 512]), Ok(None));
        let text = |b: &[u8]| Super::parse(b).unwrap_err().message;
        assert_eq!(text(&[1; 512]), "Invalid log superblock magic");
        let mut b = head(s);
        b[8] = 2;
        assert_eq!(text(&b), "Unsupported log version 2");
        for size in [0, 16, 1000, 1 << 24] {
            let b = head(Super { entries: 0, sector_size: size });
            assert_eq!(text(&b), format!("Invalid log sector size {size}"));
        }
        assert!(check_sector_size(32).is_ok() && check_sector_size(8 << 20).is_ok());
    }

    /// Goal: entries, times and marks survive their way through a sector.
    #[test]
    fn entries() {
        let e = Entry { sector: 3, sectors: 4, flags: flag::FUA, data_len: 0 };
        let t = Times { began: 5, ended: 6 };
        let mut b = [0; 512];
        e.put(&mut b);
        assert_eq!(Times::parse(&b), None);
        t.put(&mut b);
        assert_eq!((Entry::parse(&b, 0), Times::parse(&b)), (Ok(e), Some(t)));
        assert_eq!((e.data_sectors(), Entry { flags: flag::DISCARD, ..e }.data_sectors()), (4, 0));
        b[16] = 16;
        assert_eq!(Entry::parse(&b, 9).unwrap_err().message, "Invalid flags 0x10 in log entry 9");
        let mut small = [0; 32];
        t.put(&mut small);
        assert_eq!(small, [0; 32]);
        for mark in [Mark::FlushFailed, Mark::Length(4096)] {
            assert_eq!(Mark::parse(mark.text().as_bytes()), Some(mark));
        }
        assert_eq!(Mark::parse(b"mymark"), None);
    }
}
