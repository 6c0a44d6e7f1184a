//! A profile of another process: requests to a worker that serves, two in flight as a supervisor has them.

use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use grail_ipc::jobs::ProveJob;
use grail_ipc::{Expected, WorkerClient};
use tokio::runtime::Runtime;

use super::Plan;
use super::run::{Measured, Sample};
use crate::error::WorkerError;

/// How long the worker may take to load its model.
const CONNECT_LIMIT: Duration = Duration::from_secs(600);

/// Requests that are open at once.
pub(crate) const IN_FLIGHT: u32 = 2;

/// A connection to a worker that serves.
pub(crate) struct Remote {
    runtime: Runtime,
    pub client: WorkerClient,
}

impl Remote {
    /// Connects to the worker that listens at `socket`.
    ///
    /// # Errors
    /// [`WorkerError::Connect`].
    pub(crate) fn connect(socket: &Path) -> Result<Self, WorkerError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| WorkerError::Start { what: "start the I/O runtime", source })?;
        let client = runtime
            .block_on(WorkerClient::connect(socket, &Expected::default(), CONNECT_LIMIT))
            .map_err(|source| WorkerError::Connect { socket: socket.to_owned(), source })?;
        Ok(Self { runtime, client })
    }

    /// Has all groups proved as often as the plan says.
    ///
    /// # Errors
    /// [`WorkerError::Request`] with the group that has no answer.
    pub(crate) fn measure(&self, plan: &Plan, jobs: &[ProveJob]) -> Result<Measured, WorkerError> {
        let repeated = |times: u32| (0..times).flat_map(|_| jobs).collect::<Vec<_>>();
        self.runtime.block_on(async {
            self.ask(&repeated(plan.warm_up)).await?;
            self.ask(&repeated(plan.repeats)).await
        })
    }

    async fn ask(&self, jobs: &[&ProveJob]) -> Result<Measured, WorkerError> {
        let began = Instant::now();
        let next = Cell::new(0);
        let lane = async |lane: u32| {
            let mut samples = Vec::new();
            while let Some(job) = jobs.get(next.replace(next.get() + 1)) {
                let started = Instant::now();
                let failed = |source| WorkerError::Request { group: job.group, source };
                self.client.prove(job).await.map_err(failed)?;
                let (start, length) = (started.duration_since(began), started.elapsed());
                samples.push(Sample { group: job.group, lane, start, length });
            }
            Ok::<_, WorkerError>(samples)
        };
        let (mut samples, others) = tokio::try_join!(lane(0), lane(1))?;
        let wall = began.elapsed();
        samples.extend(others);
        Ok(Measured { samples, wall })
    }

    /// Resident memory of the worker.
    ///
    /// # Errors
    /// [`WorkerError::Lost`].
    pub(crate) fn resident_bytes(&self) -> Result<u64, WorkerError> {
        self.runtime.block_on(self.client.ping()).map(|pong| pong.resident_bytes).map_err(WorkerError::Lost)
    }
}
