//! What the finished checkpoints are worth: one window is sampled, proved and judged as a miner and a validator would.

use std::collections::HashSet;
use std::path::Path;

use anyhow::Context as _;
use futures::FutureExt as _;
use grail_environments::{Environment as _, ThinkingMode};
use grail_model::weights::WeightFiles;
use grail_model::{Device, LoadOptions, ProofModel, VerifyInput, VerifyOutput};
use grail_protocol::constants::{CHALLENGE_K, MIN_EOS_PROBABILITY};
use grail_protocol::distribution;
use grail_protocol::ids::TokenId;
use grail_protocol::sketch::SketchCoeffs;
use grail_text::Tokenizer;

use crate::sampling::{self, GENERATION};
use crate::tasks::{self, Source};

/// Largest difference of two logprobs that count as equal when a window is verified.
const EQUAL_LOGPROBS: f32 = 1e-4;

/// A window sampled from one checkpoint.
#[derive(Debug)]
pub struct Window {
    /// Prompt and completion of each row, and the length of the prompt.
    rows: Vec<(Vec<TokenId>, usize)>,
    logprobs: Vec<Vec<f32>>,
    pub shares: Shares,
}

/// What a window's rows and groups achieve.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shares {
    pub groups: usize,
    pub rows: usize,
    /// Groups with 1 to 15 right answers.
    pub mixed_groups: f64,
    /// Rows that end in the end token, as probable as validators want it.
    pub natural_eos: f64,
    /// Rows that are long enough.
    pub long_enough: f64,
    /// Rows that pass the distribution check.
    pub distribution: f64,
    /// Rows with the right answer.
    pub right: f64,
    /// Rows whose tokens no other row of the window has.
    pub distinct: f64,
    pub mean_tokens: f64,
    pub least_tokens: usize,
    pub most_tokens: usize,
}

/// Least shares of a checkpoint that is fit for the demo.
#[derive(Debug, Clone, Copy)]
pub struct Criteria {
    pub mixed_groups: f64,
    pub natural_eos: f64,
    pub long_enough: f64,
    pub distribution: f64,
}

/// What the demo promises.
pub const CRITERIA: Criteria = Criteria { mixed_groups: 0.75, natural_eos: 0.90, long_enough: 1.0, distribution: 0.90 };

impl Shares {
    /// Names of the criteria that are missed, with both numbers.
    #[must_use]
    pub fn misses(&self, criteria: &Criteria) -> Vec<String> {
        [
            ("groups with 1 to 15 right answers", self.mixed_groups, criteria.mixed_groups),
            ("rows with a natural end", self.natural_eos, criteria.natural_eos),
            ("rows of 32 tokens or more", self.long_enough, criteria.long_enough),
            ("rows that pass the distribution check", self.distribution, criteria.distribution),
        ]
        .into_iter()
        .filter(|(_, share, least)| share.is_nan() || share < least)
        .map(|(name, share, least)| format!("{name}: {share:.3}, at least {least} is wanted"))
        .collect()
    }
}

/// Samples a group for every source from the checkpoint in `folder` and judges all rows.
///
/// # Errors
/// If the checkpoint does not load or a row cannot be judged.
pub fn window(folder: &Path, sources: &[Source], seed: u64) -> anyhow::Result<Window> {
    let tokenizer = Tokenizer::from_dir(folder)?;
    let template = grail_text::ChatTemplate::from_dir(folder)?;
    let eos = tokenizer.eos_token_id().context("the tokenizer names no end token")?;
    let model = ProofModel::load(folder, &LoadOptions::on(Device::Cpu))?;
    let prompts = tasks::prompts(sources, &tokenizer, &template)?;
    let groups = sampling::groups(model.model(), &prompts, eos, seed)?;

    let mut rows = Vec::new();
    let mut counts = Counts::default();
    for ((source, prompt), completions) in sources.iter().zip(&prompts).zip(&groups) {
        counts.group(source, &tokenizer, completions)?;
        rows.extend(completions.iter().map(|tokens| ([prompt.as_slice(), tokens].concat(), prompt.len())));
    }
    let outputs = verify(&model, &rows, eos)?;
    for ((tokens, prompt_length), output) in rows.iter().zip(&outputs) {
        counts.row(&tokens[*prompt_length..], output, eos);
    }
    let logprobs = outputs.into_iter().map(|output| output.logprobs).collect();
    Ok(Window { rows, logprobs, shares: counts.shares() })
}

/// Share of a window's completion positions at which the checkpoint in `folder` gives the same logprob as the one that
/// the window was sampled from.
///
/// # Errors
/// If the checkpoint does not load or cannot judge the rows.
pub fn equal_logprobs(folder: &Path, window: &Window) -> anyhow::Result<f64> {
    let tokenizer = Tokenizer::from_dir(folder)?;
    let eos = tokenizer.eos_token_id().context("the tokenizer names no end token")?;
    let model = ProofModel::load(folder, &LoadOptions::on(Device::Cpu))?;
    let outputs = verify(&model, &window.rows, eos)?;
    let differences = outputs
        .iter()
        .zip(&window.logprobs)
        .flat_map(|(output, claimed)| output.logprobs.iter().zip(claimed).map(|(own, claimed)| (own - claimed).abs()));
    let (equal, all) =
        differences.fold((0, 0), |(equal, all), by| (equal + usize::from(by <= EQUAL_LOGPROBS), all + 1));
    Ok(share(equal, all))
}

/// Share of the weights' elements that differ between two checkpoints of one shape.
///
/// # Errors
/// If a checkpoint does not load or their tensors have other names or sizes.
pub fn changed_elements(first: &Path, second: &Path) -> anyhow::Result<f64> {
    let (first, second) = (WeightFiles::open(first)?, WeightFiles::open(second)?);
    let (mut changed, mut all) = (0, 0);
    let mut others = second.iter();
    for (name, tensor) in first.iter() {
        let (other_name, other) = others.next().with_context(|| format!("the second checkpoint has no {name}"))?;
        let is_same_kind = name == other_name && tensor.dtype == other.dtype && tensor.shape == other.shape;
        anyhow::ensure!(is_same_kind, "tensor {name} of the first checkpoint is not like {other_name} of the second");
        let size = tensor.dtype.element_bytes();
        let pairs = tensor.bytes.chunks_exact(size).zip(other.bytes.chunks_exact(size));
        changed += pairs.filter(|(a, b)| a != b).count();
        all += tensor.bytes.len() / size;
    }
    Ok(share(changed, all))
}

fn verify(model: &ProofModel, rows: &[(Vec<TokenId>, usize)], eos: TokenId) -> anyhow::Result<Vec<VerifyOutput>> {
    // Sketches are made as well, but nobody looks at them here.
    let coefficients = SketchCoeffs::from_randomness(&[0; 32]);
    let inputs: Vec<VerifyInput<'_>> = rows
        .iter()
        .map(|(tokens, prompt_length)| VerifyInput {
            tokens,
            prompt_length: *prompt_length,
            coefficients: &coefficients,
            temperature: GENERATION.temperature,
            repetition_penalty: GENERATION.repetition_penalty,
            eos_token: eos,
        })
        .collect();
    Ok(model.verify(&inputs)?)
}

/// Counts over a window.
#[derive(Default)]
struct Counts {
    groups: usize,
    mixed_groups: usize,
    right: usize,
    natural_eos: usize,
    long_enough: usize,
    distribution: usize,
    lengths: Vec<usize>,
    distinct: HashSet<Vec<TokenId>>,
}

impl Counts {
    fn group(&mut self, source: &Source, tokenizer: &Tokenizer, completions: &[Vec<TokenId>]) -> anyhow::Result<()> {
        let environment = tasks::environment()?;
        let mut right = 0;
        for tokens in completions {
            let text = tokenizer.decode(tokens)?;
            let verdict = environment
                .evaluate(&source.task, &text, ThinkingMode::Instructed)
                .now_or_never()
                .context("gsm8k judges at once")??;
            right += usize::from(verdict.success);
        }
        self.groups += 1;
        self.mixed_groups += usize::from(right > 0 && right < completions.len());
        self.right += right;
        Ok(())
    }

    fn row(&mut self, completion: &[TokenId], output: &VerifyOutput, eos: TokenId) {
        let ends = completion.last() == Some(&eos) && f64::from(output.eos_probability) >= MIN_EOS_PROBABILITY;
        self.natural_eos += usize::from(ends);
        self.long_enough += usize::from(completion.len() >= CHALLENGE_K);
        self.distribution += usize::from(distribution::assess(&output.chosen_probabilities).passes());
        self.lengths.push(completion.len());
        self.distinct.insert(completion.to_vec());
    }

    fn shares(&self) -> Shares {
        let rows = self.lengths.len();
        Shares {
            groups: self.groups,
            rows,
            mixed_groups: share(self.mixed_groups, self.groups),
            natural_eos: share(self.natural_eos, rows),
            long_enough: share(self.long_enough, rows),
            distribution: share(self.distribution, rows),
            right: share(self.right, rows),
            distinct: share(self.distinct.len(), rows),
            mean_tokens: share(self.lengths.iter().sum(), rows),
            least_tokens: self.lengths.iter().copied().min().unwrap_or_default(),
            most_tokens: self.lengths.iter().copied().max().unwrap_or_default(),
        }
    }
}

fn share(part: usize, whole: usize) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts of tokens and weights are far below 2^53")]
    let (part, whole) = (part as f64, whole as f64);
    part / whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misses_name_the_criterion_and_both_numbers() {
        let good = Shares {
            groups: 24,
            rows: 384,
            mixed_groups: 0.9,
            natural_eos: 1.0,
            long_enough: 1.0,
            distribution: 0.95,
            right: 0.5,
            distinct: 1.0,
            mean_tokens: 80.0,
            least_tokens: 50,
            most_tokens: 120,
        };
        assert_eq!(good.misses(&CRITERIA), Vec::<String>::new());
        let bad = Shares { mixed_groups: 0.5, distribution: f64::NAN, ..good };
        assert_eq!(bad.misses(&CRITERIA)[0], "groups with 1 to 15 right answers: 0.500, at least 0.75 is wanted");
    }
}
