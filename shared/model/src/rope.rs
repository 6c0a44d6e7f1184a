//! Rotary position embedding with the frequencies of transformers 4.57.
//!
//! Everything is computed by libtorch in f32, operation by operation as the Python code does, so that the last bit agrees;
//! only the scalars that Python computes in binary64 are computed in binary64 here.

use std::f64::consts::PI;

use tch::{Device, Kind, TchError, Tensor};

use crate::config::{RopeConfig, RopeScaling, YarnScaling};

/// Inverse frequencies and the factor on cosine and sine.
#[derive(Debug)]
pub(crate) struct Rope {
    /// `[head_dim / 2]`, f32.
    inverse_frequencies: Tensor,
    attention_factor: f64,
}

/// Cosine and sine of a batch of positions, `[tokens, 1, head_dim]` in the model's dtype.
#[derive(Debug)]
pub(crate) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    pub(crate) fn new(config: &RopeConfig, head_dim: usize, device: Device) -> Result<Self, TchError> {
        let dim = head_dim as f64;
        // Made on the CPU and moved, as the Python model's buffers are.
        let exponents =
            Tensor::f_arange_start_step(0, head_dim as i64, 2, (Kind::Float, Device::Cpu))?.f_div_scalar(dim)?;
        let frequencies = Tensor::f_pow_scalar(config.theta, &exponents)?;
        let plain = frequencies.f_reciprocal()?;
        let (inverse, attention_factor) = match &config.scaling {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.f_div_scalar(*factor)?, 1.0),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: length,
            } => {
                let bounds = (*low_freq_factor, *high_freq_factor);
                (llama3(&plain, *factor, bounds, *length)?, 1.0)
            }
            RopeScaling::Yarn(yarn_scaling) => {
                (yarn(&frequencies, yarn_scaling, config.theta, dim)?, attention_factor(yarn_scaling))
            }
        };
        Ok(Self { inverse_frequencies: inverse.f_to_device(device)?, attention_factor })
    }

    /// Rotation of each position.
    ///
    /// * `positions`: `[tokens]`, i64.
    pub(crate) fn rotation(&self, positions: &Tensor, kind: Kind) -> Result<Rotation, TchError> {
        let angles =
            positions.f_to_kind(Kind::Float)?.f_unsqueeze(-1)?.f_mul(&self.inverse_frequencies.f_unsqueeze(0)?)?;
        let angles = Tensor::f_cat(&[&angles, &angles], -1)?.f_unsqueeze(1)?;
        let scaled = |values: Tensor| {
            let values =
                if self.attention_factor == 1.0 { values } else { values.f_mul_scalar(self.attention_factor)? };
            values.f_to_kind(kind)
        };
        Ok(Rotation { cos: scaled(angles.f_cos()?)?, sin: scaled(angles.f_sin()?)? })
    }
}

impl Rotation {
    /// Cosine and sine, each `[tokens, head_dim]`.
    pub(crate) fn into_parts(self) -> Result<[Tensor; 2], TchError> {
        Ok([self.cos.f_squeeze_dim(1)?.f_contiguous()?, self.sin.f_squeeze_dim(1)?.f_contiguous()?])
    }

    /// Rotates `[tokens, heads, head_dim]`: `x·cos + rotate_half(x)·sin`, each product rounded to the model's dtype.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let halves = x.f_chunk(2, -1)?;
        let [first, second] = halves.as_slice() else {
            return Err(TchError::Shape(format!("head dimension of {:?} does not halve", x.size())));
        };
        let rotated = Tensor::f_cat(&[&second.f_neg()?, first], -1)?;
        x.f_mul(&self.cos)?.f_add(&rotated.f_mul(&self.sin)?)
    }
}

fn llama3(plain: &Tensor, factor: f64, (low, high): (f64, f64), length: f64) -> Result<Tensor, TchError> {
    let long_wavelength = length / low;
    let short_wavelength = length / high;
    let wavelengths = plain.f_reciprocal()?.f_mul_scalar(2.0 * PI)?;
    let stretched = plain.f_div_scalar(factor)?.f_where_self(&wavelengths.f_gt(long_wavelength)?, plain)?;
    let smooth = wavelengths.f_reciprocal()?.f_mul_scalar(length)?.f_sub_scalar(low)?.f_div_scalar(high - low)?;
    let rest = smooth.f_neg()?.f_add_scalar(1.0)?;
    let smoothed = rest.f_mul(&stretched)?.f_div_scalar(factor)?.f_add(&smooth.f_mul(&stretched)?)?;
    let is_medium = wavelengths.f_ge(short_wavelength)?.f_logical_and(&wavelengths.f_le(long_wavelength)?)?;
    smoothed.f_where_self(&is_medium, &stretched)
}

fn yarn(frequencies: &Tensor, scaling: &YarnScaling, theta: f64, dim: f64) -> Result<Tensor, TchError> {
    let correction = |rotations: f64| {
        dim * (scaling.original_max_position_embeddings / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
    };
    let (mut low, mut high) = (correction(scaling.beta_fast), correction(scaling.beta_slow));
    if scaling.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let extrapolation = frequencies.f_reciprocal()?;
    let interpolation = frequencies.f_mul_scalar(scaling.factor)?.f_reciprocal()?;
    let ramp = Tensor::f_arange(frequencies.size1()?, (Kind::Float, Device::Cpu))?
        .f_sub_scalar(low)?
        .f_div_scalar(high - low)?
        .f_clamp(0.0, 1.0)?;
    let extrapolation_share = ramp.f_neg()?.f_add_scalar(1.0)?;
    let interpolation_share = extrapolation_share.f_neg()?.f_add_scalar(1.0)?;
    interpolation.f_mul(&interpolation_share)?.f_add(&extrapolation.f_mul(&extrapolation_share)?)
}

fn attention_factor(scaling: &YarnScaling) -> f64 {
    let magnitude = |mscale: f64| {
        if scaling.factor <= 1.0 { 1.0 } else { 0.1 * mscale * scaling.factor.ln() + 1.0 }
    };
    match (scaling.attention_factor, scaling.mscale, scaling.mscale_all_dim) {
        (Some(factor), _, _) => factor,
        (None, Some(mscale), Some(all_dim)) => magnitude(mscale) / magnitude(all_dim),
        (None, _, _) => magnitude(1.0),
    }
}
