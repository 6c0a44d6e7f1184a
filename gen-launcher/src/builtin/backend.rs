//! What the scheduler needs of a model: sequences in numbered slots, extended one token at a time, many at once.

use std::fmt;

use grail_protocol::ids::TokenId;

/// The model failed; the server cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("{operation} failed: {detail}")]
pub struct BackendError {
    pub operation: &'static str,
    pub detail: String,
}

/// A decoder with a key-value cache of numbered slots, `0..slots()`.
///
/// The scheduler upholds: a slot is copied into only while it is empty and prefilled only then or right after that, only
/// filled slots are copied from and stepped, and a batch names a slot once, in ascending order.
pub trait DecodeBackend: Send + fmt::Debug {
    /// Width of a row of logits.
    fn vocab_size(&self) -> usize;

    /// Sequences that can be held at once.
    fn slots(&self) -> usize;

    /// Appends tokens to what a slot holds; returns the logits behind the last of them, `[vocab]`.
    ///
    /// # Errors
    /// [`BackendError`]
    fn prefill(&mut self, slot: usize, tokens: &[TokenId]) -> Result<Vec<f32>, BackendError>;

    /// Fills the empty slot `to` with the first `tokens` tokens of the sequence in `from`.
    ///
    /// # Errors
    /// [`BackendError`]
    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<(), BackendError>;

    /// Appends one token to each of the named slots and writes the logits behind them into `logits`, row by row in the
    /// order of `batch`, `[batch, vocab]`.
    ///
    /// # Errors
    /// [`BackendError`]
    fn step(&mut self, batch: &[(usize, TokenId)], logits: &mut Vec<f32>) -> Result<(), BackendError>;

    /// Empties a slot.
    fn release(&mut self, slot: usize);
}

#[cfg(test)]
pub(crate) mod fake {
    //! A model whose logits are a hash of the sequence, and which refuses what the contract forbids.

    use super::*;

    /// Deterministic stand-in for a model.
    #[derive(Debug)]
    pub(crate) struct FakeBackend {
        pub(crate) vocab_size: usize,
        pub(crate) salt: u64,
        pub(crate) slots: Vec<Option<Vec<TokenId>>>,
        /// Tokens that went through [`DecodeBackend::prefill`].
        pub(crate) prefilled: std::sync::Arc<std::sync::atomic::AtomicUsize>,
        /// Sequences of this length get NaN.
        pub(crate) poison_at: Option<usize>,
        /// The step with this number fails.
        pub(crate) fail_at_step: Option<usize>,
        pub(crate) steps: usize,
        pub(crate) generating: std::collections::BTreeSet<usize>,
    }

    impl FakeBackend {
        pub(crate) fn new(slots: usize) -> Self {
            Self {
                vocab_size: 32,
                salt: 0,
                slots: vec![None; slots],
                prefilled: std::sync::Arc::default(),
                poison_at: None,
                fail_at_step: None,
                steps: 0,
                generating: std::collections::BTreeSet::new(),
            }
        }

        /// Logits behind a sequence: a function of nothing else.
        pub(crate) fn logits(&self, tokens: &[TokenId]) -> Vec<f32> {
            if self.poison_at == Some(tokens.len()) {
                return vec![f32::NAN; self.vocab_size];
            }
            let fold = |state: u64, value: u64| (state ^ value).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
            let state =
                tokens.iter().fold(self.salt ^ 0xcbf2_9ce4_8422_2325, |state, token| fold(state, token.0.into()));
            (0..self.vocab_size as u64)
                .map(|id| {
                    #[expect(clippy::cast_precision_loss, reason = "24 bits are exact")]
                    let unit = (fold(fold(state, id), id) >> 40) as f32 / (1_u32 << 24) as f32;
                    unit * 4.0
                })
                .collect()
        }
    }

    impl DecodeBackend for FakeBackend {
        fn vocab_size(&self) -> usize {
            self.vocab_size
        }

        fn slots(&self) -> usize {
            self.slots.len()
        }

        fn prefill(&mut self, slot: usize, tokens: &[TokenId]) -> Result<Vec<f32>, BackendError> {
            assert!(!self.generating.contains(&slot), "prefill into slot {slot}, which generates");
            self.prefilled.fetch_add(tokens.len(), std::sync::atomic::Ordering::Relaxed);
            let sequence = self.slots[slot].get_or_insert_default();
            sequence.extend_from_slice(tokens);
            let sequence = sequence.clone();
            Ok(self.logits(&sequence))
        }

        fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<(), BackendError> {
            assert!(self.slots[to].is_none(), "copy into the filled slot {to}");
            let source = self.slots[from].as_ref().expect("copy from a filled slot");
            self.slots[to] = Some(source[..tokens].to_vec());
            Ok(())
        }

        fn step(&mut self, batch: &[(usize, TokenId)], logits: &mut Vec<f32>) -> Result<(), BackendError> {
            self.steps += 1;
            if self.fail_at_step == Some(self.steps) {
                return Err(BackendError { operation: "step", detail: "told to fail".to_owned() });
            }
            assert!(batch.is_sorted_by(|a, b| a.0 < b.0), "slots in ascending order");
            logits.clear();
            for (slot, token) in batch {
                self.generating.insert(*slot);
                let sequence = self.slots[*slot].as_mut().expect("step of a filled slot");
                sequence.push(*token);
                let sequence = sequence.clone();
                logits.extend(self.logits(&sequence));
            }
            Ok(())
        }

        fn release(&mut self, slot: usize) {
            self.generating.remove(&slot);
            self.slots[slot] = None;
        }
    }
}
