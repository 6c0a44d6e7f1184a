//! Rows of HumanEval.

use std::sync::Arc;

use crate::datasets::{FieldError, Fields, Row};
use crate::environment::Payload;
use crate::id::EnvironmentId;

/// One problem of the data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HumanEvalRow {
    /// Its id, `HumanEval/0` to `HumanEval/163`.
    pub task_id: Arc<str>,
    /// Imports, signature and doc string; what the model is asked.
    pub prompt: Arc<str>,
    /// The function's body.
    pub canonical_solution: Arc<str>,
    /// Defines `check`, which tests the function it is given.
    pub test: Arc<str>,
    /// Name of the function.
    pub entry_point: Arc<str>,
}

/// The one test as it is run; none if it cannot be put together. The prompt is not part of it: a completion brings its own
/// imports.
#[must_use]
pub fn test_cases(test: &str, entry_point: &str) -> Vec<String> {
    if test.is_empty() || entry_point.is_empty() {
        return Vec::new();
    }
    vec![format!("{test}\ncheck({entry_point})")]
}

impl Row for HumanEvalRow {
    const ENVIRONMENT: EnvironmentId = EnvironmentId::HumanEval;

    fn read(fields: &dyn Fields) -> Result<Self, FieldError> {
        Ok(Self {
            task_id: fields.text("task_id")?,
            prompt: fields.text("prompt")?,
            canonical_solution: fields.text("canonical_solution")?,
            test: fields.text("test")?,
            entry_point: fields.text("entry_point")?,
        })
    }

    fn question(&self) -> String {
        self.prompt.to_string()
    }

    fn payload(&self) -> Payload {
        Payload::Python {
            dataset_id: Arc::clone(&self.task_id),
            tests: test_cases(&self.test, &self.entry_point).into(),
            reference_solution: format!("{}{}", self.prompt, self.canonical_solution).into(),
        }
    }
}
