//! Checksums of weights where they lie: Σ (bits + 1)·(2·index + 1) mod 2^64 over a tensor's elements in C order, in the dtype of
//! its file.
//!
//! Addends may be added in any order, so threads and GPUs share the work; a changed, swapped or missing element changes the sum.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use grail_protocol::ids::WeightsHash;
use tch::{Device, Kind, TchError, Tensor};

use crate::config::ModelConfig;
use crate::cuda::weight_kernels;
use crate::device::host_threads;
use crate::error::ChecksumError;
use crate::ffi;
use crate::model::Model;
use crate::safetensors::FileDtype;
use crate::weights::{EMBEDDING, HEAD};

/// Checksum by tensor, by the names of the files.
pub type Checksums = BTreeMap<String, u64>;

/// Elements of one inner sum on a CPU: few enough that products of 32-bit bits and positions add up without a carry.
const BLOCK: usize = 4_096;
/// Bytes that one thread takes at once.
const PIECE_BYTES: usize = 1 << 20;
/// Elements of one step on a GPU: bounds the wide integers there to about 100 MB.
const GPU_STEP: i64 = 1 << 22;

/// How elements of a file's dtype are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As in the file; bytes of an element.
    Same1,
    Same2,
    Same4,
    Same8,
    /// Widened exactly.
    Bf16InF32,
    F16InF32,
}

impl Encoding {
    /// Elements as the file has them.
    pub(crate) const fn of_file(dtype: FileDtype) -> Self {
        match dtype.element_bytes() {
            1 => Self::Same1,
            2 => Self::Same2,
            4 => Self::Same4,
            _ => Self::Same8,
        }
    }

    /// Elements of `file` in a tensor of `kind`; `None` if the cast loses bits.
    pub(crate) fn of(file: FileDtype, kind: Kind) -> Option<Self> {
        match (file, kind) {
            (FileDtype::F32, Kind::Float) => Some(Self::Same4),
            (FileDtype::Bf16, Kind::BFloat16) => Some(Self::Same2),
            (FileDtype::Bf16, Kind::Float) => Some(Self::Bf16InF32),
            (FileDtype::F16, Kind::Float) => Some(Self::F16InF32),
            _ => None,
        }
    }

    const fn element_bytes(self) -> usize {
        match self {
            Self::Same1 => 1,
            Self::Same2 => 2,
            Self::Same4 | Self::Bf16InF32 | Self::F16InF32 => 4,
            Self::Same8 => 8,
        }
    }
}

/// A tensor in host memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostTensor<'b> {
    pub bytes: &'b [u8],
    pub encoding: Encoding,
}

/// Checksum of the bytes of one tensor of a file.
#[must_use]
pub fn of_bytes(bytes: &[u8], dtype: FileDtype) -> u64 {
    sum(bytes, Encoding::of_file(dtype), 0)
}

/// Checksums of tensors in host memory, by several threads.
pub(crate) fn host_checksums(tensors: &[HostTensor<'_>]) -> Vec<u64> {
    let sums: Vec<AtomicU64> = tensors.iter().map(|_| AtomicU64::new(0)).collect();
    let mut pieces = Vec::new();
    for (HostTensor { bytes, encoding }, total) in tensors.iter().zip(&sums) {
        for (place, piece) in bytes.chunks(PIECE_BYTES).enumerate() {
            let first = (place * PIECE_BYTES / encoding.element_bytes()) as u64;
            pieces.push((piece, *encoding, first, total));
        }
    }
    let next = AtomicUsize::new(0);
    let take = || {
        while let Some((piece, encoding, first, total)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            total.fetch_add(sum(piece, *encoding, *first), Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..host_threads().min(pieces.len()) {
            scope.spawn(take);
        }
        take();
    });
    sums.into_iter().map(AtomicU64::into_inner).collect()
}

/// Compares the checksums of a model's weights or files with those that are wanted. Both must name the same tensors, except for a
/// tied output matrix, which is the embedding.
///
/// # Errors
/// [`ChecksumError`] with the first tensor that differs.
pub fn compare(found: &Checksums, wanted: &Checksums, config: &ModelConfig) -> Result<(), ChecksumError> {
    let is_tied = config.tie_word_embeddings;
    for (tensor, expected) in wanted {
        let place = if is_tied && tensor == HEAD { EMBEDDING } else { tensor.as_str() };
        let found = *found.get(place).ok_or_else(|| ChecksumError::Unknown { tensor: tensor.clone() })?;
        if found != *expected {
            return Err(ChecksumError::Differs { tensor: tensor.clone(), found, expected: *expected });
        }
    }
    match found.keys().find(|name| !(wanted.contains_key(*name) || is_tied && *name == HEAD)) {
        Some(tensor) => Err(ChecksumError::Missing { tensor: tensor.clone() }),
        None => Ok(()),
    }
}

fn sum(bytes: &[u8], encoding: Encoding, first: u64) -> u64 {
    match encoding {
        Encoding::Same1 => sum_of(bytes, first, |[byte]: [u8; 1]| byte.into()),
        Encoding::Same2 => sum_of(bytes, first, |bytes| u16::from_le_bytes(bytes).into()),
        Encoding::Same4 => sum_of(bytes, first, u32::from_le_bytes),
        Encoding::Same8 => sum_of_wide(bytes, first),
        Encoding::Bf16InF32 => sum_of(bytes, first, |bytes| u32::from_le_bytes(bytes) >> 16),
        Encoding::F16InF32 => {
            sum_of(bytes, first, |bytes| half::f16::from_f32(f32::from_le_bytes(bytes)).to_bits().into())
        }
    }
}

/// Sum over elements of which the first has the index `first`.
///
/// Of an index `first + j` the part with `j` is summed in products of 32 bits, which processors have vectors for.
fn sum_of<const WIDTH: usize>(bytes: &[u8], mut first: u64, bits: impl Fn([u8; WIDTH]) -> u32) -> u64 {
    let mut total = 0_u64;
    for block in bytes.as_chunks::<WIDTH>().0.chunks(BLOCK) {
        let (mut plain, mut weighted, mut weight) = (0_u64, 0_u64, 1_u32);
        for element in block {
            let bits = u64::from(bits(*element));
            plain += bits;
            weighted += bits * u64::from(weight);
            weight += 2;
        }
        let count = block.len() as u64;
        // The weights of the block add up to count².
        let of_first = first.wrapping_mul(2).wrapping_mul(plain + count);
        total = total.wrapping_add(weighted + count * count).wrapping_add(of_first);
        first += count;
    }
    total
}

fn sum_of_wide(bytes: &[u8], first: u64) -> u64 {
    bytes.as_chunks::<8>().0.iter().zip(first..).fold(0, |total, (element, index)| {
        let weight = index.wrapping_mul(2).wrapping_add(1);
        u64::from_le_bytes(*element).wrapping_add(1).wrapping_mul(weight).wrapping_add(total)
    })
}

/// Sums of flat tensors where they lie. The host waits once, for all of them.
pub(crate) fn device_checksums(tensors: &[(Tensor, Encoding)]) -> Result<Vec<u64>, TchError> {
    let Some((first, _)) = tensors.first() else { return Ok(Vec::new()) };
    let device = first.device();
    let kernels = weight_kernels(device).filter(|_| tensors.iter().all(|(_, encoding)| *encoding == Encoding::Same2));
    let sums = match kernels {
        Some(kernels) => kernels.sums(&tensors.iter().map(|(tensor, _)| tensor).collect::<Vec<_>>())?,
        None => composed_sums(tensors, device)?,
    };
    let sums = sums.f_to_device(Device::Cpu)?;
    let sums = Vec::<i64>::try_from(&sums)?;
    // What does not depend on the bits: the weights of n elements add up to n².
    let constant = |(tensor, _): &(Tensor, Encoding)| (tensor.numel() as u64).wrapping_mul(tensor.numel() as u64);
    Ok(sums.into_iter().zip(tensors).map(|(sum, tensor)| sum.cast_unsigned().wrapping_add(constant(tensor))).collect())
}

/// Σ bits·(2·index + 1) of each tensor, `[tensors]`, by operations that every device has.
fn composed_sums(tensors: &[(Tensor, Encoding)], device: tch::Device) -> Result<Tensor, TchError> {
    let weights = Tensor::f_arange_start_step(1, 2 * GPU_STEP + 1, 2, (Kind::Int64, device))?;
    let sums = tensors
        .iter()
        .map(|(tensor, encoding)| device_sum(tensor, *encoding, &weights))
        .collect::<Result<Vec<_>, _>>()?;
    Tensor::f_stack(&sums, 0)
}

/// Σ bits·(2·index + 1) as a tensor without dimensions; 64-bit integers wrap there as here.
fn device_sum(tensor: &Tensor, encoding: Encoding, weights: &Tensor) -> Result<Tensor, TchError> {
    let mut total = Tensor::f_zeros([0_i64; 0], (Kind::Int64, tensor.device()))?;
    let count = tensor.numel() as i64;
    let mut first = 0;
    while first < count {
        let step = GPU_STEP.min(count - first);
        let bits = device_bits(&tensor.f_narrow(0, first, step)?, encoding)?;
        let weighted = bits.f_mul(&weights.f_narrow(0, 0, step)?)?.f_sum(Kind::Int64)?;
        let of_first = bits.f_sum(Kind::Int64)?.f_mul_scalar(2 * first)?;
        total = total.f_add(&weighted)?.f_add(&of_first)?;
        first += step;
    }
    Ok(total)
}

/// Bits of the elements as they are in the file, in 64-bit integers.
pub(crate) fn device_bits(piece: &Tensor, encoding: Encoding) -> Result<Tensor, TchError> {
    let wide = |kind: Kind| piece.f_view_dtype(kind)?.f_to_kind(Kind::Int64);
    match encoding {
        Encoding::Same1 => wide(Kind::Uint8),
        Encoding::Same2 => wide(Kind::Int16)?.f_bitwise_and_(0xffff),
        Encoding::Same4 => wide(Kind::Int)?.f_bitwise_and_(0xffff_ffff_i64),
        Encoding::Same8 => wide(Kind::Int64),
        Encoding::Bf16InF32 => wide(Kind::Int)?.f_bitwise_right_shift_tensor_scalar(16)?.f_bitwise_and_(0xffff),
        Encoding::F16InF32 => {
            piece.f_to_kind(Kind::Half)?.f_view_dtype(Kind::Int16)?.f_to_kind(Kind::Int64)?.f_bitwise_and_(0xffff)
        }
    }
}

impl Model {
    /// Checksum of every tensor of the files, computed from the weights where they lie.
    ///
    /// # Errors
    /// [`ChecksumError::Inexact`] if the model's dtype cannot hold the files'; [`ChecksumError::Torch`].
    pub fn checksums(&self) -> Result<Checksums, ChecksumError> {
        let kind = self.network().kind;
        let mut places = self.network().places()?;
        let mut tensors = Vec::with_capacity(self.dtypes.len());
        for (name, file) in &self.dtypes {
            let inexact = || ChecksumError::Inexact { tensor: name.clone(), file: file.name(), model: self.dtype() };
            let encoding = Encoding::of(*file, kind).ok_or_else(inexact)?;
            let place = places.remove(name).ok_or_else(|| ChecksumError::Unknown { tensor: name.clone() })?;
            tensors.push((place, encoding));
        }
        let on_host: Option<Vec<_>> = tensors
            .iter()
            .map(|(tensor, encoding)| Some(HostTensor { bytes: ffi::host_bytes(tensor)?, encoding: *encoding }))
            .collect();
        let sums = match on_host {
            Some(tensors) => host_checksums(&tensors),
            None => tch::no_grad(|| device_checksums(&tensors))?,
        };
        Ok(self.dtypes.keys().cloned().zip(sums).collect())
    }

    /// Whether the model's dtype holds every value of the files.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.dtypes.values().all(|file| Encoding::of(*file, self.network().kind).is_some())
    }

    /// [`compare`] with the weights, where they lie.
    ///
    /// # Errors
    /// As [`Model::checksums`] and [`compare`].
    pub fn compare(&self, wanted: &Checksums) -> Result<(), ChecksumError> {
        compare(&self.checksums()?, wanted, self.config())
    }

    /// Gives the weights their new hash, once they have the checksums that `weights` were installed with.
    ///
    /// # Errors
    /// As [`Model::compare`]; the hash stays then.
    pub fn confirm(&mut self, weights: WeightsHash, wanted: &Checksums) -> Result<(), ChecksumError> {
        self.compare(wanted)?;
        self.weights_hash = weights;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(bits: impl Iterator<Item = u64>) -> u64 {
        bits.zip(0_u64..)
            .fold(0_u64, |sum, (bits, index)| sum.wrapping_add(bits.wrapping_add(1).wrapping_mul(2 * index + 1)))
    }

    /// More than a block and more than a piece, with bits that wrap the sum.
    fn noise(count: usize) -> Vec<u8> {
        let mut state = 7_u64;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .take(count)
        .collect()
    }

    #[test]
    fn pieces_blocks_and_threads_give_the_sum_of_a_naive_loop() {
        let bytes = noise(2 * PIECE_BYTES + 8 * 1_001);
        let of_two = naive(bytes.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes).into()));
        let of_four = naive(bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes).into()));
        let of_eight = naive(bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)));
        let of_one = naive(bytes.iter().map(|byte| u64::from(*byte)));
        let expected = [of_one, of_two, of_four, of_eight];
        let encodings = [Encoding::Same1, Encoding::Same2, Encoding::Same4, Encoding::Same8];
        let tensors = encodings.map(|encoding| HostTensor { bytes: &bytes, encoding });
        assert_eq!(host_checksums(&tensors), expected);
        assert_eq!(of_bytes(&bytes, FileDtype::F32), of_four);
        assert_eq!(host_checksums(&[HostTensor { bytes: &[], encoding: Encoding::Same2 }]), [0]);
    }

    #[test]
    fn what_a_gpu_computes_is_what_a_host_computes() {
        let count = usize::try_from(GPU_STEP).unwrap() + 1_001;
        let bytes = noise(count * 4);
        let whole =
            |kind: Kind| Tensor::f_from_data_size(&bytes, &[(bytes.len() / kind.elt_size_in_bytes()) as i64], kind);
        let floats = whole(Kind::Float).unwrap();
        let halves = |kind| whole(kind).unwrap().narrow(0, 0, 5_000).nan_to_num(1.0, 2.0, 3.0).to_kind(Kind::Float);
        let cases = [
            (whole(Kind::BFloat16).unwrap(), Encoding::Same2),
            (floats, Encoding::Same4),
            (whole(Kind::BFloat16).unwrap().to_kind(Kind::Float), Encoding::Bf16InF32),
            (halves(Kind::Half), Encoding::F16InF32),
            (Tensor::empty([0], (Kind::Float, Device::Cpu)), Encoding::Same4),
        ];
        let on_host: Vec<HostTensor<'_>> = cases
            .iter()
            .map(|(tensor, encoding)| HostTensor { bytes: ffi::host_bytes(tensor).unwrap(), encoding: *encoding })
            .collect();
        assert_eq!(device_checksums(&cases).unwrap(), host_checksums(&on_host));
        // Widened and back, even where the bits are no number.
        let narrow = HostTensor { bytes: &bytes, encoding: Encoding::Same2 };
        assert_eq!(host_checksums(&on_host)[2], host_checksums(&[narrow])[0]);
    }
}
