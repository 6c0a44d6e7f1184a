//! What the cache says about itself, and what leaves it.

use std::collections::BTreeSet;
use std::fs::{File, FileTimes};
use std::time::{Duration, SystemTime};

use crate::trainer::Trainer;
use grail_checkpoint::cache::Damage;
use grail_checkpoint::layout::METADATA_FILE;
use grail_checkpoint::{CheckpointCache, HashAgreement, MadeFrom, RetentionLimits};
use grail_protocol::ids::CheckpointWindow;

const NO_LIMITS: RetentionLimits = RetentionLimits { checkpoints: usize::MAX, bytes: u64::MAX, max_age: None };

async fn filled() -> Trainer {
    let trainer = Trainer::chain([330, 360, 390]).await;
    for window in [300, 330, 360, 390] {
        trainer.install(window).await.unwrap();
    }
    trainer
}

fn set(windows: &[u64]) -> BTreeSet<CheckpointWindow> {
    windows.iter().copied().map(CheckpointWindow).collect()
}

async fn prune(trainer: &Trainer, in_use: &[u64], limits: RetentionLimits) -> Vec<u64> {
    let pruned = trainer.cache.prune(&set(in_use), &limits).await.unwrap();
    assert!(pruned.iter().all(|pruned| pruned.bytes > 12_000));
    pruned.into_iter().map(|pruned| pruned.window.0).collect()
}

#[tokio::test]
async fn the_list_says_what_each_folder_is() {
    let trainer = filled().await;
    let list = trainer.cache.list().unwrap();
    assert_eq!(list.iter().map(|summary| summary.window.0).collect::<Vec<_>>(), [300, 330, 360, 390]);
    for summary in &list {
        let contents = summary.contents.as_ref().unwrap();
        assert_eq!(contents.weights_hash, Some(trainer.hash(summary.window.0)));
        assert_eq!(contents.agreement, Some(HashAgreement::Equal));
        assert_eq!(
            contents.made_from.base().map(|base| base.0),
            summary.window.0.checked_sub(30).filter(|base| *base >= 300)
        );
        assert!(summary.bytes > 12_000 && summary.age < Duration::from_secs(3600) && !summary.held);
    }
    assert_eq!(list[0].contents.as_ref().unwrap().made_from, MadeFrom::Full);
}

#[tokio::test]
async fn the_list_shows_damage_that_needs_no_hashing() {
    let trainer = filled().await;
    let folder = |window| trainer.cache.folder(CheckpointWindow(window));
    std::fs::remove_file(folder(300).join("tokenizer.json")).unwrap();
    std::fs::write(folder(330).join("model.safetensors"), "short").unwrap();
    std::fs::write(folder(360).join(METADATA_FILE), "{").unwrap();
    let damages: Vec<_> = trainer.cache.list().unwrap().into_iter().map(|summary| summary.contents.err()).collect();
    let [Some(files), Some(weights), Some(document), None] = &damages[..] else { panic!("{damages:?}") };
    assert!(matches!(files, Damage::Folder(_)), "{files}");
    assert!(matches!(weights, Damage::Weights(_)), "{weights}");
    assert!(matches!(document, Damage::Metadata(_)), "{document}");
}

#[tokio::test]
async fn the_oldest_go_until_the_limits_are_kept() {
    let trainer = filled().await;
    assert_eq!(prune(&trainer, &[], NO_LIMITS).await, [0; 0]);
    assert_eq!(prune(&trainer, &[300], RetentionLimits { checkpoints: 3, ..NO_LIMITS }).await, [330]);
    let largest = trainer.cache.list().unwrap().iter().map(|summary| summary.bytes).max().unwrap();
    assert_eq!(prune(&trainer, &[], RetentionLimits { bytes: 2 * largest, ..NO_LIMITS }).await, [300]);
    assert_eq!(trainer.windows(), [360, 390]);
    // What is left does not need what has gone.
    trainer.delta(420, 390).await;
    trainer.assert_has(&trainer.install(420).await.unwrap(), 420);
}

#[tokio::test]
async fn the_old_go_whatever_room_there_is() {
    let trainer = filled().await;
    let yesterday = FileTimes::new().set_modified(SystemTime::now() - Duration::from_secs(86_400));
    for window in [330, 360] {
        let document = trainer.cache.folder(CheckpointWindow(window)).join(METADATA_FILE);
        File::options().append(true).open(document).unwrap().set_times(yesterday).unwrap();
    }
    let limits = RetentionLimits { max_age: Some(Duration::from_secs(3600)), ..NO_LIMITS };
    assert_eq!(prune(&trainer, &[360], limits).await, [330]);
}

#[tokio::test]
async fn what_another_process_holds_stays() {
    let trainer = filled().await;
    // Another handle on the same root is to the locks what another process is.
    let other = CheckpointCache::open(trainer.cache.root()).unwrap();
    let hold = other.hold(CheckpointWindow(330)).await.unwrap().unwrap();
    assert!(other.hold(CheckpointWindow(990)).await.unwrap().is_none());
    assert_eq!(trainer.cache.list().unwrap().iter().filter(|summary| summary.held).count(), 1);
    let nothing = RetentionLimits { checkpoints: 0, ..NO_LIMITS };
    assert_eq!(prune(&trainer, &[], nothing).await, [300, 360, 390]);
    drop(hold);
    assert_eq!(prune(&trainer, &[], nothing).await, [330]);
    assert_eq!(trainer.names(), [""; 0]);
}
