//! Persistent dirty bitmaps of an image: kept, but not kept up to date.
//!
//! A writer that does not record its writes in a bitmap must say so before the first one: the bitmap's "in use" flag stays
//! set, and the next reader knows that it is inconsistent (qcow2 specification, "Bitmap directory").
//!
//! Invariant: no guest write happens before the flags are durable.
//!
//! ```text
//! directory: │ table offset u64 │ table size u32 │ flags u32 │ type u8 │ granularity u8 │ name u16 │ extra u32 │ … │ pad 8
//! ```

use ringblock_engine::mem::Buf;
use ringblock_engine::mutant;
use ringblock_engine::units::HostOffset;
use ringblock_engine::{Errno, Error};

use super::bytes::{be16, be32, be64, put32};
use super::extensions::BitmapsExtension;
use super::geometry::Geometry;
use super::header::Header;
use super::io::Store;

/// Bytes of the fixed part of an entry.
const FIXED: usize = 24;
/// Flag: some writer did not store its changes.
const IN_USE: u32 = 1;
/// All flags there are.
const FLAGS: u32 = 7;
/// The only type of bitmap there is.
const DIRTY_TRACKING: u8 = 1;
/// Smallest and largest granularity, log2.
const MIN_GRANULARITY: u8 = 9;
const MAX_GRANULARITY: u8 = 31;
/// Limits of the peer: entries of a table, bytes of a bitmap, bytes of a name.
const MAX_TABLE: u32 = 0x800_0000;
const MAX_BYTES: u64 = 0x2000_0000;
const MAX_NAME: u16 = 1023;

/// One entry of the bitmap directory.
#[derive(Clone, Debug)]
pub(super) struct BitmapEntry {
    /// Where the entry is in the directory.
    pub(super) at: usize,
    /// Where the bitmap's table is.
    pub(super) table_offset: u64,
    /// Entries of the table.
    pub(super) table_size: u32,
    /// Flag bits.
    pub(super) flags: u32,
}

impl BitmapEntry {
    /// What its table says is not up to date.
    pub(super) fn in_use(&self) -> bool {
        self.flags & IN_USE != 0
    }

    /// Whether it is within the constraints of the format; `disk` are the bytes that it has to cover.
    fn is_valid(&self, kind: u8, granularity: u8, g: &Geometry, disk: u64) -> bool {
        let bytes = u64::from(self.table_size) << g.cluster_bits;
        let covers = || (u128::from(bytes) * 8) << granularity >= u128::from(disk);
        self.flags & !FLAGS == 0
            && kind == DIRTY_TRACKING
            && self.table_size > 0
            && self.table_offset != 0
            && g.is_host_aligned(HostOffset(self.table_offset))
            && self.table_size <= MAX_TABLE
            && bytes <= MAX_BYTES
            && (MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity)
            && (self.in_use() || covers())
    }
}

/// Walks a directory.
pub(super) fn parse(
    directory: &[u8],
    count: u32,
    g: &Geometry,
    disk: u64,
) -> Result<Vec<BitmapEntry>, Error> {
    let bad = || Error::invalid("Broken bitmap directory");
    let mut out = Vec::new();
    let mut at = 0usize;
    for _ in 0..count {
        let e = directory.get(at..).ok_or_else(bad)?;
        let (Some(table_offset), Some(table_size), Some(flags), Some(name), Some(extra)) =
            (be64(e, 0), be32(e, 8), be32(e, 12), be16(e, 18), be32(e, 20))
        else {
            return Err(bad());
        };
        let len = FIXED + usize::from(name) + extra as usize;
        let len = len.next_multiple_of(8);
        if e.len() < len {
            return Err(bad());
        }
        if extra != 0 {
            return Err(Error::invalid("Bitmap extra data is not supported"));
        }
        let entry = BitmapEntry { at, table_offset, table_size, flags };
        let named = name > 0 && name <= MAX_NAME;
        if !named || !entry.is_valid(e[16], e[17], g, disk) {
            let text = String::from_utf8_lossy(&e[FIXED..FIXED + usize::from(name)]).into_owned();
            return Err(Error::invalid(format!("Bitmap '{text}' doesn't satisfy the constraints")));
        }
        out.push(entry);
        at += len;
    }
    if at == directory.len() { Ok(out) } else { Err(bad()) }
}

/// Reads the directory.
pub(super) async fn read(
    file: &dyn Store,
    ext: &BitmapsExtension,
    header: &Header,
) -> Result<(Buf, Vec<BitmapEntry>), Error> {
    let (result, bytes) = file.read(ext.directory_offset.0, Buf::new(ext.directory_size as usize)).await;
    result.map_err(|e| Error::io(e, "Failed to read bitmap directory"))?;
    let list = parse(&bytes, ext.count, &header.geometry()?, header.size)?;
    Ok((bytes, list))
}

/// Marks all bitmaps as in use, durably.
pub(super) async fn mark_in_use(
    file: &dyn Store,
    ext: &BitmapsExtension,
    header: &Header,
) -> Result<(), Error> {
    let (mut bytes, list) = read(file, ext, header).await?;
    let mut changed = false;
    for b in list.iter().filter(|b| b.flags & IN_USE == 0) {
        put32(&mut bytes, b.at + 12, b.flags | IN_USE);
        changed = true;
    }
    let io = |e: Errno| Error::io(e, "Failed to update bitmap directory");
    if changed && !mutant!("bitmaps-in-use") {
        file.write(ext.directory_offset.0, bytes).await.map_err(io)?;
        if !mutant!("bitmaps-in-use-barrier") {
            file.flush().await.map_err(io)?;
        }
    }
    Ok(())
}
