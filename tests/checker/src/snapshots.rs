//! The snapshot table.

use crate::bytes::{be16, be32, be64, inside};
use crate::header::{Header, table_fits};
use crate::{Files, Kind, Report};

const MAX_SNAPSHOTS: u32 = 65_536;
const MAX_EXTRA: u32 = 1024;
/// Extra data that version 3 wants.
const MIN_EXTRA: u64 = 16;
const MAX_TABLE: u64 = 64 << 20;

/// An internal snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The offset of its L1 table.
    pub l1_offset: u64,
    /// The number of entries of its L1 table.
    pub l1_size: u32,
    /// The size of the disk when it was taken.
    pub disk_size: u64,
    /// Bytes of machine state.
    pub vm_state: u64,
    /// Seconds since 1970.
    pub date: u32,
    start: u64,
    id: (u64, u16),
    name: (u64, u16),
}

impl Snapshot {
    /// Its ID, out of the file that it was read from.
    pub fn id<'a>(&self, image: &'a [u8]) -> &'a [u8] {
        inside(image, self.id.0, self.id.1.into())
    }

    /// Its name, out of the file that it was read from.
    pub fn name<'a>(&self, image: &'a [u8]) -> &'a [u8] {
        inside(image, self.name.0, self.name.1.into())
    }
}

/// Reads the table into `out`, up to the first entry that cannot be.
pub(crate) fn read(files: &Files<'_>, header: &Header, out: &mut Vec<Snapshot>, report: &mut Report) {
    out.clear();
    let image = files.image;
    let start = header.snapshots_offset;
    if !table_fits(header, start, u64::from(header.snapshot_count.min(MAX_SNAPSHOTS)) * 40) {
        return report.refuse(Kind::SnapshotTable, start, header.snapshot_count.into());
    }
    if header.snapshot_count > MAX_SNAPSHOTS {
        return report.refuse(Kind::SnapshotTable, start, header.snapshot_count.into());
    }
    let mut at = start;
    for index in 0..header.snapshot_count {
        let Some(entry) = entry(image, header, &mut at) else {
            return report.refuse(Kind::SnapshotTable, at, index.into());
        };
        if at - start > MAX_TABLE {
            return report.refuse(Kind::SnapshotTable, at, index.into());
        }
        if header.version >= 3 && entry.id.0 - entry.start < 40 + MIN_EXTRA {
            report.corrupt(Kind::SnapshotIncomplete, at, index.into());
        }
        out.push(entry);
    }
}

/// One entry; moves `at` behind it.
fn entry(image: &[u8], header: &Header, at: &mut u64) -> Option<Snapshot> {
    let start = *at;
    let (id_len, name_len) = (be16(image, start + 12), be16(image, start + 14));
    let extra = be32(image, start + 36);
    if extra > MAX_EXTRA {
        return None;
    }
    let vm_state = if extra >= 8 { be64(image, start + 40) } else { be32(image, start + 32).into() };
    let disk_size = if extra >= 16 { be64(image, start + 48) } else { header.virtual_size };
    let id = start + 40 + u64::from(extra);
    let name = id + u64::from(id_len);
    *at = (name + u64::from(name_len)).next_multiple_of(8);
    Some(Snapshot {
        l1_offset: be64(image, start),
        l1_size: be32(image, start + 8),
        disk_size,
        vm_state,
        date: be32(image, start + 16),
        start,
        id: (id, id_len),
        name: (name, name_len),
    })
}

/// The bytes of the table, once it was read.
pub(crate) fn table_bytes(header: &Header, all: &[Snapshot]) -> u64 {
    let end = all.last().map(|s| (s.name.0 + u64::from(s.name.1)).next_multiple_of(8));
    end.map_or(0, |end| end - header.snapshots_offset)
}
