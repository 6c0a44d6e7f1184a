//! The cache of the hub's Python tools.

use std::path::{Path, PathBuf};

use super::located::{Layout, Located};
use super::published::Part;
use super::snapshot;

/// Revision that is used when none is pinned.
pub(super) const MAIN: &str = "main";

/// Folder of `repository` in `cache`.
pub(super) fn folder(cache: &Path, repository: &str) -> PathBuf {
    cache.join(format!("datasets--{}", repository.replace('/', "--")))
}

/// Whether `revision` is a commit rather than a name for one.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase())
}

/// The commit that `revision` means in the repository at `folder`, as far as the cache knows.
pub(super) fn commit_of(folder: &Path, revision: &str) -> Option<String> {
    if is_commit(revision) {
        return Some(revision.to_owned());
    }
    let commit = std::fs::read_to_string(folder.join("refs").join(revision)).ok()?;
    Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
}

/// The files of `parts` in the snapshot of `revision` of `repository`.
///
/// # Errors
/// Why they are not there, in words.
pub(super) fn find(cache: &Path, repository: &str, revision: &str, parts: &[Part]) -> Result<Located, String> {
    let folder = folder(cache, repository);
    if !folder.is_dir() {
        return Err(format!("{} is not there", folder.display()));
    }
    let commit = commit_of(&folder, revision).ok_or_else(|| format!("{} has no refs/{revision}", folder.display()))?;
    let snapshot = folder.join("snapshots").join(&commit);
    let names = snapshot::list(&snapshot);
    let readme = std::fs::read_to_string(snapshot.join("README.md")).ok();
    let of_part = |part: &Part| {
        let names = snapshot::files_of(&names, readme.as_deref(), part)
            .map_err(|reason| format!("{}: {reason}", snapshot.display()))?;
        Ok(names.into_iter().map(|name| snapshot.join(name)).collect())
    };
    let files = parts.iter().map(of_part).collect::<Result<_, String>>()?;
    Ok(Located { place: snapshot.display().to_string(), commit: Some(commit), layout: Layout::PerPart(files) })
}
