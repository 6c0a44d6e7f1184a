//! The pool of sandboxed interpreters: the real [`Evaluator`].
//!
//! Interpreters for programs and for formulas are children in `grail-process`'s state machine, each with a task that feeds it
//! through its pipes. A dispatcher gives jobs to whoever is idle. What an interpreter reports becomes a verdict in
//! `verdict`, and a failure of the sandbox is tried again and kept apart from a failure of the program.

mod board;
mod fleet;
mod link;
mod pair;
mod protocol;
mod role;
mod shared;
mod slot;
mod verdict;

use std::sync::Arc;

use grail_process::cgroup::Delegation;
use tokio::sync::watch;
use tracing::{info, warn};

pub use fleet::InterpreterState;
pub use slot::Patience;

use crate::environment::BoxFuture;
use crate::evaluator::{Evaluator, EvaluatorError, Program, ProgramVerdict};
use crate::sandbox::setup::{Installation, SetupError};
use crate::sandbox::{Helper, LayerReport, LayerSet, probe, working};
use board::Work;
use fleet::{Answer, Fleet};
use role::{Ground, Purpose};
use shared::Shared;
use verdict::TEST_LIMIT_S;

/// A boolean: programs run even where the sandbox is weaker than it must be. Read by whoever configures the pool.
pub const UNSAFE_VARIABLE: &str = "GRAIL_UNSAFE_SANDBOX";

/// Programs of one group at most; more interpreters would wait.
const MOST_FOR_PROGRAMS: usize = 16;
const MOST_FOR_FORMULAS: usize = 8;

/// How a pool is made.
#[derive(Debug)]
pub struct PoolConfig {
    /// How the sandbox is entered.
    pub helper: Helper,
    /// Where the interpreter lies.
    pub installation: Installation,
    /// Interpreters for programs; none if no environment needs them.
    pub programs: usize,
    /// Interpreters for formulas; none if no environment needs them.
    pub formulas: usize,
    /// Layers to use where they work. All of them, but in tests of a single layer.
    pub layers: LayerSet,
    /// Run programs although fewer layers work than are needed.
    pub is_unsafe_accepted: bool,
    /// Our control group, if one was delegated.
    pub delegation: Option<Arc<Delegation>>,
    /// By how much interpreters are nicer than this process, `0..=19`, so that proofs go first.
    pub nice: u8,
    /// Jobs that may wait or run, for each of the two kinds.
    pub queue: usize,
    /// How long interpreters may take.
    pub patience: Patience,
}

impl PoolConfig {
    /// One interpreter of each kind per core, and one more, three at least; all layers.
    #[must_use]
    pub fn new(helper: Helper, installation: Installation) -> Self {
        let cores = std::thread::available_parallelism().map_or(2, usize::from).max(2);
        Self {
            helper,
            installation,
            // A second run of a program goes to another interpreter than the first, and would wait for one that is busy; a
            // formula that takes long keeps others waiting less.
            programs: (cores + 1).min(MOST_FOR_PROGRAMS),
            formulas: (cores + 1).min(MOST_FOR_FORMULAS),
            layers: LayerSet::all(),
            is_unsafe_accepted: false,
            delegation: None,
            nice: 10,
            queue: 1_024,
            patience: Patience::default(),
        }
    }
}

/// A pool that cannot be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The interpreter is not there, or is the wrong one.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The sandbox is weaker than it must be.
    #[error(
        "refuse to run programs of a model on this host: the sandbox lacks {}; {reasons}. GRAIL_UNSAFE_SANDBOX=1 runs \
         them all the same, with less between them and this host", missing.join(", ")
    )]
    Unsafe {
        /// What lacks.
        missing: Vec<&'static str>,
        /// Why it does not work.
        reasons: String,
    },
    /// Whoever owns the pool does not want it any more.
    #[error("the evaluators were shut down")]
    ShutDown,
}

type Verdict = Result<ProgramVerdict, EvaluatorError>;

/// Sandboxed interpreters that evaluate programs and formulas. Dropping it ends them.
#[derive(Debug)]
pub struct Pool {
    programs: Fleet,
    formulas: Fleet,
    layers: LayerSet,
    reports: Vec<LayerReport>,
    /// Programs and pairs that are being evaluated: a group often holds the same one several times.
    running: Shared<Program, Verdict>,
    comparing: Shared<(String, String), Result<bool, EvaluatorError>>,
}

impl Pool {
    /// Inspects the interpreter, tries the layers and starts the interpreters, which become ready later.
    ///
    /// # Errors
    /// [`PoolError`] if there is no interpreter, or the sandbox is weaker than it must be.
    pub async fn start(config: PoolConfig) -> Result<Self, PoolError> {
        let interpreter = config.installation.open().await?;
        let reports = probe(&config.helper, &interpreter.view_with_sympy(), config.delegation.as_deref()).await;
        let layers = working(&reports).both(config.layers);
        let missing = layers.missing();
        if !missing.is_empty() {
            let reasons = reasons(&reports);
            if !config.is_unsafe_accepted {
                return Err(PoolError::Unsafe { missing, reasons });
            }
            warn!(%layers, missing = missing.join(", "), reasons, "Programs of a model run in a weak sandbox, as was asked for.");
        }
        info!(
            %layers,
            absent = reasons(&reports),
            python = interpreter.python_version,
            sympy = interpreter.sympy_version,
            programs = config.programs,
            formulas = config.formulas,
            "Evaluators start."
        );
        let (helper, delegation, nice) = (config.helper, config.delegation, config.nice);
        let ground = Arc::new(Ground { helper, interpreter, layers, delegation, nice });
        let fleet = |purpose, count| Fleet::start(&ground, purpose, count, config.queue, config.patience);
        Ok(Self {
            programs: fleet(Purpose::Programs, config.programs),
            formulas: fleet(Purpose::Formulas, config.formulas),
            layers,
            reports,
            running: Shared::default(),
            comparing: Shared::default(),
        })
    }

    /// The layers around the interpreters.
    #[must_use]
    pub fn layers(&self) -> LayerSet {
        self.layers
    }

    /// What was found of each layer at the start.
    #[must_use]
    pub fn reports(&self) -> &[LayerReport] {
        &self.reports
    }

    /// States of the interpreters for programs.
    #[must_use]
    pub fn program_states(&self) -> watch::Receiver<Vec<InterpreterState>> {
        self.programs.states()
    }

    /// States of the interpreters for formulas.
    #[must_use]
    pub fn formula_states(&self) -> watch::Receiver<Vec<InterpreterState>> {
        self.formulas.states()
    }

    /// Ends all interpreters and waits until nothing is left of them. Whoever still waits for a verdict gets none.
    pub async fn shut_down(&self) {
        self.programs.shut_down().await;
        self.formulas.shut_down().await;
    }

    async fn run_once(&self, program: &Program) -> Verdict {
        let (reply, slot) = self.program_reply(program, TEST_LIMIT_S, None).await?;
        let verdict = verdict::of_run(&reply, TEST_LIMIT_S)?;
        let Some(limit_s) = verdict::second_limit_s(&reply) else { return Ok(verdict) };
        // Another interpreter has other hashes and addresses.
        let is_unordered = reply.unordered;
        let (reply, second) = self.program_reply(program, limit_s, Some(slot)).await?;
        if is_unordered && second == slot {
            let detail =
                "its outcome may hang on the order of a set, and no second interpreter is there to ask".to_owned();
            return Err(EvaluatorError::Undecidable { detail });
        }
        verdict::of_both(verdict, &verdict::of_run(&reply, limit_s)?)
    }

    async fn program_reply(
        &self,
        program: &Program,
        limit_s: u64,
        avoid: Option<usize>,
    ) -> Result<(protocol::Reply, usize), EvaluatorError> {
        let work = Work::Program { program: program.clone(), limit_s };
        match self.programs.evaluate(&work, avoid).await? {
            Answer::Reply(reply, slot) => Ok((reply, slot)),
            Answer::NotShared => unreachable!("only pairs share a child"),
        }
    }

    async fn compare(&self, left: &str, right: &str) -> Result<bool, EvaluatorError> {
        let pair = |shares| Work::Pair { left: left.to_owned(), right: right.to_owned(), shares };
        if pair::is_plain(left, right)
            && let Answer::Reply(reply, _) = self.formulas.evaluate(&pair(true), None).await?
        {
            return Ok(is_equal(&reply));
        }
        let mut last = None;
        for _ in 0..2 {
            match self.formulas.evaluate(&pair(false), None).await {
                Ok(Answer::Reply(reply, _)) => return Ok(is_equal(&reply)),
                Ok(Answer::NotShared) => {}
                // A validator has no limit, so what hit one here is given a second chance before the group is.
                Err(error @ EvaluatorError::Undecidable { .. }) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| EvaluatorError::Undecidable { detail: "it got no answer".to_owned() }))
    }
}

fn is_equal(reply: &protocol::Reply) -> bool {
    reply.tests.first().is_some_and(|record| record.error_class.is_none())
}

fn reasons(reports: &[LayerReport]) -> String {
    let refused = |report: &LayerReport| report.refusal.as_ref().map(|reason| format!("{}: {reason}", report.layer));
    reports.iter().filter_map(refused).collect::<Vec<_>>().join("; ")
}

impl Evaluator for Pool {
    fn run(&self, program: Program) -> BoxFuture<'_, Result<ProgramVerdict, EvaluatorError>> {
        Box::pin(async move { self.running.get(program.clone(), self.run_once(&program)).await })
    }

    fn are_equal<'a>(&'a self, left: &'a str, right: &'a str) -> BoxFuture<'a, Result<bool, EvaluatorError>> {
        let key = (left.to_owned(), right.to_owned());
        Box::pin(self.comparing.get(key, self.compare(left, right)))
    }
}
