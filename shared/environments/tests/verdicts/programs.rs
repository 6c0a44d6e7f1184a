//! The rewards of programs, given what their tests came to.

use std::sync::Arc;

use grail_environments::mbpp::Mbpp;
use grail_environments::{
    Environment, EvaluatorError, Parsed, Payload, ProgramVerdict, Split, Syntax, Task, ThinkingMode, Unevaluable,
};
use grail_golden::{json, ran};
use serde::Deserialize;

use crate::recorded::{Recorded, outcomes};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProgramCase {
    name: String,
    code: String,
    tests: Vec<String>,
    #[serde(rename = "tag")]
    _tag: String,
    expected: Outcome,
    /// Absent where the reference took too long to be asked twice, or broke.
    expected_env: Option<Paid>,
    #[serde(default)]
    expect_unevaluable: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Outcome {
    #[serde(default)]
    passed: usize,
    #[serde(default)]
    total: usize,
    status: Option<String>,
    #[serde(default)]
    passed_mask: Vec<bool>,
    #[serde(default)]
    error_class: Vec<Option<String>>,
    /// What broke in the reference.
    #[serde(default, rename = "process_error_kind")]
    _process_error_kind: Option<String>,
    escaped: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Paid {
    completion_wraps_code: bool,
    reward: f64,
    success: bool,
    passed: usize,
    syntax_valid: bool,
    has_code: bool,
}

/// What a sandbox must say of the program.
fn verdict(case: &ProgramCase) -> Result<ProgramVerdict, EvaluatorError> {
    let syntax = |syntax| Ok(ProgramVerdict { syntax, tests: Vec::new() });
    if case.expect_unevaluable {
        assert!(case.expected.escaped.is_some() || case.expected.status.as_deref() == Some("process_error"));
        return Err(EvaluatorError::Undecidable { detail: "it escaped".to_owned() });
    }
    match (case.expected.status.as_deref(), &case.expected_env) {
        (Some("syntax_error"), _) => syntax(Syntax::Invalid),
        (_, Some(paid)) if !paid.has_code => syntax(Syntax::CompilerFailed),
        _ => {
            let passed: Vec<bool> = case.expected.error_class.iter().map(Option::is_none).collect();
            assert_eq!(passed, case.expected.passed_mask, "{}", case.name);
            Ok(outcomes(case.expected.error_class.iter().map(Option::as_deref)))
        }
    }
}

#[tokio::test]
async fn programs_earn_what_their_tests_say() {
    const FILE: &str = "environments/programs/programs.json";
    let evaluator = Arc::new(Recorded::default());
    let mbpp = Mbpp::embedded(Split::Train, evaluator.clone()).unwrap();
    let cases: Vec<ProgramCase> = json(FILE);
    let mut unevaluable = 0;
    for case in &cases {
        let payload =
            Payload::Python { dataset_id: "0".into(), tests: case.tests.clone().into(), reference_solution: "".into() };
        let task = Task { id: "train_0".to_owned(), question: "q".to_owned(), row: 0, payload };
        let completion =
            format!("<start_working_out>p</end_working_out>\n<SOLUTION>\n{}\n</SOLUTION><|im_end|>", case.code);
        evaluator.answer_programs(verdict(case));
        let judged = mbpp.evaluate(&task, &completion, ThinkingMode::Instructed).await;
        if case.expect_unevaluable {
            assert!(matches!(judged, Err(Unevaluable::Evaluator { .. })), "{}: {judged:?}", case.name);
            unevaluable += 1;
            continue;
        }
        let judged = judged.unwrap();
        let passed = judged.tests.iter().flatten().filter(|test| test.passed).count();
        assert_eq!(passed, case.expected.passed, "{}", case.name);
        assert_eq!(judged.success, case.expected.status.as_deref() == Some("all_passed"), "{}", case.name);
        let Some(paid) = &case.expected_env else { continue };
        assert!(paid.completion_wraps_code, "{}", case.name);
        assert!((judged.reward - paid.reward).abs() <= 1e-9, "{}: {} for {}", case.name, judged.reward, paid.reward);
        assert_eq!((judged.success, passed), (paid.success, paid.passed), "{}", case.name);
        let Parsed::Python(parsed) = judged.parsed else { panic!("{}", case.name) };
        assert_eq!((parsed.syntax_valid, !parsed.code.is_empty()), (paid.syntax_valid, paid.has_code), "{}", case.name);
        assert_eq!(
            judged.tests.map(|tests| tests.len()),
            paid.has_code.then_some(case.expected.total),
            "{}",
            case.name
        );
    }
    assert_eq!(unevaluable, 2);
    ran(FILE, cases.len(), 266);
}
