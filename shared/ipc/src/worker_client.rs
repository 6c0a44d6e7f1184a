//! The supervisor's end of the connection to a proof worker.

use std::path::Path;
use std::time::Duration;

use grail_protocol::ids::WeightsHash;
use tokio::sync::mpsc;

use crate::client::{Client, Discarded, LostConnection, Place, Placed, RequestError};
use crate::connection::Connection;
use crate::handshake::{self, Expected, HandshakeError};
use crate::jobs::{GroupProof, ProveJob, ReloadOrder, RowFacts, VerifyJob};
use crate::messages::{Epoch, Failed, FromWorker, Hello, Pong, Proved, Reloaded, RequestId, ToWorker, Verified};

/// Requests to one incarnation of a proof worker.
///
/// Each method's future sends the request when it is first polled and waits for the answer; any number may be open at once. No
/// deadline is built in: wrap a future in [`tokio::time::timeout`]. A future may be dropped; its answer is then counted as
/// abandoned. Dropping the client hangs up, which ends a worker that a supervisor started.
#[derive(Debug)]
pub struct WorkerClient {
    client: Client<ToWorker, FromWorker>,
    hello: Hello,
}

impl WorkerClient {
    /// Connects within `limit`, which must leave room for the worker to load its model.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub async fn connect(path: &Path, expected: &Expected, limit: Duration) -> Result<Self, HandshakeError> {
        let (connection, hello) = handshake::connect(path, expected, limit).await?;
        Ok(Self::new(connection, hello))
    }

    /// A client over a connection whose handshake is done.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[must_use]
    pub fn new(connection: Connection<ToWorker, FromWorker>, hello: Hello) -> Self {
        let (events, _) = mpsc::unbounded_channel();
        Self { client: Client::start(connection, hello.epoch, events), hello }
    }

    /// What the worker said of itself.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The incarnation.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.hello.epoch
    }

    /// Proves one group.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn prove(&self, job: &ProveJob) -> Result<GroupProof, RequestError> {
        let epoch = self.epoch();
        let request = |id| job.to_request(id, epoch).map(ToWorker::Prove).map_err(RequestError::Request);
        match self.client.request(request).await? {
            FromWorker::Proved(proved) => GroupProof::from_message(&proved, job).map_err(RequestError::Answer),
            other => Err(other_answer(other)),
        }
    }

    /// Recomputes rows; the answer has them in the job's order.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn verify(&self, job: &VerifyJob) -> Result<Vec<RowFacts>, RequestError> {
        let epoch = self.epoch();
        match self.client.request(|id| Ok(ToWorker::Verify(job.to_request(id, epoch)))).await? {
            FromWorker::Verified(verified) => RowFacts::from_message(&verified, job).map_err(RequestError::Answer),
            other => Err(other_answer(other)),
        }
    }

    /// Makes other weights ready beside the present ones. The answer names the weights that are ready: the present ones if the
    /// worker has no memory for both.
    ///
    /// # Errors
    /// [`RequestError`]; nothing has changed then.
    pub async fn stage(&self, order: &ReloadOrder) -> Result<WeightsHash, RequestError> {
        let epoch = self.epoch();
        match self.client.request(|id| Ok(ToWorker::Stage(order.to_command(id, epoch)))).await? {
            FromWorker::Staged { weights, .. } => Ok(weights),
            other => Err(other_answer(other)),
        }
    }

    /// Takes other weights.
    ///
    /// # Errors
    /// [`RequestError`]; after [`RequestError::Failed`] the worker still has its old weights, unless the failure is fatal for it.
    pub async fn reload(&self, order: &ReloadOrder) -> Result<Reloaded, RequestError> {
        let epoch = self.epoch();
        match self.client.request(|id| Ok(ToWorker::Reload(order.to_command(id, epoch)))).await? {
            FromWorker::Reloaded(reloaded) => Ok(reloaded),
            other => Err(other_answer(other)),
        }
    }

    /// Asks for a sign of life.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn ping(&self) -> Result<Pong, RequestError> {
        match self.client.request(|id| Ok(ToWorker::Ping { id })).await? {
            FromWorker::Pong(pong) => Ok(pong),
            other => Err(other_answer(other)),
        }
    }

    /// Waits until the worker has answered all that it accepted; it accepts nothing more.
    ///
    /// # Errors
    /// [`RequestError`].
    pub async fn drain(&self) -> Result<(), RequestError> {
        match self.client.request(|id| Ok(ToWorker::Drain { id })).await? {
            FromWorker::Drained { .. } => Ok(()),
            other => Err(other_answer(other)),
        }
    }

    /// Tells the worker to exit; [`WorkerClient::closed`] says when it has hung up.
    ///
    /// # Errors
    /// [`RequestError::Lost`] if the connection is over already.
    pub fn shutdown(&self) -> Result<(), RequestError> {
        self.client.notify(&ToWorker::Shutdown)
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

fn other_answer(message: FromWorker) -> RequestError {
    match message {
        FromWorker::Failed(failed) => RequestError::Failed(failed),
        other => RequestError::WrongKind { found: other.kind().to_owned() },
    }
}

impl Placed for FromWorker {
    fn place(&self) -> Place {
        let answer = |id: &RequestId, epoch: Option<Epoch>| Place::Answer { id: *id, epoch };
        match self {
            Self::Hello(_) => Place::Nowhere,
            Self::Proved(Proved { id, epoch, .. }) => answer(id, Some(*epoch)),
            Self::Verified(Verified { id, epoch, .. }) => answer(id, Some(*epoch)),
            Self::Staged { id, epoch, .. } | Self::Reloaded(Reloaded { id, epoch, .. }) => answer(id, Some(*epoch)),
            Self::Pong(Pong { id, epoch, .. }) => answer(id, Some(*epoch)),
            Self::Failed(Failed { id, epoch, .. }) => answer(id, Some(*epoch)),
            Self::Drained { id } => answer(id, None),
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Proved(_) => "proved",
            Self::Verified(_) => "verified",
            Self::Staged { .. } => "staged",
            Self::Reloaded(_) => "reloaded",
            Self::Pong(_) => "pong",
            Self::Drained { .. } => "drained",
            Self::Failed(_) => "failed",
        }
    }
}
