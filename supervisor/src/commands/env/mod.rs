//! `env` and `setup-evaluator`: what tasks are, how answers are judged, and whether this host can judge them.

mod list;
mod prompt;
mod score;
mod setup;
mod show;

use std::path::PathBuf;
use std::sync::Arc;

use grail_environments::datasets::{self, DatasetSettings};
use grail_environments::{Environment, EnvironmentId, ParseSplitError, Split, Task, TaskError};
use grail_process::ExitCode;
use grail_protocol::ids::EnvironmentSeed;
use serde::Serialize;

pub use list::list;
pub use prompt::{PromptOptions, prompt};
pub use score::{Completeness, ScoreOptions, Scores, score};
pub use setup::{SetupMode, setup_evaluator};
pub use show::show;

use super::{CommandError, of_pool, of_source};
use crate::checkpoints::FilesError;
use crate::environments::{EnvironmentSource, SourceError};
use crate::evaluators::Evaluators;

/// Version of the JSON form of what these commands print.
const SCHEMA: u32 = 1;

/// A question about an environment that has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnvCommandError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Split(#[from] ParseSplitError),
    #[error(transparent)]
    Task(#[from] TaskError),
    #[error(
        "{id:?} is no task of {environment} {split}, which has {tasks}; write an id like {meant:?}, or another --split"
    )]
    NoSuchTask { id: String, environment: EnvironmentId, split: Split, tasks: usize, meant: String },
    #[error("use the checkpoint {}", folder.display())]
    Checkpoint { folder: PathBuf, source: FilesError },
    #[error("{}: no such checkpoint; give a folder, or the window of a checkpoint that `checkpoint list` shows", folder.display())]
    NoCheckpoint { folder: PathBuf },
    #[error("metadata of the checkpoint {}: {detail}; name the mode with --thinking-mode", folder.display())]
    ThinkingMode { folder: PathBuf, detail: String },
    #[error(transparent)]
    Prompt(#[from] grail_text::PromptError),
    #[error("read {}", path.display())]
    Completions { path: PathBuf, source: std::io::Error },
    #[error("{} line {line}: {detail}", path.display())]
    Line { path: PathBuf, line: usize, detail: String },
    #[error(transparent)]
    Setup(#[from] grail_environments::sandbox::setup::SetupError),
    #[error(transparent)]
    Pool(#[from] grail_environments::pool::PoolError),
}

impl EnvCommandError {
    /// The code of the public table that fits.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        use grail_environments::sandbox::setup::SetupError;
        match self {
            Self::Source(error) => of_source(error),
            Self::Split(_) | Self::Task(_) | Self::NoSuchTask { .. } => ExitCode::Usage,
            Self::Completions { source, .. } if source.kind() == std::io::ErrorKind::InvalidData => ExitCode::BadData,
            Self::NoCheckpoint { .. } | Self::Completions { .. } => ExitCode::MissingInput,
            Self::Checkpoint { .. } | Self::ThinkingMode { .. } | Self::Prompt(_) | Self::Line { .. } => {
                ExitCode::BadData
            }
            Self::Setup(SetupError::Failed { .. } | SetupError::Script(_) | SetupError::Interpreter(_)) => {
                ExitCode::Unavailable
            }
            Self::Setup(SetupError::HandOver(_)) => ExitCode::CannotWrite,
            Self::Setup(SetupError::NoFolder) => ExitCode::Configuration,
            Self::Setup(_) => ExitCode::MissingInput,
            Self::Pool(error) => of_pool(error),
        }
    }
}

/// Where rows and evaluators are.
#[derive(Debug, Clone)]
pub struct EnvSite {
    pub datasets: DatasetSettings,
    pub evaluators: Arc<Evaluators>,
}

/// Which rows.
#[derive(Debug, Clone)]
pub struct RowsChoice {
    pub environment: EnvironmentId,
    /// As the environment names it; `None` = its default split.
    pub split: Option<String>,
    /// The rows that this program carries, whatever is configured.
    pub is_embedded: bool,
}

/// Where rows are from, for whoever reads an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Origin {
    /// Configured, cached or downloaded.
    Found,
    /// Part of this program.
    Embedded,
    /// Made up, since no package may ship the real ones.
    StandIn,
}

impl Origin {
    /// A remark behind a title.
    const fn remark(self) -> &'static str {
        match self {
            Self::Found => "",
            Self::Embedded => " (rows of this program)",
            Self::StandIn => " (a stand-in: this problem is made up)",
        }
    }
}

/// One task of a split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pick {
    Seed(EnvironmentSeed),
    /// `train_17`, or `17` for short.
    Id(String),
}

impl RowsChoice {
    const fn origin(&self) -> Origin {
        match (self.is_embedded, self.environment) {
            (false, _) => Origin::Found,
            (true, EnvironmentId::Math) => Origin::StandIn,
            (true, _) => Origin::Embedded,
        }
    }

    async fn open(&self, site: &EnvSite) -> Result<Arc<dyn Environment>, EnvCommandError> {
        let id = self.environment;
        let split = Split::resolve(id, self.split.as_deref())?;
        if self.is_embedded {
            let opened = datasets::embedded(id, split, site.evaluators.clone());
            return Ok(opened.map_err(|error| SourceError::Dataset { environment: id, source: Box::new(error) })?);
        }
        let source = EnvironmentSource::new(site.datasets.clone(), site.evaluators.clone());
        Ok(source.open_without_evaluators(id, split).await?)
    }
}

/// The task that `pick` means. The protocol takes any text for an id; a question with an id that is none is a mistake.
fn task(environment: &dyn Environment, pick: &Pick) -> Result<Task, EnvCommandError> {
    let id = match pick {
        Pick::Seed(seed) => return Ok(environment.task(*seed)?),
        Pick::Id(id) => id,
    };
    let task = environment.task_by_id(Some(id))?;
    let is_number = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_digit());
    if task.id == *id || is_number {
        return Ok(task);
    }
    let (environment, split, tasks) = (environment.id(), environment.split(), environment.task_count());
    Err(EnvCommandError::NoSuchTask { id: id.clone(), environment, split, tasks, meant: task.id })
}

fn document(value: &impl Serialize) -> Result<String, CommandError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CommandError::Output(error.into()))?;
    Ok(text + "\n")
}
