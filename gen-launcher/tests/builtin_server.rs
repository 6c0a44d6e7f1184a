//! The builtin server as a process, with a real model.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::os::unix::process::ExitStatusExt;

use common::{
    BuiltinServer, builtin_command, copy_checkpoint, golden_checkpoint, other_weights, prompt, sample,
    truncate_weights, until_gone,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

#[tokio::test]
async fn a_start_tells_its_phases_and_a_stop_drains() {
    let mut server = BuiltinServer::start(&golden_checkpoint(), &["--weight-version", "w0", "--spawn-children", "2"]);
    let marks = [
        "server_args=ServerArgs(",
        "Uvicorn running on",
        "Load weight begin. avail mem=",
        "Load weight end. elapsed=",
        "KV Cache is allocated. dtype: ",
        "max_total_num_tokens=",
        "The server is fired up and ready to roll!",
    ];
    let places: Vec<usize> =
        marks.iter().map(|mark| server.lines.iter().position(|line| line.contains(mark)).unwrap()).collect();
    assert!(places.is_sorted(), "{:#?}", server.lines);
    assert_eq!(server.get("/health_generate").await.0, 200);
    let info = server.get("/model_info").await.1;
    assert_eq!((&info["weight_version"], &info["model_type"]), (&json!("w0"), &json!("qwen2")));

    let running = tokio::spawn(server.post("/generate", &sample("r", 400)));
    server.until_running(1).await;
    server.signal(Signal::SIGTERM);
    server.until_line("Gracefully exiting...");
    assert_eq!(running.await.unwrap().1["meta_info"]["completion_tokens"], 400, "what runs is finished");
    assert_eq!(server.wait().code(), Some(143));
}

#[tokio::test]
async fn a_draining_server_says_so_and_sigquit_ends_it_at_once() {
    let mut server = BuiltinServer::start(&golden_checkpoint(), &["--step-ms", "20", "--spawn-children", "1"]);
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", server.pid())).unwrap();
    let children: Vec<i32> = children.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(children.len(), 1);
    let name = std::fs::read(format!("/proc/{}/cmdline", children[0])).unwrap();
    assert!(name.starts_with(b"sglang::scheduler_TP0\0"));
    let running = tokio::spawn(server.post("/generate", &sample("r", 1_500)));
    server.until_running(1).await;
    server.signal(Signal::SIGTERM);
    server.until_line("Remaining number of requests 1.");
    assert_eq!(server.get("/health").await.0, 503);
    server.signal(Signal::SIGQUIT);
    let status = server.wait();
    assert!(status.code() == Some(143) || status.signal() == Some(9), "{status}");
    assert!(running.await.is_err(), "the connection breaks");
    until_gone(children[0]);
}

#[tokio::test]
async fn sigquit_and_sigkill_leave_no_child() {
    for signal in [Signal::SIGQUIT, Signal::SIGKILL] {
        let mut server = BuiltinServer::start(&golden_checkpoint(), &["--spawn-children", "2"]);
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", server.pid())).unwrap();
        server.signal(signal);
        assert_eq!(server.wait().signal(), Some(9));
        children.split_whitespace().for_each(|pid| until_gone(pid.parse().unwrap()));
    }
}

#[test]
fn what_cannot_start_says_why() {
    let folders = tempfile::tempdir().unwrap();
    let truncated = copy_checkpoint(folders.path(), "truncated");
    truncate_weights(&truncated);
    let no_tokenizer = copy_checkpoint(folders.path(), "no_tokenizer");
    std::fs::remove_file(no_tokenizer.join("tokenizer.json")).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_port = taken.local_addr().unwrap().port().to_string();
    let golden = golden_checkpoint();
    let missing = folders.path().join("missing");
    let cases: [(&std::path::Path, &[&str], i32, &str); 6] = [
        (&golden, &["--unheard-of"], 2, "--unheard-of"),
        (&missing, &[], 1, "config.json"),
        (&truncated, &[], 1, "model.safetensors"),
        (&no_tokenizer, &[], 1, "Can't load tokenizer"),
        (&golden, &["--context-length", "9999"], 1, "greater than the derived context_length (2048)"),
        (&golden, &["--port", &taken_port], 1, "[Errno 98] address already in use"),
    ];
    for (model, more, code, text) in cases {
        // The last port counts.
        let mut command = builtin_command(model, &[]);
        if more.first() == Some(&"--port") {
            command = std::process::Command::new(env!("CARGO_BIN_EXE_grail-builtin-server"));
            command.arg("--model-path").arg(model);
        }
        let output = command.args(more).output().unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{more:?}: {log}");
        assert!(log.contains(text), "{text:?} is not in {log}");
    }
}

#[tokio::test]
async fn samples_do_not_depend_on_what_runs_beside_them() {
    let flags = ["--random-seed", "11", "--max-running-requests", "8"];
    let server = BuiltinServer::start(&golden_checkpoint(), &flags);
    let rids: Vec<String> = (0..16).map(|index| format!("r{index}")).collect();
    let mut alone = Vec::new();
    for rid in &rids {
        alone.push(server.ids(&sample(rid, 16)).await);
    }
    assert!(alone.windows(2).all(|pair| pair[0] != pair[1]), "names make draws differ");
    let together: Vec<_> = rids.iter().map(|rid| tokio::spawn(server.post("/generate", &sample(rid, 16)))).collect();
    let mut cached = 0;
    for (handle, alone) in together.into_iter().zip(&alone) {
        let (_, answer) = handle.await.unwrap();
        assert_eq!(answer["output_ids"], json!(alone));
        cached += u64::from(answer["meta_info"]["cached_tokens"] == 23);
    }
    assert_eq!(cached, 16, "the prompt is known");
    drop(server);
    let again = BuiltinServer::start(&golden_checkpoint(), &flags);
    assert_eq!(again.ids(&sample("r3", 16)).await, alone[3], "the same seed gives the same draws");
}

#[tokio::test]
async fn lengths_are_cut_as_the_real_server_cuts_them() {
    let server = BuiltinServer::start(&golden_checkpoint(), &["--context-length", "64"]);
    let ask = async |prompt_tokens: u32, max_new_tokens: Value| {
        let params = json!({"max_new_tokens": max_new_tokens, "ignore_eos": true});
        let body = json!({"input_ids": prompt(prompt_tokens), "sampling_params": params});
        let (status, answer) = server.post("/generate", &body).await;
        (status, answer["meta_info"]["completion_tokens"].as_u64())
    };
    for (asked, given) in [(0, 0), (1, 1), (21, 21), (22, 22), (23, 22), (24, 22)] {
        assert_eq!(ask(40, json!(asked)).await, (200, Some(given)), "{asked} asked");
    }
    assert_eq!(ask(40, Value::Null).await, (200, Some(22)));
    assert_eq!(ask(40, json!(25)).await, (400, None));
    assert_eq!(ask(57, json!(1)).await, (200, Some(1)));
    assert_eq!(ask(58, json!(1)).await, (400, None));
    assert_eq!(ask(64, json!(0)).await, (400, None));
}

#[tokio::test]
async fn a_sample_ends_with_the_checkpoints_end_token() {
    let server = BuiltinServer::start(&golden_checkpoint(), &[]);
    // So hot that all 512 tokens are about equally likely: 414 comes soon.
    let params = json!({"max_new_tokens": 1_900, "temperature": 50.0, "sampling_seed": 3});
    let (_, answer) = server.post("/generate", &json!({"input_ids": prompt(8), "sampling_params": params})).await;
    assert_eq!(answer["meta_info"]["finish_reason"], json!({"type": "stop", "matched": 414}));
    let ids = answer["output_ids"].as_array().unwrap();
    assert_eq!(ids.iter().position(|id| *id == 414), Some(ids.len() - 1));
    assert!(!answer["text"].as_str().unwrap().contains("<|im_end|>"));
    let mut params = json!({"max_new_tokens": ids.len(), "temperature": 50.0, "sampling_seed": 3});
    let body = |params: &Value| json!({"input_ids": prompt(8), "sampling_params": params});
    let (_, exact) = server.post("/generate", &body(&params)).await;
    assert_eq!(exact["meta_info"]["finish_reason"]["type"], "length", "the length comes first");
    params["max_new_tokens"] = (ids.len() + 5).into();
    params["ignore_eos"] = true.into();
    let (_, longer) = server.post("/generate", &body(&params)).await;
    assert_eq!(longer["meta_info"]["completion_tokens"], ids.len() + 5);
}

#[tokio::test]
async fn an_abort_gives_the_tokens_so_far() {
    let server = BuiltinServer::start(&golden_checkpoint(), &["--step-ms", "5"]);
    let running = tokio::spawn(server.post("/generate", &sample("long-1", 1_900)));
    server.until_running(1).await;
    assert_eq!(server.post("/abort_request", &json!({"rid": "long"})).await, (200, json!("")));
    let (status, answer) = running.await.unwrap();
    assert_eq!((status, &answer["meta_info"]["finish_reason"]["message"]), (200, &json!("Aborted")));
    let given = answer["output_ids"].as_array().unwrap();
    assert!(!given.is_empty() && given.len() < 1_900);
}

#[tokio::test]
async fn weights_change_whole_or_not_at_all() {
    let folders = tempfile::tempdir().unwrap();
    let first = copy_checkpoint(folders.path(), "first");
    let second = copy_checkpoint(folders.path(), "second");
    other_weights(&second);
    let broken = copy_checkpoint(folders.path(), "broken");
    truncate_weights(&broken);
    let server = BuiltinServer::start(&first, &["--random-seed", "1", "--weight-version", "w0"]);
    let checksum = async || server.post("/weights_checker", &json!({"action": "checksum"})).await.1;
    let old = (server.ids(&sample("x", 24)).await, checksum().await);
    let update = async |folder: &std::path::Path, label: &str| {
        let request = json!({"model_path": folder, "weight_version": label});
        server.post("/update_weights_from_disk", &request).await
    };

    assert_eq!(server.post("/pause_generation", &json!({})).await.0, 200);
    assert_eq!(server.post("/flush_cache?timeout=5", &json!({})).await.0, 200);
    assert_eq!(update(&second, "w1").await.0, 200);
    assert_eq!(server.post("/continue_generation", &json!({})).await.0, 200);
    let new = (server.ids(&sample("x", 24)).await, checksum().await);
    assert_ne!(new.0, old.0);
    assert_ne!(new.1["per_engine_checksum"], old.1["per_engine_checksum"]);
    let changed = |name: &str| new.1["ranks"][0]["checksums"][name] != old.1["ranks"][0]["checksums"][name];
    assert!(!changed("model.embed_tokens.weight") || !changed("model.norm.weight"), "one half is as it was");

    for folder in [&broken, &folders.path().join("missing")] {
        let (status, answer) = update(folder, "w2").await;
        assert_eq!((status, &answer["success"]), (400, &json!(false)));
    }
    assert_eq!((server.ids(&sample("x", 24)).await, checksum().await), new);
    let info = server.get("/model_info").await.1;
    assert_eq!((&info["weight_version"], &info["model_path"]), (&json!("w1"), &json!(second)));
    assert_eq!(info["tokenizer_path"], json!(first));

    assert_eq!(update(&first, "w3").await.0, 200, "without a pause, too");
    assert_eq!(server.ids(&sample("x", 24)).await, old.0);
}

#[tokio::test]
async fn a_server_told_to_be_stale_generates_with_its_old_weights_once() {
    let folders = tempfile::tempdir().unwrap();
    let first = copy_checkpoint(folders.path(), "first");
    let second = copy_checkpoint(folders.path(), "second");
    other_weights(&second);
    let mut command = builtin_command(&first, &["--random-seed", "1", "--weight-version", "w0"]);
    command.env("GRAIL_FAULT", "kill@mid_proof;stale@update");
    let mut server = BuiltinServer::start_command(command);
    assert!(server.lines.iter().any(|line| line.contains("Faults will be injected")), "{:?}", server.lines);
    let logprobs = async || {
        let mut request = sample("x", 24);
        request["return_logprob"] = json!(true);
        let meta = server.post("/generate", &request).await.1["meta_info"].clone();
        (meta["output_token_logprobs"].clone(), meta["weight_version"].clone())
    };
    let (old, _) = logprobs().await;
    let update = json!({"model_path": second, "weight_version": "w1"});
    assert_eq!(server.post("/update_weights_from_disk", &update).await.1["success"], true);
    assert_eq!(logprobs().await, (old.clone(), json!("w1")));
    assert_eq!(server.post("/update_weights_from_disk", &update).await.1["success"], true);
    let (new, label) = logprobs().await;
    assert_ne!(new, old);
    assert_eq!(label, "w1");
    server.until_line("Injecting a fault");

    let refused = builtin_command(&first, &[]).env("GRAIL_FAULT", "stale@lunch").output().unwrap();
    let log = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{log}");
    assert!(log.contains("GRAIL_FAULT") && log.contains("update"), "{log}");
}

#[tokio::test]
async fn a_small_pool_retracts_and_gives_the_same_samples() {
    let roomy = BuiltinServer::start(&golden_checkpoint(), &["--random-seed", "2"]);
    let tight = BuiltinServer::start(&golden_checkpoint(), &["--random-seed", "2", "--kv-tokens", "100"]);
    let requests: Vec<_> =
        (0..4).map(|index| tokio::spawn(tight.post("/generate", &sample(&format!("r{index}"), 40)))).collect();
    let mut retractions = 0;
    for (index, request) in requests.into_iter().enumerate() {
        let (status, answer) = request.await.unwrap();
        assert_eq!(status, 200);
        retractions += answer["meta_info"]["num_retractions"].as_u64().unwrap();
        assert_eq!(answer["output_ids"], json!(roomy.ids(&sample(&format!("r{index}"), 40)).await));
    }
    assert!(retractions > 0);
}
