//! Groups, batches and what a verifier reads, beside the golden values.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::path::Path;

use grail_model::safetensors::{OwnedTensor, SafetensorsFile, write};
use grail_model::{
    Device, Dtype, LoadOptions, Model, PackedBatch, ProofModel, ProveError, ProveInput, VerifyInput, VerifyOutput,
    set_threads,
};
use grail_protocol::ids::TokenId;
use grail_protocol::sketch::{SketchCoeffs, sketch_f32};

const MODELS: [&str; 6] =
    ["qwen2-tied", "qwen2-untied-yarn", "qwen3-tied", "qwen3-untied", "llama-tied-llama3rope", "llama-untied-linear"];
const EOS: TokenId = TokenId(414);

fn options() -> LoadOptions {
    LoadOptions::on(Device::Cpu)
}

fn load(model: &str, options: &LoadOptions) -> ProofModel {
    set_threads(1);
    ProofModel::load(&grail_golden::path(&format!("models/{model}")), options).unwrap()
}

/// Tokens without a pattern, below the vocabulary of 512.
fn tokens(seed: u32, count: usize) -> Vec<TokenId> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        TokenId((state >> 16) % 512)
    })
    .take(count)
    .collect()
}

fn coefficients(byte: u8) -> SketchCoeffs {
    SketchCoeffs::from_randomness(&[byte; 32])
}

fn farthest(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f32::max)
}

/// The sequence alone, without any sharing: hidden states and all logits.
fn alone(model: &Model, sequence: &[TokenId]) -> (Vec<f32>, Vec<f32>) {
    let mut batch = PackedBatch::new();
    batch.push_sequence(sequence);
    model.inspect(&batch, &(0..sequence.len()).collect::<Vec<_>>()).unwrap()
}

#[test]
fn sharing_the_prompt_changes_nothing_but_rounding() {
    for name in MODELS {
        let model = load(name, &options());
        // Completions within one block of queries and over several, shorter and longer than the prompt.
        for prompt_length in [1, 40, 150] {
            let prompt = tokens(1, prompt_length);
            let completions: Vec<Vec<TokenId>> =
                [1, 33, 40, 41, 300, 2].into_iter().zip(10..).map(|(length, seed)| tokens(seed, length)).collect();
            let mut batch = PackedBatch::new();
            let shared = batch.push_sequence(&prompt);
            let places: Vec<_> =
                completions.iter().map(|completion| batch.push_continuation(shared, completion)).collect();
            let (packed, _) = model.model().inspect(&batch, &[0]).unwrap();
            let width = model.config().hidden_size;
            for (completion, place) in completions.iter().zip(places) {
                let (hidden, _) = alone(model.model(), &[prompt.clone(), completion.clone()].concat());
                let rows = &batch.segment(place).rows;
                let own = &packed[rows.start * width..rows.end * width];
                let difference = farthest(own, &hidden[prompt.len() * width..]);
                assert!(difference <= 1e-4, "{name}, prompt {prompt_length}, {}: {difference}", completion.len());
            }
        }
    }
}

#[test]
fn a_group_is_the_same_in_batches_of_any_size() {
    let prompt = tokens(3, 30);
    let completions: Vec<Vec<TokenId>> = (0..16).map(|seed| tokens(100 + seed, 32 + 5 * seed as usize)).collect();
    let r = coefficients(9);
    let prove = |batch_tokens: usize| {
        let model = load("qwen3-tied", &LoadOptions { batch_tokens, ..options() });
        let completions = completions.iter().map(Vec::as_slice).collect();
        model.prove(&ProveInput { prompt: &prompt, completions, coefficients: &r, eos_token: EOS }).unwrap()
    };
    let whole = prove(100_000);
    assert_eq!(whole.prompt_sketches.len(), prompt.len());
    for batch_tokens in [1, 150, 400] {
        let cut = prove(batch_tokens);
        assert_eq!(cut.prompt_sketches, whole.prompt_sketches);
        for ((cut, whole), completion) in cut.completions.iter().zip(&whole.completions).zip(&completions) {
            assert_eq!(cut.sketches, whole.sketches);
            assert_eq!(cut.sketches.len(), completion.len());
            assert!(farthest(&cut.logprobs, &whole.logprobs) <= 5e-5);
            assert!((cut.eos_probability - whole.eos_probability).abs() <= 1e-5);
        }
    }
}

fn verify_input<'a>(tokens: &'a [TokenId], prompt_length: usize, coefficients: &'a SketchCoeffs) -> VerifyInput<'a> {
    VerifyInput { tokens, prompt_length, coefficients, temperature: 1.0, repetition_penalty: 1.0, eos_token: EOS }
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

/// What a verifier reads, position by position in binary64 from the sequence's own logits.
fn by_definition(model: &Model, input: &VerifyInput<'_>) -> VerifyOutput {
    let (hidden, logits) = alone(model, input.tokens);
    let (width, vocab) = (model.config().hidden_size, model.config().vocab_size);
    let row = |at: usize| logits[at * vocab..][..vocab].iter().map(|logit| f64::from(*logit)).collect::<Vec<_>>();
    #[expect(clippy::cast_possible_truncation, reason = "the comparison is in f32")]
    let narrow = |value: f64| value as f32;
    let (mut logprobs, mut chosen_probabilities) = (Vec::new(), Vec::new());
    for at in input.prompt_length..input.tokens.len() {
        let token = input.tokens[at].0 as usize;
        logprobs.push(narrow(softmax(&row(at - 1))[token].ln()));
        let mut scores = row(at - 1);
        for (id, score) in scores.iter_mut().enumerate() {
            if input.tokens[..at].iter().any(|seen| seen.0 as usize == id) {
                *score =
                    if *score < 0.0 { *score * input.repetition_penalty } else { *score / input.repetition_penalty };
            }
            *score /= input.temperature;
        }
        chosen_probabilities.push(narrow(softmax(&scores)[token]));
    }
    VerifyOutput {
        sketches: hidden.chunks(width).map(|row| sketch_f32(row, input.coefficients)).collect(),
        logprobs,
        eos_probability: narrow(softmax(&row(input.tokens.len() - 2))[input.eos_token.0 as usize]),
        chosen_probabilities,
    }
}

#[test]
fn verify_gives_what_the_definitions_give() {
    let model = load("llama-tied-llama3rope", &options());
    let (first, second) = (coefficients(1), coefficients(2));
    let long = tokens(5, 80);
    let sibling = [&long[..20], &tokens(6, 50)].concat();
    let other = tokens(7, 60);
    let inputs = [
        VerifyInput { temperature: 0.7, repetition_penalty: 1.1, ..verify_input(&long, 20, &first) },
        // The same prompt under another beacon and other parameters.
        VerifyInput { temperature: 1.3, ..verify_input(&sibling, 20, &second) },
        VerifyInput { repetition_penalty: 0.8, ..verify_input(&other, 1, &first) },
        VerifyInput { eos_token: TokenId(7), ..verify_input(&other, 59, &second) },
    ];
    let outputs = model.verify(&inputs).unwrap();
    assert_eq!(outputs.len(), inputs.len());
    for (input, output) in inputs.iter().zip(&outputs) {
        let expected = by_definition(model.model(), input);
        assert_eq!(output.sketches, expected.sketches);
        assert!(farthest(&output.logprobs, &expected.logprobs) <= 5e-5);
        assert!(farthest(&output.chosen_probabilities, &expected.chosen_probabilities) <= 1e-5);
        assert!((output.eos_probability - expected.eos_probability).abs() <= 1e-6);
    }
}

#[test]
fn verify_repeats_what_prove_said() {
    let model = load("qwen2-tied", &options());
    let r = coefficients(4);
    let prompt = tokens(11, 25);
    let completions: Vec<Vec<TokenId>> = (0..4).map(|seed| tokens(50 + seed, 40)).collect();
    let input = ProveInput {
        prompt: &prompt,
        completions: completions.iter().map(Vec::as_slice).collect(),
        coefficients: &r,
        eos_token: EOS,
    };
    let proved = model.prove(&input).unwrap();
    let rollouts: Vec<Vec<TokenId>> =
        completions.iter().map(|completion| [prompt.as_slice(), completion].concat()).collect();
    let rows: Vec<VerifyInput<'_>> = rollouts.iter().map(|rollout| verify_input(rollout, 25, &r)).collect();
    for (verified, completion) in model.verify(&rows).unwrap().iter().zip(&proved.completions) {
        assert_eq!(verified.sketches, [proved.prompt_sketches.as_slice(), &completion.sketches].concat());
        assert_eq!(verified.logprobs, completion.logprobs);
        assert_eq!(verified.eos_probability, completion.eos_probability);
    }
}

#[test]
fn a_rollout_without_a_prompt_has_no_logprob_for_its_first_token() {
    let model = load("qwen2-tied", &options());
    let r = coefficients(4);
    let rollout = tokens(1, 33);
    let output = model.verify(&[verify_input(&rollout, 0, &r)]).unwrap().remove(0);
    assert_eq!((output.sketches.len(), output.logprobs.len(), output.chosen_probabilities.len()), (33, 33, 33));
    assert_eq!(output.logprobs[0], f32::NEG_INFINITY);
    assert!(output.logprobs[1..].iter().all(|logprob| logprob.is_finite()));
    let single = model.verify(&[verify_input(&rollout[..1], 0, &r)]).unwrap().remove(0);
    assert_eq!((single.logprobs.as_slice(), single.eos_probability), (&[f32::NEG_INFINITY][..], 0.0));
}

#[test]
fn bad_requests_are_refused_with_the_member() {
    let model = load("qwen2-tied", &options());
    let r = coefficients(4);
    let (prompt, good, bad) = (tokens(1, 4), tokens(2, 4), vec![TokenId(3), TokenId(512)]);
    let prove = |prompt: &[TokenId], completions: Vec<&[TokenId]>, eos_token: TokenId| {
        model.prove(&ProveInput { prompt, completions, coefficients: &r, eos_token })
    };
    for (result, part) in [
        (prove(&prompt, vec![], EOS), "no completion"),
        (prove(&prompt, vec![&good, &[]], EOS), "member 1"),
        (prove(&prompt, vec![&good, &good, &bad], EOS), "member 2: token 512"),
        (prove(&bad, vec![&good], EOS), "token 512"),
        (prove(&prompt, vec![&good], TokenId(600)), "token 600"),
    ] {
        match result {
            Err(ProveError::BadRequest { detail }) => assert!(detail.contains(part), "{detail}"),
            other => panic!("{other:?}"),
        }
    }
    for input in [
        verify_input(&good, 5, &r),
        VerifyInput { temperature: 0.0, ..verify_input(&good, 1, &r) },
        VerifyInput { repetition_penalty: f64::NAN, ..verify_input(&good, 1, &r) },
    ] {
        assert!(matches!(model.verify(&[input]), Err(ProveError::BadRequest { .. })));
    }
    assert!(model.verify(&[]).unwrap().is_empty());
}

/// A copy of a golden model with one embedding row of NaN.
fn spoiled_embedding(folder: &Path, token: usize) {
    let golden = grail_golden::path("models/qwen2-tied");
    std::fs::copy(golden.join("config.json"), folder.join("config.json")).unwrap();
    let file = SafetensorsFile::open(&golden.join("model.safetensors")).unwrap();
    let tensors: Vec<OwnedTensor> = file
        .names()
        .map(|name| {
            let view = file.tensor(name).unwrap();
            let mut bytes = view.bytes.to_vec();
            if name == "model.embed_tokens.weight" {
                bytes[token * 128..][..2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
            }
            OwnedTensor { name: name.to_owned(), dtype: view.dtype, shape: view.shape.to_vec(), bytes }
        })
        .collect();
    write(&folder.join("model.safetensors"), &tensors).unwrap();
}

#[test]
fn hidden_states_that_are_not_finite_name_member_and_position() {
    let folder = tempfile::tempdir().unwrap();
    spoiled_embedding(folder.path(), 500);
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let model = ProofModel::load(folder.path(), &options().with_dtype(dtype)).unwrap();
        let r = coefficients(4);
        let prompt: Vec<TokenId> = (0..10).map(TokenId).collect();
        let good: Vec<TokenId> = (10..50).map(TokenId).collect();
        let mut bad = good.clone();
        bad[7] = TokenId(500);
        // A tied head has the NaN too, but only in one logit: sketches are what is refused.
        let input = ProveInput { prompt: &prompt, completions: vec![&good, &bad], coefficients: &r, eos_token: EOS };
        match model.prove(&input) {
            // Attention multiplies what it masks with zero, so NaN may show in rows before its own, but in no other member.
            Err(ProveError::NonFinite { member, position }) => {
                assert!(member == 1 && (10..=17).contains(&position), "member {member}, position {position}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn devices_and_dtypes_have_names() {
    for (text, device) in [("cpu", Device::Cpu), ("cuda", Device::Cuda(0)), ("cuda:3", Device::Cuda(3))] {
        assert_eq!(text.parse(), Ok(device));
    }
    assert_eq!(Device::Cuda(3).to_string(), "cuda:3");
    for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "CPU"] {
        assert!(text.parse::<Device>().is_err(), "{text}");
    }
    assert_eq!(("float32".parse(), "bf16".parse()), (Ok(Dtype::F32), Ok(Dtype::Bf16)));
    assert!("float64".parse::<Dtype>().is_err());
    assert_eq!((Device::Cpu.default_dtype(), Device::Cuda(0).default_dtype()), (Dtype::F32, Dtype::Bf16));
}
