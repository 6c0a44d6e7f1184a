//! What goes wrong between us and the store, or on the way to the disk.

use std::io;
use std::path::{Path, PathBuf};

use grail_protocol::ids::WindowStart;

use crate::layout::ROOT;

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
    #[error("{key} was replaced by another object while it was read: list the store again")]
    Changed { key: String },
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

    /// A failure to read `key`, with absence, refusal and replacement told apart by what the store said, never by its text.
    pub(super) fn read(store: &str, key: &str, source: object_store::Error) -> Self {
        let key = key.to_owned();
        match source {
            object_store::Error::NotFound { .. } => Self::NotFound { key },
            object_store::Error::Precondition { .. } => Self::Changed { key },
            source if is_denied(&source) => Self::Denied { store: store.to_owned(), key, source: Box::new(source) },
            source => Self::Read { key, source: Box::new(source) },
        }
    }

    pub(super) fn list(store: &str, source: object_store::Error) -> Self {
        let (store, source) = (store.to_owned(), Box::new(source));
        if is_denied(&source) {
            Self::Denied { store, key: ROOT.to_owned(), source }
        } else {
            Self::List { store, source }
        }
    }

    /// Whether the same request may succeed a little later: 5xx, 429, connections that break, stalls. What is absent, refused,
    /// too large or damaged stays so.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::List { .. } | Self::Read { .. } | Self::Stalled { .. } | Self::Truncated { .. })
    }
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

/// Whether an error, or anything that caused it, says that the disk or the quota is full.
#[must_use]
pub fn is_storage_full(error: &(dyn std::error::Error + 'static)) -> bool {
    any_io(error, |kind| matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
}

/// Whether the store, or the file system behind it, says that we may not read there.
fn is_denied(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. })
        || any_io(error, |kind| kind == io::ErrorKind::PermissionDenied)
}

fn any_io(error: &(dyn std::error::Error + 'static), is_it: impl Fn(io::ErrorKind) -> bool) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            if is_it(io.kind()) {
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
