//! The miner's own checks before an upload.

use std::collections::HashMap;

use grail_protocol::ids::{CheckpointWindow, GroupIndex, TokenId};
use grail_protocol::validation::{CheapCheck, Problem, ProofOutput, ValidationContext, cheap_checks};
use grail_protocol::window_file::{Row, WindowFile, read_bytes, write_file};

use crate::samples::{BLOCK_HASH, WINDOW, header, keypair, rows, sign, window};

const PROMPT: u32 = 6;
const COMPLETION: u32 = 40;
const EOS: TokenId = TokenId(399);

fn context() -> ValidationContext {
    ValidationContext {
        hotkey: keypair().hotkey().clone(),
        window: window(),
        window_hash: grail_protocol::ids::BlockHash(BLOCK_HASH.to_owned()),
        checkpoint_window: Some(CheckpointWindow(WINDOW - 30)),
        max_tokens: Some(i64::from(COMPLETION)),
        eos_token: Some(EOS),
        vocab_size: 400,
        max_position_embeddings: 4_096,
        challenge: "ab".repeat(32).parse().unwrap(),
    }
}

fn file(rows: &[Row]) -> WindowFile {
    read_bytes(write_file(Vec::new(), header(), rows).unwrap()).unwrap()
}

fn problems_with_eos(rows: &[Row], proved: &[Row], eos_probability: f32) -> Vec<String> {
    let prompts: HashMap<GroupIndex, Vec<TokenId>> =
        rows.iter().map(|row| (row.group, (0..PROMPT).map(TokenId).collect())).collect();
    let proof = |index: usize| {
        let commit = &proved[index].commit;
        Some(ProofOutput { sketches: &commit.sketches, logprobs: &commit.rollout.completion_logprobs, eos_probability })
    };
    let context = context();
    let check = CheapCheck { context: &context, prompts: &prompts, proof: &proof };
    cheap_checks(&file(rows), &check).iter().map(Problem::to_string).collect()
}

/// Problems of good rows after `change`; the proof is the one of the unchanged rows.
fn problems(change: impl Fn(&mut Vec<Row>)) -> Vec<String> {
    let good = rows(0..2, PROMPT, COMPLETION);
    let mut changed = good.clone();
    change(&mut changed);
    problems_with_eos(&changed, &good, 1.0)
}

#[test]
fn good_rows_have_no_problem() {
    assert_eq!(problems(|_| {}), Vec::<String>::new());
}

#[test]
fn each_problem_is_named_with_its_row() {
    type Change = fn(&mut Vec<Row>);
    let cases: [(Change, &str); 13] = [
        (|rows| drop(rows.pop()), "rejected: invalid_group_size"),
        (|rows| rows[4].signature = "00".repeat(64), "row 4 (group Some(0)): the row signature"),
        (|rows| rows[4].checkpoint = CheckpointWindow(WINDOW), "checkpoint window 3600000, the validator's is 3599970"),
        (
            |rows| rows[17].commit.tokens[20] = TokenId(400),
            "row 17 (group Some(1)): token 20 is 400, the vocabulary has 400",
        ),
        (|rows| rows[17].commit.tokens[20] = TokenId(1), "row 17 (group Some(1)): the commit signature"),
        (|rows| rows[17].commit.sketches[0] ^= 1, "row 17 (group Some(1)): the commit signature"),
        (
            |rows| {
                rows[17].commit.tokens[2] = TokenId(399);
                sign(&mut rows[17]);
            },
            "row 17 (group Some(1)): prompt token 2 is 399, canonical 2",
        ),
        (
            |rows| {
                rows[17].commit.sketches[9] ^= 1;
                sign(&mut rows[17]);
            },
            "row 17 (group Some(1)): the sketch at 9 is ",
        ),
        (
            |rows| {
                rows[17].commit.sketches[9] = 2_147_483_647;
                sign(&mut rows[17]);
            },
            "row 17 (group Some(1)): 1 of 46 sketches are outside",
        ),
        (
            |rows| rows[3].commit.rollout.completion_logprobs[5] = f32::NAN,
            "row 3 (group Some(0)): the logprob at 11 is NaN",
        ),
        (|rows| rows[3].commit.rollout.completion_logprobs[5] = 0.5, "row 3 (group Some(0)): the logprob at 11 is 0.5"),
        (|rows| rows[3].commit.rollout.completion_logprobs[5] -= 1.0, ", the proof's -"),
        (
            |rows| rows[3].commit.rollout.advantage = 0.0,
            "group 0: the advantage at 3 is 0, from the rewards 1; 0.001 apart",
        ),
    ];
    for (change, expected) in cases {
        let found = problems(change);
        assert!(found.iter().any(|problem| problem.contains(expected)), "{expected}: {found:?}");
    }
}

#[test]
fn a_short_completion_needs_a_probable_eos() {
    let mut ended = rows(0..1, PROMPT, COMPLETION - 1);
    let last = ended[0].commit.tokens.len() - 1;
    for row in &mut ended {
        row.commit.tokens[last] = EOS;
        sign(row);
    }
    assert_eq!(problems_with_eos(&ended, &ended, 0.021), Vec::<String>::new());
    let improbable = problems_with_eos(&ended, &ended, 0.019);
    assert_eq!(improbable.len(), 16);
    assert!(improbable[0].contains("ends in EOS of probability 0.019"), "{improbable:?}");
    let stopped = rows(0..1, PROMPT, COMPLETION - 1);
    let stopped = problems_with_eos(&stopped, &stopped, 1.0);
    assert!(stopped[0].contains("ends after 39 of 40 tokens without EOS"), "{stopped:?}");
}
