//! The constants, and that no file of the folder is left without a test.

use grail_protocol::constants::*;
use serde_json::{Map, Value, json};

/// Every constant of the reference under its name there.
fn ours() -> Vec<(&'static str, Value)> {
    vec![
        ("GRAIL_PROOF_VERSION", json!(GRAIL_PROOF_VERSION)),
        ("PRIME_Q", json!(PRIME_Q)),
        ("CHALLENGE_K", json!(CHALLENGE_K)),
        ("RNG_LABEL", json!({"sketch": LABEL_SKETCH, "open": LABEL_OPEN, "sat": LABEL_SAT})),
        ("LAYER_INDEX", json!(LAYER_INDEX)),
        ("PROOF_BATCH_SIZE", json!(PROOF_BATCH_SIZE)),
        ("PROOF_TOPK", json!(PROOF_TOPK)),
        ("PROOF_NUM_BUCKETS", json!(PROOF_NUM_BUCKETS)),
        ("PROOF_COEFF_RANGE", json!(PROOF_COEFF_RANGE)),
        ("PROOF_SKETCH_TOLERANCE_BASE", json!(PROOF_SKETCH_TOLERANCE_BASE)),
        ("PROOF_SKETCH_TOLERANCE_GROWTH", json!(PROOF_SKETCH_TOLERANCE_GROWTH)),
        ("ATTN_IMPLEMENTATION", json!(ATTN_IMPLEMENTATION)),
        ("WINDOW_LENGTH", json!(WINDOW_LENGTH)),
        ("BLOCK_TIME_SECONDS", json!(BLOCK_TIME_SECONDS)),
        ("BLOCK_TIME_VARIANCE", json!(BLOCK_TIME_VARIANCE)),
        ("NETWORK_UPLOAD_LATENCY", json!(NETWORK_UPLOAD_LATENCY)),
        ("UPLOAD_GRACE_PERIOD", json!(UPLOAD_GRACE_PERIOD)),
        ("DRAND_FUTURE_BUFFER", json!(DRAND_FUTURE_BUFFER)),
        ("ROLLOUTS_PER_PROBLEM", json!(ROLLOUTS_PER_PROBLEM)),
        ("MAX_NEW_TOKENS_PROTOCOL_CAP", json!(MAX_NEW_TOKENS_PROTOCOL_CAP)),
        ("MIN_EOS_PROBABILITY", json!(MIN_EOS_PROBABILITY)),
        ("SANITY_CHECK_DRIFT_THRESHOLD", json!(SANITY_CHECK_DRIFT_THRESHOLD)),
        ("SIGMOID_DELTA", json!(SIGMOID_DELTA)),
        ("SPEEDUP_CLIP", json!(SPEEDUP_CLIP)),
        ("SIGMOID_KERNEL_WEIGHT", json!(SIGMOID_KERNEL_WEIGHT)),
        ("REWARD_REL_TOL", json!(REWARD_REL_TOL)),
        ("REWARD_ABS_TOL", json!(REWARD_ABS_TOL)),
        ("SUPERLINEAR_EXPONENT", json!(SUPERLINEAR_EXPONENT)),
        ("UNIQUE_ROLLOUTS_CAP", json!(UNIQUE_ROLLOUTS_CAP)),
        ("UNIQUE_ROLLOUTS_CAP_ENABLED", json!(UNIQUE_ROLLOUTS_CAP_ENABLED)),
        ("GRAIL_BURN_UID", json!(GRAIL_BURN_UID)),
        ("GRAIL_BURN_PERCENTAGE", json!(GRAIL_BURN_PERCENTAGE)),
        ("TRAINER_UID", json!(TRAINER_UID)),
        ("MINER_SAMPLING_ENABLED", json!(MINER_SAMPLING_ENABLED)),
        ("MINER_SAMPLE_RATE", json!(MINER_SAMPLE_RATE)),
        ("MINER_SAMPLE_MIN", json!(MINER_SAMPLE_MIN)),
        ("MINER_SAMPLE_MAX", json!(MINER_SAMPLE_MAX)),
        ("FAILURE_LOOKBACK_WINDOWS", json!(FAILURE_LOOKBACK_WINDOWS)),
        ("MIN_ROLLOUT_FILE_SIZE_BYTES", json!(MIN_ROLLOUT_FILE_SIZE_BYTES)),
        ("MAX_ROLLOUT_FILE_SIZE_BYTES", json!(MAX_ROLLOUT_FILE_SIZE_BYTES)),
        ("SAMPLING_MIN_STEPS", json!(SAMPLING_MIN_STEPS)),
        ("SAMPLING_LOW_P", json!(SAMPLING_LOW_P)),
        ("SAMPLING_HIGH_P", json!(SAMPLING_HIGH_P)),
        ("SAMPLING_LOW_FRAC_MIN", json!(SAMPLING_LOW_FRAC_MIN)),
        ("SAMPLING_HIGH_FRAC_MIN", json!(SAMPLING_HIGH_FRAC_MIN)),
        ("SAMPLING_MID_FRAC_MAX", json!(SAMPLING_MID_FRAC_MAX)),
        ("SAMPLING_MEDIAN_LOW_MAX", json!(SAMPLING_MEDIAN_LOW_MAX)),
        ("SAMPLING_LOW_Q10_MAX", json!(SAMPLING_LOW_Q10_MAX)),
        ("SAMPLING_MIN_TOKEN_PROB", json!(SAMPLING_MIN_TOKEN_PROB)),
        ("SAMPLING_INITIAL_WINDOW_STEPS", json!(SAMPLING_INITIAL_WINDOW_STEPS)),
        ("CURRENT_ENV_ID", json!(CURRENT_ENV_ID)),
        ("CHECKPOINT_PREFIX", json!(CHECKPOINT_PREFIX)),
        ("CHECKPOINT_SUBDIR_DELTA", json!(CHECKPOINT_SUBDIR_DELTA)),
        ("CHECKPOINT_SUBDIR_FULL", json!(CHECKPOINT_SUBDIR_FULL)),
        ("CHECKPOINT_TYPE_DELTA", json!(CHECKPOINT_TYPE_DELTA)),
        ("CHECKPOINT_TYPE_FULL", json!(CHECKPOINT_TYPE_FULL)),
        ("TRUST_LIST_KEY_PREFIX", json!(TRUST_LIST_KEY_PREFIX)),
        ("TRUST_LIST_VERSION", json!(TRUST_LIST_VERSION)),
    ]
}

#[test]
fn constants() {
    const FILE: &str = "protocol/constants.json";
    let theirs: Map<String, Value> = grail_golden::json(FILE);
    let ours = ours();
    for (name, value) in &ours {
        assert_eq!(theirs.get(*name), Some(value), "{name}");
    }
    grail_golden::ran(FILE, ours.len(), theirs.len());
}
