//! `run`: one server without a supervisor, for a look at it.

use std::io::{self, Write as _};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::args::RunArgs;
use super::command::PhaseSink;
use super::server::{Context, Server, StartError, StopError, describe};
use super::service::Signals;

/// A run that did not end on request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    #[error("prepare the process")]
    Process(#[source] io::Error),
    #[error("start the server")]
    Start(#[from] StartError),
    #[error("the server died: {cause}")]
    Died { cause: String },
    #[error("stop the server")]
    Stop(#[from] StopError),
}

/// Starts a server, prints its address on stdout, and stops it on SIGTERM or SIGINT.
///
/// # Errors
/// [`RunError`]
pub async fn run(args: &RunArgs) -> Result<(), RunError> {
    grail_process::become_subreaper().map_err(RunError::Process)?;
    let mut signals = Signals::listen().map_err(RunError::Process)?;
    let phases: PhaseSink = Arc::new(|phase, detail: &str| tracing::info!(?phase, detail, "Phase of the start."));
    let context = Context { phases, interrupt: CancellationToken::new() };
    let mut start = std::pin::pin!(Server::start(args.spec(), 1, &context));
    let started = tokio::select! {
        started = &mut start => started,
        () = signals.next() => {
            context.interrupt.cancel();
            start.await
        }
    };
    let server = match started {
        Err(StartError::Interrupted) => return Ok(()),
        other => other?,
    };
    if writeln!(io::stdout(), "{}", server.url()).is_err() {
        tracing::debug!("Nobody reads the address.");
    }
    let died = tokio::select! {
        exit = server.wait() => Some(exit),
        () = signals.next() => None,
    };
    match died {
        Some(exit) => Err(RunError::Died { cause: describe(exit.cause) }),
        None => server.stop().await.map(drop).map_err(RunError::from),
    }
}
