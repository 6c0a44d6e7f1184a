//! Completions and right answers against the reference.

use std::collections::BTreeMap;

use grail_environments::gsm8k::{self, Gsm8k};
use grail_environments::{Environment, Payload, Split, Task, ThinkingMode};
use grail_golden::{json, json_lines, ran};
use serde::Deserialize;
use serde::de::IgnoredAny;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CompletionCase {
    name: String,
    mode: String,
    completion: String,
    envs: Verdicts,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Verdicts {
    gsm8k: Gsm8kVerdict,
    /// Not every completion was given to these, and they are not supported yet.
    #[serde(default, rename = "math")]
    _math: Option<IgnoredAny>,
    #[serde(default, rename = "python")]
    _python: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Gsm8kVerdict {
    parsed: Parsed,
    reward: f64,
    success: bool,
    components: BTreeMap<String, f64>,
    gold_answer: String,
    pred_answer: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Parsed {
    answer_text: String,
    has_thinking: bool,
    has_answer: bool,
    trailing_after_answer: usize,
    is_numeric_only: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Payloads {
    gsm8k: Gsm8kPayload,
    /// Payloads of environments that are not supported yet.
    math: IgnoredAny,
    python: IgnoredAny,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Gsm8kPayload {
    question: String,
    answer: String,
}

/// The task that the completions were judged for.
fn task() -> Task {
    const FILE: &str = "environments/completions/payloads.json";
    let Payloads { gsm8k, math: IgnoredAny, python: IgnoredAny } = json(FILE);
    ran(FILE, 1, 1);
    Task {
        id: "train_0".to_owned(),
        question: gsm8k.question,
        row: 0,
        payload: Payload::Gsm8k { answer: gsm8k.answer.into() },
    }
}

#[tokio::test]
async fn completions_are_judged_as_by_the_reference() {
    const FILE: &str = "environments/completions/completions.jsonl";
    let task = task();
    assert_eq!(task.question, "q");
    let environment = Gsm8k::embedded(Split::Train).unwrap();
    let cases: Vec<CompletionCase> = json_lines(FILE);
    for CompletionCase { name, mode, completion, envs } in &cases {
        let case = format!("{name} {mode}");
        let mode: ThinkingMode = mode.parse().unwrap();
        let expected = &envs.gsm8k;
        let parsed = gsm8k::parse(completion, mode);
        assert_eq!(parsed.answer_text, expected.parsed.answer_text, "{case}");
        assert_eq!(parsed.has_thinking, expected.parsed.has_thinking, "{case}");
        assert_eq!(parsed.has_answer, expected.parsed.has_answer, "{case}");
        assert_eq!(parsed.trailing, expected.parsed.trailing_after_answer, "{case}");
        assert_eq!(parsed.is_numeric_only, expected.parsed.is_numeric_only, "{case}");

        let verdict = environment.evaluate(&task, completion, mode).await.unwrap();
        assert!((verdict.reward - expected.reward).abs() <= 1e-9, "{case}: {} for {}", verdict.reward, expected.reward);
        assert_eq!(verdict.success, expected.success, "{case}");
        assert_eq!(verdict.gold_answer, expected.gold_answer, "{case}");
        assert_eq!(verdict.predicted_answer, expected.pred_answer, "{case}");
        assert_eq!(verdict.components.len(), expected.components.len(), "{case}");
        for component in &verdict.components {
            let value = expected.components[component.key];
            assert!(
                (component.value - value).abs() <= 1e-9,
                "{case} {}: {} for {value}",
                component.key,
                component.value
            );
        }
    }
    ran(FILE, cases.len(), 504);
}

#[tokio::test]
async fn a_group_is_judged_in_order() {
    let environment = Gsm8k::embedded(Split::Train).unwrap();
    let completions: Vec<String> = (0..16).map(|n| format!("</think><SOLUTION>{}</SOLUTION>", 40 + n)).collect();
    let verdicts = environment.evaluate_group(&task(), &completions, ThinkingMode::Native).await.unwrap();
    let right: Vec<usize> = (0..16).filter(|n| verdicts[*n].success).collect();
    assert_eq!((verdicts.len(), right), (16, vec![2]));
}

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
