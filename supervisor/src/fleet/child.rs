//! What all children of the supervisor have in common: where their programs lie, how they are reached, what they may see.

use std::path::{Path, PathBuf};

use grail_ipc::messages::{Epoch, SlotId};
use grail_ipc::socket::{RuntimeFolder, SocketError};
use grail_ipc::{Expected, HandshakeError, Token};
use grail_process::cause::DeathCause;
use grail_process::state::GiveUp;
use grail_process::{ChildSpec, Environment, ExitCode, Incarnation, NotReady};

/// Variables that children get beside the harmless ones: none of them is a secret.
const PASSED_ON: [&str; 5] =
    ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "RUST_BACKTRACE", "NO_COLOR", grail_process::fault::VARIABLE];

/// A child that cannot be described.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChildDefect {
    #[error("program {name} is neither beside {} nor on PATH; install it there", folder.display())]
    ProgramMissing { name: &'static str, folder: PathBuf },
    #[error(transparent)]
    Socket(#[from] grail_ipc::socket::SocketError),
    #[error("prepare the child's token")]
    Token(#[source] std::io::Error),
}

/// Our own program `name`: beside the running one, else on PATH.
///
/// # Errors
/// [`ChildDefect::ProgramMissing`] says where it was looked for.
pub fn sibling_program(name: &'static str) -> Result<PathBuf, ChildDefect> {
    let own = std::env::current_exe().unwrap_or_default();
    let folder = own.parent().unwrap_or(Path::new(".")).to_owned();
    let on_path = std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
    std::iter::once(folder.clone())
        .chain(on_path.unwrap_or_default())
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
        .ok_or(ChildDefect::ProgramMissing { name, folder })
}

/// The description of a child that serves: socket, slot, incarnation and token are handed over, secrets are not.
///
/// # Errors
/// [`ChildDefect`].
pub fn serving(
    name: &str,
    (program, variables): (&Path, &[(&'static str, String)]),
    runtime: &RuntimeFolder,
    (slot, incarnation): (SlotId, Incarnation),
) -> Result<(ChildSpec, Expected, PathBuf), ChildDefect> {
    let epoch = Epoch(incarnation.number);
    let socket = runtime.socket(&format!("{name}.{epoch}.sock"))?;
    let token = Token::generate().map_err(ChildDefect::Token)?;
    let mut spec = ChildSpec::new(name, program);
    let descriptor = spec.hand_over(token.as_bytes()).map_err(ChildDefect::Token)?;
    let passed_on = PASSED_ON.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
    let resolved = variables.iter().map(|(name, value)| (*name, value.into()));
    spec.environment = passed_on
        .chain(resolved)
        .fold(Environment::harmless(), |environment, (name, value)| environment.with(name, value));
    let spec = spec
        .argument("serve")
        .arguments(["--slot".to_owned(), slot.to_string(), "--epoch".to_owned(), epoch.to_string()])
        .arguments(["--token-fd".to_owned(), descriptor.to_string(), "--socket".to_owned()])
        .argument(socket.as_os_str());
    Ok((spec, Expected::child(slot, epoch, token), socket))
}

/// What a child that no other start would help says of the reason.
pub(super) fn hopeless_exit(reason: &GiveUp) -> Option<ExitCode> {
    match reason {
        GiveUp::Hopeless { cause: DeathCause::VersionMismatch { .. } } => Some(ExitCode::Configuration),
        GiveUp::Hopeless { cause } => cause.exit_code(),
        _ => None,
    }
}

/// What a failed handshake says about the child.
#[must_use]
pub fn not_ready(error: &HandshakeError) -> NotReady {
    NotReady(match error {
        HandshakeError::Version { ours, theirs, .. } => DeathCause::VersionMismatch { ours: *ours, theirs: *theirs },
        // The limit of the handshake is the limit of the start: whichever is noticed first means the same.
        HandshakeError::Deadline { .. } | HandshakeError::Socket(SocketError::NobodyListens { .. }) => {
            DeathCause::StartHung
        }
        error => DeathCause::HandshakeFailed { detail: grail_process::with_causes(error) },
    })
}
