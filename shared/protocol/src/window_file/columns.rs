//! Arrow columns of a slice of rows, built in one pass each and without builders: the lists go straight into their buffers.

use std::sync::Arc;

use arrow_array::{
    ArrayRef, BooleanArray, Float32Array, Float64Array, Int32Array, Int64Array, ListArray, RecordBatch, StringArray,
    StructArray,
};
use arrow_buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{ArrowError, DataType};

use super::row::Row;
use super::schema::{arrow_schema, commit_fields, element, model_fields, rollout_fields};
use super::write::WriteError;
use crate::binding::push_spaced_commitments;
use crate::constants::{GRAIL_PROOF_VERSION, LAYER_INDEX, ROLLOUTS_PER_PROBLEM};

/// Text of a commitment with a ten-digit sketch: `{"sketch": 2147483646}, `.
const COMMITMENT_BYTES: usize = 24;

/// [`ROLLOUTS_PER_PROBLEM`] in the type of its column.
const TOTAL_IN_GROUP: i32 = 16;
const _: () = assert!(TOTAL_IN_GROUP as usize == ROLLOUTS_PER_PROBLEM);

/// A row whose numbers are known to fit the columns.
#[derive(Debug)]
pub(super) struct CheckedRow<'a> {
    pub(super) row: &'a Row,
    pub(super) window_start: i64,
    pub(super) block: i64,
    pub(super) checkpoint_window: i64,
    pub(super) prompt_length: i32,
    pub(super) completion_length: i32,
}

impl<'a> CheckedRow<'a> {
    /// # Errors
    /// [`WriteError::Row`] if a number does not fit its column or the lengths contradict each other.
    pub(super) fn new(row: &'a Row) -> Result<Self, WriteError> {
        let problem = |detail: String| WriteError::Row { nonce: row.nonce(), detail };
        let commit = &row.commit;
        let tokens = commit.tokens.len();
        let prompt = commit.rollout.prompt_length as usize;
        let completion = commit.rollout.completion_logprobs.len();
        if prompt + completion != tokens {
            return Err(problem(format!("{prompt} prompt tokens and {completion} logprobs for {tokens} tokens")));
        }
        if commit.sketches.len() != tokens {
            return Err(problem(format!("{} sketches for {tokens} tokens", commit.sketches.len())));
        }
        if let Some(token) = commit.tokens.iter().find(|token| i32::try_from(token.0).is_err()) {
            return Err(problem(format!("token {token} does not fit 32 bits with sign")));
        }
        let length = |length: usize| i32::try_from(length).map_err(|_| problem(format!("{length} tokens")));
        let column = |number: u64| i64::try_from(number).map_err(|_| problem(format!("block {number}")));
        Ok(Self {
            row,
            window_start: column(row.window.block().0)?,
            block: column(row.block.0)?,
            checkpoint_window: column(row.checkpoint.0)?,
            prompt_length: length(prompt)?,
            completion_length: length(completion)?,
        })
    }

    /// Tokens of prompt and completion.
    pub(super) fn len(&self) -> usize {
        self.row.commit.tokens.len()
    }

    pub(super) fn tokens(&self) -> impl Iterator<Item = i32> + '_ {
        // `new` has refused what does not fit, so the cast keeps every value.
        self.row.commit.tokens.iter().map(|token| token.0.cast_signed())
    }

    /// Zeros for the prompt, then the logprobs.
    pub(super) fn token_logprobs(&self) -> impl Iterator<Item = f32> + '_ {
        let rollout = &self.row.commit.rollout;
        std::iter::repeat_n(0.0, rollout.prompt_length as usize).chain(rollout.completion_logprobs.iter().copied())
    }
}

/// The columns of `rows`, which must be few enough that the text of their commitments stays below 2 GiB.
pub(super) fn record_batch(rows: &[CheckedRow<'_>]) -> Result<RecordBatch, ArrowError> {
    let block_hash = strings(rows, |row| &row.row.block_hash.0);
    let randomness = strings(rows, |row| row.row.commit.randomness.as_hex());
    let columns: Vec<ArrayRef> = vec![
        longs(rows, |row| row.window_start),
        longs(rows, |row| row.block),
        longs(rows, |row| row.row.nonce().0),
        block_hash,
        randomness,
        Arc::new(BooleanArray::from_iter(rows.iter().map(|row| Some(row.row.use_drand)))),
        longs(rows, |row| row.row.group.0),
        ints(rows, |row| i32::from(row.row.rollout.get())),
        ints(rows, |_| TOTAL_IN_GROUP),
        longs(rows, |row| row.checkpoint_window),
        commit(rows)?,
        doubles(rows, |row| row.row.timestamp),
        owned_strings(rows, |row| row.row.challenge()),
        strings(rows, |row| &row.row.hotkey.0),
        strings(rows, |row| &row.row.signature),
    ];
    RecordBatch::try_new(arrow_schema(), columns)
}

fn commit(rows: &[CheckedRow<'_>]) -> Result<ArrayRef, ArrowError> {
    let model: Vec<ArrayRef> = vec![strings(rows, |row| &row.row.commit.model_name), ints(rows, |_| LAYER_INDEX)];
    let columns: Vec<ArrayRef> = vec![
        tokens(rows)?,
        commitments(rows)?,
        strings(rows, |_| GRAIL_PROOF_VERSION),
        Arc::new(StructArray::try_new(model_fields(), model, None)?),
        strings(rows, |row| &row.row.commit.signature),
        owned_strings(rows, |row| format!("{{\"randomness\": \"{}\"}}", row.row.commit.randomness.as_hex())),
        rollout(rows)?,
    ];
    Ok(Arc::new(StructArray::try_new(commit_fields(), columns, None)?))
}

fn rollout(rows: &[CheckedRow<'_>]) -> Result<ArrayRef, ArrowError> {
    let columns: Vec<ArrayRef> = vec![
        doubles(rows, |row| row.row.commit.rollout.total_reward),
        doubles(rows, |row| row.row.commit.rollout.advantage),
        Arc::new(BooleanArray::from_iter(rows.iter().map(|row| Some(row.row.commit.rollout.success)))),
        logprobs(rows)?,
        ints(rows, |row| row.prompt_length),
        ints(rows, |row| row.completion_length),
    ];
    Ok(Arc::new(StructArray::try_new(rollout_fields(), columns, None)?))
}

fn tokens(rows: &[CheckedRow<'_>]) -> Result<ArrayRef, ArrowError> {
    let mut values: Vec<i32> = Vec::with_capacity(rows.iter().map(CheckedRow::len).sum());
    rows.iter().for_each(|row| values.extend(row.tokens()));
    list(rows, DataType::Int32, Arc::new(Int32Array::from(values)))
}

fn logprobs(rows: &[CheckedRow<'_>]) -> Result<ArrayRef, ArrowError> {
    let mut values: Vec<f32> = Vec::with_capacity(rows.iter().map(CheckedRow::len).sum());
    rows.iter().for_each(|row| values.extend(row.token_logprobs()));
    list(rows, DataType::Float32, Arc::new(Float32Array::from(values)))
}

/// A list column whose rows have the lengths of the sequences.
fn list(rows: &[CheckedRow<'_>], data_type: DataType, values: ArrayRef) -> Result<ArrayRef, ArrowError> {
    let offsets = OffsetBuffer::from_lengths(rows.iter().map(CheckedRow::len));
    Ok(Arc::new(ListArray::try_new(element(data_type), offsets, values, None)?))
}

fn commitments(rows: &[CheckedRow<'_>]) -> Result<ArrayRef, ArrowError> {
    let tokens: usize = rows.iter().map(CheckedRow::len).sum();
    let mut text = String::with_capacity(tokens * COMMITMENT_BYTES + rows.len() * 2);
    let mut offsets: Vec<i32> = Vec::with_capacity(rows.len() + 1);
    offsets.push(0);
    for row in rows {
        push_spaced_commitments(&mut text, &row.row.commit.sketches);
        let end = i32::try_from(text.len())
            .map_err(|_| ArrowError::InvalidArgumentError("commitments of one row group above 2 GiB".to_owned()))?;
        offsets.push(end);
    }
    let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
    Ok(Arc::new(StringArray::try_new(offsets, Buffer::from(text.into_bytes()), None)?))
}

fn strings<'a>(rows: &'a [CheckedRow<'a>], cell: impl Fn(&'a CheckedRow<'a>) -> &'a str) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(rows.iter().map(cell)))
}

fn owned_strings<'a>(rows: &'a [CheckedRow<'a>], cell: impl Fn(&'a CheckedRow<'a>) -> String) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(rows.iter().map(cell)))
}

fn longs<'a>(rows: &'a [CheckedRow<'a>], cell: impl Fn(&'a CheckedRow<'a>) -> i64) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(rows.iter().map(cell)))
}

fn ints<'a>(rows: &'a [CheckedRow<'a>], cell: impl Fn(&'a CheckedRow<'a>) -> i32) -> ArrayRef {
    Arc::new(Int32Array::from_iter_values(rows.iter().map(cell)))
}

fn doubles<'a>(rows: &'a [CheckedRow<'a>], cell: impl Fn(&'a CheckedRow<'a>) -> f64) -> ArrayRef {
    Arc::new(Float64Array::from_iter_values(rows.iter().map(cell)))
}
