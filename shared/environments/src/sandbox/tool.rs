//! Programs that are run to their end: the interpreter that is inspected, the helper that is tried, the setup script.

use std::time::Duration;

use grail_process::{ChildSpec, Exit, Output, SpawnError, StopPlan, spawn};
use tokio::io::AsyncReadExt;

/// More than any of them writes.
const MOST_BYTES: u64 = 1 << 20;

/// A program that has ended.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) exit: Exit,
    pub(super) stdout: String,
    /// The last of what it wrote to stderr.
    pub(super) last_lines: Vec<String>,
}

impl Finished {
    pub(super) fn is_done(&self) -> bool {
        self.exit.cause.code() == Some(0)
    }

    /// How it ended and what it said last, for a message.
    pub(super) fn trouble(&self) -> String {
        let said = self.last_lines.iter().rev().find(|line| !line.trim().is_empty());
        said.map_or_else(|| self.exit.cause.to_string(), |line| format!("{line} ({})", self.exit.cause))
    }
}

/// A program that did not run to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ToolError {
    /// It could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It takes too long.
    #[error("{name} did not end within {limit:?}")]
    Hung {
        /// Its name.
        name: String,
        /// The time that it had.
        limit: Duration,
    },
    /// What it wrote could not be read.
    #[error("read what {name} writes")]
    Read {
        /// Its name.
        name: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// Runs `spec` to its end, or ends it after `limit`.
pub(super) async fn finish(mut spec: ChildSpec, limit: Duration) -> Result<Finished, ToolError> {
    spec.stdout = Output::Piped;
    let name = spec.name.clone();
    let child = spawn(spec).await?;
    let mut stdout = String::new();
    let whole = async {
        if let Some(pipe) = child.take_stdout()? {
            pipe.take(MOST_BYTES).read_to_string(&mut stdout).await?;
        }
        Ok(child.wait().await)
    };
    match tokio::time::timeout(limit, whole).await {
        Ok(Ok(exit)) => Ok(Finished { exit, stdout, last_lines: child.last_lines() }),
        Ok(Err(source)) => Err(ToolError::Read { name, source }),
        Err(_) => {
            if let Err(error) = child.stop(&StopPlan::kill()).await {
                tracing::warn!(%error, "A program that hangs cannot be ended.");
            }
            Err(ToolError::Hung { name, limit })
        }
    }
}
