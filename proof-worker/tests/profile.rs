//! `profile` of the real program on a real model.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use grail_ipc::jobs::ProveJob;
use grail_ipc::record::RecordWriter;
use grail_process::{ChildSpec, ExitCause, Signal, spawn};
use grail_protocol::ids::{GroupIndex, TokenId, WeightsHash};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_grail-proof-worker");
const MODEL: &str = "models/qwen2-tied";
/// Two small groups, twice, behind one pass to warm up.
const SMALL: [&str; 10] =
    ["--groups", "2", "--prompt", "fixed:6", "--completion", "uniform:2-9", "--warm-up", "1", "--repeats", "2"];

fn model() -> PathBuf {
    grail_golden::path(MODEL).canonicalize().unwrap()
}

fn profile(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).arg("profile").args(arguments).output().unwrap()
}

fn local(arguments: &[&str]) -> String {
    let folder = model();
    let common = ["--model", folder.to_str().unwrap(), "--threads", "1"];
    let output = profile(&[&common, arguments].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn number(report: &Value, field: &str) -> f64 {
    report.pointer(field).and_then(Value::as_f64).unwrap_or_else(|| panic!("{field} in {report}"))
}

/// Complete events of a trace, by category.
fn events(path: &Path, category: &str) -> Vec<Value> {
    let trace: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    for event in events {
        assert!(event["ph"] == "X" && event["ts"].is_f64() && event["dur"].is_f64(), "{event}");
        assert!(event["pid"].is_u64() && event["tid"].is_u64() && event["name"].is_string(), "{event}");
    }
    events.iter().filter(|event| event["cat"] == category).cloned().collect()
}

#[test]
fn a_profile_in_this_process_is_complete() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace.json");
    let report: Value =
        serde_json::from_str(&local(&[&SMALL[..], &["--json", "--trace", trace.to_str().unwrap()]].concat())).unwrap();
    assert_eq!(report["schema"], 1);
    assert_eq!((report["device"].as_str(), report["dtype"].as_str()), (Some("cpu"), Some("float32")));
    let weights = grail_model::weights_hash_of_dir(&model()).unwrap().to_string();
    assert_eq!(report["weights"], weights);
    assert_eq!((number(&report, "/groups/groups"), number(&report, "/groups/rollouts")), (2.0, 32.0));
    assert_eq!(number(&report, "/groups/prompt_tokens"), 12.0);
    assert!((64.0..=288.0).contains(&number(&report, "/groups/completion_tokens")));
    assert_eq!(number(&report, "/group_ms/samples"), 4.0);
    assert!(number(&report, "/group_ms/p50") > 0.0);
    assert!(number(&report, "/group_ms/p95") >= number(&report, "/group_ms/p50"));
    for field in ["/tokens_per_second", "/rollouts_per_second", "/useful_tflops", "/peak_resident_bytes"] {
        assert!(number(&report, field) > 0.0, "{field}");
    }
    assert_eq!(number(&report, "/matrix_product/size"), 1_024.0);
    let share = number(&report, "/useful_tflops") / number(&report, "/matrix_product/tflops");
    assert!((share - number(&report, "/share_of_matrix_product")).abs() < 1e-9);
    assert!(report["device_used_bytes"].is_null());

    let stages = report["stages"].as_array().unwrap();
    let names: Vec<&str> = stages.iter().map(|stage| stage["stage"].as_str().unwrap()).collect();
    let expected = ["upload", "embed", "attention", "feed-forward", "head/logprob", "sketch", "read-back", "other"];
    assert_eq!(names, expected);
    for stage in &stages[..7] {
        assert!(number(stage, "/ms_per_group") > 0.0, "every stage is passed: {stage}");
    }
    let shares: f64 = stages.iter().map(|stage| number(stage, "/share")).sum();
    assert!((shares - 1.0).abs() < 1e-6, "{shares}");

    assert_eq!(events(&trace, "group").len(), 4 + 2, "timed, and in stages");
    let staged = events(&trace, "stage");
    assert!(expected[..7].iter().all(|name| staged.iter().any(|event| event["name"] == *name)));
}

#[test]
fn the_table_has_what_the_document_has() {
    let text = local(&SMALL);
    for part in [
        "2 groups, 32 rollouts, 12 prompt + ",
        "completion uniform:2-9, at most 8192 tokens each, seed 1",
        "p50 ",
        "rollouts/s",
        "useful TFLOP/s",
        "at 1024 x 1024 x 1024 behind the passes",
        "peak resident memory",
        "head/logprob",
        "note: stages are of one more pass",
    ] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
}

fn record(path: &Path) {
    let tokens = |first: u32, count: u32| (first..first + count).map(TokenId).collect::<Vec<_>>();
    let (mut writer, _) = RecordWriter::open(path, "demo").unwrap();
    for group in 0..3 {
        let job = ProveJob {
            group: GroupIndex(group),
            // Of other weights than are loaded here.
            weights: WeightsHash(9),
            randomness: vec![1; 32],
            eos_token: TokenId(2),
            prompt: tokens(5, 4),
            completions: vec![tokens(9, 3), tokens(20, 7)],
        };
        writer.append(&job).unwrap();
    }
}

#[test]
fn recorded_groups_are_proved_with_whatever_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("window-3000.groups");
    record(&path);
    let report: Value = serde_json::from_str(&local(&[
        "--recorded",
        path.to_str().unwrap(),
        "--repeats",
        "1",
        "--warm-up",
        "0",
        "--json",
    ]))
    .unwrap();
    assert!(report["groups"]["source"].as_str().unwrap().starts_with("recorded with demo in "));
    assert_eq!((number(&report, "/groups/groups"), number(&report, "/groups/rollouts")), (3.0, 6.0));
    assert_eq!(number(&report, "/groups/completion_tokens"), 30.0);
}

#[tokio::test]
async fn a_worker_that_serves_is_measured_end_to_end() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("alone.sock");
    let spec = ChildSpec::new("alone", PROGRAM)
        .arguments(["serve", "--threads", "1", "--socket"])
        .argument(&socket)
        .argument("--model")
        .argument(model());
    let child = spawn(spec).await.unwrap();
    let trace = folder.path().join("trace.json");
    for has_model in [false, true] {
        let (socket, to_trace, model) = (socket.clone(), trace.clone(), model());
        let run = move || {
            let mut arguments =
                vec!["--connect", socket.to_str().unwrap(), "--json", "--trace", to_trace.to_str().unwrap()];
            if has_model {
                arguments.extend(["--model", model.to_str().unwrap()]);
            }
            profile(&[&arguments, &SMALL[..]].concat())
        };
        let output = tokio::task::spawn_blocking(run).await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((number(&report, "/in_flight"), number(&report, "/group_ms/samples")), (2.0, 4.0));
        assert!(number(&report, "/rollouts_per_second") > 0.0 && number(&report, "/peak_resident_bytes") > 0.0);
        assert_eq!(report["useful_tflops"].is_f64(), has_model);
        assert!(report["stages"].is_null() && report["matrix_product"].is_null());
        let notes = report["notes"].to_string();
        assert!(notes.contains("end to end, with 2 requests in flight") && notes.contains("stages"), "{notes}");
        assert_eq!(events(&trace, "group").len(), 4);
    }
    child.signal(Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().await.cause, ExitCause::Code(0));
}

#[test]
fn what_cannot_be_profiled_is_told_with_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let (model, empty) = (model(), folder.path().join("empty"));
    let (model, empty) = (model.to_str().unwrap(), empty.to_str().unwrap());
    drop(RecordWriter::open(Path::new(empty), "m").unwrap());
    for (arguments, code, text) in [
        (vec!["--model", model, "--completion", "long"], 2, "write fixed:N, uniform:A-B or lognormal:MEAN,SIGMA"),
        (vec!["--model", model, "--prompt", "lognormal:5"], 2, "lognormal takes a mean and a sigma"),
        (vec!["--groups", "2"], 2, "--connect"),
        (vec!["--model", "/nonexistent"], 66, "/nonexistent does not exist"),
        (vec!["--model", model, "--recorded", "/nonexistent"], 66, "/nonexistent"),
        (vec!["--model", model, "--recorded", model], 65, "recorded groups"),
        (vec!["--model", model, "--recorded", empty], 65, "holds no whole group"),
        (
            vec!["--model", model, "--prompt", "fixed:1", "--completion", "fixed:1", "--trace", "/nonexistent/t"],
            73,
            "/nonexistent/t",
        ),
    ] {
        let output = profile(&arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(text), "{arguments:?}: {error}");
    }
}

#[test]
fn reloads_are_measured_with_requests_in_flight() {
    let scratch = tempfile::tempdir().unwrap();
    let run = |more: &[&str]| {
        let folder = model();
        let common = ["--model", folder.to_str().unwrap(), "--threads", "1", "--repeats", "1", "--changed", "0.01,0.5"];
        Command::new(PROGRAM)
            .arg("profile-reload")
            .args(common)
            .arg("--scratch")
            .arg(scratch.path())
            .args(more)
            .output()
            .unwrap()
    };
    let output = run(&["--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((report["schema"].as_u64(), report["device"].as_str()), (Some(1), Some("cpu")));
    assert!(number(&report, "/read_once_ms") > 0.0 && number(&report, "/request_ms") > 0.0);
    let cases = report["cases"].as_array().unwrap();
    // Full, and a delta for each share: when ordered and staged before, in a second copy and in place.
    let kinds: Vec<(&str, bool, bool)> = cases
        .iter()
        .map(|case| {
            let flag = |name: &str| case[name].as_bool().unwrap();
            (case["source"].as_str().unwrap(), flag("in_shadow"), flag("staged"))
        })
        .collect();
    let kind = |in_shadow, staged| ["full", "delta", "delta"].map(|source| (source, in_shadow, staged));
    let deltas_staged_in_place = &kind(false, true)[1..];
    assert_eq!(kinds, [&kind(true, false), &kind(true, true), &kind(false, false), deltas_staged_in_place].concat());
    for case in cases {
        assert!(number(case, "/total_ms") >= number(case, "/stall_ms"), "{case}");
        assert!(number(case, "/longest_request_ms") > 0.0, "{case}");
        assert_eq!(case["staging_ms"].is_f64(), case["staged"] == true);
    }
    let changed = number(&cases[1], "/changed");
    assert!((0.005..0.02).contains(&changed), "{changed}");

    let output = run(&["--no-folder-in-place"]);
    let table = String::from_utf8(output.stdout).unwrap();
    let folders: Vec<&str> = table.lines().filter(|line| line.starts_with("full")).collect();
    assert!(folders.len() == 2 && folders.iter().all(|line| line.contains("second")), "{table}");
    for part in ["read once ", "longest request ms", "delta 1.0 %", "in place"] {
        assert!(table.contains(part), "{part:?} in {table}");
    }
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "nothing is left behind");
}
