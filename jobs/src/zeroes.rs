//! Finding runs of zeroes in a buffer.

use std::ops::Range;

use ringblock_engine::mem::is_zero;

/// Splits `data` into runs that are all zero or not, looked at in blocks of `block` bytes. `at` is the offset of the
/// buffer in the image, so that blocks are aligned there.
pub(crate) fn runs(data: &[u8], at: u64, block: usize) -> Vec<(Range<usize>, bool)> {
    let mut out: Vec<(Range<usize>, bool)> = Vec::new();
    let mut pos = 0;
    while pos < data.len() {
        let into = ((at + pos as u64) % block as u64) as usize;
        let end = (pos + block - into).min(data.len());
        let zero = is_zero(&data[pos..end]);
        match out.last_mut() {
            Some((range, z)) if *z == zero => range.end = end,
            _ => out.push((pos..end, zero)),
        }
        pos = end;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: runs cover the buffer and tell zeroes apart. Method: a buffer that begins inside a block.
    #[test]
    fn runs_are_aligned_to_the_image() {
        let mut data = vec![0u8; 10_000];
        data[5000] = 1;
        let found = runs(&data, 1000, 4096);
        assert_eq!(found, [(0..3096, true), (3096..7192, false), (7192..10_000, true)]);
    }
}
