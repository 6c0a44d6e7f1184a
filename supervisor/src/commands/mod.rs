//! What the subcommands do.

pub mod checkpoint;
pub mod control;
pub mod env;
pub mod local;
pub mod mine;
pub mod verify;

use grail_environments::datasets::{DatasetError, HubAnswer};
use grail_environments::pool::PoolError;
use grail_process::ExitCode;

use crate::chain::LocalChainError;
use crate::checkpoints::{CheckpointError, FilesError};
use crate::engine::EngineError;
use crate::environments::SourceError;
use crate::fleet::FleetError;
use crate::miner::MineError;
use crate::seal::SealError;
use crate::spool::SpoolError;
use crate::state::StateError;
use crate::trainer::TrainerError;
use crate::verify::VerifyError;
use crate::verify::context::ContextError;

/// A command that failed: what to say, and the code to exit with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    #[error(transparent)]
    Gpus(#[from] crate::gpus::GpuError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    LocalChain(#[from] LocalChainError),
    #[error(transparent)]
    Chain(#[from] crate::chain::ChainError),
    #[error(transparent)]
    Demo(#[from] crate::demo::DemoError),
    #[error(transparent)]
    Trainer(#[from] TrainerError),
    #[error(transparent)]
    Fleet(#[from] FleetError),
    #[error(transparent)]
    Child(#[from] crate::fleet::ChildDefect),
    #[error(transparent)]
    Mine(#[from] MineError),
    #[error(transparent)]
    Verify(#[from] VerifyError),
    #[error(transparent)]
    Context(#[from] ContextError),
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::CheckpointCommandError),
    #[error(transparent)]
    Env(#[from] Box<env::EnvCommandError>),
    #[error("open the local store {}", path.display())]
    Store { path: std::path::PathBuf, source: object_store::Error },
    #[error("open the checkpoint cache")]
    Cache(#[from] grail_checkpoint::CacheError),
    #[error("derive the demo key")]
    Key(#[from] grail_protocol::keys::KeyError),
    #[error("read {}: {source}; give the path of a window file", path.display())]
    WindowFile { path: std::path::PathBuf, source: std::io::Error },
    #[error("{}: {detail}", path.display())]
    NoContext { path: std::path::PathBuf, detail: String },
    #[error("ask the store which checkpoint a window has")]
    Choose(#[source] grail_checkpoint::ChooseError),
    #[error("draw a fresh challenge randomness from the system")]
    Randomness(#[source] std::io::Error),
    #[error("hash the weights of the context's model_dir")]
    Weights { source: grail_checkpoint::WeightsError },
    #[error("write to standard output")]
    Output(#[source] std::io::Error),
    #[error("start the asynchronous runtime")]
    Runtime(#[source] std::io::Error),
    #[error("a task ended abnormally")]
    Task(#[source] tokio::task::JoinError),
    #[error("watch for signals")]
    Signals(#[source] std::io::Error),
    #[error("stopped at once; signed groups are in the spool, and the next start goes on with them")]
    Abandoned,
    #[error(
        "no supervisor runs in {}; start one with `grail-supervisor mine`, or name its folder with --state-dir",
        list(folders)
    )]
    NobodyThere { folders: Vec<std::path::PathBuf> },
    #[error("the supervisor in {} does not answer to this user; run this as its user, or as root", folder.display())]
    NotTheirs { folder: std::path::PathBuf, source: grail_ipc::control::ControlError },
    #[error("the supervisor refuses")]
    Refused { source: grail_ipc::control::ControlError },
    #[error("speak to the supervisor in {}", folder.display())]
    Control { folder: std::path::PathBuf, source: grail_ipc::control::ControlError },
}

impl From<env::EnvCommandError> for CommandError {
    fn from(error: env::EnvCommandError) -> Self {
        Self::Env(Box::new(error))
    }
}

impl CommandError {
    /// The code of the public table that fits.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::State(StateError::Malformed { .. }) | Self::LocalChain(LocalChainError::Malformed { .. }) => {
                ExitCode::BadData
            }
            Self::State(_) => ExitCode::CannotWrite,
            Self::Gpus(error) if error.is_host_bare => ExitCode::Unavailable,
            Self::Gpus(_) => ExitCode::Configuration,
            Self::LocalChain(error) => of_local_chain(error),
            Self::Chain(_) => ExitCode::Unavailable,
            Self::Demo(crate::demo::DemoError::Unpack { .. }) | Self::Store { .. } => ExitCode::CannotWrite,
            Self::Demo(_) | Self::Key(_) | Self::Runtime(_) | Self::Task(_) | Self::Signals(_) => ExitCode::Bug,
            Self::Abandoned | Self::Control { .. } => ExitCode::Temporary,
            Self::NobodyThere { .. } => ExitCode::Unavailable,
            Self::NotTheirs { .. } => ExitCode::NotPermitted,
            Self::Refused { .. } => ExitCode::No,
            Self::Trainer(TrainerError::OtherEnvironment { .. }) => ExitCode::Configuration,
            Self::Trainer(TrainerError::Metadata(_)) => ExitCode::Unavailable,
            Self::Trainer(_) | Self::Cache(_) | Self::Output(_) => ExitCode::CannotWrite,
            Self::Fleet(error) => of_fleet(error),
            Self::Child(_) => ExitCode::MissingInput,
            Self::Mine(error) => of_mine(error),
            Self::Verify(error) => of_verify(error),
            Self::Weights { .. } => ExitCode::BadData,
            Self::Choose(_) | Self::Randomness(_) => ExitCode::Unavailable,
            Self::Context(error) => of_context(error),
            Self::Checkpoint(error) => error.exit_code(),
            Self::Env(error) => error.exit_code(),
            Self::WindowFile { .. } | Self::NoContext { .. } => ExitCode::MissingInput,
        }
    }
}

fn list(folders: &[std::path::PathBuf]) -> String {
    folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(" or ")
}

fn of_local_chain(error: &LocalChainError) -> ExitCode {
    match error {
        LocalChainError::Absent { .. } => ExitCode::MissingInput,
        LocalChainError::Differs { .. } => ExitCode::Usage,
        LocalChainError::Write { .. } => ExitCode::CannotWrite,
        _ => ExitCode::BadData,
    }
}

fn of_fleet(error: &FleetError) -> ExitCode {
    match error {
        FleetError::Child(_) => ExitCode::MissingInput,
        FleetError::Socket(_) => ExitCode::CannotWrite,
        // A child said with its own exit code what is wrong; starting again would not help.
        FleetError::NoWorkers { exit: Some(exit), .. } | FleetError::Server { exit: Some(exit), .. }
            if !exit.is_worth_a_restart() =>
        {
            *exit
        }
        FleetError::NoWorkers { .. } | FleetError::Server { .. } => ExitCode::Temporary,
    }
}

fn of_mine(error: &MineError) -> ExitCode {
    match error {
        MineError::Chain(_) => ExitCode::Unavailable,
        MineError::State(_) => ExitCode::CannotWrite,
        MineError::Fleet(error) => of_fleet(error),
        MineError::FirstCheckpoint(error) => of_checkpoint(error),
        MineError::FirstEnvironment(error) => of_source(error),
        MineError::Engine(error) => match error {
            EngineError::NoWorkers | EngineError::NoServer => ExitCode::Temporary,
            EngineError::Fleet(error) => of_fleet(error),
            EngineError::Chain(_) => ExitCode::Unavailable,
            EngineError::Spool(SpoolError::NotASpool { .. } | SpoolError::OtherWindow { .. }) => ExitCode::BadData,
            EngineError::Spool(_) | EngineError::Seal(SealError::Keep { .. }) => ExitCode::CannotWrite,
            EngineError::Seal(_) | EngineError::Task(_) => ExitCode::Bug,
        },
    }
}

fn of_checkpoint(error: &CheckpointError) -> ExitCode {
    match error {
        CheckpointError::Choose(grail_checkpoint::ChooseError::NoneReady { .. }) => ExitCode::MissingInput,
        CheckpointError::Choose(_) | CheckpointError::Metadata { .. } => ExitCode::Unavailable,
        CheckpointError::Install { source, .. } => checkpoint::of_failure(source.class()),
        CheckpointError::Files { source: FilesError::Task(_), .. } => ExitCode::Bug,
        _ => ExitCode::BadData,
    }
}

fn of_verify(error: &VerifyError) -> ExitCode {
    match error {
        VerifyError::Context(error) => of_context(error),
        VerifyError::Worker { .. } | VerifyError::Evaluator { .. } => ExitCode::Temporary,
        VerifyError::Source(error) => of_source(error),
        VerifyError::Missing(_) | VerifyError::Task(_) => ExitCode::Bug,
        _ => ExitCode::BadData,
    }
}

/// Data that is damaged is told from data, or a host, that has to be prepared first.
pub(crate) fn of_source(error: &SourceError) -> ExitCode {
    match error {
        SourceError::Evaluators { source, .. } => of_pool(source),
        SourceError::Dataset { source, .. } => match &**source {
            DatasetError::NotFound { hub: HubAnswer::None, .. } => ExitCode::Unavailable,
            DatasetError::NotFound { hub: HubAnswer::NoSpaceHere, .. } => ExitCode::CannotWrite,
            DatasetError::NotFound { .. } | DatasetError::NoPath { .. } | DatasetError::NotEmbedded { .. } => {
                ExitCode::MissingInput
            }
            DatasetError::NoSuchSplit { .. } => ExitCode::Usage,
            _ => ExitCode::BadData,
        },
    }
}

/// A host without interpreter or sandbox lacks what an operator can set up.
pub(crate) const fn of_pool(error: &PoolError) -> ExitCode {
    match error {
        PoolError::Setup(_) => ExitCode::MissingInput,
        _ => ExitCode::Configuration,
    }
}

fn of_context(error: &ContextError) -> ExitCode {
    match error {
        ContextError::Read { .. } | ContextError::Rows { .. } => ExitCode::MissingInput,
        ContextError::Malformed { .. } | ContextError::Contradiction { .. } => ExitCode::BadData,
    }
}

#[cfg(test)]
mod tests {
    use grail_environments::{EnvironmentId, Split};

    use super::*;

    #[test]
    fn a_hub_that_does_not_answer_and_a_full_disk_are_worth_another_start_and_one_without_the_rows_is_not() {
        let code = |hub| {
            let (environment, split) = (EnvironmentId::Mbpp, Split::Train);
            let (looked, remedy) = (Vec::new(), String::new());
            let source = DatasetError::NotFound { environment, split, looked, remedy, hub };
            of_source(&SourceError::Dataset { environment, source: Box::new(source) })
        };
        let codes = [HubAnswer::None, HubAnswer::NoSpaceHere, HubAnswer::No].map(code);
        assert_eq!(codes, [ExitCode::Unavailable, ExitCode::CannotWrite, ExitCode::MissingInput]);
    }
}
