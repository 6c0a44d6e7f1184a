#![no_main]

use grail_checkpoint::DeltaFormat;
use grail_checkpoint_fuzz::payload;

// The frame as it comes, and the same bytes as what is inside a frame.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    payload(DeltaFormat::V3, bytes);
    if let Ok(packed) = zstd::bulk::compress(bytes, 1) {
        payload(DeltaFormat::V3, &packed);
    }
});
