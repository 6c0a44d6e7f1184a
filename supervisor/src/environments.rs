//! Environments over the data set that is at hand, opened once per split.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use grail_environments::gsm8k::{DatasetError, Gsm8k};
use grail_environments::{Environment, EnvironmentId, Split};

/// An environment that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    #[error("open the data set of environment {environment}")]
    Dataset { environment: EnvironmentId, source: Box<DatasetError> },
    #[error("environment {environment} is not served yet; windows with this checkpoint are skipped")]
    NotServed { environment: EnvironmentId },
}

/// Opens environments from one file of rows.
#[derive(Debug)]
pub struct EnvironmentSource {
    rows: PathBuf,
    open: HashMap<(EnvironmentId, Split), Arc<dyn Environment>>,
}

impl EnvironmentSource {
    /// Over the data set in `rows`.
    #[must_use]
    pub fn new(rows: PathBuf) -> Self {
        Self { rows, open: HashMap::new() }
    }

    /// The file of rows.
    #[must_use]
    pub fn rows_path(&self) -> &Path {
        &self.rows
    }

    /// The environment `id` on `split`.
    ///
    /// # Errors
    /// If the rows cannot be read or are not the data set that validators use.
    pub fn open(&mut self, id: EnvironmentId, split: Split) -> Result<Arc<dyn Environment>, SourceError> {
        if let Some(environment) = self.open.get(&(id, split)) {
            return Ok(environment.clone());
        }
        let environment: Arc<dyn Environment> = match id {
            EnvironmentId::Gsm8k => Arc::new(
                Gsm8k::from_file(&self.rows, split)
                    .map_err(|source| SourceError::Dataset { environment: id, source: Box::new(source) })?,
            ),
            EnvironmentId::Math | EnvironmentId::Mbpp | EnvironmentId::HumanEval => {
                return Err(SourceError::NotServed { environment: id });
            }
        };
        self.open.insert((id, split), environment.clone());
        Ok(environment)
    }
}
