//! Rows of GSM8K.

use std::sync::Arc;

use crate::datasets::{FieldError, Fields, Row};
use crate::environment::Payload;
use crate::id::EnvironmentId;

/// One problem of the data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gsm8kRow {
    /// The problem; what the model is asked.
    pub question: Arc<str>,
    /// The worked solution.
    pub answer: Arc<str>,
}

impl Row for Gsm8kRow {
    const ENVIRONMENT: EnvironmentId = EnvironmentId::Gsm8k;

    fn read(fields: &dyn Fields) -> Result<Self, FieldError> {
        Ok(Self { question: fields.text("question")?, answer: fields.text("answer")? })
    }

    fn question(&self) -> String {
        self.question.to_string()
    }

    fn payload(&self) -> Payload {
        Payload::Gsm8k { answer: Arc::clone(&self.answer) }
    }
}
