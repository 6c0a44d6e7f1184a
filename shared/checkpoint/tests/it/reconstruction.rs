//! Real chains: every delta of the golden stores, applied to its base, gives the published weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::folders::{assert_changes, read_tensors};
use grail_checkpoint::delta::{DELTA_METADATA_FILE, PAYLOAD_FILE};
use grail_checkpoint::layout::{METADATA_FILE, ROOT, Tree, folder_name, object_key};
use grail_checkpoint::metadata::PublishedHash;
use grail_checkpoint::mirror::build;
use grail_checkpoint::{Delta, DeltaMetadata, HashAgreement, Metadata, Mirror, MirrorPlan, Shapes, WeightsFiles};
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use serde::Deserialize;
use serde::de::IgnoredAny;
use sha2::{Digest, Sha256};

/// One of the golden stores.
struct Bucket(PathBuf);

impl Bucket {
    fn open(name: &str) -> Self {
        Self(grail_golden::path(&format!("checkpoints/{name}")))
    }

    fn file(&self, window: CheckpointWindow, tree: Tree, name: &str) -> PathBuf {
        self.0.join(object_key(window, tree, name))
    }

    fn metadata(&self, window: CheckpointWindow, tree: Tree) -> Option<Metadata> {
        let text = std::fs::read(self.file(window, tree, METADATA_FILE)).ok()?;
        Some(Metadata::parse(&text, window, tree).unwrap())
    }

    fn is_ready(&self, window: CheckpointWindow) -> bool {
        let folder = self.0.join(ROOT).join(folder_name(window));
        let mut names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        names.any(|name| name.to_str().unwrap().starts_with("READY-"))
    }

    /// Folder of a full tree that is complete.
    fn full(&self, window: CheckpointWindow) -> Option<WeightsFiles> {
        let folder = self.file(window, Tree::Full, METADATA_FILE).parent().unwrap().to_path_buf();
        WeightsFiles::open(&folder).ok()
    }

    fn delta(&self, window: CheckpointWindow, base: &WeightsFiles, scratch: &Path) -> Delta {
        let about = std::fs::read(self.file(window, Tree::Delta, DELTA_METADATA_FILE)).unwrap();
        let DeltaMetadata { format } = DeltaMetadata::parse(&about).unwrap();
        Delta::open(&self.file(window, Tree::Delta, PAYLOAD_FILE), format, &Shapes::from(base), scratch).unwrap()
    }

    /// The checkpoint from its delta, through as many links as it takes to a full tree, in one pass.
    fn reconstruct(&self, window: CheckpointWindow) -> Reconstructed {
        let mut links = vec![window];
        let mut base_window = self.metadata(window, Tree::Delta).unwrap().base().unwrap();
        let base = loop {
            if let Some(base) = self.full(base_window) {
                break base;
            }
            links.insert(0, base_window);
            base_window = self.metadata(base_window, Tree::Delta).unwrap().base().unwrap();
        };
        let folder = tempfile::tempdir().unwrap();
        let deltas: Vec<_> = links.iter().map(|link| self.delta(*link, &base, folder.path())).collect();
        let base_hash = base.hash().unwrap();
        let plan = MirrorPlan { base: &base, base_window, base_hash, deltas: &deltas, target: folder.path() };
        let mirror = build(&plan).unwrap();
        assert_eq!((mirror.changes.base, mirror.changes.base_window), (base_hash, base_window));
        let weights = WeightsFiles::open(folder.path()).unwrap();
        assert_changes(&mirror.changes, &read_tensors(&base), &read_tensors(&weights));
        let listed = deltas.last().unwrap().listed();
        let links = [&[base_window], links.as_slice()].concat();
        Reconstructed { mirror, weights, links, listed, _folder: folder }
    }

    /// Hash of a checkpoint's weights by whatever leads to them.
    fn hash(&self, window: CheckpointWindow) -> WeightsHash {
        self.full(window).map_or_else(|| self.reconstruct(window).mirror.weights_hash, |full| full.hash().unwrap())
    }
}

struct Reconstructed {
    mirror: Mirror,
    weights: WeightsFiles,
    /// The full checkpoint, then the deltas.
    links: Vec<CheckpointWindow>,
    /// Elements that the last delta lists.
    listed: u64,
    _folder: tempfile::TempDir,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TensorFacts {
    shape: Vec<u64>,
    dtype: String,
    sha256: String,
}

fn assert_tensors(weights: &WeightsFiles, expected: &BTreeMap<String, TensorFacts>) {
    let found = read_tensors(weights);
    assert!(found.keys().eq(expected.keys()));
    for (name, facts) in expected {
        let tensor = &found[name];
        assert_eq!(hex::encode(Sha256::digest(&tensor.bytes)), facts.sha256, "{name}");
        assert_eq!((tensor.dtype.as_str(), facts.dtype.as_str()), ("BF16", "bfloat16"), "{name}");
        assert_eq!(tensor.shape, facts.shape, "{name}");
    }
}

/// What this test needs of a checkpoint's facts; how it is obtained is tested elsewhere.
#[derive(Deserialize)]
struct CheckpointFacts {
    weights_hash: WeightsHash,
    tensors: BTreeMap<String, TensorFacts>,
    #[serde(rename = "DELTA")]
    delta: Option<DeltaFacts>,
    expected: ExpectedChain,
    delta_only_weights_hash: Option<WeightsHash>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeltaFacts {
    prev_window: CheckpointWindow,
    anchor_window: CheckpointWindow,
    weights_hash: WeightsHash,
    checkpoint_type: String,
    format: String,
    nonzero_params: u64,
}

#[derive(Deserialize)]
struct ExpectedChain {
    base_and_deltas: Vec<CheckpointWindow>,
    obtainable: bool,
}

#[test]
fn every_delta_of_the_bucket() {
    let bucket = Bucket::open("bucket");
    let file = "checkpoints/weights.json";
    let checkpoints: BTreeMap<String, CheckpointFacts> = grail_golden::json(file);
    let mut deltas = 0;
    for (window, facts) in &checkpoints {
        let window = CheckpointWindow(window.parse().unwrap());
        let Some(delta) = &facts.delta else { continue };
        deltas += 1;
        let metadata = bucket.metadata(window, Tree::Delta).unwrap();
        assert_eq!(metadata.weights_hash, PublishedHash::Stated(delta.weights_hash), "{window}");
        assert_eq!(metadata.base().unwrap(), delta.prev_window, "{window}");
        assert_eq!(metadata.document()["anchor_window"], delta.anchor_window.0, "{window}");
        assert_eq!(delta.checkpoint_type, "DELTA");
        let about = std::fs::read(bucket.file(window, Tree::Delta, DELTA_METADATA_FILE)).unwrap();
        assert_eq!(DeltaMetadata::parse(&about).unwrap().format.as_str(), delta.format, "{window}");

        let made = bucket.reconstruct(window);
        assert_eq!(made.listed, delta.nonzero_params, "{window}");
        let agreement = made.weights.agreement(made.mirror.weights_hash, &metadata.weights_hash).unwrap();
        match facts.delta_only_weights_hash {
            None => {
                assert_eq!(made.mirror.weights_hash, facts.weights_hash, "{window}");
                assert_eq!(agreement, HashAgreement::Equal, "{window}");
                assert_tensors(&made.weights, &facts.tensors);
            }
            Some(hash) => {
                assert!(!facts.expected.obtainable, "{window}");
                assert_eq!(made.mirror.weights_hash, hash, "{window}");
                assert_eq!(agreement, HashAgreement::Different, "{window}");
            }
        }
        // Where the full tree of the checkpoint itself is complete, the shortest way does not use its delta.
        if bucket.full(window).is_none() {
            assert_eq!(made.links, facts.expected.base_and_deltas, "{window}");
        }
    }
    grail_golden::ran(file, deltas, 15);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FastPath {
    cases: Vec<FastPathCase>,
    tied: BTreeMap<String, TiedFacts>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FastPathCase {
    bucket: String,
    from: CheckpointWindow,
    to: CheckpointWindow,
    reference_ok: bool,
    note: String,
    state_dict_hash_before: WeightsHash,
    state_dict_hash_after: WeightsHash,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TiedFacts {
    weights_hash: WeightsHash,
    tensors: BTreeMap<String, TensorFacts>,
    hash_with_lm_head_copy: WeightsHash,
    reference_cold_ok: bool,
    published_hash: WeightsHash,
}

impl FastPathCase {
    fn check(&self, tied: &BTreeMap<String, TiedFacts>) {
        let bucket = Bucket::open(&self.bucket);
        if self.bucket == "bucket_tied" {
            // The reference hashes a model, which has the head twice; a delta has it once, and so have we.
            let [before, after] = [self.from, self.to].map(|window| &tied[&window.to_string()]);
            assert_eq!(before.hash_with_lm_head_copy, self.state_dict_hash_before);
            assert_eq!(after.hash_with_lm_head_copy, self.state_dict_hash_after);
            return;
        }
        assert_eq!(bucket.hash(self.from), self.state_dict_hash_before, "{}", self.note);
        let delta = bucket.metadata(self.to, Tree::Delta);
        let fits = delta.as_ref().is_some_and(|delta| delta.base().unwrap() == self.from);
        let is_ready = bucket.is_ready(self.to);
        if !fits || !is_ready {
            assert!(!self.reference_ok, "{}", self.note);
            assert_eq!(self.state_dict_hash_after, self.state_dict_hash_before, "{}", self.note);
            return;
        }
        assert_eq!(bucket.reconstruct(self.to).mirror.weights_hash, self.state_dict_hash_after, "{}", self.note);
        let published = delta.unwrap().weights_hash;
        let agrees = published == PublishedHash::Stated(self.state_dict_hash_after);
        assert_eq!(agrees, self.reference_ok, "{}", self.note);
    }
}

#[test]
fn fast_path() {
    let file = "checkpoints/fast_path.json";
    let vectors: FastPath = grail_golden::json(file);
    vectors.cases.iter().for_each(|case| case.check(&vectors.tied));
    let bucket = Bucket::open("bucket_tied");
    for (window, facts) in &vectors.tied {
        let window = CheckpointWindow(window.parse().unwrap());
        let made = (window.0 != 6000).then(|| bucket.reconstruct(window));
        let full = bucket.full(window);
        let weights = full.as_ref().or(made.as_ref().map(|made| &made.weights)).unwrap();
        let hash = weights.hash().unwrap();
        assert!(made.as_ref().is_none_or(|made| made.mirror.weights_hash == hash));
        assert_eq!((hash, hash), (facts.weights_hash, facts.published_hash), "{window}");
        assert_eq!(weights.hash_with_tied_head().unwrap(), Some(facts.hash_with_lm_head_copy), "{window}");
        let copied = PublishedHash::Stated(facts.hash_with_lm_head_copy);
        assert_eq!(weights.agreement(hash, &copied).unwrap(), HashAgreement::EqualWithTiedHead, "{window}");
        assert_tensors(weights, &facts.tensors);
        assert!(facts.reference_cold_ok);
    }
    grail_golden::ran(file, vectors.cases.len() + vectors.tied.len(), 10);
}

/// Every object of the tied store is what its name says.
#[test]
fn tied_bucket_objects() {
    let bucket = Bucket::open("bucket_tied");
    let mut pending = vec![bucket.0.clone()];
    while let Some(folder) = pending.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
                continue;
            }
            let key = path.strip_prefix(&bucket.0).unwrap().to_str().unwrap();
            check_object(&bucket, key, &std::fs::read(&path).unwrap());
            grail_golden::ran(&format!("checkpoints/bucket_tied/{key}"), 1, 1);
        }
    }
}

fn check_object(bucket: &Bucket, key: &str, bytes: &[u8]) {
    let Some(object) = grail_checkpoint::layout::parse_object_key(key) else {
        let marker = grail_checkpoint::ready::parse_marker(key).unwrap();
        assert_eq!(grail_checkpoint::layout::ready_key(marker.checkpoint, marker.ready), key);
        assert!(bytes.is_empty(), "{key}");
        return;
    };
    let metadata = bucket.metadata(object.window, object.tree).unwrap();
    let stated = metadata.files().unwrap().required().find(|(name, _)| *name == object.name);
    match (stated, object.name.as_str()) {
        (Some((_, digest)), _) => assert_eq!(digest.0, <[u8; 32]>::from(Sha256::digest(bytes)), "{key}"),
        (None, "FULL" | "DELTA") => assert!(bytes.is_empty(), "{key}"),
        (None, "manifest.sig") => assert_eq!(hex::decode(bytes).unwrap().len(), 64, "{key}"),
        (None, "metadata.json" | "snapshot_metadata.json") => {
            serde_json::from_slice::<BTreeMap<String, IgnoredAny>>(bytes).unwrap();
        }
        (None, other) => panic!("{other} is in no manifest"),
    }
}
