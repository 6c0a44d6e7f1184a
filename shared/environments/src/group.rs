//! The completions of one group, judged side by side.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use grail_protocol::ids::RolloutIndex;
use tokio::sync::OnceCell;

use crate::environment::BoxFuture;
use crate::evaluation::{Evaluation, GroupUnevaluable, Unevaluable};
use crate::evaluator::{Evaluator, EvaluatorError, Program, ProgramVerdict};

/// Judges `completions` at the same time; verdicts in order of the rollouts.
///
/// All are waited for, so that the error does not hang on which of them fails first.
pub(crate) async fn evaluate_all<'a, F, V>(
    completions: &'a [String],
    judge: F,
) -> Result<Vec<Evaluation>, GroupUnevaluable>
where
    F: Fn(&'a str) -> V,
    V: Future<Output = Result<Evaluation, Unevaluable>>,
{
    assert!(completions.len() <= RolloutIndex::all().len(), "a group has at most 16 rollouts");
    let verdicts = futures::future::join_all(completions.iter().map(|completion| judge(completion))).await;
    let numbered = RolloutIndex::all().zip(verdicts);
    numbered.map(|(rollout, verdict)| verdict.map_err(|source| GroupUnevaluable { rollout, source })).collect()
}

/// Answers by question; a question that is being answered is waited for.
type Answers<Q, A> = Mutex<HashMap<Q, Arc<OnceCell<Result<A, EvaluatorError>>>>>;

/// Asks an evaluator every question of a group once: completions of one task often hold the same program.
#[derive(Debug)]
pub(crate) struct GroupEvaluator<'e> {
    inner: &'e dyn Evaluator,
    programs: Answers<Program, ProgramVerdict>,
    pairs: Answers<(String, String), bool>,
}

impl<'e> GroupEvaluator<'e> {
    pub(crate) fn new(inner: &'e dyn Evaluator) -> Self {
        Self { inner, programs: Mutex::default(), pairs: Mutex::default() }
    }
}

fn slot<Q: Hash + Eq, A>(answers: &Answers<Q, A>, question: Q) -> Arc<OnceCell<Result<A, EvaluatorError>>> {
    // A map of finished insertions is whole, whoever panicked while holding the lock.
    let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(answers.entry(question).or_default())
}

impl Evaluator for GroupEvaluator<'_> {
    fn run(&self, program: Program) -> BoxFuture<'_, Result<ProgramVerdict, EvaluatorError>> {
        Box::pin(async move {
            let answer = slot(&self.programs, program.clone());
            answer.get_or_init(|| self.inner.run(program)).await.clone()
        })
    }

    fn are_equal<'a>(&'a self, left: &'a str, right: &'a str) -> BoxFuture<'a, Result<bool, EvaluatorError>> {
        Box::pin(async move {
            let answer = slot(&self.pairs, (left.to_owned(), right.to_owned()));
            answer.get_or_init(|| self.inner.are_equal(left, right)).await.clone()
        })
    }
}
