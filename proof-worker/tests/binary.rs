//! The real program on a real model.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use grail_ipc::jobs::{ProveJob, ReloadOrder, RowJob, VerifyJob};
use grail_ipc::messages::{Epoch, SlotId};
use grail_ipc::socket::RuntimeFolder;
use grail_ipc::{Expected, RequestError, Token, WorkerClient};
use grail_process::{Child, ChildSpec, ExitCause, Signal, spawn};
use grail_proof_worker::prove_file::OutputLine;
use grail_protocol::binding::commitments_hash;
use grail_protocol::hash::token_hash;
use grail_protocol::ids::{CheckpointWindow, GroupIndex, TokenId, WeightsHash};
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_grail-proof-worker");
const MODEL: &str = "models/qwen3-tied";
const OTHER_MODEL: &str = "models/qwen2-tied";
const LONG: Duration = Duration::from_secs(120);
/// Largest difference of a logprob in f32.
const LOGPROB_TOLERANCE: f64 = 5e-5;
const EOS: TokenId = TokenId(414);

/// The sequences of a model's vector, each alone, in f32.
struct Golden {
    cases: Vec<GoldenCase>,
    randomness: String,
}

struct GoldenCase {
    tokens: Vec<TokenId>,
    prompt_length: usize,
    sketches: Vec<u32>,
    logprobs: Vec<f64>,
    commitments_hash: Option<String>,
}

impl Golden {
    fn load() -> Self {
        let vector: Value = grail_golden::json(&format!("{MODEL}/expected.json"));
        let numbers = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
        let expected = vector["dtypes"]["float32"].as_array().unwrap();
        let cases = expected
            .iter()
            .enumerate()
            .map(|(index, case)| {
                let sketches = numbers(&case["sketches_lowest_index_ties"]);
                // The hash is that of the reference's own choice among ties.
                let has_ties = sketches != numbers(&case["sketches"]);
                GoldenCase {
                    tokens: numbers(&vector["tokens"][index]).into_iter().map(TokenId).collect(),
                    prompt_length: usize::try_from(vector["prompt_lengths"][index].as_u64().unwrap()).unwrap(),
                    sketches,
                    logprobs: serde_json::from_value(case["logprobs"].clone()).unwrap(),
                    commitments_hash: (!has_ties).then(|| case["commitments_hash"].as_str().unwrap().to_owned()),
                }
            })
            .collect();
        Self { cases, randomness: vector["randomness"].as_str().unwrap().to_owned() }
    }

    fn randomness(&self) -> Vec<u8> {
        hex::decode(&self.randomness).unwrap()
    }
}

impl GoldenCase {
    fn prompt(&self) -> &[TokenId] {
        &self.tokens[..self.prompt_length]
    }

    fn completion(&self) -> &[TokenId] {
        &self.tokens[self.prompt_length..]
    }

    fn check(&self, sketches: &[u32], logprobs: &[f32]) {
        assert_eq!(sketches, self.sketches);
        assert_eq!(logprobs.len(), self.logprobs.len());
        for (position, (ours, theirs)) in logprobs.iter().zip(&self.logprobs).enumerate() {
            let difference = (f64::from(*ours) - theirs).abs();
            assert!(difference <= LOGPROB_TOLERANCE, "position {position}: {ours} and {theirs}");
        }
    }
}

fn model(name: &str) -> PathBuf {
    grail_golden::path(name).canonicalize().unwrap()
}

/// Runs the program to its end with `input`.
fn run(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(PROGRAM)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that refuses its arguments reads nothing.
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap_or_default();
    child.wait_with_output().unwrap()
}

fn line(case: &GoldenCase, randomness: &str) -> String {
    json!({ "prompt": case.prompt(), "completions": [case.completion()], "randomness": randomness, "eos_token": EOS })
        .to_string()
}

#[test]
fn prove_prints_the_golden_proofs() {
    let golden = Golden::load();
    let folder = model(MODEL);
    let input: Vec<String> = golden.cases.iter().map(|case| line(case, &golden.randomness)).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    // A blank line is skipped and counted.
    std::fs::write(file.path(), format!("\n{}\n", input.join("\n"))).unwrap();
    let path = file.path().to_str().unwrap();
    let arguments = ["prove", path, "--model", folder.to_str().unwrap(), "--dtype", "f32", "--threads", "1"];
    let output = run(&arguments, "");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<OutputLine> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), golden.cases.len());
    for (index, (line, case)) in lines.iter().zip(&golden.cases).enumerate() {
        assert_eq!((line.schema, line.line, line.weights_hash), (1, index + 2, lines[0].weights_hash));
        let [proof] = line.completions.as_slice() else { panic!("one completion") };
        case.check(&proof.sketches, &proof.logprobs);
        assert_eq!(proof.token_hash, hex::encode(token_hash(&case.tokens)));
        assert_eq!(proof.commitments_hash, hex::encode(commitments_hash(&case.sketches)));
        if let Some(expected) = &case.commitments_hash {
            assert_eq!(&proof.commitments_hash, expected);
        }
        assert!((0.0..=1.0).contains(&proof.eos_probability));
    }
    grail_golden::ran(&format!("{MODEL}/expected.json"), lines.len(), golden.cases.len());
}

#[test]
fn prove_names_the_line_that_is_wrong() {
    let golden = Golden::load();
    let folder = model(MODEL);
    let arguments = ["prove", "-", "--model", folder.to_str().unwrap(), "--threads", "1"];
    let good = line(&golden.cases[3], &golden.randomness);
    let wrong = |change: fn(&mut Value)| {
        let mut value: Value = serde_json::from_str(&good).unwrap();
        change(&mut value);
        value.to_string()
    };
    for (bad, text) in [
        ("{".to_owned(), "EOF while parsing"),
        (wrong(|line| line["more"] = json!(1)), "unknown field `more`"),
        (wrong(|line| line["prompt"] = json!([])), "prompt is empty"),
        (wrong(|line| line["completions"] = json!([[1], []])), "completions[1] is empty"),
        (wrong(|line| line["randomness"] = json!("abc")), "does not have 64 hexadecimal digits"),
        (wrong(|line| line["prompt"] = json!([1_000_000])), "1000000"),
    ] {
        let output = run(&arguments, &format!("{good}\n{bad}\n{good}\n"));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(65), "{error}");
        assert!(error.contains("prove line 2") && error.contains(text), "{error}");
        let printed = String::from_utf8(output.stdout).unwrap();
        assert_eq!(printed.lines().count(), 1, "what was proved before has been printed");
    }
}

#[test]
fn exit_codes_are_the_documented_ones() {
    let folder = model(MODEL);
    let folder = folder.to_str().unwrap();
    let broken = tempfile::tempdir().unwrap();
    std::fs::write(broken.path().join("config.json"), "{}").unwrap();
    let broken = broken.path().to_str().unwrap();
    for (arguments, code, text) in [
        (vec!["--help"], 0, ""),
        (vec!["--version"], 0, ""),
        (vec![], 2, "Usage"),
        (vec!["prove", "-", "--model", folder, "--device", "tpu"], 2, "tpu"),
        (vec!["prove", "/nonexistent/groups", "--model", folder], 66, "/nonexistent/groups"),
        (vec!["prove", "-", "--model", "/nonexistent/model"], 66, "/nonexistent/model does not exist"),
        (vec!["prove", "-", "--model", broken], 65, broken),
        (vec!["serve", "--socket", "/nonexistent/x.sock", "--model", folder], 73, "/nonexistent/x.sock"),
        (vec!["serve", "--socket", "/tmp/x.sock", "--model", folder, "--token-fd", "800"], 2, "descriptor 800"),
    ] {
        let output = run(&arguments, "");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(text), "{arguments:?}: {error}");
    }
}

#[test]
fn help_documents_formats_and_exit_codes() {
    let help = |arguments: &[&str]| String::from_utf8(run(arguments, "").stdout).unwrap();
    for number in ["0", "2", "65", "66", "75", "78"] {
        assert!(help(&["--help"]).contains(&format!("{number}  ")), "{number}");
    }
    let prove = help(&["prove", "--help"]);
    for field in ["prompt", "completions", "randomness", "eos_token", "commitments_hash", "weights_hash"] {
        assert!(prove.contains(field), "{field}");
    }
    assert!(help(&["serve", "--help"]).contains("--token-fd"));
}

/// A worker of a supervisor, and the folder of its socket.
struct Worker {
    child: Child,
    client: WorkerClient,
    socket: PathBuf,
    _folder: TempDir,
}

async fn start_worker() -> Worker {
    let folder = tempfile::tempdir().unwrap();
    let runtime = RuntimeFolder::create(&folder.path().join("run")).unwrap();
    let socket = runtime.socket("worker-0.sock").unwrap();
    let token = Token::generate().unwrap();
    let mut spec = ChildSpec::new("worker-0", PROGRAM);
    let descriptor = spec.hand_over(token.as_bytes()).unwrap();
    let spec = spec
        .arguments(["serve", "--slot", "0", "--epoch", "7", "--threads", "1", "--dtype", "f32"])
        .arguments(["--token-fd".to_owned(), descriptor.to_string()])
        .argument("--socket")
        .argument(&socket)
        .argument("--model")
        .argument(model(MODEL));
    let child = spawn(spec).await.unwrap();
    let expected = Expected::child(SlotId(0), Epoch(7), token);
    let client = match WorkerClient::connect(&socket, &expected, LONG).await {
        Ok(client) => client,
        Err(error) => panic!("{error}: {:?}", child.last_lines()),
    };
    Worker { child, client, socket, _folder: folder }
}

fn group(golden: &Golden, weights: WeightsHash) -> ProveJob {
    let case = &golden.cases[1];
    ProveJob {
        group: GroupIndex(4),
        weights,
        randomness: golden.randomness(),
        eos_token: EOS,
        prompt: case.prompt().to_vec(),
        // The first also cut short: members share the prompt and nothing else.
        completions: vec![case.completion().to_vec(), case.completion()[..5].to_vec()],
    }
}

#[tokio::test]
async fn a_worker_proves_verifies_reloads_and_ends_with_its_supervisor() {
    let golden = Golden::load();
    let Worker { child, client, socket, _folder } = start_worker().await;
    let hello = client.hello();
    assert_eq!((hello.device.as_str(), i64::from(hello.pid)), ("cpu", i64::from(child.pid())));
    let weights = hello.weights.unwrap();

    let job = group(&golden, weights);
    let proof = client.prove(&job).await.unwrap();
    assert!(!socket.exists(), "the path is unlinked once the supervisor is known");
    let case = &golden.cases[1];
    for (member, length) in proof.members.iter().zip([case.completion().len(), 5]) {
        let sketches = [proof.prompt_sketches.as_slice(), &member.sketches].concat();
        let cut = GoldenCase {
            tokens: case.tokens[..case.prompt_length + length].to_vec(),
            prompt_length: case.prompt_length,
            sketches: case.sketches[..case.prompt_length + length].to_vec(),
            logprobs: case.logprobs[..length].to_vec(),
            commitments_hash: None,
        };
        cut.check(&sketches, &member.logprobs);
    }

    let rows = golden.cases.iter().map(|case| RowJob {
        tokens: case.tokens.clone(),
        prompt_length: u32::try_from(case.prompt_length).unwrap(),
        randomness: golden.randomness(),
        temperature: 1.0,
        repetition_penalty: 1.0,
        eos_token: EOS,
    });
    let rows = VerifyJob { weights, rows: rows.collect() };
    for (facts, case) in client.verify(&rows).await.unwrap().iter().zip(&golden.cases) {
        case.check(&facts.sketches, &facts.logprobs);
        for (probability, logprob) in facts.chosen_probabilities.iter().zip(&case.logprobs) {
            assert!((f64::from(*probability) - logprob.exp()).abs() <= 1e-4, "without penalty they are the same");
        }
    }

    let wrong = ProveJob { weights: WeightsHash(0), ..job.clone() };
    assert!(matches!(client.prove(&wrong).await, Err(RequestError::Failed(failed)) if failed.code == "wrong_weights"));

    let other = grail_model::weights_hash_of_dir(&model(OTHER_MODEL)).unwrap();
    let order = |weights| ReloadOrder::from_folder(CheckpointWindow(30), model(OTHER_MODEL), weights);
    let refused = client.reload(&order(WeightsHash(5))).await.unwrap_err();
    assert!(matches!(&refused, RequestError::Failed(failed) if failed.code == "reload_failed"), "{refused}");
    assert_eq!(client.prove(&job).await.unwrap().members, proof.members, "the old weights stay");
    assert_eq!(client.reload(&order(other)).await.unwrap().weights, other);
    let rolled = client.prove(&ProveJob { weights: other, ..job.clone() }).await.unwrap();
    assert_ne!(rolled.members, proof.members);
    assert!(client.prove(&job).await.is_err());
    assert_eq!(client.ping().await.unwrap().weights, Some(other));

    drop(client);
    let exit = tokio::time::timeout(LONG, child.wait()).await.expect("it ends with its supervisor");
    assert_eq!((exit.cause, exit.killed), (ExitCause::Code(0), 0));
}

#[tokio::test]
async fn a_worker_ends_on_a_signal_with_code_0() {
    let worker = start_worker().await;
    worker.child.signal(Signal::SIGTERM).unwrap();
    let exit = tokio::time::timeout(LONG, worker.child.wait()).await.unwrap();
    assert_eq!(exit.cause, ExitCause::Code(0));
}

#[tokio::test]
async fn a_worker_alone_keeps_its_socket_between_peers() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("alone.sock");
    let spec = ChildSpec::new("alone", PROGRAM)
        .arguments(["serve", "--threads", "1", "--socket"])
        .argument(&socket)
        .argument("--model")
        .argument(model(MODEL));
    let child = spawn(spec).await.unwrap();
    for _ in 0..2 {
        let client = WorkerClient::connect(&socket, &Expected::default(), LONG).await.unwrap();
        assert!(client.ping().await.unwrap().resident_bytes > 0);
    }
    assert!(Path::new(&socket).exists());
    child.signal(Signal::SIGINT).unwrap();
    assert_eq!(tokio::time::timeout(LONG, child.wait()).await.unwrap().cause, ExitCause::Code(0));
    assert!(!socket.exists());
}
