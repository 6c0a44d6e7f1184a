//! The proof workers: one supervised process a slot, fed by the proof queue, rolled one after the other.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_ipc::jobs::ProveJob;
use grail_ipc::messages::{Severity, SlotId};
use grail_ipc::socket::RuntimeFolder;
use grail_ipc::{Expected, RequestError, WorkerClient};
use grail_process::cause::DeathCause;
use grail_process::restart::RestartPolicy;
use grail_process::state::State;
use grail_process::{
    Child, ChildEvent, ChildPolicy, ChildSpec, Incarnation, NotReady, Role, Signal, StopPlan, Supervised, supervise,
};
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use tokio::sync::{mpsc, watch};

use super::FleetError;
use super::child::{self, not_ready};
use crate::engine::with_causes;
use crate::journal::Event;
use crate::progress::Progress;
use crate::proofs::{Proof, ProofError, ProofQueue, Worker};

/// How proof workers are run.
#[derive(Debug, Clone)]
pub struct WorkerSettings {
    pub program: PathBuf,
    /// Variables that the worker must see, wherever they were set.
    pub variables: Vec<(&'static str, String)>,
    pub slots: u32,
    /// `cpu` or `cuda:0`.
    pub device: String,
    /// `float32` or `bfloat16`.
    pub dtype: &'static str,
    /// Threads of one worker on the CPU.
    pub threads: usize,
    /// How long a worker may take to load its model.
    pub start_limit: Duration,
    /// How long a worker may take to roll to another checkpoint.
    pub reload_limit: Duration,
}

/// The weights that workers should have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub checkpoint: CheckpointWindow,
    pub folder: PathBuf,
    pub weights: WeightsHash,
}

/// All slots.
#[derive(Debug)]
pub struct Workers {
    slots: Vec<Slot>,
    target: watch::Sender<Target>,
    reload_limit: Duration,
}

#[derive(Debug)]
struct Slot {
    id: SlotId,
    child: Supervised,
    live: watch::Receiver<Option<Arc<LiveWorker>>>,
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
        let (target, _) = watch::channel(target);
        let slots = (0..settings.slots)
            .map(|number| Slot::start(SlotId(number), settings, runtime, target.subscribe(), observers))
            .collect();
        let workers = Self { slots, target, reload_limit: settings.reload_limit };
        workers.report_to(observers);
        workers
    }

    /// Keeps the display's count of workers, and fails waiting proofs when no slot will come back.
    fn report_to(&self, observers: &Observers) {
        let lives: Vec<_> = self.slots.iter().map(|slot| slot.live.clone()).collect();
        let states: Vec<_> = self.slots.iter().map(|slot| slot.child.states()).collect();
        let observers = observers.clone();
        tokio::spawn(async move {
            let mut lives = lives;
            let mut states = states;
            loop {
                let ready = lives.iter().filter(|live| live.borrow().is_some()).count();
                observers.progress.workers(ready, lives.len());
                if states.iter().all(|state| matches!(*state.borrow(), State::GaveUp(_) | State::Dead)) {
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

    /// Waits until every slot is ready or has given up.
    ///
    /// # Errors
    /// [`FleetError::NoWorkers`] if none is ready; with the reason of the last one.
    pub async fn wait_ready(&self) -> Result<(), FleetError> {
        let mut reason = None;
        let mut ready = 0;
        for slot in &self.slots {
            match slot.settled().await {
                Ok(_) => ready += 1,
                Err(why) => reason = Some(why),
            }
        }
        if ready == 0 {
            return Err(FleetError::NoWorkers { reason: reason.unwrap_or_else(|| "no slot is configured".to_owned()) });
        }
        Ok(())
    }

    /// Rolls slot after slot to `target`, while the others go on. A slot that cannot take it is started anew on it.
    ///
    /// # Errors
    /// [`FleetError::NoWorkers`] if no slot has the weights afterwards.
    pub async fn roll(&self, target: Target) -> Result<(), FleetError> {
        self.target.send_replace(target.clone());
        let mut reason = None;
        let mut rolled = 0;
        for slot in &self.slots {
            match slot.roll(&target, self.reload_limit).await {
                Ok(()) => rolled += 1,
                Err(why) => {
                    tracing::error!(slot = %slot.id, reason = why, "A worker did not take the checkpoint.");
                    reason = Some(why);
                }
            }
        }
        if rolled == 0 {
            return Err(FleetError::NoWorkers { reason: reason.unwrap_or_default() });
        }
        Ok(())
    }

    /// A connection to any ready worker.
    pub fn any(&self) -> Option<Arc<WorkerClient>> {
        self.slots.iter().find_map(|slot| slot.live.borrow().as_ref().map(|live| live.client.clone()))
    }

    /// Ends all workers and waits for their end.
    pub async fn shut_down(self) {
        futures::future::join_all(self.slots.into_iter().map(|slot| slot.child.shut_down())).await;
    }
}

impl Slot {
    fn start(
        id: SlotId,
        settings: &WorkerSettings,
        runtime: &RuntimeFolder,
        target: watch::Receiver<Target>,
        observers: &Observers,
    ) -> Self {
        let role = WorkerRole { slot: id, settings: settings.clone(), runtime: runtime.clone(), target, call: None };
        let policy = ChildPolicy {
            name: format!("worker-{id}"),
            start_limit: settings.start_limit,
            restart: RestartPolicy::default(),
            stop: StopPlan::terminate(Duration::from_secs(5)),
            last_incarnation: 0,
        };
        let (child, events) = supervise(role, policy);
        let (publish, live) = watch::channel(None);
        tokio::spawn(follow(id, events, publish, observers.clone()));
        Self { id, child, live }
    }

    /// The live worker, once there is one; the reason when there will be none.
    async fn settled(&self) -> Result<Arc<LiveWorker>, String> {
        let (mut states, mut live) = (self.child.states(), self.live.clone());
        loop {
            if let Some(worker) = live.borrow_and_update().clone() {
                return Ok(worker);
            }
            if let State::GaveUp(reason) = &*states.borrow_and_update() {
                return Err(format!("slot {} was given up: {reason}", self.id));
            }
            tokio::select! {
                changed = states.changed() => if changed.is_err() { return Err("the slot has ended".to_owned()) },
                changed = live.changed() => if changed.is_err() { return Err("the slot has ended".to_owned()) },
            }
        }
    }

    async fn roll(&self, target: &Target, limit: Duration) -> Result<(), String> {
        // A worker that is still starting may have read the old folder: it is rolled like the others once it is ready.
        let worker = self.settled().await?;
        match worker.reload(target, limit).await {
            Ok(()) => return Ok(()),
            Err(reason) => tracing::warn!(slot = %self.id, reason, "Reload failed; starting the worker anew."),
        }
        let mut live = self.live.clone();
        self.child.restart();
        // The old incarnation must be gone before the new one counts; that one reads the new folder when it starts.
        let gone = live.wait_for(|now| now.as_ref().is_none_or(|now| !Arc::ptr_eq(now, &worker))).await;
        drop(gone.map_err(|_| "the slot has ended".to_owned())?);
        let worker = self.settled().await?;
        match worker.client.hello().weights {
            Some(weights) if weights == target.weights => Ok(()),
            other => Err(format!("slot {} came up with weights {other:?}", self.id)),
        }
    }
}

/// Brings a slot's events to those who want to know.
async fn follow(
    slot: SlotId,
    mut events: mpsc::UnboundedReceiver<ChildEvent<Arc<WorkerClient>>>,
    publish: watch::Sender<Option<Arc<LiveWorker>>>,
    observers: Observers,
) {
    let note = |event| drop(observers.journal.send(event));
    while let Some(event) = events.recv().await {
        match event {
            ChildEvent::Ready { incarnation, child, link } => {
                note(Event::WorkerReady {
                    slot: slot.0,
                    pid: u32::try_from(child.pid()).unwrap_or_default(),
                    epoch: incarnation.number,
                });
                let worker = Arc::new(LiveWorker { slot, client: link, child });
                observers.queue.worker_ready(worker.clone());
                publish.send_replace(Some(worker));
            }
            ChildEvent::Died { incarnation, cause, last_lines, .. } => {
                observers.queue.worker_lost(slot);
                publish.send_replace(None);
                if cause != DeathCause::Requested {
                    for line in last_lines.iter().rev().take(5).rev() {
                        tracing::warn!(%slot, incarnation, line, "Last lines of the dead worker.");
                    }
                    note(Event::WorkerLost { slot: slot.0, epoch: incarnation, cause: cause.to_string() });
                }
            }
            _ => {}
        }
    }
}

/// One slot's process.
#[derive(Debug)]
struct WorkerRole {
    slot: SlotId,
    settings: WorkerSettings,
    runtime: RuntimeFolder,
    target: watch::Receiver<Target>,
    /// How the incarnation that was described last is reached.
    call: Option<(PathBuf, Expected)>,
}

impl Role for WorkerRole {
    type Link = Arc<WorkerClient>;

    fn spec(&mut self, incarnation: Incarnation) -> Result<ChildSpec, Box<dyn std::error::Error + Send + Sync>> {
        let name = format!("worker-{}", self.slot);
        let place = (self.slot, incarnation);
        let (spec, expected, socket) =
            child::serving(&name, (&self.settings.program, &self.settings.variables), &self.runtime, place)?;
        self.call = Some((socket, expected));
        let folder = self.target.borrow().folder.clone();
        Ok(spec
            .argument("--model")
            .argument(folder)
            .arguments(["--device", &self.settings.device, "--dtype", self.settings.dtype])
            .arguments(["--threads".to_owned(), self.settings.threads.to_string()]))
    }

    fn ready(
        &mut self,
        _: Arc<Child>,
        _: Incarnation,
    ) -> impl Future<Output = Result<Self::Link, NotReady>> + Send + 'static {
        let (call, limit) = (self.call.clone(), self.settings.start_limit);
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
}

/// A worker that takes requests.
#[derive(Debug)]
pub struct LiveWorker {
    slot: SlotId,
    client: Arc<WorkerClient>,
    child: Arc<Child>,
}

/// A proof that takes longer than this is given up, as the protocol's reference does.
const PROVE_LIMIT: Duration = Duration::from_secs(600);

impl LiveWorker {
    async fn reload(&self, target: &Target, limit: Duration) -> Result<(), String> {
        let reload = self.client.reload(target.checkpoint, &target.folder, target.weights);
        match tokio::time::timeout(limit, reload).await {
            Ok(Ok(reloaded)) => {
                tracing::info!(slot = %self.slot, checkpoint = %target.checkpoint, weights = %reloaded.weights,
                    stall_us = reloaded.stall_us, "Worker has the checkpoint.");
                Ok(())
            }
            Ok(Err(error)) => Err(with_causes(&error)),
            Err(_) => Err(format!("no answer within {limit:?}")),
        }
    }
}

impl Worker for LiveWorker {
    fn slot(&self) -> SlotId {
        self.slot
    }

    fn prove(&self, job: Arc<ProveJob>) -> BoxFuture<'static, Result<Proof, ProofError>> {
        let (slot, client, child) = (self.slot, self.client.clone(), self.child.clone());
        async move {
            let cause = match tokio::time::timeout(PROVE_LIMIT, client.prove(&job)).await {
                Ok(Ok(group)) => return Ok(Proof { slot, group }),
                Ok(Err(RequestError::Failed(failed))) => match failed.severity {
                    Severity::FatalForGroup => {
                        return Err(ProofError::Group { code: failed.code, detail: failed.detail });
                    }
                    Severity::Retryable => {
                        return Err(ProofError::Declined { slot, code: failed.code, detail: failed.detail });
                    }
                    Severity::FatalForWorker => format!("{}: {}", failed.code, failed.detail),
                },
                Ok(Err(error)) => with_causes(&error),
                Err(_) => format!("no answer within {PROVE_LIMIT:?}"),
            };
            // Whatever is left of it must not keep the slot: its end is noticed, and another incarnation comes.
            if let Err(error) = child.signal(Signal::SIGKILL) {
                tracing::debug!(%slot, %error, "The lost worker is gone already.");
            }
            Err(ProofError::WorkerLost { slot, cause })
        }
        .boxed()
    }
}
