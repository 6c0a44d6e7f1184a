//! Writing deltas as the trainer does; for the local demonstration and for tests.

use std::collections::BTreeMap;
use std::io;

use grail_protocol::json::{Object, Style, Value};

use super::tensor::{IndexDtype, VALUE_DTYPES};
use super::{DeltaFormat, TensorShape};

/// The level at which the trainer packs.
const ZSTD_LEVEL: i32 = 1;

/// Why two checkpoints have no delta between them: the new one must be published in full.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    #[error("tensor {tensor} is {dtype}: a delta holds BF16, F16 and F32")]
    Dtype { tensor: String, dtype: String },
    #[error("tensor {tensor} is a scalar, which has no rows")]
    Scalar { tensor: String },
    #[error("tensor {tensor} has {base} bytes in the base and {new} now: its shape needs {expected}")]
    Length { tensor: String, base: usize, new: usize, expected: u64 },
    #[error("position {position} of tensor {tensor} does not fit into {format}")]
    TooFar { tensor: String, position: u64, format: DeltaFormat },
    #[error("the header has {bytes} bytes, its length is written in 32 bits")]
    Header { bytes: usize },
    #[error("the payload could not be packed")]
    Pack(#[source] io::Error),
}

/// A payload with what `delta_metadata.json` says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedDelta {
    /// One zstd frame.
    pub payload: Vec<u8>,
    /// Elements that are listed.
    pub listed: u64,
    /// Shapes of the tensors that are listed.
    pub shapes: BTreeMap<String, Vec<u64>>,
}

/// Collects the changes of a checkpoint, tensor by tensor; holds them in memory.
#[derive(Debug)]
pub struct DeltaEncoder {
    format: DeltaFormat,
    tensors: BTreeMap<String, Changed>,
}

#[derive(Debug)]
struct Changed {
    shape: Vec<u64>,
    value_dtype: &'static str,
    listed: u64,
    indices: EncodedIndices,
    values: Vec<u8>,
}

#[derive(Debug)]
enum EncodedIndices {
    Flat(Vec<u8>),
    RowColumn { rows: (IndexDtype, Vec<u8>), columns: (IndexDtype, Vec<u8>) },
}

impl DeltaEncoder {
    #[must_use]
    pub const fn new(format: DeltaFormat) -> Self {
        Self { format, tensors: BTreeMap::new() }
    }

    /// Adds the elements of a tensor that differ: unequal as numbers of its dtype, so that a NaN is always listed and a
    /// zero that only changed its sign never is. A tensor without such elements is left out.
    ///
    /// # Errors
    /// [`EncodeError`]; nothing was added.
    pub fn tensor(&mut self, name: &str, shape: &TensorShape, base: &[u8], new: &[u8]) -> Result<(), EncodeError> {
        let tensor = || name.to_owned();
        // No number differs where no bit does, unless it is NaN; integers have none, and no delta could hold them.
        if base == new && !matches!(shape.dtype.as_str(), "BF16" | "F16" | "F32") {
            return Ok(());
        }
        let known = VALUE_DTYPES.iter().find(|(_, dtype, _)| *dtype == shape.dtype);
        let (value_dtype, _, width) =
            *known.ok_or_else(|| EncodeError::Dtype { tensor: tensor(), dtype: shape.dtype.clone() })?;
        let expected = shape.elements().saturating_mul(width as u64);
        if base.len() as u64 != expected || new.len() as u64 != expected {
            return Err(EncodeError::Length { tensor: tensor(), base: base.len(), new: new.len(), expected });
        }
        let Some((_, rest)) = shape.shape.split_first() else {
            return Err(EncodeError::Scalar { tensor: tensor() });
        };
        let pairs = base.chunks_exact(width).zip(new.chunks_exact(width)).enumerate();
        let changed = pairs.filter(|(_, (old, new))| differ(&shape.dtype, old, new));
        let (positions, values): (Vec<u64>, Vec<&[u8]>) =
            changed.map(|(position, (_, new))| (position as u64, new)).unzip();
        if positions.is_empty() {
            return Ok(());
        }
        let indices = encode_indices(self.format, &positions, rest.iter().product())
            .map_err(|position| EncodeError::TooFar { tensor: tensor(), position, format: self.format })?;
        let (listed, values) = (positions.len() as u64, values.concat());
        let changed = Changed { shape: shape.shape.clone(), value_dtype, listed, indices, values };
        self.tensors.insert(name.to_owned(), changed);
        Ok(())
    }

    /// Packs what was added.
    ///
    /// # Errors
    /// [`EncodeError::Header`] and [`EncodeError::Pack`].
    pub fn finish(self) -> Result<EncodedDelta, EncodeError> {
        let mut data = Vec::new();
        let entries = self.tensors.iter().map(|(name, changed)| changed.append(name, self.format, &mut data));
        let entries: Vec<Value> = entries.collect();
        let mut header = Object::default();
        header.insert("version", self.format.version());
        header.insert("tensors", entries);
        let header = Value::from(header).to_json(Style::Compact);
        let length = u32::try_from(header.len()).map_err(|_| EncodeError::Header { bytes: header.len() })?;
        let plain = [length.to_le_bytes().as_slice(), header.as_bytes(), &data].concat();
        Ok(EncodedDelta {
            payload: zstd::bulk::compress(&plain, ZSTD_LEVEL).map_err(EncodeError::Pack)?,
            listed: self.tensors.values().map(|changed| changed.listed).sum(),
            shapes: self.tensors.into_iter().map(|(name, changed)| (name, changed.shape)).collect(),
        })
    }
}

impl Changed {
    /// Appends the chunks to the data area and returns the header entry, its keys in the trainer's order.
    fn append(&self, name: &str, format: DeltaFormat, data: &mut Vec<u8>) -> Value {
        let offset = integer(data.len() as u64);
        let mut entry = Object::default();
        entry.insert("name", name);
        entry.insert("shape", self.shape.iter().map(|size| integer(*size)).collect::<Vec<_>>());
        entry.insert("num_nonzero", integer(self.listed));
        entry.insert("value_dtype", self.value_dtype);
        match &self.indices {
            EncodedIndices::Flat(indices) => {
                entry.insert("indices_offset", offset);
                entry.insert("indices_size", integer(indices.len() as u64));
                data.extend_from_slice(indices);
            }
            EncodedIndices::RowColumn { rows, columns } => {
                if format == DeltaFormat::V31 {
                    entry.insert("row_dtype", rows.0.as_str());
                    entry.insert("col_dtype", columns.0.as_str());
                }
                entry.insert("indices_offset", offset);
                entry.insert("indices_size", integer((rows.1.len() + columns.1.len()) as u64));
                entry.insert("rows_size", integer(rows.1.len() as u64));
                entry.insert("cols_size", integer(columns.1.len() as u64));
                data.extend_from_slice(&rows.1);
                data.extend_from_slice(&columns.1);
            }
        }
        entry.insert("values_offset", integer(data.len() as u64));
        entry.insert("values_size", integer(self.values.len() as u64));
        data.extend_from_slice(&self.values);
        entry.into()
    }
}

/// Lengths and sizes of what is in memory are far below 2^63.
fn integer(number: u64) -> Value {
    Value::Int(i64::try_from(number).unwrap_or(i64::MAX))
}

/// The positions as the format writes them, or the first that it cannot express.
fn encode_indices(format: DeltaFormat, positions: &[u64], columns: u64) -> Result<EncodedIndices, u64> {
    if format == DeltaFormat::V2 {
        return encode_flat(positions).map(EncodedIndices::Flat);
    }
    let (mut row_steps, mut column_steps) = (Vec::new(), Vec::new());
    let mut before: Option<(u64, u64)> = None;
    for position in positions {
        let (row, column) = (position / columns, position % columns);
        let (row_step, column_step) = match before {
            Some((last_row, last_column)) if last_row == row => (0, column - last_column),
            Some((last_row, _)) => (row - last_row, column),
            None => (row, column),
        };
        let fits = |step| i32::try_from(step).map_err(|_| *position);
        row_steps.push(fits(row_step)?);
        column_steps.push(fits(column_step)?);
        before = Some((row, column));
    }
    let (rows, columns) = match format {
        DeltaFormat::V2 | DeltaFormat::V3 => (IndexDtype::I32, IndexDtype::I32),
        DeltaFormat::V31 => (
            IndexDtype::narrowest(&row_steps, &[IndexDtype::U8, IndexDtype::U16]),
            IndexDtype::narrowest(&column_steps, &[IndexDtype::U16]),
        ),
    };
    Ok(EncodedIndices::RowColumn {
        rows: (rows, rows.write(&row_steps)),
        columns: (columns, columns.write(&column_steps)),
    })
}

fn encode_flat(positions: &[u64]) -> Result<Vec<u8>, u64> {
    let mut before = 0;
    let steps = positions.iter().map(|position| {
        let position = i32::try_from(*position).map_err(|_| *position)?;
        let step = position - before;
        before = position;
        Ok(step.to_le_bytes())
    });
    Ok(steps.collect::<Result<Vec<_>, u64>>()?.as_flattened().to_vec())
}

/// Whether two elements are unequal as numbers: NaN equals nothing, zeros of both signs are equal.
fn differ(dtype: &str, old: &[u8], new: &[u8]) -> bool {
    let bits = |bytes: &[u8]| bytes.iter().rev().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte));
    let (sign, infinity) = match dtype {
        "BF16" => (0x8000, 0x7F80),
        "F16" => (0x8000, 0x7C00),
        _ => (0x8000_0000, 0x7F80_0000),
    };
    let (old, new) = (bits(old), bits(new));
    let is_nan = |bits: u32| bits & !sign > infinity;
    let both_zero = (old | new) & !sign == 0;
    is_nan(old) || is_nan(new) || (old != new && !both_zero)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(dtype: &str, shape: &[u64]) -> TensorShape {
        TensorShape { dtype: dtype.to_owned(), shape: shape.to_vec() }
    }

    #[test]
    fn elements_differ_as_numbers() {
        for (dtype, old, new, expected) in [
            ("BF16", 0x3F80_u32, 0x3F81_u32, true),
            ("BF16", 0x3F80, 0x3F80, false),
            ("BF16", 0x0000, 0x8000, false),
            ("BF16", 0x0000, 0x0001, true),
            ("BF16", 0x7FC0, 0x7FC0, true),
            ("BF16", 0x7F80, 0x7F80, false),
            ("F16", 0x7C01, 0x7C01, true),
            ("F16", 0x7C00, 0xFC00, true),
            ("F32", 0x8000_0000, 0, false),
            ("F32", 0x7FC0_0000, 0x7FC0_0000, true),
            ("F32", 0xFF80_0000, 0xFF80_0000, false),
        ] {
            let width = if dtype == "F32" { 4 } else { 2 };
            let bytes = |bits: u32| bits.to_le_bytes()[..width].to_vec();
            assert_eq!(differ(dtype, &bytes(old), &bytes(new)), expected, "{dtype} {old:x} {new:x}");
        }
    }

    #[test]
    fn what_no_delta_can_hold_is_refused() {
        let mut encoder = DeltaEncoder::new(DeltaFormat::V31);
        let scalar = encoder.tensor("a", &shape("BF16", &[]), &[0; 2], &[1; 2]).unwrap_err();
        assert!(matches!(scalar, EncodeError::Scalar { .. }), "{scalar}");
        let dtype = encoder.tensor("a", &shape("I64", &[1]), &[0; 8], &[1; 8]).unwrap_err();
        assert!(matches!(dtype, EncodeError::Dtype { .. }), "{dtype}");
        let length = encoder.tensor("a", &shape("BF16", &[2]), &[0; 4], &[1; 2]).unwrap_err();
        assert!(matches!(length, EncodeError::Length { expected: 4, .. }), "{length}");
    }

    #[test]
    fn flat_positions_end_where_32_bits_do() {
        let last = u64::from(i32::MAX.unsigned_abs());
        assert_eq!(encode_flat(&[last]).unwrap(), i32::MAX.to_le_bytes());
        assert_eq!(encode_flat(&[last, last + 1]).unwrap_err(), last + 1);
        assert!(encode_indices(DeltaFormat::V31, &[last + 1], 1 << 16).is_ok());
        assert_eq!(encode_indices(DeltaFormat::V31, &[last + 1], 1).unwrap_err(), last + 1);
    }
}
