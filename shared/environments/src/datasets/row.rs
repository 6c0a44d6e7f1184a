//! Rows of data sets and the columns they are read from.

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::environment::Payload;
use crate::id::EnvironmentId;

/// A column that holds something other than a row needs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("column `{column}` holds {found}, {expected} is expected")]
pub struct FieldError {
    /// Name of the column.
    pub column: &'static str,
    /// What the row needs.
    pub expected: &'static str,
    /// What is there.
    pub found: String,
}

/// The columns of one row, by name. What is missing or null is empty; other columns do not matter.
pub trait Fields {
    /// A text.
    ///
    /// # Errors
    /// [`FieldError`] if the column holds something else.
    fn text(&self, column: &'static str) -> Result<Arc<str>, FieldError>;

    /// A list of texts.
    ///
    /// # Errors
    /// As [`Fields::text`].
    fn texts(&self, column: &'static str) -> Result<Vec<String>, FieldError>;

    /// A whole number.
    ///
    /// # Errors
    /// As [`Fields::text`].
    fn integer(&self, column: &'static str) -> Result<Option<i64>, FieldError>;
}

/// A row of an environment's data set.
pub trait Row: Clone + fmt::Debug + Send + Sync + Sized + 'static {
    /// The environment whose data it is.
    const ENVIRONMENT: EnvironmentId;

    /// Reads a row.
    ///
    /// # Errors
    /// [`FieldError`] for a column of the wrong type.
    fn read(fields: &dyn Fields) -> Result<Self, FieldError>;

    /// The row's own number, where files hold rows of several splits that are told apart by it.
    fn number(&self) -> Option<i64> {
        None
    }

    /// Text of the user message.
    fn question(&self) -> String;

    /// What is needed to judge a completion.
    fn payload(&self) -> Payload;
}

impl Fields for Map<String, Value> {
    fn text(&self, column: &'static str) -> Result<Arc<str>, FieldError> {
        match self.get(column) {
            None | Some(Value::Null) => Ok(Arc::from("")),
            Some(Value::String(text)) => Ok(Arc::from(text.as_str())),
            Some(other) => Err(unexpected(column, "a text", other)),
        }
    }

    fn texts(&self, column: &'static str) -> Result<Vec<String>, FieldError> {
        let items = match self.get(column) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(items)) => items,
            Some(other) => return Err(unexpected(column, "a list of texts", other)),
        };
        let text = |item: &Value| match item {
            Value::Null => Ok(String::new()),
            Value::String(text) => Ok(text.clone()),
            other => Err(unexpected(column, "a list of texts", other)),
        };
        items.iter().map(text).collect()
    }

    fn integer(&self, column: &'static str) -> Result<Option<i64>, FieldError> {
        match self.get(column) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| unexpected(column, "a whole number", value)),
        }
    }
}

fn unexpected(column: &'static str, expected: &'static str, found: &Value) -> FieldError {
    let found = match found {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    FieldError { column, expected, found: found.to_owned() }
}
