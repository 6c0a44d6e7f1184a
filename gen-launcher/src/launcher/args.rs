//! Command line of the launcher.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use grail_ipc::messages::{Backend, ServerSpec};
use grail_process::ExitCode;

/// Owner of one generation server: starts it, watches it, gives it new weights, stops it.
#[derive(Debug, Clone, Parser)]
#[command(name = "grail-gen-launcher", version, about, after_help = ExitCode::table())]
pub struct LauncherArgs {
    /// More log lines; twice for even more
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
    #[command(subcommand)]
    pub task: Task,
}

/// What to do.
#[derive(Debug, Clone, Subcommand)]
pub enum Task {
    /// Serve one supervisor over a socket, until it goes away
    Serve(ServeArgs),
    /// Start one server, print its address, run until it ends or SIGINT or SIGTERM comes
    Run(RunArgs),
}

/// Arguments of `serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Socket to listen on; its folder must be private to this user if a token is given
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Number of this launcher among those of the supervisor
    #[arg(long, default_value_t = 0)]
    pub slot: u32,
    /// Incarnation of this launcher
    #[arg(long, default_value_t = 0)]
    pub epoch: u64,
    /// Descriptor from which the token of this slot is read
    #[arg(long, value_name = "FD")]
    pub token_fd: Option<i32>,
    /// Milliseconds between two looks whether the server still answers
    #[arg(long, value_name = "MS", default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub look_interval_ms: u64,
    /// Milliseconds without an answer after which the server is ended
    #[arg(long, value_name = "MS", default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub silence_limit_ms: u64,
}

impl ServeArgs {
    /// How the server is watched.
    #[must_use]
    pub const fn look(&self) -> Look {
        Look {
            every: Duration::from_millis(self.look_interval_ms),
            silence: Duration::from_millis(self.silence_limit_ms),
        }
    }
}

/// How a server that is ready is watched beside its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    pub every: Duration,
    /// A server that answers nothing for so long is of no use.
    pub silence: Duration,
}

/// Arguments of `run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Kind of server
    #[arg(long, value_enum, default_value_t = BackendChoice::Builtin)]
    pub backend: BackendChoice,
    /// Folder of the checkpoint
    #[arg(long, value_name = "DIR")]
    pub model_path: PathBuf,
    /// Label of the weights in answers
    #[arg(long, default_value = "default", value_name = "LABEL")]
    pub weight_version: String,
    /// Most tokens of prompt and completion together
    #[arg(long, default_value_t = 4096, value_name = "TOKENS")]
    pub max_model_len: u32,
    /// Requests that run at once
    #[arg(long, value_name = "N")]
    pub max_running_requests: Option<u32>,
    /// Seed of the draws
    #[arg(long, value_name = "SEED")]
    pub random_seed: Option<u64>,
    /// Threads of a CPU server
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// Seconds that the start may take
    #[arg(long, default_value_t = 600, value_name = "S")]
    pub start_timeout_s: u64,
    /// Program of the builtin server; unset = beside this program
    #[arg(long, value_name = "FILE")]
    pub program: Option<PathBuf>,
}

/// `--backend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendChoice {
    Builtin,
    Sglang,
    Vllm,
}

impl RunArgs {
    /// The same as a supervisor would send.
    #[must_use]
    pub fn spec(&self) -> ServerSpec {
        ServerSpec {
            backend: match self.backend {
                BackendChoice::Builtin => Backend::Builtin,
                BackendChoice::Sglang => Backend::Sglang,
                BackendChoice::Vllm => Backend::Vllm,
            },
            program: self.program.as_ref().map(|program| program.display().to_string()),
            model_path: self.model_path.display().to_string(),
            weight_version: self.weight_version.clone(),
            max_model_len: self.max_model_len,
            max_running_requests: self.max_running_requests,
            gpus: Vec::new(),
            random_seed: self.random_seed,
            threads: self.threads,
            start_timeout_s: self.start_timeout_s,
        }
    }
}
