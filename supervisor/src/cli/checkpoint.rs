//! `checkpoint` and its options.

use std::str::FromStr;

use clap::{Args, Subcommand};
use grail_protocol::ids::{BlockNumber, CheckpointWindow, WindowStart};

use super::StateArgs;
use crate::config::FlagValue;

/// Options of `checkpoint`.
#[derive(Debug, Clone, Args)]
pub struct CheckpointArgs {
    #[command(subcommand)]
    pub command: CheckpointCommand,
}

/// What to do with checkpoints.
#[derive(Debug, Clone, Subcommand)]
pub enum CheckpointCommand {
    /// List the checkpoints of the trainer's store and of the cache.
    #[command(
        long_about = "Lists what the trainer's store holds, which of it a window must be mined with, and what the cache of \
                            this host holds. A checkpoint without a READY marker is named by no window, but deltas may be \
                            based on it."
    )]
    List(ListArgs),

    /// Show what was published as one checkpoint, and the ways to get it.
    #[command(
        long_about = "Shows the metadata of both trees of a checkpoint with the verdict on each, its files, and the routes by \
                            which it can be had, cheapest first, with the bytes that each takes."
    )]
    Show(ShowArgs),

    /// Install a checkpoint in the cache.
    #[command(
        long_about = "Installs a checkpoint in the cache, as the miner does it: by the cheapest route, every file verified. What \
                            is there already and verifies is not fetched again. Exit status 66 if the store does not have it, \
                            65 if what was published is damaged on every route, 69 if the store does not answer, 73 if the \
                            disk is full or another process holds the cache."
    )]
    Fetch(FetchArgs),

    /// Check cached checkpoints byte by byte.
    #[command(
        long_about = "Reads cached checkpoints whole and holds them against their manifest, their weights hash and their \
                            tensors' checksums. Exit status 1 if one is damaged; file and difference are named. The miner \
                            itself repairs a damaged checkpoint when it needs it next."
    )]
    Verify(CheckpointVerifyArgs),

    /// Remove cached checkpoints that nobody needs.
    #[command(
        long_about = "Removes checkpoints from the cache until it keeps the configured limits, the oldest first. What a running \
                            supervisor uses always stays."
    )]
    Prune(PruneArgs),
}

/// Options of `checkpoint list`.
#[derive(Debug, Clone, Args)]
pub struct ListArgs {
    /// Window to name the checkpoint for; the chain's next window without it.
    #[arg(long, value_name = "WINDOW", value_parser = window_start, conflicts_with = "cache_only")]
    pub window: Option<WindowStart>,

    /// List the cache only.
    #[arg(long, conflicts_with = "store_only")]
    pub cache_only: bool,

    /// List the trainer's store only.
    #[arg(long)]
    pub store_only: bool,

    #[command(flatten)]
    pub state: StateArgs,

    /// Print one JSON document instead of tables.
    #[arg(long)]
    pub json: bool,
}

/// Options of `checkpoint show`.
#[derive(Debug, Clone, Args)]
pub struct ShowArgs {
    /// Window of the checkpoint.
    #[arg(value_name = "WINDOW", value_parser = checkpoint_window)]
    pub checkpoint: CheckpointWindow,

    #[command(flatten)]
    pub state: StateArgs,

    /// Print one JSON document instead of text.
    #[arg(long)]
    pub json: bool,
}

/// Which checkpoint `checkpoint fetch` installs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchTarget {
    /// The one that became READY last.
    Latest,
    Window(CheckpointWindow),
}

impl FromStr for FetchTarget {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "latest" {
            return Ok(Self::Latest);
        }
        checkpoint_window(text).map(Self::Window).map_err(|detail| format!("{detail}, or latest"))
    }
}

/// Options of `checkpoint fetch`.
#[derive(Debug, Clone, Args)]
pub struct FetchArgs {
    /// Window of the checkpoint, or `latest` for the one that became READY last.
    #[arg(value_name = "WINDOW|latest")]
    pub checkpoint: FetchTarget,

    #[command(flatten)]
    pub state: StateArgs,

    /// Print one JSON document instead of a sentence.
    #[arg(long)]
    pub json: bool,
}

/// Options of `checkpoint verify`.
#[derive(Debug, Clone, Args)]
pub struct CheckpointVerifyArgs {
    /// Window of one checkpoint; all that are cached without it.
    #[arg(value_name = "WINDOW", value_parser = checkpoint_window)]
    pub checkpoint: Option<CheckpointWindow>,

    #[command(flatten)]
    pub state: StateArgs,

    /// Print one JSON document instead of lines.
    #[arg(long)]
    pub json: bool,
}

/// Options of `checkpoint prune`.
#[derive(Debug, Clone, Args)]
pub struct PruneArgs {
    /// Checkpoints to keep, those in use among them [GRAIL_KEEP_CHECKPOINTS].
    #[arg(long, value_name = "N")]
    pub keep: Option<u64>,

    /// Size in GiB to keep at most; 0 = any [GRAIL_KEEP_CHECKPOINTS_GIB].
    #[arg(long, value_name = "N")]
    pub max_gib: Option<u64>,

    /// Age in days to keep at most [GRAIL_KEEP_CHECKPOINTS_DAYS].
    #[arg(long, value_name = "N")]
    pub max_age_days: Option<u64>,

    /// Say what would be removed, and remove nothing.
    #[arg(long)]
    pub dry_run: bool,

    #[command(flatten)]
    pub state: StateArgs,

    /// Print one JSON document instead of lines.
    #[arg(long)]
    pub json: bool,
}

impl CheckpointCommand {
    /// The options that stand for variables.
    #[must_use]
    pub fn flag_values(&self) -> Vec<FlagValue> {
        match self {
            Self::List(args) => args.state.flag_values(),
            Self::Show(args) => args.state.flag_values(),
            Self::Fetch(args) => args.state.flag_values(),
            Self::Verify(args) => args.state.flag_values(),
            Self::Prune(args) => args.flag_values(),
        }
    }
}

impl PruneArgs {
    fn flag_values(&self) -> Vec<FlagValue> {
        let limits = [
            ("GRAIL_KEEP_CHECKPOINTS", "--keep", self.keep),
            ("GRAIL_KEEP_CHECKPOINTS_GIB", "--max-gib", self.max_gib),
            ("GRAIL_KEEP_CHECKPOINTS_DAYS", "--max-age-days", self.max_age_days),
        ];
        let limits = limits.into_iter().filter_map(|(variable, flag, value)| {
            value.map(|value| FlagValue { variable, flag, value: value.to_string() })
        });
        limits.chain(self.state.flag_values()).collect()
    }
}

fn checkpoint_window(text: &str) -> Result<CheckpointWindow, String> {
    text.parse()
        .map(CheckpointWindow)
        .map_err(|_| "the window of a checkpoint is expected, for instance 3000".to_owned())
}

fn window_start(text: &str) -> Result<WindowStart, String> {
    let block: u64 =
        text.parse().map_err(|_| "the first block of a window is expected, for instance 3000".to_owned())?;
    let containing = || WindowStart::containing(BlockNumber(block));
    WindowStart::try_from(block)
        .map_err(|_| format!("no window begins there: block {block} is in window {}", containing()))
}
