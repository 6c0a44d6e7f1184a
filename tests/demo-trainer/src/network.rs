//! The forward pass of training: the same decoder as [`TrainableModel`]'s, over its variables, laid out for many short
//! sequences. A packed batch attends sequence by sequence, which on a GPU costs more launches than work; here one product
//! serves all rows, and what all prompts begin with is computed once.

use std::collections::HashMap;

use anyhow::Context as _;
use grail_model::ModelConfig;
use grail_model::config::{Architecture, RopeScaling};
use grail_model::train::TrainableModel;
use tch::{Device, Kind, TchError, Tensor};

use crate::batch::Batch;

/// Variables of a model, and what the forward pass needs beside them.
#[derive(Debug)]
pub struct Network {
    variables: HashMap<String, Tensor>,
    config: ModelConfig,
    device: Device,
    /// Precision of matrix products; everything else is f32.
    kind: Kind,
    /// `[positions, 1, head_dim]`
    cos: Tensor,
    sin: Tensor,
}

/// What attention needs, made once for all layers.
struct Layout {
    prefix: i64,
    rows: i64,
    width: i64,
    /// `[rows, 1, width, prefix + width]`, true where a key is visible.
    mask: Tensor,
    cos: Tensor,
    sin: Tensor,
}

impl Network {
    /// A forward pass over the variables of `model`, which an optimizer may go on changing.
    ///
    /// # Errors
    /// If the model is no tied Qwen2 with plain rotary frequencies.
    pub fn new(model: &TrainableModel, kind: Kind) -> anyhow::Result<Self> {
        let config = model.config().clone();
        let is_supported = config.architecture == Architecture::Qwen2
            && config.tie_word_embeddings
            && config.rope.scaling == RopeScaling::None;
        anyhow::ensure!(is_supported, "only tied Qwen2 models with plain rotary frequencies are trained");
        let device = model.var_store().device();
        let (cos, sin) = rotation(&config, device).context("make the rotary tables")?;
        Ok(Self { variables: model.var_store().variables(), config, device, kind, cos, sin })
    }

    /// Logits of the batch's targets, `[targets, vocab]` in f32, and the targets themselves.
    ///
    /// # Errors
    /// libtorch's.
    pub fn logits(&self, batch: &Batch) -> Result<(Tensor, Tensor), TchError> {
        let upload = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(self.device);
        let layout = self.layout(batch)?;
        let tokens: Vec<i64> = batch.prefix.iter().chain(&batch.tokens).copied().collect();
        let embedding = self.variable("embedding")?;
        let mut x = Tensor::f_embedding(embedding, &upload(&tokens)?, -1, false, false)?;
        for layer in 0..self.config.layers {
            x = self.layer(&format!("layers.{layer}"), &x, &layout)?;
        }
        let predicting = x.f_index_select(0, &upload(&batch.sources)?)?;
        let hidden = self.norm("norm", &predicting)?;
        let logits = hidden.f_linear(&embedding.f_to_kind(self.kind)?, None::<&Tensor>)?.f_to_kind(Kind::Float)?;
        Ok((logits, upload(&batch.targets)?))
    }

    fn layout(&self, batch: &Batch) -> Result<Layout, TchError> {
        let upload = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(self.device);
        let (prefix, rows, width) = (batch.prefix.len() as i64, batch.rows as i64, batch.width as i64);
        let segments = upload(&batch.segments)?.f_view([rows, width])?;
        let (query, key) = (segments.f_unsqueeze(2)?, segments.f_unsqueeze(1)?);
        // The prompt and the own completion; filling sees filling, since a row that sees nothing would be NaN.
        let visible = key.f_eq(0)?.f_logical_or(&key.f_eq_tensor(&query)?)?;
        let places = Tensor::f_arange(width, (Kind::Int64, self.device))?;
        let causal = places.f_unsqueeze(0)?.f_le_tensor(&places.f_unsqueeze(1)?)?;
        let own = visible.f_logical_and(&causal)?.f_unsqueeze(1)?;
        let before = Tensor::f_ones([rows, 1, width, prefix], (Kind::Bool, self.device))?;
        let positions: Vec<i64> = (0..prefix).chain(batch.positions.iter().copied()).collect();
        let positions = upload(&positions)?;
        Ok(Layout {
            prefix,
            rows,
            width,
            mask: Tensor::f_cat(&[before, own], 3)?,
            cos: self.cos.f_index_select(0, &positions)?,
            sin: self.sin.f_index_select(0, &positions)?,
        })
    }

    fn layer(&self, name: &str, x: &Tensor, layout: &Layout) -> Result<Tensor, TchError> {
        let attended = self.attend(name, &self.norm(&format!("{name}.input_norm"), x)?, layout)?;
        let x = x.f_add(&self.linear(&format!("{name}.output"), &attended)?.f_to_kind(Kind::Float)?)?;
        let fused = self.linear(&format!("{name}.gate_up"), &self.norm(&format!("{name}.post_norm"), &x)?)?;
        let halves = fused.f_chunk(2, -1)?;
        let [gate, up] = halves.as_slice() else {
            return Err(TchError::Shape(format!("gate and up of {name} do not halve")));
        };
        let down = self.linear(&format!("{name}.down"), &gate.f_silu()?.f_mul(up)?)?;
        x.f_add(&down.f_to_kind(Kind::Float)?)
    }

    /// * `x`: `[places, hidden]`. Returns `[places, heads · head_dim]`.
    fn attend(&self, name: &str, x: &Tensor, layout: &Layout) -> Result<Tensor, TchError> {
        let (heads, kv_heads) = (self.config.heads as i64, self.config.kv_heads as i64);
        let head_dim = self.config.head_dim as i64;
        let Layout { prefix, rows, width, .. } = *layout;
        let fused = self.linear(&format!("{name}.qkv"), x)?.f_view([-1, heads + 2 * kv_heads, head_dim])?;
        let rotated = self.rotate(&fused.f_narrow(1, 0, heads + kv_heads)?, layout)?;
        let query = rotated.f_narrow(1, 0, heads)?;
        let key = self.repeat(&rotated.f_narrow(1, heads, kv_heads)?)?;
        let value = self.repeat(&fused.f_narrow(1, heads + kv_heads, kv_heads)?)?;
        // `[1, heads, prefix, head_dim]` and `[rows, heads, width, head_dim]`.
        let of_prefix = |x: &Tensor| x.f_narrow(0, 0, prefix)?.f_transpose(0, 1)?.f_unsqueeze(0);
        let of_rows =
            |x: &Tensor| x.f_narrow(0, prefix, rows * width)?.f_view([rows, width, heads, head_dim])?.f_transpose(1, 2);
        let joined = |x: &Tensor| {
            let before = of_prefix(x)?.f_expand([rows, heads, prefix, head_dim], false)?;
            Tensor::f_cat(&[before, of_rows(x)?], 2)
        };
        let none = None::<&Tensor>;
        let scale = (self.config.head_dim as f64).powf(-0.5);
        let own = Tensor::f_scaled_dot_product_attention(
            &of_rows(&query)?,
            &joined(&key)?,
            &joined(&value)?,
            Some(&layout.mask),
            0.0,
            false,
            scale,
            false,
        )?;
        let own = own.f_transpose(1, 2)?.f_reshape([rows * width, heads * head_dim])?;
        if prefix == 0 {
            return Ok(own);
        }
        let [query, key, value] = [of_prefix(&query)?, of_prefix(&key)?, of_prefix(&value)?];
        let first = Tensor::f_scaled_dot_product_attention(&query, &key, &value, none, 0.0, true, scale, false)?;
        let first = first.f_squeeze_dim(0)?.f_transpose(0, 1)?.f_reshape([prefix, heads * head_dim])?;
        Tensor::f_cat(&[first, own], 0)
    }

    fn rotate(&self, x: &Tensor, layout: &Layout) -> Result<Tensor, TchError> {
        let wide = x.f_to_kind(Kind::Float)?;
        let halves = wide.f_chunk(2, -1)?;
        let [first, second] = halves.as_slice() else {
            return Err(TchError::Shape("the head dimension does not halve".to_owned()));
        };
        let turned = Tensor::f_cat(&[&second.f_neg()?, first], -1)?;
        wide.f_mul(&layout.cos)?.f_add(&turned.f_mul(&layout.sin)?)?.f_to_kind(self.kind)
    }

    /// `[places, kv_heads, head_dim]` to `[places, heads, head_dim]`.
    fn repeat(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let (heads, kv_heads) = (self.config.heads as i64, self.config.kv_heads as i64);
        let (places, head_dim) = (x.size()[0], self.config.head_dim as i64);
        x.f_unsqueeze(2)?
            .f_expand([places, kv_heads, heads / kv_heads, head_dim], false)?
            .f_reshape([places, heads, head_dim])
    }

    /// Root-mean-square norm in f32, cast for the product that follows.
    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor, TchError> {
        let scale = x
            .f_square()?
            .f_mean_dim([-1_i64].as_slice(), true, Kind::Float)?
            .f_add_scalar(self.config.rms_norm_eps)?
            .f_rsqrt()?;
        x.f_mul(&scale)?.f_mul(self.variable(name)?)?.f_to_kind(self.kind)
    }

    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor, TchError> {
        let weight = self.variable(name)?.f_to_kind(self.kind)?;
        let bias = self.variables.get(&format!("{name}_bias")).map(|bias| bias.f_to_kind(self.kind)).transpose()?;
        x.f_linear(&weight, bias.as_ref())
    }

    fn variable(&self, name: &str) -> Result<&Tensor, TchError> {
        self.variables.get(name).ok_or_else(|| TchError::Shape(format!("the model has no variable {name}")))
    }
}

/// Cosine and sine of every position.
fn rotation(config: &ModelConfig, device: Device) -> Result<(Tensor, Tensor), TchError> {
    let options = (Kind::Float, Device::Cpu);
    let exponents =
        Tensor::f_arange_start_step(0, config.head_dim as i64, 2, options)?.f_div_scalar(config.head_dim as f64)?;
    let frequencies = Tensor::f_pow_scalar(config.rope.theta, &exponents)?.f_reciprocal()?;
    let positions = Tensor::f_arange(config.max_position_embeddings as i64, options)?.f_unsqueeze(-1)?;
    let angles = positions.f_mul(&frequencies.f_unsqueeze(0)?)?;
    let angles = Tensor::f_cat(&[&angles, &angles], -1)?.f_unsqueeze(1)?.f_to_device(device)?;
    Ok((angles.f_cos()?, angles.f_sin()?))
}

#[cfg(test)]
mod tests {
    use grail_model::train::TrainingGroup;
    use grail_protocol::ids::TokenId;

    use super::*;
    use crate::batch::Example;
    use crate::folder::Shape;
    use crate::rng::Rng;

    fn random_tokens(rng: &mut Rng, count: usize) -> Vec<TokenId> {
        (0..count).map(|_| TokenId(u32::try_from(rng.below(60)).unwrap())).collect()
    }

    /// The layout changes no result: logits and gradients equal those of the packed forward pass.
    #[test]
    fn logits_and_gradients_equal_the_packed_forward_pass() {
        grail_model::set_threads(1);
        let config = Shape::tiny(64).config().unwrap();
        let model = TrainableModel::random(config, grail_model::Device::Cpu, 3).unwrap();
        let mut rng = Rng::new(5, 0);
        let prefix = random_tokens(&mut rng, 7);
        let prompts: Vec<Vec<TokenId>> = [4, 9, 1].map(|count| random_tokens(&mut rng, count)).into();
        let completions: Vec<Vec<Vec<TokenId>>> = [vec![6, 11], vec![3], vec![8, 2, 5]]
            .into_iter()
            .map(|lengths| lengths.into_iter().map(|count| random_tokens(&mut rng, count)).collect())
            .collect();
        let whole: Vec<Vec<TokenId>> = prompts.iter().map(|prompt| [prefix.as_slice(), prompt].concat()).collect();
        let groups: Vec<TrainingGroup<'_>> = whole
            .iter()
            .zip(&completions)
            .map(|(prompt, own)| TrainingGroup { prompt, completions: own.iter().map(Vec::as_slice).collect() })
            .collect();
        let examples: Vec<Example<'_>> = prompts
            .iter()
            .zip(&completions)
            .map(|(prompt, own)| Example { prompt, completions: own.clone() })
            .collect();

        let expected = model.completion_logits(&groups).unwrap();
        let network = Network::new(&model, Kind::Float).unwrap();
        let (logits, targets) = network.logits(&Batch::new(&prefix, &examples).unwrap()).unwrap();
        assert_eq!(Vec::<i64>::try_from(&targets).unwrap(), Vec::<i64>::try_from(&expected.targets).unwrap());
        let difference = (&logits - &expected.logits).abs().max().double_value(&[]);
        assert!(difference < 1e-5, "{difference}");

        let gradient = |logits: &Tensor| {
            let loss = logits.cross_entropy_for_logits(&targets);
            let variables = model.var_store().trainable_variables();
            Tensor::run_backward(&[loss], &variables, false, false)
        };
        for (one, other) in gradient(&logits).iter().zip(&gradient(&expected.logits)) {
            let difference = (one - other).abs().max().double_value(&[]);
            assert!(difference < 1e-5, "{difference}");
        }
    }
}
