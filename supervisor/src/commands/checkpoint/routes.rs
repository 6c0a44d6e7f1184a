//! The ways to a checkpoint, as the cache would try them.

use grail_checkpoint::{Published, RouteBase, Wanted};
use grail_process::with_causes;
use grail_protocol::ids::CheckpointWindow;
use serde::Serialize;

use super::table::size;
use super::{CheckpointCommandError, Site};

/// One way to a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct RouteReport {
    /// Bytes to fetch, as stored.
    pub bytes: u64,
    /// `cached` or `full`.
    pub from: &'static str,
    /// The checkpoint that is taken from there.
    pub base: CheckpointWindow,
    /// Deltas on top of it, oldest first.
    pub deltas: Vec<CheckpointWindow>,
}

/// All ways, the likeliest first, and what closes the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct RoutesReport {
    pub open: Vec<RouteReport>,
    pub closed: Vec<String>,
}

/// The ways by which `published` could be installed now.
pub(super) async fn routes(site: &Site, published: &Published) -> Result<RoutesReport, CheckpointCommandError> {
    let checkpoint = published.window;
    let routes = site.cache.routes(&site.store, published, &Wanted::default()).await;
    let routes = routes.map_err(|source| CheckpointCommandError::Install { checkpoint, source: Box::new(source) })?;
    let open = routes.open.into_iter().map(|route| {
        let (from, base) = match route.base {
            RouteBase::Cached(window) => ("cached", window),
            RouteBase::Full(window) => ("full", window),
        };
        RouteReport { bytes: route.bytes, from, base, deltas: route.deltas }
    });
    let closed = routes.closed.iter().map(|error| with_causes(error)).collect();
    Ok(RoutesReport { open: open.collect(), closed })
}

impl RouteReport {
    /// The row under [`Self::HEADER`].
    pub(super) fn cells(&self) -> [String; 2] {
        let base = match self.from {
            "cached" => format!("checkpoint {} of the cache", self.base),
            _ => format!("FULL of {}", self.base),
        };
        let deltas: Vec<String> = self.deltas.iter().map(ToString::to_string).collect();
        let deltas = if deltas.is_empty() { String::new() } else { format!(", then DELTA {}", deltas.join(", ")) };
        [size(self.bytes), base + &deltas]
    }

    pub(super) const HEADER: [&str; 2] = ["TO FETCH", "ROUTE"];
}
