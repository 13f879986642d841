//! cargo-fuzz entry of [`ringblock_fuzz::nbd_handshake`].
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| ringblock_fuzz::nbd_handshake(data));
