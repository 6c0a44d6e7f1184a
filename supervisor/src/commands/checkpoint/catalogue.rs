//! What a listing says about each checkpoint, before any document is read.

use std::collections::{BTreeMap, BTreeSet};

use grail_checkpoint::{Listing, Tree, layout, ready};
use grail_protocol::ids::CheckpointWindow;

/// Objects of one tree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct StoredTree {
    pub objects: usize,
    /// As stored: a compressed object counts compressed, and beside its plain twin.
    pub bytes: u64,
}

/// What the store holds under one checkpoint's name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StoredCheckpoint {
    /// Windows of its READY markers, ascending.
    pub ready: BTreeSet<u64>,
    pub trees: BTreeMap<Tree, StoredTree>,
}

/// All checkpoints of a listing, those with markers alone among them.
pub(super) fn catalogue(listing: &Listing) -> BTreeMap<CheckpointWindow, StoredCheckpoint> {
    let mut checkpoints: BTreeMap<CheckpointWindow, StoredCheckpoint> = BTreeMap::new();
    for key in listing.keys() {
        if let Some(marker) = ready::parse_marker(key) {
            checkpoints.entry(marker.checkpoint).or_default().ready.insert(marker.ready);
        }
        if let Some(object) = layout::parse_object_key(key) {
            let tree = checkpoints.entry(object.window).or_default().trees.entry(object.tree).or_default();
            tree.objects += 1;
            tree.bytes = tree.bytes.saturating_add(listing.size(key).unwrap_or(0));
        }
    }
    checkpoints
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use grail_checkpoint::CheckpointStore;

    use super::*;

    #[tokio::test]
    async fn markers_and_trees_are_gathered_by_checkpoint() {
        let store = CheckpointStore::new(Arc::new(object_store::memory::InMemory::new()));
        let window = CheckpointWindow(3_030);
        for (key, bytes) in [
            (layout::ready_key(window, 3_090), 0),
            (layout::ready_key(window, 3_060), 0),
            (layout::object_key(window, Tree::Delta, "metadata.json"), 7),
            (layout::object_key(window, Tree::Delta, "delta_sparse.bin.zst"), 20),
            (layout::object_key(CheckpointWindow(3_060), Tree::Full, "FULL"), 0),
            (layout::ready_key(CheckpointWindow(3_090), 3_090), 0),
            (format!("{}/notes.txt", layout::ROOT), 5),
        ] {
            store.put_bytes(&key, vec![0; bytes]).await.unwrap();
        }
        let found = catalogue(&store.list().await.unwrap());
        let tree = |tree, objects, bytes| BTreeMap::from([(tree, StoredTree { objects, bytes })]);
        let expected = [
            (3_030, StoredCheckpoint { ready: [3_060, 3_090].into(), trees: tree(Tree::Delta, 2, 27) }),
            (3_060, StoredCheckpoint { ready: BTreeSet::new(), trees: tree(Tree::Full, 1, 0) }),
            (3_090, StoredCheckpoint { ready: [3_090].into(), trees: BTreeMap::new() }),
        ];
        assert_eq!(found, expected.map(|(window, stored)| (CheckpointWindow(window), stored)).into());
    }
}
