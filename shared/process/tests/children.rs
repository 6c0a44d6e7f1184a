//! Children as real processes.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use grail_process::{
    Child, ChildSpec, Environment, ExitCause, Grouping, Limit, LogPolicy, Marker, Output, Resource, Signal,
    SignalError, SpawnError, Stdin, StopPlan, StopTarget, become_subreaper, spawn,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

/// Longer than anything here takes; only a defect waits for it.
const LONG: Duration = Duration::from_secs(60);

type Lines = Arc<Mutex<Vec<String>>>;

/// A shell that runs `script`, and the lines that it writes.
fn shell(script: &str) -> (ChildSpec, Lines) {
    let lines = Lines::default();
    let sink = Arc::clone(&lines);
    let mut spec = ChildSpec::new("shell", "/bin/sh").arguments(["-c", script]);
    spec.log = LogPolicy::to_sink(move |line| sink.lock().unwrap().push(line.text.to_owned()));
    (spec, lines)
}

async fn output(spec: ChildSpec, lines: &Lines) -> Vec<String> {
    let exit = spawn(spec).await.unwrap().wait().await;
    assert_eq!(exit.cause, ExitCause::Code(0), "{lines:?}");
    lines.lock().unwrap().clone()
}

/// A pipe whose writing end a child and all its descendants hold: its end is theirs.
struct Witness {
    reader: pipe::Receiver,
    writer: Option<OwnedFd>,
}

impl Witness {
    fn new() -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        let reader = pipe::Receiver::from_owned_fd(reader.into()).unwrap();
        Self { reader, writer: Some(writer.into()) }
    }

    fn give(&mut self, spec: &mut ChildSpec) -> i32 {
        spec.inherit(self.writer.take().unwrap())
    }

    /// Waits until `count` descendants have said that they live.
    async fn alive(&mut self, count: usize) {
        let mut bytes = vec![0; count];
        tokio::time::timeout(LONG, self.reader.read_exact(&mut bytes)).await.expect("they live").unwrap();
    }

    async fn all_gone(&mut self) {
        let mut rest = Vec::new();
        tokio::time::timeout(LONG, self.reader.read_to_end(&mut rest)).await.expect("all have ended").unwrap();
    }
}

/// A spec whose script is given the number of a witness's descriptor as `$1`; `say` writes one byte to it.
fn witnessed(script: &str) -> (ChildSpec, Witness) {
    let mut witness = Witness::new();
    let script = format!("say() {{ printf x >/proc/self/fd/$W; }}; W=$1; {script}");
    let (mut spec, _) = shell(&script);
    let number = witness.give(&mut spec);
    (spec.arguments(["sh".to_owned(), number.to_string()]), witness)
}

#[tokio::test]
async fn the_environment_is_scrubbed() {
    let (mut spec, lines) = shell("env");
    spec.environment = Environment::only(["PATH"]).with("GRAIL_TEST", "a b");
    spec.marker = Some(Marker { variable: "GRAIL_MARK".into(), value: "m1".into() });
    let mut variables = output(spec, &lines).await;
    // What the shell itself adds.
    variables.retain(|line| !["PWD=", "OLDPWD=", "SHLVL=", "_="].iter().any(|own| line.starts_with(own)));
    variables.sort();
    let path = format!("PATH={}", std::env::var("PATH").unwrap());
    assert_eq!(variables, ["GRAIL_MARK=m1", "GRAIL_TEST=a b", path.as_str()]);
    assert!(std::env::vars_os().count() > 1, "there was something to scrub");
}

/// Variable by which this test program knows that it is started with secrets.
const SECRETS_VARIABLE: &str = "GRAIL_TEST_WITH_SECRETS";

/// No test by itself: the parent that [`no_secret_of_ours_reaches_a_child`] starts.
#[tokio::test]
async fn a_parent_with_secrets() {
    if std::env::var_os(SECRETS_VARIABLE).is_none() {
        return;
    }
    for (name, _) in SECRETS {
        assert!(std::env::var_os(name).is_some(), "{name} is there to be inherited");
    }
    for environment in [Environment::harmless(), Environment::all_except(["EDITOR"]), Environment::only(["*"])] {
        let (mut spec, lines) = shell("env");
        spec.environment = environment;
        for line in output(spec, &lines).await {
            println!("child: {line}");
        }
    }
}

const SECRETS: [(&str, &str); 5] = [
    ("R2_WRITE_SECRET_ACCESS_KEY", "hidden-1"),
    ("R2_READ_ACCESS_KEY_ID", "hidden-2"),
    ("WANDB_API_KEY", "hidden-3"),
    ("HF_TOKEN", "hidden-4"),
    ("BT_WALLET_COLD", "hidden-5"),
];

#[tokio::test]
async fn no_secret_of_ours_reaches_a_child() {
    let lines = Lines::default();
    let sink = Arc::clone(&lines);
    let mut spec = ChildSpec::new("parent", std::env::current_exe().unwrap()).arguments([
        "--exact",
        "a_parent_with_secrets",
        "--nocapture",
        "--test-threads=1",
    ]);
    spec.log = LogPolicy::to_sink(move |line| sink.lock().unwrap().push(line.text.to_owned()));
    spec.environment.set(SECRETS_VARIABLE, "1");
    for (name, value) in SECRETS {
        spec.environment.set(name, value);
    }
    let lines = output(spec, &lines).await;
    assert_eq!(lines.iter().filter(|line| line.contains("child: PWD=")).count(), 3, "{lines:?}");
    assert_eq!(lines.iter().filter(|line| line.contains("hidden-")).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[tokio::test]
async fn only_chosen_descriptors_are_inherited() {
    let leaked = {
        let file = File::open("/dev/null").unwrap();
        // Without close-on-exec, as a C library opens files.
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_DUPFD(60)).unwrap()
    };
    let (mut spec, lines) = shell(r#"for f in /proc/$$/fd/*; do echo "${f##*/}"; done; cat /proc/self/fd/$0"#);
    let number = spec.hand_over(b"the token").unwrap();
    let spec = spec.argument(number.to_string());
    let mut lines = output(spec, &lines).await;
    assert_eq!(lines.pop().as_deref(), Some("the token"));
    let unexpected: Vec<String> = lines
        .into_iter()
        .filter(|open| !["0", "1", "2"].contains(&open.as_str()) && *open != number.to_string())
        // The shell's own: its script or the folder that it lists.
        .filter(|open| open.parse::<i32>().unwrap() == leaked || open.parse::<i32>().unwrap() > 20)
        .collect();
    assert_eq!(unexpected, Vec::<String>::new());
    nix::unistd::close(leaked).unwrap();
}

#[test]
fn what_would_block_is_not_handed_over() {
    let mut spec = ChildSpec::new("x", "/bin/true");
    assert!(spec.hand_over(&[0; 4_097]).is_err());
    assert!(spec.hand_over(&[0; 4_096]).is_ok());
}

#[tokio::test]
async fn limits_scores_and_cpus_reach_the_child() {
    let cpu = first_cpu();
    let (mut spec, lines) = shell(
        "ulimit -c; ulimit -n; cat /proc/self/oom_score_adj; grep -h -e Cpus_allowed_list -e NoNewPrivs /proc/self/status; pwd",
    );
    spec.limits.push(Limit::fixed(Resource::RLIMIT_NOFILE, 99));
    spec.limits.push(Limit::most(Resource::RLIMIT_STACK));
    spec.oom_score_adjustment = Some(700);
    spec.cpus = vec![cpu];
    spec.directory = Some("/proc".into());
    let lines = output(spec, &lines).await;
    assert_eq!(lines[..3], ["0", "99", "700"]);
    assert_eq!(lines[3..], ["NoNewPrivs:\t1".to_owned(), format!("Cpus_allowed_list:\t{cpu}"), "/proc".to_owned()]);
}

#[tokio::test]
async fn memory_comes_from_the_node_if_the_kernel_lets_it() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let is_filtered = !status.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "0"]));
    let (mut spec, lines) = shell("head -n 1 /proc/self/numa_maps 2>/dev/null; echo ran");
    spec.numa_node = Some(0);
    let lines = output(spec, &lines).await;
    assert_eq!(lines.last().unwrap(), "ran", "also where it is refused");
    // A kernel without NUMA has no such file, and a sandbox may refuse the call.
    let Some(map) = lines.iter().find(|line| line.contains(" default ") || line.contains(" prefer")) else { return };
    assert!(map.contains(" prefer:0 ") || is_filtered, "{map}");

    let (mut spec, lines) = shell("echo ran");
    spec.numa_node = Some(1_000_000);
    assert_eq!(output(spec, &lines).await, ["ran"], "a node that no kernel knows");
}

fn first_cpu() -> usize {
    let ours = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
    (0..1_024).find(|cpu| ours.is_set(*cpu).unwrap_or(false)).unwrap()
}

#[tokio::test]
async fn a_child_leads_its_group_or_session() {
    for grouping in [Grouping::Group, Grouping::Session] {
        let (mut spec, lines) = shell("exec cat /proc/self/stat");
        spec.grouping = grouping;
        let stat = output(spec, &lines).await.remove(0);
        let fields: Vec<&str> = stat.split(' ').collect();
        let (pid, group, session) = (fields[0], fields[4], fields[5]);
        assert_eq!(pid, group);
        assert_eq!(pid == session, grouping == Grouping::Session);
    }
}

#[tokio::test]
async fn ignored_signals_are_not_passed_on() {
    let (spec, lines) = shell("grep SigIgn /proc/self/status");
    let ignored = output(spec, &lines).await.remove(0);
    let mask = u64::from_str_radix(ignored.rsplit('\t').next().unwrap(), 16).unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP, Signal::SIGPIPE] {
        assert_eq!(mask & (1 << (signal as i32 - 1)), 0, "{signal}");
    }
}

#[tokio::test]
async fn a_program_that_cannot_run_is_a_typed_error() {
    let error = spawn(ChildSpec::new("x", "/nonexistent/program")).await.unwrap_err();
    let SpawnError::Exec { program, source } = &error else { panic!("{error:?}") };
    assert_eq!((program.to_str(), source.kind()), (Some("/nonexistent/program"), std::io::ErrorKind::NotFound));
    let error = spawn(ChildSpec::new("x", "/etc/passwd")).await.unwrap_err();
    assert!(matches!(error, SpawnError::Exec { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied));
    let mut spec = ChildSpec::new("x", "/bin/true");
    spec.cpus = vec![1_000_000];
    assert!(matches!(spawn(spec).await.unwrap_err(), SpawnError::NoSuchCpu { cpu: 1_000_000, .. }));
}

#[tokio::test]
async fn the_cause_of_an_end_is_told() {
    for (script, expected) in [
        ("exit 0", ExitCause::Code(0)),
        ("exit 75", ExitCause::Code(75)),
        ("kill -SEGV $$", ExitCause::Signal { signal: Signal::SIGSEGV, core: false }),
        ("kill -KILL $$", ExitCause::Signal { signal: Signal::SIGKILL, core: false }),
    ] {
        let child = spawn(shell(script).0).await.unwrap();
        let exit = child.wait().await;
        assert_eq!((exit.cause, exit.killed, exit.survivors), (expected, 0, vec![]), "{script}");
        assert_eq!(child.exit().unwrap().cause, expected, "and again");
        assert_eq!(child.signal(Signal::SIGTERM), Err(SignalError::Gone));
        assert_eq!(child.signal_group(Signal::SIGTERM), Err(SignalError::Gone));
    }
}

#[tokio::test]
async fn a_patient_child_ends_by_itself_and_a_deaf_one_is_killed() {
    let (spec, mut witness) = witnessed("trap 'exit 7' TERM; say; while :; do sleep 0.01; done");
    let child = spawn(spec).await.unwrap();
    witness.alive(1).await;
    let exit = child.stop(&StopPlan::terminate(LONG)).await.unwrap();
    assert_eq!(exit.cause, ExitCause::Code(7));

    let (spec, mut witness) = witnessed("trap '' TERM; say; while :; do sleep 0.01; done");
    let child = spawn(spec).await.unwrap();
    witness.alive(1).await;
    let moment = Duration::from_millis(20);
    let plan = StopPlan::terminate(moment).then(Signal::SIGTERM, StopTarget::Group, moment);
    assert_eq!(child.stop(&plan).await.unwrap().cause.signal(), Some(Signal::SIGKILL));
    witness.all_gone().await;
    assert_eq!(child.stop(&plan).await.unwrap().cause.signal(), Some(Signal::SIGKILL), "a second stop is no harm");
}

#[tokio::test]
async fn a_stopped_process_can_be_killed() {
    // A signal that it handles waits until it goes on.
    let (spec, mut witness) = witnessed("trap 'exit 7' TERM; say; while :; do sleep 0.01; done");
    let child = spawn(spec).await.unwrap();
    witness.alive(1).await;
    child.signal(Signal::SIGSTOP).unwrap();
    let exit = child.stop(&StopPlan::terminate(Duration::from_millis(20))).await.unwrap();
    assert_eq!(exit.cause.signal(), Some(Signal::SIGKILL));
}

#[tokio::test]
async fn ending_a_child_reaches_its_grandchildren() {
    let (spec, mut witness) = witnessed("(say; exec sleep 1000) & (trap '' TERM; say; exec sleep 1000) & say; wait");
    let child = spawn(spec).await.unwrap();
    witness.alive(3).await;
    assert_eq!(child.members().len(), 2);
    let exit = child.stop(&StopPlan::kill()).await.unwrap();
    assert_eq!((exit.cause.signal(), exit.survivors), (Some(Signal::SIGKILL), vec![]));
    witness.all_gone().await;
    assert_eq!(child.members(), Vec::<i32>::new());
}

#[tokio::test]
async fn what_a_child_leaves_behind_when_it_ends_is_killed() {
    let (spec, mut witness) = witnessed("(say; exec sleep 1000) & (say; exec sleep 1000) & head -c 0; exit 3");
    let child = spawn(spec).await.unwrap();
    let exit = child.wait().await;
    assert_eq!((exit.cause, exit.killed), (ExitCause::Code(3), 2));
    witness.all_gone().await;
}

#[tokio::test]
async fn who_left_the_group_is_found_by_the_marker() {
    let (mut spec, mut witness) =
        witnessed("setsid sh -c 'printf x >/proc/self/fd/$0; exec sleep 1000' $W & say; wait");
    spec.marker = Some(Marker { variable: "GRAIL_MARK".into(), value: format!("mark-{}", std::process::id()) });
    let child = spawn(spec).await.unwrap();
    witness.alive(2).await;
    let exit = child.stop(&StopPlan::kill()).await.unwrap();
    assert_eq!(exit.killed, 1);
    witness.all_gone().await;
}

#[tokio::test]
async fn a_subreaper_becomes_the_parent_of_orphans() {
    become_subreaper().unwrap();
    // The orphan has left group and session; it writes the number of its new parent.
    let orphan =
        r#"parent() { cut -d" " -f4 /proc/$$/stat; }; while [ "$(parent)" = "$1" ]; do sleep 0.01; done; parent"#;
    // What has not left the group when the leader ends is swept with it.
    let (mut spec, _) = shell(
        r#"session() { cut -d" " -f6 /proc/$1/stat; }; setsid sh -c "$1" sh $$ &
        while [ "$(session $!)" = "$(session $$)" ]; do sleep 0.01; done; exit 0"#,
    );
    let (write, mut report) = mpsc::unbounded_channel();
    spec.log = LogPolicy::to_sink(move |line| write.send(line.text.to_owned()).unwrap_or_default());
    let child = spawn(spec.arguments(["sh", orphan])).await.unwrap();
    let parent = tokio::time::timeout(LONG, report.recv()).await.expect("the orphan writes").unwrap();
    assert_eq!(parent, std::process::id().to_string());
    assert_eq!(child.wait().await.cause, ExitCause::Code(0));
}

#[tokio::test]
async fn dropping_a_child_kills_it() {
    let (spec, mut witness) = witnessed("(say; exec sleep 1000) & say; wait");
    let child = spawn(spec).await.unwrap();
    witness.alive(2).await;
    drop(child);
    witness.all_gone().await;
}

#[test]
fn the_end_of_the_runtime_kills_its_children() {
    let mut witness = None;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let child: Child = runtime.block_on(async {
        let (spec, mut own) = witnessed("say; exec sleep 1000");
        let child = spawn(spec).await.unwrap();
        own.alive(1).await;
        witness = Some(own.reader.into_blocking_fd().unwrap());
        child
    });
    drop(runtime);
    let mut rest = Vec::new();
    File::from(witness.unwrap()).read_to_end(&mut rest).unwrap();
    assert_eq!(child.signal(Signal::SIGTERM), Err(SignalError::Gone));
}

#[tokio::test]
async fn a_flood_of_lines_is_bounded() {
    let (mut spec, lines) = shell(
        "i=0; while [ $i -lt 200 ]; do echo line $i; i=$((i+1)); done; head -c 3000000 /dev/zero | tr '\\0' x; \
                                   echo; yes flood | head -n 100000; echo last >&2",
    );
    spec.log.lines_per_second = 0;
    spec.log.burst_lines = 210;
    spec.log.kept_lines = 50;
    spec.log.line_bytes = 100;
    let child = spawn(spec).await.unwrap();
    assert_eq!(child.wait().await.cause, ExitCause::Code(0));
    let lines = lines.lock().unwrap();
    assert_eq!(lines.len(), 210);
    assert_eq!(lines[199], "line 199");
    assert!(lines.iter().all(|line| line.len() <= 100 + " [cut]".len()));
    let kept = child.last_lines();
    assert_eq!(kept.len(), 50);
    assert!(kept.iter().any(|line| line == "flood"));
}

#[tokio::test]
async fn standard_streams_can_be_pipes() {
    let mut spec = ChildSpec::new("cat", "/bin/cat");
    spec.stdin = Stdin::Piped;
    spec.stdout = Output::Piped;
    let child = spawn(spec).await.unwrap();
    let (mut stdin, mut stdout) = (child.take_stdin().unwrap().unwrap(), child.take_stdout().unwrap().unwrap());
    assert!(child.take_stdin().unwrap().is_none());
    stdin.write_all(b"through").await.unwrap();
    drop(stdin);
    let mut echoed = String::new();
    stdout.read_to_string(&mut echoed).await.unwrap();
    assert_eq!(echoed, "through");
    assert_eq!(child.wait().await.cause, ExitCause::Code(0));

    let (reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, b"given\n").unwrap();
    drop(writer);
    let (mut spec, lines) = shell("cat");
    spec.stdin = Stdin::From(reader.into());
    assert_eq!(output(spec, &lines).await, ["given"]);
}

#[tokio::test]
async fn many_children_at_once_are_all_seen_to_their_end() {
    let (ends, mut inbox) = mpsc::unbounded_channel();
    for number in 0..20 {
        let child = spawn(shell(&format!("exit {number}")).0).await.unwrap();
        let ends = ends.clone();
        tokio::spawn(async move { ends.send(child.wait().await.cause.code().unwrap()).unwrap() });
    }
    drop(ends);
    let mut codes = Vec::new();
    while let Some(code) = inbox.recv().await {
        codes.push(code);
    }
    codes.sort_unstable();
    assert_eq!(codes, (0..20).collect::<Vec<i32>>());
}

/// Variables by which this test program knows that it is started as a parent, with the witness's descriptor.
const PARENT_VARIABLE: &str = "GRAIL_TEST_PARENT_FD";

/// No test by itself: the parent that [`a_child_dies_with_its_parent`] kills.
#[tokio::test]
async fn a_parent_with_a_child() {
    let Ok(number) = std::env::var(PARENT_VARIABLE) else { return };
    let file = File::options().write(true).open(format!("/proc/self/fd/{number}")).unwrap();
    let (mut spec, _) = shell("printf x >/proc/self/fd/$0; exec sleep 1000");
    let inherited = spec.inherit(file.into());
    let child = spawn(spec.argument(inherited.to_string())).await.unwrap();
    child.wait().await;
}

#[tokio::test]
async fn a_child_dies_with_its_parent() {
    let mut witness = Witness::new();
    let mut spec = ChildSpec::new("parent", std::env::current_exe().unwrap()).arguments([
        "--exact",
        "a_parent_with_a_child",
        "--nocapture",
        "--test-threads=1",
    ]);
    let number = witness.give(&mut spec);
    spec.environment.set(PARENT_VARIABLE, number.to_string());
    let parent = spawn(spec).await.unwrap();
    witness.alive(1).await;
    // The grandchild leads a group of its own: only the parent-death signal can reach it.
    assert_eq!(parent.members(), Vec::<i32>::new());
    parent.signal(Signal::SIGKILL).unwrap();
    assert_eq!(parent.wait().await.cause.signal(), Some(Signal::SIGKILL));
    witness.all_gone().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_outlives_the_thread_that_asked_for_it() {
    let (spec, mut witness) = witnessed("say; exec sleep 1000");
    // A thread and a runtime of its own ask, and end.
    let handle = tokio::runtime::Handle::current();
    let asked = std::thread::spawn(move || handle.block_on(spawn(spec)).unwrap());
    let child = asked.join().unwrap();
    witness.alive(1).await;
    assert_eq!(child.exit(), None);
    child.signal(Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().await.cause.signal(), Some(Signal::SIGTERM), "not SIGKILL, the parent-death signal");
    assert!(witness.reader.as_raw_fd() > 2);
}
