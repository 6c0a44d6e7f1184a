//! Every message survives the wire; nothing else gets through.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use bytes::Bytes;
use grail_ipc::codec::{self, CodecError, Message};
use grail_ipc::framing::{self, FrameDecoder};
use grail_ipc::messages::*;
use grail_protocol::ids::{CheckpointWindow, GroupIndex, TokenId, WeightsHash};
use proptest::prelude::*;

const ID: RequestId = RequestId(7);
const EPOCH: Epoch = Epoch(3);
const WEIGHTS: WeightsHash = WeightsHash(0x0123_4567_89ab_cdef_0011_2233_4455_6677);

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        build: "0.1.0".into(),
        slot: SlotId(2),
        epoch: EPOCH,
        token: vec![0xff, 0, 0x80],
        pid: 4_711,
        device: "cuda:0 NVIDIA H100".into(),
        weights: Some(WEIGHTS),
    }
}

fn welcome() -> Welcome {
    Welcome { protocol: PROTOCOL_VERSION, build: "0.1.0".into(), epoch: EPOCH }
}

fn failed() -> Failed {
    Failed {
        id: ID,
        epoch: EPOCH,
        severity: Severity::FatalForGroup,
        code: "non_finite".into(),
        detail: "hidden states of group 5 contain NaN".into(),
    }
}

fn to_worker() -> Vec<ToWorker> {
    vec![
        ToWorker::Welcome(welcome()),
        ToWorker::Prove(ProveRequest {
            id: ID,
            epoch: EPOCH,
            group: GroupIndex(-1),
            weights: WEIGHTS,
            randomness: vec![1; 32],
            eos_token: TokenId(414),
            prompt: vec![1, 0, 0, 0],
            completions: vec![2, 0, 0, 0, 3, 0, 0, 0],
            cu_completions: vec![0, 1, 2],
        }),
        ToWorker::Verify(VerifyRequest {
            id: ID,
            epoch: EPOCH,
            weights: WEIGHTS,
            rows: vec![VerifyRow {
                tokens: vec![0; 8],
                prompt_length: 1,
                randomness: vec![],
                temperature: 0.7,
                repetition_penalty: 1.1,
                eos_token: TokenId(u32::MAX),
            }],
        }),
        ToWorker::Reload(ReloadCommand {
            id: ID,
            epoch: EPOCH,
            checkpoint: CheckpointWindow(u64::MAX),
            folder: "/cache/checkpoint-30".into(),
            weights: WEIGHTS,
            checksums: vec![],
            changes: vec![],
            anew: false,
        }),
        ToWorker::Stage(ReloadCommand {
            id: ID,
            epoch: EPOCH,
            checkpoint: CheckpointWindow(30),
            folder: String::new(),
            weights: WEIGHTS,
            checksums: vec![TensorChecksum { name: "model.norm.weight".into(), checksum: u64::MAX }],
            changes: vec![ChangeSet { base: WeightsHash(7), weights: WEIGHTS, file: "changes/from-0.bin".into() }],
            anew: true,
        }),
        ToWorker::Ping { id: ID },
        ToWorker::Drain { id: ID },
        ToWorker::Shutdown,
    ]
}

fn from_worker() -> Vec<FromWorker> {
    vec![
        FromWorker::Hello(hello()),
        FromWorker::Hello(Hello { weights: None, token: vec![], ..hello() }),
        FromWorker::Proved(Proved {
            id: ID,
            epoch: EPOCH,
            group: GroupIndex(i64::MIN),
            weights: WEIGHTS,
            prompt_sketches: vec![1, 2, 3, 4],
            sketches: vec![5; 8],
            logprobs: vec![6; 8],
            eos_probabilities: vec![0.0, -0.0, 1.0e-45, f32::INFINITY],
            compute_us: u64::MAX,
        }),
        FromWorker::Verified(Verified {
            id: ID,
            epoch: EPOCH,
            weights: WEIGHTS,
            rows: vec![VerifiedRow {
                sketches: vec![1; 8],
                logprobs: vec![2; 4],
                eos_probability: 0.1,
                chosen_probabilities: vec![3; 4],
            }],
        }),
        FromWorker::Staged { id: ID, epoch: EPOCH, weights: WEIGHTS },
        FromWorker::Reloaded(Reloaded {
            id: ID,
            epoch: EPOCH,
            weights: WEIGHTS,
            stall_us: 250_000,
            total_us: 900_000,
            from_changes: true,
            in_shadow: false,
        }),
        FromWorker::Pong(Pong {
            id: ID,
            epoch: EPOCH,
            weights: None,
            queued: 2,
            resident_bytes: 1 << 40,
            groups: 9,
            rollouts: 144,
        }),
        FromWorker::Drained { id: ID },
        FromWorker::Failed(failed()),
    ]
}

fn to_launcher() -> Vec<ToLauncher> {
    vec![
        ToLauncher::Welcome(welcome()),
        ToLauncher::Start {
            id: ID,
            spec: ServerSpec {
                backend: Backend::Sglang,
                program: None,
                model_path: "/cache/checkpoint-30".into(),
                weight_version: "checkpoint-30".into(),
                max_model_len: 4_096,
                max_running_requests: Some(512),
                gpus: vec!["0".into(), "GPU-1".into()],
                random_seed: Some(42),
                threads: None,
                start_timeout_s: 600,
            },
        },
        ToLauncher::Update { id: ID, folder: "/cache/checkpoint-60".into(), label: "checkpoint-60".into() },
        ToLauncher::Ping { id: ID },
        ToLauncher::Stop { id: ID },
    ]
}

fn from_launcher() -> Vec<FromLauncher> {
    let epoch = ServerEpoch { incarnation: 4, weights: "checkpoint-30".into() };
    vec![
        FromLauncher::Hello(hello()),
        FromLauncher::Phase { phase: ServerPhase::LoadingWeights, detail: "shard 1 of 4".into() },
        FromLauncher::Ready { id: ID, url: "http://127.0.0.1:31000".into(), epoch: epoch.clone() },
        FromLauncher::Updated { id: ID, epoch },
        FromLauncher::Stopped { id: ID },
        FromLauncher::Pong { id: ID, server_pid: Some(12) },
        FromLauncher::Died {
            cause: "killed".into(),
            exit: None,
            signal: Some(9),
            last_lines: vec!["out of memory".into(), String::new()],
        },
        FromLauncher::Failed(failed()),
    ]
}

fn body(frame: &Bytes) -> &[u8] {
    &frame[framing::HEADER_BYTES..]
}

fn assert_round_trip<M: Message + PartialEq>(messages: Vec<M>) {
    for message in messages {
        let frame = codec::encode(&message).unwrap();
        let mut decoder = FrameDecoder::default();
        decoder.push(&frame);
        let received = decoder.next_frame().unwrap().expect("one whole frame");
        assert_eq!(codec::decode::<M>(&received).unwrap(), message);
        assert_eq!(decoder.pending_bytes(), 0);
    }
}

#[test]
fn every_message_survives_the_wire() {
    assert_round_trip(to_worker());
    assert_round_trip(from_worker());
    assert_round_trip(to_launcher());
    assert_round_trip(from_launcher());
}

#[test]
fn truncated_and_prolonged_messages_are_errors() {
    for message in from_worker() {
        let frame = codec::encode(&message).unwrap();
        let body = body(&frame);
        for length in 0..body.len() {
            assert!(codec::decode::<FromWorker>(&body[..length]).is_err(), "{message:?} cut to {length}");
        }
        let mut prolonged = body.to_vec();
        prolonged.push(0xc0);
        let error = codec::decode::<FromWorker>(&prolonged).unwrap_err();
        assert!(matches!(error, CodecError::Trailing { trailing_bytes: 1, .. }), "{error}");
    }
}

#[test]
fn a_message_of_the_other_direction_is_an_error() {
    let frame = codec::encode(&ToWorker::Shutdown).unwrap();
    assert!(matches!(codec::decode::<FromWorker>(body(&frame)), Err(CodecError::Decode { .. })));
}

/// `{t: "drained", c: {id: 7, later: [1, [2]]}, extra: nil}`: what a newer peer may send.
#[test]
fn unknown_fields_are_ignored() {
    let mut newer = vec![0x83, 0xa1, b't', 0xa7];
    newer.extend_from_slice(b"drained");
    newer.extend_from_slice(&[0xa1, b'c', 0x82, 0xa2, b'i', b'd', 7, 0xa5]);
    newer.extend_from_slice(b"later");
    newer.extend_from_slice(&[0x92, 1, 0x91, 2, 0xa5]);
    newer.extend_from_slice(b"extra");
    newer.push(0xc0);
    assert_eq!(codec::decode::<FromWorker>(&newer).unwrap(), FromWorker::Drained { id: ID });
}

#[test]
fn content_before_the_kind_is_refused_unread() {
    // `{c: [...], t: ...}` would make serde keep the content in its own form.
    let mut reversed = vec![0x82, 0xa1, b'c', 0xdd, 0, 0x0f, 0, 0];
    reversed.resize(reversed.len() + 0x000f_0000, 1);
    let error = codec::decode::<FromWorker>(&reversed).unwrap_err();
    assert!(matches!(error, CodecError::NoMessage { .. }), "{error}");
}

#[test]
fn deep_nesting_is_refused() {
    let mut deep = vec![0x82, 0xa1, b't', 0xa7];
    deep.extend_from_slice(b"drained");
    deep.extend_from_slice(&[0xa1, b'c', 0x82, 0xa2, b'i', b'd', 7, 0xa1, b'x']);
    deep.resize(deep.len() + 100_000, 0x91);
    deep.push(0xc0);
    assert!(matches!(codec::decode::<FromWorker>(&deep), Err(CodecError::Decode { .. })));
}

#[test]
fn too_many_log_lines_are_refused() {
    let died = |lines: usize| FromLauncher::Died {
        cause: String::new(),
        exit: None,
        signal: None,
        last_lines: vec![String::new(); lines],
    };
    let most = codec::encode(&died(MAX_LAST_LINES)).unwrap();
    assert!(codec::decode::<FromLauncher>(body(&most)).is_ok());
    let more = codec::encode(&died(MAX_LAST_LINES + 1)).unwrap();
    assert!(matches!(codec::decode::<FromLauncher>(body(&more)), Err(CodecError::Decode { .. })));
}

#[test]
fn a_token_is_in_no_log() {
    let printed = format!("{:?}", FromWorker::Hello(Hello { token: b"secret".to_vec(), ..hello() }));
    assert!(printed.contains("[redacted]") && !printed.contains("115, 101"), "{printed}");
}

proptest! {
    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..2_048)) {
        prop_assert!(codec::decode::<FromWorker>(&noise).is_err());
        prop_assert!(codec::decode::<ToLauncher>(&noise).is_err());
    }

    #[test]
    fn noise_after_a_true_beginning_never_panics(
        which in any::<prop::sample::Index>(),
        cut in any::<prop::sample::Index>(),
        noise in prop::collection::vec(any::<u8>(), 0..512),
    ) {
        let messages = to_worker();
        let frame = codec::encode(&messages[which.index(messages.len())]).unwrap();
        let body = body(&frame);
        let mut damaged = body[..cut.index(body.len())].to_vec();
        damaged.extend_from_slice(&noise);
        drop(codec::decode::<ToWorker>(&damaged));
    }
}
