//! Proof of a group: sketches of all positions and logprobs of all completion tokens.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use grail_protocol::ids::{TokenId, WeightsHash};
use grail_protocol::sketch::SketchCoeffs;

use crate::config::ModelConfig;
use crate::cuda::engine;
use crate::device::{Device, Dtype};
use crate::error::{LoadError, ProveError};
use crate::evaluate::{BatchResult, Evaluated, Rollout, begin, check_all, evaluate};
use crate::model::{LoadOptions, Model};
use crate::running::Running;
use crate::sketch::SelectedBuckets;
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

    /// Most tokens of one packed batch: what was configured, or what the device has memory for if that is less.
    #[must_use]
    pub fn batch_tokens(&self) -> usize {
        let configured = self.model.batch_tokens();
        let engine = engine(self.model.config(), self.device(), self.dtype());
        engine.map_or(configured, |engine| engine.most_rows(configured))
    }

    /// Proves one group in packed batches of at most the model's token budget, the prompt once in each.
    ///
    /// # Errors
    /// [`ProveError::BadRequest`] for an empty completion or a token outside the vocabulary, [`ProveError::NonFinite`],
    /// [`ProveError::OutOfMemory`] when a single member does not fit, and errors of the device.
    pub fn prove(&self, input: &ProveInput<'_>) -> Result<ProveOutput, ProveError> {
        self.begin(std::slice::from_ref(input)).finish().pop().unwrap_or_else(|| Err(nothing_came()))
    }

    /// Begins to prove groups, several in one packed batch where the token budget allows it. On a GPU they are computed while the
    /// caller does something else, and what is begun later comes later; elsewhere they are proved when this returns.
    #[must_use]
    pub fn begin(&self, inputs: &[ProveInput<'_>]) -> RunningProof {
        if engine(self.model.config(), self.device(), self.dtype()).is_none() {
            // One batch for each group: a CPU gains nothing by larger ones.
            return RunningProof { groups: inputs.iter().map(|input| self.prove_now(input)).collect(), running: None };
        }
        let mut rollouts = Vec::new();
        let mut groups = Vec::with_capacity(inputs.len());
        for input in inputs {
            let (first, own) = (rollouts.len(), rollouts_of(input));
            groups.push(match own.and_then(|own| check_all(&self.model, &own).map(|()| own)) {
                Err(error) => Group::Known(Err(error)),
                Ok(own) => {
                    rollouts.extend(own);
                    Group::Members(first..rollouts.len(), *input.coefficients)
                }
            });
        }
        match begin(&self.model, &rollouts) {
            Ok(running) => RunningProof { groups, running: Some(running) },
            // One of them has no room: each on its own, so that the others are proved.
            Err(_) if inputs.len() > 1 => {
                RunningProof { groups: inputs.iter().map(|input| self.prove_now(input)).collect(), running: None }
            }
            Err(error) => RunningProof { groups: vec![Group::Known(Err(error))], running: None },
        }
    }

    fn prove_now(&self, input: &ProveInput<'_>) -> Group {
        let results = rollouts_of(input).and_then(|rollouts| evaluate(&self.model, &rollouts));
        Group::Known(results.and_then(|results| assemble(rollouts_in(results), input.coefficients)))
    }
}

fn rollouts_of<'a>(input: &ProveInput<'a>) -> Result<Vec<Rollout<'a>>, ProveError> {
    if input.completions.is_empty() {
        return Err(ProveError::BadRequest { detail: "the group has no completion".to_owned() });
    }
    let rollout = |completion| Rollout { prompt: input.prompt, completion, eos_token: input.eos_token, sampling: None };
    Ok(input.completions.iter().copied().map(rollout).collect())
}

/// A rollout that was evaluated, with the buckets of its batch.
type Found = (Result<Evaluated, ProveError>, Arc<SelectedBuckets>);

fn rollouts_in(results: Vec<BatchResult>) -> impl Iterator<Item = Found> {
    results.into_iter().flat_map(|BatchResult { buckets, rollouts, .. }| {
        let buckets = Arc::new(buckets);
        rollouts.into_iter().map(move |rollout| (rollout, Arc::clone(&buckets)))
    })
}

/// The proof of a group from its members in order.
fn assemble(members: impl Iterator<Item = Found>, coefficients: &SketchCoeffs) -> Result<ProveOutput, ProveError> {
    let mut output = ProveOutput { prompt_sketches: Vec::new(), completions: Vec::new() };
    for (rollout, buckets) in members {
        let rollout = rollout?;
        let sketches = |rows| stage(Stage::Sketch, || buckets.sketches(rows, coefficients));
        if output.completions.is_empty() {
            output.prompt_sketches = sketches(rollout.prompt_rows);
        }
        output.completions.push(CompletionProof {
            sketches: sketches(rollout.completion_rows),
            logprobs: rollout.logprobs,
            eos_probability: rollout.eos_probability,
        });
    }
    Ok(output)
}

fn nothing_came() -> ProveError {
    ProveError::BadRequest { detail: "no proof came of a group that was begun".to_owned() }
}

/// Groups that are being proved.
#[derive(Debug)]
pub struct RunningProof {
    groups: Vec<Group>,
    /// What is still on the device.
    running: Option<Running>,
}

#[derive(Debug)]
enum Group {
    Known(Result<ProveOutput, ProveError>),
    /// Its rollouts among those that are running.
    Members(Range<usize>, SketchCoeffs),
}

impl RunningProof {
    /// Whether [`RunningProof::finish`] will not wait.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.running.as_ref().is_none_or(Running::is_done)
    }

    /// Waits for the proofs, one for each group in the order in which they were given.
    ///
    /// Each of them is as [`ProofModel::prove`] would return it.
    #[must_use]
    pub fn finish(self) -> Vec<Result<ProveOutput, ProveError>> {
        let mut found = match self.running.map(Running::finish).transpose() {
            Ok(results) => rollouts_in(results.unwrap_or_default()),
            Err(error) => {
                return self.groups.into_iter().map(|group| group.unless_running(|| error.repeated())).collect();
            }
        };
        let proved = |group| match group {
            Group::Known(result) => result,
            Group::Members(range, coefficients) => {
                let first = range.start;
                // All of them are taken, so that the next group begins with its own.
                let own: Vec<Found> = found.by_ref().take(range.len()).collect();
                assemble(own.into_iter(), &coefficients).map_err(|error| error.of_members_from(first))
            }
        };
        self.groups.into_iter().map(proved).collect()
    }
}

impl Group {
    fn unless_running(self, error: impl FnOnce() -> ProveError) -> Result<ProveOutput, ProveError> {
        match self {
            Self::Known(result) => result,
            Self::Members(..) => Err(error()),
        }
    }
}
