//! Which checkpoint a window must be mined with, brought into a local folder with everything the supervisor reads from it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use grail_checkpoint::{
    CheckpointCache, CheckpointStore, ChooseError, InstallError, Installed, MiningPolicy, StoreError, Wanted,
};
use grail_protocol::ids::{CheckpointWindow, TokenId, WindowStart};
use grail_text::{ChatTemplate, Tokenizer};
use serde::Deserialize;

/// Limit that the reference assumes when a model's config has none.
const DEFAULT_MAX_POSITIONS: usize = 16_384;

/// A checkpoint that cannot be mined with; the window is skipped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    #[error(transparent)]
    Choose(#[from] ChooseError),
    #[error("read the metadata of checkpoint {checkpoint}")]
    Metadata { checkpoint: CheckpointWindow, source: StoreError },
    #[error("metadata of checkpoint {checkpoint} does not say how to mine")]
    Policy { checkpoint: CheckpointWindow, source: grail_checkpoint::metadata::PolicyError },
    #[error("install checkpoint {checkpoint}")]
    Install { checkpoint: CheckpointWindow, source: InstallError },
    #[error("use the files of checkpoint {checkpoint}")]
    Files { checkpoint: CheckpointWindow, source: FilesError },
}

/// Files of a checkpoint folder that the supervisor cannot use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FilesError {
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is no model configuration: {detail}", path.display())]
    Config { path: PathBuf, detail: String },
    #[error(transparent)]
    Text(#[from] grail_text::LoadError),
    #[error("the tokenizer in {} names no eos_token", folder.display())]
    NoEos { folder: PathBuf },
    #[error("loading task failed")]
    Task(#[from] tokio::task::JoinError),
}

/// What the supervisor reads from a checkpoint folder: everything but the weights.
#[derive(Debug, Clone)]
pub struct CheckpointFiles {
    pub tokenizer: Arc<Tokenizer>,
    pub template: Arc<ChatTemplate>,
    /// The tokenizer's EOS: the only token in which a completion may end early.
    pub eos_token: TokenId,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
}

#[derive(Debug, Deserialize)]
struct ModelFacts {
    vocab_size: usize,
    max_position_embeddings: Option<usize>,
}

impl CheckpointFiles {
    /// Reads `config.json`, the tokenizer and its chat template.
    ///
    /// # Errors
    /// [`FilesError`] names the file.
    pub fn read(folder: &Path) -> Result<Self, FilesError> {
        let path = folder.join("config.json");
        let text = std::fs::read(&path).map_err(|source| FilesError::Read { path: path.clone(), source })?;
        let facts: ModelFacts =
            serde_json::from_slice(&text).map_err(|error| FilesError::Config { path, detail: error.to_string() })?;
        let tokenizer = Tokenizer::from_dir(folder)?;
        let template = ChatTemplate::from_dir(folder)?;
        let eos_token = tokenizer.eos_token_id().ok_or_else(|| FilesError::NoEos { folder: folder.to_owned() })?;
        Ok(Self {
            tokenizer: Arc::new(tokenizer),
            template: Arc::new(template),
            eos_token,
            vocab_size: facts.vocab_size,
            max_position_embeddings: facts.max_position_embeddings.unwrap_or(DEFAULT_MAX_POSITIONS),
        })
    }
}

/// A checkpoint ready to mine with.
#[derive(Debug, Clone)]
pub struct ReadyCheckpoint {
    pub installed: Installed,
    pub policy: MiningPolicy,
    /// Goes into every commit: the metadata's model name, or the folder.
    pub model_name: String,
    pub files: CheckpointFiles,
}

/// Resolves and installs checkpoints, and remembers the newest one.
#[derive(Debug)]
pub struct Checkpoints {
    store: CheckpointStore,
    cache: CheckpointCache,
    ready: Option<Arc<ReadyCheckpoint>>,
}

impl Checkpoints {
    /// From the trainer's `store` into `cache`.
    #[must_use]
    pub fn new(store: CheckpointStore, cache: CheckpointCache) -> Self {
        Self { store, cache, ready: None }
    }

    /// The checkpoint that `window` must be mined with, by a fresh and complete listing.
    ///
    /// # Errors
    /// [`CheckpointError`]: the window must not be mined.
    pub async fn for_window(&mut self, window: WindowStart) -> Result<Arc<ReadyCheckpoint>, CheckpointError> {
        let checkpoint = self.store.choose(window).await?.checkpoint;
        if let Some(ready) = self.ready.as_ref().filter(|ready| ready.installed.window == checkpoint) {
            return Ok(ready.clone());
        }
        let ready = Arc::new(self.prepare(checkpoint).await?);
        self.ready = Some(ready.clone());
        Ok(ready)
    }

    async fn prepare(&self, checkpoint: CheckpointWindow) -> Result<ReadyCheckpoint, CheckpointError> {
        let published = self
            .store
            .published(checkpoint)
            .await
            .map_err(|source| CheckpointError::Metadata { checkpoint, source })?;
        let policy = published.policy().map_err(|source| CheckpointError::Policy { checkpoint, source })?.clone();
        let installed = self
            .cache
            .install(&self.store, &published, &Wanted::default())
            .await
            .map_err(|source| CheckpointError::Install { checkpoint, source })?;
        let folder = installed.folder.clone();
        let files = tokio::task::spawn_blocking(move || CheckpointFiles::read(&folder))
            .await
            .unwrap_or_else(|error| Err(error.into()))
            .map_err(|source| CheckpointError::Files { checkpoint, source })?;
        let model_name =
            installed.metadata.model_name.clone().unwrap_or_else(|| installed.folder.to_string_lossy().into_owned());
        Ok(ReadyCheckpoint { installed, policy, model_name, files })
    }
}
