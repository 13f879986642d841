//! Header extensions: the ones understood, and the rest kept byte for byte.
//!
//! Invariants: walking never leaves the area between the header and the backing file name; an unknown extension is
//! written back unchanged; the feature name table is written back unchanged, or made new for an image without one.
//!
//! ```text
//! │ type u32 │ length u32 │ data, padded to 8 │ type │ length │ … │ 0 │ 0 │
//! ```
//! Source: qcow2 specification, "Header extensions", "Bitmaps extension", "Feature name table".

use ringblock_engine::Error;
use ringblock_engine::units::HostOffset;

use super::bytes::{be32, be64};
use super::header::{Header, autoclear};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;
/// Limit on the number of bitmaps.
pub const MAX_BITMAPS: u32 = 65535;
/// Limit on the bitmap directory: 64 KiB of bitmaps of 1 KiB each.
pub const MAX_BITMAP_DIRECTORY: u64 = 1024 * MAX_BITMAPS as u64;
/// Bytes of one row of the feature name table.
const FEATURE_ROW: usize = 48;

/// Where the persistent bitmaps of an image are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BitmapsExtension {
    /// Number of bitmaps, at least 1.
    pub count: u32,
    /// Bytes of the bitmap directory.
    pub directory_size: u64,
    /// Where the bitmap directory is.
    pub directory_offset: HostOffset,
}

/// The extensions of a header.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Extensions {
    /// Format of the backing file, as stored.
    pub backing_format: Option<String>,
    /// Name of the external data file, as stored.
    pub data_file: Option<String>,
    /// Where the LUKS header is, and its length.
    pub crypto: Option<(HostOffset, u64)>,
    /// Rows of the feature name table, as stored.
    pub feature_names: Option<Vec<u8>>,
    /// The bitmaps extension, if present and declared consistent.
    pub bitmaps: Option<BitmapsExtension>,
    /// Unknown extensions in order.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

/// One step of the walk over the extension area.
struct Walk<'a> {
    area: &'a [u8],
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<(u32, &'a [u8]), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        // An area too short for another header simply ends, as does the end marker.
        let (kind, len) = (be32(self.area, 0)?, be32(self.area, 4)? as usize);
        let rest = &self.area[8..];
        let Some(data) = rest.get(..len) else {
            self.area = &[];
            return Some(Err(Error::invalid("Header extension too large")));
        };
        if kind == END {
            return None;
        }
        self.area = rest.get(len.next_multiple_of(8)..).unwrap_or(&[]);
        Some(Ok((kind, data)))
    }
}

/// Bytes up to the first NUL as text; `None` where that is not UTF-8.
pub(super) fn text(raw: &[u8]) -> Option<String> {
    let end = raw.iter().position(|&b| b == 0).unwrap_or(raw.len());
    String::from_utf8(raw[..end].to_vec()).ok()
}

/// The names an image gives to incompatible features: (bit, name). Damaged areas give what could be read.
pub(super) fn incompatible_names(area: &[u8]) -> Vec<(u32, String)> {
    let mut names = Vec::new();
    for (kind, data) in (Walk { area }).map_while(Result::ok) {
        if kind != FEATURE_NAMES {
            continue;
        }
        for row in data.chunks_exact(FEATURE_ROW) {
            let end = row[2..].iter().position(|&b| b == 0).map_or(FEATURE_ROW, |n| n + 2);
            if row[0] == 0 && row[1] < 64 {
                names.push((u32::from(row[1]), String::from_utf8_lossy(&row[2..end]).into_owned()));
            }
        }
    }
    names
}

impl Extensions {
    /// Parses the extension area of a header whose fields are already known.
    pub(super) fn parse(area: &[u8], header: &Header) -> Result<Extensions, Error> {
        let mut out = Extensions::default();
        for step in (Walk { area }) {
            let (kind, data) = step?;
            match kind {
                BACKING_FORMAT => out.backing_format = Some(backing_format(data)?),
                DATA_FILE => {
                    let name = text(data).ok_or_else(|| {
                        Error::invalid("The data file name in the image is not valid UTF-8")
                    })?;
                    out.data_file = Some(name);
                }
                FEATURE_NAMES => out.feature_names = Some(data.to_vec()),
                CRYPTO => out.crypto = Some(crypto(data, header)?),
                BITMAPS if header.autoclear & autoclear::BITMAPS != 0 => {
                    out.bitmaps = Some(bitmaps(data, header)?)
                }
                // Bitmaps that some writer did not keep up to date: gone with the next header rewrite.
                BITMAPS => {}
                _ => out.unknown.push((kind, data.to_vec())),
            }
        }
        Ok(out)
    }

    /// The extension area with its end marker, 8-byte aligned.
    pub(super) fn serialised(&self, with_names: bool) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some(f) = &self.backing_format {
            push(&mut out, BACKING_FORMAT, f.as_bytes());
        }
        if let Some(name) = &self.data_file {
            push(&mut out, DATA_FILE, name.as_bytes());
        }
        if let Some((at, len)) = self.crypto {
            push(&mut out, CRYPTO, &[at.0.to_be_bytes(), len.to_be_bytes()].concat());
        }
        if let Some(rows) = self.feature_names.as_ref().filter(|_| with_names) {
            push(&mut out, FEATURE_NAMES, rows);
        }
        if let Some(b) = &self.bitmaps {
            let mut data = Vec::with_capacity(24);
            data.extend(b.count.to_be_bytes());
            data.extend([0; 4]);
            data.extend(b.directory_size.to_be_bytes());
            data.extend(b.directory_offset.0.to_be_bytes());
            push(&mut out, BITMAPS, &data);
        }
        for (kind, data) in &self.unknown {
            push(&mut out, *kind, data);
        }
        push(&mut out, END, &[]);
        out
    }
}

/// Appends one extension, padded to 8 bytes.
fn push(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

fn backing_format(data: &[u8]) -> Result<String, Error> {
    if data.len() >= 16 {
        return Err(Error::invalid(format!(
            "ERROR: ext_backing_format: len={} too large (>=16)",
            data.len()
        )));
    }
    text(data).ok_or_else(|| Error::invalid("The backing format in the image is not valid UTF-8"))
}

fn crypto(data: &[u8], header: &Header) -> Result<(HostOffset, u64), Error> {
    if header.crypt_method != 2 {
        return Err(Error::invalid("CRYPTO header extension only expected with LUKS encryption method"));
    }
    let (16, Some(at), Some(len)) = (data.len(), be64(data, 0), be64(data, 8)) else {
        return Err(Error::invalid(format!(
            "CRYPTO header extension size {}, but expected size 16",
            data.len()
        )));
    };
    if at % (1 << header.cluster_bits) != 0 {
        return Err(Error::invalid(format!(
            "Encryption header offset '{at}' is not a multiple of cluster size '{}'",
            1u64 << header.cluster_bits
        )));
    }
    Ok((HostOffset(at), len))
}

fn bitmaps(data: &[u8], header: &Header) -> Result<BitmapsExtension, Error> {
    let fail = |what: String| Error::invalid(format!("bitmaps_ext: {what}"));
    let (24, Some(count), Some(reserved), Some(size), Some(at)) =
        (data.len(), be32(data, 0), be32(data, 4), be64(data, 8), be64(data, 16))
    else {
        return Err(fail("Invalid extension length".into()));
    };
    if reserved != 0 {
        return Err(fail("Reserved field is not zero".into()));
    }
    if count > MAX_BITMAPS {
        return Err(fail(format!(
            "image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
        )));
    }
    if count == 0 {
        return Err(fail("found bitmaps extension with zero bitmaps".into()));
    }
    if at % (1 << header.cluster_bits) != 0 || at >= super::geometry::HOST_OFFSET_LIMIT {
        return Err(fail("invalid bitmap directory offset".into()));
    }
    if size > MAX_BITMAP_DIRECTORY {
        return Err(fail(format!(
            "bitmap directory size ({size}) exceeds the maximum supported size ({MAX_BITMAP_DIRECTORY})"
        )));
    }
    Ok(BitmapsExtension { count, directory_size: size, directory_offset: HostOffset(at) })
}

/// The feature name table of a new image (specification, "Feature name table").
pub(super) fn standard_feature_names() -> Vec<u8> {
    let rows: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut out = vec![0; rows.len() * FEATURE_ROW];
    for (row, (kind, bit, name)) in out.chunks_exact_mut(FEATURE_ROW).zip(rows) {
        row[0] = kind;
        row[1] = bit;
        row[2..2 + name.len()].copy_from_slice(name.as_bytes());
    }
    out
}
