//! Token by token decoding of many sequences at once, with a cache of keys and values.
//!
//! Made for small models on a CPU: one step costs a fixed number of tensor operations whatever the number of slots.

use std::sync::Arc;

use grail_protocol::ids::TokenId;
use tch::{Kind, TchError, Tensor};

use crate::attention::{HeadShape, causal_mask};
use crate::error::TorchError;
use crate::layers::Heads;
use crate::model::{Model, host_f32};

/// Positions by which the cache and the attended window grow.
const GROWTH: usize = 64;

/// Why a decoder refuses a call. Nothing has changed then, except after [`DecodeError::Torch`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    #[error("slot {slot} does not exist: there are {slots}")]
    NoSuchSlot { slot: usize, slots: usize },
    #[error("slot {slot} is named twice in one step")]
    SlotTwice { slot: usize },
    #[error("slot {slot} holds {held} of {context_len} positions, no room for {more} more")]
    ContextFull { slot: usize, held: usize, more: usize, context_len: usize },
    #[error("token {token} is outside the vocabulary of {vocab_size}")]
    UnknownToken { token: TokenId, vocab_size: usize },
    #[error("slot {slot} holds {held} tokens, {wanted} were to be copied")]
    PrefixTooLong { slot: usize, held: usize, wanted: usize },
    #[error("no token was given")]
    Empty,
    #[error(transparent)]
    Torch(#[from] TorchError),
}

impl From<TchError> for DecodeError {
    fn from(source: TchError) -> Self {
        Self::Torch(source.into())
    }
}

/// Logits of one step, a row for each slot in the order of the call.
#[derive(Debug, Clone)]
pub struct LogitRows {
    values: Vec<f32>,
    vocab_size: usize,
}

impl LogitRows {
    /// Rows in order, `vocab_size` logits each.
    pub fn iter(&self) -> std::slice::ChunksExact<'_, f32> {
        self.values.chunks_exact(self.vocab_size)
    }

    /// One row.
    #[must_use]
    pub fn row(&self, index: usize) -> Option<&[f32]> {
        self.iter().nth(index)
    }

    /// All rows end to end.
    #[must_use]
    pub fn into_flat(self) -> Vec<f32> {
        self.values
    }
}

/// Sequences that are being continued, each in a slot of its own.
#[derive(Debug)]
pub struct Decoder {
    model: Arc<Model>,
    context_len: usize,
    shape: HeadShape,
    /// Positions held, by slot.
    lengths: Vec<usize>,
    /// Positions that the cache has room for.
    capacity: usize,
    /// By layer: keys and values, each `[slots, kv_heads, capacity, head_dim]`. Never uninitialised: a masked NaN would still
    /// spoil the product with the values.
    cache: Vec<(Tensor, Tensor)>,
}

impl Decoder {
    /// A decoder with `slots` empty slots of at most `context_len` positions each; memory is taken as it is needed.
    ///
    /// # Errors
    /// [`DecodeError::Torch`].
    pub fn new(model: Arc<Model>, slots: usize, context_len: usize) -> Result<Self, DecodeError> {
        let shape = HeadShape::of(model.config());
        let mut decoder = Self { model, context_len, shape, lengths: vec![0; slots], capacity: 0, cache: Vec::new() };
        decoder.reserve(1)?;
        Ok(decoder)
    }

    /// The weights in use.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Number of slots.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.lengths.len()
    }

    /// Most positions of one slot.
    #[must_use]
    pub const fn context_len(&self) -> usize {
        self.context_len
    }

    /// Positions that a slot holds; 0 for a slot that does not exist.
    #[must_use]
    pub fn len(&self, slot: usize) -> usize {
        self.lengths.get(slot).copied().unwrap_or_default()
    }

    /// Whether no slot holds anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|length| *length == 0)
    }

    /// Empties a slot; without effect on one that does not exist.
    pub fn release(&mut self, slot: usize) {
        if let Some(length) = self.lengths.get_mut(slot) {
            *length = 0;
        }
    }

    /// Appends tokens to what a slot holds.
    ///
    /// Returns the logits behind the last of them, `[vocab]`.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn prefill(&mut self, slot: usize, tokens: &[TokenId]) -> Result<Vec<f32>, DecodeError> {
        let held = self.admit(slot, tokens)?;
        self.reserve(held + tokens.len())?;
        let _guard = tch::no_grad_guard();
        let logits = self.prefill_rows(slot, held, tokens)?;
        if let Some(length) = self.lengths.get_mut(slot) {
            *length = held + tokens.len();
        }
        Ok(logits)
    }

    /// Makes slot `to` hold the first `tokens` positions of slot `from`, and nothing else.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<(), DecodeError> {
        let held = self.held(from)?;
        self.held(to)?;
        if held < tokens {
            return Err(DecodeError::PrefixTooLong { slot: from, held, wanted: tokens });
        }
        if from != to && tokens > 0 {
            let _guard = tch::no_grad_guard();
            for (keys, values) in &self.cache {
                for cache in [keys, values] {
                    let rows = |slot: usize| cache.f_select(0, slot as i64)?.f_narrow(1, 0, tokens as i64);
                    rows(to)?.f_copy_(&rows(from)?)?;
                }
            }
        }
        if let Some(length) = self.lengths.get_mut(to) {
            *length = tokens;
        }
        Ok(())
    }

    /// Appends one token to each of the named slots and returns the logits behind it.
    ///
    /// # Errors
    /// [`DecodeError`]; a slot may be named once.
    pub fn step(&mut self, tokens: &[(usize, TokenId)]) -> Result<LogitRows, DecodeError> {
        let vocab_size = self.model.config().vocab_size;
        if tokens.is_empty() {
            return Ok(LogitRows { values: Vec::new(), vocab_size });
        }
        let mut is_named = vec![false; self.slots()];
        let mut longest = 0;
        for (slot, token) in tokens {
            longest = longest.max(self.admit(*slot, std::slice::from_ref(token))? + 1);
            match is_named.get_mut(*slot) {
                Some(named) if !*named => *named = true,
                _ => return Err(DecodeError::SlotTwice { slot: *slot }),
            }
        }
        self.reserve(longest)?;
        let _guard = tch::no_grad_guard();
        let values = self.step_rows(tokens, longest)?;
        for (slot, _) in tokens {
            if let Some(length) = self.lengths.get_mut(*slot) {
                *length += 1;
            }
        }
        Ok(LogitRows { values, vocab_size })
    }

    fn held(&self, slot: usize) -> Result<usize, DecodeError> {
        self.lengths.get(slot).copied().ok_or(DecodeError::NoSuchSlot { slot, slots: self.slots() })
    }

    /// Positions that the slot holds, if the tokens fit behind them.
    fn admit(&self, slot: usize, tokens: &[TokenId]) -> Result<usize, DecodeError> {
        let held = self.held(slot)?;
        if tokens.is_empty() {
            return Err(DecodeError::Empty);
        }
        if let Some(token) = self.model.unknown_token(tokens) {
            return Err(DecodeError::UnknownToken { token, vocab_size: self.model.config().vocab_size });
        }
        if held + tokens.len() > self.context_len {
            return Err(DecodeError::ContextFull { slot, held, more: tokens.len(), context_len: self.context_len });
        }
        Ok(held)
    }

    /// Grows the cache to at least `positions`, by half as much again at least, so that growing stays rare.
    fn reserve(&mut self, positions: usize) -> Result<(), DecodeError> {
        if positions <= self.capacity {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        let wanted = positions.max(self.capacity + self.capacity / 2).next_multiple_of(GROWTH);
        let capacity = wanted.min(self.context_len.max(positions));
        let network = self.model.network();
        let HeadShape { kv_heads, head_dim, .. } = self.shape;
        let size = [self.lengths.len() as i64, kv_heads, capacity as i64, head_dim];
        let grown = |old: Option<&Tensor>| {
            let cache = Tensor::f_zeros(size, (network.kind, network.device))?;
            if let Some(old) = old.filter(|_| self.capacity > 0) {
                cache.f_narrow(2, 0, self.capacity as i64)?.f_copy_(old)?;
            }
            Ok::<_, TchError>(cache)
        };
        let cache = (0..network.layers.len())
            .map(|layer| {
                let old = self.cache.get(layer);
                Ok((grown(old.map(|pair| &pair.0))?, grown(old.map(|pair| &pair.1))?))
            })
            .collect::<Result<Vec<_>, TchError>>()?;
        (self.cache, self.capacity) = (cache, capacity);
        Ok(())
    }

    fn prefill_rows(&self, slot: usize, held: usize, tokens: &[TokenId]) -> Result<Vec<f32>, TchError> {
        let network = self.model.network();
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let (before, more) = (held as i64, tokens.len() as i64);
        let ids: Vec<i64> = tokens.iter().map(|token| i64::from(token.0)).collect();
        let positions: Vec<i64> = (before..before + more).collect();
        let (mut x, rotation) = network.embed(&ids, &positions)?;
        let mask = if held == 0 { None } else { Some(causal_mask(more, before, network.device)?) };
        for (layer, (keys, values)) in network.layers.iter().zip(&self.cache) {
            let Heads { query, key, value } = layer.heads(&x, &rotation, self.shape)?;
            let cached =
                |cache: &Tensor, new: &Tensor| {
                    let own = cache.f_select(0, slot as i64)?;
                    own.f_narrow(1, before, more)?.f_copy_(&new.f_transpose(0, 1)?)?;
                    let all = own.f_narrow(1, 0, before + more)?;
                    all.f_unsqueeze(1)?
                        .f_expand([kv_heads, heads / kv_heads, before + more, head_dim], false)?
                        .f_reshape([1, heads, before + more, head_dim])
                };
            let attended = Tensor::f_scaled_dot_product_attention(
                &query.f_transpose(0, 1)?.f_unsqueeze(0)?,
                &cached(keys, &key)?,
                &cached(values, &value)?,
                mask.as_ref(),
                0.0,
                mask.is_none() && more > 1,
                self.shape.scale(),
                false,
            )?;
            let attended = attended.f_squeeze_dim(0)?.f_transpose(0, 1)?.f_reshape([more, heads * head_dim])?;
            x = layer.finish(&x, &attended)?;
        }
        let last = network.norm.forward(&x.f_narrow(0, more - 1, 1)?)?;
        host_f32(&network.logits(&last)?)
    }

    fn step_rows(&self, tokens: &[(usize, TokenId)], longest: usize) -> Result<Vec<f32>, TchError> {
        let network = self.model.network();
        let HeadShape { heads, head_dim, .. } = self.shape;
        let ids: Vec<i64> = tokens.iter().map(|(_, token)| i64::from(token.0)).collect();
        let positions: Vec<i64> = tokens.iter().map(|(slot, _)| self.len(*slot) as i64).collect();
        let (mut x, rotation) = network.embed(&ids, &positions)?;
        let window = longest.next_multiple_of(GROWTH).min(self.capacity);
        let view = StepView::new(self, tokens, &positions, window as i64)?;
        for (layer, (keys, values)) in network.layers.iter().zip(&self.cache) {
            let Heads { query, key, value } = layer.heads(&x, &rotation, self.shape)?;
            view.store(keys, &key)?;
            view.store(values, &value)?;
            let attended = view.attend(&query, keys, values)?;
            x = layer.finish(&x, &view.rows(&attended)?.f_reshape([-1, heads * head_dim])?)?;
        }
        host_f32(&network.logits(&network.norm.forward(&x)?)?)
    }
}

/// Which part of the cache one step looks at: a range of neighbouring slots if the step names at least half of it (then
/// nothing is copied, and the others' rows are computed in vain), else a copy of the named slots.
struct StepView {
    shape: HeadShape,
    /// `[n]`, the named slots and their positions.
    slots: Tensor,
    positions: Tensor,
    span: Span,
    /// `[rows, 1, 1, window]`: 0 where a key is visible, else −∞.
    mask: Tensor,
    window: i64,
}

enum Span {
    /// The step names exactly these slots in order.
    Exact {
        first: i64,
        count: i64,
    },
    /// `rows`: place of each named slot in the range.
    Covering {
        first: i64,
        count: i64,
        rows: Tensor,
    },
    Copied,
}

impl StepView {
    fn new(decoder: &Decoder, tokens: &[(usize, TokenId)], positions: &[i64], window: i64) -> Result<Self, TchError> {
        let device = decoder.model.network().device;
        let on_device = |values: &[i64]| Tensor::f_from_slice(values)?.f_to_device(device);
        let slots: Vec<i64> = tokens.iter().map(|(slot, _)| *slot as i64).collect();
        let first = slots.iter().copied().min().unwrap_or_default();
        let count = slots.iter().copied().max().unwrap_or_default() - first + 1;
        let named = slots.len() as i64;
        let mut visible: Vec<i64> = positions.iter().map(|position| position + 1).collect();
        let span = if slots.iter().enumerate().all(|(at, slot)| first + at as i64 == *slot) {
            Span::Exact { first, count }
        } else if count <= 2 * named {
            let rows: Vec<i64> = slots.iter().map(|slot| slot - first).collect();
            // One visible position for the others: a row without any would be NaN.
            let mut by_row = vec![1; usize::try_from(count).unwrap_or_default()];
            for (row, length) in rows.iter().zip(&visible) {
                if let Some(place) = usize::try_from(*row).ok().and_then(|row| by_row.get_mut(row)) {
                    *place = *length;
                }
            }
            visible = by_row;
            Span::Covering { first, count, rows: on_device(&rows)? }
        } else {
            Span::Copied
        };
        let shape = decoder.shape;
        let rows = visible.len() as i64;
        let hidden = Tensor::f_arange(window, (Kind::Int64, device))?
            .f_ge_tensor(&on_device(&visible)?.f_view([rows, 1, 1, 1])?)?;
        let mask = Tensor::f_zeros([rows, 1, 1, window], (decoder.model.network().kind, device))?
            .f_masked_fill(&hidden, f64::NEG_INFINITY)?;
        Ok(Self { shape, slots: on_device(&slots)?, positions: on_device(positions)?, span, mask, window })
    }

    /// Writes `[n, kv_heads, head_dim]` into a layer's cache, each row at its slot and position.
    fn store(&self, cache: &Tensor, new: &Tensor) -> Result<(), TchError> {
        let mut cache = cache.shallow_clone();
        let at = [Some(&self.slots), None, Some(&self.positions)];
        cache.f_index_put_(&at, new, false).map(drop)
    }

    /// Attention of the named slots over a layer's cache, `[rows, kv_heads, queries, head_dim]`.
    ///
    /// Written out: for one token a slot, libtorch's fused kernel spends its time on the set-up of many tiny products.
    fn attend(&self, query: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor, TchError> {
        let queries = self.queries(query)?.f_mul_scalar(self.shape.scale())?;
        let scores = queries.f_matmul(&self.window(keys)?.f_transpose(-2, -1)?)?;
        scores.f_add(&self.mask)?.f_softmax(-1, None)?.f_matmul(&self.window(values)?)
    }

    /// `[n, heads, head_dim]` to `[rows, kv_heads, queries, head_dim]`: the queries that share a key head become the
    /// sequence dimension, so keys are not repeated.
    fn queries(&self, query: &Tensor) -> Result<Tensor, TchError> {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let query = query.f_reshape([-1, kv_heads, heads / kv_heads, head_dim])?;
        match &self.span {
            Span::Exact { .. } | Span::Copied => Ok(query),
            Span::Covering { count, rows, .. } => {
                let size = [*count, kv_heads, heads / kv_heads, head_dim];
                Tensor::f_zeros(size, (query.kind(), query.device()))?.f_index_copy_(0, rows, &query)
            }
        }
    }

    /// `[rows, kv_heads, window, head_dim]` of a layer's cache.
    fn window(&self, cache: &Tensor) -> Result<Tensor, TchError> {
        let window = cache.f_narrow(2, 0, self.window)?;
        match &self.span {
            Span::Exact { first, count } | Span::Covering { first, count, .. } => window.f_narrow(0, *first, *count),
            Span::Copied => window.f_index_select(0, &self.slots),
        }
    }

    /// The named slots' rows of `[rows, …]`.
    fn rows(&self, x: &Tensor) -> Result<Tensor, TchError> {
        match &self.span {
            Span::Exact { .. } | Span::Copied => Ok(x.shallow_clone()),
            Span::Covering { rows, .. } => x.f_index_select(0, rows),
        }
    }
}
