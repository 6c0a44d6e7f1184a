//! Every checkpoint of the golden stores, from an empty cache and from the checkpoint before it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use crate::faulty::{FaultyStore, checkpoints};
use grail_checkpoint::cache::Entry;
use grail_checkpoint::layout::{METADATA_FILE, Tree, parse_object_key};
use grail_checkpoint::ready::{markers, parse_marker};
use grail_checkpoint::{
    CheckpointCache, CheckpointStore, HashAgreement, InstallError, Installed, MadeFrom, Notice, Published, Wanted,
    WeightsFiles,
};
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use object_store::local::LocalFileSystem;
use serde::Deserialize;
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TensorFacts {
    shape: Vec<u64>,
    dtype: String,
    sha256: String,
}

type Tensors = BTreeMap<String, TensorFacts>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TreeFacts {
    prev_window: Option<CheckpointWindow>,
    anchor_window: Option<CheckpointWindow>,
    weights_hash: WeightsHash,
    checkpoint_type: String,
    /// Of deltas only, as the next one; both are asserted where payloads are decoded.
    #[serde(rename = "format")]
    _format: Option<String>,
    #[serde(rename = "nonzero_params")]
    _nonzero_params: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReferenceCold {
    ok: Option<bool>,
    error: Option<String>,
    #[serde(default)]
    cached_folders_after: Vec<String>,
    equal_to_truth: Option<bool>,
    files: Option<BTreeSet<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    base_and_deltas: Vec<CheckpointWindow>,
    obtainable: bool,
    note: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Facts {
    trees: BTreeSet<String>,
    weights_hash: WeightsHash,
    tensors: Tensors,
    #[serde(rename = "FULL")]
    full: Option<TreeFacts>,
    #[serde(rename = "DELTA")]
    delta: Option<TreeFacts>,
    ready: Vec<u64>,
    reference_cold: ReferenceCold,
    expected: Expected,
    delta_only_weights_hash: Option<WeightsHash>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Quirk {
    expected: String,
    note: String,
    weights_hash: WeightsHash,
    tensors: Tensors,
    reference_cold: ReferenceCold,
}

pub struct Bench {
    faulty: Arc<FaultyStore>,
    pub store: CheckpointStore,
    cache: CheckpointCache,
    _folder: tempfile::TempDir,
}

impl Bench {
    pub fn over(bucket: &str) -> Self {
        let root = grail_golden::path(&format!("checkpoints/{bucket}"));
        let faulty = FaultyStore::over(Arc::new(LocalFileSystem::new_with_prefix(root).unwrap()));
        let folder = tempfile::tempdir().unwrap();
        let cache = CheckpointCache::open(folder.path()).unwrap();
        Self { store: checkpoints(&faulty), faulty, cache, _folder: folder }
    }

    pub async fn install(
        &self,
        window: CheckpointWindow,
        wanted: &Wanted,
    ) -> (Published, Result<Installed, InstallError>) {
        let published = self.store.published(window).await.unwrap();
        let installed = self.cache.install(&self.store, &published, wanted).await;
        (published, installed)
    }
}

fn assert_tensors(folder: &Path, expected: &Tensors) {
    let weights = WeightsFiles::open(folder).unwrap();
    assert!(weights.tensors().keys().eq(expected.keys()));
    for (name, facts) in expected {
        let place = &weights.tensors()[name];
        assert_eq!((place.dtype.as_str(), facts.dtype.as_str()), ("BF16", "bfloat16"), "{name}");
        assert_eq!(place.shape, facts.shape, "{name}");
        let bytes = weights.read(name).unwrap().unwrap();
        assert_eq!(hex::encode(Sha256::digest(&bytes)), facts.sha256, "{name}");
    }
}

fn chain(installed: &Installed) -> Vec<CheckpointWindow> {
    match &installed.made_from {
        MadeFrom::Full => vec![installed.window],
        MadeFrom::Deltas { base, deltas } => [&[*base], deltas.as_slice()].concat(),
    }
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

impl Facts {
    fn assert_published(&self, window: CheckpointWindow, published: &Published) {
        let trees = [(Tree::Full, &published.full, &self.full), (Tree::Delta, &published.delta, &self.delta)];
        for (tree, metadata, facts) in trees {
            assert_eq!(metadata.is_ok(), self.trees.contains(tree.as_str()), "{window} {tree}");
            let (Ok(metadata), Some(facts)) = (metadata, facts) else {
                assert!(metadata.is_err() && facts.is_none(), "{window} {tree}");
                continue;
            };
            assert_eq!(facts.checkpoint_type, tree.as_str());
            assert_eq!(metadata.base().ok(), facts.prev_window, "{window}");
            assert_eq!(metadata.document()["anchor_window"].as_u64(), facts.anchor_window.map(|anchor| anchor.0));
            assert_eq!(metadata.weights_hash.to_string(), facts.weights_hash.to_string(), "{window}");
            assert_eq!(facts.weights_hash, self.weights_hash, "{window}");
        }
    }

    fn assert_installed(&self, window: CheckpointWindow, installed: &Installed) {
        assert_eq!(installed.weights_hash, self.weights_hash, "{window}");
        assert_eq!(installed.agreement, HashAgreement::Equal, "{window}");
        assert_eq!(installed.notices, [], "{window}");
        assert_tensors(&installed.folder, &self.tensors);
        let fingerprint = WeightsFiles::open(&installed.folder).unwrap().fingerprint().unwrap();
        assert_eq!(*installed.checksums, fingerprint.checksums, "{window}");
    }

    fn assert_refused(&self, window: CheckpointWindow, error: &InstallError) {
        assert!(!self.expected.obtainable, "{window}: {error}");
        assert_eq!(error.class().as_str(), "HashMismatch", "{window}: {error}");
        let found = self.delta_only_weights_hash.unwrap().to_string();
        assert!(error.to_string().contains(&found), "{window}: {error}");
    }

    /// The reference's folder has the same files as ours, which has the change set beside them.
    fn assert_like_reference(&self, bench: &Bench, installed: &Installed) {
        let window = installed.window;
        assert_eq!(self.reference_cold.error, None, "{window}");
        if self.reference_cold.ok != Some(true) {
            let note = &self.expected.note;
            assert!(self.ready.is_empty() || note.as_ref().is_some_and(|note| note.contains("reference fails here")));
            return;
        }
        assert_eq!(self.reference_cold.equal_to_truth, Some(true));
        let mut ours = names(&installed.folder);
        assert_eq!(ours.remove("changes"), installed.made_from != MadeFrom::Full, "{window}");
        assert_eq!(Some(ours), self.reference_cold.files, "{window}");
        let cached: Vec<String> =
            bench.cache.windows().unwrap().iter().map(|window| format!("checkpoint-{window}")).collect();
        assert_eq!(cached, self.reference_cold.cached_folders_after, "{window}");
    }
}

#[tokio::test]
async fn from_an_empty_cache() {
    let file = "checkpoints/weights.json";
    let checkpoints: BTreeMap<u64, Facts> = grail_golden::json(file);
    for (window, facts) in &checkpoints {
        let window = CheckpointWindow(*window);
        let bench = Bench::over("bucket");
        let listing = bench.store.list().await.unwrap();
        let ready = markers(listing.keys()).filter(|marker| marker.checkpoint == window).map(|marker| marker.ready);
        assert_eq!(ready.collect::<Vec<_>>(), facts.ready, "{window}");
        let (published, installed) = bench.install(window, &Wanted::default()).await;
        facts.assert_published(window, &published);
        match installed {
            Ok(installed) => {
                assert!(facts.expected.obtainable, "{window}");
                facts.assert_installed(window, &installed);
                assert_eq!(chain(&installed), facts.expected.base_and_deltas, "{window}");
                facts.assert_like_reference(&bench, &installed);
            }
            Err(error) => facts.assert_refused(window, &error),
        }
        assert!(names(bench.cache.root()).iter().all(|name| !name.contains('.') || name == ".lock"), "{window}");
    }
    grail_golden::ran(file, checkpoints.len(), 18);
}

#[tokio::test]
async fn from_the_checkpoint_before() {
    let file = "checkpoints/weights.json";
    let checkpoints: BTreeMap<u64, Facts> = grail_golden::json(file);
    let bench = Bench::over("bucket");
    let mut before: Option<Installed> = None;
    for (window, facts) in &checkpoints {
        let window = CheckpointWindow(*window);
        bench.faulty.take_requests();
        let prefer_base = before.as_ref().map(|before| before.window);
        let (published, installed) = bench.install(window, &Wanted { prefer_base, ..Wanted::default() }).await;
        let installed = match installed {
            Ok(installed) => installed,
            Err(error) => {
                facts.assert_refused(window, &error);
                continue;
            }
        };
        facts.assert_installed(window, &installed);
        let rests_on = published.delta.as_ref().ok().map(|delta| delta.base().unwrap());
        match before.as_ref().filter(|before| rests_on == Some(before.window)) {
            Some(before) => {
                let changes = installed.changes.as_ref().unwrap();
                assert_eq!((changes.base_window, changes.base), (before.window, before.weights_hash), "{window}");
                assert_eq!(chain(&installed), [before.window, window]);
                assert!(changes.file.is_file() && changes.file.starts_with(&installed.folder), "{window}");
                let fetched: BTreeSet<_> = bench.faulty.take_keys();
                let payloads = fetched.iter().filter(|key| !key.ends_with(METADATA_FILE));
                let windows = payloads.map(|key| parse_object_key(key).unwrap()).map(|key| (key.window, key.tree));
                assert_eq!(windows.collect::<BTreeSet<_>>(), BTreeSet::from([(window, Tree::Delta)]));
            }
            None => assert_eq!(installed.made_from, MadeFrom::Full, "{window}"),
        }
        // What a restart finds is what was installed.
        let Entry::Installed(found) = bench.cache.inspect(window) else { panic!("{window} was just installed") };
        assert_eq!((&found.checksums, &found.changes), (&installed.checksums, &installed.changes), "{window}");
        assert_eq!((&found.made_from, &found.agreement), (&installed.made_from, &installed.agreement), "{window}");
        before = Some(installed);
    }
    grail_golden::ran(file, checkpoints.len(), 18);
}

impl Quirk {
    fn check(&self, window: CheckpointWindow, published: &Published, installed: &Result<Installed, InstallError>) {
        let verdicts: BTreeSet<String> = match installed {
            Ok(installed) => self.verdicts_of(published, installed),
            Err(error) => BTreeSet::from([format!("refuse:{}", error.class())]),
        };
        let is_expected = self.expected.split('|').any(|verdict| verdicts.contains(verdict));
        assert!(is_expected, "{window}, {}: expected {}, found {verdicts:?}", self.note, self.expected);
        if let Err(error @ InstallError::HashMismatch { found, .. }) = installed {
            assert_eq!(*found, self.weights_hash, "{window}: {error}");
        }
    }

    fn verdicts_of(&self, published: &Published, installed: &Installed) -> BTreeSet<String> {
        assert_eq!(installed.weights_hash, self.weights_hash, "{}", self.note);
        assert_tensors(&installed.folder, &self.tensors);
        let reference = &self.reference_cold;
        assert_eq!(reference.equal_to_truth, (reference.ok == Some(true)).then_some(true), "{}", self.note);
        if published.policy().is_err() {
            return BTreeSet::from(["ok:skip_window".to_owned()]);
        }
        if !installed.notices.is_empty() {
            let doubts = [Notice::HashDiffers, Notice::HashNotPublished];
            assert!(installed.notices.iter().all(|notice| doubts.contains(notice)), "{:?}", installed.notices);
            return BTreeSet::from(["ok:warn".to_owned()]);
        }
        BTreeSet::from(["ok".to_owned(), format!("ok:{}", installed.made_from.tree())])
    }
}

#[tokio::test]
async fn oddities_from_an_empty_cache() {
    let file = "checkpoints/quirks.json";
    let quirks: BTreeMap<u64, Quirk> = grail_golden::json(file);
    for (window, quirk) in &quirks {
        let window = CheckpointWindow(*window);
        let bench = Bench::over("bucket_quirks");
        let (published, installed) = bench.install(window, &Wanted::default()).await;
        quirk.check(window, &published, &installed);
        assert_eq!(bench.cache.windows().unwrap().contains(&window), installed.is_ok(), "{window}");
        assert!(quirk.reference_cold.cached_folders_after.is_empty(), "{window}: not recorded for these");
        let ours_to_run = quirk.reference_cold.error.as_deref().is_none_or(|error| error == "not run: endless loop");
        assert!(ours_to_run, "{window}");
        if let (Ok(_), Some(files)) = (&installed, &quirk.reference_cold.files) {
            let ours = names(&bench.cache.folder(window));
            assert!(files.iter().all(|name| ours.contains(name)), "{window}: {ours:?} lacks some of {files:?}");
        }
    }
    grail_golden::ran(file, quirks.len(), 17);
}

#[tokio::test]
async fn oddities_from_the_checkpoint_before() {
    let file = "checkpoints/quirks.json";
    let quirks: BTreeMap<u64, Quirk> = grail_golden::json(file);
    let bench = Bench::over("bucket_quirks");
    let mut prefer_base = None;
    for (window, quirk) in &quirks {
        let window = CheckpointWindow(*window);
        let (published, installed) = bench.install(window, &Wanted { prefer_base, ..Wanted::default() }).await;
        quirk.check(window, &published, &installed);
        if installed.is_ok() {
            prefer_base = Some(window);
        }
    }
    grail_golden::ran(file, quirks.len(), 17);
}

/// Every object belongs to one of the cases, and every case has a marker.
#[tokio::test]
async fn oddities_by_object() {
    let quirks: BTreeMap<u64, Quirk> = grail_golden::json("checkpoints/quirks.json");
    let bench = Bench::over("bucket_quirks");
    let listing = bench.store.list().await.unwrap();
    let ready: BTreeSet<u64> = markers(listing.keys()).map(|marker| marker.checkpoint.0).collect();
    assert!(ready.iter().eq(quirks.keys()));
    for key in listing.keys() {
        match parse_object_key(key) {
            Some(object) => assert!(quirks.contains_key(&object.window.0), "{key}"),
            None => assert!(parse_marker(key).is_some(), "{key}"),
        }
        let file = format!("checkpoints/bucket_quirks/{key}");
        assert_eq!(listing.size(key), Some(std::fs::metadata(grail_golden::path(&file)).unwrap().len()), "{key}");
        grail_golden::ran(&file, 1, 1);
    }
}

/// A model with tied embeddings has no head in its files, in full and after a delta.
#[tokio::test]
async fn tied_embeddings() {
    let bench = Bench::over("bucket_tied");
    for (window, tree) in [(6000, Tree::Full), (6030, Tree::Delta)] {
        let (_, installed) = bench.install(CheckpointWindow(window), &Wanted::default()).await;
        let installed = installed.unwrap();
        assert_eq!((installed.made_from.tree(), &installed.agreement), (tree, &HashAgreement::Equal));
        assert!(!installed.checksums.contains_key("lm_head.weight"));
    }
}
