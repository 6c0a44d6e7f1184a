//! Judges a window file as a validator does: gathers what only a model, a tokenizer and an environment can say, and hands it
//! to the pure validator of `grail_protocol::validation`.

pub mod context;
pub mod shares;
pub mod table;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use grail_environments::datasets::DatasetSettings;
use grail_environments::{Environment, EnvironmentId, EvaluatorError, Split, ThinkingMode, Unevaluable, prompt_ids};
use grail_ipc::jobs::{RowJob, VerifyJob};
use grail_ipc::messages::Severity;
use grail_ipc::{RequestError, WorkerClient};
use grail_protocol::ids::TokenId;
use grail_protocol::randomness::ChallengeRandomness;
use grail_protocol::validation::{
    self, Facts, Forward, MissingFacts, NeededGroup, NeededRow, Needs, Report, RowEvaluation, RowFacts,
    ValidationContext,
};
use grail_protocol::window_file::{WindowFile, read_bytes};

use self::context::{Context, ContextError};
use self::shares::Shares;
use crate::checkpoints::{CheckpointFiles, FilesError};
use crate::environments::{EnvironmentSource, SourceError, with_rows_at};
use crate::evaluators::Evaluators;
use grail_process::with_causes;

/// Rows of one request to the worker, as many as a group has: what a validator computes at once.
const ROWS_PER_REQUEST: usize = 16;
/// Requests that the worker holds at once.
const REQUESTS_IN_FLIGHT: usize = 2;
/// Answers that are judged at once.
const EVALUATIONS_IN_FLIGHT: usize = 16;

/// A verification that came to no verdict: the context or the worker is to blame, not the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    #[error(transparent)]
    Context(#[from] ContextError),
    #[error("use the checkpoint of the context")]
    Files(#[from] FilesError),
    #[error("context names the environment")]
    Environment(#[from] grail_environments::ParseEnvironmentIdError),
    #[error("context names the split")]
    Split(#[from] grail_environments::ParseSplitError),
    #[error("context names the thinking mode")]
    ThinkingMode(#[from] grail_environments::ParseThinkingModeError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("recompute rows {first}..={last} on the proof worker")]
    Worker { first: usize, last: usize, source: RequestError },
    #[error("judge row {row}: nothing is said about the file")]
    Evaluator { row: usize, source: EvaluatorError },
    #[error("judge the file")]
    Missing(#[from] MissingFacts),
    #[error("checking task failed")]
    Task(#[from] tokio::task::JoinError),
}

/// A file to judge, with all facts resolved.
#[derive(Debug)]
pub struct Verification {
    context: Context,
    dtype: &'static str,
    files: CheckpointFiles,
    environment: Arc<dyn Environment>,
    source: Arc<EnvironmentSource>,
    thinking: ThinkingMode,
}

/// Rows of data sets for the files that are judged, each read once.
#[derive(Debug)]
pub struct RowSources {
    datasets: DatasetSettings,
    evaluators: Arc<Evaluators>,
    open: HashMap<(EnvironmentId, Option<PathBuf>), Arc<EnvironmentSource>>,
}

impl RowSources {
    /// Rows that no context names are looked for where `datasets` say; `evaluators` judge answers.
    #[must_use]
    pub fn new(datasets: DatasetSettings, evaluators: Arc<Evaluators>) -> Self {
        Self { datasets, evaluators, open: HashMap::new() }
    }

    fn of(&mut self, environment: EnvironmentId, rows: Option<&Path>) -> Arc<EnvironmentSource> {
        let source = self.open.entry((environment, rows.map(Path::to_owned))).or_insert_with(|| {
            let datasets = match rows {
                Some(rows) => with_rows_at(self.datasets.clone(), environment, rows),
                None => self.datasets.clone(),
            };
            Arc::new(EnvironmentSource::new(datasets, self.evaluators.clone()))
        });
        source.clone()
    }
}

/// A verdict with what belongs to it.
#[derive(Debug, serde::Serialize)]
pub struct Verified {
    pub report: Report,
    /// `None` if the file could not be read.
    pub shares: Option<Shares>,
}

impl Verification {
    /// Resolves everything that `context` names.
    ///
    /// # Errors
    /// [`VerifyError`] if a named file cannot be used or contradicts the context.
    pub async fn open(context: Context, context_path: &Path, sources: &mut RowSources) -> Result<Self, VerifyError> {
        let dtype = context::dtype_of(&context, context_path)?;
        context::check_rows(&context, context_path)?;
        let model_dir = context.model_dir.clone();
        let files = tokio::task::spawn_blocking(move || CheckpointFiles::read(&model_dir)).await??;
        let environment: EnvironmentId = context.env_id.parse()?;
        let split = Split::resolve(environment, context.split())?;
        let thinking: ThinkingMode = context.thinking_mode.parse()?;
        let source = sources.of(environment, context.dataset_rows.as_deref());
        let environment = source.open_without_evaluators(environment, split).await?;
        context::check_contradictions(&context, context_path, &files)?;
        Ok(Self { context, dtype, files, environment, source, thinking })
    }

    /// Folder of the checkpoint that the worker must hold.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// The precision in which the file is judged.
    #[must_use]
    pub const fn dtype(&self) -> &'static str {
        self.dtype
    }

    /// Judges `content`. `worker` starts a proof worker; it is only asked for if a row needs one.
    ///
    /// # Errors
    /// [`VerifyError`]; a bad file is no error but a verdict.
    pub async fn run<W, F, E>(&self, content: Bytes, challenge: ChallengeRandomness, worker: W) -> Result<Verified, E>
    where
        W: FnOnce() -> F,
        F: Future<Output = Result<Arc<WorkerClient>, E>>,
        E: From<VerifyError>,
    {
        let file = match read_bytes(content) {
            Ok(file) => Arc::new(file),
            Err(error) => return Ok(Verified { report: Report::of_read_error(&error), shares: None }),
        };
        let context = Arc::new(self.validation_context(challenge));
        let needs = {
            let (file, context) = (file.clone(), context.clone());
            tokio::task::spawn_blocking(move || validation::needs(&file, &context)).await.map_err(VerifyError::from)?
        };
        let facts = if needs.rows.is_empty() {
            Facts::default()
        } else {
            let worker = worker().await?;
            self.facts(&needs, &worker).await?
        };
        let eos = self.files.eos_token;
        let verified = tokio::task::spawn_blocking(move || judge(&file, &context, &facts, eos)).await;
        Ok(verified.map_err(VerifyError::from)??)
    }

    fn validation_context(&self, challenge: ChallengeRandomness) -> ValidationContext {
        let context = &self.context;
        ValidationContext {
            hotkey: context.hotkey.clone(),
            window: context.window,
            window_hash: context.window_hash.clone(),
            checkpoint_window: Some(context.checkpoint_window),
            max_tokens: Some(context.generation_params.max_tokens),
            eos_token: Some(context.eos_token_id.unwrap_or(self.files.eos_token)),
            vocab_size: u32::try_from(context.vocab_size.unwrap_or(self.files.vocab_size)).unwrap_or(u32::MAX),
            max_position_embeddings: context.max_position_embeddings.unwrap_or(self.files.max_position_embeddings),
            challenge,
        }
    }

    async fn facts(&self, needs: &Needs, worker: &Arc<WorkerClient>) -> Result<Facts, VerifyError> {
        let prompts = needs.groups.iter().map(|needed| (needed.group, self.prompt(needed))).collect();
        self.source.start_evaluators(self.environment.id()).await?;
        let evaluations = stream::iter(needs.rows.iter().map(|needed| self.evaluate(needed)))
            .buffered(EVALUATIONS_IN_FLIGHT)
            .try_collect::<Vec<_>>();
        let (forwards, evaluations) = futures::try_join!(self.forwards(&needs.rows, worker), evaluations)?;
        let facts = forwards.into_iter().zip(evaluations);
        let facts = facts.map(|(forward, evaluation)| RowFacts { forward, evaluation });
        let rows = needs.rows.iter().map(|needed| needed.row).zip(facts).collect();
        Ok(Facts { prompts, rows })
    }

    fn prompt(&self, needed: &NeededGroup) -> Result<Vec<TokenId>, String> {
        let task = self.environment.task(needed.seed).map_err(|error| with_causes(&error))?;
        prompt_ids(&task, self.thinking, &self.files.tokenizer, &self.files.template)
            .map_err(|error| with_causes(&error))
    }

    /// Reward and success of a row, or why it has none. A sandbox that fails says nothing about the row.
    async fn evaluate(&self, needed: &NeededRow) -> Result<Result<RowEvaluation, String>, VerifyError> {
        let decoded = || {
            let task = self.environment.task(needed.seed).map_err(|error| with_causes(&error))?;
            let completion = needed.tokens.get(needed.prompt_length..).unwrap_or_default();
            let text = self.files.tokenizer.decode(completion).map_err(|error| with_causes(&error))?;
            Ok((task, text))
        };
        let (task, text) = match decoded() {
            Ok(decoded) => decoded,
            Err(note) => return Ok(Err(note)),
        };
        match self.environment.evaluate(&task, &text, self.thinking).await {
            Ok(evaluation) => Ok(Ok(RowEvaluation { reward: evaluation.reward, success: evaluation.success })),
            Err(Unevaluable::Evaluator { source: source @ EvaluatorError::Sandbox { .. }, .. }) => {
                Err(VerifyError::Evaluator { row: needed.row, source })
            }
            Err(error) => Ok(Err(with_causes(&error))),
        }
    }

    /// Forward passes of all rows in their order.
    async fn forwards(
        &self,
        rows: &[NeededRow],
        worker: &Arc<WorkerClient>,
    ) -> Result<Vec<Result<Forward, String>>, VerifyError> {
        let requests = rows.chunks(ROWS_PER_REQUEST).map(|chunk| self.forward_chunk(chunk, worker));
        let answers: Vec<_> = stream::iter(requests).buffered(REQUESTS_IN_FLIGHT).collect().await;
        let mut forwards = Vec::with_capacity(rows.len());
        for answer in answers {
            forwards.extend(answer?);
        }
        Ok(forwards)
    }

    async fn forward_chunk(
        &self,
        rows: &[NeededRow],
        worker: &Arc<WorkerClient>,
    ) -> Result<Vec<Result<Forward, String>>, VerifyError> {
        match self.ask(rows, worker).await {
            Ok(forwards) => Ok(forwards.into_iter().map(Ok).collect()),
            // One row that the model cannot take must not hide the others: ask for each alone.
            Err(error) if error.severity() == Severity::FatalForGroup && rows.len() > 1 => {
                let mut forwards = Vec::with_capacity(rows.len());
                for row in rows {
                    forwards.extend(Box::pin(self.forward_chunk(std::slice::from_ref(row), worker)).await?);
                }
                Ok(forwards)
            }
            Err(error) if error.severity() == Severity::FatalForGroup => Ok(vec![Err(with_causes(&error))]),
            Err(source) => {
                let (first, last) = (rows.first().map_or(0, |row| row.row), rows.last().map_or(0, |row| row.row));
                Err(VerifyError::Worker { first, last, source })
            }
        }
    }

    async fn ask(&self, rows: &[NeededRow], worker: &WorkerClient) -> Result<Vec<Forward>, RequestError> {
        let sampling = &self.context.generation_params;
        let row = |needed: &NeededRow| RowJob {
            tokens: needed.tokens.clone(),
            prompt_length: u32::try_from(needed.prompt_length).unwrap_or(u32::MAX),
            randomness: needed.randomness.clone(),
            temperature: sampling.temperature,
            repetition_penalty: sampling.repetition_penalty,
            eos_token: self.context.eos_token_id.unwrap_or(self.files.eos_token),
        };
        let Some(weights) = worker.hello().weights else {
            return Err(RequestError::WrongKind { found: "a hello without weights".to_owned() });
        };
        let job = VerifyJob { weights, rows: rows.iter().map(row).collect() };
        let facts = worker.verify(&job).await?;
        Ok(facts
            .into_iter()
            .map(|facts| Forward {
                sketches: facts.sketches,
                logprobs: facts.logprobs,
                eos_probability: facts.eos_probability,
                chosen_probabilities: facts.chosen_probabilities,
            })
            .collect())
    }
}

fn judge(
    file: &WindowFile,
    context: &ValidationContext,
    facts: &Facts,
    eos_token: TokenId,
) -> Result<Verified, VerifyError> {
    let report = validation::validate(file, context, facts)?;
    let shares = shares::of(file, &report, eos_token);
    Ok(Verified { report, shares: Some(shares) })
}
