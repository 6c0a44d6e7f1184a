//! Requests with numbers over one connection, answered in any order.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, warn};

use crate::codec::{self, CodecError, Message};
use crate::connection::{Connection, ConnectionError};
use crate::jobs::ShapeError;
use crate::messages::{Epoch, Failed, RequestId, Severity};

/// Why a connection is over.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LostConnection {
    /// The peer closed it, or its process is gone.
    #[error("peer hung up")]
    PeerHungUp,
    /// All handles here were dropped.
    #[error("connection was closed on this side")]
    ClosedHere,
    /// The peer sent what makes no sense, or reading or writing failed.
    #[error("connection failed")]
    Failed(#[source] Arc<ConnectionError>),
    /// The peer sent a message that has no place here.
    #[error("peer sent a {kind} where it has no meaning")]
    Unexpected { kind: String },
}

/// A request without the answer that was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The child answered that it failed.
    #[error("child failed ({}): {}", .0.code, .0.detail)]
    Failed(Failed),
    #[error("wait for the answer of the child")]
    Lost(#[source] LostConnection),
    #[error("send the request")]
    Encode(#[from] CodecError),
    #[error("send the request")]
    Request(#[source] ShapeError),
    #[error("read the answer")]
    Answer(#[source] ShapeError),
    #[error("read the answer: {found} is no answer to this request")]
    WrongKind { found: String },
}

impl RequestError {
    /// What it means for the request and the child.
    #[must_use]
    pub fn severity(&self) -> Severity {
        match self {
            Self::Failed(failed) => failed.severity,
            Self::Encode(_) | Self::Request(_) => Severity::FatalForGroup,
            Self::Lost(_) | Self::Answer(_) | Self::WrongKind { .. } => Severity::FatalForWorker,
        }
    }
}

/// Where a message from the peer belongs.
pub(crate) enum Place {
    /// Answers one request; `epoch` where the message carries the incarnation that made it.
    Answer { id: RequestId, epoch: Option<Epoch> },
    /// Nobody asked for it.
    Event,
    /// Has no meaning after the handshake.
    Nowhere,
}

/// A message of the peer that says where it belongs.
pub(crate) trait Placed: Message {
    fn place(&self) -> Place;
    /// Short name of its kind, for errors.
    fn kind(&self) -> &'static str;
}

/// Answers that were thrown away, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Discarded {
    /// Made by another incarnation of the child.
    pub late: u64,
    /// To a number that is not open.
    pub unknown: u64,
    /// To a request whose caller has gone.
    pub abandoned: u64,
}

#[derive(Debug, Default)]
struct Counters {
    late: AtomicU64,
    unknown: AtomicU64,
    abandoned: AtomicU64,
}

#[derive(Debug)]
enum Command<In> {
    Request { id: RequestId, frame: Bytes, answer: oneshot::Sender<Result<In, RequestError>> },
    Notify { frame: Bytes },
}

/// The sending side of a connection that a task drives; cheap to share behind an `Arc`.
#[derive(Debug)]
pub(crate) struct Client<Out, In> {
    commands: mpsc::UnboundedSender<Command<In>>,
    next_id: AtomicU64,
    lost: watch::Receiver<Option<LostConnection>>,
    counters: Arc<Counters>,
    sends: std::marker::PhantomData<fn(Out)>,
}

impl<Out: Message, In: Placed> Client<Out, In> {
    /// Starts the task that drives `connection`; events go to `events`, answers of other incarnations than `epoch` nowhere.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn start(connection: Connection<Out, In>, epoch: Epoch, events: mpsc::UnboundedSender<In>) -> Self {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (lost_sender, lost) = watch::channel(None);
        let counters = Arc::new(Counters::default());
        let driver = Driver {
            connection,
            inbox,
            pending: HashMap::new(),
            epoch,
            events,
            counters: Arc::clone(&counters),
            accepts: true,
            writes: true,
        };
        tokio::spawn(driver.run(lost_sender));
        Self { commands, next_id: AtomicU64::new(1), lost, counters, sends: std::marker::PhantomData }
    }

    /// Sends what `message` makes of a fresh number and waits for the answer.
    pub(crate) async fn request(
        &self,
        message: impl FnOnce(RequestId) -> Result<Out, RequestError>,
    ) -> Result<In, RequestError> {
        let id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let frame = codec::encode(&message(id)?)?;
        let (answer, answered) = oneshot::channel();
        if self.commands.send(Command::Request { id, frame, answer }).is_err() {
            return Err(RequestError::Lost(self.reason()));
        }
        answered.await.unwrap_or_else(|_| Err(RequestError::Lost(self.reason())))
    }

    /// Sends a message that has no answer.
    pub(crate) fn notify(&self, message: &Out) -> Result<(), RequestError> {
        let frame = codec::encode(message)?;
        self.commands.send(Command::Notify { frame }).map_err(|_| RequestError::Lost(self.reason()))
    }

    /// Waits for the end of the connection.
    pub(crate) async fn closed(&self) -> LostConnection {
        let mut lost = self.lost.clone();
        match lost.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or(LostConnection::ClosedHere),
            Err(_) => LostConnection::ClosedHere,
        }
    }

    pub(crate) fn discarded(&self) -> Discarded {
        Discarded {
            late: self.counters.late.load(Ordering::Relaxed),
            unknown: self.counters.unknown.load(Ordering::Relaxed),
            abandoned: self.counters.abandoned.load(Ordering::Relaxed),
        }
    }

    fn reason(&self) -> LostConnection {
        self.lost.borrow().clone().unwrap_or(LostConnection::ClosedHere)
    }
}

/// The task behind a [`Client`]: the only owner of the connection and of the open requests.
struct Driver<Out, In> {
    connection: Connection<Out, In>,
    inbox: mpsc::UnboundedReceiver<Command<In>>,
    pending: HashMap<RequestId, oneshot::Sender<Result<In, RequestError>>>,
    epoch: Epoch,
    events: mpsc::UnboundedSender<In>,
    counters: Arc<Counters>,
    accepts: bool,
    /// Whether the peer still reads. What it wrote before it stopped is delivered first.
    writes: bool,
}

impl<Out: Message, In: Placed> Driver<Out, In> {
    async fn run(mut self, lost: watch::Sender<Option<LostConnection>>) {
        let reason = self.drive().await;
        debug!(%reason, open_requests = self.pending.len(), "Connection to a child is over.");
        lost.send_replace(Some(reason.clone()));
        self.inbox.close();
        while let Ok(command) = self.inbox.try_recv() {
            if let Command::Request { id, answer, .. } = command {
                self.pending.insert(id, answer);
            }
        }
        for answer in self.pending.into_values() {
            // Whoever asked may have gone.
            drop(answer.send(Err(RequestError::Lost(reason.clone()))));
        }
    }

    async fn drive(&mut self) -> LostConnection {
        loop {
            let Connection { reader, writer } = &mut self.connection;
            if !self.accepts && (writer.is_idle() || !self.writes) {
                return LostConnection::ClosedHere;
            }
            tokio::select! {
                command = self.inbox.recv(), if self.accepts => match command {
                    Some(Command::Request { id, frame, answer }) => {
                        self.pending.insert(id, answer);
                        writer.queue_frame(frame);
                    }
                    Some(Command::Notify { frame }) => writer.queue_frame(frame),
                    None => self.accepts = false,
                },
                written = writer.flush(), if self.writes && !writer.is_idle() => match written {
                    Ok(()) => {}
                    Err(error) if is_hang_up(&error) => self.writes = false,
                    Err(error) => return LostConnection::Failed(Arc::new(error)),
                },
                message = reader.recv() => match message {
                    Ok(Some(message)) => {
                        if let Err(reason) = self.deliver(message) {
                            return reason;
                        }
                    }
                    Ok(None) => return LostConnection::PeerHungUp,
                    Err(error) => return LostConnection::Failed(Arc::new(error)),
                }
            }
        }
    }

    fn deliver(&mut self, message: In) -> Result<(), LostConnection> {
        let (id, epoch) = match message.place() {
            Place::Answer { id, epoch } => (id, epoch),
            Place::Event => {
                // Without a listener events are of no interest.
                drop(self.events.send(message));
                return Ok(());
            }
            Place::Nowhere => return Err(LostConnection::Unexpected { kind: message.kind().to_owned() }),
        };
        if let Some(epoch) = epoch
            && epoch != self.epoch
        {
            self.counters.late.fetch_add(1, Ordering::Relaxed);
            warn!(request = %id, found = %epoch, expected = %self.epoch, "Discarded the answer of another incarnation.");
            return Ok(());
        }
        let Some(answer) = self.pending.remove(&id) else {
            self.counters.unknown.fetch_add(1, Ordering::Relaxed);
            warn!(request = %id, kind = message.kind(), "Discarded an answer that nobody waits for.");
            return Ok(());
        };
        if answer.send(Ok(message)).is_err() {
            self.counters.abandoned.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// A broken pipe is a hang-up that was noticed while writing; answers may still wait to be read.
fn is_hang_up(error: &ConnectionError) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(error, ConnectionError::Write(source) if matches!(source.kind(), BrokenPipe | ConnectionReset))
}
