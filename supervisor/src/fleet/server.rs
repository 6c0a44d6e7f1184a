//! The generation server, owned by a launcher process: kept running, rolled, and hidden behind one [`Generator`] that waits
//! while there is none.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_ipc::generate_api::CONTEXT_RESERVE_TOKENS;
use grail_ipc::messages::{Backend, ServerSpec, SlotId};
use grail_ipc::socket::RuntimeFolder;
use grail_ipc::{Expected, LauncherClient, LauncherEvent, LauncherEvents, RequestError};
use grail_process::cause::DeathCause;
use grail_process::cgroup::Delegation;
use grail_process::restart::RestartPolicy;
use grail_process::state::State;
use grail_process::{
    Child, ChildEvent, ChildPolicy, ChildSpec, Events, ExitCode, Incarnation, NotReady, Role, Signal, StartError,
    StopPlan, StopTarget, Supervised, supervise,
};
use grail_protocol::ids::TokenId;
use tokio::sync::{Notify, mpsc, watch};

use super::FleetError;
use super::canary::{Canary, CanaryError};
use super::child::{self, not_ready};
use super::conduct::{self, Conduct};
use super::control::{ServerControl, SharedFacts};
use super::link::{Heartbeat, Target};
use super::pinning;
use super::workers::Confirmers;
use crate::generation::{GenerationError, Generator, HttpGenerator, Sample, ServerFacts};
use crate::journal::Event;
use grail_process::with_causes;

/// The launcher's own start: it only opens a socket.
const LAUNCHER_START_LIMIT: Duration = Duration::from_secs(30);
/// How long a launcher may take to stop its server: the whole stop recipe.
const LAUNCHER_STOP_LIMIT: Duration = Duration::from_secs(25);
/// How long a launcher that gives no sign of life may take to stop its server, should it still be able to.
const SICK_LAUNCHER_LIMIT: Duration = Duration::from_secs(3);

/// How the generation server is run.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    pub launcher: PathBuf,
    /// Variables that the launcher must see, wherever they were set.
    pub variables: Vec<(&'static str, String)>,
    pub backend: Backend,
    pub max_model_len: u32,
    pub max_running_requests: Option<u32>,
    pub gpus: Vec<String>,
    pub random_seed: Option<u64>,
    pub threads: Option<u32>,
    pub start_limit: Duration,
    /// Most requests in flight, and how long one may take.
    pub max_concurrent: usize,
    pub request_limit: Duration,
    /// Of the launcher.
    pub heartbeat: Heartbeat,
    pub restart: RestartPolicy,
    /// Control groups for the children, where ours was delegated to us.
    pub delegation: Option<Arc<Delegation>>,
}

/// Facts of a checkpoint that answers are judged by.
#[derive(Debug, Clone, Copy)]
pub struct ModelFacts {
    pub vocab_size: usize,
    pub eos_token: TokenId,
    pub max_position_embeddings: usize,
}

impl ModelFacts {
    /// The longest sequence that a server of this model can be asked for when `configured` is wanted: a server keeps a few
    /// tokens of the model's own limit for itself.
    #[must_use]
    pub fn max_model_len(&self, configured: u32) -> u32 {
        let limit = u32::try_from(self.max_position_embeddings).unwrap_or(u32::MAX);
        configured.min(limit.saturating_sub(CONTEXT_RESERVE_TOKENS))
    }
}

/// The kept server.
#[derive(Debug)]
pub struct Server {
    child: Supervised,
    target: watch::Sender<(Target, ModelFacts)>,
    served: watch::Receiver<Served>,
    generator: Arc<WaitingGenerator>,
    facts: SharedFacts,
    again: Arc<Notify>,
}

/// What the server can do now.
#[derive(Debug, Clone, Default)]
enum Served {
    /// Nothing, but it is being worked on.
    #[default]
    Nothing,
    /// Requests under this label.
    Weights(String, Arc<HttpGenerator>),
    /// Nothing, and nobody works on it any more.
    Never { reason: String, exit: Option<ExitCode> },
}

impl Served {
    fn is_by(&self, generator: &Arc<HttpGenerator>) -> bool {
        matches!(self, Self::Weights(_, serving) if Arc::ptr_eq(serving, generator))
    }
}

impl Server {
    /// Starts launcher and server on `target`.
    #[must_use]
    pub fn start(
        settings: &ServerSettings,
        runtime: &RuntimeFolder,
        target: (Target, ModelFacts),
        confirmers: Confirmers,
        journal: mpsc::UnboundedSender<Event>,
    ) -> Self {
        let (facts, again) = (SharedFacts::default(), Arc::new(Notify::new()));
        let role =
            LauncherRole { settings: settings.clone(), runtime: runtime.clone(), facts: facts.clone(), call: None };
        let policy = ChildPolicy {
            name: "launcher".to_owned(),
            start_limit: LAUNCHER_START_LIMIT,
            restart: settings.restart.clone(),
            stop: StopPlan::terminate(LAUNCHER_STOP_LIMIT),
            // One that was stopped by a signal must first be able to hear; its own end takes the server with it.
            kill: StopPlan::terminate(Duration::ZERO).then(Signal::SIGCONT, StopTarget::Leader, SICK_LAUNCHER_LIMIT),
            last_incarnation: 0,
            jitter_seed: None,
        };
        let (child, events) = supervise(role, policy);
        let (target, wanted) = watch::channel(target);
        let (publish, served) = watch::channel(Served::Nothing);
        let (unfit, misbehaved) = mpsc::unbounded_channel();
        let keeper = Keeper {
            settings: settings.clone(),
            wanted,
            publish,
            journal,
            states: child.states(),
            facts: facts.clone(),
            canary: Canary::new(confirmers),
            again: again.clone(),
            misbehaved,
            failures: 0,
        };
        tokio::spawn(keeper.run(events));
        let generator = Arc::new(WaitingGenerator { served: served.clone(), conduct: Mutex::default(), unfit });
        Self { child, target, served, generator, facts, again }
    }

    pub(super) fn control(&self) -> ServerControl {
        ServerControl { child: self.child.control(), facts: self.facts.clone(), again: self.again.clone() }
    }

    /// The source of completions; it waits while the server is away.
    #[must_use]
    pub fn generator(&self) -> Arc<dyn Generator> {
        self.generator.clone()
    }

    /// Has the server serve `target`, and waits for it.
    ///
    /// # Errors
    /// [`FleetError::Server`] if it was given up.
    pub async fn roll(&self, target: Target, facts: ModelFacts) -> Result<(), FleetError> {
        let label = target.weights.to_string();
        // The same weights once more would only abort what is being sampled.
        self.target.send_if_modified(|wanted| {
            let is_new = wanted.0 != target;
            *wanted = (target, facts);
            is_new
        });
        self.wait_for(&label).await
    }

    /// Waits until the server answers under `label`.
    ///
    /// # Errors
    /// As [`Server::roll`].
    pub async fn wait_for(&self, label: &str) -> Result<(), FleetError> {
        let mut served = self.served.clone();
        let ended = || FleetError::Server { reason: "the launcher's keeper has ended".to_owned(), exit: None };
        let state = served
            .wait_for(|served| match served {
                Served::Nothing => false,
                Served::Weights(serves, _) => serves == label,
                Served::Never { .. } => true,
            })
            .await
            .map_err(|_| ended())?;
        match &*state {
            Served::Never { reason, exit } => Err(FleetError::Server { reason: reason.clone(), exit: *exit }),
            _ => Ok(()),
        }
    }

    /// Ends server and launcher and waits for their end.
    pub async fn shut_down(self) {
        self.child.shut_down().await;
    }
}

/// One launcher after the other, and on each the server.
#[derive(Debug)]
struct Keeper {
    settings: ServerSettings,
    wanted: watch::Receiver<(Target, ModelFacts)>,
    publish: watch::Sender<Served>,
    journal: mpsc::UnboundedSender<Event>,
    states: watch::Receiver<State>,
    facts: SharedFacts,
    canary: Canary,
    /// An operator wants the weights to be read again.
    again: Arc<Notify>,
    misbehaved: mpsc::UnboundedReceiver<Misbehaved>,
    failures: u32,
}

/// Starts of a server that may fail in a row before it is given up.
const MOST_FAILURES: u32 = 5;

impl Keeper {
    async fn run(mut self, mut events: Events<LauncherRole>) {
        while let Some(event) = events.recv().await {
            match event {
                ChildEvent::Started { incarnation, pid } => self.facts.change(|facts| {
                    (facts.pid, facts.epoch) = (Some(pid), incarnation.number);
                }),
                ChildEvent::Ready { link: (client, launcher_events), .. } => {
                    // Ends when the launcher is gone; its death comes as the next event.
                    self.serve(&client, launcher_events).await;
                    self.publish_loss("the launcher is gone");
                }
                ChildEvent::Died { cause, .. } if cause != DeathCause::Requested => {
                    self.publish_loss(&format!("launcher died: {cause}"));
                }
                ChildEvent::GaveUp(reason) => {
                    let exit = child::hopeless_exit(&reason);
                    let reason = format!("launcher was given up: {reason}");
                    self.publish.send_replace(Served::Never { reason, exit });
                }
                _ => {}
            }
        }
    }

    /// Drives one launcher until its connection is over.
    async fn serve(&mut self, client: &Arc<LauncherClient>, mut events: LauncherEvents) {
        // Where a server runs under this launcher.
        let mut url = None;
        // What another launcher failed at says nothing of this one.
        self.failures = 0;
        loop {
            self.wanted.mark_unchanged();
            let (target, facts) = self.wanted.borrow().clone();
            let brought = self.bring(client, &target, facts, &mut url).await;
            let tested = match brought {
                Ok(brought) => self.test(&brought, (&target, facts), client, &mut events).await,
                // A launcher that is gone cannot start a server; how often it may end is counted by its own limit.
                Err(NotBrought::Launcher(RequestError::Lost(lost))) => {
                    tracing::debug!(reason = with_causes(&lost), "The launcher is gone.");
                    return;
                }
                Err(error) => Tested::Unfit(error),
            };
            match tested {
                Tested::Serves => {}
                Tested::OtherWanted => continue,
                Tested::Died(cause) => {
                    url = None;
                    self.publish_loss(&cause);
                    continue;
                }
                Tested::LauncherGone => return,
                Tested::Unfit(error) => {
                    url = None;
                    if !self.recover(client, &error).await {
                        return;
                    }
                    continue;
                }
            }
            let again = self.again.clone();
            tokio::select! {
                biased;
                lost = next_death(&mut events) => match lost {
                    Some(cause) => {
                        url = None;
                        self.publish_loss(&cause);
                    }
                    None => return,
                },
                changed = self.wanted.changed() => if changed.is_err() { return },
                () = again.notified() => tracing::info!("The generation server reads its weights again."),
                Some(reason) = of_the_serving(&mut self.misbehaved, &self.publish) => {
                    // An update would leave the process as it is.
                    url = None;
                    self.publish_loss(&reason);
                    if let Err(error) = client.stop().await {
                        tracing::debug!(error = with_causes(&error), "There was no server to stop.");
                    }
                }
                _ = client.closed() => return,
            }
        }
    }

    /// Starts a server with `target`, or updates the one at `url`.
    async fn bring(
        &self,
        client: &Arc<LauncherClient>,
        target: &Target,
        facts: ModelFacts,
        url: &mut Option<String>,
    ) -> Result<Brought, NotBrought> {
        let label = target.weights.to_string();
        // Under whatever label it served: while its weights change it serves nobody.
        self.publish.send_replace(Served::Nothing);
        let is_update = url.is_some();
        let (address, epoch) = match url.take() {
            Some(address) => (address, client.update(&target.folder, &label).await?),
            None => {
                let server = client.start(self.spec(target, facts, &label)).await?;
                (server.url, server.epoch)
            }
        };
        *url = Some(address.clone());
        tracing::info!(incarnation = epoch.incarnation, weights = epoch.weights, "Generation server has the weights.");
        let facts = ServerFacts {
            url: address,
            weight_version: epoch.weights,
            vocab_size: facts.vocab_size,
            eos_token: facts.eos_token,
        };
        let generator = HttpGenerator::new(facts, self.settings.max_concurrent, self.settings.request_limit);
        let generator = Arc::new(generator.map_err(NotBrought::Client)?);
        Ok(Brought { generator, incarnation: epoch.incarnation, is_update })
    }

    /// Has the server prove that it has the weights, and lets it serve then.
    async fn test(
        &mut self,
        Brought { generator, incarnation, is_update }: &Brought,
        (target, facts): (&Target, ModelFacts),
        client: &Arc<LauncherClient>,
        events: &mut LauncherEvents,
    ) -> Tested {
        if !is_update {
            self.canary.forget();
        }
        let proven = loop {
            let proven = tokio::select! {
                biased;
                lost = next_death(events) => return lost.map_or(Tested::LauncherGone, Tested::Died),
                changed = self.wanted.changed() => match changed {
                    Ok(()) => return Tested::OtherWanted,
                    Err(_) => return Tested::LauncherGone,
                },
                _ = client.closed() => return Tested::LauncherGone,
                proven = self.canary.check(generator, target.weights, facts) => proven,
            };
            match proven {
                // Workers that fail say nothing of the server.
                Err(error @ CanaryError::Confirmation(_)) => {
                    tracing::warn!(error = with_causes(&error), "The canary is tried again.");
                    tokio::time::sleep(CANARY_PAUSE).await;
                }
                proven => break proven,
            }
        };
        match proven {
            Ok(()) => {
                self.failures = 0;
                self.publish_serving(generator, &target.weights.to_string());
                let url = generator.url().to_owned();
                drop(self.journal.send(Event::ServerReady { url, incarnation: *incarnation }));
                Tested::Serves
            }
            Err(error) => {
                if error.is_refuted() {
                    let reason = with_causes(&error);
                    tracing::error!(reason, "The generation server does not have the weights that it says it has.");
                    drop(self.journal.send(Event::ServerRefuted { weights: target.weights, reason }));
                }
                Tested::Unfit(NotBrought::Canary(error))
            }
        }
    }

    /// Makes room for another try; `false` if the launcher is gone.
    async fn recover(&mut self, client: &Arc<LauncherClient>, error: &NotBrought) -> bool {
        let reason = with_causes(error);
        self.publish_loss(&reason);
        self.failures += 1;
        if self.failures >= MOST_FAILURES || error.is_hopeless() {
            self.publish.send_replace(Served::Never { reason, exit: error.exit_code() });
            // Another launcher would fail in the same way; only another checkpoint may not.
            tokio::select! {
                _ = client.closed() => return false,
                changed = self.wanted.changed() => if changed.is_err() { return false },
            }
            self.failures = 0;
            self.publish.send_replace(Served::Nothing);
        }
        // After a failed update nobody knows what the old server holds: the next try starts a fresh one.
        if let Err(error) = client.stop().await {
            tracing::debug!(error = with_causes(&error), "There was no server to stop.");
        }
        tokio::time::sleep(Duration::from_millis(500) * self.failures).await;
        true
    }

    fn spec(&self, target: &Target, facts: ModelFacts, label: &str) -> ServerSpec {
        let max_model_len = facts.max_model_len(self.settings.max_model_len);
        ServerSpec {
            backend: self.settings.backend,
            program: None,
            model_path: target.folder.to_string_lossy().into_owned(),
            weight_version: label.to_owned(),
            max_model_len,
            max_running_requests: self.settings.max_running_requests,
            gpus: self.settings.gpus.clone(),
            random_seed: self.settings.random_seed,
            threads: self.settings.threads,
            start_timeout_s: self.settings.start_limit.as_secs().max(1),
        }
    }

    fn publish_serving(&self, generator: &Arc<HttpGenerator>, label: &str) {
        let url = generator.url().to_owned();
        tracing::info!(url, weights = label, "Generation server serves.");
        self.facts.change(|shown| (shown.url, shown.label) = (Some(url), Some(label.to_owned())));
        self.publish.send_replace(Served::Weights(label.to_owned(), generator.clone()));
    }

    fn publish_loss(&self, cause: &str) {
        let (was_serving, is_over) = match &*self.publish.borrow() {
            Served::Weights(..) => (true, false),
            Served::Nothing => (false, false),
            Served::Never { .. } => (false, true),
        };
        self.facts.change(|facts| {
            facts.label = None;
            facts.deaths += u64::from(was_serving);
            facts.last_death = Some(cause.to_owned());
        });
        if is_over || matches!(&*self.states.borrow(), State::Stopping | State::Dead) {
            return;
        }
        if was_serving {
            tracing::warn!(cause, "The generation server is lost; generation pauses, what is proved is kept.");
            drop(self.journal.send(Event::ServerLost { cause: cause.to_owned() }));
        } else {
            tracing::warn!(cause, "The generation server does not serve.");
        }
        self.publish.send_replace(Served::Nothing);
    }
}

/// A pause before workers are asked again.
const CANARY_PAUSE: Duration = Duration::from_secs(1);

/// A server that says it has the weights.
struct Brought {
    generator: Arc<HttpGenerator>,
    incarnation: u64,
    /// Whether it had other weights before.
    is_update: bool,
}

/// How a server that was brought to its weights stands the test.
enum Tested {
    Serves,
    /// Other weights are wanted meanwhile.
    OtherWanted,
    Died(String),
    LauncherGone,
    Unfit(NotBrought),
}

/// A server that does not have the weights.
#[derive(Debug, thiserror::Error)]
enum NotBrought {
    #[error(transparent)]
    Launcher(#[from] RequestError),
    #[error("make a client of the generation server")]
    Client(#[source] reqwest::Error),
    #[error("the generation server is not proven to have its weights")]
    Canary(#[source] CanaryError),
}

impl NotBrought {
    /// Whether another try would end the same way: the order itself is wrong.
    fn is_hopeless(&self) -> bool {
        matches!(self, Self::Launcher(RequestError::Failed(failed)) if failed.code == BAD_SPEC)
    }

    /// What a launcher's refusal means for us.
    fn exit_code(&self) -> Option<ExitCode> {
        match self {
            Self::Launcher(RequestError::Failed(failed)) if failed.code == BAD_CHECKPOINT => Some(ExitCode::BadData),
            Self::Launcher(RequestError::Failed(failed)) if failed.code == BAD_SPEC => Some(ExitCode::Configuration),
            _ => None,
        }
    }
}

/// Code of the launcher for a folder that cannot be served.
const BAD_CHECKPOINT: &str = "bad_checkpoint";

/// Code of the launcher for an order that no server can fulfil.
const BAD_SPEC: &str = "bad_spec";

/// The next unasked death of the server; `None` when the connection is over.
async fn next_death(events: &mut LauncherEvents) -> Option<String> {
    loop {
        match events.next().await? {
            LauncherEvent::Died { cause, last_lines, .. } => {
                for line in last_lines.iter().rev().take(5).rev() {
                    tracing::warn!(line, "Last lines of the dead server.");
                }
                return Some(cause);
            }
            LauncherEvent::Phase { phase, detail } => tracing::debug!(?phase, detail, "Generation server."),
        }
    }
}

/// A generator that waits for a server that serves.
#[derive(Debug)]
struct WaitingGenerator {
    served: watch::Receiver<Served>,
    /// Of the server that answered last.
    conduct: Mutex<Option<(Weak<HttpGenerator>, Conduct)>>,
    unfit: mpsc::UnboundedSender<Misbehaved>,
}

/// A server whose answers are of no use.
#[derive(Debug)]
struct Misbehaved {
    generator: Arc<HttpGenerator>,
    reason: String,
}

/// Why the server that answers now must be replaced, once it must.
async fn of_the_serving(
    misbehaved: &mut mpsc::UnboundedReceiver<Misbehaved>,
    publish: &watch::Sender<Served>,
) -> Option<String> {
    while let Some(Misbehaved { generator, reason }) = misbehaved.recv().await {
        if publish.borrow().is_by(&generator) {
            return Some(reason);
        }
    }
    None
}

/// Servers that may die under one sample.
const MOST_SERVERS: u32 = 3;
/// A server whose connection broke is known to be lost within this, if it is.
const LOSS_LIMIT: Duration = Duration::from_secs(5);

impl WaitingGenerator {
    async fn serving(&self) -> Result<Arc<HttpGenerator>, GenerationError> {
        let mut served = self.served.clone();
        let state = served
            .wait_for(|served| !matches!(served, Served::Nothing))
            .await
            .map_err(|_| GenerationError::NotRunning)?;
        match &*state {
            Served::Weights(_, generator) => Ok(generator.clone()),
            Served::Nothing | Served::Never { .. } => Err(GenerationError::NotRunning),
        }
    }

    /// Whether `generator`'s server is gone.
    async fn is_lost(&self, generator: &Arc<HttpGenerator>) -> bool {
        let mut served = self.served.clone();
        let replaced = served.wait_for(|served| !served.is_by(generator));
        tokio::time::timeout(LOSS_LIMIT, replaced).await.is_ok()
    }

    /// Counts what an answer says of its server, and has one replaced that misbehaves.
    fn note(&self, generator: &Arc<HttpGenerator>, answer: &Result<Vec<TokenId>, GenerationError>) {
        let Some(is_bad) = answer.as_ref().map_or_else(conduct::is_its_fault, |_| Some(false)) else { return };
        let mut known = self.conduct.lock().unwrap_or_else(PoisonError::into_inner);
        // Of an earlier server, or of one that is being replaced, nobody wants to know.
        if !self.served.borrow().is_by(generator) {
            return;
        }
        let is_of_this = |of: &Weak<HttpGenerator>| std::ptr::eq(of.as_ptr(), Arc::as_ptr(generator));
        let (_, conduct) = match &mut *known {
            Some(known) if is_of_this(&known.0) => known,
            other => other.insert((Arc::downgrade(generator), Conduct::default())),
        };
        if let Some(reason) = conduct.note(is_bad) {
            // The keeper ends with the server only.
            drop(self.unfit.send(Misbehaved { generator: generator.clone(), reason }));
        }
    }

    async fn draw(&self, sample: Sample) -> Result<Vec<TokenId>, GenerationError> {
        let mut servers = 0;
        loop {
            let generator = self.serving().await?;
            servers += 1;
            let answer = generator.sample(sample.clone()).await;
            self.note(&generator, &answer);
            match answer {
                // What a dead server was drawing nobody has seen: the next one draws it anew.
                Err(error) if error.is_of_transport() && servers < MOST_SERVERS && self.is_lost(&generator).await => {
                    tracing::debug!(
                        rid = sample.rid,
                        error = with_causes(&error),
                        "Sampling again on the next server."
                    );
                }
                result => return result,
            }
        }
    }
}

impl Generator for WaitingGenerator {
    fn sample(&self, sample: Sample) -> BoxFuture<'_, Result<Vec<TokenId>, GenerationError>> {
        self.draw(sample).boxed()
    }

    fn abort_all(&self) -> BoxFuture<'_, ()> {
        async move {
            let generator = match &*self.served.borrow() {
                Served::Weights(_, generator) => Some(generator.clone()),
                _ => None,
            };
            if let Some(generator) = generator {
                generator.abort_all().await;
            }
        }
        .boxed()
    }
}

/// The launcher's process.
#[derive(Debug)]
struct LauncherRole {
    settings: ServerSettings,
    runtime: RuntimeFolder,
    facts: SharedFacts,
    call: Option<(PathBuf, Expected)>,
}

impl LauncherRole {
    fn spec(&mut self, incarnation: Incarnation) -> Result<ChildSpec, child::ChildDefect> {
        let place = (SlotId(0), incarnation);
        let (mut spec, expected, socket) =
            child::serving("launcher", (&self.settings.launcher, &self.settings.variables), &self.runtime, place)?;
        // It must run its stop recipe when we die; killed at once it would leave the server's tree to init.
        spec.parent_death_signal = Some(Signal::SIGTERM);
        let Heartbeat { every, limit } = self.settings.heartbeat;
        let spec = spec
            .arguments(["--look-interval-ms".to_owned(), every.as_millis().to_string()])
            .arguments(["--silence-limit-ms".to_owned(), limit.as_millis().to_string()]);
        self.call = Some((socket, expected));
        Ok(pinning::confine(pinning::apply_to_launcher(spec), self.settings.delegation.as_deref()))
    }
}

impl Role for LauncherRole {
    type Process = Child;
    type Link = (Arc<LauncherClient>, LauncherEvents);

    async fn start(&mut self, incarnation: Incarnation) -> Result<Child, StartError> {
        Ok(grail_process::spawn(self.spec(incarnation)?).await?)
    }

    fn watch(&mut self, (client, _): &Self::Link) -> impl Future<Output = DeathCause> + Send + 'static {
        let (client, facts, heartbeat) = (client.clone(), self.facts.clone(), self.settings.heartbeat);
        let closed = {
            let client = client.clone();
            async move { client.closed().await }.boxed()
        };
        let ask = move || {
            let client = client.clone();
            async move { client.ping().await }.boxed()
        };
        heartbeat.watch(ask, closed, move |server| facts.change(|facts| facts.server_pid = server))
    }

    fn ready(
        &mut self,
        _: Arc<Child>,
        _: Incarnation,
    ) -> impl Future<Output = Result<Self::Link, NotReady>> + Send + 'static {
        let call = self.call.clone();
        async move {
            let Some((socket, expected)) = call else {
                return Err(NotReady(DeathCause::NotSpawned { detail: "it was never described".to_owned() }));
            };
            let connected = LauncherClient::connect(&socket, &expected, LAUNCHER_START_LIMIT).await;
            let (client, events) = connected.map_err(|error| not_ready(&error))?;
            Ok((Arc::new(client), events))
        }
    }
}
