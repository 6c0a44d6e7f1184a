//! Buffers of a forward pass, made once and used by every batch: nothing is allocated between two layers.
//!
//! Batches follow each other in one stream, so that the next may write what the last has read.

use tch::{Device, Kind, TchError, Tensor};

use super::gate_up::FeedForward;
use super::kernels::{Dimensions, pieces};

/// Rows by which the buffers grow.
const GROWTH: i64 = 4096;
/// Logits made at once, in elements: 0.75 GiB in bf16, and enough rows for a fast product at every vocabulary.
const LOGIT_ELEMENTS: i64 = 3 << 27;
/// Rows of a chunk of logits are a multiple of this, as the product's tiles are.
const LOGIT_ROWS: i64 = 256;

/// Buffers for batches of up to `rows` rows and `key_rows` rows of keys.
#[derive(Debug)]
pub(crate) struct Workspace {
    rows: i64,
    key_rows: i64,
    logit_rows: i64,
    feed_forward: FeedForward,
    /// `[rows, hidden]`: residual stream.
    x: Tensor,
    /// `[rows, hidden]`: behind a norm.
    normed: Tensor,
    /// `[rows, hidden]`: what is added to the residual stream.
    addend: Tensor,
    /// `[rows, (heads + 2 · kv_heads) · head_dim]`
    qkv: Tensor,
    /// `[key rows, 2, kv_heads, head_dim]`
    keys_values: Tensor,
    /// `[rows, 2 · inner]`, without columns where gate and up are never written.
    gate_up: Tensor,
    /// `[rows, inner]`
    activated: Tensor,
    /// `[logit rows, hidden]`
    chosen: Tensor,
    /// `[logit rows, vocab]`
    logits: Tensor,
}

/// The buffers' parts for one batch.
#[derive(Debug)]
pub(crate) struct Buffers {
    pub x: Tensor,
    pub normed: Tensor,
    pub addend: Tensor,
    pub qkv: Tensor,
    pub keys_values: Tensor,
    pub gate_up: Tensor,
    pub activated: Tensor,
}

impl Workspace {
    /// Without memory yet.
    pub(crate) fn empty(device: Device, feed_forward: FeedForward) -> Self {
        let none = || Tensor::empty([0], (Kind::BFloat16, device));
        Self {
            rows: 0,
            key_rows: 0,
            logit_rows: 0,
            x: none(),
            normed: none(),
            addend: none(),
            qkv: none(),
            keys_values: none(),
            gate_up: none(),
            feed_forward,
            activated: none(),
            chosen: none(),
            logits: none(),
        }
    }

    /// Bytes of device memory that one row of a batch takes, with its keys and what attention allocates.
    pub(crate) fn bytes_per_row(dimensions: &Dimensions, feed_forward: FeedForward) -> usize {
        let Dimensions { hidden, heads, kv_heads, head_dim, inner, .. } = *dimensions;
        // Keys twice: a shared prompt's are copied, which for short completions doubles them.
        let inner = inner + feed_forward.written(inner);
        let elements = 3 * hidden + dimensions.qkv() + 2 * 2 * kv_heads * head_dim + inner + heads * head_dim;
        usize::try_from(elements * 2 + heads * 4).unwrap_or(usize::MAX)
    }

    /// Bytes that logits take, however small the batch.
    pub(crate) fn logit_bytes() -> usize {
        usize::try_from(LOGIT_ELEMENTS * 2).unwrap_or(usize::MAX)
    }

    /// Makes room, and leaves what is large enough.
    ///
    /// # Errors
    /// libtorch's when the device has no memory; the workspace is empty then.
    pub(crate) fn reserve(
        &mut self,
        dimensions: &Dimensions,
        (rows, key_rows, logit_rows): (i64, i64, i64),
        device: Device,
    ) -> Result<(), TchError> {
        let logit_rows = logit_rows.min(Self::logit_chunk(dimensions));
        if rows <= self.rows && key_rows <= self.key_rows && logit_rows <= self.logit_rows {
            return Ok(());
        }
        let rows = self.rows.max(pieces(rows, GROWTH) * GROWTH);
        let key_rows = self.key_rows.max(pieces(key_rows, GROWTH) * GROWTH);
        let logit_rows = self.logit_rows.max(pieces(logit_rows, LOGIT_ROWS) * LOGIT_ROWS);
        // What is there is given back first: both would not fit a device that is nearly full.
        let feed_forward = self.feed_forward;
        *self = Self::empty(device, feed_forward);
        *self = Self::of(dimensions, (rows, key_rows, logit_rows), feed_forward, device)?;
        tracing::debug!(rows, key_rows, logit_rows, "Buffers of the forward pass made.");
        Ok(())
    }

    fn of(
        dimensions: &Dimensions,
        (rows, key_rows, logit_rows): (i64, i64, i64),
        feed_forward: FeedForward,
        device: Device,
    ) -> Result<Self, TchError> {
        let Dimensions { hidden, kv_heads, head_dim, inner, vocab, .. } = *dimensions;
        let buffer = |shape: &[i64]| Tensor::f_empty(shape, (Kind::BFloat16, device));
        Ok(Self {
            rows,
            key_rows,
            logit_rows,
            x: buffer(&[rows, hidden])?,
            normed: buffer(&[rows, hidden])?,
            addend: buffer(&[rows, hidden])?,
            qkv: buffer(&[rows, dimensions.qkv()])?,
            keys_values: buffer(&[key_rows, 2, kv_heads, head_dim])?,
            gate_up: buffer(&[rows, feed_forward.written(inner)])?,
            feed_forward,
            activated: buffer(&[rows, inner])?,
            chosen: buffer(&[logit_rows, hidden])?,
            logits: buffer(&[logit_rows, vocab])?,
        })
    }

    /// Rows of logits made at once.
    fn logit_chunk(dimensions: &Dimensions) -> i64 {
        (LOGIT_ELEMENTS / dimensions.vocab / LOGIT_ROWS).max(1) * LOGIT_ROWS
    }

    /// Rows of logits that fit.
    pub(crate) const fn logit_rows(&self) -> i64 {
        self.logit_rows
    }

    /// Parts for `rows` rows and `key_rows` rows of keys.
    pub(crate) fn buffers(&self, rows: i64, key_rows: i64) -> Result<Buffers, TchError> {
        let part = |buffer: &Tensor| buffer.f_narrow(0, 0, rows);
        Ok(Buffers {
            x: part(&self.x)?,
            normed: part(&self.normed)?,
            addend: part(&self.addend)?,
            qkv: part(&self.qkv)?,
            keys_values: self.keys_values.f_narrow(0, 0, key_rows)?,
            gate_up: part(&self.gate_up)?,
            activated: part(&self.activated)?,
        })
    }

    /// Hidden states and logits of `rows` rows.
    pub(crate) fn head(&self, rows: i64) -> Result<[Tensor; 2], TchError> {
        Ok([self.chosen.f_narrow(0, 0, rows)?, self.logits.f_narrow(0, 0, rows)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_grow_and_are_kept() {
        let mut workspace = Workspace::empty(Device::Cpu, FeedForward::InTwo);
        workspace.reserve(&Dimensions::TINY, (10, 20, 5), Device::Cpu).unwrap();
        let first = workspace.x.data_ptr();
        workspace.reserve(&Dimensions::TINY, (GROWTH, GROWTH, LOGIT_ROWS), Device::Cpu).unwrap();
        assert_eq!(workspace.x.data_ptr(), first, "there was room");
        workspace.reserve(&Dimensions::TINY, (GROWTH + 1, 1, 1), Device::Cpu).unwrap();
        assert_eq!((workspace.rows, workspace.key_rows, workspace.logit_rows), (2 * GROWTH, GROWTH, LOGIT_ROWS));
        let buffers = workspace.buffers(3, 7).unwrap();
        assert_eq!((buffers.qkv.size(), buffers.keys_values.size()), (vec![3, 128], vec![7, 2, 2, 16]));
    }

    #[test]
    fn a_chunk_of_logits_is_bounded_in_bytes() {
        let qwen = Dimensions { vocab: 152_064, ..Dimensions::TINY };
        let rows = Workspace::logit_chunk(&qwen);
        assert!(
            rows % LOGIT_ROWS == 0
                && rows * qwen.vocab <= LOGIT_ELEMENTS
                && (rows + LOGIT_ROWS) * qwen.vocab > LOGIT_ELEMENTS
        );
    }
}
