//! Requests in flight: answered out of order, late, wrongly, or never.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::path::Path;
use std::time::Duration;

use grail_ipc::jobs::{GroupProof, MemberProof, ProveJob, ReloadOrder, RowFacts, RowJob, ShapeError, VerifyJob};
use grail_ipc::messages::*;
use grail_ipc::{Connection, Discarded, LauncherClient, LauncherEvent, LostConnection, RequestError, WorkerClient};
use grail_protocol::ids::{CheckpointWindow, GroupIndex, TokenId, WeightsHash};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

const EPOCH: Epoch = Epoch(4);
const WEIGHTS: WeightsHash = WeightsHash(11);

type WorkerEnd = Connection<FromWorker, ToWorker>;

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        build: "test".into(),
        slot: SlotId(0),
        epoch: EPOCH,
        token: vec![],
        pid: 1,
        device: String::new(),
        weights: None,
    }
}

fn worker_pair() -> (WorkerClient, WorkerEnd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (WorkerClient::new(Connection::new(ours), hello()), Connection::new(theirs))
}

fn job(group: i64) -> ProveJob {
    ProveJob {
        group: GroupIndex(group),
        weights: WEIGHTS,
        randomness: vec![1; 32],
        eos_token: TokenId(2),
        prompt: vec![TokenId(1), TokenId(5)],
        completions: vec![vec![TokenId(7)], vec![TokenId(8), TokenId(9), TokenId(2)]],
    }
}

fn proof(job: &ProveJob) -> GroupProof {
    GroupProof {
        group: job.group,
        weights: job.weights,
        prompt_sketches: vec![0; job.prompt.len()],
        members: job
            .completions
            .iter()
            .map(|completion| MemberProof {
                sketches: completion.iter().map(|token| token.0).collect(),
                logprobs: vec![-0.5; completion.len()],
                eos_probability: 0.25,
            })
            .collect(),
        compute: Duration::from_micros(12),
    }
}

async fn received_job(worker: &mut WorkerEnd) -> (RequestId, ProveJob) {
    match worker.recv().await.unwrap().expect("a request") {
        ToWorker::Prove(request) => (request.id, ProveJob::from_request(&request).unwrap()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn answers_find_their_requests_in_any_order() {
    let (client, mut worker) = worker_pair();
    let jobs = [job(0), job(1), job(2)];
    let serve = async {
        let mut open = Vec::new();
        for _ in 0..3 {
            open.push(received_job(&mut worker).await);
        }
        for (id, job) in open.iter().rev() {
            worker.send(&FromWorker::Proved(proof(job).to_message(*id, EPOCH))).await.unwrap();
        }
    };
    let (first, second, third, ()) =
        tokio::join!(client.prove(&jobs[0]), client.prove(&jobs[1]), client.prove(&jobs[2]), serve);
    assert_eq!(first.unwrap(), proof(&jobs[0]));
    assert_eq!(second.unwrap(), proof(&jobs[1]));
    assert_eq!(third.unwrap(), proof(&jobs[2]));
    assert_eq!(client.discarded(), Discarded::default());
}

#[tokio::test]
async fn every_request_of_a_worker_has_its_answer() {
    let (client, mut worker) = worker_pair();
    let rows = VerifyJob {
        weights: WEIGHTS,
        rows: vec![RowJob {
            tokens: vec![TokenId(3), TokenId(4), TokenId(5)],
            prompt_length: 1,
            randomness: vec![9],
            temperature: 1.0,
            repetition_penalty: 1.0,
            eos_token: TokenId(5),
        }],
    };
    let facts = RowFacts {
        sketches: vec![1, 2, 3],
        logprobs: vec![-1.0, -2.0],
        eos_probability: 0.5,
        chosen_probabilities: vec![0.1, 0.2],
    };
    let order = ReloadOrder::from_folder(CheckpointWindow(60), "/c/60", WeightsHash(12));
    let serve = async {
        loop {
            let answer = match worker.recv().await.unwrap() {
                Some(ToWorker::Verify(request)) => {
                    assert_eq!(VerifyJob::from_request(&request).unwrap(), rows);
                    let rows = vec![facts.to_message()];
                    FromWorker::Verified(Verified { id: request.id, epoch: EPOCH, weights: WEIGHTS, rows })
                }
                Some(ToWorker::Reload(command)) => {
                    assert_eq!((command.checkpoint, command.folder.as_str()), (CheckpointWindow(60), "/c/60"));
                    assert_eq!(ReloadOrder::from_command(&command), order);
                    FromWorker::Reloaded(Reloaded {
                        id: command.id,
                        epoch: EPOCH,
                        weights: command.weights,
                        stall_us: 5,
                        total_us: 6,
                        from_changes: false,
                        in_shadow: true,
                    })
                }
                // One without memory for two copies.
                Some(ToWorker::Stage(command)) => FromWorker::Staged { id: command.id, epoch: EPOCH, weights: WEIGHTS },
                Some(ToWorker::Ping { id }) => FromWorker::Pong(Pong {
                    id,
                    epoch: EPOCH,
                    weights: Some(WEIGHTS),
                    queued: 1,
                    resident_bytes: 2,
                    groups: 3,
                    rollouts: 48,
                }),
                Some(ToWorker::Drain { id }) => FromWorker::Drained { id },
                Some(ToWorker::Shutdown) => break,
                other => panic!("{other:?}"),
            };
            worker.send(&answer).await.unwrap();
        }
        drop(worker);
    };
    let ask = async {
        assert_eq!(client.verify(&rows).await.unwrap(), std::slice::from_ref(&facts));
        assert_eq!(client.stage(&order).await.unwrap(), WEIGHTS);
        let reloaded = client.reload(&order).await.unwrap();
        assert_eq!((reloaded.weights, reloaded.stall_us), (WeightsHash(12), 5));
        assert_eq!(client.ping().await.unwrap().rollouts, 48);
        client.drain().await.unwrap();
        client.shutdown().unwrap();
        assert!(matches!(client.closed().await, LostConnection::PeerHungUp));
    };
    tokio::join!(serve, ask);
}

#[tokio::test]
async fn a_failure_carries_its_severity() {
    let (client, mut worker) = worker_pair();
    let asked = job(3);
    let serve = async {
        let (id, _) = received_job(&mut worker).await;
        let failed = Failed {
            id,
            epoch: EPOCH,
            severity: Severity::Retryable,
            code: "out_of_memory".into(),
            detail: "4,096 tokens".into(),
        };
        worker.send(&FromWorker::Failed(failed)).await.unwrap();
    };
    let (answer, ()) = tokio::join!(client.prove(&asked), serve);
    let error = answer.unwrap_err();
    assert_eq!(error.severity(), Severity::Retryable);
    assert_eq!(error.to_string(), "child failed (out_of_memory): 4,096 tokens");
}

#[tokio::test]
async fn late_and_unknown_answers_are_discarded_and_counted() {
    let (client, mut worker) = worker_pair();
    let asked = job(0);
    let serve = async {
        let (id, job) = received_job(&mut worker).await;
        let message = |id, epoch| FromWorker::Proved(proof(&job).to_message(id, epoch));
        worker.send(&message(id, Epoch(3))).await.unwrap();
        worker.send(&message(RequestId(99), EPOCH)).await.unwrap();
        worker.send(&message(id, EPOCH)).await.unwrap();
    };
    let (answer, ()) = tokio::join!(client.prove(&asked), serve);
    assert_eq!(answer.unwrap(), proof(&asked));
    assert_eq!(client.discarded(), Discarded { late: 1, unknown: 1, abandoned: 0 });
}

#[tokio::test]
async fn an_abandoned_request_disturbs_nobody() {
    let (client, mut worker) = worker_pair();
    let (abandoned, wanted) = (job(0), job(1));
    let serve = async {
        let (first, job) = received_job(&mut worker).await;
        worker.send(&FromWorker::Proved(proof(&job).to_message(first, EPOCH))).await.unwrap();
        let (second, job) = received_job(&mut worker).await;
        worker.send(&FromWorker::Proved(proof(&job).to_message(second, EPOCH))).await.unwrap();
    };
    let ask = async {
        {
            let mut future = std::pin::pin!(client.prove(&abandoned));
            assert!(futures_poll_once(future.as_mut()).await.is_none());
        }
        client.prove(&wanted).await.unwrap();
    };
    tokio::join!(serve, ask);
    assert_eq!(client.discarded().abandoned, 1);
}

/// Polls once, so that the request is sent, and gives up.
async fn futures_poll_once<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(match future.as_mut().poll(context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

#[tokio::test]
async fn a_lost_connection_fails_all_that_is_open_and_all_that_comes() {
    let (client, mut worker) = worker_pair();
    let (one, two) = (job(0), job(1));
    let serve = async {
        received_job(&mut worker).await;
        received_job(&mut worker).await;
        drop(worker);
    };
    let (first, second, ()) = tokio::join!(client.prove(&one), client.prove(&two), serve);
    for error in [first.unwrap_err(), second.unwrap_err(), client.prove(&one).await.unwrap_err()] {
        assert!(matches!(error, RequestError::Lost(LostConnection::PeerHungUp)), "{error:?}");
        assert_eq!(error.severity(), Severity::FatalForWorker);
    }
    assert!(client.shutdown().is_err());
}

#[tokio::test]
async fn garbage_ends_the_connection_with_its_reason() {
    let long = (64_u32 << 20) + 1;
    let frames: [(&[u8], &str); 4] = [
        (&u32::MAX.to_le_bytes(), "4294967295 bytes is over the limit"),
        (&long.to_le_bytes(), "67108865 bytes is over the limit"),
        (&[2, 0, 0, 0, 9, 9], "no map that begins with its kind"),
        (&[8, 0, 0, 0, 1, 2], "in the middle of a frame, after 6 of its bytes"),
    ];
    for (bytes, text) in frames {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let client = WorkerClient::new(Connection::new(ours), hello());
        theirs.write_all(bytes).await.unwrap();
        drop(theirs);
        let LostConnection::Failed(error) = client.closed().await else { panic!("{text}") };
        let mut texts = error.to_string();
        let mut source = std::error::Error::source(&*error);
        while let Some(error) = source {
            texts = format!("{texts}: {error}");
            source = error.source();
        }
        assert!(texts.contains(text), "{texts}");
    }
}

#[tokio::test]
async fn a_hello_in_the_middle_ends_the_connection() {
    let (client, mut worker) = worker_pair();
    worker.send(&FromWorker::Hello(hello())).await.unwrap();
    assert!(matches!(client.closed().await, LostConnection::Unexpected { kind } if kind == "hello"));
}

#[tokio::test]
async fn answers_of_another_kind_or_shape_are_errors() {
    let (client, mut worker) = worker_pair();
    let asked = job(0);
    let good = proof(&asked);
    let wrong_group = GroupProof { group: GroupIndex(8), ..good.clone() };
    let wrong_weights = GroupProof { weights: WeightsHash(1), ..good.clone() };
    let short = GroupProof { members: good.members[..1].to_vec(), ..good.clone() };
    let serve = async {
        let (id, _) = received_job(&mut worker).await;
        worker.send(&FromWorker::Drained { id }).await.unwrap();
        for answer in [wrong_group, wrong_weights, short] {
            let (id, _) = received_job(&mut worker).await;
            worker.send(&FromWorker::Proved(answer.to_message(id, EPOCH))).await.unwrap();
        }
    };
    let ask = async {
        assert!(matches!(client.prove(&asked).await, Err(RequestError::WrongKind { found }) if found == "drained"));
        let error = client.prove(&asked).await.unwrap_err();
        assert!(matches!(error, RequestError::Answer(ShapeError::Group { .. })), "{error:?}");
        let error = client.prove(&asked).await.unwrap_err();
        assert!(matches!(error, RequestError::Answer(ShapeError::Weights { .. })), "{error:?}");
        let error = client.prove(&asked).await.unwrap_err();
        assert!(matches!(error, RequestError::Answer(ShapeError::Length { field: "sketches", .. })), "{error:?}");
    };
    tokio::join!(serve, ask);
}

#[tokio::test]
async fn large_frames_in_both_directions_at_once_do_not_block_each_other() {
    let (client, mut worker) = worker_pair();
    let large = ProveJob { completions: vec![vec![TokenId(1); 200_000]; 4], ..job(0) };
    let serve = async {
        let (id, first) = received_job(&mut worker).await;
        // Answers before it reads the second request, which waits in the pipe meanwhile.
        worker.send(&FromWorker::Proved(proof(&first).to_message(id, EPOCH))).await.unwrap();
        let (id, second) = received_job(&mut worker).await;
        worker.send(&FromWorker::Proved(proof(&second).to_message(id, EPOCH))).await.unwrap();
    };
    let (first, second, ()) = tokio::join!(client.prove(&large), client.prove(&large), serve);
    assert_eq!(first.unwrap(), second.unwrap());
}

#[tokio::test]
async fn dropping_the_client_hangs_up_after_what_was_sent() {
    let (client, mut worker) = worker_pair();
    client.shutdown().unwrap();
    drop(client);
    assert_eq!(worker.recv().await.unwrap(), Some(ToWorker::Shutdown));
    assert_eq!(worker.recv().await.unwrap(), None);
}

#[test]
fn requests_that_do_not_fit_together_are_refused() {
    let good = job(0).to_request(RequestId(1), EPOCH).unwrap();
    assert_eq!(ProveJob::from_request(&good).unwrap(), job(0));
    let refused = |change: fn(&mut ProveRequest)| {
        let mut request = good.clone();
        change(&mut request);
        ProveJob::from_request(&request).unwrap_err()
    };
    assert!(matches!(refused(|r| r.prompt = vec![1, 2, 3]), ShapeError::Bulk { field: "prompt", .. }));
    assert!(matches!(refused(|r| r.prompt = vec![]), ShapeError::Empty { field: "prompt" }));
    assert!(matches!(refused(|r| r.completions.push(0)), ShapeError::Bulk { field: "completions", .. }));
    assert!(matches!(refused(|r| r.cu_completions = vec![0]), ShapeError::Empty { field: "completions" }));
    for offsets in [vec![1, 1, 4], vec![0, 1, 3], vec![0, 1, 5], vec![0, 0, 4], vec![0, 3, 1, 4], vec![0, u32::MAX, 4]]
    {
        let mut request = good.clone();
        request.cu_completions = offsets;
        let error = ProveJob::from_request(&request).unwrap_err();
        assert!(matches!(error, ShapeError::Offsets { tokens: 4, .. }), "{error}");
    }
    let row = |prompt_length| VerifyJob {
        weights: WEIGHTS,
        rows: vec![RowJob {
            tokens: vec![TokenId(3); 4],
            prompt_length,
            randomness: vec![],
            temperature: 1.0,
            repetition_penalty: 1.0,
            eos_token: TokenId(5),
        }],
    };
    for (prompt_length, accepted) in [(0, true), (1, true), (3, true), (4, false), (u32::MAX, false)] {
        let request = row(prompt_length).to_request(RequestId(1), EPOCH);
        assert_eq!(VerifyJob::from_request(&request).is_ok(), accepted, "{prompt_length}");
    }
    let none = VerifyRequest { id: RequestId(1), epoch: EPOCH, weights: WEIGHTS, rows: vec![] };
    assert!(matches!(VerifyJob::from_request(&none), Err(ShapeError::Empty { field: "rows" })));
}

#[tokio::test]
async fn a_launcher_reports_phases_while_a_request_is_open() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (client, mut events) = LauncherClient::new(Connection::new(ours), hello());
    let mut launcher = Connection::<FromLauncher, ToLauncher>::new(theirs);
    let spec = ServerSpec {
        backend: Backend::Builtin,
        program: None,
        model_path: "/c/30".into(),
        weight_version: "30".into(),
        max_model_len: 512,
        max_running_requests: None,
        gpus: vec![],
        random_seed: None,
        threads: Some(1),
        start_timeout_s: 60,
    };
    let served = ServerEpoch { incarnation: 1, weights: "30".into() };
    let updated = ServerEpoch { incarnation: 1, weights: "60".into() };
    let serve = async {
        let Some(ToLauncher::Start { id, spec: received }) = launcher.recv().await.unwrap() else { panic!() };
        assert_eq!(received, spec);
        let phase = FromLauncher::Phase { phase: ServerPhase::Listening, detail: String::new() };
        launcher.send(&phase).await.unwrap();
        launcher.send(&FromLauncher::Ready { id, url: "http://x".into(), epoch: served.clone() }).await.unwrap();
        let Some(ToLauncher::Update { id, .. }) = launcher.recv().await.unwrap() else { panic!() };
        launcher.send(&FromLauncher::Updated { id, epoch: updated.clone() }).await.unwrap();
        let Some(ToLauncher::Ping { id }) = launcher.recv().await.unwrap() else { panic!() };
        launcher.send(&FromLauncher::Pong { id, server_pid: Some(5) }).await.unwrap();
        let died = FromLauncher::Died { cause: "x".into(), exit: Some(1), signal: None, last_lines: vec![] };
        launcher.send(&died).await.unwrap();
        let Some(ToLauncher::Stop { id }) = launcher.recv().await.unwrap() else { panic!() };
        launcher.send(&FromLauncher::Stopped { id }).await.unwrap();
        drop(launcher);
    };
    let ask = async {
        let ready = client.start(spec.clone()).await.unwrap();
        assert_eq!((ready.url.as_str(), ready.epoch), ("http://x", served.clone()));
        assert_eq!(client.update(Path::new("/c/60"), "60").await.unwrap(), updated);
        assert_eq!(client.ping().await.unwrap(), Some(5));
        client.stop().await.unwrap();
        assert!(matches!(events.next().await, Some(LauncherEvent::Phase { phase: ServerPhase::Listening, .. })));
        assert!(matches!(events.next().await, Some(LauncherEvent::Died { exit: Some(1), .. })));
        assert_eq!(events.next().await, None);
    };
    tokio::join!(serve, ask);
}

#[tokio::test]
async fn what_a_peer_wrote_before_it_hung_up_is_read_first() {
    // Which of writing and reading is tried first is left to chance.
    for _ in 0..64 {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&100_u32.to_le_bytes()).await.unwrap();
        drop(theirs);
        let client = WorkerClient::new(Connection::new(ours), hello());
        let error = client.ping().await.unwrap_err();
        assert!(matches!(error, RequestError::Lost(LostConnection::Failed(_))), "{error:?}");
    }
}
