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
pub use score::{ScoreOptions, Scores, score};
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
            Self::Split(_) | Self::Task(_) => ExitCode::Usage,
            Self::NoCheckpoint { .. } | Self::Completions { .. } => ExitCode::MissingInput,
            Self::Checkpoint { .. } | Self::ThinkingMode { .. } | Self::Prompt(_) | Self::Line { .. } => {
                ExitCode::BadData
            }
            Self::Setup(SetupError::Failed { .. } | SetupError::Script(_)) => ExitCode::Unavailable,
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

/// Which rows and which of them.
#[derive(Debug, Clone)]
pub struct TaskChoice {
    pub environment: EnvironmentId,
    /// As the environment names it; `None` = its default split.
    pub split: Option<String>,
    /// The rows that this program carries, whatever is configured.
    pub is_embedded: bool,
    pub pick: Pick,
}

/// One task of a split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pick {
    Seed(EnvironmentSeed),
    Id(String),
    /// Every line of the file says which.
    ByLine,
}

impl TaskChoice {
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

/// The task that `pick` means; `None` for [`Pick::ByLine`].
fn task(environment: &dyn Environment, pick: &Pick) -> Result<Option<Task>, TaskError> {
    match pick {
        Pick::Seed(seed) => environment.task(*seed).map(Some),
        Pick::Id(id) => environment.task_by_id(Some(id)).map(Some),
        Pick::ByLine => Ok(None),
    }
}

fn document(value: &impl Serialize) -> Result<String, CommandError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CommandError::Output(error.into()))?;
    Ok(text + "\n")
}
