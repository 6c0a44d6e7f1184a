//! The interpreter on this host: found by setup, inspected before it is used.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use grail_process::{ChildSpec, Environment, LogPolicy};
use serde::Deserialize;

use super::plan::{View, ZYGOTE};
use super::tool::{self, ToolError};

/// The versions of CPython whose grammar and error classes are the reference's; any number may follow.
pub const PYTHON_VERSION: &str = "3.12";
/// The one version of sympy whose simplifications are the reference's.
pub const SYMPY_VERSION: &str = "1.14.0";

/// How long an interpreter may take to import everything, from a cold disk.
const INSPECT_LIMIT: Duration = Duration::from_secs(120);

/// An interpreter that does not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InterpreterError {
    /// It could not be run to its end.
    #[error("inspect the interpreter {}; if it is gone or another user's, run grail-supervisor setup-evaluator", python.display())]
    Run {
        /// The interpreter.
        python: PathBuf,
        /// What happened.
        #[source]
        source: ToolError,
    },
    /// It ended with an error.
    #[error("inspect the interpreter {} with sympy of {}: {detail}; run grail-supervisor setup-evaluator", python.display(), site.display())]
    Failed {
        /// The interpreter.
        python: PathBuf,
        /// Where sympy was looked for.
        site: PathBuf,
        /// What it said last.
        detail: String,
    },
    /// What it wrote is no description.
    #[error("read what the interpreter {} says of itself", python.display())]
    Answer {
        /// The interpreter.
        python: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Another version.
    #[error("{what} has version {found}, verdicts need {needed}; run grail-supervisor setup-evaluator")]
    Version {
        /// CPython or sympy.
        what: &'static str,
        /// Its version.
        found: String,
        /// The version that verdicts need.
        needed: &'static str,
    },
}

/// A CPython and a sympy that verdicts can rest on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interpreter {
    /// Version of CPython, such as `3.12.1`.
    pub python_version: String,
    /// Version of sympy.
    pub sympy_version: String,
    /// Folder that holds sympy and mpmath.
    pub site: PathBuf,
    view: View,
}

/// What the interpreter says of itself.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    python: String,
    sympy: String,
    executable: PathBuf,
    folders: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Interpreter {
    /// Asks the interpreter `python`, which runs without a sandbox and without text of a model, what it is and what it reads.
    ///
    /// # Errors
    /// [`InterpreterError`] if it cannot be run, or has another version than verdicts need.
    pub async fn inspect(python: &Path, site: &Path) -> Result<Self, InterpreterError> {
        let mut spec = ChildSpec::new("python", python)
            .arguments(["-I", "-S", "-E", "-X", "utf8", "-c", ZYGOTE, "inspect"].map(OsStr::new))
            .argument(site);
        spec.environment = Environment::empty();
        spec.log = LogPolicy::to_sink(|_| {});
        let finished = tool::finish(spec, INSPECT_LIMIT)
            .await
            .map_err(|source| InterpreterError::Run { python: python.to_owned(), source })?;
        if !finished.is_done() {
            let (python, site, detail) = (python.to_owned(), site.to_owned(), finished.trouble());
            return Err(InterpreterError::Failed { python, site, detail });
        }
        let answer = serde_json::from_str(&finished.stdout)
            .map_err(|source| InterpreterError::Answer { python: python.to_owned(), source })?;
        Self::from_answer(answer, site)
    }

    fn from_answer(answer: Answer, site: &Path) -> Result<Self, InterpreterError> {
        let is_right = answer.python.strip_prefix(PYTHON_VERSION).is_some_and(|rest| rest.starts_with('.'));
        if !is_right {
            return Err(InterpreterError::Version { what: "CPython", found: answer.python, needed: PYTHON_VERSION });
        }
        if answer.sympy != SYMPY_VERSION {
            return Err(InterpreterError::Version { what: "sympy", found: answer.sympy, needed: SYMPY_VERSION });
        }
        let view = View { python: answer.executable, folders: answer.folders, files: answer.files };
        Ok(Self { python_version: answer.python, sympy_version: answer.sympy, site: site.to_owned(), view })
    }

    /// What an interpreter for programs sees.
    #[must_use]
    pub fn view(&self) -> View {
        self.view.clone()
    }

    /// What an interpreter for formulas sees.
    #[must_use]
    pub fn view_with_sympy(&self) -> View {
        let mut view = self.view.clone();
        view.folders.push(self.site.clone());
        view
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(python: &str, sympy: &str) -> Answer {
        let executable = PathBuf::from("/opt/python3.12");
        Answer { python: python.into(), sympy: sympy.into(), executable, folders: vec![], files: vec![] }
    }

    #[test]
    fn only_the_references_versions_do() {
        let read = |python, sympy| Interpreter::from_answer(answer(python, sympy), Path::new("/site"));
        let good = read("3.12.9", "1.14.0").unwrap();
        assert_eq!(good.view_with_sympy().folders, [Path::new("/site")]);
        assert_eq!(good.view().folders, Vec::<PathBuf>::new());
        for (python, sympy) in [("3.11.7", "1.14.0"), ("3.120.0", "1.14.0"), ("3.13.0", "1.14.0"), ("3.12.1", "1.13.3")]
        {
            let error = read(python, sympy).unwrap_err().to_string();
            assert!(error.contains("setup-evaluator"), "{error}");
        }
    }
}
