//! `checkpoint list`: everything that is there, store and cache.

use std::collections::BTreeSet;

use futures::{StreamExt, TryStreamExt, stream};
use grail_checkpoint::{CheckpointStore, Listing, Tree};
use grail_protocol::ids::{CheckpointWindow, WindowStart};
use serde::Serialize;

use super::cached::{CachedRow, cached_rows};
use super::catalogue::{StoredCheckpoint, catalogue};
use super::table::{columns, count, or_dash, shortened, size};
use super::trees::{TreeReport, reports};
use super::{CheckpointCommandError, Report, SCHEMA, Site};
use crate::commands::CommandError;
use crate::commands::control::Form;
use crate::terminal::printable;

/// What is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    All,
    CacheOnly,
    StoreOnly,
}

/// The checkpoints of `site`; the rule is applied to `window`, or to the chain's next one.
///
/// # Errors
/// [`CommandError`] if store or cache does not answer.
pub async fn list(
    site: &Site,
    window: Option<WindowStart>,
    extent: Extent,
    form: Form,
) -> Result<String, CommandError> {
    let store = match extent {
        Extent::CacheOnly => None,
        Extent::All | Extent::StoreOnly => {
            let window = match window {
                Some(window) => Some(window),
                None => site.next_window().await?,
            };
            Some(stored(&site.store, window).await?)
        }
    };
    let cache = match extent {
        Extent::StoreOnly => None,
        Extent::All | Extent::CacheOnly => Some(cached(site).await?),
    };
    ListReport { schema: SCHEMA, store, cache }.print(form)
}

#[derive(Debug, Serialize)]
struct ListReport {
    schema: u32,
    store: Option<StoreReport>,
    cache: Option<CacheReport>,
}

#[derive(Debug, Serialize)]
struct StoreReport {
    place: String,
    /// Unknown where no window was named and no chain says which one is next.
    rule: Option<RuleReport>,
    checkpoints: Vec<StoredRow>,
}

/// The answer of the rule for a window.
#[derive(Debug, Serialize)]
struct RuleReport {
    window: WindowStart,
    checkpoint: Option<CheckpointWindow>,
    /// Window in which that checkpoint became READY.
    ready: Option<u64>,
}

#[derive(Debug, Serialize)]
struct StoredRow {
    window: CheckpointWindow,
    ready: BTreeSet<u64>,
    bytes: u64,
    trees: Vec<TreeReport>,
}

#[derive(Debug, Serialize)]
struct CacheReport {
    place: String,
    bytes: u64,
    checkpoints: Vec<CachedRow>,
}

async fn cached(site: &Site) -> Result<CacheReport, CommandError> {
    let checkpoints = cached_rows(site).await?;
    let bytes = checkpoints.iter().fold(0_u64, |sum, row| sum.saturating_add(row.bytes));
    Ok(CacheReport { place: site.cache.root().display().to_string(), bytes, checkpoints })
}

async fn stored(store: &CheckpointStore, window: Option<WindowStart>) -> Result<StoreReport, CheckpointCommandError> {
    let listing = store.list().await?;
    let rule = window.map(|window| {
        let choice = listing.resolve(window);
        RuleReport {
            window,
            checkpoint: choice.map(|choice| choice.checkpoint),
            ready: choice.map(|choice| choice.ready),
        }
    });
    let rows = catalogue(&listing).into_iter().map(|(window, stored)| stored_row(store, window, stored, &listing));
    let checkpoints = stream::iter(rows).buffered(store.limits().parallel).try_collect().await?;
    Ok(StoreReport { place: store.to_string(), rule, checkpoints })
}

async fn stored_row(
    store: &CheckpointStore,
    window: CheckpointWindow,
    stored: StoredCheckpoint,
    listing: &Listing,
) -> Result<StoredRow, CheckpointCommandError> {
    // Markers alone name no document that could be read.
    let trees =
        if stored.trees.is_empty() { Vec::new() } else { reports(&stored, &store.published(window).await?, listing) };
    let bytes = stored.trees.values().fold(0_u64, |sum, tree| sum.saturating_add(tree.bytes));
    Ok(StoredRow { window, ready: stored.ready, bytes, trees })
}

impl Report for ListReport {
    fn render(&self) -> String {
        let store = self.store.iter().flat_map(StoreReport::lines);
        let gap = (self.store.is_some() && self.cache.is_some()).then(String::new);
        let cache = self.cache.iter().flat_map(CacheReport::lines);
        store.chain(gap).chain(cache).map(|line| line + "\n").collect()
    }
}

impl StoreReport {
    fn lines(&self) -> Vec<String> {
        let mut lines =
            vec![format!("store {}: {}", printable(&self.place), count(self.checkpoints.len(), "checkpoint"))];
        let header = ["WINDOW", "READY", "FULL", "DELTA", "BASE", "WEIGHTS", "NOTE"];
        lines.extend(columns(header, self.checkpoints.iter().map(StoredRow::cells).collect()));
        lines.push(match &self.rule {
            None => "which window is next is not known; name one with --window".to_owned(),
            Some(rule) => rule.sentence(),
        });
        lines
    }
}

impl RuleReport {
    fn sentence(&self) -> String {
        let window = self.window;
        match (self.checkpoint, self.ready) {
            (Some(checkpoint), Some(ready)) => {
                format!("window {window} is mined with checkpoint {checkpoint}, READY since window {ready}")
            }
            _ => format!("window {window} has no checkpoint: none was READY before it"),
        }
    }
}

impl StoredRow {
    fn cells(&self) -> [String; 7] {
        let tree = |name: Tree| self.trees.iter().find(|tree| tree.tree == name.as_str());
        let (full, delta) = (tree(Tree::Full), tree(Tree::Delta));
        let ready: Vec<String> = self.ready.iter().map(ToString::to_string).collect();
        let hash = delta.or(full).and_then(|tree| tree.weights_hash.as_deref()).map(shortened);
        [
            self.window.to_string(),
            or_dash((!ready.is_empty()).then(|| ready.join(", "))),
            or_dash(full.map(|tree| size(tree.bytes))),
            or_dash(delta.map(|tree| size(tree.bytes))),
            or_dash(delta.and_then(|tree| tree.base).map(|base| base.to_string())),
            or_dash(hash),
            self.note(),
        ]
    }

    fn note(&self) -> String {
        let unnamed = self.ready.is_empty().then(|| "no READY marker".to_owned());
        let empty = self.trees.is_empty().then(|| "nothing but its marker is there".to_owned());
        let trees = self.trees.iter().filter_map(|tree| {
            let reason = tree.reason.as_ref().map(|reason| format!("{}: {}: {reason}", tree.tree, tree.verdict));
            let holes = (!tree.missing.is_empty()).then(|| {
                let files = count(tree.missing.len(), "file");
                format!("{} lacks {files}, the first {}", tree.tree, tree.missing[0])
            });
            reason.or(holes)
        });
        unnamed.into_iter().chain(empty).chain(trees).collect::<Vec<_>>().join("; ")
    }
}

impl CacheReport {
    fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "cache {}: {}, {}",
            printable(&self.place),
            count(self.checkpoints.len(), "checkpoint"),
            size(self.bytes)
        )];
        lines.extend(columns(CachedRow::HEADER, self.checkpoints.iter().map(CachedRow::cells).collect()));
        lines
    }
}

#[cfg(test)]
mod tests {
    use grail_checkpoint::MadeFrom;
    use grail_protocol::ids::{BlockNumber, WeightsHash};

    use super::*;

    fn tree(tree: Tree, base: Option<u64>) -> TreeReport {
        TreeReport {
            tree: tree.as_str(),
            objects: 5,
            bytes: 290_056,
            verdict: "mine",
            reason: None,
            weights_hash: Some("267fd19c54d4820e10234c958c503376".to_owned()),
            base: base.map(CheckpointWindow),
            missing: Vec::new(),
        }
    }

    fn stored(window: u64, ready: &[u64], trees: Vec<TreeReport>) -> StoredRow {
        let bytes = trees.iter().map(|tree| tree.bytes).sum();
        StoredRow { window: CheckpointWindow(window), ready: ready.iter().copied().collect(), bytes, trees }
    }

    fn cached(window: u64, in_use: Option<bool>) -> CachedRow {
        CachedRow {
            window: CheckpointWindow(window),
            folder: format!("/state/checkpoints/checkpoint-{window}"),
            bytes: 16_400_000_000,
            age_seconds: 3_700,
            weights_hash: Some(WeightsHash(u128::MAX / 3)),
            made_from: Some(MadeFrom::Full),
            in_use,
            damage: None,
        }
    }

    fn report() -> ListReport {
        let incomplete = TreeReport { missing: vec!["model.safetensors".to_owned()], ..tree(Tree::Full, None) };
        let reason = Some("the document is no JSON: \u{1b}[31m".to_owned());
        let unreadable = TreeReport { verdict: "absent", reason, weights_hash: None, ..tree(Tree::Delta, None) };
        let deltas = vec![CheckpointWindow(3_030), CheckpointWindow(3_060)];
        let from_deltas = MadeFrom::Deltas { base: CheckpointWindow(3_000), deltas };
        ListReport {
            schema: SCHEMA,
            store: Some(StoreReport {
                place: "LocalFileSystem(/state/store)".to_owned(),
                rule: Some(RuleReport {
                    window: WindowStart::containing(BlockNumber(3_120)),
                    checkpoint: Some(CheckpointWindow(3_060)),
                    ready: Some(3_090),
                }),
                checkpoints: vec![
                    stored(3_000, &[3_000], vec![tree(Tree::Full, None)]),
                    stored(3_060, &[3_060, 3_090], vec![incomplete, tree(Tree::Delta, Some(3_030))]),
                    stored(3_090, &[], vec![unreadable]),
                    stored(3_120, &[3_120], Vec::new()),
                ],
            }),
            cache: Some(CacheReport {
                place: "/state/checkpoints".to_owned(),
                bytes: 49_200_000_000,
                checkpoints: vec![
                    cached(3_000, Some(false)),
                    CachedRow { made_from: Some(from_deltas), ..cached(3_060, Some(true)) },
                    CachedRow {
                        weights_hash: None,
                        made_from: None,
                        damage: Some("its metadata.json could not be read".to_owned()),
                        ..cached(3_090, None)
                    },
                ],
            }),
        }
    }

    #[test]
    fn the_tables() {
        insta::assert_snapshot!("list", report().render());
    }

    #[test]
    fn the_document() {
        insta::assert_json_snapshot!("list_document", report());
    }

    #[test]
    fn without_an_answer_the_rule_says_why() {
        let window = WindowStart::containing(BlockNumber(2_970));
        let none = RuleReport { window, checkpoint: None, ready: None };
        assert_eq!(none.sentence(), "window 2970 has no checkpoint: none was READY before it");
        let store = report().store.map(|store| StoreReport { rule: None, checkpoints: Vec::new(), ..store });
        let text = ListReport { store, cache: None, ..report() }.render();
        insta::assert_snapshot!("list_of_an_empty_store", text);
    }
}
