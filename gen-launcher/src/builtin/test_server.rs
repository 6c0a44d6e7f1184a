//! A server over the fake model, on a loopback port, for tests of the HTTP interface.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use grail_process::fault::Armed;
use grail_protocol::ids::TokenId;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use super::args;
use super::backend::fake::FakeBackend;
use super::engine::Engine;
use super::http::{App, Phase, router};
use super::limits::Limits;
use super::scheduler::{Bounds, SPARE_SLOTS, Scheduler};
use super::serving::{Current, Fixed, Loaded, Loader, Serving};
use grail_gen_launcher::folder::CheckpointFolder;

/// How the server is set up.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub(super) vocab_size: usize,
    pub(super) context_length: usize,
    pub(super) max_running: usize,
    pub(super) step: Duration,
    pub(super) eos_tokens: BTreeSet<TokenId>,
    pub(super) faults: Arc<Armed>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            vocab_size: 32,
            context_length: 4104,
            max_running: 8,
            step: Duration::ZERO,
            eos_tokens: BTreeSet::new(),
            faults: Arc::default(),
        }
    }
}

/// A running server and two folders that it can load.
pub(super) struct TestServer {
    pub(super) folders: tempfile::TempDir,
    pub(super) app: Arc<App>,
    url: String,
    http: reqwest::Client,
    _task: AbortOnDropHandle<()>,
    engine: Option<Engine>,
    /// While it is set, loading waits.
    pub(super) hold_loading: Arc<AtomicBool>,
}

/// Copies the golden checkpoint under a name.
fn copy_checkpoint(into: &Path, name: &str) -> PathBuf {
    let folder = into.join(name);
    std::fs::create_dir(&folder).unwrap();
    for file in
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    {
        std::fs::copy(grail_golden::path("models/qwen2-tied").join(file), folder.join(file)).unwrap();
    }
    folder
}

impl TestServer {
    pub(super) async fn start(setup: Setup) -> Self {
        let folders = tempfile::tempdir().unwrap();
        let first = copy_checkpoint(folders.path(), "ckpt0");
        copy_checkpoint(folders.path(), "ckpt1");
        let hold_loading = Arc::new(AtomicBool::new(false));
        let held = Arc::clone(&hold_loading);
        let Setup { vocab_size, context_length, max_running, step, eos_tokens, faults } = setup;
        let loader: Arc<Loader> = Arc::new(move |path: &Path| {
            let folder = CheckpointFolder::open(path)?;
            while held.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            let salt = path.to_string_lossy().bytes().map(u64::from).sum();
            let backend = FakeBackend { vocab_size, salt, ..FakeBackend::new(max_running + SPARE_SLOTS) };
            Ok(Loaded { folder, backend: Box::new(backend) })
        });
        let Loaded { folder, backend } = loader(&first).unwrap();
        let kv_tokens = 400_000;
        let scheduler = Scheduler::new(backend, Bounds { max_running, kv_tokens });
        let (ended, _) = oneshot::channel();
        let engine = Engine::start(scheduler, Some(step), ended).unwrap();
        let fixed = Fixed {
            limits: Limits { context_length, kv_tokens, vocab_size },
            max_running,
            tokenizer: Some(grail_text::Tokenizer::from_dir(&first).unwrap()),
            tokenizer_path: first.clone(),
            eos_tokens,
            random_seed: 5,
        };
        let line = ["server", "--model-path", first.to_str().unwrap(), "--weight-version", "ckpt0"];
        let (args, _) = args::parse(line.map(Into::into)).unwrap();
        let app = Arc::new(App::new(args));
        let current = Current::new(folder, Some("tiny".to_owned()), "ckpt0".to_owned());
        let serving = Serving::new(fixed, engine.handle(), current, loader).with_faults(faults);
        app.serving.set(Arc::new(serving)).unwrap();
        app.phase.send_replace(Phase::Serving);
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let endpoints = router(Arc::clone(&app));
        let task = tokio::spawn(async move { axum::serve(listener, endpoints).await.unwrap() });
        Self {
            folders,
            app,
            url,
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
            _task: AbortOnDropHandle::new(task),
            engine: Some(engine),
            hold_loading,
        }
    }

    pub(super) fn serving(&self) -> &Arc<Serving> {
        self.app.serving.get().unwrap()
    }

    pub(super) fn folder(&self, name: &str) -> String {
        self.folders.path().join(name).display().to_string()
    }

    /// Status and body; a body that is no JSON comes as a string.
    pub(super) fn get(&self, path: &str) -> impl Future<Output = (u16, Value)> + use<> {
        answer(self.http.get(format!("{}{path}", self.url)))
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> impl Future<Output = (u16, Value)> + use<> {
        answer(self.http.post(format!("{}{path}", self.url)).json(body))
    }

    /// Waits until so many requests run and wait.
    pub(super) async fn until_load(&self, running: usize, waiting: usize) {
        loop {
            let load = self.serving().engine().load();
            if (load.running, load.waiting) == (running, waiting) {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    pub(super) fn end(mut self) {
        self.engine.take().unwrap().join().unwrap();
    }
}

async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}
