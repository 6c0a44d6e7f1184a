//! What the trainer's store, the local disk and a kill do to a roll, in whole windows with the real binaries: a window is mined with
//! the checkpoint that the rule demands of it, or skipped with the reason in the journal, and the next one is mined.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, also in its helpers")]

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use grail_checkpoint::Tree;
use grail_protocol::ids::CheckpointWindow;
use grail_tests::processes::strike;
use grail_tests::small_disk::SmallDisk;
use grail_tests::trainer::{BEFORE, DURING, FIRST, Trainer, finish, uploaded_with};
use grail_tests::waiting::wait_until;
use grail_tests::world::World;
use nix::sys::signal::Signal;
use serde_json::Value;

/// Few groups: a window that begins late still has time for them.
const FEW: [&str; 3] = ["--no-trainer", "--max-groups", "2"];

fn mining(windows: &'static str) -> [&'static str; 5] {
    [FEW[0], FEW[1], FEW[2], "--windows", windows]
}

/// The windows that were skipped and why; of none of them was a group made.
fn skipped(world: &World) -> Vec<(u64, String)> {
    let spooled = world.of_kind("group_spooled");
    let reason = |event: &Value| {
        let (window, reason) = (event["window"].as_u64().unwrap(), event["reason"].as_str().unwrap().to_owned());
        assert!(spooled.iter().all(|group| group["window"] != window), "{spooled:#?}");
        (window, reason)
    };
    world.of_kind("window_skipped").iter().map(reason).collect()
}

/// The windows that were uploaded.
fn uploaded(world: &World) -> Vec<u64> {
    world.of_kind("window_uploaded").iter().map(|event| event["window"].as_u64().unwrap()).collect()
}

/// Where a file lies in the cache of a world while it is fetched.
fn download(world: &World, window: CheckpointWindow, tree: Tree, name: &str) -> PathBuf {
    world.state.join(format!("checkpoints/checkpoint-{window}.download/{tree}/{name}"))
}

/// Waits until a file is fetched, while another one of its tree is held back.
fn wait_for_download(trainer: &Trainer, fetched: &std::path::Path, window: CheckpointWindow, tree: Tree) {
    let bytes = std::fs::metadata(trainer.object(window, tree, fetched.file_name().unwrap().to_str().unwrap()));
    let bytes = bytes.unwrap().len();
    wait_until("a file is fetched", || std::fs::metadata(fetched).is_ok_and(|file| file.len() == bytes));
}

#[test]
fn what_the_trainer_damaged_skips_its_windows_and_no_other() {
    let world = World::with_short_windows();
    let trainer = Trainer::of(&world);
    // For window 3000: a chain with a hole.
    trainer.delta(CheckpointWindow(BEFORE), CheckpointWindow(2_880), BEFORE);
    // For window 3030: an object that ends in its middle.
    let cut = CheckpointWindow(DURING);
    trainer.full(cut, &trainer.demo.first, DURING);
    trainer.truncate(cut, Tree::Full, "model.safetensors");
    // For window 3060: weights that are not those whose hash is published.
    trainer.full(FIRST, &trainer.demo.first, FIRST.0);
    let (wrong, nothing) = (CheckpointWindow(3_030), "0".repeat(32));
    trainer.delta(wrong, FIRST, wrong.0);
    trainer.edit(wrong, Tree::Delta, |document| document["weights_hash"] = nothing.clone().into());
    // For window 3090: one that is whole.
    let whole = CheckpointWindow(3_060);
    trainer.full(whole, &trainer.demo.second, whole.0);

    let run = world.mine(&mining("1"));
    finish(&world, run);
    let skipped = skipped(&world);
    assert_eq!(skipped.iter().map(|(window, _)| *window).collect::<Vec<_>>(), [3_000, 3_030, 3_060]);
    let reasons = [
        vec!["checkpoint 2880, on which 2970 rests, is neither in the cache nor in the store"],
        vec!["the FULL of checkpoint 3000 as published is incomplete or damaged", "model.safetensors", "sha256"],
        vec!["the deltas to checkpoint 3030 result in weights", &nothing],
    ];
    for ((window, reason), expected) in skipped.iter().zip(reasons) {
        assert!(expected.iter().all(|part| reason.contains(part)), "window {window}: {reason}");
    }
    assert_eq!((uploaded(&world), uploaded_with(&world)), (vec![3_090], vec![BTreeSet::from([whole.0])]));
}

#[test]
fn a_store_that_fails_for_a_while_costs_no_window_and_one_that_is_gone_costs_those_without_it() {
    let world = World::with_short_windows();
    let trainer = Trainer::of(&world);
    trainer.first();
    let run = world.mine(&mining("3"));
    wait_until("the first window is mined", || world.count("window_started") == 1);

    // The answer for the first window is known; that of the second one is asked for again and again until it comes.
    let broken = trainer.break_listings();
    wait_until("the first window is uploaded", || world.count("window_uploaded") == 1);
    world.wait_for_block(3_031);
    broken.heal();
    wait_until("the second window is mined", || world.count("window_started") == 2);

    // The bucket goes while the third window's checkpoint is fetched.
    let next = CheckpointWindow(3_030);
    trainer.delta(next, FIRST, None);
    let held_back = trainer.hold_back(next, Tree::Delta, "delta_metadata.json");
    trainer.ready(next, next.0);
    let payload = download(&world, next, Tree::Delta, "delta_sparse.bin.zst");
    wait_for_download(&trainer, &payload, next, Tree::Delta);
    let gone = trainer.take_bucket_away();
    gone.answer(held_back);
    wait_until("a window is skipped", || world.count("window_skipped") == 1);
    gone.bring_back();
    finish(&world, run);

    let skipped = skipped(&world);
    assert_eq!(skipped.iter().map(|(window, _)| *window).collect::<Vec<_>>(), [3_060]);
    assert!(skipped[0].1.contains("holds no checkpoint that was ready before window 3060"), "{skipped:?}");
    assert_eq!(uploaded(&world), [3_000, 3_030, 3_090]);
    assert_eq!(uploaded_with(&world), [FIRST.0, FIRST.0, next.0].map(|checkpoint| BTreeSet::from([checkpoint])));
}

#[test]
fn a_supervisor_killed_while_it_installs_goes_on_where_it_was() {
    let world = World::in_a_window();
    let trainer = Trainer::of(&world);
    trainer.first();
    let held_back = trainer.hold_back(FIRST, Tree::Full, "tokenizer.json");
    let run = world.mine(&FEW);
    let weights = download(&world, FIRST, Tree::Full, "model.safetensors");
    wait_for_download(&trainer, &weights, FIRST, Tree::Full);
    let fetched = std::fs::metadata(&weights).unwrap().ino();
    strike(run.pid(), Signal::SIGKILL);
    assert_eq!(run.wait().code, None);
    world.wait_for_the_end_of_all();
    assert!(!world.state.join("checkpoints/checkpoint-2940").exists(), "nothing half done has a name");

    held_back.heal();
    let run = world.mine(&mining("1"));
    finish(&world, run);
    assert_eq!(uploaded_with(&world), [BTreeSet::from([FIRST.0])]);
    let installed = world.state.join("checkpoints/checkpoint-2940/model.safetensors");
    assert_eq!(std::fs::metadata(installed).unwrap().ino(), fetched, "the weights were not fetched again");
    assert_eq!(skipped(&world), []);
}

#[test]
fn a_disk_without_room_for_a_roll_skips_windows_until_there_is_room() {
    let world = World::with_short_windows();
    let trainer = Trainer::of(&world);
    trainer.first();
    let cache = world.state.join("checkpoints");
    std::fs::create_dir(&cache).unwrap();
    let weights = std::fs::metadata(trainer.object(FIRST, Tree::Full, "model.safetensors")).unwrap().len();
    let Some(disk) = SmallDisk::mount_sized(&cache, weights * 3 / 2) else {
        println!("skipped: a tmpfs cannot be mounted here (not permitted)");
        return;
    };
    let run = world.mine(&mining("2"));
    wait_until("the first window is mined", || world.count("window_started") == 1);
    let next = CheckpointWindow(DURING);
    trainer.delta(next, FIRST, DURING);
    wait_until("a window is skipped", || world.count("window_skipped") == 1);
    disk.resize(weights * 4);
    finish(&world, run);

    let skipped = skipped(&world);
    assert_eq!(skipped.iter().map(|(window, _)| *window).collect::<Vec<_>>(), [3_030]);
    let reason = &skipped[0].1;
    assert!(reason.contains("checkpoint 3000 takes") && reason.contains("free space there"), "{reason}");
    assert_eq!(uploaded(&world), [3_000, 3_060]);
    assert_eq!(uploaded_with(&world), [BTreeSet::from([FIRST.0]), BTreeSet::from([next.0])]);
}
