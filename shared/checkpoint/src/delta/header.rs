//! The header of a payload: which tensors it changes and where their chunks lie.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Number;

use super::payload::Payload;
use super::{DeltaError, DeltaFormat, Shapes};

/// Bytes before the header: its length.
const LENGTH_BYTES: u64 = 4;

/// What one tensor's entry says, unchecked. `num_nonzero` is not read: the sizes rule.
#[derive(Debug, Deserialize)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) shape: Vec<Number>,
    pub(super) value_dtype: String,
    pub(super) indices_offset: Number,
    pub(super) indices_size: Option<Number>,
    pub(super) values_offset: Number,
    pub(super) values_size: Number,
    pub(super) rows_size: Option<Number>,
    pub(super) cols_size: Option<Number>,
    pub(super) row_dtype: Option<String>,
    pub(super) col_dtype: Option<String>,
}

/// The entries, and the offset at which the data begins.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) entries: Vec<Entry>,
    pub(super) data: u64,
}

/// The version is judged before the entries, which differ between versions. Unknown keys cost no memory.
#[derive(Deserialize)]
struct Versioned {
    version: Option<Number>,
    #[serde(rename = "tensors")]
    _tensors: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Listed {
    tensors: Vec<Entry>,
}

impl Header {
    pub(super) fn read(payload: &Payload, format: DeltaFormat, base: &Shapes) -> Result<Self, DeltaError> {
        let text = read_text(payload, base.header_limit())?;
        let versioned: Versioned = serde_json::from_slice(&text).map_err(DeltaError::header)?;
        if versioned.version.as_ref().and_then(Number::as_u64) != Some(u64::from(format.version())) {
            let found = versioned.version.map_or_else(|| "none".to_owned(), |version| version.to_string());
            return Err(DeltaError::Version { found, format });
        }
        let Listed { tensors: entries } = serde_json::from_slice(&text).map_err(DeltaError::header)?;
        for entry in &entries {
            let missing = match format {
                DeltaFormat::V2 if entry.indices_size.is_none() => "indices_size",
                DeltaFormat::V3 | DeltaFormat::V31 if entry.rows_size.is_none() => "rows_size",
                DeltaFormat::V3 | DeltaFormat::V31 if entry.cols_size.is_none() => "cols_size",
                DeltaFormat::V2 | DeltaFormat::V3 | DeltaFormat::V31 => continue,
            };
            return Err(DeltaError::header(format!("tensor {} has no {missing}", entry.name)));
        }
        Ok(Self { entries, data: LENGTH_BYTES + text.len() as u64 })
    }
}

fn read_text(payload: &Payload, limit: u64) -> Result<Vec<u8>, DeltaError> {
    if payload.length < LENGTH_BYTES {
        return Err(DeltaError::header(format!("the payload has {} bytes, its length takes 4", payload.length)));
    }
    let mut length = [0; 4];
    payload.read_at(&mut length, 0)?;
    let length = u32::from_le_bytes(length);
    if u64::from(length) > payload.length - LENGTH_BYTES {
        let what = format!("it claims {length} bytes, the payload has {}", payload.length);
        return Err(DeltaError::header(what));
    }
    if u64::from(length) > limit {
        return Err(DeltaError::Limit { what: "the header", bytes: length.into(), limit });
    }
    let mut text = vec![0; usize::try_from(length).map_err(DeltaError::header)?];
    payload.read_at(&mut text, LENGTH_BYTES)?;
    Ok(text)
}
