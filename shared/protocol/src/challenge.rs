//! Which positions a validator challenges (§6.1 of the validator's rules).

use std::ops::Range;

use crate::constants::{CHALLENGE_K, LABEL_OPEN};
use crate::hash::{Digest, token_hash};
use crate::ids::TokenId;
use crate::prf::prf_array;
use crate::python_random::PythonRandom;

/// The challenged absolute positions of one rollout, ascending: [`CHALLENGE_K`] of `start..end`, or all if there are fewer.
///
/// * `tokens`: the whole sequence; the prompt takes part in the hash.
/// * `randomness`: bytes of `R_v`.
/// * `start`, `end`: usually the length of the prompt and of the sequence.
#[must_use]
pub fn positions(tokens: &[TokenId], randomness: &[u8], start: usize, end: usize) -> Vec<usize> {
    positions_from_key(&key(&token_hash(tokens), randomness), start..end, CHALLENGE_K)
}

/// Seed of the generator that draws the positions.
#[must_use]
pub fn key(token_hash: &Digest, randomness: &[u8]) -> [u8; 32] {
    prf_array(LABEL_OPEN.as_bytes(), &[token_hash, randomness])
}

/// `count` positions of `range` (all if there are fewer), ascending, drawn with the generator that [`key`] seeds.
///
/// Below a tenth of the range they are sampled, else they are the first of a shuffle; both use the generator differently.
#[must_use]
pub fn positions_from_key(key: &[u8; 32], range: Range<usize>, count: usize) -> Vec<usize> {
    let length = range.len();
    let count = count.min(length);
    let mut random = PythonRandom::from_bytes(key);
    let mut offsets = if (count as f64) < length as f64 * 0.1 {
        random.sample_indices(length, count).expect("count was bounded by the length")
    } else {
        let mut all: Vec<usize> = (0..length).collect();
        random.shuffle(&mut all);
        all.truncate(count);
        all
    };
    offsets.sort_unstable();
    offsets.into_iter().map(|offset| range.start + offset).collect()
}
