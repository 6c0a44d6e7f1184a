//! Reading of window files, foreign ones included.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use arrow_array::{Array, RecordBatch, StructArray};
use bytes::Bytes;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::arrow::parquet_to_arrow_schema;
use parquet::errors::ParquetError;
use rayon::prelude::*;

use super::WindowFile;
use super::cells::{Column, child};
use super::commitments::Commitments;
use super::footer::{self, FooterError};
use super::metadata::{Metadata, NotANumber};
use super::row::{List, ReadCommit, ReadRollout, ReadRow};
use crate::json::{self, Object, Value};

/// Rows that are decoded at once: bounds the memory that a batch of long rows takes beside its row group's pages.
const BATCH_ROWS: usize = 128;

/// Decoded Arrow memory of a whole file above which it is given up. The largest file that is fetched (350 MiB) of honest
/// rows decodes to about 1 GiB.
const MAX_DECODED_BYTES: usize = 4 << 30;

/// Rows of a file above which it is given up: 200 times what counts for the score.
const MAX_ROWS: i64 = 1 << 20;

/// A file that yields no rows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Not readable as Parquet, or a null in `rollout_group`: a validator rejects the file (`file:corrupt_parquet`) and
    /// counts a failure.
    #[error("corrupt Parquet file: {detail}")]
    Corrupt {
        detail: String,
        #[source]
        source: Option<ParquetError>,
    },
    /// Readable, but a value cannot be converted: a validator treats the file as if it were not there.
    #[error("file counts as absent: {detail}")]
    Absent { detail: String },
}

impl ReadError {
    fn corrupt(detail: impl Into<String>) -> Self {
        Self::Corrupt { detail: detail.into(), source: None }
    }

    fn absent(detail: impl Into<String>) -> Self {
        Self::Absent { detail: detail.into() }
    }
}

impl From<ParquetError> for ReadError {
    fn from(source: ParquetError) -> Self {
        Self::Corrupt { detail: "not readable".to_owned(), source: Some(source) }
    }
}

impl From<FooterError> for ReadError {
    fn from(source: FooterError) -> Self {
        Self::corrupt(source.to_string())
    }
}

impl From<NotANumber> for ReadError {
    fn from(source: NotANumber) -> Self {
        Self::absent(source.to_string())
    }
}

/// Reads a whole file from memory, row groups in parallel on the current rayon pool.
///
/// Accepted is whatever Arrow reads: any compression, with or without dictionaries, required fields, other names of list
/// children, wider types, columns in any order. A missing column reads as null, a cell of a kind that its column cannot
/// mean as null too.
///
/// # Errors
/// [`ReadError::Corrupt`] or [`ReadError::Absent`], in the order of the reference: damage anywhere comes before a value
/// that does not convert anywhere. A file is never the cause of a panic: the library's own are caught here.
pub fn read_bytes(file: impl Into<Bytes>) -> Result<WindowFile, ReadError> {
    let file: Bytes = file.into();
    footer::check(&file)?;
    guarded(|| read(&file))
}

/// The Parquet library has assertions that damaged pages can reach.
fn guarded<T>(work: impl FnOnce() -> Result<T, ReadError>) -> Result<T, ReadError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(ReadError::corrupt("the Parquet library gave up on it")))
}

fn read(file: &Bytes) -> Result<WindowFile, ReadError> {
    // Types come from the Parquet schema alone: the embedded Arrow schema may ask for dictionaries, views or time zones
    // that change nothing in what the cells mean.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let metadata = ArrowReaderMetadata::load(file, options)?;
    let texts = metadata_texts(&metadata)?;
    let rows = metadata.metadata().row_groups().iter().fold(0_i64, |sum, group| sum.saturating_add(group.num_rows()));
    if rows > MAX_ROWS {
        return Err(ReadError::corrupt(format!("{rows} rows, more than {MAX_ROWS}")));
    }
    let decoded = AtomicUsize::new(0);
    let row_groups: Vec<Result<RowGroup, ReadError>> = (0..metadata.metadata().num_row_groups())
        .into_par_iter()
        .map(|index| guarded(|| read_row_group(file, &metadata, index, &decoded)))
        .collect();
    let row_groups = row_groups.into_iter().collect::<Result<Vec<_>, _>>()?;
    let metadata = Metadata::from_texts(&texts)?;
    let mut rows = Vec::with_capacity(row_groups.iter().map(|group| group.rows.len()).sum());
    for group in row_groups {
        if let Some(detail) = group.unconvertible {
            return Err(ReadError::absent(detail));
        }
        rows.extend(group.rows);
    }
    Ok(WindowFile { metadata, rows })
}

/// The footer's entries, and those of the embedded Arrow schema where the footer has none.
fn metadata_texts(metadata: &ArrowReaderMetadata) -> Result<HashMap<String, String>, ReadError> {
    let file = metadata.metadata().file_metadata();
    let schema = parquet_to_arrow_schema(file.schema_descr(), file.key_value_metadata())?;
    Ok(schema.metadata().clone().into())
}

/// Rows of a row group up to the first that does not convert.
struct RowGroup {
    rows: Vec<ReadRow>,
    unconvertible: Option<String>,
}

/// `decoded` counts the bytes of all row groups.
fn read_row_group(
    file: &Bytes,
    metadata: &ArrowReaderMetadata,
    index: usize,
    decoded: &AtomicUsize,
) -> Result<RowGroup, ReadError> {
    let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(file.clone(), metadata.clone())
        .with_row_groups(vec![index])
        .with_batch_size(BATCH_ROWS)
        .build()?;
    let mut group = RowGroup { rows: Vec::new(), unconvertible: None };
    for batch in reader {
        let batch = batch.map_err(|error| ReadError::from(ParquetError::from(error)))?;
        let bytes = batch.get_array_memory_size();
        if decoded.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > MAX_DECODED_BYTES {
            return Err(ReadError::corrupt(format!("the file decodes to more than {MAX_DECODED_BYTES} bytes")));
        }
        if batch.column_by_name("rollout_group").is_some_and(|column| column.null_count() > 0) {
            return Err(ReadError::corrupt("null in rollout_group"));
        }
        // After a row that does not convert, the rest is only looked at for damage.
        if group.unconvertible.is_none() {
            let first = group.rows.len();
            match (0..batch.num_rows()).map(|row| read_row(&batch, row).map_err(|detail| (row, detail))).collect() {
                Ok::<Vec<ReadRow>, _>(rows) => group.rows.extend(rows),
                Err((row, detail)) => {
                    group.unconvertible = Some(format!("row {} of row group {index}: {detail}", first + row));
                }
            }
        }
    }
    Ok(group)
}

fn read_row(batch: &RecordBatch, row: usize) -> Result<ReadRow, String> {
    let column = |name: &str| Column(batch.column_by_name(name));
    let commit = column("commit").structure(row).ok_or("commit is missing or null")?;
    Ok(ReadRow {
        window_start: column("window_start").int(row),
        block: column("block").int(row),
        nonce: column("nonce").int(row),
        block_hash: column("block_hash").string(row),
        randomness: column("randomness").string(row),
        use_drand: column("use_drand").bool(row),
        rollout_group: column("rollout_group").int(row),
        rollout_index: column("rollout_index").int(row),
        total_in_group: column("total_in_group").int(row),
        checkpoint_window: column("checkpoint_window").int(row),
        commit: read_commit(commit, row)?,
        timestamp: column("timestamp").float(row),
        challenge: column("challenge").string(row),
        hotkey: column("hotkey").string(row),
        signature: column("signature").string(row),
    })
}

/// A member that the structure lacks reads as empty; one that is null cannot be converted, except where a null is a value.
fn read_commit(commit: &StructArray, row: usize) -> Result<ReadCommit, String> {
    let model = optional_structure(child(commit, "model"), row).ok_or("model is null")?;
    let tokens = child(commit, "tokens");
    Ok(ReadCommit {
        tokens: if tokens.0.is_none() { List::Plain(Vec::new()) } else { tokens.ints(row).ok_or("tokens are null")? },
        commitments: read_commitments(child(commit, "commitments"), row)?,
        proof_version: child(commit, "proof_version").string(row),
        model_name: model.and_then(|model| child(model, "name").string(row)),
        layer_index: model.and_then(|model| child(model, "layer_index").int(row)),
        signature: child(commit, "signature").string(row),
        beacon: read_beacon(child(commit, "beacon"), row)?,
        rollout: read_rollout(child(commit, "rollout"), row)?,
    })
}

fn read_rollout(column: Column<'_>, row: usize) -> Result<ReadRollout, String> {
    let rollout = optional_structure(column, row).ok_or("rollout is null")?;
    let member = |name: &str| rollout.map_or(Column(None), |rollout| child(rollout, name));
    let logprobs = member("token_logprobs");
    Ok(ReadRollout {
        total_reward: member("total_reward").float(row),
        advantage: member("advantage").float(row),
        success: member("success").bool(row),
        token_logprobs: if logprobs.0.is_none() {
            List::Plain(Vec::new())
        } else {
            logprobs.floats(row).ok_or("token_logprobs are null")?
        },
        prompt_length: member("prompt_length").int(row),
        completion_length: member("completion_length").int(row),
    })
}

/// `Some(None)` for a missing member, `None` for a null one.
fn optional_structure(column: Column<'_>, row: usize) -> Option<Option<&StructArray>> {
    if column.0.is_none() { Some(None) } else { column.structure(row).map(Some) }
}

fn read_commitments(column: Column<'_>, row: usize) -> Result<Commitments, String> {
    if column.0.is_none() {
        return Ok(Commitments::Sketches(Vec::new()));
    }
    match column.str(row) {
        Some(text) => Commitments::parse(text).map_err(|error| format!("commitments: {error}")),
        None => Ok(Commitments::Other(column.value(row))),
    }
}

fn read_beacon(column: Column<'_>, row: usize) -> Result<Value, String> {
    if column.0.is_none() {
        return Ok(Value::Object(Object::default()));
    }
    match column.str(row) {
        Some(text) => json::parse(text).map_err(|error| format!("beacon: {error}")),
        None => Ok(column.value(row)),
    }
}
