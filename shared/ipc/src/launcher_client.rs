//! The supervisor's end of the connection to a generation launcher.

use std::path::Path;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::client::{Client, Discarded, LostConnection, Place, Placed, RequestError};
use crate::connection::Connection;
use crate::handshake::{self, Expected, HandshakeError};
use crate::messages::{Epoch, FromLauncher, Hello, RequestId, ServerEpoch, ServerPhase, ServerSpec, ToLauncher};

/// What a launcher reports without being asked.
#[derive(Debug, Clone, PartialEq)]
pub enum LauncherEvent {
    /// The server has come to another phase.
    Phase { phase: ServerPhase, detail: String },
    /// The server died without being asked to.
    Died { cause: String, exit: Option<i32>, signal: Option<i32>, last_lines: Vec<String> },
}

/// The events of one connection, in order.
#[derive(Debug)]
pub struct LauncherEvents {
    inbox: mpsc::UnboundedReceiver<FromLauncher>,
}

impl LauncherEvents {
    /// The next event, or `None` once the connection is over. Safe to cancel.
    pub async fn next(&mut self) -> Option<LauncherEvent> {
        loop {
            match self.inbox.recv().await? {
                FromLauncher::Phase { phase, detail } => return Some(LauncherEvent::Phase { phase, detail }),
                FromLauncher::Died { cause, exit, signal, last_lines } => {
                    return Some(LauncherEvent::Died { cause, exit, signal, last_lines });
                }
                // The client hands on events only.
                _ => {}
            }
        }
    }
}

/// A server that answers requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyServer {
    /// Where it listens, for instance `http://127.0.0.1:31000`.
    pub url: String,
    pub epoch: ServerEpoch,
}

/// Requests to one incarnation of a launcher; futures behave as those of [`crate::WorkerClient`].
#[derive(Debug)]
pub struct LauncherClient {
    client: Client<ToLauncher, FromLauncher>,
    hello: Hello,
}

impl LauncherClient {
    /// Connects within `limit`.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub async fn connect(
        path: &Path,
        expected: &Expected,
        limit: Duration,
    ) -> Result<(Self, LauncherEvents), HandshakeError> {
        let (connection, hello) = handshake::connect(path, expected, limit).await?;
        Ok(Self::new(connection, hello))
    }

    /// A client over a connection whose handshake is done, and its events.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[must_use]
    pub fn new(connection: Connection<ToLauncher, FromLauncher>, hello: Hello) -> (Self, LauncherEvents) {
        let (events, inbox) = mpsc::unbounded_channel();
        (Self { client: Client::start(connection, hello.epoch, events), hello }, LauncherEvents { inbox })
    }

    /// What the launcher said of itself.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Starts the server and waits until it is ready; phases come as events meanwhile.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn start(&self, spec: ServerSpec) -> Result<ReadyServer, RequestError> {
        match self.client.request(|id| Ok(ToLauncher::Start { id, spec })).await? {
            FromLauncher::Ready { url, epoch, .. } => Ok(ReadyServer { url, epoch }),
            other => Err(other_answer(other)),
        }
    }

    /// Has the server take the weights in `folder` under `label`.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn update(&self, folder: &Path, label: &str) -> Result<ServerEpoch, RequestError> {
        let (folder, label) = (folder.to_string_lossy().into_owned(), label.to_owned());
        match self.client.request(|id| Ok(ToLauncher::Update { id, folder, label })).await? {
            FromLauncher::Updated { epoch, .. } => Ok(epoch),
            other => Err(other_answer(other)),
        }
    }

    /// Asks for a sign of life; the answer is the server's pid, if it runs.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn ping(&self) -> Result<Option<u32>, RequestError> {
        match self.client.request(|id| Ok(ToLauncher::Ping { id })).await? {
            FromLauncher::Pong { server_pid, .. } => Ok(server_pid),
            other => Err(other_answer(other)),
        }
    }

    /// Stops the server and waits until nothing of it is left.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn stop(&self) -> Result<(), RequestError> {
        match self.client.request(|id| Ok(ToLauncher::Stop { id })).await? {
            FromLauncher::Stopped { .. } => Ok(()),
            other => Err(other_answer(other)),
        }
    }

    /// Waits for the end of the connection and says why it came.
    pub async fn closed(&self) -> LostConnection {
        self.client.closed().await
    }

    /// Answers that were thrown away.
    #[must_use]
    pub fn discarded(&self) -> Discarded {
        self.client.discarded()
    }
}

fn other_answer(message: FromLauncher) -> RequestError {
    match message {
        FromLauncher::Failed(failed) => RequestError::Failed(failed),
        other => RequestError::WrongKind { found: other.kind().to_owned() },
    }
}

impl Placed for FromLauncher {
    fn place(&self) -> Place {
        let answer = |id: &RequestId, epoch: Option<Epoch>| Place::Answer { id: *id, epoch };
        match self {
            Self::Hello(_) => Place::Nowhere,
            Self::Phase { .. } | Self::Died { .. } => Place::Event,
            Self::Ready { id, .. } | Self::Updated { id, .. } | Self::Stopped { id } | Self::Pong { id, .. } => {
                answer(id, None)
            }
            Self::Failed(failed) => answer(&failed.id, Some(failed.epoch)),
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Phase { .. } => "phase",
            Self::Ready { .. } => "ready",
            Self::Updated { .. } => "updated",
            Self::Stopped { .. } => "stopped",
            Self::Pong { .. } => "pong",
            Self::Died { .. } => "died",
            Self::Failed(_) => "failed",
        }
    }
}
