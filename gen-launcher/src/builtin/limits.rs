//! How long prompts and completions may be: SGLang's arithmetic, silent shortening included.

use grail_protocol::ids::TokenId;

/// Lengths that this server can serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `--context-length`, or the model's own.
    pub context_length: usize,
    /// Tokens that fit into the KV pool.
    pub kv_tokens: usize,
    pub vocab_size: usize,
}

/// A request that is refused with status 400; texts are SGLang's where it refuses too.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LengthError {
    #[error("The input_ids should not be empty.")]
    Empty,
    #[error("Input id {id} at position {position} is outside the vocabulary of {vocab_size} tokens.")]
    OutOfVocabulary { position: usize, id: i64, vocab_size: usize },
    #[error("The input ({prompt} tokens) is longer than the model's context length ({context} tokens).")]
    LongerThanContext { prompt: usize, context: usize },
    #[error(
        "Requested token count exceeds the model's maximum context length of {context} tokens. You requested a total of \
         {total} tokens: {prompt} tokens from the input messages and {new} tokens for the completion. Please reduce the \
         number of tokens in the input messages or the completion to fit within the limit."
    )]
    TotalExceedsContext { prompt: usize, new: usize, total: usize, context: usize },
    #[error(
        "Input length ({prompt} tokens) exceeds the maximum allowed length ({allowed} tokens). Use a shorter input or \
         enable --allow-auto-truncate."
    )]
    PromptTooLong { prompt: usize, allowed: usize },
}

impl Limits {
    /// Most tokens of one request, prompt and completion together, plus one.
    #[must_use]
    pub fn max_request_tokens(&self) -> usize {
        self.context_length.saturating_sub(1).min(self.kv_tokens.saturating_sub(1))
    }

    /// A prompt this long is refused.
    #[must_use]
    pub fn max_prompt_tokens(&self) -> usize {
        self.max_request_tokens().saturating_sub(5)
    }

    /// Checks ids against the vocabulary: a GPU server dies of the first one outside, this one refuses it.
    ///
    /// # Errors
    /// [`LengthError::Empty`], [`LengthError::OutOfVocabulary`]
    pub fn prompt(&self, ids: &[i64]) -> Result<Vec<TokenId>, LengthError> {
        if ids.is_empty() {
            return Err(LengthError::Empty);
        }
        ids.iter()
            .enumerate()
            .map(|(position, &id)| match u32::try_from(id) {
                Ok(token) if (token as usize) < self.vocab_size => Ok(TokenId(token)),
                _ => Err(LengthError::OutOfVocabulary { position, id, vocab_size: self.vocab_size }),
            })
            .collect()
    }

    /// How many tokens a request gets that asks for `new` (`None` = as many as fit). The answer may be one or two fewer than
    /// asked although the request was accepted: the scheduler keeps two tokens of the context for itself.
    ///
    /// # Errors
    /// [`LengthError`]
    pub fn budget(&self, prompt: usize, new: Option<usize>) -> Result<usize, LengthError> {
        let context = self.context_length;
        if prompt >= context {
            return Err(LengthError::LongerThanContext { prompt, context });
        }
        if let Some(new) = new
            && prompt + new > context
        {
            return Err(LengthError::TotalExceedsContext { prompt, new, total: prompt + new, context });
        }
        let allowed = self.max_prompt_tokens();
        if prompt >= allowed {
            return Err(LengthError::PromptTooLong { prompt, allowed });
        }
        let room = self.max_request_tokens() - prompt - 1;
        Ok(new.unwrap_or(room).min(room))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { context_length: 4104, kv_tokens: 400_000, vocab_size: 259 };

    #[test]
    fn the_last_two_tokens_of_the_context_are_never_given() {
        // As recorded from a real server: 102, 103 and 104 asked, 102 given; 105 refused.
        for (asked, given) in [(1, 1), (101, 101), (102, 102), (103, 102), (104, 102)] {
            assert_eq!(LIMITS.budget(4000, Some(asked)), Ok(given), "{asked} asked");
        }
        assert_eq!(LIMITS.budget(4000, None), Ok(102));
        let refused = LIMITS.budget(4000, Some(105)).unwrap_err();
        assert_eq!(refused, LengthError::TotalExceedsContext { prompt: 4000, new: 105, total: 4105, context: 4104 });
    }

    #[test]
    fn prompts_end_six_tokens_before_the_context() {
        assert_eq!(LIMITS.budget(4097, Some(1)), Ok(1));
        assert_eq!(LIMITS.budget(4097, None), Ok(5));
        assert_eq!(LIMITS.budget(4098, Some(1)), Err(LengthError::PromptTooLong { prompt: 4098, allowed: 4098 }));
        assert_eq!(LIMITS.budget(4104, Some(0)), Err(LengthError::LongerThanContext { prompt: 4104, context: 4104 }));
    }

    #[test]
    fn a_small_pool_binds_before_the_context() {
        let small = Limits { kv_tokens: 100, ..LIMITS };
        assert_eq!(small.budget(60, Some(50)), Ok(38));
        assert_eq!(small.budget(93, Some(50)), Ok(5));
        assert_eq!(small.budget(94, Some(1)), Err(LengthError::PromptTooLong { prompt: 94, allowed: 94 }));
    }

    #[test]
    fn ids_are_checked_against_the_vocabulary() {
        assert_eq!(LIMITS.prompt(&[0, 258]), Ok(vec![TokenId(0), TokenId(258)]));
        assert_eq!(LIMITS.prompt(&[]), Err(LengthError::Empty));
        for id in [259, -1, 999_999, i64::MAX] {
            let error = LengthError::OutOfVocabulary { position: 1, id, vocab_size: 259 };
            assert_eq!(LIMITS.prompt(&[0, id]), Err(error));
        }
    }
}
