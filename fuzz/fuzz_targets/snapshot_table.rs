#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ringblock_fuzz::find("snapshot_table").map(|t| (t.run)(data));
});
