//! Configuration: everything that can be set, resolved once into values that are valid and know where they come from.
//!
//! Sources, the later ones winning: defaults, `.env` (or `--env-file`), the process environment, options. All problems are
//! reported at once; unknown names of ours and names without effect are warnings.

mod dotenv;
mod environments;
mod gpu;
mod origin;
mod problem;
mod raw;
mod report;
mod resolve;
mod sections;
mod variables;

use std::collections::BTreeMap;

pub use environments::EnvironmentsConfig;
pub use gpu::{GenerationGpus, GpuLayout, GpuProblem, GpuRequest, ProofGpus, gpu_layout, visible_devices};
pub use origin::{Origin, Sourced};
pub use problem::{ConfigError, Problem, Warning};
pub use raw::{ENV_FILE, EnvFile, FlagValue, Inputs};
pub use report::{Report, Row, env_example};
pub use sections::{
    Backend, ChainConfig, Credentials, Folders, GenerationConfig, LocalConfig, MiningLimits, MonitoringBackend,
    MonitoringConfig, Network, ProofConfig, ProofKernels, ReloadShadow, StoreConfig, WalletConfig, WandbMode,
};
pub use variables::{Alias, SECTIONS, Section, Standing, Variable};

use resolve::Resolver;

/// What the configuration is for; it decides what must be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The embedded default: simulated chain, a folder as store, builtin generation, proofs on the CPU.
    Local,
    /// A real network and a real bucket.
    Network,
}

/// Everything that is set, valid.
#[derive(Debug, Clone)]
pub struct Config {
    pub mode: Mode,
    pub chain: ChainConfig,
    /// `None` only in [`Mode::Local`].
    pub store: Option<StoreConfig>,
    pub generation: GenerationConfig,
    pub proof: ProofConfig,
    pub limits: MiningLimits,
    pub folders: Folders,
    pub environments: EnvironmentsConfig,
    pub local: LocalConfig,
    pub monitoring: MonitoringConfig,
    /// Directives for the log filter.
    pub log: Sourced<Option<String>>,
    /// Variables of other programs that the `.env` file sets and the environment does not, for child processes.
    pub passthrough: BTreeMap<String, String>,
    report: Report,
}

impl Config {
    /// Reads and checks everything.
    ///
    /// # Errors
    /// [`ConfigError`] with every problem there is.
    pub fn load(inputs: &Inputs, mode: Mode) -> Result<Self, ConfigError> {
        let mut resolver = Resolver::new(raw::RawConfig::read(inputs));
        let chain = ChainConfig::resolve(&mut resolver);
        let store = StoreConfig::resolve(&mut resolver, mode);
        let generation = GenerationConfig::resolve(&mut resolver, mode);
        let proof = ProofConfig::resolve(&mut resolver);
        let limits = MiningLimits::resolve(&mut resolver, mode);
        let folders = Folders::resolve(&mut resolver);
        let environments = EnvironmentsConfig::resolve(&mut resolver);
        let local = LocalConfig::resolve(&mut resolver);
        let monitoring = MonitoringConfig::resolve(&mut resolver);
        let log = resolver.optional("GRAIL_LOG", resolve::text, String::clone);
        sections::resolve_without_effect(&mut resolver);
        let Resolver { raw, rows, mut problems, warnings } = resolver;
        let report = Report::new(rows, warnings);
        if !problems.is_empty() {
            problems.sort_by_key(|problem| variables::all().position(|variable| variable.name == problem.variable));
            return Err(ConfigError { problems, report });
        }
        let passthrough = raw.passthrough;
        Ok(Self {
            mode,
            chain,
            store,
            generation,
            proof,
            limits,
            folders,
            environments,
            local,
            monitoring,
            log,
            passthrough,
            report,
        })
    }

    /// The folders alone, for commands that talk to a running miner: what else is wrong by now must not keep it from being asked or
    /// stopped.
    ///
    /// # Errors
    /// [`ConfigError`] if where its state or its sockets lie does not follow.
    pub fn folders(inputs: &Inputs) -> Result<Folders, ConfigError> {
        let mut resolver = Resolver::new(raw::RawConfig::read(inputs));
        let folders = Folders::resolve(&mut resolver);
        let Resolver { rows, mut problems, warnings, .. } = resolver;
        // A statement that cannot be read names no variable, and may be one of these.
        problems.retain(|problem| ["", "GRAIL_STATE_DIR", "GRAIL_RUNTIME_DIR"].contains(&problem.variable));
        if problems.is_empty() {
            Ok(folders)
        } else {
            Err(ConfigError { problems, report: Report::new(rows, warnings) })
        }
    }

    /// All variables with the values in force and where they come from; secrets are redacted.
    #[must_use]
    pub const fn describe(&self) -> &Report {
        &self.report
    }

    /// What is worth telling at the start.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        &self.report.warnings
    }

    /// The GPUs that this configuration asks for; `None` if everything runs on the CPU.
    #[must_use]
    pub fn gpu_request(&self) -> Option<GpuRequest> {
        if self.mode == Mode::Local {
            return None;
        }
        let generation = match self.generation.backend.value {
            Backend::Sglang | Backend::Vllm => Some(GenerationGpus {
                first: self.generation.first_gpu.clone(),
                count: self.generation.tensor_parallel.clone(),
            }),
            Backend::Builtin => None,
        };
        Some(GpuRequest { generation, proof: self.proof.gpus.clone() })
    }
}

#[cfg(test)]
mod tests;
