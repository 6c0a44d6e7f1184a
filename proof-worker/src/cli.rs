//! The command line.

use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{ArgGroup, Args, Parser, Subcommand};
use grail_model::{Device, Dtype};
use grail_process::ExitCode;
use grail_telemetry::{Format, Options};

use crate::profile::{Lengths, Shape};
use crate::torch::Shadow;

static EXIT_CODES: LazyLock<String> = LazyLock::new(ExitCode::table);

const PROVE_FORMAT: &str = "\
Input, one JSON object a line (blank lines are skipped):
  prompt        token ids of the prompt
  completions   list of token ids of each completion
  randomness    64 hexadecimal digits: the randomness of the window
  eos_token     id of the tokenizer's EOS

Output, one JSON object for each input line, in order:
  schema        1
  line          number of the input line, from 1
  weights_hash  hash of the weights that proved
  completions   for each completion:
    sketches           of all positions, the prompt's included
    logprobs           of the completion tokens
    eos_probability    of the EOS token in the row before the last token
    token_hash         of prompt and completion
    commitments_hash   of the sketches

A line that is wrong ends the run with exit code 65; what was proved before it has been printed.

Example:
  echo '{\"prompt\":[1,2],\"completions\":[[3,4]],\"randomness\":\"00…ff\",\"eos_token\":4}' |
    grail-proof-worker prove - --model DIR";

const PROFILE_NOTES: &str = "\
DIST is fixed:N, uniform:A-B (both included) or lognormal:MEAN,SIGMA (mean of the lengths, deviation of their logarithms). Lengths
are cut at --max-tokens. Tokens are random: what they mean does not change the work.

Useful TFLOP/s count what a proof needs: projections of all tokens with the prompt once, the causal half of attention, the output
matrix on the completions' rows. The matrix product that they are compared with is measured in the same process.

Stages are timed in one more pass, which waits for the device around each of them and is slower for it.

Examples:
  grail-proof-worker profile --shape qwen2-1.5b --device cuda:0 --prompt fixed:200 --completion lognormal:800,0.5
  grail-proof-worker profile --model DIR --recorded window-3000.groups --trace trace.json
  grail-proof-worker profile --connect /run/worker.sock --model DIR";

const PROFILE_RELOAD_NOTES: &str = "\
A worker serves two requests in flight while it takes a checkpoint from its folder (full) and by changes of its weights (delta): with
a second copy of the weights, made ready with the command or before it (staged), and in place. Total is the time from the command to
the weights being in place, checked; stall is the part of it in which nothing could be proved.

Example:
  grail-proof-worker profile-reload --shape qwen2-1.5b --device cuda:0 --prompt-tokens 200 --completion-tokens 800 --members 16";

const SERVE_NOTES: &str = "\
Started by a supervisor, it gets --slot, --epoch and --token-fd, serves that one peer, and ends when the peer hangs up; the
socket's folder must be private (mode 0700), and the path is unlinked once the peer is known.

Standing alone, without --token-fd, it serves one peer after the other until it is stopped. Only peers of the same user are let in.";

/// One process, one GPU, one model: proofs without wallet or network.
#[derive(Debug, Parser)]
#[command(name = "grail-proof-worker", version, about, after_help = EXIT_CODES.as_str(), max_term_width = 120)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
    /// Log more: -v debug, -vv trace (GRAIL_LOG takes filter directives and wins)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Shape of log lines on stderr: human or json
    #[arg(long, global = true, value_name = "FORMAT", default_value = "human")]
    log_format: Format,
}

impl Arguments {
    /// How to log.
    #[must_use]
    pub fn logging(&self) -> Options {
        Options::from_environment(self.verbose, self.log_format)
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Prove and verify for a supervisor, over a local socket
    #[command(after_help = SERVE_NOTES)]
    Serve(ServeArguments),
    /// Prove groups from a file and print the proofs
    #[command(after_help = PROVE_FORMAT)]
    Prove(ProveArguments),
    /// Measure how fast groups are proved, and where the time goes
    #[command(after_help = PROFILE_NOTES)]
    Profile(Box<ProfileArguments>),
    /// Measure how long other weights take, and what requests in flight notice of it
    #[command(after_help = PROFILE_RELOAD_NOTES)]
    ProfileReload(Box<ProfileReloadArguments>),
}

/// Arguments of `serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArguments {
    /// Path of the socket to listen on
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Number of this worker's slot
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub slot: u32,
    /// Incarnation of this worker in its slot
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub epoch: u64,
    /// Inherited descriptor that holds the slot's token
    #[arg(long, value_name = "FD")]
    pub token_fd: Option<i32>,
    /// Whether a reload may have a second copy of the weights for its time
    #[arg(long, env = "GRAIL_RELOAD_SHADOW", value_name = "WHEN", value_enum, default_value_t)]
    pub reload_shadow: Shadow,
    #[command(flatten)]
    pub model: ModelArguments,
}

/// Arguments of `prove`.
#[derive(Debug, Clone, Args)]
pub struct ProveArguments {
    /// File of JSON lines, or - for standard input
    #[arg(value_name = "FILE")]
    pub input: PathBuf,
    #[command(flatten)]
    pub model: ModelArguments,
}

/// Arguments of `profile`.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("what").required(true).multiple(true).args(["folder", "shape", "connect"]))]
pub struct ProfileArguments {
    /// Folder of the checkpoint: config.json and safetensors; with --connect only its shape is read
    #[arg(long = "model", value_name = "DIR", conflicts_with = "shape")]
    pub folder: Option<PathBuf>,
    /// A known shape with random weights: qwen2-0.5b, qwen2-1.5b, qwen2-7b or qwen3-4b
    #[arg(long)]
    pub shape: Option<Shape>,
    /// Measure the worker that serves at this socket, with two requests in flight
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["device", "dtype", "threads", "batch_tokens"])]
    pub connect: Option<PathBuf>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// float32 (f32) or bfloat16 (bf16) [default: float32 on cpu, bfloat16 on cuda]
    #[arg(long)]
    pub dtype: Option<Dtype>,
    /// Threads of one operation on the CPU [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Most tokens of one packed batch; a longer single sequence runs alone [default: 16384 on cpu, 32768 on cuda]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch_tokens: Option<u32>,
    /// Groups from a file that `mine --record` wrote, instead of synthetic ones
    #[arg(long, value_name = "FILE", conflicts_with_all = ["groups", "prompt", "completion", "max_tokens", "longest", "seed"])]
    pub recorded: Option<PathBuf>,
    /// Synthetic groups of 16 rollouts
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub groups: u32,
    /// Lengths of prompts
    #[arg(long, value_name = "DIST", default_value = "fixed:200")]
    pub prompt: Lengths,
    /// Lengths of completions
    #[arg(long, value_name = "DIST", default_value = "lognormal:800,0.5")]
    pub completion: Lengths,
    /// Longest synthetic prompt and completion
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..=131_072))]
    pub max_tokens: u32,
    /// Length of one completion of the first synthetic group, whatever is drawn for it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=131_072))]
    pub longest: Option<u32>,
    /// Cases of a file, or of standard input (-), one JSON object a line: prompt, completion, groups, longest, seed, warm_up,
    /// repeats, stages; a report is printed behind each, one JSON document a line
    #[arg(long, value_name = "FILE", conflicts_with_all = ["connect", "recorded", "groups", "prompt", "completion", "max_tokens",
        "longest", "seed", "warm_up", "repeats", "trace", "json"])]
    pub cases: Option<PathBuf>,
    /// Number from which the synthetic groups follow
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Passes over all groups before the timed ones
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub warm_up: u32,
    /// Timed passes over all groups
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub repeats: u32,
    /// Write a trace for Chrome or Perfetto
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Print one JSON document instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `profile-reload`.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("base").required(true).args(["folder", "shape"]))]
pub struct ProfileReloadArguments {
    /// Folder of the checkpoint to start from
    #[arg(long = "model", value_name = "DIR", conflicts_with_all = ["layers", "file_dtype"])]
    pub folder: Option<PathBuf>,
    /// A known shape, filled with random weights: qwen2-0.5b, qwen2-1.5b, qwen2-7b or qwen3-4b
    #[arg(long)]
    pub shape: Option<Shape>,
    /// Layers instead of the shape's own
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub layers: Option<u32>,
    /// Precision of the files with random weights
    #[arg(long, value_name = "DTYPE", default_value = "bfloat16")]
    pub file_dtype: Dtype,
    /// Shares of the elements that deltas change
    #[arg(long, value_name = "SHARES", default_value = "0.01,0.05", value_delimiter = ',', value_parser = share)]
    pub changed: Vec<f64>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// float32 (f32) or bfloat16 (bf16) [default: float32 on cpu, bfloat16 on cuda]
    #[arg(long)]
    pub dtype: Option<Dtype>,
    /// Threads of one operation on the CPU [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Leave out folders that are read to where the weights lie, which takes longest
    #[arg(long)]
    pub no_folder_in_place: bool,
    /// Prompt of the requests in flight
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub prompt_tokens: u32,
    /// Each completion of the requests in flight
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub completion_tokens: u32,
    /// Completions of the requests in flight
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub members: u32,
    /// Reloads of each kind
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeats: u32,
    /// Folder for the checkpoints, which are removed in the end: one and one more for each share [default: that for temporary
    /// files]
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// Print one JSON document instead of a table
    #[arg(long)]
    pub json: bool,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (1e-6..=1.0).contains(&share) => Ok(share),
        _ => Err("write a share from 0.000001 to 1".to_owned()),
    }
}

/// Which model, where and how.
#[derive(Debug, Clone, Args)]
pub struct ModelArguments {
    /// Folder of the checkpoint: config.json and safetensors
    #[arg(long = "model", value_name = "DIR")]
    pub folder: PathBuf,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: Device,
    /// float32 (f32) or bfloat16 (bf16) [default: float32 on cpu, bfloat16 on cuda]
    #[arg(long)]
    pub dtype: Option<Dtype>,
    /// Threads of one operation on the CPU [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// Most tokens of one packed batch; a longer single sequence runs alone [default: 16384 on cpu, 32768 on cuda]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch_tokens: Option<u32>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn what_a_supervisor_passes_is_understood() {
        let line = "grail-proof-worker serve --slot 1 --epoch 3 --token-fd 7 --socket /run/x.sock --model /m \
                    --device cuda:0 --dtype bfloat16 --threads 2 --batch-tokens 4096";
        let arguments = Arguments::try_parse_from(line.split_ascii_whitespace()).unwrap();
        let Command::Serve(serve) = arguments.command else { panic!("serve") };
        assert_eq!((serve.slot, serve.epoch, serve.token_fd), (1, 3, Some(7)));
        assert_eq!((serve.model.device, serve.model.dtype), (Device::Cuda(0), Some(Dtype::Bf16)));
        assert_eq!((serve.model.threads, serve.model.batch_tokens), (Some(2), Some(4_096)));
    }

    #[test]
    fn wrong_values_are_refused_by_name() {
        for (arguments, text) in [
            ("prove - --model m --device tpu", "tpu"),
            ("prove - --model m --dtype f8", "f8"),
            ("prove - --model m --threads 0", "0"),
            ("serve --model m", "--socket"),
            ("profile", "--model <DIR>"),
            ("profile --model m --shape qwen2-7b", "--shape"),
            ("profile --shape qwen2-9b", "qwen2-0.5b, qwen2-1.5b"),
            ("profile --connect s --device cuda", "--device"),
            ("profile --model m --recorded f --groups 2", "--groups"),
            ("profile --model m --completion 800", "write fixed:N, uniform:A-B or lognormal:MEAN,SIGMA"),
            ("profile --model m --prompt uniform:9-5", "the first length is larger than the second"),
            ("profile --model m --repeats 0", "0"),
            ("profile-reload", "--model <DIR>"),
            ("profile-reload --model m --layers 3", "--layers"),
            ("profile-reload --shape qwen2-0.5b --changed 0.1,2", "write a share from 0.000001 to 1"),
        ] {
            let line = std::iter::once("grail-proof-worker").chain(arguments.split_ascii_whitespace());
            let error = Arguments::try_parse_from(line).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
