//! A trainer with a small model: every version differs a little from the one before.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::faulty::{FaultyStore, checkpoints, metadata_input, write_safetensors};
use grail_checkpoint::layout::{METADATA_FILE, Tree, object_key};
use grail_checkpoint::{
    CheckpointCache, CheckpointStore, DeltaFormat, DeltaInput, InstallError, Installed, Wanted, WeightsFiles,
    publish_delta, publish_full,
};
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use serde_json::Value;

const ELEMENTS: usize = 6000;

pub struct Trainer {
    pub store: Arc<FaultyStore>,
    pub checkpoints: CheckpointStore,
    pub cache: CheckpointCache,
    folder: tempfile::TempDir,
}

impl Trainer {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = FaultyStore::new();
        let cache = CheckpointCache::open(folder.path().join("checkpoints")).unwrap();
        Self { checkpoints: checkpoints(&store), store, cache, folder }
    }

    /// The model folder of a version, made when it is first asked for.
    pub fn version(&self, window: u64) -> std::path::PathBuf {
        let folder = self.folder.path().join(format!("model-{window}"));
        if !folder.exists() {
            std::fs::create_dir(&folder).unwrap();
            write_model(&folder, window);
        }
        folder
    }

    pub fn hash(&self, window: u64) -> WeightsHash {
        WeightsFiles::open(&self.version(window)).unwrap().hash().unwrap()
    }

    pub async fn full(&self, window: u64) {
        let input = metadata_input();
        publish_full(&self.checkpoints, CheckpointWindow(window), &self.version(window), &input, window).await.unwrap();
    }

    /// A delta without a READY marker: links need none.
    pub async fn delta(&self, window: u64, base: u64) {
        self.delta_of(window, window, base).await;
    }

    /// The same with the weights of another version.
    pub async fn delta_of(&self, version: u64, window: u64, base: u64) {
        let (folder, base_folder) = (self.version(version), self.version(base));
        let input = DeltaInput {
            window: CheckpointWindow(window),
            folder: &folder,
            base_window: CheckpointWindow(base),
            base_folder: &base_folder,
            anchor: None,
            format: DeltaFormat::V31,
            ready: None,
        };
        publish_delta(&self.checkpoints, &input, &metadata_input()).await.unwrap();
    }

    /// FULL 300, then a delta for every further window.
    pub async fn chain(windows: impl IntoIterator<Item = u64>) -> Self {
        let trainer = Self::new();
        trainer.full(300).await;
        let mut base = 300;
        for window in windows {
            trainer.delta(window, base).await;
            base = window;
        }
        trainer
    }

    pub async fn install(&self, window: u64) -> Result<Installed, InstallError> {
        self.install_wanted(window, &Wanted::default()).await
    }

    pub async fn install_wanted(&self, window: u64, wanted: &Wanted) -> Result<Installed, InstallError> {
        let published = self.checkpoints.published(CheckpointWindow(window)).await.unwrap();
        self.cache.install(&self.checkpoints, &published, wanted).await
    }

    pub async fn edit(&self, window: u64, tree: Tree, edit: impl FnOnce(&mut Value)) {
        let key = object_key(CheckpointWindow(window), tree, METADATA_FILE);
        let mut document: Value = serde_json::from_slice(&self.store.body(&key).await).unwrap();
        edit(&mut document);
        self.store.overwrite(&key, serde_json::to_vec(&document).unwrap()).await;
    }

    /// Damages an object and leaves its size as it is.
    pub async fn damage(&self, key: &str) {
        let mut body = self.store.body(key).await.to_vec();
        let last = body.len() - 1;
        body[last] ^= 1;
        self.store.overwrite(key, body).await;
    }

    pub fn assert_has(&self, installed: &Installed, window: u64) {
        assert_eq!(installed.weights_hash, self.hash(window));
        assert_eq!(WeightsFiles::open(&installed.folder).unwrap().hash().unwrap(), self.hash(window));
        let config = std::fs::read(installed.folder.join("config.json")).unwrap();
        assert_eq!(config, b"{\"tie_word_embeddings\": false}");
    }

    pub fn windows(&self) -> Vec<u64> {
        self.cache.windows().unwrap().iter().map(|window| window.0).collect()
    }

    /// Everything in the cache's root but its lock.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.cache.root()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != ".lock");
        names.sort_unstable();
        names
    }
}

pub fn full_key(window: u64, name: &str) -> String {
    object_key(CheckpointWindow(window), Tree::Full, name)
}

pub fn delta_key(window: u64, name: &str) -> String {
    object_key(CheckpointWindow(window), Tree::Delta, name)
}

fn write_model(folder: &Path, window: u64) {
    let mut tensors = BTreeMap::from([("a.weight", vec![0_u8; 2 * ELEMENTS]), ("b.weight", vec![1; 64])]);
    // Noise that no version changes, so that nothing compresses well and a full tree costs more than its deltas.
    let mut state = 1_u32;
    for byte in tensors.get_mut("a.weight").unwrap() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8 & 0x3f;
    }
    for step in 1..=window / 30 {
        let place = 2 * (usize::try_from(step).unwrap() * 37 % ELEMENTS);
        let [low, high, ..] = step.to_le_bytes();
        // A bit that keeps every value apart from zero and from NaN.
        tensors.get_mut("a.weight").unwrap()[place..place + 2].copy_from_slice(&[low, high | 0x20]);
    }
    let tensors: Vec<(&str, &[u8])> = tensors.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    write_safetensors(&folder.join("model.safetensors"), &tensors);
    std::fs::write(folder.join("config.json"), b"{\"tie_word_embeddings\": false}").unwrap();
    std::fs::write(folder.join("tokenizer.json"), b"{}").unwrap();
}
