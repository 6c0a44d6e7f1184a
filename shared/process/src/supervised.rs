//! One child that is kept alive: [`crate::state::Machine`] driven by a real process.

use std::error::Error;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{Instrument, error, info, info_span, warn};

use crate::cause::{DeathCause, ExitCause};
use crate::causes::with_causes;
use crate::child::{Child, Exit, StopPlan, Unkillable};
use crate::restart::RestartPolicy;
use crate::state::{Command, Event, GiveUp, Machine, State};

/// Which start of a child this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incarnation {
    /// Rises with every start; 1 is the first.
    pub number: u64,
    /// It shall run with a smaller budget, because the last one ran out of memory.
    pub reduced: bool,
}

/// Why a child that runs is not ready and never will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotReady(pub DeathCause);

/// A start that came to nothing.
pub type StartError = Box<dyn Error + Send + Sync>;

/// What keeping a process alive needs of it; [`Child`] is the real one, tests have others.
pub trait Process: fmt::Debug + Send + Sync + 'static {
    /// Its number.
    fn pid(&self) -> i32;

    /// Waits until it has ended with all that belongs to it. Safe to cancel.
    fn wait(&self) -> impl Future<Output = Exit> + Send;

    /// Ends it by `plan` and waits for that.
    ///
    /// # Errors
    /// [`Unkillable`].
    fn stop(&self, plan: &StopPlan) -> impl Future<Output = Result<Exit, Unkillable>> + Send;

    /// The last lines of its log, oldest first.
    fn last_lines(&self) -> Vec<String>;

    /// Whether the kernel has killed it because memory ran out, if that is known.
    fn was_oom_killed(&self) -> bool;
}

impl Process for Child {
    fn pid(&self) -> i32 {
        Self::pid(self)
    }

    fn wait(&self) -> impl Future<Output = Exit> + Send {
        Self::wait(self)
    }

    fn stop(&self, plan: &StopPlan) -> impl Future<Output = Result<Exit, Unkillable>> + Send {
        Self::stop(self, plan)
    }

    fn last_lines(&self) -> Vec<String> {
        Self::last_lines(self)
    }

    fn was_oom_killed(&self) -> bool {
        Self::was_oom_killed(self)
    }
}

/// How a child is started, when it is ready, and how it shows that it still works.
pub trait Role: Send + 'static {
    type Process: Process;

    /// What is had of a child that is ready, for instance a connection.
    type Link: Send + 'static;

    /// Starts a process.
    ///
    /// # Errors
    /// Counts as a death of an incarnation that never ran.
    fn start(&mut self, incarnation: Incarnation) -> impl Future<Output = Result<Self::Process, StartError>> + Send;

    /// Waits until the child is ready. It is dropped when the child dies or its start takes too long.
    fn ready(
        &mut self,
        process: Arc<Self::Process>,
        incarnation: Incarnation,
    ) -> impl Future<Output = Result<Self::Link, NotReady>> + Send + 'static;

    /// Watches a child that is ready, for instance by signs of life; it ends with what is wrong. Dropped when the child dies.
    fn watch(&mut self, link: &Self::Link) -> impl Future<Output = DeathCause> + Send + 'static;
}

/// How a child is kept alive.
#[derive(Debug, Clone)]
pub struct ChildPolicy {
    /// Name in logs and events, for instance `worker-0`.
    pub name: String,
    /// How long a start may take.
    pub start_limit: Duration,
    pub restart: RestartPolicy,
    /// How a sound child is ended.
    pub stop: StopPlan,
    /// How a child with a fault is ended.
    pub kill: StopPlan,
    /// Incarnations that were used before.
    pub last_incarnation: u64,
    /// Makes the jitter of delays repeatable.
    pub jitter_seed: Option<u64>,
}

/// What happened to a child.
#[derive(Debug)]
pub enum ChildEvent<L, P = Child> {
    /// Its process runs.
    Started { incarnation: Incarnation, pid: i32 },
    /// It works.
    Ready { incarnation: Incarnation, child: Arc<P>, link: L },
    /// It shall finish what it has; answer with [`Supervised::drained`].
    Draining { incarnation: u64 },
    /// It is gone, with all that belongs to it.
    Died { incarnation: u64, cause: DeathCause, exit: Option<Exit>, last_lines: Vec<String> },
    /// The next start follows after `delay`.
    Backoff { delay: Duration },
    /// There will be no next start before it is released.
    GaveUp(GiveUp),
    /// It has ended as it was told to.
    Stopped,
}

/// What a child is told from outside.
#[derive(Debug)]
enum Request {
    Event(Event),
    /// Concerns one incarnation only.
    Fault {
        incarnation: u64,
        cause: DeathCause,
    },
}

/// The handle of a child that is kept alive; dropping it ends the child.
#[derive(Debug)]
pub struct Supervised {
    requests: mpsc::UnboundedSender<Request>,
    state: watch::Receiver<State>,
    task: JoinHandle<()>,
    end_limit: Duration,
}

impl Supervised {
    /// Where the child is now.
    #[must_use]
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Changes of the state.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// What others may tell the child; it does not keep the child alive.
    #[must_use]
    pub fn control(&self) -> ChildControl {
        ChildControl { requests: self.requests.downgrade(), state: self.state.clone() }
    }

    /// Ends the child and waits until nothing is left of it; not longer than its plan allows, because a process that waits in the
    /// kernel for a device may never end.
    pub async fn shut_down(mut self) {
        self.control().stop();
        drop(self.requests);
        match tokio::time::timeout(self.end_limit, &mut self.task).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => error!(%error, "The task of a child failed."),
            Err(_) => {
                error!(limit = ?self.end_limit, "A child cannot be ended; it is left behind.");
                self.task.abort();
            }
        }
    }
}

/// Tells a child that is kept alive what to do. Without effect once its [`Supervised`] is gone.
#[derive(Debug, Clone)]
pub struct ChildControl {
    requests: mpsc::WeakUnboundedSender<Request>,
    state: watch::Receiver<State>,
}

impl ChildControl {
    /// Where the child is now.
    #[must_use]
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Tells that incarnation `incarnation` has a fault: it is ended, and what follows depends on `cause`. Without meaning if
    /// another one lives by now.
    pub fn fault(&self, incarnation: u64, cause: DeathCause) {
        self.tell(Request::Fault { incarnation, cause });
    }

    /// Has the child finish what it has and then end.
    pub fn drain(&self) {
        self.tell(Request::Event(Event::Drain));
    }

    /// Tells that a draining child has nothing left.
    pub fn drained(&self) {
        self.tell(Request::Event(Event::Drained));
    }

    /// Ends the child for good.
    pub fn stop(&self) {
        self.tell(Request::Event(Event::Stop));
    }

    /// Ends the child and starts it again; this counts as no death.
    pub fn restart(&self) {
        self.tell(Request::Event(Event::Restart));
    }

    /// Ends the child until it is released.
    pub fn quarantine(&self) {
        self.tell(Request::Event(Event::Quarantine));
    }

    /// Starts a child that ended, was given up or is in quarantine.
    pub fn release(&self) {
        self.tell(Request::Event(Event::Wanted));
    }

    fn tell(&self, request: Request) {
        if let Some(requests) = self.requests.upgrade() {
            // The task ends only with the handle.
            requests.send(request).unwrap_or_default();
        }
    }
}

/// Events of a child of role `R`.
pub type Events<R> = mpsc::UnboundedReceiver<ChildEvent<<R as Role>::Link, <R as Role>::Process>>;

/// Starts a child and keeps it alive; events come in order.
///
/// # Panics
/// Outside a tokio runtime.
pub fn supervise<R: Role>(role: R, policy: ChildPolicy) -> (Supervised, Events<R>) {
    let (events, inbox) = mpsc::unbounded_channel();
    let (requests, asked) = mpsc::unbounded_channel();
    let machine = Machine::new(policy.restart.clone(), policy.last_incarnation);
    // It is wanted from its birth; nobody must take the moment before its first start for an end.
    let (publish, state) = watch::channel(State::Starting);
    let span = info_span!("child", name = %policy.name);
    let chance = Chance::new(policy.jitter_seed);
    let end_limit = policy.stop.longest().max(policy.kill.longest());
    let keeper = Keeper { role, policy, machine, events, publish, life: Life::None, chance };
    let task = tokio::spawn(keeper.run(asked).instrument(span));
    (Supervised { requests, state, task, end_limit }, inbox)
}

/// What the keeper waits for.
enum Life<L, P> {
    None,
    Starting { child: Arc<P>, ready: JoinHandle<Result<L, NotReady>>, deadline: Instant },
    Running { child: Arc<P>, watch: Option<Watch> },
    Delay { until: Instant },
}

/// Ends with what is wrong with a child that runs.
struct Watch(JoinHandle<DeathCause>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<L, P> Life<L, P> {
    fn child(&self) -> Option<&Arc<P>> {
        match self {
            Self::Starting { child, .. } | Self::Running { child, .. } => Some(child),
            Self::None | Self::Delay { .. } => None,
        }
    }
}

struct Keeper<R: Role> {
    role: R,
    policy: ChildPolicy,
    machine: Machine,
    events: mpsc::UnboundedSender<ChildEvent<R::Link, R::Process>>,
    publish: watch::Sender<State>,
    life: Life<R::Link, R::Process>,
    chance: Chance,
}

/// What ended a wait.
enum Woken<L> {
    Request(Option<Request>),
    Exited(Exit),
    Ready(Result<L, NotReady>),
    Faulty(DeathCause),
    DelayOver,
}

impl<R: Role> Keeper<R> {
    async fn run(mut self, mut requests: mpsc::UnboundedReceiver<Request>) {
        let mut is_held = true;
        self.step(Event::Wanted).await;
        while is_held || self.machine.state().is_alive() {
            match self.wait(&mut requests, is_held).await {
                Woken::Request(Some(Request::Event(event))) => self.step(event).await,
                Woken::Request(Some(Request::Fault { incarnation, cause })) => {
                    if incarnation == self.machine.incarnation() {
                        warn!(incarnation, %cause, "Child has a fault.");
                        self.step(Event::Fault(cause)).await;
                    }
                }
                Woken::Request(None) => {
                    is_held = false;
                    self.step(Event::Stop).await;
                }
                Woken::Ready(Ok(link)) => self.ready(link).await,
                Woken::Ready(Err(NotReady(cause))) => {
                    warn!(%cause, "Child is not ready.");
                    self.step(Event::Fault(cause)).await;
                }
                Woken::Faulty(cause) => {
                    warn!(incarnation = self.machine.incarnation(), %cause, "Child does not work any more.");
                    if let Life::Running { watch, .. } = &mut self.life {
                        *watch = None;
                    }
                    self.step(Event::Fault(cause)).await;
                }
                Woken::Exited(exit) => self.died(exit).await,
                Woken::DelayOver => self.step(Event::DelayOver).await,
            }
        }
    }

    async fn wait(&mut self, requests: &mut mpsc::UnboundedReceiver<Request>, is_held: bool) -> Woken<R::Link> {
        let request = async { if is_held { requests.recv().await } else { std::future::pending().await } };
        match &mut self.life {
            Life::None => Woken::Request(request.await),
            Life::Delay { until } => tokio::select! {
                biased;
                request = request => Woken::Request(request),
                () = tokio::time::sleep_until(*until) => Woken::DelayOver,
            },
            Life::Running { child, watch } => tokio::select! {
                // A death explains a connection that ended with it, so it is looked at first.
                biased;
                exit = child.wait() => Woken::Exited(exit),
                request = request => Woken::Request(request),
                cause = what_is_wrong(watch) => match prefer_exit(&**child, NotReady(cause)).await {
                    Err(exit) => Woken::Exited(exit),
                    Ok(NotReady(cause)) => Woken::Faulty(cause),
                },
            },
            Life::Starting { child, ready, deadline } => tokio::select! {
                // A death explains a handshake that failed with it, so it is looked at first.
                biased;
                exit = child.wait() => Woken::Exited(exit),
                request = request => Woken::Request(request),
                answer = tokio::time::timeout_at(*deadline, &mut *ready) => Woken::Ready(match answer {
                    Ok(Ok(Err(not_ready))) => match prefer_exit(&**child, not_ready).await {
                        Ok(not_ready) => Err(not_ready),
                        Err(exit) => return Woken::Exited(exit),
                    },
                    Ok(Ok(Ok(link))) => Ok(link),
                    Ok(Err(panicked)) => Err(NotReady(DeathCause::HandshakeFailed { detail: panicked.to_string() })),
                    Err(_) => {
                        ready.abort();
                        Err(NotReady(DeathCause::StartHung))
                    }
                }),
            },
        }
    }

    async fn ready(&mut self, link: R::Link) {
        let Life::Starting { child, .. } = &self.life else { return };
        let child = Arc::clone(child);
        let incarnation = Incarnation { number: self.machine.incarnation(), reduced: self.machine.is_reduced() };
        if *self.machine.state() != State::Starting {
            // It was told to end meanwhile.
            self.life = Life::Running { child, watch: None };
            return;
        }
        let watch = Watch(tokio::spawn(self.role.watch(&link).in_current_span()));
        self.life = Life::Running { child: Arc::clone(&child), watch: Some(watch) };
        info!(incarnation = incarnation.number, pid = child.pid(), "Child is ready.");
        self.step(Event::Ready).await;
        self.tell(ChildEvent::Ready { incarnation, child, link });
    }

    async fn died(&mut self, exit: Exit) {
        let last_lines = self.life.child().map(|child| child.last_lines()).unwrap_or_default();
        if let Life::Starting { ready, .. } = &self.life {
            ready.abort();
        }
        let ran_out = matches!(exit.cause, ExitCause::Signal { signal: Signal::SIGKILL, .. })
            && self.life.child().is_some_and(|child| child.was_oom_killed());
        self.life = Life::None;
        let by_exit = if ran_out { DeathCause::OutOfMemory } else { DeathCause::Exit(exit.cause) };
        let cause = self.machine.cause_of_death(by_exit.clone());
        let incarnation = self.machine.incarnation();
        if cause == DeathCause::Requested {
            info!(incarnation, exit = %exit.cause, killed = exit.killed, "Child has ended.");
        } else {
            warn!(incarnation, %cause, exit = %exit.cause, killed = exit.killed, "Child died.");
        }
        self.tell(ChildEvent::Died { incarnation, cause, exit: Some(exit), last_lines });
        self.step(Event::Gone(by_exit)).await;
    }

    /// Takes an event and does what follows from it.
    async fn step(&mut self, event: Event) {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            let before = self.machine.state().clone();
            let command = self.machine.on(event, Instant::now().into_std(), self.chance.next());
            let state = self.machine.state().clone();
            if state != before {
                self.publish.send_replace(state.clone());
                if !state.is_alive() {
                    self.life = Life::None;
                }
                match &state {
                    State::GaveUp(reason) => {
                        error!(%reason, "Gave up a child.");
                        self.tell(ChildEvent::GaveUp(reason.clone()));
                    }
                    State::Dead => self.tell(ChildEvent::Stopped),
                    _ => {}
                }
            }
            match command {
                Some(Command::Spawn { incarnation: number, reduced }) => {
                    next = self.spawn(Incarnation { number, reduced }).await;
                }
                Some(Command::Drain) => self.tell(ChildEvent::Draining { incarnation: self.machine.incarnation() }),
                Some(Command::Stop) => self.stop(self.policy.stop.clone()),
                Some(Command::Kill) => self.stop(self.policy.kill.clone()),
                Some(Command::Wait { delay }) => {
                    self.life = Life::Delay { until: Instant::now() + delay };
                    if matches!(state, State::Backoff { .. }) {
                        self.tell(ChildEvent::Backoff { delay });
                    }
                }
                None => {}
            }
        }
    }

    /// Starts a process, or gives the event of a start that failed.
    async fn spawn(&mut self, incarnation: Incarnation) -> Option<Event> {
        match self.role.start(incarnation).await.map_err(|error| with_causes(&*error)) {
            Ok(child) => {
                let child = Arc::new(child);
                info!(incarnation = incarnation.number, pid = child.pid(), "Child was started.");
                self.tell(ChildEvent::Started { incarnation, pid: child.pid() });
                let ready = tokio::spawn(self.role.ready(Arc::clone(&child), incarnation).in_current_span());
                self.life = Life::Starting { child, ready, deadline: Instant::now() + self.policy.start_limit };
                None
            }
            Err(detail) => {
                self.life = Life::None;
                let cause = DeathCause::NotSpawned { detail };
                warn!(incarnation = incarnation.number, %cause, "Child could not be started.");
                let number = incarnation.number;
                let died =
                    ChildEvent::Died { incarnation: number, cause: cause.clone(), exit: None, last_lines: vec![] };
                self.tell(died);
                Some(Event::Gone(cause))
            }
        }
    }

    fn stop(&mut self, plan: StopPlan) {
        if let Life::Starting { ready, .. } = &self.life {
            ready.abort();
        }
        let Some(child) = self.life.child().map(Arc::clone) else { return };
        // What happens to it from here on is no fault of its own.
        self.life = Life::Running { child: Arc::clone(&child), watch: None };
        let ending = async move {
            if let Err(error) = child.stop(&plan).await {
                error!(%error, "Child cannot be ended.");
            }
        };
        // Its end is seen by the wait for its exit.
        drop(tokio::spawn(ending.in_current_span()));
    }

    fn tell(&self, event: ChildEvent<R::Link, R::Process>) {
        // Whoever does not listen need not know.
        drop(self.events.send(event));
    }
}

async fn what_is_wrong(watch: &mut Option<Watch>) -> DeathCause {
    match watch {
        Some(Watch(task)) => match task.await {
            Ok(cause) => cause,
            Err(error) => DeathCause::ConnectionLost { detail: format!("its watch failed: {error}") },
        },
        None => std::future::pending().await,
    }
}

/// A child that dies is often seen by its connection first; its exit says more.
async fn prefer_exit<P: Process>(child: &P, not_ready: NotReady) -> Result<NotReady, Exit> {
    /// A process that hung up is gone within this, unless it lives on.
    const MOMENT: Duration = Duration::from_millis(500);
    if !matches!(not_ready.0, DeathCause::HandshakeFailed { .. } | DeathCause::ConnectionLost { .. }) {
        return Ok(not_ready);
    }
    match tokio::time::timeout(MOMENT, child.wait()).await {
        // A sound child ends like this when it is hung up on, for instance because it sent nonsense.
        Ok(Exit { cause: ExitCause::Code(0), .. }) | Err(_) => Ok(not_ready),
        Ok(exit) => Err(exit),
    }
}

/// Chance for the jitter of delays; nothing depends on its quality.
#[derive(Debug)]
struct Chance(u64);

impl Chance {
    fn new(seed: Option<u64>) -> Self {
        Self(seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()))
    }

    /// In `0.0..1.0`: the upper bits of SplitMix64.
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // 32 bits fit an f64 exactly.
        let bits = u32::try_from((mixed ^ (mixed >> 31)) >> 32).unwrap_or(0);
        f64::from(bits) / (f64::from(u32::MAX) + 1.0)
    }
}
