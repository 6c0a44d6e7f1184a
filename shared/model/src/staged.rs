//! Changes that lie beside the weights on their device before they are due: at the boundary nothing is left but to write them.
//!
//! A checksum is a sum over elements, so the one that a tensor will have follows from the one that it has and from the elements that
//! change. Wrong changes are found before anything is touched, and the weights need not be summed while proofs wait.

use std::collections::BTreeMap;
use std::ops::Range;

use grail_protocol::ids::WeightsHash;
use tch::{Device, Kind, TchError, Tensor};

use crate::changes::{Changes, Edit, STEP, bits_of, steps};
use crate::checksum::{self, Checksums, Encoding, device_bits};
use crate::cuda::{Changed, Selection, WeightKernels};
use crate::error::{ChangeError, ChecksumError};
use crate::fill::{Fill, fill};
use crate::model::Model;
use crate::weights::HEAD;

/// Bytes of a position.
const POSITION_BYTES: usize = 4;
/// Most bytes of changes that lie beside a copy while they are written to it: little of what is left free when a copy is made.
const MOST_BESIDE_BYTES: usize = 1 << 28;

/// Changes of the weights `base`, on their device with the old bits, which lead to weights with the checksums that were wanted.
#[derive(Debug)]
pub struct StagedChanges {
    base: WeightsHash,
    steps: Vec<Step>,
}

/// A step with what there was before it.
#[derive(Debug)]
struct Step {
    change: Uploaded,
    /// As the new bits.
    old: Tensor,
}

/// The new bits of some elements of one tensor, and where they belong.
#[derive(Debug)]
struct Uploaded {
    tensor: String,
    place: Place,
    /// `[count]`, of the model's kind.
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
        let steps = on_device(changes, &self.network().places()?, self.network().own_kernels().as_deref())?;
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
        let (kind, kernels) = (self.network().kind, self.network().own_kernels());
        let encoding = |tensor: &String| {
            let unknown = || ChecksumError::Unknown { tensor: tensor.clone() };
            let file = *self.dtypes.get(tensor).ok_or_else(unknown)?;
            let inexact = || ChecksumError::Inexact { tensor: tensor.clone(), file: file.name(), model: self.dtype() };
            Encoding::of(file, kind).ok_or_else(inexact)
        };
        // Those of the composition first, then those of the kernels.
        let (mut names, mut sums) = (Vec::new(), Vec::new());
        let (mut names_of_changed, mut changed) = (Vec::new(), Vec::new());
        for step in steps {
            let (tensor, encoding) = (step.change.tensor.clone(), encoding(&step.change.tensor)?);
            match (&step.change.place, &kernels) {
                (Place::At(positions), Some(_)) => {
                    names_of_changed.push(tensor);
                    changed.push(Changed { positions, before: &step.old, after: &step.change.new });
                }
                _ => {
                    names.push(tensor);
                    sums.push(step.difference(encoding)?);
                }
            }
        }
        names.extend(names_of_changed);
        let mut parts = Vec::new();
        if !sums.is_empty() {
            parts.push(Tensor::f_stack(&sums, 0)?);
        }
        if let Some(kernels) = kernels {
            parts.push(kernels.differences(&changed)?);
        }
        if parts.is_empty() {
            return Ok(Vec::new());
        }
        let sums = Vec::<i64>::try_from(Tensor::f_cat(&parts, 0)?.f_to_device(Device::Cpu)?)?;
        Ok(names.into_iter().zip(sums.into_iter().map(i64::cast_unsigned)).collect())
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
            Bits::New => step.change.new.shallow_clone(),
        };
        let writes: Vec<_> = staged.steps.iter().map(|step| (&step.change, values_of(step))).collect();
        write(&places, &writes, self.network().own_kernels().as_deref())
    }

    /// Writes changes that are not staged, without a way back: to weights that nobody proves with yet. No more than
    /// [`MOST_BESIDE_BYTES`] lie beside them meanwhile.
    pub(crate) fn write_unstaged(&mut self, changes: &Changes) -> Result<(), ChangeError> {
        self.write_in_groups(changes, STEP, MOST_BESIDE_BYTES)
    }

    /// In parts of at most `step` elements, of which groups of about `most_bytes` are written together.
    pub(crate) fn write_in_groups(
        &mut self,
        changes: &Changes,
        step: usize,
        most_bytes: usize,
    ) -> Result<(), ChangeError> {
        let _guard = tch::no_grad_guard();
        let kernels = self.network().own_kernels();
        let places = self.exclusive_places()?;
        // A tied output matrix is the embedding, against which its checksum is held too.
        let is_tied = self.config().tie_word_embeddings;
        let own = changes.edits().iter().filter(|edit| !(is_tied && edit.tensor == HEAD));
        let (whole, some): (Vec<_>, Vec<_>) = own.partition(|edit| edit.indexed.is_none());
        let fill_of = |edit: &Edit| {
            let to = places.get(&edit.tensor)?.shallow_clone();
            Some(Fill { to, bytes: changes.values(edit), kind: edit.kind })
        };
        fill(whole.into_iter().filter_map(fill_of).collect())?;
        let mut group = Vec::new();
        let mut bytes = 0;
        for part in some.into_iter().flat_map(|edit| parts(changes, edit, step)) {
            bytes += part.1.len() * (POSITION_BYTES + self.dtype().kind().elt_size_in_bytes());
            group.push(part);
            if bytes >= most_bytes {
                write_parts(changes, &places, &std::mem::take(&mut group), kernels.as_deref())?;
                bytes = 0;
            }
        }
        write_parts(changes, &places, &group, kernels.as_deref())
    }
}

/// Writes elements and reads them again. The host waits once; what comes before is ordered as fast as it can.
fn write(
    places: &BTreeMap<String, Tensor>,
    writes: &[(&Uploaded, Tensor)],
    kernels: Option<&WeightKernels>,
) -> Result<(), ChangeError> {
    let (mut differ, mut selections) = (Vec::new(), Vec::new());
    for (change, values) in writes {
        let Some(tensor) = places.get(&change.tensor) else { continue };
        match (&change.place, kernels) {
            (Place::At(positions), Some(_)) => selections.push(Selection { tensor, positions, values }),
            (place, _) => differ.push(place.write(tensor, values)?),
        }
    }
    if let Some(kernels) = kernels.filter(|_| !selections.is_empty()) {
        kernels.write(&selections)?;
        differ.push(kernels.differ(&selections)?.f_any()?);
    }
    let is_written = differ.is_empty() || Tensor::f_stack(&differ, 0)?.f_any()?.f_int64_value(&[])? == 0;
    if is_written { Ok(()) } else { Err(ChangeError::NotWritten) }
}

/// The steps of all changes: positions and new bits from the file, old bits from where the weights lie.
fn on_device(
    changes: &Changes,
    places: &BTreeMap<String, Tensor>,
    kernels: Option<&WeightKernels>,
) -> Result<Vec<Step>, TchError> {
    let mut steps = Vec::new();
    let all: Vec<_> = changes.edits().iter().flat_map(|edit| parts(changes, edit, STEP)).collect();
    for change in uploaded(changes, places, &all)? {
        let Some(held) = places.get(&change.tensor) else { continue };
        let old = match (&change.place, kernels) {
            // Read below, all at once.
            (Place::At(_), Some(_)) => change.new.f_empty_like()?,
            (place, _) => place.read(held, change.new.size1()?)?.f_view_dtype(held.kind())?,
        };
        steps.push(Step { change, old });
    }
    if let Some(kernels) = kernels {
        let mut selections = Vec::with_capacity(steps.len());
        for Step { change, old } in &steps {
            if let (Place::At(positions), Some(tensor)) = (&change.place, places.get(&change.tensor)) {
                selections.push(Selection { tensor, positions, values: old });
            }
        }
        kernels.read(&selections)?;
    }
    Ok(steps)
}

/// Some elements of an edit.
type EditPart<'c> = (&'c Edit, Range<usize>);

/// All elements of an edit, in parts of `step` elements.
fn parts<'c>(changes: &Changes, edit: &'c Edit, step: usize) -> impl Iterator<Item = EditPart<'c>> {
    steps(changes.element_count(edit), step).map(move |range| (edit, range))
}

fn write_parts(
    changes: &Changes,
    places: &BTreeMap<String, Tensor>,
    parts: &[EditPart<'_>],
    kernels: Option<&WeightKernels>,
) -> Result<(), ChangeError> {
    let uploaded = uploaded(changes, places, parts)?;
    let writes: Vec<_> = uploaded.iter().map(|change| (change, change.new.shallow_clone())).collect();
    write(places, &writes, kernels)
}

/// What the file says of parts of edits, on the weights' device.
fn uploaded(
    changes: &Changes,
    places: &BTreeMap<String, Tensor>,
    parts: &[EditPart<'_>],
) -> Result<Vec<Uploaded>, TchError> {
    let (mut fills, mut made) = (Vec::new(), Vec::new());
    for (edit, range) in parts {
        let Some(tensor) = places.get(&edit.tensor) else { continue };
        let room = |kind: Kind| Tensor::f_empty([range.len() as i64], (kind, tensor.device()));
        let bytes = |all: &'_ [u8], width: usize| range.start * width..all.len().min(range.end * width);
        let (values, index) = (changes.values(edit), changes.index(edit));
        let new = room(tensor.kind())?;
        let bytes_of_values = values.get(bytes(values, edit.width)).unwrap_or_default();
        fills.push(Fill { to: new.shallow_clone(), bytes: bytes_of_values, kind: edit.kind });
        let place = match edit.indexed {
            Some(_) => {
                let positions = room(Kind::Int)?;
                let bytes_of_index = index.get(bytes(index, POSITION_BYTES)).unwrap_or_default();
                fills.push(Fill { to: positions.shallow_clone(), bytes: bytes_of_index, kind: Kind::Int });
                Place::At(positions)
            }
            None => Place::From(range.start as i64),
        };
        made.push(Uploaded { tensor: edit.tensor.clone(), place, new });
    }
    fill(fills)?;
    Ok(made)
}

impl Place {
    /// Bits of the elements of `tensor`, in memory of their own.
    fn read(&self, tensor: &Tensor, count: i64) -> Result<Tensor, TchError> {
        let bits = bits_of(tensor)?;
        match self {
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
    fn difference(&self, encoding: Encoding) -> Result<Tensor, TchError> {
        let weights = match &self.change.place {
            Place::At(positions) => wide(positions)?.f_mul_scalar_(2)?.f_add_scalar_(1)?,
            Place::From(first) => {
                let end = first + self.change.new.size1()?;
                Tensor::f_arange_start_step(2 * first + 1, 2 * end + 1, 2, (Kind::Int64, self.old.device()))?
            }
        };
        let bits = device_bits(&self.change.new, encoding)?.f_sub_(&device_bits(&self.old, encoding)?)?;
        bits.f_mul(&weights)?.f_sum(Kind::Int64)
    }
}

/// Positions as libtorch wants them.
fn wide(positions: &Tensor) -> Result<Tensor, TchError> {
    positions.f_to_kind(Kind::Int64)?.f_bitwise_and_(0xffff_ffff_i64)
}
