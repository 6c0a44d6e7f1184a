//! Environments: which problem a seed means, how its prompt reads, and what a completion earns.
//!
//! [`Environment`] is the trait that every environment fits: [`gsm8k::Gsm8k`], [`math::Math`], [`mbpp::Mbpp`] and
//! [`humaneval::HumanEval`]. [`datasets`] finds their rows. What a model writes is run by an [`Evaluator`] only. Nothing here
//! depends on process-wide state: the thinking mode is an argument of both prompt and evaluation, since both use its tags.

pub mod datasets;
mod environment;
mod evaluation;
mod evaluator;
mod group;
pub mod gsm8k;
pub mod humaneval;
mod id;
pub mod math;
pub mod mbpp;
mod no_evaluator;
pub mod pool;
pub mod python;
pub mod sandbox;
mod split;
mod tags;
mod task_id;
mod tasks;
mod thinking;

pub use environment::{BoxFuture, Environment, Payload, Task, TaskError, messages, prompt_ids, with_system_prompt};
pub use evaluation::{Component, Evaluation, Explanation, GroupUnevaluable, Parsed, TestReport, Unevaluable, explain};
pub use evaluator::{Evaluator, EvaluatorError, Program, ProgramVerdict, Syntax, TestOutcome};
pub use id::{EnvironmentId, ParseEnvironmentIdError};
pub use no_evaluator::NoEvaluator;
pub use split::{ParseSplitError, Split};
pub use tags::{TaggedAnswer, find_answer};
pub use thinking::{ParseThinkingModeError, Tags, ThinkingMode};
