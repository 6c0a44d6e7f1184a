//! The command line: definitions only, so that help, completions and the manual page come from one place.

mod checkpoint;
mod environments;

use std::path::PathBuf;

use clap::{ArgGroup, Args, CommandFactory, Parser, Subcommand, ValueHint};
use clap_complete::Shell;
use grail_environments::EnvironmentId;
use grail_process::ExitCode;

use crate::config::FlagValue;

pub use checkpoint::{
    CheckpointArgs, CheckpointCommand, CheckpointVerifyArgs, FetchArgs, FetchTarget, ListArgs, PruneArgs, ShowArgs,
};
pub use environments::{
    EnvArgs, EnvCommand, EnvListArgs, EnvPromptArgs, EnvScoreArgs, EnvShowArgs, RowsArgs, SetupEvaluatorArgs, TaskArgs,
};

/// Runs a GRAIL miner on this host.
#[derive(Debug, Parser)]
#[command(
    name = "grail-supervisor",
    version,
    max_term_width = 100,
    long_about = "Runs a GRAIL miner on this host: follows the chain's windows, generates and proves groups of rollouts in \
                  child processes, and uploads one signed file per window. `mine --local` does all of it on this machine \
                  alone, without GPU, account, chain or bucket.",
    after_long_help = ExitCode::table(),
    after_help = "`--help` explains more, with the exit codes.",
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    #[command(flatten)]
    pub global: GlobalArgs,
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes, before or after its name.
#[derive(Debug, Clone, Args)]
pub struct GlobalArgs {
    /// Log more: -v adds our own details, -vv those of libraries.
    ///
    /// GRAIL_LOG sets a filter of its own and wins.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, display_order = 900)]
    pub verbose: u8,

    /// Read variables from this file instead of `.env` in the working directory.
    ///
    /// The process environment wins over the file. An absent `.env` is no error, an absent FILE is.
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath, display_order = 901)]
    pub env_file: Option<PathBuf>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mine windows until stopped.
    #[command(
        long_about = "Mines windows until stopped. The first SIGTERM, SIGINT or SIGHUP ends admission; what is under way is \
                            finished, sealed and uploaded, for at most GRAIL_SHUTDOWN_TIMEOUT seconds. Then, or at a second \
                            SIGTERM or SIGINT, what is spooled is sealed and uploaded and the rest is given up: exit status 0 \
                            either way. A third one ends at once with exit status 75; signed groups are in the spool and \
                            survive that as they survive every crash. `status`, `stop` and the commands for slots speak to \
                            a miner that runs."
    )]
    Mine(MineArgs),

    /// Check a window file as a validator would.
    #[command(
        long_about = "Checks a window file with the validator's nine checks: once over the sample that one challenge \
                            randomness selects, once over all rows, and says how exactly sketches and logprobs agree with a \
                            forward pass of our own. Exit status 0 if everything is accepted, else 1."
    )]
    Verify(VerifyArgs),

    /// Show what the running supervisor is doing.
    #[command(
        long_about = "Shows what the running supervisor is doing: its window, its last upload, its generation server and its \
                            proof workers, one line a slot. Exit status 69 if none runs in the state directory."
    )]
    Status(StatusArgs),

    /// Start the proof worker of a slot anew.
    #[command(
        long_about = "Starts the proof worker of a slot anew. Groups that it has not proved go to other workers."
    )]
    Restart(SlotArgs),

    /// Let a slot finish its groups and take no new ones.
    #[command(
        long_about = "Lets the proof worker of a slot finish its groups and gives it no new ones, until `release`."
    )]
    Drain(SlotArgs),

    /// End the worker of a slot and keep the slot empty.
    #[command(long_about = "Ends the proof worker of a slot and keeps the slot empty, until `release`.")]
    Quarantine(SlotArgs),

    /// Use a slot again that was drained, quarantined or given up.
    #[command(long_about = "Uses a slot again that was drained or quarantined, by an operator or for its deaths.")]
    Release(SlotArgs),

    /// Have workers and generation server read the present checkpoint again.
    #[command(
        long_about = "Has the proof worker of SLOT, or without SLOT all workers and the generation server, read the present \
                            checkpoint from its folder again, one after the other. Each proves that it has the weights before \
                            it gets work."
    )]
    ReloadCheckpoint(ReloadArgs),

    /// List, show, fetch, check or remove checkpoints.
    #[command(
        long_about = "Operates on the checkpoints of the trainer's store and on the cache of this host. Works beside a running \
                            supervisor as well as without one.",
        subcommand_required = true,
        arg_required_else_help = true
    )]
    Checkpoint(CheckpointArgs),

    /// Ask what tasks, prompts and verdicts are.
    #[command(
        long_about = "Answers questions about environments without mining: which there are, what a task is, how its prompt \
                            reads, and why a completion earns what it earns.",
        subcommand_required = true,
        arg_required_else_help = true
    )]
    Env(EnvArgs),

    /// Install what is needed to judge programs and formulas, and check the sandbox.
    #[command(
        long_about = "Finds CPython 3.12, installs the pinned packages that judge formulas beside it, once, and says \
                            which layers of the sandbox work on this host. mbpp, humaneval and math need it; gsm8k does not. \
                            Exit status 1 if the sandbox lacks what running programs of a model requires, 66 if nothing is \
                            installed, 69 if there is no fitting interpreter or its packages cannot be had."
    )]
    SetupEvaluator(SetupEvaluatorArgs),

    /// Tell the running supervisor to stop, and wait until it is gone.
    #[command(
        long_about = "Tells the running supervisor to stop, and waits until it is gone, naming on standard error what it \
                            waits for. Groups under way are finished, sealed and uploaded first; with --now only what is \
                            spooled is sealed and uploaded. Exit status 69 if none runs in the state directory."
    )]
    Stop(StopArgs),

    /// Show the configuration in force, and where each value comes from.
    #[command(
        long_about = "Shows every variable with the value in force and its origin: default, file and line, environment, \
                            or option. Secrets are redacted. All problems are listed at once; exit status 78 if there is one."
    )]
    Config(ConfigArgs),

    /// Print a completion script for a shell.
    #[command(long_about = "Prints a completion script. For bash, for instance: \
                            grail-supervisor completions bash > ~/.local/share/bash-completion/completions/grail-supervisor")]
    Completions(CompletionsArgs),

    /// Print the manual page.
    #[command(long_about = "Prints the manual page in roff. To read it: grail-supervisor man | man -l -")]
    Man,
}

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LocalDevice {
    Cpu,
    Cuda,
}

/// Options of `mine`.
#[derive(Debug, Clone, Args)]
pub struct MineArgs {
    /// Mine the embedded default: simulated chain, local store, CPU.
    ///
    /// Needs no GPU, account, chain or bucket. Two demonstration checkpoints ship with the program; the second one becomes
    /// ready during the first window, so that the second window begins with a checkpoint roll.
    #[arg(long)]
    pub local: bool,

    /// Stop after N windows have been uploaded.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub windows: Option<u64>,

    /// Text from which the hotkey and the chain of --local follow.
    ///
    /// The same text gives the same tasks. A state folder keeps the seed it was made with.
    #[arg(long, value_name = "TEXT", requires = "local")]
    pub seed: Option<String>,

    /// Mix the window's randomness from the block hash alone.
    ///
    /// Without this option the latest drand beacon is mixed in; if no relay answers, the block hash alone is used too.
    #[arg(long, overrides_with = "use_drand")]
    pub no_drand: bool,

    /// Mix drand into the window's randomness (the default).
    #[arg(long, hide = true, overrides_with = "no_drand")]
    pub use_drand: bool,

    /// Environment that the demonstration's checkpoints name [GRAIL_LOCAL_ENV].
    ///
    /// gsm8k, math, mbpp or humaneval; gsm8k for a new store. All but gsm8k need what `setup-evaluator` makes. The rows of math
    /// are made up, since no package may ship the real ones.
    #[arg(long = "env", value_name = "ENV", requires = "local", conflicts_with = "no_trainer")]
    pub environment: Option<EnvironmentId>,

    /// Run programs of a model although the sandbox lacks a part that is required [GRAIL_UNSAFE_SANDBOX].
    #[arg(long)]
    pub unsafe_sandbox: bool,

    #[command(flatten)]
    pub state: StateArgs,

    /// Mine from the checkpoints that the local store holds; publish none.
    #[arg(long, requires = "local")]
    pub no_trainer: bool,

    /// Where proofs run with --local.
    ///
    /// With cuda, GRAIL_PIPELINE_PROOF_GPU_IDS or GRAIL_PIPELINE_PROOF_GPU name the GPUs, one worker each; generation stays on
    /// the CPU.
    #[arg(long, value_enum, value_name = "DEVICE", default_value_t = LocalDevice::Cpu, requires = "local")]
    pub device: LocalDevice,

    /// Length of a simulated block in milliseconds [GRAIL_LOCAL_BLOCK_MS].
    #[arg(long, value_name = "MS", requires = "local")]
    pub block_ms: Option<u64>,

    /// Keep what the proof workers are given, one file a window, for `grail-proof-worker profile --recorded`.
    ///
    /// A failure to write is logged and does not stop mining.
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub record: Option<PathBuf>,

    /// Groups after which a window is full [GRAIL_MAX_GROUPS_PER_WINDOW; 24 with --local].
    #[arg(long, value_name = "N")]
    pub max_groups: Option<u32>,
}

/// Where the state lies.
#[derive(Debug, Clone, Args)]
pub struct StateArgs {
    /// Folder of spool, journal, window files and the local store [GRAIL_STATE_DIR].
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub state_dir: Option<PathBuf>,
}

/// Options of `verify`.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("what").required(true).args(["file", "local"]))]
pub struct VerifyArgs {
    /// Window file to check; its facts are in FILE.context.json or --context.
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: Option<PathBuf>,

    /// Check every window file of the local demonstration.
    #[arg(long)]
    pub local: bool,

    /// Facts about the window: hotkey, hashes, checkpoint, environment, sampling.
    ///
    /// Paths in it are relative to it. `mine` writes one beside each window file.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "local")]
    pub context: Option<PathBuf>,

    /// Randomness that selects the challenged positions and the sample.
    ///
    /// Hexadecimal. Without it the context's is used, else a fresh one.
    #[arg(long, value_name = "HEX", value_parser = hexadecimal)]
    pub challenge_randomness: Option<String>,

    /// Folder of the model to check with, instead of the context's.
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub model: Option<PathBuf>,

    /// Where rows are computed again.
    ///
    /// With cuda on the first GPU of GRAIL_PIPELINE_PROOF_GPU_IDS or GRAIL_PIPELINE_PROOF_GPU. Sketches and logprobs are equal bit by
    /// bit only on the kind of device that proved them.
    #[arg(long, value_enum, value_name = "DEVICE", default_value_t = LocalDevice::Cpu)]
    pub device: LocalDevice,

    #[command(flatten)]
    pub state: StateArgs,

    /// Print one JSON document instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Options of `status`.
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    pub state: StateArgs,

    /// Print one JSON document instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Options of the commands for one slot.
#[derive(Debug, Clone, Args)]
pub struct SlotArgs {
    /// Number of the slot, counted from 0 as `status` shows it.
    #[arg(value_name = "SLOT")]
    pub slot: u32,

    #[command(flatten)]
    pub state: StateArgs,

    /// Print one JSON document instead of a sentence.
    #[arg(long)]
    pub json: bool,
}

/// Options of `reload-checkpoint`.
#[derive(Debug, Clone, Args)]
pub struct ReloadArgs {
    /// Number of one slot, counted from 0 as `status` shows it; all and the generation server without it.
    #[arg(value_name = "SLOT")]
    pub slot: Option<u32>,

    #[command(flatten)]
    pub state: StateArgs,

    /// Print one JSON document instead of a sentence.
    #[arg(long)]
    pub json: bool,
}

/// Options of `stop`.
#[derive(Debug, Clone, Args)]
pub struct StopArgs {
    /// Give up groups that are not spooled yet; seal and upload the others.
    #[arg(long)]
    pub now: bool,

    /// Return as soon as the supervisor knows.
    #[arg(long)]
    pub no_wait: bool,

    #[command(flatten)]
    pub state: StateArgs,

    /// Print one JSON document instead of a sentence.
    #[arg(long)]
    pub json: bool,
}

/// Options of `config`.
#[derive(Debug, Clone, Args)]
pub struct ConfigArgs {
    /// Check what `mine --local` needs, not what a network needs.
    #[arg(long, conflicts_with = "example")]
    pub local: bool,

    /// Print one JSON document instead of a table.
    #[arg(long, conflicts_with = "example")]
    pub json: bool,

    /// Print a commented template for `.env`.
    #[arg(long)]
    pub example: bool,
}

/// Options of `completions`.
#[derive(Debug, Clone, Copy, Args)]
pub struct CompletionsArgs {
    /// Shell to complete for.
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

impl MineArgs {
    /// The options that stand for variables.
    #[must_use]
    pub fn flag_values(&self) -> Vec<FlagValue> {
        let block_ms = self.block_ms.map(|ms| ("GRAIL_LOCAL_BLOCK_MS", "--block-ms", ms.to_string()));
        let max_groups =
            self.max_groups.map(|groups| ("GRAIL_MAX_GROUPS_PER_WINDOW", "--max-groups", groups.to_string()));
        let environment = self.environment.map(|id| ("GRAIL_LOCAL_ENV", "--env", id.to_string()));
        let own = block_ms.into_iter().chain(max_groups).chain(environment);
        let own = own.map(|(variable, flag, value)| FlagValue { variable, flag, value });
        own.chain(environments::unsafe_sandbox(self.unsafe_sandbox)).chain(self.state.flag_values()).collect()
    }
}

impl StateArgs {
    /// The options that stand for variables.
    #[must_use]
    pub fn flag_values(&self) -> Vec<FlagValue> {
        let folder = self.state_dir.as_ref().map(|folder| folder.display().to_string());
        folder.map(|value| FlagValue { variable: "GRAIL_STATE_DIR", flag: "--state-dir", value }).into_iter().collect()
    }
}

/// The completion script for a shell.
#[must_use]
pub fn completions(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "grail-supervisor", &mut script);
    script
}

/// The manual page of the program, with all commands.
///
/// # Errors
/// None in practice: the page is written to memory.
pub fn manual() -> std::io::Result<Vec<u8>> {
    let mut page = Vec::new();
    let mut command = Cli::command();
    command.build();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    add_subcommands(&command, &mut page)?;
    Ok(page)
}

fn add_subcommands(command: &clap::Command, page: &mut Vec<u8>) -> std::io::Result<()> {
    for subcommand in command.get_subcommands().filter(|subcommand| subcommand.get_name() != "help") {
        clap_mangen::Man::new(subcommand.clone()).render(page)?;
        add_subcommands(subcommand, page)?;
    }
    Ok(())
}

fn hexadecimal(text: &str) -> Result<String, String> {
    let digits = text.trim().trim_start_matches("0x");
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err("hexadecimal digits are expected, for instance 64 of them".to_owned());
    }
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests;
