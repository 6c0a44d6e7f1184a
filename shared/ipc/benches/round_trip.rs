//! Round trip of one group of 16 rollouts of 2,000 tokens over a real socket, without a model.
//!
//! `cargo bench -p grail-ipc --bench round_trip`. Budget: 2 ms.

use std::time::Duration;

use grail_ipc::connection::Connection;
use grail_ipc::jobs::{GroupProof, MemberProof, ProveJob};
use grail_ipc::messages::{Epoch, FromWorker, Hello, PROTOCOL_VERSION, SlotId, ToWorker};
use grail_ipc::{Expected, WorkerClient, handshake, socket};
use grail_protocol::ids::{GroupIndex, TokenId, WeightsHash};

const ROLLOUTS: usize = 16;
const TOKENS: usize = 2_000;
const PROMPT_TOKENS: usize = 200;
const LIMIT: Duration = Duration::from_secs(10);

fn main() {
    divan::main();
}

fn job() -> ProveJob {
    ProveJob {
        group: GroupIndex(1),
        weights: WeightsHash(7),
        randomness: vec![3; 32],
        eos_token: TokenId(151_645),
        prompt: (0..200).map(TokenId).collect(),
        completions: (0..16).map(|member| (0..2_000).map(|token| TokenId(member * 2_000 + token)).collect()).collect(),
    }
}

/// Answers each group at once, on a thread of its own as a worker's compute thread would.
async fn echo(mut connection: Connection<FromWorker, ToWorker>) {
    while let Ok(Some(ToWorker::Prove(request))) = connection.recv().await {
        let job = ProveJob::from_request(&request).expect("the bench sends good requests");
        let proof = GroupProof {
            group: job.group,
            weights: job.weights,
            prompt_sketches: vec![1; job.prompt.len()],
            members: job
                .completions
                .iter()
                .map(|completion| MemberProof {
                    sketches: completion.iter().map(|token| token.0).collect(),
                    logprobs: vec![-0.25; completion.len()],
                    eos_probability: 0.5,
                })
                .collect(),
            compute: Duration::ZERO,
        };
        let answer = FromWorker::Proved(proof.to_message(request.id, request.epoch));
        connection.send(&answer).await.expect("the bench still listens");
    }
}

#[divan::bench]
fn group_of_16_times_2000(bencher: divan::Bencher<'_, '_>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("bench.sock");
    let listening = path.clone();
    let worker = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = socket::Listener::bind(&listening, socket::Folder::Any).await.expect("listens");
            let hello = Hello {
                protocol: PROTOCOL_VERSION,
                build: "bench".into(),
                slot: SlotId(0),
                epoch: Epoch(1),
                token: vec![],
                pid: std::process::id(),
                device: "none".into(),
                weights: None,
            };
            let stream = listener.accept().await.expect("a peer");
            let (connection, _) = handshake::greet(stream, hello, LIMIT).await.expect("a handshake");
            echo(connection).await;
        });
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let client = runtime.block_on(WorkerClient::connect(&path, &Expected::default(), LIMIT)).expect("connects");
    let job = job();
    bencher
        .counter(divan::counter::ItemsCount::new(ROLLOUTS * TOKENS + PROMPT_TOKENS))
        .bench_local(|| runtime.block_on(client.prove(&job)).expect("an answer"));
    runtime.block_on(async { drop(client) });
    drop(runtime);
    worker.join().expect("the echo thread ends when its peer hangs up");
}
