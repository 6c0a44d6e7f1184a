//! `checkpoint prune`: makes room in the cache.

use std::collections::BTreeSet;

use grail_checkpoint::CachedSummary;
use grail_checkpoint::retention::{Cached, RetentionLimits, removable};
use grail_protocol::ids::CheckpointWindow;
use serde::Serialize;

use super::table::{count, size};
use super::{Report, SCHEMA, Site};
use crate::commands::CommandError;
use crate::commands::control::Form;

/// Whether anything is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PruneMode {
    Remove,
    DryRun,
}

/// Removes what `limits` do not allow and nobody uses.
///
/// # Errors
/// [`CommandError`] if the cache cannot be used, or if a supervisor runs and does not say what it uses: then nothing is removed.
pub async fn prune(site: &Site, limits: &RetentionLimits, mode: PruneMode, form: Form) -> Result<String, CommandError> {
    let in_use = site.in_use().await?.unwrap_or_default();
    let cache = site.cache.clone();
    let before = tokio::task::spawn_blocking(move || cache.list()).await.map_err(CommandError::Task)??;
    let removed: BTreeSet<CheckpointWindow> = match mode {
        PruneMode::DryRun => plan(&before, &in_use, limits),
        PruneMode::Remove => site.cache.prune(&in_use, limits).await?.iter().map(|pruned| pruned.window).collect(),
    };
    let (removed, kept): (Vec<_>, Vec<_>) = before.iter().partition(|summary| removed.contains(&summary.window));
    let report = PruneReport {
        schema: SCHEMA,
        place: site.cache.root().display().to_string(),
        dry_run: mode == PruneMode::DryRun,
        removed: removed.into_iter().map(PrunedRow::of).collect(),
        kept: kept.into_iter().map(PrunedRow::of).collect(),
        in_use: used(&before, &in_use),
    };
    report.print(form)
}

/// What a removal would remove now.
fn plan(
    cached: &[CachedSummary],
    in_use: &BTreeSet<CheckpointWindow>,
    limits: &RetentionLimits,
) -> BTreeSet<CheckpointWindow> {
    let folders: Vec<Cached> = cached
        .iter()
        .map(|summary| Cached { window: summary.window, bytes: summary.bytes, age: summary.age })
        .collect();
    removable(&folders, &used(cached, in_use), limits).into_iter().collect()
}

/// What a supervisor has said that it uses, and what a process holds.
fn used(cached: &[CachedSummary], in_use: &BTreeSet<CheckpointWindow>) -> BTreeSet<CheckpointWindow> {
    let held = cached.iter().filter(|summary| summary.held).map(|summary| summary.window);
    held.chain(in_use.iter().copied()).collect()
}

#[derive(Debug, Serialize)]
struct PruneReport {
    schema: u32,
    place: String,
    dry_run: bool,
    removed: Vec<PrunedRow>,
    kept: Vec<PrunedRow>,
    /// Checkpoints that stay whatever the limits say.
    in_use: BTreeSet<CheckpointWindow>,
}

#[derive(Debug, Serialize)]
struct PrunedRow {
    window: CheckpointWindow,
    bytes: u64,
}

impl PrunedRow {
    const fn of(summary: &CachedSummary) -> Self {
        Self { window: summary.window, bytes: summary.bytes }
    }
}

impl Report for PruneReport {
    fn render(&self) -> String {
        let verb = if self.dry_run { "would remove" } else { "removed" };
        let rows = self.removed.iter().map(|row| format!("{verb} checkpoint {}, {}", row.window, size(row.bytes)));
        let bytes = |rows: &[PrunedRow]| size(rows.iter().map(|row| row.bytes).sum());
        let last = format!(
            "cache {}: {verb} {}, {}; {} left, {}",
            self.place,
            count(self.removed.len(), "checkpoint"),
            bytes(&self.removed),
            count(self.kept.len(), "checkpoint"),
            bytes(&self.kept)
        );
        let in_use: Vec<String> = self.in_use.iter().map(ToString::to_string).collect();
        let in_use = (!in_use.is_empty()).then(|| format!("in use: {}", in_use.join(", ")));
        rows.chain(in_use).chain([last]).map(|line| line + "\n").collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report() {
        let row = |window, bytes| PrunedRow { window: CheckpointWindow(window), bytes };
        let report = PruneReport {
            schema: SCHEMA,
            place: "/state/checkpoints".to_owned(),
            dry_run: true,
            removed: vec![row(3_000, 290_000), row(3_030, 300_000)],
            kept: vec![row(3_060, 300_000)],
            in_use: BTreeSet::from([CheckpointWindow(3_060)]),
        };
        insta::assert_snapshot!("prune_dry_run", report.render());
        insta::assert_snapshot!("prune_removed", PruneReport { dry_run: false, ..report }.render());
    }
}
