//! The command line.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, ValueEnum};
use grail_model::Device;
use grail_protocol::constants::WINDOW_LENGTH;
use grail_protocol::ids::{BlockNumber, WindowStart};

/// Trains the two demo checkpoints and judges them; exits with 1 if a criterion is missed.
#[derive(Debug, Parser)]
#[command(name = "grail-demo-trainer", version)]
pub struct Cli {
    /// Folder for `first/`, `second/` and `metadata.json`.
    #[arg(long, value_name = "FOLDER", default_value = "deploy/demo")]
    pub out: PathBuf,
    /// Tasks to learn.
    #[arg(long, value_enum, default_value_t = TaskSet::Split)]
    pub tasks: TaskSet,
    /// Seed of the local chain whose windows are judged; random numbers follow from it too.
    #[arg(long, value_name = "TEXT", default_value = "grail-demo")]
    pub seed: String,
    /// Windows of the local chain: the first is sampled from the first checkpoint, the second from the second.
    #[arg(long, value_name = "FIRST..=LAST", default_value = "3000..=3120")]
    pub windows: Windows,
    /// Groups of a window.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub groups: usize,
    /// Steps up to the first checkpoint.
    #[arg(long, value_name = "N", default_value_t = 7_000)]
    pub steps: usize,
    /// Steps from there to the second one.
    #[arg(long, value_name = "N", default_value_t = 700)]
    pub further_steps: usize,
    /// Tasks of one step.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub tasks_per_step: usize,
    /// Completions of each task in one step.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub completions_per_task: usize,
    /// Largest learning rate.
    #[arg(long, value_name = "RATE", default_value_t = 2e-3)]
    pub rate: f64,
    /// cpu, cuda or cuda:N. On a GPU matrix products are bf16.
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// Threads of matrix products on the CPU, and threads that make batches.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub threads: usize,
    /// Judge the checkpoints that are in the folder already.
    #[arg(long)]
    pub only_judge: bool,
}

/// Which tasks are learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TaskSet {
    /// All tasks of the split `train`, so that any window of any local chain has known tasks. For a GPU.
    Split,
    /// Only those of the given windows. Feasible on a CPU.
    Windows,
}

/// A range of windows, by first block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows(RangeInclusive<u64>);

impl Windows {
    /// All windows of the range, in order.
    pub fn iter(&self) -> impl Iterator<Item = WindowStart> {
        let step = usize::try_from(WINDOW_LENGTH).unwrap_or(usize::MAX);
        self.0.clone().step_by(step).map(|block| WindowStart::containing(BlockNumber(block)))
    }
}

/// A text that is no range of windows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no range of windows: FIRST..=LAST is expected, both multiples of 30 and LAST the larger")]
pub struct NotWindows(String);

impl FromStr for Windows {
    type Err = NotWindows;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bound = |text: &str| text.trim().parse::<u64>().ok().filter(|block| block.is_multiple_of(WINDOW_LENGTH));
        text.split_once("..=")
            .and_then(|(first, last)| Some((bound(first)?, bound(last)?)))
            .filter(|(first, last)| first < last)
            .map(|(first, last)| Self(first..=last))
            .ok_or_else(|| NotWindows(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        let cli = Cli::parse_from(["grail-demo-trainer"]);
        let windows: Vec<u64> = cli.windows.iter().map(u64::from).collect();
        assert_eq!(windows, [3_000, 3_030, 3_060, 3_090, 3_120]);
    }

    #[test]
    fn bad_ranges_are_refused() {
        for text in ["3000", "3000..3030", "3000..=3001", "3030..=3000", "3000..=3000", "a..=b"] {
            assert_eq!(text.parse::<Windows>(), Err(NotWindows(text.to_owned())));
        }
    }
}
