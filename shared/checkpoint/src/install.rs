//! From the store into the cache: download, verify, hash, put in place.

use std::path::{Path, PathBuf};
use std::time::Instant;

use futures::{StreamExt, TryStreamExt, stream};
use grail_protocol::ids::CheckpointWindow;
use nix::sys::statvfs::statvfs;

use crate::cache::{CacheError, CheckpointCache, Entry, Installed, local_document};
use crate::durable;
use crate::layout::{METADATA_FILE, Tree, object_key};
use crate::manifest::{FileDefect, FolderDefect, Manifest, Sha256Digest};
use crate::metadata::{FilesDefect, Metadata, MetadataError, Published};
use crate::store::{CheckpointStore, StoreError};
use crate::weights::{HashAgreement, WeightsError, WeightsFiles};

/// How often an object is fetched whose bytes are not those of the manifest: a damaged transfer is repaired, a damaged
/// object is not.
const ATTEMPTS: usize = 2;

/// Why a checkpoint is not in the cache.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstallError {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("a file of checkpoint {window} could not be fetched")]
    Fetch {
        window: CheckpointWindow,
        #[source]
        source: StoreError,
    },
    #[error("checkpoint {window} as published is incomplete or damaged")]
    File {
        window: CheckpointWindow,
        #[source]
        source: FolderDefect,
    },
    #[error(
        "this checkpoint is only published as DELTA, which cannot be installed without its base: \
         checkpoint {window} (FULL: {full}); wait for the next FULL checkpoint"
    )]
    DeltaOnly { window: CheckpointWindow, full: String },
    #[error("checkpoint {window} has no usable metadata")]
    Metadata {
        window: CheckpointWindow,
        #[source]
        source: MetadataErrorOfTree,
    },
    #[error("checkpoint {window} names no files that can be trusted")]
    Files {
        window: CheckpointWindow,
        #[source]
        source: FilesDefect,
    },
    #[error("the weights of checkpoint {window} cannot be read")]
    Weights {
        window: CheckpointWindow,
        #[source]
        source: WeightsError,
    },
    #[error(
        "checkpoint {window} takes {needed} bytes, {} has {free} left: \
         free space there or choose another folder (GRAIL_CACHE_DIR, or --state-dir for --local)",
        folder.display()
    )]
    NoSpace { window: CheckpointWindow, needed: u64, free: u64, folder: PathBuf },
}

impl InstallError {
    /// Whether the local disk is full, as opposed to something wrong with what was published.
    #[must_use]
    pub const fn is_disk_full(&self) -> bool {
        matches!(
            self,
            Self::NoSpace { .. }
                | Self::Cache(CacheError::DiskFull { .. })
                | Self::Fetch { source: StoreError::DiskFull { .. }, .. }
        )
    }
}

/// Why a tree's metadata is of no use, as text: the document belongs to [`Published`].
#[derive(Debug, Clone, thiserror::Error)]
#[error("FULL: {full}; DELTA: {delta}")]
pub struct MetadataErrorOfTree {
    pub full: String,
    pub delta: String,
}

impl CheckpointCache {
    /// Brings a checkpoint into the cache and returns its folder. A folder that is there and verifies is used as it is,
    /// unless the trainer has published other files under the same window since.
    ///
    /// Call it once per change of checkpoint: it reads all files of a cached folder.
    ///
    /// # Errors
    /// [`InstallError`]; the cache then has no folder of this checkpoint, or the one it had.
    pub async fn install(&self, store: &CheckpointStore, published: &Published) -> Result<Installed, InstallError> {
        let window = published.window;
        let _lock = self.lock().await?;
        for path in self.sweep_locked()? {
            tracing::info!(path = %path.display(), "Removed an unfinished checkpoint folder.");
        }
        if let Some(installed) = self.cached(published).await {
            tracing::info!(checkpoint = %window, weights = %installed.weights_hash, "Checkpoint is in the cache.");
            return Ok(installed);
        }
        let metadata = match (&published.full, &published.delta) {
            (Ok(metadata), _) => metadata,
            (Err(full), Ok(_)) => return Err(InstallError::DeltaOnly { window, full: full.to_string() }),
            (Err(full), Err(delta)) => {
                let source = MetadataErrorOfTree { full: full.to_string(), delta: delta.to_string() };
                return Err(InstallError::Metadata { window, source });
            }
        };
        self.download(store, metadata).await
    }

    /// The cached folder, if its files are those that are published now, or if no full tree is published any more.
    async fn cached(&self, published: &Published) -> Option<Installed> {
        let window = published.window;
        let cache = self.clone();
        let entry = tokio::task::spawn_blocking(move || cache.inspect(window)).await;
        let installed = match entry.expect("the inspection does not panic") {
            Entry::Absent => return None,
            Entry::Damaged(damage) => {
                tracing::warn!(checkpoint = %window, error = &damage as &dyn std::error::Error,
                    "Cached checkpoint is not used and will be fetched again.");
                return None;
            }
            Entry::Installed(installed) => *installed,
        };
        let same = |now: &Manifest| installed.metadata.files().is_ok_and(|cached| cached.required().eq(now.required()));
        match published.full.as_ref().map(Metadata::files) {
            Ok(Ok(now)) if !same(now) => {
                tracing::warn!(checkpoint = %window, "The trainer has published other files under a checkpoint that is cached; \
                    the cached folder is replaced.");
                None
            }
            Ok(_) | Err(_) => Some(installed),
        }
    }

    async fn download(&self, store: &CheckpointStore, metadata: &Metadata) -> Result<Installed, InstallError> {
        let window = metadata.window;
        let started = Instant::now();
        let manifest = metadata.files().map_err(|source| InstallError::Files { window, source })?;
        let needed = stored_bytes(store, window, manifest).await?;
        self.require_space(window, needed)?;
        let partial = self.new_partial(window)?;
        fetch_files(store, window, manifest, &partial.path).await?;
        let (document, weights) = describe(metadata, &partial.path).await?;
        let local = partial.path.join(METADATA_FILE);
        write_synced(&local, &document).map_err(|source| CacheError::io(&local, source))?;
        let folder = self.place(partial, window)?;
        if weights.agreement == HashAgreement::Different {
            tracing::warn!(checkpoint = %window, weights = %weights.hash, published = ?metadata.weights_hash,
                "Weights hash differs from the published one although every file is as published; validators run these files.");
        }
        tracing::info!(checkpoint = %window, weights = %weights.hash, bytes = needed,
            seconds = started.elapsed().as_secs_f64(), folder = %folder.display(), "Checkpoint installed.");
        let metadata = Metadata::parse(&document, window, Tree::Full)
            .map_err(|source| InstallError::Metadata { window, source: unreadable(&source) })?;
        Ok(Installed { window, folder, weights_hash: weights.hash, agreement: weights.agreement, metadata })
    }

    fn require_space(&self, window: CheckpointWindow, needed: u64) -> Result<(), InstallError> {
        let space = statvfs(self.root()).map_err(|errno| CacheError::io(self.root(), errno.into()))?;
        let free = space.blocks_available().saturating_mul(space.fragment_size());
        if needed > free {
            return Err(InstallError::NoSpace { window, needed, free, folder: self.root().to_path_buf() });
        }
        Ok(())
    }
}

/// Bytes of all required objects as they are stored; an object that is missing ends the installation before it begins.
async fn stored_bytes(
    store: &CheckpointStore,
    window: CheckpointWindow,
    manifest: &Manifest,
) -> Result<u64, InstallError> {
    let sizes = manifest.required().map(|(name, _)| async move {
        let key = object_key(window, Tree::Full, name);
        let size = store.size(&key).await.map_err(|source| InstallError::Fetch { window, source })?;
        size.ok_or_else(|| file_defect(window, name, FileDefect::Missing))
    });
    let sizes: Vec<u64> = stream::iter(sizes).buffer_unordered(store.limits().parallel).try_collect().await?;
    Ok(sizes.into_iter().fold(0, u64::saturating_add))
}

async fn fetch_files(
    store: &CheckpointStore,
    window: CheckpointWindow,
    manifest: &Manifest,
    folder: &Path,
) -> Result<(), InstallError> {
    let files = manifest.required().map(|(name, expected)| fetch_file(store, window, name, expected, folder));
    stream::iter(files).buffer_unordered(store.limits().parallel).try_collect().await
}

async fn fetch_file(
    store: &CheckpointStore,
    window: CheckpointWindow,
    name: &str,
    expected: Sha256Digest,
    folder: &Path,
) -> Result<(), InstallError> {
    let target = folder.join(name);
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent).map_err(|source| CacheError::io(parent, source))?;
    }
    let key = object_key(window, Tree::Full, name);
    let mut attempt = 1;
    loop {
        let defect = match store.download(&key, &target).await {
            Ok(fetched) if fetched.sha256 == expected => return Ok(()),
            Ok(fetched) => {
                let defect = FileDefect::Hash { expected, found: fetched.sha256, bytes: fetched.bytes };
                file_defect(window, name, defect)
            }
            Err(StoreError::NotFound { .. }) => return Err(file_defect(window, name, FileDefect::Missing)),
            Err(source @ (StoreError::Truncated { .. } | StoreError::Gzip { .. })) => {
                InstallError::Fetch { window, source }
            }
            Err(source) => return Err(InstallError::Fetch { window, source }),
        };
        if attempt == ATTEMPTS {
            return Err(defect);
        }
        tracing::warn!(checkpoint = %window, key, error = &defect as &dyn std::error::Error, "Fetching a file again.");
        attempt += 1;
    }
}

#[derive(Debug)]
struct HashedWeights {
    hash: grail_protocol::ids::WeightsHash,
    agreement: HashAgreement,
}

/// Hashes the weights in `folder` and makes the local metadata document for them.
async fn describe(metadata: &Metadata, folder: &Path) -> Result<(Vec<u8>, HashedWeights), InstallError> {
    let window = metadata.window;
    let (folder, published) = (folder.to_path_buf(), metadata.weights_hash.clone());
    let hashed = tokio::task::spawn_blocking(move || -> Result<HashedWeights, WeightsError> {
        let weights = WeightsFiles::open(&folder)?;
        let hash = weights.hash()?;
        let agreement = weights.agreement(hash, &published)?;
        Ok(HashedWeights { hash, agreement })
    });
    let hashed =
        hashed.await.expect("hashing does not panic").map_err(|source| InstallError::Weights { window, source })?;
    let document = local_document(metadata, hashed.hash, &hashed.agreement);
    let mut text = serde_json::to_vec_pretty(&document).expect("a JSON value has a text");
    text.push(b'\n');
    Ok((text, hashed))
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::write(path, bytes)?;
    durable::sync_file(path)
}

fn file_defect(window: CheckpointWindow, name: &str, defect: FileDefect) -> InstallError {
    InstallError::File { window, source: FolderDefect { path: name.to_owned(), defect } }
}

fn unreadable(error: &MetadataError) -> MetadataErrorOfTree {
    MetadataErrorOfTree { full: error.to_string(), delta: "not used".to_owned() }
}
