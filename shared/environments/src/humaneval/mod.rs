//! HumanEval: Python functions given by signature and doc string, judged by one test program each.

mod row;

use std::sync::Arc;

pub use row::{HumanEvalRow, test_cases};

use crate::datasets::{DatasetError, EmbeddedFile};
use crate::evaluator::Evaluator;
use crate::python::Programs;
use crate::split::Split;

/// The authors' file; origin and licence in `data/NOTICE.md`.
pub const EMBEDDED: &[u8] = include_bytes!("../../data/HumanEval.jsonl.gz");

/// HumanEval, which has one split.
pub type HumanEval = Programs<HumanEvalRow>;

impl HumanEval {
    /// The data that is part of this program.
    ///
    /// # Errors
    /// [`DatasetError`] if it is damaged.
    pub fn embedded(evaluator: Arc<dyn Evaluator>) -> Result<Self, DatasetError> {
        let file = EmbeddedFile { name: "HumanEval.jsonl.gz", bytes: EMBEDDED };
        Self::from_parts(file.parts(Split::Test)?, evaluator)
    }

    pub(crate) fn from_parts(
        parts: Vec<Vec<HumanEvalRow>>,
        evaluator: Arc<dyn Evaluator>,
    ) -> Result<Self, DatasetError> {
        let rows: Arc<[HumanEvalRow]> = parts.into_iter().flatten().collect();
        let members = (0..rows.len()).collect();
        Self::new(Split::Test, rows, members, evaluator)
    }
}
