//! Checkpoints of the trainer: which one a window must be mined with, what its metadata says, and how its files get from
//! the store into a verified local folder.
//!
//! The order of use, once per window `W`:
//!
//! 1. [`CheckpointStore::choose`] lists the store and applies the rule of [`ready::resolve`]. A listing that failed is an
//!    error and never "no checkpoint": a window is mined only after the rule was evaluated on a complete listing.
//! 2. [`CheckpointStore::published`] reads the metadata of the chosen checkpoint's trees; [`Published::policy`] gives the
//!    environment and the sampling parameters, or the reason to skip the window.
//! 3. [`CheckpointCache::install`] returns the verified folder: from the cache, from a cached checkpoint and deltas, or
//!    downloaded, whichever costs the fewest bytes, and the next way if one fails.
//! 4. [`CheckpointCache::prune`] removes what neither the limits allow nor anybody uses.
//!
//! Nothing here holds weights in memory: objects stream to disk while they are hashed, with a cap per object.

mod blocking;
pub mod cache;
pub mod delta;
pub mod durable;
mod fetch;
pub mod install;
pub mod layout;
pub mod manifest;
pub mod metadata;
pub mod mirror;
pub mod policy;
pub mod progress;
pub mod publish;
mod python;
pub mod ready;
pub mod retention;
mod routes;
pub mod signature;
mod sink;
pub mod store;
pub mod weights;

pub use cache::{
    CacheError, CachedContents, CachedSummary, CheckpointCache, Hold, Installed, MadeFrom, Notice, Pruned,
};
pub use delta::{Delta, DeltaClass, DeltaError, DeltaFormat, DeltaMetadata, Shapes};
pub use install::{ChainError, FailureClass, InstallError, KnownRoutes, RouteBase, RouteSummary, Wanted};
pub use layout::Tree;
pub use manifest::{Manifest, Sha256Digest};
pub use metadata::{Metadata, MetadataError, Published, Verdict};
pub use mirror::{ChangeSet, Mirror, MirrorError, MirrorPlan};
pub use policy::{EnvironmentParams, GenerationParams, MiningPolicy, PolicyDefect, ThinkingModeName};
pub use progress::{Progress, ProgressFn};
pub use publish::{
    DeltaInput, MetadataInput, PublishError, PublishedDelta, PublishedFull, publish_delta, publish_full,
};
pub use ready::{Choice, resolve};
pub use retention::RetentionLimits;
pub use signature::{SignatureCheck, SignatureDefect};
pub use store::{CheckpointStore, ChooseError, Limits, Listing, RetryLimits, StoreError};
pub use weights::{Fingerprint, HashAgreement, WeightsError, WeightsFiles};
