//! cargo-fuzz entry of [`ringblock_fuzz::snapshot_table`].
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ringblock_fuzz::snapshot_table(data));
