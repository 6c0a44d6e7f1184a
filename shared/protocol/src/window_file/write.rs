//! Writing of the window file.

use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;

use arrow_schema::{ArrowError, Schema};
use parquet::arrow::arrow_writer::{ArrowColumnChunk, ArrowColumnWriter, ArrowRowGroupWriterFactory, compute_leaves};
use parquet::arrow::{ARROW_SCHEMA_META_KEY, ArrowSchemaConverter, encode_arrow_schema};
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::ColumnPath;
use rayon::prelude::*;

use super::columns::{CheckedRow, record_batch};
use super::row::Row;
use super::schema::{METADATA_KEYS, arrow_schema};
use crate::constants::WINDOW_LENGTH;
use crate::ids::{Hotkey, Nonce, WindowStart};
use crate::json::push_float;

/// A row group is closed when it holds this many tokens. About 12 MB of commitments text: small enough that all cores can
/// work on one each, large enough that the footer stays small.
const ROW_GROUP_TOKENS: usize = 1 << 19;

/// Rows that are turned into columns at once within a row group that is filled bit by bit.
const APPEND_ROWS: usize = 64;

/// Facts of the whole file.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Address of the miner; must equal the one in the object's key.
    pub wallet: Hotkey,
    pub window: WindowStart,
    /// Unix seconds.
    pub timestamp: f64,
}

/// A window file that could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// A row that no file can hold, or whose lengths contradict each other.
    #[error("row with nonce {nonce}: {detail}")]
    Row { nonce: Nonce, detail: String },
    #[error("arrange the columns of the window file")]
    Columns(#[from] ArrowError),
    #[error("encode or store the window file")]
    Parquet(#[from] ParquetError),
}

/// Writes rows as they come. The sink gets whole row groups, so memory holds at most the encoded row groups in work.
#[derive(Debug)]
pub struct Writer<W: Write + Send> {
    file: SerializedFileWriter<W>,
    factory: ArrowRowGroupWriterFactory,
    header: Header,
    open: Option<OpenRowGroup>,
    row_groups: usize,
    rows: usize,
}

/// Encodes all `rows` into `sink`, on all threads of the current rayon pool, and returns the sink.
///
/// # Errors
/// [`WriteError`]; the sink then holds a part of a file.
pub fn write_file<W: Write + Send>(sink: W, header: Header, rows: &[Row]) -> Result<W, WriteError> {
    let mut writer = Writer::new(sink, header)?;
    writer.append(rows)?;
    writer.finish()
}

impl<W: Write + Send> Writer<W> {
    /// # Errors
    /// [`WriteError::Parquet`] if the sink fails.
    pub fn new(sink: W, header: Header) -> Result<Self, WriteError> {
        let schema = arrow_schema();
        let parquet_schema = ArrowSchemaConverter::new().convert(&schema)?;
        let file = SerializedFileWriter::new(sink, parquet_schema.root_schema_ptr(), Arc::new(properties()?))?;
        let factory = ArrowRowGroupWriterFactory::new(&file, schema);
        Ok(Self { file, factory, header, open: None, row_groups: 0, rows: 0 })
    }

    /// Adds rows in the order of the file. Long slices are encoded in parallel; short ones join the row group that is open.
    ///
    /// # Errors
    /// [`WriteError::Row`] for a row that does not fit the columns, before anything of this call is written; else
    /// [`WriteError::Columns`] or [`WriteError::Parquet`], after which the writer is of no more use.
    pub fn append(&mut self, rows: &[Row]) -> Result<(), WriteError> {
        let checked: Vec<CheckedRow<'_>> = rows.iter().map(CheckedRow::new).collect::<Result<_, _>>()?;
        let mut rest = checked.as_slice();
        if self.open.is_some() {
            rest = self.fill_open(rest)?;
        }
        let mut whole = Vec::new();
        loop {
            let count = rows_of(rest, ROW_GROUP_TOKENS);
            if count == rest.len() && tokens(rest) < ROW_GROUP_TOKENS {
                break;
            }
            let (row_group, after) = rest.split_at(count);
            whole.push(row_group);
            rest = after;
        }
        self.write_row_groups(&whole)?;
        self.fill_open(rest)?;
        Ok(())
    }

    /// Rows so far.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows + self.open.as_ref().map_or(0, |open| open.rows)
    }

    /// Bytes of the file so far: those written and an estimate for the open row group.
    #[must_use]
    pub fn estimated_bytes(&self) -> usize {
        self.file.bytes_written() + self.open.as_ref().map_or(0, OpenRowGroup::estimated_bytes)
    }

    /// Writes what is left and the footer, and gives the sink back.
    ///
    /// # Errors
    /// [`WriteError`] if the sink fails.
    pub fn finish(mut self) -> Result<W, WriteError> {
        self.close_open()?;
        let texts = self.metadata_texts();
        // The same texts stand in the embedded Arrow schema and as footer entries of their own: some readers see only one.
        let schema = Schema::clone(&arrow_schema()).with_metadata(
            texts.iter().map(|(key, text)| ((*key).to_owned(), text.clone())).collect::<HashMap<_, _>>(),
        );
        self.file
            .append_key_value_metadata(KeyValue::new(ARROW_SCHEMA_META_KEY.to_owned(), encode_arrow_schema(&schema)));
        for (key, text) in texts {
            self.file.append_key_value_metadata(KeyValue::new(key.to_owned(), text));
        }
        Ok(self.file.into_inner()?)
    }

    fn metadata_texts(&self) -> [(&'static str, String); 5] {
        let [wallet, window_start, window_length, inference_count, timestamp] = METADATA_KEYS;
        [
            (wallet, self.header.wallet.0.clone()),
            (window_start, self.header.window.to_string()),
            (window_length, WINDOW_LENGTH.to_string()),
            (inference_count, self.rows.to_string()),
            (timestamp, python_float_text(self.header.timestamp)),
        ]
    }

    /// Encodes `row_groups` in parallel, a few at a time, and writes them in order.
    fn write_row_groups(&mut self, row_groups: &[&[CheckedRow<'_>]]) -> Result<(), WriteError> {
        // Twice the threads keep all of them busy while the finished ones are few enough to hold.
        for wave in row_groups.chunks(rayon::current_num_threads().max(1) * 2) {
            let (factory, first) = (&self.factory, self.row_groups);
            let encoded: Vec<Vec<ArrowColumnChunk>> = wave
                .par_iter()
                .enumerate()
                .map(|(index, rows)| {
                    let mut group = OpenRowGroup::new(factory, first + index)?;
                    group.append(rows)?;
                    group.close()
                })
                .collect::<Result<_, WriteError>>()?;
            for (columns, rows) in encoded.into_iter().zip(wave) {
                self.store(columns, rows.len())?;
            }
        }
        Ok(())
    }

    /// Adds rows to the open row group until it is full; returns those that are left.
    fn fill_open<'r, 'a>(&mut self, mut rows: &'r [CheckedRow<'a>]) -> Result<&'r [CheckedRow<'a>], WriteError> {
        while !rows.is_empty() {
            let open = match &mut self.open {
                Some(open) => open,
                none => none.insert(OpenRowGroup::new(&self.factory, self.row_groups)?),
            };
            let room = ROW_GROUP_TOKENS.saturating_sub(open.tokens);
            let (now, after) = rows.split_at(rows_of(rows, room).min(APPEND_ROWS));
            open.append(now)?;
            rows = after;
            if open.tokens >= ROW_GROUP_TOKENS {
                self.close_open()?;
                break;
            }
        }
        Ok(rows)
    }

    fn close_open(&mut self) -> Result<(), WriteError> {
        if let Some(open) = self.open.take() {
            let rows = open.rows;
            self.store(open.close()?, rows)?;
        }
        Ok(())
    }

    fn store(&mut self, columns: Vec<ArrowColumnChunk>, rows: usize) -> Result<(), WriteError> {
        let mut row_group = self.file.next_row_group()?;
        for column in columns {
            column.append_to_row_group(&mut row_group)?;
        }
        row_group.close()?;
        self.row_groups += 1;
        self.rows += rows;
        Ok(())
    }
}

/// Column writers of a row group that takes more rows.
#[derive(Debug)]
struct OpenRowGroup {
    writers: Vec<ArrowColumnWriter>,
    rows: usize,
    tokens: usize,
}

impl OpenRowGroup {
    fn new(factory: &ArrowRowGroupWriterFactory, index: usize) -> Result<Self, WriteError> {
        Ok(Self { writers: factory.create_column_writers(index)?, rows: 0, tokens: 0 })
    }

    fn append(&mut self, rows: &[CheckedRow<'_>]) -> Result<(), WriteError> {
        // Slices bound the text in memory, and a page ends with one of them.
        for rows in rows.chunks(APPEND_ROWS) {
            let batch = record_batch(rows)?;
            let mut writers = self.writers.iter_mut();
            for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
                for leaf in compute_leaves(field, column)? {
                    writers.next().expect("the writers were made from the same schema").write(&leaf)?;
                }
            }
            self.rows += rows.len();
            self.tokens += tokens(rows);
        }
        Ok(())
    }

    fn estimated_bytes(&self) -> usize {
        self.writers.iter().map(ArrowColumnWriter::get_estimated_total_bytes).sum()
    }

    fn close(self) -> Result<Vec<ArrowColumnChunk>, WriteError> {
        Ok(self.writers.into_iter().map(ArrowColumnWriter::close).collect::<Result<_, _>>()?)
    }
}

fn tokens(rows: &[CheckedRow<'_>]) -> usize {
    rows.iter().map(CheckedRow::len).sum()
}

/// The first rows that together have `wanted` tokens, all if they have fewer.
fn rows_of(rows: &[CheckedRow<'_>], wanted: usize) -> usize {
    let mut sum = 0;
    let last = rows.iter().position(|row| {
        sum += row.len();
        sum >= wanted
    });
    last.map_or(rows.len(), |last| last + 1)
}

fn properties() -> Result<WriterProperties, ParquetError> {
    // A dictionary pays where values repeat. Commitments and logprobs hardly ever do, and ids of a large vocabulary too
    // rarely: for these a hash table is built and then given up, which made the sealing of a full file a third slower.
    let path = |parts: &[&str]| ColumnPath::new(parts.iter().map(|part| (*part).to_owned()).collect());
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
        .set_dictionary_enabled(true)
        .set_statistics_enabled(EnabledStatistics::Chunk)
        .set_column_dictionary_enabled(path(&["commit", "tokens", "list", "element"]), false)
        .set_column_dictionary_enabled(path(&["commit", "commitments"]), false)
        .set_column_dictionary_enabled(path(&["commit", "rollout", "token_logprobs", "list", "element"]), false)
        .build();
    Ok(properties)
}

/// Python's `str(float)`.
fn python_float_text(value: f64) -> String {
    if value.is_finite() {
        let mut text = String::new();
        push_float(&mut text, value);
        return text;
    }
    if value.is_nan() {
        "nan".to_owned()
    } else if value > 0.0 {
        "inf".to_owned()
    } else {
        "-inf".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_spelt_as_python_spells_them() {
        for (value, text) in [
            (1_732_301_234.25, "1732301234.25"),
            (1_732_301_234.0, "1732301234.0"),
            (1e22, "1e+22"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(python_float_text(value), text);
        }
    }
}
