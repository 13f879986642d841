//! Big-endian fields in byte slices, with out-of-range reads as `None` instead of a panic.

/// The big-endian `u16` at `at`.
pub(super) fn be16(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(b.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

/// The big-endian `u32` at `at`.
pub(super) fn be32(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(b.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// The big-endian `u64` at `at`.
pub(super) fn be64(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(b.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Stores `v` big-endian at `at`; the caller sized the buffer, a miss is a bug caught in debug builds.
pub(super) fn put32(b: &mut [u8], at: usize, v: u32) {
    match b.get_mut(at..at + 4) {
        Some(s) => s.copy_from_slice(&v.to_be_bytes()),
        None => debug_assert!(false, "put32 at {at} outside {} bytes", b.len()),
    }
}

/// Stores `v` big-endian at `at`; see [`put32`].
pub(super) fn put64(b: &mut [u8], at: usize, v: u64) {
    match b.get_mut(at..at + 8) {
        Some(s) => s.copy_from_slice(&v.to_be_bytes()),
        None => debug_assert!(false, "put64 at {at} outside {} bytes", b.len()),
    }
}
