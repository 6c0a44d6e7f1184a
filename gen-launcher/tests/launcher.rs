//! The launcher as a process, with a real server under it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use common::{
    LIMIT, answer, copy_checkpoint, http, is_alive, other_weights, private_folder, sample, truncate_weights, until_gone,
};
use grail_ipc::launcher_client::ReadyServer;
use grail_ipc::messages::{Backend, ServerPhase, ServerSpec, Severity};
use grail_ipc::{Expected, LauncherClient, LauncherEvent, LauncherEvents, RequestError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;

struct Launcher {
    folders: TempDir,
    process: Child,
    client: Option<LauncherClient>,
    events: LauncherEvents,
}

impl Launcher {
    async fn start() -> Self {
        let folders = tempfile::tempdir().unwrap();
        let socket = private_folder(folders.path()).join("launcher.sock");
        let process = Command::new(env!("CARGO_BIN_EXE_grail-gen-launcher"))
            .args(["serve", "--epoch", "3", "--socket"])
            .arg(&socket)
            .env("AWS_SECRET_ACCESS_KEY", "do-not-pass-me-on")
            .env("GRAIL_ANYTHING", "nor-me")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let (client, events) = LauncherClient::connect(&socket, &Expected::default(), LIMIT).await.unwrap();
        assert_eq!(client.hello().epoch.0, 3);
        Self { folders, process, client: Some(client), events }
    }

    fn client(&self) -> &LauncherClient {
        self.client.as_ref().unwrap()
    }

    fn checkpoint(&self, name: &str) -> PathBuf {
        copy_checkpoint(self.folders.path(), name)
    }

    async fn start_server(&self, folder: &Path) -> ReadyServer {
        self.client().start(spec(folder)).await.unwrap()
    }

    async fn server_pid(&self) -> i32 {
        i32::try_from(self.client().ping().await.unwrap().unwrap()).unwrap()
    }

    async fn until_died(&mut self) -> LauncherEvent {
        loop {
            let event = tokio::time::timeout(LIMIT, self.events.next()).await.unwrap().unwrap();
            if matches!(event, LauncherEvent::Died { .. }) {
                return event;
            }
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.process.id()).unwrap()), signal).unwrap();
    }

    fn wait(&mut self) -> ExitStatus {
        self.process.wait().unwrap()
    }

    /// A program that stands in for the builtin server.
    fn script(&self, name: &str, text: &str) -> String {
        let path = self.folders.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        // One that has ended already is what was wanted.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn spec(folder: &Path) -> ServerSpec {
    ServerSpec {
        backend: Backend::Builtin,
        program: Some(env!("CARGO_BIN_EXE_grail-builtin-server").to_owned()),
        model_path: folder.display().to_string(),
        weight_version: "w0".to_owned(),
        max_model_len: 512,
        max_running_requests: Some(8),
        gpus: vec![],
        random_seed: Some(1),
        threads: Some(1),
        start_timeout_s: LIMIT.as_secs(),
    }
}

fn failed(result: Result<impl std::fmt::Debug, RequestError>) -> (String, Severity, String) {
    match result.unwrap_err() {
        RequestError::Failed(failed) => (failed.code, failed.severity, failed.detail),
        other => panic!("{other}"),
    }
}

async fn generated(url: &str) -> (Vec<u64>, String) {
    let request = http().post(format!("{url}/generate")).json(&sample("x", 16));
    let (status, answer) = answer(request).await;
    assert_eq!(status, 200, "{answer}");
    let ids = answer["output_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    (ids, answer["meta_info"]["weight_version"].as_str().unwrap().to_owned())
}

fn maps_libtorch(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().contains("libtorch")
}

#[tokio::test]
async fn a_server_is_started_watched_and_stopped() {
    let mut launcher = Launcher::start().await;
    assert_eq!(launcher.client().ping().await.unwrap(), None);
    let folder = launcher.checkpoint("first");
    let ready = launcher.start_server(&folder).await;
    assert_eq!((ready.epoch.incarnation >> 20, ready.epoch.weights.as_str()), (3, "w0"));
    assert_eq!(generated(&ready.url).await.1, "w0");

    let mut phases = Vec::new();
    while phases.last() != Some(&ServerPhase::Ready) {
        match tokio::time::timeout(LIMIT, launcher.events.next()).await.unwrap().unwrap() {
            LauncherEvent::Phase { phase, .. } => phases.push(phase),
            LauncherEvent::Died { cause, .. } => panic!("{cause}"),
        }
    }
    assert_eq!(phases[0], ServerPhase::Spawned);
    for phase in [ServerPhase::Listening, ServerPhase::LoadingWeights, ServerPhase::WarmingUp] {
        assert!(phases.contains(&phase), "{phases:?}");
    }

    let pid = launcher.server_pid().await;
    assert!(maps_libtorch(pid));
    assert!(!maps_libtorch(i32::try_from(launcher.process.id()).unwrap()), "the launcher must not load libtorch");
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let environment = String::from_utf8_lossy(&environment).into_owned();
    assert!(environment.contains("GRAIL_GEN_INCARNATION="));
    for secret in ["do-not-pass-me-on", "nor-me"] {
        assert!(!environment.contains(secret), "{environment}");
    }

    let (code, severity, _) = failed(launcher.client().start(spec(&folder)).await);
    assert_eq!((code.as_str(), severity), ("already_running", Severity::FatalForGroup));
    launcher.client().stop().await.unwrap();
    assert!(!is_alive(pid));
    assert_eq!(launcher.client().ping().await.unwrap(), None);
    launcher.client().stop().await.unwrap();
    let again = launcher.start_server(&folder).await;
    assert!(again.epoch.incarnation > ready.epoch.incarnation);
    assert_eq!(generated(&again.url).await.0, {
        launcher.client().stop().await.unwrap();
        let third = launcher.start_server(&folder).await;
        generated(&third.url).await.0
    });
}

#[tokio::test]
async fn weights_are_updated_in_place_or_by_a_new_start() {
    let launcher = Launcher::start().await;
    let first = launcher.checkpoint("first");
    let second = launcher.checkpoint("second");
    other_weights(&second);
    let broken = launcher.checkpoint("broken");
    truncate_weights(&broken);
    let other_end = launcher.checkpoint("other_end");
    std::fs::write(other_end.join("generation_config.json"), json!({"eos_token_id": [414, 412]}).to_string()).unwrap();

    let (code, _, _) = failed(launcher.client().update(&second, "w1").await);
    assert_eq!(code, "not_running");
    let ready = launcher.start_server(&first).await;
    let pid = launcher.server_pid().await;
    let old = generated(&ready.url).await;

    let epoch = launcher.client().update(&second, "w1").await.unwrap();
    assert_eq!((epoch.incarnation, epoch.weights.as_str()), (ready.epoch.incarnation, "w1"));
    assert_eq!(launcher.server_pid().await, pid, "the same process");
    let new = generated(&ready.url).await;
    assert_eq!(new.1, "w1");
    assert_ne!(new.0, old.0);

    let (code, severity, detail) = failed(launcher.client().update(&broken, "w2").await);
    assert_eq!((code.as_str(), severity), ("bad_checkpoint", Severity::FatalForGroup));
    assert!(detail.contains("model.safetensors"), "{detail}");
    assert_eq!(generated(&ready.url).await, new, "the server is untouched");

    let epoch = launcher.client().update(&other_end, "w3").await.unwrap();
    assert!(epoch.incarnation > ready.epoch.incarnation);
    assert!(!is_alive(pid));
    assert_eq!(generated(&ready.url).await, (old.0, "w3".to_owned()), "another process on the same port");
}

#[tokio::test]
async fn a_server_that_refuses_an_update_is_replaced() {
    let launcher = Launcher::start().await;
    let first = launcher.checkpoint("first");
    let second = launcher.checkpoint("second");
    let ready = launcher.start_server(&first).await;
    // Somebody else has paused it and holds it: stop the process, so that no call is answered in time.
    let pid = launcher.server_pid().await;
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    let epoch = launcher.client().update(&second, "w1").await.unwrap();
    assert!(epoch.incarnation > ready.epoch.incarnation);
    assert!(!is_alive(pid));
    assert_eq!(generated(&ready.url).await.1, "w1");
}

#[tokio::test]
async fn a_server_that_is_killed_is_reported_and_can_be_started_again() {
    let mut launcher = Launcher::start().await;
    let folder = launcher.checkpoint("first");
    let ready = launcher.start_server(&folder).await;
    let pid = launcher.server_pid().await;
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let LauncherEvent::Died { cause, exit, signal, last_lines } = launcher.until_died().await else { unreachable!() };
    assert_eq!((exit, signal), (None, Some(9)));
    assert!(cause.contains("SIGKILL"), "{cause}");
    assert!(last_lines.iter().any(|line| line.contains("fired up")), "{last_lines:?}");
    assert_eq!(launcher.client().ping().await.unwrap(), None);
    let again = launcher.start_server(&folder).await;
    assert!(again.epoch.incarnation > ready.epoch.incarnation);
    assert_eq!(generated(&again.url).await.1, "w0");
}

#[tokio::test]
async fn starts_that_fail_say_why() {
    let launcher = Launcher::start().await;
    let folder = launcher.checkpoint("first");
    let with = |change: fn(&mut ServerSpec)| {
        let mut spec = spec(&folder);
        change(&mut spec);
        spec
    };
    let start = async |spec: ServerSpec| failed(launcher.client().start(spec).await);

    let (code, severity, detail) = start(with(|spec| spec.backend = Backend::Sglang)).await;
    assert_eq!((code.as_str(), severity), ("unsupported_backend", Severity::FatalForWorker));
    assert!(detail.contains("not supported by this build yet, use builtin"), "{detail}");
    assert_eq!(start(with(|spec| spec.model_path = "/nonexistent".to_owned())).await.0, "bad_checkpoint");
    assert_eq!(start(with(|spec| spec.max_model_len = 2_047)).await.0, "bad_spec");
    assert_eq!(start(with(|spec| spec.program = Some("/nonexistent".to_owned()))).await.0, "not_spawned");

    let dies = launcher.script("dies", "echo the disk is made of cheese >&2; exit 3");
    let (code, severity, detail) = start(ServerSpec { program: Some(dies), ..spec(&folder) }).await;
    assert_eq!((code.as_str(), severity), ("exited", Severity::Retryable));
    assert!(detail.contains("exit code 3") && detail.contains("made of cheese"), "{detail}");

    let hangs = launcher.script("hangs", "echo Load weight begin.; exec sleep 1000");
    let hanging = ServerSpec { program: Some(hangs), start_timeout_s: 1, ..spec(&folder) };
    let (code, _, detail) = start(hanging).await;
    assert_eq!(code, "start_timeout");
    assert!(detail.contains("LoadingWeights"), "{detail}");
    assert_eq!(launcher.client().ping().await.unwrap(), None);
}

#[tokio::test]
async fn a_taken_port_is_no_reason_to_give_up() {
    let launcher = Launcher::start().await;
    let folder = launcher.checkpoint("first");
    let seen = launcher.folders.path().join("seen").display().to_string();
    let text = format!(
        "if [ $(ls {seen}* 2>/dev/null | wc -l) -lt 2 ]; then mktemp {seen}XXXXXX >/dev/null; \
         echo '[Errno 98] address already in use' >&2; exit 1; fi; exec {} \"$@\"",
        env!("CARGO_BIN_EXE_grail-builtin-server")
    );
    let program = Some(launcher.script("unlucky", &text));
    let ready = launcher.client().start(ServerSpec { program, ..spec(&folder) }).await.unwrap();
    assert_eq!(generated(&ready.url).await.1, "w0");
}

#[tokio::test]
async fn a_stop_interrupts_a_start() {
    let mut launcher = Launcher::start().await;
    let folder = launcher.checkpoint("first");
    let hangs = launcher.script("hangs", "exec sleep 1000");
    let hanging = ServerSpec { program: Some(hangs), ..spec(&folder) };
    let client = launcher.client.take().unwrap();
    let starting = client.start(hanging);
    let stopping = async {
        let Some(LauncherEvent::Phase { phase: ServerPhase::Spawned, detail }) = launcher.events.next().await else {
            panic!("a start begins with a process")
        };
        client.stop().await.unwrap();
        detail
    };
    let (started, detail) = tokio::join!(starting, stopping);
    assert_eq!(failed(started).0, "interrupted");
    let pid = detail.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(!is_alive(pid));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_server_outlives_its_launcher() {
    for signal in [Some(Signal::SIGKILL), Some(Signal::SIGTERM), Some(Signal::SIGINT), None] {
        let mut launcher = Launcher::start().await;
        let folder = launcher.checkpoint("first");
        launcher.start_server(&folder).await;
        let pid = launcher.server_pid().await;
        match signal {
            Some(signal) => launcher.signal(signal),
            // The supervisor goes away.
            None => drop(launcher.client.take()),
        }
        let status = launcher.wait();
        match signal {
            Some(Signal::SIGKILL) => until_gone(pid),
            _ => {
                assert_eq!(status.code(), Some(0), "{signal:?}");
                assert!(!is_alive(pid), "{signal:?}: the launcher ends after its server");
            }
        }
    }
}

#[tokio::test]
async fn the_launcher_runs_alone() {
    let folders = tempfile::tempdir().unwrap();
    let folder = copy_checkpoint(folders.path(), "first");
    let mut process = Command::new(env!("CARGO_BIN_EXE_grail-gen-launcher"))
        .args(["run", "--max-model-len", "512", "--weight-version", "solo", "--model-path"])
        .arg(&folder)
        .args(["--program", env!("CARGO_BIN_EXE_grail-builtin-server")])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut url = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(process.stdout.as_mut().unwrap()), &mut url).unwrap();
    assert_eq!(generated(url.trim()).await.1, "solo");
    kill(Pid::from_raw(i32::try_from(process.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(0));
    assert!(http().get(format!("{}/health", url.trim())).send().await.is_err(), "nobody listens any more");
}
