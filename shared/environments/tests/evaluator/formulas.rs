//! Every pair of answers of the golden vectors, compared by sympy in the sandbox.

use grail_environments::sandbox::setup::Installation;
use grail_environments::{Evaluator, EvaluatorError};
use grail_golden::{json, ran};
use serde::Deserialize;

use super::support::{LONG, config, start};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    #[serde(rename = "family")]
    _family: String,
    #[serde(rename = "predicted")]
    _predicted: String,
    #[serde(rename = "gold")]
    _gold: String,
    predicted_norm: String,
    gold_norm: String,
    equal: bool,
    decided_by: DecidedBy,
}

/// What the reference's steps said. A pair that is equal as text, or empty, never reached the second step.
#[derive(Deserialize)]
#[serde(untagged)]
enum DecidedBy {
    Text(String),
    Steps { symbolic: Step, numeric: Step },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Step {
    Answer(bool),
    /// `error:CLASS` or `error`: counts as no.
    Error(String),
}

impl Step {
    fn is_yes(&self) -> bool {
        match self {
            Self::Answer(answer) => *answer,
            Self::Error(text) => {
                assert!(text.starts_with("error"), "{text}");
                false
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pairs_compare_as_in_the_reference() {
    const FILE: &str = "environments/math/pairs.json";
    let pairs: Vec<Pair> = json(FILE);
    let pool = start(config(0, 2)).await;
    let mut wrong = Vec::new();
    let compare = |pair: &Pair| {
        let (left, right) = (pair.predicted_norm.clone(), pair.gold_norm.clone());
        let pool = &pool;
        async move { pool.are_equal(&left, &right).await }
    };
    // Enough at a time that plain ones share children.
    for chunk in pairs.chunks(8) {
        let mut verdicts = Vec::new();
        if let [a, b, c, d, e, f, g, h] = chunk {
            let all = tokio::join!(
                compare(a),
                compare(b),
                compare(c),
                compare(d),
                compare(e),
                compare(f),
                compare(g),
                compare(h)
            );
            verdicts.extend([all.0, all.1, all.2, all.3, all.4, all.5, all.6, all.7]);
        } else {
            for pair in chunk {
                verdicts.push(compare(pair).await);
            }
        }
        for (pair, found) in chunk.iter().zip(verdicts) {
            let is_right = match (&pair.decided_by, &found) {
                (DecidedBy::Steps { symbolic, numeric }, Ok(found)) => {
                    assert_eq!(pair.equal, symbolic.is_yes() || numeric.is_yes());
                    *found == symbolic.is_yes()
                }
                // Whatever sympy says of equal texts, they are equal; it must only say something.
                (DecidedBy::Text(step), Ok(_)) => ["exact", "empty"].contains(&step.as_str()),
                (_, Err(_)) => false,
            };
            if !is_right {
                wrong.push(format!("{:?} and {:?}: found {found:?}", pair.predicted_norm, pair.gold_norm));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    ran(FILE, pairs.len(), 340);
    pool.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn formulas_that_never_end_have_no_verdict_and_harm_no_others() {
    let pool = start(config(0, 1)).await;
    let ask = |left: &'static str| {
        let pool = &pool;
        async move { tokio::time::timeout(LONG, pool.are_equal(left, "6")).await.expect("an answer in time") }
    };
    // All of them are plain enough to be tried with the others, and wait while the first keeps the interpreter.
    let (tower, good, factorial, bad) = tokio::join!(ask("9**9**9"), ask("3!"), ask("factorial(10**9)"), ask("7"));
    assert_eq!((good, bad), (Ok(true), Ok(false)));
    for bomb in [tower, factorial] {
        assert!(matches!(bomb, Err(EvaluatorError::Undecidable { .. })), "{bomb:?}");
    }
    assert_eq!(pool.are_equal("1/2", "0.5").await, Ok(true));
    pool.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn formulas_that_are_programs_reach_nothing_and_leave_nothing() {
    let pool = start(config(0, 1)).await;
    let hostile = ["__import__('os')._exit(0)", "exec('import os\\nos._exit(0)')", "__import__('sys').exit(0)"];
    for text in hostile {
        let found = pool.are_equal(text, "1").await;
        assert!(matches!(found, Err(EvaluatorError::Undecidable { .. })), "{text}: {found:?}");
    }
    // It says that everything is equal, to this child only.
    let poison = "exec(\"import sys\\nfor m in list(sys.modules.values()):\\n  if getattr(m,'__name__','')=='__main__': m.SIMPLIFY=lambda x:0\")";
    assert!(pool.are_equal(poison, "1").await.is_ok());
    let denied = "5if__import__('os').listdir('/')==1else__import__('socket').socket()";
    assert_eq!(pool.are_equal(denied, "5").await, Ok(false));
    assert_eq!(pool.are_equal("x", "y").await, Ok(false));
    pool.shut_down().await;
}

/// Programs write to a `/tmp` of their own, which must not hide what the host has there.
#[tokio::test(flavor = "multi_thread")]
async fn packages_in_the_hosts_tmp_are_found() {
    let folder = tempfile::tempdir_in("/tmp").expect("a folder");
    let mut config = config(0, 1);
    let copied = std::process::Command::new("cp")
        .arg("-r")
        .arg(config.installation.folder().join("."))
        .arg(folder.path())
        .status()
        .expect("cp is everywhere");
    assert!(copied.success());
    config.installation = Installation::in_folder(folder.path());
    let pool = start(config).await;
    let answer = tokio::time::timeout(LONG, pool.are_equal("2/4", "1/2")).await;
    assert!(answer.expect("in time").expect("a verdict"));
    pool.shut_down().await;
}
