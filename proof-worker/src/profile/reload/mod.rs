//! `profile-reload`: how long other weights take, and what requests in flight notice of it.

mod checkpoint;
mod measure;

use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use grail_ipc::jobs::ReloadOrder;
use serde::Serialize;

use self::checkpoint::{Checkpoint, Scratch, Target};
use self::measure::{Sample, Worker};
use super::report::milliseconds;
use crate::cli::ProfileReloadArguments;
use crate::error::WorkerError;
use crate::torch::Shadow;

/// Number of the document's layout.
pub const RELOAD_SCHEMA: u32 = 1;

/// What reloads of one checkpoint take.
#[derive(Debug, Clone, Serialize)]
pub struct ReloadReport {
    pub schema: u32,
    /// Version of the package.
    pub build: &'static str,
    pub model: String,
    pub device: String,
    pub dtype: String,
    pub checkpoint_bytes: u64,
    /// The target's file, read once from the page cache by one thread.
    pub read_once_ms: f64,
    /// Median of a request with two in flight and no reload.
    pub request_ms: f64,
    pub repeats: u32,
    pub cases: Vec<ReloadCase>,
}

/// One kind of reload: medians of its repeats.
#[derive(Debug, Clone, Serialize)]
pub struct ReloadCase {
    /// `full`, or `delta` with its share.
    pub source: String,
    /// Share of the elements that a delta changes.
    pub changed: Option<f64>,
    /// Whether there was a second copy, as the worker says.
    pub in_shadow: bool,
    /// Whether it was made ready before it was due.
    pub staged: bool,
    /// To make it ready beside the proofs; unset if it was not staged.
    pub staging_ms: Option<f64>,
    /// From the command to the weights being in place. Behind staging it is mostly the wait for the batches that the worker had taken
    /// before it: the weights themselves were ready after [`Self::staging_ms`].
    pub total_ms: f64,
    /// In which the worker could not prove.
    pub stall_ms: f64,
    /// Longest request meanwhile.
    pub longest_request_ms: f64,
}

/// Runs `profile-reload` to its end.
///
/// # Errors
/// [`WorkerError`].
pub fn run(arguments: &ProfileReloadArguments) -> Result<(), WorkerError> {
    let parent = arguments.scratch.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = Scratch::create(&parent)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| WorkerError::Start { what: "start the I/O runtime", source })?;
    let report = runtime.block_on(measure_all(arguments, scratch.path()))?;
    let text = if arguments.json {
        serde_json::to_string_pretty(&report).map_err(|error| WorkerError::Print(error.into()))? + "\n"
    } else {
        report.table()
    };
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(WorkerError::Print),
    }
}

/// A kind of reload to be measured.
struct Case<'t> {
    target: &'t Target,
    by_changes: bool,
    stages: bool,
}

async fn measure_all(arguments: &ProfileReloadArguments, scratch: &Path) -> Result<ReloadReport, WorkerError> {
    let base = base(arguments, &scratch.join("base"))?;
    let targets = arguments
        .changed
        .iter()
        .enumerate()
        .map(|(place, share)| base.target(&scratch.join(format!("target-{place}")), *share))
        .collect::<Result<Vec<_>, _>>()?;
    let mut cases = Vec::new();
    let mut quiet = Vec::new();
    for shadow in [Shadow::Always, Shadow::Never] {
        let worker = Worker::start(arguments, (scratch, &base.folder), shadow).await?;
        quiet.extend(worker.quiet().await?);
        for stages in [false, true] {
            // Where the weights lie a folder is not made ready beforehand, but for its checks.
            let has_folder = shadow == Shadow::Always || !(stages || arguments.no_folder_in_place);
            let full = targets.first().filter(|_| has_folder).map(|target| Case { target, by_changes: false, stages });
            let deltas = targets.iter().map(|target| Case { target, by_changes: true, stages });
            for case in full.into_iter().chain(deltas) {
                let measured = measure(&worker, &base, &case, arguments.repeats).await?;
                // Minutes lie between them with a large model: what was measured must not be lost with what comes behind it.
                tracing::info!("{HEADINGS} | {}", measured.line());
                cases.push(measured);
            }
        }
        worker.end().await;
    }
    let read_once = targets.first().map_or(Ok(Duration::ZERO), |target| read_once(&target.checkpoint.folder))?;
    Ok(ReloadReport {
        schema: RELOAD_SCHEMA,
        build: env!("CARGO_PKG_VERSION"),
        model: arguments.folder.as_ref().map_or_else(
            || arguments.shape.map(|shape| format!("{shape} with random weights")).unwrap_or_default(),
            |folder| folder.display().to_string(),
        ),
        device: arguments.device.to_string(),
        dtype: arguments.dtype.unwrap_or_else(|| arguments.device.default_dtype()).to_string(),
        checkpoint_bytes: base.bytes,
        read_once_ms: milliseconds(read_once),
        request_ms: median(quiet),
        repeats: arguments.repeats,
        cases,
    })
}

fn base(arguments: &ProfileReloadArguments, folder: &Path) -> Result<Checkpoint, WorkerError> {
    match (&arguments.folder, arguments.shape) {
        (Some(folder), _) => Checkpoint::open(folder),
        (None, Some(shape)) => {
            let mut config = shape.config();
            config.layers = arguments.layers.map_or(config.layers, |layers| layers as usize);
            Checkpoint::random(folder, &config, arguments.file_dtype)
        }
        (None, None) => Err(WorkerError::Bug { detail: "a profile without a model was let through".into() }),
    }
}

async fn measure(worker: &Worker, base: &Checkpoint, case: &Case<'_>, repeats: u32) -> Result<ReloadCase, WorkerError> {
    let Case { target, by_changes, stages } = case;
    let sets = |set| if *by_changes { std::slice::from_ref(set) } else { &[] };
    let (there, back): (ReloadOrder, ReloadOrder) =
        (target.checkpoint.order(sets(&target.changes)), base.order(sets(&target.changes_back)));
    let mut samples: Vec<Sample> = Vec::new();
    for _ in 0..repeats {
        samples.push(worker.reload(&there, *stages).await?);
        worker.take(&back).await?;
    }
    if samples.iter().any(|sample| sample.from_changes != *by_changes) {
        let detail = "the worker went another way than it was asked to; its log says why".to_owned();
        return Err(WorkerError::Bug { detail });
    }
    let of = |field: fn(&Sample) -> Duration| median(samples.iter().map(field).collect());
    let staging: Option<Vec<Duration>> = samples.iter().map(|sample| sample.staging).collect();
    Ok(ReloadCase {
        source: if *by_changes { "delta" } else { "full" }.to_owned(),
        changed: by_changes.then_some(target.changed),
        in_shadow: samples.iter().all(|sample| sample.in_shadow),
        staged: *stages,
        staging_ms: staging.map(median),
        total_ms: of(|sample| sample.total),
        stall_ms: of(|sample| sample.stall),
        longest_request_ms: of(|sample| sample.longest_request),
    })
}

/// Reads the weights of a folder from the page cache and throws them away.
fn read_once(folder: &Path) -> Result<Duration, WorkerError> {
    let path = folder.join("model.safetensors");
    let failed = |source| WorkerError::Scratch { path: path.clone(), source };
    let mut buffer = vec![0; 1 << 20];
    let mut read = || {
        let started = Instant::now();
        let mut file = File::open(&path)?;
        while file.read(&mut buffer)? > 0 {}
        Ok(started.elapsed())
    };
    // The first brings it into the page cache.
    read().and_then(|_| read()).map_err(failed)
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).copied().map_or(0.0, milliseconds)
}

/// What [`ReloadCase::line`] shows.
const HEADINGS: &str = "source         copy      staged    staging ms   total ms   stall ms   longest request ms";

impl ReloadCase {
    /// One line of a table.
    fn line(&self) -> String {
        let source = self.changed.map_or_else(|| self.source.clone(), |share| format!("delta {:.1} %", share * 100.0));
        let copy = if self.in_shadow { "second" } else { "in place" };
        let staged = if self.staged { "yes" } else { "no" };
        let staging = self.staging_ms.map_or_else(|| "-".to_owned(), |staging| format!("{staging:.1}"));
        let (total, stall, longest) = (self.total_ms, self.stall_ms, self.longest_request_ms);
        format!("{source:<15}{copy:<10}{staged:<10}{staging:>10}{total:>11.1}{stall:>11.3}{longest:>21.1}")
    }
}

impl ReloadReport {
    /// Lines for people, with a final line end.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!(
            "{} on {}, {}, checkpoint of {:.2} GB\nread once by one thread {:.0} ms, a request {:.1} ms with two in flight, medians of {}\n\n",
            self.model,
            self.device,
            self.dtype,
            self.checkpoint_bytes as f64 / 1e9,
            self.read_once_ms,
            self.request_ms,
            self.repeats
        );
        text.push_str(HEADINGS);
        for case in &self.cases {
            text.push('\n');
            text.push_str(&case.line());
        }
        text.push('\n');
        text
    }
}
