//! Proof of a group: sketches of all positions and logprobs of all completion tokens.

use std::path::Path;
use std::sync::Arc;

use grail_protocol::ids::{TokenId, WeightsHash};
use grail_protocol::sketch::SketchCoeffs;

use crate::config::ModelConfig;
use crate::device::{Device, Dtype};
use crate::error::{LoadError, ProveError};
use crate::evaluate::{Rollout, evaluate};
use crate::model::{LoadOptions, Model};
use crate::stages::{Stage, stage};

/// A model that proves and verifies.
#[derive(Debug, Clone)]
pub struct ProofModel {
    model: Arc<Model>,
}

/// One group: a prompt and its completions.
#[derive(Debug, Clone)]
pub struct ProveInput<'a> {
    pub prompt: &'a [TokenId],
    pub completions: Vec<&'a [TokenId]>,
    /// From the window's `R_m`.
    pub coefficients: &'a SketchCoeffs,
    /// The tokenizer's EOS, which may differ from the model config's.
    pub eos_token: TokenId,
}

/// Proof of one group.
#[derive(Debug, Clone, PartialEq)]
pub struct ProveOutput {
    /// By prompt position; the same for every member.
    pub prompt_sketches: Vec<u32>,
    /// In the order of the input.
    pub completions: Vec<CompletionProof>,
}

/// Proof of one completion.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionProof {
    /// By completion position, each in `0..PRIME_Q`.
    pub sketches: Vec<u32>,
    /// Natural logarithms, by completion token; no temperature, no penalty.
    pub logprobs: Vec<f32>,
    /// Probability of the EOS token in the logits row before the last token, rounded to the model's dtype.
    pub eos_probability: f32,
}

impl ProofModel {
    /// Loads a Hugging Face folder.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load(folder: &Path, options: &LoadOptions) -> Result<Self, LoadError> {
        Model::load(folder, options).map(Arc::new).map(Self::new)
    }

    /// Proves with a model that is loaded already.
    #[must_use]
    pub const fn new(model: Arc<Model>) -> Self {
        Self { model }
    }

    /// The weights, to share them with a decoder.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The model to be changed in place; `None` while somebody else holds it too.
    pub fn exclusive(&mut self) -> Option<&mut Model> {
        Arc::get_mut(&mut self.model)
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// Hash of the files that were loaded.
    #[must_use]
    pub fn weights_hash(&self) -> WeightsHash {
        self.model.weights_hash()
    }

    /// Where the weights lie.
    #[must_use]
    pub fn device(&self) -> Device {
        self.model.device()
    }

    /// Precision of weights and activations.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.model.dtype()
    }

    /// Proves one group in packed batches of at most the model's token budget, the prompt once in each.
    ///
    /// # Errors
    /// [`ProveError::BadRequest`] for an empty completion or a token outside the vocabulary, [`ProveError::NonFinite`],
    /// [`ProveError::OutOfMemory`] when a single member does not fit, and errors of the device.
    pub fn prove(&self, input: &ProveInput<'_>) -> Result<ProveOutput, ProveError> {
        if input.completions.is_empty() {
            return Err(ProveError::BadRequest { detail: "the group has no completion".to_owned() });
        }
        let rollouts: Vec<Rollout<'_>> = input
            .completions
            .iter()
            .map(|completion| Rollout { prompt: input.prompt, completion, eos_token: input.eos_token, sampling: None })
            .collect();
        let mut prompt_sketches = Vec::new();
        let mut completions = Vec::with_capacity(rollouts.len());
        for result in evaluate(&self.model, &rollouts)? {
            for rollout in result.rollouts {
                let sketches = |rows| stage(Stage::Sketch, || result.buckets.sketches(rows, input.coefficients));
                if completions.is_empty() {
                    prompt_sketches = sketches(rollout.prompt_rows);
                }
                completions.push(CompletionProof {
                    sketches: sketches(rollout.completion_rows),
                    logprobs: rollout.logprobs,
                    eos_probability: rollout.eos_probability,
                });
            }
        }
        Ok(ProveOutput { prompt_sketches, completions })
    }
}
