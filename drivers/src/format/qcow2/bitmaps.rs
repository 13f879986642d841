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
use ringblock_engine::{Errno, Error};

use super::bytes::{be16, be32, be64, put32};
use super::extensions::BitmapsExtension;
use super::io::Store;

/// Bytes of the fixed part of an entry.
const FIXED: usize = 24;
/// Flag: some writer did not store its changes.
const IN_USE: u32 = 1;

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

/// Walks a directory.
pub(super) fn parse(directory: &[u8], count: u32) -> Result<Vec<BitmapEntry>, Error> {
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
        if e.len() < len || table_size > 0x800_0000 {
            return Err(bad());
        }
        out.push(BitmapEntry { at, table_offset, table_size, flags });
        at += len.next_multiple_of(8);
    }
    Ok(out)
}

/// Reads the directory.
pub(super) async fn read(file: &dyn Store, ext: &BitmapsExtension) -> Result<(Buf, Vec<BitmapEntry>), Error> {
    let (result, bytes) = file.read(ext.directory_offset.0, Buf::new(ext.directory_size as usize)).await;
    result.map_err(|e| Error::io(e, "Failed to read bitmap directory"))?;
    let list = parse(&bytes, ext.count)?;
    Ok((bytes, list))
}

/// Marks all bitmaps as in use, durably.
pub(super) async fn mark_in_use(file: &dyn Store, ext: &BitmapsExtension) -> Result<(), Error> {
    let (mut bytes, list) = read(file, ext).await?;
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
