//! JSON bodies in the shapes of SGLang 0.5.16.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::args::ServerArgs;
use super::clock::{iso_time, unix_seconds};
use super::scheduler::{Finish, Load};
use super::serving::{Answer, Current, Fixed};

/// The version whose behaviour is imitated.
pub const SGLANG_VERSION: &str = "0.5.16";

/// One sample of `/generate`.
#[must_use]
pub fn sample(answer: &Answer) -> Value {
    let finished = &answer.finished;
    let completion_tokens = finished.output.len();
    let mut meta = json!({
        "id": answer.rid,
        "finish_reason": finish_reason(finished.finish, answer.max_new_tokens),
        "prompt_tokens": answer.prompt_tokens,
        "weight_version": answer.weight_version,
        "num_retractions": finished.retractions,
        "queue_time": finished.queue_time.as_secs_f64(),
    });
    if answer.return_logprob {
        let logprobs = finished.logprobs.iter().zip(&finished.output);
        let logprobs: Vec<Value> = logprobs.map(|(logprob, token)| json!([logprob, token, null])).collect();
        meta["input_token_logprobs"] = json!([]);
        meta["output_token_logprobs_length"] = logprobs.len().into();
        meta["output_token_logprobs"] = logprobs.into();
    }
    let latency = answer.latency.as_secs_f64();
    let decode_seconds = (latency - finished.queue_time.as_secs_f64()).max(1e-9);
    #[expect(clippy::cast_precision_loss, reason = "a completion is far shorter than 2^53")]
    let throughput = completion_tokens as f64 / decode_seconds;
    meta["reasoning_tokens"] = 0.into();
    meta["completion_tokens"] = completion_tokens.into();
    meta["cached_tokens"] = finished.cached_tokens.into();
    meta["cached_tokens_details"] = match finished.cached_tokens {
        0 => Value::Null,
        cached => json!({"device": cached, "host": 0}),
    };
    meta["dp_rank"] = Value::Null;
    meta["e2e_latency"] = latency.into();
    meta["request_received_ts"] = answer.received.into();
    meta["api_server_dispatch_finish_ts"] = answer.dispatched.into();
    meta["request_finished_ts"] = answer.ended.into();
    meta["decode_throughput"] = throughput.into();
    meta["response_sent_to_client_ts"] = unix_seconds().into();
    let mut body = json!({});
    if let Some(text) = &answer.text {
        body["text"] = text.as_str().into();
    }
    body["output_ids"] = json!(finished.output);
    body["meta_info"] = meta;
    body
}

fn finish_reason(finish: Finish, max_new_tokens: usize) -> Value {
    let abort = |message: &str| json!({"type": "abort", "message": message, "status_code": null, "err_type": null});
    match finish {
        Finish::Length => json!({"type": "length", "length": max_new_tokens}),
        Finish::Stop(token) => json!({"type": "stop", "matched": token}),
        Finish::Poison => json!({"type": "stop", "matched": "NaN happened"}),
        Finish::AbortedRunning => abort("Aborted"),
        Finish::AbortedWaiting => abort("Abort in waiting queue"),
    }
}

/// `/model_info`
#[must_use]
pub fn model_info(fixed: &Fixed, current: &Current) -> Value {
    json!({
        "model_path": current.model_path,
        "tokenizer_path": fixed.tokenizer_path,
        "is_generation": true,
        "preferred_sampling_params": null,
        "weight_version": current.weight_version,
        "has_image_understanding": false,
        "has_audio_understanding": false,
        "model_type": current.folder.field("model_type"),
        "architectures": current.folder.field("architectures"),
    })
}

/// `/v1/models`
#[must_use]
pub fn models(fixed: &Fixed, current: &Current) -> Value {
    #[expect(clippy::cast_possible_truncation, reason = "seconds since 1970 are far below 2^53")]
    let created = unix_seconds() as i64;
    let model = json!({
        "id": current.served_name,
        "object": "model",
        "created": created,
        "owned_by": "sglang",
        "root": current.served_name,
        "parent": null,
        "max_model_len": fixed.limits.context_length,
    });
    json!({"object": "list", "data": [model]})
}

/// `/server_info`: the arguments, and what the scheduler made of them.
#[must_use]
pub fn server_info(args: &ServerArgs, fixed: &Fixed, current: &Current) -> Value {
    json!({
        "model_path": current.model_path,
        "tokenizer_path": fixed.tokenizer_path,
        "skip_tokenizer_init": args.skip_tokenizer_init,
        "host": args.host,
        "port": args.port,
        "dtype": args.dtype.to_string(),
        "device": "cpu",
        "context_length": args.context_length,
        "served_model_name": current.served_name,
        "weight_version": current.weight_version,
        "random_seed": fixed.random_seed,
        "tp_size": args.tp_size,
        "dp_size": 1,
        "schedule_policy": "fcfs",
        "max_running_requests": fixed.max_running,
        "max_total_num_tokens": fixed.limits.kv_tokens,
        "max_req_input_len": fixed.limits.max_prompt_tokens(),
        "page_size": 1,
        "internal_states": [{
            "effective_max_running_requests_per_dp": fixed.max_running,
            "memory_usage": {
                "weight": gigabytes(current.folder.weight_bytes()),
                "token_capacity": fixed.limits.kv_tokens,
            },
        }],
        "version": SGLANG_VERSION,
        "implementation": concat!("grail-builtin-server ", env!("CARGO_PKG_VERSION")),
    })
}

/// `/v1/loads`
#[must_use]
pub fn loads(fixed: &Fixed, current: &Current, load: Load, tokens_per_second: f64) -> Value {
    let now = unix_seconds();
    json!({
        "timestamp": iso_time(now),
        "version": SGLANG_VERSION,
        "loads": [{
            "timestamp": now,
            "dp_rank": 0,
            "num_running_reqs": load.running,
            "num_waiting_reqs": load.waiting,
            "num_waiting_uncached_tokens": 0,
            "num_used_tokens": load.used_tokens,
            "num_total_tokens": load.used_tokens,
            "max_total_num_tokens": fixed.limits.kv_tokens,
            "max_running_requests": fixed.max_running,
            "token_usage": share(load.used_tokens as u64, fixed.limits.kv_tokens as u64),
            "gen_throughput": tokens_per_second,
            "cache_hit_rate": share(load.cached_prompt_tokens, load.prompt_tokens),
            "utilization": share(load.running as u64, fixed.max_running as u64),
            "memory": {
                "weight_gb": gigabytes(current.folder.weight_bytes()),
                "kv_cache_gb": 0.0,
                "graph_gb": 0.0,
                "token_capacity": fixed.limits.kv_tokens,
            },
            "disaggregation": {
                "mode": "null",
                "prefill_bootstrap_queue_reqs": 0,
                "prefill_inflight_queue_reqs": 0,
                "decode_prealloc_queue_reqs": 0,
                "decode_transfer_queue_reqs": 0,
                "decode_retracted_queue_reqs": 0,
                "kv_transfer_speed_gb_s": 0.0,
                "kv_transfer_latency_ms": 0.0,
            },
            "queues": {"waiting": load.waiting, "grammar": 0, "paused": 0, "retracted": 0},
        }],
    })
}

/// `/get_load`, the older form.
#[must_use]
pub fn old_load(load: Load) -> Value {
    json!([{
        "dp_rank": 0,
        "num_reqs": load.running + load.waiting,
        "num_waiting_reqs": load.waiting,
        "num_tokens": load.used_tokens,
        "num_pending_tokens": 0,
        "ts_tic": unix_seconds(),
    }])
}

/// `/weights_checker` with action `checksum`.
#[must_use]
pub fn checksums(checksums: &BTreeMap<String, String>) -> Value {
    let mut hasher = Sha256::new();
    for (name, checksum) in checksums {
        hasher.update(name);
        hasher.update([0]);
        hasher.update(checksum);
    }
    let of_rank = hex::encode(hasher.finalize());
    let of_engine = hex::encode(Sha256::digest(&of_rank));
    json!({
        "success": true,
        "message": "Success.",
        "ranks": [{
            "checksums": checksums,
            "per_gpu_checksum": of_rank,
            "parallelism_info": {
                "tp_rank": 0, "tp_size": 1, "dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1, "rank": 0, "size": 1,
            },
        }],
        "per_engine_checksum": of_engine,
    })
}

#[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[expect(clippy::cast_precision_loss, reason = "sizes far below 2^53")]
fn gigabytes(bytes: u64) -> f64 {
    (bytes as f64 / 1e6).round() / 1e3
}
