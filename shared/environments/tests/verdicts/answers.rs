//! Right answers, and when another answer means the same.

use grail_environments::math::{self, Decision};
use grail_environments::{Environment, Payload, Task, ThinkingMode, gsm8k};
use grail_golden::{json, ran};
use serde::Deserialize;
use serde_json::Value;

use crate::judges;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GoldCase {
    answer_field: String,
    gold: String,
    normalized: String,
}

#[test]
fn right_answers_are_the_references() {
    const FILE: &str = "environments/completions/gsm8k_gold.json";
    let cases: Vec<GoldCase> = json(FILE);
    for case in &cases {
        let gold = gsm8k::gold_answer(&case.answer_field);
        let normalized = gsm8k::normalize(&gold);
        assert_eq!((&gold, &normalized), (&case.gold, &case.normalized), "{:?}", case.answer_field);
    }
    ran(FILE, cases.len(), 22);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BoxedCase {
    solution: String,
    dataset_answer_first_boxed: String,
    env_last_boxed: Option<String>,
    gold_used_for_success: String,
}

#[tokio::test]
async fn boxes_are_opened_as_by_the_reference() {
    const FILE: &str = "environments/completions/math_boxed.json";
    let judges = judges();
    let cases: Vec<BoxedCase> = json(FILE);
    for case in &cases {
        let answer = math::first_boxed(&case.solution).unwrap_or_default();
        assert_eq!(answer, case.dataset_answer_first_boxed, "{:?}", case.solution);
        assert_eq!(math::last_boxed(&case.solution), case.env_last_boxed.as_deref(), "{:?}", case.solution);
        let payload = Payload::Math {
            answer: answer.into(),
            solution: case.solution.as_str().into(),
            level: 0,
            subject: "Algebra".into(),
        };
        let task = Task { id: "train_0".to_owned(), question: "q".to_owned(), row: 0, payload };
        let gold = &case.gold_used_for_success;
        let completion = format!("<SOLUTION>{gold}</SOLUTION>");
        let verdict = judges.math.evaluate(&task, &completion, ThinkingMode::Instructed).await.unwrap();
        assert_eq!((&verdict.gold_answer, verdict.success), (gold, !gold.is_empty()), "{:?}", case.solution);
        // The reward knows the first box only.
        assert_eq!(verdict.components[0].value == 1.0, !answer.is_empty(), "{:?}", case.solution);
    }
    ran(FILE, cases.len(), 19);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LevelCase {
    level: Option<String>,
    parsed: u64,
}

#[test]
fn levels_are_the_references() {
    const FILE: &str = "environments/completions/math_level.json";
    let cases: Vec<LevelCase> = json(FILE);
    for case in &cases {
        assert_eq!(math::level(case.level.as_deref().unwrap_or_default()), case.parsed, "{:?}", case.level);
    }
    ran(FILE, cases.len(), 9);
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    #[serde(rename = "family")]
    _family: String,
    predicted: String,
    gold: String,
    predicted_norm: String,
    gold_norm: String,
    equal: bool,
    /// `exact`, `empty`, or what the two other steps said.
    decided_by: Value,
}

#[test]
fn pairs_are_settled_as_by_the_reference_or_left_to_sympy() {
    const FILE: &str = "environments/math/pairs.json";
    let cases: Vec<Pair> = json(FILE);
    let mut symbolic = 0;
    for case in &cases {
        let text = format!("{:?} and {:?}", case.predicted, case.gold);
        let forms = (math::normalize(&case.predicted), math::normalize(&case.gold));
        assert_eq!((&forms.0, &forms.1), (&case.predicted_norm, &case.gold_norm), "{text}");
        let numeric = case.decided_by.get("numeric") == Some(&Value::Bool(true));
        let by_sympy = case.decided_by.get("symbolic") == Some(&Value::Bool(true));
        match math::decide(&case.predicted, &case.gold) {
            Decision::Settled(equal) => {
                assert_eq!(equal, case.equal, "{text}");
                assert_eq!(equal, numeric || case.decided_by == "exact", "{text}");
            }
            Decision::Symbolic { left, right } => {
                assert_eq!((left, right), forms, "{text}");
                assert_eq!((numeric, by_sympy), (false, case.equal), "{text}");
                symbolic += 1;
            }
        }
    }
    assert_eq!(symbolic, 205);
    ran(FILE, cases.len(), 340);
}
