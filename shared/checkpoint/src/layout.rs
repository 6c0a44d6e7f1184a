//! Names of the objects of a checkpoint: one place that builds and takes apart their keys.
//!
//! ```text
//! grail/checkpoints/checkpoint-{W}/READY-{R}
//! grail/checkpoints/checkpoint-{W}/FULL/metadata.json, config.json, model.safetensors, ...
//! grail/checkpoints/checkpoint-{W}/DELTA/metadata.json, delta_metadata.json, delta_sparse.bin.zst
//! ```

use std::fmt;

use grail_protocol::ids::CheckpointWindow;

/// What every key of a checkpoint begins with, without a final slash.
pub const ROOT: &str = "grail/checkpoints";
/// Description of a tree; never part of its own manifest.
pub const METADATA_FILE: &str = "metadata.json";
/// The trainer's signature over the metadata; no consumer verifies it.
pub const SIGNATURE_FILE: &str = "manifest.sig";
/// Suffix of a compressed twin, which wins over the plain object.
pub const GZIP_SUFFIX: &str = ".gz";

/// The two forms in which a checkpoint is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tree {
    /// All files of a model folder.
    Full,
    /// The elements that changed since another checkpoint.
    Delta,
}

impl Tree {
    /// The tree as it is spelt in keys, in metadata and as the name of its marker object.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Full => "FULL",
            Self::Delta => "DELTA",
        }
    }
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An object inside a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeObject {
    pub window: CheckpointWindow,
    pub tree: Tree,
    /// Path below the tree, for instance `config.json`.
    pub name: String,
}

/// Name of the folder of a checkpoint, in the store and in the local cache.
#[must_use]
pub fn folder_name(window: CheckpointWindow) -> String {
    format!("checkpoint-{window}")
}

/// The checkpoint whose folder has this name; `None` for every other spelling, also with leading zeros.
#[must_use]
pub fn parse_folder_name(name: &str) -> Option<CheckpointWindow> {
    let digits = name.strip_prefix("checkpoint-")?;
    let window = CheckpointWindow(digits.parse().ok()?);
    (folder_name(window) == name).then_some(window)
}

/// Key of the marker that makes a checkpoint usable for windows after `ready`.
#[must_use]
pub fn ready_key(window: CheckpointWindow, ready: u64) -> String {
    format!("{ROOT}/{}/READY-{ready}", folder_name(window))
}

/// Key of the object `name` in a tree.
#[must_use]
pub fn object_key(window: CheckpointWindow, tree: Tree, name: &str) -> String {
    format!("{ROOT}/{}/{tree}/{name}", folder_name(window))
}

/// Takes a key of a tree's object apart; `None` for markers and for keys of another layout.
#[must_use]
pub fn parse_object_key(key: &str) -> Option<TreeObject> {
    let (folder, rest) = key.strip_prefix(ROOT)?.strip_prefix('/')?.split_once('/')?;
    let (tree, name) = rest.split_once('/')?;
    let tree = [Tree::Full, Tree::Delta].into_iter().find(|candidate| candidate.as_str() == tree)?;
    if name.is_empty() {
        return None;
    }
    Some(TreeObject { window: parse_folder_name(folder)?, tree, name: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_built_as_the_trainer_builds_them() {
        let window = CheckpointWindow(3060);
        assert_eq!(ready_key(window, 3090), "grail/checkpoints/checkpoint-3060/READY-3090");
        assert_eq!(
            object_key(window, Tree::Delta, METADATA_FILE),
            "grail/checkpoints/checkpoint-3060/DELTA/metadata.json"
        );
    }

    #[test]
    fn object_keys_are_taken_apart_again() {
        let key = object_key(CheckpointWindow(30), Tree::Full, "nested/config.json");
        let expected =
            TreeObject { window: CheckpointWindow(30), tree: Tree::Full, name: "nested/config.json".to_owned() };
        assert_eq!(parse_object_key(&key), Some(expected));
    }

    #[test]
    fn other_keys_are_no_tree_objects() {
        for key in [
            "grail/checkpoints/checkpoint-30/READY-30",
            "grail/checkpoints/checkpoint-30/FULL",
            "grail/checkpoints/checkpoint-30/FULL/",
            "grail/checkpoints/checkpoint-030/FULL/x",
            "grail/checkpoints/checkpoint-30-bak/FULL/x",
            "grail/checkpoints/checkpoint-30/full/x",
            "grail/windows/checkpoint-30/FULL/x",
        ] {
            assert_eq!(parse_object_key(key), None, "{key}");
        }
    }
}
