//! What a folder of the cache says about itself: the published document with what the installation found out.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Damage, Installed};
use crate::blocking::Interest;
use crate::layout::{METADATA_FILE, Tree};
use crate::manifest::Manifest;
use crate::metadata::{Metadata, PublishedHash};
use crate::mirror::{CHANGES_KEY, CHECKSUMS_KEY, ChangeSet, checksums_from_json, checksums_to_json};
use crate::weights::{HashAgreement, WeightsError, WeightsFiles};

/// Key that says how the hash was checked; only this crate writes it.
const AGREEMENT_KEY: &str = "weights_hash_agreement";
/// Key under which the hash of the published document is kept.
const PUBLISHED_HASH_KEY: &str = "published_weights_hash";
const MADE_FROM_KEY: &str = "made_from";

/// How a checkpoint came into the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MadeFrom {
    /// Its own full tree.
    Full,
    /// The checkpoint `base` and deltas, oldest first.
    Deltas { base: CheckpointWindow, deltas: Vec<CheckpointWindow> },
}

impl MadeFrom {
    /// The tree of the checkpoint whose document was used.
    #[must_use]
    pub const fn tree(&self) -> Tree {
        match self {
            Self::Full => Tree::Full,
            Self::Deltas { .. } => Tree::Delta,
        }
    }

    /// The checkpoint on which this one rests.
    #[must_use]
    pub const fn base(&self) -> Option<CheckpointWindow> {
        match self {
            Self::Full => None,
            Self::Deltas { base, .. } => Some(*base),
        }
    }
}

/// What an installation found out about the weights of a folder.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) weights_hash: WeightsHash,
    pub(crate) agreement: HashAgreement,
    pub(crate) checksums: Arc<BTreeMap<String, u64>>,
    pub(crate) changes: Option<ChangeSet>,
    pub(crate) made_from: MadeFrom,
}

impl Record {
    /// The document for a folder with the files of `manifest`: as published, but of a full tree, with this record.
    pub(crate) fn document(&self, published: &Metadata, manifest: &Manifest) -> Value {
        let mut document = published.document().clone();
        let mut set = |key: &str, value: Value| document.insert(key.to_owned(), value);
        set("file_manifest", manifest.to_json());
        set("checkpoint_type", Value::from(Tree::Full.as_str()));
        let stated = set("weights_hash", Value::from(self.weights_hash.to_string()));
        set(PUBLISHED_HASH_KEY, stated.unwrap_or(Value::Null));
        set(AGREEMENT_KEY, json!(self.agreement));
        set(MADE_FROM_KEY, json!(self.made_from));
        set(CHECKSUMS_KEY, checksums_to_json(&self.checksums));
        if let Some(changes) = &self.changes {
            set(CHANGES_KEY, changes.to_json());
        }
        if let MadeFrom::Deltas { base, .. } = &self.made_from {
            set("reconstructed_from_delta", Value::from(true));
            set("original_anchor_window", json!(base));
        }
        Value::Object(document)
    }

    /// The record of a folder, without a look at its weights; `None` if another program wrote its document.
    pub(crate) fn read(folder: &Path, metadata: &Metadata) -> Option<Self> {
        let document = metadata.document();
        let PublishedHash::Stated(weights_hash) = metadata.weights_hash else { return None };
        Some(Self {
            weights_hash,
            agreement: serde_json::from_value(document.get(AGREEMENT_KEY)?.clone()).ok()?,
            checksums: Arc::new(checksums_from_json(document.get(CHECKSUMS_KEY)?)?),
            changes: document.get(CHANGES_KEY).and_then(|changes| ChangeSet::from_json(changes, folder)),
            made_from: made_from(metadata),
        })
    }

    /// The record of a folder that has none, from its weights.
    pub(crate) fn compute(folder: &Path, published: &Metadata, interest: &Interest) -> Result<Self, WeightsError> {
        let weights = WeightsFiles::open(folder)?.read_while(interest);
        let fingerprint = weights.fingerprint()?;
        let agreement = weights.agreement(fingerprint.weights_hash, &published.weights_hash)?;
        Ok(Self {
            weights_hash: fingerprint.weights_hash,
            agreement,
            checksums: Arc::new(fingerprint.checksums),
            changes: None,
            made_from: made_from(published),
        })
    }

    pub(crate) fn installed(self, folder: &Path, metadata: Metadata) -> Installed {
        Installed {
            window: metadata.window,
            folder: folder.to_path_buf(),
            weights_hash: self.weights_hash,
            agreement: self.agreement,
            // The folder may have had another name when the record was made.
            changes: self
                .changes
                .map(|changes| ChangeSet { file: folder.join(ChangeSet::file_name(changes.base_window)), ..changes }),
            checksums: self.checksums,
            made_from: self.made_from,
            metadata,
            notices: Vec::new(),
        }
    }
}

/// The hash that was published when the folder with this document was made.
pub(crate) fn published_hash(metadata: &Metadata) -> PublishedHash {
    match metadata.document().get(PUBLISHED_HASH_KEY) {
        None => metadata.weights_hash.clone(),
        Some(stated) => PublishedHash::from_json(Some(stated)),
    }
}

fn made_from(metadata: &Metadata) -> MadeFrom {
    let recorded = metadata.document().get(MADE_FROM_KEY).cloned();
    recorded.and_then(|value| serde_json::from_value(value).ok()).unwrap_or(MadeFrom::Full)
}

/// The document of a folder, as far as it can be believed without a look at the files.
pub(crate) fn read_document(folder: &Path, window: CheckpointWindow) -> Result<Metadata, Damage> {
    let text = std::fs::read(folder.join(METADATA_FILE)).map_err(Damage::MetadataUnreadable)?;
    let metadata = Metadata::parse(&text, window, Tree::Full)?;
    metadata.files()?;
    Ok(metadata)
}

/// Verifies every file of a folder.
pub(crate) fn verify(folder: &Path, window: CheckpointWindow, interest: &Interest) -> Result<Installed, Damage> {
    let metadata = read_document(folder, window)?;
    metadata.files()?.verify_folder_while(folder, interest)?;
    let record = match Record::read(folder, &metadata) {
        Some(record) => record,
        None => Record::compute(folder, &metadata, interest)?,
    };
    Ok(record.installed(folder, metadata))
}
