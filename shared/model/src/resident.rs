//! The tensors of the files where they lie in a loaded model: views into the stacked matrices.

use std::collections::BTreeMap;
use std::sync::Arc;

use tch::{Device, Kind, TchError, Tensor};

use crate::config::{Architecture, ModelConfig};
use crate::cuda::{WeightKernels, beside_proofs, weight_kernels};
use crate::error::LoadError;
use crate::ffi::Frozen;
use crate::layers::{Layer, Linear, Network, RmsNorm};
use crate::model::Model;
use crate::rope::Rope;
use crate::safetensors::FileDtype;
use crate::weights::{EMBEDDING, HEAD};

/// One tensor that a network is built of, with its shape.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    Matrix([i64; 2]),
    Norm([i64; 1]),
    Bias([i64; 1]),
}

impl Part {
    pub(crate) fn shape(&self) -> &[i64] {
        match self {
            Self::Matrix(shape) => shape,
            Self::Norm(shape) | Self::Bias(shape) => shape,
        }
    }
}

impl Network {
    /// A network of the tensors that `make` gives.
    pub(crate) fn build(
        config: ModelConfig,
        (kind, device): (Kind, Device),
        make: &dyn Fn(Part) -> Result<Tensor, TchError>,
    ) -> Result<Self, TchError> {
        let matrix = |rows: usize, columns: usize| make(Part::Matrix([rows as i64, columns as i64]));
        let norm = |size: usize| {
            Ok::<_, TchError>(RmsNorm { weight: make(Part::Norm([size as i64]))?, epsilon: config.rms_norm_eps })
        };
        let linear = |rows: usize, columns: usize, has_bias: bool| {
            let bias = has_bias.then(|| make(Part::Bias([rows as i64]))).transpose()?;
            Ok::<_, TchError>(Linear { weight: matrix(rows, columns)?, bias })
        };
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (query, kv) = (config.query_size(), config.kv_size());
        let layer = || {
            let head_norms = match config.architecture {
                Architecture::Qwen3 => Some((norm(config.head_dim)?, norm(config.head_dim)?)),
                Architecture::Qwen2 | Architecture::Llama => None,
            };
            Ok::<_, TchError>(Layer {
                input_norm: norm(hidden)?,
                qkv: linear(query + 2 * kv, hidden, config.qkv_bias)?,
                head_norms,
                output: linear(hidden, query, config.output_bias)?,
                post_norm: norm(hidden)?,
                gate_up: linear(2 * inner, hidden, config.mlp_bias)?,
                down: linear(hidden, inner, config.mlp_bias)?,
            })
        };
        let embedding = matrix(config.vocab_size, hidden)?;
        let head =
            if config.tie_word_embeddings { embedding.shallow_clone() } else { matrix(config.vocab_size, hidden)? };
        Ok(Self {
            device,
            kind,
            embedding,
            layers: (0..config.layers).map(|_| layer()).collect::<Result<_, _>>()?,
            norm: norm(hidden)?,
            head,
            rope: Rope::new(&config.rope, config.head_dim, device)?,
            config,
        })
    }

    /// A network whose weights are whatever the memory held.
    pub(crate) fn unfilled(config: ModelConfig, options: (Kind, Device)) -> Result<Self, TchError> {
        Self::build(config, options, &|part| Tensor::f_empty(part.shape(), options))
    }

    /// Calls `visit` with every tensor under its Hugging Face name, stacked projections taken apart; a tied output matrix is left
    /// out.
    pub(crate) fn visit_hf(
        &self,
        visit: &mut dyn FnMut(String, &Tensor) -> Result<(), TchError>,
    ) -> Result<(), TchError> {
        let config = &self.config;
        let (query, kv) = (config.query_size() as i64, config.kv_size() as i64);
        let (hidden, inner) = (config.hidden_size as i64, config.intermediate_size as i64);
        visit(EMBEDDING.to_owned(), &self.embedding)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let name = |part: &str| format!("model.layers.{index}.{part}");
            let mut split = |linear: &Linear, parts: &[(&str, i64)]| {
                let mut first = 0;
                for (part, rows) in parts {
                    visit(name(&format!("{part}.weight")), &linear.weight.f_narrow(0, first, *rows)?)?;
                    if let Some(bias) = &linear.bias {
                        visit(name(&format!("{part}.bias")), &bias.f_narrow(0, first, *rows)?)?;
                    }
                    first += rows;
                }
                Ok::<_, TchError>(())
            };
            split(&layer.qkv, &[("self_attn.q_proj", query), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)])?;
            split(&layer.output, &[("self_attn.o_proj", hidden)])?;
            split(&layer.gate_up, &[("mlp.gate_proj", inner), ("mlp.up_proj", inner)])?;
            split(&layer.down, &[("mlp.down_proj", hidden)])?;
            if let Some((query_norm, key_norm)) = &layer.head_norms {
                visit(name("self_attn.q_norm.weight"), &query_norm.weight)?;
                visit(name("self_attn.k_norm.weight"), &key_norm.weight)?;
            }
            visit(name("input_layernorm.weight"), &layer.input_norm.weight)?;
            visit(name("post_attention_layernorm.weight"), &layer.post_norm.weight)?;
        }
        visit("model.norm.weight".to_owned(), &self.norm.weight)?;
        if !config.tie_word_embeddings {
            visit(HEAD.to_owned(), &self.head)?;
        }
        Ok(())
    }

    /// Every tensor that a file may have, as a flat view of where it lies; a tied output matrix is the embedding.
    pub(crate) fn places(&self) -> Result<BTreeMap<String, Tensor>, TchError> {
        let mut places = BTreeMap::new();
        self.visit_hf(&mut |name, tensor| {
            places.insert(name, tensor.f_view([-1])?);
            Ok(())
        })?;
        if self.config.tie_word_embeddings {
            places.insert(HEAD.to_owned(), self.embedding.f_view([-1])?);
        }
        Ok(places)
    }
}

impl Network {
    /// Kernels of our own for these weights where they lie, if there are any.
    pub(crate) fn own_kernels(&self) -> Option<Arc<WeightKernels>> {
        weight_kernels(self.device).filter(|_| self.kind.elt_size_in_bytes() == 2)
    }

    fn copy(&self) -> Result<Self, TchError> {
        let copy = Self::unfilled(self.config.clone(), (self.kind, self.device))?;
        // A tied output matrix is the embedding, which has its own turn.
        let is_own = |name: &str| !(self.config.tie_word_embeddings && name == HEAD);
        let pairs: Vec<(Tensor, Tensor)> = self
            .places()?
            .into_iter()
            .zip(copy.places()?.into_values())
            .filter_map(|((name, from), to)| is_own(&name).then_some((from, to)))
            .collect();
        match self.own_kernels() {
            Some(kernels) => kernels.copy(&pairs)?,
            None => pairs.into_iter().try_for_each(|(from, mut to)| to.f_copy_(&from).map(drop))?,
        }
        Ok(copy)
    }
}

impl Model {
    /// Bytes of the weights where they lie, a tied output matrix once.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        (self.config().parameters() * self.network().kind.elt_size_in_bytes()) as u64
    }

    /// The same weights a second time on the same device, to be changed while these are read.
    ///
    /// # Errors
    /// [`LoadError::Torch`] for want of memory.
    pub fn copy(&self) -> Result<Self, LoadError> {
        let network = beside_proofs(self.device(), || tch::no_grad(|| self.network().copy()))?;
        Ok(self.with_network(Frozen::new(network)))
    }

    /// Names and dtypes of the tensors of the files that were loaded.
    #[must_use]
    pub fn file_dtypes(&self) -> &BTreeMap<String, FileDtype> {
        &self.dtypes
    }
}
