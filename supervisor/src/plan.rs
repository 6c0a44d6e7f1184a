//! The facts of one window, settled before its first group and never changed in it.

use std::path::PathBuf;
use std::time::SystemTime;

use grail_checkpoint::GenerationParams;
use grail_environments::{EnvironmentId, Split, ThinkingMode};
use grail_protocol::ids::{BlockHash, CheckpointWindow, Hotkey, WeightsHash, WindowStart};
use grail_protocol::randomness::MinerRandomness;

/// Plan of one window: which checkpoint, environment, sampling policy and randomness.
#[derive(Debug, Clone)]
pub struct WindowPlan {
    pub window: WindowStart,
    pub window_hash: BlockHash,
    pub hotkey: Hotkey,
    /// `R_m`.
    pub randomness: MinerRandomness,
    pub use_drand: bool,
    pub checkpoint: CheckpointWindow,
    /// Installed folder of the checkpoint.
    pub model_dir: PathBuf,
    pub weights: WeightsHash,
    pub model_name: String,
    pub environment: EnvironmentId,
    pub split: Split,
    pub thinking: ThinkingMode,
    pub sampling: GenerationParams,
    /// Dtype of the proofs: `float32` on CPU, `bfloat16` on CUDA.
    pub dtype: &'static str,
    /// File or folder with the rows of the environment's data set; `None` if they are found where the host keeps such files.
    pub dataset_rows: Option<PathBuf>,
    /// Latest time at which the object may be stored: four seconds before block `W + 30`.
    pub deadline: SystemTime,
}

impl WindowPlan {
    /// What the checkpoint's metadata want, in one line: groups that were mined otherwise must not be in one file with these.
    #[must_use]
    pub fn policy(&self) -> String {
        let GenerationParams { max_tokens, temperature, top_p, top_k, repetition_penalty } = self.sampling;
        format!(
            "{} {} {}, max_tokens {max_tokens}, temperature {temperature}, top_p {top_p}, top_k {top_k}, repetition_penalty \
             {repetition_penalty}",
            self.environment.as_str(),
            self.split.as_str(),
            self.thinking.as_str()
        )
    }
}
