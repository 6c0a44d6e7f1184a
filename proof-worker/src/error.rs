//! Why the program ends, and with which exit code.

use std::io;
use std::path::PathBuf;

use grail_ipc::RequestError;
use grail_ipc::handshake::HandshakeError;
use grail_ipc::record::RecordError;
use grail_ipc::socket::SocketError;
use grail_model::gpu::GpuSupport;
use grail_model::{LoadError, TorchError};
use grail_process::ExitCode;
use grail_process::fault::FaultError;
use grail_protocol::ids::GroupIndex;

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
    #[error("use device {device}: {support}; {}", support.remedy())]
    NoDevice { device: String, support: GpuSupport },
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
    #[error("serve: weights are suspect: {detail}")]
    SuspectWeights { detail: String },
    #[error("serve: weights are lost: {detail}")]
    WeightsLost { detail: String },
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
    #[error("make a model of shape {shape}")]
    RandomModel {
        shape: String,
        #[source]
        source: LoadError,
    },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("profile: {} holds no whole group; record more with `mine --record`", path.display())]
    NoGroups { path: PathBuf },
    #[error("profile group {group}: {detail}")]
    Group { group: GroupIndex, detail: String },
    #[error("measure a matrix product")]
    Yardstick(#[source] TorchError),
    #[error("connect to the worker at {}", socket.display())]
    Connect {
        socket: PathBuf,
        #[source]
        source: HandshakeError,
    },
    #[error("profile group {group} on the worker")]
    Request {
        group: GroupIndex,
        #[source]
        source: RequestError,
    },
    #[error("ask the worker for its memory")]
    Lost(#[source] RequestError),
    #[error("write the trace {}", path.display())]
    Trace {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("use the scratch file {}", path.display())]
    Scratch {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("start the worker to be measured")]
    StartWorker(#[source] grail_process::SpawnError),
    #[error("reload the worker that is measured")]
    Reload(#[source] RequestError),
    #[error("print the profile")]
    Print(#[source] io::Error),
}

impl WorkerError {
    /// How the program ends by it.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::NoModel { .. } => ExitCode::MissingInput,
            Self::Load { source: LoadError::Torch(_), .. }
            | Self::RandomModel { .. }
            | Self::Yardstick(_)
            | Self::Request { .. }
            | Self::StartWorker(_)
            | Self::Reload(_)
            | Self::Lost(_) => ExitCode::Temporary,
            Self::Record(RecordError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                ExitCode::MissingInput
            }
            Self::Load { source, .. } if is_of_reading(source) => ExitCode::Temporary,
            Self::Load { .. } | Self::Line { .. } | Self::Record(_) | Self::NoGroups { .. } | Self::Group { .. } => {
                ExitCode::BadData
            }
            Self::Connect { source: HandshakeError::Version { .. }, .. } => ExitCode::Usage,
            Self::Connect { .. } => ExitCode::Unavailable,
            Self::NoDevice { support, .. } if support.may_change() => ExitCode::Temporary,
            Self::NoDevice { .. } => ExitCode::Configuration,
            Self::Token { .. } | Self::Fault(_) => ExitCode::Usage,
            Self::Socket(SocketError::FolderNotPrivate { .. } | SocketError::PathTooLong { .. }) => {
                ExitCode::Configuration
            }
            Self::Socket(_) | Self::Output(_) | Self::Trace { .. } | Self::Scratch { .. } | Self::Print(_) => {
                ExitCode::CannotWrite
            }
            Self::Nobody { .. }
            | Self::Connection(_)
            | Self::Poisoned { .. }
            | Self::OutOfMemory { .. }
            | Self::SuspectWeights { .. }
            | Self::WeightsLost { .. }
            | Self::Start { .. } => ExitCode::Temporary,
            Self::Handshake(HandshakeError::Version { .. }) => ExitCode::Usage,
            Self::Handshake(_) => ExitCode::Temporary,
            Self::Bug { .. } => ExitCode::Bug,
            Self::Input { source, .. } if source.kind() == io::ErrorKind::NotFound => ExitCode::MissingInput,
            Self::Input { .. } => ExitCode::BadData,
        }
    }
}

/// Whether a folder could not be read, against being read and found wrong: a disk or a network that fails may be well again.
fn is_of_reading(error: &LoadError) -> bool {
    let mut causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.find_map(|cause| cause.downcast_ref::<io::Error>()).is_some_and(|error| {
        !matches!(
            error.kind(),
            io::ErrorKind::NotFound
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::InvalidData
                | io::ErrorKind::UnexpectedEof
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_cannot_be_read_may_be_readable_later() {
        let code = |error: io::Error| {
            let source = LoadError::from(grail_model::ConfigError::Read { path: "config.json".into(), source: error });
            WorkerError::Load { folder: "model".into(), source }.exit_code()
        };
        assert_eq!(code(io::Error::from(nix::errno::Errno::EIO)), ExitCode::Temporary);
        assert_eq!(code(io::ErrorKind::NotFound.into()), ExitCode::BadData);
        assert_eq!(code(io::ErrorKind::InvalidData.into()), ExitCode::BadData);
    }

    #[test]
    fn a_gpu_that_may_come_is_waited_for_and_another_is_not() {
        let code = |support: GpuSupport| WorkerError::NoDevice { device: "cuda:0".to_owned(), support }.exit_code();
        let loaded = |devices| GpuSupport::Loaded {
            library: "libtorch_cuda.so".into(),
            origin: grail_model::gpu::Origin::Python,
            devices,
        };
        assert_eq!(code(loaded(0)), ExitCode::Temporary);
        assert_eq!(code(GpuSupport::Unanswered { reason: "slow".to_owned() }), ExitCode::Temporary);
        assert_eq!(code(loaded(1)), ExitCode::Configuration);
        assert_eq!(code(GpuSupport::Absent { reason: "no torch".to_owned() }), ExitCode::Configuration);
    }
}
