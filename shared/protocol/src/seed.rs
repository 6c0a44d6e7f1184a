//! Seeds of environments (protocol §8).

use crate::hash::sha256;
use crate::ids::{BlockHash, EnvironmentSeed, GroupIndex, Hotkey};

/// Seed of all rollouts of one group: the first four bytes, big-endian, of SHA-256 over
/// `seed|{hotkey}:{window_hash}:{group}`. The hash is text with `0x`, the group decimal.
#[must_use]
pub fn environment_seed(hotkey: &Hotkey, window_hash: &BlockHash, group: GroupIndex) -> EnvironmentSeed {
    let [a, b, c, d, ..] = sha256(format!("seed|{hotkey}:{window_hash}:{group}").as_bytes());
    EnvironmentSeed(u32::from_be_bytes([a, b, c, d]).into())
}
