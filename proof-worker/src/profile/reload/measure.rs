//! A worker that reloads while two requests are in flight.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use grail_ipc::jobs::{ProveJob, ReloadOrder};
use grail_ipc::messages::Reloaded;
use grail_ipc::{Expected, RequestError, WorkerClient};
use grail_process::{Child, ChildSpec, Signal, spawn};
use grail_protocol::ids::{GroupIndex, TokenId, WeightsHash};
use tokio::sync::Notify;

use crate::cli::ProfileReloadArguments;
use crate::error::WorkerError;
use crate::torch::Shadow;

/// How long the worker may take to load its model.
const CONNECT_LIMIT: Duration = Duration::from_secs(600);
/// Requests that are answered before and after a reload.
const REQUESTS_AROUND: usize = 4;

/// A worker of this program, with a model.
pub(crate) struct Worker {
    child: Child,
    client: WorkerClient,
    /// The weights that requests name.
    weights: Cell<WeightsHash>,
    job: ProveJob,
}

/// One reload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    /// In which the worker could not prove, as it says.
    pub stall: Duration,
    /// From the command to the weights being in place.
    pub total: Duration,
    /// From the command to stage to its answer; unset if nothing was staged.
    pub staging: Option<Duration>,
    /// Longest request while the weights were made ready and took over.
    pub longest_request: Duration,
    pub from_changes: bool,
    pub in_shadow: bool,
}

impl Worker {
    /// Starts a worker with the model in `folder`.
    ///
    /// # Errors
    /// [`WorkerError::StartWorker`] and [`WorkerError::Connect`].
    pub(crate) async fn start(
        arguments: &ProfileReloadArguments,
        (scratch, folder): (&Path, &Path),
        shadow: Shadow,
    ) -> Result<Self, WorkerError> {
        let what = |source| WorkerError::Start { what: "find this program", source };
        let socket = scratch.join("worker.sock");
        let mut line: Vec<OsString> = vec!["serve".into(), "--socket".into(), socket.clone().into()];
        line.extend(["--model".into(), folder.into(), "--device".into(), arguments.device.to_string().into()]);
        let shadow = if shadow == Shadow::Never { "never" } else { "always" };
        line.extend(["--reload-shadow".into(), shadow.into()]);
        if let Some(dtype) = arguments.dtype {
            line.extend(["--dtype".into(), dtype.to_string().into()]);
        }
        if let Some(threads) = arguments.threads {
            line.extend(["--threads".into(), threads.to_string().into()]);
        }
        let spec = ChildSpec::new("worker", std::env::current_exe().map_err(what)?).arguments(line);
        let child = spawn(spec).await.map_err(WorkerError::StartWorker)?;
        let client = WorkerClient::connect(&socket, &Expected::default(), CONNECT_LIMIT)
            .await
            .map_err(|source| WorkerError::Connect { socket, source })?;
        let weights = client.hello().weights.unwrap_or(WeightsHash(0));
        let tokens = |count: u32| (0..count).map(|index| TokenId(index % 200)).collect::<Vec<_>>();
        let job = ProveJob {
            group: GroupIndex(0),
            weights,
            randomness: vec![7; 32],
            eos_token: TokenId(0),
            prompt: tokens(arguments.prompt_tokens),
            completions: vec![tokens(arguments.completion_tokens); arguments.members as usize],
        };
        Ok(Self { child, client, weights: Cell::new(weights), job })
    }

    /// Ends the worker.
    pub(crate) async fn end(self) {
        drop(self.client);
        if self.child.signal(Signal::SIGTERM).is_ok() {
            self.child.wait().await;
        }
    }

    /// Takes weights while nothing is in flight.
    ///
    /// # Errors
    /// [`WorkerError::Reload`].
    pub(crate) async fn take(&self, order: &ReloadOrder) -> Result<Reloaded, WorkerError> {
        let reloaded = self.client.reload(order).await.map_err(WorkerError::Reload)?;
        self.weights.set(reloaded.weights);
        Ok(reloaded)
    }

    /// Times of requests without a reload, two in flight.
    ///
    /// # Errors
    /// [`WorkerError::Request`].
    pub(crate) async fn quiet(&self) -> Result<Vec<Duration>, WorkerError> {
        let requests = Requests::default();
        let is_enough = || requests.times.borrow().len() >= 2 * REQUESTS_AROUND;
        tokio::try_join!(self.lane(&requests, &is_enough), self.lane(&requests, &is_enough))?;
        Ok(requests.times.into_inner())
    }

    /// Takes weights while two requests are in flight.
    ///
    /// # Errors
    /// [`WorkerError::Reload`] and [`WorkerError::Request`].
    pub(crate) async fn reload(&self, order: &ReloadOrder, stages: bool) -> Result<Sample, WorkerError> {
        let requests = Requests::default();
        let is_done = Cell::new(false);
        let is_over = || is_done.get();
        let reload = async {
            requests.until(2).await;
            let staging = if stages {
                let started = Instant::now();
                self.client.stage(order).await.map_err(WorkerError::Reload)?;
                Some(started.elapsed())
            } else {
                None
            };
            let reloaded = self.take(order).await?;
            is_done.set(true);
            Ok::<_, WorkerError>((staging, reloaded))
        };
        let ((staging, reloaded), (), ()) =
            tokio::try_join!(reload, self.lane(&requests, &is_over), self.lane(&requests, &is_over))?;
        Ok(Sample {
            stall: Duration::from_micros(reloaded.stall_us),
            total: Duration::from_micros(reloaded.total_us),
            staging,
            longest_request: requests.times.into_inner().into_iter().max().unwrap_or_default(),
            from_changes: reloaded.from_changes,
            in_shadow: reloaded.in_shadow,
        })
    }

    /// One request after the other until one is answered behind `is_over`.
    async fn lane(&self, requests: &Requests, is_over: &dyn Fn() -> bool) -> Result<(), WorkerError> {
        let mut started = Instant::now();
        loop {
            let job = ProveJob { weights: self.weights.get(), ..self.job.clone() };
            match self.client.prove(&job).await {
                Ok(_) => requests.answered(started.elapsed()),
                // It was behind the swap: it is sent again under the new name, and its time goes on.
                Err(RequestError::Failed(failed)) if failed.code == "wrong_weights" => continue,
                Err(source) => return Err(WorkerError::Request { group: job.group, source }),
            }
            if is_over() {
                return Ok(());
            }
            started = Instant::now();
        }
    }
}

/// Requests that were answered.
#[derive(Default)]
struct Requests {
    times: RefCell<Vec<Duration>>,
    answered: Notify,
}

impl Requests {
    fn answered(&self, time: Duration) {
        self.times.borrow_mut().push(time);
        self.answered.notify_one();
    }

    /// Waits until so many are answered.
    async fn until(&self, count: usize) {
        while self.times.borrow().len() < count {
            self.answered.notified().await;
        }
    }
}
