//! `mine`.

use std::path::PathBuf;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::CommandError;
use super::local::{self, LocalSettings, LocalWorld};
use crate::engine::StopSignals;
use crate::journal::Event;
use crate::miner::Summary;
use crate::progress;

/// Mines in a local world until `windows` are uploaded or a signal comes.
///
/// # Errors
/// [`CommandError`]; what was spooled stays in the spool.
pub async fn local(settings: &LocalSettings, windows: Option<usize>) -> Result<Summary, CommandError> {
    let LocalWorld { mut miner, trainer, mut events, progress, started } = local::open(settings).await?;
    let stop = StopSignals::default();
    let hidden = CancellationToken::new();
    let display = tokio::spawn(progress::show(progress, started, hidden.clone()));
    let signals = tokio::spawn(watch_signals(stop.clone()));
    let publishing = trainer.map(|trainer| {
        let chain = miner.chain.clone();
        tokio::spawn(async move {
            if let Err(error) = trainer.publish_second(chain).await {
                tracing::error!(error = grail_process::with_causes(&error), "The local trainer failed.");
            }
        })
    });
    // The engine writes the journal; what the children report meanwhile goes through a writer of its own.
    let journal_of_children = miner.state.root().to_owned();
    let clock = miner.engine.clock.clone();
    let notes = tokio::spawn(async move {
        let Ok(mut journal) = crate::journal::Journal::open(&journal_of_children, clock) else { return };
        while let Some(event) = events.recv().await {
            journal.record(event);
        }
    });

    let result = miner.run(windows, stop.clone()).await;
    hidden.cancel();
    drop(display.await);
    miner.fleet.shut_down().await;
    let reason = match &result {
        Ok(_) if stop.is_stopping() => "told to stop".to_owned(),
        Ok(_) => "done".to_owned(),
        Err(error) => grail_process::with_causes(error),
    };
    miner.engine.journal.record(Event::Stopped { reason });
    let runtime = local::runtime_dir(&settings.runtime_base, "mine");
    signals.abort();
    if let Some(publishing) = publishing {
        publishing.abort();
    }
    drop(miner);
    drop(notes.await);
    remove_runtime(runtime);
    Ok(result?)
}

/// The folder of sockets is empty by now: children unlink theirs once they are connected.
fn remove_runtime(folder: PathBuf) {
    if let Err(error) = std::fs::remove_dir_all(&folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %folder.display(), %error, "The runtime folder could not be removed.");
    }
}

/// The first SIGINT or SIGTERM ends admission; the window is sealed with what is under way. The second one ends the children and
/// goes; the spool has everything.
async fn watch_signals(stop: StopSignals) {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        tracing::error!("Signals cannot be watched.");
        return;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    tracing::info!("Told to stop: no new groups; the window is sealed with what is under way.");
    stop.drain.cancel();
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    tracing::warn!("Told to stop at once; what is spooled stays in the spool.");
    stop.now.cancel();
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
