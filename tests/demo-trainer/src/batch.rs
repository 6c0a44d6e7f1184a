//! Training batches: what all prompts begin with once, then one row for each task with the rest of its prompt and its
//! completions end to end.

use anyhow::Context as _;
use grail_protocol::ids::TokenId;

/// A task with completions to learn.
#[derive(Debug, Clone)]
pub struct Example<'a> {
    /// The prompt behind the common prefix; not empty.
    pub prompt: &'a [TokenId],
    /// With the end token; none of them empty.
    pub completions: Vec<Vec<TokenId>>,
}

/// Flat arrays of one batch; row `r`, place `c` lies at `r · width + c`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub prefix: Vec<i64>,
    pub rows: usize,
    pub width: usize,
    pub tokens: Vec<i64>,
    /// Position in its own sequence.
    pub positions: Vec<i64>,
    /// 0 = prompt, 1.. = completion, −1 = filling.
    pub segments: Vec<i64>,
    /// By target: the place that predicts it, counted over the prefix and then the rows.
    pub sources: Vec<i64>,
    pub targets: Vec<i64>,
}

impl Batch {
    /// Lays the examples out; rows are filled up to the longest one.
    ///
    /// # Errors
    /// If a prompt or a completion is empty.
    pub fn new(prefix: &[TokenId], examples: &[Example<'_>]) -> anyhow::Result<Self> {
        let length =
            |example: &Example<'_>| example.prompt.len() + example.completions.iter().map(Vec::len).sum::<usize>();
        let width = examples.iter().map(length).max().context("a batch needs an example")?;
        let size = examples.len() * width;
        let mut batch = Self {
            prefix: prefix.iter().map(|token| i64::from(token.0)).collect(),
            rows: examples.len(),
            width,
            tokens: Vec::with_capacity(size),
            positions: Vec::with_capacity(size),
            segments: Vec::with_capacity(size),
            sources: Vec::new(),
            targets: Vec::new(),
        };
        for example in examples {
            batch.push(example)?;
            let end = batch.tokens.len().next_multiple_of(width);
            batch.tokens.resize(end, 0);
            batch.positions.resize(end, 0);
            batch.segments.resize(end, -1);
        }
        Ok(batch)
    }

    fn push(&mut self, example: &Example<'_>) -> anyhow::Result<()> {
        self.extend(example.prompt, 0, self.prefix.len());
        let prompt_end = self.prefix.len() + example.prompt.len();
        let last = self.place_of_last();
        anyhow::ensure!(!example.prompt.is_empty(), "a prompt to train on has nothing behind the common prefix");
        for (segment, completion) in (1..).zip(&example.completions) {
            anyhow::ensure!(!completion.is_empty(), "a completion to train on is empty");
            let first = self.place_of_last() + 1;
            self.extend(completion, segment, prompt_end);
            self.sources.push(last);
            self.sources.extend((first..).take(completion.len() - 1));
            self.targets.extend(completion.iter().map(|token| i64::from(token.0)));
        }
        Ok(())
    }

    fn extend(&mut self, tokens: &[TokenId], segment: i64, first_position: usize) {
        self.tokens.extend(tokens.iter().map(|token| i64::from(token.0)));
        self.positions.extend((first_position as i64..).take(tokens.len()));
        self.segments.extend(std::iter::repeat_n(segment, tokens.len()));
    }

    fn place_of_last(&self) -> i64 {
        (self.prefix.len() + self.tokens.len()) as i64 - 1
    }

    /// Positions that a forward pass computes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.prefix.len() + self.tokens.len()
    }

    /// Whether nothing is computed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What all prompts begin with; shorter than each of them, so that something is left of every prompt.
#[must_use]
pub fn common_prefix(prompts: &[Vec<TokenId>]) -> &[TokenId] {
    let Some((first, rest)) = prompts.split_first() else { return &[] };
    let longest = prompts.iter().map(Vec::len).min().unwrap_or_default().saturating_sub(1);
    let shared = rest
        .iter()
        .fold(longest, |shared, prompt| first.iter().zip(prompt).take(shared).take_while(|(a, b)| a == b).count());
    &first[..shared]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    #[test]
    fn rows_hold_prompt_and_completions() {
        let (first, second) = (tokens(&[1, 2]), tokens(&[3]));
        let examples = [
            Example { prompt: &first, completions: vec![tokens(&[10, 11, 12]), tokens(&[13])] },
            Example { prompt: &second, completions: vec![tokens(&[14, 15])] },
        ];
        let batch = Batch::new(&tokens(&[7, 8, 9]), &examples).unwrap();
        assert_eq!((batch.rows, batch.width, batch.len()), (2, 6, 15));
        assert_eq!(batch.tokens, [1, 2, 10, 11, 12, 13, 3, 14, 15, 0, 0, 0]);
        assert_eq!(batch.positions, [3, 4, 5, 6, 7, 5, 3, 4, 5, 0, 0, 0]);
        assert_eq!(batch.segments, [0, 0, 1, 1, 1, 2, 0, 1, 1, -1, -1, -1]);
        assert_eq!(batch.targets, [10, 11, 12, 13, 14, 15]);
        // The prefix takes places 0..3.
        assert_eq!(batch.sources, [4, 5, 6, 4, 9, 10]);
    }

    #[test]
    fn empty_parts_are_refused() {
        let prompt = tokens(&[1]);
        assert!(Batch::new(&[], &[]).is_err());
        assert!(Batch::new(&[], &[Example { prompt: &[], completions: vec![tokens(&[1])] }]).is_err());
        assert!(Batch::new(&[], &[Example { prompt: &prompt, completions: vec![vec![]] }]).is_err());
    }

    #[test]
    fn the_common_prefix_leaves_something_of_every_prompt() {
        assert_eq!(common_prefix(&[tokens(&[1, 2, 3]), tokens(&[1, 2, 4, 5])]), tokens(&[1, 2]));
        assert_eq!(common_prefix(&[tokens(&[1, 2]), tokens(&[1, 2, 4])]), tokens(&[1]));
        assert_eq!(common_prefix(&[tokens(&[1, 2])]), tokens(&[1]));
        assert!(common_prefix(&[]).is_empty());
    }
}
