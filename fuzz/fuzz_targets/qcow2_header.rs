//! cargo-fuzz entry of [`ringblock_fuzz::qcow2_header`].
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ringblock_fuzz::qcow2_header(data));
