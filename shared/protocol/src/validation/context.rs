//! What a validation needs beside the file.

use std::collections::HashMap;

use crate::ids::{BlockHash, CheckpointWindow, EnvironmentSeed, GroupIndex, Hotkey, TokenId, WindowStart};
use crate::randomness::ChallengeRandomness;

/// Facts of the window, of the checkpoint and of the validator.
#[derive(Debug, Clone)]
pub struct ValidationContext {
    /// The miner whose bucket the file lies in.
    pub hotkey: Hotkey,
    pub window: WindowStart,
    /// Hash of the window's first block.
    pub window_hash: BlockHash,
    /// Window of the validator's checkpoint; `None` if it does not know its own, which accepts any.
    pub checkpoint_window: Option<CheckpointWindow>,
    /// `generation_params.max_tokens` of the checkpoint as it stands there; see [`crate::termination`] for what it means.
    pub max_tokens: Option<i64>,
    /// EOS of the tokenizer; without one only completions of full length end properly.
    pub eos_token: Option<TokenId>,
    /// Ids from here on are invalid.
    pub vocab_size: u32,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// `R_v`: selects the challenged positions and the sampled groups.
    pub challenge: ChallengeRandomness,
}

/// Work that only a model, a tokenizer and an environment can do, known before any check that needs it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// Groups whose canonical prompt is needed, ascending.
    pub groups: Vec<NeededGroup>,
    /// Rows whose forward pass and evaluation are needed, in file order.
    pub rows: Vec<NeededRow>,
}

/// One group of [`Needs`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeededGroup {
    pub group: GroupIndex,
    /// Seed that the environment is reset with.
    pub seed: EnvironmentSeed,
}

/// One row of [`Needs`]: its ids are in the vocabulary, its lengths add up and its beacon decodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NeededRow {
    /// Index in the file.
    pub row: usize,
    pub group: GroupIndex,
    pub seed: EnvironmentSeed,
    /// Prompt and completion.
    pub tokens: Vec<TokenId>,
    /// As claimed; the canonical prompt may have another length, in which case the row fails before its forward pass matters.
    pub prompt_length: usize,
    /// The row's own beacon as bytes, which makes the sketch coefficients.
    pub randomness: Vec<u8>,
}

/// Answers to [`Needs`].
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Canonical prompt ids by group; an error text is an exception of the check.
    pub prompts: HashMap<GroupIndex, Result<Vec<TokenId>, String>>,
    /// By row index.
    pub rows: HashMap<usize, RowFacts>,
}

/// Answers for one row; an error text is an exception of the check that uses it, which fails the row.
#[derive(Debug, Clone)]
pub struct RowFacts {
    pub forward: Result<Forward, String>,
    pub evaluation: Result<RowEvaluation, String>,
}

/// What the model says of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Forward {
    /// Sketches of all positions, with the row's own beacon.
    pub sketches: Vec<u32>,
    /// Logprobs of the completion tokens.
    pub logprobs: Vec<f32>,
    /// Probability of EOS in the logits row `len − 2`, in the model's dtype.
    pub eos_probability: f32,
    /// Probabilities of the completion tokens after repetition penalty and temperature.
    pub chosen_probabilities: Vec<f32>,
}

/// What the environment says of one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowEvaluation {
    pub reward: f64,
    pub success: bool,
}

/// Facts are missing for a row that the checks reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MissingFacts {
    #[error("no canonical prompt was supplied for group {0}")]
    Prompt(GroupIndex),
    #[error("no model output and evaluation were supplied for row {0}")]
    Row(usize),
}
