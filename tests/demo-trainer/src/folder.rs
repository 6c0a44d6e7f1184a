//! The model's shape and the JSON files of a checkpoint folder that say it.

use std::path::Path;

use grail_model::{ConfigError, ModelConfig};
use grail_protocol::ids::TokenId;
use serde_json::json;

use crate::vocabulary::{MAX_POSITIONS, write_json};

/// Numbers that make a Qwen2-shaped decoder.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub vocab: usize,
    pub hidden: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub eos: TokenId,
    pub pad: TokenId,
}

impl Shape {
    /// The demo model.
    #[must_use]
    pub const fn demo(vocab: usize, eos: TokenId, pad: TokenId) -> Self {
        Self { vocab, hidden: 192, inner: 640, layers: 4, heads: 6, kv_heads: 2, eos, pad }
    }

    /// A model for tests.
    #[cfg(test)]
    pub(crate) const fn tiny(vocab: usize) -> Self {
        Self { vocab, hidden: 32, inner: 48, layers: 2, heads: 4, kv_heads: 2, eos: TokenId(2), pad: TokenId(0) }
    }

    /// `config.json`.
    #[must_use]
    pub fn document(&self) -> serde_json::Value {
        json!({
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": null,
            "eos_token_id": self.eos.0,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.inner,
            "max_position_embeddings": MAX_POSITIONS,
            "max_window_layers": self.layers,
            "model_type": "qwen2",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": self.pad.0,
            "rms_norm_eps": 1e-6,
            "rope_scaling": null,
            "rope_theta": 10000.0,
            "sliding_window": null,
            "tie_word_embeddings": true,
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "use_sliding_window": false,
            "vocab_size": self.vocab,
        })
    }

    /// The same as the model crate reads it.
    ///
    /// # Errors
    /// [`ConfigError`] if the numbers contradict each other.
    pub fn config(&self) -> Result<ModelConfig, ConfigError> {
        ModelConfig::from_json(self.document().to_string().as_bytes(), Path::new("config.json"))
    }

    /// Writes `config.json` and `generation_config.json`.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn write(&self, folder: &Path) -> anyhow::Result<()> {
        write_json(&folder.join("config.json"), &self.document())?;
        // The end of a message is the only stop token: validators accept no other end.
        let generation = json!({"do_sample": true, "eos_token_id": self.eos.0, "pad_token_id": self.pad.0});
        write_json(&folder.join("generation_config.json"), &generation)
    }
}
