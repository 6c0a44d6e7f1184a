//! Sketches of hidden states: the sixteen largest activations of each row, bucketed, on the device that holds them.
//!
//! `topk` promises nothing about equal magnitudes, and in bf16 they are common; the protocol keeps the lowest index. So the
//! selection runs on integers that never tie: bit patterns of non-negative floats order like the floats, and below the
//! pattern stands the index, counted downwards.

use grail_protocol::constants::{PRIME_Q, PROOF_TOPK};
use grail_protocol::sketch::SketchCoeffs;
use tch::{Kind, TchError, Tensor};

/// Elements of hidden states whose integer keys are made at once: bounds the memory beside the hidden states.
const CHUNK_ELEMENTS: usize = 1 << 24;

/// First binary32 value of buckets 1 to 7, as bits (`2^(1.25·b) − 1` rounded up).
const BUCKET_BITS: [u32; 7] =
    [0x3fb0_6fe1, 0x4095_04f4, 0x4147_44fd, 0x41f8_0000, 0x4296_37f1, 0x4334_04f4, 0x43d6_c4fd];

/// Signed buckets of the selected activations, sixteen by row in order of index. Independent of the randomness, so that one
/// selection serves beacons of any number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelectedBuckets(Vec<[i8; PROOF_TOPK]>);

/// Why rows have no sketch.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SketchError {
    #[error("row {row} holds NaN or infinity")]
    NonFinite { row: usize },
    #[error(transparent)]
    Torch(#[from] TchError),
}

impl SelectedBuckets {
    /// Selects and buckets each row of `hidden`.
    ///
    /// * `hidden`: `[rows, width]`, f32 or bf16, final norm applied; `width ≥ 16`.
    ///
    /// # Errors
    /// [`SketchError::NonFinite`] with the first row that holds NaN or infinity anywhere.
    pub(crate) fn of(hidden: &Tensor) -> Result<Self, SketchError> {
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
    #[must_use]
    pub fn sketches(&self, rows: std::ops::Range<usize>, coefficients: &SketchCoeffs) -> Vec<u32> {
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

/// Buckets of up to [`CHUNK_ELEMENTS`] elements; `first_row` is where the chunk begins, for the error.
fn select_chunk(hidden: &Tensor, first_row: usize) -> Result<Vec<[i8; PROOF_TOPK]>, SketchError> {
    let (rows, width) = hidden.size2()?;
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
    let largest = host_i64(&top.f_select(-1, 0)?.f_bitwise_right_shift_tensor_scalar(index_bits)?)?;
    if let Some(row) = largest.iter().position(|bits| *bits >= infinity) {
        return Err(SketchError::NonFinite { row: first_row + row });
    }
    let index = top.f_bitwise_and((1_i64 << index_bits) - 1)?.f_neg()?.f_add_scalar(width - 1)?;
    let (index, _) = index.f_sort(-1, false)?;
    let values = hidden.f_gather(-1, &index, false)?.f_to_kind(Kind::Float)?;
    let thresholds = Tensor::f_from_slice(&BUCKET_BITS.map(f32::from_bits))?.f_to_device(hidden.device())?;
    let buckets = values.f_abs()?.f_bucketize(&thresholds, true, true)?.f_mul(&values.f_sign()?.f_to_kind(Kind::Int)?)?;
    let buckets = buckets.f_to_kind(Kind::Int8)?.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
    let mut flat = vec![0_i8; usize::try_from(rows).unwrap_or_default() * PROOF_TOPK];
    let count = flat.len();
    buckets.f_copy_data(&mut flat, count)?;
    Ok(flat.as_chunks::<PROOF_TOPK>().0.to_vec())
}

fn host_i64(x: &Tensor) -> Result<Vec<i64>, TchError> {
    let x = x.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
    let mut values = vec![0; x.numel()];
    let count = values.len();
    x.f_copy_data(&mut values, count)?;
    Ok(values)
}
