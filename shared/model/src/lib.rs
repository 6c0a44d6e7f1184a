//! Decoder models on libtorch: the proof forward pass, a decoder with a cache, and training.
//!
//! The only crate that links libtorch. Everything goes through one packed forward pass without padding: the tokens of all
//! sequences end to end, a group's prompt once, with completions that attend to the prompt and to themselves.

mod attention;
mod bf16_cpu;
mod changes;
#[cfg(test)]
mod changes_tests;
pub mod checksum;
pub mod config;
mod cuda;
pub mod device;
mod difference;
mod error;
mod evaluate;
mod ffi;
mod fill;
pub mod generate;
pub mod gpu;
mod layers;
mod logits;
pub mod measure;
mod model;
mod packed;
mod prove;
mod resident;
mod rope;
mod running;
pub mod safetensors;
mod sketch;
mod staged;
pub mod stages;
pub mod train;
#[cfg(test)]
mod vector_tests;
mod verify;
pub mod weights;

pub use changes::{Changes, Undo};
pub use checksum::Checksums;
pub use config::{ConfigError, ModelConfig};
pub use cuda::beside_proofs;
pub use device::{Device, Dtype, set_threads};
pub use difference::{INDEX_DTYPE, write_difference};
pub use error::{ChangeError, ChecksumError, LoadError, ProveError, TorchError};
pub use model::{LoadOptions, Model};
pub use packed::{PackedBatch, Segment, SegmentIndex};
pub use prove::{CompletionProof, ProofModel, ProveInput, ProveOutput, RunningProof};
pub use staged::StagedChanges;
pub use verify::{VerifyInput, VerifyOutput};
pub use weights::weights_hash_of_dir;
