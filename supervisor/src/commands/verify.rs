//! `verify`: one file with its context, or all windows of a local world.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use grail_checkpoint::CheckpointStore;
use grail_environments::datasets::DatasetSettings;
use grail_ipc::WorkerClient;
use grail_protocol::ids::WindowStart;
use grail_protocol::randomness::ChallengeRandomness;
use grail_protocol::validation::Report;
use grail_protocol::window_file::{ReadError, read_bytes};
use serde::Serialize;

use super::CommandError;
use super::local::{open_store, runtime_dir, worker_settings};
use crate::beacon::Beacon;
use crate::chain::LocalChain;
use crate::clock::Clock;
use crate::evaluators::{EvaluatorSettings, Evaluators};
use crate::fleet::{self, SlotPin, Target, Workers};
use crate::state;
use crate::store::{WindowStore, window_key};
use crate::verify::context::{self, Context, ContextError};
use crate::verify::{RowSources, Verification, Verified, VerifyError, table};

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
    pub judge: JudgeSettings,
}

/// Where and how files are judged.
#[derive(Debug, Clone)]
pub struct JudgeSettings {
    /// Where the worker runs that computes rows again.
    pub pin: SlotPin,
    /// Where the folder for sockets is made.
    pub runtime_base: PathBuf,
    /// Resolved variables that the worker must see.
    pub variables: Vec<(&'static str, String)>,
    /// Where rows are looked for that no context names.
    pub datasets: DatasetSettings,
    pub evaluators: EvaluatorSettings,
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
    // A file that is no window file gets its verdict whether or not there is a context for it.
    if let Err(error) = read_bytes(content.clone()) {
        return Ok(Verified { report: Report::of_read_error(&error), shares: None });
    }
    let path = options.context.clone().unwrap_or_else(|| Context::path_beside(&options.file));
    if !path.exists() {
        let detail = "no such context; mine writes one beside each window file, or name one with --context".to_owned();
        return Err(CommandError::NoContext { path, detail });
    }
    let mut context = Context::read(&path)?;
    if let Some(model) = &options.model {
        context.model_dir.clone_from(model);
    }
    let stated = context.challenge_randomness.as_deref().map(|text| context::challenge_of(&path, text)).transpose()?;
    let challenge = match options.challenge.clone().or(stated) {
        Some(challenge) => challenge,
        None => fresh_challenge()?,
    };
    let evaluators = Arc::new(Evaluators::new(options.judge.evaluators.clone()));
    let mut sources = RowSources::new(options.judge.datasets.clone(), evaluators.clone());
    let verification = Verification::open(context, &path, &mut sources).await?;
    let verified = judge(&verification, content, challenge, &options.judge).await;
    evaluators.shut_down().await;
    verified
}

fn read_window_file(path: &Path) -> Result<Bytes, CommandError> {
    match std::fs::read(path) {
        Ok(content) => Ok(content.into()),
        // A window file that is there always gets a verdict.
        Err(source) => Err(CommandError::WindowFile { path: path.to_owned(), source }),
    }
}

/// 32 bytes of the system's randomness, so that nobody can know which rows are looked at.
fn fresh_challenge() -> Result<ChallengeRandomness, CommandError> {
    let token = grail_ipc::Token::generate().map_err(CommandError::Randomness)?;
    Ok(ChallengeRandomness::from_bytes(token.as_bytes()))
}

async fn judge(
    verification: &Verification,
    content: Bytes,
    challenge: ChallengeRandomness,
    settings: &JudgeSettings,
) -> Result<Verified, CommandError> {
    let mut workers: Option<Workers> = None;
    let folder = verification.context().model_dir.clone();
    let checkpoint = verification.context().checkpoint_window;
    let runtime = runtime_dir(&settings.runtime_base, "verify");
    let start = || async {
        let mut worker = worker_settings(vec![settings.pin.clone()], &settings.variables)?;
        worker.dtype = verification.dtype();
        let hashed = folder.clone();
        let hash = move || grail_checkpoint::WeightsFiles::open(&hashed)?.hash();
        let weights = tokio::task::spawn_blocking(hash).await.map_err(VerifyError::from)?;
        let weights = weights.map_err(|source| CommandError::Weights { source })?;
        let target = Target::from_folder(checkpoint, folder, weights);
        let (running, client) = fleet::single_worker(&worker, &runtime, target).await?;
        workers = Some(running);
        Ok::<Arc<WorkerClient>, CommandError>(client)
    };
    let verified = verification.run(content, challenge, start).await;
    if let Some(workers) = workers {
        workers.shut_down().await;
        drop(std::fs::remove_dir_all(&runtime));
    }
    verified
}

/// Verifies every window of a local world as a validator does: from the store, with the challenge of the block after it.
///
/// # Errors
/// [`CommandError`] if there is nothing to verify or no verdict was reached.
pub async fn local(
    state_dir: &Path,
    challenge: Option<ChallengeRandomness>,
    settings: &JudgeSettings,
) -> Result<LocalVerdicts, CommandError> {
    let evaluators = Arc::new(Evaluators::new(settings.evaluators.clone()));
    let verdicts = judge_all(state_dir, challenge, settings, &evaluators).await;
    evaluators.shut_down().await;
    verdicts
}

/// Longest attempt to read a window file.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(90);

async fn judge_all(
    state_dir: &Path,
    challenge: Option<ChallengeRandomness>,
    settings: &JudgeSettings,
    evaluators: &Arc<Evaluators>,
) -> Result<LocalVerdicts, CommandError> {
    let chain = Arc::new(LocalChain::open(state_dir, &Clock::system())?);
    let beacon = Beacon::Local(chain.clone());
    let objects = open_store(&state::store_of(state_dir))?;
    let checkpoints = CheckpointStore::new(objects.clone());
    let store = WindowStore::new(objects, ATTEMPT_LIMIT);
    let mut sources = RowSources::new(settings.datasets.clone(), evaluators.clone());
    let mut windows = Vec::new();
    for path in contexts(&state::windows_of(state_dir))? {
        let context = Context::read(&path)?;
        let (window, key) = (context.window, window_key(&context.hotkey, context.window));
        check_facts(&context, &path, &chain, &checkpoints).await?;
        let content = match store.get(&key).await {
            Ok(content) => content,
            // What is not in the store counts as absent, for a validator and here.
            Err(object_store::Error::NotFound { .. }) => {
                let absent = ReadError::Absent { detail: format!("{key} is not in the store") };
                let verified = Verified { report: Report::of_read_error(&absent), shares: None };
                windows.push(WindowVerdict { window, file: window_file_of(&path), verified });
                continue;
            }
            Err(source) => return Err(CommandError::Store { path: key.to_string().into(), source }),
        };
        // The hash of a simulated block is known at any time; a validator would wait for it.
        let hash = LocalChain::hash_of(chain.seed(), window.end());
        let challenge = challenge.clone().unwrap_or_else(|| beacon.challenge_randomness(&hash, window.end()));
        let verification = Verification::open(context, &path, &mut sources).await?;
        let verified = judge(&verification, content, challenge, settings).await?;
        let file = window_file_of(&path);
        windows.push(WindowVerdict { window, file, verified });
    }
    if windows.is_empty() {
        let detail = "no window file is there; run `grail-supervisor mine --local` first".to_owned();
        return Err(CommandError::NoContext { path: state::windows_of(state_dir), detail });
    }
    Ok(LocalVerdicts { schema: LOCAL_SCHEMA, windows })
}

/// Chain and store, not the miner's word, say which block hash and which checkpoint belong to a window.
async fn check_facts(
    context: &Context,
    path: &Path,
    chain: &LocalChain,
    checkpoints: &CheckpointStore,
) -> Result<(), CommandError> {
    let contradiction = |field, stated: String, found: String, source_file: PathBuf| {
        CommandError::Context(ContextError::Contradiction { path: path.to_owned(), field, stated, found, source_file })
    };
    let hash = LocalChain::hash_of(chain.seed(), context.window.block());
    if context.window_hash != hash {
        let (stated, found) = (context.window_hash.to_string(), hash.to_string());
        return Err(contradiction("window_hash", stated, found, PathBuf::from("the local chain")));
    }
    let chosen = checkpoints.choose(context.window).await.map_err(CommandError::Choose)?.checkpoint;
    if context.checkpoint_window != chosen {
        let (stated, found) = (context.checkpoint_window.to_string(), chosen.to_string());
        return Err(contradiction("checkpoint_window", stated, found, PathBuf::from("the local store")));
    }
    Ok(())
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
