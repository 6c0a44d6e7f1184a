//! A loaded decoder that any number of threads may read.

use std::collections::BTreeMap;
use std::path::Path;

use grail_protocol::ids::{TokenId, WeightsHash};
use tch::{Kind, Tensor};

use crate::config::ModelConfig;
use crate::cuda::{beside_proofs, weight_kernels};
use crate::device::{Device, Dtype};
use crate::error::{LoadError, TorchError};
use crate::ffi::Frozen;
use crate::fill::{Fill, fill};
use crate::layers::Network;
use crate::packed::PackedBatch;
use crate::safetensors::FileDtype;
use crate::stages::{Stage, stage};
use crate::train::random_network;
use crate::weights::{HEAD, WeightFiles};

/// How a folder is loaded.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    pub device: Device,
    /// Unset = [`Device::default_dtype`].
    pub dtype: Option<Dtype>,
    /// The folder's weights hash if it was computed when the checkpoint was installed; unset = computed while loading, which
    /// takes about 0.2 s per GB.
    pub known_hash: Option<WeightsHash>,
    /// Most tokens of one packed batch; a longer single sequence runs alone.
    pub batch_tokens: usize,
}

impl LoadOptions {
    /// Default precision and batch size on `device`.
    #[must_use]
    pub const fn on(device: Device) -> Self {
        Self { device, dtype: None, known_hash: None, batch_tokens: device.default_batch_tokens() }
    }

    /// The same in another precision.
    #[must_use]
    pub const fn with_dtype(self, dtype: Dtype) -> Self {
        Self { dtype: Some(dtype), ..self }
    }
}

/// Weights on a device, read-only.
#[derive(Debug)]
pub struct Model {
    network: Frozen,
    /// Of the tensors in the files, by name.
    pub(crate) dtypes: BTreeMap<String, FileDtype>,
    pub(crate) weights_hash: WeightsHash,
    device: Device,
    dtype: Dtype,
    batch_tokens: usize,
}

impl Model {
    /// Loads a Hugging Face folder: `config.json` and safetensors in one file or in shards.
    ///
    /// # Errors
    /// [`LoadError`] naming the field, the file or the tensor.
    pub fn load(folder: &Path, options: &LoadOptions) -> Result<Self, LoadError> {
        options.device.check()?;
        let config = ModelConfig::from_dir(folder)?;
        let files = WeightFiles::open(folder)?;
        files.check(&config)?;
        let weights_hash = options.known_hash.unwrap_or_else(|| files.hash());
        let dtype = options.dtype.unwrap_or_else(|| options.device.default_dtype());
        // Also at the start: what libtorch allocated for one stream it does not give to another, and the next model is loaded here.
        let network = beside_proofs(options.device, || {
            tch::no_grad(|| read_network(config, &files, (dtype.kind(), options.device.torch())))
        })?;
        // Compiled now if it must be, not when a reload waits for them.
        drop(weight_kernels(options.device.torch()));
        tracing::info!(
            folder = %folder.display(),
            device = %options.device,
            dtype = %dtype,
            weights = %weights_hash,
            bytes = files.total_bytes(),
            "Model loaded."
        );
        let dtypes = files.dtypes();
        if options.device != Device::Cpu {
            // To unmap a large file takes tenths of a second, for which no reload should wait. Without a thread it is done here.
            drop(std::thread::Builder::new().name("grail-unmap".into()).spawn(move || drop(files)));
        }
        Ok(Self {
            network: Frozen::new(network),
            dtypes,
            weights_hash,
            device: options.device,
            dtype,
            batch_tokens: options.batch_tokens.max(1),
        })
    }

    /// A model of random weights, for measurements on hosts without a checkpoint: it computes what a trained one does, and its
    /// logits are flat. The hash is the seed's number; no folder has it.
    ///
    /// # Errors
    /// [`LoadError::NoDevice`], and [`LoadError::Torch`] for want of memory.
    pub fn random(config: ModelConfig, options: &LoadOptions, seed: u32) -> Result<Self, LoadError> {
        options.device.check()?;
        let dtype = options.dtype.unwrap_or_else(|| options.device.default_dtype());
        tch::manual_seed(seed.into());
        let network = beside_proofs(options.device, || {
            tch::no_grad(|| random_network(config, options.device.torch(), dtype.kind()))
        })?;
        let mut dtypes = BTreeMap::new();
        network.visit_hf(&mut |name, _| {
            dtypes.insert(name, dtype.file());
            Ok(())
        })?;
        Ok(Self {
            network: Frozen::new(network),
            dtypes,
            weights_hash: WeightsHash(seed.into()),
            device: options.device,
            dtype,
            batch_tokens: options.batch_tokens.max(1),
        })
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.network.config
    }

    /// Hash of the files that were loaded.
    #[must_use]
    pub const fn weights_hash(&self) -> WeightsHash {
        self.weights_hash
    }

    /// Where the weights lie.
    #[must_use]
    pub const fn device(&self) -> Device {
        self.device
    }

    /// Precision of weights and activations.
    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Most tokens of one packed batch.
    #[must_use]
    pub const fn batch_tokens(&self) -> usize {
        self.batch_tokens
    }

    /// Hidden states after the final norm and the logits of `rows`, widened to f32: for diagnosis, not for proofs.
    ///
    /// Returns `([len · hidden], [rows · vocab])`.
    ///
    /// # Errors
    /// [`TorchError`], for instance for a token outside the vocabulary or a row outside the batch.
    pub fn inspect(&self, batch: &PackedBatch, rows: &[usize]) -> Result<(Vec<f32>, Vec<f32>), TorchError> {
        let _guard = tch::no_grad_guard();
        let hidden = self.network.hidden(batch)?;
        let rows: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
        let rows = Tensor::f_from_slice(&rows)?.f_to_device(self.device.torch())?;
        let logits = self.network.logits(&hidden.f_index_select(0, &rows)?)?;
        Ok((host_f32(&hidden)?, host_f32(&logits)?))
    }

    /// This model with other weights of the same files' shape.
    pub(crate) fn with_network(&self, network: Frozen) -> Self {
        Self { network, dtypes: self.dtypes.clone(), ..*self }
    }

    pub(crate) fn network(&self) -> &Network {
        &self.network
    }

    /// The network for in-place changes of its tensors.
    pub(crate) fn network_mut(&mut self) -> &Network {
        self.network.exclusive()
    }

    /// The first token that the embedding does not have.
    pub(crate) fn unknown_token(&self, tokens: &[TokenId]) -> Option<TokenId> {
        tokens.iter().copied().find(|token| token.0 as usize >= self.config().vocab_size)
    }
}

/// A tensor's elements on the host, as f32.
pub(crate) fn host_f32(x: &Tensor) -> Result<Vec<f32>, tch::TchError> {
    stage(Stage::ReadBack, || {
        let x = x.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
        let mut values = vec![0.0; x.numel()];
        let count = values.len();
        x.f_copy_data(&mut values, count)?;
        Ok(values)
    })
}

/// Builds the network from files; projections that are computed together are stacked.
pub(crate) fn read_network(
    config: ModelConfig,
    files: &WeightFiles,
    options: (Kind, tch::Device),
) -> Result<Network, LoadError> {
    let network = Network::unfilled(config, options)?;
    let is_tied = network.config.tie_word_embeddings;
    let mut fills = Vec::new();
    for (name, to) in network.places()? {
        // A tied output matrix is the embedding, and the file's copy of it, if any, is the same.
        if !(is_tied && name == HEAD) {
            let (bytes, kind) = files.elements(&name)?;
            fills.push(Fill { to, bytes, kind });
        }
    }
    fill(fills)?;
    Ok(network)
}
