//! Reloads of the real program: by changes and by folders, in a second copy and in place, with proofs in flight.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use grail_ipc::jobs::{MemberProof, ProveJob, ReloadOrder};
use grail_ipc::messages::{ChangeSet, Failed, Severity, TensorChecksum};
use grail_ipc::{Expected, RequestError, WorkerClient};
use grail_model::safetensors::{OwnedTensor, write};
use grail_model::weights::WeightFiles;
use grail_model::write_difference;
use grail_process::fault::VARIABLE;
use grail_process::{Child, ChildSpec, ExitCause, Signal, spawn};
use grail_protocol::ids::{CheckpointWindow, GroupIndex, TokenId, WeightsHash};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_grail-proof-worker");
const MODEL: &str = "models/qwen2-tied";
const LONG: Duration = Duration::from_secs(120);

/// Three checkpoints of one model and the changes from each to the next.
struct Checkpoints {
    folder: TempDir,
}

impl Checkpoints {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let golden = grail_golden::path(MODEL);
        let files = WeightFiles::open(&golden).unwrap();
        for step in 0..3_u8 {
            let path = folder.path().join(step.to_string());
            std::fs::create_dir(&path).unwrap();
            std::fs::copy(golden.join("config.json"), path.join("config.json")).unwrap();
            let changed = |(number, (name, view)): (usize, (&str, grail_model::safetensors::TensorView<'_>))| {
                let mut bytes = view.bytes.to_vec();
                // Each step changes other elements, and one tensor whole.
                for earlier in 0..step {
                    let every = if number == usize::from(earlier) { 1 } else { 5 + usize::from(earlier) };
                    bytes.chunks_exact_mut(2).step_by(every).for_each(|element| element[0] ^= 0x40 << earlier);
                }
                OwnedTensor { name: name.to_owned(), dtype: view.dtype, shape: view.shape.to_vec(), bytes }
            };
            let tensors: Vec<OwnedTensor> = files.iter().enumerate().map(changed).collect();
            write(&path.join("model.safetensors"), &tensors).unwrap();
        }
        let checkpoints = Self { folder };
        for step in 0..2 {
            let changed = write_difference(
                &checkpoints.files(step),
                &checkpoints.files(step + 1),
                &checkpoints.path(step + 1).join("changes.bin"),
            );
            assert!(changed.unwrap() > 1_000);
        }
        checkpoints
    }

    fn path(&self, step: usize) -> PathBuf {
        self.folder.path().join(step.to_string())
    }

    fn files(&self, step: usize) -> WeightFiles {
        WeightFiles::open(&self.path(step)).unwrap()
    }

    fn weights(&self, step: usize) -> WeightsHash {
        self.files(step).hash()
    }

    fn set(&self, to: usize) -> ChangeSet {
        let file = self.path(to).join("changes.bin").to_str().unwrap().to_owned();
        ChangeSet { base: self.weights(to - 1), weights: self.weights(to), file }
    }

    /// To a checkpoint, with all changes that lead there.
    fn order(&self, to: usize) -> ReloadOrder {
        let checksums = self.files(to).checksums().into_iter();
        ReloadOrder {
            checksums: checksums.map(|(name, checksum)| TensorChecksum { name, checksum }).collect(),
            changes: (1..=to).map(|step| self.set(step)).collect(),
            ..ReloadOrder::from_folder(CheckpointWindow(30), self.path(to), self.weights(to))
        }
    }
}

/// A worker that stands alone.
struct Worker {
    child: Child,
    client: WorkerClient,
    _folder: TempDir,
}

impl Worker {
    async fn start(model: &Path, variables: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("alone.sock");
        let mut spec = ChildSpec::new("alone", PROGRAM);
        for (name, value) in variables {
            spec.environment.set(*name, *value);
        }
        let spec = spec
            .arguments(["serve", "--threads", "1", "--socket"])
            .argument(&socket)
            .argument("--model")
            .argument(model);
        let child = spawn(spec).await.unwrap();
        let client = WorkerClient::connect(&socket, &Expected::default(), LONG).await.unwrap();
        Self { child, client, _folder: folder }
    }

    async fn in_place(model: &Path) -> Self {
        Self::start(model, &[("GRAIL_RELOAD_SHADOW", "never")]).await
    }

    async fn proof(&self, weights: WeightsHash) -> Vec<MemberProof> {
        self.client.prove(&job(weights)).await.unwrap().members
    }

    async fn end(self) {
        self.child.signal(Signal::SIGTERM).unwrap();
        assert_eq!(tokio::time::timeout(LONG, self.child.wait()).await.unwrap().cause, ExitCause::Code(0));
    }
}

fn job(weights: WeightsHash) -> ProveJob {
    let tokens = |first: u32, count: u32| (first..first + count).map(TokenId).collect::<Vec<_>>();
    ProveJob {
        group: GroupIndex(4),
        weights,
        randomness: vec![7; 32],
        eos_token: TokenId(2),
        prompt: tokens(5, 6),
        completions: vec![tokens(20, 9), tokens(40, 5)],
    }
}

/// What a worker that has only ever seen this checkpoint proves.
async fn reference(folder: &Path, weights: WeightsHash) -> Vec<MemberProof> {
    let worker = Worker::start(folder, &[]).await;
    let proof = worker.proof(weights).await;
    worker.end().await;
    proof
}

fn failure(error: RequestError) -> Failed {
    match error {
        RequestError::Failed(failed) => failed,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn changes_are_staged_and_take_over_while_proofs_are_in_flight() {
    let checkpoints = Checkpoints::new();
    let [old, new] = [0, 1].map(|step| checkpoints.weights(step));
    let worker = Worker::start(&checkpoints.path(0), &[]).await;
    let (before, order) = (worker.proof(old).await, checkpoints.order(1));
    let expected = reference(&checkpoints.path(1), new).await;
    assert_ne!(before, expected);
    let (is_over, proved) = (Cell::new(false), Cell::new([0, 0]));
    let lane = async || {
        while !is_over.get() {
            let [of_old, of_new] = proved.get();
            match worker.client.prove(&job(old)).await {
                Ok(proof) => {
                    assert_eq!((proof.weights, &proof.members), (old, &before));
                    proved.set([of_old + 1, of_new]);
                }
                Err(error) => {
                    assert_eq!(failure(error).code, "wrong_weights");
                    assert_eq!(worker.proof(new).await, expected);
                    proved.set([of_old, of_new + 1]);
                }
            }
        }
    };
    let roll = async {
        assert_eq!(worker.client.stage(&order).await.unwrap(), new);
        let reloaded = worker.client.reload(&order).await.unwrap();
        assert_eq!((reloaded.weights, reloaded.from_changes, reloaded.in_shadow), (new, true, true));
        assert!(reloaded.stall_us <= reloaded.total_us);
        while proved.get()[1] == 0 {
            tokio::task::yield_now().await;
        }
        is_over.set(true);
    };
    tokio::join!(roll, lane(), lane());
    assert!(proved.get()[0] > 0);
    assert_eq!(worker.client.ping().await.unwrap().weights, Some(new));
    worker.end().await;
}

#[tokio::test]
async fn a_chain_is_entered_where_the_worker_stands() {
    let checkpoints = Checkpoints::new();
    let last = checkpoints.weights(2);
    let expected = reference(&checkpoints.path(2), last).await;
    for (from, sets, is_by_changes) in [(0, 0..2, true), (1, 0..2, true), (0, 1..2, false), (0, 0..0, false)] {
        let mut order = checkpoints.order(2);
        order.changes = order.changes[sets].to_vec();
        for shadow in ["auto", "never"] {
            let worker = Worker::start(&checkpoints.path(from), &[("GRAIL_RELOAD_SHADOW", shadow)]).await;
            let reloaded = worker.client.reload(&order).await.unwrap();
            assert_eq!((reloaded.weights, reloaded.from_changes), (last, is_by_changes), "from {from}, {shadow}");
            assert_eq!(reloaded.in_shadow, shadow == "auto");
            assert_eq!(worker.proof(last).await, expected);
            worker.end().await;
        }
    }
}

#[tokio::test]
async fn without_memory_for_two_weights_change_in_place_or_not_at_all() {
    let checkpoints = Checkpoints::new();
    let [old, new] = [0, 1].map(|step| checkpoints.weights(step));
    let worker = Worker::in_place(&checkpoints.path(0)).await;
    let before = worker.proof(old).await;
    let order = checkpoints.order(1);
    let by_folder = ReloadOrder { changes: vec![], ..order.clone() };
    assert_eq!(worker.client.stage(&by_folder).await.unwrap(), old, "no second copy");

    // Changes that are well-formed and wrong. A chain is written as it is read, and its checksum found wrong behind it.
    let wrong = |to: usize| {
        let mut bytes = std::fs::read(checkpoints.path(to).join("changes.bin")).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        let file = checkpoints.path(to).join("wrong.bin");
        std::fs::write(&file, bytes).unwrap();
        let mut spoilt = checkpoints.order(to);
        spoilt.changes[to - 1].file = file.to_str().unwrap().to_owned();
        spoilt
    };
    let refused = failure(worker.client.reload(&wrong(2)).await.unwrap_err());
    assert_eq!((refused.code.as_str(), refused.severity), ("reload_failed", Severity::Retryable));
    assert!(refused.detail.contains("has checksum") && refused.detail.contains("taken back"), "{}", refused.detail);
    assert_eq!(worker.proof(old).await, before);
    assert_eq!(worker.client.ping().await.unwrap().weights, Some(old));
    // A single set is found wrong before anything is touched; the folder is tried then, which is another one's here.
    let nothing_left = ReloadOrder { folder: checkpoints.path(2), ..wrong(1) };
    let refused = failure(worker.client.reload(&nothing_left).await.unwrap_err());
    assert!(refused.detail.contains("has checksum") && !refused.detail.contains("taken back"), "{}", refused.detail);
    assert_eq!(worker.proof(old).await, before);

    // A folder that is not what was installed: found before anything is touched.
    let of_another = ReloadOrder { folder: checkpoints.path(2), changes: vec![], ..order.clone() };
    let refused = failure(worker.client.reload(&of_another).await.unwrap_err());
    assert!(refused.detail.contains("has checksum") && !refused.detail.contains("taken back"), "{}", refused.detail);
    let unchecked = ReloadOrder { checksums: vec![], ..of_another };
    let refused = failure(worker.client.reload(&unchecked).await.unwrap_err());
    assert!(refused.detail.contains("holds weights"), "{}", refused.detail);
    assert_eq!(worker.proof(old).await, before);

    // Changes lie ready beside the weights, which prove on until they are due.
    assert_eq!(worker.client.stage(&order).await.unwrap(), new);
    assert_eq!(worker.proof(old).await, before);
    let by_changes = worker.client.reload(&order).await.unwrap();
    assert_eq!((by_changes.weights, by_changes.from_changes, by_changes.in_shadow), (new, true, false));
    assert!(by_changes.stall_us > 0);
    let expected = reference(&checkpoints.path(1), new).await;
    assert_eq!(worker.proof(new).await, expected);
    let back = ReloadOrder { checksums: vec![], ..checkpoints.order(0) };
    let by_folder = worker.client.reload(&back).await.unwrap();
    assert_eq!((by_folder.weights, by_folder.from_changes, by_folder.in_shadow), (old, false, false));
    assert_eq!(worker.proof(old).await, before);
    worker.end().await;
}

#[tokio::test]
async fn changes_that_cannot_be_used_are_replaced_by_the_folder_and_a_wrong_folder_by_nothing() {
    let checkpoints = Checkpoints::new();
    let [old, new] = [0, 1].map(|step| checkpoints.weights(step));
    let expected = reference(&checkpoints.path(1), new).await;
    let order = checkpoints.order(1);
    let right = std::fs::read(&order.changes[0].file).unwrap();
    let mut flipped = right.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut header = right.clone();
    header[20] ^= 0xff;
    for (place, bytes) in [&flipped, &header, &right[..right.len() - 1], &[]].into_iter().enumerate() {
        let file = checkpoints.path(1).join(format!("spoilt-{place}.bin"));
        std::fs::write(&file, bytes).unwrap();
        let mut spoilt = order.clone();
        spoilt.changes[0].file = file.to_str().unwrap().to_owned();
        let worker = Worker::start(&checkpoints.path(0), &[]).await;
        let before = worker.proof(old).await;

        let nothing_left = ReloadOrder { folder: checkpoints.path(2), ..spoilt.clone() };
        let refused = failure(worker.client.reload(&nothing_left).await.unwrap_err());
        assert_eq!((refused.code.as_str(), refused.severity), ("reload_failed", Severity::Retryable));
        assert_eq!(worker.proof(old).await, before);

        let reloaded = worker.client.reload(&spoilt).await.unwrap();
        assert_eq!((reloaded.weights, reloaded.from_changes, reloaded.in_shadow), (new, false, true));
        assert_eq!(worker.proof(new).await, expected);
        worker.end().await;
    }
}

#[tokio::test]
async fn a_folder_is_read_anew_only_when_that_is_asked_for() {
    let checkpoints = Checkpoints::new();
    let old = checkpoints.weights(0);
    let worker = Worker::start(&checkpoints.path(0), &[]).await;
    let present = checkpoints.order(0);
    let nowhere = ReloadOrder { folder: "/nonexistent".into(), ..present.clone() };
    let at_once = worker.client.reload(&nowhere).await.unwrap();
    assert_eq!((at_once.weights, at_once.stall_us, at_once.in_shadow), (old, 0, false));
    let anew = ReloadOrder { anew: true, ..nowhere };
    assert!(failure(worker.client.reload(&anew).await.unwrap_err()).detail.contains("/nonexistent"));
    let anew = ReloadOrder { anew: true, ..present };
    assert!(worker.client.reload(&anew).await.unwrap().in_shadow);
    worker.end().await;
}

#[tokio::test]
async fn a_worker_killed_while_it_reloads_is_followed_by_one_on_the_new_folder() {
    let checkpoints = Checkpoints::new();
    let [old, new] = [0, 1].map(|step| checkpoints.weights(step));
    let expected = reference(&checkpoints.path(1), new).await;
    for fault in ["kill@reload", "hang@reload"] {
        let worker = Worker::start(&checkpoints.path(0), &[(VARIABLE, fault)]).await;
        let order = checkpoints.order(1);
        if fault == "hang@reload" {
            let reload = worker.client.reload(&order);
            let kill = async {
                // Answered behind the command, so the reload is under way.
                worker.client.ping().await.unwrap();
                worker.proof(old).await;
                worker.child.signal(Signal::SIGKILL).unwrap();
            };
            let (lost, ()) = tokio::join!(reload, kill);
            assert!(matches!(lost, Err(RequestError::Lost(_))), "{lost:?}");
        } else {
            assert!(matches!(worker.client.reload(&order).await, Err(RequestError::Lost(_))));
        }
        let cause = tokio::time::timeout(LONG, worker.child.wait()).await.unwrap().cause;
        assert_eq!(cause, ExitCause::Signal { signal: Signal::SIGKILL, core: false });
        let next = Worker::start(&checkpoints.path(1), &[]).await;
        assert_eq!(next.proof(new).await, expected);
        assert_eq!(failure(next.client.prove(&job(old)).await.unwrap_err()).code, "wrong_weights");
        next.end().await;
    }
}
