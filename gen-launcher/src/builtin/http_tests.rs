//! What the recorded answers do not show: order, locks, names, drains.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use grail_process::fault::FaultPlan;
use grail_protocol::ids::TokenId;
use serde_json::{Value, json};

use super::http::Phase;
use super::test_server::{Setup, TestServer};

fn sample(rid: &str, max_new_tokens: u64) -> Value {
    json!({"rid": rid, "input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": max_new_tokens}})
}

/// A request that would run for minutes.
fn endless(rid: &str) -> Value {
    sample(rid, 4_000)
}

fn slow() -> Setup {
    Setup { step: Duration::from_millis(1), ..Setup::default() }
}

#[tokio::test]
async fn a_batch_is_answered_in_order_and_each_sample_as_if_alone() {
    let server = TestServer::start(Setup::default()).await;
    let single = |seed: u64| json!({"max_new_tokens": 6, "sampling_seed": seed});
    let batch = json!({
        "input_ids": [[1, 2], [3], [4, 5, 6]], "rid": ["a", "b", "c"],
        "sampling_params": [single(1), single(2), single(3)],
    });
    let (status, answers) = server.post("/generate", &batch).await;
    assert_eq!(status, 200);
    let ids: Vec<&str> =
        answers.as_array().unwrap().iter().map(|one| one["meta_info"]["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["a", "b", "c"]);
    for (index, prompt) in [json!([1, 2]), json!([3]), json!([4, 5, 6])].into_iter().enumerate() {
        let body = json!({"input_ids": prompt, "sampling_params": single(index as u64 + 1)});
        let (_, alone) = server.post("/generate", &body).await;
        assert_eq!(alone["output_ids"], answers[index]["output_ids"]);
    }
    let (_, copies) = server.post("/generate", &json!({"input_ids": [1], "sampling_params": {"n": 3}})).await;
    assert_eq!(copies.as_array().map(Vec::len), Some(3));
    server.end();
}

#[tokio::test]
async fn the_draw_depends_on_name_and_seed() {
    let server = TestServer::start(Setup::default()).await;
    let ids = async |body: Value| server.post("/generate", &body).await.1["output_ids"].clone();
    let first = ids(sample("x", 20)).await;
    assert_eq!(ids(sample("x", 20)).await, first);
    assert_ne!(ids(sample("y", 20)).await, first);
    let seeded = |rid: &str| {
        let mut body = sample(rid, 20);
        body["sampling_params"]["sampling_seed"] = 9.into();
        body
    };
    assert_eq!(ids(seeded("x")).await, ids(seeded("y")).await);
    server.end();
}

#[tokio::test]
async fn end_tokens_stop_unless_they_are_ignored() {
    let eos_tokens = (0..16).map(TokenId).collect();
    let server = TestServer::start(Setup { eos_tokens, ..Setup::default() }).await;
    let (_, answer) = server.post("/generate", &sample("x", 200)).await;
    let last = answer["output_ids"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(answer["meta_info"]["finish_reason"], json!({"type": "stop", "matched": last}));
    assert!(last.as_u64().unwrap() < 16);
    let mut body = sample("x", 50);
    body["sampling_params"]["ignore_eos"] = true.into();
    let (_, answer) = server.post("/generate", &body).await;
    assert_eq!(answer["meta_info"]["finish_reason"], json!({"type": "length", "length": 50}));
    let mut body = sample("x", 200);
    body["sampling_params"]["stop_token_ids"] = (16..32).collect::<Vec<u32>>().into();
    let (_, answer) = server.post("/generate", &body).await;
    assert_eq!(answer["meta_info"]["completion_tokens"], 1, "every token ends it");
    server.end();
}

#[tokio::test]
async fn a_name_in_use_is_refused() {
    let server = TestServer::start(slow()).await;
    let first = tokio::spawn(server.post("/generate", &endless("same")));
    server.until_load(1, 0).await;
    let (status, answer) = server.post("/generate", &sample("same", 1)).await;
    assert_eq!(status, 400);
    assert_eq!(answer["error"]["message"], "Duplicate request ID detected: same");
    server.post("/abort_request", &json!({"rid": "sa"})).await;
    assert_eq!(first.await.unwrap().1["meta_info"]["finish_reason"]["type"], "abort");
    assert_eq!(server.post("/generate", &sample("same", 1)).await.0, 200);
    server.end();
}

#[tokio::test]
async fn a_waiting_request_is_aborted_with_its_own_words() {
    let server = TestServer::start(Setup { max_running: 1, ..slow() }).await;
    let running = tokio::spawn(server.post("/generate", &endless("first")));
    server.until_load(1, 0).await;
    let waiting = tokio::spawn(server.post("/generate", &endless("second")));
    server.until_load(1, 1).await;
    server.post("/abort_request", &json!({"rid": ""})).await;
    server.post("/abort_request", &json!({"rid": "second"})).await;
    let (status, answer) = waiting.await.unwrap();
    assert_eq!((status, &answer["output_ids"]), (200, &json!([])));
    assert_eq!(answer["meta_info"]["finish_reason"]["message"], "Abort in waiting queue");
    server.post("/abort_request", &json!({"abort_all": true})).await;
    running.await.unwrap();
    server.end();
}

#[tokio::test]
async fn a_client_that_hangs_up_frees_its_place() {
    let server = TestServer::start(slow()).await;
    let request = tokio::spawn(server.post("/generate", &endless("gone")));
    server.until_load(1, 0).await;
    request.abort();
    server.until_load(0, 0).await;
    assert_eq!(server.serving().requests(), 0);
    server.end();
}

#[tokio::test]
async fn a_pause_aborts_and_keeps_the_door_shut_until_continue() {
    let server = TestServer::start(slow()).await;
    let running = tokio::spawn(server.post("/generate", &endless("first")));
    server.until_load(1, 0).await;
    for mode in ["retract", "in_place"] {
        let (status, answer) = server.post("/pause_generation", &json!({"mode": mode})).await;
        assert_eq!(status, 400);
        assert!(answer["error"]["message"].as_str().unwrap().contains("not supported"));
    }
    assert_eq!(server.post("/pause_generation", &json!({})).await.0, 200);
    assert_eq!(running.await.unwrap().1["meta_info"]["finish_reason"]["type"], "abort");
    let mut late = tokio::spawn(server.post("/generate", &sample("late", 2)));
    while server.serving().requests() == 0 {
        tokio::task::yield_now().await;
    }
    let request = json!({"model_path": server.folder("ckpt1"), "weight_version": "ckpt1"});
    assert_eq!(server.post("/update_weights_from_disk", &request).await.0, 200);
    assert!(futures::poll!(&mut late).is_pending(), "a request at the door does not keep an update out");
    assert_eq!(server.post("/continue_generation", &json!({})).await.0, 200);
    let (status, answer) = late.await.unwrap();
    assert_eq!((status, &answer["meta_info"]["weight_version"]), (200, &json!("ckpt1")));
    server.end();
}

#[tokio::test]
async fn without_a_pause_an_update_waits_for_what_runs_and_new_requests_wait_for_it() {
    let server = TestServer::start(slow()).await;
    server.hold_loading.store(true, Ordering::SeqCst);
    let before = tokio::spawn(server.post("/generate", &endless("before")));
    server.until_load(1, 0).await;
    let request = json!({"model_path": server.folder("ckpt1"), "weight_version": "ckpt1"});
    let mut update = tokio::spawn(server.post("/update_weights_from_disk", &request));
    server.hold_loading.store(false, Ordering::SeqCst);
    // Loading goes on beside the generation; the swap must wait for the request that runs.
    let after = loop {
        let probe = server.post("/generate", &sample("after", 1));
        match tokio::time::timeout(Duration::from_millis(50), probe).await {
            // The update has not reached the door yet: this one was still served by the old weights.
            Ok((status, answer)) => {
                assert_eq!((status, &answer["meta_info"]["weight_version"]), (200, &json!("ckpt0")))
            }
            Err(_) => break tokio::spawn(server.post("/generate", &sample("waits", 1))),
        }
    };
    assert!(futures::poll!(&mut update).is_pending());
    server.post("/abort_request", &json!({"rid": "before"})).await;
    assert_eq!(before.await.unwrap().1["meta_info"]["weight_version"], "ckpt0");
    assert_eq!(update.await.unwrap().0, 200);
    assert_eq!(after.await.unwrap().1["meta_info"]["weight_version"], "ckpt1");
    server.end();
}

#[tokio::test]
async fn an_update_may_abort_what_runs() {
    let server = TestServer::start(slow()).await;
    let running = tokio::spawn(server.post("/generate", &endless("first")));
    server.until_load(1, 0).await;
    let request = json!({"model_path": server.folder("ckpt1"), "abort_all_requests": true});
    let (status, answer) = server.post("/update_weights_from_disk", &request).await;
    assert_eq!((status, &answer["message"]), (200, &json!("Succeeded to update model weights.")));
    assert_eq!(running.await.unwrap().1["meta_info"]["finish_reason"]["type"], "abort");
    assert_eq!(server.get("/model_info").await.1["weight_version"], "ckpt0", "no label was given");
    server.end();
}

#[tokio::test]
async fn a_stale_update_tells_success_under_the_new_label_and_keeps_the_old_weights() {
    let plan: FaultPlan = "stale@update".parse().unwrap();
    let server = TestServer::start(Setup { faults: Arc::new(plan.armed(0, 0)), ..Setup::default() }).await;
    let request = json!({
        "input_ids": [1, 2, 3],
        "return_logprob": true,
        "sampling_params": {"max_new_tokens": 8, "sampling_seed": 3},
    });
    let outputs = async || {
        let answer = server.post("/generate", &request).await.1;
        let meta = &answer["meta_info"];
        (answer["output_ids"].clone(), meta["output_token_logprobs"].clone(), meta["weight_version"].clone())
    };
    let (ids, logprobs, label) = outputs().await;
    assert_eq!((label, logprobs.as_array().unwrap().len()), (json!("ckpt0"), 8));
    let update = json!({"model_path": server.folder("ckpt1"), "weight_version": "ckpt1"});
    let (status, answer) = server.post("/update_weights_from_disk", &update).await;
    assert_eq!((status, &answer["success"]), (200, &Value::Bool(true)));
    assert_eq!(outputs().await, (ids, logprobs.clone(), json!("ckpt1")));
    assert_eq!(server.get("/model_info").await.1["model_path"], server.folder("ckpt1"));
    // The fault comes once.
    assert_eq!(server.post("/update_weights_from_disk", &update).await.0, 200);
    assert_ne!(outputs().await.1, logprobs);
    server.end();
}

#[tokio::test]
async fn a_folder_of_another_shape_is_refused() {
    let server = TestServer::start(Setup::default()).await;
    let before = server.post("/generate", &sample("x", 8)).await.1["output_ids"].clone();
    let path = std::path::Path::new(&server.folder("ckpt1")).join("config.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("\"rope_theta\": 1000000.0", "\"rope_theta\": 10000.0");
    std::fs::write(&path, text).unwrap();
    let request = json!({"model_path": server.folder("ckpt1"), "weight_version": "ckpt1"});
    let (status, answer) = server.post("/update_weights_from_disk", &request).await;
    assert_eq!((status, &answer["success"]), (400, &Value::Bool(false)));
    assert!(answer["message"].as_str().unwrap().contains("rope_theta"), "{answer}");
    let (_, after) = server.post("/generate", &sample("x", 8)).await;
    assert_eq!((&after["output_ids"], &after["meta_info"]["weight_version"]), (&before, &json!("ckpt0")));
    server.end();
}

#[tokio::test]
async fn flushing_is_refused_while_something_runs() {
    let server = TestServer::start(slow()).await;
    let running = tokio::spawn(server.post("/generate", &endless("first")));
    server.until_load(1, 0).await;
    assert_eq!(server.get("/flush_cache").await.0, 400);
    assert_eq!(server.post("/flush_cache?timeout=nan", &json!({})).await.0, 400);
    server.post("/abort_request", &json!({"abort_all": true})).await;
    running.await.unwrap();
    assert_eq!(server.get("/flush_cache?timeout=5").await.0, 200);
    server.end();
}

#[tokio::test]
async fn health_follows_the_phase_and_sees_progress_of_others() {
    let server = TestServer::start(Setup { max_running: 1, ..slow() }).await;
    let running = tokio::spawn(server.post("/generate", &endless("first")));
    server.until_load(1, 0).await;
    assert_eq!(server.get("/health_generate").await, (200, json!("")), "the queue is full, but tokens come");
    server.app.phase.send_replace(Phase::Draining);
    assert_eq!(server.get("/health").await.0, 503);
    server.post("/abort_request", &json!({"abort_all": true})).await;
    running.await.unwrap();
    // A draining server still answers requests.
    assert_eq!(server.post("/generate", &sample("x", 1)).await.0, 200);
    server.end();
}

#[tokio::test]
async fn other_bad_requests_have_known_shapes() {
    let server = TestServer::start(Setup::default()).await;
    let (status, answer) = server.post("/generate", &json!({"input_ids": [1], "stream": true})).await;
    assert_eq!(status, 400);
    assert!(answer["error"]["message"].as_str().unwrap().starts_with("stream is not supported"));
    let (status, answer) = server.post("/generate", &json!({"input_ids": "x"})).await;
    assert_eq!((status, &answer["object"], &answer["code"]), (400, &json!("error"), &json!(400)));
    let (status, answer) = server.post("/weights_checker", &json!({"action": "snapshot"})).await;
    assert_eq!((status, &answer["success"]), (400, &Value::Bool(false)));
    assert_eq!(server.post("/update_weights_from_disk", &json!({})).await.0, 400);
    assert_eq!(server.get("/nothing").await, (404, json!({"detail": "Not Found"})));
    let (status, answer) =
        server.post("/generate", &json!({"text": "12 + 30 = ", "sampling_params": {"max_new_tokens": 1}})).await;
    assert_eq!(status, 400, "the fake model's vocabulary is smaller than the tokenizer's: {answer}");
    server.end();
}
