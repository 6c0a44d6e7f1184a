//! The window file: one Parquet object per window that holds every rollout with its proof (key
//! `grail/windows/{hotkey}-window-{W}.parquet`).
//!
//! * [`Row`] and [`Commit`] are what a miner writes: every field present and typed. [`Writer`] takes them in slices,
//!   [`write_file`] all at once.
//! * [`ReadRow`] and [`ReadCommit`] are what a reader finds: anything may be null, because a foreign file may hold
//!   anything, and it is the checks of [`crate::validation`] that judge it. [`read_bytes`] reads whatever Arrow reads.
//!
//! Sizes: 5,000 rollouts of 1,000 tokens are about 110 MB of commitments text before compression. The text exists only for
//! the row groups in work, never for the whole file (measured by `benches/window_file.rs`).

mod cells;
mod columns;
mod commitments;
mod footer;
mod metadata;
mod read;
mod row;
mod schema;
mod write;

pub use commitments::Commitments;
pub use metadata::Metadata;
pub use read::{ReadError, read_bytes};
pub use row::{Commit, List, ReadCommit, ReadRollout, ReadRow, Rollout, Row};
pub use schema::{METADATA_KEYS, arrow_schema};
pub use write::{Header, WriteError, Writer, write_file};

/// A file as read: its metadata and its rows in file order.
#[derive(Debug, Clone, PartialEq)]
pub struct WindowFile {
    pub metadata: Metadata,
    pub rows: Vec<ReadRow>,
}
