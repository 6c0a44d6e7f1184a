//! Numbers of the protocol (protocol §1). None is configuration: a change to any of them makes this miner's files invalid or its
//! verdicts wrong. Each line names the unit and what depends on the number.

/// Version written as `commit.proof_version`; a validator also accepts [`ACCEPTED_PROOF_VERSIONS`]. Any other text fails the
/// proof check.
pub const GRAIL_PROOF_VERSION: &str = "v5";
/// Versions that a validator accepts.
pub const ACCEPTED_PROOF_VERSIONS: [&str; 2] = ["v4", "v5"];

/// Modulus of a sketch, 2^31 − 1. Sketches are compared modulo this number.
pub const PRIME_Q: u32 = 2_147_483_647;
/// Challenged positions of one rollout, and the least tokens of a completion. Fewer tokens fail the proof check.
pub const CHALLENGE_K: usize = 32;
/// PRF label of the sketch coefficients; another label gives other coefficients.
pub const LABEL_SKETCH: &str = "sketch";
/// PRF label of the challenged positions; another label challenges other positions.
pub const LABEL_OPEN: &str = "open";
/// PRF label of an environment that no longer exists; read by nothing.
pub const LABEL_SAT: &str = "sat";
/// `commit.model.layer_index`: the last hidden state, after the final norm. Bound by the commit signature.
pub const LAYER_INDEX: i32 = -1;
/// Sequences of one forward pass of the proof; a validator composes its batches the same way.
pub const PROOF_BATCH_SIZE: usize = 16;
/// Activations that enter the sketch of one position, and the number of coefficients.
pub const PROOF_TOPK: usize = 16;
/// Magnitude buckets of each sign; bucket values are `-7..=7`.
pub const PROOF_NUM_BUCKETS: i32 = 8;
/// Largest magnitude of a coefficient.
pub const PROOF_COEFF_RANGE: i32 = 127;
/// Tolerance of a sketch at position 0, as modular distance.
pub const PROOF_SKETCH_TOLERANCE_BASE: u64 = 6_000;
/// Growth of the tolerance with the square root of the position.
pub const PROOF_SKETCH_TOLERANCE_GROWTH: f64 = 5.0;
/// Attention kernel of both sides on CUDA; another kernel moves hidden states and so sketches.
pub const ATTN_IMPLEMENTATION: &str = "flash_attention_2";

/// Blocks in a window.
pub const WINDOW_LENGTH: u64 = 30;
/// Seconds between blocks, for estimates only; the time gate starts its average with it.
pub const BLOCK_TIME_SECONDS: u32 = 12;
/// Seconds; defined by the reference and read by nothing.
pub const BLOCK_TIME_VARIANCE: u32 = 3;
/// Seconds; defined by the reference and read by nothing.
pub const NETWORK_UPLOAD_LATENCY: u32 = 30;
/// Seconds; defined by the reference and read by nothing: there is no grace after the deadline.
pub const UPLOAD_GRACE_PERIOD: u32 = 33;
/// Seconds; defined by the reference and read by nothing.
pub const DRAND_FUTURE_BUFFER: u32 = 30;
/// Defined by the reference and read by nothing.
pub const SANITY_CHECK_DRIFT_THRESHOLD: f64 = 0.1;

/// Rollouts in a group. A group of another size rejects the file.
pub const ROLLOUTS_PER_PROBLEM: usize = 16;
/// Most tokens of a completion.
pub const MAX_NEW_TOKENS_PROTOCOL_CAP: u32 = 8_192;
/// Least probability of the EOS token with which a completion ended. Below it the termination check fails.
pub const MIN_EOS_PROBABILITY: f64 = 0.02;
/// Largest median of `exp(|Δ logprob|) − 1` over the challenged positions.
pub const LOGPROB_IS_EPS: f64 = 0.10;
/// Relative tolerance between the claimed reward and the environment's.
pub const REWARD_REL_TOL: f64 = 0.02;
/// Absolute tolerance between the claimed reward and the environment's.
pub const REWARD_ABS_TOL: f64 = 1e-6;
/// Largest magnitude of the sum of a group's advantages.
pub const GRPO_ADV_SUM_TOLERANCE: f64 = 0.01;
/// Largest difference between a claimed advantage and the recomputed one.
pub const GRPO_ADV_TOLERANCE: f64 = 1e-3;
/// Share of checked rows whose failed reward check fails the miner.
pub const REWARD_SOFT_THRESHOLD: f64 = 0.20;
/// Share of checked rows whose failed distribution check fails the miner.
pub const DISTRIBUTION_SOFT_THRESHOLD: f64 = 0.51;

/// Bytes of the smallest object that counts as a window file.
pub const MIN_ROLLOUT_FILE_SIZE_BYTES: u64 = 200;
/// Bytes of the largest object that counts as a window file, 350 MiB. A larger one is treated as absent.
pub const MAX_ROLLOUT_FILE_SIZE_BYTES: u64 = 350 << 20;
/// Bytes from which an object is uploaded in parts.
pub const MULTIPART_THRESHOLD_BYTES: u64 = 50 << 20;
/// Seconds added to the time of the block after the window: the object's `LastModified` may not be later. It is negative.
pub const DEADLINE_SLACK_SECONDS: f64 = -4.0;
/// Seconds that the reference gives one upload.
pub const UPLOAD_TIMEOUT_SECONDS: u32 = 90;

/// Unique completions of one window that count for the score.
pub const UNIQUE_ROLLOUTS_CAP: u64 = 5_000;
/// Whether the cap applies.
pub const UNIQUE_ROLLOUTS_CAP_ENABLED: bool = true;
/// Exponent over the share of the cap that a miner reached.
pub const SUPERLINEAR_EXPONENT: f64 = 4.0;
/// Processed windows during which a failed miner is not selected.
pub const FAILURE_LOOKBACK_WINDOWS: u64 = 14;
/// Blocks between two settings of weights, and the interval of the second copycat scope.
pub const WEIGHT_SUBMISSION_INTERVAL_BLOCKS: u64 = 360;
/// Windows over which a weight is computed.
pub const WEIGHT_ROLLING_WINDOWS: u64 = WEIGHT_SUBMISSION_INTERVAL_BLOCKS / WINDOW_LENGTH;
/// UID that receives the burnt weight.
pub const GRAIL_BURN_UID: u16 = 0;
/// Percent of all weight that burns.
pub const GRAIL_BURN_PERCENTAGE: f64 = 90.0;
/// UID whose bucket holds the checkpoints.
pub const TRAINER_UID: u16 = 0;
/// Subnet of the reference's constants; its miner reads `BT_NETUID` or `NETUID` instead.
pub const NETUID: u16 = 81;

/// Whether only a sample of the miners is checked in each window.
pub const MINER_SAMPLING_ENABLED: bool = true;
/// Share of the eligible miners that is checked.
pub const MINER_SAMPLE_RATE: f64 = 0.25;
/// Fewest miners checked.
pub const MINER_SAMPLE_MIN: usize = 2;
/// Most miners checked.
pub const MINER_SAMPLE_MAX: usize = 35;
/// Share of a file's groups that is checked.
pub const SAMPLE_RATE: f64 = 0.10;
/// Most rollouts checked in one file.
pub const MAX_SAMPLES_PER_MINER: usize = 64;
/// A file of at most this many rows is checked whole.
pub const MAX_SAMPLES_PER_MINER_THRESHOLD: usize = 20;
/// Share of equal completions within a window from which the later uploader is a copier.
pub const COPYCAT_WINDOW_THRESHOLD: f64 = 0.05;
/// The same over an interval of [`WEIGHT_SUBMISSION_INTERVAL_BLOCKS`].
pub const COPYCAT_INTERVAL_THRESHOLD: f64 = 0.03;

/// Fewest tokens for the distribution check; a shorter completion fails it.
pub const SAMPLING_MIN_STEPS: usize = 30;
/// Probability up to which a token counts as low.
pub const SAMPLING_LOW_P: f64 = 0.1;
/// Probability from which a token counts as high.
pub const SAMPLING_HIGH_P: f64 = 0.9;
/// Share of low tokens of an earlier form of the check; read by nothing.
pub const SAMPLING_LOW_FRAC_MIN: f64 = 0.2;
/// Share of high tokens of an earlier form of the check; read by nothing.
pub const SAMPLING_HIGH_FRAC_MIN: f64 = 0.5;
/// Share of middle tokens of an earlier form of the check; read by nothing.
pub const SAMPLING_MID_FRAC_MAX: f64 = 0.4;
/// A median probability up to this fails the distribution check.
pub const SAMPLING_MEDIAN_LOW_MAX: f64 = 0.3;
/// A 10 % quantile up to this, over all tokens or the first ones, fails the distribution check.
pub const SAMPLING_LOW_Q10_MAX: f64 = 0.025;
/// A least probability up to this fails the distribution check.
pub const SAMPLING_MIN_TOKEN_PROB: f64 = 1e-5;
/// Tokens that count as the first ones.
pub const SAMPLING_INITIAL_WINDOW_STEPS: usize = 50;

/// Environment of the reference when the checkpoint's metadata names none.
pub const CURRENT_ENV_ID: &str = "triton_kernel";
/// Slope of the kernel environment's reward.
pub const SIGMOID_DELTA: f64 = 1.8;
/// Largest speed-up that the kernel environment rewards.
pub const SPEEDUP_CLIP: f64 = 3.0;
/// Weight of the kernel environment's speed-up in the reward.
pub const SIGMOID_KERNEL_WEIGHT: f64 = 0.8;

/// Weight of the newest sample in the time gate's averages.
pub const MINER_EMA_ALPHA: f64 = 0.2;
/// Blocks that the time gate keeps free at the end of a window.
pub const MINER_SAFETY_BLOCKS: u32 = 3;
/// Seconds at which the time of a group enters the time gate's average at most.
pub const MINER_GROUP_SECONDS_CAP: f64 = 360.0;

/// Keys of all checkpoints start with this.
pub const CHECKPOINT_PREFIX: &str = "grail/checkpoints/";
/// Folder of a checkpoint that holds a difference.
pub const CHECKPOINT_SUBDIR_DELTA: &str = "DELTA";
/// Folder of a checkpoint that holds all weights.
pub const CHECKPOINT_SUBDIR_FULL: &str = "FULL";
/// `checkpoint_type` of a difference in metadata.
pub const CHECKPOINT_TYPE_DELTA: &str = "DELTA";
/// `checkpoint_type` of all weights in metadata.
pub const CHECKPOINT_TYPE_FULL: &str = "FULL";
/// Keys of the trust lists start with this.
pub const TRUST_LIST_KEY_PREFIX: &str = "grail/trust/trust_list_";
/// Format of the trust lists.
pub const TRUST_LIST_VERSION: u32 = 1;
