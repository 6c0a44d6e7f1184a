//! Tokens a second of proof and of decoding on one CPU thread.
//!
//! `GRAIL_BENCH_MODEL` names a model folder; without it the golden model `qwen2-tied` is taken. `GRAIL_BENCH_THREADS` sets
//! libtorch's threads (default 1).

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use divan::Bencher;
use divan::counter::ItemsCount;
use grail_model::generate::Decoder;
use grail_model::{Device, Dtype, LoadOptions, Model, ProofModel, ProveInput, set_threads};
use grail_protocol::ids::TokenId;
use grail_protocol::sketch::SketchCoeffs;

const PROMPT_TOKENS: usize = 150;
const MEMBERS: usize = 16;

fn main() {
    let threads = std::env::var("GRAIL_BENCH_THREADS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    set_threads(threads);
    divan::main();
}

fn folder() -> PathBuf {
    std::env::var_os("GRAIL_BENCH_MODEL").map_or_else(|| grail_golden::path("models/qwen2-tied"), PathBuf::from)
}

fn model() -> &'static Arc<Model> {
    static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
    MODEL.get_or_init(|| Arc::new(Model::load(&folder(), &LoadOptions::on(Device::Cpu)).expect("the model loads")))
}

/// Ids below the vocabulary, without a pattern.
fn tokens(vocab_size: usize, seed: usize, count: usize) -> Vec<TokenId> {
    (0..count)
        .map(|index| {
            TokenId(u32::try_from((seed * 7919 + index * index * 31 + index) % vocab_size).unwrap_or_default())
        })
        .collect()
}

/// One group of 16; counts the tokens that a proof without a shared prompt would compute.
fn prove(bencher: Bencher<'_, '_>, model: ProofModel, completion_tokens: usize) {
    let vocab_size = model.config().vocab_size;
    let prompt = tokens(vocab_size, 1, PROMPT_TOKENS);
    let completions: Vec<Vec<TokenId>> =
        (0..MEMBERS).map(|seed| tokens(vocab_size, seed + 2, completion_tokens)).collect();
    let coefficients = SketchCoeffs::from_randomness(&[7; 32]);
    bencher.counter(ItemsCount::new(MEMBERS * (PROMPT_TOKENS + completion_tokens))).bench_local(|| {
        let input = ProveInput {
            prompt: &prompt,
            completions: completions.iter().map(Vec::as_slice).collect(),
            coefficients: &coefficients,
            eos_token: TokenId(0),
        };
        model.prove(&input).expect("the group is proved")
    });
}

#[divan::bench(args = [64, 150, 400])]
fn prove_f32(bencher: Bencher<'_, '_>, completion_tokens: usize) {
    prove(bencher, ProofModel::new(Arc::clone(model())), completion_tokens);
}

#[divan::bench(args = [150])]
fn prove_bf16(bencher: Bencher<'_, '_>, completion_tokens: usize) {
    let options = LoadOptions::on(Device::Cpu).with_dtype(Dtype::Bf16);
    prove(bencher, ProofModel::load(&folder(), &options).expect("the model loads"), completion_tokens);
}

/// One hundred steps of all slots behind a prompt.
#[divan::bench(args = [1, 16, 32])]
fn decode(bencher: Bencher<'_, '_>, slots: usize) {
    const STEPS: usize = 100;
    let vocab_size = model().config().vocab_size;
    let prompt = tokens(vocab_size, 1, PROMPT_TOKENS);
    bencher
        .counter(ItemsCount::new(slots * STEPS))
        .with_inputs(|| {
            let mut decoder = Decoder::new(Arc::clone(model()), slots, 512).expect("the decoder is made");
            decoder.prefill(0, &prompt).expect("the prompt fits");
            for slot in 1..slots {
                decoder.copy_prefix(0, slot, prompt.len()).expect("the slots exist");
            }
            decoder
        })
        .bench_local_values(|mut decoder| {
            for step in 0..STEPS {
                let row: Vec<(usize, TokenId)> = tokens(vocab_size, step, slots).into_iter().enumerate().collect();
                decoder.step(&row).expect("the step fits");
            }
        });
}
