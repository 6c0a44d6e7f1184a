//! Opens environments over the rows that are found.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

use super::download;
use super::error::{DatasetError, Looked};
use super::hub_cache::{self, MAIN};
use super::library_cache;
use super::local;
use super::located::{self, Located};
use super::published::{self, Part};
use super::row::Row;
use super::settings::{DatasetSettings, HubSettings, SourceSettings, path_variable};
use crate::environment::Environment;
use crate::evaluator::Evaluator;
use crate::gsm8k::Gsm8k;
use crate::humaneval::HumanEval;
use crate::id::EnvironmentId;
use crate::math::Math;
use crate::mbpp::Mbpp;
use crate::split::Split;

/// `environment` on `split` over the data that is part of this program. MATH is a stand-in: see [`Math::stand_in`].
///
/// # Errors
/// [`DatasetError`] if the split is not part of it.
pub fn embedded(
    environment: EnvironmentId,
    split: Split,
    evaluator: Arc<dyn Evaluator>,
) -> Result<Arc<dyn Environment>, DatasetError> {
    Ok(match environment {
        EnvironmentId::Gsm8k => Arc::new(Gsm8k::embedded(split)?),
        EnvironmentId::Math => Arc::new(Math::stand_in(split, evaluator)?),
        EnvironmentId::Mbpp => Arc::new(Mbpp::embedded(split, evaluator)?),
        EnvironmentId::HumanEval if split == Split::Test => Arc::new(HumanEval::embedded(evaluator)?),
        EnvironmentId::HumanEval => return Err(DatasetError::NoSuchSplit { environment, split }),
    })
}

/// Opens environments, each split once.
#[derive(Debug)]
pub struct Datasets {
    settings: DatasetSettings,
    evaluator: Arc<dyn Evaluator>,
    open: Mutex<HashMap<(EnvironmentId, Split), Opened>>,
}

/// Filled once: whoever comes meanwhile waits, so that two callers do not download the same files.
type Opened = Arc<OnceCell<Arc<dyn Environment>>>;

impl Datasets {
    /// Looks where `settings` say; `evaluator` is given to the environments that need one.
    #[must_use]
    pub fn new(settings: DatasetSettings, evaluator: Arc<dyn Evaluator>) -> Self {
        Self { settings, evaluator, open: Mutex::default() }
    }

    /// `environment` on `split`. A failure is not remembered: the next call looks again.
    ///
    /// # Errors
    /// [`DatasetError`] if there are no rows, or not the right ones.
    pub async fn open(&self, environment: EnvironmentId, split: Split) -> Result<Arc<dyn Environment>, DatasetError> {
        let opened = {
            // A map of finished insertions is whole, whoever panicked while holding the lock.
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(open.entry((environment, split)).or_default())
        };
        opened.get_or_try_init(|| self.read(environment, split)).await.cloned()
    }

    async fn read(&self, environment: EnvironmentId, split: Split) -> Result<Arc<dyn Environment>, DatasetError> {
        let evaluator = Arc::clone(&self.evaluator);
        Ok(match environment {
            EnvironmentId::Gsm8k => Arc::new(Gsm8k::from_parts(split, self.rows(split).await?)?),
            EnvironmentId::Math => Arc::new(Math::from_parts(split, self.rows(split).await?, evaluator)?),
            EnvironmentId::Mbpp => Arc::new(Mbpp::from_parts(split, self.rows(split).await?, evaluator)?),
            EnvironmentId::HumanEval => Arc::new(HumanEval::from_parts(self.rows(split).await?, evaluator)?),
        })
    }

    /// Rows that `split` is made of, by part.
    async fn rows<R: Row>(&self, split: Split) -> Result<Vec<Vec<R>>, DatasetError> {
        let environment = R::ENVIRONMENT;
        let parts = published::parts(environment, split).ok_or(DatasetError::NoSuchSplit { environment, split })?;
        let source = self.settings.source(environment);
        let overrides = source.overrides.clone();
        let search = Search { environment, parts: parts.clone(), source, hub: self.settings.hub.clone() };
        let found = search.run(split).await?;
        tracing::info!(%environment, %split, place = %found.place, commit = found.commit, "A data set is found.");
        blocking(move || {
            let rows = found.read(&parts)?;
            located::verify(&rows, &parts, &found.place, &overrides)?;
            Ok(rows)
        })
        .await
    }
}

/// Runs `read`, which waits for disks, off the threads that serve everything else.
async fn blocking<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(read).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => unreachable!("a blocking task is never cancelled: {error}"),
    }
}

/// The files of one split.
#[derive(Clone, Debug)]
struct Search {
    environment: EnvironmentId,
    parts: Vec<Part>,
    source: SourceSettings,
    hub: HubSettings,
}

impl Search {
    async fn run(self, split: Split) -> Result<Located, DatasetError> {
        let mut looked = Vec::new();
        let search = self.clone();
        match blocking(move || search.on_disk()).await? {
            Ok(found) => return Ok(found),
            Err(mut places) => looked.append(&mut places),
        }
        let hub;
        match download::download(&self.hub, self.environment, self.revision(), &self.parts).await {
            Ok(found) => return Ok(found),
            Err(reason) => {
                hub = reason.answer();
                looked.push(Looked { place: format!("hub {}", self.hub.shown_endpoint()), reason: reason.to_string() });
            }
        }
        let search = self.clone();
        match blocking(move || search.in_library_cache()).await {
            Ok(found) => return Ok(found),
            Err(mut places) => looked.append(&mut places),
        }
        let (environment, remedy) = (self.environment, self.remedy());
        Err(DatasetError::NotFound { environment, split, looked, remedy, hub })
    }

    fn revision(&self) -> &str {
        self.source.revision.as_deref().unwrap_or(MAIN)
    }

    /// At the configured path or in the hub's cache; else what was looked at.
    fn on_disk(&self) -> Result<Result<Located, Vec<Looked>>, DatasetError> {
        let mut looked = Vec::new();
        let variable = path_variable(self.environment);
        match &self.source.path {
            None => looked.push(Looked { place: variable.to_owned(), reason: "not set".to_owned() }),
            Some(path) if !path.exists() => {
                return Err(DatasetError::NoPath { environment: self.environment, path: path.clone(), variable });
            }
            Some(path) => match local::find(path, self.environment, &self.parts) {
                Ok(found) => return Ok(Ok(found)),
                Err(reason) => looked.push(Looked { place: path.display().to_string(), reason }),
            },
        }
        let Some(cache) = &self.hub.cache else {
            looked.push(homeless("hub cache"));
            return Ok(Err(looked));
        };
        for repository in published::repositories(self.environment) {
            match hub_cache::find(cache, repository, self.revision(), &self.parts) {
                Ok(found) => return Ok(Ok(found)),
                Err(reason) => looked.push(Looked { place: "hub cache".to_owned(), reason }),
            }
        }
        Ok(Err(looked))
    }

    fn in_library_cache(&self) -> Result<Located, Vec<Looked>> {
        const PLACE: &str = "cache of the library datasets";
        let Some(cache) = &self.hub.library_cache else { return Err(vec![homeless(PLACE)]) };
        let mut looked = Vec::new();
        for repository in published::repositories(self.environment) {
            match library_cache::find(cache, repository, self.source.revision.as_deref(), &self.parts) {
                Ok(found) => return Ok(found),
                Err(reason) => looked.push(Looked { place: PLACE.to_owned(), reason }),
            }
        }
        Err(looked)
    }

    /// Which files would do, and where to put them.
    fn remedy(&self) -> String {
        let files: Vec<String> = self.parts.iter().map(|part| format!("{part}-00000-of-00001.parquet")).collect();
        let whole = published::whole_file(self.environment);
        let whole = whole.map(|stem| format!(" or the authors' {stem}.jsonl")).unwrap_or_default();
        let repository = published::repositories(self.environment).first().copied().unwrap_or_default();
        let variable = path_variable(self.environment);
        format!("bring {} of {repository}{whole} in a folder and name it by {variable}", files.join(", "))
    }
}

fn homeless(place: &str) -> Looked {
    Looked { place: place.to_owned(), reason: "neither HF_HOME nor HOME is set".to_owned() }
}
