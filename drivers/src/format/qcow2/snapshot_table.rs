//! The table of internal snapshots.
//!
//! Invariants: at most 65536 snapshots, 64 MiB of table and 1024 bytes of extra data each; extra data is kept byte for
//! byte; a table that parsed serialises to the same bytes (padding cleared).
//!
//! ```text
//! │ 40 fixed bytes │ extra data │ id │ name │ pad to 8 │ next snapshot …
//! ```
//! Source: qcow2 specification, "Snapshots".

use ringblock_engine::units::HostOffset;
use ringblock_engine::{Errno, Error};

use super::bytes::{be16, be32, be64};
use super::geometry::{Geometry, HOST_OFFSET_LIMIT, MAX_L1_BYTES};

/// Limit on the bytes of the whole table.
pub const MAX_TABLE_BYTES: u64 = 64 << 20;
/// Limit on the extra data of one snapshot.
pub const MAX_EXTRA: u32 = 1024;
/// Extra data that every snapshot of a version 3 image has.
pub const EXTRA_V3: usize = 16;
/// Bytes of the fixed part.
const FIXED: usize = 40;

/// One internal snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Where its L1 table is.
    pub l1_offset: HostOffset,
    /// Entries of its L1 table.
    pub l1_size: u32,
    /// Unique id, text.
    pub id: Vec<u8>,
    /// Name, text, not necessarily unique.
    pub name: Vec<u8>,
    /// Time of creation, seconds since the epoch.
    pub date_sec: u32,
    /// Time of creation, nanoseconds within the second.
    pub date_nsec: u32,
    /// Time the guest had been running, nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of the saved virtual machine state, the old 32-bit field.
    pub vm_state_size_32: u32,
    /// Extra data as stored.
    pub extra: Vec<u8>,
}

impl Snapshot {
    /// Bytes of the saved virtual machine state.
    pub fn vm_state_size(&self) -> u64 {
        be64(&self.extra, 0).unwrap_or(u64::from(self.vm_state_size_32))
    }

    /// Bytes of the virtual disk when the snapshot was taken; `None` in old images.
    pub fn disk_size(&self) -> Option<u64> {
        be64(&self.extra, 8)
    }

    /// Instruction count of the guest; `None` where not recorded.
    pub fn icount(&self) -> Option<u64> {
        be64(&self.extra, 16).filter(|&v| v != u64::MAX)
    }

    /// Bytes of the entry in the table, padding included.
    pub fn stored_len(&self) -> usize {
        (FIXED + self.extra.len() + self.id.len() + self.name.len()).next_multiple_of(8)
    }

    /// Whether the L1 table named here is within the limits of the format.
    pub fn check_l1(&self, geometry: &Geometry) -> Result<(), Error> {
        let bytes = u64::from(self.l1_size) * 8;
        if bytes > MAX_L1_BYTES {
            return Err(Error::new(Errno::EFBIG, "Snapshot L1 table too large"));
        }
        let fits = self.l1_offset.checked_add(bytes).is_some_and(|end| end.0 <= HOST_OFFSET_LIMIT);
        if !fits || !geometry.is_host_aligned(self.l1_offset) {
            return Err(Error::invalid("Snapshot L1 table offset invalid"));
        }
        Ok(())
    }
}

/// Where the parse of a growing prefix of the table stands.
#[derive(Debug)]
pub enum Parsed {
    /// All snapshots, and the bytes they occupy.
    Done(Vec<Snapshot>, u64),
    /// More of the table is needed: at least this many bytes from its start.
    Need(u64),
}

/// Parses `count` snapshots from the start of the table. The length of a table is not stored, so the caller reads a
/// guess and tries again with more when told.
///
/// # Errors
/// `EINVAL` for extra data over its limit, `EFBIG` for a table over 64 MiB.
pub fn parse(table: &[u8], count: u32) -> Result<Parsed, Error> {
    let mut out = Vec::new();
    let mut at = 0usize;
    for i in 0..count {
        match parse_one(table.get(at..).unwrap_or(&[]), i)? {
            Ok((snapshot, len)) => {
                at += len;
                out.push(snapshot);
            }
            Err(need) => {
                let need = (at + need) as u64;
                return if need > MAX_TABLE_BYTES { Err(too_large()) } else { Ok(Parsed::Need(need)) };
            }
        }
    }
    if at as u64 > MAX_TABLE_BYTES {
        return Err(too_large());
    }
    Ok(Parsed::Done(out, at as u64))
}

fn too_large() -> Error {
    Error::new(Errno::EFBIG, "Snapshot table is too large")
}

/// One entry and its length, or how many bytes it needs.
fn parse_one(b: &[u8], index: u32) -> Result<Result<(Snapshot, usize), usize>, Error> {
    let (Some(extra_len), Some(id_len), Some(name_len)) = (be32(b, 36), be16(b, 12), be16(b, 14)) else {
        return Ok(Err(FIXED));
    };
    if extra_len > MAX_EXTRA {
        return Err(Error::invalid(format!("Too much extra metadata in snapshot table entry {index}")));
    }
    let extra_end = FIXED + extra_len as usize;
    let id_end = extra_end + usize::from(id_len);
    let name_end = id_end + usize::from(name_len);
    let (Some(extra), Some(id), Some(name)) =
        (b.get(FIXED..extra_end), b.get(extra_end..id_end), b.get(id_end..name_end))
    else {
        return Ok(Err(name_end));
    };
    let (u32_at, u64_at) = (|at| be32(b, at).unwrap_or(0), |at| be64(b, at).unwrap_or(0));
    let snapshot = Snapshot {
        l1_offset: HostOffset(u64_at(0)),
        l1_size: u32_at(8),
        id: id.to_vec(),
        name: name.to_vec(),
        date_sec: u32_at(16),
        date_nsec: u32_at(20),
        vm_clock_nsec: u64_at(24),
        vm_state_size_32: u32_at(32),
        extra: extra.to_vec(),
    };
    Ok(Ok((snapshot, name_end.next_multiple_of(8))))
}

/// The bytes of a table.
///
/// # Errors
/// `EFBIG` where a limit of the format would be exceeded.
pub fn serialise(snapshots: &[Snapshot]) -> Result<Vec<u8>, Error> {
    let mut out = Vec::new();
    for s in snapshots {
        let (Ok(id_len), Ok(name_len)) = (u16::try_from(s.id.len()), u16::try_from(s.name.len())) else {
            return Err(too_large());
        };
        if s.extra.len() > MAX_EXTRA as usize {
            return Err(too_large());
        }
        out.extend(s.l1_offset.0.to_be_bytes());
        out.extend(s.l1_size.to_be_bytes());
        out.extend(id_len.to_be_bytes());
        out.extend(name_len.to_be_bytes());
        out.extend(s.date_sec.to_be_bytes());
        out.extend(s.date_nsec.to_be_bytes());
        out.extend(s.vm_clock_nsec.to_be_bytes());
        out.extend(s.vm_state_size_32.to_be_bytes());
        out.extend((s.extra.len() as u32).to_be_bytes());
        out.extend(&s.extra);
        out.extend(&s.id);
        out.extend(&s.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    if out.len() as u64 > MAX_TABLE_BYTES || snapshots.len() > super::header::MAX_SNAPSHOTS as usize {
        return Err(too_large());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(extra: usize) -> Snapshot {
        Snapshot {
            l1_offset: HostOffset(0x30000),
            l1_size: 2,
            id: b"1".to_vec(),
            name: b"before".to_vec(),
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
            vm_state_size_32: 4,
            extra: (0..extra).map(|i| i as u8).collect(),
        }
    }

    /// Goal: a table survives a round trip, extra data of any length included. Method: several lengths in one table,
    /// parsed from every prefix on the way.
    #[test]
    fn round_trip_with_growing_prefix() {
        let all: Vec<_> = [0, 16, 24, 33, 1024].map(sample).into();
        let bytes = serialise(&all).unwrap();
        let mut have = 0;
        loop {
            match parse(&bytes[..have], 5).unwrap() {
                Parsed::Need(n) => {
                    assert!(n as usize > have && n as usize <= bytes.len());
                    have = n as usize;
                }
                Parsed::Done(got, len) => {
                    assert_eq!((got, len as usize), (all, bytes.len()));
                    return;
                }
            }
        }
    }

    /// Goal: hostile lengths are refused before anything is read. Method: extra data of 1025 bytes.
    #[test]
    fn limits() {
        let mut bytes = serialise(&[sample(16)]).unwrap();
        bytes[36..40].copy_from_slice(&1025u32.to_be_bytes());
        assert!(parse(&bytes, 1).unwrap_err().message.contains("Too much extra metadata"));
        assert_eq!(sample(16).disk_size(), Some(0x08090a0b0c0d0e0f));
        assert_eq!(sample(0).disk_size(), None);
    }
}
