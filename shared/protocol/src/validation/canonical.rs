//! The compact JSON of a commit as read from the file: what group digests hash.

use crate::binding::compact_commitments;
use crate::json::{Style, Value, push_escaped, push_float, push_signed};
use crate::window_file::{Commitments, List, ReadCommit, ReadRollout};

/// `json.dumps(commit, sort_keys=True, separators=(",", ":"))`. Logprobs are widened from binary32.
#[must_use]
pub fn canonical_commit(commit: &ReadCommit) -> String {
    // A token, its logprob and its commitment take about 50 bytes.
    let mut out = String::with_capacity(512 + commit.tokens.len() * 56);
    out.push_str("{\"beacon\":");
    commit.beacon.push_json(&mut out, Style::CompactSorted);
    out.push_str(",\"commitments\":");
    push_commitments(&mut out, &commit.commitments);
    out.push_str(",\"model\":{\"layer_index\":");
    push_int(&mut out, commit.layer_index);
    out.push_str(",\"name\":");
    push_text(&mut out, commit.model_name.as_deref());
    out.push_str("},\"proof_version\":");
    push_text(&mut out, commit.proof_version.as_deref());
    out.push_str(",\"rollout\":");
    push_rollout(&mut out, &commit.rollout);
    out.push_str(",\"signature\":");
    push_text(&mut out, commit.signature.as_deref());
    out.push_str(",\"tokens\":");
    push_list(&mut out, &commit.tokens, |out, token| push_signed(out, i64::from(*token)));
    out.push('}');
    out
}

/// The compact JSON of the commitments, keys sorted: what the commit signature binds.
#[must_use]
pub fn canonical_commitments(commitments: &Commitments) -> String {
    let mut out = String::new();
    push_commitments(&mut out, commitments);
    out
}

fn push_commitments(out: &mut String, commitments: &Commitments) {
    match commitments {
        Commitments::Sketches(sketches) => out.push_str(&compact_commitments(sketches)),
        Commitments::Other(value) => value.push_json(out, Style::CompactSorted),
    }
}

fn push_rollout(out: &mut String, rollout: &ReadRollout) {
    out.push_str("{\"advantage\":");
    push_number(out, rollout.advantage);
    out.push_str(",\"completion_length\":");
    push_int(out, rollout.completion_length);
    out.push_str(",\"prompt_length\":");
    push_int(out, rollout.prompt_length);
    out.push_str(",\"success\":");
    out.push_str(match rollout.success {
        None => "null",
        Some(true) => "true",
        Some(false) => "false",
    });
    out.push_str(",\"token_logprobs\":");
    push_list(out, &rollout.token_logprobs, |out, logprob| push_float(out, f64::from(*logprob)));
    out.push_str(",\"total_reward\":");
    push_number(out, rollout.total_reward);
    out.push('}');
}

fn push_list<T>(out: &mut String, list: &List<T>, push: impl Fn(&mut String, &T)) {
    let mut separator = "[";
    match list {
        List::Plain(values) => {
            for value in values {
                out.push_str(separator);
                push(out, value);
                separator = ",";
            }
        }
        List::Other(values) => {
            for value in values {
                out.push_str(separator);
                value.push_json(out, Style::CompactSorted);
                separator = ",";
            }
        }
    }
    out.push_str(if list.is_empty() { "[]" } else { "]" });
}

fn push_int(out: &mut String, value: Option<i64>) {
    match value {
        Some(value) => push_signed(out, value),
        None => out.push_str("null"),
    }
}

fn push_number(out: &mut String, value: Option<f64>) {
    match value {
        Some(value) => push_float(out, value),
        None => out.push_str("null"),
    }
}

fn push_text(out: &mut String, text: Option<&str>) {
    match text {
        Some(text) => push_escaped(out, text),
        None => Value::Null.push_json(out, Style::CompactSorted),
    }
}
