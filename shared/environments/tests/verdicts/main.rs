//! Completions and right answers against the reference. What programs and formulas come to is taken from the vectors here; the
//! evaluator's own tests find it out.

mod answers;
mod groups;
mod programs;
mod recorded;

use std::collections::BTreeMap;
use std::sync::Arc;

use grail_environments::gsm8k::{self, Gsm8k};
use grail_environments::math::{self, Decision, Math};
use grail_environments::mbpp::Mbpp;
use grail_environments::{
    Environment, Evaluation, Parsed, Payload, ProgramVerdict, Split, Syntax, Task, ThinkingMode, explain, find_answer,
    python,
};
use grail_golden::{json, json_lines, ran};
use recorded::{Question, Recorded, outcomes};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CompletionCase {
    name: String,
    mode: String,
    completion: String,
    envs: Verdicts,
}

/// Not every completion was given to every environment.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Verdicts {
    gsm8k: AnswerVerdict,
    math: Option<AnswerVerdict>,
    python: Option<PythonVerdict>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AnswerVerdict {
    parsed: ParsedAnswer,
    reward: f64,
    success: bool,
    components: BTreeMap<String, f64>,
    gold_answer: String,
    pred_answer: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ParsedAnswer {
    answer_text: String,
    has_thinking: bool,
    has_answer: bool,
    trailing_after_answer: usize,
    /// Of gsm8k only.
    is_numeric_only: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PythonVerdict {
    parsed: ParsedProgram,
    reward: f64,
    success: bool,
    components: BTreeMap<String, f64>,
    tests_passed: usize,
    tests_total: usize,
    has_code: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ParsedProgram {
    code: String,
    has_thinking: bool,
    has_solution: bool,
    trailing_after_solution: usize,
    syntax_valid: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Payloads {
    gsm8k: Gsm8kPayload,
    math: MathPayload,
    python: PythonPayload,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Gsm8kPayload {
    question: String,
    answer: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MathPayload {
    question: String,
    solution: String,
    answer: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PythonPayload {
    question: String,
    test_list: Vec<String>,
    test_setup_code: String,
    test_imports: Vec<String>,
    reference_solution: String,
}

/// The tasks that the completions were judged for.
struct Tasks {
    gsm8k: Task,
    math: Task,
    python: Task,
}

fn tasks() -> Tasks {
    const FILE: &str = "environments/completions/payloads.json";
    let Payloads { gsm8k, math, python } = json(FILE);
    ran(FILE, 3, 3);
    let task = |question, payload| Task { id: "train_0".to_owned(), question, row: 0, payload };
    let tests = grail_environments::mbpp::test_cases(&python.test_list, &python.test_setup_code, &python.test_imports);
    Tasks {
        gsm8k: task(gsm8k.question, Payload::Gsm8k { answer: gsm8k.answer.into() }),
        math: task(
            math.question,
            Payload::Math {
                answer: math.answer.into(),
                solution: math.solution.into(),
                level: 0,
                subject: "Algebra".into(),
            },
        ),
        python: task(
            python.question,
            Payload::Python {
                dataset_id: "0".into(),
                tests: tests.into(),
                reference_solution: python.reference_solution.into(),
            },
        ),
    }
}

/// The environments with an evaluator that is told what to answer.
struct Judges {
    evaluator: Arc<Recorded>,
    gsm8k: Gsm8k,
    math: Math,
    mbpp: Mbpp,
}

fn judges() -> Judges {
    let evaluator = Arc::new(Recorded::default());
    Judges {
        gsm8k: Gsm8k::embedded(Split::Train).expect("the data is whole"),
        math: Math::stand_in(Split::Train, evaluator.clone()).expect("the data is whole"),
        mbpp: Mbpp::embedded(Split::Train, evaluator.clone()).expect("the data is whole"),
        evaluator,
    }
}

fn assert_paid(case: &str, verdict: &Evaluation, reward: f64, success: bool, components: &BTreeMap<String, f64>) {
    assert!((verdict.reward - reward).abs() <= 1e-9, "{case}: {} for {reward}", verdict.reward);
    assert_eq!(verdict.success, success, "{case}");
    assert_eq!(verdict.components.len(), components.len(), "{case}");
    for component in &verdict.components {
        let (value, expected) = (component.value, components[component.key]);
        assert!((value - expected).abs() <= 1e-9, "{case} {}: {value} for {expected}", component.key);
    }
}

#[tokio::test]
async fn completions_are_judged_as_by_the_reference() {
    const FILE: &str = "environments/completions/completions.jsonl";
    let (judges, tasks) = (judges(), tasks());
    assert!([&tasks.gsm8k, &tasks.math, &tasks.python].iter().all(|task| task.question == "q"));
    let cases: Vec<CompletionCase> = json_lines(FILE);
    let (mut of_math, mut of_python) = (0, 0);
    for CompletionCase { name, mode, completion, envs } in &cases {
        let case = format!("{name} {mode}");
        let mode: ThinkingMode = mode.parse().unwrap();
        judge_number(&case, &judges, &tasks.gsm8k, completion, mode, &envs.gsm8k).await;
        if let Some(expected) = &envs.math {
            judge_formula(&case, &judges, &tasks.math, completion, mode, expected).await;
            of_math += 1;
        }
        if let Some(expected) = &envs.python {
            judge_program(&case, &judges, &tasks.python, completion, mode, expected).await;
            of_python += 1;
        }
    }
    assert_eq!((of_math, of_python), (378, 442));
    ran(FILE, cases.len(), 504);
}

async fn judge_number(
    case: &str,
    judges: &Judges,
    task: &Task,
    completion: &str,
    mode: ThinkingMode,
    expected: &AnswerVerdict,
) {
    let parsed = gsm8k::ParsedCompletion {
        answer_text: expected.parsed.answer_text.clone(),
        has_thinking: expected.parsed.has_thinking,
        has_answer: expected.parsed.has_answer,
        trailing: expected.parsed.trailing_after_answer,
        is_numeric_only: expected.parsed.is_numeric_only.expect("it is of gsm8k"),
    };
    assert_eq!(gsm8k::parse(completion, mode), parsed, "{case}");
    let verdict = judges.gsm8k.evaluate(task, completion, mode).await.expect("an answer is recorded");
    assert_eq!(verdict.parsed, Parsed::Gsm8k(parsed), "{case}");
    assert_paid(case, &verdict, expected.reward, expected.success, &expected.components);
    assert_eq!((&verdict.gold_answer, &verdict.predicted_answer), (&expected.gold_answer, &expected.pred_answer));
}

async fn judge_formula(
    case: &str,
    judges: &Judges,
    task: &Task,
    completion: &str,
    mode: ThinkingMode,
    expected: &AnswerVerdict,
) {
    assert_eq!(expected.parsed.is_numeric_only, None, "{case}");
    let parsed = math::ParsedCompletion {
        answer_text: expected.parsed.answer_text.clone(),
        has_thinking: expected.parsed.has_thinking,
        has_answer: expected.parsed.has_answer,
        trailing: expected.parsed.trailing_after_answer,
    };
    judges.evaluator.answer_pairs(expected.success);
    let verdict = judges.math.evaluate(task, completion, mode).await.expect("an answer is recorded");
    assert_eq!(verdict.parsed, Parsed::Math(parsed), "{case}");
    assert_paid(case, &verdict, expected.reward, expected.success, &expected.components);
    assert_eq!((&verdict.gold_answer, &verdict.predicted_answer), (&expected.gold_answer, &expected.pred_answer));
    let asked = judges.evaluator.take_asked();
    let is_needed = matches!(math::decide(&expected.pred_answer, &expected.gold_answer), Decision::Symbolic { .. });
    assert_eq!(asked.len(), usize::from(is_needed), "{case}: {asked:?}");
}

async fn judge_program(
    case: &str,
    judges: &Judges,
    task: &Task,
    completion: &str,
    mode: ThinkingMode,
    expected: &PythonVerdict,
) {
    let parsed = python::ParsedCompletion {
        code: expected.parsed.code.clone(),
        has_thinking: expected.parsed.has_thinking,
        has_solution: expected.parsed.has_solution,
        trailing: expected.parsed.trailing_after_solution,
        syntax_valid: expected.parsed.syntax_valid,
    };
    let classes = (0..expected.tests_total).map(|test| (test >= expected.tests_passed).then_some("AssertionError"));
    let content = find_answer(completion, &mode.tags()).content.unwrap_or_default();
    assert_eq!(expected.has_code, !expected.parsed.code.is_empty(), "{case}");
    let verdict = match expected.parsed.syntax_valid {
        true => outcomes(classes),
        false if expected.has_code => ProgramVerdict { syntax: Syntax::Invalid, tests: Vec::new() },
        // Where there was something to compile, the compiler itself failed on it.
        false => ProgramVerdict { syntax: Syntax::CompilerFailed, tests: Vec::new() },
    };
    judges.evaluator.answer_programs(Ok(verdict));
    let verdict = judges.mbpp.evaluate(task, completion, mode).await.expect("an answer is recorded");
    assert_eq!(verdict.parsed, Parsed::Python(parsed), "{case}");
    assert_paid(case, &verdict, expected.reward, expected.success, &expected.components);
    assert_eq!((verdict.gold_answer.as_str(), verdict.predicted_answer.as_str()), ("", ""), "{case}");
    let passed = verdict.tests.iter().flatten().filter(|test| test.passed).count();
    let total = verdict.tests.as_ref().map_or(0, Vec::len);
    assert_eq!((passed, total), (expected.tests_passed, expected.tests_total), "{case}");
    let asked = judges.evaluator.take_asked();
    assert_eq!(asked.len(), usize::from(!content.is_empty()), "{case}");
    for question in asked {
        let Question::Program(program) = question else { panic!("{case}: a formula") };
        assert_eq!(*program.code, *content, "{case}");
        assert_eq!(program.tests.len(), 3, "{case}");
    }
}

#[tokio::test]
async fn explanations_hold_all_that_a_reward_is_made_of() {
    let (judges, tasks) = (judges(), tasks());
    judges.evaluator.answer_programs(Ok(outcomes([None, Some("AssertionError"), None])));
    let completion = "</think><SOLUTION>def f(x): return x+1</SOLUTION><|im_end|>";
    let explanation = explain(&judges.mbpp, &tasks.python, completion, ThinkingMode::Native).await.unwrap();
    let parsed = serde_json::json!({"python": {
        "code": "def f(x): return x+1", "has_thinking": true, "has_solution": true, "trailing": 10, "syntax_valid": true,
    }});
    let value = serde_json::to_value(&explanation).unwrap();
    let field = |path: &str| value.pointer(path).unwrap_or_else(|| panic!("{path} of {value}")).clone();
    assert_eq!((field("/environment"), field("/task")), ("mbpp".into(), "train_0".into()));
    assert_eq!(field("/thinking_mode"), Value::from("native"));
    assert_eq!(field("/evaluation/parsed"), parsed);
    assert_eq!(field("/evaluation/success"), Value::from(false));
    assert_eq!(field("/evaluation/components/0/weight"), Value::from(0.7));
    let failed = serde_json::json!({"passed": false, "error_class": "AssertionError", "wall_ms": 3.0});
    assert_eq!(field("/evaluation/tests/1"), failed);
    assert!((explanation.evaluation.reward - (0.7 * 2.0 / 3.0 + 0.3)).abs() < 1e-12);
}
