//! One peer: takes its requests, answers signs of life at once and everything else when it is computed.

use std::time::Duration;

use grail_ipc::connection::{Connection, ConnectionError};
use grail_ipc::jobs::{ProveJob, ReloadOrder, RowFacts, VerifyJob};
use grail_ipc::messages::{
    Epoch, Failed, FromWorker, MOST_NON_FINITE, MOST_OUT_OF_MEMORY, Pong, Reloaded, RequestId, Severity, ToWorker,
    Verified,
};
use grail_process::fault::{Act, Armed, Point};
use tokio::sync::mpsc;
use tracing::{debug, error, info};

use crate::compute::{Compute, Outcome, Outcomes, Reload};
use crate::error::WorkerError;
use crate::fault::SpoiltFrame;
use crate::prover::ComputeError;

/// The most requests that are open at once; a supervisor keeps two.
pub(crate) const MOST_OPEN: usize = 64;

/// How long a peer may take to end a worker that has told why it cannot go on. An exit code says less than the answer, and must
/// not be seen before it.
const FAREWELL: Duration = Duration::from_secs(2);

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SessionEnd {
    /// The peer hung up.
    HungUp,
    /// The peer said so.
    Shutdown,
}

/// Serves the peer until it hangs up, says so, or the worker cannot go on.
///
/// # Errors
/// [`WorkerError::Connection`] for nonsense from the peer, [`WorkerError::Poisoned`], [`WorkerError::OutOfMemory`],
/// [`WorkerError::SuspectWeights`] and [`WorkerError::Bug`] for a worker that must be replaced; its answers have been sent then.
pub(crate) async fn serve_peer(
    connection: Connection<FromWorker, ToWorker>,
    compute: &Compute,
    epoch: Epoch,
    faults: &Armed,
) -> Result<SessionEnd, WorkerError> {
    let (outcomes, mut inbox) = mpsc::unbounded_channel();
    let mut session = Session {
        connection,
        compute,
        epoch,
        faults,
        outcomes,
        open: 0,
        reloading: None,
        draining: None,
        out_of_memory: 0,
        non_finite: 0,
        is_mute: false,
    };
    if let Some(act) = faults.reach(Point::Idle)
        && let Next::HangUp = session.inject(act, None).await?
    {
        return Ok(SessionEnd::HungUp);
    }
    loop {
        let Connection { reader, writer } = &mut session.connection;
        tokio::select! {
            written = writer.flush(), if !writer.is_idle() => match written {
                Err(ConnectionError::Write(error)) => {
                    debug!(%error, "Peer hung up before it was answered.");
                    return Ok(SessionEnd::HungUp);
                }
                other => other?,
            },
            message = reader.recv() => match message {
                Ok(Some(ToWorker::Shutdown)) => {
                    info!(open = session.open, "Told to shut down.");
                    return Ok(SessionEnd::Shutdown);
                }
                Ok(Some(message)) => if let Next::HangUp = session.take(message).await? {
                    return Ok(SessionEnd::HungUp);
                },
                Ok(None) => return Ok(SessionEnd::HungUp),
                // A peer that was killed while it wrote is no better than one that hung up.
                Err(ConnectionError::Truncated { .. }) => return Ok(SessionEnd::HungUp),
                Err(error) => return Err(error.into()),
            },
            Some(outcome) = inbox.recv() => {
                match session.answer(outcome).await? {
                    Next::GoOn => {}
                    Next::HangUp => return Ok(SessionEnd::HungUp),
                    Next::End(error) => {
                        session.connection.writer.flush().await?;
                        session.wait_for_the_end().await;
                        return Err(error);
                    }
                }
            }
        }
    }
}

/// What follows from a message or an outcome.
#[derive(Debug)]
enum Next {
    GoOn,
    /// A fault ends the connection.
    HangUp,
    /// The worker cannot go on once the answer is sent.
    End(WorkerError),
}

struct Session<'c> {
    connection: Connection<FromWorker, ToWorker>,
    compute: &'c Compute,
    epoch: Epoch,
    faults: &'c Armed,
    outcomes: Outcomes,
    /// Requests accepted and not yet answered.
    open: usize,
    reloading: Option<RequestId>,
    draining: Option<RequestId>,
    /// Requests in a row for which the device had no memory.
    out_of_memory: u32,
    /// Groups in a row whose hidden states held NaN or infinity.
    non_finite: u32,
    /// A fault: no sign of life is given any more.
    is_mute: bool,
}

impl Session<'_> {
    async fn take(&mut self, message: ToWorker) -> Result<Next, WorkerError> {
        match message {
            ToWorker::Prove(request) => {
                let accepted = self
                    .accept(request.epoch)
                    .and_then(|()| ProveJob::from_request(&request).map_err(|error| bad_request(&error)));
                match accepted {
                    Ok(job) => self.compute.prove(request.id, job, self.outcomes.clone())?,
                    Err(error) => {
                        self.refuse(request.id, &error)?;
                        return Ok(Next::GoOn);
                    }
                }
                self.open += 1;
            }
            ToWorker::Verify(request) => {
                let accepted = self
                    .accept(request.epoch)
                    .and_then(|()| VerifyJob::from_request(&request).map_err(|error| bad_request(&error)));
                match accepted {
                    Ok(job) => self.compute.verify(request.id, job, self.outcomes.clone())?,
                    Err(error) => {
                        self.refuse(request.id, &error)?;
                        return Ok(Next::GoOn);
                    }
                }
                self.open += 1;
            }
            ToWorker::Stage(command) => match self.accept(command.epoch) {
                Ok(()) => {
                    info!(checkpoint = %command.checkpoint, weights = %command.weights, "Making other weights ready.");
                    let order = ReloadOrder::from_command(&command);
                    self.compute.stage(command.id, order, self.outcomes.clone())?;
                    self.open += 1;
                }
                Err(error) => self.refuse(command.id, &error)?,
            },
            ToWorker::Reload(command) => match self.accept_reload(command.epoch) {
                Ok(()) => {
                    let folder = &command.folder;
                    info!(checkpoint = %command.checkpoint, weights = %command.weights, folder, "Reloading.");
                    let order = ReloadOrder::from_command(&command);
                    self.compute.reload(command.id, order, self.outcomes.clone())?;
                    self.reloading = Some(command.id);
                    self.open += 1;
                }
                Err(error) => self.refuse(command.id, &error)?,
            },
            ToWorker::Ping { id } => {
                let pong = FromWorker::Pong(self.pong(id));
                match self.faults.reach(Point::Ping) {
                    Some(Act::Hang) => self.is_mute = true,
                    Some(act) => return self.inject(act, Some(pong)).await,
                    None if self.is_mute => {}
                    None => self.send(&pong)?,
                }
            }
            ToWorker::Drain { id } => {
                self.draining = Some(id);
                self.tell_if_drained()?;
            }
            ToWorker::Welcome(_) | ToWorker::Shutdown => {
                debug!("Peer sent what has no meaning here.");
            }
        }
        Ok(Next::GoOn)
    }

    fn accept(&self, asked: Epoch) -> Result<(), ComputeError> {
        if asked != self.epoch {
            return Err(ComputeError::WrongEpoch { asked: asked.0, ours: self.epoch.0 });
        }
        if self.draining.is_some() {
            return Err(ComputeError::Draining);
        }
        if self.open >= MOST_OPEN {
            return Err(ComputeError::QueueFull { open: self.open, most: MOST_OPEN });
        }
        Ok(())
    }

    fn accept_reload(&self, asked: Epoch) -> Result<(), ComputeError> {
        self.accept(asked)?;
        if self.reloading.is_some() {
            return Err(ComputeError::Reload { detail: "another reload is under way".to_owned() });
        }
        Ok(())
    }

    /// Sends what became of a request.
    async fn answer(&mut self, outcome: Outcome) -> Result<Next, WorkerError> {
        self.open = self.open.saturating_sub(1);
        let epoch = self.epoch;
        let mut next = Next::GoOn;
        match outcome {
            Outcome::Proved { id, proof } => {
                next = self.reply(FromWorker::Proved(proof.to_message(id, epoch))).await?;
            }
            Outcome::Verified { id, weights, rows } => {
                let rows = rows.iter().map(RowFacts::to_message).collect();
                next = self.reply(FromWorker::Verified(Verified { id, epoch, weights, rows })).await?;
            }
            Outcome::Staged { id, weights } => self.send(&FromWorker::Staged { id, epoch, weights })?,
            Outcome::Reloaded { id, reload } => {
                self.reloading = None;
                self.send(&FromWorker::Reloaded(reloaded(id, epoch, reload)))?;
            }
            Outcome::Failed { id, error } => {
                if self.reloading == Some(id) {
                    self.reloading = None;
                }
                self.refuse(id, &error)?;
                if let Some(end) = self.end_by(&error) {
                    next = Next::End(end);
                }
            }
        }
        self.tell_if_drained()?;
        Ok(next)
    }

    /// Sends a result, or what a fault leaves of it.
    async fn reply(&mut self, message: FromWorker) -> Result<Next, WorkerError> {
        (self.out_of_memory, self.non_finite) = (0, 0);
        match self.faults.reach(Point::Replying) {
            Some(act) => self.inject(act, Some(message)).await,
            None => self.send(&message).map(|()| Next::GoOn),
        }
    }

    /// Does what a fault says, `message` being what was due; acts of the process come when half of its frame is written.
    async fn inject(&mut self, act: Act, message: Option<FromWorker>) -> Result<Next, WorkerError> {
        let spoilt = SpoiltFrame::of(act, message).map_err(ConnectionError::from)?;
        let writer = &mut self.connection.writer;
        writer.queue_frame(spoilt.before);
        if let Err(error) = writer.flush().await {
            debug!(%error, "Peer hung up before the fault.");
            return Ok(Next::HangUp);
        }
        act.befall_process();
        writer.queue_frame(spoilt.after);
        Ok(if spoilt.hangs_up { Next::HangUp } else { Next::GoOn })
    }

    /// Waits until the peer hangs up or ends this process, as long as it may take for that.
    async fn wait_for_the_end(&mut self) {
        let reader = &mut self.connection.reader;
        let hung_up = async { while let Ok(Some(_)) = reader.recv().await {} };
        if tokio::time::timeout(FAREWELL, hung_up).await.is_err() {
            debug!("The peer did not end this worker.");
        }
    }

    /// Why the worker cannot go on after a request that failed.
    fn end_by(&mut self, error: &ComputeError) -> Option<WorkerError> {
        let detail = error.to_string();
        match error {
            ComputeError::OutOfMemory { .. } => {
                self.out_of_memory += 1;
                if self.out_of_memory < MOST_OUT_OF_MEMORY {
                    return None;
                }
                error!(
                    error = detail,
                    "Out of memory twice in a row; ending so that a worker with less to do can come."
                );
                Some(WorkerError::OutOfMemory { detail })
            }
            ComputeError::NonFinite { .. } => {
                self.non_finite += 1;
                if self.non_finite < MOST_NON_FINITE {
                    return None;
                }
                error!(
                    error = detail,
                    "Twice in a row nothing finite came out; ending so that the weights are loaded again."
                );
                Some(WorkerError::SuspectWeights { detail })
            }
            ComputeError::Poisoned { .. } => Some(WorkerError::Poisoned { detail }),
            ComputeError::WeightsLost { detail } => Some(WorkerError::WeightsLost { detail: detail.clone() }),
            error if error.severity() == Severity::FatalForWorker => Some(WorkerError::Bug { detail }),
            _ => None,
        }
    }

    fn refuse(&mut self, id: RequestId, error: &ComputeError) -> Result<(), WorkerError> {
        let failed = Failed {
            id,
            epoch: self.epoch,
            severity: error.severity(),
            code: error.code().to_owned(),
            detail: error.to_string(),
        };
        self.send(&FromWorker::Failed(failed))
    }

    fn tell_if_drained(&mut self) -> Result<(), WorkerError> {
        match self.draining {
            Some(id) if self.open == 0 => self.send(&FromWorker::Drained { id }),
            _ => Ok(()),
        }
    }

    fn pong(&self, id: RequestId) -> Pong {
        let (groups, rollouts) = self.compute.proved();
        Pong {
            id,
            epoch: self.epoch,
            weights: self.compute.weights(),
            queued: u32::try_from(self.open).unwrap_or(u32::MAX),
            resident_bytes: resident_bytes().unwrap_or_default(),
            groups,
            rollouts,
        }
    }

    fn send(&mut self, message: &FromWorker) -> Result<(), WorkerError> {
        Ok(self.connection.writer.queue(message)?)
    }
}

fn bad_request(error: &grail_ipc::jobs::ShapeError) -> ComputeError {
    let source = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
    ComputeError::BadRequest { detail: format!("{error}{source}") }
}

fn reloaded(id: RequestId, epoch: Epoch, reload: Reload) -> Reloaded {
    let Reload { weights, stall, total, way } = reload;
    Reloaded {
        id,
        epoch,
        weights,
        stall_us: microseconds(stall),
        total_us: microseconds(total),
        from_changes: way.from_changes,
        in_shadow: way.in_shadow,
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Second field of `/proc/self/statm`, in pages.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    pages.checked_mul(u64::try_from(page).ok()?)
}
