//! One batch without padding: the tokens of all sequences end to end, a shared prompt once.

use std::ops::Range;

use grail_protocol::ids::TokenId;

/// A run of rows of a [`PackedBatch`] that attends to itself, and to one earlier segment before it if it continues one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// The segment that comes before this one in its sequence.
    pub prefix: Option<SegmentIndex>,
}

/// Place of a segment in its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentIndex(usize);

impl SegmentIndex {
    pub(crate) const fn place(self) -> usize {
        self.0
    }
}

/// Tokens of several sequences end to end.
#[derive(Debug, Clone, Default)]
pub struct PackedBatch {
    tokens: Vec<i64>,
    positions: Vec<i64>,
    segments: Vec<Segment>,
}

impl PackedBatch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a sequence of its own, at positions `0..`.
    pub fn push_sequence(&mut self, tokens: &[TokenId]) -> SegmentIndex {
        self.push(tokens, 0, None)
    }

    /// Appends tokens that continue the segment `prefix`, which must be a sequence of its own.
    ///
    /// # Panics
    /// If `prefix` is of another batch or continues another segment itself.
    pub fn push_continuation(&mut self, prefix: SegmentIndex, tokens: &[TokenId]) -> SegmentIndex {
        let before = self.segment(prefix);
        assert!(before.prefix.is_none(), "a continuation continues a sequence, not another continuation");
        self.push(tokens, before.rows.len(), Some(prefix))
    }

    fn push(&mut self, tokens: &[TokenId], first_position: usize, prefix: Option<SegmentIndex>) -> SegmentIndex {
        let start = self.tokens.len();
        self.tokens.extend(tokens.iter().map(|token| i64::from(token.0)));
        self.positions.extend((first_position as i64..).take(tokens.len()));
        self.segments.push(Segment { rows: start..self.tokens.len(), prefix });
        SegmentIndex(self.segments.len() - 1)
    }

    /// Rows of the batch.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether it has no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// One segment.
    ///
    /// # Panics
    /// If `index` is of another batch.
    #[must_use]
    pub fn segment(&self, index: SegmentIndex) -> &Segment {
        self.segments.get(index.0).expect("a segment index comes from its own batch")
    }

    /// All segments in order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    pub(crate) fn tokens(&self) -> &[i64] {
        &self.tokens
    }

    pub(crate) fn positions(&self) -> &[i64] {
        &self.positions
    }

    /// Moves the positions of one segment: what a wrong implementation would do, for negative controls.
    #[cfg(test)]
    pub(crate) fn shift_positions(&mut self, index: SegmentIndex, by: i64) {
        let rows = self.segment(index).rows.clone();
        self.positions[rows].iter_mut().for_each(|position| *position += by);
    }
}
