//! The command line of a server, and the port it gets.

use std::ffi::OsString;
use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use grail_ipc::generate_api::CONTEXT_RESERVE_TOKENS;
use grail_ipc::messages::{Backend, ServerPhase, ServerSpec};
use grail_process::{ChildSpec, Environment, Grouping, LogPolicy, Marker, Signal};

use super::marks::PhaseFollower;
use crate::folder::CheckpointFolder;

/// Tokens of context beyond what the supervisor uses: a server keeps two for itself and refuses prompts six short of the end.
const SPARE_CONTEXT: u32 = 8;
/// Variable by which all processes of one incarnation are found.
pub const INCARNATION_VARIABLE: &str = "GRAIL_GEN_INCARNATION";
/// Program of the builtin server, beside the launcher.
const BUILTIN_PROGRAM: &str = "grail-builtin-server";

/// A server that cannot be started as asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    #[error("backend {0:?} is not supported by this build yet, use builtin")]
    Backend(Backend),
    #[error(
        "the checkpoint's max_position_embeddings is {model}, max_model_len {asked} does not fit: lower it to {fits}"
    )]
    Context { model: usize, asked: u32, fits: usize },
    #[error("find the builtin server beside {launcher}")]
    NoProgram {
        launcher: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("find a free port on the loopback interface")]
    NoPort(#[source] std::io::Error),
}

/// One start of a server.
#[derive(Debug)]
pub struct ServerCommand {
    pub child: ChildSpec,
    pub url: String,
    pub port: u16,
    /// Unguessable name by which the server is known to be ours.
    pub served_name: String,
    /// What its log has told so far.
    pub phases: Arc<PhaseFollower>,
}

/// Called with each phase that the log tells, and with the line.
pub type PhaseSink = Arc<dyn Fn(ServerPhase, &str) + Send + Sync>;

/// The command line for `spec`, on `port` if one is given, else on a free one.
///
/// # Errors
/// [`CommandError`]
pub fn build(
    spec: &ServerSpec,
    folder: &CheckpointFolder,
    port: Option<u16>,
    phase_sink: PhaseSink,
) -> Result<ServerCommand, CommandError> {
    if spec.backend != Backend::Builtin {
        return Err(CommandError::Backend(spec.backend));
    }
    let context_length = context_length(spec.max_model_len, folder)?;
    let port = match port {
        Some(port) => port,
        None => free_port().map_err(CommandError::NoPort)?,
    };
    let served_name = format!("grail-{:016x}", unguessable());
    let mut arguments: Vec<OsString> = [
        "--model-path",
        &spec.model_path,
        "--served-model-name",
        &served_name,
        "--host",
        "127.0.0.1",
        "--port",
        &port.to_string(),
        "--context-length",
        &context_length.to_string(),
        "--weight-version",
        &spec.weight_version,
        "--drain-poll-ms",
        "50",
    ]
    .map(OsString::from)
    .into();
    let mut optional = |flag: &str, value: Option<String>| {
        if let Some(value) = value {
            arguments.extend([flag.into(), value.into()]);
        }
    };
    optional("--max-running-requests", spec.max_running_requests.map(|count| count.to_string()));
    optional("--random-seed", spec.random_seed.map(|seed| seed.to_string()));
    optional("--threads", spec.threads.map(|threads| threads.to_string()));

    let phases = Arc::new(PhaseFollower::default());
    let mut child = ChildSpec::new("generation-server", program(spec)?).arguments(arguments);
    child.environment = Environment::harmless();
    if let Some(faults) = std::env::var_os(grail_process::fault::VARIABLE) {
        child.environment.set(grail_process::fault::VARIABLE, faults);
    }
    child.grouping = Grouping::Session;
    child.parent_death_signal = Some(Signal::SIGKILL);
    child.marker = Some(Marker { variable: INCARNATION_VARIABLE.to_owned(), value: format!("{:016x}", unguessable()) });
    child.log = log_policy(Arc::clone(&phases), phase_sink);
    Ok(ServerCommand { child, url: format!("http://127.0.0.1:{port}"), port, served_name, phases })
}

/// Room for `max_model_len` tokens of prompt and completion, and for what the server keeps; never more than the model has.
fn context_length(max_model_len: u32, folder: &CheckpointFolder) -> Result<usize, CommandError> {
    let wanted = (max_model_len + SPARE_CONTEXT) as usize;
    let Some(model) = folder.count("max_position_embeddings") else { return Ok(wanted) };
    let length = wanted.min(model);
    let fits = length.saturating_sub(CONTEXT_RESERVE_TOKENS as usize);
    if fits < max_model_len as usize {
        return Err(CommandError::Context { model, asked: max_model_len, fits });
    }
    Ok(length)
}

fn program(spec: &ServerSpec) -> Result<PathBuf, CommandError> {
    if let Some(program) = &spec.program {
        return Ok(PathBuf::from(program));
    }
    let launcher = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("grail-gen-launcher"));
    let program = launcher.parent().unwrap_or(Path::new(".")).join(BUILTIN_PROGRAM);
    match program.metadata() {
        Ok(_) => Ok(program),
        Err(source) => Err(CommandError::NoProgram { launcher, source }),
    }
}

/// A port that was free a moment ago. Another process may take it first: then the server says so and gets another.
fn free_port() -> std::io::Result<u16> {
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    Ok(listener.local_addr()?.port())
}

/// From the standard library's per-process random keys.
fn unguessable() -> u64 {
    RandomState::new().hash_one(std::time::SystemTime::now())
}

fn log_policy(phases: Arc<PhaseFollower>, phase_sink: PhaseSink) -> LogPolicy {
    let redactor = grail_telemetry::Redactor::from_environment();
    LogPolicy::to_sink(move |line| {
        if line.left_out > 0 {
            tracing::warn!(target: "grail_server", left_out = line.left_out, "Lines of the server were left out.");
        }
        tracing::info!(target: "grail_server", pid = line.pid, "{}", line.text);
        if let Some(phase) = phases.observe(line.text) {
            phase_sink(phase, line.text);
        }
    })
    .scrubbed_by(move |text| redactor.redact(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> ServerSpec {
        ServerSpec {
            backend: Backend::Builtin,
            program: Some("/opt/server".to_owned()),
            model_path: "/a folder/ü".to_owned(),
            weight_version: "w1".to_owned(),
            max_model_len: 512,
            max_running_requests: Some(32),
            gpus: vec![],
            random_seed: Some(7),
            threads: None,
            start_timeout_s: 60,
        }
    }

    fn folder() -> CheckpointFolder {
        CheckpointFolder::open(&grail_golden::path("models/qwen2-tied")).unwrap()
    }

    fn sink() -> PhaseSink {
        Arc::new(|_, _| {})
    }

    #[test]
    fn the_command_line_says_what_the_spec_says() {
        let command = build(&spec(), &folder(), Some(31_000), sink()).unwrap();
        let arguments: Vec<&str> = command.child.arguments.iter().map(|word| word.to_str().unwrap()).collect();
        let value = |flag: &str| {
            let place = arguments.iter().position(|word| *word == flag)?;
            arguments.get(place + 1).copied()
        };
        assert_eq!(value("--model-path"), Some("/a folder/ü"));
        assert_eq!(value("--served-model-name"), Some(command.served_name.as_str()));
        assert_eq!((value("--host"), value("--port")), (Some("127.0.0.1"), Some("31000")));
        assert_eq!(value("--context-length"), Some("520"));
        assert_eq!((value("--weight-version"), value("--random-seed")), (Some("w1"), Some("7")));
        assert_eq!((value("--max-running-requests"), value("--threads")), (Some("32"), None));
        assert_eq!(command.url, "http://127.0.0.1:31000");
        assert_eq!(command.child.parent_death_signal, Some(Signal::SIGKILL));
        assert_eq!(command.child.grouping, Grouping::Session);
        let other = build(&spec(), &folder(), None, sink()).unwrap();
        assert_ne!(other.served_name, command.served_name);
        assert_ne!(other.child.marker, command.child.marker);
        assert_ne!(other.port, 0);
    }

    #[test]
    fn the_model_bounds_the_context() {
        let with = |max_model_len| build(&ServerSpec { max_model_len, ..spec() }, &folder(), Some(1), sink());
        // The model has 2,048 positions.
        for (asked, given) in [(2_040, "2048"), (2_046, "2048"), (2_039, "2047")] {
            let command = with(asked).unwrap();
            assert!(command.child.arguments.iter().any(|word| word == given), "{asked}");
        }
        assert!(matches!(with(2_047), Err(CommandError::Context { model: 2_048, asked: 2_047, fits: 2_046 })));
    }

    #[test]
    fn other_backends_are_refused_by_name() {
        for backend in [Backend::Sglang, Backend::Vllm] {
            let error = build(&ServerSpec { backend, ..spec() }, &folder(), None, sink()).unwrap_err();
            assert!(error.to_string().ends_with("is not supported by this build yet, use builtin"), "{error}");
        }
    }
}
