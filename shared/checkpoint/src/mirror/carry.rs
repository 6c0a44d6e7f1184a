//! The files beside the weights: a delta cannot change them, so they are those of its base.

use std::io;
use std::path::Path;

use super::{CHANGES_FOLDER, MirrorError};
use crate::durable;
use crate::manifest::{Manifest, Sha256Digest};

/// Links every file of the base's manifest into `target`, weights and change sets excepted, or copies what cannot be
/// linked. Returns the files for the manifest of the target.
///
/// # Errors
/// [`MirrorError::Io`].
pub fn carry_files(
    base: &Path,
    manifest: &Manifest,
    target: &Path,
) -> Result<Vec<(String, Sha256Digest)>, MirrorError> {
    let mut carried = Vec::new();
    for (name, digest) in manifest.required().filter(|(name, _)| !belongs_to_weights(name)) {
        let path = target.join(name);
        carry(&base.join(name), &path).map_err(MirrorError::io(&path))?;
        carried.push((name.to_owned(), digest));
    }
    Ok(carried)
}

/// Loaders go by whatever index or shard they find, so not one of the base's may be left beside the new file.
pub(crate) fn belongs_to_weights(name: &str) -> bool {
    name.ends_with(".safetensors")
        || name.ends_with(".safetensors.index.json")
        || name.strip_prefix(CHANGES_FOLDER).is_some_and(|rest| rest.starts_with('/'))
}

fn carry(from: &Path, to: &Path) -> io::Result<()> {
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent)?;
    }
    if std::fs::hard_link(from, to).is_err() {
        std::fs::copy(from, to)?;
        durable::sync_file(to)?;
    }
    Ok(())
}
