//! Big-endian numbers out of a file. Beyond its end a file reads as zeroes, as files do that are about to grow.

/// `N` bytes at `at`, with zeroes beyond the end.
fn get<const N: usize>(file: &[u8], at: u64) -> [u8; N] {
    let mut out = [0; N];
    let Ok(start) = usize::try_from(at) else {
        return out;
    };
    let rest = file.get(start..).unwrap_or_default();
    let len = rest.len().min(N);
    out[..len].copy_from_slice(&rest[..len]);
    out
}

pub(crate) fn be64(file: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(get(file, at))
}

pub(crate) fn be32(file: &[u8], at: u64) -> u32 {
    u32::from_be_bytes(get(file, at))
}

pub(crate) fn be16(file: &[u8], at: u64) -> u16 {
    u16::from_be_bytes(get(file, at))
}

pub(crate) fn byte(file: &[u8], at: u64) -> u8 {
    get::<1>(file, at)[0]
}

/// The part of `at..at + len` that lies inside the file.
pub(crate) fn inside(file: &[u8], at: u64, len: u64) -> &[u8] {
    let size = file.len() as u64;
    let start = at.min(size);
    let end = at.saturating_add(len).min(size);
    &file[start as usize..end as usize]
}

/// Copies `at..` of `file` into `out`, zeroes beyond the end.
pub(crate) fn copy(file: &[u8], at: u64, out: &mut [u8]) {
    let from = inside(file, at, out.len() as u64);
    let (head, tail) = out.split_at_mut(from.len());
    head.copy_from_slice(from);
    tail.fill(0);
}
