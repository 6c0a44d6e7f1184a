//! What the header says about one tensor, checked against the base.

use std::ops::Range;

use serde_json::Number;

use super::header::Entry;
use super::{DeltaError, DeltaFormat, TensorShape};

/// Integers in which positions are written; they are added up in 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IndexDtype {
    U8,
    U16,
    I32,
}

impl IndexDtype {
    /// Without a name it is the widest.
    fn named(name: Option<&str>, tensor: &str, what: &'static str) -> Result<Self, DeltaError> {
        match name {
            Some("uint8") => Ok(Self::U8),
            Some("uint16") => Ok(Self::U16),
            Some("int32") | None => Ok(Self::I32),
            Some(other) => Err(DeltaError::Dtype {
                tensor: tensor.to_owned(),
                what,
                found: other.to_owned(),
                expected: "uint8, uint16 or int32".to_owned(),
            }),
        }
    }

    /// The first of `narrower` that holds every step, else 32 bits.
    pub(super) fn narrowest(steps: &[i32], narrower: &[Self]) -> Self {
        let largest = steps.iter().copied().max().unwrap_or(0);
        let holds = |dtype: &Self| match dtype {
            Self::U8 => largest <= i32::from(u8::MAX),
            Self::U16 => largest <= i32::from(u16::MAX),
            Self::I32 => true,
        };
        narrower.iter().copied().find(holds).unwrap_or(Self::I32)
    }

    /// The dtype as the header of a payload spells it.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::U8 => "uint8",
            Self::U16 => "uint16",
            Self::I32 => "int32",
        }
    }

    /// Steps in this dtype, which holds every one of them.
    pub(super) fn write(self, steps: &[i32]) -> Vec<u8> {
        let bytes = usize::try_from(self.bytes()).unwrap_or(4);
        steps.iter().flat_map(|step| step.to_le_bytes().into_iter().take(bytes)).collect()
    }

    pub(super) const fn bytes(self) -> u64 {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::I32 => 4,
        }
    }

    pub(super) fn read(self, bytes: &[u8], into: &mut Vec<i64>) {
        into.clear();
        match self {
            Self::U8 => into.extend(bytes.iter().map(|byte| i64::from(*byte))),
            Self::U16 => into.extend(bytes.as_chunks().0.iter().map(|chunk| i64::from(u16::from_le_bytes(*chunk)))),
            Self::I32 => into.extend(bytes.as_chunks().0.iter().map(|chunk| i64::from(i32::from_le_bytes(*chunk)))),
        }
    }
}

/// Integers of one kind at an offset of the payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Indices {
    pub(super) at: u64,
    pub(super) dtype: IndexDtype,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Layout {
    /// Differences of positions.
    Flat(Indices),
    /// Differences of rows, and columns that begin anew with each row.
    RowColumn { rows: Indices, columns: Indices },
}

/// The changes of one tensor, with everything checked that its entry says.
#[derive(Clone, Debug)]
pub struct TensorDelta {
    pub(super) layout: Layout,
    /// Where the values begin.
    pub(super) values: u64,
    pub(super) rows: i64,
    pub(super) columns: i64,
    /// Number of elements that are listed; some may have the value that they had.
    pub listed: u64,
    /// Bytes of one value.
    pub width: usize,
    /// Elements of the tensor.
    pub elements: u64,
}

/// Names of the value dtypes, as the payload and as safetensors spell them.
pub(super) const VALUE_DTYPES: [(&str, &str, usize); 3] =
    [("bfloat16", "BF16", 2), ("float16", "F16", 2), ("float32", "F32", 4)];

/// The data area of a payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct DataArea {
    /// Where it begins.
    pub(super) start: u64,
    pub(super) bytes: u64,
}

impl TensorDelta {
    /// Checks an entry against the tensor of the base, in this order: shape, dtypes, bounds, sizes. The positions
    /// themselves are not read.
    pub(super) fn checked(
        entry: &Entry,
        format: DeltaFormat,
        base: &TensorShape,
        data: DataArea,
    ) -> Result<Self, DeltaError> {
        let (rows, columns) = checked_shape(entry, base)?;
        let width = checked_value_dtype(entry, base)?;
        let index_dtypes = match format {
            DeltaFormat::V2 | DeltaFormat::V3 => (IndexDtype::I32, IndexDtype::I32),
            DeltaFormat::V31 => (
                IndexDtype::named(entry.row_dtype.as_deref(), &entry.name, "row_dtype")?,
                IndexDtype::named(entry.col_dtype.as_deref(), &entry.name, "col_dtype")?,
            ),
        };
        let chunks = Chunks { entry, data };
        let values = chunks.range("values", &entry.values_offset, Some(&entry.values_size), 0)?;
        let listed = length(&values) / width as u64;
        let layout = match format {
            DeltaFormat::V2 => chunks.flat(&values, listed, width)?,
            DeltaFormat::V3 | DeltaFormat::V31 => chunks.rows_and_columns(&values, listed, width, index_dtypes)?,
        };
        Ok(Self { layout, values: values.start, rows, columns, listed, width, elements: base.elements() })
    }
}

/// Rows and columns of the tensor; a scalar has neither and cannot be written as a delta.
fn checked_shape(entry: &Entry, base: &TensorShape) -> Result<(i64, i64), DeltaError> {
    let same = entry.shape.len() == base.shape.len()
        && entry.shape.iter().zip(&base.shape).all(|(found, expected)| found.as_u64() == Some(*expected));
    let sizes = match base.shape.split_first() {
        Some((rows, rest)) if same => {
            let columns = rest.iter().try_fold(1_i64, |product, size| product.checked_mul(i64::try_from(*size).ok()?));
            let rows = i64::try_from(*rows).ok();
            // Every position must have a number.
            rows.zip(columns).filter(|(rows, columns)| rows.checked_mul(*columns).is_some())
        }
        _ => None,
    };
    sizes.ok_or_else(|| DeltaError::Shape {
        tensor: entry.name.clone(),
        found: format!("[{}]", entry.shape.iter().map(Number::to_string).collect::<Vec<_>>().join(", ")),
        expected: format!("{:?}", base.shape),
    })
}

fn checked_value_dtype(entry: &Entry, base: &TensorShape) -> Result<usize, DeltaError> {
    let known = VALUE_DTYPES.iter().find(|(name, _, _)| *name == entry.value_dtype);
    match known {
        Some((_, dtype, width)) if *dtype == base.dtype => Ok(*width),
        _ => Err(DeltaError::Dtype {
            tensor: entry.name.clone(),
            what: "value_dtype",
            found: entry.value_dtype.clone(),
            expected: format!("that of {}", base.dtype),
        }),
    }
}

const fn length(range: &Range<u64>) -> u64 {
    range.end - range.start
}

struct Chunks<'a> {
    entry: &'a Entry,
    data: DataArea,
}

impl Chunks<'_> {
    fn flat(&self, values: &Range<u64>, listed: u64, width: usize) -> Result<Layout, DeltaError> {
        let indices = self.range("indices", &self.entry.indices_offset, self.entry.indices_size.as_ref(), 0)?;
        self.count("values", values, listed, width as u64)?;
        self.count("indices", &indices, listed, IndexDtype::I32.bytes())?;
        Ok(Layout::Flat(Indices { at: indices.start, dtype: IndexDtype::I32 }))
    }

    /// The columns follow the rows; there is no offset of their own.
    fn rows_and_columns(
        &self,
        values: &Range<u64>,
        listed: u64,
        width: usize,
        (row, column): (IndexDtype, IndexDtype),
    ) -> Result<Layout, DeltaError> {
        let entry = self.entry;
        let rows = self.range("rows", &entry.indices_offset, entry.rows_size.as_ref(), 0)?;
        let columns = self.range("columns", &entry.indices_offset, entry.cols_size.as_ref(), length(&rows))?;
        self.count("values", values, listed, width as u64)?;
        self.count("rows", &rows, listed, row.bytes())?;
        self.count("columns", &columns, listed, column.bytes())?;
        Ok(Layout::RowColumn {
            rows: Indices { at: rows.start, dtype: row },
            columns: Indices { at: columns.start, dtype: column },
        })
    }

    /// The chunk of `size` bytes that begins `skip` bytes after `offset`; a size that is no number is outside the data.
    fn range(
        &self,
        chunk: &'static str,
        offset: &Number,
        size: Option<&Number>,
        skip: u64,
    ) -> Result<Range<u64>, DeltaError> {
        let start = offset.as_u64().and_then(|offset| offset.checked_add(skip));
        let end = start.zip(size.and_then(Number::as_u64)).and_then(|(start, size)| start.checked_add(size));
        match start.zip(end) {
            Some((start, end)) if end <= self.data.bytes => Ok(self.data.start + start..self.data.start + end),
            _ => Err(DeltaError::Bounds { tensor: self.entry.name.clone(), chunk, data: self.data.bytes }),
        }
    }

    fn count(&self, chunk: &'static str, range: &Range<u64>, listed: u64, width: u64) -> Result<(), DeltaError> {
        let found = length(range);
        if listed.checked_mul(width) == Some(found) {
            return Ok(());
        }
        let expected = format!("{listed} of {width}");
        Err(DeltaError::Count { tensor: self.entry.name.clone(), chunk, found, expected })
    }
}
