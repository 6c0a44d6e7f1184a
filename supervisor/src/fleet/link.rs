//! What the fleet asks of a connection to a worker: the seam behind which a simulation stands.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_ipc::jobs::{GroupProof, ProveJob, ReloadOrder, RowFacts, VerifyJob};
use grail_ipc::messages::{ChangeSet, Hello, Pong, Reloaded, TensorChecksum};
use grail_ipc::{LostConnection, RequestError, WorkerClient};
use grail_process::cause::DeathCause;
use grail_protocol::ids::{CheckpointWindow, WeightsHash};

use grail_process::with_causes;

/// The weights that workers should have, and the ways to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub checkpoint: CheckpointWindow,
    pub folder: PathBuf,
    pub weights: WeightsHash,
    /// Of every tensor of the files; none if they are not known.
    pub checksums: Vec<TensorChecksum>,
    /// Ways from earlier weights, oldest first.
    pub changes: Vec<ChangeSet>,
}

impl Target {
    /// A target that is only to be had from its folder.
    #[must_use]
    pub fn from_folder(checkpoint: CheckpointWindow, folder: PathBuf, weights: WeightsHash) -> Self {
        Self { checkpoint, folder, weights, checksums: Vec::new(), changes: Vec::new() }
    }

    /// The order to take these weights; `anew` reads them from the folder even where they are already.
    #[must_use]
    pub fn order(&self, anew: bool) -> ReloadOrder {
        ReloadOrder {
            checkpoint: self.checkpoint,
            folder: self.folder.clone(),
            weights: self.weights,
            checksums: self.checksums.clone(),
            changes: if anew { Vec::new() } else { self.changes.clone() },
            anew,
        }
    }
}

/// A connection to one incarnation of a worker; it ends with the process.
pub trait WorkerLink: fmt::Debug + Send + Sync + 'static {
    /// What the worker said of itself when it was ready.
    fn hello(&self) -> &Hello;

    /// Proves one group.
    fn prove(&self, job: Arc<ProveJob>) -> BoxFuture<'_, Result<GroupProof, RequestError>>;

    /// Makes weights ready beside the present ones; says which are.
    fn stage(&self, order: ReloadOrder) -> BoxFuture<'_, Result<WeightsHash, RequestError>>;

    /// Rolls to other weights.
    fn reload(&self, order: ReloadOrder) -> BoxFuture<'_, Result<Reloaded, RequestError>>;

    /// Recomputes rows.
    fn verify<'l>(&'l self, job: &'l VerifyJob) -> BoxFuture<'l, Result<Vec<RowFacts>, RequestError>>;

    /// Asks for a sign of life.
    fn ping(&self) -> BoxFuture<'_, Result<Pong, RequestError>>;

    /// Waits until the worker has answered all that it accepted; it accepts nothing more.
    fn drain(&self) -> BoxFuture<'_, Result<(), RequestError>>;

    /// Waits for the end of the connection.
    fn closed(&self) -> BoxFuture<'_, LostConnection>;
}

impl WorkerLink for WorkerClient {
    fn hello(&self) -> &Hello {
        Self::hello(self)
    }

    fn prove(&self, job: Arc<ProveJob>) -> BoxFuture<'_, Result<GroupProof, RequestError>> {
        async move { Self::prove(self, &job).await }.boxed()
    }

    fn stage(&self, order: ReloadOrder) -> BoxFuture<'_, Result<WeightsHash, RequestError>> {
        async move { Self::stage(self, &order).await }.boxed()
    }

    fn reload(&self, order: ReloadOrder) -> BoxFuture<'_, Result<Reloaded, RequestError>> {
        async move { Self::reload(self, &order).await }.boxed()
    }

    fn verify<'l>(&'l self, job: &'l VerifyJob) -> BoxFuture<'l, Result<Vec<RowFacts>, RequestError>> {
        Self::verify(self, job).boxed()
    }

    fn ping(&self) -> BoxFuture<'_, Result<Pong, RequestError>> {
        Self::ping(self).boxed()
    }

    fn drain(&self) -> BoxFuture<'_, Result<(), RequestError>> {
        Self::drain(self).boxed()
    }

    fn closed(&self) -> BoxFuture<'_, LostConnection> {
        Self::closed(self).boxed()
    }
}

/// How signs of life are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// Pause between two of them.
    pub every: Duration,
    /// Time for the answer.
    pub limit: Duration,
}

/// Time for the answer to a question that is asked once more.
const SECOND_CHANCE: Duration = Duration::from_secs(1);

impl Default for Heartbeat {
    /// An answer needs no computing; half a minute without one on a busy host means that there will be none.
    fn default() -> Self {
        Self { every: Duration::from_secs(5), limit: Duration::from_secs(30) }
    }
}

impl Heartbeat {
    /// Asks with `ask` until an answer stays away or the connection `closed`; `heard` gets the answers.
    pub async fn watch<T, E: std::error::Error + 'static>(
        self,
        ask: impl Fn() -> BoxFuture<'static, Result<T, E>>,
        closed: BoxFuture<'static, LostConnection>,
        heard: impl Fn(T),
    ) -> DeathCause {
        let beats = async {
            loop {
                tokio::time::sleep(self.every).await;
                let mut answer = tokio::time::timeout(self.limit, ask()).await;
                if answer.is_err() {
                    // After a pause of this process the limit is over before the answer is read, so it asks once more.
                    answer = tokio::time::timeout(self.limit.min(SECOND_CHANCE), ask()).await;
                }
                match answer {
                    Ok(Ok(answer)) => heard(answer),
                    Ok(Err(error)) => return DeathCause::ConnectionLost { detail: with_causes(&error) },
                    Err(_) => return DeathCause::HeartbeatLost,
                }
            }
        };
        tokio::select! {
            biased;
            lost = closed => DeathCause::ConnectionLost { detail: with_causes(&lost) },
            cause = beats => cause,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[derive(Debug, thiserror::Error)]
    #[error("nonsense")]
    struct Nonsense;

    async fn watch(answers: u32, then_nonsense: bool) -> (DeathCause, u32) {
        let (asked, heard) = (Cell::new(0), Cell::new(0));
        let ask = || {
            asked.set(asked.get() + 1);
            match asked.get() <= answers {
                true => async { Ok(()) }.boxed(),
                false if then_nonsense => async { Err(Nonsense) }.boxed(),
                false => std::future::pending().boxed(),
            }
        };
        let closed = std::future::pending().boxed();
        let cause = Heartbeat::default().watch(ask, closed, |()| heard.set(heard.get() + 1)).await;
        (cause, heard.get())
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_stays_away_is_a_lost_heartbeat() {
        assert_eq!(watch(3, false).await, (DeathCause::HeartbeatLost, 3));
    }

    #[tokio::test(start_paused = true)]
    async fn nonsense_is_a_lost_connection() {
        let lost = DeathCause::ConnectionLost { detail: "nonsense".into() };
        assert_eq!(watch(2, true).await, (lost, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_connection_is_noticed_without_a_beat() {
        let closed = async { LostConnection::PeerHungUp }.boxed();
        let ask = || async { Ok::<_, Nonsense>(()) }.boxed();
        let cause = Heartbeat::default().watch(ask, closed, |()| ()).await;
        assert_eq!(cause, DeathCause::ConnectionLost { detail: "peer hung up".into() });
    }
}
