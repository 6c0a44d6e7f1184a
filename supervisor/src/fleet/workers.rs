//! The proof workers: one supervised process a slot, fed by the proof queue, rolled one after the other.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_ipc::jobs::ProveJob;
use grail_ipc::messages::{Failed, Severity, SlotId};
use grail_ipc::socket::RuntimeFolder;
use grail_ipc::{Expected, LostConnection, RequestError, WorkerClient};
use grail_process::cause::DeathCause;
use grail_process::cgroup::Delegation;
use grail_process::restart::RestartPolicy;
use grail_process::state::{GiveUp, State};
use grail_process::{
    Child, ChildControl, ChildEvent, ChildPolicy, ChildSpec, Events, ExitCode, Incarnation, NotReady, Role, StartError,
    StopPlan, Supervised, supervise,
};
use grail_protocol::ids::WeightsHash;
use tokio::sync::{mpsc, watch};

use super::FleetError;
use super::child::{self, not_ready};
use super::control::{Controls, FleetHandle, SharedFacts, SlotControl};
use super::link::{Heartbeat, Target, WorkerLink};
use super::pinning::{self, SlotPin};
use crate::journal::Event;
use crate::progress::Progress;
use crate::proofs::{Proof, ProofError, ProofQueue, Worker};
use grail_process::with_causes;

/// How proof workers are run.
#[derive(Debug, Clone)]
pub struct WorkerSettings {
    pub program: PathBuf,
    /// Variables that the worker must see, wherever they were set.
    pub variables: Vec<(&'static str, String)>,
    /// One a slot.
    pub pins: Vec<SlotPin>,
    /// Control groups for the children, where ours was delegated to us.
    pub delegation: Option<Arc<Delegation>>,
    /// `float32` or `bfloat16`.
    pub dtype: &'static str,
    /// Threads of one worker on the CPU.
    pub threads: usize,
    pub limits: SlotLimits,
}

/// How long things may take in a slot, and how often it may fail.
#[derive(Debug, Clone, PartialEq)]
pub struct SlotLimits {
    /// Loading the model.
    pub start: Duration,
    /// Rolling to another checkpoint.
    pub reload: Duration,
    /// Proving one group, with the one before it in the queue.
    pub prove: Duration,
    /// Finishing what a slot has when it is drained.
    pub drain: Duration,
    pub heartbeat: Heartbeat,
    pub restart: RestartPolicy,
    /// Makes delays repeatable.
    pub jitter_seed: Option<u64>,
}

impl Default for SlotLimits {
    /// A proof gets the time that the protocol's reference gives it.
    fn default() -> Self {
        Self {
            start: Duration::from_secs(180),
            reload: Duration::from_secs(120),
            prove: Duration::from_secs(600),
            drain: Duration::from_secs(120),
            heartbeat: Heartbeat::default(),
            restart: RestartPolicy::default(),
            jitter_seed: None,
        }
    }
}

/// All slots.
#[derive(Debug)]
pub struct Workers<L: WorkerLink = WorkerClient> {
    slots: Vec<Slot<L>>,
    target: watch::Sender<Target>,
    limits: SlotLimits,
}

#[derive(Debug)]
struct Slot<L: WorkerLink> {
    id: SlotId,
    child: Supervised,
    live: watch::Receiver<Option<Arc<LiveWorker<L>>>>,
    facts: SharedFacts,
}

/// What slots report to.
#[derive(Debug, Clone)]
pub struct Observers {
    pub queue: ProofQueue,
    pub journal: mpsc::UnboundedSender<Event>,
    pub progress: Arc<Progress>,
}

/// Why a slot has no worker.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Absent {
    reason: String,
    /// What its process said with its exit code, if that is why.
    exit: Option<ExitCode>,
    /// An operator wants it so.
    is_wanted: bool,
}

impl Absent {
    fn ended(slot: SlotId) -> Self {
        Self { reason: format!("slot {slot} has ended"), exit: None, is_wanted: true }
    }

    fn given_up(slot: SlotId, reason: &GiveUp) -> Self {
        let exit = match reason {
            GiveUp::Hopeless { cause } | GiveUp::TooOften { cause, .. } => cause.exit_code(),
            _ => None,
        };
        let is_wanted = *reason == GiveUp::Quarantined;
        Self { reason: format!("slot {slot} was given up: {reason}"), exit, is_wanted }
    }
}

impl Workers {
    /// Starts all slots on `target`.
    #[must_use]
    pub fn start(settings: &WorkerSettings, runtime: &RuntimeFolder, target: Target, observers: &Observers) -> Self {
        let role = |slot: SlotId, target, facts| WorkerRole {
            slot,
            // There are as many slots as pins.
            pin: settings.pins.get(slot.0 as usize).cloned().unwrap_or_else(|| SlotPin::cpu(Vec::new())),
            settings: settings.clone(),
            runtime: runtime.clone(),
            target,
            facts,
            call: None,
        };
        let slots = u32::try_from(settings.pins.len()).unwrap_or(u32::MAX);
        Self::start_with(slots, &settings.limits, target, observers, role)
    }

    /// A connection to any ready worker.
    pub fn any(&self) -> Option<Arc<WorkerClient>> {
        self.slots.iter().find_map(|slot| slot.live.borrow().as_ref().map(|live| live.link.clone()))
    }
}

/// Where a role keeps what signs of life say.
#[derive(Debug, Clone, Default)]
pub struct SlotFacts(SharedFacts);

impl SlotFacts {
    /// Takes what a sign of life says.
    pub fn heard(&self, pong: &grail_ipc::messages::Pong) {
        self.0.heard(pong);
    }
}

impl<L: WorkerLink> Workers<L> {
    /// Starts `count` slots, each with what `role` makes for it.
    #[must_use]
    pub fn start_with<R: Role<Link = Arc<L>>>(
        count: u32,
        limits: &SlotLimits,
        target: Target,
        observers: &Observers,
        role: impl Fn(SlotId, watch::Receiver<Target>, SlotFacts) -> R,
    ) -> Self {
        let (target, _) = watch::channel(target);
        let slots: Vec<Slot<L>> = (0..count)
            .map(|number| {
                let (id, facts) = (SlotId(number), SharedFacts::default());
                let role = role(id, target.subscribe(), SlotFacts(facts.clone()));
                Slot::start(id, role, limits, facts, observers)
            })
            .collect();
        let workers = Self { slots, target, limits: limits.clone() };
        workers.report_to(observers);
        workers
    }

    /// Keeps the display's count of workers, and fails waiting proofs when no slot will come back.
    fn report_to(&self, observers: &Observers) {
        let mut lives: Vec<_> = self.slots.iter().map(|slot| slot.live.clone()).collect();
        let mut states: Vec<_> = self.slots.iter().map(|slot| slot.child.states()).collect();
        let observers = observers.clone();
        tokio::spawn(async move {
            loop {
                let ready = lives.iter().filter(|live| live.borrow().is_some()).count();
                observers.progress.workers(ready, lives.len());
                // A slot that an operator emptied comes back when the operator says so: its work waits.
                let is_lost = |state: &State| matches!(state, State::GaveUp(reason) if *reason != GiveUp::Quarantined);
                if !states.is_empty() && states.iter().all(|state| is_lost(&state.borrow())) {
                    observers.queue.no_more_workers();
                }
                let changes = lives
                    .iter_mut()
                    .map(|live| live.changed().boxed())
                    .chain(states.iter_mut().map(|state| state.changed().boxed()));
                if futures::future::select_all(changes).await.0.is_err() {
                    return;
                }
            }
        });
    }

    pub(super) fn controls(&self) -> Vec<SlotControl> {
        let control =
            |slot: &Slot<L>| SlotControl { id: slot.id, child: slot.child.control(), facts: slot.facts.clone() };
        self.slots.iter().map(control).collect()
    }

    /// The slots as seen from outside.
    #[must_use]
    pub fn handle(&self, queue: &ProofQueue) -> FleetHandle {
        let controls = Controls { slots: self.controls(), server: None };
        FleetHandle { controls: Arc::new(Mutex::new(controls)), queue: queue.clone() }
    }

    /// Waits until every slot is ready or empty for good.
    ///
    /// # Errors
    /// [`FleetError::NoWorkers`] if none is ready; with the reason of the last one.
    pub async fn wait_ready(&self) -> Result<(), FleetError> {
        let mut settled = Vec::new();
        for slot in &self.slots {
            settled.push(slot.settled().await.map(drop));
        }
        at_least_one(settled)
    }

    /// Rolls slot after slot to `target`, while the others go on. A slot that cannot take it is started anew on it; one that an
    /// operator has emptied takes it when it is released.
    ///
    /// # Errors
    /// [`FleetError::NoWorkers`] if no slot has the weights afterwards.
    pub async fn roll(&self, target: Target) -> Result<(), FleetError> {
        self.target.send_replace(target.clone());
        let mut rolled = Vec::new();
        for slot in &self.slots {
            let result = slot.roll(&target, self.limits.reload).await;
            if let Err(absent) = &result {
                tracing::error!(slot = %slot.id, reason = absent.reason, "A worker did not take the checkpoint.");
            }
            rolled.push(result);
        }
        at_least_one(rolled)
    }

    /// Ends all workers and waits for their end.
    pub async fn shut_down(self) {
        futures::future::join_all(self.slots.into_iter().map(|slot| slot.child.shut_down())).await;
    }
}

fn at_least_one(slots: Vec<Result<(), Absent>>) -> Result<(), FleetError> {
    let is_good = |slot: &Result<(), Absent>| slot.as_ref().map_or_else(|absent| absent.is_wanted, |()| true);
    if slots.iter().any(is_good) {
        return Ok(());
    }
    let last = slots.into_iter().filter_map(Result::err).next_back();
    let (reason, exit) =
        last.map_or_else(|| ("no slot is configured".to_owned(), None), |absent| (absent.reason, absent.exit));
    Err(FleetError::NoWorkers { reason, exit })
}

impl<L: WorkerLink> Slot<L> {
    fn start<R: Role<Link = Arc<L>>>(
        id: SlotId,
        role: R,
        limits: &SlotLimits,
        facts: SharedFacts,
        observers: &Observers,
    ) -> Self {
        let policy = ChildPolicy {
            name: format!("worker-{id}"),
            start_limit: limits.start,
            restart: limits.restart.clone(),
            stop: StopPlan::terminate(Duration::from_secs(5)),
            kill: StopPlan::kill(),
            last_incarnation: 0,
            jitter_seed: limits.jitter_seed.map(|seed| seed.wrapping_add(u64::from(id.0))),
        };
        let (child, events) = supervise(role, policy);
        let (publish, live) = watch::channel(None);
        let follower = Follower {
            slot: id,
            control: child.control(),
            facts: facts.clone(),
            publish,
            observers: observers.clone(),
            limits: limits.clone(),
        };
        tokio::spawn(follower.run::<R>(events));
        Self { id, child, live, facts }
    }

    /// The live worker, once there is one; the reason when there will be none.
    async fn settled(&self) -> Result<Arc<LiveWorker<L>>, Absent> {
        let (mut states, mut live) = (self.child.states(), self.live.clone());
        loop {
            if let Some(worker) = live.borrow_and_update().clone() {
                return Ok(worker);
            }
            match &*states.borrow_and_update() {
                State::GaveUp(reason) => return Err(Absent::given_up(self.id, reason)),
                State::Dead => return Err(Absent::ended(self.id)),
                _ => {}
            }
            tokio::select! {
                biased;
                changed = live.changed() => if changed.is_err() { return Err(Absent::ended(self.id)) },
                changed = states.changed() => if changed.is_err() { return Err(Absent::ended(self.id)) },
            }
        }
    }

    async fn roll(&self, target: &Target, limit: Duration) -> Result<(), Absent> {
        // A worker that is still starting may have read the old folder: it is rolled like the others once it is ready.
        let worker = self.settled().await?;
        if worker.weights() == Some(target.weights) {
            return Ok(());
        }
        match worker.reload(target, limit).await {
            Ok(()) => return Ok(()),
            Err(reason) => tracing::warn!(slot = %self.id, reason, "Reload failed; starting the worker anew."),
        }
        let mut live = self.live.clone();
        self.facts.change(|facts| facts.told_to_end = Some(worker.incarnation));
        self.child.control().restart();
        // The old incarnation must be gone before the new one counts; that one reads the new folder when it starts.
        let gone = live.wait_for(|now| now.as_ref().is_none_or(|now| !Arc::ptr_eq(now, &worker))).await;
        drop(gone.map_err(|_| Absent::ended(self.id))?);
        let worker = self.settled().await?;
        match worker.weights() {
            Some(weights) if weights == target.weights => Ok(()),
            other => {
                let reason = format!("slot {} came up with weights {other:?}", self.id);
                Err(Absent { reason, exit: None, is_wanted: false })
            }
        }
    }
}

/// Brings a slot's events to those who want to know.
struct Follower<L: WorkerLink> {
    slot: SlotId,
    control: ChildControl,
    facts: SharedFacts,
    publish: watch::Sender<Option<Arc<LiveWorker<L>>>>,
    observers: Observers,
    limits: SlotLimits,
}

impl<L: WorkerLink> Follower<L> {
    async fn run<R: Role<Link = Arc<L>>>(self, mut events: Events<R>) {
        while let Some(event) = events.recv().await {
            match event {
                ChildEvent::Started { incarnation, pid } => self.facts.change(|facts| {
                    (facts.pid, facts.epoch, facts.weights) = (Some(pid), incarnation.number, None);
                }),
                ChildEvent::Ready { incarnation, link, .. } => self.ready(incarnation, link),
                ChildEvent::Draining { .. } => self.drain(),
                ChildEvent::Died { incarnation, cause, last_lines, .. } => self.died(incarnation, &cause, &last_lines),
                ChildEvent::GaveUp(reason) if reason != GiveUp::Quarantined => {
                    self.note(Event::WorkerGivenUp { slot: self.slot.0, reason: reason.to_string() });
                }
                _ => {}
            }
        }
    }

    fn note(&self, event: Event) {
        drop(self.observers.journal.send(event));
    }

    fn ready(&self, incarnation: Incarnation, link: Arc<L>) {
        let hello = link.hello();
        self.facts.change(|facts| {
            (facts.device, facts.weights) = (Some(hello.device.clone()), hello.weights);
        });
        self.note(Event::WorkerReady { slot: self.slot.0, pid: hello.pid, epoch: incarnation.number });
        let worker = Arc::new(LiveWorker {
            slot: self.slot,
            incarnation: incarnation.number,
            weights: Mutex::new(hello.weights),
            link,
            control: self.control.clone(),
            facts: self.facts.clone(),
            prove_limit: self.limits.prove,
            out_of_memory: AtomicU32::new(0),
            is_dead: AtomicBool::new(false),
        });
        self.observers.queue.worker_ready(Arc::new(worker.clone()));
        self.publish.send_replace(Some(worker));
    }

    fn drain(&self) {
        self.observers.queue.worker_lost(self.slot);
        let Some(worker) = self.publish.borrow().clone() else { return self.control.drained() };
        let (control, limit) = (self.control.clone(), self.limits.drain);
        tokio::spawn(async move {
            match tokio::time::timeout(limit, worker.link.drain()).await {
                Ok(Ok(())) => tracing::info!(slot = %worker.slot, "Worker is drained."),
                Ok(Err(error)) => tracing::warn!(slot = %worker.slot, error = with_causes(&error), "Drain failed."),
                Err(_) => tracing::warn!(slot = %worker.slot, ?limit, "Worker did not drain in time."),
            }
            control.drained();
        });
    }

    fn died(&self, incarnation: u64, cause: &DeathCause, last_lines: &[String]) {
        self.observers.queue.worker_lost(self.slot);
        if let Some(worker) = self.publish.send_replace(None) {
            worker.is_dead.store(true, Ordering::Relaxed);
        }
        if *cause == DeathCause::Requested {
            return;
        }
        self.facts.change(|facts| {
            facts.deaths += 1;
            facts.last_death = Some(cause.to_string());
        });
        for line in last_lines.iter().rev().take(5).rev() {
            tracing::warn!(slot = %self.slot, incarnation, line, "Last lines of the dead worker.");
        }
        self.note(Event::WorkerLost { slot: self.slot.0, epoch: incarnation, cause: cause.to_string() });
    }
}

/// Tokens of one batch of a worker whose last incarnation ran out of memory: a quarter of its default.
const REDUCED_BATCH_TOKENS: u32 = 4_096;

/// One slot's process.
#[derive(Debug)]
struct WorkerRole {
    slot: SlotId,
    pin: SlotPin,
    settings: WorkerSettings,
    runtime: RuntimeFolder,
    target: watch::Receiver<Target>,
    facts: SlotFacts,
    /// How the incarnation that was started last is reached.
    call: Option<(PathBuf, Expected)>,
}

impl WorkerRole {
    /// Starts on a smaller budget after an incarnation that ran out of memory.
    fn batch_tokens(incarnation: Incarnation) -> Option<String> {
        incarnation.reduced.then(|| REDUCED_BATCH_TOKENS.to_string())
    }

    fn spec(&mut self, incarnation: Incarnation) -> Result<ChildSpec, child::ChildDefect> {
        let name = format!("worker-{}", self.slot);
        let place = (self.slot, incarnation);
        let (spec, expected, socket) =
            child::serving(&name, (&self.settings.program, &self.settings.variables), &self.runtime, place)?;
        self.call = Some((socket, expected));
        let folder = self.target.borrow().folder.clone();
        let spec = spec
            .argument("--model")
            .argument(folder)
            .arguments(["--device", &self.pin.device, "--dtype", self.settings.dtype])
            .arguments(["--threads".to_owned(), self.settings.threads.to_string()])
            .arguments(
                Self::batch_tokens(incarnation).into_iter().flat_map(|tokens| ["--batch-tokens".to_owned(), tokens]),
            );
        Ok(pinning::confine(pinning::apply(spec, &self.pin), self.settings.delegation.as_deref()))
    }
}

impl Role for WorkerRole {
    type Process = Child;
    type Link = Arc<WorkerClient>;

    async fn start(&mut self, incarnation: Incarnation) -> Result<Child, StartError> {
        Ok(grail_process::spawn(self.spec(incarnation)?).await?)
    }

    fn ready(
        &mut self,
        _: Arc<Child>,
        _: Incarnation,
    ) -> impl Future<Output = Result<Self::Link, NotReady>> + Send + 'static {
        let (call, limit) = (self.call.clone(), self.settings.limits.start);
        async move {
            let Some((socket, expected)) = call else {
                return Err(NotReady(DeathCause::NotSpawned { detail: "it was never described".to_owned() }));
            };
            match WorkerClient::connect(&socket, &expected, limit).await {
                Ok(client) => Ok(Arc::new(client)),
                Err(error) => Err(not_ready(&error)),
            }
        }
    }

    fn watch(&mut self, link: &Self::Link) -> impl Future<Output = DeathCause> + Send + 'static {
        watch_worker(link.clone(), self.settings.limits.heartbeat, self.facts.clone())
    }
}

/// Ends when the worker behind `link` gives no sign of life, or its connection is over.
pub fn watch_worker<L: WorkerLink>(
    link: Arc<L>,
    heartbeat: Heartbeat,
    facts: SlotFacts,
) -> impl Future<Output = DeathCause> + Send + 'static {
    let closed = {
        let link = link.clone();
        async move { link.closed().await }.boxed()
    };
    let ask = move || {
        let link = link.clone();
        async move { link.ping().await }.boxed()
    };
    heartbeat.watch(ask, closed, move |pong| facts.heard(&pong))
}

/// A worker that takes requests.
#[derive(Debug)]
struct LiveWorker<L: WorkerLink> {
    slot: SlotId,
    incarnation: u64,
    weights: Mutex<Option<WeightsHash>>,
    link: Arc<L>,
    control: ChildControl,
    facts: SharedFacts,
    prove_limit: Duration,
    /// Requests in a row for which its memory did not suffice.
    out_of_memory: AtomicU32,
    /// Its process is gone: what still arrives of it does not count.
    is_dead: AtomicBool,
}

/// A worker that runs out of memory this often in a row starts anew with a smaller budget.
const MOST_OUT_OF_MEMORY: u32 = 2;

impl<L: WorkerLink> LiveWorker<L> {
    fn weights(&self) -> Option<WeightsHash> {
        *self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn reload(&self, target: &Target, limit: Duration) -> Result<(), String> {
        match tokio::time::timeout(limit, self.link.reload(target)).await {
            Ok(Ok(reloaded)) => {
                *self.weights.lock().unwrap_or_else(PoisonError::into_inner) = Some(reloaded.weights);
                self.facts.change(|facts| facts.weights = Some(reloaded.weights));
                tracing::info!(slot = %self.slot, checkpoint = %target.checkpoint, weights = %reloaded.weights,
                    stall_us = reloaded.stall_us, "Worker has the checkpoint.");
                Ok(())
            }
            Ok(Err(error)) => Err(with_causes(&error)),
            Err(_) => Err(format!("no answer within {limit:?}")),
        }
    }

    async fn prove(&self, job: Arc<ProveJob>) -> Result<Proof, ProofError> {
        let slot = self.slot;
        match tokio::time::timeout(self.prove_limit, self.link.prove(job)).await {
            Ok(Ok(_)) if self.is_dead.load(Ordering::Relaxed) => Err(self.lost(&LostConnection::PeerHungUp)),
            Ok(Ok(group)) => {
                self.out_of_memory.store(0, Ordering::Relaxed);
                Ok(Proof { slot, group })
            }
            Ok(Err(RequestError::Failed(failed))) => Err(self.failed(failed)),
            Ok(Err(RequestError::Lost(lost))) => Err(self.lost(&lost)),
            // Its end is noticed, and another incarnation comes.
            Ok(Err(error)) => Err(self.broken(DeathCause::ConnectionLost { detail: with_causes(&error) })),
            Err(_) => Err(self.broken(DeathCause::RequestHung)),
        }
    }

    fn failed(&self, failed: Failed) -> ProofError {
        let Failed { severity, code, detail, .. } = failed;
        match severity {
            Severity::FatalForGroup => ProofError::Group { code, detail },
            Severity::Retryable => {
                if code == OUT_OF_MEMORY && self.out_of_memory.fetch_add(1, Ordering::Relaxed) + 1 >= MOST_OUT_OF_MEMORY
                {
                    self.control.fault(self.incarnation, DeathCause::OutOfMemory);
                }
                ProofError::Declined { slot: self.slot, code, detail }
            }
            Severity::FatalForWorker if code == DEVICE_POISONED => self.broken(DeathCause::DevicePoisoned),
            Severity::FatalForWorker => self.broken(DeathCause::Broken { detail: format!("{code}: {detail}") }),
        }
    }

    /// The process is gone or going: whether the group is to blame depends on who ended it.
    fn lost(&self, lost: &LostConnection) -> ProofError {
        let blameless = self.facts.read().told_to_end == Some(self.incarnation);
        ProofError::WorkerLost { slot: self.slot, cause: with_causes(lost), blameless }
    }

    fn broken(&self, cause: DeathCause) -> ProofError {
        let text = cause.to_string();
        self.control.fault(self.incarnation, cause);
        ProofError::WorkerLost { slot: self.slot, cause: text, blameless: false }
    }
}

/// Codes of a worker's failures that say what is wrong with its device.
const OUT_OF_MEMORY: &str = "out_of_memory";
const DEVICE_POISONED: &str = "device_poisoned";

impl<L: WorkerLink> Worker for Arc<LiveWorker<L>> {
    fn slot(&self) -> SlotId {
        self.slot
    }

    fn prove(&self, job: Arc<ProveJob>) -> BoxFuture<'static, Result<Proof, ProofError>> {
        let worker = self.clone();
        async move { worker.as_ref().prove(job).await }.boxed()
    }
}
