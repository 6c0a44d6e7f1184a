//! The builtin server beside a real one: every answer that was recorded from SGLang 0.5.16 is asked for again.

use std::collections::BTreeSet;
use std::time::Duration;

use grail_ipc::generate_api::GenerateResponse;
use serde_json::{Map, Value, json};

use super::test_server::{Setup, TestServer};

const FILE: &str = "generation/sglang-0.5.16-responses.json";

/// Same keys at every level, same kinds of values. A null on one side agrees with anything.
fn same_shape(path: &str, recorded: &Value, ours: &Value) {
    match (recorded, ours) {
        (Value::Null, _) | (_, Value::Null) => {}
        (Value::Object(recorded), Value::Object(ours)) => {
            let names = |object: &Map<String, Value>| object.keys().cloned().collect::<BTreeSet<_>>();
            assert_eq!(names(recorded), names(ours), "{path}");
            for (name, value) in recorded {
                same_shape(&format!("{path}.{name}"), value, &ours[name]);
            }
        }
        (Value::Array(recorded), Value::Array(ours)) => {
            if let (Some(recorded), Some(ours)) = (recorded.first(), ours.first()) {
                same_shape(&format!("{path}[0]"), recorded, ours);
            }
        }
        (Value::Number(_), Value::Number(_))
        | (Value::String(_), Value::String(_))
        | (Value::Bool(_), Value::Bool(_)) => {}
        other => panic!("{path}: other kinds of values: {other:?}"),
    }
}

fn generate_body(prompt_tokens: i64, max_new_tokens: i64) -> Value {
    let ids: Vec<i64> = (0..prompt_tokens).map(|place| (place * place + place * 7) % 259).collect();
    json!({"input_ids": ids, "sampling_params": {"max_new_tokens": max_new_tokens, "temperature": 1.0}})
}

/// Status as recorded, shape as recorded, and what the sampling does not decide as recorded.
fn same_sample(name: &str, recorded: &Value, (status, ours): &(u16, Value)) {
    assert_eq!(u64::from(*status), recorded["status"], "{name}");
    let recorded = &recorded["body"];
    same_shape(name, recorded, ours);
    let (recorded, ours) = (&recorded["meta_info"], &ours["meta_info"]);
    for field in ["finish_reason", "prompt_tokens", "completion_tokens", "weight_version", "num_retractions"] {
        assert_eq!(recorded[field], ours[field], "{name}.{field}");
    }
    // The long prompt of the recording shared one token with an earlier one; so little is not worth a copy here.
    if recorded["cached_tokens"] != 1 {
        assert_eq!(recorded["cached_tokens"], ours["cached_tokens"], "{name}");
    }
}

struct Replay {
    server: TestServer,
    aborted: Vec<tokio::task::JoinHandle<(u16, Value)>>,
    checksums: Vec<Value>,
}

impl Replay {
    async fn ask(&mut self, name: &str, recorded: &Value) {
        let server = &self.server;
        match name {
            "health" => assert_eq!(server.get("/health").await, (200, recorded["body"].clone())),
            "model_info" | "model_info_after" => {
                let (status, ours) = server.get("/model_info").await;
                assert_eq!(u64::from(status), recorded["status"]);
                same_shape(name, &recorded["body"], &ours);
                let place = |text: &Value| server.folder(text.as_str().unwrap().trim_matches(['<', '>']));
                for field in ["model_path", "tokenizer_path"] {
                    assert_eq!(ours[field], place(&recorded["body"][field]), "{name}.{field}");
                }
                for field in ["weight_version", "model_type", "architectures", "is_generation"] {
                    assert_eq!(ours[field], recorded["body"][field], "{name}.{field}");
                }
            }
            "models" | "models_after" => {
                let (status, ours) = server.get("/v1/models").await;
                assert_eq!(u64::from(status), recorded["status"]);
                same_shape(name, &recorded["body"], &ours);
                let id = if name == "models" { "tiny".to_owned() } else { server.folder("ckpt1") };
                assert_eq!(ours["data"][0]["id"], id);
                assert_eq!(ours["data"][0]["max_model_len"], recorded["body"]["data"][0]["max_model_len"]);
            }
            "generate" | "generate2" | "after" => {
                same_sample(name, recorded, &server.post("/generate", &generate_body(80, 24)).await);
            }
            "after_missing" => same_sample(name, recorded, &server.post("/generate", &generate_body(80, 4)).await),
            "gen_logprob" => {
                let mut body = generate_body(80, 4);
                body["return_logprob"] = true.into();
                body["sampling_params"]["temperature"] = 0.5.into();
                let answer = server.post("/generate", &body).await;
                same_sample(name, recorded, &answer);
                let sample: GenerateResponse = serde_json::from_value(answer.1).unwrap();
                let logprobs = sample.meta_info.output_token_logprobs.unwrap();
                assert!(logprobs.iter().map(|entry| entry.1).eq(sample.output_ids));
            }
            "clamp_exact" => same_sample(name, recorded, &server.post("/generate", &generate_body(4000, 104)).await),
            "clamp_105" => {
                let answer = server.post("/generate", &generate_body(4000, 105)).await;
                assert_eq!(answer, (400, recorded["body"].clone()));
            }
            "bad_topk0" | "bad_topp0" => {
                let mut body = generate_body(8, 4);
                let (field, zero) = if name == "bad_topk0" { ("top_k", json!(0)) } else { ("top_p", json!(0.0)) };
                body["sampling_params"][field] = zero;
                assert_eq!(server.post("/generate", &body).await, (400, recorded["body"].clone()));
            }
            "abort" => {
                for index in 0..4 {
                    let mut body = generate_body(80, 2000);
                    body["rid"] = format!("ab{index}").into();
                    self.aborted.push(tokio::spawn(server.post("/generate", &body)));
                }
                server.until_load(4, 0).await;
                let answer = server.post("/abort_request", &json!({"rid": "ab0"})).await;
                assert_eq!(answer, (200, recorded["body"].clone()));
                server.until_load(3, 0).await;
            }
            "abort_all" => {
                let answer = server.post("/abort_request", &json!({"abort_all": true})).await;
                assert_eq!(answer, (200, recorded["body"].clone()));
                server.until_load(0, 0).await;
            }
            "aborted" => {
                let recorded = recorded["answers"].as_array().unwrap();
                assert_eq!(recorded.len(), self.aborted.len());
                for (recorded, ours) in recorded.iter().zip(self.aborted.drain(..)) {
                    let (status, ours) = ours.await.unwrap();
                    assert_eq!(u64::from(status), recorded["status"]);
                    same_shape(name, &recorded["meta_info"], &ours["meta_info"]);
                    for field in ["id", "finish_reason", "prompt_tokens", "weight_version"] {
                        assert_eq!(ours["meta_info"][field], recorded["meta_info"][field], "{name}.{field}");
                    }
                    let given = ours["output_ids"].as_array().unwrap().len();
                    assert_eq!(ours["meta_info"]["completion_tokens"], given);
                    assert!(given < 2000 && recorded["output_ids"].as_u64().unwrap() < 2000);
                }
            }
            "loads" => {
                let (status, ours) = server.get("/v1/loads").await;
                assert_eq!(u64::from(status), recorded["status"]);
                same_shape(name, &recorded["body"], &ours);
                for field in ["num_running_reqs", "num_waiting_reqs", "num_used_tokens", "max_total_num_tokens"] {
                    assert_eq!(ours["loads"][0][field], recorded["body"]["loads"][0][field], "{field}");
                }
            }
            "checksum0" | "checksum1" => {
                let (status, ours) = server.post("/weights_checker", &json!({"action": "checksum"})).await;
                assert_eq!(u64::from(status), recorded["status"]);
                // Names and number of tensors are those of the checkpoint.
                let (mut recorded, mut ours) = (recorded["body"].clone(), ours);
                let tensors = ours["ranks"][0]["checksums"].take();
                recorded["ranks"][0]["checksums"].take();
                same_shape(name, &recorded, &ours);
                let length = |body: &Value| body["ranks"][0]["per_gpu_checksum"].as_str().map(str::len);
                assert_eq!(length(&recorded), length(&ours));
                assert!(tensors.as_object().unwrap().contains_key("model.norm.weight"));
                self.checksums.push(ours);
            }
            "pause" => {
                let answer = server.post("/pause_generation", &json!({"mode": "abort"})).await;
                assert_eq!(answer, (200, recorded["body"].clone()));
            }
            "flush" => {
                let answer = server.post("/flush_cache?timeout=5", &json!({})).await;
                assert_eq!(answer, (200, recorded["body"].clone()));
            }
            "update" => {
                let request = json!({"model_path": server.folder("ckpt1"), "weight_version": "ckpt1"});
                let answer = server.post("/update_weights_from_disk", &request).await;
                assert_eq!(answer, (200, recorded["body"].clone()));
            }
            "continue" => {
                let answer = server.post("/continue_generation", &json!({})).await;
                assert_eq!(answer, (200, recorded["body"].clone()));
            }
            "update_missing" => {
                let (status, ours) =
                    server.post("/update_weights_from_disk", &json!({"model_path": "/nonexistent"})).await;
                assert_eq!(u64::from(status), recorded["status"]);
                same_shape(name, &recorded["body"], &ours);
                assert_eq!(ours["success"], recorded["body"]["success"]);
                assert!(ours["message"].as_str().unwrap().contains("/nonexistent"));
            }
            // The real server dies of these two; the builtin one refuses and lives.
            "update_trunc" => {
                assert_eq!(recorded["status"], "EXC");
                let folder = server.folder("ckpt0");
                let weights = std::path::Path::new(&folder).join("model.safetensors");
                let whole = std::fs::read(&weights).unwrap();
                std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
                let (status, ours) = server.post("/update_weights_from_disk", &json!({"model_path": folder})).await;
                assert_eq!((status, &ours["success"]), (400, &Value::Bool(false)));
                assert_eq!(server.get("/health_generate").await.0, 200);
                assert_eq!(server.get("/model_info").await.1["model_path"], server.folder("ckpt1"));
            }
            "out_of_vocabulary_id" => {
                assert_eq!(recorded["status"], "EXC");
                let body = json!({"input_ids": [1, 999_999], "sampling_params": {"max_new_tokens": 1}});
                let (status, ours) = server.post("/generate", &body).await;
                assert_eq!(status, 400);
                assert!(ours["error"]["message"].as_str().unwrap().contains("999999"));
                assert_eq!(server.get("/health_generate").await.0, 200);
            }
            "server_info_keys" => {
                let (status, ours) = server.get("/server_info").await;
                assert_eq!(u64::from(status), recorded["status"]);
                // The recording holds the first names in order; ours must be among them as far as it goes.
                let known: BTreeSet<&str> =
                    recorded["keys"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
                let last = *known.last().unwrap();
                for field in ours.as_object().unwrap().keys().filter(|name| name.as_str() <= last) {
                    assert!(known.contains(field.as_str()) || field == "implementation", "{field}");
                }
                assert_eq!(ours["max_req_input_len"], 4098);
            }
            "throughput_tiny_model" => {
                // Says why many requests must be in flight: the rate rises with their number.
                let rates = recorded.as_object().unwrap().iter().filter(|(name, _)| name.as_str() != "note");
                let rates: Vec<(u64, u64)> =
                    rates.map(|(number, rate)| (number.parse().unwrap(), rate.as_u64().unwrap())).collect();
                assert!(rates.len() == 3 && rates.is_sorted(), "{rates:?}");
            }
            other => panic!("{other} is a recorded answer that nobody asks for"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_are_those_of_the_real_server() {
    let recorded: Map<String, Value> = grail_golden::json(FILE);
    let setup = Setup { vocab_size: 259, step: Duration::from_millis(1), ..Setup::default() };
    let mut replay = Replay { server: TestServer::start(setup).await, aborted: Vec::new(), checksums: Vec::new() };
    for (name, entry) in &recorded {
        replay.ask(name, entry).await;
    }
    assert_eq!(replay.checksums[0], replay.checksums[1], "both folders hold the same weights");
    replay.server.end();
    grail_golden::ran(FILE, recorded.len(), 29);
}
