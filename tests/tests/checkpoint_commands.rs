//! `grail-supervisor checkpoint` on state directories whose store is the golden bucket.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, also in its helpers")]

use std::path::{Path, PathBuf};

use grail_tests::binaries::Finished;
use grail_tests::world::World;
use serde_json::{Value, json};

/// A state directory with the golden bucket as its store, and nothing else.
fn with_bucket() -> World {
    let world = World::new();
    copy_folder(&grail_golden::path("checkpoints/bucket"), &world.state.join("store"));
    world
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn checkpoint(world: &World, words: &[&str]) -> Finished {
    world.ask(&[&["checkpoint"], words].concat())
}

fn checkpoint_json(world: &World, words: &[&str]) -> Value {
    world.ask_json(&[&["checkpoint"], words].concat())
}

fn document(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout).unwrap()
}

fn cached(world: &World, window: u64) -> PathBuf {
    world.state.join(format!("checkpoints/checkpoint-{window}"))
}

fn stored(world: &World, window: u64, name: &str) -> PathBuf {
    world.state.join(format!("store/grail/checkpoints/checkpoint-{window}/{name}"))
}

/// The hash that the trainer published for a checkpoint's delta.
fn published_hash(world: &World, window: u64) -> Value {
    let text = std::fs::read(stored(world, window, "DELTA/metadata.json")).unwrap();
    serde_json::from_slice::<Value>(&text).unwrap()["weights_hash"].clone()
}

fn row(rows: &Value, window: u64) -> &Value {
    rows.as_array().unwrap().iter().find(|row| row["window"] == window).unwrap()
}

fn windows(rows: &Value) -> Vec<u64> {
    rows.as_array().unwrap().iter().map(|row| row["window"].as_u64().unwrap()).collect()
}

fn damage(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn list_shows_what_is_stored_and_what_the_rule_names() {
    let world = with_bucket();
    for (window, named) in [(3_330, json!(3_300)), (3_000, Value::Null)] {
        let list = checkpoint_json(&world, &["list", "--window", &window.to_string()]);
        assert_eq!((&list["store"]["rule"]["window"], &list["store"]["rule"]["checkpoint"]), (&json!(window), &named));
    }
    let list = checkpoint_json(&world, &["list"]);
    assert_eq!(list["store"]["rule"], Value::Null, "no chain, no next window");
    assert_eq!(list["cache"]["checkpoints"], json!([]));
    let rows = &list["store"]["checkpoints"];
    let folders = std::fs::read_dir(world.state.join("store/grail/checkpoints")).unwrap().count();
    assert_eq!(windows(rows).len(), folders);
    assert_eq!(row(rows, 3_120)["ready"], json!([]));
    assert_eq!(row(rows, 3_390)["ready"], json!([3_600]));
    let delta = &row(rows, 3_150)["trees"][0];
    assert_eq!((&delta["tree"], &delta["base"], &delta["verdict"]), (&json!("DELTA"), &json!(3_120), &json!("mine")));
    assert_eq!(delta["weights_hash"], published_hash(&world, 3_150));
    let incomplete = &row(rows, 3_360)["trees"][0];
    assert_eq!(incomplete["tree"], "FULL");
    assert!(!incomplete["missing"].as_array().unwrap().is_empty(), "{incomplete:#}");

    let text = checkpoint(&world, &["list", "--window", "3330"]);
    assert_eq!(text.code, Some(0), "{text:#?}");
    for words in ["no READY marker", "FULL lacks", "window 3330 is mined with checkpoint 3300", "cache "] {
        assert!(text.stdout.contains(words), "{words}: {}", text.stdout);
    }
    let cache_only = checkpoint_json(&world, &["list", "--cache-only"]);
    assert_eq!(cache_only["store"], Value::Null);
    assert_eq!(checkpoint_json(&world, &["list", "--store-only"])["cache"], Value::Null);
}

#[test]
fn a_folder_without_store_is_named_and_left_alone() {
    let world = World::new();
    std::fs::create_dir(&world.state).unwrap();
    for words in [&["list"][..], &["fetch", "latest"], &["verify"], &["prune"], &["show", "3000"]] {
        let refused = checkpoint(&world, words);
        assert_eq!(refused.code, Some(66), "{refused:#?}");
        assert!(refused.stderr.contains(world.state.to_str().unwrap()), "{}", refused.stderr);
        assert!(refused.stderr.contains("--state-dir"), "{}", refused.stderr);
    }
    assert_eq!(std::fs::read_dir(&world.state).unwrap().count(), 0);
}

#[test]
fn a_chain_of_deltas_is_fetched_shown_and_used_as_base() {
    let world = with_bucket();
    let shown = checkpoint_json(&world, &["show", "3150"]);
    let route = &shown["routes"]["open"][0];
    let deltas = json!([3_030, 3_060, 3_090, 3_120, 3_150]);
    assert_eq!((&route["from"], &route["base"], &route["deltas"]), (&json!("full"), &json!(3_000), &deltas));

    let fetched = checkpoint_json(&world, &["fetch", "3150"]);
    assert_eq!(fetched["weights_hash"], published_hash(&world, 3_150));
    assert_eq!(fetched["agreement"], "equal");
    assert_eq!(fetched["made_from"], json!({ "deltas": { "base": 3_000, "deltas": deltas } }));
    assert_eq!(fetched["received"], route["bytes"]);
    assert_eq!(fetched["folder"], json!(cached(&world, 3_150)));
    assert!(cached(&world, 3_150).join("model.safetensors").is_file());

    let again = checkpoint(&world, &["fetch", "3150"]);
    assert_eq!(again.code, Some(0), "{again:#?}");
    assert!(again.stdout.contains("there already"), "{}", again.stdout);

    // Now one delta is all that is missing.
    let next = checkpoint_json(&world, &["show", "3180"]);
    let route = &next["routes"]["open"][0];
    assert_eq!((&route["from"], &route["base"], &route["deltas"]), (&json!("cached"), &json!(3_150), &json!([3_180])));
    let fetched = checkpoint_json(&world, &["fetch", "3180"]);
    assert_eq!(fetched["made_from"], json!({ "deltas": { "base": 3_150, "deltas": [3_180] } }));
    assert_eq!(fetched["received"], route["bytes"]);

    let list = checkpoint_json(&world, &["list", "--cache-only"]);
    let rows = &list["cache"]["checkpoints"];
    let kept = row(rows, 3_180);
    assert_eq!((&kept["weights_hash"], &kept["in_use"]), (&fetched["weights_hash"], &json!(false)));
    assert_eq!(kept["made_from"], fetched["made_from"]);
    let shown = checkpoint(&world, &["show", "3180"]);
    assert!(shown.stdout.contains("made from 3150 and 1 delta"), "{}", shown.stdout);
}

#[test]
fn latest_is_the_one_that_became_ready_last() {
    let world = with_bucket();
    let fetched = checkpoint_json(&world, &["fetch", "latest"]);
    assert_eq!((&fetched["checkpoint"], &fetched["weights_hash"]), (&json!(3_390), &published_hash(&world, 3_390)));
    for window in std::fs::read_dir(world.state.join("store/grail/checkpoints")).unwrap() {
        for object in std::fs::read_dir(window.unwrap().path()).unwrap() {
            let object = object.unwrap();
            if object.file_name().to_str().unwrap().starts_with("READY-") {
                std::fs::remove_file(object.path()).unwrap();
            }
        }
    }
    let none = checkpoint(&world, &["fetch", "latest"]);
    assert_eq!(none.code, Some(66), "{none:#?}");
    assert!(none.stderr.contains("READY"), "{}", none.stderr);
}

#[test]
fn what_is_not_published_or_damaged_is_named() {
    let world = with_bucket();
    for words in [["fetch", "9999"], ["show", "9999"]] {
        let absent = checkpoint(&world, &words);
        assert_eq!(absent.code, Some(66), "{absent:#?}");
        assert!(absent.stderr.contains("checkpoint 9999 is not in"), "{}", absent.stderr);
        assert!(absent.stderr.contains("checkpoint list"), "{}", absent.stderr);
    }
    damage(&stored(&world, 3_030, "DELTA/delta_sparse.bin.zst"));
    let damaged = checkpoint(&world, &["fetch", "3030"]);
    assert_eq!(damaged.code, Some(65), "{damaged:#?}");
    assert!(damaged.stderr.contains("delta_sparse.bin.zst") && damaged.stderr.contains("3030"), "{}", damaged.stderr);
    assert!(!cached(&world, 3_030).exists());
}

#[test]
fn a_damaged_file_of_the_cache_is_found_and_repaired() {
    let world = with_bucket();
    checkpoint_json(&world, &["fetch", "3000"]);
    checkpoint_json(&world, &["fetch", "3060"]);
    let intact = checkpoint_json(&world, &["verify"]);
    assert_eq!((&intact["intact"], windows(&intact["checkpoints"])), (&json!(true), vec![3_000, 3_060]));

    let shard = "model-00002-of-00003.safetensors";
    damage(&cached(&world, 3_000).join(shard));
    let found = checkpoint(&world, &["verify", "--json"]);
    assert_eq!(found.code, Some(1), "{found:#?}");
    let report = document(&found);
    assert_eq!(report["intact"], false);
    let damaged = row(&report["checkpoints"], 3_000);
    assert_eq!(damaged["file"], shard);
    assert!(damaged["difference"].as_str().unwrap().contains("the manifest says"), "{damaged:#}");
    assert_eq!(row(&report["checkpoints"], 3_060)["difference"], Value::Null);
    let text = checkpoint(&world, &["verify", "3000"]);
    assert_eq!(text.code, Some(1), "{text:#?}");
    assert!(text.stdout.contains(shard) && text.stdout.contains("checkpoint fetch 3000"), "{}", text.stdout);
    assert_eq!(checkpoint(&world, &["verify", "3060"]).code, Some(0));

    checkpoint_json(&world, &["fetch", "3000"]);
    assert_eq!(checkpoint_json(&world, &["verify"])["intact"], true);

    let absent = checkpoint(&world, &["verify", "3030"]);
    assert_eq!(absent.code, Some(66), "{absent:#?}");
    assert!(absent.stderr.contains("checkpoint fetch 3030"), "{}", absent.stderr);
}

#[test]
fn metadata_that_says_something_else_of_the_weights_is_damage_too() {
    let world = with_bucket();
    let hash = checkpoint_json(&world, &["fetch", "3030"])["weights_hash"].as_str().unwrap().to_owned();
    let path = cached(&world, 3_030).join("metadata.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace(&hash, &"0".repeat(32))).unwrap();
    let found = checkpoint(&world, &["verify", "3030"]);
    assert_eq!(found.code, Some(1), "{found:#?}");
    assert!(found.stdout.contains(&format!("hash to {hash}")), "{}", found.stdout);
}

#[test]
fn prune_keeps_the_newest() {
    let world = with_bucket();
    for window in ["3000", "3030", "3060"] {
        checkpoint_json(&world, &["fetch", window]);
    }
    let dry = checkpoint_json(&world, &["prune", "--keep", "1", "--dry-run"]);
    assert_eq!((&dry["dry_run"], windows(&dry["removed"])), (&json!(true), vec![3_000, 3_030]));
    assert!(cached(&world, 3_000).is_dir() && cached(&world, 3_030).is_dir());
    // The default keeps all three.
    assert_eq!(checkpoint_json(&world, &["prune"])["removed"], json!([]));

    let pruned = checkpoint_json(&world, &["prune", "--keep", "1"]);
    assert_eq!((windows(&pruned["removed"]), windows(&pruned["kept"])), (vec![3_000, 3_030], vec![3_060]));
    assert!(!cached(&world, 3_000).exists() && !cached(&world, 3_030).exists());
    assert_eq!(checkpoint(&world, &["verify"]).code, Some(0));

    let usage = checkpoint(&world, &["prune", "--keep", "0"]);
    assert_eq!(usage.code, Some(78), "{usage:#?}");
    assert!(usage.stderr.contains("--keep"), "{}", usage.stderr);
}

#[test]
fn prune_leaves_what_a_running_miner_uses() {
    let donor = with_bucket();
    checkpoint_json(&donor, &["fetch", "3150"]);
    let world = World::new();
    let run = world.mine(&["--windows", "1", "--max-groups", "12"]);
    world.wait_for_groups(2);
    // Newer than what is mined with, and nobody's.
    copy_folder(&cached(&donor, 3_150), &cached(&world, 3_150));

    let in_use = world.ask_json(&["status"])["checkpoints_in_use"].clone();
    assert!(!in_use.as_array().unwrap().is_empty());
    let rows = checkpoint_json(&world, &["list", "--cache-only"])["cache"]["checkpoints"].clone();
    assert_eq!(row(&rows, 3_150)["in_use"], false);
    for window in in_use.as_array().unwrap() {
        assert_eq!(row(&rows, window.as_u64().unwrap())["in_use"], true);
    }

    let pruned = checkpoint_json(&world, &["prune", "--keep", "1"]);
    assert!(windows(&pruned["removed"]).contains(&3_150), "{pruned:#}");
    for window in in_use.as_array().unwrap() {
        assert!(windows(&pruned["kept"]).contains(&window.as_u64().unwrap()), "{pruned:#}");
    }
    assert!(!cached(&world, 3_150).exists());

    let mined = run.wait();
    assert_eq!(mined.code, Some(0), "{mined:#?}");
    world.assert_uploaded_whole();
    world.assert_nothing_left();
}
