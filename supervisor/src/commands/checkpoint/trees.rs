//! What was published as one checkpoint: each tree's metadata with the verdict on it, held against the listing.

use grail_checkpoint::layout::object_key;
use grail_checkpoint::metadata::PublishedHash;
use grail_checkpoint::{Listing, Metadata, MetadataError, Published, Tree};
use grail_process::with_causes;
use grail_protocol::ids::CheckpointWindow;
use serde::Serialize;

use super::catalogue::{StoredCheckpoint, StoredTree};

/// One tree of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct TreeReport {
    pub tree: &'static str,
    pub objects: usize,
    /// As stored.
    pub bytes: u64,
    /// What the metadata is good for.
    pub verdict: &'static str,
    /// Why the verdict is not "mine".
    pub reason: Option<String>,
    /// The hash as published, also one that is malformed.
    pub weights_hash: Option<String>,
    /// The checkpoint that a delta is relative to.
    pub base: Option<CheckpointWindow>,
    /// Files of the manifest that the store does not hold.
    pub missing: Vec<String>,
}

/// The trees that the store holds something of, FULL first.
pub(super) fn reports(stored: &StoredCheckpoint, published: &Published, listing: &Listing) -> Vec<TreeReport> {
    let of = |tree, metadata| stored.trees.get(&tree).map(|objects| report(tree, *objects, metadata, listing));
    of(Tree::Full, &published.full).into_iter().chain(of(Tree::Delta, &published.delta)).collect()
}

fn report(tree: Tree, stored: StoredTree, metadata: &Result<Metadata, MetadataError>, listing: &Listing) -> TreeReport {
    let blank = TreeReport {
        tree: tree.as_str(),
        objects: stored.objects,
        bytes: stored.bytes,
        verdict: "",
        reason: None,
        weights_hash: None,
        base: None,
        missing: Vec::new(),
    };
    match metadata {
        Err(error) => TreeReport { verdict: error.verdict().as_str(), reason: Some(with_causes(error)), ..blank },
        Ok(metadata) => TreeReport {
            verdict: metadata.verdict().as_str(),
            reason: defects(metadata),
            weights_hash: stated_hash(&metadata.weights_hash),
            base: metadata.base().ok(),
            missing: missing(metadata, listing),
            ..blank
        },
    }
}

/// All that is wrong with a document that could be read.
fn defects(metadata: &Metadata) -> Option<String> {
    let policy = metadata.policy().err().map(|defect| with_causes(&defect));
    let files = metadata.files().err().map(|defect| with_causes(&defect));
    let all: Vec<String> = policy.into_iter().chain(files).collect();
    (!all.is_empty()).then(|| all.join("; "))
}

fn stated_hash(hash: &PublishedHash) -> Option<String> {
    match hash {
        PublishedHash::None => None,
        PublishedHash::Stated(hash) => Some(hash.to_string()),
        PublishedHash::Malformed(text) => Some(text.clone()),
    }
}

fn missing(metadata: &Metadata, listing: &Listing) -> Vec<String> {
    let Ok(manifest) = metadata.files() else { return Vec::new() };
    let names = manifest.required().map(|(name, _)| name);
    names
        .filter(|name| listing.size_as_read(&object_key(metadata.window, metadata.tree, name)).is_none())
        .map(str::to_owned)
        .collect()
}
