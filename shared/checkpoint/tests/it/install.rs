//! Publishing, choosing and installing, with everything that can go wrong on the way.

use std::io::Write;

use crate::faulty::{Fault, FaultyStore, WINDOW, checkpoints, full_key, hasty, metadata_input, model_folder, publish};
use flate2::Compression;
use flate2::write::GzEncoder;
use grail_checkpoint::cache::Entry;
use grail_checkpoint::layout::ready_key;
use grail_checkpoint::manifest::FileDefect;
use grail_checkpoint::metadata::FilesDefect;
use grail_checkpoint::{
    CheckpointCache, CheckpointStore, ChooseError, FailureClass, HashAgreement, InstallError, Installed, MadeFrom,
    MetadataInput, Notice, PublishError, StoreError, Wanted, publish_full,
};
use grail_protocol::ids::{CheckpointWindow, WindowStart};
use serde_json::{Value, json};

struct Bench {
    store: std::sync::Arc<FaultyStore>,
    checkpoints: CheckpointStore,
    cache: CheckpointCache,
    _folder: tempfile::TempDir,
}

impl Bench {
    fn empty() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = FaultyStore::new();
        let cache = CheckpointCache::open(folder.path().join("checkpoints")).unwrap();
        Self { checkpoints: checkpoints(&store), store, cache, _folder: folder }
    }

    async fn published() -> Self {
        let bench = Self::empty();
        publish(&bench.store).await;
        bench
    }

    async fn install(&self) -> Result<Installed, InstallError> {
        let published = self.checkpoints.published(WINDOW).await.unwrap();
        self.cache.install(&self.checkpoints, &published, &Wanted::default()).await
    }

    async fn edit_metadata(&self, edit: impl FnOnce(&mut Value)) {
        let key = full_key("metadata.json");
        let mut document: Value = serde_json::from_slice(&self.store.body(&key).await).unwrap();
        edit(&mut document);
        self.store.overwrite(&key, serde_json::to_vec(&document).unwrap()).await;
    }

    /// Nothing but the lock is left in the cache.
    fn assert_nothing_installed(&self) {
        let names: Vec<_> = std::fs::read_dir(self.cache.root()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [".lock"]);
    }
}

fn window(start: u64) -> WindowStart {
    WindowStart::try_from(start).unwrap()
}

/// The whole chain of causes in one line, as a user sees it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

#[tokio::test]
async fn what_is_published_is_chosen_and_installed() {
    let bench = Bench::published().await;
    let choice = bench.checkpoints.choose(window(330)).await.unwrap();
    assert_eq!(choice.checkpoint, WINDOW);
    let published = bench.checkpoints.published(choice.checkpoint).await.unwrap();
    let policy = published.policy().unwrap();
    assert_eq!((policy.env_id.as_str(), policy.generation.max_new()), ("gsm8k", 96));
    assert_eq!(policy.env_params.split.as_deref(), Some("train"));

    let installed = bench.install().await.unwrap();
    assert_eq!(installed.folder, bench.cache.folder(WINDOW));
    assert_eq!(installed.agreement, HashAgreement::Equal);
    assert_eq!(installed.metadata.model_name.as_deref(), Some("demo/tiny"));
    let source = model_folder();
    for name in ["config.json", "model.safetensors", "extra/notes.txt"] {
        let (ours, theirs) = (installed.folder.join(name), source.path().join(name));
        assert_eq!(std::fs::read(ours).unwrap(), std::fs::read(theirs).unwrap(), "{name}");
    }
    let local: Value = serde_json::from_slice(&std::fs::read(installed.folder.join("metadata.json")).unwrap()).unwrap();
    assert_eq!(local["weights_hash"], json!(installed.weights_hash.to_string()));
    assert_eq!(local["window"], json!(300));
}

#[tokio::test]
async fn the_marker_is_the_last_object_and_names_the_window_of_readiness() {
    let bench = Bench::published().await;
    let listing = bench.checkpoints.list().await.unwrap();
    let expected = [
        ready_key(WINDOW, 300),
        full_key("FULL"),
        full_key("config.json"),
        full_key("extra/notes.txt"),
        full_key("metadata.json"),
        full_key("model.safetensors"),
    ];
    assert_eq!(
        listing.keys().collect::<std::collections::BTreeSet<_>>(),
        expected.iter().map(String::as_str).collect()
    );
    assert_eq!(listing.size(&full_key("FULL")), Some(0));
}

#[tokio::test]
async fn a_refused_publication_leaves_no_marker() {
    let bench = Bench::empty();
    let input = MetadataInput { env_id: String::new(), ..metadata_input() };
    let refused = publish_full(&bench.checkpoints, WINDOW, model_folder().path(), &input, 300).await.unwrap_err();
    assert!(matches!(refused, PublishError::Policy(_)), "{refused}");
    let empty = tempfile::tempdir().unwrap();
    let refused = publish_full(&bench.checkpoints, WINDOW, empty.path(), &metadata_input(), 300).await.unwrap_err();
    assert!(matches!(refused, PublishError::Weights(_)), "{refused}");
    assert!(bench.checkpoints.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn an_empty_store_is_told_from_a_listing_that_failed() {
    let bench = Bench::empty();
    let error = bench.checkpoints.choose(window(330)).await.unwrap_err();
    assert!(matches!(error, ChooseError::NoneReady { objects: 0, .. }), "{error}");
    assert!(error.to_string().contains("the test store"), "{error}");

    publish(&bench.store).await;
    bench.store.fail(Fault::ListBreaks { objects: 3, times: usize::MAX });
    let error = bench.checkpoints.choose(window(330)).await.unwrap_err();
    assert!(matches!(error, ChooseError::Store(StoreError::List { .. })), "{error}");

    bench.store.fail(Fault::ListBreaks { objects: 3, times: 2 });
    assert_eq!(bench.checkpoints.choose(window(330)).await.unwrap().checkpoint, WINDOW);

    bench.store.fail(Fault::Denied);
    let error = bench.checkpoints.choose(window(330)).await.unwrap_err();
    assert!(matches!(error, ChooseError::Store(StoreError::Denied { .. })), "{error}");
    let error = bench.checkpoints.published(WINDOW).await.unwrap_err();
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
}

#[tokio::test]
async fn a_checkpoint_is_not_used_in_the_window_in_which_it_became_ready() {
    let bench = Bench::published().await;
    assert!(matches!(bench.checkpoints.choose(window(300)).await, Err(ChooseError::NoneReady { objects: 6, .. })));
}

#[tokio::test]
async fn an_installed_checkpoint_is_used_without_the_store() {
    let bench = Bench::published().await;
    let first = bench.install().await.unwrap();
    let published = bench.checkpoints.published(WINDOW).await.unwrap();
    bench.store.take_requests();
    bench.store.fail(Fault::Denied);
    let second = bench.cache.install(&bench.checkpoints, &published, &Wanted::default()).await.unwrap();
    assert_eq!((second.weights_hash, &second.agreement), (first.weights_hash, &first.agreement));
    assert_eq!((&second.checksums, &second.made_from), (&first.checksums, &MadeFrom::Full));
    assert_eq!(second.checksums["model.norm.weight"], 0x0605 + 1);
    assert!(second.changes.is_none() && second.notices.is_empty());
    assert_eq!(bench.store.take_requests(), []);
}

#[tokio::test]
async fn a_damaged_cached_folder_is_fetched_again() {
    let bench = Bench::published().await;
    let first = bench.install().await.unwrap();
    let file = first.folder.join("config.json");
    let original = std::fs::read(&file).unwrap();
    std::fs::write(&file, b"{}").unwrap();
    assert!(matches!(bench.cache.inspect(WINDOW), Entry::Damaged(_)));
    bench.install().await.unwrap();
    assert_eq!(std::fs::read(&file).unwrap(), original);
}

#[tokio::test]
async fn other_files_under_the_same_window_replace_the_cached_ones() {
    let bench = Bench::published().await;
    let first = bench.install().await.unwrap();
    let folder = model_folder();
    let tensors: [(&str, &[u8]); 1] = [("model.norm.weight", &[9, 9])];
    crate::faulty::write_safetensors(&folder.path().join("model.safetensors"), &tensors);
    publish_full(&bench.checkpoints, WINDOW, folder.path(), &metadata_input(), 300).await.unwrap();
    let second = bench.install().await.unwrap();
    assert_ne!(first.weights_hash, second.weights_hash);
    assert!(matches!(second.notices[..], [Notice::RepublishedTaken { .. }]), "{:?}", second.notices);
    assert!(
        matches!(bench.cache.inspect(WINDOW), Entry::Installed(found) if found.weights_hash == second.weights_hash)
    );
}

#[tokio::test]
async fn a_damaged_object_is_refused_with_its_name_and_both_hashes() {
    let bench = Bench::published().await;
    bench.store.overwrite(&full_key("config.json"), "{}").await;
    let error = bench.install().await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains("config.json") && text.contains("its 2 bytes have sha256 44136fa3"), "{text}");
    bench.assert_nothing_installed();
}

#[tokio::test]
async fn a_truncated_object_is_refused() {
    let bench = Bench::published().await;
    let key = full_key("model.safetensors");
    let body = bench.store.body(&key).await;
    bench.store.overwrite(&key, body.slice(..body.len() - 1)).await;
    let error = bench.install().await.unwrap_err();
    let InstallError::File { source, .. } = &error else { panic!("{error}") };
    assert!(matches!(source.defect, FileDefect::Hash { .. }), "{source}");
    bench.assert_nothing_installed();
}

#[tokio::test]
async fn a_body_that_does_not_come_is_refused_with_both_lengths() {
    let bench = Bench::published().await;
    bench.store.fail(Fault::Cut { key: full_key("config.json"), bytes: 0 });
    let error = bench.install().await.unwrap_err();
    assert!(chain(&error).contains("ended after 0 of 29 bytes"), "{}", chain(&error));
    assert_eq!(error.class(), FailureClass::Unavailable);
    assert!(bench.cache.windows().unwrap().is_empty());
}

#[tokio::test]
async fn a_transfer_that_was_damaged_once_is_repaired() {
    let bench = Bench::published().await;
    bench.store.fail(Fault::DamagedOnce { key: full_key("model.safetensors") });
    assert_eq!(bench.install().await.unwrap().agreement, HashAgreement::Equal);
}

#[tokio::test]
async fn a_store_that_says_nothing_is_given_up() {
    let bench = Bench::published().await;
    bench.store.fail(Fault::Silent { key: full_key("config.json") });
    let published = bench.checkpoints.published(WINDOW).await.unwrap();
    let store = hasty(&bench.store);
    let error = bench.cache.install(&store, &published, &Wanted::default()).await.unwrap_err();
    assert!(matches!(error, InstallError::Fetch { source: StoreError::Stalled { .. }, .. }), "{error}");
    assert!(bench.cache.windows().unwrap().is_empty());
}

#[tokio::test]
async fn a_missing_object_is_named() {
    let bench = Bench::published().await;
    bench.store.remove(&full_key("model.safetensors")).await;
    let error = bench.install().await.unwrap_err();
    assert_eq!(
        chain(&error),
        "the FULL of checkpoint 300 as published is incomplete or damaged: model.safetensors differs from its manifest: the file is missing"
    );
}

#[tokio::test]
async fn missing_and_unreadable_metadata_are_told_apart() {
    let bench = Bench::published().await;
    bench.store.overwrite(&full_key("metadata.json"), "{\"window\": 300,").await;
    let text = chain(&bench.install().await.unwrap_err());
    assert!(text.contains("FULL: the document is no JSON; DELTA: the object does not exist"), "{text}");
    bench.store.remove(&full_key("metadata.json")).await;
    let text = chain(&bench.install().await.unwrap_err());
    assert!(text.contains("FULL: the object does not exist"), "{text}");
    assert!(bench.checkpoints.published(WINDOW).await.unwrap().policy().is_err());
}

#[tokio::test]
async fn metadata_without_files_is_refused() {
    let bench = Bench::published().await;
    bench.edit_metadata(|document| document["file_manifest"] = json!({})).await;
    let error = bench.install().await.unwrap_err();
    assert!(matches!(error, InstallError::Files { source: FilesDefect::EmptyManifest, .. }), "{error}");
}

#[tokio::test]
async fn a_wrong_published_hash_is_accepted_and_reported() {
    let bench = Bench::published().await;
    bench.edit_metadata(|document| document["weights_hash"] = json!("0".repeat(32))).await;
    let installed = bench.install().await.unwrap();
    assert_eq!((installed.agreement, installed.notices), (HashAgreement::Different, vec![Notice::HashDiffers]));
    let Entry::Installed(cached) = bench.cache.inspect(WINDOW) else { panic!("it was just installed") };
    assert_eq!(cached.agreement, HashAgreement::Different);
    bench.cache.remove(WINDOW).await.unwrap();
    bench.edit_metadata(|document| document["weights_hash"] = Value::Null).await;
    let installed = bench.install().await.unwrap();
    assert_eq!((installed.agreement, installed.notices), (HashAgreement::NotPublished, vec![Notice::HashNotPublished]));
}

#[tokio::test]
async fn stale_entries_of_a_retried_upload_are_not_required() {
    let bench = Bench::published().await;
    bench
        .edit_metadata(|document| {
            document["file_manifest"]["metadata.json"] = json!("0".repeat(64));
            document["file_manifest"]["manifest.sig"] = json!("0".repeat(64));
        })
        .await;
    bench.install().await.unwrap();
}

#[tokio::test]
async fn a_compressed_twin_wins_over_the_plain_object() {
    let bench = Bench::published().await;
    let key = full_key("config.json");
    let plain = bench.store.body(&key).await;
    let mut twin = GzEncoder::new(Vec::new(), Compression::fast());
    twin.write_all(&plain).unwrap();
    bench.store.overwrite(&format!("{key}.gz"), twin.finish().unwrap()).await;
    bench.store.overwrite(&key, "not read").await;
    let installed = bench.install().await.unwrap();
    assert_eq!(std::fs::read(installed.folder.join("config.json")).unwrap(), plain);

    bench.cache.remove(WINDOW).await.unwrap();
    bench.store.overwrite(&format!("{key}.gz"), "no gzip").await;
    let error = bench.install().await.unwrap_err();
    assert!(matches!(error, InstallError::Fetch { source: StoreError::Gzip { .. }, .. }), "{error}");
}

#[tokio::test]
async fn an_object_above_its_cap_is_refused() {
    let bench = Bench::published().await;
    let mut limits = bench.checkpoints.limits().clone();
    limits.other_bytes = 28;
    let store = CheckpointStore::with_limits(bench.store.clone(), limits);
    let published = bench.checkpoints.published(WINDOW).await.unwrap();
    let error = bench.cache.install(&store, &published, &Wanted::default()).await.unwrap_err();
    assert!(matches!(error, InstallError::Fetch { source: StoreError::TooLarge { cap: 28, .. }, .. }), "{error}");
    assert!(store.published(WINDOW).await.unwrap().full.is_err());
}

#[tokio::test]
async fn weights_that_cannot_be_read_are_refused_although_every_hash_is_right() {
    let bench = Bench::empty();
    let folder = model_folder();
    publish_full(&bench.checkpoints, WINDOW, folder.path(), &metadata_input(), 300).await.unwrap();
    let bad = b"\x05\0\0\0\0\0\0\0nope!".as_slice();
    bench.store.overwrite(&full_key("model.safetensors"), bad).await;
    let (_, digest) = {
        std::fs::write(folder.path().join("model.safetensors"), bad).unwrap();
        grail_checkpoint::manifest::hash_file(&folder.path().join("model.safetensors")).unwrap()
    };
    bench.edit_metadata(|document| document["file_manifest"]["model.safetensors"] = json!(digest.to_string())).await;
    let error = bench.install().await.unwrap_err();
    assert!(matches!(error, InstallError::Weights { .. }), "{error}");
    bench.assert_nothing_installed();
}

#[tokio::test]
async fn a_full_disk_is_reported_with_path_and_remedy() {
    let bench = Bench::published().await;
    let target = std::path::Path::new("/dev/full");
    let error = bench.checkpoints.download(&full_key("config.json"), target).await.unwrap_err();
    assert!(matches!(error, StoreError::DiskFull { .. }), "{error}");
    assert_eq!(
        error.to_string(),
        "no space left for /dev/full: free space there or choose another folder (GRAIL_CACHE_DIR, or --state-dir for --local)"
    );
    assert!(InstallError::Fetch { window: CheckpointWindow(1), source: error }.is_disk_full());
}
