//! Records of the window file: what a miner writes, and what a reader finds.

use super::commitments::Commitments;
use crate::constants::ROLLOUTS_PER_PROBLEM;
use crate::ids::{
    BlockHash, BlockNumber, CheckpointWindow, GroupIndex, Hotkey, Nonce, RolloutIndex, TokenId, WindowStart,
};
use crate::json::{Object, Value};
use crate::nonce::challenge_text;
use crate::randomness::MinerRandomness;

/// One rollout as a miner writes it. What follows from other fields is derived when it is written: the nonce, the challenge
/// text, `total_in_group`, and the `randomness` column, which repeats the commit's beacon.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    pub window: WindowStart,
    /// Block of the chain when the group was started.
    pub block: BlockNumber,
    /// Hash of the window's first block.
    pub block_hash: BlockHash,
    pub use_drand: bool,
    pub group: GroupIndex,
    pub rollout: RolloutIndex,
    /// Window of the checkpoint that generated and proved the row.
    pub checkpoint: CheckpointWindow,
    pub commit: Commit,
    /// Unix seconds at packaging.
    pub timestamp: f64,
    pub hotkey: Hotkey,
    /// Signature of [`Row::challenge`], 128 hexadecimal digits.
    pub signature: String,
}

impl Row {
    /// Number that is unique in the file.
    #[must_use]
    pub const fn nonce(&self) -> Nonce {
        Nonce::new(self.group, self.rollout)
    }

    /// The text that `signature` signs.
    #[must_use]
    pub fn challenge(&self) -> String {
        challenge_text(&self.block_hash, self.nonce())
    }
}

/// Tokens of one rollout with their proof. Proof version and layer index are constants and not part of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Commit {
    /// Prompt and completion.
    pub tokens: Vec<TokenId>,
    /// One sketch a token, each below `PRIME_Q`.
    pub sketches: Vec<u32>,
    /// Name of the model as the checkpoint's metadata has it; the signature binds it.
    pub model_name: String,
    /// Signature of the commit binding, 128 hexadecimal digits.
    pub signature: String,
    /// `R_m`, the beacon whose coefficients made the sketches.
    pub randomness: MinerRandomness,
    pub rollout: Rollout,
}

/// Outcome of one rollout.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    pub total_reward: f64,
    pub advantage: f64,
    pub success: bool,
    /// Log-probabilities of the completion tokens; the prompt part of the file's list is zeros.
    pub completion_logprobs: Vec<f32>,
    /// Tokens of the prompt, at most `commit.tokens.len()`.
    pub prompt_length: u32,
}

/// One row as read. `None` is a null or a missing column.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadRow {
    pub window_start: Option<i64>,
    pub block: Option<i64>,
    pub nonce: Option<i64>,
    pub block_hash: Option<String>,
    pub randomness: Option<String>,
    pub use_drand: Option<bool>,
    /// Null only if the whole column is missing: a null cell makes a file corrupt.
    pub rollout_group: Option<i64>,
    pub rollout_index: Option<i64>,
    pub total_in_group: Option<i64>,
    pub checkpoint_window: Option<i64>,
    pub commit: ReadCommit,
    pub timestamp: Option<f64>,
    pub challenge: Option<String>,
    pub hotkey: Option<String>,
    pub signature: Option<String>,
}

/// A commit as read.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadCommit {
    pub tokens: List<i32>,
    pub commitments: Commitments,
    pub proof_version: Option<String>,
    pub model_name: Option<String>,
    pub layer_index: Option<i64>,
    pub signature: Option<String>,
    /// The parsed JSON text, or null.
    pub beacon: Value,
    pub rollout: ReadRollout,
}

/// Outcome of a rollout as read.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadRollout {
    pub total_reward: Option<f64>,
    pub advantage: Option<f64>,
    pub success: Option<bool>,
    pub token_logprobs: List<f32>,
    pub prompt_length: Option<i64>,
    pub completion_length: Option<i64>,
}

/// A list column's cell: the plain case without nulls, or whatever else was found.
#[derive(Debug, Clone, PartialEq)]
pub enum List<T> {
    Plain(Vec<T>),
    /// Another element type, or nulls among the elements.
    Other(Vec<Value>),
}

impl<T> List<T> {
    /// Number of elements, nulls included.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(values) => values.len(),
            Self::Other(values) => values.len(),
        }
    }

    /// Whether the list has no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements of the plain case.
    #[must_use]
    pub fn plain(&self) -> Option<&[T]> {
        match self {
            Self::Plain(values) => Some(values),
            Self::Other(_) => None,
        }
    }
}

impl ReadCommit {
    /// `beacon["randomness"]` if it is text.
    #[must_use]
    pub fn beacon_randomness(&self) -> Option<&str> {
        self.beacon.get("randomness").and_then(Value::as_str)
    }

    /// The split point of prompt and completion as claimed, if it lies inside the sequence.
    #[must_use]
    pub fn prompt_length(&self) -> Option<usize> {
        let length = usize::try_from(self.rollout.prompt_length?).ok()?;
        (length <= self.tokens.len()).then_some(length)
    }
}

/// The row as its reader will find it, without the way through a file.
///
/// # Errors
/// [`super::WriteError::Row`] as [`super::Writer::append`].
impl TryFrom<&Row> for ReadRow {
    type Error = super::WriteError;

    fn try_from(row: &Row) -> Result<Self, Self::Error> {
        let checked = super::columns::CheckedRow::new(row)?;
        let randomness = row.commit.randomness.as_hex().to_owned();
        Ok(Self {
            window_start: Some(checked.window_start),
            block: Some(checked.block),
            nonce: Some(row.nonce().0),
            block_hash: Some(row.block_hash.0.clone()),
            randomness: Some(randomness.clone()),
            use_drand: Some(row.use_drand),
            rollout_group: Some(row.group.0),
            rollout_index: Some(i64::from(row.rollout.get())),
            total_in_group: Some(ROLLOUTS_PER_PROBLEM as i64),
            checkpoint_window: Some(checked.checkpoint_window),
            commit: ReadCommit {
                tokens: List::Plain(checked.tokens().collect()),
                commitments: Commitments::Sketches(row.commit.sketches.clone()),
                proof_version: Some(crate::constants::GRAIL_PROOF_VERSION.to_owned()),
                model_name: Some(row.commit.model_name.clone()),
                layer_index: Some(i64::from(crate::constants::LAYER_INDEX)),
                signature: Some(row.commit.signature.clone()),
                beacon: Value::from(Object::from_pairs(vec![("randomness".into(), Value::from(randomness))])),
                rollout: ReadRollout {
                    total_reward: Some(row.commit.rollout.total_reward),
                    advantage: Some(row.commit.rollout.advantage),
                    success: Some(row.commit.rollout.success),
                    token_logprobs: List::Plain(checked.token_logprobs().collect()),
                    prompt_length: Some(i64::from(checked.prompt_length)),
                    completion_length: Some(i64::from(checked.completion_length)),
                },
            },
            timestamp: Some(row.timestamp),
            challenge: Some(row.challenge()),
            hotkey: Some(row.hotkey.0.clone()),
            signature: Some(row.signature.clone()),
        })
    }
}
