//! Why a payload is refused.

use std::fmt;
use std::io;

use super::DeltaFormat;

/// The kinds of defects of a payload, one for each rule that it can break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeltaClass {
    Decompress,
    Header,
    Version,
    Bounds,
    Count,
    Dtype,
    Name,
    Limit,
    IndexRange,
    Order,
    Shape,
}

impl DeltaClass {
    /// The class as reports spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Decompress => "Decompress",
            Self::Header => "Header",
            Self::Version => "Version",
            Self::Bounds => "Bounds",
            Self::Count => "Count",
            Self::Dtype => "Dtype",
            Self::Name => "Name",
            Self::Limit => "Limit",
            Self::IndexRange => "IndexRange",
            Self::Order => "Order",
            Self::Shape => "Shape",
        }
    }
}

impl fmt::Display for DeltaClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a delta cannot be used. No weight was touched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeltaError {
    #[error("the payload is no complete zstd frame that states its size: {what}")]
    Decompress { what: String },
    #[error("the header of the payload is defective: {what}")]
    Header { what: String },
    #[error("the payload has version {found}, {format} has {}", format.version())]
    Version { found: String, format: DeltaFormat },
    #[error("{what} takes {bytes} bytes, for this model at most {limit} are accepted")]
    Limit { what: &'static str, bytes: u64, limit: u64 },
    #[error("tensor {tensor} {why}")]
    Name { tensor: String, why: &'static str },
    #[error("tensor {tensor} has shape {found} in the delta, {expected} in its base")]
    Shape { tensor: String, found: String, expected: String },
    #[error("{what} of tensor {tensor} is {found:?}: {expected} is expected")]
    Dtype { tensor: String, what: &'static str, found: String, expected: String },
    #[error("the {chunk} of tensor {tensor} are not inside the {data} bytes of data")]
    Bounds { tensor: String, chunk: &'static str, data: u64 },
    #[error("the {chunk} of tensor {tensor} have {found} bytes: {expected} are expected")]
    Count { tensor: String, chunk: &'static str, found: u64, expected: String },
    #[error("change {change} of tensor {tensor} is outside its shape")]
    IndexRange { tensor: String, change: u64 },
    #[error("change {change} of tensor {tensor} does not come after the one before it")]
    Order { tensor: String, change: u64 },
    /// Nothing is wrong with the payload: this host could not read or keep it.
    #[error("{what} could not be read or written")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
}

impl DeltaError {
    /// Which rule the payload breaks; `None` if the payload is not to blame.
    #[must_use]
    pub const fn class(&self) -> Option<DeltaClass> {
        Some(match self {
            Self::Decompress { .. } => DeltaClass::Decompress,
            Self::Header { .. } => DeltaClass::Header,
            Self::Version { .. } => DeltaClass::Version,
            Self::Limit { .. } => DeltaClass::Limit,
            Self::Name { .. } => DeltaClass::Name,
            Self::Shape { .. } => DeltaClass::Shape,
            Self::Dtype { .. } => DeltaClass::Dtype,
            Self::Bounds { .. } => DeltaClass::Bounds,
            Self::Count { .. } => DeltaClass::Count,
            Self::IndexRange { .. } => DeltaClass::IndexRange,
            Self::Order { .. } => DeltaClass::Order,
            Self::Io { .. } => return None,
        })
    }

    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(super) fn header(what: impl fmt::Display) -> Self {
        Self::Header { what: what.to_string() }
    }
}
