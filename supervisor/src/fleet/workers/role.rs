//! How the process of a slot is started, reached and watched.

use std::path::PathBuf;
use std::sync::Arc;

use futures::FutureExt;
use grail_ipc::messages::SlotId;
use grail_ipc::socket::RuntimeFolder;
use grail_ipc::{Expected, WorkerClient};
use grail_process::cause::DeathCause;
use grail_process::{Child, ChildSpec, Incarnation, NotReady, Role, StartError};
use tokio::sync::watch;

use super::{SlotFacts, WorkerSettings};
use crate::fleet::child::{self, ChildDefect, not_ready};
use crate::fleet::link::{Heartbeat, Target, WorkerLink};
use crate::fleet::pinning::{self, SlotPin};

/// Tokens of one batch of a worker whose last incarnation ran out of memory: an eighth of the default on a GPU, a quarter on a CPU.
const REDUCED_BATCH_TOKENS: u32 = 4_096;

/// One slot's process.
#[derive(Debug)]
pub(super) struct WorkerRole {
    slot: SlotId,
    pin: SlotPin,
    settings: WorkerSettings,
    runtime: RuntimeFolder,
    target: watch::Receiver<Target>,
    facts: SlotFacts,
    /// How the incarnation that was started last is reached.
    call: Option<(PathBuf, Expected)>,
}

impl WorkerRole {
    pub(super) fn new(
        slot: SlotId,
        settings: WorkerSettings,
        runtime: RuntimeFolder,
        target: watch::Receiver<Target>,
        facts: SlotFacts,
    ) -> Self {
        // There are as many slots as pins.
        let pin = settings.pins.get(slot.0 as usize).cloned().unwrap_or_else(|| SlotPin::cpu(Vec::new()));
        Self { slot, pin, settings, runtime, target, facts, call: None }
    }

    /// Starts on a smaller budget after an incarnation that ran out of memory.
    fn batch_tokens(incarnation: Incarnation) -> Option<String> {
        incarnation.reduced.then(|| REDUCED_BATCH_TOKENS.to_string())
    }

    fn spec(&mut self, incarnation: Incarnation) -> Result<ChildSpec, ChildDefect> {
        let name = format!("worker-{}", self.slot);
        let place = (self.slot, incarnation);
        let (spec, expected, socket) =
            child::serving(&name, (&self.settings.program, &self.settings.variables), &self.runtime, place)?;
        self.call = Some((socket, expected));
        let folder = self.target.borrow().folder.clone();
        let spec = spec
            .argument("--model")
            .argument(folder)
            .arguments(["--device", &self.pin.device, "--dtype", self.settings.dtype])
            .arguments(["--threads".to_owned(), self.settings.threads.to_string()])
            .arguments(
                Self::batch_tokens(incarnation).into_iter().flat_map(|tokens| ["--batch-tokens".to_owned(), tokens]),
            );
        Ok(pinning::confine(pinning::apply(spec, &self.pin), self.settings.delegation.as_deref()))
    }
}

impl Role for WorkerRole {
    type Process = Child;
    type Link = Arc<WorkerClient>;

    async fn start(&mut self, incarnation: Incarnation) -> Result<Child, StartError> {
        Ok(grail_process::spawn(self.spec(incarnation)?).await?)
    }

    fn ready(
        &mut self,
        _: Arc<Child>,
        _: Incarnation,
    ) -> impl Future<Output = Result<Self::Link, NotReady>> + Send + 'static {
        let (call, limit) = (self.call.clone(), self.settings.limits.start);
        async move {
            let Some((socket, expected)) = call else {
                return Err(NotReady(DeathCause::NotSpawned { detail: "it was never described".to_owned() }));
            };
            match WorkerClient::connect(&socket, &expected, limit).await {
                Ok(client) => Ok(Arc::new(client)),
                Err(error) => Err(not_ready(&error)),
            }
        }
    }

    fn watch(&mut self, link: &Self::Link) -> impl Future<Output = DeathCause> + Send + 'static {
        watch_worker(link.clone(), self.settings.limits.heartbeat, self.facts.clone())
    }
}

/// Ends when the worker behind `link` gives no sign of life, or its connection is over.
pub fn watch_worker<L: WorkerLink>(
    link: Arc<L>,
    heartbeat: Heartbeat,
    facts: SlotFacts,
) -> impl Future<Output = DeathCause> + Send + 'static {
    let closed = {
        let link = link.clone();
        async move { link.closed().await }.boxed()
    };
    let ask = move || {
        let link = link.clone();
        async move { link.ping().await }.boxed()
    };
    heartbeat.watch(ask, closed, move |pong| facts.heard(&pong))
}
