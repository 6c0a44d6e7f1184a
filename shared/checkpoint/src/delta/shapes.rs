//! What a delta may change: the tensors of its base.

use std::collections::BTreeMap;

use crate::weights::WeightsFiles;

/// Bytes that a header may have whatever the model; unknown keys and indentation fit in.
const HEADER_FLOOR: u64 = 64 << 10;
/// Bytes of a header per tensor, beside its name and its shape.
const HEADER_PER_TENSOR: u64 = 1 << 10;
/// Bytes of one character of a name in JSON at worst, and of one size.
const HEADER_PER_NAME_BYTE: u64 = 6;
const HEADER_PER_SIZE: u64 = 24;
/// Bytes of one change in the widest form: row, column and value of 32 bits each.
const BYTES_PER_CHANGE: u64 = 12;

/// Dtype and shape of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorShape {
    /// As a safetensors header spells it, for instance `BF16`.
    pub dtype: String,
    pub shape: Vec<u64>,
}

impl TensorShape {
    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().fold(1, |product, size| product.saturating_mul(*size))
    }
}

/// The tensors of a checkpoint by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shapes(BTreeMap<String, TensorShape>);

impl Shapes {
    /// Dtype and shape of one tensor.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&TensorShape> {
        self.0.get(name)
    }

    /// Elements of all tensors.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.0.values().fold(0, |sum, tensor| sum.saturating_add(tensor.elements()))
    }

    /// Bytes of the longest header that is read.
    #[must_use]
    pub fn header_limit(&self) -> u64 {
        self.0.iter().fold(HEADER_FLOOR, |sum, (name, tensor)| {
            sum + HEADER_PER_TENSOR
                + HEADER_PER_NAME_BYTE * name.len() as u64
                + HEADER_PER_SIZE * tensor.shape.len() as u64
        })
    }

    /// Bytes of the longest payload that is unpacked: enough for a change of every element in the widest form.
    #[must_use]
    pub fn payload_limit(&self) -> u64 {
        self.elements().saturating_mul(BYTES_PER_CHANGE).saturating_add(4 + self.header_limit())
    }
}

impl FromIterator<(String, TensorShape)> for Shapes {
    fn from_iter<I: IntoIterator<Item = (String, TensorShape)>>(tensors: I) -> Self {
        Self(tensors.into_iter().collect())
    }
}

impl From<&WeightsFiles> for Shapes {
    fn from(weights: &WeightsFiles) -> Self {
        let tensors = weights.tensors().iter();
        tensors
            .map(|(name, place)| (name.clone(), TensorShape { dtype: place.dtype.clone(), shape: place.shape.clone() }))
            .collect()
    }
}
