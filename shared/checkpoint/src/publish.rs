//! Publishing a checkpoint as the trainer does; for the local demonstration and for tests. A miner never writes here.

use std::io;
use std::path::{Path, PathBuf};

use grail_protocol::ids::{CheckpointWindow, WeightsHash, WindowStart};
use serde_json::{Map, Value, json};

use crate::durable;
use crate::layout::{METADATA_FILE, Tree, object_key, ready_key};
use crate::manifest::{Manifest, hash_file, is_rewritten};
use crate::metadata::{FilesDefect, Metadata, MetadataError};
use crate::policy::{GenerationParams, PolicyDefect, ThinkingModeName};
use crate::store::{CheckpointStore, StoreError};
use crate::weights::{WeightsError, WeightsFiles};

/// What the trainer says about a checkpoint beside its files.
#[derive(Clone, Debug, PartialEq)]
pub struct MetadataInput {
    pub env_id: String,
    /// For instance `{"split": "train"}`.
    pub env_params: Map<String, Value>,
    pub generation: GenerationParams,
    pub thinking_mode: ThinkingModeName,
    pub model_name: String,
    /// The window whose rollouts the weights were trained on.
    pub parent_window: Option<WindowStart>,
    /// Informative.
    pub training_config: Map<String, Value>,
    /// Informative.
    pub git_commit: String,
    /// Unix seconds; informative.
    pub created_at: f64,
}

/// What was published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedFull {
    pub window: CheckpointWindow,
    pub weights_hash: WeightsHash,
    /// Names of the published files.
    pub files: Vec<String>,
    /// Bytes of all files.
    pub bytes: u64,
}

/// Why a checkpoint is not published; no READY marker was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    #[error("{} could not be read", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the weights cannot be read")]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the metadata would be refused by every consumer")]
    Metadata(#[from] MetadataError),
    #[error("the metadata would make every miner skip its windows")]
    Policy(#[from] PolicyDefect),
    #[error("the metadata would name no usable files")]
    Files(#[from] FilesDefect),
}

/// Publishes all files of `folder` as the FULL tree of `window`: files, then `metadata.json`, the type marker, and last the
/// marker `READY-{ready}`, with which the checkpoint begins to exist. A `metadata.json` of the folder itself is not
/// published.
///
/// # Errors
/// [`PublishError`]; nothing refers to what was uploaded by then.
pub async fn publish_full(
    store: &CheckpointStore,
    window: CheckpointWindow,
    folder: &Path,
    input: &MetadataInput,
    ready: u64,
) -> Result<PublishedFull, PublishError> {
    let local = folder.to_path_buf();
    let contents = tokio::task::spawn_blocking(move || Contents::read(&local)).await;
    let contents = contents.expect("reading a folder does not panic")?;
    let document = document(window, input, &contents);
    let text = serde_json::to_vec_pretty(&document).expect("a JSON value has a text");
    let checked = Metadata::parse(&text, window, Tree::Full)?;
    checked.policy()?;
    let files: Vec<String> = checked.files()?.required().map(|(name, _)| name.to_owned()).collect();
    for name in &files {
        store.put_file(&object_key(window, Tree::Full, name), &folder.join(name)).await?;
    }
    store.put_bytes(&object_key(window, Tree::Full, METADATA_FILE), text).await?;
    store.put_bytes(&object_key(window, Tree::Full, Tree::Full.as_str()), Vec::new()).await?;
    store.put_bytes(&ready_key(window, ready), Vec::new()).await?;
    Ok(PublishedFull { window, weights_hash: contents.weights_hash, files, bytes: contents.bytes })
}

struct Contents {
    manifest: Manifest,
    weights_hash: WeightsHash,
    bytes: u64,
}

impl Contents {
    fn read(folder: &Path) -> Result<Self, PublishError> {
        let read_error = |path: &Path| {
            let path = path.to_path_buf();
            move |source| PublishError::Read { path, source }
        };
        let names = durable::files_below(folder).map_err(read_error(folder))?;
        let mut bytes = 0;
        let mut files = Vec::new();
        for name in names.into_iter().filter(|name| !is_rewritten(name) && name != Tree::Full.as_str()) {
            let path = folder.join(&name);
            let (length, digest) = hash_file(&path).map_err(read_error(&path))?;
            bytes += length;
            files.push((name, digest));
        }
        let weights_hash = WeightsFiles::open(folder)?.hash()?;
        Ok(Self { manifest: files.into_iter().collect(), weights_hash, bytes })
    }
}

fn document(window: CheckpointWindow, input: &MetadataInput, contents: &Contents) -> Value {
    json!({
        "window": window.0,
        "parent_window": input.parent_window.map(|parent| parent.block().0),
        "file_manifest": contents.manifest.to_json(),
        "training_config": input.training_config,
        "git_commit": input.git_commit,
        "created_at": input.created_at,
        "model_name": input.model_name,
        "checkpoint_type": Tree::Full.as_str(),
        "prev_window": null,
        "anchor_window": null,
        "weights_hash": contents.weights_hash.to_string(),
        "env_id": input.env_id,
        "env_params": input.env_params,
        "generation_params": input.generation,
        "thinking_mode": input.thinking_mode.as_str(),
    })
}
