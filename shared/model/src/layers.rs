//! The decoder: embedding, layers, final norm and output matrix, with the rounding points of transformers' modeling code.
//!
//! Query, key and value projections are one matrix, and gate and up projections another: fewer and larger products.

use tch::{Device, Kind, TchError, Tensor};

use crate::attention::{AttentionPlan, HeadShape};
use crate::bf16_cpu;
use crate::config::ModelConfig;
use crate::packed::PackedBatch;
use crate::rope::{Rope, Rotation};
use crate::stages::{Stage, stage};

/// Matrix and optional bias.
#[derive(Debug)]
pub(crate) struct Linear {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        linear(x, &self.weight, self.bias.as_ref())
    }
}

fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TchError> {
    if bf16_cpu::applies(x) { bf16_cpu::linear(x, weight, bias) } else { x.f_linear(weight, bias) }
}

/// Root-mean-square norm: computed in f32, rounded to the model's dtype, then multiplied with the weight.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    pub weight: Tensor,
    pub epsilon: f64,
}

impl RmsNorm {
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let wide = x.f_to_kind(Kind::Float)?;
        let scale = wide
            .f_square()?
            .f_mean_dim([-1_i64].as_slice(), true, Kind::Float)?
            .f_add_scalar(self.epsilon)?
            .f_rsqrt()?;
        self.weight.f_mul(&wide.f_mul(&scale)?.f_to_kind(x.kind())?)
    }
}

/// One decoder layer.
#[derive(Debug)]
pub(crate) struct Layer {
    pub input_norm: RmsNorm,
    /// Rows: queries, keys, values.
    pub qkv: Linear,
    /// Norms of queries and of keys, over a head's dimensions (Qwen3).
    pub head_norms: Option<(RmsNorm, RmsNorm)>,
    pub output: Linear,
    pub post_norm: RmsNorm,
    /// Rows: gate, up.
    pub gate_up: Linear,
    pub down: Linear,
}

/// Queries, keys and values of some tokens, rotated.
#[derive(Debug)]
pub(crate) struct Heads {
    /// `[tokens, heads, head_dim]`
    pub query: Tensor,
    /// `[tokens, kv_heads, head_dim]`
    pub key: Tensor,
    /// `[tokens, kv_heads, head_dim]`
    pub value: Tensor,
}

impl Layer {
    /// * `x`: `[tokens, hidden]`.
    pub(crate) fn heads(&self, x: &Tensor, rotation: &Rotation, shape: HeadShape) -> Result<Heads, TchError> {
        let HeadShape { heads, kv_heads, head_dim } = shape;
        let fused = self.qkv.forward(&self.input_norm.forward(x)?)?;
        let fused = fused.f_view([-1, heads + 2 * kv_heads, head_dim])?;
        let value = fused.f_narrow(1, heads + kv_heads, kv_heads)?;
        let (query, key) = match &self.head_norms {
            Some((query_norm, key_norm)) => (
                rotation.apply(&query_norm.forward(&fused.f_narrow(1, 0, heads)?)?)?,
                rotation.apply(&key_norm.forward(&fused.f_narrow(1, heads, kv_heads)?)?)?,
            ),
            None => {
                let both = rotation.apply(&fused.f_narrow(1, 0, heads + kv_heads)?)?;
                (both.f_narrow(1, 0, heads)?, both.f_narrow(1, heads, kv_heads)?)
            }
        };
        Ok(Heads { query, key, value })
    }

    /// [`Layer::finish`] for many tokens: on a CPU a few hundred rows at a time, so that the wide activations of the feed-forward
    /// part stay in the cache and are not mapped and unmapped by every operation (a quarter of the time at 6,000 tokens).
    fn finish_in_chunks(&self, x: &Tensor, attended: &Tensor) -> Result<Tensor, TchError> {
        const CHUNK_ROWS: i64 = 512;
        let rows = x.size()[0];
        if rows <= CHUNK_ROWS || x.device() != Device::Cpu || x.requires_grad() {
            return self.finish(x, attended);
        }
        let mut finished = Vec::new();
        let mut first = 0;
        while first < rows {
            let count = CHUNK_ROWS.min(rows - first);
            finished.push(self.finish(&x.f_narrow(0, first, count)?, &attended.f_narrow(0, first, count)?)?);
            first += count;
        }
        Tensor::f_cat(&finished, 0)
    }

    /// The rest of the layer behind attention.
    ///
    /// * `x`: the layer's input, `[tokens, hidden]`; `attended`: `[tokens, heads · head_dim]`.
    pub(crate) fn finish(&self, x: &Tensor, attended: &Tensor) -> Result<Tensor, TchError> {
        let x = stage(Stage::Attention, || x.f_add(&self.output.forward(attended)?))?;
        stage(Stage::FeedForward, || self.feed_forward(&x))
    }

    fn feed_forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let fused = self.gate_up.forward(&self.post_norm.forward(x)?)?;
        let inner = fused.size().last().copied().unwrap_or_default() / 2;
        let gate = fused.f_narrow(-1, 0, inner)?.f_silu()?;
        let up = fused.f_narrow(-1, inner, inner)?;
        x.f_add(&self.down.forward(&gate.f_mul(&up)?)?)
    }
}

/// A decoder's weights and its forward pass.
#[derive(Debug)]
pub(crate) struct Network {
    pub config: ModelConfig,
    pub device: Device,
    pub kind: Kind,
    /// `[vocab, hidden]`
    pub embedding: Tensor,
    pub layers: Vec<Layer>,
    pub norm: RmsNorm,
    /// `[vocab, hidden]`; the embedding itself if tied.
    pub head: Tensor,
    pub rope: Rope,
}

impl Network {
    /// Last hidden states with the final norm applied, `[tokens, hidden]` in the model's dtype.
    pub(crate) fn hidden(&self, batch: &PackedBatch) -> Result<Tensor, TchError> {
        let shape = HeadShape::of(&self.config);
        let plan = stage(Stage::Attention, || AttentionPlan::new(batch, shape, (self.kind, self.device)))?;
        let (mut x, rotation) = self.embed(batch.tokens(), batch.positions())?;
        for layer in &self.layers {
            let attended = stage(Stage::Attention, || {
                let Heads { query, key, value } = layer.heads(&x, &rotation, shape)?;
                plan.attend(&query, &key, &value)
            })?;
            x = layer.finish_in_chunks(&x, &attended)?;
        }
        stage(Stage::Head, || self.norm.forward(&x))
    }

    /// Embedded tokens `[tokens, hidden]` and the rotation of their positions.
    pub(crate) fn embed(&self, tokens: &[i64], positions: &[i64]) -> Result<(Tensor, Rotation), TchError> {
        let (tokens, positions) = stage(Stage::Upload, || {
            let on_device = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(self.device);
            Ok::<_, TchError>((on_device(tokens)?, on_device(positions)?))
        })?;
        stage(Stage::Embed, || {
            let embedded = Tensor::f_embedding(&self.embedding, &tokens, -1, false, false)?;
            Ok((embedded, self.rope.rotation(&positions, self.kind)?))
        })
    }

    /// Logits `[rows, vocab]` of some hidden states, in the model's dtype.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor, TchError> {
        linear(hidden, &self.head, None)
    }
}
