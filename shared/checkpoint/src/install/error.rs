//! Why a checkpoint is not in the cache, and what kind of reason that is.

use std::fmt;
use std::path::PathBuf;

use grail_protocol::ids::{CheckpointWindow, WeightsHash};

use crate::cache::{CacheError, Damage};
use crate::delta::{DeltaClass, DeltaError, DeltaMetadataError};
use crate::layout::Tree;
use crate::manifest::FolderDefect;
use crate::metadata::{FilesDefect, MetadataError, Published};
use crate::mirror::MirrorError;
use crate::store::StoreError;
use crate::weights::WeightsError;

/// Why a checkpoint is not in the cache.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstallError {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error("no way to checkpoint {window} is known without a listing")]
    List {
        window: CheckpointWindow,
        #[source]
        source: StoreError,
    },
    #[error("a file of checkpoint {window} could not be fetched")]
    Fetch {
        window: CheckpointWindow,
        #[source]
        source: StoreError,
    },
    /// An object that was listed is gone or another one: what was chosen by that listing may not be the choice any more.
    #[error("checkpoint {window} changed in the store while it was fetched: list it again and choose anew")]
    Vanished {
        window: CheckpointWindow,
        #[source]
        source: StoreError,
    },
    #[error("the {tree} of checkpoint {window} as published is incomplete or damaged")]
    File {
        window: CheckpointWindow,
        tree: Tree,
        #[source]
        source: FolderDefect,
    },
    #[error("checkpoint {window} has no usable metadata")]
    Metadata {
        window: CheckpointWindow,
        #[source]
        source: MetadataErrorOfTrees,
    },
    #[error("checkpoint {window} names no files that can be trusted")]
    Files {
        window: CheckpointWindow,
        #[source]
        source: FilesDefect,
    },
    #[error("no chain of deltas leads to checkpoint {window}")]
    Chain {
        window: CheckpointWindow,
        #[source]
        source: ChainError,
    },
    #[error("the delta of checkpoint {window} is in no known format")]
    Format {
        window: CheckpointWindow,
        #[source]
        source: DeltaMetadataError,
    },
    #[error("the delta of checkpoint {window} cannot be applied")]
    Delta {
        window: CheckpointWindow,
        #[source]
        source: DeltaError,
    },
    #[error("checkpoint {window} could not be made from its base")]
    Mirror {
        window: CheckpointWindow,
        #[source]
        source: MirrorError,
    },
    #[error("the cached checkpoint {base}, from which {window} was to be made, is damaged")]
    Base {
        window: CheckpointWindow,
        base: CheckpointWindow,
        #[source]
        source: Damage,
    },
    #[error("the deltas to checkpoint {window} result in weights {found}, published is {published}")]
    HashMismatch { window: CheckpointWindow, published: String, found: WeightsHash },
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
    #[error("no way leads to checkpoint {window}: {}", list(failures))]
    NoRoute { window: CheckpointWindow, failures: Vec<InstallError> },
}

/// Why no chain of deltas can be followed to its base.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    #[error(
        "checkpoint {missing}, on which {needed_by} rests, is neither in the cache nor in the store \
         (FULL: {full}; DELTA: {delta}); wait for the next FULL checkpoint"
    )]
    Hole { missing: CheckpointWindow, needed_by: CheckpointWindow, full: String, delta: String },
    #[error("checkpoint {link} does not rest on an earlier one")]
    NotDecreasing {
        link: CheckpointWindow,
        #[source]
        source: FilesDefect,
    },
    #[error("it has more than {limit} deltas, down to checkpoint {link}")]
    TooLong { limit: usize, link: CheckpointWindow },
}

/// The kinds of reasons, for reports and for what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureClass {
    /// The store did not answer, or not to the end, or this process ends: the same again may succeed, and goes on where it was.
    Unavailable,
    /// The store refuses: its credentials may have changed.
    Denied,
    /// The store changed meanwhile: list and choose again.
    Vanished,
    NoMetadata,
    /// Metadata that contradicts its key, or whose manifest is none.
    BadMetadata,
    UnsafePath,
    /// The metadata vouches for no files.
    NoManifest,
    MissingFile,
    /// Another sha256 than the manifest's, an object over its cap, a damaged gzip stream.
    DamagedFile,
    ChainBroken,
    ChainInvalid,
    ChainTooLong,
    /// A delta in a format that is not known.
    Format,
    Delta(DeltaClass),
    HashMismatch,
    Weights,
    /// The local disk is full.
    NoSpace,
    /// Another failure of this host.
    Local,
}

impl FailureClass {
    /// The class as reports spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "Unavailable",
            Self::Denied => "Denied",
            Self::Vanished => "Vanished",
            Self::NoMetadata => "NoMetadata",
            Self::BadMetadata => "BadMetadata",
            Self::UnsafePath => "UnsafePath",
            Self::NoManifest => "NoManifest",
            Self::MissingFile => "MissingFile",
            Self::DamagedFile => "DamagedFile",
            Self::ChainBroken => "ChainBroken",
            Self::ChainInvalid => "ChainInvalid",
            Self::ChainTooLong => "ChainTooLong",
            Self::Format => "Format",
            Self::Delta(class) => class.as_str(),
            Self::HashMismatch => "HashMismatch",
            Self::Weights => "Weights",
            Self::NoSpace => "NoSpace",
            Self::Local => "Local",
        }
    }

    /// Whether the store may give tomorrow, or in a moment, what it did not give now.
    #[must_use]
    pub const fn is_transient(self) -> bool {
        matches!(self, Self::Unavailable | Self::Denied | Self::Vanished)
    }
}

impl fmt::Display for FailureClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl InstallError {
    /// What kind of reason it is. Of several failures a full disk comes first and then what may pass, because after either the
    /// same installation can succeed; otherwise the first one counts, which is that of the cheapest way.
    #[must_use]
    pub fn class(&self) -> FailureClass {
        match self {
            Self::NoSpace { .. } | Self::Cache(CacheError::DiskFull { .. }) => FailureClass::NoSpace,
            // What is here stays for the next process.
            Self::Cache(CacheError::Ending) => FailureClass::Unavailable,
            Self::Cache(_) => FailureClass::Local,
            Self::List { source, .. } | Self::Fetch { source, .. } => store_class(source),
            Self::Vanished { .. } => FailureClass::Vanished,
            Self::File { source, .. } => match source.defect {
                crate::manifest::FileDefect::Missing => FailureClass::MissingFile,
                crate::manifest::FileDefect::Hash { .. } => FailureClass::DamagedFile,
                crate::manifest::FileDefect::Unreadable(_) => FailureClass::Local,
            },
            Self::Metadata { source, .. } => source.class,
            Self::Files { source: FilesDefect::NoBase { .. }, .. } => FailureClass::ChainInvalid,
            Self::Files { .. } => FailureClass::NoManifest,
            Self::Chain { source, .. } => match source {
                ChainError::Hole { .. } => FailureClass::ChainBroken,
                ChainError::NotDecreasing { .. } => FailureClass::ChainInvalid,
                ChainError::TooLong { .. } => FailureClass::ChainTooLong,
            },
            Self::Format { .. } => FailureClass::Format,
            Self::Delta { source, .. } => delta_class(source),
            Self::Mirror { source, .. } if source.is_disk_full() => FailureClass::NoSpace,
            Self::Mirror { source: MirrorError::Delta(source), .. } => delta_class(source),
            Self::Mirror { .. } | Self::Base { .. } => FailureClass::Local,
            Self::HashMismatch { .. } => FailureClass::HashMismatch,
            Self::Weights { .. } => FailureClass::Weights,
            Self::NoRoute { failures, .. } => {
                let classes = || failures.iter().map(Self::class);
                classes()
                    .find(|class| *class == FailureClass::NoSpace)
                    .or_else(|| classes().find(|class| class.is_transient()))
                    .or_else(|| classes().next())
                    .unwrap_or(FailureClass::NoMetadata)
            }
        }
    }

    /// Whether the local disk is full, as opposed to something wrong with what was published.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        self.class() == FailureClass::NoSpace
    }

    /// Whether something about a file of this checkpoint is the reason.
    pub(crate) fn concerns(&self, checkpoint: CheckpointWindow) -> bool {
        match self {
            Self::Fetch { window, .. }
            | Self::Vanished { window, .. }
            | Self::File { window, .. }
            | Self::Format { window, .. }
            | Self::Delta { window, .. } => *window == checkpoint,
            _ => false,
        }
    }

    /// The metadata of both trees is of no use.
    pub(crate) fn metadata(published: &Published) -> Self {
        let (full, delta) = (published.full.as_ref().err(), published.delta.as_ref().err());
        let classes = [full, delta].into_iter().flatten().map(metadata_class);
        let class = classes.max_by_key(|class| *class != FailureClass::NoMetadata).unwrap_or(FailureClass::NoMetadata);
        let text = |error: Option<&MetadataError>| error.map_or_else(|| "not used".to_owned(), ToString::to_string);
        let source = MetadataErrorOfTrees { full: text(full), delta: text(delta), class };
        Self::Metadata { window: published.window, source }
    }

    /// A failure to fetch an object that was listed.
    pub(crate) fn fetch(window: CheckpointWindow, source: StoreError) -> Self {
        match source {
            StoreError::NotFound { .. } | StoreError::Changed { .. } => Self::Vanished { window, source },
            source => Self::Fetch { window, source },
        }
    }
}

/// Why both trees' metadata is of no use, as text: the documents belong to [`Published`].
#[derive(Debug, Clone, thiserror::Error)]
#[error("FULL: {full}; DELTA: {delta}")]
pub struct MetadataErrorOfTrees {
    pub full: String,
    pub delta: String,
    pub class: FailureClass,
}

fn metadata_class(error: &MetadataError) -> FailureClass {
    match error {
        MetadataError::NotPublished
        | MetadataError::Unreadable(_)
        | MetadataError::Json(_)
        | MetadataError::NotAnObject(_) => FailureClass::NoMetadata,
        MetadataError::Manifest(crate::manifest::ManifestDefect::UnsafePath { .. }) => FailureClass::UnsafePath,
        MetadataError::Window { .. } | MetadataError::Type { .. } | MetadataError::Manifest(_) => {
            FailureClass::BadMetadata
        }
    }
}

const fn store_class(error: &StoreError) -> FailureClass {
    match error {
        StoreError::Denied { .. } => FailureClass::Denied,
        StoreError::NotFound { .. } | StoreError::Changed { .. } => FailureClass::Vanished,
        StoreError::TooLarge { .. } | StoreError::Gzip { .. } | StoreError::Key { .. } => FailureClass::DamagedFile,
        StoreError::DiskFull { .. } => FailureClass::NoSpace,
        StoreError::Write { .. } => FailureClass::Local,
        StoreError::List { .. }
        | StoreError::Read { .. }
        | StoreError::Put { .. }
        | StoreError::Stalled { .. }
        | StoreError::Truncated { .. } => FailureClass::Unavailable,
    }
}

fn delta_class(error: &DeltaError) -> FailureClass {
    match (error.class(), error) {
        (Some(class), _) => FailureClass::Delta(class),
        (None, error) if crate::store::is_storage_full(error) => FailureClass::NoSpace,
        (None, _) => FailureClass::Local,
    }
}

/// Every failure with its causes, in one line.
fn list(failures: &[InstallError]) -> String {
    let chain = |failure: &InstallError| {
        let mut text = failure.to_string();
        let mut next = std::error::Error::source(failure);
        while let Some(cause) = next {
            text += &format!(": {cause}");
            next = cause.source();
        }
        text
    };
    failures.iter().map(chain).collect::<Vec<_>>().join("; ")
}
