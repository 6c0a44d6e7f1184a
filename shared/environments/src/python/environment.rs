//! The environment that MBPP and HumanEval are, each over its own rows.

use std::sync::Arc;

use grail_protocol::ids::EnvironmentSeed;

use crate::datasets::{DatasetError, Row};
use crate::environment::{BoxFuture, Environment, Task, TaskError};
use crate::evaluation::{Evaluation, GroupUnevaluable, Unevaluable};
use crate::evaluator::Evaluator;
use crate::group::{self, GroupEvaluator};
use crate::id::EnvironmentId;
use crate::python;
use crate::split::Split;
use crate::tasks::{SeedRule, Tasks};
use crate::thinking::ThinkingMode;

/// One split of a data set of programs.
#[derive(Clone, Debug)]
pub struct Programs<R> {
    tasks: Tasks<R>,
    evaluator: Arc<dyn Evaluator>,
}

impl<R: Row> Programs<R> {
    /// The rows at `members`, in that order.
    pub(crate) fn new(
        split: Split,
        rows: Arc<[R]>,
        members: Vec<usize>,
        evaluator: Arc<dyn Evaluator>,
    ) -> Result<Self, DatasetError> {
        let tasks = Tasks::new(split, SeedRule::Remainder, rows, members)?;
        Ok(Self { tasks, evaluator })
    }

    /// Rows of the split, in the order that seeds count them in.
    pub fn rows(&self) -> impl Iterator<Item = &R> {
        self.tasks.rows()
    }
}

impl<R: Row> Environment for Programs<R> {
    fn id(&self) -> EnvironmentId {
        R::ENVIRONMENT
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
        Box::pin(python::evaluate(self.id(), self.evaluator.as_ref(), task, completion, mode))
    }

    fn evaluate_group<'a>(
        &'a self,
        task: &'a Task,
        completions: &'a [String],
        mode: ThinkingMode,
    ) -> BoxFuture<'a, Result<Vec<Evaluation>, GroupUnevaluable>> {
        Box::pin(async move {
            let once = GroupEvaluator::new(self.evaluator.as_ref());
            let judge = |completion| python::evaluate(self.id(), &once, task, completion, mode);
            group::evaluate_all(completions, judge).await
        })
    }
}
