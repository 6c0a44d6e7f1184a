//! What a completion earns.

use serde::Serialize;

use super::boxed::last_boxed;
use super::equality::are_equal;
use crate::environment::{Payload, Task};
use crate::evaluation::{Component, Evaluation, Parsed, Unevaluable};
use crate::evaluator::Evaluator;
use crate::id::EnvironmentId;
use crate::tags::find_answer;
use crate::thinking::ThinkingMode;

/// Code points after the answer from which on its format is not paid.
const TRAILING_LIMIT: usize = 50;

/// What is read from a completion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ParsedCompletion {
    /// The formula given as answer; empty without one. A `\boxed{}` or dollar signs are part of it.
    pub answer_text: String,
    /// Whether the reasoning was closed.
    pub has_thinking: bool,
    /// Whether there is a complete pair of answer tags.
    pub has_answer: bool,
    /// Code points after the answer.
    pub trailing: usize,
}

/// Reads `completion`.
#[must_use]
pub fn parse(completion: &str, mode: ThinkingMode) -> ParsedCompletion {
    let tagged = find_answer(completion, &mode.tags());
    ParsedCompletion {
        answer_text: tagged.content.unwrap_or_default().to_owned(),
        has_thinking: tagged.has_thinking,
        has_answer: tagged.content.is_some(),
        trailing: tagged.trailing,
    }
}

/// Judges `completion` for `task`.
///
/// The reward lies in `0.0..=0.805`. Success and the first component are two questions: where the solution's first box is
/// empty or broken, only success knows of another one. The reference pays 0 where its own arithmetic raises an exception;
/// nothing that a decoded completion can hold makes it do so.
///
/// # Errors
/// [`Unevaluable`] if `evaluator` has no verdict, or if the task is not one of MATH.
pub(super) async fn evaluate(
    evaluator: &dyn Evaluator,
    task: &Task,
    completion: &str,
    mode: ThinkingMode,
) -> Result<Evaluation, Unevaluable> {
    let Payload::Math { answer, solution, .. } = &task.payload else {
        return Err(Unevaluable::foreign(task, EnvironmentId::Math));
    };
    let parsed = parse(completion, mode);
    let gold = if answer.is_empty() { last_boxed(solution).unwrap_or_default() } else { answer };
    let verdict = are_equal(evaluator, &parsed.answer_text, gold).await;
    let success = verdict.map_err(|source| Unevaluable::evaluator(task, source))?;
    let components = components(&parsed, success && !answer.is_empty());
    Ok(Evaluation {
        reward: components.iter().fold(0.0, |sum, component| sum + component.weight * component.value),
        success,
        components: components.into(),
        gold_answer: gold.to_owned(),
        predicted_answer: parsed.answer_text.clone(),
        parsed: Parsed::Math(parsed),
        tests: None,
    })
}

fn components(parsed: &ParsedCompletion, is_correct: bool) -> [Component; 4] {
    let when = |condition: bool, value: f64| if condition { value } else { 0.0 };
    let has_format = parsed.has_answer && parsed.trailing < TRAILING_LIMIT;
    let no_trailing = (0.2 - 0.001 * parsed.trailing as f64).max(0.0);
    [
        Component { key: "r0", name: "correctness", weight: 0.7, value: when(is_correct, 1.0) },
        Component { key: "r1", name: "answer format", weight: 0.15, value: when(has_format, 0.3) },
        Component { key: "r2", name: "thinking", weight: 0.1, value: when(parsed.has_thinking, 0.5) },
        Component { key: "r3", name: "no trailing", weight: 0.05, value: when(parsed.has_answer, no_trailing) },
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rewards_stay_in_range(is_correct: bool, text in "(</think>|<SOLUTION>|</SOLUTION>|x|.{0,80}){0,8}") {
            let components = components(&parse(&text, ThinkingMode::Native), is_correct);
            let reward = components.iter().fold(0.0, |sum, component| sum + component.weight * component.value);
            prop_assert!((0.0..=0.805 + 1e-12).contains(&reward), "{reward}");
        }
    }
}
