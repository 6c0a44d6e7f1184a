//! Rows of the data sets: where they are looked for, how they are read, and whether they are the right ones.
//!
//! The order is: the configured path, the hub's cache, a download from the hub, the cache of the Python library `datasets`. All
//! rows of a split come from one of them and from one commit. Number and content of the rows are checked before a task is made of
//! them.

mod columns;
mod download;
mod error;
mod file;
mod fingerprint;
mod hub_cache;
mod library_cache;
mod loader;
mod local;
mod located;
mod published;
mod row;
mod settings;
mod snapshot;

pub use error::{DatasetError, HubAnswer, Looked};
pub use file::{FileError, read_rows};
pub use fingerprint::{Expectation, Fingerprint, NotAFingerprint, NotAnOverride, Overrides};
pub use loader::{Datasets, embedded};
pub(crate) use located::{EmbeddedFile, rows_of_file};
pub use published::HubSplit;
pub use row::{FieldError, Fields, Row};
pub use settings::{
    DEFAULT_ENDPOINT, DatasetSettings, HubSettings, SourceSettings, override_variable, path_variable, revision_variable,
};
