//! `checkpoint verify`: cached folders, read whole and held against everything that is known of them.

use std::collections::{BTreeMap, BTreeSet};

use grail_checkpoint::cache::{Damage, Entry};
use grail_checkpoint::weights::Fingerprint;
use grail_checkpoint::{CheckpointCache, Installed, WeightsError, WeightsFiles};
use grail_process::with_causes;
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use serde::Serialize;

use super::table::count;
use super::{CheckpointCommandError, Report, SCHEMA, Site};
use crate::commands::CommandError;
use crate::commands::control::Form;
use crate::terminal::printable;

/// What `checkpoint verify` found.
#[derive(Debug)]
pub struct Checked {
    /// To be printed.
    pub text: String,
    /// Whether everything that was looked at is intact.
    pub intact: bool,
}

/// Verifies `checkpoint`, or all that are cached, one after the other.
///
/// # Errors
/// [`CheckpointCommandError::NotCached`], or why the cache cannot be used. Damage is no error but an answer.
pub async fn verify(site: &Site, checkpoint: Option<CheckpointWindow>, form: Form) -> Result<Checked, CommandError> {
    let windows = match checkpoint {
        Some(checkpoint) => [checkpoint].into(),
        None => site.cache.windows()?,
    };
    let mut checkpoints = Vec::new();
    for window in windows {
        let cache = site.cache.clone();
        let row = tokio::task::spawn_blocking(move || check(&cache, window)).await.map_err(CommandError::Task)?;
        // One that is removed in the meantime is not there to be damaged.
        checkpoints.extend(row);
    }
    if let (Some(checkpoint), true) = (checkpoint, checkpoints.is_empty()) {
        let cache = site.cache.root().to_owned();
        return Err(CheckpointCommandError::NotCached { checkpoint, cache }.into());
    }
    let intact = checkpoints.iter().all(|row| row.difference.is_none());
    let place = site.cache.root().display().to_string();
    let text = VerifyReport { schema: SCHEMA, place, intact, checkpoints }.print(form)?;
    Ok(Checked { text, intact })
}

#[derive(Debug, Serialize)]
struct VerifyReport {
    schema: u32,
    place: String,
    intact: bool,
    checkpoints: Vec<VerifiedRow>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct VerifiedRow {
    window: CheckpointWindow,
    weights_hash: Option<WeightsHash>,
    tensors: Option<usize>,
    /// The file that is damaged, where it is one.
    file: Option<String>,
    /// How the folder differs from what it should be; none if it is intact.
    difference: Option<String>,
}

/// `None` if there is no such checkpoint.
fn check(cache: &CheckpointCache, window: CheckpointWindow) -> Option<VerifiedRow> {
    let damaged = |file: Option<String>, difference: String| VerifiedRow {
        window,
        weights_hash: None,
        tensors: None,
        file,
        difference: Some(difference),
    };
    match cache.inspect(window) {
        Entry::Absent => None,
        Entry::Damaged(_) if !cache.folder(window).exists() => None,
        Entry::Damaged(Damage::Folder(defect)) => Some(damaged(Some(defect.path.clone()), with_causes(&defect.defect))),
        Entry::Damaged(damage) => Some(damaged(None, with_causes(&damage))),
        Entry::Installed(installed) => Some(match fingerprint(&installed) {
            Ok(found) => compare(&installed, &found),
            Err(error) => damaged(None, with_causes(&error)),
        }),
    }
}

fn fingerprint(installed: &Installed) -> Result<Fingerprint, WeightsError> {
    WeightsFiles::open(&installed.folder)?.fingerprint()
}

/// Files that are as their manifest says may still not be what their metadata says of the tensors in them.
fn compare(installed: &Installed, found: &Fingerprint) -> VerifiedRow {
    let stated = installed.weights_hash;
    let hash = (found.weights_hash != stated)
        .then(|| format!("its weights hash to {}, its metadata.json says {stated}", found.weights_hash));
    let difference = hash.or_else(|| first_other_tensor(&installed.checksums, &found.checksums));
    VerifiedRow {
        window: installed.window,
        weights_hash: Some(found.weights_hash),
        tensors: Some(found.checksums.len()),
        file: None,
        difference,
    }
}

fn first_other_tensor(stated: &BTreeMap<String, u64>, found: &BTreeMap<String, u64>) -> Option<String> {
    let names: BTreeSet<&String> = stated.keys().chain(found.keys()).collect();
    names.into_iter().find_map(|name| match (stated.get(name), found.get(name)) {
        (Some(stated), Some(found)) if stated == found => None,
        (Some(stated), Some(found)) => {
            Some(format!("tensor {name} has checksum {found:016x}, its metadata.json says {stated:016x}"))
        }
        (Some(_), None) => Some(format!("tensor {name} is missing")),
        (None, _) => Some(format!("tensor {name} has no checksum in its metadata.json")),
    })
}

impl Report for VerifyReport {
    fn render(&self) -> String {
        let damaged: Vec<&VerifiedRow> = self.checkpoints.iter().filter(|row| row.difference.is_some()).collect();
        let total = count(self.checkpoints.len(), "checkpoint");
        let last = match damaged.first() {
            None => format!("cache {}: {total}, all intact", self.place),
            Some(first) => format!(
                "cache {}: {total}, {} damaged; `grail-supervisor checkpoint fetch {}` replaces the first of them",
                self.place,
                damaged.len(),
                first.window
            ),
        };
        let rows = self.checkpoints.iter().map(VerifiedRow::line);
        rows.chain([last]).map(|line| printable(&line) + "\n").collect()
    }
}

impl VerifiedRow {
    fn line(&self) -> String {
        let window = self.window;
        match (&self.difference, &self.file, self.weights_hash) {
            (None, _, Some(weights)) => {
                format!("{window}  intact   weights {weights}, {}", count(self.tensors.unwrap_or(0), "tensor"))
            }
            (None, _, None) => format!("{window}  intact"),
            (Some(difference), Some(file), _) => format!("{window}  damaged  {file}: {difference}"),
            (Some(difference), None, _) => format!("{window}  damaged  {difference}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(window: u64, file: Option<&str>, difference: Option<&str>) -> VerifiedRow {
        VerifiedRow {
            window: CheckpointWindow(window),
            weights_hash: difference.is_none().then_some(WeightsHash(0xff)),
            tensors: difference.is_none().then_some(27),
            file: file.map(str::to_owned),
            difference: difference.map(str::to_owned),
        }
    }

    #[test]
    fn file_and_difference_are_named() {
        let checkpoints = vec![
            row(3_000, None, None),
            row(3_030, Some("model.safetensors"), Some("its 7 bytes have sha256 ab, the manifest says cd")),
            row(3_060, None, Some("tensor a is missing")),
        ];
        let report = VerifyReport { schema: SCHEMA, place: "/state/checkpoints".into(), intact: false, checkpoints };
        insta::assert_snapshot!("verify", report.render());
        let intact = VerifyReport { intact: true, checkpoints: vec![row(3_000, None, None)], ..report };
        insta::assert_snapshot!("verify_intact", intact.render());
    }

    #[test]
    fn every_way_in_which_tensors_differ_is_told() {
        let of = |tensors: &[(&str, u64)]| -> BTreeMap<String, u64> {
            tensors.iter().map(|(name, checksum)| ((*name).to_owned(), *checksum)).collect()
        };
        let stated = of(&[("a", 1), ("b", 2)]);
        assert_eq!(first_other_tensor(&stated, &stated), None);
        for (found, words) in [
            (of(&[("a", 1), ("b", 3)]), "tensor b has checksum 0000000000000003"),
            (of(&[("a", 1)]), "tensor b is missing"),
            (of(&[("a", 1), ("b", 2), ("c", 3)]), "tensor c has no checksum"),
        ] {
            let difference = first_other_tensor(&stated, &found).unwrap();
            assert!(difference.contains(words), "{difference}");
        }
    }
}
