//! `setup-evaluator`.

use std::fmt::Write;
use std::path::Path;

use grail_environments::sandbox::setup::SetupReport;
use grail_process::cgroup::Delegation;

use super::{EnvCommandError, document};
use crate::commands::CommandError;
use crate::commands::control::Form;
use crate::evaluators::{EvaluatorSettings, helper, installation};

/// Whether anything is installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetupMode {
    Install,
    Probe,
}

/// Installs the Python side, unless it is there or only asked for, and says what is installed and which layers work here. The
/// second value says whether that is enough to run programs of a model.
///
/// # Errors
/// [`CommandError`] if there is no fitting interpreter, or its packages cannot be had.
pub async fn setup_evaluator(
    settings: &EvaluatorSettings,
    mode: SetupMode,
    form: Form,
) -> Result<(String, bool), CommandError> {
    let installation = installation(settings.folder.as_ref()).map_err(EnvCommandError::from)?;
    if mode == SetupMode::Install {
        installation.set_up().await.map_err(EnvCommandError::from)?;
    }
    let delegation = tokio::task::spawn_blocking(|| Delegation::open(Path::new("/")));
    let delegation = delegation.await.map_err(CommandError::Task)?;
    let report = installation.report(&helper(), delegation.as_ref()).await.map_err(EnvCommandError::from)?;
    let text = match form {
        Form::Text => render(&report),
        Form::Json => document(&report)?,
    };
    Ok((text, report.missing.is_empty()))
}

fn render(report: &SetupReport) -> String {
    let mut text = format!(
        "CPython {} in {}\nsympy {} in {}\n\n",
        report.python_version,
        report.python.display(),
        report.sympy_version,
        report.site.display()
    );
    for layer in &report.layers {
        let verdict = layer.refusal.as_deref().map_or_else(|| "works".to_owned(), |why| format!("no: {why}"));
        // Writing into a string cannot fail.
        writeln!(text, "{:<12} {verdict}", layer.layer.to_string()).unwrap_or_default();
    }
    let verdict = if report.missing.is_empty() {
        "enough to run programs of a model".to_owned()
    } else {
        format!("not enough to run programs of a model: {} missing", report.missing.join(", "))
    };
    text + "\n" + &verdict + "\n"
}
