//! What the cache holds, who uses it, and what may go.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use grail_protocol::ids::{CheckpointWindow, WeightsHash};

use super::folder::remove_folder;
use super::record::{MadeFrom, Record, read_document};
use super::{CacheError, CheckpointCache, Damage};
use crate::blocking::blocking;
use crate::durable;
use crate::layout::METADATA_FILE;
use crate::manifest::{FileDefect, FolderDefect};
use crate::retention::{Cached, RetentionLimits, removable};
use crate::weights::{HashAgreement, WeightsFiles};

/// One checkpoint of the cache as its folder describes itself. Nothing was hashed for it: [`CheckpointCache::inspect`] does.
#[derive(Debug)]
pub struct CachedSummary {
    pub window: CheckpointWindow,
    pub folder: PathBuf,
    /// Bytes of all its files.
    pub bytes: u64,
    /// Time since it was installed.
    pub age: Duration,
    /// Whether a process has said that it uses the folder.
    pub held: bool,
    /// What its document says, or what is wrong at the first look: files that are missing, headers that cannot be read.
    pub contents: Result<CachedContents, Damage>,
}

/// What the document of a folder says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedContents {
    /// `None` if another program wrote the folder and did not state it.
    pub weights_hash: Option<WeightsHash>,
    /// `None` as above.
    pub agreement: Option<HashAgreement>,
    pub made_from: MadeFrom,
}

/// A checkpoint that was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pruned {
    pub window: CheckpointWindow,
    /// Bytes of its files; those that another folder has too are still there.
    pub bytes: u64,
}

/// A process's word that it uses a folder, until dropped or until the process ends.
#[derive(Debug)]
pub struct Hold {
    _folder: File,
}

impl CheckpointCache {
    /// Keeps a checkpoint from being pruned or replaced by any process, also by an operator's command. `None` if it is not in
    /// the cache.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub async fn hold(&self, window: CheckpointWindow) -> Result<Option<Hold>, CacheError> {
        let path = self.folder(window);
        blocking(move |_| lock_shared(&path).map_err(|source| CacheError::io(&path, source))).await?
    }

    pub(crate) fn is_held(&self, window: CheckpointWindow) -> bool {
        self.claim(window).is_none()
    }

    /// The folder, if it is there and nobody holds it. Nobody comes to hold it while the claim lasts.
    fn claim(&self, window: CheckpointWindow) -> Option<File> {
        let folder = open_folder(&self.folder(window)).ok()??;
        folder.try_lock().ok()?;
        Some(folder)
    }

    /// All checkpoints of the cache, oldest window first. Reads documents and headers, no weights.
    ///
    /// # Errors
    /// [`CacheError`] if the folder itself cannot be read.
    pub fn list(&self) -> Result<Vec<CachedSummary>, CacheError> {
        self.windows()?.into_iter().map(|window| self.summary(window)).collect()
    }

    fn summary(&self, window: CheckpointWindow) -> Result<CachedSummary, CacheError> {
        let folder = self.folder(window);
        let (bytes, age) = bytes_and_age(&folder).map_err(|source| CacheError::io(&folder, source))?;
        let contents = read_contents(&folder, window);
        Ok(CachedSummary { window, bytes, age, held: self.is_held(window), contents, folder })
    }

    /// Removes what the limits do not allow, oldest first, and the remains of dead installations. Those `in_use` stay whatever
    /// the limits say, and so do those that any process holds.
    ///
    /// # Errors
    /// [`CacheError`]; what was removed before it stays removed.
    pub async fn prune(
        &self,
        in_use: &BTreeSet<CheckpointWindow>,
        limits: &RetentionLimits,
    ) -> Result<Vec<Pruned>, CacheError> {
        let _lock = self.lock().await?;
        self.sweep_partials()?;
        self.sweep_downloads()?;
        let mut in_use = in_use.clone();
        let mut claims = BTreeMap::new();
        let mut cached = Vec::new();
        for window in self.windows()? {
            let folder = self.folder(window);
            let (bytes, age) = bytes_and_age(&folder).map_err(|source| CacheError::io(&folder, source))?;
            match self.claim(window) {
                Some(claim) => drop(claims.insert(window, claim)),
                None => drop(in_use.insert(window)),
            }
            cached.push(Cached { window, bytes, age });
        }
        let mut pruned = Vec::new();
        for window in removable(&cached, &in_use, limits) {
            if let Some(aside) = self.set_aside(window)? {
                remove_folder(&aside)?;
            }
            let bytes = cached.iter().find(|cached| cached.window == window).map_or(0, |cached| cached.bytes);
            tracing::info!(checkpoint = %window, bytes, "Removed a checkpoint from the cache.");
            pruned.push(Pruned { window, bytes });
        }
        Ok(pruned)
    }
}

/// Waits only for a look at who holds the folder, or for its removal.
fn lock_shared(path: &Path) -> io::Result<Option<Hold>> {
    while let Some(folder) = open_folder(path)? {
        folder.lock_shared()?;
        // What was locked may have been replaced or removed before the lock was there.
        if is_same(&folder, path)? {
            return Ok(Some(Hold { _folder: folder }));
        }
    }
    Ok(None)
}

fn open_folder(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(folder) => Ok(Some(folder)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the name still leads to the folder that is open.
fn is_same(open: &File, path: &Path) -> io::Result<bool> {
    let opened = open.metadata()?;
    match std::fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (opened.dev(), opened.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn read_contents(folder: &Path, window: CheckpointWindow) -> Result<CachedContents, Damage> {
    let metadata = read_document(folder, window)?;
    if let Some((missing, _)) = metadata.files()?.required().find(|(name, _)| !folder.join(name).is_file()) {
        return Err(FolderDefect { path: missing.to_owned(), defect: FileDefect::Missing }.into());
    }
    WeightsFiles::open(folder)?;
    let record = Record::read(folder, &metadata);
    let stated = record.as_ref().map(|record| (record.weights_hash, record.agreement.clone()));
    Ok(CachedContents {
        weights_hash: stated.as_ref().map(|(hash, _)| *hash),
        agreement: stated.map(|(_, agreement)| agreement),
        made_from: record.map_or(MadeFrom::Full, |record| record.made_from),
    })
}

/// Bytes of all files, and the time since the document was written, which is the last thing that an installation writes.
fn bytes_and_age(folder: &Path) -> io::Result<(u64, Duration)> {
    let mut bytes = 0;
    for name in durable::files_below(folder)? {
        bytes += std::fs::metadata(folder.join(name))?.len();
    }
    let document = folder.join(METADATA_FILE);
    let written = std::fs::metadata(if document.exists() { &document } else { folder })?.modified()?;
    Ok((bytes, SystemTime::now().duration_since(written).unwrap_or_default()))
}
