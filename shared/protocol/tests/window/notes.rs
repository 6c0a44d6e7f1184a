//! What is said of each miss: the position, what was found, and what was expected or allowed.

use std::collections::HashMap;

use grail_protocol::constants::PRIME_Q;
use grail_protocol::ids::{BlockHash, CheckpointWindow, GroupIndex, TokenId};
use grail_protocol::validation::{
    Check, Facts, FindingCode, Forward, Report, RowEvaluation, RowFacts, ValidationContext, validate,
};
use grail_protocol::window_file::{Commitments, List, ReadRow, Row, WindowFile, read_bytes, write_file};

use crate::samples::{BLOCK_HASH, WINDOW, header, keypair, rows, sign, window};

const PROMPT: u32 = 6;
const COMPLETION: u32 = 40;
const EOS: TokenId = TokenId(399);

/// The row that has something wrong.
const ROW: usize = 3;

/// A change before the row is written and signed, after it was read, or to what the model and the environment say.
enum Change {
    Written(fn(&mut Row)),
    Read(fn(&mut ReadRow)),
    Known(fn(&mut RowFacts)),
}

fn context() -> ValidationContext {
    ValidationContext {
        hotkey: keypair().hotkey().clone(),
        window: window(),
        window_hash: BlockHash(BLOCK_HASH.to_owned()),
        checkpoint_window: Some(CheckpointWindow(WINDOW - 30)),
        max_tokens: Some(i64::from(COMPLETION)),
        eos_token: Some(EOS),
        vocab_size: 400,
        max_position_embeddings: 64,
        challenge: "ab".repeat(32).parse().unwrap(),
    }
}

/// What an honest row's model and environment say.
fn known(row: &Row) -> RowFacts {
    let commit = &row.commit;
    let logprobs = &commit.rollout.completion_logprobs;
    RowFacts {
        forward: Ok(Forward {
            sketches: commit.sketches.clone(),
            logprobs: logprobs.clone(),
            eos_probability: 1.0,
            chosen_probabilities: vec![0.75; logprobs.len()],
        }),
        evaluation: Ok(RowEvaluation { reward: commit.rollout.total_reward, success: commit.rollout.success }),
    }
}

fn report(change: &Change) -> Report {
    let mut rows = rows(0..1, PROMPT, COMPLETION);
    let mut facts: HashMap<usize, RowFacts> = rows.iter().map(known).enumerate().collect();
    match change {
        Change::Written(write) => {
            write(&mut rows[ROW]);
            sign(&mut rows[ROW]);
        }
        Change::Known(learn) => learn(facts.get_mut(&ROW).unwrap()),
        Change::Read(_) => {}
    }
    let mut file: WindowFile = read_bytes(write_file(Vec::new(), header(), &rows).unwrap()).unwrap();
    if let Change::Read(read) = change {
        read(&mut file.rows[ROW]);
    }
    let prompt = (0..PROMPT).map(TokenId).collect();
    let facts = Facts { prompts: HashMap::from([(GroupIndex(0), Ok(prompt))]), rows: facts };
    validate(&file, &context(), &facts).unwrap()
}

fn forward(facts: &mut RowFacts) -> &mut Forward {
    facts.forward.as_mut().unwrap()
}

fn ends_early(row: &mut Row, last: TokenId) {
    row.commit.tokens.pop();
    row.commit.sketches.pop();
    row.commit.rollout.completion_logprobs.pop();
    *row.commit.tokens.last_mut().unwrap() = last;
}

#[test]
fn honest_rows_have_no_note() {
    let report = report(&Change::Known(|_| {}));
    assert!(report.is_accepted(), "{report:?}");
    assert!(report.all_rows.rows.iter().all(|row| row.note.is_none()));
    assert_eq!(report.strict, []);
}

#[test]
fn each_missed_check_says_where_and_both_numbers() {
    use Change::{Known, Read, Written};
    // The check that is missed, none if the row ends before, and parts of the note.
    type Case = (Change, Option<Check>, &'static [&'static str]);
    let cases: [Case; 21] = [
        (
            Written(|row| row.checkpoint = CheckpointWindow(WINDOW)),
            None,
            &["checkpoint window 3600000, the validator's is 3599970"],
        ),
        (
            Read(|row| row.commit.rollout.completion_length = Some(39)),
            Some(Check::SchemaValid),
            &["lengths 6 of the prompt and 39 of the completion for 46 tokens"],
        ),
        (
            Read(|row| row.commit.rollout.completion_length = Some(0)),
            Some(Check::SchemaValid),
            &["completion length 0, 1 to 8192 are allowed"],
        ),
        (
            Read(|row| row.commit.commitments = Commitments::Sketches(vec![1; 45])),
            Some(Check::SchemaValid),
            &["45 commitments for 46 tokens"],
        ),
        (
            Read(|row| row.commit.tokens = List::Plain(vec![1; 5])),
            Some(Check::SchemaValid),
            &["5 tokens, at least 32 are needed"],
        ),
        (
            Written(|row| row.commit.tokens[20] = TokenId(400)),
            Some(Check::TokensValid),
            &["token 20 is 400, the vocabulary has 400"],
        ),
        (
            Read(|row| {
                row.commit.tokens = List::Plain(vec![1; 65]);
                row.commit.commitments = Commitments::Sketches(vec![1; 65]);
                row.commit.rollout.completion_length = Some(59);
            }),
            Some(Check::TokensValid),
            &["65 tokens, the model takes at most 64"],
        ),
        (
            Written(|row| row.commit.tokens[2] = TokenId(399)),
            Some(Check::EnvPromptValid),
            &["prompt token 2 is 399, canonical 2"],
        ),
        (
            Read(|row| row.commit.rollout.prompt_length = Some(7)),
            Some(Check::SchemaValid),
            &["lengths 7 of the prompt and 40 of the completion for 46 tokens"],
        ),
        (
            Read(|row| row.commit.proof_version = Some("v3".to_owned())),
            Some(Check::ProofValid),
            &["proof version \"v3\", accepted are [\"v4\", \"v5\"]"],
        ),
        (Read(|row| row.commit.layer_index = Some(-2)), Some(Check::ProofValid), &["layer index -2, must be -1"]),
        (
            Known(|facts| {
                for sketch in &mut forward(facts).sketches {
                    *sketch = (*sketch + 1_000_000) % PRIME_Q;
                }
            }),
            Some(Check::ProofValid),
            &["the sketch at ", ", the model's ", ": distance 1000000, at most ", " is allowed"],
        ),
        (
            Written(|row| ends_early(row, TokenId(7))),
            Some(Check::TerminationValid),
            &["ends after 39 of 40 tokens without EOS"],
        ),
        (
            Known(|facts| facts.evaluation = Ok(RowEvaluation { reward: 0.25, success: true })),
            Some(Check::RewardValid),
            &["claimed reward 1, environment says 0.25"],
        ),
        (
            Known(|facts| {
                for logprob in &mut forward(facts).logprobs {
                    *logprob -= 1.0;
                }
            }),
            Some(Check::LogprobsValid),
            &["median logprob deviation 1.718", "at most 0.1 is allowed; at worst the logprob at ", "the model's -"],
        ),
        (
            Known(|facts| forward(facts).logprobs.fill(f32::NAN)),
            Some(Check::LogprobsValid),
            &["the logprob at ", " is -", ", the model's NaN"],
        ),
        (
            Known(|facts| {
                for logprob in &mut forward(facts).logprobs {
                    *logprob -= 800.0;
                }
            }),
            Some(Check::LogprobsValid),
            &["the logprob at ", ", the model's -8", ": off by 800"],
        ),
        (
            Known(|facts| forward(facts).chosen_probabilities.truncate(29)),
            Some(Check::TokenDistributionValid),
            &["29 token probabilities, at least 30 are needed"],
        ),
        (
            Known(|facts| forward(facts).chosen_probabilities.fill(0.25)),
            Some(Check::TokenDistributionValid),
            &["token probabilities: median 0.25, must be above 0.3"],
        ),
        (
            Known(|facts| forward(facts).chosen_probabilities[5] = 0.0),
            Some(Check::TokenDistributionValid),
            &["token probabilities: least 0 at token 5 of the completion, must be above 0.00001"],
        ),
        (
            Known(|facts| forward(facts).chosen_probabilities[..10].fill(0.015_625)),
            Some(Check::TokenDistributionValid),
            &["10 % quantile 0.015625, must be above 0.025; 10 % quantile of the first tokens 0.015625, must be above"],
        ),
    ];
    for (change, check, parts) in cases {
        let report = report(&change);
        let row = &report.all_rows.rows[ROW];
        let missed = row.checks.0.iter().find(|(_, passed)| !passed).map(|(check, _)| *check);
        let note = row.note.clone().unwrap_or_default();
        assert_eq!(missed, check, "{note}");
        assert!(parts.iter().all(|part| note.contains(part)), "{note}: {parts:?}");
    }
}

#[test]
fn an_improbable_end_says_how_improbable() {
    let mut rows = rows(0..1, PROMPT, COMPLETION);
    ends_early(&mut rows[ROW], EOS);
    sign(&mut rows[ROW]);
    let mut facts: HashMap<usize, RowFacts> = rows.iter().map(known).enumerate().collect();
    forward(facts.get_mut(&ROW).unwrap()).eos_probability = 0.015_625;
    let file = read_bytes(write_file(Vec::new(), header(), &rows).unwrap()).unwrap();
    let prompt = (0..PROMPT).map(TokenId).collect();
    let facts = Facts { prompts: HashMap::from([(GroupIndex(0), Ok(prompt))]), rows: facts };
    let report = validate(&file, &context(), &facts).unwrap();
    let note = report.all_rows.rows[ROW].note.as_deref();
    assert_eq!(note, Some("position 44 ends in EOS of probability 0.015625, at least 0.02 is needed"));
}

#[test]
fn a_refused_group_says_which_advantage() {
    for (change, expected) in [
        (
            Change::Read(|row| row.commit.rollout.advantage = Some(0.5)),
            "the advantage at 3 is 0.5, from the rewards 1; 0.001 apart",
        ),
        (Change::Read(|row| row.commit.rollout.advantage = None), "an advantage or a reward is missing"),
    ] {
        let notes = report(&change).all_rows.group_notes;
        assert!(notes.len() == 1 && notes[0].group == 0 && notes[0].detail.starts_with(expected), "{notes:?}");
    }
}

#[test]
fn each_finding_says_where_and_both_values() {
    use Change::{Known, Read};
    type Case = (Change, FindingCode, &'static [&'static str]);
    let cases: [Case; 10] = [
        (
            Read(|row| row.hotkey = Some("5Other".to_owned())),
            FindingCode::ForeignHotkey,
            &["the row's hotkey is 5Other, the wallet's 5"],
        ),
        (
            Read(|row| row.challenge = Some("x".to_owned())),
            FindingCode::WrongChallenge,
            &["the challenge is \"x\", expected \"", BLOCK_HASH],
        ),
        (Read(|row| row.nonce = Some(77)), FindingCode::WrongNonce, &["nonce 77, from group and rollout 3"]),
        (Read(|row| row.nonce = None), FindingCode::WrongNonce, &["nonce null, from group and rollout 3"]),
        (
            Read(|row| row.randomness = Some("00".to_owned())),
            FindingCode::RandomnessColumn,
            &["the randomness column is 00, the beacon's a5a5"],
        ),
        (
            Read(|row| row.commit.commitments = Commitments::Sketches([vec![1; 9], vec![PRIME_Q; 37]].concat())),
            FindingCode::SketchOutOfRange,
            &["37 of 46 sketches are outside 0..2147483647, the first at position 9 is 2147483647"],
        ),
        (
            Read(|row| row.commit.rollout.token_logprobs = List::Plain([vec![-1.0; 10], vec![f32::NAN; 36]].concat())),
            FindingCode::NanLogprob,
            &["36 of 40 logprobs of the completion are NaN, the first at position 10"],
        ),
        (
            Known(|facts| facts.evaluation = Ok(RowEvaluation { reward: 1.0, success: false })),
            FindingCode::SuccessDiffers,
            &["claimed success true, environment says false"],
        ),
        (
            Known(|facts| {
                for sketch in &mut forward(facts).sketches {
                    *sketch = (*sketch + 1_000) % PRIME_Q;
                }
                let last = forward(facts).sketches.last_mut().unwrap();
                *last = (*last + 1_000) % PRIME_Q;
            }),
            FindingCode::SketchDistance,
            &[
                "median sketch distance 1000, honest up to 200; 2.2 % above 1500, honest up to 5.0 %",
                "the largest is 2000 at position 45",
            ],
        ),
        (Read(|row| row.rollout_group = Some(-1)), FindingCode::GroupsNotAscending, &["group -1 stands after group 0"]),
    ];
    for (change, code, parts) in cases {
        let report = report(&change);
        let details: Vec<&str> = report
            .strict
            .iter()
            .filter(|finding| finding.row == ROW && finding.code == code)
            .map(|finding| finding.detail.as_str())
            .collect();
        assert_eq!(details.len(), 1, "{code:?}: {:?}", report.strict);
        assert!(parts.iter().all(|part| details[0].contains(part)), "{}: {parts:?}", details[0]);
    }
}
