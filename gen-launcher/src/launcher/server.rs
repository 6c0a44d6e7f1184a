//! One server: its start, its weights, its end.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use grail_ipc::messages::{ServerEpoch, ServerPhase, ServerSpec};
use grail_process::{Child, Exit, ExitCause, Signal, StopPlan, StopTarget, Unkillable, with_causes};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::args::Look;
use super::client::{CallError, ServerClient};
use super::command::{self, CommandError, PhaseSink, ServerCommand};
use super::marks;
use crate::folder::{CheckpointFolder, FolderError};

/// How often a start is tried because another process took the port.
const PORT_ATTEMPTS: usize = 5;
/// First and longest pause between two looks at a starting server.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// What aborting everything may take before a stop goes on without it.
const ABORT_LIMIT: Duration = Duration::from_secs(2);
/// Graces of a stop.
const TERMINATE_GRACE: Duration = Duration::from_secs(8);
const QUIT_GRACE: Duration = Duration::from_secs(3);
/// Limit of an update: this, and the time for the bytes from a slow disk.
const LEAST_UPDATE_LIMIT: Duration = Duration::from_secs(60);
const SLOW_DISK_BYTES_PER_SECOND: u64 = 50_000_000;
/// Lines of a dead server that errors and messages carry.
const TOLD_LINES: usize = 40;

/// A server that does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("the checkpoint cannot be served")]
    Folder(#[from] FolderError),
    #[error("start the server")]
    Spawn(#[from] grail_process::SpawnError),
    #[error("set up the HTTP client")]
    Client(#[from] reqwest::Error),
    #[error("the server ended before it was ready: {cause}{}", told(last_lines))]
    Exited { cause: String, last_lines: Vec<String> },
    #[error("the server was not ready within {limit:?}: {missing}{}", told(last_lines))]
    Deadline { limit: Duration, missing: String, last_lines: Vec<String> },
    #[error("the server is ready, but not as asked")]
    Unfit(#[source] CallError),
    #[error("a stop came before the server was ready")]
    Interrupted,
}

impl StartError {
    /// Short fixed name, for the supervisor's counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Command(CommandError::Backend(_)) => "unsupported_backend",
            Self::Command(_) => "bad_spec",
            Self::Folder(_) => "bad_checkpoint",
            Self::Spawn(_) | Self::Client(_) => "not_spawned",
            Self::Exited { .. } => "exited",
            Self::Deadline { .. } => "start_timeout",
            Self::Unfit(_) => "unfit",
            Self::Interrupted => "interrupted",
        }
    }

    /// Whether the same start may succeed later.
    #[must_use]
    pub const fn is_worth_another_try(&self) -> bool {
        !matches!(self, Self::Command(_) | Self::Folder(_))
    }
}

fn told(last_lines: &[String]) -> String {
    if last_lines.is_empty() {
        return String::new();
    }
    let told = &last_lines[last_lines.len().saturating_sub(TOLD_LINES)..];
    format!("; its last lines:\n{}", told.join("\n"))
}

/// A server that was not stopped as it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    #[error(transparent)]
    Unkillable(#[from] Unkillable),
    #[error("processes of the server survive SIGKILL: {0:?}; they wait in the kernel for a device")]
    Survivors(Vec<i32>),
}

/// Weights that a server did not take.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpdateError {
    /// The server is untouched and goes on with its weights.
    #[error("the folder cannot be served; the present weights stay")]
    Folder(#[from] FolderError),
    /// There is no server any more.
    #[error("the server did not take the weights ({reason}) and could not be stopped")]
    Stop {
        reason: String,
        #[source]
        source: StopError,
    },
    /// There is no server any more.
    #[error("the server did not take the weights ({reason}) and could not be started on them")]
    Restart {
        reason: String,
        #[source]
        source: StartError,
    },
    /// There is no server any more.
    #[error("a stop came before the weights were in place")]
    Interrupted,
}

impl UpdateError {
    /// Short fixed name, for the supervisor's counters.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Folder(_) => "bad_checkpoint",
            Self::Stop { .. } => "survivors",
            Self::Restart { source, .. } => source.code(),
            Self::Interrupted => "interrupted",
        }
    }
}

/// What starts and updates report to, and what ends them early.
pub struct Context {
    pub phases: PhaseSink,
    pub interrupt: CancellationToken,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("interrupt", &self.interrupt).finish_non_exhaustive()
    }
}

/// A server that answered a canary.
#[derive(Debug)]
pub struct Server {
    child: Child,
    client: ServerClient,
    port: u16,
    spec: ServerSpec,
    folder: CheckpointFolder,
    incarnation: u64,
}

impl Server {
    /// Starts a server and waits until it is ready, or until `interrupt` is cancelled.
    ///
    /// # Errors
    /// [`StartError`]; then nothing of it is left.
    pub async fn start(spec: ServerSpec, incarnation: u64, context: &Context) -> Result<Self, StartError> {
        let folder = open(&spec.model_path).await?;
        Self::start_on(spec, folder, incarnation, None, context).await
    }

    async fn start_on(
        spec: ServerSpec,
        folder: CheckpointFolder,
        incarnation: u64,
        port: Option<u16>,
        context: &Context,
    ) -> Result<Self, StartError> {
        let mut attempt = 1;
        loop {
            match Self::try_start(&spec, &folder, port, context).await {
                Ok((child, client, port)) => return Ok(Self { child, client, port, spec, folder, incarnation }),
                Err(StartError::Exited { cause, last_lines })
                    if attempt < PORT_ATTEMPTS && marks::is_port_taken(&last_lines) =>
                {
                    tracing::warn!(attempt, cause, "Another process took the port; trying again.");
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn try_start(
        spec: &ServerSpec,
        folder: &CheckpointFolder,
        port: Option<u16>,
        context: &Context,
    ) -> Result<(Child, ServerClient, u16), StartError> {
        let Context { phases, interrupt } = context;
        let ServerCommand { child, url, port, served_name, phases: seen } =
            command::build(spec, folder, port, Arc::clone(phases))?;
        let client = ServerClient::new(url)?;
        let child = grail_process::spawn(child).await?;
        phases(ServerPhase::Spawned, &format!("pid {} on port {port}", child.pid()));
        let limit = Duration::from_secs(spec.start_timeout_s.max(1));
        let becomes_ready = async {
            until_it_generates(&client, limit).await.map_err(|error| StartError::Deadline {
                limit,
                missing: format!("last phase {:?}, {}", seen.last(), with_causes(&error)),
                last_lines: child.last_lines(),
            })?;
            phases(ServerPhase::WarmingUp, "the server generates; asking for a canary");
            check(&client, spec, folder, &served_name).await.map_err(StartError::Unfit)
        };
        let ready = tokio::select! {
            () = interrupt.cancelled() => Err(StartError::Interrupted),
            exit = child.wait() => {
                Err(StartError::Exited { cause: describe(exit.cause), last_lines: child.last_lines() })
            }
            ready = becomes_ready => ready,
        };
        match ready {
            Ok(()) => {
                phases(ServerPhase::Ready, client.url());
                Ok((child, client, port))
            }
            Err(error) => {
                if let Err(error) = child.stop(&StopPlan::kill()).await {
                    tracing::error!(%error, "A server that did not start cannot be ended.");
                }
                Err(error)
            }
        }
    }

    /// Where it answers.
    #[must_use]
    pub fn url(&self) -> &str {
        self.client.url()
    }

    /// Which process with which weights.
    #[must_use]
    pub fn epoch(&self) -> ServerEpoch {
        ServerEpoch { incarnation: self.incarnation, weights: self.spec.weight_version.clone() }
    }

    /// Pid of its leader.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.pid()
    }

    /// Waits for its end; safe to cancel.
    pub async fn wait(&self) -> Exit {
        self.child.wait().await
    }

    /// Waits until the server has answered nothing for `look.silence`, not even what needs no generating. Safe to cancel.
    pub async fn silence(&self, look: Look) {
        let mut refused_since: Option<Instant> = None;
        loop {
            tokio::time::sleep(look.every).await;
            match tokio::time::timeout(look.silence, self.client.is_there()).await {
                Ok(Ok(())) => refused_since = None,
                Ok(Err(error)) => {
                    tracing::debug!(error = with_causes(&error), "The server did not answer.");
                    let since = *refused_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= look.silence {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }

    /// Ends it at once.
    ///
    /// # Errors
    /// [`StopError`]
    pub async fn kill(self) -> Result<Exit, StopError> {
        self.end(&StopPlan::kill()).await
    }

    /// The last lines of its log.
    #[must_use]
    pub fn last_lines(&self) -> Vec<String> {
        let lines = self.child.last_lines();
        lines[lines.len().saturating_sub(TOLD_LINES)..].to_vec()
    }

    /// Gives the server other weights: in place if it can take them, else by a new start on the same port under
    /// `next_incarnation`. The folder is checked before the server is touched.
    ///
    /// # Errors
    /// [`UpdateError`], and the server if it goes on unchanged.
    pub async fn update(
        self,
        folder: &str,
        label: &str,
        next_incarnation: u64,
        context: &Context,
    ) -> Result<Self, (UpdateError, Option<Box<Self>>)> {
        let compared = async {
            let new = open(folder).await?;
            let difference = self.folder.difference(&new)?;
            Ok((new, difference))
        };
        let (new, difference) = match compared.await {
            Ok(compared) => compared,
            Err(error) => return Err((UpdateError::Folder(error), Some(Box::new(self)))),
        };
        (context.phases)(ServerPhase::Updating, folder);
        let spec = ServerSpec { model_path: folder.to_owned(), weight_version: label.to_owned(), ..self.spec.clone() };
        let (reason, plan) = match difference {
            // A sound server that must read its start files again.
            Some(difference) => (difference.to_string(), stop_plan()),
            None => {
                let updated = tokio::select! {
                    () = context.interrupt.cancelled() => {
                        let stopped = self.end(&StopPlan::kill()).await;
                        let reason = "a stop came meanwhile".to_owned();
                        let error = stopped.err().map(|source| UpdateError::Stop { reason, source });
                        return Err((error.unwrap_or(UpdateError::Interrupted), None));
                    }
                    exit = self.child.wait() => Err(format!("it died: {}", describe(exit.cause))),
                    updated = self.update_in_place(&new, folder, label) => updated.map_err(|error| with_causes(&error)),
                };
                match updated {
                    Ok(()) => return Ok(Self { spec, folder: new, ..self }),
                    // Which weights it has is uncertain: it must not answer once more.
                    Err(reason) => (reason, StopPlan::kill()),
                }
            }
        };
        tracing::warn!(reason, folder, label, "The server does not take the weights; starting it anew on them.");
        let port = self.port;
        if let Err(source) = self.end(&plan).await {
            return Err((UpdateError::Stop { reason, source }, None));
        }
        let started = Self::start_on(spec, new, next_incarnation, Some(port), context).await;
        started.map_err(|source| match source {
            StartError::Interrupted => (UpdateError::Interrupted, None),
            source => (UpdateError::Restart { reason, source }, None),
        })
    }

    /// Nothing runs, the weights change, the change is proven, then requests come in again.
    async fn update_in_place(&self, new: &CheckpointFolder, folder: &str, label: &str) -> Result<(), CallError> {
        self.client.pause().await?;
        self.client.flush().await?;
        let reading = Duration::from_secs(new.weight_bytes() / SLOW_DISK_BYTES_PER_SECOND);
        self.client.update_weights(folder, label, LEAST_UPDATE_LIMIT + reading).await?;
        self.client.expect_weights(folder, label).await?;
        self.client.proceed().await?;
        self.client.canary("grail-canary-update", label, vocab_size(new)).await
    }

    /// Stops it: abort what runs, SIGTERM and SIGQUIT to the leader, SIGKILL to all that belongs to it, and a look whether
    /// anything is left.
    ///
    /// # Errors
    /// [`StopError`]
    pub async fn stop(self) -> Result<Exit, StopError> {
        if self.child.exit().is_none()
            && let Err(error) = tokio::time::timeout(ABORT_LIMIT, self.client.abort_all()).await.unwrap_or(Ok(()))
        {
            tracing::debug!(%error, "The server does not take an abort; stopping it all the same.");
        }
        self.end(&stop_plan()).await
    }

    async fn end(self, plan: &StopPlan) -> Result<Exit, StopError> {
        let exit = self.child.stop(plan).await?;
        let survivors: Vec<i32> = exit.survivors.iter().copied().chain(self.child.members()).collect();
        if survivors.is_empty() { Ok(exit) } else { Err(StopError::Survivors(survivors)) }
    }
}

fn stop_plan() -> StopPlan {
    StopPlan::terminate(TERMINATE_GRACE).then(Signal::SIGQUIT, StopTarget::Leader, QUIT_GRACE)
}

async fn open(folder: &str) -> Result<CheckpointFolder, FolderError> {
    let path = Path::new(folder).to_owned();
    let opened = tokio::task::spawn_blocking(move || CheckpointFolder::open(&path)).await;
    opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}

/// Asks until the server says that it generates. An early end is the caller's to see.
async fn until_it_generates(client: &ServerClient, limit: Duration) -> Result<(), CallError> {
    let deadline = Instant::now() + limit;
    let mut pause = FIRST_PAUSE;
    loop {
        match client.health_generate().await {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() + pause >= deadline => return Err(error),
            Err(_) => tokio::time::sleep(pause).await,
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// The right server, with the right weights, which really generates.
async fn check(
    client: &ServerClient,
    spec: &ServerSpec,
    folder: &CheckpointFolder,
    served_name: &str,
) -> Result<(), CallError> {
    client.expect_served_name(served_name).await?;
    client.expect_weights(&spec.model_path, &spec.weight_version).await?;
    client.canary("grail-canary-start", &spec.weight_version, vocab_size(folder)).await
}

/// In words, without the meanings that our own programs give to exit codes.
pub(super) fn describe(cause: ExitCause) -> String {
    match cause {
        ExitCause::Code(code) => format!("exit code {code}"),
        other => other.to_string(),
    }
}

fn vocab_size(folder: &CheckpointFolder) -> usize {
    // A configuration without it was refused by the server.
    folder.count("vocab_size").unwrap_or_default()
}
