//! Environments: which problem a seed means, how its prompt reads, and what a completion earns.
//!
//! [`Environment`] is the trait that every environment fits; [`gsm8k::Gsm8k`] is the first. Nothing here depends on
//! process-wide state: the thinking mode is an argument of both prompt and evaluation, since both use its tags.

mod environment;
mod evaluator;
pub mod gsm8k;
mod id;
pub mod pool;
pub mod sandbox;
mod split;
mod tags;
mod task_id;
mod thinking;

pub use environment::{
    BoxFuture, Component, Environment, Evaluation, GroupUnevaluable, Payload, Task, TaskError, Unevaluable, messages,
    prompt_ids, with_system_prompt,
};
pub use evaluator::{Evaluator, EvaluatorError, Program, ProgramVerdict, Syntax, TestOutcome};
pub use id::{EnvironmentId, ParseEnvironmentIdError};
pub use split::{ParseSplitError, Split};
pub use tags::{TaggedAnswer, find_answer};
pub use thinking::{ParseThinkingModeError, Tags, ThinkingMode};
