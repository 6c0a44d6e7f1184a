//! Every fault that `GRAIL_FAULT` injects, in the real program.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::error::Error;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use grail_ipc::jobs::{GroupProof, ProveJob, ReloadOrder};
use grail_ipc::messages::{Epoch, Severity, SlotId};
use grail_ipc::socket::RuntimeFolder;
use grail_ipc::{Expected, HandshakeError, LostConnection, RequestError, Token, WorkerClient};
use grail_process::fault::{Act, Fault, FaultPlan, Point, VARIABLE};
use grail_process::{Child, ChildSpec, ExitCause, LogPolicy, Signal, spawn};
use grail_protocol::ids::{CheckpointWindow, GroupIndex, TokenId};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::sync::{Mutex, mpsc};

const PROGRAM: &str = env!("CARGO_BIN_EXE_grail-proof-worker");
const MODEL: &str = "models/qwen2-tied";
const OTHER_MODEL: &str = "models/qwen3-tied";
const LONG: Duration = Duration::from_secs(120);
/// Where a supervisor's worker can be hit while it works.
const STAGES: [Point; 4] = [Point::Starting, Point::Idle, Point::MidProof, Point::Replying];

fn model(name: &str) -> PathBuf {
    grail_golden::path(name).canonicalize().unwrap()
}

fn fault(act: Act, point: Point) -> Fault {
    Fault::new(act, point).unwrap()
}

/// A worker in slot 1, incarnation 7, that is told to do something wrong.
struct Worker {
    child: Child,
    socket: PathBuf,
    expected: Expected,
    /// What it logs.
    lines: Mutex<mpsc::UnboundedReceiver<String>>,
    _folder: TempDir,
}

impl Worker {
    async fn start(plan: impl Into<FaultPlan>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = RuntimeFolder::create(&folder.path().join("run")).unwrap();
        let socket = runtime.socket("worker-1.sock").unwrap();
        let token = Token::generate().unwrap();
        let (sink, lines) = mpsc::unbounded_channel();
        let mut spec = ChildSpec::new("worker-1", PROGRAM);
        spec.log = LogPolicy::to_sink(move |line| drop(sink.send(line.text.to_owned())));
        spec.environment.set(VARIABLE, plan.into().to_string());
        let descriptor = spec.hand_over(token.as_bytes()).unwrap();
        let spec = spec
            .arguments(["serve", "--slot", "1", "--epoch", "7", "--threads", "1"])
            .arguments(["--token-fd".to_owned(), descriptor.to_string()])
            .argument("--socket")
            .argument(&socket)
            .argument("--model")
            .argument(model(MODEL));
        let child = spawn(spec).await.unwrap();
        let expected = Expected::child(SlotId(1), Epoch(7), token);
        Self { child, socket, expected, lines: Mutex::new(lines), _folder: folder }
    }

    async fn connect(&self) -> Result<WorkerClient, HandshakeError> {
        WorkerClient::connect(&self.socket, &self.expected, LONG).await
    }

    /// Waits until it logs `text`.
    async fn says(&self, text: &str) {
        let mut lines = self.lines.lock().await;
        let found = async {
            while let Some(line) = lines.recv().await {
                if line.contains(text) {
                    return;
                }
            }
            panic!("it ended and never said {text:?}");
        };
        tokio::time::timeout(LONG, found).await.unwrap();
    }

    async fn is_hit(&self) {
        self.says("Injecting a fault.").await;
    }

    async fn end(&self) -> ExitCause {
        tokio::time::timeout(LONG, self.child.wait()).await.expect("it ends").cause
    }

    async fn kill(&self) {
        self.child.signal(Signal::SIGKILL).unwrap();
        self.end().await;
    }

    /// Waits until the kernel has stopped it.
    async fn is_stopped(&self) {
        let pid = Pid::from_raw(self.child.pid());
        let stopped = move || waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT);
        tokio::time::timeout(LONG, tokio::task::spawn_blocking(stopped)).await.unwrap().unwrap().unwrap();
    }
}

fn job(client: &WorkerClient) -> ProveJob {
    ProveJob {
        group: GroupIndex(4),
        weights: client.hello().weights.unwrap(),
        randomness: vec![7; 32],
        eos_token: TokenId(2),
        prompt: [5, 6, 7].map(TokenId).to_vec(),
        completions: vec![[8, 9].map(TokenId).to_vec(), [10, 11, 2].map(TokenId).to_vec()],
    }
}

async fn prove(client: &WorkerClient) -> Result<GroupProof, RequestError> {
    client.prove(&job(client)).await
}

async fn reload(client: &WorkerClient) -> Result<(), RequestError> {
    let weights = grail_model::weights_hash_of_dir(&model(OTHER_MODEL)).unwrap();
    client.reload(&ReloadOrder::from_folder(CheckpointWindow(30), model(OTHER_MODEL), weights)).await.map(drop)
}

/// Points that a worker reaches.
fn of_workers() -> impl Iterator<Item = Point> {
    Point::ALL.into_iter().filter(|point| ![Point::Update, Point::Sampled].contains(point))
}

/// Leads a worker past every point; an error where it was lost on the way.
async fn lead_to(worker: &Worker, point: Point) -> Result<(), Box<dyn Error>> {
    let client = worker.connect().await?;
    match point {
        Point::Starting | Point::Loaded | Point::Hello | Point::Idle => {
            client.ping().await?;
        }
        Point::MidProof | Point::Replying => {
            prove(&client).await?;
        }
        Point::Reload => reload(&client).await?,
        Point::Ping => {
            client.ping().await?;
        }
        Point::Update | Point::Sampled => panic!("a point of generation servers"),
    }
    Ok(())
}

/// All texts of an error and its causes.
fn reason(error: &dyn Error) -> String {
    std::iter::successors(Some(error), |&error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

async fn dies(act: Act, point: Point, expected: ExitCause) {
    let worker = Worker::start(fault(act, point)).await;
    // As a supervisor does: where it ends before it listens, nobody would ever answer.
    tokio::select! {
        led = lead_to(&worker, point) => assert!(led.is_err(), "{act}@{point}"),
        _ = worker.end() => {}
    }
    assert_eq!(worker.end().await, expected, "{act}@{point}");
    worker.is_hit().await;
}

fn by(signal: Signal) -> ExitCause {
    ExitCause::Signal { signal, core: false }
}

#[tokio::test]
async fn killed_at_every_point() {
    for point in of_workers() {
        dies(Act::Kill, point, by(Signal::SIGKILL)).await;
    }
}

#[tokio::test]
async fn crashed_at_every_stage() {
    for point in STAGES {
        dies(Act::Segv, point, by(Signal::SIGSEGV)).await;
    }
    dies(Act::Abort, Point::MidProof, by(Signal::SIGABRT)).await;
    dies(Act::Exit(9), Point::Replying, ExitCause::Code(9)).await;
    dies(Act::Exit(0), Point::Starting, ExitCause::Code(0)).await;
}

#[tokio::test]
async fn stopped_at_every_stage_and_continued() {
    for point in STAGES {
        let worker = Worker::start(fault(Act::Stop, point)).await;
        let go_on = async {
            worker.is_stopped().await;
            worker.child.signal(Signal::SIGCONT).unwrap();
        };
        let (led, ()) = tokio::join!(lead_to(&worker, point), go_on);
        led.unwrap_or_else(|error| panic!("stop@{point}: {error}"));
        worker.kill().await;
    }
}

#[tokio::test]
async fn late_and_right() {
    for point in of_workers() {
        let worker = Worker::start(fault(Act::Slow(Duration::from_millis(20)), point)).await;
        lead_to(&worker, point).await.unwrap_or_else(|error| panic!("slow@{point}: {error}"));
        worker.is_hit().await;
        worker.kill().await;
    }
}

#[tokio::test]
async fn hung_before_it_is_ready() {
    for point in [Point::Starting, Point::Loaded, Point::Hello] {
        let worker = Worker::start(fault(Act::Hang, point)).await;
        tokio::select! {
            biased;
            client = worker.connect() => panic!("hang@{point}: {client:?}"),
            () = worker.is_hit() => {}
        }
        worker.kill().await;
    }
}

#[tokio::test]
async fn hung_on_the_computing_or_the_loading_thread_it_gives_signs_of_life() {
    let worker = Worker::start(fault(Act::Hang, Point::MidProof)).await;
    let client = worker.connect().await.unwrap();
    tokio::select! {
        biased;
        proof = prove(&client) => panic!("{proof:?}"),
        () = worker.is_hit() => {}
    }
    assert_eq!(client.ping().await.unwrap().queued, 1);
    worker.kill().await;

    let worker = Worker::start(fault(Act::Hang, Point::Reload)).await;
    let client = worker.connect().await.unwrap();
    tokio::select! {
        biased;
        reloaded = reload(&client) => panic!("{reloaded:?}"),
        () = worker.is_hit() => {}
    }
    prove(&client).await.expect("the old weights prove meanwhile");
    worker.kill().await;
}

#[tokio::test]
async fn hung_on_the_thread_of_its_connection_it_gives_none() {
    for point in [Point::Idle, Point::Replying] {
        let worker = Worker::start(fault(Act::Hang, point)).await;
        let client = worker.connect().await.unwrap();
        tokio::select! {
            biased;
            proof = prove(&client) => panic!("hang@{point}: {proof:?}"),
            pong = client.ping() => assert_eq!(point, Point::Replying, "{pong:?}"),
            () = worker.is_hit() => {}
        }
        worker.kill().await;
    }
}

#[tokio::test]
async fn without_signs_of_life_it_goes_on_proving() {
    let worker = Worker::start(fault(Act::Hang, Point::Ping)).await;
    let client = worker.connect().await.unwrap();
    for _ in 0..2 {
        // Requests are read in order, so a ping would be answered before the proof is.
        tokio::select! {
            biased;
            pong = client.ping() => panic!("{pong:?}"),
            proof = prove(&client) => drop(proof.unwrap()),
        }
    }
    drop(client);
    assert_eq!(worker.end().await, ExitCause::Code(0));
}

#[tokio::test]
async fn frames_that_make_no_sense_are_refused_by_the_other_side() {
    for (act, text) in [
        (Act::Garbage, "is no map that begins with its kind"),
        (Act::Oversize, "frame of 4294967295 bytes is over the limit"),
        (Act::Truncated, "hung up in the middle of a frame"),
    ] {
        for point in [Point::Hello, Point::Idle, Point::Replying, Point::Ping] {
            let worker = Worker::start(fault(act, point)).await;
            let told = match worker.connect().await {
                Err(error) => reason(&error),
                Ok(client) => {
                    match point {
                        Point::Replying => drop(prove(&client).await.unwrap_err()),
                        Point::Ping => drop(client.ping().await.unwrap_err()),
                        _ => {}
                    }
                    reason(&client.closed().await)
                }
            };
            assert!(told.contains(text), "{act}@{point}: {told}");
            if point == Point::Hello {
                worker.connect().await.expect("the next greeting is whole");
            }
            worker.child.signal(Signal::SIGTERM).unwrap();
            assert_eq!(worker.end().await, ExitCause::Code(0), "{act}@{point}");
        }
    }
}

#[tokio::test]
async fn a_wrong_greeting_is_refused_and_the_next_one_is_right() {
    for act in [Act::WrongVersion, Act::WrongToken, Act::StaleEpoch] {
        let worker = Worker::start(fault(act, Point::Hello)).await;
        let refused = worker.connect().await.unwrap_err();
        let is_right = match act {
            Act::WrongVersion => matches!(refused, HandshakeError::Version { ours, theirs, .. } if theirs == ours + 1),
            Act::WrongToken => matches!(refused, HandshakeError::Token { slot: SlotId(1) }),
            _ => matches!(refused, HandshakeError::Epoch { found: Epoch(6), expected: Epoch(7) }),
        };
        assert!(is_right, "{act}: {refused}");
        worker.connect().await.unwrap();
        worker.kill().await;
    }
}

#[tokio::test]
async fn answers_of_another_incarnation_are_thrown_away() {
    for point in [Point::Replying, Point::Ping] {
        let worker = Worker::start(fault(Act::StaleEpoch, point)).await;
        let client = worker.connect().await.unwrap();
        let late = async {
            match point {
                Point::Ping => drop(client.ping().await),
                _ => drop(prove(&client).await),
            }
        };
        tokio::select! {
            biased;
            () = late => panic!("an answer of another incarnation was taken"),
            () = worker.is_hit() => {}
        }
        // Behind the late answer on the same connection.
        client.ping().await.unwrap();
        assert_eq!(client.discarded().late, 1);
        worker.kill().await;
    }
}

fn failure(result: Result<GroupProof, RequestError>) -> (String, Severity) {
    match result {
        Err(RequestError::Failed(failed)) => (failed.code, failed.severity),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_is_not_finite_is_told_or_shown() {
    let found = Worker::start(fault(Act::Nan, Point::MidProof)).await;
    let client = found.connect().await.unwrap();
    assert_eq!(failure(prove(&client).await), ("non_finite".to_owned(), Severity::FatalForGroup));
    prove(&client).await.expect("the worker lives on");
    found.kill().await;

    let unnoticed = Worker::start(fault(Act::Nan, Point::Replying)).await;
    let client = unnoticed.connect().await.unwrap();
    let proof = prove(&client).await.unwrap();
    assert!(proof.members.iter().flat_map(|member| &member.logprobs).all(|logprob| logprob.is_nan()));
    unnoticed.kill().await;
}

#[tokio::test]
async fn out_of_memory_once_is_survived_and_twice_in_a_row_is_not() {
    let second = NonZeroU32::new(2).unwrap();
    let declined = ("out_of_memory".to_owned(), Severity::Retryable);
    let oom = fault(Act::Oom, Point::MidProof);

    let once = Worker::start(oom).await;
    let client = once.connect().await.unwrap();
    assert_eq!(failure(prove(&client).await), declined);
    prove(&client).await.unwrap();
    once.kill().await;

    let twice = Worker::start(FaultPlan::from_iter([oom, oom.nth(second)])).await;
    let client = twice.connect().await.unwrap();
    assert_eq!(failure(prove(&client).await), declined);
    assert_eq!(failure(prove(&client).await), declined);
    assert!(matches!(client.closed().await, LostConnection::PeerHungUp));
    assert_eq!(twice.end().await, ExitCause::Code(75));
    twice.says("Out of memory twice in a row").await;
}

#[tokio::test]
async fn weights_are_suspect_when_nothing_finite_comes_out_twice_in_a_row() {
    let (second, nan) = (NonZeroU32::new(2).unwrap(), fault(Act::Nan, Point::MidProof));
    let worker = Worker::start(FaultPlan::from_iter([nan, nan.nth(second)])).await;
    let client = worker.connect().await.unwrap();
    for _ in 0..2 {
        assert_eq!(failure(prove(&client).await), ("non_finite".to_owned(), Severity::FatalForGroup));
    }
    assert!(matches!(client.closed().await, LostConnection::PeerHungUp));
    assert_eq!(worker.end().await, ExitCause::Code(75));
    worker.says("so that the weights are loaded again").await;
}

#[tokio::test]
async fn a_poisoned_device_ends_the_worker() {
    let worker = Worker::start(fault(Act::Poison, Point::MidProof)).await;
    let client = worker.connect().await.unwrap();
    assert_eq!(failure(prove(&client).await), ("device_poisoned".to_owned(), Severity::FatalForWorker));
    assert_eq!(worker.end().await, ExitCause::Code(75));
}

#[tokio::test]
async fn only_the_slot_the_incarnation_and_the_count_that_are_named() {
    let kill = fault(Act::Kill, Point::MidProof);
    let others = Worker::start(FaultPlan::from_iter([kill.slot(0), kill.epoch(6)])).await;
    let client = others.connect().await.unwrap();
    prove(&client).await.unwrap();
    others.says("Faults will be injected into this worker.").await;
    others.kill().await;

    let second = NonZeroU32::new(2).unwrap();
    let ours = Worker::start(kill.slot(1).epoch(7).nth(second)).await;
    let client = ours.connect().await.unwrap();
    prove(&client).await.unwrap();
    prove(&client).await.unwrap_err();
    assert_eq!(ours.end().await, by(Signal::SIGKILL));
}

#[test]
fn a_text_that_is_no_plan_is_a_usage_error() {
    for (text, remedy) in [
        ("kill", "write act@point"),
        ("kill@lunch", "starting, loaded, hello, idle, mid_proof, replying, reload, ping, update, sampled are"),
        ("nan@idle", "nan has no meaning at idle, where kill, segv"),
    ] {
        let output = std::process::Command::new(PROGRAM)
            .args(["serve", "--socket", "/nonexistent/x.sock", "--model"])
            .arg(model(MODEL))
            .env(VARIABLE, text)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(&format!("failed to read GRAIL_FAULT={text:?}")) && error.contains(remedy), "{error}");
    }
}
