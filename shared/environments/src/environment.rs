//! What every environment offers.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use grail_protocol::ids::{EnvironmentSeed, RolloutIndex, TokenId};
use grail_text::{ChatTemplate, Message, PromptError, RenderOptions, Tokenizer, render_prompt_ids};

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
}

/// A part of a reward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Component {
    /// Key in the reference's list, such as `r0`.
    pub key: &'static str,
    /// What it pays for.
    pub name: &'static str,
    /// Factor in the total.
    pub weight: f64,
    /// Value before the factor.
    pub value: f64,
}

/// Verdict on one completion.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Sum of weight times value, from the first component to the last; written into the rollout.
    pub reward: f64,
    /// Whether the answer is right; written into the rollout, not compared by validators.
    pub success: bool,
    /// Parts of the reward in order.
    pub components: Vec<Component>,
    /// The right answer, as it is compared.
    pub gold_answer: String,
    /// The completion's answer; empty if it gives none.
    pub predicted_answer: String,
}

/// A completion on which no trustworthy verdict is possible; its whole group is dropped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unevaluable {
    /// Judging it failed in a way that a validator would see differently.
    #[error("evaluating a completion of task {task}: {detail}")]
    Evaluation {
        /// Id of the task.
        task: String,
        /// What happened.
        detail: String,
    },
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

    /// Judges the completions of one group, in order of the rollouts.
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
        assert!(completions.len() <= RolloutIndex::all().len(), "a group has at most 16 rollouts");
        Box::pin(async move {
            let mut evaluations = Vec::with_capacity(completions.len());
            for (rollout, completion) in RolloutIndex::all().zip(completions) {
                let verdict = self.evaluate(task, completion, mode).await;
                evaluations.push(verdict.map_err(|source| GroupUnevaluable { rollout, source })?);
            }
            Ok(evaluations)
        })
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
