//! Ways by deltas: which one is taken, what happens where one breaks, and what is never accepted.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use crate::faulty::Fault;
use crate::trainer::{Trainer, delta_key, full_key};
use grail_checkpoint::cache::Entry;
use grail_checkpoint::layout::{Tree, parse_object_key};
use grail_checkpoint::{
    ChainError, FailureClass, HashAgreement, InstallError, MadeFrom, Notice, Progress, ProgressFn, Wanted,
};
use grail_protocol::ids::CheckpointWindow;
use serde_json::{Value, json};

const PAYLOAD: &str = "delta_sparse.bin.zst";
const WEIGHTS: &str = "model.safetensors";

fn windows(windows: &[u64]) -> Vec<CheckpointWindow> {
    windows.iter().copied().map(CheckpointWindow).collect()
}

fn deltas(base: u64, deltas: &[u64]) -> MadeFrom {
    MadeFrom::Deltas { base: CheckpointWindow(base), deltas: windows(deltas) }
}

fn prefer(window: u64) -> Wanted {
    Wanted { prefer_base: Some(CheckpointWindow(window)), ..Wanted::default() }
}

/// The trees of which something was fetched since the last call, metadata aside.
fn fetched(trainer: &Trainer) -> BTreeSet<(u64, Tree)> {
    let keys = trainer.store.take_keys().into_iter().filter(|key| !key.ends_with("metadata.json"));
    keys.map(|key| parse_object_key(&key).unwrap()).map(|object| (object.window.0, object.tree)).collect()
}

#[tokio::test]
async fn from_nothing_the_nearest_full_tree_is_fetched_with_the_deltas_since() {
    let trainer = Trainer::chain([330, 360, 390]).await;
    trainer.full(360).await;
    let installed = trainer.install(390).await.unwrap();
    trainer.assert_has(&installed, 390);
    assert_eq!(installed.made_from, deltas(360, &[390]));
    assert_eq!(installed.metadata.model_name.as_deref(), Some("demo/tiny"));
    assert_eq!(installed.metadata.window, CheckpointWindow(390));
    let changes = installed.changes.unwrap();
    assert_eq!((changes.base_window, changes.base), (CheckpointWindow(360), trainer.hash(360)));
    assert_eq!((changes.changed, changes.elements), (1, 6000 + 32));
    // The base is a checkpoint of its own, and nothing else stays.
    assert_eq!(trainer.names(), ["checkpoint-360", "checkpoint-390"]);
}

#[tokio::test]
async fn from_the_checkpoint_before_only_a_delta_is_fetched() {
    let trainer = Trainer::chain([330]).await;
    trainer.install(300).await.unwrap();
    trainer.full(330).await;
    fetched(&trainer);
    let installed = trainer.install_wanted(330, &prefer(300)).await.unwrap();
    trainer.assert_has(&installed, 330);
    assert_eq!(fetched(&trainer), BTreeSet::from([(330, Tree::Delta)]));
    assert_eq!(installed.made_from, deltas(300, &[330]));
}

#[tokio::test]
async fn the_nearest_cached_checkpoint_is_the_base_unless_another_one_is_in_use() {
    let trainer = Trainer::chain([330, 360, 390]).await;
    for window in [300, 330, 360] {
        trainer.install(window).await.unwrap();
    }
    let nearest = trainer.install(390).await.unwrap();
    assert_eq!(nearest.made_from, deltas(360, &[390]));
    trainer.cache.remove(CheckpointWindow(390)).await.unwrap();
    let in_use = trainer.install_wanted(390, &prefer(330)).await.unwrap();
    assert_eq!(in_use.made_from, deltas(330, &[360, 390]));
    assert_eq!(in_use.changes.as_ref().unwrap().base, trainer.hash(330));
    trainer.assert_has(&in_use, 390);
    // One that is not on the way, or gone, changes nothing.
    trainer.cache.remove(CheckpointWindow(390)).await.unwrap();
    assert_eq!(trainer.install_wanted(390, &prefer(240)).await.unwrap().made_from, deltas(360, &[390]));
}

#[tokio::test]
async fn a_cached_checkpoint_further_back_is_cheaper_than_a_full_tree() {
    let trainer = Trainer::chain([330, 360, 390]).await;
    trainer.install(300).await.unwrap();
    trainer.full(360).await;
    trainer.full(390).await;
    assert_eq!(trainer.install(390).await.unwrap().made_from, deltas(300, &[330, 360, 390]));
}

#[tokio::test]
async fn no_shard_or_index_of_the_base_is_carried_along() {
    let trainer = Trainer::new();
    let folder = trainer.version(300);
    std::fs::rename(folder.join(WEIGHTS), folder.join("model-00001-of-00001.safetensors")).unwrap();
    let tensors = ["a.weight", "b.weight"].map(|name| (name.to_owned(), json!("model-00001-of-00001.safetensors")));
    let index = json!({"metadata": {}, "weight_map": Value::Object(tensors.into_iter().collect())});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    trainer.full(300).await;
    trainer.delta(330, 300).await;
    trainer.delta(360, 330).await;
    let expected = ["changes", "config.json", "metadata.json", WEIGHTS, "tokenizer.json"];
    for window in [330, 360] {
        let installed = trainer.install(window).await.unwrap();
        trainer.assert_has(&installed, window);
        let entries = std::fs::read_dir(&installed.folder).unwrap();
        let names: BTreeSet<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(names, BTreeSet::from(expected.map(str::to_owned)));
        let changes: Vec<_> = std::fs::read_dir(installed.folder.join("changes")).unwrap().collect();
        assert_eq!(changes.len(), 1, "{window}");
    }
}

#[tokio::test]
async fn a_damaged_delta_leads_to_the_full_tree_and_is_fetched_twice() {
    let trainer = Trainer::chain([330]).await;
    trainer.full(330).await;
    trainer.install(300).await.unwrap();
    trainer.damage(&delta_key(330, PAYLOAD)).await;
    trainer.store.take_requests();
    let installed = trainer.install(330).await.unwrap();
    trainer.assert_has(&installed, 330);
    assert_eq!(installed.made_from, MadeFrom::Full);
    let requests = trainer.store.take_requests();
    assert_eq!(requests.iter().filter(|request| request.key == delta_key(330, PAYLOAD)).count(), 2);
}

#[tokio::test]
async fn a_damaged_full_tree_leads_to_the_delta() {
    let trainer = Trainer::chain([330]).await;
    trainer.full(330).await;
    // From nothing the full tree costs less than another one and a delta.
    trainer.damage(&full_key(330, WEIGHTS)).await;
    let installed = trainer.install(330).await.unwrap();
    trainer.assert_has(&installed, 330);
    assert_eq!(installed.made_from, deltas(300, &[330]));
    assert_eq!(trainer.names(), ["checkpoint-300", "checkpoint-330"]);
}

#[tokio::test]
async fn an_incomplete_full_tree_is_not_begun() {
    let trainer = Trainer::chain([330, 360]).await;
    trainer.full(330).await;
    trainer.full(360).await;
    for window in [330, 360] {
        trainer.store.remove(&full_key(window, WEIGHTS)).await;
    }
    let installed = trainer.install(360).await.unwrap();
    assert_eq!(installed.made_from, deltas(300, &[330, 360]));
    assert!(!fetched(&trainer).contains(&(330, Tree::Full)));
}

#[tokio::test]
async fn a_damaged_cached_base_is_noticed_and_left_out() {
    for file in [WEIGHTS, "tokenizer.json", "metadata.json"] {
        let trainer = Trainer::chain([330]).await;
        let base = trainer.install(300).await.unwrap();
        let mut bytes = std::fs::read(base.folder.join(file)).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(base.folder.join(file), bytes).unwrap();
        let installed = trainer.install(330).await.unwrap();
        trainer.assert_has(&installed, 330);
        // The base was fetched again and is sound now.
        assert!(matches!(trainer.cache.inspect(CheckpointWindow(300)), Entry::Installed(_)), "{file}");
        assert!(matches!(trainer.cache.inspect(CheckpointWindow(330)), Entry::Installed(_)), "{file}");
    }
}

#[tokio::test]
async fn a_hole_ends_the_chain() {
    let trainer = Trainer::chain([330, 360]).await;
    trainer.store.remove(&delta_key(330, "metadata.json")).await;
    let error = trainer.install(360).await.unwrap_err();
    let InstallError::Chain { source: ChainError::Hole { missing, needed_by, .. }, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!((missing.0, needed_by.0, error.class()), (330, 360, FailureClass::ChainBroken));
    assert_eq!(trainer.names(), [""; 0]);
    // What is in the cache bridges it.
    trainer.full(330).await;
    trainer.install(330).await.unwrap();
    for name in ["metadata.json", WEIGHTS] {
        trainer.store.remove(&full_key(330, name)).await;
    }
    trainer.assert_has(&trainer.install(360).await.unwrap(), 360);
}

#[tokio::test]
async fn a_link_without_its_payload_is_a_hole_too() {
    let trainer = Trainer::chain([330, 360]).await;
    trainer.store.remove(&delta_key(330, PAYLOAD)).await;
    let error = trainer.install(360).await.unwrap_err();
    assert_eq!(error.class(), FailureClass::MissingFile, "{error}");
    // A marker without files is no checkpoint.
    let empty = trainer.install(420).await.unwrap_err();
    assert_eq!(empty.class(), FailureClass::NoMetadata, "{empty}");
}

#[tokio::test]
async fn a_chain_that_does_not_go_down_is_not_followed() {
    let trainer = Trainer::chain([330, 360]).await;
    for window in [360, 390, 330] {
        trainer.edit(330, Tree::Delta, |document| document["prev_window"] = json!(window)).await;
        let error = trainer.install(360).await.unwrap_err();
        assert_eq!(error.class(), FailureClass::ChainInvalid, "{error}");
    }
}

#[tokio::test]
async fn a_chain_has_at_most_64_deltas() {
    let steps = |count: u64| (1..=count).map(|step| 300 + 30 * step);
    let trainer = Trainer::chain(steps(65)).await;
    let longest = 300 + 30 * 64;
    let error = trainer.install(longest + 30).await.unwrap_err();
    assert_eq!(error.class(), FailureClass::ChainTooLong, "{error}");
    let installed = trainer.install(longest).await.unwrap();
    trainer.assert_has(&installed, longest);
    assert_eq!(installed.made_from, deltas(300, &steps(64).collect::<Vec<_>>()));
}

#[tokio::test]
async fn other_weights_than_published_are_refused_and_leave_nothing() {
    let trainer = Trainer::chain([330]).await;
    trainer.install(300).await.unwrap();
    trainer.edit(330, Tree::Delta, |document| document["weights_hash"] = json!("0".repeat(32))).await;
    fetched(&trainer);
    let error = trainer.install(330).await.unwrap_err();
    assert_eq!(error.class(), FailureClass::HashMismatch, "{error}");
    assert_eq!(trainer.names(), ["checkpoint-300"]);
    // The cached base was found sound, so fetching it again would change nothing.
    assert_eq!(fetched(&trainer), BTreeSet::from([(330, Tree::Delta)]));
    // A full tree of the same checkpoint helps.
    trainer.full(330).await;
    let installed = trainer.install(330).await.unwrap();
    assert_eq!((installed.made_from, installed.agreement), (MadeFrom::Full, HashAgreement::Equal));
}

#[tokio::test]
async fn wrong_hashes_in_the_middle_do_not_matter() {
    let trainer = Trainer::chain([330, 360]).await;
    trainer.edit(330, Tree::Delta, |document| document["weights_hash"] = json!("0".repeat(32))).await;
    let installed = trainer.install(360).await.unwrap();
    trainer.assert_has(&installed, 360);
    assert_eq!(installed.notices, []);
}

#[tokio::test]
async fn a_full_tree_that_its_hash_denies_gives_way_to_a_delta_that_its_hash_confirms() {
    let trainer = Trainer::chain([330]).await;
    trainer.full(330).await;
    trainer.edit(330, Tree::Full, |document| document["weights_hash"] = json!("0".repeat(32))).await;
    let installed = trainer.install(330).await.unwrap();
    assert_eq!((&installed.made_from, &installed.agreement), (&deltas(300, &[330]), &HashAgreement::Equal));
    assert_eq!(installed.notices, []);

    let other = Trainer::chain([330]).await;
    other.full(330).await;
    for tree in [Tree::Full, Tree::Delta] {
        other.edit(330, tree, |document| document["weights_hash"] = json!("0".repeat(32))).await;
    }
    let installed = other.install(330).await.unwrap();
    other.assert_has(&installed, 330);
    assert_eq!((installed.made_from, installed.agreement), (MadeFrom::Full, HashAgreement::Different));
    assert_eq!(installed.notices, [Notice::HashDiffers]);
    assert_eq!(other.names(), ["checkpoint-300", "checkpoint-330"]);
}

#[tokio::test]
async fn a_delta_without_a_hash_is_used_where_nothing_better_is_published() {
    let trainer = Trainer::chain([330]).await;
    trainer.edit(330, Tree::Delta, |document| document["weights_hash"] = Value::Null).await;
    let installed = trainer.install(330).await.unwrap();
    trainer.assert_has(&installed, 330);
    assert_eq!(installed.agreement, HashAgreement::NotPublished);
    assert_eq!(installed.notices, [Notice::HashNotPublished]);

    trainer.cache.remove(CheckpointWindow(330)).await.unwrap();
    trainer.full(330).await;
    let installed = trainer.install(330).await.unwrap();
    assert_eq!((installed.made_from, installed.agreement), (MadeFrom::Full, HashAgreement::Equal));
}

#[tokio::test]
async fn a_delta_that_cannot_be_decoded_has_the_class_of_its_defect() {
    let trainer = Trainer::chain([330]).await;
    trainer.install(300).await.unwrap();
    let name = "delta_metadata.json";
    let mut about: Value = serde_json::from_slice(&trainer.store.body(&delta_key(330, name)).await).unwrap();
    for (format, class) in [("sparse_codec_v2", "Version"), ("sparse_codec_v9", "Format")] {
        about["format"] = json!(format);
        let text = serde_json::to_vec(&about).unwrap();
        let digest = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(&text));
        trainer.store.overwrite(&delta_key(330, name), text).await;
        trainer.edit(330, Tree::Delta, |document| document["file_manifest"][name] = json!(digest)).await;
        let error = trainer.install(330).await.unwrap_err();
        assert_eq!(error.class().as_str(), class, "{error}");
        assert_eq!(trainer.names(), ["checkpoint-300"]);
    }
}

#[tokio::test]
async fn an_object_that_vanishes_is_told_from_one_that_was_never_there() {
    let trainer = Trainer::chain([330]).await;
    trainer.store.fail(Fault::Vanishing { key: delta_key(330, PAYLOAD) });
    let error = trainer.install(330).await.unwrap_err();
    assert_eq!(error.class(), FailureClass::Vanished, "{error}");
    assert!(matches!(error, InstallError::Vanished { .. }), "{error}");
    trainer.store.heal();
    trainer.assert_has(&trainer.install(330).await.unwrap(), 330);
}

#[tokio::test]
async fn a_store_that_is_gone_says_so_for_every_way() {
    let trainer = Trainer::chain([330]).await;
    trainer.full(330).await;
    let published = trainer.checkpoints.published(CheckpointWindow(330)).await.unwrap();
    trainer.store.fail(Fault::Outage { bodies: 0 });
    let wanted = Wanted::default();
    let install = || trainer.cache.install(&trainer.checkpoints, &published, &wanted);
    let error = install().await.unwrap_err();
    assert_eq!(error.class(), FailureClass::Unavailable, "{error}");
    trainer.store.fail(Fault::Denied);
    let error = install().await.unwrap_err();
    assert_eq!(error.class(), FailureClass::Denied, "{error}");
    assert!(trainer.windows().is_empty());
}

#[tokio::test]
async fn what_was_fetched_before_an_outage_is_gone_on_with() {
    let trainer = Trainer::chain([]).await;
    let published = trainer.checkpoints.published(CheckpointWindow(300)).await.unwrap();
    trainer.store.fail(Fault::Outage { bodies: 6 });
    let wanted = Wanted::default();
    let error = trainer.cache.install(&trainer.checkpoints, &published, &wanted).await.unwrap_err();
    assert_eq!(error.class(), FailureClass::Unavailable, "{error}");
    assert_eq!(trainer.names(), ["checkpoint-300.download"]);
    trainer.store.heal();
    trainer.store.take_requests();
    let installed = trainer.cache.install(&trainer.checkpoints, &published, &wanted).await.unwrap();
    trainer.assert_has(&installed, 300);
    // config, tokenizer and 13 ranges, of which six bodies were here.
    assert_eq!(trainer.store.take_requests().len(), 15 - 6);
    assert_eq!(trainer.names(), ["checkpoint-300"]);
}

#[tokio::test]
async fn progress_grows_up_to_the_total() {
    let trainer = Trainer::chain([330]).await;
    trainer.install(300).await.unwrap();
    let seen: Arc<Mutex<Vec<Progress>>> = Arc::default();
    let report = ProgressFn::new({
        let seen = seen.clone();
        move |progress| seen.lock().unwrap().push(progress)
    });
    trainer.install_wanted(330, &Wanted { progress: Some(report), ..Wanted::default() }).await.unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.iter().all(|progress| progress.window == CheckpointWindow(330)));
    let last = seen.iter().max_by_key(|progress| progress.received).unwrap();
    assert!(last.total > 0);
    assert_eq!(last.received, last.total);
    assert!(seen.iter().all(|progress| progress.total == last.total));
}

#[tokio::test]
async fn another_version_under_the_same_window_replaces_the_first_unless_that_is_in_use() {
    let trainer = Trainer::chain([330]).await;
    let first = trainer.install(330).await.unwrap();
    // The trainer starts again from 300 and comes to other weights.
    trainer.delta_of(390, 330, 300).await;

    let in_use = Wanted { in_use: true, ..Wanted::default() };
    let kept = trainer.install_wanted(330, &in_use).await.unwrap();
    assert_eq!(kept.weights_hash, first.weights_hash);
    assert!(matches!(kept.notices[..], [Notice::RepublishedKept { .. }]), "{:?}", kept.notices);

    let held = trainer.cache.hold(CheckpointWindow(330)).await.unwrap().unwrap();
    let kept = trainer.install(330).await.unwrap();
    assert_eq!(kept.weights_hash, first.weights_hash);
    drop(held);

    let taken = trainer.install(330).await.unwrap();
    assert_eq!(taken.weights_hash, trainer.hash(390));
    assert!(matches!(taken.notices[..], [Notice::RepublishedTaken { .. }]), "{:?}", taken.notices);
    assert_eq!(trainer.install(330).await.unwrap().notices, []);
}
