//! A decoder whose weights have gradients: the same packed forward pass, for programs that train small models.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use grail_protocol::ids::TokenId;
use tch::{Kind, TchError, Tensor, nn};

use crate::config::ModelConfig;
use crate::device::{Device, Dtype};
use crate::error::{LoadError, TorchError};
use crate::layers::{Layer, Linear, Network, RmsNorm};
use crate::model::read_network;
use crate::packed::PackedBatch;
use crate::resident::Part;
use crate::safetensors::{OwnedTensor, SafetensorsError};
use crate::weights::WeightFiles;

/// Standard deviation of fresh matrices, as `initializer_range` of the configurations has it.
const INITIAL_DEVIATION: f64 = 0.02;
/// Group of the variable store for matrices and embeddings, which weight decay suits.
pub const DECAY_GROUP: usize = 0;
/// Group of the variable store for norms and biases, which it does not.
pub const NO_DECAY_GROUP: usize = 1;

/// A decoder in f32 with trainable weights.
#[derive(Debug)]
pub struct TrainableModel {
    network: Network,
    store: nn::VarStore,
}

/// A prompt and its completions, which share its rows.
#[derive(Debug, Clone)]
pub struct TrainingGroup<'a> {
    /// Not empty: its last row predicts the first token of every completion.
    pub prompt: &'a [TokenId],
    /// None of them empty.
    pub completions: Vec<&'a [TokenId]>,
}

/// Logits with gradients of all completion tokens, completions end to end in order.
#[derive(Debug)]
pub struct CompletionLogits {
    /// `[rows, vocab]`, f32.
    pub logits: Tensor,
    /// `[rows]`, i64: the token that each row predicts.
    pub targets: Tensor,
    /// `completions + 1` offsets into the rows, first 0, over all groups.
    pub offsets: Vec<usize>,
}

impl TrainableModel {
    /// Fresh weights: normal matrices, norms of one, biases of zero.
    ///
    /// # Errors
    /// [`TorchError`].
    pub fn random(config: ModelConfig, device: Device, seed: i64) -> Result<Self, TorchError> {
        // libtorch has one generator for the process: two models made at once would share its numbers.
        static GENERATOR: Mutex<()> = Mutex::new(());
        let network = {
            let _generator = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
            tch::manual_seed(seed);
            tch::no_grad(|| random_network(config, device.torch(), Kind::Float))?
        };
        Ok(Self::register(network)?)
    }

    /// The weights of a folder.
    ///
    /// # Errors
    /// As [`crate::Model::load`].
    pub fn from_dir(folder: &Path, device: Device) -> Result<Self, LoadError> {
        let config = ModelConfig::from_dir(folder)?;
        let files = WeightFiles::open(folder)?;
        files.check(&config)?;
        let network = tch::no_grad(|| read_network(config, &files, (Kind::Float, device.torch())))?;
        Ok(Self::register(network)?)
    }

    /// The variables, for an optimizer; see [`DECAY_GROUP`] and [`NO_DECAY_GROUP`].
    #[must_use]
    pub fn var_store(&self) -> &nn::VarStore {
        &self.store
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.network.config
    }

    /// Hidden states after the final norm of a packed batch, `[len, hidden]`, with gradients.
    ///
    /// # Errors
    /// [`TorchError`].
    pub fn forward_packed(&self, batch: &PackedBatch) -> Result<Tensor, TorchError> {
        Ok(self.network.hidden(batch)?)
    }

    /// One forward pass over all groups; each prompt is computed once.
    ///
    /// # Errors
    /// [`TorchError`] for an empty prompt or completion, a token outside the vocabulary, or no memory.
    pub fn completion_logits(&self, groups: &[TrainingGroup<'_>]) -> Result<CompletionLogits, TorchError> {
        let mut batch = PackedBatch::new();
        let (mut rows, mut targets, mut offsets) = (Vec::new(), Vec::new(), vec![0]);
        for group in groups {
            let prompt = batch.push_sequence(group.prompt);
            for completion in &group.completions {
                if group.prompt.is_empty() || completion.is_empty() {
                    return Err(TorchError { detail: "a prompt or completion to train on is empty".to_owned() });
                }
                let own = batch.push_continuation(prompt, completion);
                let own = &batch.segment(own).rows;
                rows.push(batch.segment(prompt).rows.end as i64 - 1);
                rows.extend((own.start..own.end - 1).map(|row| row as i64));
                targets.extend(completion.iter().map(|token| i64::from(token.0)));
                offsets.push(rows.len());
            }
        }
        let on_device = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(self.network.device);
        let hidden = self.network.hidden(&batch)?.f_index_select(0, &on_device(&rows)?)?;
        Ok(CompletionLogits { logits: self.network.logits(&hidden)?, targets: on_device(&targets)?, offsets })
    }

    /// Writes `model.safetensors` with Hugging Face's names; `config.json` is the caller's.
    ///
    /// # Errors
    /// [`LoadError::Torch`] and [`LoadError::Safetensors`].
    pub fn save_safetensors(&self, folder: &Path, dtype: Dtype) -> Result<(), LoadError> {
        let mut tensors = Vec::new();
        tch::no_grad(|| {
            self.network.visit_hf(&mut |name, tensor| {
                tensors.push(owned(name, tensor, dtype)?);
                Ok(())
            })
        })?;
        std::fs::create_dir_all(folder)
            .map_err(|source| SafetensorsError::Write { path: folder.to_owned(), source })?;
        Ok(crate::safetensors::write(&folder.join("model.safetensors"), &tensors)?)
    }

    /// Makes variables of all weights.
    fn register(network: Network) -> Result<Self, TchError> {
        let store = nn::VarStore::new(network.device);
        let root = store.root();
        let matrix =
            |path: &nn::Path<'_>, name: &str, tensor: &Tensor| path.set_group(DECAY_GROUP).f_var_copy(name, tensor);
        let vector =
            |path: &nn::Path<'_>, name: &str, tensor: &Tensor| path.set_group(NO_DECAY_GROUP).f_var_copy(name, tensor);
        let norm = |path: &nn::Path<'_>, name: &str, norm: &RmsNorm| {
            Ok::<_, TchError>(RmsNorm { weight: vector(path, name, &norm.weight)?, epsilon: norm.epsilon })
        };
        let linear = |path: &nn::Path<'_>, name: &str, linear: &Linear| {
            let bias = linear.bias.as_ref().map(|bias| vector(path, &format!("{name}_bias"), bias)).transpose()?;
            Ok::<_, TchError>(Linear { weight: matrix(path, name, &linear.weight)?, bias })
        };
        let embedding = matrix(&root, "embedding", &network.embedding)?;
        let head = if network.config.tie_word_embeddings {
            embedding.shallow_clone()
        } else {
            matrix(&root, "head", &network.head)?
        };
        let mut layers = Vec::with_capacity(network.layers.len());
        for (index, layer) in network.layers.iter().enumerate() {
            let path = &root.sub("layers").sub(index);
            let head_norms = match &layer.head_norms {
                Some((query, key)) => Some((norm(path, "query_norm", query)?, norm(path, "key_norm", key)?)),
                None => None,
            };
            layers.push(Layer {
                input_norm: norm(path, "input_norm", &layer.input_norm)?,
                qkv: linear(path, "qkv", &layer.qkv)?,
                head_norms,
                output: linear(path, "output", &layer.output)?,
                post_norm: norm(path, "post_norm", &layer.post_norm)?,
                gate_up: linear(path, "gate_up", &layer.gate_up)?,
                down: linear(path, "down", &layer.down)?,
            });
        }
        let final_norm = norm(&root, "norm", &network.norm)?;
        Ok(Self { network: Network { embedding, layers, norm: final_norm, head, ..network }, store })
    }
}

pub(crate) fn random_network(config: ModelConfig, device: tch::Device, kind: Kind) -> Result<Network, TchError> {
    let options = (kind, device);
    Network::build(config, options, &|part| match part {
        Part::Matrix(shape) => Tensor::f_randn(shape, options)?.f_mul_scalar(INITIAL_DEVIATION),
        Part::Norm(shape) => Tensor::f_ones(shape, options),
        Part::Bias(shape) => Tensor::f_zeros(shape, options),
    })
}

fn owned(name: String, tensor: &Tensor, dtype: Dtype) -> Result<OwnedTensor, TchError> {
    let tensor = tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_to_kind(dtype.kind())?.f_contiguous()?;
    let dtype = dtype.file();
    let mut bytes = vec![0; tensor.numel() * dtype.element_bytes()];
    // Every host that libtorch runs on is little-endian, as the format is.
    tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
    let shape = tensor.size().iter().map(|extent| usize::try_from(*extent).unwrap_or_default()).collect();
    Ok(OwnedTensor { name, dtype, shape, bytes })
}
