//! The local cache of checkpoints: one verified folder per checkpoint, put in place by a rename, under one lock per root.

mod folder;
mod housekeeping;
mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use grail_protocol::ids::{CheckpointWindow, WeightsHash};

use crate::blocking::Interest;
use crate::layout::{Tree, folder_name, parse_folder_name};
use crate::manifest::FolderDefect;
use crate::metadata::{FilesDefect, Metadata, MetadataError};
use crate::mirror::ChangeSet;
use crate::signature::SignatureDefect;
use crate::weights::{HashAgreement, WeightsError};

pub(crate) use folder::PartialFolder;
use folder::remove_folder;
pub use housekeeping::{CachedContents, CachedSummary, Hold, Pruned};
pub use record::MadeFrom;
pub(crate) use record::{Record, published_hash, read_document};

const LOCK_FILE: &str = ".lock";
/// How often a lock that another process holds is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(100);

/// What went wrong with the cache folder itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    #[error("no space left for {}: free space there or choose another folder (GRAIL_CACHE_DIR, or --state-dir for --local)", path.display())]
    DiskFull {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} could not be used as checkpoint cache", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("another process has held {} for {waited_s} s: let it finish its download, or end it", path.display())]
    Locked { path: PathBuf, waited_s: u64 },
    #[error("this process ends and begins nothing more")]
    Ending,
}

impl CacheError {
    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        if crate::store::is_storage_full(&source) { Self::DiskFull { path, source } } else { Self::Io { path, source } }
    }
}

/// A checkpoint that lies verified in a folder.
#[derive(Clone, Debug)]
pub struct Installed {
    pub window: CheckpointWindow,
    pub folder: PathBuf,
    /// Over the tensors of the files; the identity of the weights everywhere else.
    pub weights_hash: WeightsHash,
    /// How [`Self::weights_hash`] compares to what was published.
    pub agreement: HashAgreement,
    /// Checksum per tensor, by name.
    pub checksums: Arc<BTreeMap<String, u64>>,
    /// The way from the checkpoint that this one was made from; `None` for a full tree that was downloaded.
    pub changes: Option<ChangeSet>,
    pub made_from: MadeFrom,
    /// The metadata as it lies in the folder. What to mine with is [`crate::Published::policy`]'s answer, which prefers the
    /// delta's document.
    pub metadata: Metadata,
    /// What an operator should know; nothing of it keeps the checkpoint from being used. Empty unless
    /// [`CheckpointCache::install`] made it.
    pub notices: Vec<Notice>,
}

/// Something odd about a checkpoint that is used all the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Notice {
    #[error(
        "the trainer has published other weights or files under this checkpoint since it was installed ({now}, was {was}); the first version is kept"
    )]
    RepublishedKept { was: String, now: String },
    #[error(
        "the trainer has published other weights or files under this checkpoint since it was installed ({now}, was {was}); the new version replaces it"
    )]
    RepublishedTaken { was: String, now: String },
    #[error("the {tree} metadata is not signed by the trainer: {defect}; validators do not check that")]
    Signature { tree: Tree, defect: SignatureDefect },
    #[error(
        "the weights hash differs from the published one although every file is as published; validators run these files"
    )]
    HashDiffers,
    #[error("no weights hash was published; the weights rest on the sha256 of what was downloaded")]
    HashNotPublished,
}

/// Why a folder of the cache is not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    #[error("its metadata.json could not be read")]
    MetadataUnreadable(#[source] io::Error),
    #[error("its metadata.json is defective")]
    Metadata(#[from] MetadataError),
    #[error("its metadata.json vouches for no files")]
    Files(#[from] FilesDefect),
    #[error("its files are damaged")]
    Folder(#[from] FolderDefect),
    #[error("its weights are damaged")]
    Weights(#[from] WeightsError),
}

/// State of one checkpoint in the cache.
#[derive(Debug)]
pub enum Entry {
    Absent,
    Damaged(Damage),
    Installed(Box<Installed>),
}

/// Folder with one verified subfolder per checkpoint.
#[derive(Clone, Debug)]
pub struct CheckpointCache {
    root: PathBuf,
    lock_wait: Duration,
}

/// Exclusive use of a cache root among processes, until dropped.
#[derive(Debug)]
pub(crate) struct CacheLock {
    _file: File,
}

impl CheckpointCache {
    /// The cache in `root`, which is made if need be.
    ///
    /// # Errors
    /// [`CacheError`] if the folder cannot be made.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, CacheError> {
        let root = root.into();
        std::fs::create_dir_all(&root).map_err(|source| CacheError::io(&root, source))?;
        Ok(Self { root, lock_wait: Duration::from_secs(600) })
    }

    /// The same cache, giving up after `wait` while another process installs into it.
    #[must_use]
    pub fn with_lock_wait(self, wait: Duration) -> Self {
        Self { lock_wait: wait, ..self }
    }

    /// The folder that holds the checkpoints' folders.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a checkpoint lies once it is installed.
    #[must_use]
    pub fn folder(&self, window: CheckpointWindow) -> PathBuf {
        self.root.join(folder_name(window))
    }

    /// The checkpoints that have a folder, verified or not.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub fn windows(&self) -> Result<BTreeSet<CheckpointWindow>, CacheError> {
        let names = self.names()?;
        Ok(names.iter().filter_map(|name| parse_folder_name(name)).collect())
    }

    /// Reads a checkpoint's folder and verifies every file of its manifest. Blocking: reads all weights once.
    #[must_use]
    pub fn inspect(&self, window: CheckpointWindow) -> Entry {
        self.inspect_while(window, &Interest::default())
    }

    /// The same, given up once nobody waits for it; what it then says is not to be believed.
    pub(crate) fn inspect_while(&self, window: CheckpointWindow, interest: &Interest) -> Entry {
        let folder = self.folder(window);
        if !folder.exists() {
            return Entry::Absent;
        }
        match record::verify(&folder, window, interest) {
            Ok(installed) => Entry::Installed(Box::new(installed)),
            Err(damage) => Entry::Damaged(damage),
        }
    }

    /// Takes a checkpoint out of the cache. The name goes first, so that nobody finds half a folder; a process that has
    /// files open keeps them.
    ///
    /// # Errors
    /// [`CacheError`]; an absent folder is none.
    pub async fn remove(&self, window: CheckpointWindow) -> Result<(), CacheError> {
        let _lock = self.lock().await?;
        self.set_aside(window)?.map_or(Ok(()), |aside| remove_folder(&aside))
    }

    pub(crate) async fn lock(&self) -> Result<CacheLock, CacheError> {
        let path = self.root.join(LOCK_FILE);
        let io = |source| CacheError::io(&path, source);
        let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(io)?;
        let mut waited = Duration::ZERO;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(CacheLock { _file: file }),
                Err(TryLockError::Error(source)) => return Err(io(source)),
                Err(TryLockError::WouldBlock) if waited >= self.lock_wait => {
                    return Err(CacheError::Locked { path, waited_s: waited.as_secs() });
                }
                Err(TryLockError::WouldBlock) => {
                    if waited.is_zero() {
                        tracing::info!(path = %path.display(), "Another process installs a checkpoint; waiting for it.");
                    }
                    tokio::time::sleep(LOCK_RETRY).await;
                    waited += LOCK_RETRY;
                }
            }
        }
    }

    pub(crate) fn names(&self) -> Result<Vec<String>, CacheError> {
        let io = |source| CacheError::io(&self.root, source);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.root).map_err(io)? {
            if let Ok(name) = entry.map_err(io)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::METADATA_FILE;

    fn cache() -> (tempfile::TempDir, CheckpointCache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = CheckpointCache::open(folder.path().join("checkpoints")).unwrap();
        (folder, cache)
    }

    #[tokio::test]
    async fn the_lock_excludes_and_names_its_file() {
        let (_folder, cache) = cache();
        let held = cache.lock().await.unwrap();
        let error = cache.clone().with_lock_wait(Duration::ZERO).lock().await.unwrap_err();
        assert!(matches!(error, CacheError::Locked { .. }), "{error}");
        assert!(error.to_string().contains(LOCK_FILE), "{error}");
        drop(held);
        cache.with_lock_wait(Duration::ZERO).lock().await.unwrap();
    }

    #[test]
    fn a_folder_without_metadata_is_damaged() {
        let (_folder, cache) = cache();
        let window = CheckpointWindow(30);
        assert!(matches!(cache.inspect(window), Entry::Absent));
        std::fs::create_dir(cache.folder(window)).unwrap();
        assert!(matches!(cache.inspect(window), Entry::Damaged(Damage::MetadataUnreadable(_))));
        std::fs::write(cache.folder(window).join(METADATA_FILE), b"{\"file_manifest\": {}}").unwrap();
        assert!(matches!(cache.inspect(window), Entry::Damaged(Damage::Files(FilesDefect::EmptyManifest))));
    }

    #[test]
    fn a_full_disk_is_told_apart() {
        let full = CacheError::io(Path::new("/cache"), io::ErrorKind::StorageFull.into());
        assert!(matches!(full, CacheError::DiskFull { .. }));
        assert!(full.to_string().contains("/cache"), "{full}");
        assert!(full.to_string().contains("free space there or choose another folder"), "{full}");
    }
}
