//! The one thread that owns the model.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use grail_ipc::jobs::{GroupProof, ProveJob, ReloadOrder, RowFacts, VerifyJob};
use grail_ipc::messages::{RequestId, Severity};
use grail_process::fault::{Act, Armed, Point};
use grail_protocol::ids::WeightsHash;
use tokio::sync::{mpsc as async_mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, error};

use crate::batches::{Batches, Request};
use crate::error::WorkerError;
use crate::prepare::{Order, Preparer, Then};
use crate::prover::{ComputeError, Loader, Prepared, Prover, Retired, Way};

/// What became of a request.
#[derive(Debug)]
pub enum Outcome {
    Proved {
        id: RequestId,
        proof: GroupProof,
    },
    Verified {
        id: RequestId,
        weights: WeightsHash,
        rows: Vec<RowFacts>,
    },
    /// `weights` are ready to take over; the present ones if others cannot lie ready.
    Staged {
        id: RequestId,
        weights: WeightsHash,
    },
    Reloaded {
        id: RequestId,
        reload: Reload,
    },
    Failed {
        id: RequestId,
        error: ComputeError,
    },
}

/// A reload that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reload {
    pub weights: WeightsHash,
    /// In which nothing could be proved.
    pub stall: Duration,
    /// Since the command.
    pub total: Duration,
    pub way: Way,
}

/// Where outcomes of one session go; when it is closed nobody wants them any more.
pub type Outcomes = async_mpsc::UnboundedSender<Outcome>;

/// What is known of the model without asking its thread.
#[derive(Debug, Default)]
pub(crate) struct Known {
    weights: Mutex<Option<WeightsHash>>,
    groups: AtomicU64,
    rollouts: AtomicU64,
}

impl Known {
    /// Hash of the weights that prove now.
    pub(crate) fn weights(&self) -> Option<WeightsHash> {
        *self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn count(&self, proof: &GroupProof) {
        self.groups.fetch_add(1, Ordering::Relaxed);
        self.rollouts.fetch_add(u64::try_from(proof.members.len()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn set_weights(&self, weights: WeightsHash) {
        *self.weights.lock().unwrap_or_else(PoisonError::into_inner) = Some(weights);
    }
}

pub(crate) enum Work {
    Prove(Request),
    Verify { id: RequestId, job: VerifyJob, outcomes: Outcomes },
    TakeOver { prepared: Box<dyn Prepared>, done: mpsc::Sender<TakenOver> },
}

/// What became of weights that were to take over, and how long nothing could be proved for it.
pub(crate) type TakenOver = (Result<Retired, ComputeError>, Duration);

/// The handle of the computing thread; dropping it ends the thread after its current batch.
pub struct Compute {
    work: mpsc::Sender<Work>,
    orders: mpsc::Sender<Order>,
    known: Arc<Known>,
    thread: JoinHandle<()>,
    device: String,
}

impl std::fmt::Debug for Compute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compute").field("known", &self.known).field("device", &self.device).finish_non_exhaustive()
    }
}

impl Compute {
    /// Starts the thread, which loads `folder` first, and waits for that.
    ///
    /// # Errors
    /// What loading says; [`WorkerError::Start`] if there can be no thread.
    pub async fn start(loader: Arc<dyn Loader>, folder: PathBuf, faults: Arc<Armed>) -> Result<Self, WorkerError> {
        let (work, inbox) = mpsc::channel();
        let (report, loaded) = oneshot::channel();
        let known = Arc::new(Known::default());
        let (of_thread, goes_wrong) = (Arc::clone(&known), Arc::clone(&faults));
        let life = move || {
            goes_wrong.pass(Point::Starting);
            match loader.load(&folder) {
                Ok(prover) => {
                    goes_wrong.pass(Point::Loaded);
                    of_thread.set_weights(prover.weights());
                    if report.send(Ok((prover.device(), prover.reloader()))).is_ok() {
                        compute(prover, &inbox, &of_thread, &goes_wrong);
                    }
                }
                Err(error) => drop(report.send(Err(error))),
            }
        };
        let thread = std::thread::Builder::new()
            .name("grail-compute".into())
            .spawn(life)
            .map_err(|source| WorkerError::Start { what: "start the computing thread", source })?;
        let gone = || WorkerError::Bug { detail: "the computing thread panicked while it loaded the model".to_owned() };
        let (device, reloader) = loaded.await.map_err(|_| gone())??;
        let orders = Preparer::new(reloader, Arc::clone(&known), faults, work.clone()).start()?;
        Ok(Self { work, orders, known, thread, device })
    }

    /// Where the model lies.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Hash of the weights that prove now.
    #[must_use]
    pub fn weights(&self) -> Option<WeightsHash> {
        self.known.weights()
    }

    /// Groups and rollouts proved since the start.
    #[must_use]
    pub fn proved(&self) -> (u64, u64) {
        (self.known.groups.load(Ordering::Relaxed), self.known.rollouts.load(Ordering::Relaxed))
    }

    /// Queues a group.
    ///
    /// # Errors
    /// [`WorkerError::Bug`] if the thread is gone.
    pub fn prove(&self, id: RequestId, job: ProveJob, outcomes: Outcomes) -> Result<(), WorkerError> {
        self.queue(Work::Prove(Request { id, job, outcomes }))
    }

    /// Queues rows.
    ///
    /// # Errors
    /// [`WorkerError::Bug`] if the thread is gone.
    pub fn verify(&self, id: RequestId, job: VerifyJob, outcomes: Outcomes) -> Result<(), WorkerError> {
        self.queue(Work::Verify { id, job, outcomes })
    }

    /// Makes other weights ready while the present ones prove.
    ///
    /// # Errors
    /// [`WorkerError::Bug`] if the thread for it is gone; a failure to load goes to `outcomes`.
    pub fn stage(&self, id: RequestId, order: ReloadOrder, outcomes: Outcomes) -> Result<(), WorkerError> {
        self.order(Order { id, order, then: Then::Wait, began: Instant::now(), outcomes })
    }

    /// Makes other weights ready, unless they are, and has them take over between two batches.
    ///
    /// # Errors
    /// [`WorkerError::Bug`] if the thread for it is gone; a failure to load goes to `outcomes`.
    pub fn reload(&self, id: RequestId, order: ReloadOrder, outcomes: Outcomes) -> Result<(), WorkerError> {
        self.order(Order { id, order, then: Then::TakeOver, began: Instant::now(), outcomes })
    }

    fn order(&self, order: Order) -> Result<(), WorkerError> {
        self.orders.send(order).map_err(|_| WorkerError::Bug { detail: "the loading thread is gone".to_owned() })
    }

    fn queue(&self, work: Work) -> Result<(), WorkerError> {
        self.work.send(work).map_err(|_| WorkerError::Bug { detail: "the computing thread is gone".to_owned() })
    }

    /// Ends the thread after its current batch; `false` if that takes longer than `limit`.
    pub async fn end(self, limit: Duration) -> bool {
        // The loading thread has a sender of its own, and ends when it has no more orders.
        drop((self.work, self.orders));
        let thread = self.thread;
        // A blocking task would keep the runtime alive for as long as the batch takes.
        let ended = async {
            while !thread.is_finished() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(limit, ended).await.is_ok()
    }
}

fn compute(prover: Box<dyn Prover>, inbox: &mpsc::Receiver<Work>, known: &Known, faults: &Armed) {
    // Why there are no weights any more.
    let mut lost: Option<ComputeError> = None;
    let mut batches = Batches::new(inbox, known, faults);
    while let Some(work) = batches.next() {
        let (outcome, outcomes) = match work {
            Work::Prove(Request { outcomes, .. }) | Work::Verify { outcomes, .. } if outcomes.is_closed() => {
                debug!("Skipped a request whose sender has gone.");
                continue;
            }
            Work::Prove(Request { id, outcomes, .. }) | Work::Verify { id, outcomes, .. }
                if let Some(error) = &lost =>
            {
                (failed(id, error.clone()), outcomes)
            }
            Work::Prove(request) => {
                batches.prove(&*prover, request);
                continue;
            }
            Work::Verify { id, job, outcomes } => {
                batches.finish();
                let verified = guarded(&*prover, job.weights, || prover.verify(&job));
                let verified = verified.map(|rows| Outcome::Verified { id, weights: job.weights, rows });
                (verified.unwrap_or_else(|error| failed(id, error)), outcomes)
            }
            Work::TakeOver { prepared, done } => {
                // What was begun is of the old weights.
                batches.finish();
                let (taken_over, stall) = take_over(prepared);
                match &taken_over {
                    Ok(_) => known.set_weights(prover.weights()),
                    Err(error) if error.severity() == Severity::FatalForWorker => lost = Some(error.clone()),
                    Err(_) => {}
                }
                // The loading thread waits for it.
                drop(done.send((taken_over, stall)));
                continue;
            }
        };
        // Whoever asked may have gone meanwhile.
        drop(outcomes.send(outcome));
    }
}

fn take_over(prepared: Box<dyn Prepared>) -> TakenOver {
    let started = Instant::now();
    let taken_over = catch_unwind(AssertUnwindSafe(|| prepared.take_over()));
    // In the middle of it there is no telling what the weights are.
    let lost = |panic: Box<dyn Any + Send>| Err(ComputeError::WeightsLost { detail: panic_text(&*panic) });
    (taken_over.unwrap_or_else(lost), started.elapsed())
}

/// Runs `work` if the weights are those asked for; a panic becomes an error.
fn guarded<T>(
    prover: &dyn Prover,
    asked: WeightsHash,
    work: impl FnOnce() -> Result<T, ComputeError>,
) -> Result<T, ComputeError> {
    let loaded = prover.weights();
    if asked != loaded {
        return Err(ComputeError::WrongWeights { asked, loaded });
    }
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(ComputeError::Panicked { detail: panic_text(&*panic) }))
}

/// What a fault on the computing thread makes of a proof.
pub(crate) fn injected(act: Option<Act>) -> Result<(), ComputeError> {
    let detail = "injected by GRAIL_FAULT".to_owned();
    match act {
        None => Ok(()),
        Some(Act::Oom) => Err(ComputeError::OutOfMemory { detail }),
        Some(Act::Poison) => Err(ComputeError::Poisoned { detail }),
        Some(Act::Nan) => Err(ComputeError::NonFinite { detail }),
        Some(act) => {
            act.befall_process();
            Ok(())
        }
    }
}

pub(crate) fn failed(id: RequestId, error: ComputeError) -> Outcome {
    error!(request = %id, code = error.code(), %error, "Request failed.");
    Outcome::Failed { id, error }
}

pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no text").to_owned()
}

#[cfg(test)]
mod tests {
    use grail_protocol::ids::{GroupIndex, TokenId};

    use super::*;
    use crate::prover::Reloader;

    const WEIGHTS: WeightsHash = WeightsHash(1);

    /// Proves everything, and has no say in its weights.
    struct Willing;

    impl Prover for Willing {
        fn weights(&self) -> WeightsHash {
            WEIGHTS
        }

        fn device(&self) -> String {
            String::new()
        }

        fn prove(&self, job: &ProveJob) -> Result<GroupProof, ComputeError> {
            let (group, weights) = (job.group, WEIGHTS);
            Ok(GroupProof { group, weights, prompt_sketches: vec![], members: vec![], compute: Duration::ZERO })
        }

        fn verify(&self, _: &VerifyJob) -> Result<Vec<RowFacts>, ComputeError> {
            Ok(vec![])
        }

        fn reloader(&self) -> Box<dyn Reloader> {
            panic!("nobody asks for it here")
        }
    }

    struct Failing(fn() -> ComputeError);

    impl Prepared for Failing {
        fn weights(&self) -> WeightsHash {
            WeightsHash(2)
        }

        fn way(&self) -> Way {
            Way { from_changes: false, in_shadow: false }
        }

        fn is_ready(&self) -> bool {
            true
        }

        fn take_over(self: Box<Self>) -> Result<Retired, ComputeError> {
            Err(self.0())
        }
    }

    /// What becomes of a proof and of rows that are queued behind a reload that fails.
    fn behind(reload: fn() -> ComputeError) -> (TakenOver, Vec<Outcome>) {
        let (work, inbox) = mpsc::channel();
        let (outcomes, mut answers) = async_mpsc::unbounded_channel();
        let (done, taken_over) = mpsc::channel();
        let group = GroupIndex(1);
        let job = ProveJob {
            group,
            weights: WEIGHTS,
            randomness: vec![],
            eos_token: TokenId(0),
            prompt: vec![],
            completions: vec![],
        };
        let rows = VerifyJob { weights: WEIGHTS, rows: vec![] };
        work.send(Work::TakeOver { prepared: Box::new(Failing(reload)), done }).unwrap();
        work.send(Work::Prove(Request { id: RequestId(1), job, outcomes: outcomes.clone() })).unwrap();
        work.send(Work::Verify { id: RequestId(2), job: rows, outcomes }).unwrap();
        drop(work);
        compute(Box::new(Willing), &inbox, &Known::default(), &Armed::default());
        let outcomes = std::iter::from_fn(|| answers.blocking_recv()).collect();
        (taken_over.recv().unwrap(), outcomes)
    }

    #[test]
    fn nothing_is_proved_once_the_weights_are_lost() {
        let detail = || "as told".to_owned();
        let lost = |error: &ComputeError| matches!(error, ComputeError::WeightsLost { .. });
        let panics = || panic!("as told");
        for reload in [(|| ComputeError::WeightsLost { detail: "as told".to_owned() }) as fn() -> _, panics] {
            let (taken_over, outcomes) = behind(reload);
            assert!(matches!(&taken_over.0, Err(error) if lost(error) && error.to_string().contains(&detail())));
            assert_eq!(outcomes.len(), 2);
            for outcome in outcomes {
                assert!(matches!(&outcome, Outcome::Failed { error, .. } if lost(error)), "{outcome:?}");
            }
        }
        let (taken_over, outcomes) = behind(|| ComputeError::Reload { detail: String::new() });
        assert!(matches!(taken_over.0, Err(ComputeError::Reload { .. })));
        assert!(matches!(outcomes[..], [Outcome::Proved { .. }, Outcome::Verified { .. }]), "the old ones prove on");
    }
}
