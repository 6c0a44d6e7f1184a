//! Whether two formulas mean the same.

use super::float::parse_float;
use super::normal::normalize;
use crate::evaluator::{Evaluator, EvaluatorError};

/// Difference below which two numbers are the same, whatever their size.
const TOLERANCE: f64 = 1e-6;

/// What can be said about two formulas without sympy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Whether they are equal.
    Settled(bool),
    /// They are equal if sympy says so of these.
    Symbolic {
        /// The completion's answer, normalised.
        left: String,
        /// The right answer, normalised.
        right: String,
    },
}

/// Compares `predicted` with `gold` as texts and as numbers, and says whether sympy is needed.
///
/// The reference asks sympy before it compares numbers; its result is the same, since any of the three is enough.
#[must_use]
pub fn decide(predicted: &str, gold: &str) -> Decision {
    if predicted.is_empty() || gold.is_empty() {
        return Decision::Settled(false);
    }
    let (left, right) = (normalize(predicted), normalize(gold));
    if left == right || are_close(&left, &right) {
        return Decision::Settled(true);
    }
    if is_no_expression(&left) || is_no_expression(&right) {
        return Decision::Settled(false);
    }
    Decision::Symbolic { left, right }
}

fn are_close(left: &str, right: &str) -> bool {
    parse_float(left).zip(parse_float(right)).is_some_and(|(left, right)| (left - right).abs() < TOLERANCE)
}

/// Whether Python's tokenizer is sure to fail on `normal`: on a backslash outside strings and comments.
fn is_no_expression(normal: &str) -> bool {
    normal.contains('\\') && !normal.contains(['\'', '"', '#'])
}

/// Whether `predicted` and `gold` mean the same.
pub(super) async fn are_equal(evaluator: &dyn Evaluator, predicted: &str, gold: &str) -> Result<bool, EvaluatorError> {
    match decide(predicted, gold) {
        Decision::Settled(equal) => Ok(equal),
        Decision::Symbolic { left, right } => evaluator.are_equal(&left, &right).await,
    }
}
