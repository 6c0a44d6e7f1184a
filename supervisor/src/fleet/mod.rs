//! The child processes that a miner works with: proof workers and one generation server, rolled from checkpoint to checkpoint
//! as one.

mod canary;
mod child;
mod conduct;
mod control;
mod link;
pub mod pinning;
mod server;
mod workers;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use grail_ipc::WorkerClient;
use grail_ipc::messages::TensorChecksum;
use grail_ipc::socket::{RuntimeFolder, SocketError};
use grail_process::ExitCode;
use grail_protocol::ids::WeightsHash;
use tokio::sync::mpsc;

pub use child::{ChildDefect, sibling_program};
pub use control::{FleetHandle, ServerStatus, SlotCommand, SlotRefused, SlotStatus};
pub use link::{Heartbeat, Target, WorkerLink};
pub use pinning::SlotPin;
pub use server::{ModelFacts, ServerSettings};
pub use workers::{Observers, SlotFacts, SlotLimits, WorkerSettings, Workers, watch_worker};

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
    NoWorkers { reason: String, exit: Option<ExitCode> },
    #[error("the generation server cannot work: {reason}")]
    Server { reason: String, exit: Option<ExitCode> },
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
    controls: Arc<Mutex<control::Controls>>,
}

#[derive(Debug)]
struct Running {
    workers: Workers,
    server: Server,
    /// The weights on which everything was started, until they are there.
    started_on: Option<WeightsHash>,
    /// The weights that everything has.
    rolled: Option<WeightsHash>,
}

/// The weights of a checkpoint and all ways to them.
#[must_use]
pub fn target_of(checkpoint: &ReadyCheckpoint) -> Target {
    let installed = &checkpoint.installed;
    let checksum = |(name, checksum): (&String, &u64)| TensorChecksum { name: name.clone(), checksum: *checksum };
    Target {
        checkpoint: installed.window,
        folder: installed.folder.clone(),
        weights: installed.weights_hash,
        checksums: installed.checksums.iter().map(checksum).collect(),
        changes: checkpoint.changes.clone(),
    }
}

impl Fleet {
    /// A fleet that reports to `journal` and `progress`.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[must_use]
    pub fn new(settings: FleetSettings, journal: mpsc::UnboundedSender<Event>, progress: Arc<Progress>) -> Self {
        let controls = Arc::default();
        Self { settings, queue: ProofQueue::start(), journal, progress, running: None, controls }
    }

    /// The fleet as seen from outside.
    #[must_use]
    pub fn handle(&self) -> FleetHandle {
        FleetHandle { controls: self.controls.clone(), queue: self.queue.clone() }
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

    /// Starts what does not run yet, on `checkpoint`; it is not waited for.
    ///
    /// # Errors
    /// [`FleetError`] if there can be no children at all.
    pub fn ensure_started(&mut self, checkpoint: &ReadyCheckpoint) -> Result<(), FleetError> {
        if self.running.is_none() {
            self.running = Some(self.start(target_of(checkpoint), ModelFacts::of(&checkpoint.files))?);
        }
        Ok(())
    }

    /// Brings workers and server to `checkpoint`. Both have the same weights afterwards, or this fails and nothing may be mined.
    ///
    /// # Errors
    /// [`FleetError`].
    pub async fn roll(&mut self, checkpoint: &ReadyCheckpoint) -> Result<(), FleetError> {
        self.ensure_started(checkpoint)?;
        let Some(running) = &mut self.running else { return Ok(()) };
        let (target, facts) = (target_of(checkpoint), ModelFacts::of(&checkpoint.files));
        if running.rolled == Some(target.weights) {
            // The server may have been lost since; whoever samples waits for it.
            return Ok(());
        }
        running.rolled = None;
        let weights = target.weights;
        let first = running.started_on.take() == Some(weights);
        // A server waits for a worker that confirms its weights, so the first failure ends both.
        let brought = if first {
            let label = weights.to_string();
            futures::try_join!(running.workers.wait_ready(), running.server.wait_for(&label))
        } else {
            futures::try_join!(running.workers.roll(target.clone()), running.server.roll(target, facts))
        };
        if let Err(error) = brought {
            if first {
                self.shut_down().await;
            }
            return Err(error);
        }
        running.rolled = Some(weights);
        let active = Event::CheckpointActive { checkpoint: checkpoint.installed.window, weights };
        // Without a journal nobody asks.
        drop(self.journal.send(active));
        Ok(())
    }

    fn start(&self, target: Target, facts: ModelFacts) -> Result<Running, FleetError> {
        let runtime = RuntimeFolder::create(&self.settings.runtime_dir)?;
        let observers =
            Observers { queue: self.queue.clone(), journal: self.journal.clone(), progress: self.progress.clone() };
        let workers = Workers::start(&self.settings.workers, &runtime, target.clone(), &observers);
        let started_on = Some(target.weights);
        let confirmers = workers.confirmers();
        let server = Server::start(&self.settings.server, &runtime, (target, facts), confirmers, self.journal.clone());
        let controls = control::Controls { slots: workers.controls(), server: Some(server.control()) };
        *self.controls.lock().unwrap_or_else(PoisonError::into_inner) = controls;
        Ok(Running { workers, server, started_on, rolled: None })
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
    let settings = WorkerSettings { pins: settings.pins.iter().take(1).cloned().collect(), ..settings.clone() };
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
    Err(FleetError::NoWorkers { reason, exit: None })
}
