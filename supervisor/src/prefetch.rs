//! Checkpoints ahead of their windows: fetched as soon as they are READY, made ready in the workers, so that the window that
//! needs one finds it there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use grail_process::with_causes;
use grail_protocol::ids::CheckpointWindow;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::chain::{Chain, next_window};
use crate::checkpoints::{CheckpointError, Checkpoints, ReadyCheckpoint};
use crate::environments::EnvironmentSource;
use crate::fleet::{FleetHandle, target_of};
use crate::journal::Event;

/// How often the store is listed: three times in the shortest time between a marker and the window that needs it.
const LONGEST_PAUSE: Duration = Duration::from_secs(12);
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause between two tries of a checkpoint that cannot be fetched.
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// Looks for the checkpoint of the next window all the time. Ends never: abort its task.
#[derive(Debug)]
pub struct Prefetcher {
    pub checkpoints: Checkpoints,
    pub chain: Arc<dyn Chain>,
    pub fleet: FleetHandle,
    pub environments: Arc<EnvironmentSource>,
    pub journal: mpsc::UnboundedSender<Event>,
}

/// A checkpoint that could not be fetched, and when it is tried again.
#[derive(Debug, Clone, Copy)]
struct Failed {
    pause: Duration,
    again: Instant,
}

impl Prefetcher {
    /// Fetches what the next window will need, as soon as it is READY.
    pub async fn run(self) {
        let mut failed: BTreeMap<CheckpointWindow, Failed> = BTreeMap::new();
        let mut fetched = None;
        let mut unlisted = false;
        let pause = self.chain.nominal_block_time().clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        loop {
            tokio::time::sleep(pause).await;
            // The first window's own checkpoint comes first.
            let Some(active) = self.checkpoints.active() else { continue };
            let next = match self.demand().await {
                Ok(next) => next,
                Err(error) => {
                    if !std::mem::replace(&mut unlisted, true) {
                        tracing::warn!(error = with_causes(&error), "The checkpoint of the next window is not known.");
                    }
                    continue;
                }
            };
            unlisted = false;
            let is_due = |next: &CheckpointWindow| failed.get(next).is_none_or(|failed| failed.again <= Instant::now());
            let is_new = |next: &CheckpointWindow| *next != active && Some(*next) != fetched;
            let Some(next) = next.filter(is_new).filter(is_due) else { continue };
            match self.fetch(next, pause).await {
                Some(Ok(ready)) => {
                    fetched = Some(next);
                    failed.remove(&next);
                    self.make_ready(&ready);
                    // Beside: whoever mines relies on the store being listed all the time.
                    let environments = self.environments.clone();
                    tokio::spawn(async move {
                        // The window that needs it says it again.
                        if let Err(error) = environments.open_of(&ready.policy).await {
                            tracing::warn!(checkpoint = %ready.installed.window, error = with_causes(&error),
                                "The environment of the next window cannot be served yet.");
                        }
                    });
                }
                Some(Err(error)) => {
                    let pause = failed.get(&next).map_or(pause, |failed| (failed.pause * 2).min(LONGEST_RETRY));
                    failed.insert(next, Failed { pause, again: Instant::now() + pause });
                    tracing::warn!(checkpoint = %next, error = with_causes(&error), retry_in = ?pause,
                        "The checkpoint of the next window cannot be fetched yet.");
                }
                None => tracing::info!(checkpoint = %next, "Fetching a checkpoint makes room for another one."),
            }
        }
    }

    /// What the rule demands for the window after the present one, as far as markers are there.
    async fn demand(&self) -> Result<Option<CheckpointWindow>, CheckpointError> {
        let Ok(next) = next_window(&*self.chain).await else { return Ok(None) };
        let listing = self.checkpoints.list().await?;
        Ok(listing.resolve(next).map(|choice| choice.checkpoint))
    }

    /// Fetches `next`, unless a window waits for another checkpoint meanwhile, or the next one will. The store is listed all the
    /// time: whoever mines relies on it to hear of late markers.
    async fn fetch(
        &self,
        next: CheckpointWindow,
        pause: Duration,
    ) -> Option<Result<Arc<ReadyCheckpoint>, CheckpointError>> {
        let other_demanded = self.checkpoints.other_demanded(next);
        tokio::select! {
            biased;
            fetched = self.checkpoints.obtain(next) => Some(fetched),
            () = other_demanded => None,
            () = self.other_next(next, pause) => None,
        }
    }

    /// Ends when the rule demands another checkpoint than `next` of the next window.
    async fn other_next(&self, next: CheckpointWindow, pause: Duration) {
        loop {
            tokio::time::sleep(pause).await;
            match self.demand().await {
                Ok(Some(demanded)) if demanded != next => return,
                Ok(_) => {}
                Err(error) => tracing::debug!(error = with_causes(&error), "The store was not listed."),
            }
        }
    }

    fn make_ready(&self, ready: &ReadyCheckpoint) {
        let installed = &ready.installed;
        tracing::info!(checkpoint = %installed.window, weights = %installed.weights_hash,
            "The checkpoint of the next window is on this host.");
        let event = Event::CheckpointInstalled { checkpoint: installed.window, weights: installed.weights_hash };
        // Without a journal nobody asks.
        drop(self.journal.send(event));
        self.fleet.stage(target_of(ready));
    }
}
