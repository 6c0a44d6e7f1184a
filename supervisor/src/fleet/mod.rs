//! The child processes that a miner works with: proof workers and one generation server, rolled from checkpoint to checkpoint
//! as one.

mod child;
mod control;
mod server;
mod workers;

use std::path::PathBuf;
use std::sync::Arc;

use grail_ipc::WorkerClient;
use grail_ipc::socket::{RuntimeFolder, SocketError};
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use tokio::sync::mpsc;

pub use child::{ChildDefect, sibling_program};
pub use control::{FleetHandle, ServerStatus, SlotCommand, SlotRefused, SlotStatus};
pub use server::{ModelFacts, ServerSettings};
pub use workers::{Observers, Target, WorkerSettings, Workers};

use crate::checkpoints::{CheckpointFiles, ReadyCheckpoint};
use crate::generation::Generator;
use crate::journal::Event;
use crate::progress::Progress;
use crate::proofs::{ProofQueue, Prover};
use server::Server;

/// A fleet that cannot work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FleetError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Child(#[from] ChildDefect),
    #[error("no proof worker can work: {reason}")]
    NoWorkers { reason: String },
    #[error("the generation server cannot work: {reason}")]
    Server { reason: String },
}

impl ModelFacts {
    /// The facts of a checkpoint's files.
    #[must_use]
    pub const fn of(files: &CheckpointFiles) -> Self {
        Self {
            vocab_size: files.vocab_size,
            eos_token: files.eos_token,
            max_position_embeddings: files.max_position_embeddings,
        }
    }
}

/// How children are run.
#[derive(Debug, Clone)]
pub struct FleetSettings {
    /// Folder for sockets, mode 0700.
    pub runtime_dir: PathBuf,
    pub workers: WorkerSettings,
    pub server: ServerSettings,
}

/// All children. Nothing runs before the first [`Fleet::roll`].
#[derive(Debug)]
pub struct Fleet {
    settings: FleetSettings,
    queue: ProofQueue,
    journal: mpsc::UnboundedSender<Event>,
    progress: Arc<Progress>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    workers: Workers,
    server: Server,
    rolled: Option<(CheckpointWindow, WeightsHash)>,
}

impl Fleet {
    /// A fleet that reports to `journal` and `progress`.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[must_use]
    pub fn new(settings: FleetSettings, journal: mpsc::UnboundedSender<Event>, progress: Arc<Progress>) -> Self {
        Self { settings, queue: ProofQueue::start(), journal, progress, running: None }
    }

    /// Dtype of the proofs.
    #[must_use]
    pub const fn dtype(&self) -> &'static str {
        self.settings.workers.dtype
    }

    /// Longest sequence, prompt and completion together, that the server takes with `files`' model.
    #[must_use]
    pub fn max_model_len(&self, files: &CheckpointFiles) -> u32 {
        ModelFacts::of(files).max_model_len(self.settings.server.max_model_len)
    }

    /// Brings workers and server to `checkpoint`; true if that was not so before. Both have the same weights afterwards, or
    /// this fails and nothing may be mined.
    ///
    /// # Errors
    /// [`FleetError`].
    pub async fn roll(&mut self, checkpoint: &ReadyCheckpoint) -> Result<bool, FleetError> {
        let target = Target {
            checkpoint: checkpoint.installed.window,
            folder: checkpoint.installed.folder.clone(),
            weights: checkpoint.installed.weights_hash,
        };
        let facts = ModelFacts::of(&checkpoint.files);
        let key = (target.checkpoint, target.weights);
        let started = self.running.is_some();
        if !started {
            let running = self.start(target.clone(), facts)?;
            self.running = Some(running);
        }
        let Some(running) = &mut self.running else { return Ok(false) };
        let label = target.weights.to_string();
        if running.rolled == Some(key) {
            // The server may have been lost since; whoever samples waits for it.
            return Ok(false);
        }
        running.rolled = None;
        if started {
            let (workers, server) =
                futures::join!(running.workers.roll(target.clone()), running.server.roll(target, facts));
            workers.and(server)?;
        } else {
            let brought = futures::join!(running.workers.wait_ready(), running.server.wait_for(&label));
            if let Err(error) = brought.0.and(brought.1) {
                self.shut_down().await;
                return Err(error);
            }
        }
        if let Some(running) = &mut self.running {
            running.rolled = Some(key);
        }
        Ok(true)
    }

    fn start(&self, target: Target, facts: ModelFacts) -> Result<Running, FleetError> {
        let runtime = RuntimeFolder::create(&self.settings.runtime_dir)?;
        let observers =
            Observers { queue: self.queue.clone(), journal: self.journal.clone(), progress: self.progress.clone() };
        let workers = Workers::start(&self.settings.workers, &runtime, target.clone(), &observers);
        let server = Server::start(&self.settings.server, &runtime, (target, facts), self.journal.clone());
        Ok(Running { workers, server, rolled: None })
    }

    /// Source of completions, waiting while there is no server.
    #[must_use]
    pub fn generator(&self) -> Option<Arc<dyn Generator>> {
        self.running.as_ref().map(|running| running.server.generator())
    }

    /// Maker of proofs.
    #[must_use]
    pub fn prover(&self) -> Arc<dyn Prover> {
        Arc::new(self.queue.clone())
    }

    /// Ends all children and waits for their end.
    pub async fn shut_down(&mut self) {
        if let Some(running) = self.running.take() {
            futures::join!(running.workers.shut_down(), running.server.shut_down());
        }
    }
}

/// One worker for a task beside mining, for instance verification.
///
/// # Errors
/// [`FleetError`] if it does not become ready.
pub async fn single_worker(
    settings: &WorkerSettings,
    runtime_dir: &std::path::Path,
    target: Target,
) -> Result<(Workers, Arc<WorkerClient>), FleetError> {
    let runtime = RuntimeFolder::create(runtime_dir)?;
    let (journal, _) = mpsc::unbounded_channel();
    let observers = Observers { queue: ProofQueue::start(), journal, progress: Arc::new(Progress::default()) };
    let settings = WorkerSettings { slots: 1, ..settings.clone() };
    let expected = target.weights;
    let workers = Workers::start(&settings, &runtime, target, &observers);
    if let Err(error) = workers.wait_ready().await {
        workers.shut_down().await;
        return Err(error);
    }
    let reason = match workers.any() {
        Some(client) if client.hello().weights == Some(expected) => return Ok((workers, client)),
        Some(client) => format!("it loaded weights {:?}, the folder holds {expected}", client.hello().weights),
        None => "it died as soon as it was ready".to_owned(),
    };
    workers.shut_down().await;
    Err(FleetError::NoWorkers { reason })
}
