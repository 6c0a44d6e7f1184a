//! The control socket of a running supervisor: what can be asked, and the server that answers.

mod place;
mod status;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use grail_ipc::control::{self, ControlError, Patience, Refusal, RefusalKind};
use grail_ipc::messages::SlotId;
use grail_ipc::socket::{Folder, Listener, RuntimeFolder, SocketError, check_operator};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::Instant;

pub use place::{Place, socket_base};
pub use status::{SCHEMA, Status, awaited, duration};

use crate::checkpoints::Checkpoints;
use crate::fleet::{FleetHandle, SlotCommand};
use crate::progress::{Progress, elapsed_ms};
use crate::shutdown::{Shutdown, Urgency};
use grail_process::with_causes;

/// Clients that are served at once; more are turned away.
const MAX_CLIENTS: usize = 8;
/// Uids of refused peers that are remembered, so that each is logged once.
const MAX_REMEMBERED: usize = 64;
/// For the reason of a refusal to be taken by a peer that is turned away.
const FAREWELL: Duration = Duration::from_millis(100);
/// After a failure to accept, for instance for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

const PATIENCE: Patience =
    Patience { turn: Duration::from_secs(5), idle: Duration::from_secs(30), pause: Duration::from_millis(10) };

/// What an operator may ask for.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(tag = "t", content = "c", rename_all = "snake_case")]
pub enum Request {
    Status,
    Slot {
        slot: SlotId,
        command: SlotCommand,
    },
    /// Read the present checkpoint again: one worker, or all and the generation server.
    ReloadCheckpoint {
        slot: Option<SlotId>,
    },
    Stop {
        /// Give up what is not spooled yet.
        now: bool,
    },
}

/// What the supervisor says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "t", content = "c", rename_all = "snake_case")]
pub enum Answer {
    Status(Box<Status>),
    /// The order was taken; the status shows how it goes on.
    Accepted,
}

/// The client that speaks to a [`ControlServer`].
pub type Client = control::ControlClient<Request, Answer>;

/// What answers are made from.
#[derive(Debug)]
pub struct Facts {
    pub state_dir: PathBuf,
    pub started_at: SystemTime,
    /// The same moment on the clock of [`Progress`].
    pub started: Instant,
    pub progress: Arc<Progress>,
    pub checkpoints: Checkpoints,
    pub fleet: FleetHandle,
    pub shutdown: Shutdown,
}

impl Facts {
    /// Carries a request out. Never waits: the miner's own tasks do what takes time.
    ///
    /// # Errors
    /// [`Refusal`] with the reason.
    pub fn answer(&self, request: Request) -> Result<Answer, Refusal> {
        match request {
            Request::Status => Ok(Answer::Status(Box::new(self.status()))),
            Request::Slot { slot, command } => {
                tracing::info!(%slot, ?command, "An operator gives an order.");
                self.fleet.command(slot, command).map_err(refused)?;
                Ok(Answer::Accepted)
            }
            Request::ReloadCheckpoint { slot } => {
                tracing::info!(?slot, "An operator has the checkpoint read again.");
                self.fleet.read_anew(slot).map_err(refused)?;
                Ok(Answer::Accepted)
            }
            Request::Stop { now } => {
                tracing::info!(now, "An operator tells the miner to stop.");
                self.shutdown.raise(if now { Urgency::Now } else { Urgency::Drain });
                Ok(Answer::Accepted)
            }
        }
    }

    /// What is known now.
    #[must_use]
    pub fn status(&self) -> Status {
        let window = self.progress.snapshot(elapsed_ms(self.started));
        let urgency = self.shutdown.urgency();
        let since = self.started_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Status {
            build: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            state_dir: self.state_dir.clone(),
            started_unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            up_seconds: self.started.elapsed().as_secs(),
            phase: self.progress.phase(),
            stopping: urgency,
            awaits: (urgency != Urgency::None).then(|| self.awaited()),
            window: (window.window != 0).then_some(window),
            last_upload: self.progress.last_upload(),
            checkpoints_in_use: self.checkpoints.in_use(),
            slots: self.fleet.slots(),
            server: self.fleet.server(),
        }
    }

    /// What a miner that is told to stop waits for.
    #[must_use]
    pub fn awaited(&self) -> String {
        let children = self.fleet.slots().iter().filter(|slot| slot.pid.is_some()).count()
            + usize::from(self.fleet.server().is_some_and(|server| server.pid.is_some()));
        awaited(self.progress.phase(), &self.progress.snapshot(elapsed_ms(self.started)), children)
    }
}

fn refused(error: crate::fleet::SlotRefused) -> Refusal {
    Refusal { kind: RefusalKind::Request, reason: error.to_string() }
}

/// Listens until it is closed or dropped; then the socket is gone.
#[derive(Debug)]
pub struct ControlServer {
    place: Place,
    accepting: JoinHandle<()>,
}

impl ControlServer {
    /// Listens at `place`. A socket that is there already was left by a process that is gone: whoever calls this holds the lock
    /// of the state directory.
    ///
    /// # Errors
    /// [`SocketError`].
    pub async fn open(place: Place, facts: Arc<Facts>) -> Result<Self, SocketError> {
        if let Some(folder) = &place.folder {
            RuntimeFolder::create(folder)?;
        }
        if let Err(source) = std::fs::remove_file(&place.path)
            && source.kind() != std::io::ErrorKind::NotFound
        {
            return Err(SocketError::Listen { path: place.path, source });
        }
        // An operator may have made the state directory readable for others; mode and uid check guard the socket itself.
        let listener = Listener::bind(&place.path, Folder::Any).await?;
        tracing::debug!(socket = %place.path.display(), "Listening for operators.");
        Ok(Self { place, accepting: tokio::spawn(accept(listener, facts)) })
    }

    /// Stops listening and removes the socket. Who is connected stays so until the process ends, which is how a client learns
    /// of that end.
    pub async fn close(mut self) {
        self.accepting.abort();
        // The listener goes with its task, and with it the socket's name.
        drop((&mut self.accepting).await);
        if let Some(folder) = &self.place.folder {
            drop(std::fs::remove_dir(folder));
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: Listener, facts: Arc<Facts>) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    let ours = geteuid().as_raw();
    let mut refused = BTreeSet::new();
    loop {
        let (stream, uid) = match listener.accept_any().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(error = with_causes(&error), "An operator could not connect.");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(error) = check_operator(uid, ours) {
            if refused.len() < MAX_REMEMBERED && refused.insert(uid) {
                tracing::warn!(%error, "Refused a peer at the control socket.");
            }
            let refusal = Refusal { kind: RefusalKind::NotPermitted, reason: error.to_string() };
            control::turn_away(stream, refusal, FAREWELL).await;
            continue;
        }
        let Ok(permit) = clients.clone().try_acquire_owned() else {
            let reason = format!("the supervisor serves {MAX_CLIENTS} clients already; try again in a moment");
            control::turn_away(stream, Refusal { kind: RefusalKind::Busy, reason }, FAREWELL).await;
            continue;
        };
        let facts = facts.clone();
        tokio::spawn(async move {
            let served = control::serve(stream, PATIENCE, |request| facts.answer(request)).await;
            if let Err(error) = served {
                note_end(&error);
            }
            drop(permit);
        });
    }
}

/// A client that broke the rules; one that went away in mid-sentence did not.
fn note_end(error: &ControlError) {
    let error = with_causes(error);
    tracing::debug!(error, "A conversation at the control socket ended.");
}

#[cfg(test)]
mod tests;
