use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::*;

struct Bench {
    folder: tempfile::TempDir,
    inputs: Inputs,
}

impl Bench {
    fn new(environment: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = [("HOME", "/home/miner")];
        let environment = home.iter().chain(environment).map(|(name, value)| (name.into(), value.into())).collect();
        let env_file = EnvFile::InFolder(folder.path().to_path_buf());
        Self { folder, inputs: Inputs { environment, env_file, flags: Vec::new() } }
    }

    fn file(self, text: &str) -> Self {
        std::fs::write(self.folder.path().join(ENV_FILE), text).unwrap();
        self
    }

    fn load(&self, mode: Mode) -> Result<Config, ConfigError> {
        Config::load(&self.inputs, mode)
    }

    /// A report without the path of the temporary folder.
    fn clean(&self, text: &str) -> String {
        text.replace(&format!("{}/", self.folder.path().display()), "")
    }
}

const R2: [(&str, &str); 6] = [
    ("R2_ACCOUNT_ID", "0123456789abcdef0123456789abcdef"),
    ("R2_BUCKET_ID", "0123456789abcdef0123456789abcdef"),
    ("R2_READ_ACCESS_KEY_ID", "read-key-id"),
    ("R2_READ_SECRET_ACCESS_KEY", "read-secret"),
    ("R2_WRITE_ACCESS_KEY_ID", "write-key-id"),
    ("R2_WRITE_SECRET_ACCESS_KEY", "write-secret"),
];

fn network(changes: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let mut environment = R2.to_vec();
    environment.extend_from_slice(changes);
    Bench::new(&environment).load(Mode::Network)
}

fn problems(result: Result<Config, ConfigError>) -> Vec<String> {
    result.unwrap_err().problems.iter().map(ToString::to_string).collect()
}

#[test]
fn every_default_of_the_table_converts() {
    let config = Bench::new(&[]).load(Mode::Local).unwrap();
    assert_eq!(config.warnings(), []);
    assert_eq!(config.chain.netuid, Sourced { value: 81, origin: Origin::Default });
    assert_eq!(config.chain.endpoints.value, ["wss://entrypoint-finney.opentensor.ai:443"]);
    assert_eq!(config.generation.max_model_len.value, 12_288);
    assert_eq!(config.generation.groups_per_batch.value, None);
    assert_eq!(config.generation.server_timeout.value, Duration::from_secs(300));
    assert_eq!(config.limits.max_groups.value, 24);
    assert_eq!(config.limits.max_file_bytes.value, 330 << 20);
    assert_eq!(config.limits.safety_blocks.value, 3);
    assert_eq!(config.limits.upload_timeout.value, Duration::from_secs(90));
    assert_eq!(config.proof.cpu_workers.value, 2);
    assert_eq!(config.proof.gpus, ProofGpus::Single(Sourced { value: 1, origin: Origin::Default }));
    assert_eq!(config.folders.checkpoints(), Path::new("/home/miner/.cache/grail/checkpoints"));
    assert_eq!(config.folders.state.value, Path::new("/home/miner/.local/state/grail-supervisor"));
    assert_eq!(config.folders.runtime.value, Path::new("/home/miner/.local/state/grail-supervisor/run"));
    assert_eq!(config.local.block_time.value, None);
    assert!(config.store.is_none());
}

#[test]
fn the_report_of_a_fresh_machine() {
    let config = Bench::new(&[]).load(Mode::Local).unwrap();
    insta::assert_snapshot!(config.describe().to_text(&[]));
}

#[test]
fn the_eight_gpu_example_of_the_guide() {
    let guide = "\
        GRAIL_PIPELINE_BACKEND=sglang   # Default and recommended\n\
        GRAIL_PIPELINE_VLLM_GPU=0\n\
        GRAIL_PIPELINE_VLLM_TP=4               # GPUs 0-3\n\
        GRAIL_PIPELINE_PROOF_GPU=4             # primary in-process worker\n\
        GRAIL_PIPELINE_PROOF_GPU_IDS=4,5,6,7   # GPUs 4-7\n\
        GRAIL_PIPELINE_PROOF_SUBPROCESS=true   # GIL-free subprocess pool\n\
        GRAIL_PIPELINE_GROUPS_PER_BATCH=72     # send 72 groups\n\
        GRAIL_PIPELINE_GPU_MEM_UTIL=0.88\n\
        GRAIL_PIPELINE_MAX_MODEL_LEN=4096\n\
        GRAIL_PIPELINE_MAX_NUM_SEQS=512\n\
        GRAIL_PIPELINE_MAX_CONCURRENT=512\n\
        GRAIL_PIPELINE_PROOF_FLASH_ATTN=false  # MUST stay false\n";
    let bench = Bench::new(&R2).file(guide);
    let config = bench.load(Mode::Network).unwrap();
    assert_eq!(config.generation.groups_per_batch.value, Some(72));
    assert_eq!(config.generation.max_num_seqs.value, Some(512));
    assert!((config.generation.gpu_memory_share.value - 0.88).abs() < f64::EPSILON);
    let layout = gpu_layout(&visible_devices(None, 8), &config.gpu_request().unwrap()).unwrap();
    assert_eq!((layout.generation.join(","), layout.proof.join(",")), ("0,1,2,3".to_owned(), "4,5,6,7".to_owned()));
    insta::assert_snapshot!(bench.clean(&config.describe().to_text(&[])));
    let text = serde_json::to_string_pretty(&config.describe().to_json(&[])).unwrap();
    insta::assert_snapshot!("the_eight_gpu_example_as_json", bench.clean(&text));
}

#[test]
fn all_problems_come_at_once_with_place_and_remedy() {
    let file = "\
        NETUID=abc\n\
        GRAIL_PIPELINE_VLLM_TP = 0\n\
        R2_WRITE_SECRET_ACCESS_KEY=hunter2hunter2\n\
        R2_READ_SECRET_ACCESS_KEY=hunter2hunter2\n\
        GRAIL_PIPELINE_PROOF_GPU_IDS=4,5,4\n\
        this line is wrong\n";
    let environment = [
        ("BT_NETWORK", "fineny"),
        ("GRAIL_PIPELINE_DISABLE_CUDA_GRAPH", "ja"),
        ("GRAIL_PIPELINE_GPU_MEM_UTIL", "88"),
        ("R2_ENDPOINT_URL", "s3.example.org"),
        ("R2_READ_ACCESS_KEY_ID", "an access key id of more than 32 characters"),
        ("R2_BUCKET_ID", "b"),
        ("R2_ACCOUNT_ID", "a"),
        ("UPLOAD_TIMEOUT", "nan"),
        ("GRAIL_MONITORING_BACKEND", "wandb"),
        ("BT_WALLET_HOT", "../other"),
    ];
    let bench = Bench::new(&environment).file(file);
    let error = bench.load(Mode::Network).unwrap_err();
    assert!(!format!("{error} {error:?}").contains("hunter2"));
    insta::assert_snapshot!(bench.clean(&error.to_string()));
}

#[test]
fn an_empty_machine_is_told_what_a_network_needs() {
    insta::assert_snapshot!(problems(Bench::new(&[]).load(Mode::Network)).join("\n"));
}

#[test]
fn the_environment_wins_over_the_file_and_options_over_both() {
    let mut bench = Bench::new(&[("GRAIL_MAX_GROUPS_PER_WINDOW", "20")])
        .file("GRAIL_MAX_GROUPS_PER_WINDOW=10\nGRAIL_PROOF_WORKERS=3\nBT_WALLET_COLD=\n");
    let config = bench.load(Mode::Local).unwrap();
    assert_eq!(config.limits.max_groups.origin, Origin::Env { name: "GRAIL_MAX_GROUPS_PER_WINDOW" });
    assert_eq!(config.limits.max_groups.value, 20);
    let line = Origin::File { path: bench.folder.path().join(ENV_FILE), line: 2 };
    assert_eq!(config.proof.cpu_workers, Sourced { value: 3, origin: line });
    assert_eq!(config.chain.wallet.cold, Sourced { value: "default".to_owned(), origin: Origin::Default });
    bench.inputs.flags =
        vec![FlagValue { variable: "GRAIL_MAX_GROUPS_PER_WINDOW", flag: "--max-groups", value: "12".to_owned() }];
    let groups = bench.load(Mode::Local).unwrap().limits.max_groups;
    assert_eq!(groups, Sourced { value: 12, origin: Origin::Flag { name: "--max-groups" } });
}

#[test]
fn a_blank_value_of_the_environment_hides_the_file() {
    let config = Bench::new(&[("GRAIL_PROOF_WORKERS", " ")]).file("GRAIL_PROOF_WORKERS=3\n").load(Mode::Local).unwrap();
    assert_eq!(config.proof.cpu_workers, Sourced { value: 2, origin: Origin::Default });
}

#[test]
fn the_subnet_has_two_names_of_which_the_longer_is_read_first() {
    let netuid = |environment: &[(&str, &str)]| network(environment).unwrap().chain.netuid.value;
    assert_eq!(netuid(&[("NETUID", "429")]), 429);
    assert_eq!(netuid(&[("NETUID", "429"), ("BT_NETUID", "12")]), 12);
    assert_eq!(netuid(&[("NETUID", "429"), ("BT_NETUID", "")]), 429);
}

#[test]
fn faults_for_the_children_are_no_unknown_variable() {
    assert_eq!(Bench::new(&[("GRAIL_FAULT", "anything")]).load(Mode::Local).unwrap().warnings(), []);
}

#[test]
fn settings_of_workers_are_known_wherever_they_are_set() {
    let config =
        Bench::new(&[]).file("GRAIL_RELOAD_SHADOW=never\nGRAIL_PROOF_KERNELS=off\n").load(Mode::Local).unwrap();
    assert_eq!(config.warnings(), []);
    assert_eq!(
        (config.proof.reload_shadow.value, config.proof.kernels.value),
        (ReloadShadow::Never, ProofKernels::Off)
    );
    assert_eq!(
        (config.proof.reload_shadow.value.name(), config.proof.kernels.value.name()),
        ("never".into(), "off".into())
    );
    let error = network(&[("GRAIL_RELOAD_SHADOW", "sometimes")]).unwrap_err();
    assert_eq!(error.problems[0].variable, "GRAIL_RELOAD_SHADOW");
}

#[test]
fn a_window_of_the_embedded_default_is_smaller_unless_it_is_set() {
    let groups = |environment: &[(&str, &str)], mode| {
        let config = Bench::new(environment).load(mode).unwrap();
        let row = config.describe().rows.iter().find(|row| row.name == "GRAIL_MAX_GROUPS_PER_WINDOW").cloned();
        assert_eq!(row.unwrap().value, Some(config.limits.max_groups.value.to_string()));
        config.limits.max_groups.value
    };
    assert_eq!(groups(&[], Mode::Local), 24);
    assert_eq!(groups(&[("GRAIL_MAX_GROUPS_PER_WINDOW", "40")], Mode::Local), 40);
    assert_eq!(network(&[]).unwrap().limits.max_groups.value, 313);
}

#[test]
fn misspelt_unknown_and_ineffective_names_are_warnings() {
    let bench = Bench::new(&[
        ("GRAIL_PIPELINE_PROOF_GPU_ID", "3"),
        ("GRAIL_PIPLINE_BACKEND", "vllm"),
        ("GRAIL_SOMETHING_ELSE_ALTOGETHER", "1"),
        ("WANDB_NOTES", "not ours"),
    ])
    .file("GRAIL_GENERATION_BATCH_SIZE=4\nKERNEL_EVAL_GPU_IDS=1\nGRAIL_PIPELINE_PROOF_FLASH_ATTN=true\nGRAIL_LOG=a\nGRAIL_LOG=b\n");
    let config = bench.load(Mode::Local).unwrap();
    let ProofGpus::Single(gpu) = &config.proof.gpus else { panic!("{:?}", config.proof) };
    assert_eq!(gpu.value, 3);
    assert_eq!(config.log.value.as_deref(), Some("b"));
    let warnings: Vec<String> = config.warnings().iter().map(|warning| bench.clean(&warning.to_string())).collect();
    insta::assert_snapshot!(warnings.join("\n"));
}

#[test]
fn a_name_that_is_right_wins_over_its_misspelling() {
    let config = network(&[("GRAIL_PIPELINE_VLLM_GPU_ID", "3"), ("GRAIL_PIPELINE_VLLM_GPU", "2")]).unwrap();
    assert_eq!(config.generation.first_gpu.value, 2);
    assert_eq!(config.warnings(), []);
}

#[test]
fn a_custom_network_needs_an_endpoint_and_an_endpoint_wins() {
    let missing = problems(network(&[("BT_NETWORK", "custom")]));
    assert_eq!(missing.len(), 1);
    assert!(missing[0].starts_with("BT_CHAIN_ENDPOINT is not set: BT_NETWORK=custom needs it"), "{missing:?}");
    let own = network(&[("BT_NETWORK", "custom"), ("BT_CHAIN_ENDPOINT", "ws://10.0.0.1:9944, wss://b")]).unwrap();
    assert_eq!(own.chain.endpoints.value, ["ws://10.0.0.1:9944", "wss://b"]);
    assert_eq!(problems(network(&[("BT_CHAIN_ENDPOINT", "http://x")])).len(), 1);
}

#[test]
fn the_bucket_is_named_like_the_account_unless_the_endpoint_is_ones_own() {
    let other = problems(network(&[("R2_BUCKET_ID", "other")]));
    assert!(other[0].contains("must be named like the account"), "{other:?}");
    let config = network(&[("R2_BUCKET_ID", "other"), ("R2_ENDPOINT_URL", "http://127.0.0.1:9000/")]).unwrap();
    let store = config.store.unwrap();
    assert_eq!((store.bucket_id.value.as_str(), store.endpoint_url.value.as_str()), ("other", "http://127.0.0.1:9000"));
    let store = network(&[]).unwrap().store.unwrap();
    assert_eq!(store.endpoint_url.value, "https://0123456789abcdef0123456789abcdef.r2.cloudflarestorage.com");
    assert_eq!(store.write.secret_access_key.value.expose(), "write-secret");
}

#[test]
fn a_write_secret_is_never_offered_as_the_read_secret() {
    let same = problems(network(&[("R2_READ_SECRET_ACCESS_KEY", "write-secret")]));
    assert_eq!(same.len(), 1);
    assert!(same[0].contains("[redacted]") && same[0].contains("published on chain"), "{same:?}");
    assert!(!same[0].contains("write-secret"), "{same:?}");
}

#[test]
fn a_named_file_must_exist_and_be_text() {
    let mut bench = Bench::new(&[]);
    let path = bench.folder.path().join("absent.env");
    bench.inputs.env_file = EnvFile::Named(path.clone());
    let missing = problems(bench.load(Mode::Local));
    assert!(missing[0].contains("absent.env") && missing[0].contains("--env-file"), "{missing:?}");
    std::fs::write(&path, b"A=\xff").unwrap();
    assert!(problems(bench.load(Mode::Local))[0].contains("save the file as UTF-8"));
    std::fs::write(&path, "GRAIL_PROOF_WORKERS=5").unwrap();
    assert_eq!(bench.load(Mode::Local).unwrap().proof.cpu_workers.value, 5);
}

#[test]
fn a_value_that_is_no_text_is_a_problem() {
    use std::os::unix::ffi::OsStringExt;
    let mut bench = Bench::new(&[]);
    bench.inputs.environment.push(("NETUID".into(), OsString::from_vec(vec![0xff])));
    assert!(problems(bench.load(Mode::Local))[0].contains("the value is no UTF-8"));
}

#[test]
fn folders_follow_home_and_the_xdg_variables() {
    let environment = [
        ("XDG_STATE_HOME", "/state"),
        ("XDG_RUNTIME_DIR", "/run/user/1000"),
        ("GRAIL_CACHE_DIR", "~/models"),
        ("GRAIL_LIBTORCH_DIR", "/opt/torch/lib"),
    ];
    let config = Bench::new(&environment).load(Mode::Local).unwrap();
    assert_eq!(config.folders.cache.value, Path::new("/home/miner/models"));
    assert_eq!(config.folders.state.value, Path::new("/state/grail-supervisor"));
    assert_eq!(config.folders.runtime.value, Path::new("/run/user/1000/grail-supervisor"));
    assert_eq!(config.proof.libtorch_dir.value, Some(PathBuf::from("/opt/torch/lib")));

    let mut homeless = Bench::new(&[]);
    homeless.inputs.environment.clear();
    let names: Vec<_> = homeless.load(Mode::Local).unwrap_err().problems.iter().map(|p| p.variable).collect();
    assert_eq!(names, ["BT_WALLET_PATH", "GRAIL_CACHE_DIR", "GRAIL_STATE_DIR"]);
}

#[test]
fn the_demonstration_generates_on_the_cpu_whatever_is_set() {
    let config = Bench::new(&[("GRAIL_PIPELINE_BACKEND", "vllm")]).load(Mode::Local).unwrap();
    assert_eq!(config.generation.backend.value, Backend::Builtin);
    assert_eq!(config.gpu_request(), None);
    let builtin = network(&[("GRAIL_PIPELINE_BACKEND", "builtin")]).unwrap().gpu_request().unwrap();
    assert_eq!(builtin.generation, None);
}

#[test]
fn variables_of_other_programs_are_passed_on_unless_the_environment_has_them() {
    let config =
        Bench::new(&[("NCCL_DEBUG", "WARN")]).file("NCCL_DEBUG=INFO\nHF_HUB_OFFLINE=1\n").load(Mode::Local).unwrap();
    assert_eq!(config.passthrough, BTreeMap::from([("HF_HUB_OFFLINE".to_owned(), "1".to_owned())]));
}

#[test]
fn booleans_numbers_and_durations_accept_what_the_guide_writes() {
    for (text, expected) in [("true", true), ("YES", true), ("1", true), ("on", true), ("0", false), ("No", false)] {
        let config = network(&[("GRAIL_PIPELINE_DISABLE_CUDA_GRAPH", text)]).unwrap();
        assert_eq!(config.generation.disable_cuda_graph.value, expected, "{text}");
    }
    let config = network(&[("GRAIL_PIPELINE_MAX_MODEL_LEN", "12_288"), ("UPLOAD_TIMEOUT", "0.5")]).unwrap();
    assert_eq!(config.generation.max_model_len.value, 12_288);
    assert_eq!(config.limits.upload_timeout.value, Duration::from_millis(500));
}

#[test]
fn the_example_in_deploy_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/.env.example");
    let found = std::fs::read_to_string(path).unwrap();
    assert!(
        found == env_example(),
        "deploy/.env.example differs from the table of variables; make it again with \
         `cargo run -p grail-supervisor -- config --example > deploy/.env.example`"
    );
}

#[test]
fn the_example_is_a_configuration_in_which_nothing_is_set() {
    let plain = Bench::new(&[]).load(Mode::Local).unwrap();
    let bench = Bench::new(&[]).file(&env_example());
    let commented = bench.load(Mode::Local).unwrap();
    assert_eq!(commented.describe(), plain.describe());
    // With the signs of comment removed every line still is an assignment, and none has a defect of its own.
    let opened: String = env_example()
        .lines()
        .filter_map(|line| line.strip_prefix("# ").filter(|rest| rest.split('=').next().is_some_and(is_name)))
        .map(|line| format!("{line}\n"))
        .collect();
    assert!(opened.contains("\nNETUID=81\n") && opened.contains("\nR2_ACCOUNT_ID=\n"));
    let opened = Bench::new(&[]).file(&opened).load(Mode::Local).unwrap();
    // The one default that is another without a network.
    let of_network = |name| name == "GRAIL_MAX_GROUPS_PER_WINDOW";
    let values = |config: &Config| {
        let rows = config.describe().rows.iter().filter(|row| !of_network(row.name));
        rows.map(|row| row.value.clone()).collect::<Vec<_>>()
    };
    assert_eq!(values(&opened), values(&plain));
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

#[test]
fn what_urls_hold_beside_a_host_is_in_no_report() {
    for (url, shown) in [
        ("wss://user:p4ssw0rd@node:9944/ws?apikey=hidden", "wss://[redacted]@node:9944/[redacted]"),
        ("wss://node/v1/hidden", "wss://node/[redacted]"),
        ("ws://10.0.0.1:9944/", "ws://10.0.0.1:9944/"),
        ("wss://node?key=hidden", "wss://node/[redacted]"),
        ("https://id:p4/ssw0rd@s3:9000", "https://[redacted]@s3:9000"),
        ("id:p4ssw0rd@s3:9000/hidden", "[redacted]@s3:9000/[redacted]"),
        ("no url", "no url"),
        ("/srv/models", "/srv/models"),
    ] {
        assert_eq!(resolve::shown_url(url), shown);
    }
    let endpoint = "wss://user:p4ssw0rd@node/ws?apikey=hidden";
    let config =
        network(&[("BT_CHAIN_ENDPOINT", endpoint), ("R2_ENDPOINT_URL", "https://id:p4ssw0rd@s3:9000")]).unwrap();
    assert_eq!(config.chain.endpoints.value, [endpoint], "as it was set, for whoever connects");
    let report = config.describe().to_text(&[]);
    assert!(
        report.contains("wss://[redacted]@node/[redacted]") && report.contains("https://[redacted]@s3:9000"),
        "{report}"
    );
    assert!(!report.contains("p4ssw0rd") && !report.contains("hidden"), "{report}");
    for url in ["ftp://id:p4ssw0rd@s3/hidden", "id:p4ssw0rd@s3:9000"] {
        let wrong = problems(network(&[("R2_ENDPOINT_URL", url)]));
        assert!(!wrong[0].contains("p4ssw0rd") && !wrong[0].contains("hidden"), "{wrong:?}");
    }
}

#[test]
fn a_running_miner_is_found_whatever_else_is_wrong() {
    let bench =
        Bench::new(&[("XDG_STATE_HOME", "/state")]).file("GRAIL_WORKER_PROVE_TIMEOUT=10m\nGRAIL_KEEP_WINDOWS_DAYS=x\n");
    assert_eq!(problems(bench.load(Mode::Local)).len(), 2);
    assert_eq!(Config::folders(&bench.inputs).unwrap().state.value, Path::new("/state/grail-supervisor"));
    let mut lost = Bench::new(&[]);
    lost.inputs.environment.clear();
    let error = Config::folders(&lost.inputs).unwrap_err();
    assert!(error.problems.iter().all(|problem| problem.variable == "GRAIL_STATE_DIR"), "{error}");
    let malformed = Bench::new(&[]).file("GRAIL_STATE_DIR='/elsewhere\n");
    assert!(Config::folders(&malformed.inputs).is_err(), "it may be what names the folder");
}
