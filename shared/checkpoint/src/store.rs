//! The store that the trainer publishes to, whatever is behind it: a bucket or a directory.

use std::collections::BTreeMap;
use std::fs::File;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use grail_protocol::ids::{CheckpointWindow, WindowStart};
use object_store::buffered::BufWriter;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use crate::layout::{GZIP_SUFFIX, METADATA_FILE, ROOT, Tree, object_key};
use crate::metadata::{Metadata, MetadataError, Published};
use crate::ready::{self, Choice};
use crate::sink::{Coding, Sink, SinkError};

pub use crate::sink::Fetched;

/// Pieces of a download that may wait for the disk.
const QUEUED_PIECES: usize = 8;
const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Bounds on what is taken from a store.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest weights file (`*.safetensors`), plain bytes.
    pub weights_bytes: u64,
    /// Largest delta payload (`*.zst`), plain bytes.
    pub delta_bytes: u64,
    /// Largest object of any other kind, plain bytes.
    pub other_bytes: u64,
    /// Longest wait for the next answer or the next piece of a body.
    pub stall: Duration,
    /// Objects fetched at the same time.
    pub parallel: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            weights_bytes: 64 * GIB,
            delta_bytes: 16 * GIB,
            other_bytes: 64 * MIB,
            stall: Duration::from_secs(30),
            parallel: 4,
        }
    }
}

impl Limits {
    /// The cap for an object, by its name.
    #[must_use]
    pub fn cap(&self, name: &str) -> u64 {
        match Path::new(name).extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => self.weights_bytes,
            Some("zst") => self.delta_bytes,
            _ => self.other_bytes,
        }
    }
}

/// What went wrong between us and the store, or on the way to the disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error("the checkpoints in {store} could not be listed, which is not the same as none being there")]
    List {
        store: String,
        #[source]
        source: Box<object_store::Error>,
    },
    #[error("{store} refuses access to {key}: check the credentials and their permissions")]
    Denied {
        store: String,
        key: String,
        #[source]
        source: Box<object_store::Error>,
    },
    #[error("{key} could not be read")]
    Read {
        key: String,
        #[source]
        source: Box<object_store::Error>,
    },
    #[error("{key} could not be stored")]
    Put {
        key: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{key} does not exist")]
    NotFound { key: String },
    #[error("{key} is no key that a store can hold")]
    Key {
        key: String,
        #[source]
        source: object_store::path::Error,
    },
    #[error("{key} gave nothing for {seconds} s")]
    Stalled { key: String, seconds: u64 },
    #[error("{key} ended after {received} of {expected} bytes")]
    Truncated { key: String, received: u64, expected: u64 },
    #[error("{key} holds more than the {cap} bytes that are accepted")]
    TooLarge { key: String, cap: u64 },
    #[error("{key} is no complete gzip stream")]
    Gzip {
        key: String,
        #[source]
        source: io::Error,
    },
    #[error("no space left for {}: free space there or choose another folder (GRAIL_CACHE_DIR, or --state-dir for --local)", path.display())]
    DiskFull {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} could not be written", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    /// A failure to write `path`, with a full disk told apart.
    #[must_use]
    pub fn write(path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        if is_storage_full(&source) { Self::DiskFull { path, source } } else { Self::Write { path, source } }
    }
}

/// Whether an error, or anything that caused it, says that the disk or the quota is full.
#[must_use]
pub fn is_storage_full(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            if matches!(io.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
                return true;
            }
            // An I/O error hides the error that it wraps from `source`, which skips to that error's own cause.
            next = io.get_ref().map(|inner| inner as &(dyn std::error::Error + 'static)).or_else(|| error.source());
        } else {
            next = error.source();
        }
    }
    false
}

/// Why no checkpoint can be named for a window.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChooseError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "{store} holds no checkpoint that was ready before window {window} ({objects} objects under {ROOT}): \
         wait until the trainer has published one, or check that this is the trainer's store"
    )]
    NoneReady { store: String, window: WindowStart, objects: usize },
}

/// All objects below [`ROOT`], as one complete listing gave them.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Listing {
    objects: BTreeMap<String, u64>,
}

impl Listing {
    /// Keys in ascending order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.objects.keys().map(String::as_str)
    }

    /// Stored size of an object in bytes; `None` if it was not listed.
    #[must_use]
    pub fn size(&self, key: &str) -> Option<u64> {
        self.objects.get(key).copied()
    }

    /// Number of objects.
    #[must_use]
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether the listing is complete and names nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// The checkpoint for `window`: [`ready::resolve`].
    #[must_use]
    pub fn resolve(&self, window: WindowStart) -> Option<Choice> {
        ready::resolve(self.keys(), window)
    }
}

/// An object as it is stored.
#[derive(Debug)]
struct Located {
    path: Key,
    size: u64,
    coding: Coding,
}

/// The trainer's store.
#[derive(Clone, Debug)]
pub struct CheckpointStore {
    store: Arc<dyn ObjectStore>,
    limits: Limits,
}

impl CheckpointStore {
    /// The store behind `store`, with the default [`Limits`].
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self::with_limits(store, Limits::default())
    }

    /// The store behind `store`.
    #[must_use]
    pub fn with_limits(store: Arc<dyn ObjectStore>, limits: Limits) -> Self {
        Self { store, limits }
    }

    /// The bounds in force.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Lists all checkpoints' objects, page by page.
    ///
    /// # Errors
    /// [`StoreError`] if any page is missing; never an incomplete or empty listing instead.
    pub async fn list(&self) -> Result<Listing, StoreError> {
        let prefix = key_path(ROOT)?;
        let mut pages = self.store.list(Some(&prefix));
        let mut objects = BTreeMap::new();
        while let Some(object) = self.in_time(ROOT, pages.next()).await? {
            let object = object.map_err(|source| self.list_error(source))?;
            objects.insert(object.location.to_string(), object.size);
        }
        Ok(Listing { objects })
    }

    /// The checkpoint that `window` must be mined with, by a fresh listing.
    ///
    /// # Errors
    /// [`ChooseError::NoneReady`] if the rule has no answer; [`ChooseError::Store`] if it could not be evaluated.
    pub async fn choose(&self, window: WindowStart) -> Result<Choice, ChooseError> {
        let listing = self.list().await?;
        self.choose_from(&listing, window)
    }

    /// The checkpoint that `window` must be mined with, by a listing of this store.
    ///
    /// # Errors
    /// [`ChooseError::NoneReady`].
    pub fn choose_from(&self, listing: &Listing, window: WindowStart) -> Result<Choice, ChooseError> {
        let none = || ChooseError::NoneReady { store: self.store.to_string(), window, objects: listing.len() };
        listing.resolve(window).ok_or_else(none)
    }

    /// Metadata of both trees of a checkpoint.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer; documents that are absent or defective are part of the result.
    pub async fn published(&self, window: CheckpointWindow) -> Result<Published, StoreError> {
        let full = self.metadata(window, Tree::Full).await?;
        let delta = self.metadata(window, Tree::Delta).await?;
        Ok(Published { window, full, delta })
    }

    async fn metadata(
        &self,
        window: CheckpointWindow,
        tree: Tree,
    ) -> Result<Result<Metadata, MetadataError>, StoreError> {
        let text = match self.read(&object_key(window, tree, METADATA_FILE)).await {
            Ok(Some(text)) => text,
            Ok(None) => return Ok(Err(MetadataError::NotPublished)),
            // What cannot be a document counts as none, as unreadable JSON does.
            Err(error @ (StoreError::Gzip { .. } | StoreError::TooLarge { .. })) => {
                return Ok(Err(MetadataError::Unreadable(error.to_string())));
            }
            Err(error) => return Err(error),
        };
        Ok(Metadata::parse(&text, window, tree))
    }

    /// Stored size of `key` or of its compressed twin, in bytes; `None` if neither exists.
    ///
    /// # Errors
    /// [`StoreError`] if the store does not answer.
    pub async fn size(&self, key: &str) -> Result<Option<u64>, StoreError> {
        Ok(self.locate(key).await?.map(|located| located.size))
    }

    /// Plain bytes of a small object; `None` if neither it nor its twin exists.
    ///
    /// # Errors
    /// [`StoreError`], in particular for an object above the cap of its name.
    pub async fn read(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(located) = self.locate(key).await? else { return Ok(None) };
        let cap = self.limits.cap(key);
        let mut sink = Sink::new(Vec::new(), located.coding, cap);
        let mut body = self.open(key, &located, cap).await?;
        while let Some(piece) = self.next_piece(key, &mut body).await? {
            sink.take(&piece).map_err(|error| sink_error(key, cap, Path::new(""), error))?;
        }
        let (plain, _) = sink.finish().map_err(|error| sink_error(key, cap, Path::new(""), error))?;
        Ok(Some(plain))
    }

    /// Downloads an object into the new file `target`, hashing it on the way, and syncs the file. Memory stays bounded.
    ///
    /// # Errors
    /// [`StoreError`]; the file may then exist with a part of the bytes.
    pub async fn download(&self, key: &str, target: &Path) -> Result<Fetched, StoreError> {
        let missing = || StoreError::NotFound { key: key.to_owned() };
        let located = self.locate(key).await?.ok_or_else(missing)?;
        let cap = self.limits.cap(key);
        let mut body = self.open(key, &located, cap).await?;
        let (pieces, queue) = mpsc::channel::<Bytes>(QUEUED_PIECES);
        let path = target.to_path_buf();
        let writer = tokio::task::spawn_blocking(move || write_file(&path, located.coding, cap, queue));
        let mut received = Ok(());
        loop {
            match self.next_piece(key, &mut body).await {
                Ok(Some(piece)) => {
                    // The writer hung up: its own error says why.
                    if pieces.send(piece).await.is_err() {
                        break;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    received = Err(error);
                    break;
                }
            }
        }
        drop(pieces);
        let written = writer.await.map_err(|panic| StoreError::write(target, io::Error::other(panic)))?;
        received?;
        written.map_err(|error| sink_error(key, cap, target, error))
    }

    /// Stores a file under `key`, in parts if it is large.
    ///
    /// # Errors
    /// [`StoreError`]; a multipart upload that failed is aborted.
    pub async fn put_file(&self, key: &str, file: &Path) -> Result<(), StoreError> {
        let mut source = tokio::fs::File::open(file).await.map_err(|source| put_error(key, source))?;
        let mut target = BufWriter::new(Arc::clone(&self.store), key_path(key)?);
        if let Err(error) = tokio::io::copy(&mut source, &mut target).await {
            if let Err(abort) = target.abort().await {
                tracing::debug!(key, error = &abort as &dyn std::error::Error, "Upload could not be aborted.");
            }
            return Err(put_error(key, error));
        }
        // A writer whose end has begun cannot be aborted any more: it panics.
        target.shutdown().await.map_err(|source| put_error(key, source))
    }

    /// Stores a small object under `key`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn put_bytes(&self, key: &str, bytes: Vec<u8>) -> Result<(), StoreError> {
        let path = key_path(key)?;
        self.store.put(&path, bytes.into()).await.map_err(|source| put_error(key, source))?;
        Ok(())
    }

    /// Finds an object; the compressed twin wins, as for every reader.
    async fn locate(&self, key: &str) -> Result<Option<Located>, StoreError> {
        for (name, coding) in [(format!("{key}{GZIP_SUFFIX}"), Coding::Gzip), (key.to_owned(), Coding::Plain)] {
            let path = key_path(&name)?;
            match self.in_time(&name, self.store.head(&path)).await? {
                Ok(meta) => return Ok(Some(Located { path, size: meta.size, coding })),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(source) => return Err(self.read_error(&name, source)),
            }
        }
        Ok(None)
    }

    async fn open(&self, key: &str, located: &Located, cap: u64) -> Result<Body, StoreError> {
        if located.size > cap {
            return Err(StoreError::TooLarge { key: key.to_owned(), cap });
        }
        let answer = self.in_time(key, self.store.get(&located.path)).await?;
        let answer = answer.map_err(|source| self.read_error(key, source))?;
        Ok(Body { expected: answer.meta.size, received: 0, pieces: answer.into_stream() })
    }

    async fn next_piece(&self, key: &str, body: &mut Body) -> Result<Option<Bytes>, StoreError> {
        match self.in_time(key, body.pieces.next()).await? {
            Some(Ok(piece)) => {
                body.received += piece.len() as u64;
                Ok(Some(piece))
            }
            Some(Err(source)) => Err(self.read_error(key, source)),
            None if body.received == body.expected => Ok(None),
            None => {
                Err(StoreError::Truncated { key: key.to_owned(), received: body.received, expected: body.expected })
            }
        }
    }

    async fn in_time<T>(&self, key: &str, answer: impl Future<Output = T>) -> Result<T, StoreError> {
        let stalled = |_| StoreError::Stalled { key: key.to_owned(), seconds: self.limits.stall.as_secs() };
        tokio::time::timeout(self.limits.stall, answer).await.map_err(stalled)
    }

    fn list_error(&self, source: object_store::Error) -> StoreError {
        let store = self.store.to_string();
        let source = Box::new(source);
        if is_denied(&source) {
            StoreError::Denied { store, key: ROOT.to_owned(), source }
        } else {
            StoreError::List { store, source }
        }
    }

    fn read_error(&self, key: &str, source: object_store::Error) -> StoreError {
        let key = key.to_owned();
        match source {
            object_store::Error::NotFound { .. } => StoreError::NotFound { key },
            source if is_denied(&source) => {
                StoreError::Denied { store: self.store.to_string(), key, source: Box::new(source) }
            }
            source => StoreError::Read { key, source: Box::new(source) },
        }
    }
}

impl std::fmt::Display for CheckpointStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.store.fmt(f)
    }
}

struct Body {
    expected: u64,
    received: u64,
    pieces: BoxStream<'static, object_store::Result<Bytes>>,
}

fn write_file(path: &Path, coding: Coding, cap: u64, mut queue: mpsc::Receiver<Bytes>) -> Result<Fetched, SinkError> {
    let file = File::options().write(true).create(true).truncate(true).open(path).map_err(SinkError::Target)?;
    let mut sink = Sink::new(file, coding, cap);
    while let Some(piece) = queue.blocking_recv() {
        sink.take(&piece)?;
    }
    let (file, fetched) = sink.finish()?;
    file.sync_all().map_err(SinkError::Target)?;
    Ok(fetched)
}

fn sink_error(key: &str, cap: u64, target: &Path, error: SinkError) -> StoreError {
    match error {
        SinkError::OverCap => StoreError::TooLarge { key: key.to_owned(), cap },
        SinkError::Gzip(source) => StoreError::Gzip { key: key.to_owned(), source },
        SinkError::Target(source) => StoreError::write(target, source),
    }
}

fn put_error(key: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
    StoreError::Put { key: key.to_owned(), source: source.into() }
}

fn key_path(key: &str) -> Result<Key, StoreError> {
    Key::parse(key).map_err(|source| StoreError::Key { key: key.to_owned(), source })
}

fn is_denied(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. })
}
