//! Every process of a miner dies, stops or speaks nonsense while a window runs: no spooled group is lost, nothing is left.
//!
//! Workers are hit at exact points by `GRAIL_FAULT`; the launcher, the generation server and the supervisor by their pid.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, also in its helpers")]

use std::collections::BTreeMap;
use std::ffi::OsStr;

use grail_tests::binaries::{Finished, Run};
use grail_tests::processes::{self, strike};
use grail_tests::waiting::wait_until;
use grail_tests::world::World;
use nix::sys::signal::Signal;
use serde_json::Value;

const SLOTS: u64 = 2;
/// More groups than any of these runs has time for.
const ENDLESS: [&str; 2] = ["--max-groups", "400"];

/// How deaths are written in the journal.
const KILLED: &str = "killed by SIGKILL";
const CRASHED: &str = "killed by SIGSEGV";
const MUTE: &str = "gave no sign of life";
const START_HUNG: &str = "was not ready in time";
const REQUEST_HUNG: &str = "did not answer a request in time";

/// A world in which a hung process is noticed within seconds, and which makes no more groups than a test needs.
fn impatient() -> World {
    World::in_a_window()
        .with("GRAIL_PIPELINE_GROUPS_PER_BATCH", "2")
        .with("GRAIL_PROOF_WORKERS", SLOTS.to_string())
        .with("GRAIL_HEARTBEAT_INTERVAL", "0.5")
        .with("GRAIL_HEARTBEAT_TIMEOUT", "4")
        .with("GRAIL_WORKER_START_TIMEOUT", "20")
        .with("GRAIL_WORKER_PROVE_TIMEOUT", "15")
}

/// What incarnations 1, 2, … of a slot do wrong, and as what each death must be known.
type Life = [(&'static str, &'static str)];

/// The text of `GRAIL_FAULT` for lives of slots 0, 1, …
fn faults(lives: &[&Life]) -> String {
    let of_slot = |(slot, life): (usize, &&Life)| {
        let fault =
            move |(place, (fault, _)): (usize, &(&str, &str))| format!("{fault},slot={slot},epoch={}", place + 1);
        life.iter().enumerate().map(fault).collect::<Vec<_>>()
    };
    lives.iter().enumerate().flat_map(of_slot).collect::<Vec<_>>().join(";")
}

/// Causes of death by slot and incarnation.
fn deaths(world: &World) -> BTreeMap<(u64, u64), String> {
    let death = |event: &Value| {
        let number = |name: &str| event[name].as_u64().unwrap();
        ((number("slot"), number("epoch")), event["cause"].as_str().unwrap().to_owned())
    };
    world.of_kind("worker_lost").iter().map(death).collect()
}

fn is_ready(world: &World, slot: u64, epoch: u64) -> bool {
    world.of_kind("worker_ready").iter().any(|event| event["slot"] == slot && event["epoch"] == epoch)
}

/// Ends a miner in mid-window and looks at what it leaves.
fn stop(world: &World, run: Run) -> Finished {
    assert_eq!(world.ask_json(&["stop"])["gone"], true);
    let mined = run.wait();
    assert_eq!(mined.code, Some(0), "{mined:#?}");
    world.assert_uploaded_whole();
    world.assert_nothing_left();
    mined
}

/// Both slots live through `life`; the window goes on, and its file is whole.
fn survives(life: &Life) {
    let world = impatient().with("GRAIL_FAULT", faults(&[life, life]));
    let run = world.mine(&ENDLESS);
    let next = u64::try_from(life.len()).unwrap() + 1;
    wait_until("the incarnations after the faults are ready", || {
        (0..SLOTS).all(|slot| is_ready(&world, slot, next)) || processes::has_ended(run.pid())
    });
    world.wait_for_more_groups(2);
    stop(&world, run);
    let deaths = deaths(&world);
    for slot in 0..SLOTS {
        for (epoch, (fault, cause)) in (1..).zip(life) {
            let found = deaths.get(&(slot, epoch)).map_or("it lived", String::as_str);
            assert!(found.contains(cause), "{fault} in slot {slot}, incarnation {epoch}: {found}; {deaths:#?}");
        }
    }
}

#[test]
fn workers_that_start() {
    survives(&[
        // The others start while the window runs.
        ("kill@mid_proof", KILLED),
        ("kill@starting", KILLED),
        ("segv@starting", CRASHED),
        ("stop@starting", START_HUNG),
    ]);
}

#[test]
fn workers_that_are_idle() {
    survives(&[("kill@mid_proof", KILLED), ("kill@idle", KILLED), ("segv@idle", CRASHED), ("stop@idle", MUTE)]);
}

#[test]
fn workers_in_mid_proof() {
    survives(&[
        ("kill@mid_proof", KILLED),
        ("segv@mid_proof", CRASHED),
        ("stop@mid_proof", MUTE),
        ("hang@mid_proof", REQUEST_HUNG),
    ]);
}

#[test]
fn workers_that_reply() {
    survives(&[("kill@replying", KILLED), ("segv@replying", CRASHED), ("stop@replying", MUTE), ("hang@ping", MUTE)]);
}

#[test]
fn workers_that_speak_nonsense() {
    survives(&[
        ("oversize@replying", "frame of 4294967295 bytes is over the limit"),
        ("garbage@ping", "connection lost: "),
        ("truncated@idle", "in the middle of a frame"),
        ("wrong_token@hello", "does not show the token"),
    ]);
}

/// A pid in the status, once it is there and another than `before`.
fn pid_in_status(world: &World, name: &str, before: Option<u32>) -> u32 {
    let pid = || {
        let status = world.ask_json(&["status"]);
        let is_serving = status["server"]["state"] == "serving";
        let pid = status["server"][name].as_u64().filter(|_| is_serving)?;
        Some(u32::try_from(pid).unwrap()).filter(|pid| Some(*pid) != before)
    };
    wait_until(&format!("the status shows another {name}"), || pid().is_some());
    pid().unwrap()
}

/// The launcher or the server under it is hit by each signal in turn; the log tells the `causes`.
fn survives_without(name: &str, causes: [(Signal, &str); 3]) {
    let world = impatient();
    let run = world.mine(&ENDLESS);
    world.wait_for_groups(1);
    let mut struck = None;
    for (signal, _) in causes {
        let pid = pid_in_status(&world, name, struck);
        let server = pid_in_status(&world, "server_pid", None);
        let lost = world.count("server_lost");
        strike(pid, signal);
        wait_until("the loss is noted", || world.count("server_lost") > lost);
        wait_until("the server is gone", || processes::has_ended(server));
        struck = Some(pid);
    }
    pid_in_status(&world, name, struck);
    world.wait_for_more_groups(2);
    let mined = stop(&world, run);
    for (signal, cause) in causes {
        assert!(mined.stderr.contains(cause), "{signal}, {cause}: {}", mined.stderr);
    }
    assert_eq!(deaths(&world), BTreeMap::new(), "workers have nothing to do with it");
}

#[test]
fn the_launcher() {
    survives_without("pid", [(Signal::SIGKILL, KILLED), (Signal::SIGSEGV, CRASHED), (Signal::SIGSTOP, MUTE)]);
}

#[test]
fn the_generation_server() {
    let silent = "no answer within 4s";
    survives_without("server_pid", [(Signal::SIGKILL, KILLED), (Signal::SIGSEGV, CRASHED), (Signal::SIGSTOP, silent)]);
}

#[test]
fn a_generation_server_that_answers_nonsense_is_replaced() {
    // Answers arrive in any order; among so many, three in a row or five of two hundred do.
    let nonsense: Vec<String> = (70..90).map(|nth| format!("garbage@sampled,nth={nth}")).collect();
    let world = impatient().with("GRAIL_FAULT", nonsense.join(";"));
    let run = world.mine(&ENDLESS);
    wait_until("the server is replaced", || world.count("server_lost") >= 1);
    let lost = world.of_kind("server_lost").remove(0);
    assert!(lost["cause"].as_str().unwrap().ends_with("were of no use"), "{lost}");
    world.wait_for_more_groups(2);
    // What several bad answers said of one server has it replaced once.
    assert_eq!(world.count("server_ready"), 1 + world.count("server_lost"));
    stop(&world, run);
}

#[test]
fn the_supervisor() {
    let world = impatient();
    for signal in [Signal::SIGKILL, Signal::SIGSEGV] {
        let run = world.mine(&ENDLESS);
        world.wait_for_more_groups(2);
        strike(run.pid(), signal);
        assert_eq!(run.wait().code, None);
        // The next start removes its control socket.
        world.wait_for_the_end_of_all();
    }
    let before = world.count("group_spooled");
    let run = world.mine(&ENDLESS);
    world.wait_for_more_groups(1);
    let recovered = world.of_kind("window_started").last().unwrap()["recovered_groups"].as_u64().unwrap();
    assert!(recovered >= u64::try_from(before).unwrap(), "{recovered} of {before}");

    strike(run.pid(), Signal::SIGSTOP);
    strike(run.pid(), Signal::SIGCONT);
    world.wait_for_more_groups(2);
    stop(&world, run);
}

#[test]
fn all_workers_flap_and_what_they_proved_is_uploaded() {
    let world = impatient().with("GRAIL_FAULT", "kill@mid_proof,nth=3");
    let mined = world.mine(&ENDLESS).wait();
    assert_eq!(mined.code, Some(75), "{mined:#?}");
    assert!(mined.stderr.contains("no proof worker is left"), "{}", mined.stderr);
    let given_up = world.of_kind("worker_given_up");
    let slots: Vec<u64> = given_up.iter().map(|event| event["slot"].as_u64().unwrap()).collect();
    assert_eq!(slots.len(), 2, "{given_up:#?}");
    assert_ne!(slots[0], slots[1]);
    for event in &given_up {
        assert!(event["reason"].as_str().unwrap().contains("died more than 5 times"), "{event:#}");
    }
    assert!(world.count("group_spooled") >= 2);
    world.assert_uploaded_whole();
    world.assert_nothing_left();
}

/// Slot 0 does wrong what `fault` says until it is given up for `reason`; the other one goes on.
fn one_is_given_up(fault: &str, reason: &str) -> (World, Vec<String>) {
    let world = impatient().with("GRAIL_FAULT", fault);
    let run = world.mine(&ENDLESS);
    wait_until("the slot is given up", || world.count("worker_given_up") > 0 || processes::has_ended(run.pid()));
    world.wait_for_more_groups(2);
    let status = world.ask_json(&["status"]);
    assert_eq!((&status["slots"][0]["state"], &status["slots"][1]["state"]), (&"gave_up".into(), &"ready".into()));
    assert!(status["slots"][0]["detail"].as_str().unwrap().contains(reason), "{status:#}");
    stop(&world, run);
    let given_up = world.of_kind("worker_given_up");
    assert_eq!((given_up.len(), &given_up[0]["slot"]), (1, &0.into()), "{given_up:#?}");
    assert!(given_up[0]["reason"].as_str().unwrap().contains(reason), "{given_up:#?}");
    let deaths = deaths(&world);
    assert!(deaths.keys().all(|(slot, _)| *slot == 0), "{deaths:#?}");
    let causes = deaths.into_values().collect();
    (world, causes)
}

#[test]
fn one_worker_flaps_and_the_other_finishes() {
    let (_, causes) = one_is_given_up("kill@mid_proof,slot=0", "died more than 5 times");
    assert_eq!(causes, [KILLED; 6]);
}

#[test]
fn out_of_memory_is_tried_once_more() {
    let fault = "oom@mid_proof,slot=0;oom@mid_proof,slot=0,nth=2";
    let (world, causes) = one_is_given_up(fault, "ran out of memory again");
    assert_eq!(causes, ["ran out of memory"; 2]);
    let groups = world.of_kind("group_spooled");
    assert!(groups.iter().all(|event| event["slot"] == 1), "{groups:#?}");
}

#[test]
fn a_worker_of_another_version_is_given_up_at_once() {
    let (_, causes) = one_is_given_up("wrong_version@hello,slot=0", "speaks protocol 3, this build speaks 2");
    assert_eq!(causes.len(), 1, "{causes:?}");
}

#[test]
fn workers_of_another_version_end_the_miner_at_once() {
    let world = impatient().with("GRAIL_FAULT", "wrong_version@hello");
    let mined = world.mine(&ENDLESS).wait();
    // Starting again would find the same programs.
    assert_eq!(mined.code, Some(78), "{mined:#?}");
    assert!(mined.stderr.contains("speaks protocol 3, this build speaks 2"), "{}", mined.stderr);
    assert_eq!((world.count("worker_lost"), world.count("worker_given_up")), (2, 2));
    world.assert_nothing_left();
}

#[test]
fn a_group_that_kills_two_workers_is_dropped() {
    // With one group under way, both first incarnations meet the same one.
    let world = impatient().with("GRAIL_PIPELINE_GROUPS_PER_BATCH", "1").with("GRAIL_FAULT", "kill@mid_proof,epoch=1");
    let mined = world.mine(&["--windows", "1", "--max-groups", "3"]).wait();
    assert_eq!(mined.code, Some(0), "{mined:#?}");
    let dropped = world.of_kind("group_dropped");
    assert_eq!(dropped.len(), 1, "{dropped:#?}");
    assert_eq!(dropped[0]["group"], 0);
    assert!(dropped[0]["reason"].as_str().unwrap().contains("poisonous"), "{dropped:#?}");
    assert_eq!(deaths(&world).into_values().collect::<Vec<_>>(), [KILLED; 2]);
    assert_eq!(world.count("group_spooled"), 3);
    world.assert_uploaded_whole();
    world.assert_nothing_left();

    // Its job is kept, for a worker that is looked at alone.
    let job = world.state.join("poisonous").join("window-3000-group-0.groups");
    let models = std::fs::read_dir(world.state.join("demo")).unwrap().flatten().map(|entry| entry.path());
    let model = models.into_iter().find(|path| path.join("config.json").is_file()).unwrap();
    let arguments =
        [OsStr::new("profile"), OsStr::new("--recorded"), job.as_os_str(), OsStr::new("--model"), model.as_os_str()];
    let arguments = [&arguments[..], &["--warm-up", "0", "--repeats", "1", "--json"].map(OsStr::new)].concat();
    let proved = Run::start("grail-proof-worker", &arguments, world.folder.path(), &[]).wait();
    assert_eq!(proved.code, Some(0), "{proved:#?}");
    let document: Value = serde_json::from_str(&proved.stdout).unwrap();
    assert!(document.to_string().contains("\"rollouts\":16"), "{document:#}");
}
