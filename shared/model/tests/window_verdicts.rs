//! The whole validator against the reference: every golden window file with the model, the tokenizer and the environment that
//! the reference judged it with.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use grail_environments::gsm8k::Gsm8k;
use grail_environments::{Environment, Payload, Split, Task, ThinkingMode, prompt_ids};
use grail_model::{Device, Dtype, LoadOptions, ProofModel, VerifyInput};
use grail_protocol::hash::sha256;
use grail_protocol::ids::{BlockHash, BlockNumber, CheckpointWindow, GroupIndex, Hotkey, TokenId, WindowStart};
use grail_protocol::randomness::{ChallengeRandomness, MinerRandomness, mix_challenge, mix_miner};
use grail_protocol::sketch::SketchCoeffs;
use grail_protocol::validation::{
    Facts, FindingCode, Forward, NeededGroup, NeededRow, Report, RowEvaluation, RowFacts, Severity, ValidationContext,
    Verdict, needs, row_completion_digest, validate,
};
use grail_protocol::window_file::{WindowFile, read_bytes};
use grail_text::{ChatTemplate, Tokenizer};
use serde::Deserialize;
use serde_json::{Value, json};

const FILE: &str = "protocol/window_verdicts.json";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vectors {
    context: Setting,
    valid: Valid,
    variants: Vec<Variant>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Setting {
    hotkey: Hotkey,
    window: WindowStart,
    window_hash: BlockHash,
    next_block_hash: BlockHash,
    drand_miner: String,
    drand_validator: String,
    miner_randomness: MinerRandomness,
    challenge_randomness: ChallengeRandomness,
    checkpoint_window: CheckpointWindow,
    model_dir: String,
    model_name: String,
    dtype: String,
    env_id: String,
    env_params: BTreeMap<String, String>,
    env_split: String,
    dataset_rows: String,
    generation_params: GenerationParams,
    thinking_mode: ThinkingMode,
    eos_token_id: TokenId,
    vocab_size: u32,
    max_position_embeddings: usize,
    groups: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GenerationParams {
    max_tokens: i64,
    temperature: f64,
    /// Sampling alone reads these two.
    #[serde(rename = "top_p")]
    _top_p: f64,
    #[serde(rename = "top_k")]
    _top_k: i64,
    repetition_penalty: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Group {
    group: GroupIndex,
    seed: u64,
    task_id: String,
    task_index: usize,
    split: String,
    question_sha256: String,
    correct_answer: String,
    prompt_length: usize,
    prompt_text_sha256: String,
    prompt_ids: Vec<TokenId>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Valid {
    file: String,
    sha256: String,
    reference: ValidReference,
    all_rows: AllRows,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ValidReference {
    verdict: Value,
    failure_reason: Value,
    metrics: Value,
    processed: Value,
    indices_checked: Vec<usize>,
    rows: Vec<Value>,
    digests: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AllRows {
    hard_failure: bool,
    soft_gate: bool,
    failure_reason: Value,
    valid: usize,
    checked: usize,
    unique: usize,
    soft_failures: Value,
    groups_valid: bool,
    rows: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Variant {
    name: String,
    what: String,
    file: String,
    sha256: String,
    reference: Reference,
    local_verify: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    verdict: Value,
    failure_reason: Value,
    metrics: Value,
    processed: Value,
    indices_checked: Value,
    row_checks: Vec<Value>,
    first_failing_row_checks: Value,
    rows_checked: Value,
    distinct_digests: Value,
}

/// Model, tokenizer and environment of the context.
struct Validator {
    context: ValidationContext,
    setting: Setting,
    model: ProofModel,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    environment: Gsm8k,
    /// Most rows stand in many of the files.
    known: HashMap<(Vec<TokenId>, usize, Vec<u8>), Forward>,
}

impl Validator {
    fn new(setting: Setting) -> Self {
        let folder = |relative: &str| grail_golden::path(&format!("protocol/{relative}"));
        let dir = folder(&setting.model_dir);
        assert_eq!(setting.dtype, "float32");
        assert_eq!(setting.env_id, "gsm8k");
        assert_eq!(setting.env_params["split"], setting.env_split);
        assert_eq!(setting.env_split, Split::Train.as_str());
        let context = ValidationContext {
            hotkey: setting.hotkey.clone(),
            window: setting.window,
            window_hash: setting.window_hash.clone(),
            checkpoint_window: Some(setting.checkpoint_window),
            max_tokens: Some(setting.generation_params.max_tokens),
            eos_token: Some(setting.eos_token_id),
            vocab_size: setting.vocab_size,
            max_position_embeddings: setting.max_position_embeddings,
            challenge: setting.challenge_randomness.clone(),
        };
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        assert_eq!(tokenizer.eos_token_id(), Some(setting.eos_token_id));
        let model = ProofModel::load(&dir, &LoadOptions::on(Device::Cpu).with_dtype(Dtype::F32)).unwrap();
        assert_eq!(model.config().vocab_size, setting.vocab_size as usize);
        assert_eq!(model.config().max_position_embeddings, setting.max_position_embeddings);
        // The same rows are part of the environment.
        assert!(setting.dataset_rows.ends_with("/gsm_train.jsonl.gz"), "{}", setting.dataset_rows);
        let environment = Gsm8k::embedded(Split::Train).unwrap();
        let template = ChatTemplate::from_dir(&dir).unwrap();
        Self { context, setting, model, tokenizer, template, environment, known: HashMap::new() }
    }

    fn prompt(&self, needed: &NeededGroup) -> Vec<TokenId> {
        let task = self.environment.task(needed.seed).unwrap();
        prompt_ids(&task, self.setting.thinking_mode, &self.tokenizer, &self.template).unwrap()
    }

    fn evaluate(&self, row: &NeededRow) -> RowEvaluation {
        let task = self.environment.task(row.seed).unwrap();
        let completion = self.tokenizer.decode(&row.tokens[row.prompt_length..]).unwrap();
        let evaluation = self.environment.evaluate(&task, &completion, self.setting.thinking_mode);
        // This environment computes and never waits.
        let Poll::Ready(evaluation) = pin!(evaluation).poll(&mut Context::from_waker(Waker::noop())) else {
            panic!("gsm8k waits for something");
        };
        let evaluation = evaluation.unwrap();
        RowEvaluation { reward: evaluation.reward, success: evaluation.success }
    }

    /// Runs the rows that no file before had, in batches as the reference does.
    fn run(&mut self, rows: &[NeededRow]) {
        let key = |row: &NeededRow| (row.tokens.clone(), row.prompt_length, row.randomness.clone());
        let new: Vec<&NeededRow> = rows.iter().filter(|row| !self.known.contains_key(&key(row))).collect();
        for rows in new.chunks(16) {
            let coefficients: Vec<SketchCoeffs> =
                rows.iter().map(|row| SketchCoeffs::from_randomness(&row.randomness)).collect();
            let inputs: Vec<VerifyInput<'_>> = rows
                .iter()
                .zip(&coefficients)
                .map(|(row, coefficients)| VerifyInput {
                    tokens: &row.tokens,
                    prompt_length: row.prompt_length,
                    coefficients,
                    temperature: self.setting.generation_params.temperature,
                    repetition_penalty: self.setting.generation_params.repetition_penalty,
                    eos_token: self.setting.eos_token_id,
                })
                .collect();
            for (row, output) in rows.iter().zip(self.model.verify(&inputs).unwrap()) {
                let forward = Forward {
                    sketches: output.sketches,
                    logprobs: output.logprobs,
                    eos_probability: output.eos_probability,
                    chosen_probabilities: output.chosen_probabilities,
                };
                self.known.insert(key(row), forward);
            }
        }
    }

    fn judge(&mut self, file: &WindowFile) -> Report {
        let needs = needs(file, &self.context);
        self.run(&needs.rows);
        let facts = Facts {
            prompts: needs.groups.iter().map(|needed| (needed.group, Ok(self.prompt(needed)))).collect(),
            rows: needs
                .rows
                .iter()
                .map(|row| {
                    let forward = &self.known[&(row.tokens.clone(), row.prompt_length, row.randomness.clone())];
                    (row.row, RowFacts { forward: Ok(forward.clone()), evaluation: Ok(self.evaluate(row)) })
                })
                .collect(),
        };
        validate(file, &self.context, &facts).unwrap()
    }

    fn report(&mut self, file: &str, digest: &str) -> (Report, Option<WindowFile>) {
        let path = format!("protocol/{file}");
        let bytes = grail_golden::bytes(&path);
        assert_eq!(hex::encode(sha256(&bytes)), digest, "{file}");
        grail_golden::ran(&path, 1, 1);
        match read_bytes(bytes) {
            Ok(read) => (self.judge(&read), Some(read)),
            Err(error) => (Report::of_read_error(&error), None),
        }
    }
}

/// How two numbers are compared, by the key that they stand under.
fn tolerance(key: &str, expected: f64) -> f64 {
    match key {
        "env_reward" => 1e-9,
        "logprob_median_dev" | "logprob_max_dev" => 1e-3,
        "mean" | "median" | "q10" | "min" | "low_frac" | "high_frac" | "mid_frac" | "bc" => expected.abs() * 0.01,
        _ => 0.0,
    }
}

/// Compares two documents; numbers within the tolerance of the key that they stand under. Keys that only ours has are named in
/// `ours_only`.
fn assert_matches(path: &str, ours: &Value, expected: &Value, ours_only: &[&str]) {
    match (ours, expected) {
        (Value::Object(ours), Value::Object(expected)) => {
            let mut keys: Vec<&String> = ours.keys().filter(|key| !ours_only.contains(&key.as_str())).collect();
            let mut expected_keys: Vec<&String> = expected.keys().collect();
            keys.sort_unstable();
            expected_keys.sort_unstable();
            assert_eq!(keys, expected_keys, "{path}");
            for (key, expected) in expected {
                assert_matches(&format!("{path}.{key}"), &ours[key], expected, ours_only);
            }
        }
        (Value::Array(ours), Value::Array(expected)) => {
            assert_eq!(ours.len(), expected.len(), "{path}");
            for (index, (ours, expected)) in ours.iter().zip(expected).enumerate() {
                assert_matches(&format!("{path}[{index}]"), ours, expected, ours_only);
            }
        }
        (Value::Number(number), Value::Number(wanted)) if number.is_f64() || wanted.is_f64() => {
            let (number, wanted) = (number.as_f64().unwrap(), wanted.as_f64().unwrap());
            let key = path.rsplit('.').next().unwrap_or(path);
            assert!((number - wanted).abs() <= tolerance(key, wanted), "{path}: {number}, expected {wanted}");
        }
        _ => assert_eq!(ours, expected, "{path}"),
    }
}

/// Rows that a self-test must warn about: their sketches or logprobs are not the model's. Most of these files the reference
/// accepts.
fn inexact_rows(name: &str) -> Vec<usize> {
    match name {
        "sketch_shift_5000"
        | "sketch_shift_7000"
        | "sketch_shift_6000_pos_dependent"
        | "sketch_plus_modulus"
        | "commitment_without_sketch_key" => vec![4],
        "wrong_completion_token" | "wrong_completion_token_not_resigned" | "completion_replaced" => vec![5],
        "beacon_other_than_proved" => vec![2],
        "logprobs_shift_0.20"
        | "logprobs_shift_0.09"
        | "logprobs_quarter_wrong"
        | "logprobs_too_short"
        | "logprobs_nan"
        | "logprobs_minus_inf"
        | "temperature_scaled_logprobs"
        | "logprobs_quarter_minus_inf"
        | "logprobs_quarter_minus_1000"
        | "logprobs_median_just_below"
        | "logprobs_median_just_above"
        | "logprobs_15_of_32_wrong"
        | "logprobs_16_of_32_dev_0.15"
        | "logprobs_16_of_32_dev_0.25" => vec![6],
        _ => Vec::new(),
    }
}

/// Findings that the reference does not have, as (code, row); rows as ranges.
fn strict_findings(name: &str) -> Vec<(FindingCode, Vec<usize>)> {
    use FindingCode as Code;
    match name {
        "sketch_plus_modulus" => vec![(Code::SketchOutOfRange, vec![4])],
        "row_signed_by_other_key" => vec![(Code::ForeignHotkey, vec![3])],
        "challenge_with_other_text" => vec![(Code::WrongChallenge, vec![3])],
        _ => Vec::new(),
    }
}

fn assert_setting(validator: &Validator) {
    let setting = &validator.setting;
    assert_eq!(mix_miner(&setting.window_hash, Some(&setting.drand_miner)), setting.miner_randomness);
    assert_eq!(mix_challenge(&setting.next_block_hash, Some(&setting.drand_validator)), setting.challenge_randomness);
    assert_eq!(setting.window, WindowStart::containing(BlockNumber(setting.window.block().0 + 29)));
    for group in &setting.groups {
        let seed = grail_protocol::seed::environment_seed(&setting.hotkey, &setting.window_hash, group.group);
        assert_eq!(seed.0, group.seed, "group {}", group.group);
        let task: Task = validator.environment.task(seed).unwrap();
        let Payload::Gsm8k { answer } = &task.payload else { panic!("{} is no task of gsm8k", task.id) };
        assert_eq!((task.id.as_str(), task.row), (group.task_id.as_str(), group.task_index));
        assert_eq!(group.split, setting.env_split);
        assert_eq!(hex::encode(sha256(task.question.as_bytes())), group.question_sha256);
        assert_eq!(grail_environments::gsm8k::gold_answer(answer), group.correct_answer);
        let prompt = validator.prompt(&NeededGroup { group: group.group, seed });
        assert_eq!(prompt, group.prompt_ids, "group {}", group.group);
        assert_eq!(prompt.len(), group.prompt_length);
        let text = validator.tokenizer.decode(&prompt).unwrap();
        assert_eq!(hex::encode(sha256(text.as_bytes())), group.prompt_text_sha256, "group {}", group.group);
    }
}

fn assert_valid(validator: &mut Validator, valid: &Valid) {
    let (report, file) = validator.report(&valid.file, &valid.sha256);
    let shown = serde_json::to_value(&report).unwrap();
    let reference = &valid.reference;
    assert_eq!(shown["verdict"], reference.verdict);
    assert_eq!(shown["failure_reason"], reference.failure_reason);
    assert_eq!(shown["metrics"], reference.metrics);
    assert_eq!(shown["processed"], reference.processed);
    assert_eq!(report.indices_checked.as_ref(), Some(&reference.indices_checked));
    let rows = shown["all_rows"]["rows"].as_array().unwrap();
    let sampled: Vec<Value> = reference.indices_checked.iter().map(|index| rows[*index].clone()).collect();
    assert_matches("valid.rows", &json!(sampled), &json!(reference.rows), &["note"]);

    let all = &report.all_rows;
    let failed = valid.all_rows.hard_failure || valid.all_rows.soft_gate || !valid.all_rows.groups_valid;
    assert_eq!(all.verdict, if failed { Verdict::Failed } else { Verdict::Success });
    assert_eq!(shown["all_rows"]["failure_reason"], valid.all_rows.failure_reason);
    assert_eq!(
        (all.valid, all.checked, all.unique),
        (valid.all_rows.valid, valid.all_rows.checked, valid.all_rows.unique)
    );
    assert_eq!(shown["all_rows"]["soft_failures"], valid.all_rows.soft_failures);
    assert_eq!(all.groups_valid, Some(valid.all_rows.groups_valid));
    assert_matches("all_rows", &shown["all_rows"]["rows"], &json!(valid.all_rows.rows), &["note"]);

    let mut digests: BTreeMap<String, usize> = BTreeMap::new();
    for row in &file.unwrap().rows {
        *digests.entry(hex::encode(row_completion_digest(row).unwrap())).or_default() += 1;
    }
    assert_eq!(digests, reference.digests);
    assert_eq!(report.distinct_digests, Some(reference.digests.len()));
    assert_eq!(report.strict, Vec::new());
    assert_eq!(report.exactness.rows_below, Vec::new());
    assert!(report.exactness.sketch_equal.unwrap() >= 0.99, "{:?}", report.exactness);
    assert!(report.exactness.logprob_equal.unwrap() >= 0.99, "{:?}", report.exactness);
    assert!(report.is_accepted());
}

fn assert_variant(validator: &mut Validator, variant: &Variant) {
    let (report, _) = validator.report(&variant.file, &variant.sha256);
    let shown = serde_json::to_value(&report).unwrap();
    let (name, reference) = (&variant.name, &variant.reference);
    let context = format!("{name}: {}", variant.what);
    assert_eq!(shown["verdict"], reference.verdict, "{context}");
    assert_eq!(shown["failure_reason"], reference.failure_reason, "{context}");
    assert_eq!(shown["metrics"], reference.metrics, "{context}");
    assert_eq!(shown["processed"], reference.processed, "{context}");
    assert_eq!(shown["indices_checked"], reference.indices_checked, "{context}");
    assert_eq!(shown["rows_checked"], reference.rows_checked, "{context}");
    assert_eq!(shown["first_failing_row_checks"], reference.first_failing_row_checks, "{context}");
    assert_eq!(shown["distinct_digests"], reference.distinct_digests, "{context}");
    assert_matches(name, &shown["row_checks"], &json!(reference.row_checks), &[]);

    // A file of one group is never sampled, so both verdicts see the same rows.
    if report.metrics.is_some_and(|metrics| metrics.total <= 20) {
        assert_eq!(report.all_rows.verdict, report.verdict, "{context}");
        assert_eq!(report.all_rows.failure_reason, report.failure_reason, "{context}");
    }
    let below: Vec<usize> = report.exactness.rows_below.iter().map(|row| row.row).collect();
    assert_eq!(below, inexact_rows(name), "{context}: {:?}", report.exactness.rows_below);

    for (code, rows) in strict_findings(name) {
        let found: Vec<usize> =
            report.strict.iter().filter(|finding| finding.code == code).map(|finding| finding.row).collect();
        assert_eq!(found, rows, "{context}: {code:?}");
    }
    let errors = report.strict.iter().any(|finding| finding.severity == Severity::Error);
    assert_eq!(
        report.is_accepted(),
        report.verdict == Verdict::Success && report.all_rows.verdict == Verdict::Success && !errors
    );
    assert_eq!(
        variant.local_verify.is_some(),
        errors && report.verdict == Verdict::Success,
        "{context}: {:?}, {:?}",
        variant.local_verify,
        report.strict
    );
}

#[test]
fn every_window_file_gets_the_verdict_of_the_reference() {
    let vectors: Vectors = grail_golden::json(FILE);
    assert_eq!(vectors.context.model_name, "tiny/qwen3-tied");
    let total = 1 + vectors.variants.len();
    let mut validator = Validator::new(vectors.context);
    assert_setting(&validator);
    assert_valid(&mut validator, &vectors.valid);
    let mut ran = 1;
    for variant in &vectors.variants {
        assert_variant(&mut validator, variant);
        ran += 1;
    }
    assert_eq!(total, 94);
    grail_golden::ran(FILE, ran, total);
}

/// Honest files differ from the rest in their findings; this is the whole list, so that a new finding on an honest file shows.
#[test]
fn findings_are_made_on_the_files_that_deserve_them() {
    let vectors: Vectors = grail_golden::json(FILE);
    let mut validator = Validator::new(vectors.context);
    let mut found: BTreeMap<&str, BTreeMap<FindingCode, Vec<usize>>> = BTreeMap::new();
    for variant in &vectors.variants {
        let (report, _) = validator.report(&variant.file, &variant.sha256);
        for finding in report.strict {
            found.entry(&variant.name).or_default().entry(finding.code).or_default().push(finding.row);
        }
    }
    let mut lines = Vec::new();
    for (name, codes) in found {
        for (code, rows) in codes {
            lines.push(format!("{name} {} {rows:?}", json!(code).as_str().unwrap()));
        }
    }
    let expected: Vec<&str> = include_str!("window_findings.txt").lines().collect();
    assert_eq!(lines, expected);
}
