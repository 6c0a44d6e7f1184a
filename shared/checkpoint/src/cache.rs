//! The local cache of checkpoints: one verified folder per checkpoint, put in place by a rename, under one lock per root.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::hash::BuildHasher;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde_json::Value;

use crate::durable;
use crate::layout::{METADATA_FILE, Tree, folder_name, parse_folder_name};
use crate::manifest::{FolderDefect, Manifest};
use crate::metadata::{FilesDefect, Metadata, MetadataError};
use crate::weights::{HashAgreement, WeightsError, WeightsFiles};

const PARTIAL_SUFFIX: &str = ".partial";
const LOCK_FILE: &str = ".lock";
/// Key of a local metadata document that says how the hash it states was checked; only this crate writes it.
const AGREEMENT_KEY: &str = "weights_hash_agreement";
/// Key under which the hash of the published document is kept.
const PUBLISHED_HASH_KEY: &str = "published_weights_hash";
/// Age at which a partial folder that names no process counts as abandoned.
const ABANDONED_AFTER: Duration = Duration::from_secs(3600);
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
    /// The full tree's metadata as it lies in the folder. What to mine with is [`crate::Published::policy`]'s answer, which
    /// prefers the delta's document.
    pub metadata: Metadata,
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
        let folder = self.folder(window);
        if !folder.exists() {
            return Entry::Absent;
        }
        match verify(&folder, window) {
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

    /// Removes the remains of installations whose process is gone. Returns what was removed.
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn sweep(&self) -> Result<Vec<PathBuf>, CacheError> {
        let _lock = self.lock().await?;
        self.sweep_locked()
    }

    pub(crate) fn sweep_locked(&self) -> Result<Vec<PathBuf>, CacheError> {
        let mut removed = Vec::new();
        for name in self.names()? {
            let path = self.root.join(&name);
            if is_dead_partial(&name, &path) {
                remove_folder(&path)?;
                removed.push(path);
            }
        }
        Ok(removed)
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

    /// A fresh folder for an installation by this process.
    pub(crate) fn new_partial(&self, window: CheckpointWindow) -> Result<PartialFolder, CacheError> {
        let path = self.partial_path(window);
        std::fs::create_dir(&path).map_err(|source| CacheError::io(&path, source))?;
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
        durable::sync_folder(&self.root).map_err(io)?;
        if let Some(aside) = aside {
            remove_folder(&aside)?;
        }
        Ok(target)
    }

    fn set_aside(&self, window: CheckpointWindow) -> Result<Option<PathBuf>, CacheError> {
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
        self.root.join(format!("{}.{}.{random:08x}{PARTIAL_SUFFIX}", folder_name(window), std::process::id()))
    }

    fn names(&self) -> Result<Vec<String>, CacheError> {
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

/// The metadata document for a folder: as published, with the hash of the files in it and how it was checked.
pub(crate) fn local_document(published: &Metadata, hash: WeightsHash, agreement: &HashAgreement) -> Value {
    let mut document = published.document().clone();
    let stated = document.insert("weights_hash".to_owned(), Value::from(hash.to_string()));
    document.insert(PUBLISHED_HASH_KEY.to_owned(), stated.unwrap_or(Value::Null));
    let agreement = serde_json::to_value(agreement).expect("an enumeration of unit variants is a JSON text");
    document.insert(AGREEMENT_KEY.to_owned(), agreement);
    Value::Object(document)
}

fn verify(folder: &Path, window: CheckpointWindow) -> Result<Installed, Damage> {
    let text = std::fs::read(folder.join(METADATA_FILE)).map_err(Damage::MetadataUnreadable)?;
    let metadata = Metadata::parse(&text, window, Tree::Full)?;
    let manifest: &Manifest = metadata.files()?;
    manifest.verify_folder(folder)?;
    let (weights_hash, agreement) = hash_of(folder, &metadata)?;
    Ok(Installed { window, folder: folder.to_path_buf(), weights_hash, agreement, metadata })
}

/// The hash that the local document records, which the verified files still have; computed if another program wrote it.
fn hash_of(folder: &Path, metadata: &Metadata) -> Result<(WeightsHash, HashAgreement), WeightsError> {
    let recorded = metadata.document().get(AGREEMENT_KEY).and_then(|value| serde_json::from_value(value.clone()).ok());
    if let (Some(agreement), crate::metadata::PublishedHash::Stated(hash)) = (recorded, &metadata.weights_hash) {
        return Ok((*hash, agreement));
    }
    let weights = WeightsFiles::open(folder)?;
    let hash = weights.hash()?;
    let agreement = weights.agreement(hash, &metadata.weights_hash)?;
    Ok((hash, agreement))
}

fn remove_folder(path: &Path) -> Result<(), CacheError> {
    std::fs::remove_dir_all(path).map_err(|source| CacheError::io(path, source))
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
    use super::*;

    fn cache() -> (tempfile::TempDir, CheckpointCache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = CheckpointCache::open(folder.path().join("checkpoints")).unwrap();
        (folder, cache)
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
        let make = |name: String| {
            let path = cache.root().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        let swept = [
            make(format!("checkpoint-30.{dead}.0123abcd.partial")),
            make(format!("checkpoint-60.{}.0123abcd.partial", std::process::id())),
        ];
        let kept = [
            make(format!("checkpoint-90.{alive}.0123abcd.partial")),
            make("checkpoint-120.x.0123abcd.partial".to_owned()),
            make("checkpoint-150".to_owned()),
            make("other.partial".to_owned()),
        ];
        assert_eq!(cache.sweep().await.unwrap().into_iter().collect::<BTreeSet<_>>(), BTreeSet::from(swept));
        assert!(kept.iter().all(|path| path.exists()));
        assert_eq!(cache.windows().unwrap(), BTreeSet::from([CheckpointWindow(150)]));
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

    #[tokio::test]
    async fn a_partial_folder_vanishes_unless_it_is_placed() {
        let (_folder, cache) = cache();
        let window = CheckpointWindow(30);
        let dropped = cache.new_partial(window).unwrap().path.clone();
        assert!(!dropped.exists());

        std::fs::create_dir(cache.folder(window)).unwrap();
        std::fs::write(cache.folder(window).join("old"), b"").unwrap();
        let partial = cache.new_partial(window).unwrap();
        std::fs::write(partial.path.join("new"), b"").unwrap();
        let placed = cache.place(partial, window).unwrap();
        assert_eq!(durable::files_below(&placed).unwrap(), ["new"]);
        assert_eq!(durable::files_below(cache.root()).unwrap(), ["checkpoint-30/new"]);

        cache.remove(window).await.unwrap();
        cache.remove(window).await.unwrap();
        assert!(cache.windows().unwrap().is_empty());
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
