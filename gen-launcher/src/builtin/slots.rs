//! Which sequence lies in which slot, and which prompts can be had without computing them again.

use std::sync::Arc;

use grail_protocol::ids::TokenId;

/// A prompt whose keys and values are in a slot, with the logits behind it.
#[derive(Debug)]
pub struct CachedPrompt {
    pub tokens: Vec<TokenId>,
    pub logits: Vec<f32>,
}

/// Shorter beginnings are computed again: copying costs about as much.
pub const MIN_SHARED_TOKENS: usize = 16;

/// A beginning that another slot holds.
#[derive(Debug)]
pub struct Shared {
    pub slot: usize,
    /// How much of it; less than the sequence unless `whole` is set.
    pub tokens: usize,
    /// The prompt, if it is the whole sequence: its logits need no computing.
    pub whole: Option<Arc<CachedPrompt>>,
}

#[derive(Debug, Clone)]
enum Use {
    /// Nothing is in it.
    Empty,
    /// Belongs to no request, but holds a prompt (and what was generated behind it).
    Spare { prompt: Arc<CachedPrompt>, last_used: u64 },
    /// Belongs to a request; a retracted one that came back holds more than a prompt.
    Busy { prompt: Option<Arc<CachedPrompt>> },
}

/// What must happen to the backend's slot before it can be filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    Empty(usize),
    /// Release it first: it holds a prompt that nobody used for long.
    Evicted(usize),
}

/// All slots of a backend.
#[derive(Debug)]
pub struct SlotTable {
    uses: Vec<Use>,
    clock: u64,
}

impl SlotTable {
    /// All of them empty.
    #[must_use]
    pub fn new(slots: usize) -> Self {
        Self { uses: vec![Use::Empty; slots], clock: 0 }
    }

    /// The slot whose prompt shares the longest beginning with `tokens`, if any is worth copying.
    pub fn find(&mut self, tokens: &[TokenId]) -> Option<Shared> {
        self.clock += 1;
        let shared = |slot: usize| {
            let prompt = self.prompt(slot)?;
            let length = prompt.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            let is_whole = length == tokens.len() && length == prompt.tokens.len();
            // Without the prompt's own logits the last token must be computed.
            let length = if is_whole { length } else { length.min(tokens.len().saturating_sub(1)) };
            (is_whole || length >= MIN_SHARED_TOKENS).then(|| Shared {
                slot,
                tokens: length,
                whole: is_whole.then(|| Arc::clone(prompt)),
            })
        };
        let best =
            (0..self.uses.len()).filter_map(shared).max_by_key(|shared| (shared.whole.is_some(), shared.tokens))?;
        if let Use::Spare { last_used, .. } = &mut self.uses[best.slot] {
            *last_used = self.clock;
        }
        Some(best)
    }

    fn prompt(&self, slot: usize) -> Option<&Arc<CachedPrompt>> {
        match &self.uses[slot] {
            Use::Spare { prompt, .. } | Use::Busy { prompt: Some(prompt) } => Some(prompt),
            Use::Empty | Use::Busy { prompt: None } => None,
        }
    }

    /// Takes a slot for a request: an empty one, else the spare one that was not used for longest, never `keep`. `None` if
    /// all others are busy.
    pub fn take(&mut self, keep: Option<usize>) -> Option<Taken> {
        let eligible = |slot: &usize| Some(*slot) != keep;
        let empty = (0..self.uses.len()).filter(eligible).find(|slot| matches!(self.uses[*slot], Use::Empty));
        let taken = match empty {
            Some(slot) => Taken::Empty(slot),
            None => {
                let spare = |slot: usize| match self.uses[slot] {
                    Use::Spare { last_used, .. } => Some((last_used, slot)),
                    Use::Empty | Use::Busy { .. } => None,
                };
                Taken::Evicted((0..self.uses.len()).filter(eligible).filter_map(spare).min()?.1)
            }
        };
        let (Taken::Empty(slot) | Taken::Evicted(slot)) = taken;
        self.uses[slot] = Use::Busy { prompt: None };
        Some(taken)
    }

    /// Notes which prompt a busy slot begins with.
    pub fn hold(&mut self, slot: usize, prompt: Arc<CachedPrompt>) {
        self.uses[slot] = Use::Busy { prompt: Some(prompt) };
    }

    /// Ends a request's use. Returns whether the backend must release the slot: it keeps a prompt that no other slot holds.
    pub fn give_back(&mut self, slot: usize) -> bool {
        self.clock += 1;
        let Use::Busy { prompt } = std::mem::replace(&mut self.uses[slot], Use::Empty) else { return true };
        let Some(prompt) = prompt else { return true };
        if (0..self.uses.len()).any(|other| self.prompt(other).is_some_and(|held| held.tokens == prompt.tokens)) {
            return true;
        }
        self.uses[slot] = Use::Spare { prompt, last_used: self.clock };
        false
    }

    /// Forgets spare prompts; returns the slots to release.
    pub fn flush(&mut self) -> Vec<usize> {
        let is_spare = |slot: &usize| matches!(self.uses[*slot], Use::Spare { .. });
        let spare: Vec<usize> = (0..self.uses.len()).filter(is_spare).collect();
        spare.iter().for_each(|slot| self.uses[*slot] = Use::Empty);
        spare
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(ids: &[u32]) -> Arc<CachedPrompt> {
        Arc::new(CachedPrompt { tokens: ids.iter().copied().map(TokenId).collect(), logits: vec![] })
    }

    fn tokens(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    #[test]
    fn a_finished_prompt_stays_until_its_slot_is_needed() {
        let mut table = SlotTable::new(2);
        assert_eq!(table.take(None), Some(Taken::Empty(0)));
        table.hold(0, prompt(&[1, 2]));
        assert_eq!(table.find(&tokens(&[1, 2])).unwrap().slot, 0);
        assert!(table.find(&tokens(&[1])).is_none());
        assert!(!table.give_back(0));
        assert_eq!(table.find(&tokens(&[1, 2])).unwrap().slot, 0);
        assert_eq!(table.take(Some(0)), Some(Taken::Empty(1)));
        assert_eq!(table.take(Some(0)), None);
        assert_eq!(table.take(None), Some(Taken::Evicted(0)));
        assert!(table.find(&tokens(&[1, 2])).is_none());
        assert_eq!(table.take(None), None);
    }

    #[test]
    fn a_prompt_is_kept_once() {
        let mut table = SlotTable::new(3);
        for slot in 0..2 {
            assert_eq!(table.take(None), Some(Taken::Empty(slot)));
            table.hold(slot, prompt(&[7]));
        }
        assert!(table.give_back(0), "slot 1 still holds the prompt");
        assert!(!table.give_back(1));
        assert_eq!(table.flush(), [1]);
        assert!(table.find(&tokens(&[7])).is_none());
    }

    #[test]
    fn the_longest_shared_beginning_wins_and_its_last_token_is_computed() {
        let mut table = SlotTable::new(3);
        let sequence: Vec<u32> = (0..40).collect();
        for (slot, length) in [(0, 20), (1, 30), (2, 15)] {
            assert_eq!(table.take(None), Some(Taken::Empty(slot)));
            table.hold(slot, prompt(&sequence[..length]));
        }
        let found = table.find(&tokens(&sequence)).unwrap();
        assert_eq!((found.slot, found.tokens, found.whole.is_none()), (1, 30, true));
        let found = table.find(&tokens(&sequence[..25])).unwrap();
        assert_eq!((found.slot, found.tokens, found.whole.is_none()), (1, 24, true));
        let found = table.find(&tokens(&sequence[..20])).unwrap();
        assert_eq!((found.slot, found.tokens, found.whole.is_some()), (0, 20, true));
        assert!(table.find(&tokens(&sequence[..16])).is_none(), "fifteen are not worth it");
        assert!(table.find(&tokens(&sequence[1..])).is_none());
    }

    #[test]
    fn the_prompt_that_was_used_longest_ago_goes_first() {
        let mut table = SlotTable::new(3);
        for (slot, id) in [(0, 10), (1, 11), (2, 12)] {
            assert_eq!(table.take(None), Some(Taken::Empty(slot)));
            table.hold(slot, prompt(&[id]));
        }
        for slot in [2, 0, 1] {
            assert!(!table.give_back(slot));
        }
        assert!(table.find(&tokens(&[12])).is_some());
        assert_eq!(table.take(None), Some(Taken::Evicted(0)));
        assert_eq!(table.take(None), Some(Taken::Evicted(1)));
        assert_eq!(table.take(None), Some(Taken::Evicted(2)));
    }
}
