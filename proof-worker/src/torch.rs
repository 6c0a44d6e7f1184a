//! The prover that computes with libtorch.

use std::path::Path;
use std::sync::Arc;

use grail_ipc::jobs::{GroupProof, MemberProof, ProveJob, RowFacts, VerifyJob};
use grail_model::{
    CompletionProof, Device, Dtype, LoadOptions, ProofModel, ProveError, ProveInput, ProveOutput, RunningProof,
    VerifyInput, gpu, set_threads,
};
use grail_protocol::ids::{GroupIndex, WeightsHash};
use grail_protocol::sketch::SketchCoeffs;
use tokio::time::Instant;

use crate::cli::ModelArguments;
use crate::error::WorkerError;
use crate::prover::{ComputeError, Loader, Prover, Proving, Reloader};
use crate::torch_reload::{Slot, TorchReloader};

/// Loads checkpoints to one device in one precision.
#[derive(Debug, Clone, Copy)]
pub struct TorchLoader {
    device: Device,
    dtype: Option<Dtype>,
    batch_tokens: usize,
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
        Ok(loader.with_batch_tokens(arguments.batch_tokens))
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
                return Err(WorkerError::NoDevice { device: device.to_string(), support: support.clone() });
            }
        }
        Ok(Self { device, dtype, batch_tokens: device.default_batch_tokens(), shadow: Shadow::Auto })
    }

    /// The same with another most of tokens in one packed batch, if one is given.
    #[must_use]
    pub fn with_batch_tokens(self, batch_tokens: Option<u32>) -> Self {
        let given = batch_tokens.map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX));
        Self { batch_tokens: given.unwrap_or(self.batch_tokens), ..self }
    }

    /// How models are loaded.
    #[must_use]
    pub fn options(&self) -> LoadOptions {
        LoadOptions { dtype: self.dtype, batch_tokens: self.batch_tokens, ..LoadOptions::on(self.device) }
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
        ProofModel::load(folder, &self.options())
            .map_err(|source| WorkerError::Load { folder: folder.to_owned(), source })
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
        let nothing = || ComputeError::Library { detail: "no proof came of the group".to_owned() };
        self.begin(&[job]).finish().pop().unwrap_or_else(|| Err(nothing()))
    }

    fn batch_tokens(&self) -> usize {
        let model = self.slot.model();
        // On a CPU larger batches only make the first answer wait for the last.
        if model.device() == Device::Cpu { 0 } else { model.batch_tokens() }
    }

    fn begin(&self, jobs: &[&ProveJob]) -> Box<dyn Proving> {
        let began = Instant::now();
        let coefficients: Vec<SketchCoeffs> =
            jobs.iter().map(|job| SketchCoeffs::from_randomness(&job.randomness)).collect();
        let inputs: Vec<ProveInput<'_>> = jobs
            .iter()
            .zip(&coefficients)
            .map(|(job, coefficients)| ProveInput {
                prompt: &job.prompt,
                completions: job.completions.iter().map(Vec::as_slice).collect(),
                coefficients,
                eos_token: job.eos_token,
            })
            .collect();
        let model = self.slot.model();
        Box::new(TorchProving {
            began,
            groups: jobs.iter().map(|job| job.group).collect(),
            weights: model.weights_hash(),
            running: model.begin(&inputs),
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

/// Groups that a model proves.
struct TorchProving {
    began: Instant,
    groups: Vec<GroupIndex>,
    weights: WeightsHash,
    running: RunningProof,
}

impl Proving for TorchProving {
    fn is_done(&self) -> bool {
        self.running.is_done()
    }

    fn finish(self: Box<Self>) -> Vec<Result<GroupProof, ComputeError>> {
        let Self { began, groups, weights, running } = *self;
        let outputs = running.finish();
        let compute = began.elapsed();
        let proof = |(output, group): (Result<ProveOutput, ProveError>, GroupIndex)| {
            let ProveOutput { prompt_sketches, completions } = output.map_err(refused)?;
            let members = completions.into_iter().map(member).collect();
            Ok(GroupProof { group, weights, prompt_sketches, members, compute })
        };
        outputs.into_iter().zip(groups).map(proof).collect()
    }
}

fn member(proof: CompletionProof) -> MemberProof {
    let CompletionProof { sketches, logprobs, eos_probability } = proof;
    MemberProof { sketches, logprobs, eos_probability }
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
