//! Files of published trees on their way into the cache: each checked against its manifest, kept for the next attempt if the
//! rest cannot be had now.

use std::path::{Path, PathBuf};

use futures::{StreamExt, TryStreamExt, stream};

use crate::blocking::blocking;
use crate::cache::{CacheError, CheckpointCache};
use crate::durable;
use crate::install::InstallError;
use crate::layout::object_key;
use crate::manifest::{FileDefect, FolderDefect, Sha256Digest, hash_file_while};
use crate::metadata::Metadata;
use crate::progress::{FileMeter, Meter};
use crate::store::{CheckpointStore, StoreError, ledger};

/// How often an object is fetched whose bytes are not those of the manifest: a damaged transfer is repaired, a damaged
/// object is not.
const ATTEMPTS: usize = 2;

/// Fetches trees for one installation, under the lock of the cache.
#[derive(Debug)]
pub(crate) struct Fetcher<'a> {
    pub(crate) store: &'a CheckpointStore,
    pub(crate) cache: &'a CheckpointCache,
    pub(crate) meter: Meter,
}

impl Fetcher<'_> {
    /// Brings the files of a tree together in a folder, which has nothing else in it then.
    pub(crate) async fn tree(&self, metadata: &Metadata) -> Result<PathBuf, InstallError> {
        let window = metadata.window;
        let manifest = metadata.files().map_err(|source| InstallError::Files { window, source })?;
        let folder = self.cache.download_folder(window, metadata.tree);
        std::fs::create_dir_all(&folder).map_err(|source| CacheError::io(&folder, source))?;
        // One by one: a closure over borrowed names would keep the whole installation from being `Send`.
        let mut files = Vec::new();
        for (name, expected) in manifest.required() {
            files.push(self.file(metadata, name, expected, &folder));
        }
        let fetched: Result<(), InstallError> =
            stream::iter(files).buffer_unordered(self.store.limits().parallel.max(1)).try_collect().await;
        fetched?;
        remove_others(&folder, |name| manifest.required().any(|(required, _)| required == name))
            .map_err(|source| CacheError::io(&folder, source))?;
        Ok(folder)
    }

    async fn file(
        &self,
        metadata: &Metadata,
        name: &str,
        expected: Sha256Digest,
        folder: &Path,
    ) -> Result<(), InstallError> {
        let (window, tree) = (metadata.window, metadata.tree);
        let target = folder.join(name);
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).map_err(|source| CacheError::io(parent, source))?;
        }
        let meter = self.meter.file();
        if is_here(&target, expected, &meter).await? {
            return Ok(());
        }
        let key = object_key(window, tree, name);
        let mut attempt = 1;
        loop {
            let defect = match self.store.download_metered(&key, &target, &meter).await {
                Ok(fetched) if fetched.sha256 == expected => return Ok(()),
                Ok(fetched) => {
                    let defect = FileDefect::Hash { expected, found: fetched.sha256, bytes: fetched.bytes };
                    let source = FolderDefect { path: name.to_owned(), defect };
                    InstallError::File { window, tree, source }
                }
                Err(source @ (StoreError::Gzip { .. } | StoreError::Changed { .. })) => {
                    InstallError::fetch(window, source)
                }
                // What arrived stays where it is, for the next attempt.
                Err(source) => return Err(InstallError::fetch(window, source)),
            };
            meter.forget();
            ledger::discard(&target).map_err(|source| CacheError::io(&target, source))?;
            if attempt == ATTEMPTS {
                return Err(defect);
            }
            tracing::warn!(checkpoint = %window, key, error = &defect as &dyn std::error::Error, "Fetching a file again.");
            attempt += 1;
        }
    }
}

/// Whether an earlier attempt has fetched the file; one with other bytes is removed, an unfinished one stays.
async fn is_here(target: &Path, expected: Sha256Digest, meter: &FileMeter<'_>) -> Result<bool, InstallError> {
    if !target.exists() || ledger::is_unfinished(target) {
        return Ok(false);
    }
    let path = target.to_path_buf();
    let io = |source| CacheError::io(target, source);
    let (bytes, found) = blocking(move |interest| hash_file_while(&path, interest)).await?.map_err(io)?;
    if found == expected {
        meter.add(bytes);
        return Ok(true);
    }
    ledger::discard(target).map_err(io)?;
    Ok(false)
}

fn remove_others(folder: &Path, stays: impl Fn(&str) -> bool) -> std::io::Result<()> {
    for name in durable::files_below(folder)? {
        if !stays(&name) {
            std::fs::remove_file(folder.join(name))?;
        }
    }
    Ok(())
}
