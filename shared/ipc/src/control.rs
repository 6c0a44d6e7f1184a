//! How an operator's command speaks to a running supervisor: a greeting with versions, then requests and answers in turn.
//!
//! The supervisor greets first. What requests and answers contain is the supervisor's own matter; here are the envelope, its
//! version, and the bounds that keep a careless or hostile client from costing the supervisor anything: small frames, a limit
//! on every wait, a pause between answers.

use std::path::Path;
use std::time::Duration;

use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::codec::Content;
use crate::connection::{Connection, ConnectionError};
use crate::socket::{self, PeerError, SocketError, check_operator};

/// Version of the control protocol. Peers with another version are refused, with both numbers.
pub const CONTROL_VERSION: u32 = 1;

/// The longest request: a few words.
pub const MAX_REQUEST_BYTES: usize = 4 << 10;
/// The longest answer: the status of a thousand slots.
pub const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Who speaks, with which version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    pub protocol: u32,
    /// Version of the package that was built, for people.
    pub build: String,
    pub pid: u32,
}

impl Greeting {
    /// The greeting of this process.
    #[must_use]
    pub fn ours() -> Self {
        Self { protocol: CONTROL_VERSION, build: env!("CARGO_PKG_VERSION").to_owned(), pid: std::process::id() }
    }
}

/// Why a supervisor does not do what it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The peer's uid.
    NotPermitted,
    /// The peer's version.
    Version,
    /// Too many clients.
    Busy,
    /// This request, now.
    Request,
}

/// A refusal with its reason, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub kind: RefusalKind,
    pub reason: String,
}

/// From a client to the supervisor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", content = "c", rename_all = "snake_case")]
pub enum ToSupervisor<R> {
    Greeting(Greeting),
    Request(R),
}

/// From the supervisor to a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", content = "c", rename_all = "snake_case")]
pub enum FromSupervisor<A> {
    Greeting(Greeting),
    Answer(A),
    Refused(Refusal),
}

/// A conversation that came to nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("no {awaited} within {limit:?}")]
    Deadline { awaited: &'static str, limit: Duration },
    #[error("peer hung up before its {awaited}")]
    HungUp { awaited: &'static str },
    #[error("peer sent something else instead of its {awaited}")]
    Unexpected { awaited: &'static str },
    #[error("peer speaks control protocol {theirs} (build {build}), this build speaks {ours}")]
    Version { ours: u32, theirs: u32, build: String },
    #[error("{}", .0.reason)]
    Refused(Refusal),
    #[error("speak to the peer")]
    Connection(#[from] ConnectionError),
}

impl ControlError {
    /// Whether the uid was the reason.
    #[must_use]
    pub fn is_not_permitted(&self) -> bool {
        match self {
            Self::Socket(SocketError::Peer(_)) => true,
            Self::Socket(SocketError::Connect { source, .. }) => source.kind() == std::io::ErrorKind::PermissionDenied,
            Self::Refused(refusal) => refusal.kind == RefusalKind::NotPermitted,
            _ => false,
        }
    }

    /// Whether no supervisor listens there.
    #[must_use]
    pub const fn is_nobody_there(&self) -> bool {
        matches!(self, Self::Socket(SocketError::NobodyListens { .. }))
    }
}

fn check_version(greeting: &Greeting) -> Result<(), ControlError> {
    if greeting.protocol == CONTROL_VERSION {
        return Ok(());
    }
    Err(ControlError::Version { ours: CONTROL_VERSION, theirs: greeting.protocol, build: greeting.build.clone() })
}

async fn within<T>(
    limit: Duration,
    awaited: &'static str,
    work: impl Future<Output = Result<T, ControlError>>,
) -> Result<T, ControlError> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(ControlError::Deadline { awaited, limit }))
}

/// The client's end.
#[derive(Debug)]
pub struct ControlClient<R: Content, A: Content> {
    connection: Connection<ToSupervisor<R>, FromSupervisor<A>>,
    limit: Duration,
    peer: Greeting,
}

impl<R: Content, A: Content> ControlClient<R, A> {
    /// Connects to the supervisor that listens on `path`; `limit` bounds this and every answer.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn connect(path: &Path, limit: Duration) -> Result<Self, ControlError> {
        // Who is there listens; only one that starts this very moment is worth a short wait.
        let (stream, uid) = socket::connect_any(path, limit.min(Duration::from_millis(250))).await?;
        check_supervisor(uid).map_err(SocketError::Peer)?;
        let mut connection = Connection::with_limit(stream, MAX_ANSWER_BYTES);
        let peer = within(limit, "greeting", async {
            match connection.recv().await? {
                Some(FromSupervisor::Greeting(greeting)) => {
                    check_version(&greeting)?;
                    connection.send(&ToSupervisor::Greeting(Greeting::ours())).await?;
                    Ok(greeting)
                }
                Some(FromSupervisor::Refused(refusal)) => Err(ControlError::Refused(refusal)),
                Some(FromSupervisor::Answer(_)) => Err(ControlError::Unexpected { awaited: "greeting" }),
                None => Err(ControlError::HungUp { awaited: "greeting" }),
            }
        })
        .await?;
        Ok(Self { connection, limit, peer })
    }

    /// The supervisor's greeting.
    #[must_use]
    pub const fn peer(&self) -> &Greeting {
        &self.peer
    }

    /// Waits until the supervisor closes the connection. What it says meanwhile is dropped. Safe to cancel.
    pub async fn hung_up(&mut self) {
        while let Ok(Some(_)) = self.connection.recv().await {}
    }

    /// Asks for one thing and waits for the answer.
    ///
    /// # Errors
    /// [`ControlError::Refused`] with the reason, or why the connection is of no use any more.
    pub async fn request(&mut self, request: R) -> Result<A, ControlError> {
        within(self.limit, "answer", async {
            self.connection.send(&ToSupervisor::Request(request)).await?;
            match self.connection.recv().await? {
                Some(FromSupervisor::Answer(answer)) => Ok(answer),
                Some(FromSupervisor::Refused(refusal)) => Err(ControlError::Refused(refusal)),
                Some(FromSupervisor::Greeting(_)) => Err(ControlError::Unexpected { awaited: "answer" }),
                None => Err(ControlError::HungUp { awaited: "answer" }),
            }
        })
        .await
    }
}

/// Root may speak to the supervisor of anybody; others to their own, or to root's.
fn check_supervisor(peer: Option<u32>) -> Result<(), PeerError> {
    let ours = geteuid().as_raw();
    if ours == 0 { Ok(()) } else { check_operator(peer, ours) }
}

/// Bounds of one conversation, as the supervisor sets them.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the client's greeting, and for it to take an answer.
    pub turn: Duration,
    /// Between two requests.
    pub idle: Duration,
    /// Pause after each answer, so that requests without end cost little.
    pub pause: Duration,
}

/// The supervisor's end: greets, then answers requests in turn until the client hangs up.
///
/// # Errors
/// [`ControlError`] says how the client broke the rules; the caller logs it and forgets the client.
pub async fn serve<R: Content, A: Content>(
    stream: UnixStream,
    patience: Patience,
    answer: impl Fn(R) -> Result<A, Refusal>,
) -> Result<(), ControlError> {
    let mut connection: Connection<FromSupervisor<A>, ToSupervisor<R>> =
        Connection::with_limit(stream, MAX_REQUEST_BYTES);
    let greeted = within(patience.turn, "greeting", async {
        connection.send(&FromSupervisor::Greeting(Greeting::ours())).await?;
        match connection.recv().await? {
            Some(ToSupervisor::Greeting(greeting)) => check_version(&greeting),
            Some(ToSupervisor::Request(_)) => Err(ControlError::Unexpected { awaited: "greeting" }),
            None => Err(ControlError::HungUp { awaited: "greeting" }),
        }
    });
    if let Err(error) = greeted.await {
        if matches!(error, ControlError::Version { .. }) {
            let refusal = Refusal { kind: RefusalKind::Version, reason: error.to_string() };
            within(patience.turn, "reading", async { Ok(connection.send(&FromSupervisor::Refused(refusal)).await?) })
                .await?;
        }
        return Err(error);
    }
    loop {
        let request = within(patience.idle, "request", async { Ok(connection.recv().await?) }).await?;
        let reply = match request {
            Some(ToSupervisor::Request(request)) => match answer(request) {
                Ok(answer) => FromSupervisor::Answer(answer),
                Err(refusal) => FromSupervisor::Refused(refusal),
            },
            Some(ToSupervisor::Greeting(_)) => return Err(ControlError::Unexpected { awaited: "request" }),
            None => return Ok(()),
        };
        // A client that does not read must not hold the answer for ever.
        within(patience.turn, "reading", async { Ok(connection.send(&reply).await?) }).await?;
        tokio::time::sleep(patience.pause).await;
    }
}

/// Tells a peer why it is turned away, and hangs up. A fresh socket takes the few bytes at once; one that does not within
/// `limit` is left without an explanation.
pub async fn turn_away(stream: UnixStream, refusal: Refusal, limit: Duration) {
    let mut connection: Connection<FromSupervisor<()>, ToSupervisor<()>> = Connection::new(stream);
    drop(tokio::time::timeout(limit, connection.send(&FromSupervisor::Refused(refusal))).await);
}
