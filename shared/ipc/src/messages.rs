//! Messages between the supervisor and its children, as MessagePack maps with named fields.
//!
//! Bulk arrays travel as one `bin` of little-endian bytes: a MessagePack list of integers costs about fifty times more to
//! encode. Fields are added, never renamed; a reader ignores fields that it does not know.

use std::fmt;

use grail_protocol::ids::{CheckpointWindow, GroupIndex, TokenId, WeightsHash};
use serde::{Deserialize, Serialize};

/// Version of this protocol. Peers with another version are refused, with both numbers.
pub const PROTOCOL_VERSION: u32 = 2;

/// The most log lines that a message carries: an empty line takes one byte of the frame and 24 of memory.
pub const MAX_LAST_LINES: usize = 1_024;

/// Number of a request on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub u64);

/// Incarnation of a child: rises with every start of its slot, so that a late answer of a dead one is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// Place of a proof worker, `0..n`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SlotId(pub u32);

macro_rules! display_as_inner {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
display_as_inner!(RequestId, Epoch, SlotId);

/// First message of the listening side (worker or launcher) to the supervisor that has connected.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    pub protocol: u32,
    /// Version of the package that was built, for people.
    pub build: String,
    pub slot: SlotId,
    pub epoch: Epoch,
    /// Token of the slot as the child got it on its inherited descriptor; empty when it stands alone.
    #[serde(with = "serde_bytes")]
    pub token: Vec<u8>,
    pub pid: u32,
    /// Where the model lies, for instance `cpu` or `cuda:0 NVIDIA H100`; empty for a launcher.
    pub device: String,
    /// Hash of the weights that are loaded, if any are.
    pub weights: Option<WeightsHash>,
}

/// The token proves who listens, so it is in no log.
impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hello")
            .field("protocol", &self.protocol)
            .field("build", &self.build)
            .field("slot", &self.slot)
            .field("epoch", &self.epoch)
            .field("token", &"[redacted]")
            .field("pid", &self.pid)
            .field("device", &self.device)
            .field("weights", &self.weights)
            .finish()
    }
}

/// The supervisor's answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    pub protocol: u32,
    pub build: String,
    pub epoch: Epoch,
}

/// From the supervisor to a proof worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", content = "c", rename_all = "snake_case")]
pub enum ToWorker {
    Welcome(Welcome),
    Prove(ProveRequest),
    Verify(VerifyRequest),
    /// Make the weights of a reload ready beside the present ones, while those prove on.
    Stage(ReloadCommand),
    Reload(ReloadCommand),
    Ping {
        id: RequestId,
    },
    /// Finish what was accepted, accept nothing more.
    Drain {
        id: RequestId,
    },
    Shutdown,
}

/// From a proof worker to the supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", content = "c", rename_all = "snake_case")]
pub enum FromWorker {
    Hello(Hello),
    Proved(Proved),
    Verified(Verified),
    Staged {
        id: RequestId,
        epoch: Epoch,
        /// The weights that the next reload to them finds ready; the present ones if others cannot lie ready.
        weights: WeightsHash,
    },
    Reloaded(Reloaded),
    Pong(Pong),
    Drained {
        id: RequestId,
    },
    Failed(Failed),
}

/// One group to prove: the prompt once, its completions end to end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProveRequest {
    pub id: RequestId,
    pub epoch: Epoch,
    pub group: GroupIndex,
    /// The weights that generated the group; a worker with others refuses.
    pub weights: WeightsHash,
    /// `R_m` of the window as bytes.
    #[serde(with = "serde_bytes")]
    pub randomness: Vec<u8>,
    /// The tokenizer's EOS, which may differ from the model config's.
    pub eos_token: TokenId,
    /// Prompt ids, `u32` little-endian.
    #[serde(with = "serde_bytes")]
    pub prompt: Vec<u8>,
    /// Completion ids of all members end to end, `u32` little-endian.
    #[serde(with = "serde_bytes")]
    pub completions: Vec<u8>,
    /// `n + 1` offsets into `completions`, in tokens; the first is 0.
    pub cu_completions: Vec<u32>,
}

/// Proof of one group, in the order of the request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proved {
    pub id: RequestId,
    pub epoch: Epoch,
    pub group: GroupIndex,
    /// The weights that made this proof.
    pub weights: WeightsHash,
    /// Sketches of the prompt positions, `u32` little-endian; the same for every member.
    #[serde(with = "serde_bytes")]
    pub prompt_sketches: Vec<u8>,
    /// Sketches of the completion positions end to end, `u32` little-endian.
    #[serde(with = "serde_bytes")]
    pub sketches: Vec<u8>,
    /// Logprobs of the completion tokens end to end, `f32` little-endian.
    #[serde(with = "serde_bytes")]
    pub logprobs: Vec<u8>,
    /// Per member: probability of the EOS token in the logits row `len − 2`.
    pub eos_probabilities: Vec<f32>,
    /// Microseconds that the forward pass and its read-back took.
    pub compute_us: u64,
}

/// Whole rollouts to recompute, as a validator does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerifyRequest {
    pub id: RequestId,
    pub epoch: Epoch,
    pub weights: WeightsHash,
    pub rows: Vec<VerifyRow>,
}

/// One rollout of a [`VerifyRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerifyRow {
    /// Prompt and completion ids, `u32` little-endian.
    #[serde(with = "serde_bytes")]
    pub tokens: Vec<u8>,
    pub prompt_length: u32,
    /// The row's own beacon as bytes; it may differ between rows.
    #[serde(with = "serde_bytes")]
    pub randomness: Vec<u8>,
    pub temperature: f64,
    pub repetition_penalty: f64,
    pub eos_token: TokenId,
}

/// Answer to a [`VerifyRequest`], rows in its order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verified {
    pub id: RequestId,
    pub epoch: Epoch,
    pub weights: WeightsHash,
    pub rows: Vec<VerifiedRow>,
}

/// What a verifier needs of one row; logits never leave the worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerifiedRow {
    /// Sketches of all positions, `u32` little-endian.
    #[serde(with = "serde_bytes")]
    pub sketches: Vec<u8>,
    /// Logprobs of the completion positions, `f32` little-endian.
    #[serde(with = "serde_bytes")]
    pub logprobs: Vec<u8>,
    /// Probability of the EOS token in the logits row `len − 2`, in the model's dtype.
    pub eos_probability: f32,
    /// Probabilities of the chosen completion tokens after repetition penalty and temperature, `f32` little-endian: what the
    /// distribution check is computed from.
    #[serde(with = "serde_bytes")]
    pub chosen_probabilities: Vec<u8>,
}

/// Take other weights, between two batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReloadCommand {
    pub id: RequestId,
    pub epoch: Epoch,
    pub checkpoint: CheckpointWindow,
    /// Folder of the full checkpoint.
    pub folder: String,
    /// Hash that the weights must have after the reload.
    pub weights: WeightsHash,
    /// Checksum of every tensor of the files, from when the checkpoint was installed. Without any the worker hashes the files.
    #[serde(default)]
    pub checksums: Vec<TensorChecksum>,
    /// Ways from other weights to these, without the folder: each set leads from its base to the base of the next, the last to
    /// `weights`. A worker whose weights are the base of one of them may go on from there.
    #[serde(default)]
    pub changes: Vec<ChangeSet>,
    /// Whether the folder is read even if the weights are there already.
    #[serde(default)]
    pub anew: bool,
}

/// Checksum of one tensor in the dtype of its file: Σ (bits + 1)·(2·index + 1) mod 2^64 over its elements in C order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorChecksum {
    pub name: String,
    pub checksum: u64,
}

/// What differs between two checkpoints, as a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeSet {
    pub base: WeightsHash,
    pub weights: WeightsHash,
    /// A safetensors file: `index/NAME` (U32, ascending element positions) with `value/NAME` (the new elements in the dtype of
    /// the tensor's file), or `whole/NAME`; tensors that are the same are absent.
    pub file: String,
}

/// The weights are in place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reloaded {
    pub id: RequestId,
    pub epoch: Epoch,
    pub weights: WeightsHash,
    /// Microseconds in which the worker could not prove.
    pub stall_us: u64,
    /// Microseconds from the command to the weights being in place.
    #[serde(default)]
    pub total_us: u64,
    /// Whether changes were applied to the weights that were there, instead of reading the folder.
    #[serde(default)]
    pub from_changes: bool,
    /// Whether there was a second copy of the weights for the time of the reload.
    #[serde(default)]
    pub in_shadow: bool,
}

/// Sign of life, answered at once, also while a batch computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pong {
    pub id: RequestId,
    pub epoch: Epoch,
    pub weights: Option<WeightsHash>,
    /// Requests accepted and not yet answered.
    pub queued: u32,
    /// Resident memory of the process in bytes.
    pub resident_bytes: u64,
    /// Groups and rows proved since the start.
    pub groups: u64,
    pub rollouts: u64,
}

/// What a failed request means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The same request may succeed elsewhere or later.
    Retryable,
    /// The group itself is the cause: drop it.
    FatalForGroup,
    /// The worker cannot go on and must be replaced.
    FatalForWorker,
}

/// Requests in a row without memory after which a worker ends, and its supervisor has it end: the device will not get any.
pub const MOST_OUT_OF_MEMORY: u32 = 2;

/// Groups in a row that are not finite before the weights are suspect, and worker and supervisor act as above: one group may have met a
/// hole of the model, the next one hardly.
pub const MOST_NON_FINITE: u32 = 2;

/// A request that has no answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failed {
    pub id: RequestId,
    pub epoch: Epoch,
    pub severity: Severity,
    /// Stable short name of the cause, for counters: `wrong_weights`, `non_finite`, `out_of_memory`, `bad_request`, …
    pub code: String,
    /// What happened, on what, and what to do.
    pub detail: String,
}

/// From the supervisor to a launcher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", content = "c", rename_all = "snake_case")]
pub enum ToLauncher {
    Welcome(Welcome),
    Start { id: RequestId, spec: ServerSpec },
    Update { id: RequestId, folder: String, label: String },
    Ping { id: RequestId },
    Stop { id: RequestId },
}

/// From a launcher to the supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", content = "c", rename_all = "snake_case")]
pub enum FromLauncher {
    Hello(Hello),
    Phase {
        phase: ServerPhase,
        detail: String,
    },
    Ready {
        id: RequestId,
        url: String,
        epoch: ServerEpoch,
    },
    Updated {
        id: RequestId,
        epoch: ServerEpoch,
    },
    Stopped {
        id: RequestId,
    },
    Pong {
        id: RequestId,
        server_pid: Option<u32>,
    },
    /// The server died without being asked to.
    Died {
        cause: String,
        exit: Option<i32>,
        signal: Option<i32>,
        /// The last lines of its log, at most [`MAX_LAST_LINES`].
        #[serde(deserialize_with = "bounded_lines")]
        last_lines: Vec<String>,
    },
    Failed(Failed),
}

/// Incarnation of the server process and label of the weights that it serves.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ServerEpoch {
    pub incarnation: u64,
    pub weights: String,
}

/// Which server, with what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerSpec {
    pub backend: Backend,
    /// Program of the builtin server; unset = beside the launcher.
    pub program: Option<String>,
    /// Folder of the checkpoint.
    pub model_path: String,
    /// Label of the weights; answers carry it as `weight_version`.
    pub weight_version: String,
    /// `GRAIL_PIPELINE_MAX_MODEL_LEN`: the most tokens of prompt and completion together.
    pub max_model_len: u32,
    pub max_running_requests: Option<u32>,
    /// Positions in the parent's `CUDA_VISIBLE_DEVICES` or indexes when it is unset; empty for a CPU server.
    pub gpus: Vec<String>,
    pub random_seed: Option<u64>,
    /// Threads of a CPU server; unset = its own choice.
    pub threads: Option<u32>,
    pub start_timeout_s: u64,
}

/// Kind of server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    Builtin,
    Sglang,
    Vllm,
}

/// Phases of a server's start, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerPhase {
    Spawned,
    Listening,
    LoadingWeights,
    WarmingUp,
    Ready,
    Updating,
    Stopping,
}

/// A list of at most [`MAX_LAST_LINES`] texts, refused while it is read.
fn bounded_lines<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Lines;
    impl<'de> serde::de::Visitor<'de> for Lines {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX_LAST_LINES} lines")
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut lines = Vec::new();
            while let Some(line) = seq.next_element()? {
                if lines.len() == MAX_LAST_LINES {
                    return Err(serde::de::Error::invalid_length(MAX_LAST_LINES + 1, &self));
                }
                lines.push(line);
            }
            Ok(lines)
        }
    }
    deserializer.deserialize_seq(Lines)
}
