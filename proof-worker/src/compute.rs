//! The one thread that owns the model.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use grail_ipc::jobs::{GroupProof, ProveJob, RowFacts, VerifyJob};
use grail_ipc::messages::RequestId;
use grail_process::fault::{Act, Armed, Point};
use grail_protocol::ids::WeightsHash;
use tokio::sync::{mpsc as async_mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, error, info};

use crate::error::WorkerError;
use crate::prover::{ComputeError, Loader, Prover};

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
    /// `stall` is the time in which nothing could be proved, `total` that since the command.
    Reloaded {
        id: RequestId,
        weights: WeightsHash,
        stall: Duration,
        total: Duration,
    },
    Failed {
        id: RequestId,
        error: ComputeError,
    },
}

/// Where outcomes of one session go; when it is closed nobody wants them any more.
pub type Outcomes = async_mpsc::UnboundedSender<Outcome>;

/// What is known of the model without asking its thread.
#[derive(Debug, Default)]
struct Known {
    weights: Mutex<Option<WeightsHash>>,
    groups: AtomicU64,
    rollouts: AtomicU64,
}

impl Known {
    fn set_weights(&self, weights: WeightsHash) {
        *self.weights.lock().unwrap_or_else(PoisonError::into_inner) = Some(weights);
    }
}

enum Work {
    Prove { id: RequestId, job: ProveJob, outcomes: Outcomes },
    Verify { id: RequestId, job: VerifyJob, outcomes: Outcomes },
    Install { id: RequestId, prover: Box<dyn Prover>, began: Instant, outcomes: Outcomes },
}

/// The handle of the computing thread; dropping it ends the thread after its current batch.
pub struct Compute {
    work: mpsc::Sender<Work>,
    known: Arc<Known>,
    loader: Arc<dyn Loader>,
    faults: Arc<Armed>,
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
        let (of_thread, loads, goes_wrong) = (Arc::clone(&known), Arc::clone(&loader), Arc::clone(&faults));
        let life = move || {
            goes_wrong.pass(Point::Starting);
            match loads.load(&folder) {
                Ok(prover) => {
                    goes_wrong.pass(Point::Loaded);
                    of_thread.set_weights(prover.weights());
                    if report.send(Ok(prover.device())).is_ok() {
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
        let device = loaded.await.map_err(|_| gone())??;
        Ok(Self { work, known, loader, faults, thread, device })
    }

    /// Where the model lies.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.device
    }

    /// Hash of the weights that prove now.
    #[must_use]
    pub fn weights(&self) -> Option<WeightsHash> {
        *self.known.weights.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.queue(Work::Prove { id, job, outcomes })
    }

    /// Queues rows.
    ///
    /// # Errors
    /// [`WorkerError::Bug`] if the thread is gone.
    pub fn verify(&self, id: RequestId, job: VerifyJob, outcomes: Outcomes) -> Result<(), WorkerError> {
        self.queue(Work::Verify { id, job, outcomes })
    }

    /// Loads other weights beside the present ones, which prove meanwhile, and has them take over between two batches.
    ///
    /// # Errors
    /// [`WorkerError::Start`] if there can be no thread; a failure to load goes to `outcomes`.
    pub fn reload(
        &self,
        id: RequestId,
        folder: PathBuf,
        expected: WeightsHash,
        outcomes: Outcomes,
    ) -> Result<(), WorkerError> {
        let (loader, faults, work) = (Arc::clone(&self.loader), Arc::clone(&self.faults), self.work.clone());
        let began = Instant::now();
        let load = move || {
            faults.pass(Point::Reload);
            match load_expected(&*loader, &folder, expected) {
                Ok(prover) => drop(work.send(Work::Install { id, prover, began, outcomes })),
                Err(error) => drop(outcomes.send(Outcome::Failed { id, error })),
            }
        };
        std::thread::Builder::new()
            .name("grail-reload".into())
            .spawn(load)
            .map(drop)
            .map_err(|source| WorkerError::Start { what: "start the loading thread", source })
    }

    fn queue(&self, work: Work) -> Result<(), WorkerError> {
        self.work.send(work).map_err(|_| WorkerError::Bug { detail: "the computing thread is gone".to_owned() })
    }

    /// Ends the thread after its current batch; `false` if that takes longer than `limit`.
    pub async fn end(self, limit: Duration) -> bool {
        drop(self.work);
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

fn load_expected(loader: &dyn Loader, folder: &Path, expected: WeightsHash) -> Result<Box<dyn Prover>, ComputeError> {
    let failed = |detail: String| ComputeError::Reload { detail };
    let loaded = catch_unwind(AssertUnwindSafe(|| loader.load(folder)));
    let prover = match loaded {
        Ok(Ok(prover)) => prover,
        Ok(Err(error)) => return Err(failed(format!("{:#}", anyhow::Error::from(error)))),
        Err(panic) => return Err(failed(format!("loading {} panicked: {}", folder.display(), panic_text(&*panic)))),
    };
    if prover.weights() != expected {
        let detail =
            format!("folder {} holds weights {}, the command names {expected}", folder.display(), prover.weights());
        return Err(failed(detail));
    }
    Ok(prover)
}

fn compute(mut prover: Box<dyn Prover>, inbox: &mpsc::Receiver<Work>, known: &Known, faults: &Armed) {
    while let Ok(work) = inbox.recv() {
        let (outcome, outcomes) = match work {
            Work::Prove { outcomes, .. } | Work::Verify { outcomes, .. } if outcomes.is_closed() => {
                debug!("Skipped a request whose sender has gone.");
                continue;
            }
            Work::Prove { id, job, outcomes } => {
                let proved = guarded(&*prover, job.weights, || {
                    injected(faults.reach(Point::MidProof))?;
                    prover.prove(&job)
                });
                if let Ok(proof) = &proved {
                    known.groups.fetch_add(1, Ordering::Relaxed);
                    let members = u64::try_from(proof.members.len()).unwrap_or(u64::MAX);
                    known.rollouts.fetch_add(members, Ordering::Relaxed);
                    debug!(group = %proof.group, tokens = job.tokens(), compute = ?proof.compute, "Group proved.");
                }
                (proved.map(|proof| Outcome::Proved { id, proof }).unwrap_or_else(|error| failed(id, error)), outcomes)
            }
            Work::Verify { id, job, outcomes } => {
                let verified = guarded(&*prover, job.weights, || prover.verify(&job));
                let verified = verified.map(|rows| Outcome::Verified { id, weights: job.weights, rows });
                (verified.unwrap_or_else(|error| failed(id, error)), outcomes)
            }
            Work::Install { id, prover: other, began, outcomes } => {
                let started = Instant::now();
                let weights = other.weights();
                known.set_weights(weights);
                // The old weights are freed here, between two batches.
                prover = other;
                let stall = started.elapsed();
                info!(%weights, ?stall, "Other weights are in place.");
                (Outcome::Reloaded { id, weights, stall, total: began.elapsed() }, outcomes)
            }
        };
        // Whoever asked may have gone meanwhile.
        drop(outcomes.send(outcome));
    }
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
fn injected(act: Option<Act>) -> Result<(), ComputeError> {
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

fn failed(id: RequestId, error: ComputeError) -> Outcome {
    error!(request = %id, code = error.code(), %error, "Request failed.");
    Outcome::Failed { id, error }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no text").to_owned()
}
