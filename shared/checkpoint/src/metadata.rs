//! `metadata.json` of a tree: strict JSON, the structural checks that keep a wrong or hostile document out, and the parts
//! that decide whether and how a window is mined.

use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use serde_json::{Map, Value};

use crate::layout::Tree;
use crate::manifest::{Manifest, ManifestDefect};
use crate::policy::{MiningPolicy, PolicyDefect};

/// What a metadata document is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Usable.
    Mine,
    /// A valid document, but no window is mined with it.
    SkipWindow,
    /// As if the object did not exist.
    Absent,
    /// A structural defect: this tree is ignored, the other one is tried.
    RejectMetadata,
    /// The delta may not be used; the full tree is tried.
    UnusableDelta,
}

impl Verdict {
    /// The verdict as reports spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mine => "mine",
            Self::SkipWindow => "skip_window",
            Self::Absent => "absent",
            Self::RejectMetadata => "reject_metadata",
            Self::UnusableDelta => "unusable_delta",
        }
    }
}

/// Why a document gives no [`Metadata`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    #[error("the object does not exist")]
    NotPublished,
    #[error("the object cannot be read: {0}")]
    Unreadable(String),
    #[error("the document is no JSON")]
    Json(#[source] serde_json::Error),
    #[error("the document is {0}: a JSON object with content is expected")]
    NotAnObject(&'static str),
    #[error("window is {found}, the key says {expected}")]
    Window { found: String, expected: CheckpointWindow },
    #[error("checkpoint_type is {found}, the key says {expected}")]
    Type { found: String, expected: Tree },
    #[error("the manifest cannot be used")]
    Manifest(#[from] ManifestDefect),
}

impl MetadataError {
    /// Whether the document counts as absent or as rejected.
    #[must_use]
    pub const fn verdict(&self) -> Verdict {
        match self {
            Self::NotPublished | Self::Unreadable(_) | Self::Json(_) | Self::NotAnObject(_) => Verdict::Absent,
            Self::Window { .. } | Self::Type { .. } | Self::Manifest(_) => Verdict::RejectMetadata,
        }
    }
}

/// Why the files of a tree may not be used although its document is sound.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FilesDefect {
    #[error("the metadata lacks file_manifest: files that nothing vouches for are not loaded")]
    NoManifest,
    #[error("file_manifest names no file")]
    EmptyManifest,
    #[error("prev_window is {found}: a delta of checkpoint {window} needs an earlier checkpoint's window there")]
    NoBase { window: CheckpointWindow, found: String },
}

/// The `weights_hash` that a document states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PublishedHash {
    /// Absent or null.
    None,
    Stated(WeightsHash),
    /// A value that is no hash; it equals no weights.
    Malformed(String),
}

impl PublishedHash {
    pub(crate) fn from_json(stated: Option<&Value>) -> Self {
        match stated {
            None | Some(Value::Null) => Self::None,
            Some(stated) => match stated.as_str().and_then(|hash| hash.parse().ok()) {
                Some(hash) => Self::Stated(hash),
                None => Self::Malformed(stated.to_string()),
            },
        }
    }
}

impl std::fmt::Display for PublishedHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Stated(hash) => hash.fmt(f),
            Self::Malformed(text) => f.write_str(text),
        }
    }
}

/// Metadata of one tree whose document is sound.
#[derive(Debug, Clone)]
pub struct Metadata {
    pub window: CheckpointWindow,
    pub tree: Tree,
    /// Name of the model for the signed commitment; `None` if the document has none.
    pub model_name: Option<String>,
    pub weights_hash: PublishedHash,
    manifest: Option<Manifest>,
    policy: Result<MiningPolicy, PolicyDefect>,
    document: Map<String, Value>,
}

impl Metadata {
    /// Reads the document that lies under the key of (`window`, `tree`). Unknown keys are ignored, a repeated key takes its
    /// last value, informative keys may hold anything.
    ///
    /// # Errors
    /// [`MetadataError`]: no JSON object, or one that contradicts its key or names unsafe files.
    pub fn parse(text: &[u8], window: CheckpointWindow, tree: Tree) -> Result<Self, MetadataError> {
        let document = match serde_json::from_slice(text).map_err(MetadataError::Json)? {
            Value::Object(document) if document.is_empty() => {
                return Err(MetadataError::NotAnObject("an empty object"));
            }
            Value::Object(document) => document,
            Value::Array(_) => return Err(MetadataError::NotAnObject("an array")),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
                return Err(MetadataError::NotAnObject("a single value"));
            }
        };
        Self::from_document(document, window, tree)
    }

    fn from_document(
        document: Map<String, Value>,
        window: CheckpointWindow,
        tree: Tree,
    ) -> Result<Self, MetadataError> {
        match document.get("window") {
            None => {}
            Some(stated) if stated.as_u64() == Some(window.0) => {}
            Some(other) => return Err(MetadataError::Window { found: other.to_string(), expected: window }),
        }
        match document.get("checkpoint_type") {
            None => {}
            Some(stated) if stated.as_str() == Some(tree.as_str()) => {}
            Some(other) => return Err(MetadataError::Type { found: other.to_string(), expected: tree }),
        }
        let manifest = match document.get("file_manifest") {
            None | Some(Value::Null) => None,
            Some(entries) => Some(Manifest::from_json(entries)?),
        };
        let text = |key: &str| document.get(key).and_then(Value::as_str);
        let weights_hash = PublishedHash::from_json(document.get("weights_hash"));
        Ok(Self {
            window,
            tree,
            model_name: text("model_name").filter(|name| !name.is_empty()).map(str::to_owned),
            weights_hash,
            manifest,
            policy: MiningPolicy::from_document(&document),
            document,
        })
    }

    /// Environment, sampling and thinking mode.
    ///
    /// # Errors
    /// [`PolicyDefect`]: the window is skipped.
    pub fn policy(&self) -> Result<&MiningPolicy, PolicyDefect> {
        self.policy.as_ref().map_err(Clone::clone)
    }

    /// The files of the tree.
    ///
    /// # Errors
    /// [`FilesDefect`]: the tree may not be used.
    pub fn files(&self) -> Result<&Manifest, FilesDefect> {
        let manifest = self.manifest.as_ref().ok_or(FilesDefect::NoManifest)?;
        if manifest.is_empty() {
            return Err(FilesDefect::EmptyManifest);
        }
        if self.tree == Tree::Delta {
            self.base()?;
        }
        Ok(manifest)
    }

    /// The checkpoint that a delta is relative to; always earlier than the delta's own.
    ///
    /// # Errors
    /// [`FilesDefect::NoBase`] if there is none, as for every full tree.
    pub fn base(&self) -> Result<CheckpointWindow, FilesDefect> {
        let stated = self.document.get("prev_window").unwrap_or(&Value::Null);
        match stated.as_u64() {
            Some(base) if base < self.window.0 && self.tree == Tree::Delta => Ok(CheckpointWindow(base)),
            _ => Err(FilesDefect::NoBase { window: self.window, found: stated.to_string() }),
        }
    }

    /// What the document as a whole is good for.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match (self.policy(), self.files(), self.tree) {
            (Err(_), _, _) | (Ok(_), Err(FilesDefect::NoManifest), _) => Verdict::SkipWindow,
            (Ok(_), Err(_), Tree::Delta) => Verdict::UnusableDelta,
            (Ok(_), Err(_), Tree::Full) => Verdict::RejectMetadata,
            (Ok(_), Ok(_), _) => Verdict::Mine,
        }
    }

    /// The whole document as published.
    #[must_use]
    pub const fn document(&self) -> &Map<String, Value> {
        &self.document
    }
}

/// Both trees' metadata of one checkpoint, as one look at the store found them.
#[derive(Debug)]
pub struct Published {
    pub window: CheckpointWindow,
    pub full: Result<Metadata, MetadataError>,
    pub delta: Result<Metadata, MetadataError>,
}

/// Why a checkpoint prescribes nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    #[error("checkpoint {window} has no readable metadata (FULL: {full}; DELTA: {delta})")]
    NoMetadata { window: CheckpointWindow, full: String, delta: String },
    #[error("checkpoint {window} is not fit for mining: its {tree} metadata is defective")]
    Defective {
        window: CheckpointWindow,
        tree: Tree,
        #[source]
        defect: PolicyDefect,
    },
}

impl Published {
    /// Environment, sampling and thinking mode of the checkpoint. The delta's document wins over the full tree's whenever it
    /// is readable, also when what it says is defective: validators judge by it.
    ///
    /// # Errors
    /// [`PolicyError`]: the window is skipped.
    pub fn policy(&self) -> Result<&MiningPolicy, PolicyError> {
        match (&self.delta, &self.full) {
            (Ok(metadata), _) | (Err(_), Ok(metadata)) => metadata.policy().map_err(|defect| PolicyError::Defective {
                window: self.window,
                tree: metadata.tree,
                defect,
            }),
            (Err(delta), Err(full)) => {
                Err(PolicyError::NoMetadata { window: self.window, full: full.to_string(), delta: delta.to_string() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const WINDOW: CheckpointWindow = CheckpointWindow(3030);

    fn document(changes: Value) -> Vec<u8> {
        let mut document = json!({
            "window": 3030,
            "checkpoint_type": "FULL",
            "file_manifest": {"a": "0".repeat(64)},
            "env_id": "gsm8k",
            "thinking_mode": "instructed",
            "generation_params":
                {"max_tokens": 64, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
        });
        for (key, value) in changes.as_object().unwrap() {
            document[key] = value.clone();
        }
        serde_json::to_vec(&document).unwrap()
    }

    fn full(changes: Value) -> Result<Metadata, MetadataError> {
        Metadata::parse(&document(changes), WINDOW, Tree::Full)
    }

    #[test]
    fn a_full_tree_without_files_is_ignored() {
        let empty = full(json!({"file_manifest": {"metadata.json": "0".repeat(64)}})).unwrap();
        assert_eq!(empty.files().unwrap_err(), FilesDefect::EmptyManifest);
        assert_eq!(empty.verdict(), Verdict::RejectMetadata);
    }

    #[test]
    fn a_malformed_weights_hash_is_kept_for_the_report() {
        assert_eq!(
            full(json!({"weights_hash": "xyz"})).unwrap().weights_hash,
            PublishedHash::Malformed("\"xyz\"".into())
        );
        assert_eq!(full(json!({"weights_hash": null})).unwrap().weights_hash, PublishedHash::None);
        let stated = full(json!({"weights_hash": "000000000000000000000000000000ff"})).unwrap().weights_hash;
        assert_eq!(stated, PublishedHash::Stated(WeightsHash(255)));
    }

    #[test]
    fn the_deltas_policy_wins_even_when_it_is_defective() {
        let delta = json!({"checkpoint_type": "DELTA", "prev_window": 3000, "env_id": ""});
        let published = Published {
            window: WINDOW,
            full: full(json!({})),
            delta: Metadata::parse(&document(delta), WINDOW, Tree::Delta),
        };
        let error = published.policy().unwrap_err();
        assert!(matches!(error, PolicyError::Defective { tree: Tree::Delta, .. }), "{error}");
        let without_delta = Published { delta: Err(MetadataError::NotPublished), ..published };
        assert_eq!(without_delta.policy().unwrap().env_id, "gsm8k");
    }

    #[test]
    fn no_metadata_at_all_names_both_reasons() {
        let published = Published {
            window: WINDOW,
            full: Metadata::parse(b"{", WINDOW, Tree::Full),
            delta: Err(MetadataError::NotPublished),
        };
        assert_eq!(
            published.policy().unwrap_err().to_string(),
            "checkpoint 3030 has no readable metadata (FULL: the document is no JSON; DELTA: the object does not exist)"
        );
    }

    #[test]
    fn a_full_tree_has_no_base() {
        assert!(full(json!({"prev_window": 3000})).unwrap().base().is_err());
    }
}
