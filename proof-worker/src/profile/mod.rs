//! `profile`: how fast groups are proved, and where the time goes.

mod cases;
mod flop;
mod groups;
mod lengths;
mod local;
pub mod reload;
mod remote;
mod report;
mod run;
mod shape;
mod trace;

use std::io::{self, Write};
use std::path::Path;

use grail_ipc::jobs::ProveJob;
use grail_model::ModelConfig;

pub use lengths::{Lengths, NotLengths};
pub use report::{GroupTimes, GroupsReport, MatrixProductReport, Report, SCHEMA, StageReport};
pub use shape::{NotAShape, Shape};

use crate::cli::ProfileArguments;
use crate::error::WorkerError;
use flop::useful_flop;
use groups::{Groups, Source, Synthetic};
use local::{Local, Staged};
use remote::{IN_FLIGHT, Remote};
use run::Measured;

/// Tokens that are drawn for a worker whose vocabulary nobody named: every tokenizer has as many.
const LEAST_VOCABULARY: usize = 256;

/// How often all groups are proved.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub warm_up: u32,
    pub repeats: u32,
}

/// Runs `profile` to its end.
///
/// # Errors
/// [`WorkerError`].
pub fn run(arguments: &ProfileArguments) -> Result<(), WorkerError> {
    if let Some(cases) = &arguments.cases {
        return cases::run(arguments, cases);
    }
    let report = match &arguments.connect {
        Some(socket) => profile_remote(arguments, socket)?,
        None => profile_local(arguments)?,
    };
    let text = if arguments.json {
        let json = serde_json::to_string_pretty(&report);
        json.map_err(|error| WorkerError::Print(error.into()))? + "\n"
    } else {
        report.table()
    };
    match io::stdout().lock().write_all(text.as_bytes()) {
        // Whoever read it has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(WorkerError::Print),
    }
}

fn source(arguments: &ProfileArguments) -> Source {
    match &arguments.recorded {
        Some(path) => Source::Recorded(path.clone()),
        None => Source::Synthetic(Synthetic {
            groups: arguments.groups,
            prompt: arguments.prompt,
            completion: arguments.completion,
            most_tokens: arguments.max_tokens,
            longest: arguments.longest,
            seed: arguments.seed,
        }),
    }
}

fn plan(arguments: &ProfileArguments) -> Plan {
    Plan { warm_up: arguments.warm_up, repeats: arguments.repeats }
}

fn profile_local(arguments: &ProfileArguments) -> Result<Report, WorkerError> {
    let local = Local::load(arguments)?;
    let groups = source(arguments).groups(local.config().vocab_size, local.weights())?;
    local_report(&local, plan(arguments), &groups, true, arguments.trace.as_deref())
}

/// Measures a model in this process; with `in_depth` also its stages and what the device keeps up.
fn local_report(
    local: &Local,
    plan: Plan,
    groups: &Groups,
    in_depth: bool,
    trace: Option<&Path>,
) -> Result<Report, WorkerError> {
    let measured = local.measure(&plan, &groups.jobs)?;
    // Before anything else, while the device is as warm as the passes left it.
    let product = local.matrix_product(in_depth)?;
    let mut notes = Vec::new();
    let staged = in_depth.then(|| local.stages(&groups.jobs, measured.wall)).transpose()?;
    if in_depth {
        notes.push("stages are of one more pass, which waits for the device around each of them".to_owned());
    }
    let (stages, events) = staged.map_or((None, Vec::new()), |Staged { stages, events }| (Some(stages), events));
    if let Some(path) = trace {
        trace::write(path, &[measured.events(), events].concat())?;
    }
    let device_memory = local.device_memory().unwrap_or_else(|note| {
        notes.push(note.to_owned());
        None
    });
    let mut report = report(plan, groups, &measured, Some(local.config()));
    report.in_flight = local.in_flight(&groups.jobs);
    report.share_of_matrix_product = report.useful_tflops.map(|tflops| tflops / product.tflops);
    Ok(Report {
        model: local.name.clone(),
        device: local.device().to_string(),
        dtype: Some(local.dtype().to_string()),
        weights: local.weights().to_string(),
        matrix_product: Some(product),
        peak_resident_bytes: peak_resident_bytes(),
        device_used_bytes: device_memory.map(|(used, _)| used),
        device_total_bytes: device_memory.map(|(_, total)| total),
        stages,
        notes,
        ..report
    })
}

fn profile_remote(arguments: &ProfileArguments, socket: &Path) -> Result<Report, WorkerError> {
    let config = remote_config(arguments)?;
    let remote = Remote::connect(socket)?;
    let hello = remote.client.hello();
    let no_weights = || WorkerError::Bug { detail: format!("the worker at {} names no weights", socket.display()) };
    let weights = hello.weights.ok_or_else(no_weights)?;
    let vocab_size = config.as_ref().map_or(LEAST_VOCABULARY, |config| config.vocab_size);
    let groups = source(arguments).groups(vocab_size, weights)?;
    let measured = remote.measure(&plan(arguments), &groups.jobs)?;
    if let Some(path) = &arguments.trace {
        trace::write(path, &measured.events())?;
    }
    let mut notes = vec![
        format!("times are end to end, with {IN_FLIGHT} requests in flight"),
        "stages, the matrix product and device memory are left out: another process computes".to_owned(),
        "resident memory is the worker's at the end".to_owned(),
    ];
    if config.is_none() {
        notes.push(format!(
            "useful TFLOP/s are left out and synthetic tokens are below {LEAST_VOCABULARY}: name the worker's model with --model \
             or --shape"
        ));
    }
    Ok(Report {
        model: format!("of the worker at {}", socket.display()),
        device: hello.device.clone(),
        weights: weights.to_string(),
        in_flight: IN_FLIGHT,
        peak_resident_bytes: Some(remote.resident_bytes()?),
        notes,
        ..report(plan(arguments), &groups, &measured, config.as_ref())
    })
}

/// The shape of the model that the worker has, if the command line names it.
fn remote_config(arguments: &ProfileArguments) -> Result<Option<ModelConfig>, WorkerError> {
    match (&arguments.folder, arguments.shape) {
        (Some(folder), _) => ModelConfig::from_dir(folder)
            .map(Some)
            .map_err(|error| WorkerError::Load { folder: folder.clone(), source: error.into() }),
        (None, shape) => Ok(shape.map(Shape::config)),
    }
}

/// What both kinds of profile have in common; the rest is unset.
fn report(
    Plan { warm_up, repeats }: Plan,
    groups: &Groups,
    measured: &Measured,
    config: Option<&ModelConfig>,
) -> Report {
    let jobs = &groups.jobs;
    let sum = |count: fn(&ProveJob) -> usize| jobs.iter().map(count).sum::<usize>();
    let rollouts = sum(|job| job.completions.len());
    let per_second = |of_one_pass: f64| of_one_pass * f64::from(repeats) / measured.wall.as_secs_f64();
    let flop = config.map(|config| jobs.iter().map(|job| useful_flop(config, job)).sum::<f64>());
    Report {
        schema: SCHEMA,
        build: env!("CARGO_PKG_VERSION"),
        model: String::new(),
        device: String::new(),
        dtype: None,
        weights: String::new(),
        groups: GroupsReport {
            source: groups.described.clone(),
            groups: jobs.len(),
            rollouts,
            prompt_tokens: sum(|job| job.prompt.len()),
            completion_tokens: sum(ProveJob::completion_tokens),
            lengths: None,
        },
        warm_up,
        repeats,
        in_flight: 1,
        group_ms: GroupTimes::of(measured.samples.iter().map(|sample| sample.length).collect()),
        tokens_per_second: per_second(sum(ProveJob::tokens) as f64),
        rollouts_per_second: per_second(rollouts as f64),
        useful_tflops: flop.map(|flop| per_second(flop) / 1e12),
        matrix_product: None,
        share_of_matrix_product: None,
        peak_resident_bytes: None,
        device_used_bytes: None,
        device_total_bytes: None,
        stages: None,
        notes: Vec::new(),
    }
}

/// `VmHWM` of this process.
fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1_024)
}
