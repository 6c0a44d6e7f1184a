//! GSM8K: grade-school maths word problems with a number as answer.

mod answer;
mod dataset;
mod reward;

use std::path::Path;
use std::sync::{Arc, LazyLock};

use grail_protocol::ids::EnvironmentSeed;

pub use answer::{gold_answer, normalize, predict};
pub use dataset::{DatasetCheck, DatasetError, Fingerprint, Row, VAL_ROWS, parse_rows, read_rows, split_rows};
pub use reward::{ParsedCompletion, evaluate, parse};

use crate::environment::{BoxFuture, Environment, Evaluation, Payload, Task, TaskError, Unevaluable};
use crate::id::EnvironmentId;
use crate::split::Split;
use crate::task_id::TaskNumber;
use crate::thinking::ThinkingMode;

/// The authors' training file; origin and licence in `data/NOTICE.md`.
pub static EMBEDDED_TRAIN: &[u8] = include_bytes!("../../data/gsm_train.jsonl.gz");

/// One split of GSM8K.
#[derive(Clone, Debug)]
pub struct Gsm8k {
    split: Split,
    /// All rows of the file.
    rows: Arc<[Row]>,
    /// Rows of the split, as places in `rows`.
    members: Arc<[usize]>,
}

impl Gsm8k {
    /// The split `train` or `val` of the data that is part of this program.
    ///
    /// # Errors
    /// [`DatasetError::NotEmbedded`] for `test`, whose file is not part of it.
    pub fn embedded(split: Split) -> Result<Self, DatasetError> {
        static ROWS: LazyLock<Result<Arc<[Row]>, Arc<DatasetError>>> =
            LazyLock::new(|| parse_rows(EMBEDDED_TRAIN, Path::new("(embedded) gsm_train.jsonl.gz")).map_err(Arc::new));
        if split == Split::Test {
            return Err(DatasetError::NotEmbedded { split });
        }
        let rows = ROWS.as_ref().map_err(|error| DatasetError::Embedded(Arc::clone(error)))?;
        Self::from_rows(Arc::clone(rows), Path::new("(embedded) gsm_train.jsonl.gz"), split, DatasetCheck::Published)
    }

    /// `split` from the file at `path`, JSON lines with `question` and `answer`, gzip-compressed or not: the training file
    /// for `train` and `val`, the test file for `test`.
    ///
    /// # Errors
    /// [`DatasetError`] if the file cannot be read or is not the published one; see [`Gsm8k::from_file_with`].
    pub fn from_file(path: &Path, split: Split) -> Result<Self, DatasetError> {
        Self::from_file_with(path, split, DatasetCheck::Published)
    }

    /// As [`Gsm8k::from_file`], with a choice of what the file must be.
    ///
    /// # Errors
    /// [`DatasetError`] if the file cannot be read or `check` refuses it.
    pub fn from_file_with(path: &Path, split: Split, check: DatasetCheck) -> Result<Self, DatasetError> {
        Self::from_rows(read_rows(path)?, path, split, check)
    }

    fn from_rows(rows: Arc<[Row]>, path: &Path, split: Split, check: DatasetCheck) -> Result<Self, DatasetError> {
        check.verify(&rows, path, split)?;
        let members: Arc<[usize]> = split_rows(rows.len(), split).into();
        if members.is_empty() {
            return Err(DatasetError::TooFewRows { path: path.to_owned(), rows: rows.len(), split });
        }
        Ok(Self { split, rows, members })
    }

    /// Places of the split's rows in the file, in order.
    #[must_use]
    pub fn file_rows(&self) -> &[usize] {
        &self.members
    }

    fn numbered(&self, number: &TaskNumber) -> Task {
        let place = number.row(self.members.len());
        let row = &self.rows[self.members[place]];
        Task {
            id: format!("{}_{number}", self.split),
            question: row.question.to_string(),
            row: place,
            payload: Payload::Gsm8k { answer: Arc::clone(&row.answer) },
        }
    }
}

/// Row that `seed` means among `rows`: the reference's `trunc(seed mod 2³² / 2³² · rows)`, which is exact in doubles.
fn row_of_seed(seed: EnvironmentSeed, rows: usize) -> usize {
    let low = seed.0 & 0xffff_ffff;
    let row = (u128::from(low) * rows as u128) >> 32;
    usize::try_from(row).expect("the product of a fraction and a count is below the count")
}

impl Environment for Gsm8k {
    fn id(&self) -> EnvironmentId {
        EnvironmentId::Gsm8k
    }

    fn split(&self) -> Split {
        self.split
    }

    fn task_count(&self) -> usize {
        self.members.len()
    }

    fn task(&self, seed: EnvironmentSeed) -> Result<Task, TaskError> {
        Ok(self.numbered(&TaskNumber::from_index(row_of_seed(seed, self.members.len()))))
    }

    fn task_by_id(&self, task_id: Option<&str>) -> Result<Task, TaskError> {
        Ok(self.numbered(&TaskNumber::parse(task_id.unwrap_or_default())))
    }

    fn evaluate<'a>(
        &'a self,
        task: &'a Task,
        completion: &'a str,
        mode: ThinkingMode,
    ) -> BoxFuture<'a, Result<Evaluation, Unevaluable>> {
        let Payload::Gsm8k { answer } = &task.payload;
        Box::pin(std::future::ready(Ok(evaluate(answer, completion, mode))))
    }
}
