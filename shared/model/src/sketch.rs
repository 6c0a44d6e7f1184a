//! Sketches of hidden states: the sixteen largest activations of each row, bucketed, on the device that holds them.
//!
//! On the CPU the protocol's own selection scans the rows. On a GPU `topk` promises nothing about equal magnitudes, and in
//! bf16 they are common; the protocol keeps the lowest index. So the selection there runs on integers that never tie: bit
//! patterns of non-negative floats order like the floats, and below the pattern stands the index, counted downwards.

use grail_protocol::constants::{PRIME_Q, PROOF_TOPK};
use grail_protocol::sketch::{SketchCoeffs, bucket, selected_indices_bf16, selected_indices_f32};
use half::bf16;
use tch::{Device, Kind, TchError, Tensor};

use crate::stages::{Stage, stage};

/// Elements of hidden states whose integer keys are made at once: bounds the memory beside the hidden states.
const CHUNK_ELEMENTS: usize = 1 << 24;

/// First binary32 value of buckets 1 to 7, as bits (`2^(1.25·b) − 1` rounded up).
const BUCKET_BITS: [u32; 7] =
    [0x3fb0_6fe1, 0x4095_04f4, 0x4147_44fd, 0x41f8_0000, 0x4296_37f1, 0x4334_04f4, 0x43d6_c4fd];

/// Signed buckets of the selected activations, sixteen by row in order of index. Independent of the randomness, so that one
/// selection serves beacons of any number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SelectedBuckets(Vec<[i8; PROOF_TOPK]>);

/// Why rows have no sketch.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SketchError {
    #[error("row {row} holds NaN or infinity")]
    NonFinite { row: usize },
    #[error(transparent)]
    Torch(#[from] TchError),
}

impl SelectedBuckets {
    /// Buckets that were selected elsewhere, by row.
    pub(crate) const fn from_rows(rows: Vec<[i8; PROOF_TOPK]>) -> Self {
        Self(rows)
    }

    /// Selects and buckets each row of `hidden`.
    ///
    /// * `hidden`: `[rows, width]`, f32 or bf16, final norm applied; `width ≥ 16`.
    ///
    /// # Errors
    /// [`SketchError::NonFinite`] with the first row that holds NaN or infinity anywhere.
    pub(crate) fn of(hidden: &Tensor) -> Result<Self, SketchError> {
        if hidden.device() == Device::Cpu { Self::by_scan(hidden) } else { Self::by_topk(hidden) }
    }

    /// Scans rows that lie in host memory.
    fn by_scan(hidden: &Tensor) -> Result<Self, SketchError> {
        let (_, width) = hidden.size2()?;
        let width = usize::try_from(width).unwrap_or_default().max(1);
        match hidden.kind() {
            Kind::Float => {
                let values: Vec<f32> = host(hidden)?;
                scan(values.chunks_exact(width), selected_indices_f32, |value| value)
            }
            Kind::BFloat16 => {
                let bits: Vec<i16> = host(&hidden.f_contiguous()?.f_view_dtype(Kind::Int16)?)?;
                let values: Vec<bf16> = bits.into_iter().map(|bits| bf16::from_bits(bits.cast_unsigned())).collect();
                scan(values.chunks_exact(width), selected_indices_bf16, bf16::to_f32)
            }
            other => Err(TchError::Kind(format!("hidden states of kind {other:?} have no sketch")).into()),
        }
    }

    /// Selects with tensor operations on the device.
    fn by_topk(hidden: &Tensor) -> Result<Self, SketchError> {
        let (rows, width) = hidden.size2()?;
        let mut selected = Vec::with_capacity(usize::try_from(rows).unwrap_or_default());
        let chunk = (CHUNK_ELEMENTS as i64 / width.max(1)).max(1);
        let mut first = 0;
        while first < rows {
            let count = chunk.min(rows - first);
            let buckets = select_chunk(&hidden.f_narrow(0, first, count)?, selected.len())?;
            selected.extend(buckets);
            first += count;
        }
        Ok(Self(selected))
    }

    /// Sketches of some of the rows under one set of coefficients, each in `0..PRIME_Q`.
    ///
    /// # Panics
    /// If `rows` reaches beyond the rows.
    pub(crate) fn sketches(&self, rows: std::ops::Range<usize>, coefficients: &SketchCoeffs) -> Vec<u32> {
        let coefficients = coefficients.as_array();
        let rows = self.0.get(rows).expect("the rows of a segment are rows of its batch");
        rows.iter()
            .map(|buckets| {
                let sum: i32 = buckets.iter().zip(coefficients).map(|(bucket, r)| i32::from(*bucket) * r).sum();
                // |sum| ≤ 16 · 7 · 127, far below the modulus.
                if sum < 0 { PRIME_Q - sum.unsigned_abs() } else { sum.unsigned_abs() }
            })
            .collect()
    }
}

fn scan<'a, T: Copy + 'a>(
    rows: impl Iterator<Item = &'a [T]>,
    select: fn(&[T]) -> [usize; PROOF_TOPK],
    widen: fn(T) -> f32,
) -> Result<SelectedBuckets, SketchError> {
    rows.enumerate()
        .map(|(row, values)| {
            let mut buckets = [0_i8; PROOF_TOPK];
            for (slot, index) in buckets.iter_mut().zip(select(values)) {
                let value = values.get(index).copied().map_or(f32::NAN, widen);
                // Infinity and NaN exceed every number in magnitude, so a row that holds one has it selected.
                if !value.is_finite() {
                    return Err(SketchError::NonFinite { row });
                }
                *slot = i8::try_from(bucket(value)).unwrap_or_default();
            }
            Ok(buckets)
        })
        .collect::<Result<_, _>>()
        .map(SelectedBuckets)
}

/// Buckets of up to [`CHUNK_ELEMENTS`] elements; `first_row` is where the chunk begins, for the error.
fn select_chunk(hidden: &Tensor, first_row: usize) -> Result<Vec<[i8; PROOF_TOPK]>, SketchError> {
    let (_, width) = hidden.size2()?;
    let hidden = hidden.f_contiguous()?;
    let (bits, infinity) = match hidden.kind() {
        Kind::Float => (hidden.f_view_dtype(Kind::Int)?.f_bitwise_and(0x7fff_ffff_i64)?, 0x7f80_0000_i64),
        Kind::BFloat16 => (hidden.f_view_dtype(Kind::Int16)?.f_bitwise_and(0x7fff_i64)?, 0x7f80_i64),
        other => return Err(TchError::Kind(format!("hidden states of kind {other:?} have no sketch")).into()),
    };
    let index_bits = i64::from(64 - (width.max(2) - 1).leading_zeros());
    let descending = Tensor::f_arange_start_step(width - 1, -1, -1, (Kind::Int64, hidden.device()))?;
    let keys = bits
        .f_to_kind(Kind::Int64)?
        .f_bitwise_left_shift_tensor_scalar(index_bits)?
        .f_bitwise_or_tensor(&descending)?;
    let (top, _) = keys.f_topk(PROOF_TOPK as i64, -1, true, true)?;
    // The largest key of a row shows whether anything in it is infinite or NaN.
    let largest: Vec<i64> = host(&top.f_select(-1, 0)?.f_bitwise_right_shift_tensor_scalar(index_bits)?)?;
    if let Some(row) = largest.iter().position(|bits| *bits >= infinity) {
        return Err(SketchError::NonFinite { row: first_row + row });
    }
    let index = top.f_bitwise_and((1_i64 << index_bits) - 1)?.f_neg()?.f_add_scalar(width - 1)?;
    let (index, _) = index.f_sort(-1, false)?;
    let values = hidden.f_gather(-1, &index, false)?.f_to_kind(Kind::Float)?;
    let thresholds = Tensor::f_from_slice(&BUCKET_BITS.map(f32::from_bits))?.f_to_device(hidden.device())?;
    let buckets =
        values.f_abs()?.f_bucketize(&thresholds, true, true)?.f_mul(&values.f_sign()?.f_to_kind(Kind::Int)?)?;
    let flat: Vec<i8> = host(&buckets.f_to_kind(Kind::Int8)?)?;
    Ok(flat.as_chunks::<PROOF_TOPK>().0.to_vec())
}

fn host<T: tch::kind::Element + Default + Clone>(x: &Tensor) -> Result<Vec<T>, TchError> {
    stage(Stage::ReadBack, || {
        let x = x.f_to_device(Device::Cpu)?.f_contiguous()?;
        let mut values = vec![T::default(); x.numel()];
        let count = values.len();
        x.f_copy_data(&mut values, count)?;
        Ok(values)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tensor(values: &[f32], width: usize, kind: Kind) -> Tensor {
        Tensor::from_slice(values).view([-1, width as i64]).to_kind(kind)
    }

    #[test]
    fn thresholds_are_those_of_the_protocol() {
        for (below, bits) in BUCKET_BITS.into_iter().enumerate() {
            let below = i32::try_from(below).unwrap();
            assert_eq!(bucket(f32::from_bits(bits)), below + 1);
            assert_eq!(bucket(f32::from_bits(bits - 1)), below);
        }
    }

    proptest! {
        #[test]
        fn tensor_operations_select_what_the_scan_selects(
            width in 16..200_usize,
            rows in 1..9_usize,
            coarse in any::<bool>(),
            values in proptest::collection::vec(-600.0_f32..600.0, 1..1800),
        ) {
            // Few different values make ties at the cut; the pool is repeated to fill the rows.
            let values: Vec<f32> = values
                .iter()
                .cycle()
                .take(rows * width)
                .map(|value| if coarse { (value / 50.0).round() } else { *value })
                .collect();
            for kind in [Kind::Float, Kind::BFloat16] {
                let hidden = tensor(&values, width, kind);
                prop_assert_eq!(SelectedBuckets::by_topk(&hidden).unwrap(), SelectedBuckets::by_scan(&hidden).unwrap());
            }
        }
    }

    #[test]
    fn rows_beyond_one_chunk_are_selected_too() {
        let width = 1 << 13;
        let rows = CHUNK_ELEMENTS / width + 3;
        let hidden = Tensor::arange((rows * width) as i64, (Kind::Float, Device::Cpu)).sin() * 200.0;
        let hidden = hidden.view([rows as i64, width as i64]);
        assert_eq!(SelectedBuckets::by_topk(&hidden).unwrap(), SelectedBuckets::by_scan(&hidden).unwrap());
    }

    #[test]
    fn a_row_with_nan_or_infinity_is_refused_by_number() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for kind in [Kind::Float, Kind::BFloat16] {
                let mut values = vec![1.0; 3 * 20];
                values[2 * 20 + 7] = bad;
                let hidden = tensor(&values, 20, kind);
                for result in [SelectedBuckets::by_scan(&hidden), SelectedBuckets::by_topk(&hidden)] {
                    assert!(matches!(result, Err(SketchError::NonFinite { row: 2 })), "{bad} in {kind:?}: {result:?}");
                }
            }
        }
    }

    #[test]
    fn negative_sums_wrap_at_the_modulus() {
        let coefficients = SketchCoeffs::from_randomness(&[7; 32]);
        let mut buckets = [0_i8; PROOF_TOPK];
        let place = coefficients.as_array().iter().position(|r| *r < 0).unwrap();
        buckets[place] = 3;
        let r = coefficients.as_array()[place];
        let selected = SelectedBuckets(vec![buckets]);
        assert_eq!(selected.sketches(0..1, &coefficients), [PRIME_Q - (3 * r).unsigned_abs()]);
    }
}
