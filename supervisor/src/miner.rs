//! The loop over windows: plan, roll, mine, until told to stop.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use grail_environments::{Environment, EnvironmentId, Split, ThinkingMode};
use grail_protocol::constants::DEADLINE_SLACK_SECONDS;
use grail_protocol::ids::{CheckpointWindow, WindowStart};
use grail_protocol::keys::Keypair;

use crate::beacon::Beacon;
use crate::chain::{Chain, ChainError, Head};
use crate::checkpoints::{CheckpointError, CheckpointRule, Checkpoints, ReadyCheckpoint};
use crate::engine::{Engine, EngineError, Outcome, StopSignals};
use crate::environments::{EnvironmentSource, SourceError};
use crate::fleet::{Fleet, FleetError};
use crate::generation::Generator;
use crate::group::WindowParts;
use crate::journal::Event;
use crate::leftovers;
use crate::offload::Offload;
use crate::plan::WindowPlan;
use crate::progress::Progress;
use crate::record::Recording;
use crate::spool::{self, SpoolError, SpoolHeader};
use crate::state::{StateDir, StateError, WindowRandomness};
use grail_process::with_causes;

/// A miner that cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MineError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// Before the first window nothing runs yet that waiting would help.
    #[error("no window can be mined")]
    FirstCheckpoint(#[source] CheckpointError),
    #[error("no window can be mined")]
    FirstEnvironment(#[source] SourceError),
}

/// Why a window is not mined; the next one may be.
#[derive(Debug, thiserror::Error)]
enum Skipped {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    EnvironmentId(#[from] grail_environments::ParseEnvironmentIdError),
    #[error(transparent)]
    Split(#[from] grail_environments::ParseSplitError),
    #[error(transparent)]
    ThinkingMode(#[from] grail_environments::ParseThinkingModeError),
}

/// A window that is not begun.
#[derive(Debug)]
enum NotBegun {
    Skipped(Skipped),
    Fatal(MineError),
}

impl<E: Into<Skipped>> From<E> for NotBegun {
    fn from(error: E) -> Self {
        Self::Skipped(error.into())
    }
}

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    pub uploaded: Vec<(WindowStart, usize, PathBuf)>,
    pub lost: usize,
    pub skipped: usize,
}

/// The window that is not mined although its time has come, and why: its verdict, if it stays so until it is over.
#[derive(Debug, Default)]
struct Unmined(Option<(WindowStart, String)>);

impl Unmined {
    /// Notes why `window` is not mined yet. Whether that is news.
    fn note(&mut self, window: WindowStart, reason: String) -> bool {
        let noted = Some((window, reason));
        let is_news = self.0 != noted;
        self.0 = noted;
        is_news
    }

    /// Whether something is noted of `window`.
    fn is_of(&self, window: WindowStart) -> bool {
        self.0.as_ref().is_some_and(|(noted, _)| *noted == window)
    }

    /// The window that was noted, if `current` is another one.
    fn over(&mut self, current: WindowStart) -> Option<(WindowStart, String)> {
        self.0.take_if(|(window, _)| *window != current)
    }
}

/// A window whose file is in the store and that is not over.
#[derive(Debug)]
struct Sent {
    window: WindowStart,
    deadline: SystemTime,
    /// Says when another checkpoint turns out to be the window's.
    rule: Arc<dyn CheckpointRule>,
    /// The last window that was done before it.
    before: Option<WindowStart>,
}

/// Everything that mines.
#[derive(Debug)]
pub struct Miner {
    pub state: StateDir,
    pub chain: Arc<dyn Chain>,
    pub beacon: Beacon,
    pub checkpoints: Checkpoints,
    pub environments: Arc<EnvironmentSource>,
    pub engine: Engine,
    pub fleet: Fleet,
    pub signer: Arc<Keypair>,
    pub progress: Arc<Progress>,
    pub recording: Recording,
}

impl Miner {
    /// Mines until `windows` window files are in the store, or until `stop`.
    ///
    /// # Errors
    /// [`MineError`]; what was spooled stays in the spool.
    pub async fn run(&mut self, windows: Option<usize>, stop: StopSignals) -> Result<Summary, MineError> {
        let mut summary = Summary::default();
        let mut done = self.last_uploaded();
        tokio::select! {
            warm = self.warm_up(done) => warm?,
            () = stop.stopping() => {}
        }
        let mut unmined = Unmined::default();
        let mut sent = self.sent_before(done).await?;
        while windows.is_none_or(|windows| summary.uploaded.len() < windows) {
            let next = tokio::select! {
                next = self.next_window(done, &stop) => next?,
                by = late_answer(sent.as_ref()) => {
                    if let Some(Sent { window, deadline, before, .. }) = sent.take() {
                        summary.uploaded.retain(|(uploaded, ..)| *uploaded != window);
                        if self.engine.withdraw(window, deadline).await? {
                            done = before;
                            unmined.note(window, over_before_anew(by));
                        } else {
                            summary.lost += 1;
                        }
                    }
                    continue;
                }
            };
            sent = None;
            let Some(head) = next else { break };
            let window = WindowStart::containing(head.block);
            self.give_up(unmined.over(window), &mut summary);
            let has_checkpoint = AtomicBool::new(false);
            let over = window_over(self.chain.clone(), window);
            let prepared = tokio::select! {
                prepared = self.prepare(window, head, &has_checkpoint) => prepared,
                () = stop.now.cancelled() => break,
                () = over => {
                    let late = if has_checkpoint.load(Ordering::Relaxed) { "environment" } else { "checkpoint" };
                    // What was said before of this window is nearer to the cause.
                    if !unmined.is_of(window) {
                        unmined.note(window, format!("its {late} was not here before the window was over"));
                    }
                    continue;
                }
            };
            let (parts, checkpoint) = match prepared {
                Ok(prepared) => prepared,
                Err(NotBegun::Fatal(error)) => return Err(error),
                Err(NotBegun::Skipped(reason)) => {
                    let reason = with_causes(&reason);
                    if unmined.note(window, reason.clone()) {
                        tracing::warn!(%window, reason, "The window cannot begin yet; trying again while it lasts.");
                    }
                    tokio::select! {
                        () = tokio::time::sleep(self.chain.nominal_block_time()) => {}
                        () = stop.stopping() => break,
                    }
                    continue;
                }
            };
            unmined = Unmined::default();
            let before = done.replace(window);
            self.checkpoints.activate(checkpoint.installed.window).await;
            let fleet = self.fleet.roll(&checkpoint);
            let outcome = match self.engine.run_window(parts.clone(), &stop, fleet).await {
                Err(EngineError::Spool(error @ SpoolError::OtherWindow { .. })) => {
                    self.skip(window, with_causes(&error));
                    summary.skipped += 1;
                    continue;
                }
                outcome => outcome?,
            };
            match outcome {
                Outcome::Uploaded { groups, file, .. } => {
                    summary.uploaded.push((window, groups, file));
                    let (deadline, rule) = (parts.plan.deadline, parts.rule.clone());
                    sent = Some(Sent { window, deadline, rule, before });
                }
                Outcome::Empty { dropped } => {
                    self.skip(window, format!("no group was ready in time, {dropped} were dropped"));
                    summary.skipped += 1;
                }
                Outcome::Lost { .. } => summary.lost += 1,
                // The same window once more, with the checkpoint that is its own.
                Outcome::Superseded { by, .. } => {
                    done = before;
                    unmined.note(window, over_before_anew(by));
                }
            }
            self.checkpoints.let_go();
        }
        self.give_up(unmined.0, &mut summary);
        Ok(summary)
    }

    fn give_up(&mut self, unmined: Option<(WindowStart, String)>, summary: &mut Summary) {
        if let Some((window, reason)) = unmined {
            self.skip(window, reason);
            summary.skipped += 1;
        }
    }

    /// Starts the children on the checkpoint of the first window, before it begins. Nothing runs yet that waiting would help, so
    /// what is wrong is said at once; but what a crash left in the spool of a window goes first, whatever the children do.
    async fn warm_up(&mut self, done: Option<WindowStart>) -> Result<(), MineError> {
        let head = self.chain.head().await?;
        let current = WindowStart::containing(head.block).max(self.chain.first_window());
        let window = if done == Some(current) { current.next() } else { current };
        if self.has_spooled(window) {
            return Ok(());
        }
        let checkpoint = match self.checkpoints.for_window(window).await {
            Ok(checkpoint) => checkpoint,
            Err(error) if error.is_of_the_trainer() => {
                tracing::warn!(%window, error = with_causes(&error), "The first window has no checkpoint to be mined with yet.");
                return Ok(());
            }
            Err(error) => return Err(MineError::FirstCheckpoint(error)),
        };
        self.checkpoints.activate(checkpoint.installed.window).await;
        let environments = self.environments.clone();
        let environment = async { environments.open_of(&checkpoint.policy).await.map_err(MineError::FirstEnvironment) };
        let fleet = async { Ok(self.fleet.roll(&checkpoint).await?) };
        futures::try_join!(fleet, environment).map(drop)
    }

    fn has_spooled(&self, window: WindowStart) -> bool {
        self.spooled(window).is_some() || spool::sent_path_of(&self.engine.spool_dir, window).exists()
    }

    /// The facts of groups of `window` that an earlier life has spooled.
    fn spooled(&self, window: WindowStart) -> Option<SpoolHeader> {
        let folder = &self.engine.spool_dir;
        let places = [spool::sent_path_of(folder, window), spool::path_of(folder, window)];
        let (header, _) = places.iter().find_map(|place| spool::read(place).ok().filter(|read| !read.1.is_empty()))?;
        header
    }

    /// Where the trainer's store does not answer, the checkpoint that an earlier life chose for `window` while it did: what was
    /// spooled with it goes out all the same.
    async fn checkpoint_of_spool(
        &self,
        window: WindowStart,
        error: &CheckpointError,
    ) -> Option<(Arc<ReadyCheckpoint>, SpoolHeader)> {
        let header = self.spooled(window).filter(|header| error.leaves_open(header.checkpoint))?;
        let checkpoint = self.checkpoints.cached(header.checkpoint).await?;
        tracing::warn!(%window, checkpoint = %header.checkpoint, error = with_causes(error),
            "The trainer's store does not answer; the window goes on with the checkpoint that it was begun with.");
        Some((checkpoint, header))
    }

    /// A window whose file is in the store must not be put again: the later object would be the one that counts.
    fn last_uploaded(&self) -> Option<WindowStart> {
        let uploads = crate::journal::uploads(self.state.root());
        let uploads = uploads.inspect_err(|error| tracing::warn!(%error, "The journal cannot be read."));
        uploads.unwrap_or_default().into_keys().next_back()
    }

    /// The window that an earlier life has uploaded, if it is not over: another checkpoint may still turn out to be its own.
    async fn sent_before(&self, done: Option<WindowStart>) -> Result<Option<Sent>, ChainError> {
        let Some(window) = done.filter(|window| spool::sent_path_of(&self.engine.spool_dir, *window).exists()) else {
            return Ok(None);
        };
        if self.chain.head().await?.block >= window.end() {
            return Ok(None);
        }
        let Some(header) = self.spooled(window) else { return Ok(None) };
        let deadline = deadline_of(self.chain.expected_time(window.end()).await?);
        let rule = self.checkpoints.rule(window, header.checkpoint);
        Ok(Some(Sent { window, deadline, rule, before: None }))
    }

    /// Waits for a window after `done`; `None` when told to stop.
    async fn next_window(&self, done: Option<WindowStart>, stop: &StopSignals) -> Result<Option<Head>, ChainError> {
        loop {
            if let Some(step) = self.engine.clock.resync() {
                tracing::warn!(?step, "The system's clock was set.");
            }
            let head = self.chain.head().await?;
            let window = WindowStart::containing(head.block);
            let wanted = match done {
                Some(done) if window <= done => done.next(),
                // The first checkpoint of the local chain is ready for its first whole window only.
                _ if window.block() < self.chain.first_window().block() => self.chain.first_window(),
                // A spool from before a crash goes out even when told to stop.
                _ if stop.is_stopping() && !self.has_spooled(window) => return Ok(None),
                _ => return Ok(Some(head)),
            };
            if stop.is_stopping() {
                return Ok(None);
            }
            let due = self.chain.expected_time(wanted.block()).await?;
            let pause = due.duration_since(self.engine.clock.now()).unwrap_or_default();
            let pause = pause.clamp(Duration::from_millis(10), Duration::from_secs(5));
            tokio::select! {
                () = stop.stopping() => return Ok(None),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn prepare(
        &mut self,
        window: WindowStart,
        head: Head,
        has_checkpoint: &AtomicBool,
    ) -> Result<(Arc<WindowParts>, Arc<ReadyCheckpoint>), NotBegun> {
        let (checkpoint, from_before) = match self.checkpoints.for_window(window).await {
            Ok(checkpoint) => (checkpoint, None),
            Err(error) => match self.checkpoint_of_spool(window, &error).await {
                Some((checkpoint, header)) => (checkpoint, Some((header, error))),
                None => return Err(error.into()),
            },
        };
        has_checkpoint.store(true, Ordering::Relaxed);
        let plan = self.plan(window, head, &checkpoint).await?;
        if let Some((header, error)) = from_before
            && header.is_superseded_by(&SpoolHeader::of(&plan))
        {
            return Err(error.into());
        }
        // What was judged before a crash goes out whether or not anything can be judged now.
        let environment = if self.has_spooled(window) {
            self.environments.open_without_evaluators(plan.environment, plan.split).await?
        } else {
            self.environments.open(plan.environment, plan.split).await?
        };
        self.fleet.ensure_started(&checkpoint).map_err(fatal)?;
        let generator = self
            .fleet
            .generator()
            .ok_or_else(|| fatal(FleetError::Server { reason: "it was never started".to_owned(), exit: None }))?;
        Ok((Arc::new(self.parts(plan, &checkpoint, environment, generator)), checkpoint))
    }

    fn parts(
        &self,
        plan: WindowPlan,
        checkpoint: &ReadyCheckpoint,
        environment: Arc<dyn Environment>,
        generator: Arc<dyn Generator>,
    ) -> WindowParts {
        let prover = self.recording.of_window(&plan, self.fleet.prover());
        let rule = self.checkpoints.rule(plan.window, plan.checkpoint);
        WindowParts {
            plan,
            environment,
            tokenizer: checkpoint.files.tokenizer.clone(),
            template: checkpoint.files.template.clone(),
            eos_token: checkpoint.files.eos_token,
            vocab_size: checkpoint.files.vocab_size,
            max_position_embeddings: checkpoint.files.max_position_embeddings,
            max_model_len: self.fleet.max_model_len(&checkpoint.files) as usize,
            generator,
            prover,
            rule,
            signer: self.signer.clone(),
            progress: self.progress.clone(),
            clock: self.engine.clock.clone(),
            offload: Offload::default(),
            poisonous_dir: self.state.root().join(leftovers::POISONOUS),
        }
    }

    async fn plan(
        &self,
        window: WindowStart,
        head: Head,
        checkpoint: &ReadyCheckpoint,
    ) -> Result<WindowPlan, NotBegun> {
        let policy = &checkpoint.policy;
        let environment: EnvironmentId = policy.env_id.parse().map_err(Skipped::EnvironmentId)?;
        let split = Split::resolve(environment, policy.env_params.split.as_deref())?;
        let thinking: ThinkingMode = policy.thinking_mode.as_str().parse().map_err(Skipped::ThinkingMode)?;
        let window_hash = self.chain.block_hash(window.block()).await.map_err(fatal)?;
        let WindowRandomness { randomness, use_drand, .. } =
            match self.state.window_randomness(window).map_err(fatal)? {
                Some(kept) => kept,
                None => {
                    let (randomness, use_drand) = self.beacon.miner_randomness(&window_hash, head.block);
                    let record = WindowRandomness { window, randomness, use_drand };
                    self.state.keep_window_randomness(&record).map_err(fatal)?;
                    record
                }
            };
        let end = self.chain.expected_time(window.end()).await.map_err(fatal)?;
        Ok(WindowPlan {
            window,
            window_hash,
            hotkey: self.signer.hotkey().clone(),
            randomness,
            use_drand,
            checkpoint: checkpoint.installed.window,
            model_dir: checkpoint.installed.folder.clone(),
            weights: checkpoint.installed.weights_hash,
            model_name: checkpoint.model_name.clone(),
            environment,
            split,
            thinking,
            sampling: policy.generation,
            dtype: self.fleet.dtype(),
            dataset_rows: self.environments.rows_path(environment),
            deadline: deadline_of(end),
        })
    }

    fn skip(&mut self, window: WindowStart, reason: String) {
        tracing::warn!(%window, reason, "Window skipped.");
        self.engine.journal.record(Event::WindowSkipped { window, reason });
    }
}

/// The last moment at which a file counts, of a window that ends at `end`.
fn deadline_of(end: SystemTime) -> SystemTime {
    end - Duration::from_secs_f64(-DEADLINE_SLACK_SECONDS)
}

fn over_before_anew(by: CheckpointWindow) -> String {
    format!("it was over before it could begin anew with checkpoint {by}")
}

/// The checkpoint that turns out to be that of a window whose file is in the store already, if that ever happens.
async fn late_answer(sent: Option<&Sent>) -> CheckpointWindow {
    match sent {
        Some(sent) => sent.rule.other().await,
        None => std::future::pending().await,
    }
}

/// Ends when the chain has left `window`.
async fn window_over(chain: Arc<dyn Chain>, window: WindowStart) {
    loop {
        tokio::time::sleep(chain.nominal_block_time()).await;
        if chain.head().await.is_ok_and(|head| head.block >= window.end()) {
            return;
        }
    }
}

fn fatal(error: impl Into<MineError>) -> NotBegun {
    NotBegun::Fatal(error.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_reason_is_the_verdict_of_a_window_that_is_over() {
        let window = |start| WindowStart::try_from(start).unwrap();
        let mut unmined = Unmined::default();
        assert!(unmined.note(window(3_000), "first".to_owned()));
        assert!(!unmined.note(window(3_000), "first".to_owned()), "said once");
        assert!(unmined.is_of(window(3_000)) && !unmined.is_of(window(3_030)));
        assert!(unmined.note(window(3_000), "second".to_owned()));
        assert_eq!(unmined.over(window(3_000)), None);
        assert_eq!(unmined.over(window(3_030)), Some((window(3_000), "second".to_owned())));
        assert_eq!(unmined.over(window(3_060)), None, "once");
    }
}
