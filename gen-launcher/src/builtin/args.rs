//! Command line of the builtin server: the spellings of SGLang for what it shares, and a few of its own.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use grail_model::Dtype;

/// Generation server on the CPU, for tests and for mining without a GPU.
#[derive(Debug, Clone, PartialEq, Parser)]
#[command(name = "grail-builtin-server", version, about, after_help = EXIT_CODES)]
pub struct ServerArgs {
    /// Folder of the checkpoint: config.json, safetensors, tokenizer
    #[arg(long, alias = "model", value_name = "DIR")]
    pub model_path: PathBuf,
    /// Name that /v1/models shows; unset = the model path
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0 = any free one
    #[arg(long, default_value_t = 30000)]
    pub port: u16,
    /// Accepted for SGLang's sake; without effect
    #[arg(long, visible_alias = "tensor-parallel-size", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub tp_size: u32,
    /// Most tokens of prompt and completion together; unset = the model's own limit
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub context_length: Option<usize>,
    /// Requests that run at once
    #[arg(long, value_name = "N", default_value = "64", value_parser = positive)]
    pub max_running_requests: usize,
    /// Seed of the draws; unset = another one at every start
    #[arg(long, value_name = "SEED")]
    pub random_seed: Option<u64>,
    /// Label of the weights in answers
    #[arg(long, value_name = "LABEL", default_value = "default")]
    pub weight_version: String,
    /// Ids in, ids out: no text in answers, end tokens from the configuration only
    #[arg(long)]
    pub skip_tokenizer_init: bool,
    /// Precision: auto (= float32), float32 or bfloat16
    #[arg(long, default_value = "auto", value_parser = dtype)]
    pub dtype: DtypeChoice,
    /// Threads of one tensor operation; unset = one a core
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
    /// Least duration of a decode step in milliseconds, to imitate slower hardware
    #[arg(long, value_name = "MS")]
    pub step_ms: Option<u64>,
    /// Tokens of all running requests together; unset = context length times running requests
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    pub kv_tokens: Option<usize>,
    /// How often a draining server looks whether its last request has ended, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 5_000)]
    pub drain_poll_ms: u64,
    /// Idle child processes to start, as a server with one process a GPU has them
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub spawn_children: u32,
    /// Ignore flags that are unknown
    #[arg(long)]
    pub lenient: bool,
    /// Be one of the idle children of the process with this pid
    #[arg(long, hide = true, value_name = "PID")]
    pub idle_child_of: Option<i32>,
}

const EXIT_CODES: &str = "\
Exit codes: 1 the model cannot be loaded or the port not bound, 2 usage, 70 the model failed while it generated,
143 ended by SIGTERM after the last request, 137 ended by SIGQUIT at once.";

/// `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DtypeChoice {
    Auto,
    Only(Dtype),
}

impl DtypeChoice {
    /// `None` = the device's own.
    #[must_use]
    pub const fn dtype(self) -> Option<Dtype> {
        match self {
            Self::Auto => None,
            Self::Only(dtype) => Some(dtype),
        }
    }
}

impl std::fmt::Display for DtypeChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Only(dtype) => dtype.fmt(f),
        }
    }
}

fn dtype(text: &str) -> Result<DtypeChoice, String> {
    match text {
        "auto" => Ok(DtypeChoice::Auto),
        other => {
            other.parse().map(DtypeChoice::Only).map_err(|error: grail_model::device::NotADtype| error.to_string())
        }
    }
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads a command line, the program's name first. With `--lenient` unknown flags and their values are left out; they are
/// returned beside the arguments.
///
/// # Errors
/// What clap says; help and version are among it.
pub fn parse(line: impl IntoIterator<Item = OsString>) -> Result<(ServerArgs, Vec<String>), clap::Error> {
    let mut line: Vec<OsString> = line.into_iter().collect();
    let is_lenient = line.iter().any(|word| word == "--lenient");
    let mut ignored = Vec::new();
    loop {
        let error = match ServerArgs::try_parse_from(&line) {
            Ok(args) => return Ok((args, ignored)),
            Err(error) => error,
        };
        let Some(flag) = unknown_flag(&error).filter(|_| is_lenient) else { return Err(error) };
        let starts = |word: &OsString| {
            let word = word.to_string_lossy();
            word == flag || word.strip_prefix(&flag).is_some_and(|rest| rest.starts_with('='))
        };
        let Some(place) = line.iter().position(starts) else { return Err(error) };
        line.remove(place);
        while line.get(place).is_some_and(|word| !word.to_string_lossy().starts_with('-')) {
            line.remove(place);
        }
        ignored.push(flag);
    }
}

fn unknown_flag(error: &clap::Error) -> Option<String> {
    match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(ContextValue::String(flag))) if flag.starts_with('-') => Some(flag.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &str) -> Result<(ServerArgs, Vec<String>), clap::Error> {
        parse(std::iter::once("server").chain(words.split_whitespace()).map(OsString::from))
    }

    #[test]
    fn sglang_spellings_are_understood() {
        let (args, ignored) = read(
            "--model-path /m --served-model-name n --host 127.0.0.1 --port 31000 --tp-size 4 --context-length 4104 \
             --max-running-requests 528 --random-seed 7 --weight-version w --skip-tokenizer-init --dtype bfloat16",
        )
        .unwrap();
        assert_eq!((args.port, args.tp_size, args.context_length), (31000, 4, Some(4104)));
        assert_eq!((args.max_running_requests, args.random_seed), (528, Some(7)));
        assert_eq!(args.dtype, DtypeChoice::Only(Dtype::Bf16));
        assert!(args.skip_tokenizer_init && ignored.is_empty());
        let (args, _) = read("--model /m").unwrap();
        assert_eq!((args.port, args.max_running_requests, args.weight_version.as_str()), (30000, 64, "default"));
        assert_eq!(args.dtype.dtype(), None);
    }

    #[test]
    fn bad_values_and_unknown_flags_are_usage_errors() {
        for words in [
            "",
            "--model-path /m --tp-size 0",
            "--model-path /m --port 70000",
            "--model-path /m --context-length 0",
            "--model-path /m --dtype int8",
            "--model-path /m --mem-fraction-static 0.9",
            "--model-path /m --lenient --tp-size 0",
        ] {
            let error = read(words).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{words}");
        }
        assert_eq!(read("--help").unwrap_err().exit_code(), 0);
    }

    #[test]
    fn lenient_leaves_unknown_flags_out() {
        let (args, ignored) =
            read("--model-path /m --mem-fraction-static 0.9 --disable-cuda-graph --lenient --log-level=info --port 5")
                .unwrap();
        assert_eq!(args.port, 5);
        assert_eq!(ignored, ["--mem-fraction-static", "--disable-cuda-graph", "--log-level"]);
    }
}
