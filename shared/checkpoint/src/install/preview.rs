//! The ways to a checkpoint, for people: what an installation would try now.

use std::collections::BTreeSet;

use grail_protocol::ids::CheckpointWindow;

use super::{ChainError, InstallError, Wanted};
use crate::cache::CheckpointCache;
use crate::metadata::Published;
use crate::routes::{Base, Route, Routes};
use crate::store::CheckpointStore;

/// What deltas are applied to, or the checkpoint itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteBase {
    /// A folder of the cache.
    Cached(CheckpointWindow),
    /// The full tree of a checkpoint in the store.
    Full(CheckpointWindow),
}

/// One way to a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteSummary {
    pub base: RouteBase,
    /// Oldest first; none if the base is the checkpoint itself.
    pub deltas: Vec<CheckpointWindow>,
    /// Bytes to fetch, as stored.
    pub bytes: u64,
}

/// All ways to a checkpoint.
#[derive(Debug)]
pub struct KnownRoutes {
    /// In the order in which they are tried.
    pub open: Vec<RouteSummary>,
    /// Why others do not exist.
    pub closed: Vec<InstallError>,
}

impl CheckpointCache {
    /// The ways that [`Self::install`] would try now if the checkpoint is not in the cache itself. Nothing is fetched but
    /// metadata, so that a way may still turn out to be damaged.
    ///
    /// # Errors
    /// [`InstallError`] if store or cache does not answer.
    pub async fn routes(
        &self,
        store: &CheckpointStore,
        published: &Published,
        wanted: &Wanted,
    ) -> Result<KnownRoutes, InstallError> {
        let window = published.window;
        let listing = store.list().await.map_err(|source| InstallError::List { window, source })?;
        let mut routes = Routes::new(store, &listing, published, self.windows()?, wanted.prefer_base);
        let mut open = Vec::new();
        while let Some(route) = routes.next().await {
            open.push(summary(&route));
        }
        let mut closed = match routes.into_error() {
            InstallError::NoRoute { failures, .. } => failures,
            only => vec![only],
        };
        // A chain may well end where a way begins.
        let bases: BTreeSet<CheckpointWindow> = open.iter().map(RouteSummary::base_window).collect();
        closed.retain(|error| !ends_at(error, &bases));
        Ok(KnownRoutes { open, closed })
    }
}

impl RouteSummary {
    /// The checkpoint at which the way begins.
    #[must_use]
    pub const fn base_window(&self) -> CheckpointWindow {
        match self.base {
            RouteBase::Cached(window) | RouteBase::Full(window) => window,
        }
    }
}

fn summary(route: &Route) -> RouteSummary {
    let base = match &route.base {
        Base::Cached(window) => RouteBase::Cached(*window),
        Base::Full(metadata) => RouteBase::Full(metadata.window),
    };
    RouteSummary { base, deltas: route.deltas.iter().map(|delta| delta.window).collect(), bytes: route.bytes }
}

fn ends_at(error: &InstallError, bases: &BTreeSet<CheckpointWindow>) -> bool {
    let InstallError::Chain { source: ChainError::Hole { missing, .. }, .. } = error else { return false };
    bases.contains(missing)
}
