//! Verdicts on completions, and why there may be none.

use grail_protocol::ids::RolloutIndex;
use serde::Serialize;

use crate::environment::{Environment, Task};
use crate::evaluator::{EvaluatorError, TestOutcome};
use crate::id::EnvironmentId;
use crate::thinking::ThinkingMode;
use crate::{gsm8k, math, python};

/// A part of a reward.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Component {
    /// Key in the reference's record, such as `r0`.
    pub key: &'static str,
    /// What it pays for.
    pub name: &'static str,
    /// Factor in the total.
    pub weight: f64,
    /// Value before the factor.
    pub value: f64,
}

/// What an environment's parser reads from a completion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Parsed {
    /// A number.
    Gsm8k(gsm8k::ParsedCompletion),
    /// A formula.
    Math(math::ParsedCompletion),
    /// A program.
    Python(python::ParsedCompletion),
}

/// How one test of a program ended.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TestReport {
    /// Whether program and test ended without an exception.
    pub passed: bool,
    /// Name of the exception's class; `None` for a test that passed.
    pub error_class: Option<String>,
    /// Time it took in milliseconds; `None` for a test that did not run because the program does not compile.
    pub wall_ms: Option<f64>,
}

impl From<&TestOutcome> for TestReport {
    fn from(outcome: &TestOutcome) -> Self {
        Self {
            passed: outcome.has_passed(),
            error_class: outcome.error_class.clone(),
            wall_ms: Some(outcome.wall.as_secs_f64() * 1e3),
        }
    }
}

/// Verdict on one completion.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Sum of weight times value over the components; written into the rollout.
    pub reward: f64,
    /// Whether the answer is right; written into the rollout, not compared by validators.
    pub success: bool,
    /// Parts of the reward in order.
    pub components: Vec<Component>,
    /// What was read from the completion.
    pub parsed: Parsed,
    /// The right answer, as it is compared; empty where programs are tested.
    pub gold_answer: String,
    /// The completion's answer; empty if it gives none, and where programs are tested.
    pub predicted_answer: String,
    /// Tests of the program in order; `None` where none was run or nothing is tested.
    pub tests: Option<Vec<TestReport>>,
}

/// A verdict with what it is a verdict on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// The environment.
    pub environment: EnvironmentId,
    /// Id of the task.
    pub task: String,
    /// Mode whose tags the completion was read by.
    pub thinking_mode: ThinkingMode,
    /// The verdict.
    pub evaluation: Evaluation,
}

/// Why `completion` gets its reward.
///
/// # Errors
/// As [`Environment::evaluate`].
pub async fn explain(
    environment: &dyn Environment,
    task: &Task,
    completion: &str,
    mode: ThinkingMode,
) -> Result<Explanation, Unevaluable> {
    let evaluation = environment.evaluate(task, completion, mode).await?;
    Ok(Explanation { environment: environment.id(), task: task.id.clone(), thinking_mode: mode, evaluation })
}

/// A completion on which no trustworthy verdict is possible; its whole group is dropped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unevaluable {
    /// The program or the comparison has no verdict.
    #[error("evaluating a completion of task {task}: {source}")]
    Evaluator {
        /// Id of the task.
        task: String,
        /// Why.
        #[source]
        source: EvaluatorError,
    },
    /// The evaluator answered something other than it was asked.
    #[error("evaluating a completion of task {task}: {outcomes} outcomes for {tests} tests")]
    Outcomes {
        /// Id of the task.
        task: String,
        /// Outcomes that came.
        outcomes: usize,
        /// Tests that were to be run.
        tests: usize,
    },
    /// The task is of another environment than the one that was asked to judge it.
    #[error("task {task} is of another environment than {environment}")]
    ForeignTask {
        /// Id of the task.
        task: String,
        /// The environment that was asked.
        environment: EnvironmentId,
    },
}

impl Unevaluable {
    pub(crate) fn evaluator(task: &Task, source: EvaluatorError) -> Self {
        Self::Evaluator { task: task.id.clone(), source }
    }

    pub(crate) fn foreign(task: &Task, environment: EnvironmentId) -> Self {
        Self::ForeignTask { task: task.id.clone(), environment }
    }
}

/// A group with a rollout that cannot be evaluated. A group is never shrunk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rollout {} of the group: {source}", rollout.get())]
pub struct GroupUnevaluable {
    /// The first such rollout.
    pub rollout: RolloutIndex,
    /// Why.
    #[source]
    pub source: Unevaluable,
}
