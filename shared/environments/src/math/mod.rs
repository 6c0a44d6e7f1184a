//! MATH: competition mathematics with a formula as answer.

mod boxed;
mod equality;
mod float;
mod normal;
mod reward;
mod row;
mod stand_in;

use std::sync::Arc;

use grail_protocol::ids::EnvironmentSeed;
use grail_protocol::python_random::PythonRandom;

pub use boxed::{first_boxed, last_boxed};
pub use equality::{Decision, decide};
pub use normal::normalize;
pub use reward::{ParsedCompletion, parse};
pub use row::{MathRow, level};
pub use stand_in::{StandInFile, stand_in_files, stand_in_rows};

use crate::datasets::DatasetError;
use crate::environment::{BoxFuture, Environment, Task, TaskError};
use crate::evaluation::{Evaluation, GroupUnevaluable, Unevaluable};
use crate::evaluator::Evaluator;
use crate::group::{self, GroupEvaluator};
use crate::id::EnvironmentId;
use crate::split::Split;
use crate::tasks::{SeedRule, Tasks};
use crate::thinking::ThinkingMode;

/// Rows of the training files that are held out as `val`.
pub const VAL_ROWS: usize = 500;
/// Seed of the shuffles that pick them.
const VAL_SEED: u64 = 42;

/// One of the seven parts of the data set, a configuration of its own on the hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subset {
    /// Name of the configuration.
    pub name: &'static str,
    /// What its rows have as `type`.
    pub subject: &'static str,
    /// Rows of the training file.
    pub train: usize,
    /// Rows of the test file.
    pub test: usize,
}

const fn subset(name: &'static str, subject: &'static str, train: usize, test: usize) -> Subset {
    Subset { name, subject, train, test }
}

/// The parts in the order in which they are read; both files and shuffles follow it.
pub const SUBSETS: [Subset; 7] = [
    subset("algebra", "Algebra", 1744, 1187),
    subset("counting_and_probability", "Counting & Probability", 771, 474),
    subset("geometry", "Geometry", 870, 479),
    subset("intermediate_algebra", "Intermediate Algebra", 1295, 903),
    subset("number_theory", "Number Theory", 869, 540),
    subset("prealgebra", "Prealgebra", 1205, 871),
    subset("precalculus", "Precalculus", 746, 546),
];

/// One split of MATH.
#[derive(Clone, Debug)]
pub struct Math {
    tasks: Tasks<MathRow>,
    evaluator: Arc<dyn Evaluator>,
}

impl Math {
    /// A stand-in with the sizes of the real data set and made-up problems, for demonstrations: no validator has these rows,
    /// so nothing that is mined on them is worth anything.
    ///
    /// # Errors
    /// Never for the sizes that are built in.
    pub fn stand_in(split: Split, evaluator: Arc<dyn Evaluator>) -> Result<Self, DatasetError> {
        Self::from_parts(split, stand_in_rows(split), evaluator)
    }

    /// From the rows of each subset's file, in order.
    pub(crate) fn from_parts(
        split: Split,
        parts: Vec<Vec<MathRow>>,
        evaluator: Arc<dyn Evaluator>,
    ) -> Result<Self, DatasetError> {
        let lengths: Vec<usize> = parts.iter().map(Vec::len).collect();
        let rows: Arc<[MathRow]> = parts.into_iter().flatten().collect();
        let tasks = Tasks::new(split, SeedRule::Fraction, rows, split_rows(&lengths, split))?;
        Ok(Self { tasks, evaluator })
    }

    /// Places of the split's rows among all rows that were read, in order.
    #[must_use]
    pub fn file_rows(&self) -> &[usize] {
        self.tasks.members()
    }
}

/// Places of `split`'s rows where files of the given `lengths` follow each other, ascending.
///
/// One generator shuffles file after file; of each, a share of [`VAL_ROWS`] by its length is held out as `val`, rounded half
/// to even, and the last file gives what is still missing.
#[must_use]
pub fn split_rows(lengths: &[usize], split: Split) -> Vec<usize> {
    let total: usize = lengths.iter().sum();
    if split == Split::Test {
        return (0..total).collect();
    }
    let mut generator = PythonRandom::from_u64(VAL_SEED);
    let mut is_held_out = vec![false; total];
    let (mut start, mut left) = (0, VAL_ROWS);
    for (place, length) in lengths.iter().copied().enumerate() {
        let is_last = place + 1 == lengths.len();
        let share = if is_last { left } else { rounded_quotient(VAL_ROWS * length, total) };
        let share = share.min(length).min(left);
        let mut order: Vec<usize> = (0..length).collect();
        generator.shuffle(&mut order);
        for row in &order[..share] {
            is_held_out[start + row] = true;
        }
        start += length;
        left -= share;
    }
    (0..total).filter(|row| is_held_out[*row] == (split == Split::Val)).collect()
}

/// `numerator / denominator`, rounded to the nearest integer, halves to the even one; 0 for a denominator of 0.
fn rounded_quotient(numerator: usize, denominator: usize) -> usize {
    let quotient = numerator.checked_div(denominator).unwrap_or(0);
    let rest = numerator - quotient * denominator;
    let is_up = 2 * rest > denominator || (2 * rest == denominator && quotient % 2 == 1);
    if denominator > 0 && is_up { quotient + 1 } else { quotient }
}

impl Environment for Math {
    fn id(&self) -> EnvironmentId {
        EnvironmentId::Math
    }

    fn split(&self) -> Split {
        self.tasks.split()
    }

    fn task_count(&self) -> usize {
        self.tasks.count()
    }

    fn task(&self, seed: EnvironmentSeed) -> Result<Task, TaskError> {
        Ok(self.tasks.of_seed(seed))
    }

    fn task_by_id(&self, task_id: Option<&str>) -> Result<Task, TaskError> {
        Ok(self.tasks.of_id(task_id))
    }

    fn evaluate<'a>(
        &'a self,
        task: &'a Task,
        completion: &'a str,
        mode: ThinkingMode,
    ) -> BoxFuture<'a, Result<Evaluation, Unevaluable>> {
        Box::pin(reward::evaluate(self.evaluator.as_ref(), task, completion, mode))
    }

    fn evaluate_group<'a>(
        &'a self,
        task: &'a Task,
        completions: &'a [String],
        mode: ThinkingMode,
    ) -> BoxFuture<'a, Result<Vec<Evaluation>, GroupUnevaluable>> {
        Box::pin(async move {
            let once = GroupEvaluator::new(self.evaluator.as_ref());
            group::evaluate_all(completions, |completion| reward::evaluate(&once, task, completion, mode)).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotients_round_half_to_even() {
        let cases =
            [(1, 2, 0), (3, 2, 2), (5, 2, 2), (7, 2, 4), (1, 3, 0), (2, 3, 1), (500 * 746, 7500, 50), (0, 0, 0)];
        for (numerator, denominator, rounded) in cases {
            assert_eq!(rounded_quotient(numerator, denominator), rounded, "{numerator}/{denominator}");
        }
    }

    #[test]
    fn small_files_are_held_out_whole() {
        assert_eq!(split_rows(&[3, 2], Split::Val), [0, 1, 2, 3, 4]);
        assert!(split_rows(&[3, 2], Split::Train).is_empty());
        assert_eq!(split_rows(&[3, 2], Split::Test), [0, 1, 2, 3, 4]);
    }
}
