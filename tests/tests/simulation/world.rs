//! The miner's own parts on a simulated host.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use futures::future::BoxFuture;
use grail_checkpoint::GenerationParams;
use grail_environments::datasets::{DatasetSettings, HubSettings};
use grail_environments::{Environment, EnvironmentId, NoEvaluator, Split, ThinkingMode, datasets};
use grail_ipc::messages::SlotId;
use grail_process::restart::RestartPolicy;
use grail_protocol::gate::TimeGate;
use grail_protocol::ids::{CheckpointWindow, WeightsHash, WindowStart};
use grail_protocol::keys::{DEMO_HOTKEY_URI, Keypair};
use grail_protocol::randomness;
use grail_supervisor::chain::{Chain, LocalChain, LocalChainSettings};
use grail_supervisor::checkpoints::{CheckpointFiles, CheckpointRule};
use grail_supervisor::clock::Clock;
use grail_supervisor::demo::Demo;
use grail_supervisor::engine::{Engine, EngineError, Limits, StopSignals};
use grail_supervisor::environments::EnvironmentSource;
use grail_supervisor::evaluators::{EvaluatorSettings, Evaluators};
use grail_supervisor::fleet::{FleetError, Heartbeat, Observers, SlotCommand, SlotLimits, Target, WorkerLink, Workers};
use grail_supervisor::group::WindowParts;
use grail_supervisor::intake::IntakeLimits;
use grail_supervisor::journal::{self, Journal};
use grail_supervisor::offload::Offload;
use grail_supervisor::plan::WindowPlan;
use grail_supervisor::progress::Progress;
use grail_supervisor::proofs::ProofQueue;
use grail_supervisor::store::WindowStore;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::generator::{COMPLETION_TOKENS, SimGenerator};
use crate::schedule::Schedule;
use crate::store::SimStore;
use crate::worker::{SimLink, SimRole};

/// What a window is mined with.
#[derive(Debug, Clone)]
pub struct MinedWith {
    pub checkpoint: CheckpointWindow,
    pub weights: WeightsHash,
    pub rule: Arc<dyn CheckpointRule>,
}

/// Far enough in the future that no real clock stamps anything later than a deadline.
const BEGINNING: Duration = Duration::from_secs(4_102_444_800);
/// How long an init system takes to start the supervisor again.
const RESTART: Duration = Duration::from_secs(2);
/// Lives after which a world is stuck.
const MOST_LIVES: usize = 14;

/// How fast a world is, and what its workers are.
#[derive(Debug, Clone)]
pub struct Pace {
    pub block: Duration,
    /// Between the deadline and the end of a window.
    pub slack: Duration,
    /// What latencies and times of the schedule are divided by.
    pub haste: u32,
    pub limits: SlotLimits,
    /// The windows that are mined, with the weights of each.
    pub targets: Vec<(WindowStart, Target)>,
    pub is_virtual: bool,
}

pub fn window(number: u64) -> WindowStart {
    WindowStart::try_from(number).unwrap()
}

impl Pace {
    /// Virtual time and simulated workers: everything is as slow as on a real host.
    fn simulated() -> Self {
        let target = |number, weights| {
            let window = window(number);
            let target = Target::from_folder(checkpoint(window), PathBuf::from("simulated"), weights);
            (window, target)
        };
        Self {
            block: Duration::from_secs(12),
            slack: Duration::from_secs(4),
            haste: 1,
            limits: SlotLimits {
                start: Duration::from_secs(30),
                reload: Duration::from_secs(20),
                prove: Duration::from_secs(60),
                drain: Duration::from_secs(30),
                heartbeat: Heartbeat { every: Duration::from_secs(5), limit: Duration::from_secs(15) },
                restart: RestartPolicy::default(),
                jitter_seed: None,
            },
            targets: vec![target(3_000, WeightsHash(0xa)), target(3_030, WeightsHash(0xb))],
            is_virtual: true,
        }
    }
}

/// What all worlds share: the demo's data set, tokenizer and policy.
pub struct Fixtures {
    _folder: tempfile::TempDir,
    pub demo: Demo,
    pub files: CheckpointFiles,
    pub environment: Arc<dyn Environment>,
    /// Environments over the rows of the demo, read once for all worlds.
    pub environments: Arc<EnvironmentSource>,
    pub signer: Arc<Keypair>,
}

pub fn fixtures() -> &'static Fixtures {
    static FIXTURES: OnceLock<Fixtures> = OnceLock::new();
    FIXTURES.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let demo = Demo::unpack(folder.path()).unwrap();
        let files = CheckpointFiles::read(&demo.first).unwrap();
        let split = Split::resolve(EnvironmentId::Gsm8k, None).unwrap();
        let environment = datasets::embedded(EnvironmentId::Gsm8k, split, Arc::new(NoEvaluator)).unwrap();
        let signer = Arc::new(Keypair::from_uri(DEMO_HOTKEY_URI).unwrap());
        let hub = HubSettings::from_variables(|_| None);
        let settings = demo.datasets(DatasetSettings { hub, sources: BTreeMap::new() });
        let evaluators = Arc::new(Evaluators::new(EvaluatorSettings::default()));
        let environments = Arc::new(EnvironmentSource::new(settings, evaluators));
        Fixtures { _folder: folder, demo, files, environment, environments, signer }
    })
}

/// One simulated host, over all lives of its supervisor.
pub struct World {
    pub schedule: Schedule,
    pub pace: Pace,
    pub folder: tempfile::TempDir,
    pub store: Arc<SimStore>,
    pub now: SystemTime,
    /// Lives that were killed.
    pub crashes: usize,
}

impl World {
    /// A simulated one.
    pub fn new(seed: u64) -> Self {
        let mut pace = Pace::simulated();
        pace.limits.jitter_seed = Some(seed);
        Self::at(Schedule::new(seed), pace, SystemTime::UNIX_EPOCH + BEGINNING)
    }

    /// A world whose clock stands at `now`.
    pub fn at(schedule: Schedule, pace: Pace, now: SystemTime) -> Self {
        // In memory where that is possible: a simulation appends and syncs a great many records.
        let memory = PathBuf::from("/dev/shm");
        let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        Self {
            store: SimStore::new(&schedule.store, schedule.unread),
            schedule,
            pace,
            folder: folder.unwrap(),
            now,
            crashes: 0,
        }
    }

    pub fn state_dir(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    pub fn journal_text(&self) -> String {
        std::fs::read_to_string(self.state_dir().join(journal::FILE)).unwrap_or_default()
    }

    /// Hash of all events with their times. What follows from the signatures is left out: they hold chance by design.
    pub fn journal_hash(&self) -> String {
        let mut hash = Sha256::new();
        for line in self.journal_text().lines() {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            if let Some(event) = line["event"].as_object_mut() {
                event.remove("sha256");
                event.remove("bytes");
            }
            hash.update(line.to_string());
        }
        hex::encode(hash.finalize())
    }

    /// One life of the supervisor after the other, until all windows are over.
    pub fn live_through(&mut self) {
        self.live_through_with(|world, life, target, observers| world.simulated_workers(life, target, observers));
    }

    /// The same with the workers that `start` makes.
    pub fn live_through_with<L: WorkerLink>(&mut self, start: impl Fn(&Self, usize, Target, &Observers) -> Workers<L>) {
        for life in 0..MOST_LIVES {
            // Every life has a runtime of its own: a crash takes all its tasks with it.
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().start_paused(self.pace.is_virtual).build().unwrap();
            let limit = self.schedule.crashes.get(life).map(|limit| *limit / self.pace.haste);
            let (ended, lasted) = runtime.block_on(async {
                let began = Instant::now();
                let run = self.live(life, &start);
                let ended = match limit {
                    Some(limit) => tokio::time::timeout(limit, run).await.ok(),
                    None => Some(run.await),
                };
                (ended, began.elapsed())
            });
            drop(runtime);
            self.now = if self.pace.is_virtual { self.now + lasted + RESTART } else { SystemTime::now() };
            match ended {
                Some(Ok(())) => return,
                // An init system starts the supervisor anew; it comes back for the next window.
                Some(Err(EngineError::NoWorkers | EngineError::Fleet(FleetError::NoWorkers { .. }))) => {}
                Some(Err(error)) => panic!("seed {}: life {life} ended with {error:?}", self.schedule.seed),
                None => {
                    self.crashes += 1;
                    self.tear_spool(life);
                }
            }
        }
        panic!("seed {}: the supervisor does not come to an end", self.schedule.seed);
    }

    /// Leaves part of a record at the end of the newest spool, as a crash in mid-append does.
    pub fn tear_spool(&self, life: usize) {
        let bytes = self.schedule.torn_bytes[life];
        let path = |window| grail_supervisor::spool::path_of(&self.state_dir().join("spool"), window);
        // A spool that is closed is whole: nothing was added to it when the crash came.
        let newest = self.pace.targets.iter().rev().map(|(window, _)| path(*window));
        if let Some(path) = newest.into_iter().find(|path| path.is_file()) {
            let mut content = std::fs::read(&path).unwrap();
            content.extend(std::iter::repeat_n(0x5a, bytes));
            std::fs::write(&path, content).unwrap();
        }
    }

    async fn live<L: WorkerLink>(
        &self,
        life: usize,
        start: impl Fn(&Self, usize, Target, &Observers) -> Workers<L>,
    ) -> Result<(), EngineError> {
        let clock = Clock::starting_at(self.now);
        let chain = self.chain(&clock);
        let observers = self.observers(&clock);
        let mut engine = self.engine(&chain, &clock);
        let mut workers: Option<Workers<L>> = None;
        for (window, target) in &self.pace.targets {
            let window = *window;
            if self.is_uploaded(window) {
                continue;
            }
            tokio::time::sleep_until(clock.instant_of(chain.expected_time(window.block()).await.unwrap())).await;
            if chain.head().await.unwrap().block >= window.end() {
                continue;
            }
            let is_new = workers.is_none();
            let workers = workers.get_or_insert_with(|| {
                let workers = start(self, life, target.clone(), &observers);
                self.obey_operator(life, &workers, &observers);
                workers
            });
            let fleet = async { if is_new { workers.wait_ready().await } else { workers.roll(target.clone()).await } };
            let mined = MinedWith { checkpoint: checkpoint(window), weights: target.weights, rule: Arc::new(NoOther) };
            let parts = self.parts(window, mined, &chain, (&observers, &clock)).await;
            engine.run_window(Arc::new(parts), &StopSignals::default(), fleet).await?;
        }
        if let Some(workers) = workers {
            workers.shut_down().await;
        }
        Ok(())
    }

    pub fn chain(&self, clock: &Clock) -> Arc<LocalChain> {
        let settings = LocalChainSettings { seed: Some("simulation".to_owned()), block_time: Some(self.pace.block) };
        Arc::new(LocalChain::open_or_start(&self.state_dir(), &settings, clock).unwrap())
    }

    /// Whatever children report goes into the journal.
    pub fn observers(&self, clock: &Clock) -> Observers {
        let (notes, mut events) = mpsc::unbounded_channel();
        let mut journal_of_children = Journal::open(&self.state_dir(), clock.clone()).unwrap();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                journal_of_children.record(event);
            }
        });
        Observers { queue: ProofQueue::start(), journal: notes, progress: Arc::new(Progress::default()) }
    }

    pub fn engine(&self, chain: &Arc<LocalChain>, clock: &Clock) -> Engine {
        Engine {
            chain: chain.clone(),
            store: WindowStore::new(self.store.clone(), Duration::from_secs(90)),
            spool_dir: self.state_dir().join("spool"),
            windows_dir: self.state_dir().join("windows"),
            limits: Limits {
                intake: IntakeLimits { requests: 16 * self.schedule.open_groups, groups: None },
                open_groups: 2 * self.schedule.open_groups,
                max_groups: self.schedule.max_groups,
                max_file_bytes: 330 << 20,
            },
            gate: TimeGate::new(1).with_block_time(self.pace.block),
            journal: Journal::open(&self.state_dir(), clock.clone()).unwrap(),
            clock: clock.clone(),
            hotkey: fixtures().signer.hotkey().clone(),
            started: Instant::now(),
        }
    }

    pub fn is_uploaded(&self, window: WindowStart) -> bool {
        journal::uploads(&self.state_dir()).unwrap().contains_key(&window)
    }

    pub fn simulated_workers(&self, life: usize, target: Target, observers: &Observers) -> Workers<SimLink> {
        let schedule = &self.schedule;
        let role = |slot: SlotId, target, facts| SimRole {
            seed: schedule.seed,
            slot,
            target,
            facts,
            heartbeat: self.pace.limits.heartbeat,
            faults: (1..=8).map(|number| schedule.workers.get(&(life, slot.0, number)).copied()).collect(),
        };
        Workers::start_with(schedule.slots, &self.pace.limits, target, observers, role)
    }

    pub fn obey_operator<L: WorkerLink>(&self, life: usize, workers: &Workers<L>, observers: &Observers) {
        for (_, when, slot, restarts) in self.schedule.operator.iter().filter(|order| order.0 == life) {
            let (slot, when, restarts) = (SlotId(*slot), *when / self.pace.haste, *restarts);
            let pause = Duration::from_secs(45) / self.pace.haste;
            let handle = workers.handle(&observers.queue);
            tokio::spawn(async move {
                tokio::time::sleep(when).await;
                // Refused where it has no meaning at that time.
                if restarts {
                    drop(handle.command(slot, SlotCommand::Restart));
                } else {
                    drop(handle.command(slot, SlotCommand::Drain));
                    tokio::time::sleep(pause).await;
                    drop(handle.command(slot, SlotCommand::Release));
                }
            });
        }
    }

    pub async fn parts(
        &self,
        window: WindowStart,
        MinedWith { checkpoint, weights, rule }: MinedWith,
        chain: &LocalChain,
        (observers, clock): (&Observers, &Clock),
    ) -> WindowParts {
        let fixtures = fixtures();
        let window_hash = chain.block_hash(window.block()).await.unwrap();
        let plan = WindowPlan {
            window,
            randomness: randomness::mix_miner(&window_hash, None),
            window_hash,
            hotkey: fixtures.signer.hotkey().clone(),
            use_drand: false,
            checkpoint,
            model_dir: fixtures.demo.first.clone(),
            weights,
            model_name: "simulated".to_owned(),
            environment: EnvironmentId::Gsm8k,
            split: Split::resolve(EnvironmentId::Gsm8k, None).unwrap(),
            thinking: ThinkingMode::Instructed,
            sampling: GenerationParams { max_tokens: COMPLETION_TOKENS as u64, ..fixtures.demo.generation },
            dtype: "float32",
            dataset_rows: Some(fixtures.demo.rows[&EnvironmentId::Gsm8k].clone()),
            deadline: chain.expected_time(window.end()).await.unwrap() - self.pace.slack,
        };
        let outage = self.schedule.outage.map(|(after, lasts)| {
            let from = Instant::now() + after / self.pace.haste;
            (from, from + lasts / self.pace.haste)
        });
        WindowParts {
            plan,
            environment: fixtures.environment.clone(),
            tokenizer: fixtures.files.tokenizer.clone(),
            template: fixtures.files.template.clone(),
            eos_token: fixtures.files.eos_token,
            vocab_size: fixtures.files.vocab_size,
            max_position_embeddings: fixtures.files.max_position_embeddings,
            max_model_len: fixtures.files.max_position_embeddings,
            generator: Arc::new(SimGenerator {
                seed: self.schedule.seed,
                weights,
                bad_samples: self.schedule.bad_samples,
                haste: self.pace.haste,
                outage,
                drawn: AtomicU64::new(0),
            }),
            prover: Arc::new(observers.queue.clone()),
            rule,
            signer: fixtures.signer.clone(),
            progress: observers.progress.clone(),
            clock: clock.clone(),
            offload: Offload::Here,
            poisonous_dir: self.state_dir().join("poisonous"),
        }
    }
}

pub fn checkpoint(window: WindowStart) -> CheckpointWindow {
    CheckpointWindow(window.block().0 - 30)
}

/// The rule never changes its mind.
#[derive(Debug)]
struct NoOther;

impl CheckpointRule for NoOther {
    fn other(&self) -> BoxFuture<'_, CheckpointWindow> {
        std::future::pending().boxed()
    }

    fn known(&self) -> Option<CheckpointWindow> {
        None
    }

    fn look(&self) -> BoxFuture<'_, Option<CheckpointWindow>> {
        async { None }.boxed()
    }
}
