//! One packed forward pass over groups of rollouts, and what proving and verifying read from it.

use grail_protocol::ids::TokenId;
use tch::{TchError, Tensor};

use crate::cuda::{Engine, engine};
use crate::error::ProveError;
use crate::logits::LogitReader;
use crate::model::Model;
use crate::packed::{PackedBatch, SegmentIndex};
use crate::running::{Part, Pending, Running};
use crate::sketch::{SelectedBuckets, SketchError};
use crate::stages::{Stage, stage};

/// One rollout to evaluate; rollouts with an equal prompt that stand side by side share its rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rollout<'a> {
    pub prompt: &'a [TokenId],
    pub completion: &'a [TokenId],
    pub eos_token: TokenId,
    /// Unset = no probabilities after sampling's transformations are wanted.
    pub sampling: Option<Sampling>,
}

/// What turns logits into the distribution that tokens are drawn from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sampling {
    pub temperature: f64,
    pub repetition_penalty: f64,
}

/// What one rollout's rows say.
#[derive(Debug)]
pub(crate) struct Evaluated {
    /// Buckets of the prompt's positions, then of the completion's: rows of the batch's selection.
    pub prompt_rows: std::ops::Range<usize>,
    pub completion_rows: std::ops::Range<usize>,
    /// By completion token.
    pub logprobs: Vec<f32>,
    pub eos_probability: f32,
    /// By completion token; empty without [`Rollout::sampling`].
    pub chosen_probabilities: Vec<f32>,
}

/// Result of one packed batch.
#[derive(Debug)]
pub(crate) struct BatchResult {
    /// Place of the batch's first rollout among all.
    pub first: usize,
    pub buckets: SelectedBuckets,
    /// By rollout of the batch; one whose hidden states or logits are not finite has none.
    pub rollouts: Vec<Result<Evaluated, ProveError>>,
}

/// Evaluates all rollouts in order, in batches of at most the model's token budget.
///
/// # Errors
/// [`ProveError`]; members are numbered as in `rollouts`.
pub(crate) fn evaluate(model: &Model, rollouts: &[Rollout<'_>]) -> Result<Vec<BatchResult>, ProveError> {
    check_all(model, rollouts)?;
    begin(model, rollouts)?.finish()
}

/// As [`evaluate`] for rollouts that were checked; on a GPU the results are still to come when it returns.
///
/// # Errors
/// As [`evaluate`].
pub(crate) fn begin(model: &Model, rollouts: &[Rollout<'_>]) -> Result<Running, ProveError> {
    let _guard = tch::no_grad_guard();
    let engine = engine(model.config(), model.device(), model.dtype());
    let budget = engine.as_ref().map_or(model.batch_tokens(), |engine| engine.most_rows(model.batch_tokens()));
    let evaluation = Evaluation { model, engine: engine.as_deref(), rollouts };
    let mut parts = Vec::new();
    let mut first = 0;
    for size in batch_sizes(rollouts, budget) {
        let end = first + size;
        evaluation.run_halving(first..end, &mut parts)?;
        first = end;
    }
    Ok(Running::new(parts))
}

/// Whether every rollout can be evaluated.
///
/// # Errors
/// [`ProveError::BadRequest`] with the number of the first that cannot.
pub(crate) fn check_all(model: &Model, rollouts: &[Rollout<'_>]) -> Result<(), ProveError> {
    rollouts.iter().enumerate().try_for_each(|(member, rollout)| check(model, member, rollout))
}

fn check(model: &Model, member: usize, rollout: &Rollout<'_>) -> Result<(), ProveError> {
    let bad = |detail: String| Err(ProveError::BadRequest { detail: format!("member {member}: {detail}") });
    if rollout.completion.is_empty() {
        return bad("the completion is empty".to_owned());
    }
    let unknown = |tokens| model.unknown_token(tokens);
    let eos = std::slice::from_ref(&rollout.eos_token);
    if let Some(token) = unknown(rollout.prompt).or_else(|| unknown(rollout.completion)).or_else(|| unknown(eos)) {
        return bad(format!("token {token} is outside the vocabulary of {}", model.config().vocab_size));
    }
    match rollout.sampling {
        Some(Sampling { temperature, repetition_penalty })
            if !(temperature.is_finite()
                && temperature > 0.0
                && repetition_penalty.is_finite()
                && repetition_penalty > 0.0) =>
        {
            bad(format!("temperature {temperature} and repetition penalty {repetition_penalty} must be positive"))
        }
        _ => Ok(()),
    }
}

/// Numbers of consecutive rollouts that go into one batch each.
fn batch_sizes(rollouts: &[Rollout<'_>], budget: usize) -> Vec<usize> {
    let mut sizes = Vec::new();
    let (mut size, mut tokens) = (0, 0);
    for (index, rollout) in rollouts.iter().enumerate() {
        let shares = size > 0 && rollouts.get(index - 1).is_some_and(|before| before.prompt == rollout.prompt);
        let more = rollout.completion.len() + if shares { 0 } else { rollout.prompt.len() };
        if size > 0 && tokens + more > budget {
            sizes.push(size);
            (size, tokens) = (1, rollout.prompt.len() + rollout.completion.len());
        } else {
            (size, tokens) = (size + 1, tokens + more);
        }
    }
    if size > 0 {
        sizes.push(size);
    }
    sizes
}

struct Evaluation<'a> {
    model: &'a Model,
    engine: Option<&'a Engine>,
    rollouts: &'a [Rollout<'a>],
}

impl Evaluation<'_> {
    /// One batch; in two halves if the device has no memory for it, down to one rollout.
    fn run_halving(&self, range: std::ops::Range<usize>, parts: &mut Vec<Part>) -> Result<(), ProveError> {
        let members = self.rollouts.get(range.clone()).unwrap_or_default();
        let pack = Pack::new(members);
        let rows = pack.batch.len();
        let result = match self.engine {
            Some(engine) => pack.launch(self.model, engine, range.start).map(Part::OnDevice),
            None => pack.run(self.model, range.start).map(Part::Done),
        };
        match result {
            Ok(part) => {
                parts.push(part);
                if let Some(engine) = self.engine {
                    engine.note_success(rows, self.model.batch_tokens());
                }
            }
            Err(ProveError::OutOfMemory { tokens, detail }) if members.len() > 1 => {
                tracing::warn!(
                    tokens,
                    members = members.len(),
                    error = detail,
                    "Out of device memory; halving the batch."
                );
                if let Some(engine) = self.engine {
                    engine.halve(tokens);
                }
                let middle = range.start + members.len() / 2;
                self.run_halving(range.start..middle, parts)?;
                self.run_halving(middle..range.end, parts)?;
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// A batch and where each rollout's segments are.
struct Pack<'a> {
    members: &'a [Rollout<'a>],
    batch: PackedBatch,
    /// By member: its prompt's segment (none if empty) and its completion's.
    places: Vec<(Option<SegmentIndex>, SegmentIndex)>,
}

impl<'a> Pack<'a> {
    fn new(members: &'a [Rollout<'a>]) -> Self {
        let mut batch = PackedBatch::new();
        let mut places: Vec<(Option<SegmentIndex>, SegmentIndex)> = Vec::with_capacity(members.len());
        let mut last: Option<&Rollout<'_>> = None;
        for member in members {
            let shared = last.filter(|before| before.prompt == member.prompt).and(places.last()).map(|place| place.0);
            let prompt =
                shared.unwrap_or_else(|| (!member.prompt.is_empty()).then(|| batch.push_sequence(member.prompt)));
            let completion = match prompt {
                Some(prompt) => batch.push_continuation(prompt, member.completion),
                None => batch.push_sequence(member.completion),
            };
            places.push((prompt, completion));
            last = Some(member);
        }
        Self { members, batch, places }
    }

    fn run(&self, model: &Model, first: usize) -> Result<BatchResult, ProveError> {
        let torch = |error| ProveError::classify(error, self.batch.len());
        let hidden = model.network().hidden(&self.batch).map_err(torch)?;
        let buckets = stage(Stage::Sketch, || SelectedBuckets::of(&hidden)).map_err(|error| match error {
            SketchError::NonFinite { row } => self.non_finite(row, first),
            SketchError::Torch(error) => torch(error),
        })?;
        let rollouts = stage(Stage::Head, || self.read(model, &hidden)).map_err(torch)?;
        Ok(BatchResult { first, buckets, rollouts: rollouts.into_iter().map(Ok).collect() })
    }

    /// Has a GPU's engine compute the batch, without waiting for it unless sampling's probabilities are wanted.
    fn launch(&self, model: &Model, engine: &Engine, first: usize) -> Result<Pending, ProveError> {
        let torch = |error| ProveError::classify(error, self.batch.len());
        let mut pending = Pending::new(first, self.batch.len());
        for (member, place) in self.members.iter().zip(&self.places) {
            let rows = self.logit_rows(*place);
            let segments = (place.0.map(|prompt| self.batch.segment(prompt)), self.batch.segment(place.1));
            pending.push(member, segments, &rows);
        }
        let chosen = |hidden: &Tensor| {
            let reader = LogitReader { model, hidden };
            let sampled = self.members.iter().zip(&self.places).map(|(member, place)| match member.sampling {
                None => Ok(Vec::new()),
                Some(sampling) => reader.chosen_probabilities(member, &self.logit_rows(*place), sampling),
            });
            stage(Stage::Head, || sampled.collect::<Result<Vec<_>, _>>())
        };
        let launched = engine.launch(model.network(), &self.batch, pending.predictions(), chosen).map_err(torch)?;
        Ok(pending.launched(launched))
    }

    /// Names the member and its position that row `row` of the batch belongs to.
    fn non_finite(&self, row: usize, first: usize) -> ProveError {
        for (member, (prompt, completion)) in self.places.iter().enumerate() {
            let prompt = prompt.map(|index| self.batch.segment(index).rows.clone()).unwrap_or_default();
            let completion = &self.batch.segment(*completion).rows;
            if prompt.contains(&row) {
                return ProveError::NonFinite { member: first + member, position: row - prompt.start };
            }
            if completion.contains(&row) {
                return ProveError::NonFinite {
                    member: first + member,
                    position: prompt.len() + row - completion.start,
                };
            }
        }
        ProveError::NonFinite { member: first, position: row }
    }

    /// Rows of the batch whose logits say the member's completion tokens; the row of the first is the prompt's last, and
    /// missing if there is no prompt.
    fn logit_rows(&self, (prompt, completion): (Option<SegmentIndex>, SegmentIndex)) -> Vec<i64> {
        let completion = &self.batch.segment(completion).rows;
        let before = prompt.map(|prompt| self.batch.segment(prompt).rows.end - 1);
        before.into_iter().chain(completion.start..completion.end - 1).map(|row| row as i64).collect()
    }

    fn read(&self, model: &Model, hidden: &Tensor) -> Result<Vec<Evaluated>, TchError> {
        let rows: Vec<Vec<i64>> = self.places.iter().map(|place| self.logit_rows(*place)).collect();
        let reader = LogitReader { model, hidden };
        let eos = reader.eos_probabilities(self.members, &rows)?;
        let logprobs = reader.logprobs(self.members, &rows)?;
        let mut evaluated = Vec::with_capacity(self.members.len());
        let parts = self.members.iter().zip(&self.places).zip(rows.iter().zip(logprobs).zip(eos));
        for ((member, (prompt, completion)), ((rows, logprobs), eos_probability)) in parts {
            let chosen_probabilities = match member.sampling {
                None => Vec::new(),
                Some(sampling) => reader.chosen_probabilities(member, rows, sampling)?,
            };
            evaluated.push(Evaluated {
                prompt_rows: prompt.map(|index| self.batch.segment(index).rows.clone()).unwrap_or_default(),
                completion_rows: self.batch.segment(*completion).rows.clone(),
                logprobs: after_missing_row(member.prompt.is_empty(), logprobs, f32::NEG_INFINITY),
                eos_probability,
                chosen_probabilities,
            });
        }
        Ok(evaluated)
    }
}

/// Puts `value` where a completion token has no logits row: the first token of a sequence without a prompt.
pub(crate) fn after_missing_row(has_no_prompt: bool, mut values: Vec<f32>, value: f32) -> Vec<f32> {
    if has_no_prompt {
        values.insert(0, value);
    }
    values
}

/// Tokens whose probability the member's logits rows give, in order.
pub(crate) fn targets(member: &Rollout<'_>) -> impl Iterator<Item = i64> {
    member.completion.iter().skip(usize::from(member.prompt.is_empty())).map(|token| i64::from(token.0))
}
