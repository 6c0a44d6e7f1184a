//! `verify`: one file with its context, or all windows of a local world.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use grail_ipc::WorkerClient;
use grail_protocol::ids::WindowStart;
use grail_protocol::randomness::ChallengeRandomness;
use serde::Serialize;

use super::CommandError;
use super::local::{open_store, runtime_dir, worker_settings};
use crate::beacon::Beacon;
use crate::chain::LocalChain;
use crate::fleet::{self, Target, Workers};
use crate::state;
use crate::store::{WindowStore, window_key};
use crate::verify::context::Context;
use crate::verify::{Verification, Verified, VerifyError, table};

/// Number of the JSON shape of `verify --local`.
const LOCAL_SCHEMA: u32 = 1;

/// What to verify a single file with.
#[derive(Debug, Clone)]
pub struct FileOptions {
    pub file: PathBuf,
    /// Unset = `<file>.context.json`.
    pub context: Option<PathBuf>,
    /// Folder of the model to check with, in place of the context's.
    pub model: Option<PathBuf>,
    pub challenge: Option<ChallengeRandomness>,
    pub device: String,
}

/// The verdict on one window of a local world.
#[derive(Debug, Serialize)]
pub struct WindowVerdict {
    pub window: WindowStart,
    pub file: PathBuf,
    #[serde(flatten)]
    pub verified: Verified,
}

/// The verdicts on all windows of a local world.
#[derive(Debug, Serialize)]
pub struct LocalVerdicts {
    pub schema: u32,
    pub windows: Vec<WindowVerdict>,
}

impl LocalVerdicts {
    /// Whether every window is accepted.
    #[must_use]
    pub fn is_accepted(&self) -> bool {
        self.windows.iter().all(|window| window.verified.report.is_accepted())
    }

    /// All verdicts as text.
    #[must_use]
    pub fn render(&self) -> String {
        let window = |window: &WindowVerdict| {
            format!("window {}  {}\n{}", window.window, window.file.display(), table::render(&window.verified))
        };
        self.windows.iter().map(window).collect::<Vec<_>>().join("\n")
    }
}

/// Verifies one file.
///
/// # Errors
/// [`CommandError`] if no verdict was reached; a bad file is a verdict.
pub async fn file(options: &FileOptions) -> Result<Verified, CommandError> {
    let content = read_window_file(&options.file)?;
    let path = options.context.clone().unwrap_or_else(|| Context::path_beside(&options.file));
    if !path.exists() {
        let detail = "no such context; mine writes one beside each window file, or name one with --context".to_owned();
        return Err(CommandError::NoContext { path, detail });
    }
    let mut context = Context::read(&path)?;
    if let Some(model) = &options.model {
        context.model_dir.clone_from(model);
    }
    let challenge = options
        .challenge
        .clone()
        .or_else(|| context.challenge_randomness.as_ref().and_then(|text| text.parse::<ChallengeRandomness>().ok()));
    let challenge = challenge.unwrap_or_else(fresh_challenge);
    let verification = open(context, path).await?;
    judge(&verification, content, challenge, &options.device).await
}

async fn open(context: Context, path: PathBuf) -> Result<Verification, CommandError> {
    let opened = tokio::task::spawn_blocking(move || Verification::new(context, path)).await;
    Ok(opened.map_err(VerifyError::from)??)
}

fn read_window_file(path: &Path) -> Result<Bytes, CommandError> {
    match std::fs::read(path) {
        Ok(content) => Ok(content.into()),
        // A window file that is there always gets a verdict.
        Err(source) => Err(CommandError::WindowFile { path: path.to_owned(), source }),
    }
}

/// 32 bytes of the system's randomness, so that nobody can know which rows are looked at.
fn fresh_challenge() -> ChallengeRandomness {
    let token = grail_ipc::Token::generate().map(|token| *token.as_bytes()).unwrap_or_default();
    ChallengeRandomness::from_bytes(&token)
}

async fn judge(
    verification: &Verification,
    content: Bytes,
    challenge: ChallengeRandomness,
    device: &str,
) -> Result<Verified, CommandError> {
    let mut workers: Option<Workers> = None;
    let folder = verification.context().model_dir.clone();
    let checkpoint = verification.context().checkpoint_window;
    let start = || async {
        let mut settings = worker_settings(1, device)?;
        settings.dtype = dtype(&verification.context().dtype, settings.dtype);
        let hashed = folder.clone();
        let hash = move || grail_checkpoint::WeightsFiles::open(&hashed)?.hash();
        let weights = tokio::task::spawn_blocking(hash).await.map_err(VerifyError::from)?;
        let weights = weights.map_err(|source| CommandError::Weights { source })?;
        let target = Target { checkpoint, folder, weights };
        let (running, client) = fleet::single_worker(&settings, &runtime_dir("verify"), target).await?;
        workers = Some(running);
        Ok::<Arc<WorkerClient>, CommandError>(client)
    };
    let verified = verification.run(content, challenge, start).await;
    if let Some(workers) = workers {
        workers.shut_down().await;
        drop(std::fs::remove_dir_all(runtime_dir("verify")));
    }
    verified
}

/// The context's dtype decides: a file is judged in the precision that it names.
fn dtype(stated: &str, of_device: &'static str) -> &'static str {
    match stated {
        "float32" => "float32",
        "bfloat16" => "bfloat16",
        _ => of_device,
    }
}

/// Verifies every window of a local world as a validator does: from the store, with the challenge of the block after it.
///
/// # Errors
/// [`CommandError`] if there is nothing to verify or no verdict was reached.
pub async fn local(
    state_dir: &Path,
    challenge: Option<ChallengeRandomness>,
    device: &str,
) -> Result<LocalVerdicts, CommandError> {
    let chain = Arc::new(LocalChain::open(state_dir)?);
    let beacon = Beacon::Local(chain.clone());
    let store = WindowStore::new(open_store(&state::store_of(state_dir))?);
    let mut windows = Vec::new();
    for path in contexts(&state::windows_of(state_dir))? {
        let context = Context::read(&path)?;
        let (window, key) = (context.window, window_key(&context.hotkey, context.window));
        let content =
            store.get(&key).await.map_err(|source| CommandError::Store { path: key.to_string().into(), source })?;
        // The hash of a simulated block is known at any time; a validator would wait for it.
        let hash = LocalChain::hash_of(chain.seed(), window.end());
        let challenge = challenge.clone().unwrap_or_else(|| beacon.challenge_randomness(&hash, window.end()));
        let verification = open(context, path.clone()).await?;
        let verified = judge(&verification, content, challenge, device).await?;
        let file = window_file_of(&path);
        windows.push(WindowVerdict { window, file, verified });
    }
    if windows.is_empty() {
        let detail = "no window file is there; run `grail-supervisor mine --local` first".to_owned();
        return Err(CommandError::NoContext { path: state::windows_of(state_dir), detail });
    }
    Ok(LocalVerdicts { schema: LOCAL_SCHEMA, windows })
}

const CONTEXT_SUFFIX: &str = ".parquet.context.json";

/// Contexts beside window files, by window.
fn contexts(folder: &Path) -> Result<Vec<PathBuf>, CommandError> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(CommandError::WindowFile { path: folder.to_owned(), source }),
    };
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().ends_with(CONTEXT_SUFFIX))
        .collect();
    paths.sort();
    Ok(paths)
}

fn window_file_of(context: &Path) -> PathBuf {
    let text = context.to_string_lossy();
    PathBuf::from(text.strip_suffix(".context.json").unwrap_or(&text))
}
