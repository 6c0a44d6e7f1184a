//! The text that a row signature signs (protocol §7).

use crate::ids::{BlockHash, Nonce};

/// `|{block_hash}|{nonce}`: the reference's first part, an episode seed, is always empty.
#[must_use]
pub fn challenge_text(block_hash: &BlockHash, nonce: Nonce) -> String {
    format!("|{block_hash}|{nonce}")
}
