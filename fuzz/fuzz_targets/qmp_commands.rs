#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ringblock_fuzz::find("qmp_commands").map(|t| (t.run)(data));
});
