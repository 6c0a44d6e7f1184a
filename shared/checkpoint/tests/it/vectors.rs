//! The golden cases of checkpoints: which one is chosen, what metadata is worth, and real full trees.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use grail_checkpoint::layout::{METADATA_FILE, Tree, parse_object_key, ready_key};
use grail_checkpoint::manifest::{FileDefect, hash_file};
use grail_checkpoint::ready::{markers, parse_marker, resolve};
use grail_checkpoint::{
    CheckpointCache, CheckpointStore, HashAgreement, InstallError, Listing, Metadata, MetadataError, PolicyDefect,
    Published, Verdict, Wanted,
};
use grail_protocol::ids::{CheckpointWindow, WindowStart};
use object_store::local::LocalFileSystem;
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Resolution {
    ready_rule: String,
    bucket: Vec<BucketCase>,
    listings: Vec<ListingCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BucketCase {
    window: WindowStart,
    checkpoint_window: Option<CheckpointWindow>,
    trees: Vec<String>,
    latest_full_function: Option<CheckpointWindow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListingCase {
    id: String,
    keys: Vec<String>,
    window: WindowStart,
    checkpoint_window: Option<CheckpointWindow>,
}

fn bucket() -> CheckpointStore {
    let root = grail_golden::path("checkpoints/bucket");
    CheckpointStore::new(Arc::new(LocalFileSystem::new_with_prefix(root).unwrap()))
}

fn files_below(folder: &Path) -> usize {
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| if path.is_dir() { files_below(&path) } else { 1 })
        .sum()
}

fn has_metadata(listing: &Listing, checkpoint: CheckpointWindow, tree: Tree) -> bool {
    let objects = listing.keys().filter_map(parse_object_key);
    objects.into_iter().any(|object| object.window == checkpoint && object.tree == tree && object.name == METADATA_FILE)
}

#[tokio::test]
async fn resolution() {
    let file = "checkpoints/resolution.json";
    let vectors: Resolution = grail_golden::json(file);
    let listing = bucket().list().await.unwrap();
    assert_eq!(vectors.ready_rule, "max by (ready_window, checkpoint_window) over markers with ready_window < window",);
    for case in &vectors.bucket {
        let choice = listing.resolve(case.window).map(|choice| choice.checkpoint);
        assert_eq!(choice, case.checkpoint_window, "window {}", case.window);
        let trees = [Tree::Full, Tree::Delta]
            .into_iter()
            .filter(|tree| choice.is_some_and(|checkpoint| has_metadata(&listing, checkpoint, *tree)));
        assert_eq!(trees.map(Tree::as_str).collect::<Vec<_>>(), case.trees, "window {}", case.window);
        let latest_full = markers(listing.keys())
            .filter(|marker| marker.ready < case.window.block().0)
            .map(|marker| marker.checkpoint)
            .filter(|checkpoint| has_metadata(&listing, *checkpoint, Tree::Full))
            .max();
        assert_eq!(latest_full, case.latest_full_function, "window {}", case.window);
    }
    for case in &vectors.listings {
        let choice = resolve(&case.keys, case.window).map(|choice| choice.checkpoint);
        assert_eq!(choice, case.checkpoint_window, "{}", case.id);
    }
    let cases = vectors.bucket.len() + vectors.listings.len();
    grail_golden::ran(file, cases, 23 + 32);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MetadataCases {
    verdicts: BTreeMap<String, String>,
    cases: Vec<MetadataCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MetadataCase {
    id: String,
    tree: String,
    key_window: CheckpointWindow,
    text: String,
    note: Option<String>,
    reference: Reference,
    /// Verdicts separated by a bar, of which any will do.
    expected: String,
}

/// What the reference did with the document.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Reference {
    parsed: bool,
    missing: Option<Vec<String>>,
    generation: Option<Sampling>,
    generation_error: Option<String>,
    raises: Option<String>,
    treated_as: Option<String>,
    verdict: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sampling {
    max_new_tokens: u32,
    temperature: f64,
    top_p: f64,
    top_k: Option<u32>,
    repetition_penalty: f64,
}

impl MetadataCase {
    fn check(&self) {
        let tree = if self.tree == "FULL" { Tree::Full } else { Tree::Delta };
        assert_eq!(tree.as_str(), self.tree, "{}", self.id);
        let metadata = Metadata::parse(self.text.as_bytes(), self.key_window, tree);
        let verdict = metadata.as_ref().map_or_else(|error| error.verdict(), Metadata::verdict);
        let accepted: Vec<&str> = self.expected.split('|').collect();
        assert!(accepted.contains(&verdict.as_str()), "{}: {verdict:?}, note {:?}", self.id, self.note);
        if let Ok(metadata) = &metadata {
            self.check_policy(metadata);
        }
        let reference = &self.reference;
        if !reference.parsed {
            assert_eq!(verdict, Verdict::Absent, "{}", self.id);
            assert_eq!(reference.treated_as.as_deref(), Some("absent"), "{}", self.id);
        }
        if let Some(raised) = &reference.raises {
            assert!(raised == "TypeError" || raised == "ValueError", "{}", self.id);
            assert_eq!(verdict, Verdict::Mine, "{}: informative keys may hold anything", self.id);
        } else if reference.verdict.as_deref() == Some("skip_window") {
            assert_ne!(verdict, Verdict::Mine, "{}", self.id);
        }
    }

    fn check_policy(&self, metadata: &Metadata) {
        let policy = metadata.policy();
        let reference = &self.reference;
        if let Some(missing) = reference.missing.as_ref().and_then(|missing| missing.first()) {
            let key = match policy.clone().unwrap_err() {
                PolicyDefect::Missing { key } | PolicyDefect::Type { key, .. } | PolicyDefect::Range { key, .. } => key,
                other => panic!("{}: {other}", self.id),
            };
            let name = missing.split_once(' ').map_or(missing.as_str(), |(name, _)| name);
            assert_eq!(name.strip_prefix("generation_params.").unwrap_or(name), key, "{}", self.id);
        }
        if let Some(error) = &reference.generation_error {
            assert!(policy.is_err(), "{}: the reference raised {error}", self.id);
        }
        if let (Some(expected), Ok(policy)) = (&reference.generation, &policy) {
            let ours = &policy.generation;
            assert_eq!(ours.max_new(), expected.max_new_tokens, "{}", self.id);
            assert_eq!(ours.top_k_limit(), expected.top_k, "{}", self.id);
            let (ours, theirs) = (
                [ours.temperature, ours.top_p, ours.repetition_penalty],
                [expected.temperature, expected.top_p, expected.repetition_penalty],
            );
            assert_eq!(ours.map(f64::to_bits), theirs.map(f64::to_bits), "{}", self.id);
        }
    }
}

#[test]
fn metadata_cases() {
    let file = "checkpoints/metadata_cases.json";
    let vectors: MetadataCases = grail_golden::json(file);
    let known = [Verdict::Mine, Verdict::SkipWindow, Verdict::Absent, Verdict::RejectMetadata, Verdict::UnusableDelta];
    assert_eq!(
        vectors.verdicts.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        known.iter().map(|verdict| verdict.as_str()).collect(),
    );
    assert!(vectors.verdicts.values().all(|meaning| !meaning.is_empty()));
    vectors.cases.iter().for_each(MetadataCase::check);
    grail_golden::ran(file, vectors.cases.len(), 97);
}

/// Every metadata document is sound, and every full tree installs, except the one that was never uploaded to its end.
#[tokio::test]
async fn bucket_full_trees() {
    let store = bucket();
    let listing = store.list().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cache = CheckpointCache::open(folder.path()).unwrap();
    let checkpoints: BTreeSet<_> = listing.keys().filter_map(parse_object_key).map(|object| object.window).collect();
    let mut installed_windows = Vec::new();
    for window in checkpoints {
        let published = store.published(window).await.unwrap();
        for metadata in [&published.full, &published.delta].into_iter().flatten() {
            assert_eq!(metadata.verdict(), Verdict::Mine, "{window} {}", metadata.tree);
        }
        let is_full = published.full.is_ok();
        assert_eq!(is_full, has_metadata(&listing, window, Tree::Full), "{window}");
        if !is_full {
            continue;
        }
        // Without its delta, a full tree has to stand for itself.
        let published = Published { delta: Err(MetadataError::NotPublished), ..published };
        match cache.install(&store, &published, &Wanted::default()).await {
            Ok(installed) => {
                assert_eq!(installed.agreement, HashAgreement::Equal, "{window}");
                installed_windows.push(window.0);
                for (name, expected) in published.full.as_ref().unwrap().files().unwrap().required() {
                    assert_eq!(hash_file(&installed.folder.join(name)).unwrap().1, expected, "{window} {name}");
                }
                assert!(!installed.folder.join("snapshot_metadata.json").exists(), "{window}: nothing vouches for it");
            }
            Err(InstallError::File { source, .. }) => {
                assert_eq!(window, CheckpointWindow(3360));
                assert_eq!(source.path, "model-00003-of-00003.safetensors");
                assert!(matches!(source.defect, FileDefect::Missing), "{source}");
            }
            Err(other) => panic!("{window}: {other}"),
        }
    }
    assert_eq!(installed_windows, [3000, 3300, 3480, 3540]);
}

/// Every object is listed and is what its name says: a marker, or a file with the hash of its tree's manifest.
#[tokio::test]
async fn bucket_objects() {
    let root = grail_golden::path("checkpoints/bucket");
    let store = bucket();
    let listing = store.list().await.unwrap();
    assert_eq!(listing.len(), files_below(&root));
    for key in listing.keys() {
        let bytes = std::fs::read(root.join(key)).unwrap();
        assert_eq!(listing.size(key), Some(bytes.len() as u64), "{key}");
        match parse_object_key(key) {
            None => {
                let marker = parse_marker(key).unwrap();
                assert_eq!(ready_key(marker.checkpoint, marker.ready), key);
                assert!(bytes.is_empty(), "{key}");
            }
            Some(object) if object.name == object.tree.as_str() => assert!(bytes.is_empty(), "{key}"),
            Some(object) if object.name == "manifest.sig" => {
                assert_eq!(hex::decode(&bytes).unwrap().len(), 64, "{key}");
            }
            Some(object) => {
                let published = store.published(object.window).await.unwrap();
                let metadata = if object.tree == Tree::Full { published.full } else { published.delta }.unwrap();
                let expected = metadata.files().unwrap().required().find(|(name, _)| *name == object.name);
                let found = hash_file(&root.join(key)).unwrap().1;
                let outside_the_manifest = [METADATA_FILE, "snapshot_metadata.json"].contains(&object.name.as_str());
                match expected {
                    Some((_, expected)) => assert_eq!(found, expected, "{key}"),
                    None => assert!(outside_the_manifest, "{key}"),
                }
            }
        }
        grail_golden::ran(&format!("checkpoints/bucket/{key}"), 1, 1);
    }
}
