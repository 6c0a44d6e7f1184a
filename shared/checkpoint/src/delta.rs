//! Sparse deltas: the elements of a checkpoint that changed since another one, with their new bits.
//!
//! Nothing is added or rounded: applying a delta overwrites. A payload is unpacked, and every position in it is checked,
//! before the first value is handed out; what is wrong with it has a [`DeltaClass`]. Memory is bounded by the model: the
//! size of the frame is checked first, payloads over 16 MiB are unpacked into a file, and changes are decoded in blocks.

mod cursor;
mod encode;
mod error;
mod format;
mod header;
mod payload;
mod shapes;
mod tensor;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

pub use cursor::{Changes, Cursor};
pub use encode::{DeltaEncoder, EncodeError, EncodedDelta};
pub use error::{DeltaClass, DeltaError};
pub use format::{DeltaFormat, DeltaMetadata, DeltaMetadataError, UnknownFormat};
pub use shapes::{Shapes, TensorShape};
pub use tensor::TensorDelta;

use header::Header;
use payload::Payload;
use tensor::DataArea;

/// The document that says how the payload is written.
pub const DELTA_METADATA_FILE: &str = "delta_metadata.json";
/// The payload of a delta.
pub const PAYLOAD_FILE: &str = "delta_sparse.bin.zst";

/// A delta whose payload holds what its base needs, all of it checked.
#[derive(Debug)]
pub struct Delta {
    tensors: BTreeMap<String, TensorDelta>,
    /// Absent for an empty delta without a payload.
    payload: Option<Payload>,
}

impl Delta {
    /// Decodes a payload file. A payload over 16 MiB is unpacked into a nameless file in the folder `scratch`.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn open(path: &Path, format: DeltaFormat, base: &Shapes, scratch: &Path) -> Result<Self, DeltaError> {
        let file = File::open(path).map_err(DeltaError::io(path.display().to_string()))?;
        Self::decode(file, format, base, scratch)
    }

    /// Decodes a payload for the tensors of `base`; those do not change along a chain.
    ///
    /// # Errors
    /// [`DeltaError`]: the first rule that the payload breaks, in the order frame, header, version, then for each tensor
    /// name, shape, dtypes, bounds, sizes, range, order.
    pub fn decode(packed: impl Read, format: DeltaFormat, base: &Shapes, scratch: &Path) -> Result<Self, DeltaError> {
        let Some(payload) = Payload::unpack(packed, base.payload_limit(), scratch)? else {
            return Ok(Self { tensors: BTreeMap::new(), payload: None });
        };
        let header = Header::read(&payload, format, base)?;
        let data = DataArea { start: header.data, bytes: payload.length - header.data };
        let mut tensors = BTreeMap::new();
        for entry in header.entries {
            let name = |why| DeltaError::Name { tensor: entry.name.clone(), why };
            let shape = base.get(&entry.name).ok_or_else(|| name("is not in the base"))?;
            if tensors.contains_key(&entry.name) {
                return Err(name("is listed twice"));
            }
            let tensor = TensorDelta::checked(&entry, format, shape, data)?;
            Cursor::new(&payload, &entry.name, &tensor).check()?;
            tensors.insert(entry.name, tensor);
        }
        Ok(Self { tensors, payload: Some(payload) })
    }

    /// The changed tensors by name.
    #[must_use]
    pub const fn tensors(&self) -> &BTreeMap<String, TensorDelta> {
        &self.tensors
    }

    /// Number of elements that are listed.
    #[must_use]
    pub fn listed(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.listed).sum()
    }

    /// The changes of one tensor from the beginning; `None` if there are none.
    #[must_use]
    pub fn cursor(&self, name: &str) -> Option<Cursor<'_>> {
        let (name, tensor) = self.tensors.get_key_value(name)?;
        Some(Cursor::new(self.payload.as_ref()?, name, tensor))
    }
}
