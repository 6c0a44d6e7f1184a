//! Publishing a checkpoint as the trainer does; for the local demonstration and for tests. A miner never writes here.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use grail_protocol::ids::{CheckpointWindow, WeightsHash, WindowStart};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::delta::{DELTA_METADATA_FILE, DeltaEncoder, DeltaFormat, EncodeError, PAYLOAD_FILE, Shapes};
use crate::durable;
use crate::layout::{METADATA_FILE, Tree, object_key, ready_key};
use crate::manifest::{Manifest, Sha256Digest, hash_file, is_rewritten};
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

/// What a delta is made of, and under which names it goes out.
#[derive(Clone, Copy, Debug)]
pub struct DeltaInput<'a> {
    pub window: CheckpointWindow,
    /// Folder of the checkpoint.
    pub folder: &'a Path,
    pub base_window: CheckpointWindow,
    /// Folder of the checkpoint that the delta is relative to.
    pub base_folder: &'a Path,
    /// The nearest full checkpoint; informative.
    pub anchor: Option<CheckpointWindow>,
    pub format: DeltaFormat,
    /// The window of the READY marker; without one the tree is a link that others may use, but no window's checkpoint.
    pub ready: Option<u64>,
}

/// What was published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedDelta {
    pub window: CheckpointWindow,
    /// Hash of all weights of the checkpoint's folder.
    pub weights_hash: WeightsHash,
    /// Elements that the delta lists.
    pub listed: u64,
    /// Elements of the checkpoint.
    pub elements: u64,
    /// Bytes of the payload.
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
    #[error("there is no delta between the two checkpoints: publish the new one in full")]
    Encode(#[from] EncodeError),
    #[error("there is no delta between the two checkpoints, because {what}: publish the new one in full")]
    OtherTensors { what: String },
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
    let tree = TreeFacts { window, tree: Tree::Full, base: None, weights_hash: contents.weights_hash };
    let document = document(&tree, input, &contents.manifest);
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

/// Publishes what differs between two folders as the DELTA tree of a checkpoint: payload and `delta_metadata.json`, then
/// `metadata.json`, the type marker, and last the READY marker, if there is to be one. Holds both weights of a tensor and the whole
/// payload in memory.
///
/// # Errors
/// [`PublishError`]; nothing refers to what was uploaded by then.
pub async fn publish_delta(
    store: &CheckpointStore,
    delta: &DeltaInput<'_>,
    input: &MetadataInput,
) -> Result<PublishedDelta, PublishError> {
    let window = delta.window;
    let (base, folder, format) = (delta.base_folder.to_path_buf(), delta.folder.to_path_buf(), delta.format);
    let encoded = tokio::task::spawn_blocking(move || DeltaContents::encode(&base, &folder, format)).await;
    let contents = encoded.expect("encoding a delta does not panic")?;
    let payload = contents.payload;
    let about = delta_document(delta, contents.elements, contents.listed, &contents.shapes);
    let about = serde_json::to_vec_pretty(&about).expect("a JSON value has a text");
    let sha256 = |bytes: &[u8]| Sha256Digest(Sha256::digest(bytes).into());
    let files = [(PAYLOAD_FILE, sha256(&payload)), (DELTA_METADATA_FILE, sha256(&about))];
    let manifest: Manifest = files.into_iter().map(|(name, digest)| (name.to_owned(), digest)).collect();
    let base = Some((delta.base_window, delta.anchor));
    let tree = TreeFacts { window, tree: Tree::Delta, base, weights_hash: contents.weights_hash };
    let text = serde_json::to_vec_pretty(&document(&tree, input, &manifest)).expect("a JSON value has a text");
    let checked = Metadata::parse(&text, window, Tree::Delta)?;
    checked.policy()?;
    checked.files()?;

    let bytes = payload.len() as u64;
    let key = |name: &str| object_key(window, Tree::Delta, name);
    store.put_bytes(&key(PAYLOAD_FILE), payload).await?;
    store.put_bytes(&key(DELTA_METADATA_FILE), about).await?;
    store.put_bytes(&key(METADATA_FILE), text).await?;
    store.put_bytes(&key(Tree::Delta.as_str()), Vec::new()).await?;
    if let Some(ready) = delta.ready {
        store.put_bytes(&ready_key(window, ready), Vec::new()).await?;
    }
    let (weights_hash, listed, elements) = (contents.weights_hash, contents.listed, contents.elements);
    Ok(PublishedDelta { window, weights_hash, listed, elements, bytes })
}

struct DeltaContents {
    payload: Vec<u8>,
    listed: u64,
    elements: u64,
    shapes: BTreeMap<String, Vec<u64>>,
    weights_hash: WeightsHash,
}

impl DeltaContents {
    fn encode(base: &Path, folder: &Path, format: DeltaFormat) -> Result<Self, PublishError> {
        let (base, new) = (WeightsFiles::open(base)?, WeightsFiles::open(folder)?);
        let (base_shapes, shapes) = (Shapes::from(&base), Shapes::from(&new));
        let mut encoder = DeltaEncoder::new(format);
        let names = base.tensors().keys().chain(new.tensors().keys());
        if let Some(name) = names.into_iter().find(|name| base_shapes.get(name) != shapes.get(name)) {
            let what = format!("tensor {name} is not in both with one dtype and shape");
            return Err(PublishError::OtherTensors { what });
        }
        for name in new.tensors().keys() {
            let (Some(old), Some(new), Some(shape)) = (base.read(name)?, new.read(name)?, shapes.get(name)) else {
                continue;
            };
            encoder.tensor(name, shape, &old, &new)?;
        }
        let (encoded, elements) = (encoder.finish()?, shapes.elements());
        let (payload, listed, shapes) = (encoded.payload, encoded.listed, encoded.shapes);
        Ok(Self { payload, listed, elements, shapes, weights_hash: new.hash()? })
    }
}

fn delta_document(delta: &DeltaInput<'_>, elements: u64, listed: u64, shapes: &BTreeMap<String, Vec<u64>>) -> Value {
    #[expect(clippy::cast_precision_loss, reason = "an informative ratio")]
    let sparsity = if elements == 0 { 1.0 } else { 1.0 - listed as f64 / elements as f64 };
    json!({
        "format": delta.format.as_str(),
        "threshold": 0.0,
        "prev_window": delta.base_window.0,
        "anchor_window": delta.anchor.map(|anchor| anchor.0),
        "shapes": shapes,
        "total_params": elements,
        "nonzero_params": listed,
        "sparsity_ratio": sparsity,
    })
}

/// What a metadata document says about its tree.
struct TreeFacts {
    window: CheckpointWindow,
    tree: Tree,
    /// Of a delta: the checkpoint that it is relative to, and the nearest full one.
    base: Option<(CheckpointWindow, Option<CheckpointWindow>)>,
    weights_hash: WeightsHash,
}

fn document(tree: &TreeFacts, input: &MetadataInput, manifest: &Manifest) -> Value {
    json!({
        "window": tree.window.0,
        "parent_window": input.parent_window.map(|parent| parent.block().0),
        "file_manifest": manifest.to_json(),
        "training_config": input.training_config,
        "git_commit": input.git_commit,
        "created_at": input.created_at,
        "model_name": input.model_name,
        "checkpoint_type": tree.tree.as_str(),
        "prev_window": tree.base.map(|(base, _)| base.0),
        "anchor_window": tree.base.and_then(|(_, anchor)| anchor).map(|anchor| anchor.0),
        "weights_hash": tree.weights_hash.to_string(),
        "env_id": input.env_id,
        "env_params": input.env_params,
        "generation_params": input.generation,
        "thinking_mode": input.thinking_mode.as_str(),
    })
}
