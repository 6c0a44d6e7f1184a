//! The server with a model that does what it is told: no libtorch computes here.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use grail_ipc::jobs::{GroupProof, MemberProof, ProveJob, ReloadOrder, RowFacts, RowJob, VerifyJob};
use grail_ipc::messages::{Epoch, Failed, Severity, SlotId};
use grail_ipc::socket::RuntimeFolder;
use grail_ipc::{Expected, LostConnection, RequestError, Token, WorkerClient};
use grail_process::ExitCode;
use grail_proof_worker::WorkerError;
use grail_proof_worker::cli::{ModelArguments, ServeArguments};
use grail_proof_worker::prover::{ComputeError, Loader, Prepared, Prover, Reloader, Retired, Way};
use grail_proof_worker::serve::serve;
use grail_proof_worker::torch::Shadow;
use grail_protocol::ids::{CheckpointWindow, GroupIndex, TokenId, WeightsHash};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;

const LONG: Duration = Duration::from_secs(60);
const OLD: WeightsHash = WeightsHash(1);
const NEW: WeightsHash = WeightsHash(2);

/// Groups that a [`Puppet`] treats in its own way.
const NON_FINITE: i64 = 100;
const POISONED: i64 = 101;
const PANIC: i64 = 102;
const OUT_OF_MEMORY: i64 = 103;
const HELD: i64 = 104;

type Gates = Arc<Mutex<HashMap<PathBuf, mpsc::Receiver<()>>>>;

/// Loads a folder `weights-N` as a model with the weights hash N.
#[derive(Default)]
struct Puppets {
    /// Group [`HELD`] waits for a word, and so does loading a folder that has a gate.
    gates: Gates,
}

impl Loader for Puppets {
    fn load(&self, folder: &Path) -> Result<Box<dyn Prover>, WorkerError> {
        pass(&self.gates, folder);
        let name = folder.file_name().unwrap().to_str().unwrap();
        let Some(number) = name.strip_prefix("weights-") else {
            return Err(WorkerError::NoModel { folder: folder.to_owned() });
        };
        let held = self.gates.lock().unwrap().remove(Path::new("held"));
        let weights = Arc::new(Mutex::new(WeightsHash(number.parse().unwrap())));
        Ok(Box::new(Puppet { weights, gates: Arc::clone(&self.gates), held: Mutex::new(held) }))
    }
}

fn pass(gates: &Gates, name: &Path) {
    let gate = gates.lock().unwrap().remove(name);
    if let Some(gate) = gate {
        gate.recv().unwrap();
    }
}

impl Puppets {
    fn gate(&self, name: &str) -> mpsc::Sender<()> {
        let (open, gate) = mpsc::channel();
        self.gates.lock().unwrap().insert(PathBuf::from(name), gate);
        open
    }
}

struct Puppet {
    weights: Arc<Mutex<WeightsHash>>,
    gates: Gates,
    held: Mutex<Option<mpsc::Receiver<()>>>,
}

impl Prover for Puppet {
    fn weights(&self) -> WeightsHash {
        *self.weights.lock().unwrap()
    }

    fn device(&self) -> String {
        "puppet".into()
    }

    fn prove(&self, job: &ProveJob) -> Result<GroupProof, ComputeError> {
        let detail = "as told".to_owned();
        match job.group.0 {
            NON_FINITE => return Err(ComputeError::NonFinite { detail }),
            POISONED => return Err(ComputeError::Poisoned { detail }),
            OUT_OF_MEMORY => return Err(ComputeError::OutOfMemory { detail }),
            PANIC => panic!("as told"),
            HELD => self.held.lock().unwrap().as_ref().unwrap().recv().unwrap(),
            _ => {}
        }
        Ok(proof(job))
    }

    fn verify(&self, job: &VerifyJob) -> Result<Vec<RowFacts>, ComputeError> {
        Ok(job.rows.iter().map(facts).collect())
    }

    fn reloader(&self) -> Box<dyn Reloader> {
        Box::new(PuppetReloader { weights: Arc::clone(&self.weights), gates: Arc::clone(&self.gates) })
    }
}

/// Prepares folders `weights-N` in a second copy, `short-N` in place, `spoilt-N` and `lost-N` in place and in vain.
struct PuppetReloader {
    weights: Arc<Mutex<WeightsHash>>,
    gates: Gates,
}

impl Reloader for PuppetReloader {
    fn prepare(&mut self, order: &ReloadOrder) -> Result<Box<dyn Prepared>, ComputeError> {
        pass(&self.gates, &order.folder);
        let name = order.folder.to_str().unwrap();
        let Some((kind, number)) = name.split_once('-') else {
            return Err(ComputeError::Reload { detail: format!("folder {name} does not exist") });
        };
        let ready = WeightsHash(number.parse().unwrap());
        Ok(Box::new(PuppetPrepared { weights: Arc::clone(&self.weights), ready, kind: kind.to_owned() }))
    }
}

struct PuppetPrepared {
    weights: Arc<Mutex<WeightsHash>>,
    ready: WeightsHash,
    kind: String,
}

impl Prepared for PuppetPrepared {
    fn weights(&self) -> WeightsHash {
        self.ready
    }

    fn way(&self) -> Way {
        Way { from_changes: false, in_shadow: self.kind == "weights" }
    }

    fn is_ready(&self) -> bool {
        ["weights", "beside"].contains(&self.kind.as_str())
    }

    fn take_over(self: Box<Self>) -> Result<Retired, ComputeError> {
        let detail = "as told".to_owned();
        match self.kind.as_str() {
            "spoilt" => return Err(ComputeError::Reload { detail }),
            "lost" => return Err(ComputeError::WeightsLost { detail }),
            "panic" => panic!("as told"),
            _ => *self.weights.lock().unwrap() = self.ready,
        }
        Ok(Box::new(()))
    }
}

fn proof(job: &ProveJob) -> GroupProof {
    let member = |completion: &Vec<TokenId>| MemberProof {
        sketches: completion.iter().map(|token| token.0 * 2).collect(),
        logprobs: vec![-1.0; completion.len()],
        eos_probability: 0.5,
    };
    GroupProof {
        group: job.group,
        weights: job.weights,
        prompt_sketches: vec![9; job.prompt.len()],
        members: job.completions.iter().map(member).collect(),
        compute: Duration::from_micros(3),
    }
}

fn facts(row: &RowJob) -> RowFacts {
    RowFacts {
        sketches: vec![4; row.tokens.len()],
        logprobs: vec![-2.0; row.completion_tokens()],
        eos_probability: 0.25,
        chosen_probabilities: vec![0.5; row.completion_tokens()],
    }
}

fn order(folder: &str) -> ReloadOrder {
    ReloadOrder::from_folder(CheckpointWindow(60), folder, NEW)
}

fn job(group: i64) -> ProveJob {
    ProveJob {
        group: GroupIndex(group),
        weights: OLD,
        randomness: vec![1; 32],
        eos_token: TokenId(2),
        prompt: vec![TokenId(1)],
        completions: vec![vec![TokenId(3), TokenId(2)], vec![TokenId(4)]],
    }
}

struct Server {
    _folder: TempDir,
    socket: PathBuf,
    task: JoinHandle<Result<(), WorkerError>>,
    expected: Expected,
    puppets: Arc<Puppets>,
}

impl Server {
    fn start(model: &str, is_alone: bool) -> Self {
        Self::with(Arc::new(Puppets::default()), model, is_alone)
    }

    fn with(puppets: Arc<Puppets>, model: &str, is_alone: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = RuntimeFolder::create(&folder.path().join("run")).unwrap();
        let socket = runtime.socket("worker.sock").unwrap();
        let model = ModelArguments {
            folder: model.into(),
            device: grail_model::Device::Cpu,
            dtype: None,
            threads: None,
            batch_tokens: None,
        };
        let arguments = ServeArguments {
            socket: socket.clone(),
            slot: 3,
            epoch: 5,
            token_fd: None,
            reload_shadow: Shadow::Auto,
            model,
        };
        let token = Token::generate().unwrap();
        let expected = if is_alone { Expected::default() } else { Expected::child(SlotId(3), Epoch(5), token.clone()) };
        let loader: Arc<dyn Loader> = puppets.clone();
        let token = (!is_alone).then_some(token);
        let task = tokio::spawn(async move { serve(&arguments, token, loader, Arc::default()).await });
        Self { _folder: folder, socket, task, expected, puppets }
    }

    async fn client(&self) -> WorkerClient {
        WorkerClient::connect(&self.socket, &self.expected, LONG).await.unwrap()
    }

    async fn end(self) -> Result<(), WorkerError> {
        tokio::time::timeout(LONG, self.task).await.expect("the server ends").unwrap()
    }
}

fn failure(error: RequestError) -> (String, Severity) {
    match error {
        RequestError::Failed(Failed { code, severity, .. }) => (code, severity),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_supervised_worker_proves_and_ends_when_its_supervisor_hangs_up() {
    let server = Server::start("weights-1", false);
    let client = server.client().await;
    let hello = client.hello();
    assert_eq!((hello.slot, hello.epoch, hello.device.as_str()), (SlotId(3), Epoch(5), "puppet"));
    assert_eq!((hello.weights, hello.pid), (Some(OLD), std::process::id()));
    let jobs = [job(0), job(1), job(2)];
    let (first, second, third) = tokio::join!(client.prove(&jobs[0]), client.prove(&jobs[1]), client.prove(&jobs[2]));
    assert_eq!([first.unwrap(), second.unwrap(), third.unwrap()], jobs.map(|job| proof(&job)));
    let rows = VerifyJob {
        weights: OLD,
        rows: vec![RowJob {
            tokens: vec![TokenId(1), TokenId(2), TokenId(3)],
            prompt_length: 1,
            randomness: vec![],
            temperature: 0.7,
            repetition_penalty: 1.1,
            eos_token: TokenId(3),
        }],
    };
    assert_eq!(client.verify(&rows).await.unwrap(), [facts(&rows.rows[0])]);
    let pong = client.ping().await.unwrap();
    assert_eq!((pong.weights, pong.queued, pong.groups, pong.rollouts), (Some(OLD), 0, 3, 6));
    assert!(pong.resident_bytes > 1 << 20);
    assert!(!server.socket.exists(), "the path is unlinked once the supervisor is known");
    drop(client);
    server.end().await.unwrap();
}

#[tokio::test]
async fn signs_of_life_come_while_a_batch_computes() {
    let puppets = Arc::new(Puppets::default());
    let open = puppets.gate("held");
    let server = Server::with(puppets, "weights-1", false);
    let client = server.client().await;
    let (held, waiting) = (job(HELD), job(1));
    let watch = async {
        // Both are accepted, in the order in which they were sent, before the ping that follows them.
        assert_eq!(client.ping().await.unwrap().queued, 2);
        open.send(()).unwrap();
    };
    let (first, second, ()) = tokio::join!(client.prove(&held), client.prove(&waiting), watch);
    assert_eq!((first.unwrap(), second.unwrap()), (proof(&held), proof(&waiting)));
    drop(client);
    server.end().await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_proved_is_told_with_its_severity() {
    let server = Server::start("weights-1", false);
    let client = server.client().await;
    let other_weights = ProveJob { weights: NEW, ..job(0) };
    let empty_completion = ProveJob { completions: vec![vec![]], ..job(0) };
    for (job, code, severity) in [
        (other_weights, "wrong_weights", Severity::Retryable),
        (empty_completion, "bad_request", Severity::FatalForGroup),
        (job(NON_FINITE), "non_finite", Severity::FatalForGroup),
        (job(OUT_OF_MEMORY), "out_of_memory", Severity::Retryable),
    ] {
        assert_eq!(failure(client.prove(&job).await.unwrap_err()), (code.to_owned(), severity));
    }
    let no_rows = VerifyJob { weights: OLD, rows: vec![] };
    let refused = failure(client.verify(&no_rows).await.unwrap_err());
    assert_eq!(refused, ("bad_request".to_owned(), Severity::FatalForGroup));
    client.prove(&job(0)).await.expect("the worker lives on");
    drop(client);
    server.end().await.unwrap();
}

#[tokio::test]
async fn a_worker_that_cannot_go_on_says_so_and_ends() {
    for (group, code, exit) in [(POISONED, "device_poisoned", ExitCode::Temporary), (PANIC, "panicked", ExitCode::Bug)]
    {
        let server = Server::start("weights-1", false);
        let client = server.client().await;
        let failed = failure(client.prove(&job(group)).await.unwrap_err());
        assert_eq!(failed, (code.to_owned(), Severity::FatalForWorker));
        assert!(matches!(client.closed().await, LostConnection::PeerHungUp));
        assert_eq!(server.end().await.unwrap_err().exit_code(), exit);
    }
}

#[tokio::test]
async fn out_of_memory_twice_in_a_row_ends_the_worker_behind_its_answer() {
    let server = Server::start("weights-1", false);
    let client = server.client().await;
    let declined = ("out_of_memory".to_owned(), Severity::Retryable);
    for _ in 0..2 {
        assert_eq!(failure(client.prove(&job(OUT_OF_MEMORY)).await.unwrap_err()), declined);
        client.prove(&job(0)).await.expect("a smaller request may still do, and counts as a new start");
    }
    assert_eq!(failure(client.prove(&job(OUT_OF_MEMORY)).await.unwrap_err()), declined);
    assert_eq!(failure(client.prove(&job(OUT_OF_MEMORY)).await.unwrap_err()), declined);
    assert!(matches!(client.closed().await, LostConnection::PeerHungUp));
    let end = server.end().await.unwrap_err();
    assert_eq!(
        (end.exit_code(), end.to_string().as_str()),
        (ExitCode::Temporary, "serve: out of device memory twice in a row: as told")
    );
}

#[tokio::test]
async fn draining_answers_what_was_accepted_and_nothing_more() {
    let puppets = Arc::new(Puppets::default());
    let open = puppets.gate("held");
    let server = Server::with(puppets, "weights-1", false);
    let client = server.client().await;
    let held = job(HELD);
    let watch = async {
        let late = job(1);
        let refused = {
            let mut drain = std::pin::pin!(client.drain());
            // Sent, not answered: the held group is open.
            tokio::select! {
                biased;
                _ = &mut drain => panic!("drained too early"),
                refused = client.prove(&late) => refused.unwrap_err(),
            }
        };
        assert_eq!(failure(refused).0, "draining");
        open.send(()).unwrap();
    };
    let (proved, ()) = tokio::join!(client.prove(&held), watch);
    proved.unwrap();
    client.drain().await.unwrap();
    client.shutdown().unwrap();
    assert!(matches!(client.closed().await, LostConnection::PeerHungUp));
    server.end().await.unwrap();
}

#[tokio::test]
async fn a_reload_swaps_the_weights_while_the_old_ones_prove() {
    let server = Server::start("weights-1", false);
    let client = server.client().await;
    let open = server.puppets.gate("weights-2");
    let during = async {
        // Loading waits for its gate; proving does not.
        client.prove(&job(0)).await.unwrap();
        let second = client.reload(&order("weights-2")).await.unwrap_err();
        assert_eq!(failure(second), ("reload_failed".to_owned(), Severity::Retryable));
        open.send(()).unwrap();
    };
    let order = order("weights-2");
    let (reloaded, ()) = tokio::join!(client.reload(&order), during);
    assert_eq!(reloaded.unwrap().weights, NEW);
    assert_eq!(failure(client.prove(&job(1)).await.unwrap_err()).0, "wrong_weights");
    client.prove(&ProveJob { weights: NEW, ..job(1) }).await.unwrap();
    assert_eq!(client.ping().await.unwrap().weights, Some(NEW));
    drop(client);
    server.end().await.unwrap();
}

#[tokio::test]
async fn a_reload_that_fails_keeps_the_old_weights() {
    let server = Server::start("weights-1", false);
    let client = server.client().await;
    for (folder, text) in [
        ("weights-7", "folder weights-7 holds weights 00000000000000000000000000000007, the command names"),
        ("nowhere", "folder nowhere does not exist; the old weights stay"),
    ] {
        let error = client.reload(&order(folder)).await.unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(failure(error), ("reload_failed".to_owned(), Severity::Retryable));
        client.prove(&job(0)).await.unwrap();
    }
    client.reload(&order("weights-2")).await.expect("a later one may succeed");
    drop(client);
    server.end().await.unwrap();
}

#[tokio::test]
async fn weights_that_were_staged_take_over_without_being_made_again() {
    let server = Server::start("weights-1", false);
    let client = server.client().await;
    assert_eq!(client.stage(&order("weights-2")).await.unwrap(), NEW);
    client.prove(&job(0)).await.expect("the old weights prove on");
    assert_eq!(client.ping().await.unwrap().weights, Some(OLD));
    // Nobody opens this gate: whoever read the folder again would wait for ever.
    let _closed = server.puppets.gate("weights-2");
    let reloaded = client.reload(&order("weights-2")).await.unwrap();
    assert_eq!((reloaded.weights, reloaded.in_shadow), (NEW, true));
    let again = client.reload(&order("weights-2")).await.unwrap();
    assert_eq!((again.weights, again.stall_us, again.in_shadow), (NEW, 0, false), "answered at once");
    assert_eq!(client.stage(&order("weights-2")).await.unwrap(), NEW, "nothing to make ready");
    drop(client);
    server.end().await.unwrap();
}

#[tokio::test]
async fn a_second_stage_replaces_the_first_and_anew_reads_again() {
    let server = Server::start("weights-1", false);
    let client = server.client().await;
    let third = WeightsHash(3);
    let other = ReloadOrder { weights: third, ..order("weights-3") };
    assert_eq!(client.stage(&other).await.unwrap(), third);
    assert_eq!(client.stage(&order("weights-2")).await.unwrap(), NEW);
    let open = server.puppets.gate("weights-3");
    let during = async {
        client.prove(&job(0)).await.unwrap();
        open.send(()).unwrap();
    };
    let (reloaded, ()) = tokio::join!(client.reload(&other), during);
    assert_eq!(reloaded.unwrap().weights, third, "it was made a second time");

    let anew = ReloadOrder { anew: true, ..other };
    let open = server.puppets.gate("weights-3");
    let during = async {
        client.prove(&ProveJob { weights: third, ..job(0) }).await.unwrap();
        open.send(()).unwrap();
    };
    let (reloaded, ()) = tokio::join!(client.reload(&anew), during);
    assert!(reloaded.unwrap().in_shadow, "it was read again, though the hash is the same");
    drop(client);
    server.end().await.unwrap();
}

#[tokio::test]
async fn without_memory_for_two_the_present_weights_are_named_and_changed_in_place() {
    let server = Server::start("weights-1", false);
    let client = server.client().await;
    assert_eq!(client.stage(&order("short-2")).await.unwrap(), OLD);
    client.prove(&job(0)).await.unwrap();
    let spoilt = client.reload(&order("spoilt-2")).await.unwrap_err();
    assert_eq!(failure(spoilt), ("reload_failed".to_owned(), Severity::Retryable));
    client.prove(&job(0)).await.expect("the old weights are back");
    // What lies ready beside the weights is kept until it is due, though it is no second copy.
    assert_eq!(client.stage(&order("beside-2")).await.unwrap(), NEW);
    client.prove(&job(0)).await.expect("nothing is in place yet");
    // It is not made ready again: that would wait here for ever.
    let _closed = server.puppets.gate("beside-2");
    let reloaded = client.reload(&order("beside-2")).await.unwrap();
    assert_eq!((reloaded.weights, reloaded.in_shadow), (NEW, false));
    client.prove(&ProveJob { weights: NEW, ..job(0) }).await.unwrap();
    drop(client);
    server.end().await.unwrap();
}

#[tokio::test]
async fn a_worker_whose_weights_are_lost_proves_nothing_more_and_ends() {
    for folder in ["lost-2", "panic-2"] {
        let puppets = Arc::new(Puppets::default());
        let open = puppets.gate("held");
        let server = Server::with(puppets, "weights-1", false);
        let client = server.client().await;
        let (held, late, order) = (job(HELD), job(1), order(folder));
        let meanwhile = async {
            // The reload is ready behind the held group and before the late one.
            assert_eq!(client.ping().await.unwrap().queued, 2);
            open.send(()).unwrap();
        };
        let (proved, reloaded, ()) = tokio::join!(client.prove(&held), client.reload(&order), meanwhile);
        proved.unwrap();
        let lost = ("weights_lost".to_owned(), Severity::FatalForWorker);
        assert_eq!(failure(reloaded.unwrap_err()), lost);
        match client.prove(&late).await.unwrap_err() {
            RequestError::Failed(failed) => assert_eq!((failed.code, failed.severity), lost),
            other => assert!(matches!(other, RequestError::Lost(_)), "{other:?}"),
        }
        drop(client);
        assert_eq!(server.end().await.unwrap_err().exit_code(), ExitCode::Temporary);
    }
}

#[tokio::test]
async fn a_worker_alone_serves_one_peer_after_the_other() {
    let server = Server::start("weights-1", true);
    for _ in 0..2 {
        let client = server.client().await;
        client.prove(&job(0)).await.unwrap();
        assert!(client.hello().token.is_empty());
    }
    // Nonsense, before and after the handshake.
    let mut stranger = tokio::net::UnixStream::connect(&server.socket).await.unwrap();
    stranger.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    let mut rest = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut stranger, &mut rest).await.unwrap_or_default();
    let client = server.client().await;
    assert!(server.socket.exists());
    client.shutdown().unwrap();
    let socket = server.socket.clone();
    server.end().await.unwrap();
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_peer_that_leaves_in_the_middle_disturbs_nobody() {
    let puppets = Arc::new(Puppets::default());
    let open = puppets.gate("held");
    let server = Server::with(puppets, "weights-1", true);
    let client = server.client().await;
    {
        let held = job(HELD);
        let mut abandoned = std::pin::pin!(client.prove(&held));
        tokio::select! {
            biased;
            _ = &mut abandoned => panic!("it is held"),
            pong = client.ping() => assert_eq!(pong.unwrap().queued, 1),
        }
    }
    drop(client);
    open.send(()).unwrap();
    let next = server.client().await;
    next.prove(&job(1)).await.unwrap();
    next.shutdown().unwrap();
    server.end().await.unwrap();
}

#[tokio::test]
async fn a_model_that_cannot_be_loaded_ends_the_worker() {
    let server = Server::start("nowhere", false);
    let socket = server.socket.clone();
    let error = server.end().await.unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::MissingInput);
    assert_eq!(error.to_string(), "load the model: folder nowhere does not exist");
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_taken_socket_is_an_error() {
    let first = Server::start("weights-1", true);
    first.client().await;
    let second = {
        let model = ModelArguments {
            folder: "weights-1".into(),
            device: grail_model::Device::Cpu,
            dtype: None,
            threads: None,
            batch_tokens: None,
        };
        let arguments = ServeArguments {
            socket: first.socket.clone(),
            slot: 0,
            epoch: 0,
            token_fd: None,
            reload_shadow: Shadow::Auto,
            model,
        };
        let loader: Arc<dyn Loader> = Arc::new(Puppets::default());
        serve(&arguments, None, loader, Arc::default()).await.unwrap_err()
    };
    assert_eq!(second.exit_code(), ExitCode::CannotWrite);
    assert!(second.to_string().contains("another process listens there"), "{second}");
    first.client().await.shutdown().unwrap();
    first.end().await.unwrap();
}
