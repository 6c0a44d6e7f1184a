//! What the server needs of a model: the seam behind which libtorch stands.

use std::path::Path;

use grail_ipc::jobs::{GroupProof, ProveJob, ReloadOrder, RowFacts, VerifyJob};
use grail_ipc::messages::Severity;
use grail_protocol::ids::WeightsHash;

use crate::error::WorkerError;

/// A loaded model.
pub trait Prover: Send {
    /// Hash of the weights it holds.
    fn weights(&self) -> WeightsHash;

    /// Where they lie, for instance `cpu` or `cuda:0`.
    fn device(&self) -> String;

    /// Proves one group.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn prove(&self, job: &ProveJob) -> Result<GroupProof, ComputeError>;

    /// Most tokens of groups that are begun together; 0 where one group at a time is best.
    fn batch_tokens(&self) -> usize {
        0
    }

    /// Begins to prove groups together. What is begun later comes later.
    fn begin(&self, jobs: &[&ProveJob]) -> Box<dyn Proving> {
        Box::new(Proved(jobs.iter().map(|job| self.prove(job)).collect()))
    }

    /// Recomputes rows, in the order of the job.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn verify(&self, job: &VerifyJob) -> Result<Vec<RowFacts>, ComputeError>;

    /// What makes other weights ready for this prover, on a thread of its own.
    fn reloader(&self) -> Box<dyn Reloader>;
}

/// Groups that are being proved.
pub trait Proving {
    /// Whether [`Proving::finish`] will not wait.
    fn is_done(&self) -> bool;

    /// Waits for the proofs, one for each group in the order in which they were given.
    fn finish(self: Box<Self>) -> Vec<Result<GroupProof, ComputeError>>;
}

/// Groups that were proved when they were begun.
struct Proved(Vec<Result<GroupProof, ComputeError>>);

impl Proving for Proved {
    fn is_done(&self) -> bool {
        true
    }

    fn finish(self: Box<Self>) -> Vec<Result<GroupProof, ComputeError>> {
        self.0
    }
}

/// Makes other weights ready for a prover, which goes on proving meanwhile.
pub trait Reloader: Send {
    /// Makes the weights of `order` ready by the cheapest way that is open.
    ///
    /// # Errors
    /// [`ComputeError::Reload`]; nothing has changed then.
    fn prepare(&mut self, order: &ReloadOrder) -> Result<Box<dyn Prepared>, ComputeError>;
}

/// Weights that can take over from those of the prover that they were made ready for.
pub trait Prepared: Send {
    /// Their hash.
    fn weights(&self) -> WeightsHash;

    /// How they were made ready.
    fn way(&self) -> Way;

    /// Whether all that takes long is done, so that they are worth keeping until they are due.
    fn is_ready(&self) -> bool;

    /// Puts them in place; runs on the computing thread, between two batches.
    ///
    /// # Errors
    /// [`ComputeError::Reload`] if the old weights prove on, [`ComputeError::WeightsLost`] if there are none any more.
    fn take_over(self: Box<Self>) -> Result<Retired, ComputeError>;
}

/// What is not needed any more after a reload, to be freed on a thread that nobody waits for.
pub type Retired = Box<dyn std::any::Any + Send>;

/// The way to other weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// Changes are applied to the weights that are there, instead of reading the folder.
    pub from_changes: bool,
    /// There is a second copy meanwhile; without one the weights are changed where they lie.
    pub in_shadow: bool,
}

/// Makes provers.
pub trait Loader: Send + Sync + 'static {
    /// Loads the checkpoint in `folder`.
    ///
    /// # Errors
    /// [`WorkerError::Load`] and its like.
    fn load(&self, folder: &Path) -> Result<Box<dyn Prover>, WorkerError>;
}

/// A request that was not computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ComputeError {
    #[error("worker has weights {loaded}, the request asks for {asked}: reload the worker or send it elsewhere")]
    WrongWeights { asked: WeightsHash, loaded: WeightsHash },
    #[error("{detail}")]
    BadRequest { detail: String },
    #[error("{detail}")]
    NonFinite { detail: String },
    #[error("{detail}")]
    OutOfMemory { detail: String },
    #[error("{detail}")]
    Poisoned { detail: String },
    #[error("{detail}")]
    Library { detail: String },
    #[error("worker panicked: {detail}")]
    Panicked { detail: String },
    #[error("{detail}; the old weights stay")]
    Reload { detail: String },
    #[error("reload failed and the old weights are lost: {detail}")]
    WeightsLost { detail: String },
    #[error("worker is draining and accepts nothing more")]
    Draining,
    #[error("worker has {open} open requests and accepts no more than {most}")]
    QueueFull { open: usize, most: usize },
    #[error("request is of incarnation {asked}, this is {ours}")]
    WrongEpoch { asked: u64, ours: u64 },
}

impl ComputeError {
    /// What it means for the request and the worker.
    #[must_use]
    pub fn severity(&self) -> Severity {
        match self {
            Self::BadRequest { .. } | Self::NonFinite { .. } => Severity::FatalForGroup,
            Self::Poisoned { .. } | Self::Panicked { .. } | Self::WeightsLost { .. } => Severity::FatalForWorker,
            Self::WrongWeights { .. }
            | Self::OutOfMemory { .. }
            | Self::Library { .. }
            | Self::Reload { .. }
            | Self::Draining
            | Self::QueueFull { .. }
            | Self::WrongEpoch { .. } => Severity::Retryable,
        }
    }

    /// Short fixed name.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::WrongWeights { .. } => "wrong_weights",
            Self::BadRequest { .. } => "bad_request",
            Self::NonFinite { .. } => "non_finite",
            Self::OutOfMemory { .. } => "out_of_memory",
            Self::Poisoned { .. } => "device_poisoned",
            Self::Library { .. } => "library",
            Self::Panicked { .. } => "panicked",
            Self::Reload { .. } => "reload_failed",
            Self::WeightsLost { .. } => "weights_lost",
            Self::Draining => "draining",
            Self::QueueFull { .. } => "queue_full",
            Self::WrongEpoch { .. } => "wrong_epoch",
        }
    }
}
