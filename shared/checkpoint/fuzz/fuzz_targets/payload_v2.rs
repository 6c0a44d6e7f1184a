#![no_main]

use grail_checkpoint::DeltaFormat;

// The frame as it comes, and the same bytes as what is inside a frame.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    grail_checkpoint_fuzz::payload(DeltaFormat::V2, bytes);
    grail_checkpoint_fuzz::content(DeltaFormat::V2, bytes);
});
