//! Sampling of groups against the reference.

use std::collections::{BTreeMap, HashMap};

use grail_protocol::hash::sha256;
use grail_protocol::ids::{BlockHash, BlockNumber, Hotkey, WindowStart};
use grail_protocol::randomness::ChallengeRandomness;
use grail_protocol::validation::{ValidationContext, canonical_commit, group_digests, groups, sampled_rows};
use grail_protocol::window_file::WindowFile;
use serde::Deserialize;

use crate::samples::golden;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vectors {
    file: String,
    hotkey: String,
    group_order_in_file: Vec<String>,
    group_digests: HashMap<String, String>,
    sorted_groups: Vec<String>,
    canonical_commit_examples: Vec<Canonical>,
    #[serde(rename = "note")]
    _note: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Canonical {
    row: usize,
    text: String,
    sha256: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    first_groups: usize,
    rows: usize,
    challenge_randomness: ChallengeRandomness,
    selected_groups: Vec<String>,
    rows_checked: usize,
    first_row: usize,
    last_row: usize,
}

fn context(hotkey: &str, challenge: ChallengeRandomness) -> ValidationContext {
    ValidationContext {
        hotkey: Hotkey(hotkey.to_owned()),
        window: WindowStart::containing(BlockNumber(0)),
        window_hash: BlockHash(String::new()),
        checkpoint_window: None,
        max_tokens: None,
        eos_token: None,
        vocab_size: 0,
        max_position_embeddings: 0,
        challenge,
    }
}

#[test]
fn groups_are_digested_ordered_and_drawn_as_the_reference_does() {
    let vectors: Vectors = grail_golden::json("protocol/group_sampling.json");
    assert_eq!(vectors.file, "windows/sampling_45_groups.parquet");
    let file = golden("sampling_45_groups");

    for example in &vectors.canonical_commit_examples {
        let text = canonical_commit(&file.rows[example.row].commit);
        assert_eq!(text, example.text, "row {}", example.row);
        assert_eq!(hex::encode(sha256(text.as_bytes())), example.sha256, "row {}", example.row);
    }

    let found = groups(&file.rows);
    let numbers: Vec<String> = found.iter().map(|group| group.number.to_string()).collect();
    assert_eq!(numbers, vectors.group_order_in_file);
    let digests = group_digests(&file.rows, &found);
    let by_name: HashMap<String, String> = numbers.iter().cloned().zip(digests.iter().map(hex::encode)).collect();
    assert_eq!(by_name, vectors.group_digests);
    let sorted: BTreeMap<_, _> = digests.iter().zip(&numbers).collect();
    assert_eq!(sorted.into_values().collect::<Vec<_>>(), vectors.sorted_groups.iter().collect::<Vec<_>>());

    let total = vectors.cases.len();
    let mut ran = 0;
    for case in vectors.cases {
        let shown = format!("{} groups, {}", case.first_groups, case.challenge_randomness);
        let allowed = &vectors.group_order_in_file[..case.first_groups];
        let rows: Vec<_> =
            file.rows.iter().filter(|row| allowed.contains(&row.rollout_group.unwrap().to_string())).cloned().collect();
        assert_eq!(rows.len(), case.rows, "{shown}");
        let part = WindowFile { metadata: file.metadata.clone(), rows };
        let checked = sampled_rows(&part, &context(&vectors.hotkey, case.challenge_randomness));
        assert_eq!(checked.len(), case.rows_checked, "{shown}");
        assert_eq!((checked.first(), checked.last()), (Some(&case.first_row), Some(&case.last_row)), "{shown}");
        let mut selected: Vec<i64> = checked.iter().map(|row| part.rows[*row].rollout_group.unwrap()).collect();
        selected.sort_unstable();
        selected.dedup();
        let mut expected: Vec<i64> = case.selected_groups.iter().map(|group| group.parse().unwrap()).collect();
        expected.sort_unstable();
        assert_eq!(selected, expected, "{shown}");
        ran += 1;
    }
    grail_golden::ran("protocol/group_sampling.json", ran, total);
    grail_golden::ran("protocol/windows/sampling_45_groups.parquet", 1, 1);
}
