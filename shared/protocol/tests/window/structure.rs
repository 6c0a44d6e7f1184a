//! Every golden window file against the structural part of its verdict.

use grail_protocol::hash::sha256;
use grail_protocol::ids::{BlockHash, BlockNumber, CheckpointWindow, Hotkey, TokenId, WindowStart};
use grail_protocol::validation::{Report, ValidationContext, Verdict, check_structure, needs};
use grail_protocol::window_file::{ReadError, read_bytes};
use serde_json::Value;

use crate::samples::golden_bytes;

pub fn context(vectors: &Value) -> ValidationContext {
    let text = |key: &str| vectors["context"][key].as_str().unwrap().to_owned();
    let number = |key: &str| vectors["context"][key].as_u64().unwrap();
    ValidationContext {
        hotkey: Hotkey(text("hotkey")),
        window: WindowStart::containing(BlockNumber(number("window"))),
        window_hash: BlockHash(text("window_hash")),
        checkpoint_window: Some(CheckpointWindow(number("checkpoint_window"))),
        max_tokens: vectors["context"]["generation_params"]["max_tokens"].as_i64(),
        eos_token: Some(TokenId(u32::try_from(number("eos_token_id")).unwrap())),
        vocab_size: u32::try_from(number("vocab_size")).unwrap(),
        max_position_embeddings: usize::try_from(number("max_position_embeddings")).unwrap(),
        challenge: text("challenge_randomness").parse().unwrap(),
    }
}

/// Name, SHA-256, reason of a rejection, rows.
fn files(vectors: &Value) -> Vec<(String, String, Option<String>, Option<u64>)> {
    let valid = &vectors["valid"];
    let mut files = vec![(
        "valid".to_owned(),
        valid["sha256"].as_str().unwrap().to_owned(),
        None,
        valid["reference"]["metrics"]["total"].as_u64(),
    )];
    for variant in vectors["variants"].as_array().unwrap() {
        let reference = &variant["reference"];
        let rejected = matches!(reference["verdict"].as_str().unwrap(), "file-rejected" | "absent");
        let file = variant["file"].as_str().unwrap();
        files.push((
            file.strip_prefix("windows/").unwrap().strip_suffix(".parquet").unwrap().to_owned(),
            variant["sha256"].as_str().unwrap().to_owned(),
            rejected.then(|| reference["failure_reason"].as_str().unwrap().to_owned()),
            (!rejected).then(|| reference["metrics"]["total"].as_u64().unwrap()),
        ));
    }
    files
}

#[test]
fn every_golden_file_is_read_or_rejected_as_the_reference_does() {
    let vectors: Value = grail_golden::json("protocol/window_verdicts.json");
    let context = context(&vectors);
    let files = files(&vectors);
    let total = files.len();
    assert_eq!(total, 94);
    for (name, digest, rejection, rows) in files {
        let bytes = golden_bytes(&name);
        assert_eq!(hex::encode(sha256(&bytes)), digest, "{name}");
        let found = match read_bytes(bytes) {
            Err(error) => {
                let report = Report::of_read_error(&error);
                let expected =
                    if matches!(error, ReadError::Absent { .. }) { Verdict::Absent } else { Verdict::FileRejected };
                assert_eq!(report.verdict, expected, "{name}");
                report.failure_reason
            }
            Ok(file) => {
                if let Some(rows) = rows {
                    assert_eq!(file.rows.len() as u64, rows, "{name}");
                }
                let rejected =
                    check_structure(&file, &context).err().map(|rejection| format!("file:{}", rejection.code()));
                assert_eq!(
                    needs(&file, &context).rows.is_empty(),
                    rejected.is_some() || file.rows.is_empty(),
                    "{name}"
                );
                rejected
            }
        };
        assert_eq!(found, rejection, "{name}");
        grail_golden::ran(&format!("protocol/windows/{name}.parquet"), 1, 1);
    }
}
