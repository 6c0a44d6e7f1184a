//! A child that is kept alive, as a real process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use grail_process::restart::{BackoffPolicy, Intensity, RestartPolicy};
use grail_process::state::{GiveUp, State};
use grail_process::{
    Child, ChildEvent, ChildPolicy, ChildSpec, DeathCause, ExitCause, Incarnation, LogPolicy, NotReady, Role, Signal,
    StartError, StopPlan, Supervised, supervise,
};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::watch;

const LONG: Duration = Duration::from_secs(60);
/// What is added to the number of an incarnation that says it is sick.
const SICK: u64 = 1_000;

/// Runs a script in which `$1` is the number of the incarnation; it is ready when it has written `ready`.
struct Shell {
    script: &'static str,
    started: Arc<AtomicU64>,
    written: watch::Receiver<u64>,
    write: watch::Sender<u64>,
}

impl Shell {
    fn new(script: &'static str) -> Self {
        let (write, written) = watch::channel(0);
        Self { script, started: Arc::default(), written, write }
    }
}

impl Shell {
    fn spec(&mut self, incarnation: Incarnation) -> Result<ChildSpec, StartError> {
        if self.script.is_empty() {
            return Err("no script".into());
        }
        self.started.fetch_add(1, Ordering::Relaxed);
        let number = incarnation.number;
        let arguments = ["-c".to_owned(), self.script.to_owned(), "sh".to_owned(), number.to_string()];
        let mut spec = ChildSpec::new("shell", "/bin/sh").arguments(arguments);
        let write = self.write.clone();
        spec.log = LogPolicy::to_sink(move |line| {
            match line.text {
                "ready" => drop(write.send_replace(number)),
                "sick" => drop(write.send_replace(number + SICK)),
                _ => {}
            };
        });
        Ok(spec)
    }
}

impl Role for Shell {
    type Process = Child;
    type Link = u64;

    async fn start(&mut self, incarnation: Incarnation) -> Result<Child, StartError> {
        Ok(grail_process::spawn(self.spec(incarnation)?).await?)
    }

    fn watch(&mut self, link: &u64) -> impl Future<Output = DeathCause> + Send + 'static {
        let (mut written, number) = (self.written.clone(), *link / 10);
        async move {
            // The second line of an incarnation stands for a sign that it does not work any more.
            if written.wait_for(|written| *written == number + SICK).await.is_ok() {
                return DeathCause::HeartbeatLost;
            }
            std::future::pending().await
        }
    }

    fn ready(
        &mut self,
        _: Arc<Child>,
        incarnation: Incarnation,
    ) -> impl Future<Output = Result<u64, NotReady>> + Send + 'static {
        let mut written = self.written.clone();
        async move {
            match written.wait_for(|number| *number % SICK == incarnation.number).await {
                Ok(_) => Ok(incarnation.number * 10),
                Err(_) => Err(NotReady(DeathCause::HandshakeFailed { detail: "no output".into() })),
            }
        }
    }
}

fn policy() -> ChildPolicy {
    let first = Duration::from_millis(1);
    ChildPolicy {
        name: "shell".into(),
        start_limit: LONG,
        restart: RestartPolicy {
            intensities: vec![Intensity { most: 3, period: LONG }],
            backoff: BackoffPolicy { first, most: first, jitter: 0.5, forgiven_after: LONG },
            quarantine: None,
        },
        stop: StopPlan::terminate(LONG),
        kill: StopPlan::kill(),
        last_incarnation: 0,
        jitter_seed: None,
    }
}

struct Watched {
    child: Supervised,
    events: UnboundedReceiver<ChildEvent<u64>>,
}

impl Watched {
    fn start(role: Shell, policy: ChildPolicy) -> Self {
        let (child, events) = supervise(role, policy);
        Self { child, events }
    }

    async fn next(&mut self) -> ChildEvent<u64> {
        tokio::time::timeout(LONG, self.events.recv()).await.expect("an event").expect("it is kept")
    }

    async fn until_ready(&mut self) -> (u64, u64, Arc<Child>) {
        loop {
            if let ChildEvent::Ready { incarnation, child, link } = self.next().await {
                return (incarnation.number, link, child);
            }
        }
    }

    async fn until_given_up(&mut self) -> GiveUp {
        loop {
            if let ChildEvent::GaveUp(reason) = self.next().await {
                return reason;
            }
        }
    }

    async fn until_died(&mut self) -> (u64, DeathCause, Vec<String>) {
        loop {
            if let ChildEvent::Died { incarnation, cause, last_lines, .. } = self.next().await {
                return (incarnation, cause, last_lines);
            }
        }
    }
}

const PATIENT: &str = "echo ready; exec sleep 1000";

#[tokio::test]
async fn a_child_that_is_killed_comes_back() {
    let mut watched = Watched::start(Shell::new(PATIENT), policy());
    assert!(matches!(watched.next().await, ChildEvent::Started { incarnation: Incarnation { number: 1, .. }, .. }));
    let (number, link, child) = watched.until_ready().await;
    assert_eq!((number, link), (1, 10));
    assert_eq!(watched.child.state(), State::Ready);
    child.signal(Signal::SIGSEGV).unwrap();
    let (number, cause, last_lines) = watched.until_died().await;
    assert_eq!((number, last_lines), (1, vec!["ready".to_owned()]));
    assert_eq!(cause, DeathCause::Exit(ExitCause::Signal { signal: Signal::SIGSEGV, core: false }));
    assert!(matches!(watched.next().await, ChildEvent::Backoff { .. }));
    let (number, link, second) = watched.until_ready().await;
    assert_eq!((number, link), (2, 20));
    watched.child.shut_down().await;
    assert_eq!(second.exit().unwrap().cause.signal(), Some(Signal::SIGTERM), "nothing is left");
}

#[tokio::test]
async fn a_usage_error_is_not_tried_again() {
    let role = Shell::new("echo no such flag >&2; exit 2");
    let started = Arc::clone(&role.started);
    let mut watched = Watched::start(role, policy());
    let (_, cause, last_lines) = watched.until_died().await;
    assert_eq!(last_lines, ["no such flag"]);
    assert_eq!(watched.until_given_up().await, GiveUp::Hopeless { cause });
    assert_eq!(started.load(Ordering::Relaxed), 1);
    watched.child.shut_down().await;
}

#[tokio::test]
async fn a_flapping_child_is_given_up_and_can_be_released() {
    let role = Shell::new("[ $1 -gt 4 ] || exit 70; echo ready; exec sleep 1000");
    let started = Arc::clone(&role.started);
    let mut watched = Watched::start(role, policy());
    assert!(matches!(watched.until_given_up().await, GiveUp::TooOften { .. }));
    assert_eq!(started.load(Ordering::Relaxed), 4, "the first start and three more");
    watched.child.control().release();
    assert_eq!(watched.until_ready().await.0, 5);
    watched.child.shut_down().await;
}

#[tokio::test]
async fn a_start_that_hangs_is_ended() {
    let mut slow = policy();
    slow.start_limit = Duration::from_millis(30);
    slow.restart.intensities[0].most = 0;
    let mut watched = Watched::start(Shell::new("exec sleep 1000"), slow);
    assert_eq!(watched.until_died().await.1, DeathCause::StartHung);
    assert!(matches!(watched.until_given_up().await, GiveUp::TooOften { cause: DeathCause::StartHung, .. }));
    watched.child.shut_down().await;
}

#[tokio::test]
async fn a_program_that_cannot_be_described_counts_as_a_death() {
    let mut watched = Watched::start(Shell::new(""), policy());
    let (_, cause, _) = watched.until_died().await;
    assert_eq!(cause, DeathCause::NotSpawned { detail: "no script".into() });
    assert!(matches!(watched.until_given_up().await, GiveUp::TooOften { .. }));
    watched.child.shut_down().await;
}

#[tokio::test]
async fn a_fault_replaces_its_own_incarnation_only() {
    let mut watched = Watched::start(Shell::new(PATIENT), policy());
    watched.until_ready().await;
    watched.child.control().fault(1, DeathCause::HeartbeatLost);
    assert_eq!(watched.until_died().await.1, DeathCause::HeartbeatLost);
    assert_eq!(watched.until_ready().await.0, 2);
    // Late news of the first.
    watched.child.control().fault(1, DeathCause::RequestHung);
    watched.child.control().restart();
    assert_eq!(watched.until_died().await.1, DeathCause::Requested);
    assert_eq!(watched.until_ready().await.0, 3);
    watched.child.shut_down().await;
}

#[tokio::test]
async fn a_version_mismatch_ends_it() {
    let mut watched = Watched::start(Shell::new(PATIENT), policy());
    watched.until_ready().await;
    let cause = DeathCause::VersionMismatch { ours: 1, theirs: 2 };
    watched.child.control().fault(1, cause.clone());
    assert_eq!(watched.until_given_up().await, GiveUp::Hopeless { cause });
    watched.child.shut_down().await;
}

#[tokio::test]
async fn draining_waits_for_the_word() {
    let mut watched = Watched::start(Shell::new(PATIENT), policy());
    watched.until_ready().await;
    watched.child.control().drain();
    assert!(matches!(watched.next().await, ChildEvent::Draining { incarnation: 1 }));
    assert_eq!(watched.child.state(), State::Draining);
    watched.child.control().drained();
    assert_eq!(watched.until_died().await.1, DeathCause::Requested);
    assert!(matches!(watched.next().await, ChildEvent::Stopped));
    assert_eq!(watched.child.state(), State::Dead);
    watched.child.control().release();
    assert_eq!(watched.until_ready().await.0, 2);
    watched.child.shut_down().await;
}

#[tokio::test]
async fn dropping_the_handle_ends_the_child() {
    let mut watched = Watched::start(Shell::new(PATIENT), policy());
    let (_, _, child) = watched.until_ready().await;
    drop(watched.child);
    assert_eq!(child.wait().await.cause.signal(), Some(Signal::SIGTERM));
}

#[tokio::test]
async fn a_child_that_does_not_work_any_more_is_killed_and_replaced() {
    // It ignores SIGTERM, as a process that hangs does.
    let role = Shell::new("trap '' TERM; echo ready; [ $1 -gt 1 ] || echo sick; while :; do sleep 1000; done");
    let mut watched = Watched::start(role, policy());
    assert_eq!(watched.until_died().await.1, DeathCause::HeartbeatLost);
    assert_eq!(watched.until_ready().await.0, 2);
    watched.child.control().fault(2, DeathCause::RequestHung);
    assert_eq!(watched.until_died().await.1, DeathCause::RequestHung);
    drop(watched.child);
}

#[tokio::test]
async fn quarantine_holds_until_released() {
    let mut watched = Watched::start(Shell::new(PATIENT), policy());
    watched.until_ready().await;
    let control = watched.child.control();
    control.quarantine();
    assert_eq!(watched.until_died().await.1, DeathCause::Requested);
    assert_eq!(watched.until_given_up().await, GiveUp::Quarantined);
    control.restart();
    control.release();
    assert_eq!(watched.until_ready().await.0, 2, "a restart does not release it");
    watched.child.shut_down().await;
    control.release();
    assert_eq!(control.state(), State::Dead, "nobody keeps it any more");
}

#[tokio::test]
async fn a_quarantine_ends_by_its_timer() {
    let mut flapping = policy();
    flapping.restart.intensities[0].most = 0;
    flapping.restart.quarantine = Some(Duration::from_millis(1));
    let mut watched = Watched::start(Shell::new("[ $1 -gt 1 ] || exit 70; echo ready; exec sleep 1000"), flapping);
    assert!(matches!(watched.until_given_up().await, GiveUp::TooOften { .. }));
    assert_eq!(watched.until_ready().await.0, 2);
    drop(watched.child);
}
