//! GSM8K: grade-school maths word problems with a number as answer.

mod answer;
mod reward;
mod row;

use std::path::Path;
use std::sync::Arc;

use grail_protocol::ids::EnvironmentSeed;
use grail_protocol::python_random::PythonRandom;

pub use answer::{gold_answer, normalize, predict};
pub use reward::{ParsedCompletion, evaluate, parse};
pub use row::Gsm8kRow;

pub use crate::datasets::DatasetError;
use crate::datasets::{EmbeddedFile, Overrides, rows_of_file};
use crate::environment::{BoxFuture, Environment, Payload, Task, TaskError};
use crate::evaluation::{Evaluation, Unevaluable};
use crate::id::EnvironmentId;
use crate::split::Split;
use crate::tasks::{SeedRule, Tasks};
use crate::thinking::ThinkingMode;

/// The authors' training file; origin and licence in `data/NOTICE.md`.
pub const EMBEDDED_TRAIN: &[u8] = include_bytes!("../../data/gsm_train.jsonl.gz");

/// Rows of the training file that are held out as `val`.
pub const VAL_ROWS: usize = 250;
/// Seed of the shuffle that picks them.
const VAL_SEED: u64 = 42;

/// One split of GSM8K.
#[derive(Clone, Debug)]
pub struct Gsm8k {
    tasks: Tasks<Gsm8kRow>,
}

impl Gsm8k {
    /// The split `train` or `val` of the data that is part of this program.
    ///
    /// # Errors
    /// [`DatasetError::NotEmbedded`] for `test`, whose file is not part of it.
    pub fn embedded(split: Split) -> Result<Self, DatasetError> {
        if split == Split::Test {
            return Err(DatasetError::NotEmbedded { environment: EnvironmentId::Gsm8k, split });
        }
        let file = EmbeddedFile { name: "gsm_train.jsonl.gz", bytes: EMBEDDED_TRAIN };
        Self::from_parts(split, file.parts(split)?)
    }

    /// `split` from the file at `path` with the columns `question` and `answer`: the training file for `train` and `val`, the
    /// test file for `test`.
    ///
    /// # Errors
    /// [`DatasetError`] if the file cannot be read or is not the published one; see [`Gsm8k::from_file_with`].
    pub fn from_file(path: &Path, split: Split) -> Result<Self, DatasetError> {
        Self::from_file_with(path, split, &Overrides::default())
    }

    /// As [`Gsm8k::from_file`], with a choice of what the file must be.
    ///
    /// # Errors
    /// [`DatasetError`] if the file cannot be read or is neither the published nor the named one.
    pub fn from_file_with(path: &Path, split: Split, overrides: &Overrides) -> Result<Self, DatasetError> {
        Self::from_parts(split, rows_of_file(path, split, overrides)?)
    }

    pub(crate) fn from_parts(split: Split, parts: Vec<Vec<Gsm8kRow>>) -> Result<Self, DatasetError> {
        let rows: Arc<[Gsm8kRow]> = parts.into_iter().flatten().collect();
        let members = split_rows(rows.len(), split);
        Ok(Self { tasks: Tasks::new(split, SeedRule::Fraction, rows, members)? })
    }

    /// Places of the split's rows in the file, in order.
    #[must_use]
    pub fn file_rows(&self) -> &[usize] {
        self.tasks.members()
    }
}

/// Places of `split`'s rows in its file of `rows` rows, ascending. `val` is the first [`VAL_ROWS`] of a shuffle of the
/// training file, as a set; `train` is the rest.
#[must_use]
pub fn split_rows(rows: usize, split: Split) -> Vec<usize> {
    if split == Split::Test {
        return (0..rows).collect();
    }
    let mut order: Vec<usize> = (0..rows).collect();
    PythonRandom::from_u64(VAL_SEED).shuffle(&mut order);
    let (held_out, rest) = order.split_at(VAL_ROWS.min(rows));
    let mut members = if split == Split::Val { held_out.to_vec() } else { rest.to_vec() };
    members.sort_unstable();
    members
}

impl Environment for Gsm8k {
    fn id(&self) -> EnvironmentId {
        EnvironmentId::Gsm8k
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
        let verdict = match &task.payload {
            Payload::Gsm8k { answer } => Ok(evaluate(answer, completion, mode)),
            _ => Err(Unevaluable::foreign(task, self.id())),
        };
        Box::pin(std::future::ready(verdict))
    }
}
