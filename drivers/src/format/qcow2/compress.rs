//! Packing and unpacking of clusters: deflate without a wrapper, or Zstandard.
//!
//! Invariants: unpacking writes exactly one cluster and never more, whatever the packed bytes say; trailing bytes
//! after the packed data (the entry counts whole sectors) are ignored.
//!
//! ```text
//! host bytes, sector-rounded ──unpack──► cluster_size bytes
//! cluster ──pack──► bytes, or nothing where that does not save at least a byte
//! ```
//! Source: qcow2 specification, "Compressed Clusters Descriptor"; deflate has a window of 2^12 bytes.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use ringblock_engine::Errno;
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use super::header::CompressionType;

/// log2 of the deflate window that readers of the format allow.
const WINDOW_BITS: u8 = 12;

/// Unpacks into `cluster`, which must be filled exactly.
///
/// # Errors
/// `EIO` for damaged input or input that holds less than a cluster.
pub fn unpack(kind: CompressionType, packed: &[u8], cluster: &mut [u8]) -> Result<(), Errno> {
    match kind {
        CompressionType::Zlib => inflate(packed, cluster),
        CompressionType::Zstd => unpack_zstd(packed, cluster),
    }
}

fn inflate(packed: &[u8], cluster: &mut [u8]) -> Result<(), Errno> {
    let mut d = Decompress::new_with_window_bits(false, WINDOW_BITS);
    // With all input and room for all output one call does it; BufError is a full output with input left over.
    let status = d.decompress(packed, cluster, FlushDecompress::Finish).map_err(|_| Errno::EIO)?;
    let full = d.total_out() == cluster.len() as u64;
    match status {
        Status::StreamEnd | Status::BufError | Status::Ok if full => Ok(()),
        _ => Err(Errno::EIO),
    }
}

fn unpack_zstd(packed: &[u8], cluster: &mut [u8]) -> Result<(), Errno> {
    let mut d = Decoder::new().map_err(|_| Errno::ENOMEM)?;
    let mut input = InBuffer::around(packed);
    let mut output = OutBuffer::around(cluster);
    // Each turn consumes or produces something, or the input is short: the loop is bounded by their lengths.
    loop {
        let before = (input.pos(), output.pos());
        d.run(&mut input, &mut output).map_err(|_| Errno::EIO)?;
        if output.pos() == output.capacity() {
            return Ok(());
        }
        if (input.pos(), output.pos()) == before {
            return Err(Errno::EIO);
        }
    }
}

/// Packs a cluster. `None` where the result would not be smaller than the cluster: it is then stored as it is.
///
/// # Errors
/// `EIO` where the packer fails, `ENOMEM` where it gets no memory.
pub fn pack(kind: CompressionType, cluster: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
    match kind {
        CompressionType::Zlib => deflate(cluster),
        CompressionType::Zstd => pack_zstd(cluster),
    }
}

fn deflate(cluster: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
    let mut c = Compress::new_with_window_bits(Compression::default(), false, WINDOW_BITS);
    let mut out = Vec::with_capacity(cluster.len().saturating_sub(1));
    let status = c.compress_vec(cluster, &mut out, FlushCompress::Finish).map_err(|_| Errno::EIO)?;
    Ok((status == Status::StreamEnd && out.len() < cluster.len()).then_some(out))
}

fn pack_zstd(cluster: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
    let mut out = vec![0; cluster.len().saturating_sub(1)];
    let mut c = zstd::bulk::Compressor::new(zstd::DEFAULT_COMPRESSION_LEVEL).map_err(|_| Errno::ENOMEM)?;
    match c.compress_to_buffer(cluster, &mut out) {
        Ok(n) => {
            out.truncate(n);
            Ok(Some(out))
        }
        // The only failure with valid arguments is a destination too small: the cluster does not shrink.
        Err(_) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u64) -> Vec<u8> {
        let mut x = seed;
        (0..n)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                x as u8
            })
            .collect()
    }

    /// Goal: what is packed unpacks, with trailing garbage, for every cluster size; noise is not packed. Method:
    /// half-repetitive data of each size.
    #[test]
    fn round_trip_with_trailing_bytes() {
        for kind in [CompressionType::Zlib, CompressionType::Zstd] {
            for bits in [9, 12, 16, 21] {
                let n = 1 << bits;
                let mut data = vec![7u8; n];
                data[n / 2..].copy_from_slice(&noise(n / 2, 3));
                let mut packed = pack(kind, &data).unwrap().unwrap();
                assert!(packed.len() < n);
                packed.extend(noise(400, 9));
                let mut back = vec![0; n];
                unpack(kind, &packed, &mut back).unwrap();
                assert!(back == data);
                assert_eq!(pack(kind, &noise(n, 5)).unwrap(), None);
            }
        }
    }

    /// Goal: damaged and short input fails and cannot overrun. Method: truncations, noise, and a bomb that would
    /// unpack to far more than a cluster.
    #[test]
    fn damaged_input_is_an_error() {
        for kind in [CompressionType::Zlib, CompressionType::Zstd] {
            let packed = pack(kind, &vec![1u8; 1 << 20]).unwrap().unwrap();
            let mut small = vec![0; 4096];
            unpack(kind, &packed, &mut small).unwrap();
            assert!(small.iter().all(|&b| b == 1));
            let mut large = vec![0; 2 << 20];
            assert_eq!(unpack(kind, &packed, &mut large), Err(Errno::EIO));
            assert_eq!(unpack(kind, &packed[..8], &mut large), Err(Errno::EIO));
            assert_eq!(unpack(kind, &[], &mut small), Err(Errno::EIO));
            assert_eq!(unpack(kind, &[0xff; 512], &mut small), Err(Errno::EIO));
        }
    }
}
