//! The proof workers: one supervised process a slot, fed by the proof queue, rolled one after the other.

mod live;
mod role;
mod slot;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use grail_ipc::WorkerClient;
use grail_ipc::messages::SlotId;
use grail_ipc::socket::RuntimeFolder;
use grail_process::cgroup::Delegation;
use grail_process::restart::RestartPolicy;
use grail_process::state::{GiveUp, State};
use grail_process::{ExitCode, Role};
use tokio::sync::{Semaphore, mpsc, watch};

pub(super) use self::live::Confirmers;
use self::live::LiveWorker;
use self::role::WorkerRole;
pub use self::role::watch_worker;
pub(super) use self::slot::Order;
use self::slot::{Rolling, Slot};
use super::control::{Controls, FleetHandle, SharedFacts, SlotControl};
use super::link::{Heartbeat, Target, WorkerLink};
use super::pinning::SlotPin;
use super::{FleetError, child};
use crate::journal::Event;
use crate::progress::Progress;
use crate::proofs::ProofQueue;

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
        let role = |slot, target, facts| WorkerRole::new(slot, settings.clone(), runtime.clone(), target, facts);
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
        Confirmers::new(self.slots.iter().map(|slot| slot.live.clone()).collect())
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
    let exit_of = |state: &State| match state {
        State::GaveUp(reason) => child::hopeless_exit(reason),
        _ => None,
    };
    let exits: Vec<Option<ExitCode>> = slots.iter().map(exit_of).collect();
    let exit = exits.first().copied().flatten().filter(|_| exits.iter().all(Option::is_some));
    FleetError::NoWorkers { reason: reason.unwrap_or_else(|| "no slot is configured".to_owned()), exit }
}
