//! `checkpoint fetch`: brings a checkpoint into the cache, as the miner does it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use grail_checkpoint::{FailureClass, HashAgreement, Installed, Listing, MadeFrom, ProgressFn, Wanted, ready};
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tokio::time::Instant;

use super::cached::origin;
use super::catalogue::catalogue;
use super::table::size;
use super::{CheckpointCommandError, Report, SCHEMA, Site};
use crate::cli::FetchTarget;
use crate::commands::CommandError;
use crate::commands::control::Form;
use crate::terminal::printable;

const MIB: f64 = (1 << 20) as f64;
const BAR: &str = "{spinner} {msg}: {bytes} of {total_bytes}, {bytes_per_sec}";

/// Installs `target`; on a terminal a line shows how far it is.
///
/// # Errors
/// [`CheckpointCommandError`] says what is missing, damaged or full.
pub async fn fetch(site: &Site, target: FetchTarget, form: Form) -> Result<String, CommandError> {
    let listing = site.store.list().await.map_err(CheckpointCommandError::from)?;
    let checkpoint = match target {
        FetchTarget::Window(checkpoint) => checkpoint,
        FetchTarget::Latest => {
            latest(&listing).ok_or_else(|| CheckpointCommandError::NoneReady { store: site.store.to_string() })?
        }
    };
    let published = site.store.published(checkpoint).await.map_err(CheckpointCommandError::from)?;
    let meter = Meter::start(checkpoint);
    let wanted =
        Wanted { progress: Some(meter.report()), in_use: is_in_use(site, checkpoint).await, ..Wanted::default() };
    let installed = site.cache.install(&site.store, &published, &wanted).await;
    let (received, took) = meter.finish();
    let installed = installed.map_err(|source| {
        // What is no longer published may be cached all the same; only if it is not, its absence is the reason.
        let stored = catalogue(&listing).get(&checkpoint).is_some_and(|stored| !stored.trees.is_empty());
        if !stored && source.class() == FailureClass::NoMetadata {
            return CheckpointCommandError::NotInStore { checkpoint, store: site.store.to_string() };
        }
        CheckpointCommandError::Install { checkpoint, source: Box::new(source) }
    })?;
    FetchReport::new(&installed, received, took).print(form)
}

/// Whether a miner may be reading the cached folder: then it stays, whatever was published under its window since.
async fn is_in_use(site: &Site, checkpoint: CheckpointWindow) -> bool {
    site.in_use().await.map_or(true, |in_use| in_use.is_some_and(|in_use| in_use.contains(&checkpoint)))
}

/// The checkpoint that became READY last.
fn latest(listing: &Listing) -> Option<CheckpointWindow> {
    ready::markers(listing.keys()).max().map(|choice| choice.checkpoint)
}

/// Shows and counts what arrives.
#[derive(Debug)]
struct Meter {
    bar: ProgressBar,
    received: Arc<AtomicU64>,
    started: Instant,
}

impl Meter {
    /// Nothing is drawn where standard error is no terminal.
    fn start(checkpoint: CheckpointWindow) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(BAR) {
            bar.set_style(style);
        }
        bar.set_message(format!("checkpoint {checkpoint}"));
        Self { bar, received: Arc::default(), started: Instant::now() }
    }

    fn report(&self) -> ProgressFn {
        let (bar, received) = (self.bar.clone(), self.received.clone());
        ProgressFn::new(move |progress| {
            received.store(progress.received, Ordering::Relaxed);
            bar.set_length(progress.total);
            bar.set_position(progress.received);
        })
    }

    /// Bytes that the last route received, and how long everything took.
    fn finish(self) -> (u64, Duration) {
        self.bar.finish_and_clear();
        (self.received.load(Ordering::Relaxed), self.started.elapsed())
    }
}

#[derive(Debug, Serialize)]
struct FetchReport {
    schema: u32,
    checkpoint: CheckpointWindow,
    folder: String,
    weights_hash: WeightsHash,
    /// How the hash compares with the published one.
    agreement: HashAgreement,
    made_from: MadeFrom,
    /// Bytes from the store; 0 if it was in the cache.
    received: u64,
    seconds: f64,
    /// What is odd about it; it is used all the same.
    notices: Vec<String>,
}

impl FetchReport {
    fn new(installed: &Installed, received: u64, took: Duration) -> Self {
        Self {
            schema: SCHEMA,
            checkpoint: installed.window,
            folder: installed.folder.display().to_string(),
            weights_hash: installed.weights_hash,
            agreement: installed.agreement.clone(),
            made_from: installed.made_from.clone(),
            received,
            seconds: took.as_secs_f64(),
            notices: installed.notices.iter().map(ToString::to_string).collect(),
        }
    }

    fn route(&self) -> String {
        if self.received == 0 {
            return format!("it was there already, made from {}", origin(&self.made_from));
        }
        let rate = if self.seconds > 0.0 { self.received as f64 / self.seconds } else { 0.0 };
        let route = match &self.made_from {
            MadeFrom::Full => "its FULL tree".to_owned(),
            MadeFrom::Deltas { base, deltas } => {
                let deltas: Vec<String> = deltas.iter().map(ToString::to_string).collect();
                format!("checkpoint {base} and the deltas {}", deltas.join(", "))
            }
        };
        format!("made from {route}: {} in {:.1} s, {:.1} MiB/s", size(self.received), self.seconds, rate / MIB)
    }
}

impl Report for FetchReport {
    fn render(&self) -> String {
        let first = format!("checkpoint {} is in {}", self.checkpoint, self.folder);
        let notices = self.notices.iter().map(|notice| format!("note: {notice}"));
        let lines = [first, format!("weights {}; {}", self.weights_hash, self.route())];
        lines.into_iter().chain(notices).map(|line| printable(&line) + "\n").collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> FetchReport {
        FetchReport {
            schema: SCHEMA,
            checkpoint: CheckpointWindow(3_060),
            folder: "/state/checkpoints/checkpoint-3060".to_owned(),
            weights_hash: WeightsHash(0xff),
            agreement: HashAgreement::Equal,
            made_from: MadeFrom::Deltas {
                base: CheckpointWindow(3_000),
                deltas: vec![CheckpointWindow(3_030), CheckpointWindow(3_060)],
            },
            received: 300 << 20,
            seconds: 2.0,
            notices: Vec::new(),
        }
    }

    #[test]
    fn the_route_is_told() {
        insta::assert_snapshot!("fetch", report().render());
        let notices = vec!["its hash\u{1b}[31m differs".to_owned()];
        let cached = FetchReport { received: 0, made_from: MadeFrom::Full, notices, ..report() };
        insta::assert_snapshot!("fetch_cached", cached.render());
    }
}
