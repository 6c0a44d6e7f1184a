//! Rows of MATH.

use std::sync::Arc;

use grail_text::python;

use super::boxed::first_boxed;
use crate::datasets::{FieldError, Fields, Row};
use crate::environment::Payload;
use crate::id::EnvironmentId;

/// One problem of the data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MathRow {
    /// The problem; what the model is asked.
    pub problem: Arc<str>,
    /// Difficulty in words, `Level 1` to `Level 5`.
    pub level: Arc<str>,
    /// Branch of mathematics, the column `type`.
    pub subject: Arc<str>,
    /// The worked solution, with the answer in a box.
    pub solution: Arc<str>,
}

/// Number of a difficulty given in words: its first run of digits, 0 without one.
#[must_use]
pub fn level(text: &str) -> u64 {
    let digits = text.chars().map(python::decimal_digit).skip_while(Option::is_none).map_while(|digit| digit);
    digits.fold(0, |number: u64, digit| number.saturating_mul(10).saturating_add(u64::from(digit)))
}

impl Row for MathRow {
    const ENVIRONMENT: EnvironmentId = EnvironmentId::Math;

    fn read(fields: &dyn Fields) -> Result<Self, FieldError> {
        Ok(Self {
            problem: fields.text("problem")?,
            level: fields.text("level")?,
            subject: fields.text("type")?,
            solution: fields.text("solution")?,
        })
    }

    fn question(&self) -> String {
        self.problem.to_string()
    }

    fn payload(&self) -> Payload {
        Payload::Math {
            answer: first_boxed(&self.solution).unwrap_or_default().into(),
            solution: Arc::clone(&self.solution),
            level: level(&self.level),
            subject: Arc::clone(&self.subject),
        }
    }
}
