//! The program: tasks, tokenizer, two phases of training, two checkpoints, judgement.

use std::path::Path;

use anyhow::Context as _;
use grail_model::gpu::{self, GpuSupport};
use grail_model::train::TrainableModel;
use grail_model::{Device, Dtype, set_threads};
use grail_protocol::ids::WindowStart;
use grail_text::{ChatTemplate, Tokenizer};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tch::Kind;

use crate::cli::{Cli, TaskSet};
use crate::evaluation::{self, CRITERIA, Shares};
use crate::folder::Shape;
use crate::sampling::GENERATION;
use crate::tasks::{self, Source};
use crate::training::{self, Lessons, Phase};
use crate::vocabulary::{self, write_json};

/// Folder of the checkpoint that is ready first.
const FIRST: &str = "first";
/// Folder of the checkpoint behind it.
const SECOND: &str = "second";
/// Files of the tokenizer, the same in both.
const TOKENIZER_FILES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];

/// What came of a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// Both checkpoints are fit for the demo.
    Fit,
    /// What was missed.
    Unfit(Vec<String>),
}

/// Runs the program.
///
/// # Errors
/// If files cannot be written, the device is not there, or libtorch fails.
pub fn run(cli: &Cli) -> anyhow::Result<Outcome> {
    set_threads(cli.threads);
    let (first, second) = (cli.out.join(FIRST), cli.out.join(SECOND));
    if !cli.only_judge {
        train(cli, &first, &second)?;
    }
    judge(cli, &first, &second)
}

fn train(cli: &Cli, first: &Path, second: &Path) -> anyhow::Result<()> {
    enable(cli.device)?;
    let seed = seed_number(&cli.seed);
    let sources = match cli.tasks {
        TaskSet::Split => tasks::split_sources()?,
        TaskSet::Windows => {
            let windows = cli.windows.iter().map(|window| tasks::window_sources(&cli.seed, window, cli.groups));
            windows.collect::<anyhow::Result<Vec<_>>>()?.concat()
        }
    };
    // The same tokenizer whichever tasks are learned.
    vocabulary::write(first, &tasks::split_sources()?, seed)?;
    let tokenizer = Tokenizer::from_dir(first)?;
    let prompts = tasks::prompts(&sources, &tokenizer, &ChatTemplate::from_dir(first)?)?;
    let eos = tokenizer.eos_token_id().context("the tokenizer names no end token")?;
    let pad = tokenizer.pad_token_id().context("the tokenizer names no token that fills up")?;
    let shape = Shape::demo(tokenizer.vocab_size(), eos, pad);
    let config = shape.config()?;
    tracing::info!(
        tasks = sources.len(),
        parameters = config.parameters(),
        vocabulary = config.vocab_size,
        device = %cli.device,
        "Training begins."
    );
    let model = TrainableModel::random(config, cli.device, i64::from_ne_bytes(seed.to_ne_bytes()))?;
    let mut optimizer = training::optimizer(&model)?;
    let lessons = Lessons { sources: &sources, prompts: &prompts, tokenizer: &tokenizer, eos };
    let kind = match cli.device {
        Device::Cpu => Kind::Float,
        Device::Cuda(_) => Kind::BFloat16,
    };
    for (folder, phase) in [(first, first_phase(cli, seed)), (second, second_phase(cli, seed))] {
        training::train(&model, &mut optimizer, lessons, &phase, kind)?;
        save(&model, &shape, folder, first)?;
    }
    write_json(&cli.out.join("metadata.json"), &metadata())
}

fn first_phase(cli: &Cli, seed: u64) -> Phase {
    Phase {
        name: FIRST,
        steps: cli.steps,
        tasks_per_step: cli.tasks_per_step,
        completions_per_task: cli.completions_per_task,
        warmup: (cli.steps / 20).clamp(1, 200),
        peak_rate: cli.rate,
        final_rate: cli.rate / 20.0,
        right_share: 0.55,
        smoothing: 0.04,
        seed,
        producers: cli.threads,
    }
}

/// What a step of reinforcement learning does to a model: more right answers, and a little more certainty.
fn second_phase(cli: &Cli, seed: u64) -> Phase {
    Phase {
        name: SECOND,
        steps: cli.further_steps,
        warmup: (cli.further_steps / 10).max(1),
        peak_rate: cli.rate / 4.0,
        final_rate: cli.rate / 40.0,
        right_share: 0.65,
        smoothing: 0.02,
        seed: seed.wrapping_add(1),
        ..first_phase(cli, seed)
    }
}

fn enable(device: Device) -> anyhow::Result<()> {
    match (device, gpu::enable()) {
        (Device::Cpu, _) => Ok(()),
        (Device::Cuda(index), support @ GpuSupport::Loaded { devices, .. }) if index < *devices => {
            tracing::info!(%support, "GPU found.");
            Ok(())
        }
        (Device::Cuda(_), support) => anyhow::bail!("device {device} is not usable: {support}"),
    }
}

fn save(model: &TrainableModel, shape: &Shape, folder: &Path, tokenizer: &Path) -> anyhow::Result<()> {
    model.save_safetensors(folder, Dtype::Bf16)?;
    shape.write(folder)?;
    for file in TOKENIZER_FILES.into_iter().filter(|_| folder != tokenizer) {
        std::fs::copy(tokenizer.join(file), folder.join(file)).with_context(|| format!("copy {file}"))?;
    }
    tracing::info!(folder = %folder.display(), "Checkpoint saved.");
    Ok(())
}

/// What a trainer's metadata prescribes beside window and manifest.
fn metadata() -> serde_json::Value {
    json!({
        "env_id": "gsm8k",
        "env_params": {"split": "train"},
        "generation_params": GENERATION,
        "model_name": "grail-demo",
        "thinking_mode": "instructed",
    })
}

fn judge(cli: &Cli, first: &Path, second: &Path) -> anyhow::Result<Outcome> {
    let mut windows = cli.windows.iter();
    let (Some(early), Some(late)) = (windows.next(), windows.next()) else {
        anyhow::bail!("two windows are needed to judge two checkpoints");
    };
    let of =
        |window: WindowStart| -> anyhow::Result<Vec<Source>> { tasks::window_sources(&cli.seed, window, cli.groups) };
    let mut missed = Vec::new();
    let seed = seed_number(&cli.seed);
    let mut shares_of = |name: &str, folder: &Path, window: WindowStart| {
        let judged = evaluation::window(folder, &of(window)?, seed)?;
        print(name, window, &judged.shares);
        let misses = judged.shares.misses(&CRITERIA);
        missed.extend(misses.into_iter().map(|miss| format!("checkpoint {name}: {miss}")));
        anyhow::Ok(judged)
    };
    shares_of(FIRST, first, early)?;
    let judged = shares_of(SECOND, second, late)?;
    let equal = evaluation::equal_logprobs(first, &judged)?;
    let changed = evaluation::changed_elements(first, second)?;
    println!("logprobs of the second window that the first checkpoint gives as well  {:6.2} %", 100.0 * equal);
    println!("elements of the weights that differ between the checkpoints            {:6.2} %", 100.0 * changed);
    if equal >= 0.5 {
        missed.push(format!("equal logprobs: {equal:.3}, less than 0.5 is wanted"));
    }
    if changed < 0.01 {
        missed.push(format!("changed elements: {changed:.4}, at least 0.01 is wanted"));
    }
    Ok(if missed.is_empty() { Outcome::Fit } else { Outcome::Unfit(missed) })
}

fn print(name: &str, window: WindowStart, shares: &Shares) {
    println!("checkpoint {name}, window {}: {} groups, {} rows", window.block(), shares.groups, shares.rows);
    let lines = [
        ("groups with 1 to 15 right answers", shares.mixed_groups),
        ("rows with a natural end", shares.natural_eos),
        ("rows of 32 tokens or more", shares.long_enough),
        ("rows that pass the distribution check", shares.distribution),
        ("rows with the right answer", shares.right),
        ("rows that are like no other", shares.distinct),
    ];
    for (what, share) in lines {
        println!("  {what:<40} {:6.2} %", 100.0 * share);
    }
    let (mean, least, most) = (shares.mean_tokens, shares.least_tokens, shares.most_tokens);
    println!("  tokens of a row: {mean:.1} on average, {least} to {most}");
}

fn seed_number(text: &str) -> u64 {
    Sha256::digest(text).iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}
