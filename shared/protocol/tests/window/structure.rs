//! Every golden window file against the structural part of its verdict.

use grail_protocol::hash::sha256;
use grail_protocol::ids::{BlockHash, BlockNumber, CheckpointWindow, Hotkey, TokenId, WindowStart};
use grail_protocol::validation::{Facts, Report, ValidationContext, Verdict, check_structure, needs, validate};
use grail_protocol::window_file::{ReadError, read_bytes};
use serde_json::{Value, json};

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

#[test]
fn a_report_has_the_documented_shape() {
    let vectors: Value = grail_golden::json("protocol/window_verdicts.json");
    let context = context(&vectors);
    let empty = read_bytes(golden_bytes("no_rows")).unwrap();
    let report = validate(&empty, &context, &Facts::default()).unwrap();
    assert!(report.is_accepted());
    let zero = json!({
        "valid": 0, "checked": 0, "total": 0, "estimated_valid": 0, "successful": 0, "estimated_successful": 0,
        "unique": 0, "estimated_unique": 0, "prompt_valid": 0, "prompt_mismatch": 0, "had_failure": 0,
    });
    let processed = json!({"total": 0, "invalid_signature": 0, "invalid_proof": 0, "processing_error": 0});
    let accepted = json!({
        "schema": 1, "verdict": "success", "failure_reason": null, "metrics": zero, "processed": processed,
        "indices_checked": [], "rows_checked": 0, "first_failing_row_checks": null, "row_checks": [],
        "distinct_digests": 0,
        "all_rows": {
            "verdict": "success", "failure_reason": null, "valid": 0, "checked": 0, "unique": 0, "soft_failures": {},
            "groups_valid": true, "rows": [],
        },
        "strict": [],
        "exactness": {"sketch_equal": null, "logprob_equal": null, "rows_below": []},
    });
    assert_eq!(serde_json::to_value(&report).unwrap(), accepted);

    let mut rejected = accepted;
    for (key, value) in [("verdict", json!("file-rejected")), ("failure_reason", json!("file:corrupt_parquet"))] {
        rejected[key] = value.clone();
        rejected["all_rows"][key] = value;
    }
    rejected["metrics"]["had_failure"] = json!(1);
    rejected["indices_checked"] = Value::Null;
    rejected["distinct_digests"] = Value::Null;
    rejected["all_rows"]["groups_valid"] = Value::Null;
    let error = read_bytes(golden_bytes("truncated_file")).unwrap_err();
    let report = Report::of_read_error(&error);
    assert!(!report.is_accepted());
    assert_eq!(serde_json::to_value(&report).unwrap(), rejected);
}

#[test]
fn facts_that_were_not_supplied_are_no_verdict() {
    let vectors: Value = grail_golden::json("protocol/window_verdicts.json");
    let context = context(&vectors);
    let file = read_bytes(golden_bytes("valid_one_group")).unwrap();
    let needs = needs(&file, &context);
    assert_eq!((needs.groups.len(), needs.rows.len()), (1, 16));
    assert_eq!(needs.groups[0].seed.0, 1_990_056_608);
    let error = validate(&file, &context, &Facts::default()).unwrap_err();
    assert_eq!(error.to_string(), "no canonical prompt was supplied for group 0");
}
