//! What MBPP and HumanEval share: a program between the answer tags, judged by tests.

mod environment;
mod reward;

use std::sync::Arc;

pub use environment::Programs;

use serde::Serialize;

use crate::environment::{Payload, Task};
use crate::evaluation::{Evaluation, TestReport, Unevaluable};
use crate::evaluator::{Evaluator, Program, ProgramVerdict, Syntax};
use crate::id::EnvironmentId;
use crate::tags::{TaggedAnswer, find_answer};
use crate::thinking::ThinkingMode;

/// What is read from a completion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ParsedCompletion {
    /// The program; empty without one, or if the compiler itself fails on it. Code fences are part of it.
    pub code: String,
    /// Whether the reasoning was closed.
    pub has_thinking: bool,
    /// Whether there is a complete pair of answer tags.
    pub has_solution: bool,
    /// Code points after the answer; 0 if the compiler itself failed on the program.
    pub trailing: usize,
    /// Whether there is a program and it compiles.
    pub syntax_valid: bool,
}

/// Judges `completion` for `task` by running its program on the task's tests.
///
/// The reward lies in `0.0..=1.0`. The reference pays 0 where its own arithmetic raises an exception; nothing that a decoded
/// completion can hold makes it do so.
///
/// # Errors
/// [`Unevaluable`] if `evaluator` has no verdict, or if the task is not one of programs.
pub(crate) async fn evaluate(
    environment: EnvironmentId,
    evaluator: &dyn Evaluator,
    task: &Task,
    completion: &str,
    mode: ThinkingMode,
) -> Result<Evaluation, Unevaluable> {
    let Payload::Python { tests, .. } = &task.payload else { return Err(Unevaluable::foreign(task, environment)) };
    let tagged = find_answer(completion, &mode.tags());
    let verdict = match tagged.content {
        None | Some("") => None,
        Some(code) => {
            let program = Program { code: Arc::from(code), tests: Arc::clone(tests) };
            let verdict = evaluator.run(program).await.map_err(|source| Unevaluable::evaluator(task, source))?;
            Some(checked(verdict, task, tests.len())?)
        }
    };
    Ok(judge(&tagged, verdict.as_ref(), tests.len()))
}

/// `verdict`, unless it cannot be one on `tests` tests.
fn checked(verdict: ProgramVerdict, task: &Task, tests: usize) -> Result<ProgramVerdict, Unevaluable> {
    let expected = if verdict.syntax == Syntax::Valid { tests } else { 0 };
    if verdict.tests.len() != expected {
        return Err(Unevaluable::Outcomes { task: task.id.clone(), outcomes: verdict.tests.len(), tests: expected });
    }
    Ok(verdict)
}

/// The verdict on a completion whose program, if it has one, came to `verdict`.
fn judge(tagged: &TaggedAnswer<'_>, verdict: Option<&ProgramVerdict>, tests: usize) -> Evaluation {
    let parsed = parsed(tagged, verdict.map(|verdict| verdict.syntax));
    let reports = verdict.and_then(|verdict| reports(verdict, tests));
    let passed = reports.iter().flatten().filter(|report| report.passed).count();
    let total = reports.as_ref().map_or(0, Vec::len);
    let components = reward::components(&parsed, passed, total);
    Evaluation {
        reward: reward::compensated_sum(components.iter().map(|component| component.weight * component.value)),
        success: total > 0 && passed == total,
        components: components.into(),
        parsed: crate::evaluation::Parsed::Python(parsed),
        gold_answer: String::new(),
        predicted_answer: String::new(),
        tests: reports,
    }
}

fn parsed(tagged: &TaggedAnswer<'_>, syntax: Option<Syntax>) -> ParsedCompletion {
    let (has_thinking, has_solution) = (tagged.has_thinking, tagged.content.is_some());
    if syntax == Some(Syntax::CompilerFailed) {
        // The reference gives up on the program but not on the block, whatever follows it.
        return ParsedCompletion { has_thinking, has_solution, ..ParsedCompletion::default() };
    }
    ParsedCompletion {
        code: tagged.content.unwrap_or_default().to_owned(),
        has_thinking,
        has_solution,
        trailing: tagged.trailing,
        syntax_valid: syntax == Some(Syntax::Valid),
    }
}

/// One report per test; `None` where the program counts as absent.
fn reports(verdict: &ProgramVerdict, tests: usize) -> Option<Vec<TestReport>> {
    match verdict.syntax {
        Syntax::Valid => Some(verdict.tests.iter().map(TestReport::from).collect()),
        Syntax::Invalid => {
            let failed = TestReport { passed: false, error_class: Some("SyntaxError".to_owned()), wall_ms: None };
            Some(vec![failed; tests])
        }
        Syntax::CompilerFailed => None,
    }
}
