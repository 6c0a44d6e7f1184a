//! Bad input: one clear error with the value and the remedy, the documented exit code, nothing lost.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, also in its helpers")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use grail_checkpoint::{CheckpointStore, GenerationParams, MetadataInput, ThinkingModeName, publish_full};
use grail_protocol::ids::CheckpointWindow;
use grail_tests::binaries::{Finished, Run};
use grail_tests::small_disk::SmallDisk;

fn supervisor(arguments: &[&str], folder: &Path) -> Finished {
    Run::start("grail-supervisor", arguments, folder, &[]).wait()
}

/// One error line on standard error that names all of `words`.
fn assert_refused(finished: &Finished, code: i32, words: &[&str]) {
    assert_eq!(finished.code, Some(code), "{finished:#?}");
    let error = finished.stderr.lines().filter(|line| line.contains("error")).collect::<Vec<_>>().join("\n");
    for word in words {
        assert!(finished.stderr.contains(word), "{word:?} is missing in: {error}\n{}", finished.stderr);
    }
    assert!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
}

/// A copy of a model of the golden vectors that may be damaged.
fn model(folder: &Path) -> PathBuf {
    let copy = folder.join("model");
    std::fs::create_dir_all(&copy).unwrap();
    let source = grail_golden::path("models/qwen2-tied");
    for entry in std::fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        if !entry.file_name().to_string_lossy().starts_with("expected") {
            let to = copy.join(entry.file_name());
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
    copy
}

/// Publishes `model` as the one checkpoint of a local world and mines there.
fn mine_with(model: &Path, folder: &Path) -> Finished {
    let state = folder.join("state");
    let store = state.join("store");
    std::fs::create_dir_all(&store).unwrap();
    let input = MetadataInput {
        env_id: "gsm8k".into(),
        env_params: serde_json::json!({"split": "train"}).as_object().unwrap().clone(),
        generation: GenerationParams::from_json(&serde_json::json!({
            "max_tokens": 48, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0
        }))
        .unwrap(),
        thinking_mode: ThinkingModeName::Instructed,
        model_name: "tiny".into(),
        parent_window: None,
        training_config: serde_json::Map::new(),
        git_commit: "test".into(),
        created_at: 0.0,
    };
    let objects = object_store::local::LocalFileSystem::new_with_prefix(&store).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let store = CheckpointStore::new(Arc::new(objects));
    let published = runtime.block_on(publish_full(&store, CheckpointWindow(2_940), model, &input, 2_970));
    published.unwrap();
    supervisor(
        &[
            "mine",
            "--local",
            "--no-trainer",
            "--windows",
            "1",
            "--state-dir",
            state.to_str().unwrap(),
            "--block-ms",
            "400",
        ],
        folder,
    )
}

#[test]
fn an_unreadable_configuration() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(".env"), "GRAIL_PIPELINE_MAX_MODEL_LEN=many\n").unwrap();
    let refused = supervisor(&["mine", "--local"], folder.path());
    assert_refused(&refused, 78, &["GRAIL_PIPELINE_MAX_MODEL_LEN", "many", ".env"]);
    let absent = supervisor(&["--env-file", "nowhere.env", "mine", "--local"], folder.path());
    assert_refused(&absent, 78, &["nowhere.env"]);
}

#[test]
fn an_empty_store() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let arguments = ["mine", "--local", "--no-trainer", "--state-dir", state.to_str().unwrap(), "--block-ms", "100"];
    assert_refused(&supervisor(&arguments, folder.path()), 66, &["no checkpoint", "3000"]);
}

#[test]
fn a_missing_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    rename_tensor(&model.join("model.safetensors"), "model.norm.weight", "model.nrom.weight");
    assert_refused(&mine_with(&model, folder.path()), 65, &["model.norm.weight"]);
}

#[test]
fn a_wrong_dtype() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let path = model.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    // Sixteen bits stay sixteen bits, so the file is well-formed; only no weights are integers.
    let place = find(&bytes, b"\"BF16\"").unwrap();
    bytes[place..place + 6].copy_from_slice(b"\"I16\" ");
    std::fs::write(&path, bytes).unwrap();
    assert_refused(&mine_with(&model, folder.path()), 65, &["I16"]);
}

#[test]
fn a_broken_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    std::fs::write(model.join("tokenizer.json"), "{\"version\": ").unwrap();
    assert_refused(&mine_with(&model, folder.path()), 65, &["tokenizer.json"]);
}

#[test]
fn a_wrong_file_given_to_verify() {
    let folder = tempfile::tempdir().unwrap();
    let vectors: serde_json::Value = grail_golden::json("protocol/window_verdicts.json");
    let mut context = vectors["context"].clone();
    context["model_dir"] = grail_golden::path("models/qwen3-tied").to_str().unwrap().into();
    let rows = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/environments/data/gsm_train.jsonl.gz");
    context["dataset_rows"] = rows.canonicalize().unwrap().to_str().unwrap().into();
    let context_path = folder.path().join("context.json");
    std::fs::write(&context_path, context.to_string()).unwrap();
    let file = folder.path().join("notes.txt");
    std::fs::write(&file, "this is no window file, but it is longer than twelve bytes").unwrap();
    let arguments = ["verify", "notes.txt", "--context", "context.json", "--json"];
    let refused = supervisor(&arguments, folder.path());
    assert_eq!(refused.code, Some(1), "{refused:#?}");
    let report: serde_json::Value = serde_json::from_str(&refused.stdout).unwrap();
    assert_eq!(report["verdict"], "file-rejected");
    assert_eq!(report["failure_reason"], "file:corrupt_parquet");

    let without_context = supervisor(&["verify", "notes.txt"], folder.path());
    assert_eq!(without_context.code, Some(1), "{without_context:#?}");

    let absent = supervisor(&["verify", "nothing.parquet", "--context", "context.json"], folder.path());
    assert_refused(&absent, 66, &["nothing.parquet"]);
    let honest = grail_golden::path("protocol/windows/valid.parquet");
    let judged = ["verify", honest.to_str().unwrap(), "--context", "context.json"];
    context["vocab_size"] = 7.into();
    std::fs::write(&context_path, context.to_string()).unwrap();
    assert_refused(&supervisor(&judged, folder.path()), 65, &["vocab_size", "7", "512"]);
    context["vocab_size"] = 512.into();
    context["dtype"] = "float16".into();
    std::fs::write(&context_path, context.to_string()).unwrap();
    assert_refused(&supervisor(&judged, folder.path()), 65, &["dtype", "float16", "bfloat16"]);
    context["dtype"] = "float32".into();
    std::fs::write(&context_path, context.to_string()).unwrap();
    assert_eq!(supervisor(&judged, folder.path()).code, Some(0));
}

#[test]
fn a_full_disk() {
    let folder = tempfile::tempdir().unwrap();
    let small = folder.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let Some(_mounted) = SmallDisk::mount(&small) else {
        println!("skipped: a tmpfs cannot be mounted here (not permitted)");
        return;
    };
    let state = small.join("state");
    let arguments = [
        "mine",
        "--local",
        "--windows",
        "1",
        "--state-dir",
        state.to_str().unwrap(),
        "--block-ms",
        "1500",
        "--max-groups",
        "200",
    ];
    let run = Run::start("grail-supervisor", &arguments, folder.path(), &[]);
    let spooled = || {
        let text = std::fs::read_to_string(state.join("journal.jsonl")).unwrap_or_default();
        text.matches("group_spooled").count()
    };
    let deadline = std::time::Instant::now() + grail_tests::binaries::LIMIT;
    while spooled() < 2 {
        assert!(std::time::Instant::now() < deadline, "no group was spooled");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // Now the disk fills up under a window that runs.
    let mut filler = std::fs::File::create(small.join("filler")).unwrap();
    while std::io::Write::write_all(&mut filler, &[0; 1 << 12]).is_ok() {}
    assert_refused(&run.wait(), 73, &["small", "space"]);
    // What was spooled before can be read; it was closed for the upload, which needs no space.
    let spool = grail_supervisor::spool::read(&state.join("spool").join("window-3000.sent")).unwrap();
    assert!(spool.1.len() >= 2, "{} groups", spool.1.len());
}

fn rename_tensor(path: &Path, from: &str, to: &str) {
    let mut bytes = std::fs::read(path).unwrap();
    let place = find(&bytes, from.as_bytes()).unwrap();
    bytes[place..place + from.len()].copy_from_slice(to.as_bytes());
    std::fs::write(path, bytes).unwrap();
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}

#[test]
fn gpus_that_are_not_there_are_all_in_one_report() {
    let folder = tempfile::tempdir().unwrap();
    let variables = [("CUDA_VISIBLE_DEVICES", ""), ("GRAIL_PIPELINE_PROOF_GPU_IDS", "6,7")];
    let state = folder.path().join("state");
    let arguments = ["mine", "--local", "--device", "cuda", "--state-dir", state.to_str().unwrap()];
    let finished = Run::start("grail-supervisor", &arguments, folder.path(), &variables).wait();
    assert_eq!(finished.code, Some(78), "{finished:#?}");
    let said = &finished.stderr;
    for index in ["6", "7"] {
        let named = said.lines().any(|line| {
            line.contains("ProtocolViolationError")
                && line.contains("GRAIL_PIPELINE_PROOF_GPU_IDS")
                && line.contains(index)
        });
        assert!(named, "GPU {index}: {said}");
    }
    assert!(!state.exists(), "nothing was started");
    let verify = ["verify", "--local", "--device", "cuda", "--state-dir", state.to_str().unwrap()];
    let finished = Run::start("grail-supervisor", &verify, folder.path(), &variables).wait();
    assert_eq!(finished.code, Some(78), "{finished:#?}");
    assert!(finished.stderr.contains("GPU 7"), "{finished:#?}");
}

/// Children get the same setting, and one that ended by it would be started for ever.
#[test]
fn a_slip_in_the_log_filter_ends_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let variables = [("GRAIL_LOG", "grail=louder")];
    for (program, arguments, code) in [
        ("grail-proof-worker", ["prove", "absent.jsonl", "--model", "absent"].as_slice(), 66),
        ("grail-supervisor", &["verify", "absent.parquet"], 66),
    ] {
        let finished = Run::start(program, arguments, folder.path(), &variables).wait();
        assert_eq!(finished.code, Some(code), "{program}: {finished:#?}");
        assert!(
            finished.stderr.contains("WARN") && finished.stderr.contains("is in force"),
            "{program}: {finished:#?}"
        );
    }
}
