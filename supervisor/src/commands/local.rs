//! The embedded default: simulated chain, directory store, demo checkpoints, CPU workers and the builtin server.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use grail_checkpoint::retention::RetentionLimits;
use grail_checkpoint::{CheckpointCache, CheckpointStore};
use grail_environments::EnvironmentId;
use grail_environments::datasets::DatasetSettings;
use grail_ipc::messages::Backend;
use grail_process::cgroup::Delegation;
use grail_process::restart::RestartPolicy;
use grail_protocol::gate::TimeGate;
use grail_protocol::keys::{DEMO_HOTKEY_URI, Keypair};
use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::CommandError;
use crate::beacon::Beacon;
use crate::chain::{Chain, LocalChain, LocalChainSettings};
use crate::checkpoints::Checkpoints;
use crate::clock::Clock;
use crate::control::socket_base;
use crate::demo::Demo;
use crate::engine::{Engine, Limits};
use crate::environments::EnvironmentSource;
use crate::evaluators::{EvaluatorSettings, Evaluators};
use crate::fleet::{Fleet, FleetSettings, ServerSettings, SlotLimits, SlotPin, WorkerSettings, sibling_program};
use crate::journal::{Event, Journal};
use crate::miner::Miner;
use crate::prefetch::Prefetcher;
use crate::progress::Progress;
use crate::record::Recording;
use crate::state::{StateDir, StateError};
use crate::store::WindowStore;
use crate::trainer::{self, LocalTrainer};

/// Settings of a local world, resolved.
#[derive(Debug, Clone)]
pub struct LocalSettings {
    pub state_dir: PathBuf,
    /// Where the folder for sockets is made.
    pub runtime_base: PathBuf,
    /// Resolved variables that children must see.
    pub child_variables: Vec<(&'static str, String)>,
    pub seed: Option<String>,
    pub block_time: Option<Duration>,
    pub use_drand: bool,
    /// Environment that the demo checkpoints name; unset = the one of an existing store, else gsm8k.
    pub environment: Option<EnvironmentId>,
    /// Where rows are looked for, before those of the demo.
    pub datasets: DatasetSettings,
    pub evaluators: EvaluatorSettings,
    /// Whether the demo checkpoints are published into the local store; without, it must hold some.
    pub trainer: bool,
    /// One a worker; all on the CPU, or all on GPUs.
    pub pins: Vec<SlotPin>,
    pub slot_limits: SlotLimits,
    /// Most groups in generation at once; unset = as many as requests allow.
    pub generating_groups: Option<usize>,
    pub max_groups: usize,
    pub max_file_bytes: u64,
    pub safety_blocks: u32,
    pub max_model_len: u32,
    pub max_concurrent: Option<usize>,
    pub max_num_seqs: Option<u32>,
    pub server_timeout: Duration,
    /// Longest attempt to upload a window file.
    pub upload_timeout: Duration,
    /// How long the groups under way may take once it is told to stop.
    pub shutdown_limit: Duration,
    /// How long the files of a window that is over are kept.
    pub keep_windows: Duration,
    /// What the cache of checkpoints keeps beside those in use.
    pub keep_checkpoints: RetentionLimits,
    /// Where groups are recorded; unset = they are not.
    pub record: Option<PathBuf>,
}

/// Requests in flight at the builtin server when nothing else is configured: its own batch.
const BUILTIN_CONCURRENT: usize = 64;

/// A local world, ready to mine in.
#[derive(Debug)]
pub struct LocalWorld {
    pub miner: Miner,
    pub prefetcher: Prefetcher,
    pub trainer: Option<LocalTrainer>,
    /// Events of the children, for the journal.
    pub events: mpsc::UnboundedReceiver<Event>,
    pub progress: Arc<Progress>,
    pub started: Instant,
}

/// Folder for the sockets of this process.
pub(super) fn runtime_dir(base: &Path, purpose: &str) -> PathBuf {
    socket_base(base).join(format!("grail-{purpose}-{}", std::process::id()))
}

/// Opens or makes the world of `settings`.
///
/// # Errors
/// [`CommandError`] names what is missing or cannot be written.
pub async fn open(settings: &LocalSettings) -> Result<LocalWorld, CommandError> {
    let state = StateDir::open(&settings.state_dir)?;
    let objects = open_store(&state.store())?;
    let checkpoint_store = CheckpointStore::new(objects.clone());
    let mut demo = Demo::unpack(&state.demo())?;
    if settings.trainer {
        let environment = trainer::environment(&checkpoint_store, settings.environment).await?;
        demo = demo.for_environment(environment)?;
        if environment == EnvironmentId::Math && settings.datasets.source(environment).path.is_none() {
            tracing::warn!("The rows of math are a stand-in of made-up problems: no package may ship the real ones.");
        }
    }
    let chain_settings = LocalChainSettings { seed: settings.seed.clone(), block_time: settings.block_time };
    let mut trainer = None;
    if settings.trainer {
        let publisher = LocalTrainer { store: checkpoint_store.clone(), demo: demo.clone() };
        publisher.publish_first().await?;
        trainer = Some(publisher);
    }
    // Publishing takes a moment, so the clock of a new chain starts behind it.
    let clock = Clock::system();
    let local = Arc::new(LocalChain::open_or_start(state.root(), &chain_settings, &clock)?);
    let chain: Arc<dyn Chain> = local.clone();
    let beacon = if settings.use_drand { Beacon::Local(local) } else { Beacon::BlockHashOnly };

    let progress = Arc::new(Progress::default());
    let in_state = |action| move |source| StateError::io(action, &settings.state_dir, source);
    let uploads = crate::journal::uploads(state.root()).map_err(in_state("read the journal in"))?;
    let mut gate = TimeGate::new(settings.safety_blocks).with_block_time(chain.nominal_block_time());
    if let Some(upload) = uploads.into_values().next_back() {
        if let Some(took_ms) = upload.took_ms {
            gate.record_upload(Duration::from_millis(took_ms));
        }
        progress.remember_upload(upload);
    }
    let journal = Journal::open(state.root(), clock.clone()).map_err(in_state("open the journal in"))?;
    let mut journal = journal.followed_by(progress.clone());
    journal.record(Event::Started { pid: std::process::id(), build: env!("CARGO_PKG_VERSION").to_owned() });
    // What supervisors that are dead have left in it may take seconds to end.
    let delegation = tokio::task::spawn_blocking(|| Delegation::open(Path::new("/")));
    let delegation = delegation.await.map_err(CommandError::Task)?.map(Arc::new);
    let (notes, events) = mpsc::unbounded_channel();
    let started = Instant::now();
    let signer = Arc::new(Keypair::from_uri(DEMO_HOTKEY_URI)?);
    let engine = Engine {
        chain: chain.clone(),
        store: WindowStore::new(objects, settings.upload_timeout),
        spool_dir: state.spool(),
        windows_dir: state.windows(),
        limits: limits(settings),
        gate,
        journal,
        clock,
        hotkey: signer.hotkey().clone(),
        started,
    };
    let cache = CheckpointCache::open(state.checkpoints())?;
    let checkpoints = Checkpoints::new(checkpoint_store, cache, settings.keep_checkpoints);
    let evaluators = EvaluatorSettings { delegation: delegation.clone(), ..settings.evaluators.clone() };
    let evaluators = Arc::new(Evaluators::new(evaluators));
    let fleet = Fleet::new(fleet_settings(settings, delegation)?, notes.clone(), progress.clone());
    let environments = Arc::new(EnvironmentSource::new(demo.datasets(settings.datasets.clone()), evaluators));
    let prefetcher = Prefetcher {
        checkpoints: checkpoints.clone(),
        chain: chain.clone(),
        fleet: fleet.handle(),
        environments: environments.clone(),
        journal: notes,
    };
    let miner = Miner {
        checkpoints,
        environments,
        fleet,
        signer,
        progress: progress.clone(),
        state,
        chain,
        beacon,
        engine,
        recording: Recording::into_folder(settings.record.clone()),
    };
    Ok(LocalWorld { miner, prefetcher, trainer, events, progress, started })
}

/// The directory store under `path`.
///
/// # Errors
/// If the folder cannot be made or opened.
pub fn open_store(path: &Path) -> Result<Arc<dyn ObjectStore>, CommandError> {
    let failed = |source| CommandError::Store { path: path.to_owned(), source };
    std::fs::create_dir_all(path)
        .map_err(|error| failed(object_store::Error::Generic { store: "local", source: error.into() }))?;
    // What the journal says is there must be there after a loss of power.
    Ok(Arc::new(LocalFileSystem::new_with_prefix(path).map_err(failed)?.with_fsync(true)))
}

fn limits(settings: &LocalSettings) -> Limits {
    let concurrent = settings.max_concurrent.unwrap_or(BUILTIN_CONCURRENT);
    let (intake, open_groups) = crate::engine::flow_limits(concurrent, settings.generating_groups, settings.pins.len());
    Limits { intake, open_groups, max_groups: settings.max_groups, max_file_bytes: settings.max_file_bytes }
}

fn fleet_settings(
    settings: &LocalSettings,
    delegation: Option<Arc<Delegation>>,
) -> Result<FleetSettings, CommandError> {
    Ok(FleetSettings {
        runtime_dir: runtime_dir(&settings.runtime_base, "mine"),
        workers: WorkerSettings {
            delegation: delegation.clone(),
            limits: settings.slot_limits.clone(),
            ..worker_settings(settings.pins.clone(), &settings.child_variables)?
        },
        server: ServerSettings {
            launcher: sibling_program("grail-gen-launcher")?,
            variables: settings.child_variables.clone(),
            backend: Backend::Builtin,
            max_model_len: settings.max_model_len,
            max_running_requests: settings.max_num_seqs.or_else(|| u32::try_from(BUILTIN_CONCURRENT).ok()),
            gpus: Vec::new(),
            random_seed: None,
            threads: Some(1),
            start_limit: settings.server_timeout,
            max_concurrent: settings.max_concurrent.unwrap_or(BUILTIN_CONCURRENT),
            request_limit: settings.server_timeout,
            heartbeat: settings.slot_limits.heartbeat,
            restart: RestartPolicy::default(),
            delegation,
        },
    })
}

/// Workers where `pins` say; those on the CPU share its cores evenly.
///
/// # Errors
/// If the worker's program is missing.
pub fn worker_settings(
    pins: Vec<SlotPin>,
    variables: &[(&'static str, String)],
) -> Result<WorkerSettings, CommandError> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let on_cpu = pins.iter().all(|pin| pin.visible.is_none());
    Ok(WorkerSettings {
        program: sibling_program("grail-proof-worker")?,
        variables: variables.to_vec(),
        dtype: if on_cpu { "float32" } else { "bfloat16" },
        threads: (cores / pins.len().max(1)).max(1),
        pins,
        limits: SlotLimits::default(),
        delegation: None,
    })
}
