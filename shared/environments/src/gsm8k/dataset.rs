//! The rows of GSM8K and how they are divided.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use flate2::read::MultiGzDecoder;
use grail_protocol::python_random::PythonRandom;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::split::Split;

/// Rows of the training file that are held out as `val`.
pub const VAL_ROWS: usize = 250;
/// Seed of the shuffle that picks them.
const VAL_SEED: u64 = 42;
/// Largest uncompressed file; the real ones have 4.2 MB.
const MAX_BYTES: u64 = 64 << 20;

/// One problem of the data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The problem.
    pub question: Arc<str>,
    /// The worked solution.
    pub answer: Arc<str>,
}

/// SHA-256 over the questions in order, each after its length in bytes as a little-endian `u64`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

/// A text that is no fingerprint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no fingerprint: 64 hexadecimal digits are expected")]
pub struct NotAFingerprint(pub String);

impl Fingerprint {
    /// Fingerprint of `rows`.
    #[must_use]
    pub fn of(rows: &[Row]) -> Self {
        let mut hash = Sha256::new();
        for row in rows {
            hash.update((row.question.len() as u64).to_le_bytes());
            hash.update(row.question.as_bytes());
        }
        Self(hash.finalize().into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl FromStr for Fingerprint {
    type Err = NotAFingerprint;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| NotAFingerprint(text.to_owned()))?;
        Ok(Self(bytes))
    }
}

/// What a data file must be. A changed file makes every prompt wrong, so it is refused before anything is mined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatasetCheck {
    /// The authors' file.
    Published,
    /// Another file, named by its operator with both values.
    Override {
        /// Its number of rows.
        rows: usize,
        /// Its fingerprint.
        fingerprint: Fingerprint,
    },
}

/// Rows and fingerprint of the authors' training file.
const PUBLISHED_TRAIN: (usize, &str) = (7473, "8631da674573f613957b1f6449431ad396b5b25c65e79b74d495169e631d64e1");
/// Rows and fingerprint of the authors' test file.
const PUBLISHED_TEST: (usize, &str) = (1319, "20e8ef35426585557cced12062d679d71c98c63a51c33521ca971840ea7b19b6");

impl DatasetCheck {
    /// Rows and fingerprint that the file for `split` must have.
    fn expected(self, split: Split) -> (usize, Fingerprint) {
        match self {
            Self::Override { rows, fingerprint } => (rows, fingerprint),
            Self::Published => {
                let (rows, text) = if split == Split::Test { PUBLISHED_TEST } else { PUBLISHED_TRAIN };
                (rows, text.parse().expect("the constants are 64 hexadecimal digits"))
            }
        }
    }

    /// Refuses `rows` unless they are what is expected.
    pub(super) fn verify(self, rows: &[Row], path: &Path, split: Split) -> Result<(), DatasetError> {
        let (expected_rows, expected) = self.expected(split);
        if rows.len() != expected_rows {
            return Err(DatasetError::RowCount {
                path: path.to_owned(),
                rows: rows.len(),
                expected: expected_rows,
                split,
            });
        }
        let actual = Fingerprint::of(rows);
        if actual != expected {
            return Err(DatasetError::Fingerprint { path: path.to_owned(), actual, expected, split });
        }
        if let Self::Override { .. } = self {
            let (published_rows, published) = Self::Published.expected(split);
            tracing::warn!(
                environment = "gsm8k", %split, rows = expected_rows, fingerprint = %expected, published_rows, %published,
                "A data file other than the published one is in use."
            );
        }
        Ok(())
    }
}

/// Why a data file is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// Missing or unreadable.
    #[error("reading the gsm8k data {}: {source}; check the configured path", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system or the decompressor said.
        #[source]
        source: std::io::Error,
    },
    /// Larger than any file that it could be.
    #[error("the gsm8k data {} holds more than {MAX_BYTES} bytes; check the configured path", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A line is not a row.
    #[error(
        "the gsm8k data {} line {line}: {source}; each line must be a JSON object with the texts `question` and `answer`",
        path.display()
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Not the right number of rows.
    #[error("the gsm8k data {} has {rows} rows, the file for split {split} has {expected}; use that file", path.display())]
    RowCount {
        /// The file.
        path: PathBuf,
        /// Rows it has.
        rows: usize,
        /// Rows it should have.
        expected: usize,
        /// Split asked for.
        split: Split,
    },
    /// Other questions, or in another order.
    #[error(
        "the gsm8k data {} has fingerprint {actual}, the file for split {split} has {expected}; use that file, or name both \
         row count and fingerprint as an override if every validator uses yours", path.display()
    )]
    Fingerprint {
        /// The file.
        path: PathBuf,
        /// Fingerprint it has.
        actual: Fingerprint,
        /// Fingerprint it should have.
        expected: Fingerprint,
        /// Split asked for.
        split: Split,
    },
    /// Nothing is left for the split.
    #[error("the gsm8k data {} has {rows} rows, too few for split {split}", path.display())]
    TooFewRows {
        /// The file.
        path: PathBuf,
        /// Rows it has.
        rows: usize,
        /// Split asked for.
        split: Split,
    },
    /// Only the training file is part of the program.
    #[error("the gsm8k split {split} is not part of this program; name its file in the configuration")]
    NotEmbedded {
        /// Split asked for.
        split: Split,
    },
    /// The program's own data is damaged.
    #[error("the data inside the program: {0}")]
    Embedded(#[source] Arc<DatasetError>),
}

/// Rows of the file at `path`, JSON lines, gzip-compressed or not.
///
/// # Errors
/// [`DatasetError`] if it cannot be read or a line is no row.
pub fn read_rows(path: &Path) -> Result<Arc<[Row]>, DatasetError> {
    let unreadable = |source| DatasetError::Read { path: path.to_owned(), source };
    let mut file = std::fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.by_ref().take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    parse_rows(&bytes, path)
}

/// Rows of the file content `bytes`; `path` is for messages.
///
/// # Errors
/// As [`read_rows`].
pub fn parse_rows(bytes: &[u8], path: &Path) -> Result<Arc<[Row]>, DatasetError> {
    const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
    let mut plain = Vec::new();
    let text = if bytes.starts_with(&GZIP_MAGIC) {
        let mut decoder = MultiGzDecoder::new(bytes).take(MAX_BYTES + 1);
        decoder.read_to_end(&mut plain).map_err(|source| DatasetError::Read { path: path.to_owned(), source })?;
        plain.as_slice()
    } else {
        bytes
    };
    if text.len() as u64 > MAX_BYTES {
        return Err(DatasetError::TooLarge { path: path.to_owned() });
    }
    let lines = text.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
    lines
        .map(|(index, line)| {
            let record: Record = serde_json::from_slice(line).map_err(|source| DatasetError::Line {
                path: path.to_owned(),
                line: index + 1,
                source,
            })?;
            Ok(Row { question: record.question.unwrap_or_default(), answer: record.answer.unwrap_or_default() })
        })
        .collect()
}

/// A row as it stands in a file; other columns do not matter, what is missing or null is empty.
#[derive(Deserialize)]
struct Record {
    #[serde(default)]
    question: Option<Arc<str>>,
    #[serde(default)]
    answer: Option<Arc<str>>,
}

/// Places of `split`'s rows in its file of `rows` rows, ascending. `val` is the first [`VAL_ROWS`] of a shuffle of the
/// training file, as a set; `train` is the rest.
#[must_use]
pub fn split_rows(rows: usize, split: Split) -> Vec<usize> {
    if split == Split::Test {
        return (0..rows).collect();
    }
    let mut order: Vec<usize> = (0..rows).collect();
    PythonRandom::from_u64(VAL_SEED).shuffle(&mut order);
    let (held_out, rest) = order.split_at(VAL_ROWS.min(rows));
    let mut members = if split == Split::Val { held_out.to_vec() } else { rest.to_vec() };
    members.sort_unstable();
    members
}
