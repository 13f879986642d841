//! The disk as the guest reads it.
//!
//! ```text
//!   L2 entry: standard ─► image or data file   zero ─► 0   none ─► backing, then 0   compressed ─► inflate
//! ```

use crate::bytes::{be64, copy, inside};
use crate::header::Header;
use crate::inflate;
use crate::tables::{COMPRESSED, COPIED, OFFSET, ZERO, compressed_range};
use crate::{Files, Finding, Kind};

/// One mapping of a disk: the active one or a snapshot's.
pub(crate) struct View<'a> {
    pub(crate) files: &'a Files<'a>,
    pub(crate) header: &'a Header,
    pub(crate) l1_offset: u64,
    pub(crate) l1_size: u32,
}

impl View<'_> {
    /// Reads `size` bytes of disk, or as much as `out` takes.
    pub(crate) fn read(
        &self,
        size: u64,
        out: &mut [u8],
        unknown: &mut Vec<(u64, u64)>,
        scratch: &mut inflate::Scratch,
    ) -> Result<(), Finding> {
        unknown.clear();
        let disk = (out.len() as u64).min(size) as usize;
        out[disk..].fill(0);
        let per_table = self.header.l2_entries() << self.header.cluster_bits;
        let cluster = self.header.cluster() as usize;
        let mut guest = 0;
        for (index, part) in out[..disk].chunks_mut(per_table as usize).enumerate() {
            let entry = self.l1_entry(index as u64);
            let table = entry & OFFSET;
            if !self.header.aligned(table) {
                return fail(Kind::L2Unaligned, index as u64, entry);
            }
            if table == 0 {
                self.backing(guest, part);
                guest += part.len() as u64;
                continue;
            }
            for (i, part) in part.chunks_mut(cluster).enumerate() {
                self.cluster(table, i as u64, guest, part, unknown, scratch)?;
                guest += part.len() as u64;
            }
        }
        Ok(())
    }

    fn l1_entry(&self, index: u64) -> u64 {
        if index >= u64::from(self.l1_size) {
            return 0;
        }
        be64(self.files.image, self.l1_offset.saturating_add(8 * index))
    }

    /// What the backing image has at `guest`.
    fn backing(&self, guest: u64, out: &mut [u8]) {
        copy(self.files.backing.unwrap_or_default(), guest, out);
    }

    fn host(&self) -> &[u8] {
        if self.header.has_data_file() { self.files.data.unwrap_or_default() } else { self.files.image }
    }

    fn cluster(
        &self,
        table: u64,
        index: u64,
        guest: u64,
        out: &mut [u8],
        unknown: &mut Vec<(u64, u64)>,
        scratch: &mut inflate::Scratch,
    ) -> Result<(), Finding> {
        let (extended, header) = (self.header.extended_l2(), self.header);
        let at = table + index * if extended { 16 } else { 8 };
        let entry = be64(self.files.image, at);
        if entry & COMPRESSED != 0 {
            return self.compressed(at, entry, guest, out, unknown, scratch);
        }
        let offset = entry & OFFSET;
        let allocated = offset != 0 || (header.has_data_file() && entry & COPIED != 0);
        if allocated && !header.aligned(offset) {
            return fail(Kind::ClusterUnaligned, at, entry);
        }
        if extended {
            return self.subclusters(at, offset, allocated, guest, out);
        }
        if entry & ZERO != 0 {
            if header.version < 3 {
                return fail(Kind::ZeroV2, at, entry);
            }
            out.fill(0);
        } else if !allocated {
            self.backing(guest, out);
        } else {
            self.data_offset(at, offset, guest)?;
            copy(self.host(), offset, out);
        }
        Ok(())
    }

    /// With an external data file, guest and host offsets are the same.
    fn data_offset(&self, at: u64, offset: u64, guest: u64) -> Result<(), Finding> {
        if self.header.has_data_file() && offset != guest {
            return fail(Kind::DataOffset, at, offset);
        }
        Ok(())
    }

    fn subclusters(
        &self,
        at: u64,
        offset: u64,
        has: bool,
        guest: u64,
        out: &mut [u8],
    ) -> Result<(), Finding> {
        let bitmap = be64(self.files.image, at + 8);
        if (bitmap >> 32) & bitmap & 0xffff_ffff != 0 {
            return fail(Kind::SubclusterBoth, at, bitmap);
        }
        if !has && bitmap & 0xffff_ffff != 0 {
            return fail(Kind::SubclusterNone, at, bitmap);
        }
        let size = self.header.cluster() / 32;
        for (i, part) in out.chunks_mut(size as usize).enumerate() {
            let within = i as u64 * size;
            if bitmap >> (32 + i) & 1 != 0 {
                part.fill(0);
            } else if bitmap >> i & 1 != 0 {
                self.data_offset(at, offset, guest)?;
                copy(self.host(), offset + within, part);
            } else {
                self.backing(guest + within, part);
            }
        }
        Ok(())
    }

    fn compressed(
        &self,
        at: u64,
        entry: u64,
        guest: u64,
        out: &mut [u8],
        unknown: &mut Vec<(u64, u64)>,
        scratch: &mut inflate::Scratch,
    ) -> Result<(), Finding> {
        if self.header.has_data_file() {
            return fail(Kind::CompressedData, at, entry);
        }
        if self.header.compression != 0 {
            unknown.push((guest, guest + out.len() as u64));
            out.fill(0);
            return Ok(());
        }
        let (offset, len) = compressed_range(self.header, entry);
        let packed = inside(self.files.image, offset, len);
        match scratch.inflate(packed, self.header.cluster() as usize) {
            Some(data) => out.copy_from_slice(&data[..out.len()]),
            None => return fail(Kind::Compressed, at, entry),
        }
        Ok(())
    }
}

fn fail<T>(kind: Kind, at: u64, value: u64) -> Result<T, Finding> {
    Err(Finding { kind, at, value })
}
