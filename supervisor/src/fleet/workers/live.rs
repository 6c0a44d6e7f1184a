//! A worker that takes requests, and what its failures mean.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_ipc::jobs::{ProveJob, ReloadOrder, RowFacts, VerifyJob};
use grail_ipc::messages::{Failed, MOST_NON_FINITE, MOST_OUT_OF_MEMORY, Reloaded, Severity, SlotId};
use grail_ipc::{LostConnection, RequestError, WorkerClient};
use grail_process::cause::DeathCause;
use grail_process::{ChildControl, Incarnation, with_causes};
use grail_protocol::ids::WeightsHash;
use tokio::sync::watch;

use crate::fleet::control::SharedFacts;
use crate::fleet::link::{Target, WorkerLink};
use crate::proofs::{Proof, ProofError, Worker};

/// The workers that live, for questions beside the queue of groups.
#[derive(Debug, Clone)]
pub(in crate::fleet) struct Confirmers<L: WorkerLink = WorkerClient> {
    lives: Vec<watch::Receiver<Option<Arc<LiveWorker<L>>>>>,
}

/// A question that some workers failed at, whatever they died of.
const MOST_ASKED: u32 = 4;

impl<L: WorkerLink> Confirmers<L> {
    pub(super) const fn new(lives: Vec<watch::Receiver<Option<Arc<LiveWorker<L>>>>>) -> Self {
        Self { lives }
    }

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

/// A worker that takes requests.
#[derive(Debug)]
pub(super) struct LiveWorker<L: WorkerLink> {
    pub slot: SlotId,
    pub incarnation: u64,
    weights: Mutex<Option<WeightsHash>>,
    /// The weights that it was last told to make ready.
    asked_to_stage: Mutex<Option<WeightsHash>>,
    pub link: Arc<L>,
    control: ChildControl,
    facts: SharedFacts,
    prove_limit: Duration,
    /// Requests in a row for which its memory did not suffice.
    out_of_memory: AtomicU32,
    /// Groups in a row of which nothing finite came out.
    non_finite: AtomicU32,
    /// Its process is gone: what still arrives of it does not count.
    is_dead: AtomicBool,
}

/// Why a worker does not have the weights of an order.
pub(super) struct Refused {
    pub reason: String,
    /// It was only to read again what it had, and it still has that.
    pub proves_on: bool,
}

impl<L: WorkerLink> LiveWorker<L> {
    pub(super) fn new(
        slot: SlotId,
        incarnation: Incarnation,
        link: Arc<L>,
        control: ChildControl,
        facts: SharedFacts,
        prove_limit: Duration,
    ) -> Self {
        Self {
            slot,
            incarnation: incarnation.number,
            weights: Mutex::new(link.hello().weights),
            asked_to_stage: Mutex::new(None),
            link,
            control,
            facts,
            prove_limit,
            out_of_memory: AtomicU32::new(0),
            non_finite: AtomicU32::new(0),
            is_dead: AtomicBool::new(false),
        }
    }

    /// Its process is gone.
    pub(super) fn note_death(&self) {
        self.is_dead.store(true, Ordering::Relaxed);
    }

    pub(super) fn weights(&self) -> Option<WeightsHash> {
        *self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it neither has `weights` nor was told to make them ready.
    pub(super) fn is_to_stage(&self, weights: WeightsHash) -> bool {
        let asked = *self.asked_to_stage.lock().unwrap_or_else(PoisonError::into_inner);
        asked != Some(weights) && self.weights() != Some(weights)
    }

    pub(super) async fn stage(&self, next: &Target, limit: Duration) {
        *self.asked_to_stage.lock().unwrap_or_else(PoisonError::into_inner) = Some(next.weights);
        let (slot, checkpoint) = (self.slot, next.checkpoint);
        match tokio::time::timeout(limit, self.link.stage(next.order(false))).await {
            Ok(Ok(ready)) if ready == next.weights => {
                tracing::info!(%slot, %checkpoint, "Worker has the checkpoint ready.")
            }
            Ok(Ok(_)) => {
                tracing::info!(%slot, %checkpoint, "Worker will change its weights when the checkpoint is due.")
            }
            Ok(Err(error)) => {
                tracing::warn!(%slot, %checkpoint, error = with_causes(&error), "Worker could not make the checkpoint ready.");
            }
            Err(_) => tracing::warn!(%slot, %checkpoint, ?limit, "Worker did not make the checkpoint ready in time."),
        }
    }

    pub(super) async fn reload(&self, order: ReloadOrder, limit: Duration) -> Result<Reloaded, Refused> {
        let (checkpoint, weights) = (order.checkpoint, order.weights);
        let had_them = self.weights() == Some(weights);
        // Whatever was ready takes over now or is dropped.
        *self.asked_to_stage.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
                self.non_finite.store(0, Ordering::Relaxed);
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
            Severity::FatalForGroup if code == NON_FINITE => {
                if self.non_finite.fetch_add(1, Ordering::Relaxed) + 1 >= MOST_NON_FINITE {
                    self.replace(DeathCause::Broken { detail: format!("weights are suspect: {detail}") });
                }
                ProofError::Suspect { slot: self.slot, code, detail }
            }
            Severity::FatalForGroup => ProofError::Group { code, detail },
            Severity::Retryable => {
                if code == OUT_OF_MEMORY && self.out_of_memory.fetch_add(1, Ordering::Relaxed) + 1 >= MOST_OUT_OF_MEMORY
                {
                    self.replace(DeathCause::OutOfMemory);
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

    /// Ends the worker, as it would end by itself; what else it has is not to blame.
    fn replace(&self, cause: DeathCause) {
        self.facts.change(|facts| facts.told_to_end = Some(self.incarnation));
        self.control.fault(self.incarnation, cause);
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
const NON_FINITE: &str = "non_finite";
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
