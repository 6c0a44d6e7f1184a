//! `checkpoint show`: what was published as one checkpoint, and how it can be had.

use std::collections::BTreeSet;

use grail_checkpoint::layout::{SIGNATURE_FILE, object_key};
use grail_checkpoint::{Listing, Metadata, MiningPolicy, Published, Tree};
use grail_process::with_causes;
use grail_protocol::ids::CheckpointWindow;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::cached::{CachedRow, cached_rows, origin};
use super::catalogue::{StoredCheckpoint, catalogue};
use super::routes::{RouteReport, RoutesReport, routes};
use super::table::{age, columns, count, or_dash, size};
use super::trees::{TreeReport, reports};
use super::{CheckpointCommandError, Report, SCHEMA, Site};
use crate::commands::CommandError;
use crate::commands::control::Form;
use crate::terminal::printable;

/// Keys of a document that get a line of their own; nothing here interprets them.
const SHOWN_KEYS: [&str; 6] =
    ["model_name", "parent_window", "prev_window", "anchor_window", "created_at", "git_commit"];

/// All that is known of one checkpoint.
///
/// # Errors
/// [`CheckpointCommandError::NotInStore`], or why store or cache did not answer.
pub async fn show(site: &Site, checkpoint: CheckpointWindow, form: Form) -> Result<String, CommandError> {
    let listing = site.store.list().await.map_err(CheckpointCommandError::from)?;
    let Some(stored) = catalogue(&listing).remove(&checkpoint) else {
        return Err(CheckpointCommandError::NotInStore { checkpoint, store: site.store.to_string() }.into());
    };
    let published = site.store.published(checkpoint).await.map_err(CheckpointCommandError::from)?;
    let (policy, policy_defect) = match published.policy() {
        Ok(policy) => (Some(described(policy)), None),
        Err(error) => (None, Some(with_causes(&error))),
    };
    let report = ShowReport {
        schema: SCHEMA,
        checkpoint,
        store: site.store.to_string(),
        policy,
        policy_defect,
        trees: shown_trees(&stored, &published, &listing),
        ready: stored.ready,
        routes: routes(site, &published).await?,
        cached: cached_rows(site).await?.into_iter().find(|row| row.window == checkpoint),
    };
    report.print(form)
}

#[derive(Debug, Serialize)]
struct ShowReport {
    schema: u32,
    checkpoint: CheckpointWindow,
    store: String,
    /// Windows of its READY markers.
    ready: BTreeSet<u64>,
    /// How windows are mined with it.
    policy: Option<Value>,
    /// Why no window is.
    policy_defect: Option<String>,
    trees: Vec<ShownTree>,
    routes: RoutesReport,
    cached: Option<CachedRow>,
}

#[derive(Debug, Serialize)]
struct ShownTree {
    summary: TreeReport,
    /// Whether the trainer's signature is there. The trainer's key is not known here, so it is not checked; validators do not
    /// check it either.
    signed: bool,
    /// The whole document as published; none if it is not readable.
    document: Option<Map<String, Value>>,
    /// What the manifest names.
    files: Vec<ShownFile>,
}

#[derive(Debug, Serialize)]
struct ShownFile {
    path: String,
    /// As stored; none if the store does not hold it.
    bytes: Option<u64>,
    sha256: String,
}

fn described(policy: &MiningPolicy) -> Value {
    json!({
        "env_id": policy.env_id,
        "env_params": policy.env_params.document,
        "thinking_mode": policy.thinking_mode,
        "generation": policy.generation,
        "max_new_tokens": policy.generation.max_new(),
    })
}

fn shown_trees(stored: &StoredCheckpoint, published: &Published, listing: &Listing) -> Vec<ShownTree> {
    let reports = reports(stored, published, listing).into_iter();
    reports
        .map(|summary| {
            let (tree, metadata) = if summary.tree == Tree::Full.as_str() {
                (Tree::Full, published.full.as_ref())
            } else {
                (Tree::Delta, published.delta.as_ref())
            };
            let metadata = metadata.ok();
            ShownTree {
                signed: listing.size_as_read(&object_key(published.window, tree, SIGNATURE_FILE)).is_some(),
                document: metadata.map(|metadata| metadata.document().clone()),
                files: metadata.map(|metadata| shown_files(metadata, listing)).unwrap_or_default(),
                summary,
            }
        })
        .collect()
}

fn shown_files(metadata: &Metadata, listing: &Listing) -> Vec<ShownFile> {
    let Ok(manifest) = metadata.files() else { return Vec::new() };
    let files = manifest.required().map(|(path, sha256)| ShownFile {
        path: path.to_owned(),
        bytes: listing.size_as_read(&object_key(metadata.window, metadata.tree, path)),
        sha256: sha256.to_string(),
    });
    files.collect()
}

impl Report for ShowReport {
    fn render(&self) -> String {
        let ready: Vec<String> = self.ready.iter().map(ToString::to_string).collect();
        let ready = if ready.is_empty() {
            "never: no window is mined with it, but deltas may be based on it".to_owned()
        } else {
            format!("in window {}", ready.join(", "))
        };
        let mut lines = vec![
            format!("checkpoint {} in {}", self.checkpoint, self.store),
            fact("ready", &ready),
            fact("policy", &self.policy_line()),
            fact("cache", &self.cached.as_ref().map_or_else(|| "not there".to_owned(), cached_line)),
        ];
        if self.trees.is_empty() {
            lines.push("nothing but its marker is there".to_owned());
        }
        for tree in &self.trees {
            lines.push(String::new());
            lines.extend(tree.lines());
        }
        lines.push(String::new());
        lines.extend(self.route_lines());
        lines.iter().map(|line| printable(line) + "\n").collect()
    }
}

impl ShowReport {
    fn policy_line(&self) -> String {
        let Some(policy) = &self.policy else {
            return self.policy_defect.clone().unwrap_or_else(|| "none".to_owned());
        };
        let text = |key: &str| policy[key].as_str().unwrap_or_default().to_owned();
        format!(
            "{} {}, {}, at most {} tokens, {}",
            text("env_id"),
            policy["env_params"],
            text("thinking_mode"),
            policy["max_new_tokens"],
            policy["generation"]
        )
    }

    fn route_lines(&self) -> Vec<String> {
        let mut lines = columns(RouteReport::HEADER, self.routes.open.iter().map(RouteReport::cells).collect());
        if lines.is_empty() {
            lines.push("no route leads to it".to_owned());
        }
        lines.extend(self.routes.closed.iter().map(|reason| format!("closed: {reason}")));
        lines
    }
}

impl ShownTree {
    fn lines(&self) -> Vec<String> {
        let summary = &self.summary;
        let verdict = match &summary.reason {
            None => summary.verdict.to_owned(),
            Some(reason) => format!("{}: {reason}", summary.verdict),
        };
        let mut lines = vec![
            format!("{}, {}, {}", summary.tree, count(summary.objects, "object"), size(summary.bytes)),
            fact("verdict", &verdict),
            fact("weights", &or_dash(summary.weights_hash.clone())),
            fact("signature", if self.signed { "there, not checked" } else { "missing" }),
        ];
        let document = self.document.iter().flat_map(|document| SHOWN_KEYS.map(|key| (key, document.get(key))));
        lines.extend(document.filter_map(|(key, value)| Some(fact(key, &plain(value?)))));
        let rows = self.files.iter().map(|file| {
            let bytes = file.bytes.map_or_else(|| "missing".to_owned(), size);
            [bytes, file.path.clone(), file.sha256.clone()]
        });
        lines.extend(columns(["SIZE", "FILE", "SHA256"], rows.collect()));
        lines
    }
}

fn cached_line(row: &CachedRow) -> String {
    if let Some(damage) = &row.damage {
        return format!("{}: {damage}", row.folder);
    }
    let made_from = row.made_from.as_ref().map_or_else(|| "unknown".to_owned(), origin);
    let in_use = if row.in_use == Some(true) { ", in use" } else { "" };
    let since = age(std::time::Duration::from_secs(row.age_seconds));
    format!("{}, {}, made from {made_from} {since} ago{in_use}", row.folder, size(row.bytes))
}

/// A JSON value without the quotes of a text.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn fact(name: &str, value: &str) -> String {
    format!("{name:<14}{value}")
}

#[cfg(test)]
mod tests {
    use grail_checkpoint::MadeFrom;

    use super::*;

    fn report() -> ShowReport {
        let document = json!({
            "window": 3_060, "prev_window": 3_030, "anchor_window": null, "model_name": "a\u{1b}model", "created_at": 1.5,
        });
        ShowReport {
            schema: SCHEMA,
            checkpoint: CheckpointWindow(3_060),
            store: "LocalFileSystem(/state/store)".to_owned(),
            ready: [3_060, 3_090].into(),
            policy: Some(json!({
                "env_id": "gsm8k",
                "env_params": { "split": "train" },
                "thinking_mode": "instructed",
                "generation": { "temperature": 0.7, "top_k": 50 },
                "max_new_tokens": 2_048,
            })),
            policy_defect: None,
            trees: vec![ShownTree {
                summary: TreeReport {
                    tree: "DELTA",
                    objects: 5,
                    bytes: 9_500,
                    verdict: "mine",
                    reason: None,
                    weights_hash: Some("267fd19c54d4820e10234c958c503376".to_owned()),
                    base: Some(CheckpointWindow(3_030)),
                    missing: vec!["delta_metadata.json".to_owned()],
                },
                signed: true,
                document: document.as_object().cloned(),
                files: vec![
                    ShownFile { path: "delta_sparse.bin.zst".to_owned(), bytes: Some(8_000), sha256: "ab".repeat(32) },
                    ShownFile { path: "delta_metadata.json".to_owned(), bytes: None, sha256: "cd".repeat(32) },
                ],
            }],
            routes: RoutesReport {
                open: vec![RouteReport {
                    bytes: 8_000,
                    from: "cached",
                    base: CheckpointWindow(3_000),
                    deltas: vec![CheckpointWindow(3_030), CheckpointWindow(3_060)],
                }],
                closed: vec!["the FULL of checkpoint 3030 is incomplete".to_owned()],
            },
            cached: Some(CachedRow {
                window: CheckpointWindow(3_060),
                folder: "/state/checkpoints/checkpoint-3060".to_owned(),
                bytes: 290_056,
                age_seconds: 59,
                weights_hash: None,
                made_from: Some(MadeFrom::Full),
                in_use: Some(true),
                damage: None,
            }),
        }
    }

    #[test]
    fn the_text() {
        insta::assert_snapshot!("show", report().render());
    }

    #[test]
    fn a_checkpoint_of_which_only_the_marker_is_there() {
        let bare = ShowReport {
            ready: BTreeSet::new(),
            policy: None,
            policy_defect: Some("checkpoint 3060 has no readable metadata".to_owned()),
            trees: Vec::new(),
            routes: RoutesReport { open: Vec::new(), closed: Vec::new() },
            cached: None,
            ..report()
        };
        insta::assert_snapshot!("show_bare", bare.render());
    }

    #[test]
    fn the_document() {
        insta::assert_json_snapshot!("show_document", report());
    }
}
