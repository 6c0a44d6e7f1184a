//! The prover that computes with libtorch.

use std::path::Path;
use std::sync::Arc;

use grail_ipc::jobs::{GroupProof, MemberProof, ProveJob, RowFacts, VerifyJob};
use grail_model::{Device, Dtype, LoadOptions, ProofModel, ProveError, ProveInput, VerifyInput, gpu, set_threads};
use grail_protocol::ids::WeightsHash;
use grail_protocol::sketch::SketchCoeffs;
use tokio::time::Instant;

use crate::cli::{DEFAULT_BATCH_TOKENS, ModelArguments};
use crate::error::WorkerError;
use crate::prover::{ComputeError, Loader, Prover, Reloader};
use crate::torch_reload::{Slot, TorchReloader};

/// Loads checkpoints to one device in one precision.
#[derive(Debug, Clone, Copy)]
pub struct TorchLoader {
    device: Device,
    dtype: Option<Dtype>,
    batch_tokens: u32,
    shadow: Shadow,
}

/// Whether a reload may have a second copy of the weights for its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Shadow {
    /// If the device has memory for it.
    #[default]
    Auto,
    /// In any case; without memory the reload fails.
    Always,
    /// In no case: weights are changed where they lie, and nothing is proved meanwhile.
    Never,
}

impl TorchLoader {
    /// Sets up libtorch: threads, and the CUDA library if a GPU is wanted.
    ///
    /// # Errors
    /// [`WorkerError::NoDevice`] if a GPU is wanted and cannot be had.
    pub fn new(arguments: &ModelArguments) -> Result<Self, WorkerError> {
        let loader = Self::on(arguments.device, arguments.dtype, arguments.threads)?;
        Ok(Self { batch_tokens: arguments.batch_tokens, ..loader })
    }

    /// As [`TorchLoader::new`].
    ///
    /// # Errors
    /// As [`TorchLoader::new`].
    pub fn on(device: Device, dtype: Option<Dtype>, threads: Option<u32>) -> Result<Self, WorkerError> {
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        set_threads(threads.map_or_else(available, |threads| usize::try_from(threads).unwrap_or(1)));
        if let Device::Cuda(index) = device {
            let support = gpu::enable();
            if index >= support.devices() {
                let (device, support) = (device.to_string(), support.to_string());
                return Err(WorkerError::NoDevice { device, support });
            }
        }
        Ok(Self { device, dtype, batch_tokens: DEFAULT_BATCH_TOKENS, shadow: Shadow::Auto })
    }

    /// The same with another choice for reloads.
    #[must_use]
    pub const fn with_shadow(self, shadow: Shadow) -> Self {
        Self { shadow, ..self }
    }

    /// The model itself.
    ///
    /// # Errors
    /// [`WorkerError::NoModel`] and [`WorkerError::Load`].
    pub fn load_model(&self, folder: &Path) -> Result<ProofModel, WorkerError> {
        if !folder.is_dir() {
            return Err(WorkerError::NoModel { folder: folder.to_owned() });
        }
        let batch_tokens = usize::try_from(self.batch_tokens).unwrap_or(usize::MAX);
        let options = LoadOptions { dtype: self.dtype, batch_tokens, ..LoadOptions::on(self.device) };
        ProofModel::load(folder, &options).map_err(|source| WorkerError::Load { folder: folder.to_owned(), source })
    }
}

impl Loader for TorchLoader {
    fn load(&self, folder: &Path) -> Result<Box<dyn Prover>, WorkerError> {
        Ok(Box::new(TorchProver::new(self.load_model(folder)?).with_shadow(self.shadow)))
    }
}

/// A model that proves what the protocol asks.
#[derive(Debug)]
pub struct TorchProver {
    slot: Arc<Slot>,
    shadow: Shadow,
}

impl TorchProver {
    /// Proves with `model`.
    #[must_use]
    pub fn new(model: ProofModel) -> Self {
        Self { slot: Arc::new(Slot::new(model)), shadow: Shadow::Auto }
    }

    /// The same with another choice for reloads.
    #[must_use]
    pub fn with_shadow(self, shadow: Shadow) -> Self {
        Self { shadow, ..self }
    }
}

impl Prover for TorchProver {
    fn weights(&self) -> WeightsHash {
        self.slot.model().weights_hash()
    }

    fn device(&self) -> String {
        self.slot.model().device().to_string()
    }

    fn prove(&self, job: &ProveJob) -> Result<GroupProof, ComputeError> {
        let started = Instant::now();
        let coefficients = SketchCoeffs::from_randomness(&job.randomness);
        let input = ProveInput {
            prompt: &job.prompt,
            completions: job.completions.iter().map(Vec::as_slice).collect(),
            coefficients: &coefficients,
            eos_token: job.eos_token,
        };
        let output = self.slot.model().prove(&input).map_err(refused)?;
        let members = output
            .completions
            .into_iter()
            .map(|proof| MemberProof {
                sketches: proof.sketches,
                logprobs: proof.logprobs,
                eos_probability: proof.eos_probability,
            })
            .collect();
        Ok(GroupProof {
            group: job.group,
            weights: self.weights(),
            prompt_sketches: output.prompt_sketches,
            members,
            compute: started.elapsed(),
        })
    }

    fn verify(&self, job: &VerifyJob) -> Result<Vec<RowFacts>, ComputeError> {
        let coefficients: Vec<SketchCoeffs> =
            job.rows.iter().map(|row| SketchCoeffs::from_randomness(&row.randomness)).collect();
        let inputs: Vec<VerifyInput<'_>> = job
            .rows
            .iter()
            .zip(&coefficients)
            .map(|(row, coefficients)| VerifyInput {
                tokens: &row.tokens,
                prompt_length: usize::try_from(row.prompt_length).unwrap_or(usize::MAX),
                coefficients,
                temperature: row.temperature,
                repetition_penalty: row.repetition_penalty,
                eos_token: row.eos_token,
            })
            .collect();
        let outputs = self.slot.model().verify(&inputs).map_err(refused)?;
        Ok(outputs
            .into_iter()
            .map(|output| RowFacts {
                sketches: output.sketches,
                logprobs: output.logprobs,
                eos_probability: output.eos_probability,
                chosen_probabilities: output.chosen_probabilities,
            })
            .collect())
    }

    fn reloader(&self) -> Box<dyn Reloader> {
        Box::new(TorchReloader::new(Arc::clone(&self.slot), self.shadow))
    }
}

fn refused(error: ProveError) -> ComputeError {
    let detail = error.to_string();
    match error {
        ProveError::OutOfMemory { .. } => ComputeError::OutOfMemory { detail },
        ProveError::Poisoned { .. } => ComputeError::Poisoned { detail },
        ProveError::NonFinite { .. } => ComputeError::NonFinite { detail },
        ProveError::BadRequest { .. } => ComputeError::BadRequest { detail },
        _ => ComputeError::Library { detail },
    }
}
