//! The training loop: batches of freshly made completions, AdamW, cosine schedule.

use std::f64::consts::PI;
use std::sync::mpsc::sync_channel;
use std::time::Instant;

use anyhow::Context as _;
use grail_model::train::{NO_DECAY_GROUP, TrainableModel};
use grail_protocol::ids::TokenId;
use grail_text::Tokenizer;
use tch::nn::{self, OptimizerConfig as _};
use tch::{Kind, Reduction};

use crate::batch::{Batch, Example, common_prefix};
use crate::network::Network;
use crate::rng::Rng;
use crate::synthesis;
use crate::tasks::Source;

/// Batches that each producer makes ahead.
const AHEAD: usize = 4;
/// Batches among which tasks of similar length are gathered, so that little is filled up.
const POOL: usize = 16;
/// Steps between two lines of progress.
const REPORT_EVERY: usize = 100;
/// Largest norm of a step's gradient.
const GRADIENT_NORM: f64 = 1.0;

/// What is learned: tasks, their prompts, and the tokenizer that writes the completions.
#[derive(Debug, Clone, Copy)]
pub struct Lessons<'a> {
    pub sources: &'a [Source],
    /// By source.
    pub prompts: &'a [Vec<TokenId>],
    pub tokenizer: &'a Tokenizer,
    pub eos: TokenId,
}

/// A stretch of training that ends in a checkpoint.
#[derive(Debug, Clone)]
pub struct Phase {
    pub name: &'static str,
    pub steps: usize,
    pub tasks_per_step: usize,
    pub completions_per_task: usize,
    /// Steps in which the learning rate rises.
    pub warmup: usize,
    pub peak_rate: f64,
    pub final_rate: f64,
    /// Share of right answers among the completions to learn.
    pub right_share: f64,
    /// Probability mass spread evenly over the vocabulary. It keeps the model from certainty, so that the logprobs of two
    /// checkpoints differ at every position.
    pub smoothing: f64,
    pub seed: u64,
    /// Threads that make batches.
    pub producers: usize,
}

impl Phase {
    fn rate(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak_rate * (step + 1) as f64 / self.warmup as f64;
        }
        let done = (step - self.warmup) as f64 / (self.steps - self.warmup).max(1) as f64;
        self.final_rate + (self.peak_rate - self.final_rate) * 0.5 * (1.0 + (PI * done).cos())
    }

    /// Places of the tasks of every step: each epoch has every task once, tasks of similar length share a step.
    fn order(&self, lengths: &[usize]) -> Vec<Vec<usize>> {
        let mut steps: Vec<Vec<usize>> = Vec::with_capacity(self.steps);
        let mut rng = Rng::new(self.seed, 2);
        let size = self.tasks_per_step.min(lengths.len()).max(1);
        while steps.len() < self.steps {
            let mut tasks: Vec<usize> = (0..lengths.len()).collect();
            rng.shuffle(&mut tasks);
            let mut epoch = Vec::new();
            for pool in tasks.chunks_mut(size * POOL) {
                pool.sort_by_key(|task| lengths[*task]);
                epoch.extend(pool.chunks_exact(size).map(<[usize]>::to_vec));
            }
            rng.shuffle(&mut epoch);
            steps.extend(epoch);
        }
        steps.truncate(self.steps);
        steps
    }
}

/// AdamW over the model's variables; norms and biases do not decay.
///
/// # Errors
/// libtorch's.
pub fn optimizer(model: &TrainableModel) -> anyhow::Result<nn::Optimizer> {
    let mut optimizer = nn::adamw(0.9, 0.98, 0.01).build(model.var_store(), 0.0).context("make the optimizer")?;
    optimizer.set_weight_decay_group(NO_DECAY_GROUP, 0.0);
    Ok(optimizer)
}

/// Trains for one phase. Returns the mean loss of its last steps.
///
/// # Errors
/// If a batch cannot be made or libtorch fails.
pub fn train(
    model: &TrainableModel,
    optimizer: &mut nn::Optimizer,
    lessons: Lessons<'_>,
    phase: &Phase,
    kind: Kind,
) -> anyhow::Result<f64> {
    let network = Network::new(model, kind)?;
    let lengths: Vec<usize> = lessons.prompts.iter().map(Vec::len).collect();
    let order = phase.order(&lengths);
    let prefix = common_prefix(lessons.prompts);
    let producers = phase.producers.max(1);
    std::thread::scope(|scope| {
        let mut feeds = Vec::with_capacity(producers);
        for first in 0..producers {
            let (sender, feed) = sync_channel(AHEAD);
            feeds.push(feed);
            let order = &order;
            scope.spawn(move || {
                for (step, tasks) in order.iter().enumerate().skip(first).step_by(producers) {
                    // The loop has ended early, with its own error.
                    if sender.send(make_batch(lessons, phase, prefix, (step, tasks))).is_err() {
                        return;
                    }
                }
            });
        }
        let mut progress = Progress::new(phase);
        for step in 0..order.len() {
            let batch = feeds[step % producers].recv().context("a thread that makes batches has ended")??;
            optimizer.set_lr(phase.rate(step));
            let (logits, targets) = network.logits(&batch)?;
            let loss =
                logits.f_cross_entropy_loss::<tch::Tensor>(&targets, None, Reduction::Mean, -100, phase.smoothing)?;
            optimizer.backward_step_clip_norm(&loss, GRADIENT_NORM);
            progress.record(step, loss.double_value(&[]), batch.len())?;
        }
        Ok(progress.last_loss)
    })
}

fn make_batch(
    lessons: Lessons<'_>,
    phase: &Phase,
    prefix: &[TokenId],
    (step, tasks): (usize, &Vec<usize>),
) -> anyhow::Result<Batch> {
    let mut rng = Rng::new(phase.seed, 3 + step as u64);
    let examples = tasks
        .iter()
        .map(|task| {
            let completions = (0..phase.completions_per_task)
                .map(|_| {
                    let text = synthesis::completion(&lessons.sources[*task].worked, phase.right_share, &mut rng).text;
                    let mut tokens = lessons.tokenizer.encode(&text)?;
                    tokens.push(lessons.eos);
                    Ok(tokens)
                })
                .collect::<anyhow::Result<_>>()?;
            Ok(Example { prompt: &lessons.prompts[*task][prefix.len()..], completions })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    Batch::new(prefix, &examples)
}

/// Lines of progress.
struct Progress<'a> {
    phase: &'a Phase,
    started: Instant,
    sum: f64,
    count: usize,
    tokens: usize,
    last_loss: f64,
}

impl<'a> Progress<'a> {
    fn new(phase: &'a Phase) -> Self {
        Self { phase, started: Instant::now(), sum: 0.0, count: 0, tokens: 0, last_loss: f64::NAN }
    }

    fn record(&mut self, step: usize, loss: f64, tokens: usize) -> anyhow::Result<()> {
        anyhow::ensure!(loss.is_finite(), "the loss of step {step} is {loss}");
        self.sum += loss;
        self.count += 1;
        self.tokens += tokens;
        if self.count == REPORT_EVERY || step + 1 == self.phase.steps {
            self.last_loss = self.sum / self.count as f64;
            let seconds = self.started.elapsed().as_secs_f64();
            tracing::info!(
                phase = self.phase.name,
                step = step + 1,
                of = self.phase.steps,
                loss = format!("{:.4}", self.last_loss),
                rate = format!("{:.2e}", self.phase.rate(step)),
                tokens_per_s = format!("{:.0}", self.tokens as f64 / seconds),
                seconds = format!("{seconds:.0}"),
                "Training."
            );
            (self.sum, self.count) = (0.0, 0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use grail_model::Device;
    use grail_text::ChatTemplate;

    use super::*;
    use crate::folder::Shape;
    use crate::{tasks, vocabulary};

    fn phase(steps: usize) -> Phase {
        Phase {
            name: "test",
            steps,
            tasks_per_step: 4,
            completions_per_task: 2,
            warmup: 2,
            peak_rate: 0.01,
            final_rate: 0.001,
            right_share: 0.5,
            smoothing: 0.0,
            seed: 1,
            producers: 2,
        }
    }

    #[test]
    fn the_rate_rises_and_falls() {
        let phase = phase(12);
        let rates: Vec<f64> = (0..12).map(|step| phase.rate(step)).collect();
        assert!((rates[0] - 0.005).abs() < 1e-12 && (rates[1] - 0.01).abs() < 1e-12 && (rates[2] - 0.01).abs() < 1e-12);
        assert!(rates[2..].windows(2).all(|pair| pair[0] > pair[1]), "{rates:?}");
        assert!(rates[11] > 0.001 && rates[11] < 0.002);
    }

    #[test]
    fn every_epoch_has_every_task_once() {
        let lengths: Vec<usize> = (0..40).map(|task| task * 7 % 40).collect();
        let order = phase(25).order(&lengths);
        assert_eq!(order.len(), 25);
        for epoch in order[..20].chunks(10) {
            let mut tasks: Vec<usize> = epoch.iter().flatten().copied().collect();
            tasks.sort_unstable();
            assert_eq!(tasks, (0..40).collect::<Vec<_>>());
        }
        assert_ne!(order[..10], order[10..20]);
        assert_eq!(order, phase(25).order(&lengths));
    }

    /// A short run over two tasks: the loss falls, and the same run gives the same loss again.
    #[test]
    fn a_tiny_model_learns() {
        grail_model::set_threads(1);
        let sources = tasks::split_sources().unwrap();
        let folder = tempfile::tempdir().unwrap();
        vocabulary::write(folder.path(), &sources[..600], 1).unwrap();
        let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
        let template = ChatTemplate::from_dir(folder.path()).unwrap();
        let prompts = tasks::prompts(&sources[..2], &tokenizer, &template).unwrap();
        let eos = tokenizer.eos_token_id().unwrap();
        let lessons = Lessons { sources: &sources[..2], prompts: &prompts, tokenizer: &tokenizer, eos };
        let run = |steps| {
            let config = Shape::tiny(tokenizer.vocab_size()).config().unwrap();
            let model = TrainableModel::random(config, Device::Cpu, 1).unwrap();
            let mut optimizer = optimizer(&model).unwrap();
            train(&model, &mut optimizer, lessons, &phase(steps), Kind::Float).unwrap()
        };
        // The mean over a run: a longer one is lower only if it falls.
        let (short, long) = (run(2), run(12));
        assert!(short > 7.0 && short < 8.0, "an untrained model knows nothing: ln 2048 is 7.6, found {short}");
        assert!(long < short - 0.5, "{short} and then {long}");
        assert!((run(2) - short).abs() < 1e-4);
    }
}
