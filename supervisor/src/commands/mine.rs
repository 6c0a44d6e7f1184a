//! `mine`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use grail_process::with_causes;
use grail_protocol::ids::WindowStart;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::CommandError;
use super::local::{self, LocalSettings, LocalWorld};
use crate::chain::Chain;
use crate::control::{ControlServer, Facts, Place, socket_base};
use crate::engine::StopSignals;
use crate::journal::{Event, Journal};
use crate::leftovers::{self, Moment};
use crate::miner::{MineError, Miner, Summary};
use crate::progress::{self, Phase};
use crate::shutdown::{Shutdown, Signals, Urgency};
use crate::trainer::LocalTrainer;

/// How often files of old windows are looked for.
const CLEANING_PERIOD: Duration = Duration::from_secs(3_600);

/// Mines in a local world until `windows` are uploaded or it is told to stop.
///
/// # Errors
/// [`CommandError`]; what was spooled stays in the spool.
pub async fn local(settings: &LocalSettings, windows: Option<usize>) -> Result<Summary, CommandError> {
    let shutdown = Shutdown::default();
    let signals = Signals::install().map_err(CommandError::Signals)?;
    let watching = tokio::spawn(signals.watch(shutdown.clone()));
    let mined = tokio::select! {
        mined = mine(settings, windows, &shutdown) => mined,
        // Children have a parent-death signal, and the spool is synced: nothing is left that waiting would save.
        () = shutdown.reached(Urgency::AtOnce) => Err(CommandError::Abandoned),
    };
    watching.abort();
    mined
}

async fn mine(settings: &LocalSettings, windows: Option<usize>, shutdown: &Shutdown) -> Result<Summary, CommandError> {
    let started_at = SystemTime::now();
    let LocalWorld { mut miner, prefetcher, trainer, mut events, progress, started } = local::open(settings).await?;
    let facts = Arc::new(Facts {
        state_dir: miner.state.root().to_owned(),
        started_at,
        started,
        progress: progress.clone(),
        checkpoints: miner.checkpoints.clone(),
        fleet: miner.fleet.handle(),
        shutdown: shutdown.clone(),
    });
    let control = listen(&settings.runtime_base, facts.clone()).await;
    let cleaning = tidy(&miner, settings).await;
    let stop = StopSignals::default();
    let awaited = move || facts.awaited();
    let conducting = tokio::spawn(shutdown.clone().conduct(stop.clone(), settings.shutdown_limit, awaited));
    let hidden = CancellationToken::new();
    let display = tokio::spawn(progress::show(progress.clone(), started, hidden.clone()));
    let publishing = trainer.map(|trainer| tokio::spawn(publish(trainer, miner.chain.clone())));
    let fetching = tokio::spawn(prefetcher.run());
    // The engine writes the journal; what the children report meanwhile goes through a writer of its own.
    let journal_of_children = miner.state.root().to_owned();
    let clock = miner.engine.clock.clone();
    let notes = tokio::spawn(async move {
        let Ok(mut journal) = Journal::open(&journal_of_children, clock) else { return };
        while let Some(event) = events.recv().await {
            journal.record(event);
        }
    });

    let result = miner.run(windows, stop).await;
    // It holds an end of the journal's channel.
    fetching.abort();
    drop(fetching.await);
    hidden.cancel();
    drop(display.await);
    progress.enter_phase(Phase::Ending);
    miner.environments.evaluators().shut_down().await;
    miner.fleet.shut_down().await;
    miner.engine.journal.record(Event::Stopped { reason: reason(&result, shutdown.urgency()) });
    conducting.abort();
    cleaning.abort();
    if let Some(publishing) = publishing {
        publishing.abort();
    }
    // While the state directory is still ours: the socket of the next supervisor must not be taken away.
    if let Some(control) = control {
        control.close().await;
    }
    drop(miner);
    drop(notes.await);
    remove_runtime(local::runtime_dir(&settings.runtime_base, "mine"));
    Ok(result?)
}

fn reason(result: &Result<Summary, MineError>, urgency: Urgency) -> String {
    match (result, urgency) {
        (Err(error), _) => with_causes(error),
        (Ok(_), Urgency::None) => "done".to_owned(),
        (Ok(_), Urgency::Drain) => "told to stop".to_owned(),
        (Ok(_), Urgency::Now | Urgency::AtOnce) => "told to stop now".to_owned(),
    }
}

/// A miner whose operators cannot reach it still mines.
async fn listen(runtime_base: &Path, facts: Arc<Facts>) -> Option<ControlServer> {
    let place = Place::of(&facts.state_dir, runtime_base);
    match ControlServer::open(place, facts).await {
        Ok(server) => Some(server),
        Err(error) => {
            tracing::error!(error = with_causes(&error), "There is no control socket; only signals reach this miner.");
            None
        }
    }
}

/// Reports and removes what earlier runs left, now and every hour from now on.
async fn tidy(miner: &Miner, settings: &LocalSettings) -> JoinHandle<()> {
    let root = miner.state.root().to_owned();
    let chain = miner.chain.clone();
    let current = current_window(&*chain).await;
    let (base, at_start) = (socket_base(&settings.runtime_base), root.clone());
    let first = tokio::task::spawn_blocking(move || {
        leftovers::remove_stale_runtimes(&base)?;
        leftovers::remove_partial(&at_start)?;
        // Without the chain nobody knows what is old.
        current.map_or(Ok(()), |current| leftovers::report(&at_start, current))
    });
    note_failure(first.await);
    let keep = settings.keep_windows;
    tokio::spawn(async move {
        let mut rounds = tokio::time::interval(CLEANING_PERIOD);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            rounds.tick().await;
            let Some(current) = current_window(&*chain).await else { continue };
            let moment = Moment { current, block_time: chain.nominal_block_time(), now: SystemTime::now(), keep };
            let root = root.clone();
            note_failure(tokio::task::spawn_blocking(move || leftovers::clean(&root, &moment)).await);
        }
    })
}

async fn current_window(chain: &dyn Chain) -> Option<WindowStart> {
    let head = chain.head().await.ok()?;
    Some(WindowStart::containing(head.block))
}

fn note_failure<T>(done: Result<std::io::Result<T>, tokio::task::JoinError>) {
    let error = match done {
        Ok(Ok(_)) => return,
        Ok(Err(error)) => with_causes(&error),
        Err(error) => with_causes(&error),
    };
    tracing::warn!(error, "What earlier runs left could not be looked through.");
}

async fn publish(trainer: LocalTrainer, chain: Arc<dyn Chain>) {
    if let Err(error) = trainer.publish_second(chain).await {
        tracing::error!(error = with_causes(&error), "The local trainer failed.");
    }
}

/// The folder of sockets is empty by now: children unlink theirs once they are connected.
fn remove_runtime(folder: PathBuf) {
    if let Err(error) = std::fs::remove_dir_all(&folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %folder.display(), %error, "The runtime folder could not be removed.");
    }
}

/// The result as lines for people.
#[must_use]
pub fn describe(summary: &Summary) -> String {
    let mut text: Vec<String> = summary
        .uploaded
        .iter()
        .map(|(window, groups, file)| format!("window {window}: {groups} groups uploaded; kept as {}", file.display()))
        .collect();
    if summary.skipped > 0 || summary.lost > 0 {
        text.push(format!("{} windows skipped, {} lost", summary.skipped, summary.lost));
    }
    text.join("\n")
}
