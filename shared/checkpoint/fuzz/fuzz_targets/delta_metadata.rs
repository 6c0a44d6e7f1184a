#![no_main]

libfuzzer_sys::fuzz_target!(|text: &[u8]| grail_checkpoint_fuzz::delta_metadata(text));
