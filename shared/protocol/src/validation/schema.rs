//! Form of one commit (validation §5) by lax rules: what converts without loss counts as its type.

use crate::constants::{CHALLENGE_K, MAX_NEW_TOKENS_PROTOCOL_CAP};
use crate::json::Value;
use crate::window_file::{Commitments, List, ReadCommit, ReadRollout};

/// What the commit lacks of the form that every later check relies on.
pub(super) fn defect(commit: &ReadCommit) -> Option<String> {
    // If the token list itself is invalid the dependent lengths compare with 0, and the row fails either way.
    let length = commit.tokens.len();
    if let Some(position) = first_not(&commit.tokens, lax_int) {
        return Some(format!("token {position} is no integer"));
    }
    if length < CHALLENGE_K {
        return Some(format!("{length} tokens, at least {CHALLENGE_K} are needed"));
    }
    commitments_defect(&commit.commitments, length)
        .or_else(|| missing_field(commit).map(|field| format!("{field} is missing")))
        .or_else(|| randomness_defect(commit.beacon_randomness()))
        .or_else(|| rollout_defect(&commit.rollout, length))
}

fn commitments_defect(commitments: &Commitments, length: usize) -> Option<String> {
    if !commitments_are_objects(commitments) {
        return Some("the commitments are no list of objects".to_owned());
    }
    let count = commitments.len().unwrap_or(0);
    (commitments.len() != Some(length)).then(|| format!("{count} commitments for {length} tokens"))
}

fn missing_field(commit: &ReadCommit) -> Option<&'static str> {
    [
        ("the proof version", commit.proof_version.is_some()),
        ("the signature", commit.signature.is_some()),
        ("the model's name", commit.model_name.is_some()),
        ("the layer index", commit.layer_index.is_some()),
    ]
    .into_iter()
    .find_map(|(field, is_there)| (!is_there).then_some(field))
}

fn randomness_defect(randomness: Option<&str>) -> Option<String> {
    let Some(text) = randomness else { return Some("the beacon has no randomness".to_owned()) };
    match text.chars().position(|digit| !digit.is_ascii_hexdigit()) {
        None if text.is_empty() => Some("the beacon's randomness has 0 digits, at least 1 is needed".to_owned()),
        None => None,
        Some(position) => Some(format!("character {position} of the beacon's randomness is not hexadecimal")),
    }
}

fn rollout_defect(rollout: &ReadRollout, length: usize) -> Option<String> {
    let Some((prompt, completion)) = rollout.prompt_length.zip(rollout.completion_length) else {
        return Some("a length of prompt or completion is missing".to_owned());
    };
    if prompt < 0 {
        return Some(format!("prompt length {prompt}, at least 0 is allowed"));
    }
    if !(1..=i64::from(MAX_NEW_TOKENS_PROTOCOL_CAP)).contains(&completion) {
        return Some(format!("completion length {completion}, 1 to {MAX_NEW_TOKENS_PROTOCOL_CAP} are allowed"));
    }
    if i128::from(prompt) + i128::from(completion) != length as i128 {
        return Some(format!("lengths {prompt} of the prompt and {completion} of the completion for {length} tokens"));
    }
    let fields = [
        ("success", rollout.success.is_some()),
        ("total reward", rollout.total_reward.is_some()),
        ("advantage", rollout.advantage.is_some()),
    ];
    if let Some((field, _)) = fields.into_iter().find(|(_, is_there)| !is_there) {
        return Some(format!("the {field} is missing"));
    }
    first_not(&rollout.token_logprobs, lax_float).map(|position| format!("logprob {position} is no number"))
}

fn commitments_are_objects(commitments: &Commitments) -> bool {
    match commitments {
        Commitments::Sketches(_) => true,
        Commitments::Other(value) => {
            value.as_array().is_some_and(|items| items.iter().all(|item| item.as_object().is_some()))
        }
    }
}

/// Position of the first element that is not as `is_lax` wants it.
fn first_not<T>(list: &List<T>, is_lax: impl Fn(&Value) -> bool) -> Option<usize> {
    match list {
        List::Plain(_) => None,
        List::Other(values) => values.iter().position(|value| !is_lax(value)),
    }
}

/// Integers, bools, whole floats and texts of integers.
fn lax_int(value: &Value) -> bool {
    match value {
        Value::Int(_) | Value::BigInt(_) | Value::Bool(_) => true,
        Value::Float(float) => float.is_finite() && float.fract() == 0.0,
        Value::String(text) => text.as_str().is_some_and(|text| text.trim().parse::<i128>().is_ok()),
        Value::Null | Value::Array(_) | Value::Object(_) => false,
    }
}

/// Numbers, bools and texts of numbers.
fn lax_float(value: &Value) -> bool {
    match value {
        Value::Int(_) | Value::BigInt(_) | Value::Bool(_) | Value::Float(_) => true,
        Value::String(text) => text.as_str().is_some_and(|text| text.trim().parse::<f64>().is_ok()),
        Value::Null | Value::Array(_) | Value::Object(_) => false,
    }
}
