#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ringblock_fuzz::find("qcow2_image").map(|t| (t.run)(data));
});
