//! One packed forward pass over groups of rollouts, and what proving and verifying read from it.

use grail_protocol::ids::TokenId;
use tch::{Kind, TchError, Tensor};

use crate::device::Device;
use crate::error::ProveError;
use crate::model::{Model, host_f32};
use crate::packed::{PackedBatch, SegmentIndex};
use crate::sketch::{SelectedBuckets, SketchError};
use crate::stages::{Stage, stage};

/// Logits made at once on a GPU, in elements: bounds the memory of the output matrix's product and of its f32 copy.
const GPU_LOGIT_ELEMENTS: usize = 1 << 26;
/// The same on a CPU: a few megabytes stay in the cache.
const CPU_LOGIT_ELEMENTS: usize = 1 << 20;
/// Fewest rows of logits made at once, however large the vocabulary: with fewer the product is slow.
const LEAST_LOGIT_ROWS: usize = 128;

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
    pub rollouts: Vec<Evaluated>,
}

/// Evaluates all rollouts in order, in batches of at most the model's token budget.
///
/// # Errors
/// [`ProveError`]; members are numbered as in `rollouts`.
pub(crate) fn evaluate(model: &Model, rollouts: &[Rollout<'_>]) -> Result<Vec<BatchResult>, ProveError> {
    for (member, rollout) in rollouts.iter().enumerate() {
        check(model, member, rollout)?;
    }
    let _guard = tch::no_grad_guard();
    let mut results = Vec::new();
    let mut first = 0;
    for size in batch_sizes(rollouts, model.batch_tokens()) {
        let end = first + size;
        evaluate_halving(model, rollouts, first..end, &mut results)?;
        first = end;
    }
    Ok(results)
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

/// One batch; in two halves if the device has no memory for it, down to one rollout.
fn evaluate_halving(
    model: &Model,
    rollouts: &[Rollout<'_>],
    range: std::ops::Range<usize>,
    results: &mut Vec<BatchResult>,
) -> Result<(), ProveError> {
    let members = rollouts.get(range.clone()).unwrap_or_default();
    match Pack::new(members).run(model, range.start) {
        Ok(result) => results.push(result),
        Err(ProveError::OutOfMemory { tokens, detail }) if members.len() > 1 => {
            tracing::warn!(tokens, members = members.len(), error = detail, "Out of device memory; halving the batch.");
            let middle = range.start + members.len() / 2;
            evaluate_halving(model, rollouts, range.start..middle, results)?;
            evaluate_halving(model, rollouts, middle..range.end, results)?;
        }
        Err(error) => return Err(error),
    }
    Ok(())
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
        Ok(BatchResult { first, buckets, rollouts })
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
                logprobs: after_missing_row(member, logprobs, f32::NEG_INFINITY),
                eos_probability,
                chosen_probabilities,
            });
        }
        Ok(evaluated)
    }
}

/// Puts `value` where a completion token has no logits row: the first token of a sequence without a prompt.
fn after_missing_row(member: &Rollout<'_>, mut values: Vec<f32>, value: f32) -> Vec<f32> {
    if member.prompt.is_empty() {
        values.insert(0, value);
    }
    values
}

/// Tokens whose probability the member's logits rows give, in order.
fn targets(member: &Rollout<'_>) -> impl Iterator<Item = i64> {
    member.completion.iter().skip(usize::from(member.prompt.is_empty())).map(|token| i64::from(token.0))
}

/// Reads logits of hidden states in chunks of bounded size.
struct LogitReader<'a> {
    model: &'a Model,
    hidden: &'a Tensor,
}

impl LogitReader<'_> {
    fn chunk_rows(&self) -> usize {
        let elements = match self.model.device() {
            Device::Cpu => CPU_LOGIT_ELEMENTS,
            Device::Cuda(_) => GPU_LOGIT_ELEMENTS,
        };
        (elements / self.model.config().vocab_size).max(LEAST_LOGIT_ROWS)
    }

    fn on_device(&self, values: &[i64]) -> Result<Tensor, TchError> {
        stage(Stage::Upload, || Tensor::f_from_slice(values)?.f_to_device(self.model.device().torch()))
    }

    /// Logits of some rows in the model's dtype.
    fn logits(&self, rows: &[i64]) -> Result<Tensor, TchError> {
        self.model.network().logits(&self.hidden.f_index_select(0, &self.on_device(rows)?)?)
    }

    /// By member: softmax of its last logits row at the EOS token, in the model's dtype; 0 if it has no row.
    fn eos_probabilities(&self, members: &[Rollout<'_>], rows: &[Vec<i64>]) -> Result<Vec<f32>, TchError> {
        let mut probabilities = vec![0.0; members.len()];
        let with_row: Vec<(usize, i64, i64)> = members
            .iter()
            .zip(rows)
            .enumerate()
            .filter_map(|(at, (member, rows))| Some((at, *rows.last()?, i64::from(member.eos_token.0))))
            .collect();
        for chunk in with_row.chunks(self.chunk_rows()) {
            let rows: Vec<i64> = chunk.iter().map(|(_, row, _)| *row).collect();
            let eos: Vec<i64> = chunk.iter().map(|(_, _, eos)| *eos).collect();
            let chosen = self.logits(&rows)?.f_softmax(-1, None)?.f_gather(
                -1,
                &self.on_device(&eos)?.f_unsqueeze(-1)?,
                false,
            )?;
            for ((at, _, _), value) in chunk.iter().zip(host_f32(&chosen)?) {
                if let Some(slot) = probabilities.get_mut(*at) {
                    *slot = value;
                }
            }
        }
        Ok(probabilities)
    }

    /// By member: log-softmax in f32 at each of its tokens that has a logits row.
    fn logprobs(&self, members: &[Rollout<'_>], rows: &[Vec<i64>]) -> Result<Vec<Vec<f32>>, TchError> {
        let flat_rows: Vec<i64> = rows.iter().flatten().copied().collect();
        let flat_targets: Vec<i64> = members.iter().flat_map(targets).collect();
        let mut chosen = Vec::new();
        for (rows, targets) in flat_rows.chunks(self.chunk_rows()).zip(flat_targets.chunks(self.chunk_rows())) {
            let logprobs = self.logits(rows)?.f_log_softmax(-1, Kind::Float)?;
            chosen.push(logprobs.f_gather(-1, &self.on_device(targets)?.f_unsqueeze(-1)?, false)?);
        }
        if chosen.is_empty() {
            return Ok(vec![Vec::new(); members.len()]);
        }
        // One read-back for the batch: each waits for the device.
        let values = host_f32(&Tensor::f_cat(&chosen, 0)?)?;
        let mut rest = values.as_slice();
        Ok(rows
            .iter()
            .map(|rows| {
                let (own, others) = rest.split_at(rows.len());
                rest = others;
                own.to_vec()
            })
            .collect())
    }

    /// Probability of each completion token after repetition penalty over all tokens before it and after temperature.
    fn chosen_probabilities(
        &self,
        member: &Rollout<'_>,
        rows: &[i64],
        sampling: Sampling,
    ) -> Result<Vec<f32>, TchError> {
        let targets: Vec<i64> = targets(member).collect();
        let penalty = RepetitionPenalty::new(self, member, sampling.repetition_penalty)?;
        // Logits row r (0-based among the member's) stands behind this many tokens.
        let first_prefix = member.prompt.len().max(1);
        let mut probabilities = Vec::with_capacity(member.completion.len());
        for (index, (rows, targets)) in
            rows.chunks(self.chunk_rows()).zip(targets.chunks(self.chunk_rows())).enumerate()
        {
            let mut scores = self.logits(rows)?.f_to_kind(Kind::Float)?;
            if let Some(penalty) = &penalty {
                let prefix = (first_prefix + index * self.chunk_rows()) as i64;
                scores = penalty.apply(&scores, prefix)?;
            }
            if sampling.temperature != 1.0 {
                scores = scores.f_div_scalar(sampling.temperature)?;
            }
            let targets = self.on_device(targets)?.f_unsqueeze(-1)?;
            probabilities.extend(host_f32(&scores.f_softmax(-1, None)?.f_gather(-1, &targets, false)?)?);
        }
        Ok(after_missing_row(member, probabilities, 0.0))
    }
}

/// The rule of transformers: the score of every token that occurred before is multiplied with the penalty if negative and
/// divided by it otherwise, once however often the token occurred.
struct RepetitionPenalty {
    penalty: f64,
    /// `[1, vocab]`: index of the token's first occurrence in the sequence, or its length.
    first_occurrence: Tensor,
}

impl RepetitionPenalty {
    /// `None` if the penalty changes nothing.
    fn new(reader: &LogitReader<'_>, member: &Rollout<'_>, penalty: f64) -> Result<Option<Self>, TchError> {
        if penalty == 1.0 {
            return Ok(None);
        }
        let length = member.prompt.len() + member.completion.len();
        let mut first = vec![length as i64; reader.model.config().vocab_size];
        for (position, token) in member.prompt.iter().chain(member.completion).enumerate() {
            if let Some(slot) = first.get_mut(token.0 as usize) {
                *slot = (*slot).min(position as i64);
            }
        }
        Ok(Some(Self { penalty, first_occurrence: reader.on_device(&first)?.f_unsqueeze(0)? }))
    }

    /// * `scores`: `[rows, vocab]`, f32; the first row stands behind `prefix` tokens, each next one behind one more.
    fn apply(&self, scores: &Tensor, prefix: i64) -> Result<Tensor, TchError> {
        let lengths = Tensor::f_arange_start(prefix, prefix + scores.size()[0], (Kind::Int64, scores.device()))?
            .f_unsqueeze(1)?;
        let seen = self.first_occurrence.f_lt_tensor(&lengths)?;
        let multiplied = scores.f_mul_scalar(self.penalty)?;
        let divided = scores.f_div_scalar(self.penalty)?;
        let penalised = multiplied.f_where_self(&scores.f_lt(0.0)?, &divided)?;
        penalised.f_where_self(&seen, scores)
    }
}
