//! `config.json` of a Hugging Face folder as the numbers that the forward pass needs.

use std::path::{Path, PathBuf};

use grail_protocol::ids::TokenId;
use serde::Deserialize;

/// Why a folder's `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file is missing or unreadable.
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The file is no JSON, or a field has another type.
    #[error("parse {path}")]
    Parse {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    /// The `architectures` entry is none of ours.
    #[error("{path}: architecture {found:?} is not supported: only Qwen2, Qwen3 and Llama decoders are")]
    Architecture { path: PathBuf, found: String },
    /// A field asks for something that the forward pass does not do.
    #[error("{path}: {field} = {found} is not supported: {remedy}")]
    Unsupported { path: PathBuf, field: &'static str, found: String, remedy: &'static str },
    /// A required field is absent.
    #[error("{path}: {field} is missing")]
    Missing { path: PathBuf, field: &'static str },
    /// A field's value contradicts another or is out of range.
    #[error("{path}: {field} = {found} is invalid: {expected}")]
    Invalid { path: PathBuf, field: &'static str, found: String, expected: String },
}

/// Family of decoders; they differ in biases and in the norm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    Qwen2,
    Qwen3,
    Llama,
}

/// How rotary frequencies are stretched; parameters as transformers 4.57 names them.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    Linear { factor: f64 },
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: f64 },
    Yarn(YarnScaling),
}

/// Parameters of YaRN.
#[derive(Debug, Clone, PartialEq)]
pub struct YarnScaling {
    pub factor: f64,
    pub original_max_position_embeddings: f64,
    /// Factor on cosine and sine; unset = from `mscale`, `mscale_all_dim` or `factor`.
    pub attention_factor: Option<f64>,
    pub mscale: Option<f64>,
    pub mscale_all_dim: Option<f64>,
    pub beta_fast: f64,
    pub beta_slow: f64,
    /// Whether the correction range is rounded to whole dimensions.
    pub truncate: bool,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// Shape and options of one decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub max_position_embeddings: usize,
    /// The output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Bias of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub output_bias: bool,
    /// Bias of the three feed-forward projections.
    pub mlp_bias: bool,
    pub rope: RopeConfig,
    /// `dtype` or `torch_dtype` as written, if any; the files' own dtype decides what is loaded.
    pub dtype: Option<String>,
    /// `eos_token_id`; the protocol uses the tokenizer's instead.
    pub eos_token_ids: Vec<TokenId>,
    pub pad_token_id: Option<TokenId>,
}

impl ModelConfig {
    /// Reads `config.json` of `folder`.
    ///
    /// # Errors
    /// [`ConfigError`], with the path and the field.
    pub fn from_dir(folder: &Path) -> Result<Self, ConfigError> {
        let path = folder.join("config.json");
        let text = std::fs::read(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        Self::from_json(&text, &path)
    }

    /// Parses the text of a `config.json`; `path` only names it in errors.
    ///
    /// # Errors
    /// As [`ModelConfig::from_dir`].
    pub fn from_json(text: &[u8], path: &Path) -> Result<Self, ConfigError> {
        let raw: RawConfig =
            serde_json::from_slice(text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        Resolver { path, raw: &raw }.resolve()
    }

    /// Queries per key head.
    #[must_use]
    pub const fn queries_per_kv_head(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Width of the query projection.
    #[must_use]
    pub const fn query_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the key projection, and of the value projection.
    #[must_use]
    pub const fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Number of parameters, tied ones once.
    #[must_use]
    pub fn parameters(&self) -> usize {
        crate::weights::expected_tensors(self).iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

/// `config.json` as written; everything optional, defaults as transformers has them.
#[derive(Debug, Deserialize)]
struct RawConfig {
    architectures: Option<Vec<String>>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    partial_rotary_factor: Option<f64>,
    quantization_config: Option<serde_json::Value>,
    dtype: Option<String>,
    torch_dtype: Option<String>,
    eos_token_id: Option<OneOrMany>,
    pad_token_id: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct RawRope {
    rope_type: Option<String>,
    /// Older name of `rope_type`.
    #[serde(rename = "type")]
    older_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    truncate: Option<bool>,
}

/// A token id or a list of them.
#[derive(Debug)]
struct OneOrMany(Vec<u32>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let one = |value: &serde_json::Value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| serde::de::Error::custom(format!("{value} is no token id")))
        };
        match &value {
            serde_json::Value::Array(items) => items.iter().map(one).collect::<Result<_, _>>().map(Self),
            other => one(other).map(|id| Self(vec![id])),
        }
    }
}

struct Resolver<'a> {
    path: &'a Path,
    raw: &'a RawConfig,
}

impl Resolver<'_> {
    fn resolve(&self) -> Result<ModelConfig, ConfigError> {
        let raw = self.raw;
        let architecture = self.architecture()?;
        self.refuse_unsupported(architecture)?;
        let hidden_size = self.positive("hidden_size", raw.hidden_size)?;
        let heads = self.positive("num_attention_heads", raw.num_attention_heads)?;
        let kv_heads = match (raw.num_key_value_heads, architecture) {
            (None, Architecture::Llama) => heads,
            (count, _) => self.positive("num_key_value_heads", count)?,
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(self.invalid("num_key_value_heads", kv_heads, format!("must divide {heads} attention heads")));
        }
        // Qwen3's configuration class has the default 128; the other two divide.
        let head_dim = match (raw.head_dim, architecture) {
            (Some(dim), _) => dim,
            (None, Architecture::Qwen3) => 128,
            (None, _) => hidden_size / heads,
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(self.invalid("head_dim", head_dim, "must be even and positive".to_owned()));
        }
        if hidden_size < grail_protocol::constants::PROOF_TOPK {
            return Err(self.invalid("hidden_size", hidden_size, "a sketch needs 16 activations".to_owned()));
        }
        let max_position_embeddings = self.positive("max_position_embeddings", raw.max_position_embeddings)?;
        let attention_bias = raw.attention_bias.unwrap_or(false);
        Ok(ModelConfig {
            architecture,
            vocab_size: self.positive("vocab_size", raw.vocab_size)?,
            hidden_size,
            intermediate_size: self.positive("intermediate_size", raw.intermediate_size)?,
            layers: self.positive("num_hidden_layers", raw.num_hidden_layers)?,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6),
            max_position_embeddings,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            qkv_bias: architecture == Architecture::Qwen2 || attention_bias,
            output_bias: architecture != Architecture::Qwen2 && attention_bias,
            mlp_bias: architecture == Architecture::Llama && raw.mlp_bias.unwrap_or(false),
            rope: self.rope(max_position_embeddings)?,
            dtype: raw.dtype.clone().or_else(|| raw.torch_dtype.clone()),
            eos_token_ids: raw.eos_token_id.iter().flat_map(|ids| ids.0.iter().copied().map(TokenId)).collect(),
            pad_token_id: raw.pad_token_id.map(TokenId),
        })
    }

    fn architecture(&self) -> Result<Architecture, ConfigError> {
        let names = self.raw.architectures.as_deref().unwrap_or_default();
        match names {
            [name] if name == "Qwen2ForCausalLM" => Ok(Architecture::Qwen2),
            [name] if name == "Qwen3ForCausalLM" => Ok(Architecture::Qwen3),
            [name] if name == "LlamaForCausalLM" => Ok(Architecture::Llama),
            other => Err(ConfigError::Architecture { path: self.path.to_owned(), found: other.join(", ") }),
        }
    }

    fn refuse_unsupported(&self, architecture: Architecture) -> Result<(), ConfigError> {
        let raw = self.raw;
        let activation = raw.hidden_act.as_deref().unwrap_or("silu");
        if activation != "silu" {
            return Err(self.unsupported("hidden_act", activation, "the feed-forward activation must be silu"));
        }
        if architecture != Architecture::Llama && raw.use_sliding_window == Some(true) {
            return Err(self.unsupported("use_sliding_window", true, "attention must be full in every layer"));
        }
        if let Some(kind) = raw.layer_types.iter().flatten().find(|kind| *kind != "full_attention") {
            return Err(self.unsupported("layer_types", kind, "attention must be full in every layer"));
        }
        if let Some(value) = raw.quantization_config.as_ref().filter(|value| !value.is_null()) {
            return Err(self.unsupported("quantization_config", value, "proofs need exact weights"));
        }
        let ropes = [raw.rope_parameters.as_ref(), raw.rope_scaling.as_ref()];
        let partial = ropes.into_iter().flatten().find_map(|rope| rope.partial_rotary_factor);
        if let Some(factor) = partial.or(raw.partial_rotary_factor).filter(|factor| *factor != 1.0) {
            return Err(self.unsupported("partial_rotary_factor", factor, "every head dimension must rotate"));
        }
        Ok(())
    }

    fn rope(&self, max_position_embeddings: usize) -> Result<RopeConfig, ConfigError> {
        let raw = self.raw;
        // transformers 5 writes `rope_parameters` with theta inside; older versions `rope_theta` and `rope_scaling`.
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let theta = rope.and_then(|rope| rope.rope_theta).or(raw.rope_theta).unwrap_or(10_000.0);
        if !(theta.is_finite() && theta > 1.0) {
            return Err(self.invalid("rope_theta", theta, "must exceed 1".to_owned()));
        }
        let scaling = match rope {
            None => RopeScaling::None,
            Some(rope) => self.rope_scaling(rope, max_position_embeddings)?,
        };
        Ok(RopeConfig { theta, scaling })
    }

    fn rope_scaling(&self, rope: &RawRope, max_position_embeddings: usize) -> Result<RopeScaling, ConfigError> {
        let kind = rope.rope_type.as_deref().or(rope.older_type.as_deref()).unwrap_or("default");
        let need = |field: &'static str, value: Option<f64>| match value {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(self.invalid(field, value, "must be positive".to_owned())),
            None => Err(ConfigError::Missing { path: self.path.to_owned(), field }),
        };
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: need("rope_scaling.factor", rope.factor)? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: need("rope_scaling.factor", rope.factor)?,
                low_freq_factor: need("rope_scaling.low_freq_factor", rope.low_freq_factor)?,
                high_freq_factor: need("rope_scaling.high_freq_factor", rope.high_freq_factor)?,
                original_max_position_embeddings: need(
                    "rope_scaling.original_max_position_embeddings",
                    rope.original_max_position_embeddings,
                )?,
            }),
            "yarn" => {
                #[expect(clippy::cast_precision_loss, reason = "a context length is far below 2^53")]
                let own_length = max_position_embeddings as f64;
                // Zero counts as unset: the Python code joins these with `or`.
                let unless_zero = |value: Option<f64>| value.filter(|value| *value != 0.0);
                Ok(RopeScaling::Yarn(YarnScaling {
                    factor: need("rope_scaling.factor", rope.factor)?,
                    original_max_position_embeddings: unless_zero(rope.original_max_position_embeddings)
                        .unwrap_or(own_length),
                    attention_factor: rope.attention_factor,
                    mscale: unless_zero(rope.mscale),
                    mscale_all_dim: unless_zero(rope.mscale_all_dim),
                    beta_fast: unless_zero(rope.beta_fast).unwrap_or(32.0),
                    beta_slow: unless_zero(rope.beta_slow).unwrap_or(1.0),
                    truncate: rope.truncate.unwrap_or(true),
                }))
            }
            other => Err(self.unsupported("rope_type", other, "use default, linear, llama3 or yarn")),
        }
    }

    fn positive(&self, field: &'static str, value: Option<usize>) -> Result<usize, ConfigError> {
        match value {
            None => Err(ConfigError::Missing { path: self.path.to_owned(), field }),
            Some(0) => Err(self.invalid(field, 0, "must be positive".to_owned())),
            // Far above any model, and small enough that no product of two overflows.
            Some(value) if value > 1 << 31 => Err(self.invalid(field, value, "is absurdly large".to_owned())),
            Some(value) => Ok(value),
        }
    }

    fn invalid(&self, field: &'static str, found: impl ToString, expected: String) -> ConfigError {
        ConfigError::Invalid { path: self.path.to_owned(), field, found: found.to_string(), expected }
    }

    fn unsupported(&self, field: &'static str, found: impl ToString, remedy: &'static str) -> ConfigError {
        ConfigError::Unsupported { path: self.path.to_owned(), field, found: found.to_string(), remedy }
    }
}
