//! What every environment offers.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use grail_protocol::ids::{EnvironmentSeed, TokenId};
use grail_text::{ChatTemplate, Message, PromptError, RenderOptions, Tokenizer, render_prompt_ids};

use crate::evaluation::{Evaluation, GroupUnevaluable, Unevaluable};
use crate::group;
use crate::id::EnvironmentId;
use crate::split::Split;
use crate::thinking::ThinkingMode;

/// A future on the heap, so that environments fit behind `dyn`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One problem. All 16 rollouts of a group work on the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// `{split}_{number}`; never sent, for logs.
    pub id: String,
    /// Text of the user message.
    pub question: String,
    /// Row in the split.
    pub row: usize,
    /// What is needed to judge a completion.
    pub payload: Payload,
}

/// What an environment knows about the right answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// GSM8K: the worked solution, which ends in `#### answer`.
    Gsm8k {
        /// Field `answer` of the row.
        answer: Arc<str>,
    },
    /// MATH: the answer as a formula.
    Math {
        /// Content of the first `\boxed{}` of the solution; empty without one.
        answer: Arc<str>,
        /// The worked solution.
        solution: Arc<str>,
        /// Difficulty from 1 to 5, 0 if unknown.
        level: u64,
        /// Branch of mathematics.
        subject: Arc<str>,
    },
    /// MBPP and HumanEval: tests that a program must pass.
    Python {
        /// The row's own id in its data set, `602` or `HumanEval/119`.
        dataset_id: Arc<str>,
        /// What is run after the program, one test after the other.
        tests: Arc<[String]>,
        /// A whole program that the authors of the data set hold to be right.
        reference_solution: Arc<str>,
    },
}

/// A seed or id for which there is no task.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TaskError {
    /// The environment refuses its split.
    #[error("{environment} has no tasks in split {split}")]
    NoTasks {
        /// The environment.
        environment: EnvironmentId,
        /// The split.
        split: Split,
    },
}

/// A source of tasks and the judge of their completions.
pub trait Environment: Send + Sync + fmt::Debug {
    /// Which environment this is.
    fn id(&self) -> EnvironmentId;

    /// Which part of its data it serves.
    fn split(&self) -> Split;

    /// Number of tasks.
    fn task_count(&self) -> usize;

    /// The task that `seed` means.
    ///
    /// # Errors
    /// [`TaskError`] if there is none; no group may be produced then.
    fn task(&self, seed: EnvironmentSeed) -> Result<Task, TaskError>;

    /// The task with the text id `task_id`; number 0 where the id holds none or is absent.
    ///
    /// # Errors
    /// As [`Environment::task`].
    fn task_by_id(&self, task_id: Option<&str>) -> Result<Task, TaskError>;

    /// Judges `completion`, the text of the completion's tokens with special tokens kept.
    ///
    /// # Errors
    /// [`Unevaluable`]: the group is dropped.
    fn evaluate<'a>(
        &'a self,
        task: &'a Task,
        completion: &'a str,
        mode: ThinkingMode,
    ) -> BoxFuture<'a, Result<Evaluation, Unevaluable>>;

    /// Judges the completions of one group side by side; verdicts come in order of the rollouts. What several completions
    /// have in common, such as the same program, is judged once.
    ///
    /// # Errors
    /// [`GroupUnevaluable`] for the first completion without a verdict.
    ///
    /// # Panics
    /// If there are more completions than rollouts in a group.
    fn evaluate_group<'a>(
        &'a self,
        task: &'a Task,
        completions: &'a [String],
        mode: ThinkingMode,
    ) -> BoxFuture<'a, Result<Vec<Evaluation>, GroupUnevaluable>> {
        Box::pin(group::evaluate_all(completions, move |completion| self.evaluate(task, completion, mode)))
    }
}

/// The conversation that asks for `task`: system prompt and question.
#[must_use]
pub fn messages(task: &Task, mode: ThinkingMode) -> Vec<Message> {
    with_system_prompt(vec![Message::user(task.question.as_str())], mode)
}

/// `messages` after the mode's system prompt, unless they start with a system message of their own.
#[must_use]
pub fn with_system_prompt(mut messages: Vec<Message>, mode: ThinkingMode) -> Vec<Message> {
    if messages.first().is_none_or(|first| first.role != "system") {
        messages.insert(0, Message::system(mode.system_prompt()));
    }
    messages
}

/// Ids of the prompt for `task`, which a validator recomputes and compares one by one.
///
/// # Errors
/// [`PromptError`] if the checkpoint's template or tokenizer fails.
pub fn prompt_ids(
    task: &Task,
    mode: ThinkingMode,
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
) -> Result<Vec<TokenId>, PromptError> {
    let options = RenderOptions { enable_thinking: mode.enable_thinking() };
    render_prompt_ids(tokenizer, template, &messages(task, mode), options)
}
