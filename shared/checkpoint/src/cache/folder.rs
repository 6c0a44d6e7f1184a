//! Folders of a cache root beside the checkpoints: unfinished ones, downloads that can go on, and what nobody needs any more.

use std::hash::BuildHasher;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use grail_protocol::ids::CheckpointWindow;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::{CacheError, CheckpointCache};
use crate::durable;
use crate::layout::{Tree, folder_name, parse_folder_name};

const PARTIAL_SUFFIX: &str = ".partial";
const DOWNLOAD_SUFFIX: &str = ".download";
/// Unit of a file's blocks, whatever the file system's own is.
const BLOCK_BYTES: u64 = 512;
/// Age at which a download that nobody goes on with, or a partial folder that names no process, counts as abandoned.
const ABANDONED_AFTER: Duration = Duration::from_secs(3600);

/// A folder under a name that nobody takes for a checkpoint; removed unless it was placed.
#[derive(Debug)]
pub(crate) struct PartialFolder {
    pub(crate) path: PathBuf,
    placed: bool,
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if !self.placed
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), error = &error as &dyn std::error::Error,
                "Unfinished checkpoint folder could not be removed; the next installation tries again.");
        }
    }
}

impl CheckpointCache {
    /// A fresh folder for an installation by this process.
    pub(crate) fn new_partial(&self, window: CheckpointWindow) -> Result<PartialFolder, CacheError> {
        let path = self.partial_path(window);
        std::fs::create_dir(&path).map_err(|source| CacheError::io(&path, source))?;
        Ok(PartialFolder { path, placed: false })
    }

    /// Makes a finished download the partial folder of a checkpoint.
    pub(crate) fn adopt(&self, download: &Path, window: CheckpointWindow) -> Result<PartialFolder, CacheError> {
        let path = self.partial_path(window);
        std::fs::rename(download, &path).map_err(|source| CacheError::io(&path, source))?;
        Ok(PartialFolder { path, placed: false })
    }

    /// Gives a finished partial folder its final name; a folder that had it is set aside first and then removed.
    pub(crate) fn place(&self, mut partial: PartialFolder, window: CheckpointWindow) -> Result<PathBuf, CacheError> {
        let target = self.folder(window);
        let io = |source| CacheError::io(&target, source);
        durable::sync_tree(&partial.path).map_err(io)?;
        let aside = self.set_aside(window)?;
        std::fs::rename(&partial.path, &target).map_err(io)?;
        partial.placed = true;
        durable::sync_folder(self.root()).map_err(io)?;
        if let Some(aside) = aside {
            remove_folder(&aside)?;
        }
        Ok(target)
    }

    pub(crate) fn set_aside(&self, window: CheckpointWindow) -> Result<Option<PathBuf>, CacheError> {
        let folder = self.folder(window);
        let aside = self.partial_path(window);
        match std::fs::rename(&folder, &aside) {
            Ok(()) => Ok(Some(aside)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(CacheError::io(&folder, error)),
        }
    }

    fn partial_path(&self, window: CheckpointWindow) -> PathBuf {
        // Every `RandomState` has other keys, so that names never repeat within a process.
        let random = std::hash::RandomState::new().hash_one(()) & u64::from(u32::MAX);
        self.root().join(format!("{}.{}.{random:08x}{PARTIAL_SUFFIX}", folder_name(window), std::process::id()))
    }

    /// Where the files of a tree lie while they are fetched. The name is the same for every process, so that the next one goes
    /// on where this one was ended.
    pub(crate) fn download_folder(&self, window: CheckpointWindow, tree: Tree) -> PathBuf {
        self.root().join(format!("{}{DOWNLOAD_SUFFIX}", folder_name(window))).join(tree.as_str())
    }

    /// Bytes of a tree that the disk has already. A file that is begun has its final length from the start, so what counts is
    /// what is stored of it.
    pub(crate) fn downloaded_bytes(&self, window: CheckpointWindow, tree: Tree) -> u64 {
        let folder = self.download_folder(window, tree);
        let stored = |name: &String| {
            let file = std::fs::metadata(folder.join(name)).ok()?;
            Some(file.len().min(file.blocks().saturating_mul(BLOCK_BYTES)))
        };
        durable::files_below(&folder).unwrap_or_default().iter().filter_map(stored).sum()
    }

    /// Removes the downloads of checkpoints for which `goes` holds. Only under the lock.
    pub(crate) fn remove_downloads(&self, goes: impl Fn(CheckpointWindow) -> bool) -> Result<Vec<PathBuf>, CacheError> {
        let mut removed = Vec::new();
        for name in self.names()? {
            if download_window(&name).is_some_and(&goes) {
                let path = self.root().join(&name);
                remove_folder(&path)?;
                removed.push(path);
            }
        }
        Ok(removed)
    }

    /// Removes the remains of installations whose process is gone. Returns what was removed.
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn sweep(&self) -> Result<Vec<PathBuf>, CacheError> {
        let _lock = self.lock().await?;
        let mut removed = self.sweep_partials()?;
        removed.extend(self.sweep_downloads()?);
        Ok(removed)
    }

    pub(crate) fn sweep_partials(&self) -> Result<Vec<PathBuf>, CacheError> {
        let mut removed = Vec::new();
        for name in self.names()? {
            let path = self.root().join(&name);
            if is_dead_partial(&name, &path) {
                remove_folder(&path)?;
                removed.push(path);
            }
        }
        Ok(removed)
    }

    pub(crate) fn sweep_downloads(&self) -> Result<Vec<PathBuf>, CacheError> {
        self.remove_downloads(|window| {
            [Tree::Full, Tree::Delta]
                .into_iter()
                .map(|tree| self.download_folder(window, tree))
                .all(|folder| !folder.exists() || is_older_than(&folder, ABANDONED_AFTER))
        })
    }
}

pub(crate) fn remove_folder(path: &Path) -> Result<(), CacheError> {
    std::fs::remove_dir_all(path).map_err(|source| CacheError::io(path, source))
}

fn download_window(name: &str) -> Option<CheckpointWindow> {
    parse_folder_name(name.strip_suffix(DOWNLOAD_SUFFIX)?)
}

/// Whether a name is that of an unfinished folder whose process is gone. Only called under the lock, under which no folder
/// of this process can be in use either.
fn is_dead_partial(name: &str, path: &Path) -> bool {
    let Some(stem) = name.strip_suffix(PARTIAL_SUFFIX) else { return false };
    let mut parts = stem.split('.');
    if !parts.next().is_some_and(|folder| folder.starts_with("checkpoint-")) {
        return false;
    }
    match parts.next().and_then(|pid| pid.parse::<u32>().ok()).and_then(|pid| i32::try_from(pid).ok()) {
        Some(pid) if pid > 0 => {
            pid.unsigned_abs() == std::process::id() || kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH)
        }
        _ => is_older_than(path, ABANDONED_AFTER),
    }
}

fn is_older_than(path: &Path, age: Duration) -> bool {
    let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.ok().and_then(|time| SystemTime::now().duration_since(time).ok()).is_some_and(|elapsed| elapsed > age)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::FileTimes;

    use super::*;

    fn cache() -> (tempfile::TempDir, CheckpointCache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = CheckpointCache::open(folder.path().join("checkpoints")).unwrap();
        (folder, cache)
    }

    fn make(cache: &CheckpointCache, name: impl AsRef<Path>) -> PathBuf {
        let path = cache.root().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[tokio::test]
    async fn only_dead_remains_are_swept() {
        let (_folder, cache) = cache();
        let dead = {
            // A process that has ended and was waited for: its id is free again.
            let mut child = std::process::Command::new("true").spawn().unwrap();
            child.wait().unwrap();
            child.id()
        };
        let alive = std::os::unix::process::parent_id();
        let swept = [
            make(&cache, format!("checkpoint-30.{dead}.0123abcd.partial")),
            make(&cache, format!("checkpoint-60.{}.0123abcd.partial", std::process::id())),
        ];
        let kept = [
            make(&cache, format!("checkpoint-90.{alive}.0123abcd.partial")),
            make(&cache, "checkpoint-120.x.0123abcd.partial"),
            make(&cache, "checkpoint-150"),
            make(&cache, "other.partial"),
        ];
        assert_eq!(cache.sweep().await.unwrap().into_iter().collect::<BTreeSet<_>>(), BTreeSet::from(swept));
        assert!(kept.iter().all(|path| path.exists()));
        assert_eq!(cache.windows().unwrap(), BTreeSet::from([CheckpointWindow(150)]));
    }

    #[tokio::test]
    async fn downloads_stay_until_nobody_has_gone_on_with_them_for_an_hour() {
        let (_folder, cache) = cache();
        let (old, young) = (CheckpointWindow(30), CheckpointWindow(60));
        for window in [old, young] {
            std::fs::create_dir_all(cache.download_folder(window, Tree::Full)).unwrap();
        }
        let delta = cache.download_folder(old, Tree::Delta);
        std::fs::create_dir_all(&delta).unwrap();
        let two_hours_ago = FileTimes::new().set_modified(SystemTime::now() - 2 * ABANDONED_AFTER);
        let age = |path: &Path| std::fs::File::open(path).unwrap().set_times(two_hours_ago).unwrap();
        age(&cache.download_folder(old, Tree::Full));
        assert!(cache.sweep().await.unwrap().is_empty());
        age(&delta);
        assert_eq!(cache.sweep().await.unwrap(), [cache.root().join("checkpoint-30.download")]);
        assert!(cache.windows().unwrap().is_empty());
        assert_eq!(cache.remove_downloads(|window| window == young).unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_partial_folder_vanishes_unless_it_is_placed() {
        let (_folder, cache) = cache();
        let window = CheckpointWindow(30);
        let dropped = cache.new_partial(window).unwrap().path.clone();
        assert!(!dropped.exists());

        std::fs::create_dir(cache.folder(window)).unwrap();
        std::fs::write(cache.folder(window).join("old"), b"").unwrap();
        let download = cache.download_folder(window, Tree::Full);
        std::fs::create_dir_all(&download).unwrap();
        std::fs::write(download.join("new"), b"").unwrap();
        let partial = cache.adopt(&download, window).unwrap();
        cache.remove_downloads(|_| true).unwrap();
        let placed = cache.place(partial, window).unwrap();
        assert_eq!(durable::files_below(&placed).unwrap(), ["new"]);
        assert_eq!(durable::files_below(cache.root()).unwrap(), ["checkpoint-30/new"]);

        cache.remove(window).await.unwrap();
        cache.remove(window).await.unwrap();
        assert!(cache.windows().unwrap().is_empty());
    }
}
