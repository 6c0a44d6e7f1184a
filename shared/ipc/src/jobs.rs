//! What a worker is asked and what it answers, as types: the messages carry the same as raw bytes.
//!
//! Shapes are checked on both sides, so that neither a wrong request nor a wrong answer gets further than here.

use std::path::PathBuf;
use std::time::Duration;

use grail_protocol::ids::{CheckpointWindow, GroupIndex, TokenId, WeightsHash};

use crate::bulk::{self, BulkError};
use crate::messages::{
    ChangeSet, Epoch, ProveRequest, Proved, ReloadCommand, RequestId, TensorChecksum, Verified, VerifiedRow,
    VerifyRequest, VerifyRow,
};

/// A request or an answer whose parts do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    #[error("{field}")]
    Bulk {
        field: &'static str,
        #[source]
        source: BulkError,
    },
    #[error("{field} has {found} elements, {expected} are expected")]
    Length { field: &'static str, found: usize, expected: usize },
    #[error("offsets of the completions must rise from 0 to {tokens}, not {offsets:?}")]
    Offsets { offsets: Vec<u32>, tokens: usize },
    #[error("{field} is empty")]
    Empty { field: &'static str },
    #[error("{field} has {found} elements: more than a message can count")]
    TooMany { field: &'static str, found: usize },
    #[error("prompt length {prompt_length} is not inside a row of {tokens} tokens")]
    PromptLength { prompt_length: u32, tokens: usize },
    #[error("answer is about group {found}, {expected} was asked")]
    Group { found: GroupIndex, expected: GroupIndex },
    #[error("answer was made with weights {found}, {expected} were asked")]
    Weights { found: WeightsHash, expected: WeightsHash },
}

/// One group to prove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProveJob {
    pub group: GroupIndex,
    /// The weights that generated the group.
    pub weights: WeightsHash,
    /// `R_m` of the window as bytes.
    pub randomness: Vec<u8>,
    /// The tokenizer's EOS.
    pub eos_token: TokenId,
    /// The prompt, once for all members; not empty.
    pub prompt: Vec<TokenId>,
    /// The members' completions; at least one, none empty.
    pub completions: Vec<Vec<TokenId>>,
}

/// Proof of one group, members in the order of the job.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupProof {
    pub group: GroupIndex,
    pub weights: WeightsHash,
    /// Sketches of the prompt positions, the same for every member.
    pub prompt_sketches: Vec<u32>,
    pub members: Vec<MemberProof>,
    /// What the forward pass and its read-back took.
    pub compute: Duration,
}

/// Proof of one member of a group.
#[derive(Debug, Clone, PartialEq)]
pub struct MemberProof {
    /// Sketches of the completion positions.
    pub sketches: Vec<u32>,
    /// Logprobs of the completion tokens.
    pub logprobs: Vec<f32>,
    /// Probability of the EOS token in the logits row `len − 2`.
    pub eos_probability: f32,
}

impl ProveJob {
    /// Tokens of all completions.
    #[must_use]
    pub fn completion_tokens(&self) -> usize {
        self.completions.iter().map(Vec::len).sum()
    }

    /// Tokens that the forward pass sees: the prompt once and all completions.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.prompt.len() + self.completion_tokens()
    }

    /// The message.
    ///
    /// # Errors
    /// [`ShapeError::TooMany`] beyond 2^32 tokens.
    pub fn to_request(&self, id: RequestId, epoch: Epoch) -> Result<ProveRequest, ShapeError> {
        let tokens = self.completion_tokens();
        let mut completions = Vec::with_capacity(tokens * 4);
        let mut cu_completions = Vec::with_capacity(self.completions.len() + 1);
        let mut offset = 0;
        cu_completions.push(0);
        for completion in &self.completions {
            completions.extend_from_slice(&bulk::tokens_to_bytes(completion));
            offset += completion.len();
            cu_completions
                .push(u32::try_from(offset).map_err(|_| ShapeError::TooMany { field: "completions", found: tokens })?);
        }
        Ok(ProveRequest {
            id,
            epoch,
            group: self.group,
            weights: self.weights,
            randomness: self.randomness.clone(),
            eos_token: self.eos_token,
            prompt: bulk::tokens_to_bytes(&self.prompt),
            completions,
            cu_completions,
        })
    }

    /// The job of a message.
    ///
    /// # Errors
    /// [`ShapeError`] if the arrays are no whole tokens, the offsets do not rise from 0 to the number of completion tokens, or
    /// prompt, group or a completion is empty.
    pub fn from_request(request: &ProveRequest) -> Result<Self, ShapeError> {
        let prompt = tokens("prompt", &request.prompt)?;
        let packed = tokens("completions", &request.completions)?;
        if prompt.is_empty() {
            return Err(ShapeError::Empty { field: "prompt" });
        }
        if request.cu_completions.len() < 2 {
            return Err(ShapeError::Empty { field: "completions" });
        }
        let refused = || ShapeError::Offsets { offsets: request.cu_completions.clone(), tokens: packed.len() };
        let offsets: Vec<usize> =
            request.cu_completions.iter().map(|offset| usize::try_from(*offset).unwrap_or(usize::MAX)).collect();
        if offsets.first() != Some(&0) || offsets.last() != Some(&packed.len()) {
            return Err(refused());
        }
        let completions = offsets
            .windows(2)
            .map(|pair| {
                let completion = packed.get(pair[0]..pair[1]).ok_or_else(refused)?;
                if completion.is_empty() { Err(refused()) } else { Ok(completion.to_vec()) }
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            group: request.group,
            weights: request.weights,
            randomness: request.randomness.clone(),
            eos_token: request.eos_token,
            prompt,
            completions,
        })
    }
}

impl GroupProof {
    /// The message.
    #[must_use]
    pub fn to_message(&self, id: RequestId, epoch: Epoch) -> Proved {
        let sketches: Vec<u32> = self.members.iter().flat_map(|member| member.sketches.iter().copied()).collect();
        let logprobs: Vec<f32> = self.members.iter().flat_map(|member| member.logprobs.iter().copied()).collect();
        Proved {
            id,
            epoch,
            group: self.group,
            weights: self.weights,
            prompt_sketches: bulk::u32_to_bytes(&self.prompt_sketches),
            sketches: bulk::u32_to_bytes(&sketches),
            logprobs: bulk::f32_to_bytes(&logprobs),
            eos_probabilities: self.members.iter().map(|member| member.eos_probability).collect(),
            compute_us: u64::try_from(self.compute.as_micros()).unwrap_or(u64::MAX),
        }
    }

    /// The proof in a message that answers `job`.
    ///
    /// # Errors
    /// [`ShapeError`] if it is about another group, made with other weights, or of another shape than the job.
    pub fn from_message(message: &Proved, job: &ProveJob) -> Result<Self, ShapeError> {
        if message.group != job.group {
            return Err(ShapeError::Group { found: message.group, expected: job.group });
        }
        check_weights(message.weights, job.weights)?;
        let tokens = job.completion_tokens();
        let prompt_sketches = sketches("prompt_sketches", &message.prompt_sketches, job.prompt.len())?;
        let sketches = sketches("sketches", &message.sketches, tokens)?;
        let logprobs = floats("logprobs", &message.logprobs, tokens)?;
        check_length("eos_probabilities", message.eos_probabilities.len(), job.completions.len())?;
        let mut members = Vec::with_capacity(job.completions.len());
        let mut start = 0;
        for (completion, eos_probability) in job.completions.iter().zip(&message.eos_probabilities) {
            let range = start..start + completion.len();
            start = range.end;
            members.push(MemberProof {
                sketches: sketches[range.clone()].to_vec(),
                logprobs: logprobs[range].to_vec(),
                eos_probability: *eos_probability,
            });
        }
        Ok(Self {
            group: message.group,
            weights: message.weights,
            prompt_sketches,
            members,
            compute: Duration::from_micros(message.compute_us),
        })
    }
}

/// Whole rollouts to recompute, as a validator does.
#[derive(Debug, Clone, PartialEq)]
pub struct VerifyJob {
    pub weights: WeightsHash,
    /// At least one.
    pub rows: Vec<RowJob>,
}

/// One rollout of a [`VerifyJob`].
#[derive(Debug, Clone, PartialEq)]
pub struct RowJob {
    /// Prompt and completion.
    pub tokens: Vec<TokenId>,
    /// In `0..tokens.len()`.
    pub prompt_length: u32,
    /// The row's own beacon as bytes.
    pub randomness: Vec<u8>,
    pub temperature: f64,
    pub repetition_penalty: f64,
    pub eos_token: TokenId,
}

/// What a verifier needs of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct RowFacts {
    /// Sketches of all positions.
    pub sketches: Vec<u32>,
    /// Logprobs of the completion positions.
    pub logprobs: Vec<f32>,
    /// Probability of the EOS token in the logits row `len − 2`, in the model's dtype.
    pub eos_probability: f32,
    /// Probabilities of the chosen completion tokens after repetition penalty and temperature.
    pub chosen_probabilities: Vec<f32>,
}

impl RowJob {
    /// Tokens after the prompt.
    #[must_use]
    pub fn completion_tokens(&self) -> usize {
        self.tokens.len().saturating_sub(usize::try_from(self.prompt_length).unwrap_or(usize::MAX))
    }
}

impl VerifyJob {
    /// The message.
    #[must_use]
    pub fn to_request(&self, id: RequestId, epoch: Epoch) -> VerifyRequest {
        let rows = self
            .rows
            .iter()
            .map(|row| VerifyRow {
                tokens: bulk::tokens_to_bytes(&row.tokens),
                prompt_length: row.prompt_length,
                randomness: row.randomness.clone(),
                temperature: row.temperature,
                repetition_penalty: row.repetition_penalty,
                eos_token: row.eos_token,
            })
            .collect();
        VerifyRequest { id, epoch, weights: self.weights, rows }
    }

    /// The job of a message.
    ///
    /// # Errors
    /// [`ShapeError`] if there is no row, tokens are no whole ids, or a prompt length is not inside its row.
    pub fn from_request(request: &VerifyRequest) -> Result<Self, ShapeError> {
        if request.rows.is_empty() {
            return Err(ShapeError::Empty { field: "rows" });
        }
        let rows = request
            .rows
            .iter()
            .map(|row| {
                let tokens = tokens("tokens", &row.tokens)?;
                let prompt = usize::try_from(row.prompt_length).unwrap_or(usize::MAX);
                if prompt >= tokens.len() {
                    return Err(ShapeError::PromptLength { prompt_length: row.prompt_length, tokens: tokens.len() });
                }
                Ok(RowJob {
                    tokens,
                    prompt_length: row.prompt_length,
                    randomness: row.randomness.clone(),
                    temperature: row.temperature,
                    repetition_penalty: row.repetition_penalty,
                    eos_token: row.eos_token,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { weights: request.weights, rows })
    }
}

impl RowFacts {
    /// The message.
    #[must_use]
    pub fn to_message(&self) -> VerifiedRow {
        VerifiedRow {
            sketches: bulk::u32_to_bytes(&self.sketches),
            logprobs: bulk::f32_to_bytes(&self.logprobs),
            eos_probability: self.eos_probability,
            chosen_probabilities: bulk::f32_to_bytes(&self.chosen_probabilities),
        }
    }

    /// The rows of a message that answers `job`.
    ///
    /// # Errors
    /// [`ShapeError`] if it was made with other weights or is of another shape than the job.
    pub fn from_message(message: &Verified, job: &VerifyJob) -> Result<Vec<Self>, ShapeError> {
        check_weights(message.weights, job.weights)?;
        check_length("rows", message.rows.len(), job.rows.len())?;
        message
            .rows
            .iter()
            .zip(&job.rows)
            .map(|(row, asked)| {
                let completion = asked.completion_tokens();
                Ok(Self {
                    sketches: sketches("sketches", &row.sketches, asked.tokens.len())?,
                    logprobs: floats("logprobs", &row.logprobs, completion)?,
                    eos_probability: row.eos_probability,
                    chosen_probabilities: floats("chosen_probabilities", &row.chosen_probabilities, completion)?,
                })
            })
            .collect()
    }
}

fn check_weights(found: WeightsHash, expected: WeightsHash) -> Result<(), ShapeError> {
    if found == expected { Ok(()) } else { Err(ShapeError::Weights { found, expected }) }
}

fn check_length(field: &'static str, found: usize, expected: usize) -> Result<(), ShapeError> {
    if found == expected { Ok(()) } else { Err(ShapeError::Length { field, found, expected }) }
}

fn tokens(field: &'static str, bytes: &[u8]) -> Result<Vec<TokenId>, ShapeError> {
    bulk::tokens_from_bytes(bytes).map_err(|source| ShapeError::Bulk { field, source })
}

fn sketches(field: &'static str, bytes: &[u8], expected: usize) -> Result<Vec<u32>, ShapeError> {
    let values = bulk::u32_from_bytes(bytes).map_err(|source| ShapeError::Bulk { field, source })?;
    check_length(field, values.len(), expected)?;
    Ok(values)
}

fn floats(field: &'static str, bytes: &[u8], expected: usize) -> Result<Vec<f32>, ShapeError> {
    let values = bulk::f32_from_bytes(bytes).map_err(|source| ShapeError::Bulk { field, source })?;
    check_length(field, values.len(), expected)?;
    Ok(values)
}

/// Which weights a worker should have, and the ways to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReloadOrder {
    pub checkpoint: CheckpointWindow,
    /// Folder of the full checkpoint.
    pub folder: PathBuf,
    pub weights: WeightsHash,
    /// Checksum of every tensor of the files; without any the worker hashes the files.
    pub checksums: Vec<TensorChecksum>,
    /// Ways from other weights, each from its base to the base of the next, the last to `weights`.
    pub changes: Vec<ChangeSet>,
    /// Whether the folder is read even if the weights are there already.
    pub anew: bool,
}

impl ReloadOrder {
    /// The order to read `folder`.
    #[must_use]
    pub fn from_folder(checkpoint: CheckpointWindow, folder: impl Into<PathBuf>, weights: WeightsHash) -> Self {
        Self { checkpoint, folder: folder.into(), weights, checksums: Vec::new(), changes: Vec::new(), anew: false }
    }

    /// The message that asks for it.
    #[must_use]
    pub fn to_command(&self, id: RequestId, epoch: Epoch) -> ReloadCommand {
        ReloadCommand {
            id,
            epoch,
            checkpoint: self.checkpoint,
            folder: self.folder.to_string_lossy().into_owned(),
            weights: self.weights,
            checksums: self.checksums.clone(),
            changes: self.changes.clone(),
            anew: self.anew,
        }
    }

    /// Reads the message.
    #[must_use]
    pub fn from_command(command: &ReloadCommand) -> Self {
        Self {
            checkpoint: command.checkpoint,
            folder: PathBuf::from(&command.folder),
            weights: command.weights,
            checksums: command.checksums.clone(),
            changes: command.changes.clone(),
            anew: command.anew,
        }
    }
}
