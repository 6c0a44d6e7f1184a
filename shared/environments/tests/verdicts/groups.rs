//! Sixteen completions at once.

use std::sync::Arc;

use grail_environments::gsm8k::Gsm8k;
use grail_environments::humaneval::HumanEval;
use grail_environments::math::Math;
use grail_environments::{
    Environment, EnvironmentId, Evaluator, EvaluatorError, NoEvaluator, Payload, ProgramVerdict, Split, Syntax, Task,
    ThinkingMode, Unevaluable,
};
use grail_protocol::ids::RolloutIndex;

use crate::recorded::{Question, Recorded, outcomes};

fn task(payload: Payload) -> Task {
    Task { id: "x_0".to_owned(), question: "q".to_owned(), row: 0, payload }
}

fn formula() -> Task {
    task(Payload::Math { answer: "2*x".into(), solution: "".into(), level: 1, subject: "Algebra".into() })
}

fn program(tests: &[&str]) -> Task {
    let tests = tests.iter().map(|test| (*test).to_owned()).collect();
    task(Payload::Python { dataset_id: "0".into(), tests, reference_solution: "".into() })
}

/// Completions with the given answers, each after its own thoughts.
fn completions<'a>(answers: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let completion = |(n, answer)| format!("thought {n}</think><SOLUTION>{answer}</SOLUTION>");
    answers.into_iter().enumerate().map(completion).collect()
}

#[tokio::test]
async fn a_group_is_judged_in_order() {
    let environment = Gsm8k::embedded(Split::Train).unwrap();
    let completions: Vec<String> = (0..16).map(|n| format!("</think><SOLUTION>{}</SOLUTION>", 40 + n)).collect();
    let task = task(Payload::Gsm8k { answer: "#### 42".into() });
    let verdicts = environment.evaluate_group(&task, &completions, ThinkingMode::Native).await.unwrap();
    let right: Vec<usize> = (0..16).filter(|n| verdicts[*n].success).collect();
    assert_eq!((verdicts.len(), right), (16, vec![2]));
}

#[tokio::test]
async fn equal_programs_run_once() {
    let evaluator = Arc::new(Recorded::default());
    let environment = HumanEval::embedded(evaluator.clone()).unwrap();
    evaluator.answer_programs(Ok(outcomes([None])));
    let answers = ["a = 1", "b = 2", "a = 1", " a = 1\n", "", "b = 2"];
    let completions = completions(answers.into_iter().cycle().take(16));
    let verdicts = environment.evaluate_group(&program(&["1"]), &completions, ThinkingMode::Native).await.unwrap();
    let asked = evaluator.take_asked();
    let code = |question: &Question| match question {
        Question::Program(program) => program.code.to_string(),
        Question::Pair(..) => panic!("a formula"),
    };
    assert_eq!(asked.iter().map(code).collect::<Vec<_>>(), ["a = 1", "b = 2"]);
    for (verdict, answer) in verdicts.iter().zip(answers.into_iter().cycle()) {
        assert_eq!((verdict.success, verdict.tests.is_some()), (!answer.is_empty(), !answer.is_empty()));
    }
    // Another group asks again.
    environment.evaluate_group(&program(&["1"]), &completions, ThinkingMode::Native).await.unwrap();
    assert_eq!(evaluator.take_asked().len(), 2);
}

#[tokio::test]
async fn equal_pairs_are_compared_once() {
    let evaluator = Arc::new(Recorded::default());
    let environment = Math::stand_in(Split::Train, evaluator.clone()).unwrap();
    evaluator.answer_pairs(true);
    let completions = completions(["x+x", "X + X", "2*x", "\\sqrt{x}", "x*2", "x+x"]);
    let verdicts = environment.evaluate_group(&formula(), &completions, ThinkingMode::Native).await.unwrap();
    let pair = |left: &str| Question::Pair(left.to_owned(), "2*x".to_owned());
    assert_eq!(evaluator.take_asked(), [pair("x+x"), pair("x*2")]);
    let success: Vec<bool> = verdicts.iter().map(|verdict| verdict.success).collect();
    assert_eq!(success, [true, true, true, false, true, true]);
}

#[tokio::test]
async fn the_first_completion_without_a_verdict_is_named() {
    let refusal = EvaluatorError::Undecidable { detail: "killed".to_owned() };
    let evaluator = Arc::new(Recorded::default());
    let environment = HumanEval::embedded(evaluator.clone()).unwrap();
    evaluator.answer_programs(Err(refusal.clone()));
    let completions = completions(["", "", "a = 1", "", "b = 2"]);
    let task = program(&["1"]);
    let error = environment.evaluate_group(&task, &completions, ThinkingMode::Native).await.unwrap_err();
    assert_eq!(error.rollout, RolloutIndex::all().nth(2).unwrap());
    assert_eq!(error.source, Unevaluable::Evaluator { task: "x_0".to_owned(), source: refusal });
    assert!(error.to_string().contains("killed"), "{error}");
}

#[tokio::test]
async fn outcomes_must_be_of_the_tests() {
    let evaluator = Arc::new(Recorded::default());
    let environment = HumanEval::embedded(evaluator.clone()).unwrap();
    let completion = "<SOLUTION>a = 1</SOLUTION>";
    for verdict in [
        outcomes([None]),
        outcomes([None, None, None]),
        ProgramVerdict { syntax: Syntax::Invalid, tests: outcomes([None]).tests },
    ] {
        evaluator.answer_programs(Ok(verdict));
        let judged = environment.evaluate(&program(&["1", "2"]), completion, ThinkingMode::Native).await;
        assert!(matches!(judged, Err(Unevaluable::Outcomes { .. })), "{judged:?}");
    }
    // Without tests nothing can be right.
    evaluator.answer_programs(Ok(outcomes([])));
    let judged = environment.evaluate(&program(&[]), completion, ThinkingMode::Native).await.unwrap();
    assert_eq!((judged.success, judged.components[0].value, judged.components[1].value), (false, 0.0, 1.0));
}

#[tokio::test]
async fn a_task_of_another_environment_is_refused() {
    let evaluator: Arc<dyn Evaluator> = Arc::new(NoEvaluator);
    let gsm8k = Gsm8k::embedded(Split::Train).unwrap();
    let math = Math::stand_in(Split::Train, evaluator.clone()).unwrap();
    let humaneval = HumanEval::embedded(evaluator).unwrap();
    let foreign = task(Payload::Gsm8k { answer: "1".into() });
    for (environment, task) in [(&gsm8k as &dyn Environment, &formula()), (&math, &foreign), (&humaneval, &foreign)] {
        let judged = environment.evaluate(task, "<SOLUTION>1</SOLUTION>", ThinkingMode::Native).await;
        let expected = Unevaluable::ForeignTask { task: "x_0".to_owned(), environment: environment.id() };
        assert_eq!(judged, Err(expected));
    }
    assert_eq!(math.id(), EnvironmentId::Math);
    // Without a sandbox, what needs none is still judged.
    let judged = math.evaluate(&formula(), "<SOLUTION>2 * x</SOLUTION>", ThinkingMode::Native).await.unwrap();
    assert!(judged.success);
    let judged = math.evaluate(&formula(), "<SOLUTION>x+x</SOLUTION>", ThinkingMode::Native).await;
    assert!(matches!(judged, Err(Unevaluable::Evaluator { .. })), "{judged:?}");
}
