//! An evaluator for where nothing is judged.

use crate::environment::BoxFuture;
use crate::evaluator::{Evaluator, EvaluatorError, Program, ProgramVerdict};

/// Has no sandbox and so no verdicts. Tasks and prompts can be shown with it, and GSM8K can be mined, which runs nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoEvaluator;

impl NoEvaluator {
    fn refusal() -> EvaluatorError {
        EvaluatorError::Sandbox { attempts: 0, detail: "none was started".to_owned() }
    }
}

impl Evaluator for NoEvaluator {
    fn run(&self, _program: Program) -> BoxFuture<'_, Result<ProgramVerdict, EvaluatorError>> {
        Box::pin(std::future::ready(Err(Self::refusal())))
    }

    fn are_equal<'a>(&'a self, _left: &'a str, _right: &'a str) -> BoxFuture<'a, Result<bool, EvaluatorError>> {
        Box::pin(std::future::ready(Err(Self::refusal())))
    }
}
