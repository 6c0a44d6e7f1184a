//! What the logits of a packed batch say, by libtorch's operations: logprobs, the probability of EOS, and that of the chosen
//! tokens behind sampling's transformations.

use tch::{Kind, TchError, Tensor};

use crate::device::Device;
use crate::evaluate::{Rollout, Sampling, after_missing_row, targets};
use crate::model::{Model, host_f32};
use crate::stages::{Stage, stage};

/// Logits made at once on a GPU, in elements: bounds the memory of the output matrix's product and of its f32 copy.
const GPU_LOGIT_ELEMENTS: usize = 1 << 26;
/// The same on a CPU: a few megabytes stay in the cache.
const CPU_LOGIT_ELEMENTS: usize = 1 << 20;
/// Fewest rows of logits made at once, however large the vocabulary: with fewer the product is slow.
const LEAST_LOGIT_ROWS: usize = 128;

/// Reads logits of hidden states in chunks of bounded size.
pub(crate) struct LogitReader<'a> {
    pub model: &'a Model,
    pub hidden: &'a Tensor,
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
    pub(crate) fn eos_probabilities(&self, members: &[Rollout<'_>], rows: &[Vec<i64>]) -> Result<Vec<f32>, TchError> {
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
    pub(crate) fn logprobs(&self, members: &[Rollout<'_>], rows: &[Vec<i64>]) -> Result<Vec<Vec<f32>>, TchError> {
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
    pub(crate) fn chosen_probabilities(
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
        Ok(after_missing_row(member.prompt.is_empty(), probabilities, 0.0))
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
