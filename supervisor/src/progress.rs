//! What the miner is doing, for people: a line that follows it on a terminal, one line every few seconds otherwise.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use grail_protocol::constants::ROLLOUTS_PER_PROBLEM;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::journal::Event;

const TERMINAL_TICK: Duration = Duration::from_millis(200);
const PLAIN_TICK: Duration = Duration::from_secs(10);

/// Stage of a group that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Generating,
    Proving,
}

/// What the miner as a whole is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Phase {
    /// Children start on their first checkpoint.
    Starting,
    /// For the next window, or for what it needs.
    Waiting,
    Mining,
    /// The window file is sealed and on its way to the store.
    Uploading,
    /// Children are being ended.
    Ending,
}

impl Phase {
    const ALL: [Self; 5] = [Self::Starting, Self::Waiting, Self::Mining, Self::Uploading, Self::Ending];
}

/// The last window whose file was confirmed in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastUpload {
    pub window: u64,
    pub bytes: usize,
    pub unix_ms: u64,
    /// From the last group to the confirmed file; unset if that is not known.
    #[serde(default)]
    pub took_ms: Option<u64>,
}

/// Counters of the running window.
#[derive(Debug, Default)]
pub struct Progress {
    phase: AtomicU8,
    last_upload: Mutex<Option<LastUpload>>,
    window: AtomicU64,
    blocks_left: AtomicU64,
    generating: AtomicUsize,
    proving: AtomicUsize,
    spooled: AtomicUsize,
    dropped: AtomicUsize,
    workers_ready: AtomicUsize,
    workers: AtomicUsize,
    window_began_ms: AtomicU64,
}

/// One reading of [`Progress`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub window: u64,
    pub blocks_left: u64,
    pub generating: usize,
    pub proving: usize,
    pub spooled: usize,
    pub dropped: usize,
    pub workers_ready: usize,
    pub workers: usize,
    pub rollouts_per_second: f64,
}

impl std::fmt::Display for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "window {} · {} blocks left · groups: {} generating, {} proving, {} spooled, {} dropped · {:.1} rollouts/s · workers {}/{}",
            self.window,
            self.blocks_left,
            self.generating,
            self.proving,
            self.spooled,
            self.dropped,
            self.rollouts_per_second,
            self.workers_ready,
            self.workers,
        )
    }
}

impl Progress {
    /// What is being done.
    #[must_use]
    pub fn phase(&self) -> Phase {
        let number = self.phase.load(Ordering::Relaxed);
        Phase::ALL.into_iter().find(|phase| *phase as u8 == number).unwrap_or(Phase::Starting)
    }

    /// Notes what is being done.
    pub fn enter_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The last window whose file was confirmed in the store, also of an earlier run.
    #[must_use]
    pub fn last_upload(&self) -> Option<LastUpload> {
        self.last_upload.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes an upload of an earlier run.
    pub fn remember_upload(&self, upload: LastUpload) {
        *self.last_upload.lock().unwrap_or_else(PoisonError::into_inner) = Some(upload);
    }

    /// Follows the journal, which hears of every step of a window.
    pub fn note(&self, event: &Event, unix_ms: u64) {
        let phase = match event {
            Event::WindowStarted { .. } => Phase::Mining,
            Event::WindowSealed { .. } => Phase::Uploading,
            Event::WindowUploaded { window, bytes, took_ms, .. } => {
                let (window, bytes, took_ms) = (window.block().0, *bytes, *took_ms);
                self.remember_upload(LastUpload { window, bytes, unix_ms, took_ms });
                Phase::Waiting
            }
            Event::WindowLost { .. } | Event::WindowSkipped { .. } | Event::CheckpointActive { .. } => Phase::Waiting,
            _ => return,
        };
        self.enter_phase(phase);
    }

    /// Starts the counters of a window; `spooled` groups are there from before a restart.
    pub fn begin_window(&self, window: u64, spooled: usize, elapsed_ms: u64) {
        self.window.store(window, Ordering::Relaxed);
        self.spooled.store(spooled, Ordering::Relaxed);
        self.dropped.store(0, Ordering::Relaxed);
        self.window_began_ms.store(elapsed_ms, Ordering::Relaxed);
    }

    /// Notes how much of the window is left.
    pub fn blocks_left(&self, blocks: u64) {
        self.blocks_left.store(blocks, Ordering::Relaxed);
    }

    /// Notes how many of the workers can prove.
    pub fn workers(&self, ready: usize, all: usize) {
        self.workers_ready.store(ready, Ordering::Relaxed);
        self.workers.store(all, Ordering::Relaxed);
    }

    /// Counts a group that is on disk.
    pub fn spooled(&self) {
        self.spooled.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a group that was dropped.
    pub fn dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a group in `stage` until the returned guard goes.
    #[must_use]
    pub fn enter(self: &Arc<Self>, stage: Stage) -> StageGuard {
        self.counter(stage).fetch_add(1, Ordering::Relaxed);
        StageGuard { progress: self.clone(), stage }
    }

    fn counter(&self, stage: Stage) -> &AtomicUsize {
        match stage {
            Stage::Generating => &self.generating,
            Stage::Proving => &self.proving,
        }
    }

    /// Reads all counters; `elapsed_ms` counts from the same start as in [`Progress::begin_window`].
    #[must_use]
    pub fn snapshot(&self, elapsed_ms: u64) -> Snapshot {
        let load = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        let spooled = load(&self.spooled);
        let seconds = elapsed_ms.saturating_sub(self.window_began_ms.load(Ordering::Relaxed)) as f64 / 1e3;
        Snapshot {
            window: self.window.load(Ordering::Relaxed),
            blocks_left: self.blocks_left.load(Ordering::Relaxed),
            generating: load(&self.generating),
            proving: load(&self.proving),
            spooled,
            dropped: load(&self.dropped),
            workers_ready: load(&self.workers_ready),
            workers: load(&self.workers),
            rollouts_per_second: if seconds > 0.0 { (spooled * ROLLOUTS_PER_PROBLEM) as f64 / seconds } else { 0.0 },
        }
    }
}

/// Counts a group in its stage for as long as it lives; a task that is aborted gives it back too.
#[derive(Debug)]
pub struct StageGuard {
    progress: Arc<Progress>,
    stage: Stage,
}

impl StageGuard {
    /// Moves the group to another stage.
    #[must_use]
    pub fn next(self, stage: Stage) -> Self {
        self.progress.enter(stage)
    }
}

impl Drop for StageGuard {
    fn drop(&mut self) {
        self.progress.counter(self.stage).fetch_sub(1, Ordering::Relaxed);
    }
}

/// Shows `progress` on standard error until `stop`; `started` is the zero of its milliseconds.
pub async fn show(progress: Arc<Progress>, started: Instant, stop: CancellationToken) {
    let terminal = std::io::stderr().is_terminal();
    let bar = terminal.then(|| {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        bar
    });
    let mut ticks = tokio::time::interval(if terminal { TERMINAL_TICK } else { PLAIN_TICK });
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = ticks.tick() => {}
        }
        let snapshot = progress.snapshot(elapsed_ms(started));
        if snapshot.window == 0 || progress.phase() != Phase::Mining {
            continue;
        }
        match &bar {
            Some(bar) => {
                bar.set_message(snapshot.to_string());
                bar.tick();
            }
            None => crate::terminal::note(format_args!("{snapshot}")),
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
}

/// Milliseconds since `started`.
#[must_use]
pub fn elapsed_ms(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_given_back_when_a_group_ends_anywhere() {
        let progress = Arc::new(Progress::default());
        progress.begin_window(3_000, 2, 1_000);
        let first = progress.enter(Stage::Generating);
        let second = progress.enter(Stage::Generating).next(Stage::Proving);
        let reading = progress.snapshot(2_000);
        assert_eq!((reading.generating, reading.proving), (1, 1));
        drop((first, second));
        progress.spooled();
        let reading = progress.snapshot(3_000);
        assert_eq!((reading.generating, reading.proving, reading.spooled), (0, 0, 3));
        assert!((reading.rollouts_per_second - 24.0).abs() < 1e-9);
    }

    #[test]
    fn the_journal_tells_what_is_being_done() {
        let window = grail_protocol::ids::WindowStart::try_from(3_000).unwrap();
        let progress = Progress::default();
        assert_eq!((progress.phase(), progress.last_upload()), (Phase::Starting, None));
        let sealed = Event::WindowSealed { window, groups: 1, rollouts: 16, bytes: 9, sha256: String::new() };
        progress.note(&sealed, 1);
        assert_eq!(progress.phase(), Phase::Uploading);
        progress.note(&Event::WindowUploaded { window, key: "k".into(), bytes: 9, took_ms: Some(7) }, 2);
        progress.note(&Event::ServerLost { cause: "c".into() }, 3);
        assert_eq!(progress.phase(), Phase::Waiting);
        assert_eq!(progress.last_upload(), Some(LastUpload { window: 3_000, bytes: 9, unix_ms: 2, took_ms: Some(7) }));
        for phase in Phase::ALL {
            progress.enter_phase(phase);
            assert_eq!(progress.phase(), phase);
        }
    }
}
