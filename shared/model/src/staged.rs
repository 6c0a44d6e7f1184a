//! Changes that lie beside the weights on their device before they are due: at the boundary nothing is left but to write them.
//!
//! A checksum is a sum over elements, so the one that a tensor will have follows from the one that it has and from the elements that
//! change. Wrong changes are found before anything is touched, and the weights need not be summed while proofs wait.

use std::collections::BTreeMap;
use std::sync::Arc;

use grail_protocol::ids::WeightsHash;
use tch::{Device, Kind, TchError, Tensor};

use crate::changes::{Changes, Edit, bits_of, steps};
use crate::checksum::{self, Checksums, Encoding, device_bits};
use crate::cuda::{Selection, WeightKernels, weight_kernels};
use crate::error::{ChangeError, ChecksumError};
use crate::fill::{Fill, fill};
use crate::model::Model;
use crate::weights::HEAD;

/// Bytes of a position.
const POSITION_BYTES: usize = 4;

/// Changes of the weights `base`, on their device with the old bits, which lead to weights with the checksums that were wanted.
#[derive(Debug)]
pub struct StagedChanges {
    base: WeightsHash,
    steps: Vec<Step>,
}

/// Some elements of one tensor.
#[derive(Debug)]
struct Step {
    tensor: String,
    place: Place,
    /// `[count]`, of the model's kind.
    old: Tensor,
    /// As `old`.
    new: Tensor,
}

/// Where in their tensor the elements of a step are.
#[derive(Debug)]
enum Place {
    /// `[count]`, i32 with the bits of a u32.
    At(Tensor),
    /// From this one on.
    From(i64),
}

/// Which bits are written.
#[derive(Debug, Clone, Copy)]
enum Bits {
    Old,
    New,
}

impl Changes {
    /// Bytes on the device of `model` that staging them takes; `None` if they cannot be staged: whole folders, and changes that name a
    /// tied output matrix, which is the embedding.
    #[must_use]
    pub fn staged_bytes(&self, model: &Model) -> Option<u64> {
        let is_tied = model.config().tie_word_embeddings;
        if !self.is_set() || is_tied && self.edits().iter().any(|edit| edit.tensor == HEAD) {
            return None;
        }
        let width = model.dtype().kind().elt_size_in_bytes();
        let of = |edit: &Edit| {
            let position = if edit.indexed.is_some() { POSITION_BYTES } else { 0 };
            (self.element_count(edit) * (2 * width + position)) as u64
        };
        Some(self.edits().iter().map(of).sum())
    }
}

impl Model {
    /// Brings `changes` to the weights' device without touching the weights, and computes that they lead to `wanted`.
    ///
    /// * `before`: checksums of the weights as they are.
    ///
    /// # Errors
    /// [`ChangeError::Checksum`] if they lead elsewhere; [`ChangeError::Torch`], for instance for want of memory.
    ///
    /// # Panics
    /// If [`Changes::staged_bytes`] has none.
    pub fn stage(
        &self,
        changes: &Changes,
        before: &Checksums,
        wanted: &Checksums,
    ) -> Result<StagedChanges, ChangeError> {
        assert!(changes.staged_bytes(self).is_some(), "only changes that can be staged are");
        let _guard = tch::no_grad_guard();
        let steps = on_device(changes, &self.network().places()?, self.own_kernels().as_deref())?;
        let mut expected = before.clone();
        for (tensor, sum) in self.differences(&steps)? {
            let unknown = || ChecksumError::Missing { tensor: tensor.clone() };
            let found = expected.get_mut(&tensor).ok_or_else(unknown)?;
            *found = found.wrapping_add(sum);
        }
        checksum::compare(&expected, wanted, self.config())?;
        Ok(StagedChanges { base: self.weights_hash(), steps })
    }

    /// By step: its tensor, and what its new bits add to that one's checksum. The host waits once.
    fn differences(&self, steps: &[Step]) -> Result<Vec<(String, u64)>, ChangeError> {
        let (kind, kernels) = (self.network().kind, self.own_kernels());
        let mut sums = Vec::with_capacity(steps.len());
        for step in steps {
            let unknown = || ChecksumError::Unknown { tensor: step.tensor.clone() };
            let file = *self.dtypes.get(&step.tensor).ok_or_else(unknown)?;
            let inexact =
                || ChecksumError::Inexact { tensor: step.tensor.clone(), file: file.name(), model: self.dtype() };
            sums.push(step.difference(Encoding::of(file, kind).ok_or_else(inexact)?, kernels.as_deref())?);
        }
        if sums.is_empty() {
            return Ok(Vec::new());
        }
        let sums = Vec::<i64>::try_from(Tensor::f_stack(&sums, 0)?.f_to_device(Device::Cpu)?)?;
        Ok(steps.iter().map(|step| step.tensor.clone()).zip(sums.into_iter().map(i64::cast_unsigned)).collect())
    }

    /// Writes staged changes where the weights lie, reads them again, and gives the weights their new hash.
    ///
    /// # Errors
    /// [`ChangeError::OtherWeights`] if the weights are not those that they were staged for; [`ChangeError::NotWritten`] and
    /// [`ChangeError::Torch`], behind which [`Model::give_back`] brings the old bits back.
    pub fn take(&mut self, staged: &StagedChanges, weights: WeightsHash) -> Result<(), ChangeError> {
        if staged.base != self.weights_hash() {
            return Err(ChangeError::OtherWeights { staged: staged.base, loaded: self.weights_hash() });
        }
        self.write(staged, Bits::New)?;
        self.weights_hash = weights;
        Ok(())
    }

    /// Brings back the bits that were there before [`Model::take`], and the hash.
    ///
    /// # Errors
    /// [`ChangeError::NotWritten`] and [`ChangeError::Torch`]; the weights are of no use then.
    pub fn give_back(&mut self, staged: &StagedChanges) -> Result<(), ChangeError> {
        self.write(staged, Bits::Old)?;
        self.weights_hash = staged.base;
        Ok(())
    }

    fn write(&mut self, staged: &StagedChanges, bits: Bits) -> Result<(), ChangeError> {
        let _guard = tch::no_grad_guard();
        let places = self.exclusive_places()?;
        let values_of = |step: &Step| match bits {
            Bits::Old => step.old.shallow_clone(),
            Bits::New => step.new.shallow_clone(),
        };
        let values = staged.steps.iter().map(|step| (step.tensor.as_str(), &step.place, values_of(step)));
        write(&places, values, self.own_kernels().as_deref())
    }

    /// Writes changes that are not staged, without a way back: for weights that nobody proves with yet.
    pub(crate) fn write_unstaged(&mut self, changes: &Changes) -> Result<(), ChangeError> {
        let _guard = tch::no_grad_guard();
        let places = self.exclusive_places()?;
        let steps = uploaded(changes, &places)?;
        let values = steps.iter().map(|step| (step.tensor.as_str(), &step.place, step.new.shallow_clone()));
        write(&places, values, self.own_kernels().as_deref())
    }

    /// Kernels of our own for these weights, if there are any.
    fn own_kernels(&self) -> Option<Arc<WeightKernels>> {
        weight_kernels(self.network().device).filter(|_| self.network().kind.elt_size_in_bytes() == 2)
    }
}

/// Writes elements and reads them again. The host waits once; what comes before is ordered as fast as it can.
fn write<'s>(
    places: &BTreeMap<String, Tensor>,
    values: impl Iterator<Item = (&'s str, &'s Place, Tensor)>,
    kernels: Option<&WeightKernels>,
) -> Result<(), ChangeError> {
    let mut differ = Vec::new();
    let mut flag = None;
    for (tensor, place, values) in values {
        let Some(tensor) = places.get(tensor) else { continue };
        match (place, kernels) {
            (Place::At(positions), Some(kernels)) => {
                let selection = Selection { tensor, positions, values: &values };
                kernels.write(selection)?;
                let flag = match &flag {
                    Some(flag) => flag,
                    None => flag.insert(Tensor::f_zeros([1], (Kind::Int, tensor.device()))?),
                };
                kernels.compare(selection, flag)?;
            }
            _ => differ.push(place.write(tensor, &values)?),
        }
    }
    if let Some(flag) = flag {
        differ.push(flag.f_any()?);
    }
    let is_written = differ.is_empty() || Tensor::f_stack(&differ, 0)?.f_any()?.f_int64_value(&[])? == 0;
    if is_written { Ok(()) } else { Err(ChangeError::NotWritten) }
}

/// The new bits of some elements of one tensor, and where they belong.
struct Uploaded {
    tensor: String,
    place: Place,
    new: Tensor,
}

/// The steps of all changes: positions and new bits from the file, old bits from where the weights lie.
fn on_device(
    changes: &Changes,
    places: &BTreeMap<String, Tensor>,
    kernels: Option<&WeightKernels>,
) -> Result<Vec<Step>, TchError> {
    let mut made = Vec::new();
    for Uploaded { tensor, place, new } in uploaded(changes, places)? {
        let Some(held) = places.get(&tensor) else { continue };
        let old = place.read(held, new.size1()?, kernels)?.f_view_dtype(held.kind())?;
        made.push(Step { tensor, place, old, new });
    }
    Ok(made)
}

/// What the file says, on the weights' device, in pieces of bounded size.
fn uploaded(changes: &Changes, places: &BTreeMap<String, Tensor>) -> Result<Vec<Uploaded>, TchError> {
    let mut fills = Vec::new();
    let mut edits = Vec::new();
    for edit in changes.edits() {
        let Some(tensor) = places.get(&edit.tensor) else { continue };
        let room = |kind: Kind| Tensor::f_empty([changes.element_count(edit) as i64], (kind, tensor.device()));
        let new = room(tensor.kind())?;
        fills.push(Fill { to: new.shallow_clone(), bytes: changes.values(edit), kind: edit.kind });
        let positions = edit.indexed.map(|_| room(Kind::Int)).transpose()?;
        if let Some(positions) = &positions {
            fills.push(Fill { to: positions.shallow_clone(), bytes: changes.index(edit), kind: Kind::Int });
        }
        edits.push((edit, positions, new));
    }
    fill(fills)?;
    let mut made = Vec::new();
    for (edit, positions, new) in edits {
        for range in steps(changes.element_count(edit)) {
            let part = |all: &Tensor| all.f_narrow(0, range.start as i64, range.len() as i64);
            let (place, new) = match &positions {
                Some(positions) => (Place::At(part(positions)?), part(&new)?),
                None => (Place::From(range.start as i64), part(&new)?),
            };
            made.push(Uploaded { tensor: edit.tensor.clone(), place, new });
        }
    }
    Ok(made)
}

impl Place {
    /// Bits of the elements of `tensor`, in memory of their own.
    fn read(&self, tensor: &Tensor, count: i64, kernels: Option<&WeightKernels>) -> Result<Tensor, TchError> {
        let bits = bits_of(tensor)?;
        match self {
            Self::At(positions) if let Some(kernels) = kernels => {
                let values = Tensor::f_empty([count], (bits.kind(), bits.device()))?;
                kernels.read(Selection { tensor: &bits, positions, values: &values })?;
                Ok(values)
            }
            Self::At(positions) => bits.f_index_select(0, &wide(positions)?),
            Self::From(first) => {
                let part = bits.f_narrow(0, *first, count)?;
                let mut copy = part.f_empty_like()?;
                copy.f_copy_(&part)?;
                Ok(copy)
            }
        }
    }

    /// Writes bits where they belong; returns whether any of them cannot be read there, as a tensor without dimensions.
    fn write(&self, tensor: &Tensor, values: &Tensor) -> Result<Tensor, TchError> {
        let (mut bits, values) = (bits_of(tensor)?, bits_of(values)?);
        let written = match self {
            Self::At(positions) => {
                let positions = wide(positions)?;
                drop(bits.f_index_copy_(0, &positions, &values)?);
                bits.f_index_select(0, &positions)?
            }
            Self::From(first) => {
                let mut part = bits.f_narrow(0, *first, values.size1()?)?;
                part.f_copy_(&values)?;
                part
            }
        };
        written.f_ne_tensor(&values)?.f_any()
    }
}

impl Step {
    /// Σ (new bits − old bits)·(2·position + 1) as a tensor without dimensions; 64-bit integers wrap there as in a checksum.
    fn difference(&self, encoding: Encoding, kernels: Option<&WeightKernels>) -> Result<Tensor, TchError> {
        if let (Place::At(positions), Some(kernels)) = (&self.place, kernels) {
            let sum = Tensor::f_zeros([1], (Kind::Int64, positions.device()))?;
            kernels.sum_differences(positions, [&self.old, &self.new], &sum)?;
            return sum.f_squeeze();
        }
        let weights = match &self.place {
            Place::At(positions) => wide(positions)?.f_mul_scalar_(2)?.f_add_scalar_(1)?,
            Place::From(first) => {
                let end = first + self.new.size1()?;
                Tensor::f_arange_start_step(2 * first + 1, 2 * end + 1, 2, (Kind::Int64, self.new.device()))?
            }
        };
        let bits = device_bits(&self.new, encoding)?.f_sub_(&device_bits(&self.old, encoding)?)?;
        bits.f_mul(&weights)?.f_sum(Kind::Int64)
    }
}

/// Positions as libtorch wants them.
fn wide(positions: &Tensor) -> Result<Tensor, TchError> {
    positions.f_to_kind(Kind::Int64)?.f_bitwise_and_(0xffff_ffff_i64)
}
