//! Control groups of the kernel, where this process may make some; elsewhere these tests say so and end.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use grail_process::cgroup::Delegation;
use grail_process::{ChildSpec, Signal, StopPlan, spawn};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// Longer than anything here takes; only a defect waits for it.
const LONG: Duration = Duration::from_secs(60);

/// A child whose grandchild has left group and session, and says with a byte that it lives.
const ESCAPE: &str = "setsid sh -c 'printf x >/proc/self/fd/$0; exec sleep 1000' $0 & exec sleep 1000";

fn delegation() -> Option<Delegation> {
    let delegation = Delegation::open(Path::new("/"));
    if delegation.is_none() {
        eprintln!("skipped: no control group was delegated to this process");
    }
    delegation
}

fn escaping() -> (ChildSpec, pipe::Receiver) {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut spec = ChildSpec::new("shell", "/bin/sh").arguments(["-c", ESCAPE]);
    let number = spec.inherit(writer.into());
    (spec.argument(number.to_string()), pipe::Receiver::from_owned_fd(reader.into()).unwrap())
}

async fn alive(reader: &mut pipe::Receiver) {
    tokio::time::timeout(LONG, reader.read_u8()).await.expect("it lives").unwrap();
}

async fn all_gone(reader: &mut pipe::Receiver) {
    let mut rest = Vec::new();
    tokio::time::timeout(LONG, reader.read_to_end(&mut rest)).await.expect("all have ended").unwrap();
}

#[tokio::test]
async fn who_left_group_and_session_ends_with_the_child() {
    let Some(delegation) = delegation() else { return };
    let (mut spec, mut reader) = escaping();
    let leaf = delegation.leaf("escape").unwrap();
    let folder = leaf.folder().to_owned();
    spec.cgroup = Some(leaf);
    let child = spawn(spec).await.unwrap();
    alive(&mut reader).await;
    assert_eq!(child.members().len(), 1, "the grandchild");
    let inside = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap();
    assert!(inside.lines().any(|pid| pid == child.pid().to_string()), "{inside}");
    let exit = child.stop(&StopPlan::terminate(LONG)).await.unwrap();
    assert_eq!((exit.cause.signal(), exit.killed, exit.survivors), (Some(Signal::SIGTERM), 1, vec![]));
    all_gone(&mut reader).await;
    assert!(!folder.exists());
    assert!(child.memory().is_some() && !child.was_oom_killed());
}

#[tokio::test]
async fn dropping_a_child_ends_who_left_it() {
    let Some(delegation) = delegation() else { return };
    let (mut spec, mut reader) = escaping();
    spec.cgroup = Some(delegation.leaf("dropped").unwrap());
    let child = spawn(spec).await.unwrap();
    alive(&mut reader).await;
    drop(child);
    all_gone(&mut reader).await;
}

/// Variable by which this test program knows that it is started as a parent, with the descriptor of a pipe.
const PARENT_VARIABLE: &str = "GRAIL_TEST_CGROUP_FD";

/// No test by itself: the parent that [`the_next_start_ends_what_a_killed_parent_left`] kills.
#[tokio::test]
async fn a_parent_with_a_control_group() {
    let Ok(number) = std::env::var(PARENT_VARIABLE) else { return };
    let writer = File::options().write(true).open(format!("/proc/self/fd/{number}")).unwrap();
    let mut spec = ChildSpec::new("shell", "/bin/sh").arguments(["-c", ESCAPE]);
    let inherited = spec.inherit(writer.into());
    spec.cgroup = Some(delegation().unwrap().leaf("left").unwrap());
    spawn(spec.argument(inherited.to_string())).await.unwrap().wait().await;
}

#[tokio::test]
async fn the_next_start_ends_what_a_killed_parent_left() {
    if delegation().is_none() {
        return;
    }
    let (reader, writer) = std::io::pipe().unwrap();
    let mut reader = pipe::Receiver::from_owned_fd(reader.into()).unwrap();
    let mut spec = ChildSpec::new("parent", std::env::current_exe().unwrap()).arguments([
        "--exact",
        "a_parent_with_a_control_group",
        "--nocapture",
    ]);
    let number = spec.inherit(writer.into());
    spec.environment.set(PARENT_VARIABLE, number.to_string());
    let parent = spawn(spec).await.unwrap();
    alive(&mut reader).await;
    parent.signal(Signal::SIGKILL).unwrap();
    parent.wait().await;
    // The parent-death signal has reached the child, and nothing the grandchild.
    assert!(delegation().is_some());
    all_gone(&mut reader).await;
}
