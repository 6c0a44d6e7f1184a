//! Sketches of hidden states (protocol §5): the 16 largest activations, in buckets, times 16 coefficients.

use half::bf16;
use num_bigint::BigInt;
use rayon::prelude::*;

use crate::constants::{
    LABEL_SKETCH, PRIME_Q, PROOF_COEFF_RANGE, PROOF_SKETCH_TOLERANCE_BASE, PROOF_SKETCH_TOLERANCE_GROWTH, PROOF_TOPK,
};
use crate::prf::prf_array;

/// The 16 coefficients of a window, each in `-127..=127`. They do not depend on the width of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SketchCoeffs([i32; PROOF_TOPK]);

impl SketchCoeffs {
    /// Coefficients of the bytes of `R_m` (see [`crate::randomness::clean_hex`] for a foreign text).
    #[must_use]
    pub fn from_randomness(randomness: &[u8]) -> Self {
        let raw: [u8; 2 * PROOF_TOPK] = prf_array(LABEL_SKETCH.as_bytes(), &[randomness]);
        let (words, _) = raw.as_chunks::<2>();
        let mut coefficients = [0; PROOF_TOPK];
        for (coefficient, word) in coefficients.iter_mut().zip(words) {
            *coefficient = coefficient_of(i16::from_be_bytes(*word));
        }
        Self(coefficients)
    }

    /// The coefficients in order.
    #[must_use]
    pub const fn as_array(&self) -> &[i32; PROOF_TOPK] {
        &self.0
    }
}

/// `|x| mod 255 − 127` in 16-bit arithmetic: `|−32768|` stays negative there, and its floored remainder is 127.
#[must_use]
pub const fn coefficient_of(x: i16) -> i32 {
    (x.wrapping_abs() as i32).rem_euclid(2 * PROOF_COEFF_RANGE + 1) - PROOF_COEFF_RANGE
}

/// Bits of the least binary32 magnitude of the buckets 1 to 7: the first values at which `trunc(0.8 · log2(|v| + 1))`, computed
/// in binary64, reaches the bucket.
const BUCKET_THRESHOLDS: [u32; 7] =
    [0x3FB0_6FE1, 0x4095_04F4, 0x4147_44FD, 0x41F8_0000, 0x4296_37F1, 0x4334_04F4, 0x43D6_C4FD];
const MAGNITUDE_BITS: u32 = 0x7FFF_FFFF;
const INFINITY_BITS: u32 = 0x7F80_0000;

/// Bucket of one activation, `-7..=7`: 0 for NaN and below 1.378…, ±7 for infinity.
#[must_use]
pub fn bucket(value: f32) -> i32 {
    let bits = value.to_bits();
    let magnitude = bits & MAGNITUDE_BITS;
    if magnitude > INFINITY_BITS {
        return 0;
    }
    let bucket: i32 = BUCKET_THRESHOLDS.iter().map(|threshold| i32::from(magnitude >= *threshold)).sum();
    if bits > MAGNITUDE_BITS { -bucket } else { bucket }
}

/// A type of hidden state.
trait Activation: Copy + Sync {
    /// Bits without the sign. As a signed integer, because baseline x86-64 compares only those in vectors; their order is that
    /// of the magnitudes, with NaN above infinity.
    type Magnitude: Copy + PartialOrd + Into<i32>;
    fn magnitude(self) -> Self::Magnitude;
    fn to_f32(self) -> f32;
}

impl Activation for f32 {
    type Magnitude = i32;
    fn magnitude(self) -> i32 {
        (self.to_bits() & MAGNITUDE_BITS).cast_signed()
    }
    fn to_f32(self) -> f32 {
        self
    }
}

impl Activation for bf16 {
    type Magnitude = i16;
    fn magnitude(self) -> i16 {
        (self.to_bits() & 0x7FFF).cast_signed()
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

/// Activations that are compared with the current cut in one go, without a branch for each.
const SCAN: usize = 32;

/// Indices of the 16 largest magnitudes of `row`, ascending; among equal ones the lowest indices.
///
/// Keeps the best 16 seen so far. After the first hundreds of activations hardly any exceeds the least of them, so nearly all
/// the time goes into the comparison of whole chunks, at about the speed at which memory delivers them.
fn top_indices<T: Activation>(row: &[T]) -> [usize; PROOF_TOPK] {
    let (first, rest) = row.split_at(PROOF_TOPK);
    let mut best = [0_u64; PROOF_TOPK];
    for (index, value) in first.iter().enumerate() {
        best[index] = ranking_key(value.magnitude().into(), index);
    }
    best.sort_unstable_by(|left, right| right.cmp(left));
    let mut least = first[index_of(best[PROOF_TOPK - 1])].magnitude();
    for (chunk_index, chunk) in rest.chunks(SCAN).enumerate() {
        let any_larger = match chunk.first_chunk::<SCAN>() {
            Some(whole) => whole.iter().fold(false, |any, value| any | (value.magnitude() > least)),
            None => true,
        };
        if !any_larger {
            continue;
        }
        for (offset, value) in chunk.iter().enumerate() {
            if value.magnitude() > least {
                let index = PROOF_TOPK + chunk_index * SCAN + offset;
                insert(&mut best, ranking_key(value.magnitude().into(), index));
                least = row[index_of(best[PROOF_TOPK - 1])].magnitude();
            }
        }
    }
    let mut indices = best.map(index_of);
    indices.sort_unstable();
    indices
}

/// Larger magnitudes first, then lower indices.
fn ranking_key(magnitude: i32, index: usize) -> u64 {
    let index = u32::try_from(index).expect("a hidden state has fewer than 2^32 values");
    u64::from(magnitude.cast_unsigned()) << 32 | u64::from(!index)
}

#[expect(clippy::cast_possible_truncation, reason = "the low half of the key is the index")]
const fn index_of(key: u64) -> usize {
    !(key as u32) as usize
}

/// Puts `key` at its place in the descending order and drops the last one.
fn insert(best: &mut [u64; PROOF_TOPK], key: u64) {
    let mut place = PROOF_TOPK - 1;
    while place > 0 && best[place - 1] < key {
        best[place] = best[place - 1];
        place -= 1;
    }
    best[place] = key;
}

fn sketch<T: Activation>(row: &[T], coefficients: &SketchCoeffs) -> u32 {
    assert!(row.len() >= PROOF_TOPK, "a hidden state of {} values has no {PROOF_TOPK} largest ones", row.len());
    let indices = top_indices(row);
    let sum: i32 = indices.iter().zip(coefficients.0).map(|(index, r)| bucket(row[*index].to_f32()) * r).sum();
    if sum < 0 { PRIME_Q - sum.unsigned_abs() } else { sum.unsigned_abs() }
}

/// Indices (ascending) that the sketch of `row` selects: the largest magnitudes, the lowest index among equal ones.
///
/// # Panics
/// If `row` has fewer than 16 values.
#[must_use]
pub fn selected_indices_f32(row: &[f32]) -> [usize; PROOF_TOPK] {
    top_indices(row)
}

/// [`selected_indices_f32`] of a bf16 row.
///
/// # Panics
/// If `row` has fewer than 16 values.
#[must_use]
pub fn selected_indices_bf16(row: &[bf16]) -> [usize; PROOF_TOPK] {
    top_indices(row)
}

/// Sketch of one hidden state `[hidden]` after the final norm, in `0..PRIME_Q`.
///
/// # Panics
/// If `row` has fewer than 16 values.
#[must_use]
pub fn sketch_f32(row: &[f32], coefficients: &SketchCoeffs) -> u32 {
    sketch(row, coefficients)
}

/// [`sketch_f32`] of a bf16 row.
///
/// # Panics
/// If `row` has fewer than 16 values.
#[must_use]
pub fn sketch_bf16(row: &[bf16], coefficients: &SketchCoeffs) -> u32 {
    sketch(row, coefficients)
}

/// Rows that one thread takes at least: about 0.1 ms of work at a width of 3,584.
const ROWS_PER_TASK: usize = 32;

fn sketch_rows<T: Activation>(hidden: &[T], width: usize, coefficients: &SketchCoeffs) -> Vec<u32> {
    assert!(width >= PROOF_TOPK, "a hidden state of {width} values has no {PROOF_TOPK} largest ones");
    assert!(hidden.len().is_multiple_of(width), "{} values are no whole rows of {width}", hidden.len());
    hidden.par_chunks_exact(width).with_min_len(ROWS_PER_TASK).map(|row| sketch(row, coefficients)).collect()
}

/// Sketches `[tokens]` of `hidden` `[tokens, width]`, row major, on rayon's current pool.
///
/// # Panics
/// If `width < 16` or `hidden` is no whole number of rows.
#[must_use]
pub fn sketch_rows_f32(hidden: &[f32], width: usize, coefficients: &SketchCoeffs) -> Vec<u32> {
    sketch_rows(hidden, width, coefficients)
}

/// [`sketch_rows_f32`] of bf16 rows.
///
/// # Panics
/// If `width < 16` or `hidden` is no whole number of rows.
#[must_use]
pub fn sketch_rows_bf16(hidden: &[bf16], width: usize, coefficients: &SketchCoeffs) -> Vec<u32> {
    sketch_rows(hidden, width, coefficients)
}

/// Largest modular distance that passes at an absolute `position` (the prompt counts): `floor(6000 + 5·sqrt(position))`.
///
/// This is no test of correctness: an unrelated sketch is usually within it.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a positive number is floored; positions are far below 2^53")]
pub fn tolerance(position: usize) -> u64 {
    (PROOF_SKETCH_TOLERANCE_BASE as f64 + PROOF_SKETCH_TOLERANCE_GROWTH * (position as f64).sqrt()) as u64
}

/// `min(|a − b|, Q − |a − b|)` as the reference computes it, without a check of the range: for claims outside `0..Q` the result
/// may be negative, which passes any tolerance.
#[must_use]
pub const fn modular_distance(a: i64, b: i64) -> i128 {
    let difference = (a as i128 - b as i128).abs();
    let other_way = PRIME_Q as i128 - difference;
    if difference < other_way { difference } else { other_way }
}

/// [`modular_distance`] for integers of any size.
#[must_use]
pub fn modular_distance_big(a: &BigInt, b: &BigInt) -> BigInt {
    let difference = BigInt::from((a - b).magnitude().clone());
    let other_way = BigInt::from(PRIME_Q) - &difference;
    difference.min(other_way)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, word by word.
    fn bucket_by_formula(value: f32) -> i32 {
        let value = f64::from(value);
        if value.is_nan() || value.abs() < 1e-6 {
            return 0;
        }
        if value.is_infinite() {
            return if value > 0.0 { 7 } else { -7 };
        }
        #[expect(clippy::cast_possible_truncation, reason = "the definition truncates")]
        let bucket = (((value.abs() + 1.0).log2() * 0.8) as i32).min(7);
        if value < 0.0 { -bucket } else { bucket }
    }

    fn indices_by_sorting(row: &[f32]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|left, right| row[*right].abs().total_cmp(&row[*left].abs()).then(left.cmp(right)));
        order.truncate(PROOF_TOPK);
        order.sort_unstable();
        order
    }

    proptest! {
        #[test]
        fn bucket_equals_its_formula(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            prop_assert_eq!(bucket(value), bucket_by_formula(value));
        }

        #[test]
        fn bucket_equals_its_formula_near_the_thresholds(threshold in 0..7_usize, offset in -40_i32..40, negative in any::<bool>()) {
            let magnitude = f32::from_bits(BUCKET_THRESHOLDS[threshold].wrapping_add_signed(offset));
            let value = if negative { -magnitude } else { magnitude };
            prop_assert_eq!(bucket(value), bucket_by_formula(value));
        }

        #[test]
        fn selection_equals_a_stable_sort(row in proptest::collection::vec(prop_oneof![
            (-6_i8..6).prop_map(f32::from),
            any::<f32>(),
        ], 16..400)) {
            prop_assert_eq!(selected_indices_f32(&row).to_vec(), indices_by_sorting(&row));
            let coarse: Vec<bf16> = row.iter().map(|value| bf16::from_f32(*value)).collect();
            let widened: Vec<f32> = coarse.iter().map(|value| value.to_f32()).collect();
            prop_assert_eq!(selected_indices_bf16(&coarse).to_vec(), indices_by_sorting(&widened));
        }

        #[test]
        fn rows_equal_single_sketches(
            rows in 0..70_usize, width in 16..50_usize, seed in any::<u32>(), randomness in any::<[u8; 32]>()
        ) {
            let coefficients = SketchCoeffs::from_randomness(&randomness);
            let hidden: Vec<f32> = (0..rows * width)
                .map(|index| {
                    let mixed = (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(u64::from(seed));
                    f32::from(u16::try_from(mixed >> 48).unwrap()) / 300.0 - 100.0
                })
                .collect();
            let coarse: Vec<bf16> = hidden.iter().map(|value| bf16::from_f32(*value)).collect();
            let single: Vec<u32> = hidden.chunks(width).map(|row| sketch_f32(row, &coefficients)).collect();
            prop_assert_eq!(sketch_rows_f32(&hidden, width, &coefficients), single);
            let single: Vec<u32> = coarse.chunks(width).map(|row| sketch_bf16(row, &coefficients)).collect();
            prop_assert_eq!(sketch_rows_bf16(&coarse, width, &coefficients), single);
        }

        #[test]
        fn both_distances_agree(a in any::<i64>(), b in any::<i64>()) {
            let big = modular_distance_big(&a.into(), &b.into());
            prop_assert_eq!(big, modular_distance(a, b).into());
        }
    }

    #[test]
    fn a_claim_beyond_the_modulus_has_a_negative_distance() {
        assert_eq!(modular_distance(0, 2 * i64::from(PRIME_Q) + 5), -i128::from(PRIME_Q) - 5);
    }

    #[test]
    #[should_panic(expected = "no 16 largest")]
    fn a_narrow_hidden_state_is_refused() {
        assert_eq!(sketch_f32(&[1.0; 15], &SketchCoeffs::from_randomness(&[0])), 0);
    }
}
