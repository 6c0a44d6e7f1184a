//! What a program earns.

use super::ParsedCompletion;
use crate::evaluation::Component;

/// Code points after the answer from which on its format is not paid.
const TRAILING_LIMIT: usize = 50;

/// Parts of the reward of a program that passed `passed` of `total` tests.
pub(super) fn components(parsed: &ParsedCompletion, passed: usize, total: usize) -> [Component; 4] {
    let when = |condition: bool| if condition { 1.0 } else { 0.0 };
    let correctness = if total == 0 { 0.0 } else { passed as f64 / total as f64 };
    let has_format = parsed.has_solution && parsed.trailing < TRAILING_LIMIT;
    [
        Component { key: "correctness", name: "correctness", weight: 0.7, value: correctness },
        Component { key: "syntax", name: "syntax", weight: 0.1, value: when(parsed.syntax_valid) },
        Component { key: "format", name: "format", weight: 0.1, value: when(has_format) },
        Component { key: "thinking", name: "thinking", weight: 0.1, value: when(parsed.has_thinking) },
    ]
}

/// `sum` of CPython 3.12, which carries what each addition rounds away (Neumaier).
pub(super) fn compensated_sum(values: impl IntoIterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0.0_f64, 0.0_f64);
    for value in values {
        let next = sum + value;
        lost += if sum.abs() >= value.abs() { (sum - next) + value } else { (value - next) + sum };
        sum = next;
    }
    // CPython skips a correction that is not finite, which no reward has.
    sum + lost
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sums_are_those_of_cpython() {
        // Values that `sum` of CPython 3.12 gives.
        assert_eq!(compensated_sum([0.1; 10]), 1.0);
        assert_eq!(compensated_sum([1.0, 1e100, 1.0, -1e100]), 2.0);
        assert_eq!(compensated_sum([0.0, 0.1, 0.1, 0.1]), 0.300_000_000_000_000_04);
        assert_eq!(compensated_sum([]), 0.0);
    }

    proptest! {
        #[test]
        fn rewards_stay_in_range(flags in any::<[bool; 3]>(), trailing in 0_usize..100, total in 0_usize..8, part in 0_usize..8) {
            let [has_thinking, has_solution, syntax_valid] = flags;
            let parsed = ParsedCompletion { code: String::new(), has_thinking, has_solution, trailing, syntax_valid };
            let components = components(&parsed, part.min(total), total);
            let reward = compensated_sum(components.iter().map(|component| component.weight * component.value));
            prop_assert!((0.0..=1.0 + 1e-12).contains(&reward), "{reward}");
        }
    }
}
