//! What the cache holds, as it says itself: nothing is read again, `checkpoint verify` does that.

use std::collections::BTreeSet;
use std::time::Duration;

use grail_checkpoint::{CachedSummary, MadeFrom};
use grail_process::with_causes;
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use serde::Serialize;

use super::Site;
use super::table::{age, count, or_dash, shortened, size};
use crate::commands::CommandError;
use crate::terminal::note;

/// A checkpoint of the cache.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct CachedRow {
    pub window: CheckpointWindow,
    pub folder: String,
    pub bytes: u64,
    /// Time since it was installed.
    pub age_seconds: u64,
    /// As recorded in the folder.
    pub weights_hash: Option<WeightsHash>,
    pub made_from: Option<MadeFrom>,
    /// Unknown where a supervisor runs that does not say what it uses.
    pub in_use: Option<bool>,
    /// What is wrong with the folder at the first look.
    pub damage: Option<String>,
}

/// All checkpoints of the cache.
pub(super) async fn cached_rows(site: &Site) -> Result<Vec<CachedRow>, CommandError> {
    let in_use = match site.in_use().await {
        Ok(in_use) => Some(in_use.unwrap_or_default()),
        Err(error) => {
            note(format_args!("grail-supervisor: warning: what is in use is not known: {}", with_causes(&error)));
            None
        }
    };
    let cache = site.cache.clone();
    let summaries = tokio::task::spawn_blocking(move || cache.list()).await.map_err(CommandError::Task)??;
    Ok(summaries.into_iter().map(|summary| CachedRow::new(summary, in_use.as_ref())).collect())
}

impl CachedRow {
    fn new(summary: CachedSummary, in_use: Option<&BTreeSet<CheckpointWindow>>) -> Self {
        let CachedSummary { window, folder, bytes, age, held, contents } = summary;
        let (contents, damage) = match contents {
            Ok(contents) => (Some(contents), None),
            Err(damage) => (None, Some(with_causes(&damage))),
        };
        let said = in_use.map(|in_use| in_use.contains(&window));
        Self {
            window,
            folder: folder.display().to_string(),
            bytes,
            age_seconds: age.as_secs(),
            weights_hash: contents.as_ref().and_then(|contents| contents.weights_hash),
            made_from: contents.map(|contents| contents.made_from),
            in_use: if held { Some(true) } else { said },
            damage,
        }
    }

    /// The row under [`Self::HEADER`].
    pub(super) fn cells(&self) -> [String; 7] {
        let in_use = match self.in_use {
            None => "unknown",
            Some(true) => "yes",
            Some(false) => "no",
        };
        [
            self.window.to_string(),
            size(self.bytes),
            age(Duration::from_secs(self.age_seconds)),
            or_dash(self.weights_hash.map(|hash| shortened(&hash.to_string()))),
            or_dash(self.made_from.as_ref().map(origin)),
            in_use.to_owned(),
            self.damage.clone().unwrap_or_default(),
        ]
    }

    pub(super) const HEADER: [&str; 7] = ["WINDOW", "SIZE", "AGE", "WEIGHTS", "MADE FROM", "IN USE", "DAMAGE"];
}

/// Where weights came from, in a few words.
pub(super) fn origin(made_from: &MadeFrom) -> String {
    match made_from {
        MadeFrom::Full => "FULL".to_owned(),
        MadeFrom::Deltas { base, deltas } => format!("{base} and {}", count(deltas.len(), "delta")),
    }
}
