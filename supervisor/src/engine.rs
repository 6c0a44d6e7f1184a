//! One window: admit groups while there is time, spool each as it is signed, seal, upload, confirm.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use grail_process::with_causes;
use grail_protocol::constants::{ROLLOUTS_PER_PROBLEM, WINDOW_LENGTH};
use grail_protocol::gate::TimeGate;
use grail_protocol::ids::{BlockNumber, CheckpointWindow, GroupIndex, Hotkey, WindowStart};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::chain::{Chain, ChainError, Head};
use crate::clock::Clock;
use crate::fleet::FleetError;
use crate::generation::GenerationError;
use crate::group::{self, Dropped, WindowParts};
use crate::intake::{Intake, IntakeLimits};
use crate::journal::{Event, Journal};
use crate::proofs::ProofError;
use crate::seal::{self, SealError, Sealed};
use crate::spool::{self, Recovered, Spool, SpoolError, SpoolHeader, SpooledGroup};
use crate::store::{self, UploadError, WindowStore};

/// Bounds of a window that do not come from the protocol.
#[derive(Debug, Clone)]
pub struct Limits {
    /// What is generated at once.
    pub intake: IntakeLimits,
    /// Groups between admission and their record in the spool: what waits to be proved is bounded, too.
    pub open_groups: usize,
    /// Groups a window: beyond 312 further rollouts score nothing.
    pub max_groups: usize,
    /// Estimated size of the file at which admission stops.
    pub max_file_bytes: u64,
}

/// What a window needs apart from its plan.
#[derive(Debug)]
pub struct Engine {
    pub chain: Arc<dyn Chain>,
    pub store: WindowStore,
    pub spool_dir: std::path::PathBuf,
    pub windows_dir: std::path::PathBuf,
    pub limits: Limits,
    pub gate: TimeGate,
    pub journal: Journal,
    pub clock: Clock,
    /// Whose windows these are.
    pub hotkey: Hotkey,
    /// Zero of the progress display's milliseconds.
    pub started: Instant,
}

/// How a window is told to end before its time.
#[derive(Debug, Clone, Default)]
pub struct StopSignals {
    /// Nothing new is begun; what is under way is finished, sealed and uploaded.
    pub drain: CancellationToken,
    /// What is under way is given up; what is spooled is sealed and uploaded.
    pub now: CancellationToken,
}

impl StopSignals {
    /// Whether nothing new may be begun.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.drain.is_cancelled() || self.now.is_cancelled()
    }

    /// Waits until nothing new may be begun.
    pub async fn stopping(&self) {
        tokio::select! {
            () = self.drain.cancelled() => {}
            () = self.now.cancelled() => {}
        }
    }
}

/// How a window ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Uploaded {
        groups: usize,
        bytes: usize,
        key: String,
        file: std::path::PathBuf,
    },
    /// Nothing was there to upload.
    Empty {
        dropped: usize,
    },
    /// There was something, and it is not in the store.
    Lost {
        groups: usize,
        reason: String,
    },
    /// The rule names another checkpoint than the one that the groups were made with; they are set aside.
    Superseded {
        by: CheckpointWindow,
        groups: usize,
    },
}

/// A window that could not be run to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error("no proof worker is left")]
    NoWorkers,
    #[error("the generation server was given up")]
    NoServer,
    #[error(transparent)]
    Fleet(FleetError),
    #[error("sealing task ended abnormally")]
    Task(#[from] tokio::task::JoinError),
}

/// A group that came out of its stages.
type Finished = (GroupIndex, Instant, Result<SpooledGroup, Dropped>);

/// State of the running window.
#[derive(Debug)]
struct Running {
    parts: Arc<WindowParts>,
    spool: Spool,
    groups: Vec<SpooledGroup>,
    dropped: usize,
    next: GroupIndex,
    estimated_bytes: u64,
    tasks: JoinSet<Finished>,
    intake: Arc<Intake>,
    given_up: Option<GivenUp>,
    /// The checkpoint that the rule names instead.
    superseded: Option<CheckpointWindow>,
    /// Groups that were dropped since the last one that was spooled.
    dropped_in_a_row: usize,
    /// No group is admitted before: a cause that drops every group must not burn indexes as fast as it can.
    held_until: Instant,
}

/// What will not come back in this process.
#[derive(Debug)]
enum GivenUp {
    Workers,
    Server,
    /// It never came to have the window's weights.
    Fleet(FleetError),
}

/// How long the store is asked, at least, for a file that may be there.
const LEAST_LOOK: Duration = Duration::from_secs(15);
/// What is kept free for closing a window, in averages of what it took.
const CLOSING_MARGIN: f64 = 1.5;
/// Blocks beside that.
const CLOSING_BLOCKS: f64 = 2.0;
/// Drops in a row after which admission slows down to one group a block.
const MANY_DROPS: usize = 16;
/// How long the server may take to hear that requests are aborted; the upload does not wait for it.
const ABORT_LIMIT: Duration = Duration::from_millis(500);

impl Engine {
    /// Runs one window to its upload, or until `stop`. Groups are admitted once `fleet` is there; what a spool from before a crash
    /// holds goes out even if it never is.
    ///
    /// # Errors
    /// [`EngineError`]; the spool then holds every group that was signed.
    pub async fn run_window(
        &mut self,
        parts: Arc<WindowParts>,
        stop: &StopSignals,
        fleet: impl Future<Output = Result<(), FleetError>>,
    ) -> Result<Outcome, EngineError> {
        if let Some(outcome) = self.resume_sent(&parts).await? {
            return Ok(outcome);
        }
        let head = self.chain.head().await?;
        let is_from_its_begin = head.block.0 <= parts.plan.window.block().0 + 1;
        let mut running = self.begin(parts, head).await?;
        let filled = self.fill(&mut running, stop, fleet).await;
        let closing = Instant::now();
        let given_up = running.given_up.take();
        if running.superseded.is_none() && !running.groups.is_empty() {
            running.superseded = self.last_look(&running.parts).await;
        }
        if let Some(by) = running.superseded {
            filled?;
            return self.set_aside(running, by);
        }
        if running.groups.is_empty() && is_from_its_begin && !stop.is_stopping() {
            // No group was ready in a whole window. If that was for what was measured, nothing would ever correct it.
            self.gate.forget();
        }
        // Whatever ended the window, what is spooled goes out first.
        let outcome = self.finish(running, closing).await;
        // What ended it comes first: a disk that is full fails the spool before it fails the copy of the file.
        filled?;
        let outcome = outcome?;
        match given_up {
            Some(GivenUp::Workers) => Err(EngineError::NoWorkers),
            Some(GivenUp::Server) => Err(EngineError::NoServer),
            Some(GivenUp::Fleet(error)) => Err(EngineError::Fleet(error)),
            None => Ok(outcome),
        }
    }

    /// Another checkpoint that the rule names now, as far as the upload leaves time to ask.
    async fn last_look(&self, parts: &WindowParts) -> Option<CheckpointWindow> {
        let latest = self.clock.instant_of(parts.plan.deadline - self.closing_time());
        match tokio::time::timeout_at(latest, parts.rule.look()).await {
            Ok(other) => other,
            Err(_) => {
                tracing::warn!(window = %parts.plan.window, "No time for a last look at the checkpoints.");
                parts.rule.known()
            }
        }
    }

    async fn begin(&mut self, parts: Arc<WindowParts>, head: Head) -> Result<Running, EngineError> {
        let plan = &parts.plan;
        let header = SpoolHeader::of(plan);
        let (spool, recovered) = self.open_spool(&header)?;
        if let Some((bytes, kept)) = recovered.torn {
            tracing::warn!(window = %plan.window, bytes, kept = %kept.display(), "A torn record was cut off the spool.");
        }
        let next = recovered.groups.iter().map(|group| group.group.0 + 1).max().unwrap_or(0);
        // What was read back from disk is checked like a file that is about to go out; a group that no longer holds is left
        // out, and its index stays used.
        let groups = if recovered.groups.is_empty() {
            Vec::new()
        } else {
            let (groups, parts) = (recovered.groups, parts.clone());
            parts.offload.run(move || seal::seal(groups, &parts)).await??.groups
        };
        let elapsed = crate::progress::elapsed_ms(self.started);
        parts.progress.begin_window(plan.window.block().0, groups.len(), elapsed);
        self.journal.record(Event::WindowStarted {
            window: plan.window,
            block: head.block,
            checkpoint: plan.checkpoint,
            recovered_groups: groups.len(),
        });
        tracing::info!(window = %plan.window, block = %head.block, checkpoint = %plan.checkpoint, weights = %plan.weights,
            recovered_groups = groups.len(), "Window started.");
        let estimated_bytes = groups.iter().map(seal::estimated_bytes).sum();
        Ok(Running {
            parts,
            spool,
            groups,
            dropped: 0,
            next: GroupIndex(next),
            estimated_bytes,
            tasks: JoinSet::new(),
            intake: Arc::default(),
            given_up: None,
            superseded: None,
            dropped_in_a_row: 0,
            held_until: Instant::now(),
        })
    }

    /// Opens the window's spool. One that was begun with another checkpoint or policy, before a late marker and a crash, is of no use,
    /// and neither is a file whose first bytes a loss of power took.
    fn open_spool(&self, header: &SpoolHeader) -> Result<(Spool, Recovered), SpoolError> {
        let path = spool::path_of(&self.spool_dir, header.window);
        match spool::read(&path) {
            Ok((Some(found), groups)) if found.is_superseded_by(header) => {
                let kept = spool::set_aside(&path)?;
                tracing::warn!(window = %header.window, groups = groups.len(), made_with = %found.checkpoint,
                    demanded = %header.checkpoint, made_by = found.policy, policy = header.policy, kept = %kept.display(),
                    "The spool was begun with another checkpoint or policy than the rule names now; it is set aside.");
            }
            Err(error @ SpoolError::NotASpool { .. }) => {
                let kept = spool::set_aside(&path)?;
                tracing::warn!(%error, kept = %kept.display(), "What lies in the spool's place is set aside.");
            }
            _ => {}
        }
        Spool::open(&self.spool_dir, header)
    }

    /// Rollouts of two checkpoints must never be in one file.
    fn set_aside(&mut self, running: Running, by: CheckpointWindow) -> Result<Outcome, EngineError> {
        let Running { parts, spool, groups, .. } = running;
        let (window, groups) = (parts.plan.window, groups.len());
        let kept = spool::set_aside(spool.path())?;
        tracing::warn!(%window, groups, made_with = %parts.plan.checkpoint, demanded = %by, kept = %kept.display(),
            "The rule names another checkpoint for this window; what was made is set aside, and the window begins anew.");
        self.journal.record(Event::WindowRestarted { window, checkpoint: by, groups });
        Ok(Outcome::Superseded { by, groups })
    }

    /// A spool that is closed was about to be uploaded when a crash came, or was uploaded already: nothing is added to it, and what is
    /// in the store is not put again.
    async fn resume_sent(&mut self, parts: &Arc<WindowParts>) -> Result<Option<Outcome>, EngineError> {
        let plan = &parts.plan;
        let (window, closed) = (plan.window, spool::sent_path_of(&self.spool_dir, plan.window));
        let (found, groups) = match spool::read_sent(&self.spool_dir, &SpoolHeader::of(plan)) {
            Ok(Some(sent)) => sent,
            Ok(None) => return Ok(None),
            Err(error @ SpoolError::NotASpool { .. }) => {
                // The store does not let a file be replaced, should there be one.
                let kept = spool::set_aside(&closed)?;
                tracing::warn!(%error, kept = %kept.display(), "What lies in the place of a closed spool is set aside.");
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let key = store::window_key(&plan.hotkey, window);
        tracing::info!(%window, groups = groups.len(), %key, "The window's file may be in the store already.");
        if found.checkpoint != plan.checkpoint {
            let is_gone = self.withdraw(window, plan.deadline).await?;
            let reason = "its file was made with another checkpoint and could not be taken out of the store in time";
            return Ok((!is_gone).then(|| self.lost(window, groups.len(), reason)));
        }
        // To look does no harm behind the deadline.
        let limit = self.clock.instant_of(plan.deadline).max(Instant::now() + LEAST_LOOK);
        let Ok(stored) = tokio::time::timeout_at(limit, self.store.stored(&key)).await else {
            return Ok(Some(self.lost(window, groups.len(), "the store did not answer before the deadline")));
        };
        let Some((content, at)) = stored else {
            return self.send_what_was_closed(parts, &found, groups).await;
        };
        let sent = groups_in(&content).filter(|sent| is_made_of(sent, &groups));
        let Some(sent) = sent else {
            return Ok(Some(self.lost(window, groups.len(), "the store holds another file under its name")));
        };
        if at > plan.deadline {
            return Ok(Some(self.lost(window, sent.len(), "it was stored after the deadline")));
        }
        let (groups, bytes) = (sent.len(), content.len());
        tracing::info!(%window, groups, bytes, %key, "The window is in the store already.");
        self.journal.record(Event::WindowUploaded { window, key: key.to_string(), bytes, took_ms: None });
        let file = seal::keep_copy(&self.windows_dir, parts, &content).unwrap_or_default();
        Ok(Some(Outcome::Uploaded { groups, bytes, key: key.to_string(), file }))
    }

    /// Puts what a crash kept from the store, unless the rule or the policy is another one by now; then the window begins anew.
    async fn send_what_was_closed(
        &mut self,
        parts: &Arc<WindowParts>,
        found: &SpoolHeader,
        groups: Vec<SpooledGroup>,
    ) -> Result<Option<Outcome>, EngineError> {
        let window = parts.plan.window;
        let other = self.last_look(parts).await;
        if other.is_some() || found.is_superseded_by(&SpoolHeader::of(&parts.plan)) {
            let kept = spool::set_aside(&spool::sent_path_of(&self.spool_dir, window))?;
            tracing::warn!(%window, groups = groups.len(), kept = %kept.display(),
                "What was to be uploaded is of another checkpoint or policy by now; it is set aside.");
            return Ok(other.map(|by| {
                self.journal.record(Event::WindowRestarted { window, checkpoint: by, groups: groups.len() });
                Outcome::Superseded { by, groups: groups.len() }
            }));
        }
        let closing = Instant::now();
        // The same bytes, if they are here: whatever the dead process may still bring to the store is then the same file.
        let file = seal::copy_path(&self.windows_dir, parts);
        let copy = std::fs::read(&file).ok().map(Bytes::from);
        match copy
            .and_then(|content| Some((groups_in(&content).filter(|sent| is_made_of(sent, &groups))?.len(), content)))
        {
            Some((sent, content)) => Ok(Some(self.upload(parts, content, (sent, file), closing).await)),
            None => self.send(parts, groups, None, closing).await.map(Some),
        }
    }

    fn lost(&mut self, window: WindowStart, groups: usize, reason: &str) -> Outcome {
        tracing::error!(%window, groups, reason, "The window is lost.");
        self.journal.record(Event::WindowLost { window, reason: reason.to_owned() });
        Outcome::Lost { groups, reason: reason.to_owned() }
    }

    /// Takes a window's file out of the store again, because the rule names another checkpoint for it: a file of the wrong one costs
    /// many windows, none costs this one. Whether it is gone before `deadline`, so that the window may begin anew; if not, it is
    /// tried on for the length of a window, in which validators may still come to see it.
    ///
    /// # Errors
    /// If its spool cannot be set aside.
    pub async fn withdraw(&mut self, window: WindowStart, deadline: SystemTime) -> Result<bool, EngineError> {
        let key = store::window_key(&self.hotkey, window);
        tracing::warn!(%window, %key,
            "The window's file was made with another checkpoint than the rule names now; it is taken out of the store.");
        // First: a crash behind it finds the closed spool of a window that is not uploaded, and comes here again.
        self.journal.record(Event::WindowWithdrawn { window, key: key.to_string() });
        let limit = self.clock.instant_of(deadline);
        let last = limit + self.chain.nominal_block_time().mul_f64(WINDOW_LENGTH as f64);
        let (store, removed) = (self.store.clone(), key.clone());
        let removal = tokio::spawn(tokio::time::timeout_at(last, async move { store.withdraw(&removed).await }));
        let is_gone = matches!(tokio::time::timeout_at(limit, removal).await, Ok(Ok(Ok(()))));
        if !is_gone {
            tracing::error!(%window, %key, "The file is not taken out of the store yet; trying on.");
            return Ok(false);
        }
        let closed = spool::sent_path_of(&self.spool_dir, window);
        // One that could not be closed lies under its own name, and is found to be superseded.
        if closed.exists() {
            let kept = spool::set_aside(&closed)?;
            tracing::info!(%window, kept = %kept.display(), "What was in the withdrawn file is kept for inspection.");
        }
        Ok(true)
    }

    /// Admits groups and spools them until time, the cap or `stop` ends the window.
    async fn fill(
        &mut self,
        running: &mut Running,
        stop: &StopSignals,
        fleet: impl Future<Output = Result<(), FleetError>>,
    ) -> Result<(), EngineError> {
        let mut fleet = std::pin::pin!(fleet);
        let rule = running.parts.rule.clone();
        let mut other = rule.other();
        let mut is_ready = false;
        let intake = running.intake.clone();
        let window = running.parts.plan.window;
        let stragglers = self.straggler_deadline(running.parts.plan.deadline);
        let mut ticks = tokio::time::interval((self.chain.nominal_block_time() / 4).min(Duration::from_secs(1)));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut block = self.observe_head(running).await?;
        loop {
            let open = !stop.is_stopping() && running.given_up.is_none() && WindowStart::containing(block) == window;
            if open && is_ready {
                self.admit(running, block);
            }
            if running.tasks.is_empty() && (!open || !self.may_admit(running, block)) {
                return Ok(());
            }
            tokio::select! {
                biased;
                Some(finished) = running.tasks.join_next() => self.take_result(running, finished)?,
                () = stop.now.cancelled() => return self.give_up_stragglers(running, "told to stop at once").await,
                () = tokio::time::sleep_until(stragglers) => {
                    return self.give_up_stragglers(running, "the upload needs the time that is left").await;
                }
                by = &mut other => {
                    running.superseded = Some(by);
                    return self.give_up_stragglers(running, "the rule names another checkpoint").await;
                }
                () = stop.drain.cancelled(), if open => {}
                // There may be room for another group.
                () = intake.drawn() => {}
                ready = &mut fleet, if !is_ready => {
                    is_ready = true;
                    if let Err(error) = ready {
                        running.given_up = Some(GivenUp::Fleet(error));
                    }
                }
                _ = ticks.tick() => block = self.observe_head(running).await?,
            }
        }
    }

    /// Ends what is under way; what is ready already counts.
    async fn give_up_stragglers(&mut self, running: &mut Running, reason: &str) -> Result<(), EngineError> {
        while let Some(finished) = running.tasks.try_join_next() {
            self.take_result(running, finished)?;
        }
        let aborted = running.tasks.len();
        if aborted == 0 {
            return Ok(());
        }
        tracing::warn!(window = %running.parts.plan.window, aborted, reason, "Groups under way are given up.");
        running.dropped += aborted;
        running.tasks = JoinSet::new();
        let told = tokio::time::timeout(ABORT_LIMIT, running.parts.generator.abort_all()).await;
        if told.is_err() {
            tracing::warn!("The generation server did not take the abort in time.");
        }
        Ok(())
    }

    async fn observe_head(&mut self, running: &Running) -> Result<BlockNumber, EngineError> {
        let head = self.chain.head().await?;
        let since = head.time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.gate.observe_block(head.block, since);
        running.parts.progress.blocks_left(running.parts.plan.window.end().0.saturating_sub(head.block.0));
        Ok(head.block)
    }

    /// What a window needs from its last group to the confirmed file: half more than on average.
    fn closing_time(&self) -> Duration {
        Duration::from_secs_f64((CLOSING_MARGIN * self.gate.upload_seconds()).max(0.0))
    }

    /// Latest moment at which a group may still be waited for: the last look at the checkpoints and the upload lie behind it.
    fn straggler_deadline(&self, deadline: SystemTime) -> Instant {
        let reserve = CLOSING_BLOCKS * self.gate.block_seconds();
        self.clock.instant_of(deadline - self.closing_time() - Duration::from_secs_f64(reserve.max(0.0)))
    }

    fn may_admit(&self, running: &Running, block: BlockNumber) -> bool {
        let underway = running.groups.len() + running.tasks.len();
        let per_group = running.estimated_bytes / (running.groups.len().max(1) as u64);
        let estimate = running.estimated_bytes + per_group * (running.tasks.len() as u64 + 1);
        underway < self.limits.max_groups
            && estimate <= self.limits.max_file_bytes
            && self.gate.admits(running.parts.plan.window, block)
    }

    fn admit(&self, running: &mut Running, block: BlockNumber) {
        while running.intake.has_room(self.limits.intake)
            && running.tasks.len() < self.limits.open_groups
            && Instant::now() >= running.held_until
            && self.may_admit(running, block)
        {
            let (group, parts, admitted) = (running.next, running.parts.clone(), running.intake.admit());
            running.next = GroupIndex(group.0 + 1);
            running.tasks.spawn(async move {
                let began = Instant::now();
                let result = group::run(parts, (group, admitted), block).await;
                (group, began, result)
            });
        }
    }

    fn take_result(
        &mut self,
        running: &mut Running,
        finished: Result<Finished, tokio::task::JoinError>,
    ) -> Result<(), EngineError> {
        match finished {
            Ok(finished) => self.take(running, finished),
            // A defect in one group costs that group.
            Err(error) => {
                tracing::error!(%error, "The task of a group ended abnormally.");
                self.count_drop(running);
                Ok(())
            }
        }
    }

    fn count_drop(&self, running: &mut Running) {
        running.dropped += 1;
        running.dropped_in_a_row += 1;
        if running.dropped_in_a_row >= MANY_DROPS {
            running.held_until = Instant::now() + self.chain.nominal_block_time();
        }
        running.parts.progress.dropped();
    }

    /// Spools a group that is ready, or notes why it was dropped.
    fn take(&mut self, running: &mut Running, finished: Finished) -> Result<(), EngineError> {
        let (group, began, result) = finished;
        let window = running.parts.plan.window;
        match result {
            Ok(signed) => {
                self.gate.record_group(began.elapsed());
                running.spool.append(&signed)?;
                let successes = signed.rollouts.iter().filter(|rollout| rollout.success).count();
                self.journal.record(Event::GroupSpooled { window, group, slot: signed.slot, successes });
                tracing::debug!(%window, %group, slot = signed.slot, successes, "Group spooled.");
                running.estimated_bytes += seal::estimated_bytes(&signed);
                running.groups.push(signed);
                running.dropped_in_a_row = 0;
                running.parts.progress.spooled();
            }
            Err(dropped) => {
                match &dropped {
                    Dropped::Proof(ProofError::NoWorkers) => running.given_up = Some(GivenUp::Workers),
                    Dropped::Generation(GenerationError::NotRunning) => running.given_up = Some(GivenUp::Server),
                    _ => {}
                }
                let reason = with_causes(&dropped);
                tracing::warn!(%window, %group, reason, "Group dropped.");
                self.journal.record(Event::GroupDropped { window, group, reason });
                self.count_drop(running);
            }
        }
        Ok(())
    }

    /// Seals what is spooled and brings it to the store; `closing` is when the last group was taken.
    async fn finish(&mut self, running: Running, closing: Instant) -> Result<Outcome, EngineError> {
        let Running { parts, spool, groups, dropped, .. } = running;
        if groups.is_empty() {
            return Ok(Outcome::Empty { dropped });
        }
        self.send(&parts, groups, Some(spool), closing).await
    }

    /// Seals groups, closes their spool if it is open, and uploads.
    async fn send(
        &mut self,
        parts: &Arc<WindowParts>,
        groups: Vec<SpooledGroup>,
        spool: Option<Spool>,
        closing: Instant,
    ) -> Result<Outcome, EngineError> {
        let window = parts.plan.window;
        let sealed = {
            let parts = parts.clone();
            parts.offload.run(move || seal::seal(groups, &parts)).await??
        };
        let Sealed { content, groups, sha256 } = sealed;
        let groups = groups.len();
        self.journal.record(Event::WindowSealed {
            window,
            groups,
            rollouts: groups * ROLLOUTS_PER_PROBLEM,
            bytes: content.len(),
            sha256,
        });
        // A disk that is full must not keep the window from the store.
        let kept = {
            let (parts, folder, content) = (parts.clone(), self.windows_dir.clone(), content.clone());
            parts.offload.run(move || seal::keep_copy(&folder, &parts, &content)).await?
        };
        let file = kept.as_ref().ok().cloned().unwrap_or_default();
        if let Some(Err(error)) = spool.map(Spool::close) {
            // A crash from here on may put other groups behind the same name; the store refuses to replace a file.
            tracing::error!(%window, error = with_causes(&error), "The spool could not be closed before the upload.");
        }
        let outcome = self.upload(parts, content, (groups, file), closing).await;
        kept?;
        Ok(outcome)
    }

    async fn upload(
        &mut self,
        parts: &WindowParts,
        content: Bytes,
        (groups, file): (usize, std::path::PathBuf),
        closing: Instant,
    ) -> Outcome {
        let (window, bytes) = (parts.plan.window, content.len());
        let key = store::window_key(&parts.plan.hotkey, window);
        let deadline = (parts.plan.deadline, self.clock.instant_of(parts.plan.deadline));
        let stored: Result<(), UploadError> = self.store.put_confirmed(&key, content, deadline).await;
        match stored {
            Ok(()) => {
                let took = closing.elapsed();
                self.gate.record_upload(took);
                let took_ms = u64::try_from(took.as_millis()).ok();
                self.journal.record(Event::WindowUploaded { window, key: key.to_string(), bytes, took_ms });
                tracing::info!(%window, groups, bytes, %key, took_ms, "Window uploaded.");
                Outcome::Uploaded { groups, bytes, key: key.to_string(), file }
            }
            Err(error) => {
                if error.is_for_want_of_time() {
                    self.gate.upload_was_late();
                }
                self.lost(window, groups, &with_causes(&error))
            }
        }
    }
}

/// The groups of a window file; `None` if it is none.
fn groups_in(content: &Bytes) -> Option<HashSet<i64>> {
    let file = grail_protocol::window_file::read_bytes(content.clone()).ok()?;
    Some(file.rows.iter().filter_map(|row| row.rollout_group).collect())
}

/// Whether a file's groups are all of ours; those that did not pass the last check are not in it.
fn is_made_of(sent: &HashSet<i64>, groups: &[SpooledGroup]) -> bool {
    !sent.is_empty() && sent.iter().all(|sent| groups.iter().any(|group| group.group.0 == *sent))
}

/// Bounds for a generation server that is kept at `requests`, and `workers` that prove: what is generated ahead of the proofs is as
/// much again as what is being generated. `groups` are an operator's bound of those in generation.
#[must_use]
pub fn flow_limits(requests: usize, groups: Option<usize>, workers: usize) -> (IntakeLimits, usize) {
    let at_once = requests.div_ceil(ROLLOUTS_PER_PROBLEM);
    let generating = groups.map_or(at_once, |groups| groups.clamp(1, at_once));
    (IntakeLimits { requests, groups }, 2 * generating + workers * crate::proofs::IN_FLIGHT_PER_WORKER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_open_is_bounded_by_requests_workers_and_the_operator() {
        let limits = |requests, groups, workers| {
            let (intake, open) = flow_limits(requests, groups, workers);
            assert_eq!(intake, IntakeLimits { requests, groups });
            open
        };
        assert_eq!(limits(512, None, 4), 64 + 8);
        assert_eq!(limits(512, Some(72), 4), 64 + 8, "more groups than requests are of no use");
        assert_eq!(limits(512, Some(1), 4), 2 + 8);
        assert_eq!(limits(1, None, 1), 2 + 2);
    }
}
