//! The pseudo-random function of the protocol (protocol §4): SHAKE-256 over parts joined by `||`.

use sha3::Shake256;
use sha3::digest::{ExtendableOutput as _, Update as _, XofReader as _};

/// Most bytes of one output.
pub const MAX_OUTPUT_BYTES: usize = 65_536;

/// More output was asked for than the protocol allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes of output were asked for: at most {MAX_OUTPUT_BYTES} are allowed")]
pub struct OutputTooLong {
    /// Bytes asked for.
    pub bytes: usize,
}

/// The first `bytes` bytes of the function. `||` stands after the label even when there are no parts, and after no part but
/// before each.
///
/// # Errors
/// [`OutputTooLong`] above [`MAX_OUTPUT_BYTES`].
pub fn prf(label: &[u8], parts: &[&[u8]], bytes: usize) -> Result<Vec<u8>, OutputTooLong> {
    if bytes > MAX_OUTPUT_BYTES {
        return Err(OutputTooLong { bytes });
    }
    let mut output = vec![0; bytes];
    fill(label, parts, &mut output);
    Ok(output)
}

/// [`prf`] for a length that is known when compiling.
#[must_use]
pub fn prf_array<const BYTES: usize>(label: &[u8], parts: &[&[u8]]) -> [u8; BYTES] {
    const { assert!(BYTES <= MAX_OUTPUT_BYTES, "an output has at most 65,536 bytes") };
    let mut output = [0; BYTES];
    fill(label, parts, &mut output);
    output
}

fn fill(label: &[u8], parts: &[&[u8]], output: &mut [u8]) {
    let mut hash = Shake256::default();
    hash.update(label);
    hash.update(b"||");
    for (index, part) in parts.iter().enumerate() {
        if index > 0 {
            hash.update(b"||");
        }
        hash.update(part);
    }
    hash.finalize_xof().read(output);
}
