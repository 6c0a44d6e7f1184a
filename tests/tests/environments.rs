//! Environments whose answers are run or compared by sandboxed interpreters, with the real binaries.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, also in its helpers")]

use grail_tests::binaries::Run;
use grail_tests::processes;
use grail_tests::waiting::wait_until;
use grail_tests::world::World;
use nix::sys::signal::Signal;
use serde_json::Value;

const HOTKEY: &str = "5DtDLm5rQHShDqojQpsvcN8tRXHVFaecfDoRet1SU6BFD9Fi";

/// Whether this host may run what models write; says so where it may not.
fn can_judge() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let probed = Run::start("grail-supervisor", &["setup-evaluator", "--probe"], folder.path(), &[]).wait();
    assert!(matches!(probed.code, Some(0 | 1)), "{probed:#?}");
    if probed.code == Some(1) {
        println!("skipped: the sandbox of this host is too weak:\n{}", probed.stdout);
    }
    probed.code == Some(0)
}

/// A window of `environment` is mined, and a verifier comes to the same rewards.
fn a_window_is_mined_and_accepted(environment: &str) {
    if !can_judge() {
        return;
    }
    let world = World::with_short_windows();
    let mined = world.mine(&["--env", environment, "--windows", "1", "--max-groups", "6"]).wait();
    assert_eq!(mined.code, Some(0), "{mined:#?}");
    assert_eq!(processes::mentioning(&world.state), [], "nothing is left running");
    let is_told = mined.stderr.contains("stand-in of made-up problems");
    assert_eq!(is_told, environment == "math", "{}", mined.stderr);
    assert_accepted(&world, environment);
}

fn assert_accepted(world: &World, environment: &str) {
    let verified = world.ask_json(&["verify", "--local"]);
    let windows = verified["windows"].as_array().unwrap();
    assert_eq!(windows.len(), 1);
    let report = &windows[0]["report"];
    assert_eq!(report["verdict"], "success", "{report:#}");
    let rows = report["all_rows"]["rows"].as_array().unwrap();
    assert!(!rows.is_empty() && rows.iter().all(|row| row["checks"]["reward_valid"] == true));
    let file = windows[0]["file"].as_str().unwrap();
    let context: Value = serde_json::from_slice(&std::fs::read(format!("{file}.context.json")).unwrap()).unwrap();
    assert_eq!(context["env_id"], environment);
}

#[test]
fn mbpp() {
    a_window_is_mined_and_accepted("mbpp");
}

#[test]
fn humaneval() {
    a_window_is_mined_and_accepted("humaneval");
}

#[test]
fn math_on_a_stand_in() {
    a_window_is_mined_and_accepted("math");
}

/// Interpreters below the process `of`.
fn interpreters(of: u32) -> Vec<u32> {
    let is_interpreter = |found: &processes::Found| found.command.contains(" -X utf8 -c ");
    processes::below(of).into_iter().filter(is_interpreter).map(|found| found.pid).collect()
}

/// Processes that hold the sandboxes of interpreters below the process `of`.
fn helpers(of: u32) -> Vec<u32> {
    let is_helper = |found: &processes::Found| found.command.contains("evaluator-zygote outer");
    processes::below(of).into_iter().filter(is_helper).map(|found| found.pid).collect()
}

/// Evaluators are killed, stopped and broken while a window is mined: groups are judged by others or dropped whole, and what is
/// uploaded is right.
#[test]
fn evaluators_that_are_killed_stopped_or_broken_cost_no_window() {
    if !can_judge() {
        return;
    }
    let world = World::with_short_windows().with("GRAIL_EVALUATORS", "2");
    let run = world.mine(&["--env", "mbpp", "--windows", "1", "--max-groups", "8"]);
    wait_until("interpreters", || interpreters(run.pid()).len() >= 2);
    let (mut seen, mut struck) = (Vec::new(), 0);
    // The first process of a namespace takes no signal from outside but SIGKILL and SIGSTOP, so its helper is broken.
    for (signal, victims) in [
        (Signal::SIGKILL, interpreters as fn(u32) -> Vec<u32>),
        (Signal::SIGSEGV, helpers),
        (Signal::SIGSTOP, interpreters),
    ] {
        let is_over = || world.count("window_uploaded") == 1;
        wait_until("interpreters, or the end of the window", || interpreters(run.pid()).len() >= 2 || is_over());
        let victim = victims(run.pid()).first().copied();
        let Some(victim) = victim.filter(|_| !is_over()) else { break };
        seen.extend(interpreters(run.pid()));
        processes::strike(victim, signal);
        struck += 1;
        let groups = world.count("group_spooled");
        wait_until("another group, or the end of the window", || world.count("group_spooled") > groups || is_over());
    }
    let mined = run.wait();
    assert_eq!(mined.code, Some(0), "{mined:#?}");
    assert_eq!(processes::mentioning(&world.state), [], "nothing is left running");
    assert!(struck > 0, "an evaluator was struck");
    assert!(seen.iter().all(|pid| processes::has_ended(*pid)), "no interpreter is left");
    assert_accepted(&world, "mbpp");
}

/// An interpreter is killed in the middle of a program: another one runs it, and the verdict is the right one.
#[test]
fn a_program_whose_interpreter_is_killed_is_run_again() {
    if !can_judge() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    // Long enough to be seen at work, and far from the limit of five seconds on a machine that is a few times slower.
    let slow = "x = 0\nwhile x < 10 ** 7:\n    x += 1\n";
    let solution = solution_of("humaneval_0", folder.path());
    let line = serde_json::json!({ "completion": answer(&format!("{solution}\n{slow}")) });
    let file = folder.path().join("slow.jsonl");
    std::fs::write(&file, line.to_string()).unwrap();
    let words = ["env", "score", "humaneval", file.to_str().unwrap(), "--seed", "0", "--embedded", "-v"];
    let run = Run::start("grail-supervisor", &words, folder.path(), &[("GRAIL_EVALUATORS", "2")]);
    // A child of an interpreter is a program under way; those that it is tried with at its start need no time.
    let is_at_work = |child: &processes::Found| processes::cpu_ticks(child.pid) >= 10;
    let under_way = || interpreters(run.pid()).into_iter().find(|pid| processes::below(*pid).iter().any(is_at_work));
    wait_until("a program under way", || under_way().is_some());
    if let Some(pid) = under_way() {
        processes::strike(pid, Signal::SIGKILL);
    }
    let scored = run.wait();
    let verdict: Value = serde_json::from_str(&scored.stdout).unwrap_or_else(|error| panic!("{error}: {scored:#?}"));
    assert!(scored.stderr.contains("A sandbox failed."), "{scored:#?}");
    // Where the machine is so slow that the test runs into its time limit, that is a verdict, too.
    assert!(verdict["evaluation"]["tests"][0].is_object(), "{verdict:#}");
}

fn answer(code: &str) -> String {
    format!("why</end_working_out><SOLUTION>{code}</SOLUTION>")
}

/// The reference solution of a task, as it passes.
fn solution_of(task: &str, folder: &std::path::Path) -> String {
    let shown = env(&["show", "humaneval", "--task", task, "--embedded", "--json"], folder);
    let shown: Value = serde_json::from_str(&shown.stdout).unwrap_or_else(|error| panic!("{error}: {shown:#?}"));
    // Annotations are never evaluated, and the import they come from is not allowed.
    shown["payload"]["reference_solution"].as_str().unwrap().replace("from typing import List", "")
}

#[test]
fn without_an_interpreter_nothing_is_mined_and_the_remedy_is_said() {
    let world = World::with_short_windows();
    let absent = world.folder.path().join("absent");
    let world = world.with("GRAIL_EVALUATOR_DIR", absent.to_str().unwrap());
    let refused = world.mine(&["--env", "math"]).wait();
    assert_eq!(refused.code, Some(66), "{refused:#?}");
    assert!(refused.stderr.contains("setup-evaluator") && refused.stderr.contains("environment math"), "{refused:#?}");
    assert_eq!(processes::mentioning(&world.state), [], "nothing is left running");
}

#[test]
fn a_store_is_for_one_environment() {
    let world = World::before_a_window();
    let run = world.mine(&["--env", "mbpp"]);
    wait_until("a published checkpoint", || world.state.join("store/grail/checkpoints").is_dir());
    wait_until("a miner", || world.count("started") == 1);
    processes::strike(run.pid(), Signal::SIGTERM);
    assert_eq!(run.wait().code, Some(0));
    let refused = world.mine(&["--env", "gsm8k"]).wait();
    assert_eq!(refused.code, Some(78), "{refused:#?}");
    assert!(refused.stderr.contains("holds checkpoints for mbpp, not for gsm8k"), "{}", refused.stderr);
}

fn env(words: &[&str], folder: &std::path::Path) -> grail_tests::binaries::Finished {
    Run::start("grail-supervisor", &[&["env"], words].concat(), folder, &[("HF_HUB_OFFLINE", "1")]).wait()
}

#[test]
fn tasks_and_prompts_are_those_of_the_vectors() {
    let folder = tempfile::tempdir().unwrap();
    let shown = env(&["show", "humaneval", "--task", "humaneval_3", "--embedded", "--json"], folder.path());
    assert_eq!(shown.code, Some(0), "{shown:#?}");
    let shown: Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!((shown["row"].as_u64(), shown["payload"]["dataset_id"].as_str()), (Some(3), Some("HumanEval/3")));

    // The seed of a group is the one that its hotkey, window and index make.
    let hash = format!("0x{}", "ab".repeat(32));
    let group = ["show", "mbpp", "--embedded", "--json", "--group", "7", "--hotkey", HOTKEY, "--window-hash", &hash];
    let by_group: Value = serde_json::from_str(&env(&group, folder.path()).stdout).unwrap();
    let seed = grail_protocol::seed::environment_seed(
        &grail_protocol::ids::Hotkey(HOTKEY.into()),
        &grail_protocol::ids::BlockHash(hash.clone()),
        grail_protocol::ids::GroupIndex(7),
    );
    let by_seed = ["show", "mbpp", "--embedded", "--json", "--seed", &seed.0.to_string()];
    let by_seed: Value = serde_json::from_str(&env(&by_seed, folder.path()).stdout).unwrap();
    assert_eq!(by_group, by_seed);

    for (id, remedy) in [("bogus", "train_"), ("validation_17", "--split")] {
        let refused = env(&["show", "mbpp", "--task", id, "--embedded"], folder.path());
        assert_eq!(refused.code, Some(2), "{refused:#?}");
        assert!(refused.stderr.contains(id) && refused.stderr.contains(remedy), "{refused:#?}");
    }
    let by_number = env(&["show", "math", "--task", "17", "--embedded"], folder.path());
    assert!(by_number.stdout.contains("train_17") && by_number.stdout.contains("made up"), "{by_number:#?}");

    let model = grail_golden::path("models/qwen3-tied");
    let words = ["prompt", "gsm8k", "--seed", "1", "--embedded", "--thinking-mode", "native", "--json", "--checkpoint"];
    let prompt = env(&[&words[..], &[model.to_str().unwrap()]].concat(), folder.path());
    assert_eq!(prompt.code, Some(0), "{prompt:#?}");
    let prompt: Value = serde_json::from_str(&prompt.stdout).unwrap();
    assert!(prompt["text"].as_str().unwrap().contains("<SOLUTION>") && prompt["ids"].as_array().unwrap().len() > 50);
}

#[test]
fn completions_from_a_file_are_judged_line_by_line() {
    if !can_judge() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let solution = solution_of("humaneval_0", folder.path());
    let lines = [
        serde_json::json!({ "completion": answer(&solution), "note": "kept by its owner" }),
        serde_json::json!({ "completion": answer("def f(:"), "task": "humaneval_0" }),
        serde_json::json!({ "completion": "nothing", "seed": 5 }),
    ];
    let text = lines.map(|line| line.to_string()).join("\n\n");
    let file = folder.path().join("completions.jsonl");
    std::fs::write(&file, &text).unwrap();
    let file = file.to_str().unwrap();
    let scored = env(&["score", "humaneval", file, "--seed", "0", "--embedded"], folder.path());
    assert_eq!(scored.code, Some(0), "{scored:#?}");
    let scored: Vec<Value> = scored.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let rewards: Vec<_> = scored.iter().map(|line| line["evaluation"]["reward"].as_f64().unwrap()).collect();
    assert_eq!((rewards[0], rewards[2]), (1.0, 0.0));
    assert!((rewards[1] - 0.2).abs() < 1e-9, "{rewards:?}");
    assert_eq!(scored[1]["evaluation"]["tests"][0]["error_class"], "SyntaxError");
    assert_eq!(scored[2]["line"], 5);
    assert_eq!(scored[2]["task"], "humaneval_5");
    assert!(scored.iter().all(|line| line["schema"] == 1 && line["environment"] == "humaneval"));

    let escaping = serde_json::json!({ "completion": answer("raise BaseException()") });
    std::fs::write(file, escaping.to_string()).unwrap();
    let undecidable = env(&["score", "humaneval", file, "--task", "0", "--embedded"], folder.path());
    assert_eq!(undecidable.code, Some(1), "{undecidable:#?}");
    let line: Value = serde_json::from_str(&undecidable.stdout).unwrap();
    assert_eq!(line["unevaluable"]["kind"], "undecidable");

    std::fs::write(file, [0xff, 0xfe]).unwrap();
    let binary = env(&["score", "humaneval", file, "--task", "0", "--embedded"], folder.path());
    assert_eq!(binary.code, Some(65), "{binary:#?}");

    std::fs::write(file, "{\"completion\": \"x\"}\n{\"completion\": 3}\n").unwrap();
    let refused = env(&["score", "humaneval", file, "--seed", "0", "--embedded"], folder.path());
    assert_eq!(refused.code, Some(65), "{refused:#?}");
    assert!(refused.stderr.contains("line 2") && refused.stdout.is_empty(), "{refused:#?}");
    let nameless = env(&["score", "humaneval", file, "--embedded"], folder.path());
    assert!(nameless.stderr.contains("line 1") && nameless.stderr.contains("--task"), "{nameless:#?}");
}

#[test]
fn what_is_missing_on_a_host_is_listed_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().to_str().unwrap();
    let variables = [("HF_HOME", home), ("HF_HUB_OFFLINE", "1"), ("GRAIL_EVALUATOR_DIR", home)];
    let words = ["env", "list", "--json"];
    let listed = Run::start("grail-supervisor", &words, folder.path(), &variables).wait();
    assert_eq!(listed.code, Some(0), "{listed:#?}");
    let listed: Value = serde_json::from_str(&listed.stdout).unwrap();
    let environments = listed["environments"].as_array().unwrap();
    let ids: Vec<_> = environments.iter().map(|one| one["environment"].as_str().unwrap()).collect();
    assert_eq!(ids, ["gsm8k", "math", "mbpp", "humaneval"]);
    assert!(
        environments.iter().all(|one| one["splits"][0]["missing"].as_str().unwrap().contains("GRAIL_DATASET_PATH"))
    );
    assert_eq!(environments[0]["evaluator_missing"], Value::Null);
    assert!(environments[2]["evaluator_missing"].as_str().unwrap().contains("setup-evaluator"));
}

#[test]
fn the_evaluator_is_set_up_once_and_probed() {
    let folder = tempfile::tempdir().unwrap();
    let setup = |words: &[&str], variables: &[(&str, &str)]| {
        Run::start("grail-supervisor", &[&["setup-evaluator"], words].concat(), folder.path(), variables).wait()
    };
    let probed = setup(&["--probe", "--json"], &[]);
    let report: Value = serde_json::from_str(&probed.stdout).unwrap_or_else(|error| panic!("{error}: {probed:#?}"));
    let is_enough = report["missing"].as_array().unwrap().is_empty();
    assert_eq!(probed.code, Some(if is_enough { 0 } else { 1 }), "{probed:#?}");
    assert_eq!(report["sympy_version"], "1.14.0");
    assert!(report["python_version"].as_str().unwrap().starts_with("3.12."));
    assert_eq!(report["layers"].as_array().unwrap().len(), 6);
    // It is there, so nothing is installed again.
    let site = std::path::Path::new(report["site"].as_str().unwrap()).join("sympy/__init__.py");
    let changed = || std::fs::metadata(&site).unwrap().modified().unwrap();
    let before = changed();
    let again = setup(&[], &[]);
    assert_eq!((again.code, changed()), (probed.code, before), "{again:#?}");

    let absent = folder.path().join("absent");
    let missing = setup(&["--probe"], &[("GRAIL_EVALUATOR_DIR", absent.to_str().unwrap())]);
    assert_eq!(missing.code, Some(66), "{missing:#?}");
    assert!(missing.stderr.contains("setup-evaluator") && !absent.exists(), "{missing:#?}");
}
