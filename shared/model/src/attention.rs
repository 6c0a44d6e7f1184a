//! Attention of a packed batch, segment by segment.
//!
//! libtorch's causal flag aligns queries and keys at the first row, so it serves sequences of their own. A continuation has
//! fewer queries than keys: it goes under a mask, some queries at a time, each with the keys up to its last query only. (Letting
//! the prefix's queries come along under the causal flag was measured too: slower on a CPU for prompts and completions alike.)

use tch::{Device, Kind, TchError, Tensor};

use crate::bf16_cpu::{self, Ends};
use crate::config::ModelConfig;
use crate::packed::{PackedBatch, Segment};

/// What attention needs beside queries, keys and values, made once for all layers of a forward pass.
#[derive(Debug)]
pub(crate) struct AttentionPlan<'a> {
    batch: &'a PackedBatch,
    /// By segment: whether another one continues it.
    is_continued: Vec<bool>,
    /// Unset without continuations.
    mask: Option<SlidingMask>,
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
    pub(crate) fn new(
        batch: &'a PackedBatch,
        shape: HeadShape,
        (kind, device): (Kind, Device),
    ) -> Result<Self, TchError> {
        let mut is_continued = vec![false; batch.segments().len()];
        let mut longest = None;
        for segment in batch.segments() {
            let Some(prefix) = segment.prefix else { continue };
            if let Some(flag) = is_continued.get_mut(prefix.place()) {
                *flag = true;
            }
            longest = longest.max(Some(batch.segment(prefix).rows.len() + segment.rows.len()));
        }
        let mask = longest.map(|keys| SlidingMask::new(keys as i64, kind, device)).transpose()?;
        Ok(Self { batch, is_continued, mask, shape })
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
            .map(|segment| self.attend_segment(segment, [query, &key, &value]))
            .collect::<Result<Vec<_>, _>>()?;
        end_to_end(&outputs)
    }

    /// As [`AttentionPlan::attend`], in bf16 on the CPU.
    fn attend_rounded(&self, [query, key, value]: [&Tensor; 3]) -> Result<Tensor, TchError> {
        let segments = self.batch.segments().iter().zip(&self.is_continued);
        let outputs = segments
            .map(|(segment, is_continued)| {
                let prefix = segment.prefix.map(|prefix| self.batch.segment(prefix));
                let queries = gather(query, None, segment)?;
                let (keys, values) = (gather(key, prefix, segment)?, gather(value, prefix, segment)?);
                let ends = if *is_continued { Ends::Later } else { Ends::Here };
                bf16_cpu::attend([&queries, &keys, &values], self.shape, ends)
            })
            .collect::<Result<Vec<_>, _>>()?;
        end_to_end(&outputs)
    }

    /// Returns `[rows, heads · head_dim]`.
    fn attend_segment(&self, segment: &Segment, [query, key, value]: [&Tensor; 3]) -> Result<Tensor, TchError> {
        let prefix = segment.prefix.map(|prefix| self.batch.segment(prefix));
        let queries = heads_first(&gather(query, None, segment)?)?;
        let keys = heads_first(&gather(key, prefix, segment)?)?;
        let values = heads_first(&gather(value, prefix, segment)?)?;
        let own = segment.rows.len() as i64;
        let before = prefix.map_or(0, |prefix| prefix.rows.len() as i64);
        let attended = match &self.mask {
            Some(mask) if prefix.is_some() => {
                let mut outputs = Vec::new();
                let mut first = 0;
                while first < own {
                    let count = mask.block.min(own - first);
                    let visible = before + first + count;
                    outputs.push(self.attend_block(
                        &queries.f_narrow(2, first, count)?,
                        [&keys.f_narrow(2, 0, visible)?, &values.f_narrow(2, 0, visible)?],
                        Some(&mask.of(count, visible)?),
                    )?);
                    first += count;
                }
                Tensor::f_cat(&outputs, 2)?
            }
            _ => self.attend_block(&queries, [&keys, &values], None)?,
        };
        attended.f_squeeze_dim(0)?.f_transpose(0, 1)?.f_reshape([own, self.shape.heads * self.shape.head_dim])
    }

    /// `[1, heads, rows, head_dim]` of queries over all the keys given, causal from the first row unless a mask is given.
    fn attend_block(
        &self,
        queries: &Tensor,
        [keys, values]: [&Tensor; 2],
        mask: Option<&Tensor>,
    ) -> Result<Tensor, TchError> {
        let is_causal = mask.is_none() && queries.size().get(2).is_some_and(|rows| *rows > 1);
        Tensor::f_scaled_dot_product_attention(queries, keys, values, mask, 0.0, is_causal, self.shape.scale(), false)
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

/// Masks of blocks of queries whose last one sees all keys, as views of one band.
#[derive(Debug)]
struct SlidingMask {
    /// `[block, keys + block]`: 0 in column `c` of row `r` if `c ≤ keys + r`, else −∞.
    band: Tensor,
    /// Most queries of one block.
    block: i64,
    keys: i64,
}

impl SlidingMask {
    /// For up to `keys` keys.
    fn new(keys: i64, kind: Kind, device: Device) -> Result<Self, TchError> {
        // On a CPU 128 queries keep a block's scores in the cache; a GPU wants fewer and larger calls.
        let block = if device == Device::Cpu { 128 } else { 1024 };
        let hidden = causal_mask(block, keys, device)?.f_logical_not()?;
        let zeros = Tensor::f_zeros([block, keys + block], (kind, device))?;
        Ok(Self { band: zeros.f_masked_fill(&hidden, f64::NEG_INFINITY)?, block, keys })
    }

    /// `[queries, visible]`: query `i` sees the first `visible − queries + i + 1` keys.
    fn of(&self, queries: i64, visible: i64) -> Result<Tensor, TchError> {
        self.band.f_narrow(0, 0, queries)?.f_narrow(1, self.keys + queries - visible, visible)
    }
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
