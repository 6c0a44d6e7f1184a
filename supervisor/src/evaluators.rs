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
use tokio_util::sync::CancellationToken;

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
    /// Ends starts that are under way, and refuses others.
    end: CancellationToken,
}

impl Evaluators {
    /// None of them runs yet.
    #[must_use]
    pub fn new(settings: EvaluatorSettings) -> Self {
        Self { settings, programs: Mutex::default(), formulas: Mutex::default(), end: CancellationToken::new() }
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

    /// Ends all interpreters for good and waits until nothing is left of them. Whoever still waits for a verdict gets none.
    pub async fn shut_down(&self) {
        self.end.cancel();
        for kind in [Kind::Programs, Kind::Formulas] {
            let pool = self.place(kind).lock().await.take();
            if let Some(pool) = pool {
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
        let started = self.end.run_until_cancelled(Pool::start(self.config(kind)?)).await;
        let pool = Arc::new(started.ok_or(PoolError::ShutDown)??);
        *place = Some(Arc::clone(&pool));
        Ok(pool)
    }

    fn config(&self, kind: Kind) -> Result<PoolConfig, PoolError> {
        let settings = &self.settings;
        let mut config = PoolConfig::new(helper(), installation(settings.folder.as_ref())?);
        match kind {
            Kind::Programs => {
                config.programs = settings.count.unwrap_or(config.programs);
                config.formulas = 0;
            }
            Kind::Formulas => {
                config.programs = 0;
                config.formulas = settings.count.unwrap_or(config.formulas);
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_is_judged_by_python_needs_an_interpreter() {
        let folder = tempfile::tempdir().unwrap();
        let settings = EvaluatorSettings { folder: Some(folder.path().join("absent")), ..EvaluatorSettings::default() };
        let evaluators = Evaluators::new(settings);
        evaluators.start_for(EnvironmentId::Gsm8k).await.unwrap();
        for environment in [EnvironmentId::Math, EnvironmentId::Mbpp, EnvironmentId::HumanEval] {
            let error = evaluators.start_for(environment).await.unwrap_err();
            assert!(matches!(error, PoolError::Setup(SetupError::NotSetUp { .. })), "{error}");
        }
        let verdict = evaluators.are_equal("1/2", "0.5").await;
        assert!(matches!(verdict, Err(EvaluatorError::Sandbox { .. })), "{verdict:?}");
    }

    #[tokio::test]
    async fn nothing_starts_after_the_end() {
        let evaluators = Evaluators::new(EvaluatorSettings::default());
        evaluators.shut_down().await;
        let error = evaluators.start_for(EnvironmentId::Math).await.unwrap_err();
        assert!(matches!(error, PoolError::ShutDown), "{error}");
    }

    #[test]
    fn each_kind_has_interpreters_of_its_own_only() {
        let settings = EvaluatorSettings { folder: Some("/e".into()), count: Some(3), ..EvaluatorSettings::default() };
        let evaluators = Evaluators::new(settings);
        let counts = |kind| evaluators.config(kind).map(|config| (config.programs, config.formulas)).unwrap();
        assert_eq!([counts(Kind::Programs), counts(Kind::Formulas)], [(3, 0), (0, 3)]);
    }
}
