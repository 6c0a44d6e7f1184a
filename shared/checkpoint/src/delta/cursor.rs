//! The walk over the changes of one tensor.

use super::DeltaError;
use super::payload::Payload;
use super::tensor::{Indices, Layout, TensorDelta};

/// Changes decoded at once.
const BLOCK_CHANGES: u64 = 8192;

/// Some changes of a tensor, in ascending order of position.
#[derive(Debug, Clone, Copy)]
pub struct Changes<'a> {
    /// Positions in C order.
    pub positions: &'a [u64],
    /// The new values end to end, raw bits in little-endian order.
    pub values: &'a [u8],
}

/// Walks over the changes of one tensor, block by block.
#[derive(Debug)]
pub struct Cursor<'a> {
    payload: &'a Payload,
    name: &'a str,
    tensor: &'a TensorDelta,
    /// Number of the next change to be decoded.
    next: u64,
    row: i64,
    /// Column in the row; the whole position for flat indices.
    column: i64,
    last: i64,
    disorder: Option<u64>,
    raw: Vec<u8>,
    rows: Vec<i64>,
    columns: Vec<i64>,
    positions: Vec<u64>,
    values: Vec<u8>,
    /// How many of the decoded changes were applied.
    applied: usize,
}

impl<'a> Cursor<'a> {
    pub(super) const fn new(payload: &'a Payload, name: &'a str, tensor: &'a TensorDelta) -> Self {
        Self {
            payload,
            name,
            tensor,
            next: 0,
            row: 0,
            column: 0,
            last: -1,
            disorder: None,
            raw: Vec::new(),
            rows: Vec::new(),
            columns: Vec::new(),
            positions: Vec::new(),
            values: Vec::new(),
            applied: 0,
        }
    }

    /// The next changes; `None` after the last.
    ///
    /// # Errors
    /// [`DeltaError::IndexRange`], or [`DeltaError::Io`] if the payload cannot be read any more.
    pub fn next_block(&mut self) -> Result<Option<Changes<'_>>, DeltaError> {
        let (first, count) = (self.next, self.next_positions()?);
        if count == 0 {
            return Ok(None);
        }
        let width = self.tensor.width;
        self.values.resize(self.positions.len() * width, 0);
        self.payload.read_at(&mut self.values, self.tensor.values + first * width as u64)?;
        self.applied = 0;
        Ok(Some(Changes { positions: &self.positions, values: &self.values }))
    }

    /// Decodes the next positions and returns how many there are.
    fn next_positions(&mut self) -> Result<u64, DeltaError> {
        let count = BLOCK_CHANGES.min(self.tensor.listed - self.next);
        if count == 0 {
            return Ok(0);
        }
        match self.tensor.layout {
            Layout::Flat(indices) => {
                self.read_indices(indices, count, Part::Columns)?;
                self.walk_flat()?;
            }
            Layout::RowColumn { rows, columns } => {
                self.read_indices(rows, count, Part::Rows)?;
                self.read_indices(columns, count, Part::Columns)?;
                self.walk_rows()?;
            }
        }
        self.next += count;
        Ok(count)
    }

    /// Reads all positions.
    ///
    /// # Errors
    /// [`DeltaError::IndexRange`] for the first position outside the tensor, else [`DeltaError::Order`] for the first that
    /// does not ascend.
    pub(super) fn check(mut self) -> Result<(), DeltaError> {
        while self.next_positions()? > 0 {}
        match self.disorder {
            None => Ok(()),
            Some(change) => Err(DeltaError::Order { tensor: self.name.to_owned(), change }),
        }
    }

    /// Overwrites what is changed of a block of the tensor that begins at element `first`. The blocks of a tensor come one
    /// after the other, without a gap.
    pub(crate) fn apply(&mut self, first: u64, block: &mut [u8]) -> Result<(), DeltaError> {
        let width = self.tensor.width;
        let end = first + (block.len() / width) as u64;
        loop {
            if self.applied == self.positions.len() && self.next_block()?.is_none() {
                return Ok(());
            }
            let pending = &self.positions[self.applied..];
            let inside = pending.partition_point(|position| *position < end);
            let values = &self.values[self.applied * width..];
            match width {
                2 => scatter::<2>(first, &pending[..inside], values, block),
                _ => scatter::<4>(first, &pending[..inside], values, block),
            }
            self.applied += inside;
            if self.applied < self.positions.len() {
                return Ok(());
            }
        }
    }

    fn read_indices(&mut self, indices: Indices, count: u64, part: Part) -> Result<(), DeltaError> {
        let bytes = indices.dtype.bytes();
        // A block is small, so its size fits any machine's.
        self.raw.resize(usize::try_from(count * bytes).unwrap_or(0), 0);
        self.payload.read_at(&mut self.raw, indices.at + self.next * bytes)?;
        let into = match part {
            Part::Rows => &mut self.rows,
            Part::Columns => &mut self.columns,
        };
        indices.dtype.read(&self.raw, into);
        Ok(())
    }

    fn walk_flat(&mut self) -> Result<(), DeltaError> {
        self.positions.clear();
        let elements = self.tensor.rows * self.tensor.columns;
        for index in 0..self.columns.len() {
            self.column += self.columns[index];
            if !(0..elements).contains(&self.column) {
                return Err(self.out_of_range(index));
            }
            self.push(index, self.column);
        }
        Ok(())
    }

    fn walk_rows(&mut self) -> Result<(), DeltaError> {
        self.positions.clear();
        for index in 0..self.rows.len() {
            let step = self.rows[index];
            let is_first = self.next == 0 && index == 0;
            self.row += step;
            self.column = if is_first || step != 0 { self.columns[index] } else { self.column + self.columns[index] };
            if !(0..self.tensor.rows).contains(&self.row) || !(0..self.tensor.columns).contains(&self.column) {
                return Err(self.out_of_range(index));
            }
            self.push(index, self.row * self.tensor.columns + self.column);
        }
        Ok(())
    }

    /// Takes a position that is inside the tensor.
    fn push(&mut self, index: usize, position: i64) {
        if position <= self.last && self.disorder.is_none() {
            self.disorder = Some(self.next + index as u64);
        }
        self.last = position;
        self.positions.push(position.unsigned_abs());
    }

    fn out_of_range(&self, index: usize) -> DeltaError {
        DeltaError::IndexRange { tensor: self.name.to_owned(), change: self.next + index as u64 }
    }
}

#[derive(Clone, Copy)]
enum Part {
    Rows,
    Columns,
}

/// Writes each value to its position; values beyond the positions are left alone.
fn scatter<const WIDTH: usize>(first: u64, positions: &[u64], values: &[u8], block: &mut [u8]) {
    let (elements, _) = block.as_chunks_mut::<WIDTH>();
    for (position, value) in positions.iter().zip(values.as_chunks::<WIDTH>().0) {
        let element = usize::try_from(position.wrapping_sub(first)).ok().and_then(|place| elements.get_mut(place));
        if let Some(element) = element {
            *element = *value;
        }
    }
}
