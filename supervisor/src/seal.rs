//! From signed groups to the window file, and the last look at it before it leaves the house.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use bytes::Bytes;
use grail_ipc::bulk::{self, BulkError};
use grail_protocol::ids::{RolloutIndex, TokenId};
use grail_protocol::randomness::ChallengeRandomness;
use grail_protocol::validation::{CheapCheck, Problem, ProofOutput, ValidationContext, cheap_checks};
use grail_protocol::window_file::{Commit, Header, ReadError, Rollout, Row, WriteError, read_bytes, write_file};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::durable;
use crate::group::WindowParts;
use crate::spool::{SpooledGroup, SpooledRollout};
use crate::verify::context::{Context, ContextSampling, relative_to};

/// Bytes of the file per token of a rollout: sketch text, logprob and id after compression, measured at about 10.
const FILE_BYTES_PER_TOKEN: u64 = 12;

/// A window that cannot be sealed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    #[error("write the window file")]
    Write(#[from] WriteError),
    #[error("read the window file back")]
    ReadBack(#[from] ReadError),
    #[error("the window file would be refused: {0}")]
    Refused(Problem),
    #[error("keep a copy of the window file as {}: free space and start again", path.display())]
    Keep { path: PathBuf, source: std::io::Error },
}

/// A window file in memory that has passed every check which needs no model.
#[derive(Debug, Clone)]
pub struct Sealed {
    pub content: Bytes,
    /// The groups in it, ascending.
    pub groups: Vec<SpooledGroup>,
    /// SHA-256 of the content, lower-case hex.
    pub sha256: String,
}

/// What a group will add to the file, roughly.
#[must_use]
pub fn estimated_bytes(group: &SpooledGroup) -> u64 {
    let prompt = group.prompt.len() as u64;
    let bytes: u64 = group.rollouts.iter().map(|rollout| prompt + rollout.completion.len() as u64).sum();
    bytes / size_of::<TokenId>() as u64 * FILE_BYTES_PER_TOKEN
}

/// Writes the file of `groups`, reads it back and checks it. A group that a validator would refuse is left out and reported: one
/// wrong row would void the whole file.
///
/// # Errors
/// [`SealError`]; the spool is untouched.
pub fn seal(mut groups: Vec<SpooledGroup>, parts: &WindowParts) -> Result<Sealed, SealError> {
    groups.sort_by_key(|group| group.group);
    loop {
        let unpacked: Vec<Option<Unpacked>> = groups.par_iter().map(unpack).collect();
        let mut is_sound = unpacked.iter().map(Option::is_some);
        groups.retain(|_| is_sound.next().unwrap_or(false));
        let unpacked: Vec<Unpacked> = unpacked.into_iter().flatten().collect();
        let content = write(&groups, &unpacked, parts)?;
        let problems = check(content.clone(), &groups, &unpacked, parts)?;
        if problems.is_empty() {
            let sha256 = hex::encode(Sha256::digest(&content));
            return Ok(Sealed { content, groups, sha256 });
        }
        let before = groups.len();
        groups.retain(|group| {
            let problem = problems.iter().find(|problem| group_of(problem) == Some(group.group.0));
            if let Some(problem) = problem {
                tracing::error!(group = %group.group, %problem, "A group fails the checks before upload and is left out.");
            }
            problem.is_none()
        });
        if groups.len() == before {
            return Err(SealError::Refused(problems[0].clone()));
        }
    }
}

/// The group's arrays; a group whose record is damaged is left out, because the others must go out.
fn unpack(group: &SpooledGroup) -> Option<Unpacked> {
    let unpacked = Unpacked::new(group);
    let report = |error: &BulkError| tracing::error!(group = %group.group, %error, "A damaged group is left out.");
    unpacked.inspect_err(report).ok()
}

fn group_of(problem: &Problem) -> Option<i64> {
    match problem {
        Problem::Row { group, .. } => *group,
        Problem::Group { group, .. } => Some(*group),
        _ => None,
    }
}

/// A spooled group with its arrays as numbers.
#[derive(Debug)]
struct Unpacked {
    prompt: Vec<TokenId>,
    rollouts: Vec<UnpackedRollout>,
}

#[derive(Debug)]
struct UnpackedRollout {
    completion: Vec<TokenId>,
    /// Of all positions, the prompt's first.
    sketches: Vec<u32>,
    logprobs: Vec<f32>,
    eos_probability: f32,
}

impl Unpacked {
    fn new(group: &SpooledGroup) -> Result<Self, BulkError> {
        let prompt_sketches = bulk::u32_from_bytes(&group.prompt_sketches)?;
        let rollout = |spooled: &SpooledRollout| {
            let sketches = bulk::u32_from_bytes(&spooled.sketches)?;
            Ok(UnpackedRollout {
                completion: bulk::tokens_from_bytes(&spooled.completion)?,
                sketches: [&prompt_sketches[..], &sketches].concat(),
                logprobs: bulk::f32_from_bytes(&spooled.logprobs)?,
                eos_probability: spooled.eos_probability,
            })
        };
        let rollouts = group.rollouts.iter().map(rollout).collect::<Result<_, _>>()?;
        Ok(Self { prompt: bulk::tokens_from_bytes(&group.prompt)?, rollouts })
    }
}

fn write(groups: &[SpooledGroup], unpacked: &[Unpacked], parts: &WindowParts) -> Result<Bytes, SealError> {
    let timestamp = parts.clock.now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let rows: Vec<Row> = groups
        .par_iter()
        .zip(unpacked)
        .flat_map_iter(|(group, unpacked)| rows(group, unpacked, parts, timestamp))
        .collect();
    let header = Header { wallet: parts.plan.hotkey.clone(), window: parts.plan.window, timestamp };
    Ok(write_file(Vec::new(), header, &rows)?.into())
}

fn rows<'a>(
    group: &'a SpooledGroup,
    unpacked: &'a Unpacked,
    parts: &'a WindowParts,
    timestamp: f64,
) -> impl Iterator<Item = Row> + 'a {
    let plan = &parts.plan;
    let rollouts = group.rollouts.iter().zip(&unpacked.rollouts);
    RolloutIndex::all().zip(rollouts).map(move |(rollout, (spooled, numbers))| Row {
        window: plan.window,
        block: group.block,
        block_hash: plan.window_hash.clone(),
        use_drand: plan.use_drand,
        group: group.group,
        rollout,
        checkpoint: plan.checkpoint,
        commit: Commit {
            tokens: [&unpacked.prompt[..], &numbers.completion].concat(),
            sketches: numbers.sketches.clone(),
            model_name: plan.model_name.clone(),
            signature: hex::encode(&spooled.commit_signature),
            randomness: plan.randomness.clone(),
            rollout: Rollout {
                total_reward: spooled.reward,
                advantage: spooled.advantage,
                success: spooled.success,
                completion_logprobs: numbers.logprobs.clone(),
                prompt_length: u32::try_from(unpacked.prompt.len()).unwrap_or(u32::MAX),
            },
        },
        timestamp,
        hotkey: plan.hotkey.clone(),
        signature: hex::encode(&spooled.row_signature),
    })
}

fn check(
    content: Bytes,
    groups: &[SpooledGroup],
    unpacked: &[Unpacked],
    parts: &WindowParts,
) -> Result<Vec<Problem>, SealError> {
    let plan = &parts.plan;
    let file = read_bytes(content)?;
    let context = ValidationContext {
        hotkey: plan.hotkey.clone(),
        window: plan.window,
        window_hash: plan.window_hash.clone(),
        checkpoint_window: Some(plan.checkpoint),
        max_tokens: i64::try_from(plan.sampling.max_tokens).ok(),
        eos_token: Some(parts.eos_token),
        vocab_size: u32::try_from(parts.vocab_size).unwrap_or(u32::MAX),
        max_position_embeddings: parts.max_position_embeddings,
        // Nothing is sampled here, so any value does.
        challenge: ChallengeRandomness::from_bytes(&[0; 32]),
    };
    let prompts: HashMap<_, _> =
        groups.iter().zip(unpacked).map(|(group, unpacked)| (group.group, unpacked.prompt.clone())).collect();
    let proofs: Vec<&UnpackedRollout> = unpacked.iter().flat_map(|group| &group.rollouts).collect();
    let proof = |row: usize| {
        proofs.get(row).map(|rollout| ProofOutput {
            sketches: &rollout.sketches,
            logprobs: &rollout.logprobs,
            eos_probability: rollout.eos_probability,
        })
    };
    Ok(cheap_checks(&file, &CheapCheck { context: &context, prompts: &prompts, proof: &proof }))
}

/// Where the copy of a window's file is kept in `folder`.
#[must_use]
pub fn copy_path(folder: &Path, parts: &WindowParts) -> PathBuf {
    folder.join(format!("{}-window-{}.parquet", parts.plan.hotkey, parts.plan.window))
}

/// Keeps the file beside its context in `folder`, where `verify` finds both.
///
/// # Errors
/// If the disk refuses.
pub fn keep_copy(folder: &Path, parts: &WindowParts, content: &Bytes) -> Result<PathBuf, SealError> {
    let path = copy_path(folder, parts);
    let keep = |source| SealError::Keep { path: path.clone(), source };
    std::fs::create_dir_all(folder).map_err(keep)?;
    durable::write(&path, content).map_err(keep)?;
    durable::write_json(&Context::path_beside(&path), &context(folder, parts)).map_err(keep)?;
    Ok(path)
}

fn context(folder: &Path, parts: &WindowParts) -> Context {
    let plan = &parts.plan;
    let sampling = &plan.sampling;
    Context {
        hotkey: plan.hotkey.clone(),
        window: plan.window,
        window_hash: plan.window_hash.clone(),
        checkpoint_window: plan.checkpoint,
        model_dir: relative_to(folder, &plan.model_dir),
        dtype: plan.dtype.to_owned(),
        env_id: plan.environment.to_string(),
        env_params: [("split".to_owned(), plan.split.to_string().into())].into(),
        dataset_rows: plan.dataset_rows.as_deref().map(|rows| relative_to(folder, rows)),
        generation_params: ContextSampling {
            max_tokens: i64::try_from(sampling.max_tokens).unwrap_or(i64::MAX),
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: i64::from(sampling.top_k),
            repetition_penalty: sampling.repetition_penalty,
        },
        thinking_mode: plan.thinking.to_string(),
        env_split: None,
        challenge_randomness: None,
        eos_token_id: Some(parts.eos_token),
        vocab_size: None,
        max_position_embeddings: None,
        model_name: Some(plan.model_name.clone()),
    }
}
