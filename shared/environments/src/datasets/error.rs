//! Why an environment has no rows.

use std::fmt;
use std::path::PathBuf;

use super::file::FileError;
use super::fingerprint::Fingerprint;
use crate::id::EnvironmentId;
use crate::split::Split;

/// A place where rows were looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Looked {
    /// The place.
    pub place: String,
    /// Why they are not there.
    pub reason: String,
}

impl fmt::Display for Looked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.reason)
    }
}

/// Why an environment has no rows. Wrong rows make every prompt wrong, so they are refused before anything is mined.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not the right number of rows.
    #[error("{environment} from {place}: {part} has {rows} rows, the published file has {expected}; use that file")]
    RowCount {
        /// The environment.
        environment: EnvironmentId,
        /// Where the rows are from.
        place: String,
        /// Configuration and split on the hub.
        part: String,
        /// Rows there are.
        rows: usize,
        /// Rows there should be.
        expected: usize,
    },
    /// Other questions, or in another order.
    #[error(
        "{environment} from {place}: split {split} has fingerprint {actual}, the published one has {expected}; use that \
         file, or name yours by {variable}={split}={rows}:{actual} if every validator uses it"
    )]
    Fingerprint {
        /// The environment.
        environment: EnvironmentId,
        /// Where the rows are from.
        place: String,
        /// Split on the hub.
        split: super::HubSplit,
        /// Rows there are.
        rows: usize,
        /// Fingerprint they have.
        actual: Fingerprint,
        /// Fingerprint they should have.
        expected: Fingerprint,
        /// Variable that names another file.
        variable: &'static str,
    },
    /// Rows without questions, which no fingerprint has told apart from the right ones.
    #[error("{environment} from {place}: no row of {part} has a question; check that this is a file of the data set")]
    NoQuestions {
        /// The environment.
        environment: EnvironmentId,
        /// Where the rows are from.
        place: String,
        /// Configuration and split on the hub.
        part: String,
    },
    /// Nothing is left for the split.
    #[error("{environment} has {rows} rows, too few for split {split}")]
    TooFewRows {
        /// The environment.
        environment: EnvironmentId,
        /// Rows there are.
        rows: usize,
        /// Split asked for.
        split: Split,
    },
    /// The environment has no such split.
    #[error("{environment} has no split {split}")]
    NoSuchSplit {
        /// The environment.
        environment: EnvironmentId,
        /// Split asked for.
        split: Split,
    },
    /// The split is not part of the program.
    #[error("the {environment} split {split} is not part of this program; name its file in the configuration")]
    NotEmbedded {
        /// The environment.
        environment: EnvironmentId,
        /// Split asked for.
        split: Split,
    },
    /// The configured file or folder does not exist.
    #[error("the {environment} data {} is not there; correct or unset {variable}", path.display())]
    NoPath {
        /// The environment.
        environment: EnvironmentId,
        /// The configured path.
        path: PathBuf,
        /// Variable that names it.
        variable: &'static str,
    },
    /// Nowhere to be found.
    #[error("no data of {environment} for split {split}: {}; {remedy}", list(looked))]
    NotFound {
        /// The environment.
        environment: EnvironmentId,
        /// Split asked for.
        split: Split,
        /// Every place that was looked at.
        looked: Vec<Looked>,
        /// Which files to bring, and where to.
        remedy: String,
        /// What came of asking the hub.
        hub: HubAnswer,
    },
}

/// What came of asking the hub for files that are not here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HubAnswer {
    /// It does not have them, or was not to be asked.
    No,
    /// None, or one that was spoilt on its way: another try may find them.
    None,
    /// It has them, and the disk has no room for them.
    NoSpaceHere,
}

fn list(looked: &[Looked]) -> String {
    looked.iter().map(Looked::to_string).collect::<Vec<_>>().join("; ")
}
