//! Why a sandbox could not be entered.

use std::io;
use std::path::PathBuf;

use grail_process::ExitCode;
use nix::errno::Errno;

use super::layers::Layer;

/// A sandbox that could not be entered; the process that tried must end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnterError {
    /// The helper was called in another way than this build calls it.
    #[error("read the plan of the sandbox; the helper is only called by grail-supervisor itself")]
    Plan(#[source] serde_json::Error),
    /// No such stage.
    #[error("enter the sandbox: {0:?} is no stage of it; the helper is only called by grail-supervisor itself")]
    Stage(String),
    /// A layer was refused by the kernel.
    #[error("set up {layer}: {what}")]
    Layer {
        /// Which layer.
        layer: Layer,
        /// What was tried.
        what: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file of the interpreter cannot be shown inside of the new root.
    #[error("show {} inside of the sandbox; if it has moved, run grail-supervisor setup-evaluator again", path.display())]
    Show {
        /// The file or folder.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A filter of system calls could not be made.
    #[error("make the filters of system calls")]
    Filter(#[from] seccompiler::Error),
    /// A filter could not be made from its rules.
    #[error("make the filters of system calls")]
    Rules(#[from] seccompiler::BackendError),
    /// The kernel took only a part of the Landlock rules.
    #[error("set up landlock: the kernel does not enforce it")]
    LandlockAbsent,
    /// The Landlock rules could not be made or applied.
    #[error("set up landlock")]
    Landlock(#[from] landlock::RulesetError),
    /// The interpreter could not be started.
    #[error("start {}", program.display())]
    Exec {
        /// The interpreter, or this program again.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl EnterError {
    pub(super) fn layer(layer: Layer, what: impl Into<String>) -> impl FnOnce(Errno) -> Self {
        move |source| Self::Layer { layer, what: what.into(), source: source.into() }
    }

    /// How the helper ends: with a code that says whether the same start may go better later.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Plan(_) | Self::Stage(_) => ExitCode::Usage,
            Self::Show { source, .. } | Self::Layer { source, .. } | Self::Exec { source, .. }
                if is_passing(source) =>
            {
                ExitCode::Temporary
            }
            Self::Show { .. } | Self::Exec { .. } => ExitCode::MissingInput,
            Self::Filter(_) | Self::Rules(_) => ExitCode::Bug,
            Self::Layer { .. } | Self::LandlockAbsent | Self::Landlock(_) => ExitCode::NotPermitted,
        }
    }
}

/// A shortage, which may be over at the next try. The kernel says ENOSPC where there are too many namespaces.
fn is_passing(error: &io::Error) -> bool {
    let shortages = [Errno::EAGAIN, Errno::ENOMEM, Errno::ENOSPC, Errno::EMFILE, Errno::ENFILE, Errno::EINTR];
    error.raw_os_error().is_some_and(|code| shortages.contains(&Errno::from_raw(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shortages_are_worth_another_start_and_refusals_are_not() {
        let refused = |errno: Errno| EnterError::layer(Layer::Namespaces, "unshare")(errno).exit_code();
        assert_eq!(refused(Errno::ENOSPC), ExitCode::Temporary);
        assert_eq!(refused(Errno::EPERM), ExitCode::NotPermitted);
        let gone = EnterError::Exec { program: "/python".into(), source: Errno::ENOENT.into() };
        assert_eq!(gone.exit_code(), ExitCode::MissingInput);
        assert_eq!(EnterError::Stage("x".into()).exit_code(), ExitCode::Usage);
    }
}
