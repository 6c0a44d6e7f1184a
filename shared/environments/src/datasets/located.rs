//! Files that were found, and their rows.

use std::path::{Path, PathBuf};

use super::error::DatasetError;
use super::file::{FileError, read_rows};
use super::fingerprint::{Fingerprint, Overrides};
use super::published::{self, HubSplit, Part};
use super::row::Row;
use super::settings::override_variable;

/// Where the rows of a split lie: all in one place, and of one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Located {
    /// The place, for logs and messages.
    pub(crate) place: String,
    /// Commit on the hub, if it is known.
    pub(crate) commit: Option<String>,
    /// The files.
    pub(crate) layout: Layout,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Files of each part, to be read one after the other.
    PerPart(Vec<Vec<PathBuf>>),
    /// One file with the rows of all parts, maybe among others.
    Whole(PathBuf),
}

impl Located {
    /// Rows of each of `parts`.
    pub(super) fn read<R: Row>(&self, parts: &[Part]) -> Result<Vec<Vec<R>>, FileError> {
        match &self.layout {
            Layout::Whole(path) => Ok(divide(read_rows(path)?, parts)),
            Layout::PerPart(files) => files.iter().map(|paths| read_all(paths)).collect(),
        }
    }
}

fn read_all<R: Row>(paths: &[PathBuf]) -> Result<Vec<R>, FileError> {
    let mut rows = Vec::new();
    for path in paths {
        rows.append(&mut read_rows(path)?);
    }
    Ok(rows)
}

/// `rows` of one file by part: by the rows' own numbers where parts have some, else by the parts' lengths, the last one taking
/// what is left.
pub(super) fn divide<R: Row>(rows: Vec<R>, parts: &[Part]) -> Vec<Vec<R>> {
    let mut divided = Vec::with_capacity(parts.len());
    let mut rest = rows.as_slice();
    for (place, part) in parts.iter().enumerate() {
        if let Some(numbers) = &part.numbers {
            let is_of_part = |row: &&R| row.number().is_some_and(|number| numbers.contains(&number));
            divided.push(rows.iter().filter(is_of_part).cloned().collect());
            continue;
        }
        let is_last = place + 1 == parts.len();
        let (own, others) = rest.split_at(if is_last { rest.len() } else { part.rows.min(rest.len()) });
        divided.push(own.to_vec());
        rest = others;
    }
    divided
}

/// Refuses `rows` of `parts` unless they are the published ones, or those that `overrides` names.
///
/// # Errors
/// [`DatasetError`] for the first difference.
pub(super) fn verify<R: Row>(
    rows: &[Vec<R>],
    parts: &[Part],
    place: &str,
    overrides: &Overrides,
) -> Result<(), DatasetError> {
    for split in HubSplit::ALL {
        let of_split: Vec<_> = parts.iter().zip(rows).filter(|(part, _)| part.split == split).collect();
        if !of_split.is_empty() {
            verify_split(split, &of_split, place, overrides)?;
        }
    }
    Ok(())
}

fn verify_split<R: Row>(
    split: HubSplit,
    rows: &[(&Part, &Vec<R>)],
    place: &str,
    overrides: &Overrides,
) -> Result<(), DatasetError> {
    let environment = R::ENVIRONMENT;
    let count: usize = rows.iter().map(|(_, rows)| rows.len()).sum();
    let wrong_count = |part: String, rows, expected| DatasetError::RowCount {
        environment,
        place: place.to_owned(),
        part,
        rows,
        expected,
    };
    let named = overrides.0.get(&split);
    match named {
        Some(named) if named.rows != count => return Err(wrong_count(split.to_string(), count, named.rows)),
        Some(_) => {}
        None => {
            if let Some((part, rows)) = rows.iter().find(|(part, rows)| rows.len() != part.rows) {
                return Err(wrong_count(part.to_string(), rows.len(), part.rows));
            }
        }
    }
    let actual = Fingerprint::of(rows.iter().flat_map(|(_, rows)| rows.iter().map(Row::question)));
    let published = published::fingerprint(environment, split);
    match named.map(|named| named.fingerprint).or(published) {
        Some(expected) if expected != actual => {
            return Err(DatasetError::Fingerprint {
                environment,
                place: place.to_owned(),
                split,
                rows: count,
                actual,
                expected,
                variable: override_variable(environment),
            });
        }
        Some(_) => {}
        None => has_questions(rows, place)?,
    }
    if named.is_some() {
        tracing::warn!(%environment, %split, rows = count, fingerprint = %actual, ?published,
            "A data file other than the published one is in use.");
    } else {
        tracing::info!(%environment, %split, rows = count, fingerprint = %actual, place, "Rows of a data set are read.");
    }
    Ok(())
}

/// Refuses parts without a single question: the column has another name there.
fn has_questions<R: Row>(rows: &[(&Part, &Vec<R>)], place: &str) -> Result<(), DatasetError> {
    match rows.iter().find(|(_, rows)| rows.iter().all(|row| row.question().is_empty())) {
        None => Ok(()),
        Some((part, _)) => Err(DatasetError::NoQuestions {
            environment: R::ENVIRONMENT,
            place: place.to_owned(),
            part: part.to_string(),
        }),
    }
}

/// A file that is part of the program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EmbeddedFile {
    pub(crate) name: &'static str,
    pub(crate) bytes: &'static [u8],
}

impl EmbeddedFile {
    /// Its rows for `split`, by part.
    pub(crate) fn parts<R: Row>(self, split: crate::Split) -> Result<Vec<Vec<R>>, DatasetError> {
        let place = format!("(embedded) {}", self.name);
        let rows = super::file::parse_rows(bytes::Bytes::from_static(self.bytes), Path::new(&place))?;
        checked(rows, &place, split, &Overrides::default())
    }
}

/// Rows of the file at `path` for `split`, by part.
///
/// # Errors
/// [`DatasetError`] if it cannot be read or is not what it should be.
pub(crate) fn rows_of_file<R: Row>(
    path: &Path,
    split: crate::Split,
    overrides: &Overrides,
) -> Result<Vec<Vec<R>>, DatasetError> {
    checked(read_rows(path)?, &path.display().to_string(), split, overrides)
}

fn checked<R: Row>(
    rows: Vec<R>,
    place: &str,
    split: crate::Split,
    overrides: &Overrides,
) -> Result<Vec<Vec<R>>, DatasetError> {
    let environment = R::ENVIRONMENT;
    let parts = published::parts(environment, split).ok_or(DatasetError::NoSuchSplit { environment, split })?;
    let divided = divide(rows, &parts);
    verify(&divided, &parts, place, overrides)?;
    Ok(divided)
}
