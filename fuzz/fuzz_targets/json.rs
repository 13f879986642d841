//! cargo-fuzz entry of [`ringblock_fuzz::json`].
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ringblock_fuzz::json(data));
