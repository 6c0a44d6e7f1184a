//! Rows of MBPP.

use std::sync::Arc;

use grail_text::python;

use crate::datasets::{FieldError, Fields, Row};
use crate::environment::Payload;
use crate::id::EnvironmentId;

/// One problem of the data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MbppRow {
    /// Its number, 1 to 974.
    pub task_id: i64,
    /// The problem in words.
    pub text: Arc<str>,
    /// A program that solves it.
    pub code: Arc<str>,
    /// Asserts, one a test.
    pub test_list: Vec<String>,
    /// Program text that the asserts need.
    pub test_setup_code: Arc<str>,
    /// Lines of imports that the asserts need; a column that the configuration `full` does not have.
    pub test_imports: Vec<String>,
}

/// What the model is asked: `text`, and the first line of `code` that defines a function, with `pass` as its body.
///
/// The line may stand anywhere, also in a class or a doc string, and is not cut at its colon.
#[must_use]
pub fn question(text: &str, code: &str) -> String {
    match signature(code) {
        Some(line) => format!("{text}\n\n{line}\n    pass"),
        None => text.to_owned(),
    }
}

fn signature(code: &str) -> Option<&str> {
    // Only line feeds end a line; stripping removes the carriage returns that most rows carry.
    code.split('\n').map(python::strip).find(|line| line.starts_with("def "))
}

/// The tests as they are run: lines of imports and set-up code before each assert.
#[must_use]
pub fn test_cases(test_list: &[String], test_setup_code: &str, test_imports: &[String]) -> Vec<String> {
    let mut setup = test_imports.join("\n");
    if !test_setup_code.is_empty() {
        setup = format!("{setup}\n{test_setup_code}");
    }
    let test = |line: &String| if setup.is_empty() { line.clone() } else { format!("{setup}\n{line}") };
    test_list.iter().map(test).collect()
}

impl Row for MbppRow {
    const ENVIRONMENT: EnvironmentId = EnvironmentId::Mbpp;

    fn read(fields: &dyn Fields) -> Result<Self, FieldError> {
        Ok(Self {
            task_id: fields.integer("task_id")?.unwrap_or_default(),
            text: fields.text("text")?,
            code: fields.text("code")?,
            test_list: fields.texts("test_list")?,
            test_setup_code: fields.text("test_setup_code")?,
            test_imports: fields.texts("test_imports")?,
        })
    }

    fn number(&self) -> Option<i64> {
        Some(self.task_id)
    }

    fn question(&self) -> String {
        question(&self.text, &self.code)
    }

    fn payload(&self) -> Payload {
        Payload::Python {
            dataset_id: self.task_id.to_string().into(),
            tests: test_cases(&self.test_list, &self.test_setup_code, &self.test_imports).into(),
            reference_solution: Arc::clone(&self.code),
        }
    }
}
