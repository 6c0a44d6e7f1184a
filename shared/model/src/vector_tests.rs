//! The golden models, computed by transformers 4.57.1 on libtorch 2.11 (SDPA, CPU), against the packed forward pass.

use std::path::PathBuf;

use grail_protocol::binding::{CommitBinding, commitments_hash};
use grail_protocol::hash::token_hash;
use grail_protocol::ids::TokenId;
use grail_protocol::sketch::{SketchCoeffs, modular_distance};
use serde::Deserialize;

use crate::config::{Architecture, RopeScaling};
use crate::safetensors::SafetensorsFile;
use crate::weights::WeightFiles;
use crate::{Device, Dtype, LoadOptions, Model, ModelConfig, PackedBatch, ProofModel, ProveInput, VerifyInput};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    tokenizer: String,
    models: Vec<IndexEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct IndexEntry {
    dir: String,
    arch: String,
    parameters: usize,
    tied: bool,
    rope_theta: f64,
    rope_scaling: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    model: String,
    arch: String,
    tokens: Vec<Vec<TokenId>>,
    prompt_lengths: Vec<usize>,
    randomness: String,
    model_name: String,
    layer_index: i32,
    hidden_size: usize,
    software: Software,
    attention: String,
    device: String,
    how: String,
    dtypes: ByDtype,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Software {
    torch: String,
    transformers: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ByDtype {
    float32: Vec<ExpectedSequence>,
    bfloat16: Vec<ExpectedSequence>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpectedSequence {
    sketches: Vec<u32>,
    sketches_lowest_index_ties: Vec<u32>,
    sketches_in_batch: Vec<u32>,
    max_distance_alone_vs_batch: i128,
    cut_gap_zero_positions: Vec<usize>,
    logprobs: Vec<f32>,
    logprobs_in_batch: Vec<f32>,
    commitments_hash: String,
    binding: String,
    proof_version: String,
    beacon: Beacon,
    max_abs_hidden_alone_vs_batch: f32,
    argmax_last: usize,
    hidden_rms: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Beacon {
    randomness: String,
}

/// What a forward pass says of one sequence.
#[derive(Clone)]
struct Found {
    hidden: Vec<f32>,
    sketches: Vec<u32>,
    logprobs: Vec<f32>,
}

/// Differences of all sequences of one model and dtype, against the bounds.
#[derive(Default)]
struct Comparison {
    hidden: Vec<f32>,
    logprobs: Vec<f32>,
    /// Of sketches, at positions without a tie.
    distances: Vec<i128>,
}

impl Comparison {
    fn add(&mut self, found: &Found, expected: &ExpectedSequence, hidden: &[f32]) {
        assert_eq!(found.sketches.len(), expected.sketches_lowest_index_ties.len());
        assert_eq!(found.logprobs.len(), expected.logprobs.len());
        assert_eq!(found.hidden.len(), hidden.len());
        self.hidden.extend(differences(&found.hidden, hidden));
        self.logprobs.extend(differences(&found.logprobs, &expected.logprobs));
        let pairs = found.sketches.iter().zip(&expected.sketches_lowest_index_ties).enumerate();
        self.distances.extend(
            pairs
                .filter(|(position, _)| !expected.cut_gap_zero_positions.contains(position))
                .map(|(_, (found, expected))| modular_distance(i64::from(*found), i64::from(*expected))),
        );
    }

    /// The bounds that an implementation must keep.
    fn judge(mut self, dtype: Dtype) -> Result<String, String> {
        let maximum = |values: &[f32]| values.iter().copied().fold(0.0, f32::max);
        let (hidden, logprob) = (maximum(&self.hidden), maximum(&self.logprobs));
        self.logprobs.sort_by(f32::total_cmp);
        let median = self.logprobs[self.logprobs.len() / 2];
        let equal = self.distances.iter().filter(|distance| **distance == 0).count();
        #[expect(clippy::cast_precision_loss, reason = "a few hundred positions")]
        let share = equal as f64 / self.distances.len() as f64;
        let farthest = self.distances.iter().copied().max().unwrap_or_default();
        let text = format!(
            "{dtype}: hidden {hidden:e}, logprob {logprob:e} median {median:e}, sketches equal {share:.4} farthest {farthest}"
        );
        let is_within = match dtype {
            Dtype::F32 => hidden <= 1e-4 && logprob <= 5e-5 && farthest == 0,
            Dtype::Bf16 => share >= 0.95 && farthest <= 700 && logprob <= 0.3 && median <= 0.02,
        };
        if is_within { Ok(text) } else { Err(text) }
    }
}

fn differences(left: &[f32], right: &[f32]) -> impl Iterator<Item = f32> {
    left.iter().zip(right).map(|(left, right)| {
        let difference = (left - right).abs();
        if difference.is_nan() { f32::INFINITY } else { difference }
    })
}

/// One golden model folder.
struct Golden {
    folder: String,
    expected: Expected,
    hidden: SafetensorsFile,
}

impl Golden {
    fn open(folder: &str) -> Self {
        let expected: Expected = grail_golden::json(&format!("models/{folder}/expected.json"));
        let hidden = SafetensorsFile::open(&grail_golden::path(&format!("models/{folder}/expected.safetensors")));
        Self { folder: folder.to_owned(), expected, hidden: hidden.unwrap() }
    }

    fn path(&self) -> PathBuf {
        grail_golden::path(&format!("models/{}", self.folder))
    }

    fn model(&self, dtype: Dtype) -> ProofModel {
        crate::set_threads(1);
        ProofModel::load(&self.path(), &LoadOptions::on(Device::Cpu).with_dtype(dtype)).unwrap()
    }

    fn coefficients(&self) -> SketchCoeffs {
        SketchCoeffs::from_randomness(&hex::decode(&self.expected.randomness).unwrap())
    }

    fn sequences(&self, dtype: Dtype) -> &[ExpectedSequence] {
        match dtype {
            Dtype::F32 => &self.expected.dtypes.float32,
            Dtype::Bf16 => &self.expected.dtypes.bfloat16,
        }
    }

    /// A tensor of the file as f32, whether stored so or as bf16 bit patterns.
    fn tensor(&self, name: &str) -> Option<Vec<f32>> {
        let view = self.hidden.tensor(name)?;
        Some(match view.dtype.name() {
            "F32" => view.bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            "U16" => view
                .bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|bytes| half::bf16::from_bits(u16::from_le_bytes(*bytes)).to_f32())
                .collect(),
            other => panic!("{name} is {other}"),
        })
    }

    fn expected_hidden(&self, dtype: Dtype, sequence: usize) -> Vec<f32> {
        let name = format!("{dtype}.seq{sequence}.hidden");
        self.tensor(&name).or_else(|| self.tensor(&format!("{name}_bf16bits"))).unwrap()
    }

    fn expected_logits(&self, dtype: Dtype, sequence: usize) -> Vec<f32> {
        self.tensor(&format!("{dtype}.seq{sequence}.logits_last")).unwrap()
    }

    fn parts(&self, sequence: usize) -> (&[TokenId], &[TokenId]) {
        self.expected.tokens[sequence].split_at(self.expected.prompt_lengths[sequence])
    }
}

/// Log-softmax at the token that each row predicts.
fn chosen_logprobs(logits: &[f32], vocab: usize, tokens: &[TokenId]) -> Vec<f32> {
    logits
        .chunks(vocab)
        .zip(tokens)
        .map(|(row, token)| {
            let maximum = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = row.iter().map(|logit| f64::from(logit - maximum).exp()).sum();
            #[expect(clippy::cast_possible_truncation, reason = "the comparison is in f32")]
            let log_sum = sum.ln() as f32;
            row[token.0 as usize] - maximum - log_sum
        })
        .collect()
}

/// The sequence as prompt and continuation of a packed batch that `spoil` may change, read row by row.
fn packed(golden: &Golden, model: &Model, sequence: usize, spoil: Spoil) -> Found {
    let (prompt, completion) = golden.parts(sequence);
    let mut batch = PackedBatch::new();
    let foreign: Vec<TokenId> = golden.parts((sequence + 1) % 4).0.iter().cycle().take(prompt.len()).copied().collect();
    let prompt_index = batch.push_sequence(if spoil == Spoil::PrefixOfAnother { &foreign } else { prompt });
    let completion_index = batch.push_continuation(prompt_index, completion);
    if spoil == Spoil::ShiftedPosition {
        batch.shift_positions(completion_index, 1);
    }
    let width = model.config().hidden_size;
    let first = if spoil == Spoil::OffByOneRow { prompt.len() } else { prompt.len() - 1 };
    let rows: Vec<usize> = (first..).take(completion.len()).map(|row| row.min(batch.len() - 1)).collect();
    let (mut hidden, logits) = model.inspect(&batch, &rows).unwrap();
    if spoil == Spoil::OffByOneRow {
        hidden.rotate_left(width);
    }
    let coefficients = golden.coefficients();
    let sketches = hidden.chunks(width).map(|row| grail_protocol::sketch::sketch_f32(row, &coefficients)).collect();
    Found { hidden, sketches, logprobs: chosen_logprobs(&logits, model.config().vocab_size, completion) }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Spoil {
    Nothing,
    ShiftedPosition,
    PrefixOfAnother,
    OffByOneRow,
}

fn compare(golden: &Golden, dtype: Dtype, found: impl Fn(usize) -> Found) -> Result<String, String> {
    let mut comparison = Comparison::default();
    for (sequence, expected) in golden.sequences(dtype).iter().enumerate() {
        comparison.add(&found(sequence), expected, &golden.expected_hidden(dtype, sequence));
    }
    comparison.judge(dtype)
}

fn check_model(folder: &str) {
    let golden = Golden::open(folder);
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let model = golden.model(dtype);
        check_paths(&golden, &model, dtype);
        check_negative_controls(&golden, &model, dtype);
        check_fields(&golden, &model, dtype);
    }
    check_header(&golden);
    let sequences = golden.expected.tokens.len() * 2;
    grail_golden::ran(&format!("models/{folder}/expected.json"), sequences, 8);
    let tensors = golden.hidden.names().count();
    // Hidden states and last logits, of each sequence in both dtypes: all read in `check_paths` and `check_fields`.
    grail_golden::ran(&format!("models/{folder}/expected.safetensors"), 2 * sequences, tensors);
}

/// The packed pass, `prove` and `verify` keep the bounds.
fn check_paths(golden: &Golden, model: &ProofModel, dtype: Dtype) {
    let coefficients = golden.coefficients();
    let eos_token = TokenId(414);
    let direct = compare(golden, dtype, |sequence| packed(golden, model.model(), sequence, Spoil::Nothing));
    println!("{} packed {}", golden.folder, direct.expect("packed"));
    let alone = compare(golden, dtype, |sequence| {
        let tokens = &golden.expected.tokens[sequence];
        let (prompt, completion) = golden.parts(sequence);
        let mut batch = PackedBatch::new();
        batch.push_sequence(tokens);
        let rows: Vec<usize> = (prompt.len() - 1..tokens.len() - 1).collect();
        let (hidden, logits) = model.model().inspect(&batch, &rows).unwrap();
        let width = model.config().hidden_size;
        let sketches = hidden.chunks(width).map(|row| grail_protocol::sketch::sketch_f32(row, &coefficients)).collect();
        Found { hidden, sketches, logprobs: chosen_logprobs(&logits, model.config().vocab_size, completion) }
    });
    println!("{} alone {}", golden.folder, alone.expect("alone"));
    let proved = compare(golden, dtype, |sequence| {
        let (prompt, completion) = golden.parts(sequence);
        let completions = vec![completion];
        let input = ProveInput { prompt, completions, coefficients: &coefficients, eos_token };
        let mut output = model.prove(&input).unwrap();
        let completion = output.completions.remove(0);
        let mut sketches = output.prompt_sketches;
        sketches.extend(completion.sketches);
        Found { hidden: golden.expected_hidden(dtype, sequence), sketches, logprobs: completion.logprobs }
    });
    println!("{} proved {}", golden.folder, proved.expect("proved"));
    let inputs: Vec<VerifyInput<'_>> = (golden.expected.tokens.iter().zip(&golden.expected.prompt_lengths))
        .map(|(tokens, prompt_length)| VerifyInput {
            tokens,
            prompt_length: *prompt_length,
            coefficients: &coefficients,
            temperature: 1.0,
            repetition_penalty: 1.0,
            eos_token,
        })
        .collect();
    let verified = model.verify(&inputs).unwrap();
    let together = compare(golden, dtype, |sequence| Found {
        hidden: golden.expected_hidden(dtype, sequence),
        sketches: verified[sequence].sketches.clone(),
        logprobs: verified[sequence].logprobs.clone(),
    });
    println!("{} verified {}", golden.folder, together.expect("verified"));
}

/// Each of the mistakes that the bounds must catch breaks them.
fn check_negative_controls(golden: &Golden, model: &ProofModel, dtype: Dtype) {
    for spoil in [Spoil::ShiftedPosition, Spoil::PrefixOfAnother, Spoil::OffByOneRow] {
        let spoiled = compare(golden, dtype, |sequence| packed(golden, model.model(), sequence, spoil));
        println!("{} spoiled {}", golden.folder, spoiled.expect_err("a mistake kept the bounds"));
    }
}

/// The remaining fields of each sequence.
fn check_fields(golden: &Golden, model: &ProofModel, dtype: Dtype) {
    let vocab = model.config().vocab_size;
    for (sequence, expected) in golden.sequences(dtype).iter().enumerate() {
        let tokens = &golden.expected.tokens[sequence];
        let mut batch = PackedBatch::new();
        batch.push_sequence(tokens);
        let (hidden, logits) = model.model().inspect(&batch, &[tokens.len() - 1]).unwrap();
        let expected_logits = golden.expected_logits(dtype, sequence);
        assert_eq!((logits.len(), expected_logits.len()), (vocab, vocab));
        let farthest = differences(&logits, &expected_logits).fold(0.0, f32::max);
        let (logit_bound, rms_bound) = if dtype == Dtype::F32 { (2e-4, 1e-6) } else { (0.5, 1e-3) };
        assert!(farthest <= logit_bound, "{dtype} sequence {sequence}: logits differ by {farthest}");
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        assert!(largest - logits[expected.argmax_last] <= logit_bound, "another token is likeliest");
        #[expect(clippy::cast_precision_loss, reason = "a few thousand values")]
        let rms = (hidden.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / hidden.len() as f64).sqrt();
        assert!((rms / expected.hidden_rms - 1.0).abs() <= rms_bound, "rms {rms}, not {}", expected.hidden_rms);

        let farthest = (expected.sketches.iter().zip(&expected.sketches_in_batch))
            .map(|(alone, batch)| modular_distance(i64::from(*alone), i64::from(*batch)))
            .max();
        assert_eq!(farthest, Some(expected.max_distance_alone_vs_batch));
        // What padding changes in the reference is the scale of rounding: far below what a mistake does.
        assert!(expected.max_abs_hidden_alone_vs_batch <= if dtype == Dtype::F32 { 1e-4 } else { 0.6 });
        let padding = differences(&expected.logprobs, &expected.logprobs_in_batch).fold(0.0, f32::max);
        assert!(padding <= if dtype == Dtype::F32 { 5e-5 } else { 0.3 }, "padding moves logprobs by {padding}");

        assert_eq!(expected.beacon.randomness, golden.expected.randomness);
        assert_eq!(expected.proof_version, "v5");
        let commitments = commitments_hash(&expected.sketches);
        assert_eq!(hex::encode(commitments), expected.commitments_hash);
        let randomness = hex::decode(&expected.beacon.randomness).unwrap();
        let name = &golden.expected.model_name;
        let digest = CommitBinding::new(&token_hash(tokens), &randomness, name, &commitments).digest();
        assert_eq!(hex::encode(digest), expected.binding);
    }
}

fn check_header(golden: &Golden) {
    let expected = &golden.expected;
    let config = ModelConfig::from_dir(&golden.path()).unwrap();
    assert_eq!(expected.model, golden.folder);
    assert_eq!(expected.model_name, format!("tiny/{}", golden.folder));
    assert_eq!(expected.arch, architecture_name(config.architecture));
    assert_eq!(expected.layer_index, -1);
    assert_eq!(expected.hidden_size, config.hidden_size);
    assert_eq!((expected.attention.as_str(), expected.device.as_str()), ("sdpa", "cpu"));
    assert_eq!((expected.software.torch.as_str(), expected.software.transformers.as_str()), ("2.11.0", "4.57.1"));
    assert!(expected.how.contains("each alone without a mask"), "{}", expected.how);
    assert_eq!(expected.tokens.len(), expected.prompt_lengths.len());
}

fn architecture_name(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Qwen2 => "Qwen2ForCausalLM",
        Architecture::Qwen3 => "Qwen3ForCausalLM",
        Architecture::Llama => "LlamaForCausalLM",
    }
}

#[test]
fn qwen2_tied() {
    check_model("qwen2-tied");
}

#[test]
fn qwen2_untied_yarn() {
    check_model("qwen2-untied-yarn");
}

#[test]
fn qwen3_tied() {
    check_model("qwen3-tied");
}

#[test]
fn qwen3_untied() {
    check_model("qwen3-untied");
}

#[test]
fn llama_tied_llama3rope() {
    check_model("llama-tied-llama3rope");
}

#[test]
fn llama_untied_linear() {
    check_model("llama-untied-linear");
}

#[test]
fn folders_hold_what_the_index_says() {
    let index: Index = grail_golden::json("models/index.json");
    assert_eq!(index.tokenizer, "tokenizer");
    for entry in &index.models {
        let folder = grail_golden::path(&format!("models/{}", entry.dir));
        let config = ModelConfig::from_dir(&folder).unwrap();
        assert_eq!(architecture_name(config.architecture), entry.arch);
        assert_eq!(config.tie_word_embeddings, entry.tied);
        assert_eq!(config.parameters(), entry.parameters);
        assert!((config.rope.theta - entry.rope_theta).abs() < f64::EPSILON);
        let kind = entry.rope_scaling.as_ref().map(|scaling| scaling["rope_type"].as_str().unwrap());
        assert_eq!(
            kind,
            match config.rope.scaling {
                RopeScaling::None => None,
                RopeScaling::Linear { .. } => Some("linear"),
                RopeScaling::Llama3 { .. } => Some("llama3"),
                RopeScaling::Yarn(_) => Some("yarn"),
            }
        );
        assert_eq!((config.eos_token_ids.as_slice(), config.pad_token_id), (&[TokenId(414)][..], Some(TokenId(412))));
        assert_eq!(config.dtype.as_deref(), Some("bfloat16"));
        grail_golden::ran(&format!("models/{}/config.json", entry.dir), 1, 1);
        check_neighbours(&entry.dir);
        check_weights(&entry.dir, &config);
    }
    grail_golden::ran("models/index.json", index.models.len(), 6);
}

/// Every model carries the common tokenizer; its own generation configuration repeats the ids.
fn check_neighbours(folder: &str) {
    for name in ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"] {
        let own = format!("models/{folder}/{name}");
        assert_eq!(grail_golden::bytes(&own), grail_golden::bytes(&format!("models/tokenizer/{name}")), "{own}");
        grail_golden::ran(&own, 1, 1);
    }
    let path = format!("models/{folder}/generation_config.json");
    let expected = serde_json::json!({
        "_from_model_config": true, "eos_token_id": 414, "pad_token_id": 412, "transformers_version": "4.57.1"
    });
    assert_eq!(grail_golden::json::<serde_json::Value>(&path), expected);
    grail_golden::ran(&path, 1, 1);
}

/// All tensors are there, in bf16, and the hash is that of their bytes in order of name.
fn check_weights(folder: &str, config: &ModelConfig) {
    let path = format!("models/{folder}/model.safetensors");
    let files = WeightFiles::open(&grail_golden::path(&format!("models/{folder}"))).unwrap();
    files.check(config).unwrap();
    let mut names: Vec<&str> = files.iter().map(|(name, _)| name).collect();
    let mut all = Vec::new();
    for (name, view) in files.iter() {
        assert_eq!(view.dtype.name(), "BF16", "{name}");
        all.extend_from_slice(view.bytes);
    }
    assert_eq!(files.hash().0, xxhash_rust::xxh3::xxh3_128(&all));
    names.sort_unstable();
    let expected = crate::weights::expected_tensors(config).len();
    grail_golden::ran(&path, names.len(), expected);
}
