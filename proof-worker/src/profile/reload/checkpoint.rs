//! Checkpoints to reload: a base, and targets that differ from it in a share of their elements.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use grail_ipc::jobs::ReloadOrder;
use grail_ipc::messages::{ChangeSet, TensorChecksum};
use grail_model::config::Architecture;
use grail_model::safetensors::{FileDtype, OwnedTensor, write};
use grail_model::weights::{WeightFiles, expected_tensors};
use grail_model::{Dtype, LoadError, ModelConfig, write_difference};
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use serde_json::json;

use super::super::lengths::Random;
use crate::error::WorkerError;

/// One checkpoint of the scratch folder.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub folder: PathBuf,
    pub weights: WeightsHash,
    pub checksums: Vec<TensorChecksum>,
    pub bytes: u64,
}

/// A checkpoint with the changes that lead to it from the base.
#[derive(Debug)]
pub(crate) struct Target {
    pub checkpoint: Checkpoint,
    /// Share of the elements that differ.
    pub changed: f64,
    pub changes: ChangeSet,
    /// From this checkpoint to the base again.
    pub changes_back: ChangeSet,
}

/// A folder that is removed when it is dropped.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// A folder of this process in `parent`.
    ///
    /// # Errors
    /// [`WorkerError::Scratch`].
    pub(crate) fn create(parent: &Path) -> Result<Self, WorkerError> {
        let folder = parent.join(format!("grail-reload-{}", std::process::id()));
        std::fs::create_dir_all(&folder).map_err(|source| scratch(&folder, source))?;
        Ok(Self(folder))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "The scratch folder cannot be removed.");
        }
    }
}

fn scratch(path: &Path, source: std::io::Error) -> WorkerError {
    WorkerError::Scratch { path: path.to_owned(), source }
}

fn unusable(folder: &Path) -> impl Fn(LoadError) -> WorkerError {
    let folder = folder.to_owned();
    move |source| WorkerError::Load { folder: folder.clone(), source }
}

impl Checkpoint {
    /// Reads what an installed checkpoint knows of itself.
    ///
    /// # Errors
    /// [`WorkerError::Load`].
    pub(crate) fn open(folder: &Path) -> Result<Self, WorkerError> {
        let files = WeightFiles::open(folder).map_err(unusable(folder))?;
        let checksums = files.checksums().into_iter();
        Ok(Self {
            folder: folder.to_owned(),
            weights: files.hash(),
            checksums: checksums.map(|(name, checksum)| TensorChecksum { name, checksum }).collect(),
            bytes: files.total_bytes() as u64,
        })
    }

    /// Fills `folder` with random weights of a shape.
    ///
    /// # Errors
    /// [`WorkerError::Scratch`] and [`WorkerError::Load`].
    pub(crate) fn random(folder: &Path, config: &ModelConfig, dtype: Dtype) -> Result<Self, WorkerError> {
        std::fs::create_dir_all(folder).map_err(|source| scratch(folder, source))?;
        let path = folder.join("config.json");
        std::fs::write(&path, hf_config(config).to_string()).map_err(|source| scratch(&path, source))?;
        let tensors = by_several_threads(&expected_tensors(config), |place, (name, shape)| {
            let count: usize = shape.iter().product();
            let (dtype, bytes) = random_elements(&mut Random::new(place), count, dtype);
            OwnedTensor { name: name.clone(), dtype, shape: shape.clone(), bytes }
        });
        write(&folder.join("model.safetensors"), &tensors).map_err(|error| unusable(folder)(error.into()))?;
        Self::open(folder)
    }

    /// A copy in `folder` in which about `share` of the elements differ, and the changes that lead there.
    ///
    /// # Errors
    /// [`WorkerError::Scratch`] and [`WorkerError::Load`].
    pub(crate) fn target(&self, folder: &Path, share: f64) -> Result<Target, WorkerError> {
        std::fs::create_dir_all(folder).map_err(|source| scratch(folder, source))?;
        let path = folder.join("config.json");
        std::fs::copy(self.folder.join("config.json"), &path).map_err(|source| scratch(&path, source))?;
        let files = WeightFiles::open(&self.folder).map_err(unusable(&self.folder))?;
        let views: Vec<_> = files.iter().collect();
        let tensors = by_several_threads(&views, |place, (name, view)| {
            let mut bytes = view.bytes.to_vec();
            // Other seeds than those of the elements.
            change(&mut Random::new(!place), &mut bytes, view.dtype, share);
            OwnedTensor { name: (*name).to_owned(), dtype: view.dtype, shape: view.shape.to_vec(), bytes }
        });
        let failed = unusable(folder);
        write(&folder.join("model.safetensors"), &tensors).map_err(|error| failed(error.into()))?;
        drop(tensors);
        let target = WeightFiles::open(folder).map_err(&failed)?;
        let [there, back] = ["changes.bin", "changes-back.bin"].map(|name| folder.join(name));
        let changed = write_difference(&files, &target, &there).map_err(&failed)?;
        write_difference(&target, &files, &back).map_err(&failed)?;
        let elements: usize = files.iter().map(|(_, view)| view.shape.iter().product::<usize>()).sum();
        let checkpoint = Self::open(folder)?;
        let set = |base, weights, file: &Path| ChangeSet { base, weights, file: file.to_string_lossy().into_owned() };
        let changes = set(self.weights, checkpoint.weights, &there);
        let changes_back = set(checkpoint.weights, self.weights, &back);
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^53")]
        let changed = changed as f64 / elements.max(1) as f64;
        Ok(Target { checkpoint, changed, changes, changes_back })
    }

    /// The order to take these weights, from the folder unless `changes` lead there.
    pub(crate) fn order(&self, changes: &[ChangeSet]) -> ReloadOrder {
        ReloadOrder {
            checksums: self.checksums.clone(),
            changes: changes.to_vec(),
            ..ReloadOrder::from_folder(CheckpointWindow(0), &self.folder, self.weights)
        }
    }
}

/// What `work` makes of each item and its place, in their order; a large shape takes one thread minutes.
fn by_several_threads<Item: Sync, Made: Send>(items: &[Item], work: impl Fn(u64, &Item) -> Made + Sync) -> Vec<Made> {
    let next = AtomicUsize::new(0);
    let take = || {
        let mut made = Vec::new();
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(place) else { return made };
            made.push((place, work(place as u64, item)));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut made: Vec<(usize, Made)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(take)).collect();
        let join = |worker: std::thread::ScopedJoinHandle<'_, _>| {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        workers.into_iter().flat_map(join).collect()
    });
    made.sort_unstable_by_key(|(place, _)| *place);
    made.into_iter().map(|(_, made)| made).collect()
}

/// Small numbers of both signs.
fn random_elements(random: &mut Random, count: usize, dtype: Dtype) -> (FileDtype, Vec<u8>) {
    // Two elements of 32 bits from each draw; what they are does not change the work.
    let draws = std::iter::repeat_with(|| random.next()).flat_map(|draw| [draw >> 32, draw & 0xffff_ffff]);
    // A sign, an exponent of 2^-6, and a random mantissa.
    let bits = draws.take(count).map(|draw| u32::try_from(draw).unwrap_or_default() & 0x807f_ffff | 0x3c80_0000);
    match dtype {
        Dtype::F32 => (FileDtype::F32, bits.flat_map(u32::to_le_bytes).collect()),
        // The upper half of an f32 is a bf16.
        Dtype::Bf16 => (FileDtype::Bf16, bits.flat_map(|bits| bits.to_le_bytes().into_iter().skip(2)).collect()),
    }
}

/// Changes the lowest bit of elements at random distances, on average one in `1 / share`.
fn change(random: &mut Random, bytes: &mut [u8], dtype: FileDtype, share: f64) {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share is in 0..=1 and no less than 1e-6"
    )]
    let widest = (2.0 / share).round().max(2.0) as u64 - 1;
    let mut gap = random.below(widest);
    for element in bytes.chunks_exact_mut(dtype.element_bytes()) {
        if gap > 0 {
            gap -= 1;
            continue;
        }
        gap = random.below(widest);
        if let Some(lowest) = element.first_mut() {
            *lowest ^= 1;
        }
    }
}

/// `config.json` of a shape.
fn hf_config(config: &ModelConfig) -> serde_json::Value {
    let architecture = match config.architecture {
        Architecture::Qwen2 => "Qwen2ForCausalLM",
        Architecture::Qwen3 => "Qwen3ForCausalLM",
        Architecture::Llama => "LlamaForCausalLM",
    };
    json!({
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope.theta,
        "hidden_act": "silu",
    })
}
