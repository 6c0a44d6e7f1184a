//! The ways to a checkpoint: its full tree, or deltas on top of a checkpoint that is in the cache or in the store. Found step
//! by step down the chain, from one listing; the cheapest in bytes comes first.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use grail_protocol::ids::CheckpointWindow;

use crate::install::{ChainError, InstallError};
use crate::layout::{METADATA_FILE, Tree, object_key};
use crate::manifest::{FileDefect, FolderDefect};
use crate::metadata::{Metadata, MetadataError, Published};
use crate::store::{CheckpointStore, Listing};

/// Deltas that a way may have; the trainer publishes a full tree after ten.
const MAX_DELTAS: usize = 64;
/// Ways by deltas that may result in other weights than published: with a second base the fault is not in the base.
const MAX_MISMATCHES: usize = 2;

/// What the deltas are applied to.
#[derive(Clone, Debug)]
pub(crate) enum Base {
    Cached(CheckpointWindow),
    Full(Arc<Metadata>),
}

/// One way to a checkpoint.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) base: Base,
    /// Oldest first; none if the base is the checkpoint itself.
    pub(crate) deltas: Vec<Arc<Metadata>>,
    /// Bytes to fetch.
    pub(crate) bytes: u64,
}

impl Route {
    pub(crate) fn base_window(&self) -> CheckpointWindow {
        match &self.base {
            Base::Cached(window) => *window,
            Base::Full(metadata) => metadata.window,
        }
    }

    /// Every checkpoint of which something is fetched.
    pub(crate) fn fetched(&self) -> impl Iterator<Item = CheckpointWindow> {
        self.trees().map(|(window, _)| window)
    }

    /// The trees that are fetched.
    pub(crate) fn trees(&self) -> impl Iterator<Item = (CheckpointWindow, Tree)> {
        let base = match &self.base {
            Base::Cached(_) => None,
            Base::Full(metadata) => Some((metadata.window, Tree::Full)),
        };
        base.into_iter().chain(self.deltas.iter().map(|delta| (delta.window, Tree::Delta)))
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.base {
            Base::Cached(window) => write!(f, "cached {window}")?,
            Base::Full(metadata) => write!(f, "FULL {}", metadata.window)?,
        }
        self.deltas.iter().try_for_each(|delta| write!(f, " + DELTA {}", delta.window))
    }
}

/// Hands out ways, cheapest first, and looks for more while those known have failed.
#[derive(Debug)]
pub(crate) struct Routes<'a> {
    store: &'a CheckpointStore,
    listing: &'a Listing,
    cached: BTreeSet<CheckpointWindow>,
    preferred: Option<CheckpointWindow>,
    target: CheckpointWindow,
    open: Vec<Route>,
    /// Ways from full trees that are in the cache, for the case that the cached folder is of no use.
    reserve: Vec<Route>,
    walk: Option<Walk>,
    /// Whether a base turned out to be of no use, so that one further back may now be the cheapest.
    base_lost: bool,
    mismatches: usize,
    failures: Vec<InstallError>,
}

/// A chain as far as it was followed.
#[derive(Debug)]
struct Walk {
    /// Newest first.
    links: Vec<Arc<Metadata>>,
    bytes: u64,
    /// What the oldest link rests on.
    base: CheckpointWindow,
    /// Set once the base was looked at.
    looked_at: Option<LookedAt>,
}

impl<'a> Routes<'a> {
    /// The ways to what is `published`; `cached` are the checkpoints that have a folder, `preferred` the one in use.
    pub(crate) fn new(
        store: &'a CheckpointStore,
        listing: &'a Listing,
        published: &Published,
        cached: BTreeSet<CheckpointWindow>,
        preferred: Option<CheckpointWindow>,
    ) -> Self {
        let preferred = preferred.filter(|window| cached.contains(window));
        let target = published.window;
        let mut routes = Self {
            store,
            listing,
            cached,
            preferred,
            target,
            open: Vec::new(),
            reserve: Vec::new(),
            walk: None,
            base_lost: false,
            mismatches: 0,
            failures: Vec::new(),
        };
        if let Ok(full) = &published.full {
            match tree_bytes(listing, full) {
                Ok(bytes) => {
                    let base = Base::Full(Arc::new(full.clone()));
                    routes.open.push(Route { base, deltas: Vec::new(), bytes });
                }
                Err(error) => routes.failures.push(error),
            }
        }
        if let Ok(delta) = &published.delta {
            match Walk::begin(listing, delta) {
                Ok(walk) => routes.walk = Some(walk),
                Err(error) => routes.failures.push(error),
            }
        }
        match (&published.full, &published.delta) {
            (Err(_), Err(_)) => routes.failures.push(InstallError::metadata(published)),
            (Err(error), Ok(_)) | (Ok(_), Err(error)) if !matches!(error, MetadataError::NotPublished) => {
                tracing::warn!(checkpoint = %target, error = error as &dyn std::error::Error,
                    "One of the two trees of the checkpoint has metadata of no use; the other one is used.");
            }
            _ => {}
        }
        routes
    }

    /// The cheapest way that was not handed out yet.
    pub(crate) async fn next(&mut self) -> Option<Route> {
        if std::mem::take(&mut self.base_lost) || self.open.iter().all(|route| route.deltas.is_empty()) {
            self.look_further().await;
        }
        let full_bytes = self.open.iter().find(|route| route.deltas.is_empty()).map_or(u64::MAX, |route| route.bytes);
        let cheapest = self.open.iter().enumerate().min_by_key(|(_, route)| {
            // What is in use can be rolled on from in place, which saves more than a few bytes less to fetch.
            let in_use =
                self.preferred.is_some_and(|window| matches!(route.base, Base::Cached(base) if base == window));
            (!(in_use && route.bytes <= full_bytes), route.bytes, route.deltas.len())
        })?;
        let index = cheapest.0;
        Some(self.open.swap_remove(index))
    }

    /// Notes why a way led nowhere.
    pub(crate) fn failed(&mut self, route: &Route, error: InstallError) {
        tracing::warn!(checkpoint = %self.target, route = %route, class = %error.class(),
            error = &error as &dyn std::error::Error, "A way to the checkpoint failed; the next one is tried.");
        match &error {
            InstallError::Base { base, .. } => {
                self.cached.remove(base);
                self.base_lost = true;
                self.open.extend(self.reserve.extract_if(.., |route| route.base_window() == *base));
            }
            InstallError::HashMismatch { .. } => {
                self.mismatches += 1;
                if self.mismatches >= MAX_MISMATCHES {
                    self.give_up_deltas();
                }
            }
            // Every way by deltas has the links that this one has.
            error if route.deltas.iter().any(|delta| error.concerns(delta.window)) => self.give_up_deltas(),
            _ => {}
        }
        self.failures.push(error);
    }

    /// Notes that a way led to weights that nothing confirms. Other deltas state no more than these do.
    pub(crate) fn doubted(&mut self, route: &Route) {
        if !route.deltas.is_empty() {
            self.give_up_deltas();
        }
    }

    /// Only the full tree of the checkpoint itself is left to try.
    fn give_up_deltas(&mut self) {
        self.walk = None;
        self.reserve.clear();
        self.open.retain(|route| route.deltas.is_empty());
    }

    /// Why there is no checkpoint, once no way is left.
    pub(crate) fn into_error(mut self) -> InstallError {
        if self.failures.len() == 1
            && let Some(only) = self.failures.pop()
        {
            return only;
        }
        InstallError::NoRoute { window: self.target, failures: self.failures }
    }

    /// Follows the chain until it has found a base that is as good as any behind it.
    async fn look_further(&mut self) {
        while let Some(mut walk) = self.walk.take() {
            let found = walk.looked_at.as_ref().map(|base| base.found.is_some());
            if let Some(found) = found
                && let Err(error) = walk.go_on(self.store, self.listing, self.target).await
            {
                // A chain ends where it has no more deltas; that is a defect only if it found nothing to stand on there.
                let is_end = matches!(error, InstallError::Chain { source: ChainError::Hole { .. }, .. });
                if !(is_end && found) {
                    self.failures.push(error);
                }
                return;
            }
            let looked_at = self.look_at_base(&walk).await;
            let suffices = looked_at.found.is_some_and(|found| self.suffices(&walk, found));
            walk.looked_at = Some(looked_at);
            self.walk = Some(walk);
            if suffices {
                return;
            }
        }
    }

    /// Adds the ways that begin at the base of the walk.
    async fn look_at_base(&mut self, walk: &Walk) -> LookedAt {
        let deltas: Vec<Arc<Metadata>> = walk.links.iter().rev().cloned().collect();
        let mut looked_at = LookedAt { found: None, full: "usable".to_owned() };
        let is_cached = self.cached.contains(&walk.base);
        match complete_full(self.store, self.listing, walk.base).await {
            Ok((full, bytes)) => {
                let bytes = walk.bytes.saturating_add(bytes);
                let route = Route { base: Base::Full(Arc::new(full)), deltas: deltas.clone(), bytes };
                if is_cached {
                    self.reserve.push(route)
                } else {
                    self.open.push(route)
                }
                looked_at.found = Some(Found::InStore);
            }
            Err(defect) => {
                looked_at.full = defect.to_string();
                if let FullDefect::Store(error) = defect {
                    self.failures.push(error);
                }
            }
        }
        if is_cached {
            self.open.push(Route { base: Base::Cached(walk.base), deltas, bytes: walk.bytes });
            looked_at.found = Some(Found::Cached);
        }
        looked_at
    }

    /// Whether no base further back can be cheaper or better than the one that was found.
    fn suffices(&self, walk: &Walk, found: Found) -> bool {
        let preferred_below = self.preferred.is_some_and(|window| window < walk.base);
        let cached_below = self.cached.range(..walk.base).next().is_some();
        let cheapest = self.open.iter().map(|route| route.bytes).min();
        match found {
            Found::Cached => !preferred_below,
            Found::InStore => !cached_below || cheapest.is_some_and(|bytes| bytes <= walk.bytes),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Found {
    Cached,
    InStore,
}

/// What the base of a walk is good for.
#[derive(Debug)]
struct LookedAt {
    found: Option<Found>,
    /// Its full tree, for a report.
    full: String,
}

/// Why a full tree cannot be a base.
#[derive(Debug, thiserror::Error)]
enum FullDefect {
    #[error(transparent)]
    Metadata(MetadataError),
    #[error("{}", match .0 {
        InstallError::File { source, .. } => format!("{} is missing", source.path),
        other => other.to_string(),
    })]
    Files(InstallError),
    #[error(transparent)]
    Store(InstallError),
}

impl Walk {
    fn begin(listing: &Listing, delta: &Metadata) -> Result<Self, InstallError> {
        let (base, bytes) = link(listing, delta, delta.window)?;
        Ok(Self { links: vec![Arc::new(delta.clone())], bytes, base, looked_at: None })
    }

    /// Goes behind the base, by its delta.
    async fn go_on(
        &mut self,
        store: &CheckpointStore,
        listing: &Listing,
        target: CheckpointWindow,
    ) -> Result<(), InstallError> {
        let (window, chain) = (self.base, |source| InstallError::Chain { window: target, source });
        let needed_by = self.links.last().map_or(target, |link| link.window);
        let delta = match listed_metadata(store, listing, window, Tree::Delta).await? {
            Ok(delta) => delta,
            Err(delta) => {
                let full = self.looked_at.as_ref().map_or_else(String::new, |base| base.full.clone());
                return Err(chain(ChainError::Hole { missing: window, needed_by, full, delta: delta.to_string() }));
            }
        };
        if self.links.len() >= MAX_DELTAS {
            return Err(chain(ChainError::TooLong { limit: MAX_DELTAS, link: needed_by }));
        }
        let (base, bytes) = link(listing, &delta, target)?;
        self.links.push(Arc::new(delta));
        self.bytes = self.bytes.saturating_add(bytes);
        self.base = base;
        self.looked_at = None;
        Ok(())
    }
}

/// What a delta rests on, and its bytes.
fn link(
    listing: &Listing,
    delta: &Metadata,
    target: CheckpointWindow,
) -> Result<(CheckpointWindow, u64), InstallError> {
    let not_decreasing = |source| {
        let source = ChainError::NotDecreasing { link: delta.window, source };
        InstallError::Chain { window: target, source }
    };
    Ok((delta.base().map_err(not_decreasing)?, tree_bytes(listing, delta)?))
}

/// The full tree of a checkpoint and its bytes, if all of it is listed. Whether it has a READY marker does not matter for a
/// base.
async fn complete_full(
    store: &CheckpointStore,
    listing: &Listing,
    window: CheckpointWindow,
) -> Result<(Metadata, u64), FullDefect> {
    let full = listed_metadata(store, listing, window, Tree::Full).await.map_err(FullDefect::Store)?;
    let full = full.map_err(FullDefect::Metadata)?;
    let bytes = tree_bytes(listing, &full).map_err(FullDefect::Files)?;
    Ok((full, bytes))
}

async fn listed_metadata(
    store: &CheckpointStore,
    listing: &Listing,
    window: CheckpointWindow,
    tree: Tree,
) -> Result<Result<Metadata, MetadataError>, InstallError> {
    if listing.size_as_read(&object_key(window, tree, METADATA_FILE)).is_none() {
        return Ok(Err(MetadataError::NotPublished));
    }
    store.metadata(window, tree).await.map_err(|source| InstallError::fetch(window, source))
}

/// Bytes of all files of a tree; an error if one of them was not listed.
fn tree_bytes(listing: &Listing, metadata: &Metadata) -> Result<u64, InstallError> {
    let (window, tree) = (metadata.window, metadata.tree);
    let manifest = metadata.files().map_err(|source| InstallError::Files { window, source })?;
    manifest.required().try_fold(0_u64, |sum, (name, _)| {
        let missing = || FolderDefect { path: name.to_owned(), defect: FileDefect::Missing };
        let bytes = listing.size_as_read(&object_key(window, tree, name));
        let bytes = bytes.ok_or_else(|| InstallError::File { window, tree, source: missing() })?;
        Ok(sum.saturating_add(bytes))
    })
}
