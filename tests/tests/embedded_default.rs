//! The embedded default from end to end, with the real binaries: mine, verify, and what must be left behind.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, also in its helpers")]

use std::path::{Path, PathBuf};

use grail_tests::binaries::{Finished, Run};
use grail_tests::processes;
use grail_tests::waiting::wait_until;
use serde_json::Value;

const BLOCK_MS: &str = "600";

fn supervisor(arguments: &[&str], folder: &Path) -> Finished {
    Run::start("grail-supervisor", arguments, folder, &[]).wait()
}

fn json(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout).unwrap_or_else(|error| panic!("{error}: {finished:?}"))
}

fn events(state: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(state.join("journal.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["event"].clone()).collect()
}

fn of_kind<'a>(events: &'a [Value], kind: &str) -> Vec<&'a Value> {
    events.iter().filter(|event| event["kind"] == kind).collect()
}

#[test]
fn two_windows_with_a_roll_in_between_are_mined_and_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let state_text = state.to_str().unwrap();
    let mined = supervisor(
        &["mine", "--local", "--windows", "2", "--max-groups", "12", "--block-ms", BLOCK_MS, "--state-dir", state_text],
        folder.path(),
    );
    assert_eq!(mined.code, Some(0), "{mined:#?}");
    assert_eq!(processes::mentioning(&state), [], "nothing is left running");

    let events = events(&state);
    let uploaded = of_kind(&events, "window_uploaded");
    assert_eq!(uploaded.len(), 2);
    let rolled: Vec<_> = of_kind(&events, "checkpoint_active").iter().map(|event| event["weights"].clone()).collect();
    assert_eq!(rolled.len(), 2, "one checkpoint a window");
    assert_ne!(rolled[0], rolled[1]);
    the_roll_is_by_delta_without_a_new_process(&events, &state);
    let workers: std::collections::BTreeSet<_> =
        of_kind(&events, "group_spooled").iter().map(|event| event["slot"].as_u64().unwrap()).collect();
    assert_eq!(workers.into_iter().collect::<Vec<_>>(), [0, 1], "both workers proved");

    let verified = supervisor(&["verify", "--local", "--json", "--state-dir", state_text], folder.path());
    assert_eq!(verified.code, Some(0), "{verified:#?}");
    let verdicts = json(&verified);
    for window in verdicts["windows"].as_array().unwrap() {
        let report = &window["report"];
        assert_eq!(report["verdict"], "success");
        assert_eq!(report["all_rows"]["verdict"], "success");
        assert_eq!(
            report["strict"].as_array().unwrap().iter().filter(|finding| finding["severity"] == "error").count(),
            0
        );
        assert!(report["exactness"]["sketch_equal"].as_f64().unwrap() > 0.999, "{}", report["exactness"]);
        assert!(report["exactness"]["logprob_equal"].as_f64().unwrap() > 0.999, "{}", report["exactness"]);
    }
    old_weights_do_not_pass_for_new_ones(&verdicts, folder.path());
    spooled_groups_are_all_in_the_files(&events, &verdicts);
}

fn the_roll_is_by_delta_without_a_new_process(events: &[Value], state: &Path) {
    let trees = state.join("store/grail/checkpoints/checkpoint-3000");
    assert!(!trees.join("FULL").exists(), "the second checkpoint is only published as a DELTA");
    let facts = std::fs::read(trees.join("DELTA/delta_metadata.json")).unwrap();
    let facts: Value = serde_json::from_slice(&facts).unwrap();
    let changed = facts["nonzero_params"].as_f64().unwrap() / facts["total_params"].as_f64().unwrap();
    assert!(changed >= 0.01, "{facts:#}");

    assert_eq!(of_kind(events, "worker_ready").len(), 2, "each slot had one process");
    assert_eq!(of_kind(events, "worker_lost").len(), 0);
    let rolled = of_kind(events, "worker_rolled");
    let second = &of_kind(events, "checkpoint_active")[1]["weights"];
    assert_eq!(rolled.len(), 2, "{rolled:#?}");
    assert!(rolled.iter().all(|roll| roll["from_changes"] == true && roll["weights"] == *second), "{rolled:#?}");
    let servers = of_kind(events, "server_ready");
    assert_eq!(servers.len(), 2, "{servers:#?}");
    assert_eq!(servers[0]["incarnation"], servers[1]["incarnation"], "the server was updated, not started anew");
    let installed = events.iter().position(|event| event["kind"] == "checkpoint_installed");
    let second_window = events.iter().rposition(|event| event["kind"] == "window_started");
    assert!(installed < second_window, "the checkpoint was here before its window");
}

fn old_weights_do_not_pass_for_new_ones(verdicts: &Value, folder: &Path) {
    let file = |window: usize| PathBuf::from(verdicts["windows"][window]["file"].as_str().unwrap());
    let context = |window: usize| {
        let mut path = file(window).into_os_string();
        path.push(".context.json");
        PathBuf::from(path)
    };
    let read = |path: &Path| serde_json::from_slice::<Value>(&std::fs::read(path).unwrap()).unwrap();
    let mut other = read(&context(1));
    other["model_dir"] = read(&context(0))["model_dir"].clone();
    let path = context(1).with_file_name("old-weights.json");
    std::fs::write(&path, other.to_string()).unwrap();
    let second = file(1);
    let arguments = ["verify", second.to_str().unwrap(), "--context", path.to_str().unwrap(), "--json"];
    let report = json(&supervisor(&arguments, folder));
    assert!(report["exactness"]["logprob_equal"].as_f64().unwrap() < 0.5, "{}", report["exactness"]);
}

fn spooled_groups_are_all_in_the_files(events: &[Value], verdicts: &Value) {
    for window in verdicts["windows"].as_array().unwrap() {
        let spooled =
            of_kind(events, "group_spooled").iter().filter(|event| event["window"] == window["window"]).count();
        assert_eq!(window["report"]["metrics"]["total"], spooled * 16);
    }
}

#[test]
fn a_supervisor_that_is_killed_leaves_nothing_running_and_loses_no_group() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let arguments = [
        "mine",
        "--local",
        "--windows",
        "1",
        "--max-groups",
        "12",
        "--block-ms",
        "2500",
        "--state-dir",
        state.to_str().unwrap(),
    ];
    let run = Run::start("grail-supervisor", &arguments, folder.path(), &[]);
    let journal = state.join("journal.jsonl");
    wait_until("a few groups are spooled", || {
        std::fs::read_to_string(&journal).is_ok_and(|text| text.matches("group_spooled").count() >= 3)
    });
    let pid = nix::unistd::Pid::from_raw(i32::try_from(run.pid()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(run.wait().code, None, "killed");
    wait_until("its children are gone", || processes::mentioning(&state).is_empty());
    let before: Vec<Value> = of_kind(&events(&state), "group_spooled").into_iter().cloned().collect();

    let again = supervisor(&arguments, folder.path());
    assert_eq!(again.code, Some(0), "{again:#?}");
    let after = events(&state);
    let uploaded = of_kind(&after, "window_uploaded");
    let window = before[0]["window"].clone();
    assert_eq!(uploaded[0]["window"], window, "the window in which it was killed goes out");
    let sealed = of_kind(&after, "window_sealed");
    assert!(sealed[0]["groups"].as_u64().unwrap() >= before.len() as u64, "{sealed:?}");
    let numbers: Vec<_> =
        of_kind(&after, "group_spooled").iter().map(|event| event["group"].as_i64().unwrap()).collect();
    let distinct: std::collections::BTreeSet<_> = numbers.iter().collect();
    assert_eq!(distinct.len(), numbers.len(), "no index is used twice");
    let verified = supervisor(&["verify", "--local", "--json", "--state-dir", state.to_str().unwrap()], folder.path());
    assert_eq!(verified.code, Some(0), "{verified:#?}");
}
