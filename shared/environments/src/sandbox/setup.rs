//! Setting the interpreter up on a host: the same script as the build's, and what came of it.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use grail_process::cgroup::Delegation;
use grail_process::{ChildSpec, Environment, Stdin};
use serde::Serialize;

use super::interpreter::{Interpreter, InterpreterError, SYMPY_VERSION};
use super::layers::LayerSet;
use super::plan::Helper;
use super::probe::{self, LayerReport};
use super::tool::{self, ToolError};

/// Finds CPython and installs sympy beside it, once.
const SCRIPT: &str = include_str!("../../../../deploy/setup-evaluator.sh");
/// How long downloading 7 MB and compiling it may take.
const SETUP_LIMIT: Duration = Duration::from_secs(900);

/// A host on which no program can be evaluated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// There is no folder for it.
    #[error("find a folder for the evaluator: neither GRAIL_BUILD_CACHE_DIR, XDG_CACHE_HOME nor HOME is set")]
    NoFolder,
    /// Setup was never run here, or was not finished.
    #[error("{} is not there, so the evaluator is not set up; run grail-supervisor setup-evaluator (make evaluator in a checkout)", path.display())]
    NotSetUp {
        /// The file that says so.
        path: PathBuf,
    },
    /// The script could not be run to its end.
    #[error("set the evaluator up")]
    Script(#[source] ToolError),
    /// The script could not be handed to bash.
    #[error("set the evaluator up: hand the script to bash")]
    HandOver(#[source] std::io::Error),
    /// The script found something missing.
    #[error("set the evaluator up: {detail}")]
    Failed {
        /// What it said last.
        detail: String,
    },
    /// The interpreter does not do.
    #[error(transparent)]
    Interpreter(#[from] InterpreterError),
}

/// Where the evaluator's interpreter and packages lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    folder: PathBuf,
}

/// What was found on a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SetupReport {
    /// Changes when the meaning of a field does.
    pub schema: u32,
    /// The interpreter.
    pub python: PathBuf,
    /// Its version.
    pub python_version: String,
    /// Where sympy lies.
    pub site: PathBuf,
    /// Its version.
    pub sympy_version: String,
    /// What works.
    pub layers: Vec<LayerReport>,
    /// What lacks for running programs at all; empty if enough works.
    pub missing: Vec<&'static str>,
}

impl Installation {
    /// The folder of this user: `evaluator-VERSION` in `GRAIL_BUILD_CACHE_DIR`, else in `grail-supervisor` of the user's cache.
    ///
    /// # Errors
    /// [`SetupError::NoFolder`] if no variable says where that is.
    pub fn of_this_user(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, SetupError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let cache = set("GRAIL_BUILD_CACHE_DIR")
            .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("grail-supervisor")))
            .or_else(|| set("HOME").map(|home| home.join(".cache/grail-supervisor")))
            .ok_or(SetupError::NoFolder)?;
        Ok(Self::in_cache(&cache))
    }

    /// The installation in the cache folder `cache`, under the name that the setup script gives it.
    #[must_use]
    pub fn in_cache(cache: &Path) -> Self {
        Self::in_folder(cache.join(format!("evaluator-{SYMPY_VERSION}")))
    }

    /// The installation in `folder`, whether it is there or not.
    #[must_use]
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Looks at what is installed.
    ///
    /// # Errors
    /// [`SetupError`] if setup was not run, or what it found does not do any more.
    pub async fn open(&self) -> Result<Interpreter, SetupError> {
        // Written last, so its presence means that the folder is complete.
        let path = self.folder.join("python");
        let python = std::fs::read_to_string(&path).map_err(|_| SetupError::NotSetUp { path })?;
        Ok(Interpreter::inspect(Path::new(python.trim()), &self.folder.join("site")).await?)
    }

    /// Installs what is missing, and reuses what is there.
    ///
    /// # Errors
    /// [`SetupError`] with what the host lacks and how to get it.
    pub async fn set_up(&self) -> Result<(), SetupError> {
        let mut script: File = tempfile::tempfile().map_err(SetupError::HandOver)?;
        script.write_all(SCRIPT.as_bytes()).map_err(SetupError::HandOver)?;
        std::io::Seek::rewind(&mut script).map_err(SetupError::HandOver)?;
        let mut spec = ChildSpec::new("setup-evaluator", "bash").arguments(["-s", "--"]).argument(&self.folder);
        // pip's own settings, such as an index or a proxy, are the operator's matter.
        spec.environment = Environment::only([
            "PATH",
            "HOME",
            "USER",
            "LANG",
            "LC_*",
            "TMPDIR",
            "PYENV_ROOT",
            "PIP_*",
            "UV_*",
            "XDG_*",
            "http_proxy",
            "https_proxy",
            "no_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "NO_PROXY",
            "SSL_CERT_*",
            "REQUESTS_CA_BUNDLE",
        ]);
        spec.stdin = Stdin::From(script.into());
        let finished = tool::finish(spec, SETUP_LIMIT).await.map_err(SetupError::Script)?;
        if finished.is_done() { Ok(()) } else { Err(SetupError::Failed { detail: finished.trouble() }) }
    }

    /// What is installed and which layers work here.
    ///
    /// # Errors
    /// As [`Installation::open`].
    pub async fn report(&self, helper: &Helper, delegation: Option<&Delegation>) -> Result<SetupReport, SetupError> {
        let interpreter = self.open().await?;
        let view = interpreter.view_with_sympy();
        let layers = probe::probe(helper, &view, delegation).await;
        let missing = probe::working(&layers).missing();
        Ok(SetupReport {
            schema: 1,
            python: view.python,
            python_version: interpreter.python_version,
            site: interpreter.site,
            sympy_version: interpreter.sympy_version,
            layers,
            missing,
        })
    }
}

impl SetupReport {
    /// The layers that work.
    #[must_use]
    pub fn working(&self) -> LayerSet {
        probe::working(&self.layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(variables: &[(&str, &str)]) -> Result<PathBuf, SetupError> {
        let variables: Vec<(String, OsString)> =
            variables.iter().map(|(name, value)| ((*name).to_owned(), OsString::from(value))).collect();
        let look_up = |name: &str| variables.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
        Installation::of_this_user(look_up).map(|installation| installation.folder)
    }

    #[test]
    fn the_folder_follows_the_users_variables() {
        let all = [("GRAIL_BUILD_CACHE_DIR", "/build"), ("XDG_CACHE_HOME", "/xdg"), ("HOME", "/home/me")];
        assert_eq!(folder(&all).unwrap(), Path::new("/build/evaluator-1.14.0"));
        assert_eq!(folder(&all[1..]).unwrap(), Path::new("/xdg/grail-supervisor/evaluator-1.14.0"));
        assert_eq!(folder(&all[2..]).unwrap(), Path::new("/home/me/.cache/grail-supervisor/evaluator-1.14.0"));
        assert!(matches!(folder(&[("HOME", "")]), Err(SetupError::NoFolder)));
    }

    #[tokio::test]
    async fn a_folder_without_a_setup_says_how_to_get_one() {
        let folder = tempfile::tempdir().unwrap();
        let error = Installation::in_folder(folder.path()).open().await.unwrap_err().to_string();
        assert!(error.contains("grail-supervisor setup-evaluator"), "{error}");
    }
}
