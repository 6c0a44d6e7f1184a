//! Every program of the golden vectors, and the datasets' own solutions, against the reference's pool.

use std::collections::{BTreeMap, BTreeSet};

use grail_environments::{Evaluator, EvaluatorError, Syntax};
use grail_golden::{json, json_lines, ran};
use serde::Deserialize;

use super::support::{assert_leaves_nothing, classes, config, program, start};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProgramCase {
    name: String,
    code: String,
    tests: Vec<String>,
    tag: String,
    expected: Expected,
    #[serde(default)]
    expected_env: Option<ExpectedEnvironment>,
    #[serde(default)]
    expect_unevaluable: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    #[serde(default)]
    passed: usize,
    #[serde(default)]
    total: usize,
    #[serde(default)]
    status: String,
    #[serde(default)]
    passed_mask: Vec<bool>,
    #[serde(default)]
    error_class: Vec<Option<String>>,
    #[serde(default)]
    escaped: Option<String>,
    #[serde(default)]
    process_error_kind: Option<String>,
}

/// What the whole environment makes of it. Its reward is asserted where rewards are made.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpectedEnvironment {
    completion_wraps_code: bool,
    reward: f64,
    success: bool,
    passed: usize,
    syntax_valid: bool,
    has_code: bool,
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_get_the_references_verdicts() {
    const FILE: &str = "environments/programs/programs.json";
    let cases: Vec<ProgramCase> = json(FILE);
    let pool = start(config(2, 0)).await;
    let mut wrong = Vec::new();
    for case in &cases {
        let tests: Vec<&str> = case.tests.iter().map(String::as_str).collect();
        let found = pool.run(program(&case.code, &tests)).await;
        if let Err(difference) = compare(case, &found) {
            wrong.push(format!("{}: {difference}; found {found:?}", case.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    ran(FILE, cases.len(), 266);
    assert_leaves_nothing(pool).await;
}

type Found = Result<grail_environments::ProgramVerdict, EvaluatorError>;

fn compare(case: &ProgramCase, found: &Found) -> Result<(), String> {
    let Expected { passed, total, status, passed_mask, error_class, escaped, process_error_kind } = &case.expected;
    assert!(["verdict", "attack"].contains(&case.tag.as_str()), "{}", case.tag);
    let is_lost = escaped.is_some() || process_error_kind.is_some();
    let has_code = case.expected_env.as_ref().is_none_or(|environment| environment.has_code);
    if case.expect_unevaluable || (is_lost && has_code) {
        return match found {
            Err(EvaluatorError::Undecidable { .. }) => Ok(()),
            _ => Err("it has no verdict".to_owned()),
        };
    }
    let Ok(verdict) = found else { return Err("it has a verdict".to_owned()) };
    if let Some(environment) = &case.expected_env {
        let ExpectedEnvironment { completion_wraps_code, reward, success, passed, syntax_valid, has_code } =
            environment;
        let syntax = match (syntax_valid, has_code) {
            (true, true) => Syntax::Valid,
            (false, true) => Syntax::Invalid,
            (_, false) => Syntax::CompilerFailed,
        };
        let has_passed = verdict.tests.iter().filter(|test| test.has_passed()).count();
        let all_passed = !verdict.tests.is_empty() && has_passed == verdict.tests.len();
        let is_in_range = *completion_wraps_code && (0.0..=1.0).contains(reward);
        if (verdict.syntax, has_passed, all_passed, is_in_range) != (syntax, *passed, *success, true) {
            return Err(format!("{syntax:?}, {passed} passed"));
        }
    }
    if is_lost {
        return Ok(());
    }
    let is_syntax_error = status == "syntax_error";
    let expected: Vec<&str> = error_class.iter().map(|class| class.as_deref().unwrap_or("-")).collect();
    let mask: Vec<bool> = verdict.tests.iter().map(|test| test.has_passed()).collect();
    let counted = mask.iter().filter(|passed| **passed).count();
    let expected_status = match counted {
        _ if is_syntax_error => "syntax_error",
        _ if counted == *total => "all_passed",
        0 if expected.iter().all(|class| *class == "Timeout") => "timeout",
        0 => "error",
        _ => "some_failed",
    };
    let is_equal = classes(verdict) == expected
        && mask == *passed_mask
        && counted == *passed
        && *total == case.tests.len()
        && (verdict.syntax == Syntax::Valid) != is_syntax_error
        && status == expected_status;
    if is_equal { Ok(()) } else { Err(format!("{status}, {expected:?}")) }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    builtins_allowed: BTreeSet<String>,
    imports_allowed_top_level: Vec<String>,
    per_test_wall_seconds: u64,
    workers_miner: u32,
    workers_validator: u32,
    tasks_per_worker: u32,
    caller_wait_seconds: String,
    process_error_attempts: u32,
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_see_the_references_names_and_modules() {
    const FILE: &str = "environments/programs/pool_rules.json";
    let rules: Rules = json(FILE);
    // Two, for what names sets is run by two.
    let pool = start(config(2, 0)).await;
    let allowed = format!("assert sorted(__builtins__) == sorted({:?})", rules.builtins_allowed);
    // Three of the names are keywords; the rest can be written down, and one that is not allowed cannot.
    let known: Vec<String> = rules.builtins_allowed.iter().cloned().collect();
    let names = format!("[{}]", known.join(", "));
    let mut tests = vec![allowed, names];
    tests.extend(rules.imports_allowed_top_level.iter().map(|module| format!("import {module}")));
    tests.push("import collections.abc".to_owned());
    let passing = tests.len();
    tests.extend(
        ["import mathx", "import os", "import sys", "from . import math", "getattr", "__name__"].map(str::to_owned),
    );
    let tests: Vec<&str> = tests.iter().map(String::as_str).collect();
    let verdict = pool.run(program("", &tests)).await.unwrap();
    assert_eq!(classes(&verdict)[..passing], vec!["-"; passing]);
    let refused = ["ImportError", "ImportError", "ImportError", "ImportError", "NameError", "NameError"];
    assert_eq!(classes(&verdict)[passing..], refused);
    // Of these only the time limit shows in a verdict; ours is longer, and what ends between the two has none.
    let kept = (rules.per_test_wall_seconds, rules.process_error_attempts, rules.caller_wait_seconds.as_str());
    assert_eq!(kept, (5, 3, "5*tests+30"));
    assert_eq!((rules.workers_miner, rules.workers_validator, rules.tasks_per_worker), (4, 8, 50));
    ran(FILE, 1, 1);
    assert_leaves_nothing(pool).await;
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReferenceSolutions {
    #[serde(rename = "note")]
    _note: String,
    mbpp_rows: usize,
    humaneval_rows: usize,
    mbpp: Vec<Failing<u32>>,
    humaneval: Vec<Failing<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Failing<Id> {
    task_id: Id,
    passed: usize,
    total: usize,
    status: String,
    errors: Vec<String>,
}

#[derive(Deserialize)]
struct MbppRow {
    task_id: u32,
    code: String,
    test_list: Vec<String>,
    test_setup_code: String,
}

#[derive(Deserialize)]
struct HumanEvalRow {
    task_id: String,
    prompt: String,
    canonical_solution: String,
    test: String,
    entry_point: String,
}

/// A solution, its tests, and the class of the error that all of them end with, if they do.
struct Solution {
    name: String,
    code: String,
    tests: Vec<String>,
    error: Option<String>,
}

const SOLUTIONS: &str = "environments/programs/reference_solutions.json";
const MBPP: &str = "environments/data/mbpp.jsonl.gz";
const HUMANEVAL: &str = "environments/data/HumanEval.jsonl.gz";

/// The class that a message such as `NameError: name ...` starts with; all tests of a row fail alike.
fn error_of<Id: std::fmt::Debug>(row: &Failing<Id>) -> String {
    let class = |message: &String| message.split(':').next().unwrap_or_default().to_owned();
    let classes: BTreeSet<String> = row.errors.iter().map(class).collect();
    assert_eq!((classes.len(), row.passed, row.status.as_str()), (1, 0, "error"), "{:?}", row.task_id);
    assert!(row.total > 0);
    classes.into_iter().next().expect("one")
}

fn mbpp_solutions() -> Vec<Solution> {
    let known: ReferenceSolutions = json(SOLUTIONS);
    let failing: BTreeMap<u32, String> = known.mbpp.iter().map(|row| (row.task_id, error_of(row))).collect();
    let rows: Vec<MbppRow> = json_lines(MBPP);
    assert_eq!((rows.len(), failing.len()), (known.mbpp_rows, 29));
    let solution = |row: MbppRow| {
        let setup = if row.test_setup_code.is_empty() { String::new() } else { format!("\n{}\n", row.test_setup_code) };
        let tests = row.test_list.iter().map(|test| format!("{setup}{test}")).collect();
        let error = failing.get(&row.task_id).cloned();
        Solution { name: format!("mbpp {}", row.task_id), code: row.code.trim().to_owned(), tests, error }
    };
    rows.into_iter().map(solution).collect()
}

fn humaneval_solutions() -> Vec<Solution> {
    let known: ReferenceSolutions = json(SOLUTIONS);
    let failing: BTreeMap<String, String> =
        known.humaneval.iter().map(|row| (row.task_id.clone(), error_of(row))).collect();
    let rows: Vec<HumanEvalRow> = json_lines(HUMANEVAL);
    assert_eq!((rows.len(), failing.len()), (known.humaneval_rows, 27));
    let solution = |row: HumanEvalRow| {
        let tests = vec![format!("{}\ncheck({})", row.test, row.entry_point)];
        let code = format!("{}{}", row.prompt, row.canonical_solution).trim().to_owned();
        Solution { name: row.task_id.clone(), code, tests, error: failing.get(&row.task_id).cloned() }
    };
    rows.into_iter().map(solution).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_hangs_on_a_set_has_no_verdict_where_only_one_interpreter_is_there() {
    let pool = start(config(1, 0)).await;
    let answer = pool.run(program("x = list({'a', 'b'})", &["assert len(x) == 2"])).await;
    assert!(matches!(&answer, Err(EvaluatorError::Undecidable { detail }) if detail.contains("set")), "{answer:?}");
    let settled = pool.run(program("x = 'a' in {'a', 'b'}", &["assert x"])).await.unwrap();
    assert_eq!(classes(&settled), ["-"]);
    assert_leaves_nothing(pool).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_datasets_own_solutions_pass_or_fail_as_in_the_reference() {
    let mut solutions = mbpp_solutions();
    solutions.extend(humaneval_solutions());
    let pool = start(config(2, 0)).await;
    let (mut wrong, mut late) = (Vec::new(), Vec::new());
    for pair in solutions.chunks(2) {
        let verdicts = futures_of(&pool, pair).await;
        for (solution, found) in pair.iter().zip(verdicts) {
            let expected = vec![solution.error.as_deref().unwrap_or("-"); solution.tests.len()];
            match &found {
                Ok(verdict) if verdict.syntax == Syntax::Valid && classes(verdict) == expected => {}
                // A slow machine comes near to the limit, and then there is no verdict: never a wrong one.
                Err(EvaluatorError::Undecidable { detail }) if is_about_time(detail) => late.push(&solution.name),
                _ => wrong.push(format!("{}: expected {expected:?}, found {found:?}", solution.name)),
            }
        }
    }
    println!("without a verdict, because they take seconds on this machine: {late:?}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(late.len() <= 10, "{late:?}");
    ran(SOLUTIONS, solutions.len(), 974 + 164);
    ran(MBPP, solutions.len() - 164, 974);
    ran(HUMANEVAL, solutions.len() - 974, 164);
    assert_leaves_nothing(pool).await;
}

fn is_about_time(detail: &str) -> bool {
    detail.contains("too near") || detail.contains("too busy")
}

/// Verdicts on a few solutions at the same time.
async fn futures_of(pool: &grail_environments::pool::Pool, solutions: &[Solution]) -> Vec<Found> {
    let run = |solution: &Solution| {
        let tests: Vec<&str> = solution.tests.iter().map(String::as_str).collect();
        pool.run(program(&solution.code, &tests))
    };
    match solutions {
        [first, second] => {
            let (first, second) = tokio::join!(run(first), run(second));
            vec![first, second]
        }
        others => {
            let mut verdicts = Vec::new();
            for solution in others {
                verdicts.push(run(solution).await);
            }
            verdicts
        }
    }
}
