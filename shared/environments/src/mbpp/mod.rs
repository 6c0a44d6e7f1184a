//! MBPP: short Python functions, asked for in words and judged by asserts.

mod row;

use std::sync::Arc;

use grail_protocol::python_random::PythonRandom;

pub use row::{MbppRow, question, test_cases};

use crate::datasets::{DatasetError, EmbeddedFile};
use crate::evaluator::Evaluator;
use crate::python::Programs;
use crate::split::Split;

/// The authors' file with all 974 rows; origin and licence in `data/NOTICE.md`.
pub const EMBEDDED: &[u8] = include_bytes!("../../data/mbpp.jsonl.gz");

/// Seed of the shuffle that divides the test file.
const SHUFFLE_SEED: u64 = 42;

/// One split of MBPP.
pub type Mbpp = Programs<MbppRow>;

impl Mbpp {
    /// The split `train` or `val` of the data that is part of this program.
    ///
    /// # Errors
    /// [`DatasetError::NoSuchSplit`] for `test`.
    pub fn embedded(split: Split, evaluator: Arc<dyn Evaluator>) -> Result<Self, DatasetError> {
        let file = EmbeddedFile { name: "mbpp.jsonl.gz", bytes: EMBEDDED };
        Self::from_parts(split, file.parts(split)?, evaluator)
    }

    /// From the split's own file and the test file.
    pub(crate) fn from_parts(
        split: Split,
        parts: Vec<Vec<MbppRow>>,
        evaluator: Arc<dyn Evaluator>,
    ) -> Result<Self, DatasetError> {
        let own = parts.first().map_or(0, Vec::len);
        let rows: Arc<[MbppRow]> = parts.into_iter().flatten().collect();
        let members = split_rows(own, rows.len() - own, split);
        Self::new(split, rows, members, evaluator)
    }
}

/// Places of `split`'s rows where `own` rows of its own file are followed by `test` rows of the test file: all of its own,
/// then its share of the shuffled test rows, 80 % for `train` and the rest for `val`, in shuffled order.
#[must_use]
pub fn split_rows(own: usize, test: usize, split: Split) -> Vec<usize> {
    let mut shuffled: Vec<usize> = (0..test).collect();
    PythonRandom::from_u64(SHUFFLE_SEED).shuffle(&mut shuffled);
    let (for_train, for_val) = shuffled.split_at(test * 8 / 10);
    let share = if split == Split::Train { for_train } else { for_val };
    (0..own).chain(share.iter().map(|row| own + row)).collect()
}
