//! `env`, `setup-evaluator` and their options.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand, ValueHint};
use grail_environments::{EnvironmentId, ThinkingMode};
use grail_protocol::ids::{BlockHash, GroupIndex, Hotkey};
use grail_protocol::keys::decode_address;

use super::StateArgs;
use crate::config::FlagValue;

/// Options of `env`.
#[derive(Debug, Clone, Args)]
pub struct EnvArgs {
    #[command(subcommand)]
    pub command: EnvCommand,
}

/// What to ask of environments.
#[derive(Debug, Clone, Subcommand)]
pub enum EnvCommand {
    /// List the environments and whether this host can mine them.
    #[command(
        long_about = "Lists the environments, the number of tasks of each split, and what is missing on this host, without a \
                            download: rows that neither a configured path nor a cache has, an interpreter, a part of the sandbox."
    )]
    List(EnvListArgs),

    /// Show a task: its question, and what its answers are judged by.
    #[command(
        long_about = "Shows the task that a seed, a group of a window or an id means, with what its answers are judged \
                            by. Exit status 66 if there are no rows."
    )]
    Show(EnvShowArgs),

    /// Show the prompt of a task, as text and as token ids.
    #[command(
        long_about = "Shows the prompt that validators recompute for a task, as text and as token ids under a checkpoint's \
                            tokenizer, template and thinking mode."
    )]
    Prompt(EnvPromptArgs),

    /// Judge completions from a file, and say why they earn what they earn.
    #[command(
        long_about = "Judges completions as the miner does. Each line of FILE is an object with `completion`, the decoded text with \
                            special tokens kept, and maybe `task`, the id of a task, or `seed`; without them the task of the \
                            options is meant. For each line one is printed: what was read, the parts of the reward, the reward, \
                            the success, and how every test ended, or why there is no verdict. Exit status 1 if a completion has \
                            no verdict, 75 if the sandbox failed for one, 65 if a line cannot be read."
    )]
    Score(EnvScoreArgs),
}

/// Which rows are used.
#[derive(Debug, Clone, Args)]
pub struct RowsArgs {
    /// Split of the data set, as the environment names it; its default one if absent.
    #[arg(long, value_name = "SPLIT")]
    pub split: Option<String>,

    /// Use the rows that this program carries; those of math are made up.
    #[arg(long)]
    pub embedded: bool,
}

/// Which task is meant.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("task_choice").args(["seed", "task", "group"]))]
pub struct TaskArgs {
    /// Seed of the task.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,

    /// Id of the task, for instance train_17.
    #[arg(long, value_name = "ID")]
    pub task: Option<String>,

    /// Index of a group, whose seed follows from --hotkey and --window-hash.
    #[arg(long, value_name = "N", requires_all = ["hotkey", "window_hash"], value_parser = group_index)]
    pub group: Option<GroupIndex>,

    /// Hotkey of the miner, for --group.
    #[arg(long, value_name = "SS58", requires = "group", value_parser = hotkey)]
    pub hotkey: Option<Hotkey>,

    /// Hash of the window's first block with 0x, for --group.
    #[arg(long, value_name = "HASH", requires = "group", value_parser = block_hash)]
    pub window_hash: Option<BlockHash>,
}

/// Options of `env list`.
#[derive(Debug, Clone, Args)]
pub struct EnvListArgs {
    /// Print one JSON document instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Options of `env show`.
#[derive(Debug, Clone, Args)]
#[command(mut_group("task_choice", |group| group.required(true)))]
pub struct EnvShowArgs {
    /// Environment: gsm8k, math, mbpp or humaneval.
    #[arg(value_name = "ENV")]
    pub environment: EnvironmentId,

    #[command(flatten)]
    pub task: TaskArgs,

    #[command(flatten)]
    pub rows: RowsArgs,

    /// Print one JSON document instead of text.
    #[arg(long)]
    pub json: bool,
}

/// Options of `env prompt`.
#[derive(Debug, Clone, Args)]
#[command(mut_group("task_choice", |group| group.required(true)))]
pub struct EnvPromptArgs {
    /// Environment: gsm8k, math, mbpp or humaneval.
    #[arg(value_name = "ENV")]
    pub environment: EnvironmentId,

    #[command(flatten)]
    pub task: TaskArgs,

    #[command(flatten)]
    pub rows: RowsArgs,

    /// Checkpoint with tokenizer and template: a folder, or the window of a cached one.
    #[arg(long, value_name = "FOLDER|WINDOW", value_hint = ValueHint::DirPath)]
    pub checkpoint: PathBuf,

    /// instructed or native; the one of the checkpoint's metadata if absent.
    #[arg(long, value_name = "MODE")]
    pub thinking_mode: Option<ThinkingMode>,

    #[command(flatten)]
    pub state: StateArgs,

    /// Print one JSON document instead of text.
    #[arg(long)]
    pub json: bool,
}

/// Options of `env score`.
#[derive(Debug, Clone, Args)]
pub struct EnvScoreArgs {
    /// Environment: gsm8k, math, mbpp or humaneval.
    #[arg(value_name = "ENV")]
    pub environment: EnvironmentId,

    /// File of JSON lines; - is standard input.
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,

    #[command(flatten)]
    pub task: TaskArgs,

    #[command(flatten)]
    pub rows: RowsArgs,

    /// instructed or native: whose tags completions are read by.
    #[arg(long, value_name = "MODE", default_value = "instructed")]
    pub thinking_mode: ThinkingMode,

    /// Run programs although the sandbox lacks a part that is required [GRAIL_UNSAFE_SANDBOX].
    #[arg(long)]
    pub unsafe_sandbox: bool,
}

/// Options of `setup-evaluator`.
#[derive(Debug, Clone, Args)]
pub struct SetupEvaluatorArgs {
    /// Change nothing: say what is installed and which parts of the sandbox work.
    #[arg(long)]
    pub probe: bool,

    /// Print one JSON document instead of a table.
    #[arg(long)]
    pub json: bool,
}

impl EnvCommand {
    /// The options that stand for variables.
    #[must_use]
    pub fn flag_values(&self) -> Vec<FlagValue> {
        match self {
            Self::Prompt(args) => args.state.flag_values(),
            Self::Score(args) => unsafe_sandbox(args.unsafe_sandbox).into_iter().collect(),
            Self::List(_) | Self::Show(_) => Vec::new(),
        }
    }
}

/// `--unsafe-sandbox`, where it is given.
pub(super) fn unsafe_sandbox(is_given: bool) -> Option<FlagValue> {
    let value = || FlagValue {
        variable: grail_environments::pool::UNSAFE_VARIABLE,
        flag: "--unsafe-sandbox",
        value: "true".to_owned(),
    };
    is_given.then(value)
}

fn group_index(text: &str) -> Result<GroupIndex, String> {
    text.parse().map(GroupIndex).map_err(|_| "the index of a group is expected, for instance 12".to_owned())
}

fn hotkey(text: &str) -> Result<Hotkey, String> {
    let wrong = |_| "an SS58 address is expected, and this is none or has a typing error".to_owned();
    decode_address(text).map_err(wrong)?;
    Ok(Hotkey(text.to_owned()))
}

fn block_hash(text: &str) -> Result<BlockHash, String> {
    let digits = text.strip_prefix("0x").unwrap_or_default();
    // Seeds hash the text, so that upper case would be another block.
    if digits.len() == 64 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        Ok(BlockHash(text.to_owned()))
    } else {
        Err("the hash of a block is expected: 0x and 64 hexadecimal digits in lower case".to_owned())
    }
}
