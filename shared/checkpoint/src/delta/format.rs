//! The three forms of a payload, and the document beside it that says which one it has.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// How the positions of a payload are written. All forms hold new values, never differences.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeltaFormat {
    /// Flat positions.
    V2,
    /// Rows and columns of 32 bits.
    V3,
    /// Rows and columns, each tensor with the narrowest integers that hold them.
    V31,
}

/// A name that no decoder knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no known delta format: sparse_codec_v2, sparse_codec_v3 or sparse_codec_v3.1 is expected")]
pub struct UnknownFormat(pub String);

impl DeltaFormat {
    pub const ALL: [Self; 3] = [Self::V2, Self::V3, Self::V31];

    /// The format as `delta_metadata.json` spells it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V2 => "sparse_codec_v2",
            Self::V3 => "sparse_codec_v3",
            Self::V31 => "sparse_codec_v3.1",
        }
    }

    /// The number in the header of a payload.
    #[must_use]
    pub const fn version(self) -> u32 {
        match self {
            Self::V2 => 2,
            Self::V3 => 3,
            Self::V31 => 31,
        }
    }
}

impl fmt::Display for DeltaFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for DeltaFormat {
    type Err = UnknownFormat;
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|format| format.as_str() == name).ok_or_else(|| UnknownFormat(name.to_owned()))
    }
}

/// Why a `delta_metadata.json` is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeltaMetadataError {
    #[error("delta_metadata.json is no JSON object with a text as format")]
    Json(#[from] serde_json::Error),
    #[error(transparent)]
    Format(#[from] UnknownFormat),
}

/// What a decoder needs of `delta_metadata.json`; the rest is informative, shapes are those of the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaMetadata {
    pub format: DeltaFormat,
}

impl DeltaMetadata {
    /// Reads the document.
    ///
    /// # Errors
    /// [`DeltaMetadataError`]: the delta is unusable.
    pub fn parse(text: &[u8]) -> Result<Self, DeltaMetadataError> {
        #[derive(Deserialize)]
        struct Document {
            format: String,
        }
        let document: Document = serde_json::from_slice(text)?;
        Ok(Self { format: document.format.parse()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_known_by_their_names() {
        for format in DeltaFormat::ALL {
            let text = format!(r#"{{"format": "{format}", "threshold": 0.0, "shapes": {{"a": [1]}}}}"#);
            assert_eq!(DeltaMetadata::parse(text.as_bytes()).unwrap(), DeltaMetadata { format });
        }
    }

    #[test]
    fn other_documents_are_refused() {
        for text in [r#"{"format": "sparse_codec_v1"}"#, r#"{"format": ""}"#] {
            let error = DeltaMetadata::parse(text.as_bytes()).unwrap_err();
            assert!(matches!(error, DeltaMetadataError::Format(_)), "{text}: {error}");
        }
        for text in ["", "{}", "null", r#"{"format": 2}"#, r#"{"format": null}"#] {
            let error = DeltaMetadata::parse(text.as_bytes()).unwrap_err();
            assert!(matches!(error, DeltaMetadataError::Json(_)), "{text}: {error}");
        }
    }
}
