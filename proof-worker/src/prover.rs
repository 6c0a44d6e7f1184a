//! What the server needs of a model: the seam behind which libtorch stands.

use std::path::Path;

use grail_ipc::jobs::{GroupProof, ProveJob, RowFacts, VerifyJob};
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

    /// Recomputes rows, in the order of the job.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn verify(&self, job: &VerifyJob) -> Result<Vec<RowFacts>, ComputeError>;
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
            Self::Poisoned { .. } | Self::Panicked { .. } => Severity::FatalForWorker,
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
            Self::Draining => "draining",
            Self::QueueFull { .. } => "queue_full",
            Self::WrongEpoch { .. } => "wrong_epoch",
        }
    }
}
