//! The sandboxed interpreters of this process, started when the first environment needs them: most hosts mine word problems,
//! which need none.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use grail_environments::pool::{Pool, PoolConfig, PoolError};
use grail_environments::sandbox::setup::{Installation, SetupError};
use grail_environments::sandbox::{Helper, enter_and_exec};
use grail_environments::{BoxFuture, EnvironmentId, Evaluator, EvaluatorError, Program, ProgramVerdict};
use grail_process::cgroup::Delegation;
use grail_process::with_causes;
use tokio::sync::Mutex;

/// First argument of this program where it is to become an interpreter in a sandbox; no command for people.
const SANDBOX_COMMAND: &str = "evaluator-zygote";
/// This program, whatever became of its file meanwhile.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Enters the sandbox if this process was started for that. To be called before any thread is started.
#[must_use]
pub fn sandbox_stage() -> Option<ExitCode> {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let (command, rest) = arguments.split_first()?;
    (command == SANDBOX_COMMAND).then(|| enter_and_exec(rest))
}

/// How a sandbox is entered with this program.
#[must_use]
pub fn helper() -> Helper {
    Helper { program: THIS_PROGRAM.into(), arguments: vec![SANDBOX_COMMAND.into()] }
}

/// The interpreter in `folder`, else in this user's cache.
///
/// # Errors
/// [`SetupError::NoFolder`] if no variable says where that is.
pub fn installation(folder: Option<&PathBuf>) -> Result<Installation, SetupError> {
    match folder {
        Some(folder) => Ok(Installation::in_folder(folder)),
        None => Installation::of_this_user(|name| std::env::var_os(name)),
    }
}

/// How evaluators are started.
#[derive(Debug, Clone, Default)]
pub struct EvaluatorSettings {
    /// Where the interpreter lies; unset = the user's cache.
    pub folder: Option<PathBuf>,
    /// Interpreters of each kind; unset = by the cores.
    pub count: Option<usize>,
    /// Programs of a model run although the sandbox lacks a part that is required.
    pub is_unsafe_accepted: bool,
    /// Our control group, if one was delegated.
    pub delegation: Option<Arc<Delegation>>,
}

/// What interpreters are needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Programs,
    Formulas,
}

impl Kind {
    const fn of(environment: EnvironmentId) -> Option<Self> {
        match environment {
            EnvironmentId::Gsm8k => None,
            EnvironmentId::Math => Some(Self::Formulas),
            EnvironmentId::Mbpp | EnvironmentId::HumanEval => Some(Self::Programs),
        }
    }
}

/// Evaluators of both kinds; each kind is a pool that starts when it is first needed.
#[derive(Debug)]
pub struct Evaluators {
    settings: EvaluatorSettings,
    programs: Mutex<Option<Arc<Pool>>>,
    formulas: Mutex<Option<Arc<Pool>>>,
}

impl Evaluators {
    /// None of them runs yet.
    #[must_use]
    pub fn new(settings: EvaluatorSettings) -> Self {
        Self { settings, programs: Mutex::default(), formulas: Mutex::default() }
    }

    /// Starts what `environment` needs, unless it runs. A failure is not remembered: the next call tries again.
    ///
    /// # Errors
    /// [`PoolError`] if there is no interpreter, or the sandbox is weaker than it must be.
    pub async fn start_for(&self, environment: EnvironmentId) -> Result<(), PoolError> {
        match Kind::of(environment) {
            Some(kind) => self.pool(kind).await.map(drop),
            None => Ok(()),
        }
    }

    /// Ends all interpreters and waits until nothing is left of them.
    pub async fn shut_down(&self) {
        for kind in [Kind::Programs, Kind::Formulas] {
            let pool = self.place(kind).lock().await.take();
            // Whoever still waits for a verdict keeps its pool, which ends when that one is dropped.
            if let Some(pool) = pool.and_then(Arc::into_inner) {
                pool.shut_down().await;
            }
        }
    }

    const fn place(&self, kind: Kind) -> &Mutex<Option<Arc<Pool>>> {
        match kind {
            Kind::Programs => &self.programs,
            Kind::Formulas => &self.formulas,
        }
    }

    async fn pool(&self, kind: Kind) -> Result<Arc<Pool>, PoolError> {
        // Held during the start, so that there is one only.
        let mut place = self.place(kind).lock().await;
        if let Some(pool) = &*place {
            return Ok(Arc::clone(pool));
        }
        let pool = Arc::new(Pool::start(self.config(kind)?).await?);
        *place = Some(Arc::clone(&pool));
        Ok(pool)
    }

    fn config(&self, kind: Kind) -> Result<PoolConfig, PoolError> {
        let settings = &self.settings;
        let mut config = PoolConfig::new(helper(), installation(settings.folder.as_ref())?);
        let count = |kind_of_field, by_cores| match settings.count {
            _ if kind != kind_of_field => 0,
            Some(count) => count,
            None => by_cores,
        };
        config.programs = count(Kind::Programs, config.programs);
        config.formulas = count(Kind::Formulas, config.formulas);
        config.is_unsafe_accepted = settings.is_unsafe_accepted;
        config.delegation.clone_from(&settings.delegation);
        Ok(config)
    }

    async fn running(&self, kind: Kind) -> Result<Arc<Pool>, EvaluatorError> {
        let failed = |error: PoolError| EvaluatorError::Sandbox { attempts: 0, detail: with_causes(&error) };
        self.pool(kind).await.map_err(failed)
    }
}

impl Evaluator for Evaluators {
    fn run(&self, program: Program) -> BoxFuture<'_, Result<ProgramVerdict, EvaluatorError>> {
        Box::pin(async move { self.running(Kind::Programs).await?.run(program).await })
    }

    fn are_equal<'a>(&'a self, left: &'a str, right: &'a str) -> BoxFuture<'a, Result<bool, EvaluatorError>> {
        Box::pin(async move { self.running(Kind::Formulas).await?.are_equal(left, right).await })
    }
}
