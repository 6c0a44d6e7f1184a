//! Why the program ends, and with which exit code.

use std::io;
use std::path::PathBuf;

use grail_ipc::handshake::HandshakeError;
use grail_ipc::socket::SocketError;
use grail_model::LoadError;
use grail_process::ExitCode;
use grail_process::fault::FaultError;

/// A failure that ends the program. Texts read after "failed to".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    #[error("load the model: folder {} does not exist", folder.display())]
    NoModel { folder: PathBuf },
    #[error("load the model in {}", folder.display())]
    Load {
        folder: PathBuf,
        #[source]
        source: LoadError,
    },
    #[error("use device {device}: {support}; choose --device cpu or another CUDA_VISIBLE_DEVICES")]
    NoDevice { device: String, support: String },
    #[error("read the token from descriptor {descriptor}")]
    Token {
        descriptor: i32,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("serve: nobody connected within {seconds} s")]
    Nobody { seconds: u64 },
    #[error("serve a peer")]
    Handshake(#[from] HandshakeError),
    #[error("serve: the connection to the supervisor failed")]
    Connection(#[from] grail_ipc::ConnectionError),
    #[error("serve: device is of no use any more: {detail}")]
    Poisoned { detail: String },
    #[error("serve: out of device memory twice in a row: {detail}")]
    OutOfMemory { detail: String },
    #[error("serve: {detail}")]
    Bug { detail: String },
    #[error("start: {what}")]
    Start {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Fault(#[from] FaultError),
    #[error("read {}", path.display())]
    Input {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("prove line {line}: {detail}")]
    Line { line: usize, detail: String },
    #[error("write the proofs")]
    Output(#[source] io::Error),
}

impl WorkerError {
    /// How the program ends by it.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::NoModel { .. } => ExitCode::MissingInput,
            Self::Load { source: LoadError::Torch(_), .. } => ExitCode::Temporary,
            Self::Load { .. } | Self::Line { .. } => ExitCode::BadData,
            Self::NoDevice { .. } => ExitCode::Configuration,
            Self::Token { .. } | Self::Fault(_) => ExitCode::Usage,
            Self::Socket(SocketError::FolderNotPrivate { .. } | SocketError::PathTooLong { .. }) => {
                ExitCode::Configuration
            }
            Self::Socket(_) | Self::Output(_) => ExitCode::CannotWrite,
            Self::Nobody { .. }
            | Self::Connection(_)
            | Self::Poisoned { .. }
            | Self::OutOfMemory { .. }
            | Self::Start { .. } => ExitCode::Temporary,
            Self::Handshake(HandshakeError::Version { .. }) => ExitCode::Usage,
            Self::Handshake(_) => ExitCode::Temporary,
            Self::Bug { .. } => ExitCode::Bug,
            Self::Input { source, .. } if source.kind() == io::ErrorKind::NotFound => ExitCode::MissingInput,
            Self::Input { .. } => ExitCode::BadData,
        }
    }
}
