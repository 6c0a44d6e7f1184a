//! What a completion earns.

use serde::Serialize;

use super::answer::{gold_answer, is_numeric_only, normalize, predict};
use crate::evaluation::{Component, Evaluation, Parsed};
use crate::tags::find_answer;
use crate::thinking::ThinkingMode;

/// What is read from a completion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ParsedCompletion {
    /// The number given as answer; empty without one.
    pub answer_text: String,
    /// Whether the reasoning was closed.
    pub has_thinking: bool,
    /// Whether there is a complete pair of answer tags.
    pub has_answer: bool,
    /// Code points after the answer.
    pub trailing: usize,
    /// Whether the answer is a number and nothing else.
    pub is_numeric_only: bool,
}

/// Reads `completion`.
#[must_use]
pub fn parse(completion: &str, mode: ThinkingMode) -> ParsedCompletion {
    let tagged = find_answer(completion, &mode.tags());
    let number = tagged.content.and_then(predict);
    ParsedCompletion {
        has_thinking: tagged.has_thinking,
        has_answer: tagged.content.is_some(),
        trailing: tagged.trailing,
        is_numeric_only: number.is_some() && tagged.content.is_some_and(is_numeric_only),
        answer_text: number.unwrap_or_default(),
    }
}

/// Judges `completion` against the worked solution `answer` of its task.
///
/// The reward lies in `0.0..=0.735`. A completion that ends in `<|im_end|>` has ten trailing code points, which makes
/// 0.6895 the best that is usual.
#[must_use]
pub fn evaluate(answer: &str, completion: &str, mode: ThinkingMode) -> Evaluation {
    let parsed = parse(completion, mode);
    let gold = gold_answer(answer);
    let success = normalize(&parsed.answer_text) == normalize(&gold);
    let components = components(&parsed, success);
    Evaluation {
        reward: components.iter().fold(0.0, |sum, component| sum + component.weight * component.value),
        success,
        components: components.into(),
        gold_answer: gold,
        predicted_answer: parsed.answer_text.clone(),
        parsed: Parsed::Gsm8k(parsed),
        tests: None,
    }
}

fn components(parsed: &ParsedCompletion, success: bool) -> [Component; 5] {
    let when = |condition: bool, value: f64| if condition { value } else { 0.0 };
    // An empty prediction equals an empty gold answer, yet it is not paid.
    let is_correct = success && !parsed.answer_text.is_empty();
    let is_strict = parsed.has_answer && parsed.is_numeric_only && parsed.trailing == 0;
    let no_trailing = (0.2 - 0.001 * parsed.trailing as f64).max(0.0);
    [
        Component { key: "r0", name: "correctness", weight: 0.6, value: when(is_correct, 1.0) },
        Component { key: "r1", name: "strict format", weight: 0.15, value: when(is_strict, 0.3) },
        Component { key: "r2", name: "thinking", weight: 0.1, value: when(parsed.has_thinking, 0.5) },
        Component { key: "r3", name: "answer", weight: 0.1, value: when(parsed.has_answer, 0.3) },
        Component { key: "r4", name: "no trailing", weight: 0.05, value: when(parsed.has_answer, no_trailing) },
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_answer_is_never_paid() {
        let verdict = evaluate("", "<SOLUTION></SOLUTION>", ThinkingMode::Native);
        assert!(verdict.success);
        assert_eq!(verdict.components[0].value, 0.0);
    }

    proptest! {
        #[test]
        fn rewards_stay_in_range(answer in ".{0,20}", start in ".{0,20}", number in "[-+.,0-9]{0,5}", end in ".{0,300}") {
            let completion = format!("{start}</think><SOLUTION>{number}</SOLUTION>{end}");
            for mode in ThinkingMode::ALL {
                let verdict = evaluate(&answer, &completion, mode);
                prop_assert!((0.0..=0.735 + 1e-12).contains(&verdict.reward), "{}", verdict.reward);
                let trailing = parse(&completion, mode).trailing;
                prop_assert_eq!(trailing, completion.chars().rev().take(trailing).count());
            }
        }
    }
}
