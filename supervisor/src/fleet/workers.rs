//! The proof workers: one supervised process a slot, fed by the proof queue, rolled one after the other.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_ipc::jobs::{ProveJob, ReloadOrder, RowFacts, VerifyJob};
use grail_ipc::messages::{Failed, Reloaded, Severity, SlotId};
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
use tokio::sync::{Semaphore, mpsc, watch};

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
}

#[derive(Debug)]
struct Slot<L: WorkerLink> {
    id: SlotId,
    child: Supervised,
    live: watch::Receiver<Option<Arc<LiveWorker<L>>>>,
    facts: SharedFacts,
    orders: mpsc::UnboundedSender<Order>,
}

/// What a slot is told about its weights.
#[derive(Debug, Clone)]
pub(super) enum Order {
    /// Others are wanted: the target has changed.
    Roll,
    /// These will be wanted soon.
    Stage(Arc<Target>),
    /// Read the present ones from their folder again.
    ReadAnew,
}

/// What slots report to.
#[derive(Debug, Clone)]
pub struct Observers {
    pub queue: ProofQueue,
    pub journal: mpsc::UnboundedSender<Event>,
    pub progress: Arc<Progress>,
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
        let [turn, staging_turn] = [(); 2].map(|()| Arc::new(Semaphore::new(1)));
        let slots: Vec<Slot<L>> = (0..count)
            .map(|number| {
                let (id, facts) = (SlotId(number), SharedFacts::default());
                let role = role(id, target.subscribe(), SlotFacts(facts.clone()));
                let (sender, orders) = mpsc::unbounded_channel();
                let (turn, staging_turn) = (turn.clone(), staging_turn.clone());
                let rolling = Rolling { target: target.subscribe(), orders, turn, staging_turn };
                Slot::start(id, role, (sender, rolling), limits, facts, observers)
            })
            .collect();
        let workers = Self { slots, target };
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
        let control = |slot: &Slot<L>| SlotControl {
            id: slot.id,
            child: slot.child.control(),
            facts: slot.facts.clone(),
            orders: slot.orders.clone(),
        };
        self.slots.iter().map(control).collect()
    }

    /// Whoever recomputes rows with certain weights.
    pub(super) fn confirmers(&self) -> Confirmers<L> {
        Confirmers { lives: self.slots.iter().map(|slot| slot.live.clone()).collect() }
    }

    /// The slots as seen from outside.
    #[must_use]
    pub fn handle(&self, queue: &ProofQueue) -> FleetHandle {
        let controls = Controls { slots: self.controls(), server: None };
        FleetHandle { controls: Arc::new(Mutex::new(controls)), queue: queue.clone() }
    }

    /// Waits until some slot has a worker with the weights that are wanted. The others come on their own.
    ///
    /// # Errors
    /// [`FleetError::NoWorkers`] if every slot was given up.
    pub async fn wait_ready(&self) -> Result<(), FleetError> {
        let weights = self.target.borrow().weights;
        let mut lives: Vec<_> = self.slots.iter().map(|slot| slot.live.clone()).collect();
        let mut states: Vec<_> = self.slots.iter().map(|slot| slot.child.states()).collect();
        loop {
            let has =
                |live: &Option<Arc<LiveWorker<L>>>| live.as_ref().is_some_and(|live| live.weights() == Some(weights));
            if lives.iter_mut().any(|live| has(&live.borrow_and_update())) {
                return Ok(());
            }
            let now: Vec<State> = states.iter_mut().map(|state| state.borrow_and_update().clone()).collect();
            if now.iter().all(is_lost) {
                return Err(no_workers(&now));
            }
            let changes = lives
                .iter_mut()
                .map(|live| live.changed().boxed())
                .chain(states.iter_mut().map(|state| state.changed().boxed()));
            if futures::future::select_all(changes).await.0.is_err() {
                return Err(FleetError::NoWorkers { reason: "the slots have ended".to_owned(), exit: None });
            }
        }
    }

    /// Rolls one slot after the other to `target`, while the others go on; a slot that cannot take it is started anew on it. Returns
    /// when the first slot has it: nobody waits for a slot that is broken.
    ///
    /// # Errors
    /// [`FleetError::NoWorkers`] if every slot was given up.
    pub async fn roll(&self, target: Target) -> Result<(), FleetError> {
        let is_new = self.target.send_if_modified(|wanted| {
            let is_new = *wanted != target;
            *wanted = target;
            is_new
        });
        if is_new {
            // In the order of the slots; the watch alone would wake them in any.
            for slot in &self.slots {
                slot.orders.send(Order::Roll).unwrap_or_default();
            }
        }
        self.wait_ready().await
    }

    /// Ends all workers and waits for their end.
    pub async fn shut_down(self) {
        futures::future::join_all(self.slots.into_iter().map(|slot| slot.child.shut_down())).await;
    }
}

/// The workers that live, for questions beside the queue of groups.
#[derive(Debug, Clone)]
pub(super) struct Confirmers<L: WorkerLink = WorkerClient> {
    lives: Vec<watch::Receiver<Option<Arc<LiveWorker<L>>>>>,
}

/// A question that some workers failed at, whatever they died of.
const MOST_ASKED: u32 = 4;

impl<L: WorkerLink> Confirmers<L> {
    /// Has a worker with the job's weights recompute it; waits for one.
    ///
    /// # Errors
    /// The last failure, when several workers have failed.
    pub async fn verify(&mut self, job: &VerifyJob) -> Result<Vec<RowFacts>, RequestError> {
        let mut asked = 0;
        loop {
            let worker = self.with_weights(job.weights).await;
            asked += 1;
            let answer = match tokio::time::timeout(worker.prove_limit, worker.link.verify(job)).await {
                Ok(answer) => answer,
                Err(_) => {
                    // The next answer comes from another worker, or from this slot's next one.
                    drop(worker.broken(DeathCause::RequestHung));
                    continue;
                }
            };
            match answer {
                Err(error) if asked < MOST_ASKED => {
                    tracing::debug!(slot = %worker.slot, error = with_causes(&error), "Asking another worker.");
                    // One whose end is not known yet would be asked at once again.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                answer => return answer,
            }
        }
    }

    async fn with_weights(&mut self, weights: WeightsHash) -> Arc<LiveWorker<L>> {
        loop {
            let fits = |live: &Arc<LiveWorker<L>>| live.weights() == Some(weights);
            if let Some(live) = self.lives.iter_mut().find_map(|live| live.borrow_and_update().clone().filter(fits)) {
                return live;
            }
            let changes: Vec<_> = self.lives.iter_mut().map(|live| live.changed().boxed()).collect();
            if changes.is_empty() || futures::future::select_all(changes).await.0.is_err() {
                // The slots have ended; whoever waits here is ended too.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Whether a slot will not come back by itself. One that an operator emptied comes back when the operator says so: its work waits.
fn is_lost(state: &State) -> bool {
    matches!(state, State::GaveUp(reason) if *reason != GiveUp::Quarantined)
}

/// Why there is no worker, when all slots were given up; with an exit code if no start of any would go better.
fn no_workers(slots: &[State]) -> FleetError {
    let reason = slots.iter().find_map(|state| match state {
        State::GaveUp(reason) => Some(format!("each slot was given up, the first because it {reason}")),
        _ => None,
    });
    let exits: Vec<Option<ExitCode>> = slots.iter().map(hopeless_exit).collect();
    let exit = exits.first().copied().flatten().filter(|_| exits.iter().all(Option::is_some));
    FleetError::NoWorkers { reason: reason.unwrap_or_else(|| "no slot is configured".to_owned()), exit }
}

/// What a slot that no other start would help says of the reason.
fn hopeless_exit(state: &State) -> Option<ExitCode> {
    match state {
        State::GaveUp(GiveUp::Hopeless { cause: DeathCause::VersionMismatch { .. } }) => Some(ExitCode::Configuration),
        State::GaveUp(GiveUp::Hopeless { cause }) => cause.exit_code(),
        _ => None,
    }
}

/// What all slots share of a roll.
#[derive(Debug)]
struct Rolling {
    target: watch::Receiver<Target>,
    orders: mpsc::UnboundedReceiver<Order>,
    /// One slot reloads at a time.
    turn: Arc<Semaphore>,
    /// One slot makes ready at a time; no reload waits for that.
    staging_turn: Arc<Semaphore>,
}

impl<L: WorkerLink> Slot<L> {
    fn start<R: Role<Link = Arc<L>>>(
        id: SlotId,
        role: R,
        (orders, rolling): (mpsc::UnboundedSender<Order>, Rolling),
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
            rolling,
            change: None,
            staging: None,
            is_offered: false,
            reads_anew: false,
            next: None,
        };
        tokio::spawn(follower.run::<R>(events));
        Self { id, child, live, facts, orders }
    }
}

/// Brings a slot's events to those who want to know, and its worker to the weights that are wanted: only with them it gets work.
struct Follower<L: WorkerLink> {
    slot: SlotId,
    control: ChildControl,
    facts: SharedFacts,
    publish: watch::Sender<Option<Arc<LiveWorker<L>>>>,
    observers: Observers,
    limits: SlotLimits,
    rolling: Rolling,
    /// The reload or its preparation under way.
    change: Option<BoxFuture<'static, Change<L>>>,
    /// If that is a preparation: whether its turn has come.
    staging: Option<Arc<AtomicBool>>,
    /// Whether the queue gives work to the live worker.
    is_offered: bool,
    /// An operator wants the weights to be read again.
    reads_anew: bool,
    /// Weights that will be wanted soon.
    next: Option<Arc<Target>>,
}

/// What became of a request to a worker about its weights.
struct Change<L: WorkerLink> {
    worker: Arc<LiveWorker<L>>,
    outcome: Outcome,
}

/// Why a worker does not have the weights of an order.
struct Refused {
    reason: String,
    /// It was only to read again what it had, and it still has that.
    proves_on: bool,
}

enum Outcome {
    Reloaded(Result<Reloaded, Refused>),
    /// With success or without: weights that are not ready beforehand take longer when they are due.
    Staged,
}

impl<L: WorkerLink> Follower<L> {
    async fn run<R: Role<Link = Arc<L>>>(mut self, mut events: Events<R>) {
        loop {
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Some(event) => self.take::<R>(event),
                    None => return,
                },
                change = under_way(&mut self.change) => {
                    (self.change, self.staging) = (None, None);
                    self.changed(change);
                }
                // Without orders the fleet is being ended; the last events still count.
                Some(order) = self.rolling.orders.recv() => self.obey(order),
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Roll => {}
            Order::Stage(target) => self.next = Some(target),
            Order::ReadAnew => self.reads_anew = true,
        }
        self.bring_to_target();
    }

    fn take<R: Role<Link = Arc<L>>>(&mut self, event: ChildEvent<Arc<L>, R::Process>) {
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

    /// Gives the live worker work if it has the wanted weights, else has it take them.
    fn bring_to_target(&mut self) {
        let Some(worker) = self.publish.borrow().clone() else { return };
        let target = self.rolling.target.borrow().clone();
        let has_them = worker.weights() == Some(target.weights);
        if !has_them {
            self.withdraw();
        }
        if !has_them && self.staging.as_ref().is_some_and(|begun| !begun.load(Ordering::Relaxed)) {
            // What still waits for its turn comes too late.
            (self.change, self.staging) = (None, None);
        }
        if self.change.is_some() {
            // Looked at again when that one is over.
            return;
        }
        if has_them && !self.reads_anew {
            if !self.is_offered {
                self.is_offered = true;
                self.observers.queue.worker_ready(Arc::new(worker.clone()));
            }
            return self.stage_next(worker);
        }
        self.withdraw();
        let order = target.order(std::mem::take(&mut self.reads_anew));
        let (turn, limit) = (self.rolling.turn.clone(), self.limits.reload);
        let reload = async move {
            // The semaphore is never closed.
            let _turn = turn.acquire().await;
            let result = worker.reload(order, limit).await;
            Change { worker, outcome: Outcome::Reloaded(result) }
        };
        self.change = Some(reload.boxed());
    }

    /// Has the worker make ready what will be wanted soon, once, while it proves.
    fn stage_next(&mut self, worker: Arc<LiveWorker<L>>) {
        let Some(next) = self.next.clone().filter(|next| worker.is_to_stage(next.weights)) else { return };
        let (turn, limit) = (self.rolling.staging_turn.clone(), self.limits.reload);
        let begun = Arc::new(AtomicBool::new(false));
        self.staging = Some(begun.clone());
        let stage = async move {
            // The semaphore is never closed.
            let _turn = turn.acquire().await;
            begun.store(true, Ordering::Relaxed);
            worker.stage(&next, limit).await;
            Change { worker, outcome: Outcome::Staged }
        };
        self.change = Some(stage.boxed());
    }

    fn changed(&mut self, Change { worker, outcome }: Change<L>) {
        let is_live = self.publish.borrow().as_ref().is_some_and(|live| Arc::ptr_eq(live, &worker));
        match outcome {
            Outcome::Reloaded(Ok(reloaded)) if is_live => {
                self.note(Event::WorkerRolled {
                    slot: self.slot.0,
                    epoch: worker.incarnation,
                    weights: reloaded.weights,
                    stall_us: reloaded.stall_us,
                    from_changes: reloaded.from_changes,
                    in_shadow: reloaded.in_shadow,
                });
                // Whoever waits for a slot with these weights looks again.
                self.publish.send_modify(|_| {});
                self.bring_to_target();
            }
            Outcome::Reloaded(Err(Refused { reason, proves_on: true })) if is_live => {
                tracing::error!(slot = %self.slot, reason,
                    "A worker cannot read its checkpoint again; it proves on with the weights that it has.");
                self.bring_to_target();
            }
            Outcome::Reloaded(Err(Refused { reason, .. })) if is_live => {
                tracing::error!(slot = %self.slot, reason, "A worker did not take the checkpoint; starting it anew.");
                self.facts.change(|facts| facts.told_to_end = Some(worker.incarnation));
                self.control.restart();
            }
            Outcome::Reloaded(_) | Outcome::Staged => self.bring_to_target(),
        }
    }

    /// Takes the live worker out of the queue.
    fn withdraw(&mut self) {
        self.is_offered = false;
        self.observers.queue.worker_lost(self.slot);
    }

    fn note(&self, event: Event) {
        drop(self.observers.journal.send(event));
    }

    fn ready(&mut self, incarnation: Incarnation, link: Arc<L>) {
        let hello = link.hello();
        self.facts.change(|facts| {
            (facts.device, facts.weights) = (Some(hello.device.clone()), hello.weights);
        });
        self.note(Event::WorkerReady { slot: self.slot.0, pid: hello.pid, epoch: incarnation.number });
        let worker = Arc::new(LiveWorker {
            slot: self.slot,
            incarnation: incarnation.number,
            weights: Mutex::new(hello.weights),
            asked_to_stage: Mutex::new(None),
            link,
            control: self.control.clone(),
            facts: self.facts.clone(),
            prove_limit: self.limits.prove,
            out_of_memory: AtomicU32::new(0),
            is_dead: AtomicBool::new(false),
        });
        self.publish.send_replace(Some(worker));
        self.bring_to_target();
    }

    fn drain(&mut self) {
        self.withdraw();
        let Some(worker) = self.publish.borrow().clone() else { return self.control.drained() };
        let (control, limit, facts) = (self.control.clone(), self.limits.drain, self.facts.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(limit, worker.link.drain()).await {
                Ok(Ok(())) => tracing::info!(slot = %worker.slot, "Worker is drained."),
                Ok(Err(error)) => tracing::warn!(slot = %worker.slot, error = with_causes(&error), "Drain failed."),
                Err(_) => tracing::warn!(slot = %worker.slot, ?limit, "Worker did not drain in time."),
            }
            // What it still has is cut off by us.
            facts.change(|facts| facts.told_to_end = Some(worker.incarnation));
            control.drained();
        });
    }

    fn died(&mut self, incarnation: u64, cause: &DeathCause, last_lines: &[String]) {
        self.withdraw();
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

async fn under_way<L: WorkerLink>(change: &mut Option<BoxFuture<'static, Change<L>>>) -> Change<L> {
    match change {
        Some(change) => change.await,
        None => std::future::pending().await,
    }
}

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
    /// The weights that it was last told to make ready.
    asked_to_stage: Mutex<Option<WeightsHash>>,
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

    /// Whether it neither has `weights` nor was told to make them ready.
    fn is_to_stage(&self, weights: WeightsHash) -> bool {
        let asked = *self.asked_to_stage.lock().unwrap_or_else(PoisonError::into_inner);
        asked != Some(weights) && self.weights() != Some(weights)
    }

    async fn stage(&self, next: &Target, limit: Duration) {
        *self.asked_to_stage.lock().unwrap_or_else(PoisonError::into_inner) = Some(next.weights);
        let (slot, checkpoint) = (self.slot, next.checkpoint);
        match tokio::time::timeout(limit, self.link.stage(next.order(false))).await {
            Ok(Ok(ready)) if ready == next.weights => {
                tracing::info!(%slot, %checkpoint, "Worker has the checkpoint ready.")
            }
            Ok(Ok(_)) => tracing::info!(%slot, %checkpoint, "Worker has no memory to make the checkpoint ready."),
            Ok(Err(error)) => {
                tracing::warn!(%slot, %checkpoint, error = with_causes(&error), "Worker could not make the checkpoint ready.");
            }
            Err(_) => tracing::warn!(%slot, %checkpoint, ?limit, "Worker did not make the checkpoint ready in time."),
        }
    }

    async fn reload(&self, order: ReloadOrder, limit: Duration) -> Result<Reloaded, Refused> {
        let (checkpoint, weights) = (order.checkpoint, order.weights);
        let had_them = self.weights() == Some(weights);
        let refused = |reason| Refused { reason, proves_on: false };
        match tokio::time::timeout(limit, self.link.reload(order)).await {
            Ok(Ok(reloaded)) if reloaded.weights != weights => {
                Err(refused(format!("it took weights {}, the order names {weights}", reloaded.weights)))
            }
            Ok(Ok(reloaded)) => {
                *self.weights.lock().unwrap_or_else(PoisonError::into_inner) = Some(reloaded.weights);
                self.facts.change(|facts| facts.weights = Some(reloaded.weights));
                tracing::info!(slot = %self.slot, %checkpoint, weights = %reloaded.weights, stall_us = reloaded.stall_us,
                    total_us = reloaded.total_us, from_changes = reloaded.from_changes, in_shadow = reloaded.in_shadow,
                    "Worker has the checkpoint.");
                Ok(reloaded)
            }
            Ok(Err(error)) => {
                let is_intact = matches!(&error, RequestError::Failed(failed) if failed.code == RELOAD_FAILED);
                Err(Refused { reason: with_causes(&error), proves_on: had_them && is_intact })
            }
            Err(_) => Err(refused(format!("no answer within {limit:?}"))),
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
                    self.facts.change(|facts| facts.told_to_end = Some(self.incarnation));
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

/// Code of a worker whose reload failed before it had touched the old weights, or after every change was taken back.
const RELOAD_FAILED: &str = "reload_failed";
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
