//! Shapes of known models, to be filled with random weights on hosts that have no checkpoint.

use std::fmt;
use std::str::FromStr;

use grail_model::ModelConfig;
use grail_model::config::{Architecture, RopeConfig, RopeScaling};

/// A model by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Qwen2Half,
    Qwen2OneAndAHalf,
    Qwen2Seven,
    Qwen3Four,
}

/// A text that names no shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no shape: qwen2-0.5b, qwen2-1.5b, qwen2-7b or qwen3-4b is expected; --model takes a folder of any shape"
)]
pub struct NotAShape(pub String);

impl Shape {
    const ALL: [Self; 4] = [Self::Qwen2Half, Self::Qwen2OneAndAHalf, Self::Qwen2Seven, Self::Qwen3Four];

    const fn name(self) -> &'static str {
        match self {
            Self::Qwen2Half => "qwen2-0.5b",
            Self::Qwen2OneAndAHalf => "qwen2-1.5b",
            Self::Qwen2Seven => "qwen2-7b",
            Self::Qwen3Four => "qwen3-4b",
        }
    }

    /// As the model's published `config.json` has it.
    #[must_use]
    pub fn config(self) -> ModelConfig {
        match self {
            Self::Qwen2Half => qwen2([896, 4_864, 24], (14, 2), (151_936, true)),
            Self::Qwen2OneAndAHalf => qwen2([1_536, 8_960, 28], (12, 2), (151_936, true)),
            Self::Qwen2Seven => qwen2([3_584, 18_944, 28], (28, 4), (152_064, false)),
            Self::Qwen3Four => ModelConfig {
                architecture: Architecture::Qwen3,
                head_dim: 128,
                qkv_bias: false,
                ..qwen2([2_560, 9_728, 36], (32, 8), (151_936, true))
            },
        }
    }
}

fn qwen2(
    [hidden_size, intermediate_size, layers]: [usize; 3],
    (heads, kv_heads): (usize, usize),
    (vocab_size, tie_word_embeddings): (usize, bool),
) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen2,
        vocab_size,
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads,
        head_dim: hidden_size / heads,
        rms_norm_eps: 1e-6,
        max_position_embeddings: 32_768,
        tie_word_embeddings,
        qkv_bias: true,
        output_bias: false,
        mlp_bias: false,
        rope: RopeConfig { theta: 1_000_000.0, scaling: RopeScaling::None },
        dtype: Some("bfloat16".to_owned()),
        eos_token_ids: Vec::new(),
        pad_token_id: None,
    }
}

impl FromStr for Shape {
    type Err = NotAShape;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|shape| shape.name() == text).ok_or_else(|| NotAShape(text.to_owned()))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_published_numbers_of_parameters() {
        // From the models' cards and files.
        for (name, parameters) in [
            ("qwen2-0.5b", 494_032_768),
            ("qwen2-1.5b", 1_543_714_304),
            ("qwen2-7b", 7_615_616_512),
            ("qwen3-4b", 4_022_468_096),
        ] {
            let shape: Shape = name.parse().unwrap();
            assert_eq!(shape.config().parameters(), parameters, "{name}");
            assert_eq!(shape.to_string(), name);
        }
        assert!("qwen2-9b".parse::<Shape>().unwrap_err().to_string().contains("qwen2-7b"));
    }
}
