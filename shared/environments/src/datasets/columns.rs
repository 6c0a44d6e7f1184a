//! Rows in Arrow's columns.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type};
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;

use super::row::{FieldError, Fields};

/// One row of a batch.
pub(super) struct BatchRow<'b> {
    pub(super) batch: &'b RecordBatch,
    pub(super) row: usize,
}

impl BatchRow<'_> {
    /// Reads `column` with `read`, which says `None` for a type it does not know.
    fn cell<T: Default>(
        &self,
        column: &'static str,
        expected: &'static str,
        read: impl FnOnce(&dyn Array, usize) -> Option<T>,
    ) -> Result<T, FieldError> {
        let Some(array) = self.batch.column_by_name(column) else { return Ok(T::default()) };
        read(array.as_ref(), self.row).ok_or_else(|| FieldError {
            column,
            expected,
            found: format!("values of type {}", array.data_type()),
        })
    }
}

impl Fields for BatchRow<'_> {
    fn text(&self, column: &'static str) -> Result<Arc<str>, FieldError> {
        self.cell(column, "a text", text).map(Arc::from)
    }

    fn texts(&self, column: &'static str) -> Result<Vec<String>, FieldError> {
        self.cell(column, "a list of texts", texts)
    }

    fn integer(&self, column: &'static str) -> Result<Option<i64>, FieldError> {
        self.cell(column, "a whole number", |array, row| {
            if array.is_null(row) || *array.data_type() == DataType::Null {
                Some(None)
            } else {
                integer(array, row).map(Some)
            }
        })
    }
}

/// The text at `row`, empty for null; `None` if the array holds something else.
fn text(array: &dyn Array, row: usize) -> Option<String> {
    if array.is_null(row) {
        return Some(String::new());
    }
    match array.data_type() {
        DataType::Null => Some(String::new()),
        DataType::Utf8 => Some(array.as_string::<i32>().value(row).to_owned()),
        DataType::LargeUtf8 => Some(array.as_string::<i64>().value(row).to_owned()),
        DataType::Utf8View => Some(array.as_string_view().value(row).to_owned()),
        DataType::Dictionary(_, _) => {
            let dictionary = array.as_any_dictionary_opt()?;
            let key = usize::try_from(integer(dictionary.keys(), row)?).ok()?;
            text(dictionary.values().as_ref(), key)
        }
        _ => None,
    }
}

/// The texts of the list at `row`.
fn texts(array: &dyn Array, row: usize) -> Option<Vec<String>> {
    if array.is_null(row) {
        return Some(Vec::new());
    }
    let items = match array.data_type() {
        DataType::Null => return Some(Vec::new()),
        DataType::List(_) => array.as_list::<i32>().value(row),
        DataType::LargeList(_) => array.as_list::<i64>().value(row),
        _ => return None,
    };
    (0..items.len()).map(|item| text(items.as_ref(), item)).collect()
}

/// The whole number at `row`, which is not null.
fn integer(array: &dyn Array, row: usize) -> Option<i64> {
    match array.data_type() {
        DataType::Int8 => Some(array.as_primitive::<Int8Type>().value(row).into()),
        DataType::Int16 => Some(array.as_primitive::<Int16Type>().value(row).into()),
        DataType::Int32 => Some(array.as_primitive::<Int32Type>().value(row).into()),
        DataType::Int64 => Some(array.as_primitive::<Int64Type>().value(row)),
        DataType::UInt8 => Some(array.as_primitive::<UInt8Type>().value(row).into()),
        DataType::UInt16 => Some(array.as_primitive::<UInt16Type>().value(row).into()),
        DataType::UInt32 => Some(array.as_primitive::<UInt32Type>().value(row).into()),
        DataType::UInt64 => array.as_primitive::<UInt64Type>().value(row).try_into().ok(),
        _ => None,
    }
}
