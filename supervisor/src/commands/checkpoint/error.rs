//! Why a command on checkpoints came to nothing, and the exit code for it.

use std::path::PathBuf;

use grail_checkpoint::{CacheError, FailureClass, InstallError, StoreError};
use grail_process::ExitCode;
use grail_protocol::ids::CheckpointWindow;

/// A command on checkpoints that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointCommandError {
    #[error(
        "{} holds neither a store nor a cache of checkpoints; run `grail-supervisor mine --local` first, or name another \
         folder with --state-dir",
        folder.display()
    )]
    NoState { folder: PathBuf },
    #[error("checkpoint {checkpoint} is not in {store}; `grail-supervisor checkpoint list` shows what is there")]
    NotInStore { checkpoint: CheckpointWindow, store: String },
    #[error("{store} holds no checkpoint that is READY; wait until the trainer has published one")]
    NoneReady { store: String },
    #[error(
        "checkpoint {checkpoint} is not in the cache {}; `grail-supervisor checkpoint fetch {checkpoint}` brings it there",
        cache.display()
    )]
    NotCached { checkpoint: CheckpointWindow, cache: PathBuf },
    #[error("ask the trainer's store")]
    Store(#[from] StoreError),
    #[error("install checkpoint {checkpoint}")]
    Install { checkpoint: CheckpointWindow, source: Box<InstallError> },
    #[error("use the cache of checkpoints")]
    Cache(#[from] CacheError),
}

impl CheckpointCommandError {
    /// The code of the public table that fits.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::NoState { .. } | Self::NotInStore { .. } | Self::NoneReady { .. } | Self::NotCached { .. } => {
                ExitCode::MissingInput
            }
            Self::Store(error) => of_store(error),
            Self::Install { source, .. } => of_failure(source.class()),
            Self::Cache(_) => ExitCode::CannotWrite,
        }
    }
}

fn of_store(error: &StoreError) -> ExitCode {
    match error {
        StoreError::Denied { .. } => ExitCode::NotPermitted,
        StoreError::DiskFull { .. } | StoreError::Write { .. } => ExitCode::CannotWrite,
        _ => ExitCode::Unavailable,
    }
}

pub(in crate::commands) const fn of_failure(class: FailureClass) -> ExitCode {
    match class {
        FailureClass::Unavailable => ExitCode::Unavailable,
        FailureClass::Denied => ExitCode::NotPermitted,
        FailureClass::Vanished => ExitCode::Temporary,
        FailureClass::NoSpace | FailureClass::Local => ExitCode::CannotWrite,
        // Everything else is wrong with what was published.
        _ => ExitCode::BadData,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_class_of_failure_has_its_code() {
        let codes = [
            (FailureClass::Unavailable, ExitCode::Unavailable),
            (FailureClass::Denied, ExitCode::NotPermitted),
            (FailureClass::Vanished, ExitCode::Temporary),
            (FailureClass::NoSpace, ExitCode::CannotWrite),
            (FailureClass::Local, ExitCode::CannotWrite),
            (FailureClass::DamagedFile, ExitCode::BadData),
            (FailureClass::ChainBroken, ExitCode::BadData),
        ];
        for (class, code) in codes {
            assert_eq!(of_failure(class), code, "{class}");
        }
    }
}
