//! One interpreter of the pool: kept alive, fed with jobs, replaced when it is worn out or stuck.

use std::time::Duration;

use grail_process::restart::{BackoffPolicy, Intensity, RestartPolicy};
use grail_process::{ChildEvent, ChildPolicy, DeathCause, Events, Supervised, supervise, with_causes};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::board::{Job, Outcome, Seat, Work};
use super::link::Link;
use super::protocol::{Kind, Reply, Request, Status};
use super::role::{Zygote, stop_plan};

/// On a busy machine a test may wait this many times as long as it may run; then the interpreter kills the child.
const MOST_BUSY: u64 = 3;
const DEADLINE_GRACE_S: u64 = 2;
/// Beyond the tests' own time, until the kernel ends the child.
const CPU_GRACE_S: u64 = 5;
/// CPU seconds of formulas that are compared by one child, and the wall clock that they get on a busy machine.
const FORMULA_CPU_S: u64 = 5;
const FORMULA_WALL_S: u64 = 30;
/// An interpreter is replaced after this many children, or when it has grown by this much.
const MOST_FORKS: u32 = 500;
const MOST_GROWTH_KIB: u64 = 64 << 10;

/// How long an interpreter may take beyond what it was asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// From the start of the process to its answers to the probes.
    pub start: Duration,
    /// Beyond the time after which it kills a child itself.
    pub answer: Duration,
    /// Between two signs of life of an idle interpreter.
    pub between_pings: Duration,
    /// For a sign of life.
    pub ping: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            start: Duration::from_secs(120),
            answer: Duration::from_secs(10),
            between_pings: Duration::from_secs(10),
            ping: Duration::from_secs(10),
        }
    }
}

/// What the dispatcher hears of a slot.
#[derive(Debug)]
pub(super) struct Note {
    pub(super) slot: usize,
    pub(super) seat: Seat,
    /// Process of the interpreter's helper, while there is one.
    pub(super) pid: Option<i32>,
}

/// The task of one slot.
pub(super) struct Slot {
    index: usize,
    child: Supervised,
    events: Events<Zygote>,
    jobs: mpsc::UnboundedReceiver<Vec<Job>>,
    notes: mpsc::UnboundedSender<Note>,
    link: Option<(u64, Link)>,
    pid: Option<i32>,
    patience: Patience,
    has_limits: bool,
}

impl Slot {
    pub(super) fn start(
        index: usize,
        role: Zygote,
        patience: Patience,
        jobs: mpsc::UnboundedReceiver<Vec<Job>>,
        notes: mpsc::UnboundedSender<Note>,
    ) -> Self {
        let has_limits = role.ground.layers.has(crate::sandbox::Layer::Limits);
        let policy = policy(role.name.clone(), patience);
        let (child, events) = supervise(role, policy);
        Self { index, child, events, jobs, notes, link: None, pid: None, patience, has_limits }
    }

    /// Runs until the pool ends, in the middle of a job if it must, and ends the interpreter then.
    pub(super) async fn run(mut self, end: CancellationToken) {
        tokio::select! {
            () = end.cancelled() => {}
            () = self.work() => {}
        }
        self.child.shut_down().await;
    }

    async fn work(&mut self) {
        loop {
            let is_ready = self.link.is_some();
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => self.on_event(event),
                    None => return,
                },
                jobs = self.jobs.recv() => match jobs {
                    Some(jobs) => self.serve(jobs).await,
                    None => return,
                },
                () = tokio::time::sleep(self.patience.between_pings), if is_ready => self.ping().await,
            }
        }
    }

    fn on_event(&mut self, event: ChildEvent<Link>) {
        match event {
            ChildEvent::Started { pid, .. } => {
                self.pid = Some(pid);
                self.tell(Seat::Starting);
            }
            ChildEvent::Ready { incarnation, link, .. } => {
                self.link = Some((incarnation.number, link));
                self.tell(Seat::Idle);
            }
            ChildEvent::Died { cause, last_lines, .. } => {
                self.link = None;
                self.pid = None;
                if cause != DeathCause::Requested {
                    for line in last_lines.iter().rev().take(5).rev() {
                        tracing::warn!(slot = self.index, line, "Last lines of an evaluator.");
                    }
                }
                self.tell(Seat::Starting);
            }
            ChildEvent::GaveUp(reason) => self.tell(Seat::GivenUp(reason.to_string())),
            ChildEvent::Stopped => self.tell(Seat::GivenUp("it was stopped".to_owned())),
            ChildEvent::Draining { .. } | ChildEvent::Backoff { .. } => {}
        }
    }

    fn tell(&self, seat: Seat) {
        // Without a dispatcher nobody needs to know.
        drop(self.notes.send(Note { slot: self.index, seat, pid: self.pid }));
    }

    async fn serve(&mut self, jobs: Vec<Job>) {
        match self.ask(&jobs).await {
            Ok((reply, is_worn_out)) => {
                let slot = self.index;
                answer(jobs, &reply, slot);
                if is_worn_out {
                    debug!(
                        slot,
                        forks = reply.forks,
                        rss_kib = reply.rss_kib,
                        "An evaluator is replaced by a new one."
                    );
                    self.link = None;
                    self.child.control().restart();
                } else {
                    self.tell(Seat::Idle);
                }
            }
            Err((incarnation, cause)) => {
                let detail = cause.to_string();
                if let Some(incarnation) = incarnation {
                    self.replace(incarnation, cause);
                }
                for job in jobs {
                    tell_outcome(job, Outcome::Failed { detail: detail.clone() });
                }
            }
        }
    }

    /// Puts `jobs` to the interpreter.
    async fn ask(&mut self, jobs: &[Job]) -> Result<(Reply, bool), (Option<u64>, DeathCause)> {
        let Some((incarnation, link)) = &mut self.link else {
            return Err((None, DeathCause::ConnectionLost { detail: "it died before it was asked".to_owned() }));
        };
        let question = Question::of(jobs, self.has_limits);
        let request = question.request();
        let limit = Duration::from_secs(request.wall_s) + self.patience.answer;
        match tokio::time::timeout(limit, link.exchange(request)).await {
            Ok(Ok(reply)) => {
                let is_worn_out = reply.forks >= MOST_FORKS || link.grown_kib(&reply) >= MOST_GROWTH_KIB;
                Ok((reply, is_worn_out))
            }
            Ok(Err(error)) => Err((Some(*incarnation), DeathCause::ConnectionLost { detail: with_causes(&error) })),
            Err(_) => Err((Some(*incarnation), DeathCause::RequestHung)),
        }
    }

    async fn ping(&mut self) {
        let Some((incarnation, link)) = &mut self.link else { return };
        let request = Request {
            id: 0,
            question: Kind::Ping,
            code: None,
            tests: None,
            pairs: None,
            time_s: 0,
            wall_s: 0,
            cpu_s: None,
        };
        let answered = tokio::time::timeout(self.patience.ping, link.exchange(request)).await;
        if !matches!(&answered, Ok(Ok(reply)) if reply.status == Status::Pong) {
            let incarnation = *incarnation;
            self.replace(incarnation, DeathCause::HeartbeatLost);
        }
    }

    /// Ends an interpreter that does not work any more; the next one is started.
    fn replace(&mut self, incarnation: u64, cause: DeathCause) {
        self.link = None;
        self.tell(Seat::Starting);
        self.child.control().fault(incarnation, cause);
    }
}

/// What jobs ask together: one program, or pairs of formulas.
enum Question<'j> {
    Program { code: &'j str, tests: &'j [String], limit_s: u64, has_limits: bool },
    Pairs { pairs: Vec<(String, String)>, has_limits: bool },
}

impl<'j> Question<'j> {
    fn of(jobs: &'j [Job], has_limits: bool) -> Self {
        let mut pairs = Vec::new();
        for job in jobs {
            match &job.work {
                Work::Program { program, limit_s } => {
                    let (code, tests) = (&program.code, &program.tests);
                    return Self::Program { code, tests, limit_s: *limit_s, has_limits };
                }
                Work::Pair { left, right, .. } => pairs.push((left.clone(), right.clone())),
            }
        }
        Self::Pairs { pairs, has_limits }
    }

    fn request(&self) -> Request<'_> {
        match self {
            Self::Program { code, tests, limit_s, has_limits } => {
                let seconds = limit_s * tests.len() as u64;
                Request {
                    id: 0,
                    question: Kind::Run,
                    code: Some(code),
                    tests: Some(tests),
                    pairs: None,
                    time_s: *limit_s,
                    wall_s: seconds * MOST_BUSY + DEADLINE_GRACE_S,
                    cpu_s: has_limits.then_some(seconds + CPU_GRACE_S),
                }
            }
            Self::Pairs { pairs, has_limits } => Request {
                id: 0,
                question: Kind::Sympy,
                code: None,
                tests: None,
                pairs: Some(pairs),
                time_s: FORMULA_CPU_S,
                wall_s: FORMULA_WALL_S,
                cpu_s: has_limits.then_some(FORMULA_CPU_S),
            },
        }
    }
}

/// Gives every job its part of `reply`.
fn answer(jobs: Vec<Job>, reply: &Reply, slot: usize) {
    let is_shared = jobs.len() > 1;
    for (index, job) in jobs.into_iter().enumerate() {
        let outcome = match reply.status {
            Status::SandboxFailed => Outcome::Failed { detail: reply.detail.clone() },
            Status::Pong => Outcome::Failed { detail: "it answered another question".to_owned() },
            Status::Undecidable if is_shared => Outcome::NotShared,
            Status::Done | Status::Undecidable => {
                let mut reply = reply.clone();
                if is_shared {
                    reply.tests = reply.tests.get(index).cloned().into_iter().collect();
                }
                Outcome::Answered { reply, slot }
            }
        };
        tell_outcome(job, outcome);
    }
}

pub(super) fn tell_outcome(job: Job, outcome: Outcome) {
    // Whoever asked may have gone.
    drop(job.reply.send(outcome));
}

/// Deaths of evaluators are cheap, so more of them are borne than of other children. The delays are short enough for starts
/// that always fail to exceed the limit within half a minute: jobs wait until then.
fn policy(name: String, patience: Patience) -> ChildPolicy {
    ChildPolicy {
        name,
        start_limit: patience.start,
        restart: RestartPolicy {
            intensities: vec![
                Intensity { most: 10, period: Duration::from_secs(60) },
                Intensity { most: 60, period: Duration::from_secs(1_800) },
            ],
            backoff: BackoffPolicy {
                first: Duration::from_millis(50),
                most: Duration::from_secs(5),
                jitter: 0.5,
                forgiven_after: Duration::from_secs(30),
            },
            quarantine: Some(Duration::from_secs(120)),
        },
        stop: stop_plan(),
        kill: stop_plan(),
        last_incarnation: 0,
        jitter_seed: None,
    }
}
