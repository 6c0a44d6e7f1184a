//! Rows of one split and the tasks they make.

use std::sync::Arc;

use grail_protocol::ids::EnvironmentSeed;

use crate::datasets::{DatasetError, Row};
use crate::environment::Task;
use crate::id::EnvironmentId;
use crate::split::Split;
use crate::task_id::TaskNumber;

/// How a seed picks a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SeedRule {
    /// The seed's lower 32 bits as a fraction of all rows.
    Fraction,
    /// Remainder of the division by the number of rows.
    Remainder,
}

impl SeedRule {
    /// Row that `seed` means among `rows`.
    fn row(self, seed: EnvironmentSeed, rows: usize) -> usize {
        let row = match self {
            // The reference's `trunc(seed mod 2³² / 2³² · rows)`, which is exact in doubles.
            Self::Fraction => (u128::from(seed.0 & 0xffff_ffff) * rows as u128) >> 32,
            Self::Remainder => u128::from(seed.0) % rows as u128,
        };
        usize::try_from(row).expect("a row is below the number of rows")
    }
}

/// The tasks of one split.
#[derive(Debug)]
pub(crate) struct Tasks<R> {
    split: Split,
    rule: SeedRule,
    /// All rows that were read.
    rows: Arc<[R]>,
    /// Rows of the split, as places in `rows`, in the order that seeds count them in. Never empty.
    members: Arc<[usize]>,
}

// Not derived, so that rows need not be cloneable.
impl<R> Clone for Tasks<R> {
    fn clone(&self) -> Self {
        let (rows, members) = (Arc::clone(&self.rows), Arc::clone(&self.members));
        Self { split: self.split, rule: self.rule, rows, members }
    }
}

impl<R: Row> Tasks<R> {
    /// The rows at `members`.
    ///
    /// # Errors
    /// [`DatasetError::TooFewRows`] if there are none, since a seed would mean nothing then.
    pub(crate) fn new(split: Split, rule: SeedRule, rows: Arc<[R]>, members: Vec<usize>) -> Result<Self, DatasetError> {
        if members.is_empty() {
            return Err(DatasetError::TooFewRows { environment: R::ENVIRONMENT, rows: rows.len(), split });
        }
        Ok(Self { split, rule, rows, members: members.into() })
    }

    pub(crate) fn split(&self) -> Split {
        self.split
    }

    pub(crate) fn count(&self) -> usize {
        self.members.len()
    }

    /// Places of the split's rows in what was read.
    pub(crate) fn members(&self) -> &[usize] {
        &self.members
    }

    /// Rows of the split in order.
    pub(crate) fn rows(&self) -> impl Iterator<Item = &R> {
        self.members.iter().map(|place| &self.rows[*place])
    }

    pub(crate) fn of_seed(&self, seed: EnvironmentSeed) -> Task {
        self.numbered(&TaskNumber::from_index(self.rule.row(seed, self.members.len())))
    }

    pub(crate) fn of_id(&self, task_id: Option<&str>) -> Task {
        self.numbered(&TaskNumber::parse(task_id.unwrap_or_default()))
    }

    fn numbered(&self, number: &TaskNumber) -> Task {
        let place = number.row(self.members.len());
        let row = &self.rows[self.members[place]];
        Task { id: format!("{}_{number}", self.prefix()), question: row.question(), row: place, payload: row.payload() }
    }

    /// What ids of tasks start with.
    fn prefix(&self) -> &'static str {
        match (R::ENVIRONMENT, self.split) {
            (EnvironmentId::HumanEval, _) => "humaneval",
            (EnvironmentId::Mbpp, Split::Val) => "validation",
            (_, split) => split.as_str(),
        }
    }
}
