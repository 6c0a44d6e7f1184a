//! Rolls from checkpoint to checkpoint with the real binaries, and what may go wrong with them. The test is the trainer.

use std::collections::BTreeSet;

use grail_checkpoint::Tree;
use grail_protocol::ids::CheckpointWindow;
use grail_tests::processes;
use grail_tests::trainer::{BEFORE, DURING, FIRST, Trainer, finish, uploaded_with};
use grail_tests::waiting::wait_until;
use grail_tests::world::World;
use nix::sys::signal::Signal;
use serde_json::Value;

#[test]
fn a_server_that_keeps_old_weights_is_found_before_any_group_is_spooled() {
    let world = World::with_short_windows().with("GRAIL_FAULT", "stale@update");
    let run = world.mine(&["--windows", "2", "--max-groups", "4"]);
    finish(&world, run);
    let refuted = world.of_kind("server_refuted");
    assert_eq!(refuted.len(), 1, "{:#?}", world.events());
    let active = world.of_kind("checkpoint_active");
    assert_eq!(refuted[0]["weights"], active[1]["weights"], "the update was not believed");
    let events = world.events();
    let place = |holds: &dyn Fn(&Value) -> bool| events.iter().position(holds).unwrap();
    let found = place(&|event| event["kind"] == "server_refuted");
    let spooled = place(&|event| event["kind"] == "group_spooled" && event["window"] == 3_030);
    assert!(found < spooled, "no group was drawn from old weights: {events:#?}");
    assert_ne!(active[0]["weights"], active[1]["weights"]);
    assert_eq!(uploaded_with(&world), [BTreeSet::from([FIRST.0]), BTreeSet::from([3_000])]);
}

#[test]
fn a_late_marker_begins_the_window_anew() {
    let world = World::in_a_window();
    let trainer = Trainer::of(&world);
    trainer.first();
    let run = world.mine(&["--no-trainer", "--max-groups", "300"]);
    world.wait_for_groups(2);
    // READY with the same number, seen late: of two the later checkpoint counts.
    trainer.full(CheckpointWindow(BEFORE), &trainer.demo.second, BEFORE);
    wait_until("the window begins anew", || world.count("window_restarted") == 1);
    let restarted = world.of_kind("window_restarted").remove(0);
    assert_eq!(restarted["checkpoint"], BEFORE);
    assert!(restarted["groups"].as_u64().unwrap() >= 2, "{restarted}");
    world.wait_for_more_groups(2);
    assert_eq!(world.ask_json(&["stop"])["gone"], true);
    finish(&world, run);
    assert_eq!(uploaded_with(&world), [BTreeSet::from([BEFORE])], "no rollout of the other checkpoint is in the file");
    assert!(world.state.join("spool/window-3000.aside").is_file(), "what was made before is kept for inspection");
}

#[test]
fn a_file_that_is_in_the_store_when_a_late_marker_appears_is_taken_back_and_mined_anew() {
    let world = World::in_a_window();
    let trainer = Trainer::of(&world);
    trainer.first();
    let run = world.mine(&["--no-trainer", "--max-groups", "2"]);
    wait_until("the window is in the store", || world.count("window_uploaded") == 1);
    trainer.full(CheckpointWindow(BEFORE), &trainer.demo.second, BEFORE);
    wait_until("its file is taken back", || world.count("window_withdrawn") == 1);
    wait_until("the window is in the store once more", || world.count("window_uploaded") == 2);
    assert_eq!(world.ask_json(&["stop"])["gone"], true);
    finish(&world, run);
    let uploads = world.of_kind("window_uploaded");
    assert!(uploads.iter().all(|upload| upload["key"] == uploads[0]["key"]), "{uploads:#?}");
    let held = uploaded_with(&world).pop();
    assert_eq!(held, Some(BTreeSet::from([BEFORE])), "no rollout of the other checkpoint is in the file");
    assert!(world.state.join("spool/window-3000.aside").is_file(), "what was made before is kept for inspection");
    assert!(world.state.join("spool/window-3000.sent").is_file());
}

#[test]
fn a_file_of_an_earlier_life_is_taken_back_too() {
    let world = World::in_a_window();
    let trainer = Trainer::of(&world);
    trainer.first();
    let options = ["--no-trainer", "--max-groups", "2"];
    let run = world.mine(&options);
    wait_until("the window is in the store", || world.count("window_uploaded") == 1);
    processes::strike(run.pid(), Signal::SIGKILL);
    assert_eq!(run.wait().code, None);
    world.wait_for_the_end_of_all();
    trainer.full(CheckpointWindow(BEFORE), &trainer.demo.second, BEFORE);
    let run = world.mine(&options);
    wait_until("its file is taken back", || world.count("window_withdrawn") == 1);
    wait_until("the window is in the store once more", || world.count("window_uploaded") == 2);
    assert_eq!(world.ask_json(&["stop"])["gone"], true);
    finish(&world, run);
    assert_eq!(uploaded_with(&world).pop(), Some(BTreeSet::from([BEFORE])));
}

#[test]
fn what_a_crash_left_goes_out_although_the_trainers_store_does_not_answer() {
    let world = World::in_a_window();
    let trainer = Trainer::of(&world);
    trainer.first();
    let options = ["--no-trainer", "--max-groups", "300"];
    let run = world.mine(&options);
    world.wait_for_groups(2);
    processes::strike(run.pid(), Signal::SIGKILL);
    assert_eq!(run.wait().code, None);
    world.wait_for_the_end_of_all();
    let broken = trainer.break_listings();
    let run = world.mine(&options);
    wait_until("the window goes on", || world.count("window_started") == 2);
    let resumed = world.of_kind("window_started").remove(1);
    assert!(resumed["recovered_groups"].as_u64().unwrap() >= 2 && resumed["checkpoint"] == FIRST.0, "{resumed}");
    assert_eq!(world.ask_json(&["stop"])["gone"], true);
    // `verify` asks the store, too.
    broken.heal();
    finish(&world, run);
    assert_eq!(uploaded_with(&world), [BTreeSet::from([FIRST.0])]);
}

#[test]
fn a_damaged_delta_skips_the_window_until_there_is_another_way() {
    let world = World::with_short_windows();
    let trainer = Trainer::of(&world);
    trainer.first();
    let run = world.mine(&["--no-trainer", "--windows", "2", "--max-groups", "4"]);
    wait_until("the first window is mined", || world.count("window_started") == 1);
    let damaged = CheckpointWindow(DURING);
    trainer.delta(damaged, FIRST, DURING);
    let payload = trainer.object(damaged, Tree::Delta, "delta_sparse.bin.zst");
    let mut bytes = std::fs::read(&payload).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&payload, bytes).unwrap();
    // The rule demands the damaged one, so mining on with the old one would void the file.
    wait_until("a window is skipped", || world.count("window_skipped") == 1);
    let skipped = world.of_kind("window_skipped").remove(0);
    assert_eq!(skipped["window"], 3_030);
    let reason = skipped["reason"].as_str().unwrap();
    assert!(reason.contains("delta_sparse.bin.zst"), "{reason}");
    trainer.full(damaged, &trainer.demo.second, DURING);
    finish(&world, run);
    assert_eq!(uploaded_with(&world), [BTreeSet::from([FIRST.0]), BTreeSet::from([DURING])]);
}

#[test]
fn of_two_rolls_in_one_window_the_last_one_counts() {
    let world = World::with_short_windows();
    let trainer = Trainer::of(&world);
    trainer.first();
    let run = world.mine(&["--no-trainer", "--windows", "2", "--max-groups", "4"]);
    wait_until("the first window is mined", || world.count("window_started") == 1);
    let (second, third) = (CheckpointWindow(2_970), CheckpointWindow(DURING));
    trainer.delta(second, FIRST, DURING);
    wait_until("the second checkpoint is here", || world.count("checkpoint_installed") == 1);
    trainer.delta(third, second, DURING);
    finish(&world, run);
    assert_eq!(uploaded_with(&world), [BTreeSet::from([FIRST.0]), BTreeSet::from([third.0])]);
    let started = world.of_kind("window_started");
    assert_eq!(started.last().unwrap()["checkpoint"], third.0, "{started:#?}");
}

#[test]
fn a_marker_without_files_skips_the_window_and_says_why() {
    let world = World::with_short_windows();
    let trainer = Trainer::of(&world);
    trainer.first();
    let run = world.mine(&["--no-trainer", "--windows", "2", "--max-groups", "4"]);
    wait_until("the first window is mined", || world.count("window_started") == 1);
    trainer.ready(CheckpointWindow(DURING), DURING);
    wait_until("a window is skipped", || world.count("window_skipped") == 1);
    let skipped = world.of_kind("window_skipped").remove(0);
    assert_eq!(skipped["window"], 3_030);
    let reason = skipped["reason"].as_str().unwrap();
    assert!(reason.contains("checkpoint 3000 has no readable metadata"), "{reason}");
    // The trainer's next one is whole again.
    trainer.delta(CheckpointWindow(3_030), FIRST, 3_030);
    finish(&world, run);
    assert_eq!(uploaded_with(&world).last().unwrap(), &BTreeSet::from([3_030]));
}

#[test]
fn an_operator_has_the_checkpoint_read_again() {
    let world = World::in_a_window();
    let run = world.mine(&["--max-groups", "300"]);
    world.wait_for_groups(1);
    let before = world.ask_json(&["status"]);
    assert_eq!(world.ask_json(&["reload-checkpoint", "0"])["accepted"], true);
    world.wait_for_more_groups(2);
    assert_eq!(world.ask_json(&["reload-checkpoint"])["slot"], Value::Null);
    wait_until("the server has read it again", || world.count("server_ready") == 2);
    world.wait_for_more_groups(2);
    let refused = world.ask(&["reload-checkpoint", "9"]);
    assert_eq!(refused.code, Some(1), "{refused:#?}");
    assert!(refused.stderr.contains("there is no slot 9"), "{}", refused.stderr);
    let after = world.ask_json(&["status"]);
    for slot in 0..2 {
        assert_eq!(before["slots"][slot]["pid"], after["slots"][slot]["pid"], "no process was replaced");
    }
    assert_eq!(world.ask_json(&["stop"])["gone"], true);
    let log = finish(&world, run);
    assert!(log.matches("Worker has the checkpoint.").count() >= 3, "{log}");
    world.assert_uploaded_whole();
}

#[test]
fn a_worker_that_cannot_read_its_checkpoint_again_proves_on() {
    let world = World::in_a_window();
    let run = world.mine(&["--max-groups", "300"]);
    world.wait_for_groups(1);
    let weights = world.state.join(format!("checkpoints/checkpoint-{FIRST}/model.safetensors"));
    let aside = weights.with_extension("aside");
    std::fs::rename(&weights, &aside).unwrap();
    std::fs::write(&weights, "damaged").unwrap();
    let before = world.ask_json(&["status"]);
    let of_the_slot = || world.of_kind("group_spooled").iter().filter(|group| group["slot"] == 0).count();
    let proved = of_the_slot();
    assert_eq!(world.ask_json(&["reload-checkpoint", "0"])["accepted"], true);
    // More than it may have had before it was told to.
    wait_until("the slot proves on", || of_the_slot() >= proved + 4);
    std::fs::rename(&aside, &weights).unwrap();
    let after = world.ask_json(&["status"]);
    assert_eq!(before["slots"][0]["pid"], after["slots"][0]["pid"], "its process was not replaced");
    assert_eq!(world.ask_json(&["stop"])["gone"], true);
    let log = finish(&world, run);
    assert_eq!(log.matches("A worker cannot read its checkpoint again").count(), 1, "{log}");
    world.assert_uploaded_whole();
}

#[test]
fn a_first_checkpoint_that_does_not_say_how_to_mine_skips_its_windows() {
    let world = World::with_short_windows();
    let trainer = Trainer::of(&world);
    trainer.first();
    trainer.edit(FIRST, Tree::Full, |document| document["generation_params"]["temperature"] = 9.into());
    let run = world.mine(&["--no-trainer", "--windows", "1", "--max-groups", "4"]);
    wait_until("a window is skipped", || world.count("window_skipped") == 1);
    let skipped = world.of_kind("window_skipped").remove(0);
    assert_eq!(skipped["window"], 3_000);
    assert!(skipped["reason"].as_str().unwrap().contains("temperature"), "{skipped}");
    trainer.full(CheckpointWindow(DURING), &trainer.demo.second, DURING);
    finish(&world, run);
    assert_eq!(uploaded_with(&world), [BTreeSet::from([DURING])]);
}
