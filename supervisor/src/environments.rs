//! Environments over the data that is configured or found, with the evaluators that they need.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use grail_checkpoint::MiningPolicy;
use grail_environments::datasets::{DatasetError, DatasetSettings, Datasets};
use grail_environments::pool::PoolError;
use grail_environments::{Environment, EnvironmentId, Split};

use crate::evaluators::Evaluators;

/// An environment that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    #[error("open the data set of environment {environment}")]
    Dataset { environment: EnvironmentId, source: Box<DatasetError> },
    #[error("start the evaluators of environment {environment}")]
    Evaluators { environment: EnvironmentId, source: Box<PoolError> },
}

/// Opens environments, each split once.
#[derive(Debug)]
pub struct EnvironmentSource {
    settings: DatasetSettings,
    datasets: Datasets,
    evaluators: Arc<Evaluators>,
}

impl EnvironmentSource {
    /// Rows are looked for where `settings` say, answers are judged by `evaluators`.
    #[must_use]
    pub fn new(settings: DatasetSettings, evaluators: Arc<Evaluators>) -> Self {
        let datasets = Datasets::new(settings.clone(), evaluators.clone());
        Self { settings, datasets, evaluators }
    }

    /// The file or folder that is configured for the rows of `id`; `None` if they are found in a cache or on the hub.
    #[must_use]
    pub fn rows_path(&self, id: EnvironmentId) -> Option<PathBuf> {
        self.settings.source(id).path
    }

    /// The environment `id` on `split`, with its evaluators.
    ///
    /// # Errors
    /// If the rows cannot be had or are not the data set that validators use, or if answers cannot be judged on this host.
    pub async fn open(&self, id: EnvironmentId, split: Split) -> Result<Arc<dyn Environment>, SourceError> {
        let environment = self.open_without_evaluators(id, split).await?;
        self.start_evaluators(id).await?;
        Ok(environment)
    }

    /// Starts what judges answers of `id`, unless it runs.
    ///
    /// # Errors
    /// If answers cannot be judged on this host.
    pub async fn start_evaluators(&self, id: EnvironmentId) -> Result<(), SourceError> {
        let failed = |source| SourceError::Evaluators { environment: id, source: Box::new(source) };
        self.evaluators.start_for(id).await.map_err(failed)
    }

    /// As [`Self::open`], for tasks, or for groups that were judged before: evaluators start when something is judged.
    ///
    /// # Errors
    /// If the rows cannot be had or are not the data set that validators use.
    pub async fn open_without_evaluators(
        &self,
        id: EnvironmentId,
        split: Split,
    ) -> Result<Arc<dyn Environment>, SourceError> {
        let failed = |source| SourceError::Dataset { environment: id, source: Box::new(source) };
        self.datasets.open(id, split).await.map_err(failed)
    }

    /// Opens what `policy` names, ahead of the window that needs it. Names that mean nothing are left to that window.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_of(&self, policy: &MiningPolicy) -> Result<(), SourceError> {
        let Ok(id) = policy.env_id.parse::<EnvironmentId>() else { return Ok(()) };
        let Ok(split) = Split::resolve(id, policy.env_params.split.as_deref()) else { return Ok(()) };
        self.open(id, split).await.map(drop)
    }

    /// The evaluators.
    #[must_use]
    pub const fn evaluators(&self) -> &Arc<Evaluators> {
        &self.evaluators
    }
}

/// `settings` with the rows of `id` at `path`.
#[must_use]
pub fn with_rows_at(mut settings: DatasetSettings, id: EnvironmentId, path: &Path) -> DatasetSettings {
    settings.sources.entry(id).or_default().path = Some(path.to_owned());
    settings
}
