//! Files of rows: JSON lines, compressed or not, Parquet, and Arrow streams. What a file is, is told by its first bytes.

use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;
use arrow_ipc::reader::StreamReader;
use arrow_schema::ArrowError;
use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::errors::ParquetError;
use serde_json::{Map, Value};

use super::columns::BatchRow;
use super::row::{FieldError, Row};

/// Largest file, also when uncompressed; the largest real one has 4.2 MB.
pub(super) const MAX_BYTES: u64 = 64 << 20;

const GZIP: &[u8] = &[0x1f, 0x8b];
const PARQUET: &[u8] = b"PAR1";
/// Start of a message in an Arrow stream; the file format starts with its own name instead.
const ARROW_STREAM: &[u8] = &[0xff; 4];

/// Why a file of rows is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// Missing or unreadable.
    #[error("reading {}: {source}; check the path and its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system or the decompressor said.
        #[source]
        source: std::io::Error,
    },
    /// Larger than any file that it could be.
    #[error("{} holds more than {MAX_BYTES} bytes, so it is no file of this data set; check the path", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A line is no JSON object.
    #[error("{} line {line}: {source}; each line must be a JSON object", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A column of a row has the wrong type.
    #[error("{} row {row}: {source}; check that this is a file of the data set", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Number of the row, from 1.
        row: usize,
        /// What is wrong with it.
        #[source]
        source: FieldError,
    },
    /// Damaged Parquet.
    #[error("{} as Parquet: {source}; fetch the file again", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        #[source]
        source: ParquetError,
    },
    /// Damaged Arrow.
    #[error("{} as Arrow: {source}; fetch the file again", path.display())]
    Arrow {
        /// The file.
        path: PathBuf,
        /// What the reader said.
        #[source]
        source: ArrowError,
    },
}

/// Rows of the file at `path`.
///
/// # Errors
/// [`FileError`] if it cannot be read or holds no rows of this kind.
pub fn read_rows<R: Row>(path: &Path) -> Result<Vec<R>, FileError> {
    let unreadable = |source| FileError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    parse_rows(bytes.into(), path)
}

/// Rows of a file with the content `bytes`; `path` is for messages.
pub(super) fn parse_rows<R: Row>(bytes: Bytes, path: &Path) -> Result<Vec<R>, FileError> {
    if bytes.starts_with(PARQUET) {
        return parquet_rows(bytes, path);
    }
    if bytes.starts_with(ARROW_STREAM) {
        return arrow_rows(bytes, path);
    }
    if !bytes.starts_with(GZIP) {
        return json_rows(&bytes, path);
    }
    let mut plain = Vec::new();
    let mut decoder = MultiGzDecoder::new(bytes.as_ref()).take(MAX_BYTES + 1);
    decoder.read_to_end(&mut plain).map_err(|source| FileError::Read { path: path.to_owned(), source })?;
    if plain.len() as u64 > MAX_BYTES {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    json_rows(&plain, path)
}

fn json_rows<R: Row>(text: &[u8], path: &Path) -> Result<Vec<R>, FileError> {
    let lines = text.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    let mut rows = Vec::new();
    for (index, line) in lines {
        let broken = |source| FileError::Line { path: path.to_owned(), line: index + 1, source };
        let fields: Map<String, Value> = serde_json::from_slice(line).map_err(broken)?;
        let wrong = |source| FileError::Row { path: path.to_owned(), row: rows.len() + 1, source };
        let row = R::read(&fields).map_err(wrong)?;
        rows.push(row);
    }
    Ok(rows)
}

fn parquet_rows<R: Row>(bytes: Bytes, path: &Path) -> Result<Vec<R>, FileError> {
    let damaged = |source| FileError::Parquet { path: path.to_owned(), source };
    // Types as Parquet has them; the writer's own schema only adds ways to store the same texts.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let builder = ParquetRecordBatchReaderBuilder::try_new_with_options(bytes, options).map_err(damaged)?;
    let plain_bytes: i64 = builder.metadata().row_groups().iter().map(|group| group.total_byte_size()).sum();
    if u64::try_from(plain_bytes).is_ok_and(|bytes| bytes > MAX_BYTES) {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    let mut rows = Vec::new();
    for batch in builder.build().map_err(damaged)? {
        let batch = batch.map_err(|source| FileError::Arrow { path: path.to_owned(), source })?;
        read_batch(&batch, &mut rows, path)?;
    }
    Ok(rows)
}

fn arrow_rows<R: Row>(bytes: Bytes, path: &Path) -> Result<Vec<R>, FileError> {
    let damaged = |source| FileError::Arrow { path: path.to_owned(), source };
    let mut rows = Vec::new();
    for batch in StreamReader::try_new(Cursor::new(bytes), None).map_err(damaged)? {
        read_batch(&batch.map_err(damaged)?, &mut rows, path)?;
    }
    Ok(rows)
}

fn read_batch<R: Row>(batch: &RecordBatch, rows: &mut Vec<R>, path: &Path) -> Result<(), FileError> {
    for row in 0..batch.num_rows() {
        let wrong = |source| FileError::Row { path: path.to_owned(), row: rows.len() + 1, source };
        let row = R::read(&BatchRow { batch, row }).map_err(wrong)?;
        rows.push(row);
    }
    Ok(())
}
