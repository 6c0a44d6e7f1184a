//! The numbers that one packed batch needs on the device, in one upload.

use std::ops::Range;

use tch::{TchError, Tensor};

use super::attention::Attention;
use super::tiles::Work;
use crate::packed::PackedBatch;

/// Which rows of a batch predict which tokens.
#[derive(Debug, Default, Clone)]
pub(crate) struct Predictions {
    /// Rows of the batch, in any order and as often as wanted.
    pub rows: Vec<i32>,
    /// By row: the token whose log-softmax is wanted.
    pub targets: Vec<i32>,
    /// By row: the EOS token whose probability is wanted too, or −1.
    pub eos: Vec<i32>,
}

/// A batch on the device. All numbers are i32, in one tensor.
#[derive(Debug)]
pub(crate) struct Layout {
    numbers: Tensor,
    tokens: Range<usize>,
    positions: Range<usize>,
    key_sources: Range<usize>,
    query_offsets: Range<usize>,
    key_offsets: Range<usize>,
    rows: Range<usize>,
    targets: Range<usize>,
    eos: Range<usize>,
    /// Starts and tiles of attention by the kernel for Hopper.
    work: Option<[Range<usize>; 2]>,
    pub most_queries: i64,
    pub most_keys: i64,
}

/// Numbers on the host before they are uploaded, with the part that each list takes.
#[derive(Default)]
struct Numbers(Vec<i32>);

impl Numbers {
    fn push(&mut self, values: impl IntoIterator<Item = i32>) -> Range<usize> {
        let start = self.0.len();
        self.0.extend(values);
        start..self.0.len()
    }

    /// Pieces of four numbers that a kernel reads as one; libtorch's memory is aligned by more.
    fn push_fours(&mut self, values: &[[i32; 4]]) -> Range<usize> {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self.push(values.as_flattened().iter().copied())
    }
}

/// Rows, offsets and tokens fit: a batch is far below 2^31 rows, and tokens are below the vocabulary.
pub(super) fn narrow(value: usize) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

/// By key row: the row of the batch that it is taken from; offsets of queries and of keys by segment.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sequences {
    key_sources: Vec<i32>,
    query_offsets: Vec<i32>,
    key_offsets: Vec<i32>,
    most_queries: usize,
    most_keys: usize,
}

impl Sequences {
    /// Every segment's keys end to end, a shared prefix again before each segment that continues it.
    fn end_to_end(batch: &PackedBatch) -> Self {
        let mut found = Self { query_offsets: vec![0], key_offsets: vec![0], ..Self::default() };
        for segment in batch.segments() {
            let prefix = segment.prefix.map(|prefix| batch.segment(prefix).rows.clone()).unwrap_or_default();
            let keys = prefix.len() + segment.rows.len();
            found.key_sources.extend(prefix.chain(segment.rows.clone()).map(narrow));
            found.query_offsets.push(narrow(segment.rows.end));
            found.key_offsets.push(narrow(found.key_sources.len()));
            found.most_queries = found.most_queries.max(segment.rows.len());
            found.most_keys = found.most_keys.max(keys);
        }
        found
    }

    /// Every row once and in its place, for attention that finds the prefix itself.
    fn in_place(batch: &PackedBatch) -> Self {
        Self { key_sources: (0..batch.len()).map(narrow).collect(), ..Self::default() }
    }
}

impl Layout {
    /// Puts the numbers together and has `upload` bring them to where they are needed.
    pub(crate) fn new(
        batch: &PackedBatch,
        predictions: &Predictions,
        attention: Attention,
        upload: impl FnOnce(&[i32]) -> Result<Tensor, TchError>,
    ) -> Result<Self, TchError> {
        let sequences = match attention {
            Attention::Varlen(_) | Attention::Hopper(_) => Sequences::end_to_end(batch),
            Attention::PerSequence => Sequences::in_place(batch),
        };
        let mut numbers = Numbers::default();
        let work = match attention {
            Attention::Hopper(own) => {
                let Work { starts, tiles } = own.tiling.deal(&sequences.query_offsets, &sequences.key_offsets);
                Some([numbers.push(starts), numbers.push_fours(&tiles)])
            }
            Attention::Varlen(_) | Attention::PerSequence => None,
        };
        // Tokens and positions are far below 2^31.
        let in_batch = |value: &i64| i32::try_from(*value).unwrap_or(i32::MAX);
        Ok(Self {
            tokens: numbers.push(batch.tokens().iter().map(in_batch)),
            positions: numbers.push(batch.positions().iter().map(in_batch)),
            key_sources: numbers.push(sequences.key_sources),
            query_offsets: numbers.push(sequences.query_offsets),
            key_offsets: numbers.push(sequences.key_offsets),
            rows: numbers.push(predictions.rows.iter().copied()),
            targets: numbers.push(predictions.targets.iter().copied()),
            eos: numbers.push(predictions.eos.iter().copied()),
            work,
            most_queries: sequences.most_queries as i64,
            most_keys: sequences.most_keys as i64,
            numbers: upload(&numbers.0)?,
        })
    }

    fn part(&self, range: &Range<usize>) -> Result<Tensor, TchError> {
        self.numbers.f_narrow(0, range.start as i64, range.len() as i64)
    }

    pub(crate) fn tokens(&self) -> Result<Tensor, TchError> {
        self.part(&self.tokens)
    }

    pub(crate) fn positions(&self) -> Result<Tensor, TchError> {
        self.part(&self.positions)
    }

    pub(crate) fn key_sources(&self) -> Result<Tensor, TchError> {
        self.part(&self.key_sources)
    }

    /// Of queries and of keys.
    pub(crate) fn offsets(&self) -> Result<[Tensor; 2], TchError> {
        Ok([self.part(&self.query_offsets)?, self.part(&self.key_offsets)?])
    }

    /// Rows, targets and EOS tokens of some of the predictions.
    pub(crate) fn predictions(&self, some: Range<usize>) -> Result<[Tensor; 3], TchError> {
        let of = |all: &Range<usize>| self.part(&(all.start + some.start..all.start + some.end));
        Ok([of(&self.rows)?, of(&self.targets)?, of(&self.eos)?])
    }

    /// Starts and tiles for the kernel for Hopper.
    ///
    /// # Errors
    /// The layout was made for other attention.
    pub(crate) fn work(&self) -> Result<[Tensor; 2], TchError> {
        let [starts, tiles] =
            self.work.as_ref().ok_or_else(|| TchError::Shape("a layout without tiles of attention".to_owned()))?;
        Ok([self.part(starts)?, self.part(tiles)?])
    }

    pub(crate) fn rows(&self) -> i64 {
        self.tokens.len() as i64
    }

    pub(crate) fn key_rows(&self) -> i64 {
        self.key_sources.len() as i64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use grail_protocol::ids::TokenId;

    #[test]
    fn a_shared_prefix_stands_before_each_segment_that_continues_it() {
        let tokens: Vec<TokenId> = (0..9).map(TokenId).collect();
        let mut batch = PackedBatch::new();
        let prompt = batch.push_sequence(&tokens[..2]);
        batch.push_continuation(prompt, &tokens[..3]);
        batch.push_continuation(prompt, &tokens[..1]);
        batch.push_sequence(&tokens[..2]);
        assert_eq!(
            Sequences::end_to_end(&batch),
            Sequences {
                key_sources: vec![0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7],
                query_offsets: vec![0, 2, 5, 6, 8],
                key_offsets: vec![0, 2, 7, 10, 12],
                most_queries: 3,
                most_keys: 5,
            }
        );
        assert_eq!(Sequences::in_place(&batch).key_sources, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn what_is_uploaded_is_found_again() {
        let tokens: Vec<TokenId> = (4..9).map(TokenId).collect();
        let mut batch = PackedBatch::new();
        let prompt = batch.push_sequence(&tokens[..2]);
        batch.push_continuation(prompt, &tokens[2..]);
        let predictions = Predictions { rows: vec![1, 2, 3], targets: vec![6, 7, 8], eos: vec![-1, -1, 5] };
        let layout = Layout::new(&batch, &predictions, Attention::PerSequence, Tensor::f_from_slice).unwrap();
        let values = |part: Tensor| Vec::<i32>::try_from(part).unwrap();
        assert_eq!(values(layout.tokens().unwrap()), [4, 5, 6, 7, 8]);
        assert_eq!(values(layout.positions().unwrap()), [0, 1, 2, 3, 4]);
        assert_eq!(layout.predictions(1..3).unwrap().map(values), [vec![2, 3], vec![7, 8], vec![-1, 5]]);
    }
}
