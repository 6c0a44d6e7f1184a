//! Errors of loading and of the forward pass.

use std::path::PathBuf;

use grail_protocol::ids::WeightsHash;
use tch::TchError;

use crate::config::ConfigError;
use crate::device::{Device, Dtype};
use crate::safetensors::SafetensorsError;

/// Why a folder cannot be loaded as a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// Neither `model.safetensors` nor an index is there.
    #[error("{folder} holds neither model.safetensors nor model.safetensors.index.json")]
    NoWeights { folder: PathBuf },
    /// Both are there: generation servers would read the one, this program the other.
    #[error(
        "{folder} holds both model.safetensors and model.safetensors.index.json: remove the stale one, \
         since generation and proof would load different weights"
    )]
    Ambiguous { folder: PathBuf },
    /// The index cannot be used.
    #[error("{path} is a broken index: {detail}")]
    BrokenIndex { path: PathBuf, detail: String },
    /// A tensor that the configuration asks for is in no file.
    #[error("tensor {tensor} is missing in {folder}")]
    MissingTensor { tensor: String, folder: PathBuf },
    /// A tensor that the configuration does not know.
    #[error("tensor {tensor} in {file} belongs to no part of the model that config.json describes")]
    ExtraTensor { tensor: String, file: PathBuf },
    /// A tensor in two files.
    #[error("tensor {tensor} is in both {first} and {second}")]
    DuplicateTensor { tensor: String, first: PathBuf, second: PathBuf },
    /// A tensor of another shape than the configuration says.
    #[error("tensor {tensor} in {file} has shape {found:?}, config.json asks for {expected:?}")]
    WrongShape { tensor: String, file: PathBuf, found: Vec<usize>, expected: Vec<usize> },
    /// A tensor of a type that weights cannot have.
    #[error("tensor {tensor} in {file} has dtype {found}: BF16, F16 and F32 are supported")]
    WrongDtype { tensor: String, file: PathBuf, found: &'static str },
    /// The embedding is tied, but the file's output matrix is another one.
    #[error("config.json ties the embeddings, but lm_head.weight in {file} differs from model.embed_tokens.weight")]
    TiedHeadDiffers { file: PathBuf },
    /// The folder is of another model than the one that is loaded.
    #[error("{folder} describes another model than the one that is loaded: their config.json differ")]
    OtherModel { folder: PathBuf },
    /// The device is not there; see [`crate::gpu::enable`].
    #[error(
        "device {device} does not exist: {devices} GPUs are visible with the CUDA library that is loaded, if any is"
    )]
    NoDevice { device: Device, devices: usize },
    /// libtorch refused an operation.
    #[error(transparent)]
    Torch(#[from] TorchError),
}

impl From<TchError> for LoadError {
    fn from(source: TchError) -> Self {
        Self::Torch(source.into())
    }
}

/// Why the weights of a model are not those that were wanted.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ChecksumError {
    #[error("tensor {tensor} has checksum {found:016x}, {expected:016x} is wanted")]
    Differs { tensor: String, found: u64, expected: u64 },
    #[error("tensor {tensor} has no checksum to compare with")]
    Missing { tensor: String },
    #[error("a checksum is wanted of tensor {tensor}, which the model does not have")]
    Unknown { tensor: String },
    /// The cast lost bits, so nothing can be said of the file's.
    #[error("tensor {tensor} is {file} in its file and held as {model}, which loses bits: nothing can be compared")]
    Inexact { tensor: String, file: &'static str, model: Dtype },
    #[error(transparent)]
    Torch(#[from] TorchError),
}

impl From<TchError> for ChecksumError {
    fn from(source: TchError) -> Self {
        Self::Torch(source.into())
    }
}

/// Why a file of changes cannot be applied to a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// An entry of another name than `index/NAME`, `value/NAME` and `whole/NAME`.
    #[error("{path}: entry {entry:?} is none of index/NAME, value/NAME and whole/NAME")]
    Entry { path: PathBuf, entry: String },
    /// A tensor's entries do not fit the model or each other.
    #[error("{path}: changes of tensor {tensor}: {detail}")]
    Tensor { path: PathBuf, tensor: String, detail: String },
    /// They lead to other weights than those that are wanted.
    #[error(transparent)]
    Checksum(#[from] ChecksumError),
    /// Changes were made ready beside other weights than those that are there.
    #[error("changes of weights {staged} were made ready, weights {loaded} are loaded")]
    OtherWeights { staged: WeightsHash, loaded: WeightsHash },
    /// The weights are not what was just written.
    #[error("weights differ from the changes that were written to them")]
    NotWritten,
    #[error(transparent)]
    Torch(#[from] TorchError),
}

impl From<TchError> for ChangeError {
    fn from(source: TchError) -> Self {
        Self::Torch(source.into())
    }
}

/// An error that libtorch raised.
#[derive(Debug, Clone, thiserror::Error)]
#[error("libtorch: {detail}")]
pub struct TorchError {
    /// The first line of libtorch's text; the rest is a C++ stack.
    pub detail: String,
}

impl From<TchError> for TorchError {
    fn from(source: TchError) -> Self {
        let text = match source {
            TchError::Torch(text) => text,
            other => other.to_string(),
        };
        Self { detail: text.lines().next().unwrap_or_default().to_owned() }
    }
}

/// Why a forward pass gave no proof.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProveError {
    /// The device has no memory left, even for the smallest part of the request.
    #[error("out of device memory at {tokens} tokens: {detail}")]
    OutOfMemory { tokens: usize, detail: String },
    /// The device context is lost: every later call on it fails too.
    #[error("device context is poisoned: {detail}")]
    Poisoned { detail: String },
    /// A hidden state holds NaN or infinity, so it has no sketch. `position` is the first that shows it: the cause may lie a few
    /// positions later, since attention multiplies masked values with zero.
    #[error("hidden states of member {member} contain NaN or infinity at position {position}")]
    NonFinite { member: usize, position: usize },
    /// The request contradicts itself or the model.
    #[error("bad request: {detail}")]
    BadRequest { detail: String },
    /// Any other refusal of libtorch.
    #[error(transparent)]
    Torch(#[from] TorchError),
}

impl ProveError {
    /// Sorts an error of libtorch by its text; `tokens` is the size of the batch that failed.
    ///
    /// The one place that looks at the text: libtorch has no codes.
    pub(crate) fn classify(source: TchError, tokens: usize) -> Self {
        let error = TorchError::from(source);
        let is = |needle: &str| error.detail.contains(needle);
        if is("out of memory") || is("can't allocate memory") || is("CUBLAS_STATUS_ALLOC_FAILED") {
            Self::OutOfMemory { tokens, detail: error.detail }
        } else if is("CUDA error") || is("device-side assert") || is("CUBLAS_STATUS") || is("CUDNN_STATUS") {
            Self::Poisoned { detail: error.detail }
        } else {
            Self::Torch(error)
        }
    }

    /// The same error for another group of the batch that failed.
    pub(crate) fn repeated(&self) -> Self {
        match self {
            Self::OutOfMemory { tokens, detail } => Self::OutOfMemory { tokens: *tokens, detail: detail.clone() },
            Self::Poisoned { detail } => Self::Poisoned { detail: detail.clone() },
            Self::NonFinite { member, position } => Self::NonFinite { member: *member, position: *position },
            Self::BadRequest { detail } => Self::BadRequest { detail: detail.clone() },
            Self::Torch(error) => Self::Torch(error.clone()),
        }
    }

    /// The same error with members numbered from `first`.
    pub(crate) fn of_members_from(self, first: usize) -> Self {
        match self {
            Self::NonFinite { member, position } => Self::NonFinite { member: member.saturating_sub(first), position },
            other => other,
        }
    }
}
