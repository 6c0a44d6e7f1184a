//! The typed parts of the configuration, one per section of the table.

use std::path::PathBuf;
use std::time::Duration;

use grail_checkpoint::retention::RetentionLimits;
use grail_environments::EnvironmentId;
use grail_telemetry::SecretString;

use super::Mode;
use super::gpu::ProofGpus;
use super::origin::{Origin, Sourced};
use super::resolve::{
    Resolver, boolean, choice, committed, endpoints, gpu_list, http_url, integer, plain_name, plainly, seconds, share,
    shown_url, text,
};
use super::variables::{Standing, all};

const MIB: u64 = 1 << 20;
const SECONDS_PER_DAY: u64 = 86_400;
/// Widths of the fields of the commitment on chain, in bytes.
const ACCOUNT_WIDTH: usize = 32;
const ACCESS_KEY_WIDTH: usize = 32;
const SECRET_WIDTH: usize = 64;

/// Networks by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    Finney,
    Test,
    Local,
    Archive,
    /// Only by `BT_CHAIN_ENDPOINT`.
    Custom,
}

const NETWORKS: &[(&str, Network)] = &[
    ("finney", Network::Finney),
    ("test", Network::Test),
    ("local", Network::Local),
    ("archive", Network::Archive),
    ("custom", Network::Custom),
];

impl Network {
    /// The network's own node.
    #[must_use]
    pub const fn endpoint(self) -> Option<&'static str> {
        match self {
            Self::Finney => Some("wss://entrypoint-finney.opentensor.ai:443"),
            Self::Test => Some("wss://test.finney.opentensor.ai:443"),
            Self::Local => Some("ws://127.0.0.1:9944"),
            Self::Archive => Some("wss://archive.chain.opentensor.ai:443"),
            Self::Custom => None,
        }
    }
}

/// Chain and wallet.
#[derive(Debug, Clone)]
pub struct ChainConfig {
    pub network: Sourced<Network>,
    /// Nodes to try in turn; never empty.
    pub endpoints: Sourced<Vec<String>>,
    pub netuid: Sourced<u16>,
    pub wallet: WalletConfig,
}

/// Whose hotkey signs.
#[derive(Debug, Clone)]
pub struct WalletConfig {
    pub cold: Sourced<String>,
    pub hot: Sourced<String>,
    pub path: Sourced<PathBuf>,
}

impl ChainConfig {
    pub(super) fn resolve(resolver: &mut Resolver) -> Self {
        let network = resolver.value("BT_NETWORK", choice(NETWORKS), |network| name_of(NETWORKS, *network));
        let given = resolver.optional("BT_CHAIN_ENDPOINT", endpoints, |urls| shown_urls(urls));
        let endpoints = match (given.value, network.value.endpoint()) {
            (Some(urls), _) => Sourced { value: urls, origin: given.origin },
            (None, Some(own)) => Sourced { value: vec![own.to_owned()], origin: network.origin.clone() },
            (None, None) => {
                resolver.problem("BT_CHAIN_ENDPOINT", &Origin::Default, None, "BT_NETWORK=custom needs it");
                Sourced { value: Vec::new(), origin: Origin::Default }
            }
        };
        resolver.report_value("BT_CHAIN_ENDPOINT", shown_urls(&endpoints.value));
        let netuid = resolver.value("NETUID", integer(0, u64::from(u16::MAX)), plainly);
        let cold = resolver.value("BT_WALLET_COLD", plain_name, String::clone);
        let hot = resolver.value("BT_WALLET_HOT", plain_name, String::clone);
        let path = required_folder(resolver, "BT_WALLET_PATH");
        Self { network, endpoints, netuid, wallet: WalletConfig { cold, hot, path } }
    }
}

/// One pair of keys of the store.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub access_key_id: Sourced<SecretString>,
    pub secret_access_key: Sourced<SecretString>,
}

/// The miner's own bucket.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    pub account_id: Sourced<String>,
    pub bucket_id: Sourced<String>,
    /// Committed on chain, for validators.
    pub read: Credentials,
    /// For uploads; never leaves this machine.
    pub write: Credentials,
    pub endpoint_url: Sourced<String>,
    pub region: Sourced<String>,
}

/// The values as they were given, before it is known whether they are complete.
struct StoreValues {
    account_id: Sourced<Option<String>>,
    bucket_id: Sourced<Option<String>>,
    read: [Sourced<Option<SecretString>>; 2],
    write: [Sourced<Option<SecretString>>; 2],
    endpoint_url: Sourced<Option<String>>,
}

impl StoreConfig {
    /// `None` if a part is missing; in [`Mode::Network`] each missing part is a problem.
    pub(super) fn resolve(resolver: &mut Resolver, mode: Mode) -> Option<Self> {
        let values = StoreValues {
            account_id: resolver.optional("R2_ACCOUNT_ID", committed(ACCOUNT_WIDTH), String::clone),
            bucket_id: resolver.optional("R2_BUCKET_ID", text, String::clone),
            read: [resolver.secret("R2_READ_ACCESS_KEY_ID"), resolver.secret("R2_READ_SECRET_ACCESS_KEY")],
            write: [resolver.secret("R2_WRITE_ACCESS_KEY_ID"), resolver.secret("R2_WRITE_SECRET_ACCESS_KEY")],
            endpoint_url: resolver.optional("R2_ENDPOINT_URL", http_url, |url| shown_url(url)),
        };
        let region = resolver.value("R2_REGION", text, String::clone);
        if mode == Mode::Local {
            return None;
        }
        values.check(resolver);
        values.complete(region)
    }
}

impl StoreValues {
    fn check(&self, resolver: &mut Resolver) {
        let given = [
            ("R2_ACCOUNT_ID", self.account_id.value.is_some()),
            ("R2_BUCKET_ID", self.bucket_id.value.is_some()),
            ("R2_READ_ACCESS_KEY_ID", self.read[0].value.is_some()),
            ("R2_READ_SECRET_ACCESS_KEY", self.read[1].value.is_some()),
            ("R2_WRITE_ACCESS_KEY_ID", self.write[0].value.is_some()),
            ("R2_WRITE_SECRET_ACCESS_KEY", self.write[1].value.is_some()),
        ];
        for (name, is_given) in given {
            // A value that did not convert has been reported.
            if !is_given && !resolver.has_problem(name) {
                resolver.problem(name, &Origin::Default, None, "mining on a network needs it");
            }
        }
        for (name, value, width) in [
            ("R2_READ_ACCESS_KEY_ID", &self.read[0], ACCESS_KEY_WIDTH),
            ("R2_READ_SECRET_ACCESS_KEY", &self.read[1], SECRET_WIDTH),
        ] {
            let Some(secret) = &value.value else { continue };
            if let Err(expected) = committed(width)(secret.expose()) {
                resolver.problem(name, &value.origin, Some(String::new()), &format!("expected {expected}"));
            }
        }
        let own_endpoint = self.endpoint_url.value.is_some();
        if let (Some(account), Some(bucket)) = (&self.account_id.value, &self.bucket_id.value)
            && account != bucket
            && !own_endpoint
        {
            let what = format!("the bucket must be named like the account ({account}): validators look for it there");
            resolver.problem("R2_BUCKET_ID", &self.bucket_id.origin, Some(bucket.clone()), &what);
        }
        if let (Some(read), Some(write)) = (&self.read[1].value, &self.write[1].value)
            && read.expose() == write.expose()
            && !own_endpoint
        {
            let what = "it equals the write secret, and it would be published on chain";
            resolver.problem("R2_READ_SECRET_ACCESS_KEY", &self.read[1].origin, Some(String::new()), what);
        }
    }

    fn complete(self, region: Sourced<String>) -> Option<StoreConfig> {
        let account_id = present(self.account_id)?;
        let endpoint_url = present(self.endpoint_url).unwrap_or_else(|| Sourced {
            value: format!("https://{}.r2.cloudflarestorage.com", account_id.value),
            origin: Origin::Default,
        });
        let credentials = |[access_key_id, secret_access_key]: [Sourced<Option<SecretString>>; 2]| {
            Some(Credentials { access_key_id: present(access_key_id)?, secret_access_key: present(secret_access_key)? })
        };
        Some(StoreConfig {
            account_id,
            bucket_id: present(self.bucket_id)?,
            read: credentials(self.read)?,
            write: credentials(self.write)?,
            endpoint_url,
            region,
        })
    }
}

/// Which program generates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    Sglang,
    Vllm,
    /// Our own server on the CPU.
    Builtin,
}

const BACKENDS: &[(&str, Backend)] =
    &[("sglang", Backend::Sglang), ("vllm", Backend::Vllm), ("builtin", Backend::Builtin)];

/// The generation server and how it is fed.
#[derive(Debug, Clone)]
pub struct GenerationConfig {
    pub backend: Sourced<Backend>,
    pub first_gpu: Sourced<u32>,
    pub tensor_parallel: Sourced<u32>,
    /// Above 0, at most 1.
    pub gpu_memory_share: Sourced<f64>,
    /// Tokens.
    pub max_model_len: Sourced<u32>,
    pub max_num_seqs: Sourced<Option<u32>>,
    pub max_concurrent: Sourced<Option<u32>>,
    /// Most open groups; `None`: automatic.
    pub groups_per_batch: Sourced<Option<u32>>,
    pub server_timeout: Sourced<Duration>,
    pub disable_cuda_graph: Sourced<bool>,
    pub symlink_dir: Sourced<Option<PathBuf>>,
    pub vllm_python: Sourced<Option<PathBuf>>,
    pub tokenizer_fallback: Sourced<Option<String>>,
}

impl GenerationConfig {
    pub(super) fn resolve(resolver: &mut Resolver, mode: Mode) -> Self {
        let mut backend =
            resolver.value("GRAIL_PIPELINE_BACKEND", choice(BACKENDS), |backend| name_of(BACKENDS, *backend));
        if mode == Mode::Local {
            backend = Sourced { value: Backend::Builtin, origin: Origin::Flag { name: "--local" } };
            resolver.report_from_flag("GRAIL_PIPELINE_BACKEND", "builtin", "--local");
        }
        Self {
            backend,
            first_gpu: resolver.value("GRAIL_PIPELINE_VLLM_GPU", integer(0, 1023), plainly),
            tensor_parallel: resolver.value("GRAIL_PIPELINE_VLLM_TP", integer(1, 64), plainly),
            gpu_memory_share: resolver.value("GRAIL_PIPELINE_GPU_MEM_UTIL", share, |share| format!("{share:.2}")),
            max_model_len: resolver.value("GRAIL_PIPELINE_MAX_MODEL_LEN", integer(64, 1 << 20), plainly),
            max_num_seqs: resolver.optional("GRAIL_PIPELINE_MAX_NUM_SEQS", integer(1, 1 << 16), plainly),
            max_concurrent: resolver.optional("GRAIL_PIPELINE_MAX_CONCURRENT", integer(1, 1 << 16), plainly),
            groups_per_batch: resolver.optional("GRAIL_PIPELINE_GROUPS_PER_BATCH", integer(1, 1 << 12), plainly),
            server_timeout: resolver.value("GRAIL_PIPELINE_SERVER_TIMEOUT", seconds(86_400.0), show_seconds),
            disable_cuda_graph: resolver.value("GRAIL_PIPELINE_DISABLE_CUDA_GRAPH", boolean, plainly),
            symlink_dir: resolver.folder("GRAIL_PIPELINE_SYMLINK_DIR"),
            vllm_python: resolver.folder("GRAIL_VLLM_PYTHON"),
            tokenizer_fallback: resolver.optional("GRAIL_TRAIN_MODEL_ID", text, String::clone),
        }
    }
}

/// When a worker has a second copy of the weights for a change of checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReloadShadow {
    /// Where memory allows it.
    Auto,
    Always,
    Never,
}

const RELOAD_SHADOWS: &[(&str, ReloadShadow)] =
    &[("auto", ReloadShadow::Auto), ("always", ReloadShadow::Always), ("never", ReloadShadow::Never)];

impl ReloadShadow {
    /// As a worker reads it.
    #[must_use]
    pub fn name(self) -> String {
        name_of(RELOAD_SHADOWS, self)
    }
}

/// What computes proofs on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProofKernels {
    /// Our own kernels, where they can be had.
    Own,
    /// libtorch's operations only.
    Off,
}

const PROOF_KERNELS: &[(&str, ProofKernels)] = &[("own", ProofKernels::Own), ("off", ProofKernels::Off)];

impl ProofKernels {
    /// As a worker reads it.
    #[must_use]
    pub fn name(self) -> String {
        name_of(PROOF_KERNELS, self)
    }
}

/// The proof workers.
#[derive(Debug, Clone)]
pub struct ProofConfig {
    pub gpus: ProofGpus,
    /// Workers where proofs run on the CPU.
    pub cpu_workers: Sourced<u32>,
    /// Folder with `libtorch_cuda.so`.
    pub libtorch_dir: Sourced<Option<PathBuf>>,
    pub reload_shadow: Sourced<ReloadShadow>,
    pub kernels: Sourced<ProofKernels>,
    /// How long a worker may take to load its model.
    pub start_timeout: Sourced<Duration>,
    /// How long a worker may take to prove a group.
    pub prove_timeout: Sourced<Duration>,
    /// How often children are asked for a sign of life, and how long the answer may take.
    pub heartbeat_interval: Sourced<Duration>,
    pub heartbeat_timeout: Sourced<Duration>,
}

impl ProofConfig {
    pub(super) fn resolve(resolver: &mut Resolver) -> Self {
        let single = resolver.value("GRAIL_PIPELINE_PROOF_GPU", integer(0, 1023), plainly);
        let show = |indices: &Vec<u32>| indices.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let list = resolver.optional("GRAIL_PIPELINE_PROOF_GPU_IDS", gpu_list, show);
        Self {
            gpus: present(list).map_or(ProofGpus::Single(single), ProofGpus::List),
            cpu_workers: resolver.value("GRAIL_PROOF_WORKERS", integer(1, 64), plainly),
            libtorch_dir: resolver.folder("GRAIL_LIBTORCH_DIR"),
            reload_shadow: resolver.value("GRAIL_RELOAD_SHADOW", choice(RELOAD_SHADOWS), |when| when.name()),
            kernels: resolver.value("GRAIL_PROOF_KERNELS", choice(PROOF_KERNELS), |kernels| kernels.name()),
            start_timeout: resolver.value("GRAIL_WORKER_START_TIMEOUT", seconds(3_600.0), show_seconds),
            prove_timeout: resolver.value("GRAIL_WORKER_PROVE_TIMEOUT", seconds(3_600.0), show_seconds),
            heartbeat_interval: resolver.value("GRAIL_HEARTBEAT_INTERVAL", seconds(600.0), show_seconds),
            heartbeat_timeout: resolver.value("GRAIL_HEARTBEAT_TIMEOUT", seconds(3_600.0), show_seconds),
        }
    }
}

/// When a window is full, and when it must be closed.
#[derive(Debug, Clone)]
pub struct MiningLimits {
    /// Blocks.
    pub safety_blocks: Sourced<u32>,
    pub max_groups: Sourced<u32>,
    pub max_file_bytes: Sourced<u64>,
    pub upload_timeout: Sourced<Duration>,
    /// From the first signal to the end of the groups under way.
    pub shutdown_timeout: Sourced<Duration>,
}

/// Groups of a window in the embedded default, unless configured: what a demonstration needs, in a few seconds.
const LOCAL_MAX_GROUPS: u32 = 24;

impl MiningLimits {
    pub(super) fn resolve(resolver: &mut Resolver, mode: Mode) -> Self {
        let mut max_groups = resolver.value("GRAIL_MAX_GROUPS_PER_WINDOW", integer(1, 1 << 20), plainly);
        if mode == Mode::Local && max_groups.origin == Origin::Default {
            max_groups.value = LOCAL_MAX_GROUPS;
            resolver.report_value("GRAIL_MAX_GROUPS_PER_WINDOW", LOCAL_MAX_GROUPS.to_string());
        }
        Self {
            safety_blocks: resolver.value("GRAIL_MINER_SAFETY_BLOCKS", integer(0, 29), plainly),
            max_groups,
            max_file_bytes: resolver
                .value("GRAIL_MAX_FILE_MIB", integer::<u64>(1, 350), plainly)
                .map(|mebibytes| mebibytes * MIB),
            upload_timeout: resolver.value("UPLOAD_TIMEOUT", seconds(3_600.0), show_seconds),
            shutdown_timeout: resolver.value("GRAIL_SHUTDOWN_TIMEOUT", seconds(3_600.0), show_seconds),
        }
    }
}

/// Where things lie.
#[derive(Debug, Clone)]
pub struct Folders {
    pub cache: Sourced<PathBuf>,
    pub state: Sourced<PathBuf>,
    pub runtime: Sourced<PathBuf>,
    /// How long the files of a window that is over are kept.
    pub keep_windows: Sourced<Duration>,
    /// What the cache keeps beside the checkpoints in use.
    pub keep_checkpoints: RetentionLimits,
}

impl Folders {
    pub(super) fn resolve(resolver: &mut Resolver) -> Self {
        let cache = required_folder(resolver, "GRAIL_CACHE_DIR");
        let own = |folder: PathBuf| folder.join("grail-supervisor");
        let given = resolver.folder("GRAIL_STATE_DIR");
        let state = present(given).unwrap_or_else(|| {
            let base = resolver.base_folder("XDG_STATE_HOME");
            let home = || resolver.base_folder("HOME").map(|home| home.join(".local/state"));
            let value = base.or_else(home).map(own);
            let value = value.unwrap_or_else(|| {
                resolver.problem("GRAIL_STATE_DIR", &Origin::Default, None, "neither HOME nor XDG_STATE_HOME is set");
                PathBuf::new()
            });
            Sourced { value, origin: Origin::Default }
        });
        resolver.report_value("GRAIL_STATE_DIR", state.value.display().to_string());
        let given = resolver.folder("GRAIL_RUNTIME_DIR");
        let runtime = present(given).unwrap_or_else(|| {
            let base = resolver.base_folder("XDG_RUNTIME_DIR").map(own);
            Sourced { value: base.unwrap_or_else(|| state.value.join("run")), origin: Origin::Default }
        });
        resolver.report_value("GRAIL_RUNTIME_DIR", runtime.value.display().to_string());
        let days = resolver.value("GRAIL_KEEP_WINDOWS_DAYS", integer::<u64>(1, 3_650), plainly);
        let keep_windows = days.map(|days| Duration::from_secs(days * SECONDS_PER_DAY));
        let keep_checkpoints = retention(resolver);
        Self { cache, state, runtime, keep_windows, keep_checkpoints }
    }

    /// Cache of downloaded checkpoints.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.cache.value.join("checkpoints")
    }
}

fn retention(resolver: &mut Resolver) -> RetentionLimits {
    let checkpoints = resolver.value("GRAIL_KEEP_CHECKPOINTS", integer::<u64>(1, 10_000), plainly).value;
    let gib = resolver.value("GRAIL_KEEP_CHECKPOINTS_GIB", integer::<u64>(0, 1 << 20), plainly).value;
    let days = resolver.value("GRAIL_KEEP_CHECKPOINTS_DAYS", integer::<u64>(1, 3_650), plainly).value;
    RetentionLimits {
        checkpoints: usize::try_from(checkpoints).unwrap_or(usize::MAX),
        bytes: if gib == 0 { u64::MAX } else { gib << 30 },
        max_age: Some(Duration::from_secs(days * SECONDS_PER_DAY)),
    }
}

/// The simulated chain.
#[derive(Debug, Clone)]
pub struct LocalConfig {
    /// `None`: what an existing chain has.
    pub block_time: Sourced<Option<Duration>>,
    /// `None`: what an existing store has.
    pub environment: Sourced<Option<EnvironmentId>>,
}

impl LocalConfig {
    pub(super) fn resolve(resolver: &mut Resolver) -> Self {
        let block_ms = resolver.optional("GRAIL_LOCAL_BLOCK_MS", integer::<u64>(20, 600_000), plainly);
        let environment = resolver.optional("GRAIL_LOCAL_ENV", environment, plainly);
        Self { block_time: block_ms.map(|ms| ms.map(Duration::from_millis)), environment }
    }
}

fn environment(text: &str) -> Result<EnvironmentId, String> {
    text.parse().map_err(|_| "gsm8k, math, mbpp or humaneval".to_owned())
}

/// Where metrics go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MonitoringBackend {
    Wandb,
    Null,
}

const MONITORING_BACKENDS: &[(&str, MonitoringBackend)] =
    &[("wandb", MonitoringBackend::Wandb), ("null", MonitoringBackend::Null)];

/// How WandB is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WandbMode {
    Online,
    Offline,
    Disabled,
}

const WANDB_MODES: &[(&str, WandbMode)] =
    &[("online", WandbMode::Online), ("offline", WandbMode::Offline), ("disabled", WandbMode::Disabled)];

/// Monitoring outside of our own metrics.
#[derive(Debug, Clone)]
pub struct MonitoringConfig {
    pub backend: Sourced<MonitoringBackend>,
    pub api_key: Sourced<Option<SecretString>>,
    pub project: Sourced<String>,
    pub entity: Sourced<Option<String>>,
    pub mode: Sourced<WandbMode>,
}

impl MonitoringConfig {
    pub(super) fn resolve(resolver: &mut Resolver) -> Self {
        let show = |backend: &MonitoringBackend| name_of(MONITORING_BACKENDS, *backend);
        let config = Self {
            backend: resolver.value("GRAIL_MONITORING_BACKEND", choice(MONITORING_BACKENDS), show),
            api_key: resolver.secret("WANDB_API_KEY"),
            project: resolver.value("WANDB_PROJECT", text, String::clone),
            entity: resolver.optional("WANDB_ENTITY", text, String::clone),
            mode: resolver.value("WANDB_MODE", choice(WANDB_MODES), |mode| name_of(WANDB_MODES, *mode)),
        };
        let needs_key = config.backend.value == MonitoringBackend::Wandb && config.mode.value == WandbMode::Online;
        if needs_key && config.api_key.value.is_none() {
            let what = "GRAIL_MONITORING_BACKEND=wandb needs it unless WANDB_MODE is offline or disabled";
            resolver.problem("WANDB_API_KEY", &Origin::Default, None, what);
        }
        config
    }
}

/// Reports the variables that change nothing, where they are set, and checks those that are booleans all the same.
pub(super) fn resolve_without_effect(resolver: &mut Resolver) {
    const BOOLEANS: [&str; 3] =
        ["GRAIL_PIPELINE_PROOF_SUBPROCESS", "GRAIL_PIPELINE_PROOF_FLASH_ATTN", "R2_FORCE_PATH_STYLE"];
    for variable in all().filter(|variable| variable.standing != Standing::Active) {
        if resolver.raw.value(variable).is_none() {
            continue;
        }
        if BOOLEANS.contains(&variable.name) {
            resolver.optional(variable.name, boolean, plainly);
        } else {
            resolver.optional(variable.name, text, String::clone);
        }
    }
}

fn required_folder(resolver: &mut Resolver, name: &'static str) -> Sourced<PathBuf> {
    // Without a value a problem was recorded, and nothing uses the empty path.
    resolver.folder(name).map(Option::unwrap_or_default)
}

fn present<T>(sourced: Sourced<Option<T>>) -> Option<Sourced<T>> {
    let Sourced { value, origin } = sourced;
    value.map(|value| Sourced { value, origin })
}

fn name_of<T: PartialEq>(words: &[(&'static str, T)], value: T) -> String {
    words.iter().find(|(_, candidate)| *candidate == value).map_or_else(String::new, |(word, _)| (*word).to_owned())
}

fn shown_urls(urls: &[String]) -> String {
    urls.iter().map(shown_url).collect::<Vec<_>>().join(",")
}

fn show_seconds(duration: &Duration) -> String {
    duration.as_secs_f64().to_string()
}
