//! From the command line to an exit code.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Parser;
use grail_checkpoint::layout;
use grail_environments::EnvironmentId;
use grail_environments::datasets::DatasetSettings;
use grail_ipc::messages::SlotId;
use grail_process::ExitCode;
use grail_protocol::ids::{CheckpointWindow, EnvironmentSeed};
use grail_protocol::randomness::ChallengeRandomness;
use grail_protocol::seed;
use grail_telemetry::{Format, Options};

use crate::cli::{
    self, CheckpointCommand, Cli, Command, ConfigArgs, EnvCommand, LocalDevice, MineArgs, ReloadArgs, RowsArgs,
    SetupEvaluatorArgs, SlotArgs, StateArgs, StatusArgs, StopArgs, TaskArgs, VerifyArgs,
};
use crate::commands::checkpoint::{self, Extent, PruneMode, Site};
use crate::commands::control::{self, Form, Wait, Whereabouts};
use crate::commands::env::{self, Completeness, EnvSite, Pick, PromptOptions, RowsChoice, ScoreOptions, SetupMode};
use crate::commands::local::LocalSettings;
use crate::commands::verify::{FileOptions, JudgeSettings};
use crate::commands::{CommandError, mine, verify};
use crate::config::{Config, ConfigError, FlagValue, Folders, GpuRequest, Inputs, Mode, Origin, env_example};
use crate::evaluators::{EvaluatorSettings, Evaluators};
use crate::fleet::{Heartbeat, SlotCommand, SlotLimits, SlotPin};
use crate::gpus::{self, HostGpus};
use crate::state;
use crate::terminal::{is_reader_gone, note};
use crate::verify::table;
use grail_process::with_causes;

/// Parses, runs, and says how it ended. Only `main` ends the process.
#[must_use]
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not errors; where nobody reads them any more there is nothing to tell.
            drop(error.print());
            return if error.use_stderr() { ExitCode::Usage } else { ExitCode::Done };
        }
    };
    let inputs = |flags: Vec<FlagValue>| Inputs::from_process(cli.global.env_file.clone(), flags);
    match &cli.command {
        Command::Mine(args) => mine_command(args, &inputs(args.flag_values()), cli.global.verbose),
        Command::Verify(args) => verify_command(args, &inputs(args.state.flag_values()), cli.global.verbose),
        Command::Status(args) => status_command(args, &inputs(args.state.flag_values())),
        Command::Restart(args) => slot_command(args, SlotCommand::Restart, &inputs(args.state.flag_values())),
        Command::Drain(args) => slot_command(args, SlotCommand::Drain, &inputs(args.state.flag_values())),
        Command::Quarantine(args) => slot_command(args, SlotCommand::Quarantine, &inputs(args.state.flag_values())),
        Command::Release(args) => slot_command(args, SlotCommand::Release, &inputs(args.state.flag_values())),
        Command::ReloadCheckpoint(args) => reload_command(args, &inputs(args.state.flag_values())),
        Command::Checkpoint(args) => {
            checkpoint_command(&args.command, &inputs(args.command.flag_values()), cli.global.verbose)
        }
        Command::Env(args) => env_command(&args.command, &inputs(args.command.flag_values()), cli.global.verbose),
        Command::SetupEvaluator(args) => setup_command(args, &inputs(Vec::new()), cli.global.verbose),
        Command::Stop(args) => stop_command(args, &inputs(args.state.flag_values())),
        Command::Config(args) => config_command(args, &inputs(Vec::new())),
        Command::Completions(args) => print(&cli::completions(args.shell)),
        Command::Man => match cli::manual() {
            Ok(page) => print(&page),
            Err(error) => fail(&CommandError::Output(error)),
        },
    }
}

fn mine_command(args: &MineArgs, inputs: &Inputs, verbosity: u8) -> ExitCode {
    let mode = if args.local { Mode::Local } else { Mode::Network };
    let config = match Config::load(inputs, mode) {
        Ok(config) => config,
        Err(error) => return refuse(&error),
    };
    start_logging(&config, verbosity);
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    if !args.local {
        // Wrong numbers of GPUs are said before anything else.
        if let Some(request) = config.gpu_request() {
            let host = block_on_gpus(&config);
            if let Err(error) = host.and_then(|host| Ok(gpus::layout(&host, &request)?)) {
                return fail(&error);
            }
        }
        note(format_args!(
            "grail-supervisor: error: this build mines the embedded default only; run `grail-supervisor mine --local`"
        ));
        return ExitCode::Configuration;
    }
    let pins = match device_pins(args.device, &config) {
        Ok(pins) => pins,
        Err(error) => return fail(&error),
    };
    raise_open_files();
    let settings = local_settings(args, &config, pins);
    let windows = args.windows.map(|windows| usize::try_from(windows).unwrap_or(usize::MAX));
    block_on(async {
        let summary = mine::local(&settings, windows).await?;
        Ok((mine::describe(&summary) + "\n", ExitCode::Done))
    })
}

/// Each request to the generation server is a connection, and service managers give 1,024 descriptors unless asked for more.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(soft, hard)| if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) });
    if let Err(error) = raised {
        tracing::debug!(%error, "The limit of open files stays as it is.");
    }
}

/// One pin a worker: its share of the CPUs, or its GPU.
fn device_pins(device: LocalDevice, config: &Config) -> Result<Vec<SlotPin>, CommandError> {
    if device == LocalDevice::Cpu {
        let slots = usize::try_from(config.proof.cpu_workers.value).unwrap_or(usize::MAX);
        return Ok(gpus::cpu_pins(slots, Path::new("/")));
    }
    let host = block_on_gpus(config)?;
    let layout = gpus::layout(&host, &GpuRequest { generation: None, proof: config.proof.gpus.clone() })?;
    Ok(gpus::slot_pins(&layout, &host, Path::new("/")))
}

fn local_settings(args: &MineArgs, config: &Config, pins: Vec<SlotPin>) -> LocalSettings {
    let limits = &config.limits;
    let generation = &config.generation;
    let size = |value: u32| usize::try_from(value).unwrap_or(usize::MAX);
    LocalSettings {
        state_dir: local_state_dir(&config.folders),
        runtime_base: config.folders.runtime.value.clone(),
        child_variables: child_variables(config),
        seed: args.seed.clone(),
        block_time: config.local.block_time.value,
        use_drand: !args.no_drand,
        trainer: !args.no_trainer,
        environment: config.local.environment.value,
        datasets: datasets(config),
        evaluators: evaluators(config),
        slot_limits: slot_limits(config),
        pins,
        generating_groups: generation.groups_per_batch.value.map(size),
        max_groups: size(limits.max_groups.value),
        max_file_bytes: limits.max_file_bytes.value,
        safety_blocks: limits.safety_blocks.value,
        max_model_len: generation.max_model_len.value,
        max_concurrent: generation.max_concurrent.value.map(size),
        max_num_seqs: generation.max_num_seqs.value,
        server_timeout: generation.server_timeout.value,
        upload_timeout: limits.upload_timeout.value,
        shutdown_limit: limits.shutdown_timeout.value,
        keep_windows: config.folders.keep_windows.value,
        keep_checkpoints: config.folders.keep_checkpoints,
        record: args.record.clone(),
    }
}

/// The GPUs of this host as this process and its configuration show them.
fn block_on_gpus(config: &Config) -> Result<HostGpus, CommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CommandError::Runtime)?;
    let host = runtime.block_on(HostGpus::read(Path::new("/"), |name| visible_variable(config, name)));
    for warning in gpus::warnings(&host) {
        tracing::warn!("{warning}");
    }
    Ok(host)
}

/// A variable of another program, from the environment, else from the `.env` file.
fn visible_variable(config: &Config, name: &str) -> Option<String> {
    std::env::var(name).ok().or_else(|| config.passthrough.get(name).cloned())
}

fn slot_limits(config: &Config) -> SlotLimits {
    let proof = &config.proof;
    SlotLimits {
        start: proof.start_timeout.value,
        prove: proof.prove_timeout.value,
        heartbeat: Heartbeat { every: proof.heartbeat_interval.value, limit: proof.heartbeat_timeout.value },
        ..SlotLimits::default()
    }
}

/// What children must see of the configuration, wherever it was set.
fn child_variables(config: &Config) -> Vec<(&'static str, String)> {
    let proof = &config.proof;
    let libtorch = proof.libtorch_dir.value.as_ref().map(|folder| folder.display().to_string());
    [
        ("GRAIL_LIBTORCH_DIR", libtorch),
        ("GRAIL_RELOAD_SHADOW", Some(proof.reload_shadow.value.name())),
        ("GRAIL_PROOF_KERNELS", Some(proof.kernels.value.name())),
        ("GRAIL_LOG", config.log.value.clone()),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name, value?)))
    .collect()
}

fn judge_settings(config: &Config, device: LocalDevice) -> Result<JudgeSettings, CommandError> {
    let pin = match device {
        // All CPUs for the one worker.
        LocalDevice::Cpu => gpus::cpu_pins(1, Path::new("/")),
        LocalDevice::Cuda => device_pins(device, config)?,
    };
    Ok(JudgeSettings {
        pin: pin.into_iter().next().unwrap_or_else(|| SlotPin::cpu(Vec::new())),
        runtime_base: config.folders.runtime.value.clone(),
        variables: child_variables(config),
        datasets: datasets(config),
        evaluators: evaluators(config),
    })
}

fn datasets(config: &Config) -> DatasetSettings {
    config.environments.datasets(|name| {
        // What is no text can only come from the environment.
        std::env::var_os(name).or_else(|| config.passthrough.get(name).map(OsString::from))
    })
}

fn evaluators(config: &Config) -> EvaluatorSettings {
    let environments = &config.environments;
    EvaluatorSettings {
        folder: environments.evaluator_folder.value.clone(),
        count: environments.evaluators.value,
        is_unsafe_accepted: environments.is_unsafe_accepted.value,
        delegation: None,
    }
}

/// The embedded default keeps its world apart from a real miner's, unless a folder was named.
fn local_state_dir(Folders { state, .. }: &Folders) -> PathBuf {
    match state.origin {
        Origin::Default => state.value.join("local"),
        _ => state.value.clone(),
    }
}

fn verify_command(args: &VerifyArgs, inputs: &Inputs, verbosity: u8) -> ExitCode {
    let config = match Config::load(inputs, Mode::Local) {
        Ok(config) => config,
        Err(error) => return refuse(&error),
    };
    start_logging(&config, verbosity);
    let challenge = match args.challenge_randomness.as_deref().map(challenge_of).transpose() {
        Ok(challenge) => challenge,
        Err(detail) => {
            note(format_args!("grail-supervisor: error: --challenge-randomness: {detail}"));
            return ExitCode::Usage;
        }
    };
    let judge = match judge_settings(&config, args.device) {
        Ok(judge) => judge,
        Err(error) => return fail(&error),
    };
    let json = args.json;
    let Some(file) = args.file.clone() else {
        let state = local_state_dir(&config.folders);
        return block_on(async {
            let verdicts = verify::local(&state, challenge, &judge).await?;
            let text = if json { to_json(&verdicts)? } else { verdicts.render() };
            Ok((text, answer(verdicts.is_accepted())))
        });
    };
    let options = FileOptions { file, context: args.context.clone(), model: args.model.clone(), challenge, judge };
    block_on(async {
        let verified = verify::file(&options).await?;
        let text = if json { to_json(&verified.report)? } else { table::render(&verified) };
        Ok((text, answer(verified.report.is_accepted())))
    })
}

fn status_command(args: &StatusArgs, inputs: &Inputs) -> ExitCode {
    let form = form(args.json);
    operate(&args.state, inputs, async |whereabouts| control::status(&whereabouts, form).await)
}

fn slot_command(args: &SlotArgs, command: SlotCommand, inputs: &Inputs) -> ExitCode {
    let (slot, form) = (SlotId(args.slot), form(args.json));
    operate(&args.state, inputs, async |whereabouts| control::slot(&whereabouts, slot, command, form).await)
}

fn reload_command(args: &ReloadArgs, inputs: &Inputs) -> ExitCode {
    let (slot, form) = (args.slot.map(SlotId), form(args.json));
    operate(&args.state, inputs, async |whereabouts| control::reload_checkpoint(&whereabouts, slot, form).await)
}

fn stop_command(args: &StopArgs, inputs: &Inputs) -> ExitCode {
    let (now, form) = (args.now, form(args.json));
    let wait = if args.no_wait { Wait::No } else { Wait::UntilGone };
    operate(&args.state, inputs, async |whereabouts| control::stop(&whereabouts, now, wait, form).await)
}

fn checkpoint_command(command: &CheckpointCommand, inputs: &Inputs, verbosity: u8) -> ExitCode {
    let config = match Config::load(inputs, Mode::Local) {
        Ok(config) => config,
        Err(error) => return refuse(&error),
    };
    start_logging(&config, verbosity);
    block_on(async {
        let site = Site::local(&local_state_dir(&config.folders), config.folders.runtime.value.clone())?;
        let text = match command {
            CheckpointCommand::List(args) => {
                let extent = match (args.cache_only, args.store_only) {
                    (true, _) => Extent::CacheOnly,
                    (_, true) => Extent::StoreOnly,
                    _ => Extent::All,
                };
                checkpoint::list(&site, args.window, extent, form(args.json)).await?
            }
            CheckpointCommand::Show(args) => checkpoint::show(&site, args.checkpoint, form(args.json)).await?,
            CheckpointCommand::Fetch(args) => checkpoint::fetch(&site, args.checkpoint, form(args.json)).await?,
            CheckpointCommand::Verify(args) => {
                let checked = checkpoint::verify(&site, args.checkpoint, form(args.json)).await?;
                return Ok((checked.text, answer(checked.intact)));
            }
            CheckpointCommand::Prune(args) => {
                let mode = if args.dry_run { PruneMode::DryRun } else { PruneMode::Remove };
                checkpoint::prune(&site, &config.folders.keep_checkpoints, mode, form(args.json)).await?
            }
        };
        Ok((text, ExitCode::Done))
    })
}

fn env_command(command: &EnvCommand, inputs: &Inputs, verbosity: u8) -> ExitCode {
    let config = match Config::load(inputs, Mode::Local) {
        Ok(config) => config,
        Err(error) => return refuse(&error),
    };
    start_logging_quietly(&config, verbosity);
    let site = EnvSite { datasets: datasets(&config), evaluators: Arc::new(Evaluators::new(evaluators(&config))) };
    block_on(async {
        let text = match command {
            EnvCommand::List(args) => env::list(&site, form(args.json)).await?,
            EnvCommand::Show(args) => {
                let choice = rows_choice(args.environment, &args.rows);
                env::show(&site, &choice, &pick(&args.task).unwrap_or(FIRST_TASK), form(args.json)).await?
            }
            EnvCommand::Prompt(args) => {
                let options = PromptOptions {
                    choice: rows_choice(args.environment, &args.rows),
                    pick: pick(&args.task).unwrap_or(FIRST_TASK),
                    checkpoint: checkpoint_folder(&args.checkpoint, &config),
                    thinking_mode: args.thinking_mode,
                };
                env::prompt(&site, &options, form(args.json)).await?
            }
            EnvCommand::Score(args) => {
                let options = ScoreOptions {
                    choice: rows_choice(args.environment, &args.rows),
                    pick: pick(&args.task),
                    file: args.file.clone(),
                    thinking_mode: args.thinking_mode,
                };
                let scores = env::score(&site, &options).await?;
                let code = match scores.completeness {
                    Completeness::Complete => ExitCode::Done,
                    Completeness::Undecidable => ExitCode::No,
                    Completeness::SandboxFailed => ExitCode::Temporary,
                };
                return Ok((scores.text, code));
            }
        };
        Ok((text, ExitCode::Done))
    })
}

/// Never used: the command line demands a task where one is needed.
const FIRST_TASK: Pick = Pick::Seed(EnvironmentSeed(0));

fn rows_choice(environment: EnvironmentId, rows: &RowsArgs) -> RowsChoice {
    RowsChoice { environment, split: rows.split.clone(), is_embedded: rows.embedded }
}

fn pick(task: &TaskArgs) -> Option<Pick> {
    if let Some(id) = &task.task {
        return Some(Pick::Id(id.clone()));
    }
    let of_group = || {
        let hotkey = task.hotkey.as_ref()?;
        Some(seed::environment_seed(hotkey, task.window_hash.as_ref()?, task.group?))
    };
    task.seed.map(EnvironmentSeed).or_else(of_group).map(Pick::Seed)
}

/// A folder, or where the cache keeps the checkpoint of a window.
fn checkpoint_folder(named: &Path, config: &Config) -> PathBuf {
    let window = named.to_str().and_then(|text| text.parse().ok()).map(CheckpointWindow);
    // The cache is not opened: that would make its folder.
    let cached = |window| state::checkpoints_of(&local_state_dir(&config.folders)).join(layout::folder_name(window));
    window.filter(|_| !named.is_dir()).map_or_else(|| named.to_owned(), cached)
}

fn setup_command(args: &SetupEvaluatorArgs, inputs: &Inputs, verbosity: u8) -> ExitCode {
    let config = match Config::load(inputs, Mode::Local) {
        Ok(config) => config,
        Err(error) => return refuse(&error),
    };
    start_logging_quietly(&config, verbosity);
    let mode = if args.probe { SetupMode::Probe } else { SetupMode::Install };
    block_on(async {
        let (text, is_enough) = env::setup_evaluator(&evaluators(&config), mode, form(args.json)).await?;
        Ok((text, answer(is_enough)))
    })
}

const fn form(json: bool) -> Form {
    if json { Form::Json } else { Form::Text }
}

/// Runs a command that speaks to a running supervisor. Without a folder it is looked for in the default one, then in that of
/// the embedded default.
fn operate(
    state: &StateArgs,
    inputs: &Inputs,
    command: impl AsyncFnOnce(Whereabouts) -> Result<String, CommandError>,
) -> ExitCode {
    let configured = match Config::folders(inputs) {
        Ok(folders) => folders,
        Err(error) => return refuse(&error),
    };
    let mut folders = vec![configured.state.value.clone()];
    if state.state_dir.is_none() {
        folders.push(local_state_dir(&configured));
        folders.dedup();
    }
    let whereabouts = Whereabouts { folders, runtime_base: configured.runtime.value };
    block_on(async { Ok((command(whereabouts).await?, ExitCode::Done)) })
}

fn challenge_of(text: &str) -> Result<ChallengeRandomness, String> {
    text.trim().trim_start_matches("0x").to_lowercase().parse().map_err(|error| with_causes(&error))
}

fn answer(accepted: bool) -> ExitCode {
    if accepted { ExitCode::Done } else { ExitCode::No }
}

fn config_command(args: &ConfigArgs, inputs: &Inputs) -> ExitCode {
    if args.example {
        return print(env_example().as_bytes());
    }
    let mode = if args.local { Mode::Local } else { Mode::Network };
    let (report, problems) = match Config::load(inputs, mode) {
        Ok(config) => (config.describe().clone(), Vec::new()),
        Err(error) => (error.report.clone(), error.problems),
    };
    let text = if args.json { format!("{:#}\n", report.to_json(&problems)) } else { report.to_text(&problems) };
    match print(text.as_bytes()) {
        ExitCode::Done if !problems.is_empty() => ExitCode::Configuration,
        code => code,
    }
}

fn start_logging(config: &Config, verbosity: u8) {
    log_with(config.log.value.clone(), verbosity);
}

/// For commands whose answer says all of it: only what is wrong is logged, unless more is asked for.
fn start_logging_quietly(config: &Config, verbosity: u8) {
    let quiet = || (verbosity == 0).then(|| "warn".to_owned());
    log_with(config.log.value.clone().or_else(quiet), verbosity);
}

fn log_with(directives: Option<String>, verbosity: u8) {
    let options = Options { verbosity, format: Format::default(), directives };
    if let Err(error) = grail_telemetry::init(&options) {
        note(format_args!("grail-supervisor: warning: logging: {}", with_causes(&error)));
    }
}

fn block_on(work: impl Future<Output = Result<(String, ExitCode), CommandError>>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&CommandError::Runtime(error)),
    };
    let code = match runtime.block_on(work) {
        Ok((text, code)) => match print(text.as_bytes()) {
            ExitCode::Done => code,
            failed => failed,
        },
        Err(error) => fail(&error),
    };
    // What still runs is of no use any more, and waiting for it would keep a miner that is told to go at once.
    runtime.shutdown_background();
    code
}

fn to_json(value: &impl serde::Serialize) -> Result<String, CommandError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CommandError::Output(error.into()))?;
    Ok(text + "\n")
}

/// Standard output is data. A reader that has gone away is no failure.
fn print(bytes: &[u8]) -> ExitCode {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::Done,
        Err(error) if is_reader_gone(&error) => ExitCode::Done,
        Err(error) => fail(&CommandError::Output(error)),
    }
}

fn fail(error: &CommandError) -> ExitCode {
    note(format_args!("grail-supervisor: error: {}", with_causes(error)));
    error.exit_code()
}

fn refuse(error: &ConfigError) -> ExitCode {
    note(format_args!(
        "grail-supervisor: error: the configuration is wrong; `grail-supervisor config` shows all of it\n{error}"
    ));
    ExitCode::Configuration
}
