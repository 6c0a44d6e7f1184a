//! The store that the trainer publishes to, whatever is behind it: a bucket or a directory.

mod download;
mod error;
pub(crate) mod ledger;
mod limits;

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use grail_protocol::ids::{CheckpointWindow, WindowStart};
use object_store::buffered::BufWriter;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::io::AsyncWriteExt;

use crate::layout::{GZIP_SUFFIX, METADATA_FILE, ROOT, Tree, object_key};
use crate::metadata::{Metadata, MetadataError, Published};
use crate::ready::{self, Choice};
use crate::sink::{Coding, Sink, SinkError};

pub use crate::sink::Fetched;
pub use error::{ChooseError, StoreError, is_storage_full};
use limits::Retries;
pub use limits::{Limits, RetryLimits};

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

    /// Stored size of an object or of its compressed twin, which is the one that is read; `None` if neither was listed.
    #[must_use]
    pub fn size_as_read(&self, key: &str) -> Option<u64> {
        self.size(&format!("{key}{GZIP_SUFFIX}")).or_else(|| self.size(key))
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
    /// Its own key, with the suffix of a compressed twin.
    name: String,
    path: Key,
    size: u64,
    e_tag: Option<String>,
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

    /// Lists all checkpoints' objects, page by page; a listing that breaks is begun anew.
    ///
    /// # Errors
    /// [`StoreError`] if any page is missing; never an incomplete or empty listing instead.
    pub async fn list(&self) -> Result<Listing, StoreError> {
        let mut retries = Retries::new(&self.limits.retry);
        loop {
            match self.list_once().await {
                Ok(listing) => return Ok(listing),
                Err(error) => retries.after(error).await?,
            }
        }
    }

    async fn list_once(&self) -> Result<Listing, StoreError> {
        let prefix = key_path(ROOT)?;
        let mut pages = self.store.list(Some(&prefix));
        let mut objects = BTreeMap::new();
        while let Some(object) = self.in_time(ROOT, pages.next()).await? {
            let object = object.map_err(|source| StoreError::list(&self.store.to_string(), source))?;
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

    pub(crate) async fn metadata(
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
        let mut retries = Retries::new(&self.limits.retry);
        loop {
            match self.read_once(key).await {
                Ok(plain) => return Ok(plain),
                Err(error) => retries.after(error).await?,
            }
        }
    }

    async fn read_once(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(located) = self.locate_once(key).await? else { return Ok(None) };
        let cap = self.limits.cap(key);
        let mut sink = Sink::new(Vec::new(), located.coding, cap);
        let mut body = self.open(&located, cap).await?;
        while let Some(piece) = self.next_piece(&located.name, &mut body).await? {
            sink.take(&piece).map_err(|error| sink_error(key, cap, Path::new(""), error))?;
        }
        let (plain, _) = sink.finish().map_err(|error| sink_error(key, cap, Path::new(""), error))?;
        Ok(Some(plain))
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
        let mut retries = Retries::new(&self.limits.retry);
        loop {
            match self.locate_once(key).await {
                Ok(located) => return Ok(located),
                Err(error) => retries.after(error).await?,
            }
        }
    }

    async fn locate_once(&self, key: &str) -> Result<Option<Located>, StoreError> {
        for (name, coding) in [(format!("{key}{GZIP_SUFFIX}"), Coding::Gzip), (key.to_owned(), Coding::Plain)] {
            let path = key_path(&name)?;
            match self.in_time(&name, self.store.head(&path)).await? {
                Ok(meta) => return Ok(Some(Located { name, path, size: meta.size, e_tag: meta.e_tag, coding })),
                Err(object_store::Error::NotFound { .. }) => {}
                Err(source) => return Err(self.read_error(&name, source)),
            }
        }
        Ok(None)
    }

    async fn open(&self, located: &Located, cap: u64) -> Result<Body, StoreError> {
        if located.size > cap {
            return Err(StoreError::TooLarge { key: located.name.clone(), cap });
        }
        let answer = self.in_time(&located.name, self.store.get(&located.path)).await?;
        let answer = answer.map_err(|source| self.read_error(&located.name, source))?;
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

    fn read_error(&self, key: &str, source: object_store::Error) -> StoreError {
        StoreError::read(&self.store.to_string(), key, source)
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
