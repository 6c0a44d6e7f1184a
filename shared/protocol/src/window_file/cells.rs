//! Cells of Arrow columns by Python's eyes: a foreign file may use other types than ours for the same values.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, StructArray};
use arrow_schema::DataType;

use super::row::List;
use crate::json::{Object, Value};

/// A column that may be missing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Column<'a>(pub(super) Option<&'a ArrayRef>);

impl<'a> Column<'a> {
    /// Integers of any width, and floats without a fraction; anything else reads as null.
    pub(super) fn int(self, row: usize) -> Option<i64> {
        match self.value(row) {
            Value::Int(value) => Some(value),
            // Floats up to 2^53 hold whole numbers exactly; no number of the protocol is larger.
            Value::Float(value) if value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0 => {
                #[expect(clippy::cast_possible_truncation, reason = "a whole number within 2^53")]
                let value = value as i64;
                Some(value)
            }
            Value::Bool(value) => Some(i64::from(value)),
            _ => None,
        }
    }

    pub(super) fn float(self, row: usize) -> Option<f64> {
        match self.value(row) {
            Value::Float(value) => Some(value),
            #[expect(clippy::cast_precision_loss, reason = "Python's float() of an integer column rounds likewise")]
            Value::Int(value) => Some(value as f64),
            _ => None,
        }
    }

    pub(super) fn bool(self, row: usize) -> Option<bool> {
        self.value(row).as_bool()
    }

    /// Text without a copy.
    pub(super) fn str(self, row: usize) -> Option<&'a str> {
        let array = self.0?;
        if array.is_null(row) {
            return None;
        }
        match array.data_type() {
            DataType::Utf8 => Some(array.as_string::<i32>().value(row)),
            DataType::LargeUtf8 => Some(array.as_string::<i64>().value(row)),
            DataType::Utf8View => Some(array.as_string_view().value(row)),
            _ => None,
        }
    }

    pub(super) fn string(self, row: usize) -> Option<String> {
        self.str(row).map(str::to_owned)
    }

    /// Any cell as the value that Python would see; null for a type that has no JSON counterpart.
    pub(super) fn value(self, row: usize) -> Value {
        self.0.map_or(Value::Null, |array| json(array, row))
    }

    /// The structure of a cell that is one and is not null.
    pub(super) fn structure(self, row: usize) -> Option<&'a StructArray> {
        let array = self.0?.as_struct_opt()?;
        (!array.is_null(row)).then_some(array)
    }

    /// A list cell; `None` for a null or for something else than a list.
    pub(super) fn ints(self, row: usize) -> Option<List<i32>> {
        let values = self.elements(row)?;
        let plain = values.as_primitive_opt::<Int32Type>().filter(|values| values.null_count() == 0);
        if let Some(plain) = plain {
            return Some(List::Plain(plain.values().to_vec()));
        }
        // Other widths of integers mean the same numbers.
        let found = other(&values);
        let narrow = found.iter().map(|value| i32::try_from(value.as_i64()?).ok()).collect::<Option<Vec<i32>>>();
        Some(narrow.map_or(List::Other(found), List::Plain))
    }

    /// As [`Self::ints`]; binary64 is kept as it is, because its text differs from that of a widened binary32.
    pub(super) fn floats(self, row: usize) -> Option<List<f32>> {
        let values = self.elements(row)?;
        let plain = values.as_primitive_opt::<Float32Type>().filter(|values| values.null_count() == 0);
        Some(plain.map_or_else(|| List::Other(other(&values)), |values| List::Plain(values.values().to_vec())))
    }

    fn elements(self, row: usize) -> Option<ArrayRef> {
        let array = self.0?;
        if array.is_null(row) {
            return None;
        }
        elements(array, row)
    }
}

/// Child column of a structure.
pub(super) fn child<'a>(structure: &'a StructArray, name: &str) -> Column<'a> {
    Column(structure.column_by_name(name))
}

fn other(values: &ArrayRef) -> Vec<Value> {
    (0..values.len()).map(|index| json(values, index)).collect()
}

fn elements(array: &ArrayRef, row: usize) -> Option<ArrayRef> {
    match array.data_type() {
        DataType::List(_) => Some(array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => Some(array.as_list::<i64>().value(row)),
        DataType::FixedSizeList(..) => Some(array.as_fixed_size_list().value(row)),
        _ => None,
    }
}

fn json(array: &ArrayRef, row: usize) -> Value {
    if array.is_null(row) {
        return Value::Null;
    }
    macro_rules! primitive {
        ($($data_type:ident, $arrow_type:ty, $wide:ty);* $(;)?) => {
            match array.data_type() {
                $(DataType::$data_type => Some(Value::from(<$wide>::from(array.as_primitive::<$arrow_type>().value(row)))),)*
                _ => None,
            }
        };
    }
    let number = primitive! {
        Int8, Int8Type, i64;
        Int16, Int16Type, i64;
        Int32, Int32Type, i64;
        Int64, Int64Type, i64;
        UInt8, UInt8Type, i64;
        UInt16, UInt16Type, i64;
        UInt32, UInt32Type, i64;
        UInt64, UInt64Type, num_bigint::BigInt;
        Float16, Float16Type, f64;
        Float32, Float32Type, f64;
        Float64, Float64Type, f64;
    };
    if let Some(number) = number {
        return number;
    }
    match array.data_type() {
        DataType::Boolean => Value::from(array.as_boolean().value(row)),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            Column(Some(array)).str(row).map_or(Value::Null, Value::from)
        }
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..) => {
            let values =
                elements(array, row).map(|values| (0..values.len()).map(|index| json(&values, index)).collect());
            Value::Array(values.unwrap_or_default())
        }
        DataType::Struct(fields) => {
            let structure = array.as_struct();
            let members = fields.iter().zip(structure.columns());
            Value::Object(Object::from_pairs(
                members.map(|(field, column)| (field.name().as_str().into(), json(column, row))).collect(),
            ))
        }
        _ => Value::Null,
    }
}
