//! A running supervisor and its operator: the control socket, signals, and what is left behind.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise, also in its helpers")]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use grail_tests::binaries::{Run, binary};
use grail_tests::processes;
use grail_tests::waiting::wait_until;
use grail_tests::world::World;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn send(run: &Run, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(run.pid()).unwrap()), signal).unwrap();
}

#[test]
fn a_slot_is_restarted_in_mid_window_and_the_window_is_whole() {
    let world = World::new();
    let run = world.mine(&["--windows", "1", "--max-groups", "24"]);
    world.wait_for_groups(2);
    let before = world.ask_json(&["status"]);
    assert_eq!((before["pid"].as_u64(), before["phase"].as_str()), (Some(u64::from(run.pid())), Some("mining")));
    assert_eq!(before["stopping"], "none");
    assert_eq!(before["window"]["window"], 3_000);
    assert!(before["server"]["pid"].is_i64() || before["server"]["pid"].is_u64(), "{before:#}");
    let slots = before["slots"].as_array().unwrap();
    assert_eq!(slots.len(), 2, "{before:#}");
    let old = slots[0]["pid"].as_i64().unwrap();

    let table = world.ask(&["status"]);
    assert_eq!(table.code, Some(0), "{table:#?}");
    assert!(table.stdout.contains("window 3000") && table.stdout.contains(&old.to_string()), "{}", table.stdout);

    assert_eq!(world.ask_json(&["restart", "0"])["accepted"], true);
    wait_until("another process has the slot", || {
        let status = world.ask_json(&["status"]);
        status["slots"][0]["pid"].as_i64().is_some_and(|pid| pid != old)
    });
    let refused = world.ask(&["restart", "9"]);
    assert_eq!(refused.code, Some(1), "{refused:#?}");
    assert!(refused.stderr.contains("slot 9"), "{}", refused.stderr);

    let mined = run.wait();
    assert_eq!(mined.code, Some(0), "{mined:#?}");
    world.assert_uploaded_whole();
    world.assert_nothing_left();
}

#[test]
fn stop_drains_and_returns_when_the_supervisor_is_gone() {
    let world = World::new();
    let run = world.mine(&["--max-groups", "200"]);
    world.wait_for_groups(2);
    let stopped = world.ask(&["stop"]);
    assert_eq!(stopped.code, Some(0), "{stopped:#?}");
    assert!(stopped.stdout.contains(&format!("pid {}", run.pid())), "{stopped:#?}");
    assert!(stopped.stderr.contains("waiting for"), "{stopped:#?}");
    // The state directory is free by now: this does not wait.
    world.assert_nothing_left();
    let mined = run.wait();
    assert_eq!(mined.code, Some(0), "{mined:#?}");
    assert_eq!(world.count("window_lost"), 0);
    world.assert_uploaded_whole();
    let absent = world.ask(&["status"]);
    assert_eq!(absent.code, Some(69), "{absent:#?}");
    assert!(absent.stderr.contains(world.state.to_str().unwrap()) && absent.stderr.contains("grail-supervisor mine"));
}

#[test]
fn stop_now_uploads_what_is_spooled() {
    let world = World::new();
    let run = world.mine(&["--max-groups", "200"]);
    world.wait_for_groups(2);
    let stopped = world.ask_json(&["stop", "--now"]);
    assert_eq!((stopped["gone"].as_bool(), stopped["pid"].as_u64()), (Some(true), Some(u64::from(run.pid()))));
    assert_eq!(run.wait().code, Some(0));
    world.assert_uploaded_whole();
    world.assert_nothing_left();
}

#[test]
fn one_signal_drains() {
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let world = World::new();
        let run = world.mine(&["--max-groups", "200"]);
        world.wait_for_groups(2);
        send(&run, signal);
        let mined = run.wait();
        assert_eq!(mined.code, Some(0), "{signal}: {mined:#?}");
        assert!(mined.stderr.contains("Told to stop"), "{}", mined.stderr);
        assert!(!mined.stderr.contains("Stopping now"), "{}", mined.stderr);
        world.assert_uploaded_whole();
        world.assert_nothing_left();
    }
}

#[test]
fn a_second_signal_uploads_what_is_spooled() {
    let world = World::new();
    let run = world.mine(&["--max-groups", "200"]);
    world.wait_for_groups(2);
    // Two different ones: the same one twice may arrive as one.
    send(&run, Signal::SIGTERM);
    send(&run, Signal::SIGINT);
    let mined = run.wait();
    assert_eq!(mined.code, Some(0), "{mined:#?}");
    assert!(mined.stderr.contains("Stopping now"), "{}", mined.stderr);
    world.assert_uploaded_whole();
    world.assert_nothing_left();
}

#[test]
fn a_third_order_ends_it_at_once_and_the_spool_is_safe() {
    let world = World::new();
    let run = world.mine(&["--max-groups", "200"]);
    world.wait_for_groups(2);
    // Workers that do not react keep it from ending by itself.
    for event in world.events().iter().filter(|event| event["kind"] == "worker_ready") {
        kill(Pid::from_raw(i32::try_from(event["pid"].as_i64().unwrap()).unwrap()), Signal::SIGSTOP).unwrap();
    }
    assert_eq!(world.ask_json(&["stop", "--now", "--no-wait"])["gone"], false);
    send(&run, Signal::SIGTERM);
    let mined = run.wait();
    assert_eq!(mined.code, Some(75), "{mined:#?}");
    assert!(mined.stderr.contains("spool"), "{}", mined.stderr);
    wait_until("its children are gone", || processes::mentioning(&world.state).is_empty());
    let spooled = world.count("group_spooled");
    // The third order may come before or behind the moment at which the spool is closed.
    let places = ["spool/window-3000.spool", "spool/window-3000.sent"].map(|name| world.state.join(name));
    let place = places.iter().find(|place| place.is_file()).expect("a spool");
    let spool = grail_supervisor::spool::read(place).unwrap();
    assert!(spool.1.len() >= spooled && spooled >= 2, "{} groups, {spooled} events", spool.1.len());
}

#[test]
fn a_killed_supervisor_leaves_a_socket_that_the_next_one_replaces() {
    let world = World::new();
    let run = world.mine(&["--max-groups", "200"]);
    let pid = run.pid();
    wait_until("it listens", || world.socket().exists());
    let second = world.mine(&[]).wait();
    assert_eq!(second.code, Some(73), "{second:#?}");
    assert!(second.stderr.contains(&format!("pid {pid} on host ")), "{}", second.stderr);
    wait_until("its children have their sockets", || {
        world.state.join("run").join(format!("grail-mine-{pid}")).exists()
    });
    send(&run, Signal::SIGKILL);
    assert_eq!(run.wait().code, None);
    assert!(world.socket().exists());
    let absent = world.ask(&["stop"]);
    assert_eq!(absent.code, Some(69), "{absent:#?}");

    let next = world.mine(&["--max-groups", "200"]);
    wait_until("the next one answers", || world.ask(&["status"]).code == Some(0));
    assert!(!world.state.join("run").join(format!("grail-mine-{pid}")).exists());
    assert_eq!(world.ask_json(&["stop", "--now"])["pid"].as_u64(), Some(u64::from(next.pid())));
    assert_eq!(next.wait().code, Some(0));
    world.assert_nothing_left();
}

#[test]
fn another_user_is_refused() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can become another user");
        return;
    }
    let world = World::new();
    let run = world.mine(&["--max-groups", "200"]);
    wait_until("it answers", || world.ask(&["status"]).code == Some(0));
    // Where the other user can read it.
    let program = world.folder.path().join("grail-supervisor");
    std::fs::copy(binary("grail-supervisor"), &program).unwrap();
    let open = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    open(world.folder.path(), 0o755);
    let as_nobody = || {
        let mut command = Command::new(&program);
        command.args(["status", "--state-dir", world.state.to_str().unwrap()]).env_clear().env("HOME", "/");
        let output = command.current_dir("/").uid(65_534).gid(65_534).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = as_nobody();
    assert_eq!(code, Some(77), "{said}");
    // Even where modes let it through, the peer's uid decides.
    open(&world.state, 0o755);
    open(&world.socket(), 0o666);
    let (code, said) = as_nobody();
    assert_eq!(code, Some(77), "{said}");
    assert!(said.contains("65534"), "{said}");
    world.ask_json(&["stop", "--now"]);
    assert_eq!(run.wait().code, Some(0));
}

#[test]
fn a_closed_terminal_does_not_end_a_miner() {
    let world = World::new();
    let mut command = Command::new(binary("grail-supervisor"));
    command.args(["-v", "mine", "--local", "--windows", "1", "--max-groups", "6", "--block-ms", "1500", "--state-dir"]);
    command
        .arg(&world.state)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .env("HOME", world.folder.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).current_dir(world.folder.path());
    let mut child = command.spawn().unwrap();
    // Nobody reads from the first line on: every write fails with a broken pipe.
    drop((child.stdout.take(), child.stderr.take()));
    wait_until("it ends", || {
        let state = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        state.rsplit_once(')').unwrap().1.trim_start().starts_with('Z')
    });
    assert_eq!(child.wait().unwrap().code(), Some(0));
    world.assert_uploaded_whole();
    world.assert_nothing_left();
}
