//! Attention of a packed batch, segment by segment.
//!
//! libtorch's causal flag aligns queries and keys at the first row, so it serves sequences of their own. A continuation has
//! fewer queries than keys: either its prefix's queries come along and their rows are dropped (exactly the kernel call of the
//! unshared sequence, and no more work than a mask while the prefix is the shorter part), or a mask says what is visible.

use tch::{Device, Kind, TchError, Tensor};

use crate::bf16_cpu::{self, Ends};
use crate::config::ModelConfig;
use crate::packed::{PackedBatch, Segment};

/// What attention needs beside queries, keys and values, made once for all layers of a forward pass.
#[derive(Debug)]
pub(crate) struct AttentionPlan<'a> {
    batch: &'a PackedBatch,
    /// By segment; only for continuations that use a mask.
    masks: Vec<Option<Tensor>>,
    shape: HeadShape,
}

/// Numbers of heads and their size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadShape {
    pub heads: i64,
    pub kv_heads: i64,
    pub head_dim: i64,
}

impl HeadShape {
    pub(crate) fn of(config: &ModelConfig) -> Self {
        Self { heads: config.heads as i64, kv_heads: config.kv_heads as i64, head_dim: config.head_dim as i64 }
    }

    /// Factor on the scores.
    pub(crate) fn scale(self) -> f64 {
        (self.head_dim as f64).powf(-0.5)
    }
}

impl<'a> AttentionPlan<'a> {
    pub(crate) fn new(batch: &'a PackedBatch, shape: HeadShape, device: Device) -> Result<Self, TchError> {
        let masks = batch
            .segments()
            .iter()
            .map(|segment| match segment.prefix.map(|prefix| batch.segment(prefix)) {
                Some(prefix) if !takes_prefix_queries(prefix, segment) => {
                    causal_mask(segment.rows.len() as i64, prefix.rows.len() as i64, device).map(Some)
                }
                _ => Ok(None),
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { batch, masks, shape })
    }

    /// * `query`: `[tokens, heads, head_dim]`; `key`, `value`: `[tokens, kv_heads, head_dim]`.
    ///
    /// Returns `[tokens, heads · head_dim]`.
    pub(crate) fn attend(&self, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Tensor, TchError> {
        if bf16_cpu::applies(query) {
            return self.attend_rounded([query, key, value]);
        }
        // Once for the whole batch: a shared prompt would otherwise be repeated for every completion.
        let key = self.repeat_heads(key)?;
        let value = self.repeat_heads(value)?;
        let outputs = self
            .batch
            .segments()
            .iter()
            .zip(&self.masks)
            .map(|(segment, mask)| self.attend_segment(segment, mask.as_ref(), [query, &key, &value]))
            .collect::<Result<Vec<_>, _>>()?;
        end_to_end(&outputs)
    }

    /// As [`AttentionPlan::attend`], in bf16 on the CPU.
    fn attend_rounded(&self, [query, key, value]: [&Tensor; 3]) -> Result<Tensor, TchError> {
        let segments = self.batch.segments();
        let is_prefix = |segment: &Segment| {
            segments.iter().any(|other| other.prefix.is_some_and(|prefix| self.batch.segment(prefix) == segment))
        };
        let outputs = segments
            .iter()
            .map(|segment| {
                let prefix = segment.prefix.map(|prefix| self.batch.segment(prefix));
                let queries = gather(query, None, segment)?;
                let (keys, values) = (gather(key, prefix, segment)?, gather(value, prefix, segment)?);
                let ends = if is_prefix(segment) { Ends::Later } else { Ends::Here };
                bf16_cpu::attend([&queries, &keys, &values], self.shape, ends)
            })
            .collect::<Result<Vec<_>, _>>()?;
        end_to_end(&outputs)
    }

    fn attend_segment(
        &self,
        segment: &Segment,
        mask: Option<&Tensor>,
        [query, key, value]: [&Tensor; 3],
    ) -> Result<Tensor, TchError> {
        let own = segment.rows.len() as i64;
        let prefix = segment.prefix.map(|prefix| self.batch.segment(prefix));
        let all = |x: &Tensor| gather(x, prefix, segment);
        let queries = if mask.is_some() { gather(query, None, segment)? } else { all(query)? };
        let attended = Tensor::f_scaled_dot_product_attention(
            &heads_first(&queries)?,
            &heads_first(&all(key)?)?,
            &heads_first(&all(value)?)?,
            mask,
            0.0,
            mask.is_none() && queries.size()[0] > 1,
            self.shape.scale(),
            false,
        )?;
        // `[1, heads, rows, head_dim]`, of which the last `own` rows are this segment's.
        let attended = attended.f_squeeze_dim(0)?.f_transpose(0, 1)?;
        let rows = attended.size()[0];
        attended.f_narrow(0, rows - own, own)?.f_reshape([own, self.shape.heads * self.shape.head_dim])
    }

    /// `[tokens, kv_heads, d]` to `[tokens, heads, d]`, each head as often as queries share it.
    fn repeat_heads(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        if heads == kv_heads {
            return Ok(x.shallow_clone());
        }
        let tokens = x.size()[0];
        x.f_unsqueeze(2)?
            .f_expand([tokens, kv_heads, heads / kv_heads, head_dim], false)?
            .f_reshape([tokens, heads, head_dim])
    }
}

fn end_to_end(outputs: &[Tensor]) -> Result<Tensor, TchError> {
    match outputs {
        [only] => Ok(only.shallow_clone()),
        many => Tensor::f_cat(many, 0),
    }
}

/// Whether a continuation is computed together with its prefix's queries instead of under a mask: the causal kernel skips
/// what a mask would still compute, and needs no memory for the mask.
fn takes_prefix_queries(prefix: &Segment, own: &Segment) -> bool {
    prefix.rows.len() < own.rows.len()
}

/// Rows of `prefix`, then of `segment`; without a copy where they are neighbours.
fn gather(x: &Tensor, prefix: Option<&Segment>, segment: &Segment) -> Result<Tensor, TchError> {
    let narrow = |rows: &std::ops::Range<usize>| x.f_narrow(0, rows.start as i64, rows.len() as i64);
    match prefix {
        None => narrow(&segment.rows),
        Some(prefix) if prefix.rows.end == segment.rows.start => narrow(&(prefix.rows.start..segment.rows.end)),
        Some(prefix) => Tensor::f_cat(&[narrow(&prefix.rows)?, narrow(&segment.rows)?], 0),
    }
}

/// `[rows, heads, d]` to `[1, heads, rows, d]`.
fn heads_first(x: &Tensor) -> Result<Tensor, TchError> {
    x.f_transpose(0, 1)?.f_unsqueeze(0)
}

/// `[own, prefix + own]`: true where key `j` is visible to query `i`, that is `j ≤ prefix + i`.
pub(crate) fn causal_mask(own: i64, prefix: i64, device: Device) -> Result<Tensor, TchError> {
    let keys = Tensor::f_arange(prefix + own, (Kind::Int64, device))?.f_unsqueeze(0)?;
    let last_visible = Tensor::f_arange_start(prefix, prefix + own, (Kind::Int64, device))?.f_unsqueeze(1)?;
    keys.f_le_tensor(&last_visible)
}
