//! Form of one commit (validation §5) by lax rules: what converts without loss counts as its type.

use crate::constants::{CHALLENGE_K, MAX_NEW_TOKENS_PROTOCOL_CAP};
use crate::json::Value;
use crate::window_file::{Commitments, List, ReadCommit};

/// Whether the commit has the form that every later check relies on.
pub(super) fn is_valid(commit: &ReadCommit) -> bool {
    // If the token list itself is invalid the dependent lengths compare with 0, and the row fails either way.
    let length = commit.tokens.len();
    all_lax(&commit.tokens, lax_int)
        && length >= CHALLENGE_K
        && commitments_are_objects(&commit.commitments)
        && commit.commitments.len() == Some(length)
        && commit.proof_version.is_some()
        && commit.signature.is_some()
        && commit.model_name.is_some()
        && commit.layer_index.is_some()
        && commit.beacon_randomness().is_some_and(is_hex)
        && rollout_is_valid(commit, length)
}

fn rollout_is_valid(commit: &ReadCommit, length: usize) -> bool {
    let rollout = &commit.rollout;
    let lengths = rollout.prompt_length.zip(rollout.completion_length).is_some_and(|(prompt, completion)| {
        prompt >= 0
            && (1..=i64::from(MAX_NEW_TOKENS_PROTOCOL_CAP)).contains(&completion)
            && i128::from(prompt) + i128::from(completion) == length as i128
    });
    lengths
        && rollout.success.is_some()
        && rollout.total_reward.is_some()
        && rollout.advantage.is_some()
        && all_lax(&rollout.token_logprobs, lax_float)
}

/// One or more hexadecimal digits in either case.
fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn commitments_are_objects(commitments: &Commitments) -> bool {
    match commitments {
        Commitments::Sketches(_) => true,
        Commitments::Other(value) => {
            value.as_array().is_some_and(|items| items.iter().all(|item| item.as_object().is_some()))
        }
    }
}

fn all_lax<T>(list: &List<T>, is_lax: impl Fn(&Value) -> bool) -> bool {
    match list {
        List::Plain(_) => true,
        List::Other(values) => values.iter().all(is_lax),
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
