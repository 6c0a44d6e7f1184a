//! Changes of weights that are loaded already: some elements of some tensors, or whole tensors, from a file.
//!
//! Everything that can be wrong with a file is found before anything is touched. Old bits can be kept, to play them back.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, TchError, Tensor};

use crate::checksum::Encoding;
use crate::config::ModelConfig;
use crate::error::{ChangeError, LoadError};
use crate::fill::{Fill, fill};
use crate::model::Model;
use crate::safetensors::{FileDtype, SafetensorsFile, TensorView};
use crate::weights::{HEAD, WeightFiles, expected_tensors};

/// Elements that are scattered at once: bounds what lies beside the weights on the device to about 50 MB.
pub(crate) const STEP: usize = 1 << 22;

/// Changes that fit a model: checked, and mapped but not read into memory.
#[derive(Debug)]
pub struct Changes {
    source: Source,
    edits: Vec<Edit>,
    /// Dtypes of the files from which the whole model is read; unset = they stay.
    dtypes: Option<BTreeMap<String, FileDtype>>,
}

#[derive(Debug)]
enum Source {
    Set(SafetensorsFile),
    Folder(WeightFiles),
}

/// What happens to one tensor.
#[derive(Debug)]
pub(crate) struct Edit {
    pub tensor: String,
    pub kind: Kind,
    /// Bytes of an element in the file.
    pub width: usize,
    /// Elements that are named; unset = all of them, in order.
    pub indexed: Option<usize>,
}

/// Old bits of what was changed, in host memory.
#[derive(Debug, Default)]
pub struct Undo {
    saved: Vec<Saved>,
    dtypes: Option<BTreeMap<String, FileDtype>>,
}

#[derive(Debug)]
struct Saved {
    /// Place among the edits, and which of its elements.
    edit: usize,
    range: Range<usize>,
    old: Tensor,
}

impl Changes {
    /// Opens a file of changes: `index/NAME` (U32, ascending) with `value/NAME`, or `whole/NAME`.
    ///
    /// # Errors
    /// [`ChangeError`] if the file is damaged, names a tensor that `model` does not have, or has another dtype, shape or order.
    pub fn open(path: &Path, model: &Model) -> Result<Self, ChangeError> {
        let file = SafetensorsFile::open(path)?;
        let shapes = file_shapes(model.config());
        let mut edits = Vec::new();
        for entry in file.names() {
            let (part, tensor) = entry.split_once('/').unwrap_or((entry, ""));
            let checker = Checker { file: &file, model, shapes: &shapes, tensor };
            match part {
                "index" => edits.push(checker.indexed()?),
                "whole" => edits.push(checker.whole()?),
                // Checked with its index.
                "value" if file.tensor(&format!("index/{tensor}")).is_some() => {}
                "value" => return Err(checker.refused("it has values and no index")),
                _ => return Err(ChangeError::Entry { path: path.to_owned(), entry: entry.to_owned() }),
            }
        }
        Ok(Self { source: Source::Set(file), edits, dtypes: None })
    }

    /// All tensors of a folder, for a model of the same shape.
    ///
    /// # Errors
    /// As [`Model::load`]; [`LoadError::OtherModel`] if its configuration is another one.
    pub fn from_folder(folder: &Path, model: &Model) -> Result<Self, LoadError> {
        let config = ModelConfig::from_dir(folder)?;
        if config != *model.config() {
            return Err(LoadError::OtherModel { folder: folder.to_owned() });
        }
        let files = WeightFiles::open(folder)?;
        files.check(&config)?;
        let dtypes = files.dtypes();
        let mut edits = Vec::with_capacity(dtypes.len());
        for (tensor, dtype) in &dtypes {
            // A tied output matrix is the embedding, which the check found to be the same.
            if !(config.tie_word_embeddings && tensor == HEAD) {
                let (_, kind) = files.elements(tensor)?;
                edits.push(Edit { tensor: tensor.clone(), kind, width: dtype.element_bytes(), indexed: None });
            }
        }
        Ok(Self { source: Source::Folder(files), edits, dtypes: Some(dtypes) })
    }

    /// The files of a whole folder.
    #[must_use]
    pub const fn files(&self) -> Option<&WeightFiles> {
        match &self.source {
            Source::Folder(files) => Some(files),
            Source::Set(_) => None,
        }
    }

    /// Elements that are written.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.edits.iter().map(|edit| self.element_count(edit) as u64).sum()
    }

    pub(crate) fn edits(&self) -> &[Edit] {
        &self.edits
    }

    /// Whether it is some elements of weights that stay otherwise, and not a folder.
    pub(crate) const fn is_set(&self) -> bool {
        matches!(self.source, Source::Set(_))
    }

    pub(crate) fn element_count(&self, edit: &Edit) -> usize {
        edit.indexed.unwrap_or_else(|| self.values(edit).len() / edit.width)
    }

    pub(crate) fn values(&self, edit: &Edit) -> &[u8] {
        let prefix = if edit.indexed.is_some() { "value" } else { "whole" };
        match &self.source {
            Source::Set(file) => file.tensor(&format!("{prefix}/{}", edit.tensor)).map(|view| view.bytes),
            Source::Folder(files) => files.elements(&edit.tensor).ok().map(|(bytes, _)| bytes),
        }
        .unwrap_or_default()
    }

    pub(crate) fn index(&self, edit: &Edit) -> &[u8] {
        match &self.source {
            Source::Set(file) => file.tensor(&format!("index/{}", edit.tensor)).map(|view| view.bytes),
            Source::Folder(_) => None,
        }
        .unwrap_or_default()
    }

    /// Positions of a range of an edit's elements, on `device`.
    fn positions(&self, edit: &Edit, range: &Range<usize>, device: Device) -> Result<Tensor, TchError> {
        let bytes = self.index(edit).get(range.start * 4..range.end * 4).unwrap_or_default();
        let index = Tensor::f_from_data_size(bytes, &[range.len() as i64], Kind::Int)?;
        // libtorch has no unsigned 32-bit positions; half the bytes cross the bus before they are widened.
        index.f_to_device(device)?.f_to_kind(Kind::Int64)?.f_bitwise_and_(0xffff_ffff_i64)
    }
}

/// Compares the entries of one tensor with the model.
struct Checker<'a> {
    file: &'a SafetensorsFile,
    model: &'a Model,
    /// Of all tensors that the model's files may have.
    shapes: &'a BTreeMap<String, Vec<usize>>,
    tensor: &'a str,
}

impl<'a> Checker<'a> {
    fn refused(&self, detail: impl Into<String>) -> ChangeError {
        let path: PathBuf = self.file.path().to_owned();
        ChangeError::Tensor { path, tensor: self.tensor.to_owned(), detail: detail.into() }
    }

    fn entry(&self, part: &str) -> Result<TensorView<'a>, ChangeError> {
        let entry = self.file.tensor(&format!("{part}/{}", self.tensor));
        entry.ok_or_else(|| self.refused(format!("it has no {part}")))
    }

    /// Shape of the tensor, and the kind of its elements in files.
    fn target(&self, found: FileDtype) -> Result<(&'a [usize], Kind), ChangeError> {
        let dtypes = self.model.file_dtypes();
        let dtype = dtypes.get(self.tensor).ok_or_else(|| self.refused("the model has no such tensor"))?;
        if *dtype != found {
            return Err(self.refused(format!(
                "its values are {}, the model's file has {}",
                found.name(),
                dtype.name()
            )));
        }
        if Encoding::of(*dtype, self.model.dtype().kind()).is_none() {
            let held = self.model.dtype();
            return Err(self.refused(format!("{} is held as {held}, which loses bits", dtype.name())));
        }
        let kind = match dtype {
            FileDtype::F16 => Kind::Half,
            FileDtype::Bf16 => Kind::BFloat16,
            _ => Kind::Float,
        };
        let shape = self.shapes.get(self.tensor).ok_or_else(|| self.refused("the model has no such tensor"))?;
        Ok((shape, kind))
    }

    fn whole(&self) -> Result<Edit, ChangeError> {
        let view = self.entry("whole")?;
        let (shape, kind) = self.target(view.dtype)?;
        if view.shape != shape {
            return Err(self.refused(format!("its shape is {:?}, the model's {shape:?}", view.shape)));
        }
        if self.file.tensor(&format!("index/{}", self.tensor)).is_some() {
            return Err(self.refused("it is there whole and by index"));
        }
        Ok(Edit { tensor: self.tensor.to_owned(), kind, width: view.dtype.element_bytes(), indexed: None })
    }

    fn indexed(&self) -> Result<Edit, ChangeError> {
        let (index, values) = (self.entry("index")?, self.entry("value")?);
        let (shape, kind) = self.target(values.dtype)?;
        if index.dtype.name() != "U32" {
            return Err(self.refused(format!("its index is {}, not U32", index.dtype.name())));
        }
        let &[count] = index.shape else {
            return Err(self.refused(format!("its index has shape {:?}, not one dimension", index.shape)));
        };
        if values.shape != [count] {
            return Err(self.refused(format!("{count} positions have values of shape {:?}", values.shape)));
        }
        let mut positions = index.bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
        if !positions.clone().is_sorted_by(|before, after| before < after) {
            return Err(self.refused("its positions do not ascend"));
        }
        let elements: usize = shape.iter().product();
        if let Some(last) = positions.next_back().filter(|last| *last as usize >= elements) {
            return Err(self.refused(format!("position {last} is outside its {elements} elements")));
        }
        Ok(Edit { tensor: self.tensor.to_owned(), kind, width: values.dtype.element_bytes(), indexed: Some(count) })
    }
}

impl Undo {
    /// Bytes of the old bits that [`Model::apply`] would keep of `model`.
    #[must_use]
    pub fn bytes_for(changes: &Changes, model: &Model) -> u64 {
        changes.elements() * model.dtype().kind().elt_size_in_bytes() as u64
    }
}

impl Model {
    /// Changes the weights in place, bit for bit, and keeps the old bits in `undo` if one is given. The model's hash stays, until
    /// [`Model::confirm`].
    ///
    /// # Errors
    /// [`ChangeError::Torch`]; some tensors may be changed then, and [`Model::revert`] brings their old bits back.
    pub fn apply(&mut self, changes: &Changes, mut undo: Option<&mut Undo>) -> Result<(), ChangeError> {
        let _guard = tch::no_grad_guard();
        let places = self.exclusive_places()?;
        let mut fills = Vec::new();
        for (at, edit) in changes.edits.iter().enumerate() {
            let Some(place) = places.get(&edit.tensor) else { continue };
            let count = changes.element_count(edit);
            if edit.indexed.is_none() {
                if let Some(undo) = undo.as_deref_mut() {
                    undo.saved.push(Saved { edit: at, range: 0..count, old: on_host(place)? });
                }
                fills.push(Fill { to: place.shallow_clone(), bytes: changes.values(edit), kind: edit.kind });
                continue;
            }
            for range in steps(count, STEP) {
                let positions = changes.positions(edit, &range, place.device())?;
                let mut bits = bits_of(place)?;
                if let Some(undo) = undo.as_deref_mut() {
                    let old = on_host(&bits.f_index_select(0, &positions)?)?;
                    undo.saved.push(Saved { edit: at, range: range.clone(), old });
                }
                let bytes = changes.values(edit).get(range.start * edit.width..range.end * edit.width);
                let values = Tensor::f_from_data_size(bytes.unwrap_or_default(), &[range.len() as i64], edit.kind)?;
                let values = bits_of(&values.f_to_device(place.device())?.f_to_kind(place.kind())?)?;
                drop(bits.f_index_copy_(0, &positions, &values)?);
            }
        }
        fill(fills)?;
        if let Some(dtypes) = &changes.dtypes {
            let before = std::mem::replace(&mut self.dtypes, dtypes.clone());
            if let Some(undo) = undo {
                undo.dtypes = Some(before);
            }
        }
        Ok(())
    }

    /// As [`Model::apply`] without a way back, for a copy that nobody proves with yet: in large transfers, and without a wait for
    /// each.
    ///
    /// # Errors
    /// As [`Model::apply`], and [`ChangeError::NotWritten`]; the copy is of no use then.
    pub fn apply_to_copy(&mut self, changes: &Changes) -> Result<(), ChangeError> {
        if changes.is_set() && self.device() != crate::Device::Cpu {
            self.write_unstaged(changes)
        } else {
            self.apply(changes, None)
        }
    }

    /// Brings back what `changes` changed, as far as they came.
    ///
    /// # Errors
    /// [`ChangeError::Torch`]; the weights are of no use then.
    pub fn revert(&mut self, changes: &Changes, undo: Undo) -> Result<(), ChangeError> {
        let _guard = tch::no_grad_guard();
        let places = self.exclusive_places()?;
        if let Some(dtypes) = undo.dtypes {
            self.dtypes = dtypes;
        }
        // Latest first: a tied output matrix and its embedding are the same elements.
        for Saved { edit, range, old } in undo.saved.into_iter().rev() {
            let Some(edit) = changes.edits.get(edit) else { continue };
            let Some(place) = places.get(&edit.tensor) else { continue };
            if edit.indexed.is_some() {
                let positions = changes.positions(edit, &range, place.device())?;
                drop(bits_of(place)?.f_index_copy_(0, &positions, &old.f_to_device(place.device())?)?);
            } else {
                place.shallow_clone().f_copy_(&old)?;
            }
        }
        self.device().synchronize();
        Ok(())
    }

    pub(crate) fn exclusive_places(&mut self) -> Result<BTreeMap<String, Tensor>, TchError> {
        self.network_mut().places()
    }
}

/// Shapes of all tensors that files of a model may have.
fn file_shapes(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let mut shapes: BTreeMap<String, Vec<usize>> = expected_tensors(config).into_iter().collect();
    shapes.insert(HEAD.to_owned(), vec![config.vocab_size, config.hidden_size]);
    shapes
}

pub(crate) fn steps(count: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count).step_by(step).map(move |first| first..count.min(first + step))
}

/// The same elements as integers: copies of a number that is none must keep their bits.
pub(crate) fn bits_of(tensor: &Tensor) -> Result<Tensor, TchError> {
    tensor.f_view_dtype(if tensor.kind().elt_size_in_bytes() == 2 { Kind::Int16 } else { Kind::Int })
}

/// A copy of its own, also of what lies in host memory already.
fn on_host(tensor: &Tensor) -> Result<Tensor, TchError> {
    let mut copy = Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu))?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}
