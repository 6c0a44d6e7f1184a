//! The launcher at its supervisor's socket: messages in, messages out, and one actor that owns the server.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use grail_ipc::handshake::{self, HandshakeError};
use grail_ipc::messages::{
    Epoch, Failed, FromLauncher, Hello, PROTOCOL_VERSION, RequestId, ServerPhase, ServerSpec, Severity, SlotId,
    ToLauncher,
};
use grail_ipc::socket::{Folder, Listener, SocketError};
use grail_ipc::{Connection, ConnectionError, Token};
use grail_process::{Exit, ExitCause, with_causes};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::args::{Look, ServeArgs};
use super::command::PhaseSink;
use super::server::{Context, Server, StopError, describe};

/// How long a peer may take to say who it is.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// How long the last messages may take to leave.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// A launcher that cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    #[error("read the token")]
    Token(#[source] io::Error),
    #[error("prepare the process")]
    Process(#[source] io::Error),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("speak with the supervisor")]
    Connection(#[from] ConnectionError),
    #[error("stop the server")]
    Stop(#[from] StopError),
}

type Outbox = mpsc::UnboundedSender<FromLauncher>;

/// Waits for one supervisor and serves it until it hangs up, or until SIGTERM or SIGINT. The server is stopped before this
/// returns, whatever happened.
///
/// # Errors
/// [`ServeError`]
pub async fn serve(args: &ServeArgs) -> Result<(), ServeError> {
    grail_process::become_subreaper().map_err(ServeError::Process)?;
    let mut signals = Signals::listen().map_err(ServeError::Process)?;
    let token = args.token_fd.map(read_token).transpose().map_err(ServeError::Token)?;
    let folder = if token.is_some() { Folder::Private } else { Folder::Any };
    let listener = Listener::bind(&args.socket, folder).await?;
    tracing::info!(socket = %args.socket.display(), "Waiting for the supervisor.");
    let connection = tokio::select! {
        connected = greet_one(&listener, args, token.as_ref()) => connected?,
        () = signals.next() => return Ok(()),
    };
    drop(listener);
    converse(connection, (Epoch(args.epoch), args.look()), &mut signals).await
}

/// Descriptors are opened anew by their number, so that this needs no unsafe code.
fn read_token(descriptor: i32) -> io::Result<Token> {
    Token::read_from(OwnedFd::from(File::open(format!("/proc/self/fd/{descriptor}"))?))
}

/// SIGTERM and SIGINT; a supervisor that dies sends the first through the kernel.
#[derive(Debug)]
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(super) fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// The first peer with which the handshake succeeds.
async fn greet_one(
    listener: &Listener,
    args: &ServeArgs,
    token: Option<&Token>,
) -> Result<Connection<FromLauncher, ToLauncher>, ServeError> {
    loop {
        let stream = listener.accept().await?;
        let hello = Hello {
            protocol: PROTOCOL_VERSION,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            slot: SlotId(args.slot),
            epoch: Epoch(args.epoch),
            token: token.map(|token| token.as_bytes().to_vec()).unwrap_or_default(),
            pid: std::process::id(),
            device: String::new(),
            weights: None,
        };
        match handshake::greet(stream, hello, HANDSHAKE_LIMIT).await {
            Ok((connection, welcome)) => {
                tracing::info!(build = welcome.build, "The supervisor is connected.");
                return Ok(connection);
            }
            // A version that does not fit will not fit later.
            Err(error @ HandshakeError::Version { .. }) => return Err(error.into()),
            Err(error) => tracing::warn!(%error, "Refused a peer."),
        }
    }
}

/// Shovels messages until the conversation is over, then has the actor stop the server.
async fn converse(
    connection: Connection<FromLauncher, ToLauncher>,
    (epoch, look): (Epoch, Look),
    signals: &mut Signals,
) -> Result<(), ServeError> {
    let Connection { mut reader, mut writer } = connection;
    let (outbox, mut outgoing) = mpsc::unbounded_channel();
    let (commands, queue) = mpsc::unbounded_channel();
    let server_pid = Arc::new(AtomicI32::new(0));
    let actor = Actor {
        outbox: outbox.clone(),
        queue,
        epoch,
        look,
        server: None,
        incarnations: 0,
        pid: Arc::clone(&server_pid),
    };
    let actor = tokio::spawn(actor.run());
    let mut interrupt = CancellationToken::new();
    let ended = loop {
        tokio::select! {
            message = reader.recv() => match message {
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
                Ok(Some(message)) => {
                    let order = match message {
                        ToLauncher::Welcome(_) => continue,
                        ToLauncher::Ping { id } => {
                            let server_pid = u32::try_from(server_pid.load(Ordering::Relaxed)).ok().filter(|pid| *pid > 0);
                            if let Err(error) = writer.queue(&FromLauncher::Pong { id, server_pid }) {
                                break Err(error);
                            }
                            continue;
                        }
                        ToLauncher::Start { id, spec } => Order::Start { id, spec: Box::new(spec) },
                        ToLauncher::Update { id, folder, label } => Order::Update { id, folder, label },
                        ToLauncher::Stop { id } => {
                            // Whatever is under way is given up.
                            std::mem::take(&mut interrupt).cancel();
                            Order::Stop { id }
                        }
                    };
                    if commands.send((order, interrupt.clone())).is_err() {
                        break Ok(());
                    }
                }
            },
            Some(message) = outgoing.recv() => if let Err(error) = writer.queue(&message) {
                break Err(error);
            },
            flushed = writer.flush(), if !writer.is_idle() => if let Err(error) = flushed {
                break Err(error);
            },
            () = signals.next() => {
                tracing::info!("Told to end.");
                break Ok(());
            }
        }
    };
    tracing::info!("The conversation with the supervisor is over.");
    interrupt.cancel();
    drop((commands, outbox));
    let stopped = actor.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
    while let Some(message) = outgoing.recv().await {
        writer.queue(&message)?;
    }
    // The peer may be gone; then nobody misses the messages.
    if tokio::time::timeout(FAREWELL_LIMIT, writer.flush()).await.is_err() {
        tracing::debug!("The supervisor does not read its last messages.");
    }
    stopped?;
    match ended {
        // A peer that was killed leaves half a frame at times; that is an end as any other.
        Ok(()) | Err(ConnectionError::Truncated { .. } | ConnectionError::Write(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[derive(Debug)]
enum Order {
    Start { id: RequestId, spec: Box<ServerSpec> },
    Update { id: RequestId, folder: String, label: String },
    Stop { id: RequestId },
}

/// How a server is lost.
#[derive(Debug)]
enum End {
    Exit(Exit),
    /// Its process lives and answers nothing.
    Silence,
}

/// Owns the server. One order at a time; a token that is cancelled ends the order that carries it.
struct Actor {
    outbox: Outbox,
    queue: mpsc::UnboundedReceiver<(Order, CancellationToken)>,
    epoch: Epoch,
    look: Look,
    server: Option<Server>,
    incarnations: u64,
    pid: Arc<AtomicI32>,
}

impl Actor {
    async fn run(mut self) -> Result<(), StopError> {
        loop {
            let died = async {
                match &self.server {
                    Some(server) => tokio::select! {
                        biased;
                        exit = server.wait() => End::Exit(exit),
                        () = server.silence(self.look) => End::Silence,
                    },
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                order = self.queue.recv() => match order {
                    None => break,
                    Some((order, interrupt)) => self.obey(order, &interrupt).await,
                },
                end = died => self.lost(end).await,
            }
            self.publish_pid();
        }
        match self.server.take() {
            Some(server) => server.stop().await.map(drop),
            None => Ok(()),
        }
    }

    /// Tells of a server that ended, or ends one that answers nothing.
    async fn lost(&mut self, end: End) {
        let Some(server) = self.server.take() else { return };
        let last_lines = server.last_lines();
        let (cause, exit) = match end {
            End::Exit(exit) => (describe(exit.cause), Some(exit)),
            End::Silence => {
                let cause = format!("no answer within {:?}", self.look.silence);
                tracing::error!(cause, "The server hangs; ending it.");
                let ended = server.kill().await;
                if let Err(error) = &ended {
                    tracing::error!(error = with_causes(error), "The server that hangs cannot be ended.");
                }
                (cause, ended.ok())
            }
        };
        tracing::error!(cause, killed = exit.as_ref().map(|exit| exit.killed), "The server is lost.");
        let exit = exit.map(|exit| exit.cause);
        self.say(FromLauncher::Died {
            cause,
            exit: exit.and_then(ExitCause::code),
            signal: exit.and_then(ExitCause::signal).map(|signal| signal as i32),
            last_lines,
        });
    }

    async fn obey(&mut self, order: Order, interrupt: &CancellationToken) {
        match order {
            Order::Start { id, spec } => self.start(id, *spec, interrupt).await,
            Order::Update { id, folder, label } => self.update(id, &folder, &label, interrupt).await,
            Order::Stop { id } => self.stop(id).await,
        }
    }

    async fn start(&mut self, id: RequestId, spec: ServerSpec, interrupt: &CancellationToken) {
        if self.server.is_some() {
            self.fail(
                id,
                Severity::FatalForGroup,
                "already_running",
                "a server runs already: stop it first".to_owned(),
            );
            return;
        }
        let incarnation = self.next_incarnation();
        match Server::start(spec, incarnation, &self.context(interrupt)).await {
            Ok(server) => {
                let (url, epoch) = (server.url().to_owned(), server.epoch());
                tracing::info!(url, incarnation, weights = epoch.weights, "The server is ready.");
                self.server = Some(server);
                self.publish_pid();
                self.say(FromLauncher::Ready { id, url, epoch });
            }
            Err(error) => {
                let severity =
                    if error.is_worth_another_try() { Severity::Retryable } else { Severity::FatalForWorker };
                self.fail(id, severity, error.code(), with_causes(&error));
            }
        }
    }

    async fn update(&mut self, id: RequestId, folder: &str, label: &str, interrupt: &CancellationToken) {
        let Some(server) = self.server.take() else {
            self.fail(id, Severity::Retryable, "not_running", "no server runs: start one first".to_owned());
            return;
        };
        let next = self.next_incarnation();
        match server.update(folder, label, next, &self.context(interrupt)).await {
            Ok(server) => {
                let epoch = server.epoch();
                tracing::info!(incarnation = epoch.incarnation, weights = label, "The server has new weights.");
                self.server = Some(server);
                self.publish_pid();
                self.say(FromLauncher::Updated { id, epoch });
            }
            Err((error, server)) => {
                let severity = if server.is_some() { Severity::FatalForGroup } else { Severity::FatalForWorker };
                self.server = server.map(|server| *server);
                self.publish_pid();
                self.fail(id, severity, error.code(), with_causes(&error));
            }
        }
    }

    async fn stop(&mut self, id: RequestId) {
        self.say(FromLauncher::Phase { phase: ServerPhase::Stopping, detail: String::new() });
        let stopped = match self.server.take() {
            Some(server) => server.stop().await.map(drop),
            None => Ok(()),
        };
        self.publish_pid();
        match stopped {
            Ok(()) => self.say(FromLauncher::Stopped { id }),
            Err(error) => self.fail(id, Severity::FatalForWorker, "survivors", with_causes(&error)),
        }
    }

    /// Unique over all launchers of a supervisor's life: the launcher's own incarnation, then a count.
    fn next_incarnation(&mut self) -> u64 {
        self.incarnations += 1;
        (self.epoch.0 << 20) + self.incarnations
    }

    fn context(&self, interrupt: &CancellationToken) -> Context {
        let outbox = self.outbox.clone();
        let phases: PhaseSink = Arc::new(move |phase, detail: &str| {
            if outbox.send(FromLauncher::Phase { phase, detail: detail.to_owned() }).is_err() {
                tracing::debug!(?phase, "Nobody listens to phases any more.");
            }
        });
        Context { phases, interrupt: interrupt.clone() }
    }

    fn publish_pid(&self) {
        self.pid.store(self.server.as_ref().map_or(0, Server::pid), Ordering::Relaxed);
    }

    fn fail(&self, id: RequestId, severity: Severity, code: &str, detail: String) {
        tracing::warn!(code, detail, "An order failed.");
        self.say(FromLauncher::Failed(Failed { id, epoch: self.epoch, severity, code: code.to_owned(), detail }));
    }

    fn say(&self, message: FromLauncher) {
        if self.outbox.send(message).is_err() {
            tracing::debug!("The supervisor is gone.");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn a_token_is_read_from_its_descriptor() {
        let token = Token::generate().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(token.as_bytes()).unwrap();
        drop(writer);
        assert!(read_token(reader.as_raw_fd()).unwrap().matches(token.as_bytes()));
        assert!(read_token(-1).is_err());
    }
}
