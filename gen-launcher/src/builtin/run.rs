//! Life of the server's process: bind, load, serve, drain.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::hash::{BuildHasher, RandomState};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use grail_process::fault::{Armed, FaultPlan};
use grail_process::with_causes;
use grail_text::Tokenizer;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::args::{self, ServerArgs};
use super::backend::{BackendError, DecodeBackend};
use super::clock::mark;
use super::engine::Engine;
use super::http::{App, Phase, router};
use super::limits::Limits;
use super::scheduler::{Bounds, SPARE_SLOTS, Scheduler};
use super::serving::{Current, Fixed, Loaded, Loader, Serving};
use super::torch::{self, DecoderOptions};
use grail_gen_launcher::folder::CheckpointFolder;

/// What a generation server is to faults that name a slot or an incarnation.
const FAULT_SLOT: u32 = 0;
const FAULT_EPOCH: u64 = 0;

/// How the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ServerExit {
    /// Help or version was asked for.
    Done = 0,
    /// The model cannot be loaded, or the port not bound.
    NotStarted = 1,
    /// The command line is wrong.
    Usage = 2,
    /// The model failed while it generated.
    ModelFailed = 70,
    /// SIGINT.
    Interrupted = 130,
    /// SIGTERM, after the last request.
    Terminated = 143,
}

impl From<ServerExit> for std::process::ExitCode {
    fn from(exit: ServerExit) -> Self {
        Self::from(exit as u8)
    }
}

/// What ends a server before its time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum RunError {
    #[error("Initialization failed. bind {host}:{port}: {text}")]
    Bind { host: std::net::IpAddr, port: u16, text: String },
    #[error("Initialization failed. {0}")]
    Load(String),
    #[error("Initialization failed. {what}")]
    System {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("Scheduler hit an exception: {0}")]
    Model(#[from] BackendError),
}

impl RunError {
    const fn exit(&self) -> ServerExit {
        match self {
            Self::Bind { .. } | Self::Load(_) | Self::System { .. } => ServerExit::NotStarted,
            Self::Model(_) => ServerExit::ModelFailed,
        }
    }
}

/// Runs the server to its end. `line` is the command line, the program's name first.
pub fn run(line: impl IntoIterator<Item = OsString>) -> ServerExit {
    let (args, ignored) = match args::parse(line) {
        Ok(parsed) => parsed,
        Err(error) => {
            if error.print().is_err() {
                return ServerExit::Usage;
            }
            return if error.exit_code() == 0 { ServerExit::Done } else { ServerExit::Usage };
        }
    };
    if let Some(parent) = args.idle_child_of {
        idle(Pid::from_raw(parent));
        return ServerExit::Done;
    }
    for flag in ignored {
        mark(&format!("Ignored the unknown flag {flag}."));
    }
    let faults = match FaultPlan::from_environment() {
        Ok(plan) => {
            if !plan.is_empty() {
                mark(&format!("Faults will be injected into this server: {plan}."));
            }
            Arc::new(plan.armed(FAULT_SLOT, FAULT_EPOCH))
        }
        Err(error) => {
            mark(&with_causes(&error));
            return ServerExit::Usage;
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(serve(args, faults));
            // Connections and a load that is under way are of no use any more.
            runtime.shutdown_background();
            ended
        }
        Err(source) => Err(RunError::System { what: "start the runtime", source }),
    };
    ended.unwrap_or_else(|error| {
        mark(&with_causes(&error));
        error.exit()
    })
}

/// Stays until it is killed; dies with its parent, as SGLang's schedulers do.
fn idle(parent: Pid) {
    if nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).is_err() {
        return;
    }
    while nix::unistd::getppid() == parent {
        nix::unistd::pause();
    }
}

async fn serve(args: ServerArgs, faults: Arc<Armed>) -> Result<ServerExit, RunError> {
    let listen = |what| move |source| RunError::System { what, source };
    let mut terminate = signal(SignalKind::terminate()).map_err(listen("listen for SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(listen("listen for SIGINT"))?;
    let mut quit = signal(SignalKind::quit()).map_err(listen("listen for SIGQUIT"))?;
    let mut children = Children::start(args.spawn_children).map_err(listen("start idle children"))?;

    mark(&format!("server_args=ServerArgs({args:?})"));
    let (host, port) = (args.host, args.port);
    let listener = TcpListener::bind((host, port)).await.map_err(|source| {
        let text = match source.kind() {
            std::io::ErrorKind::AddrInUse => "[Errno 98] address already in use".to_owned(),
            _ => source.to_string(),
        };
        RunError::Bind { host, port, text }
    })?;
    let address = listener.local_addr().map_err(listen("read the own address"))?;
    mark(&format!("INFO:     Uvicorn running on http://{address} (Press CTRL+C to quit)"));

    let drain_poll = Duration::from_millis(args.drain_poll_ms.max(1));
    let app = Arc::new(App::new(args));
    let endpoints = router(Arc::clone(&app));
    let server = tokio::spawn(async move { axum::serve(listener, endpoints).await });
    let (ended, mut has_ended) = oneshot::channel();
    let mut start = Box::pin(start(Arc::clone(&app), faults, ended));
    let mut engine = None;
    let exit = loop {
        tokio::select! {
            started = &mut start, if engine.is_none() => {
                engine = Some(started?);
                app.phase.send_replace(Phase::Serving);
                mark("The server is fired up and ready to roll!");
            }
            _ = &mut has_ended, if engine.is_some() => break ServerExit::ModelFailed,
            _ = terminate.recv() => {
                drain(&app, drain_poll, &mut quit).await;
                break ServerExit::Terminated;
            }
            _ = interrupt.recv() => break ServerExit::Interrupted,
            _ = quit.recv() => {
                mark("SIGQUIT received. Killing the whole tree at once.");
                children.kill();
                kill_self();
            }
        }
    };
    drop(start);
    children.kill();
    let joined = engine.map_or(Ok(()), Engine::join);
    server.abort();
    joined?;
    Ok(exit)
}

/// Waits until no request is left; SIGQUIT cuts it short.
async fn drain(app: &App, poll: Duration, quit: &mut tokio::signal::unix::Signal) {
    app.phase.send_replace(Phase::Draining);
    loop {
        let remaining = app.serving.get().map_or(0, |serving| serving.requests());
        mark(&format!("Gracefully exiting... Remaining number of requests {remaining}."));
        if remaining == 0 {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(poll) => {}
            _ = quit.recv() => return,
        }
    }
}

fn kill_self() {
    if let Err(error) = nix::sys::signal::kill(Pid::this(), Signal::SIGKILL) {
        mark(&format!("Cannot kill myself: {error}"));
    }
}

/// Loads the model, starts the decode thread and generates a first token.
async fn start(app: Arc<App>, faults: Arc<Armed>, ended: oneshot::Sender<()>) -> Result<Engine, RunError> {
    let args = &app.args;
    if let Some(threads) = args.threads {
        grail_model::set_threads(threads);
    }
    let begun = Instant::now();
    mark(&format!("Load weight begin. avail mem={}", available_memory()));
    let options = options(args)?;
    let loader: Arc<Loader> = Arc::new(move |folder: &Path| {
        // Headers first: their errors are clearer, and an update compares the folders.
        let folder = CheckpointFolder::open(folder)?;
        let backend = torch::load(folder.path(), options)?;
        Ok(Loaded { folder, backend })
    });
    let first = Arc::clone(&loader);
    let model_path = args.model_path.clone();
    let loaded = tokio::task::spawn_blocking(move || first(&model_path)).await;
    let Loaded { folder, backend } = match loaded {
        Ok(Ok(loaded)) => loaded,
        Ok(Err(error)) => return Err(RunError::Load(with_causes(&*error))),
        Err(panic) => return Err(RunError::Load(panic.to_string())),
    };
    mark(&format!(
        "Load weight end. elapsed={:.2} s, type={}, avail mem={}.",
        begun.elapsed().as_secs_f64(),
        folder.field("architectures").get(0).and_then(|name| name.as_str()).unwrap_or("unknown"),
        available_memory()
    ));
    let fixed = fixed(args, options.context_length, &folder, &*backend)?;
    mark(&format!("KV Cache is allocated. dtype: {}, #tokens: {}", args.dtype, fixed.limits.kv_tokens));
    mark(&format!(
        "max_total_num_tokens={}, max_running_requests={}, context_len={}",
        fixed.limits.kv_tokens, fixed.max_running, fixed.limits.context_length
    ));
    let bounds = Bounds { max_running: fixed.max_running, kv_tokens: fixed.limits.kv_tokens };
    let step_time = args.step_ms.map(Duration::from_millis);
    let engine = Engine::start(Scheduler::new(backend, bounds), step_time, ended)
        .map_err(|source| RunError::System { what: "start the decode thread", source })?;
    let current = Current::new(folder, args.served_model_name.clone(), args.weight_version.clone());
    let serving = Arc::new(Serving::new(fixed, engine.handle(), current, loader).with_faults(faults));
    if !serving.is_healthy(Duration::from_secs(600)).await {
        return Err(match engine.join() {
            Err(error) => RunError::Load(format!("warmup error: {error}")),
            Ok(()) => RunError::Load("warmup error: no token came".to_owned()),
        });
    }
    if app.serving.set(serving).is_err() {
        unreachable!("a server starts once");
    }
    Ok(engine)
}

fn options(args: &ServerArgs) -> Result<DecoderOptions, RunError> {
    // Read before the weights: the context length sizes the cache.
    let config =
        grail_model::ModelConfig::from_dir(&args.model_path).map_err(|error| RunError::Load(with_causes(&error)))?;
    let derived = config.max_position_embeddings;
    let context_length = args.context_length.unwrap_or(derived);
    if context_length > derived {
        return Err(RunError::Load(format!(
            "User-specified context_length ({context_length}) is greater than the derived context_length ({derived}). \
             Lower --context-length."
        )));
    }
    Ok(DecoderOptions { slots: args.max_running_requests + SPARE_SLOTS, context_length, dtype: args.dtype.dtype() })
}

fn fixed(
    args: &ServerArgs,
    context_length: usize,
    folder: &CheckpointFolder,
    backend: &dyn DecodeBackend,
) -> Result<Fixed, RunError> {
    let vocab_size = backend.vocab_size();
    if u32::try_from(vocab_size).is_err() {
        return Err(RunError::Load(format!("a vocabulary of {vocab_size} tokens is not supported")));
    }
    let tokenizer = if args.skip_tokenizer_init {
        None
    } else {
        let loaded = Tokenizer::from_dir(folder.path());
        Some(loaded.map_err(|error| RunError::Load(format!("Can't load tokenizer: {}", with_causes(&error))))?)
    };
    let mut eos_tokens: BTreeSet<_> = folder.eos_tokens().clone();
    eos_tokens.extend(tokenizer.as_ref().and_then(Tokenizer::eos_token_id));
    if eos_tokens.is_empty() {
        mark("No end token is known: samples end by length only.");
    }
    let kv_tokens = args.kv_tokens.unwrap_or(context_length * args.max_running_requests);
    Ok(Fixed {
        limits: Limits { context_length, kv_tokens, vocab_size },
        max_running: args.max_running_requests,
        tokenizer,
        tokenizer_path: args.model_path.clone(),
        eos_tokens,
        random_seed: args.random_seed.unwrap_or_else(|| RandomState::new().hash_one(std::process::id())),
    })
}

/// Memory that the host can give, as a log mark says it.
fn available_memory() -> String {
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()
    });
    available.map_or_else(|| "unknown".to_owned(), |kilobytes| format!("{:.2} GB", kilobytes / 1024.0 / 1024.0))
}

/// Processes that do nothing, so that stopping a server means stopping a tree.
#[derive(Debug)]
struct Children(Vec<Child>);

impl Children {
    fn start(count: u32) -> std::io::Result<Self> {
        let mut children = Self(Vec::new());
        for index in 0..count {
            let child = Command::new(std::env::current_exe()?)
                .arg0(format!("sglang::scheduler_TP{index}"))
                .args(["--model-path", "", "--idle-child-of"])
                .arg(std::process::id().to_string())
                .stdin(Stdio::null())
                .spawn();
            match child {
                Ok(child) => children.0.push(child),
                Err(error) => {
                    children.kill();
                    return Err(error);
                }
            }
        }
        Ok(children)
    }

    fn kill(&mut self) {
        for mut child in self.0.drain(..) {
            if let Err(error) = child.kill().and_then(|()| child.wait()) {
                mark(&format!("Cannot end child {}: {error}", child.id()));
            }
        }
    }
}
