//! Why a process ended, and what follows from it.

use std::fmt;

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use crate::exit::ExitCode;

/// How the process itself ended, as the kernel says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCause {
    /// It returned or called exit.
    Code(i32),
    /// A signal killed it; `core` if a core was dumped.
    Signal { signal: Signal, core: bool },
    /// It is gone and its status could not be had.
    Unknown,
}

impl ExitCause {
    /// The cause in a wait status; `None` while the process lives.
    #[must_use]
    pub fn from_status(status: WaitStatus) -> Option<Self> {
        match status {
            WaitStatus::Exited(_, code) => Some(Self::Code(code)),
            WaitStatus::Signaled(_, signal, core) => Some(Self::Signal { signal, core }),
            _ => None,
        }
    }

    /// The exit code, if it ended by itself.
    #[must_use]
    pub fn code(self) -> Option<i32> {
        if let Self::Code(code) = self { Some(code) } else { None }
    }

    /// The signal that ended it.
    #[must_use]
    pub fn signal(self) -> Option<Signal> {
        if let Self::Signal { signal, .. } = self { Some(signal) } else { None }
    }
}

impl fmt::Display for ExitCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => match ExitCode::from_number(*code) {
                Some(known) => write!(f, "exit code {code} ({})", known.meaning()),
                None => write!(f, "exit code {code}"),
            },
            Self::Signal { signal, core: false } => write!(f, "killed by {signal}"),
            Self::Signal { signal, core: true } => write!(f, "killed by {signal}, core dumped"),
            Self::Unknown => f.write_str("gone, status unknown"),
        }
    }
}

/// Why a child of ours is dead: what its watcher knows beyond the exit status comes first.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeathCause {
    /// It was asked to stop.
    Requested,
    /// It ended by itself.
    Exit(ExitCause),
    /// It never ran: the program is missing, cannot be executed, or its limits were refused.
    NotSpawned { detail: String },
    /// It was not ready in time.
    StartHung,
    /// It was reached, but the handshake failed for another reason than its version.
    HandshakeFailed { detail: String },
    /// It speaks another version of the protocol.
    VersionMismatch { ours: u32, theirs: u32 },
    /// It did not answer a sign of life.
    HeartbeatLost,
    /// It did not answer a request in time.
    RequestHung,
    /// Its connection ended or carried nonsense while the process lived.
    ConnectionLost { detail: String },
    /// It ran out of memory, on the device or the host.
    OutOfMemory,
    /// Its device context is of no use any more.
    DevicePoisoned,
    /// It said itself that it cannot go on.
    Broken { detail: String },
}

/// Whether a child comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Start it again, within the limits.
    Restart,
    /// Start it again with a smaller budget; the second time in a row it stays away.
    RestartReduced,
    /// The same start would end the same way.
    Never,
}

impl DeathCause {
    /// What follows from the cause.
    #[must_use]
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Exit(ExitCause::Code(code)) => match ExitCode::from_number(*code) {
                Some(
                    ExitCode::Usage
                    | ExitCode::BadData
                    | ExitCode::MissingInput
                    | ExitCode::NotPermitted
                    | ExitCode::Configuration,
                ) => Disposition::Never,
                _ => Disposition::Restart,
            },
            Self::VersionMismatch { .. } => Disposition::Never,
            Self::OutOfMemory => Disposition::RestartReduced,
            _ => Disposition::Restart,
        }
    }

    /// What the process said with its exit code, if that is one of ours.
    #[must_use]
    pub fn exit_code(&self) -> Option<ExitCode> {
        match self {
            Self::Exit(ExitCause::Code(code)) => ExitCode::from_number(*code),
            _ => None,
        }
    }

    /// Short fixed name, for counters and events.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Exit(ExitCause::Code(_)) => "exit_code",
            Self::Exit(ExitCause::Signal { .. }) => "signal",
            Self::Exit(ExitCause::Unknown) => "unknown",
            Self::NotSpawned { .. } => "not_spawned",
            Self::StartHung => "start_hung",
            Self::HandshakeFailed { .. } => "handshake_failed",
            Self::VersionMismatch { .. } => "version_mismatch",
            Self::HeartbeatLost => "heartbeat_lost",
            Self::RequestHung => "request_hung",
            Self::ConnectionLost { .. } => "connection_lost",
            Self::OutOfMemory => "out_of_memory",
            Self::DevicePoisoned => "device_poisoned",
            Self::Broken { .. } => "broken",
        }
    }
}

impl fmt::Display for DeathCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requested => f.write_str("stopped on request"),
            Self::Exit(cause) => cause.fmt(f),
            Self::NotSpawned { detail } => write!(f, "could not be started: {detail}"),
            Self::StartHung => f.write_str("was not ready in time"),
            Self::HandshakeFailed { detail } => write!(f, "handshake failed: {detail}"),
            Self::VersionMismatch { ours, theirs } => write!(f, "speaks protocol {theirs}, this build speaks {ours}"),
            Self::HeartbeatLost => f.write_str("gave no sign of life"),
            Self::RequestHung => f.write_str("did not answer a request in time"),
            Self::ConnectionLost { detail } => write!(f, "connection lost: {detail}"),
            Self::OutOfMemory => f.write_str("ran out of memory"),
            Self::DevicePoisoned => f.write_str("device context is poisoned"),
            Self::Broken { detail } => write!(f, "cannot go on: {detail}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_from_each_cause() {
        let code = |code| DeathCause::Exit(ExitCause::Code(code)).disposition();
        for number in [2, 65, 66, 77, 78] {
            assert_eq!(code(number), Disposition::Never, "{number}");
        }
        for number in [0, 1, 3, 69, 70, 73, 75, 101, 255] {
            assert_eq!(code(number), Disposition::Restart, "{number}");
        }
        let killed = DeathCause::Exit(ExitCause::Signal { signal: Signal::SIGKILL, core: false });
        assert_eq!(killed.disposition(), Disposition::Restart);
        assert_eq!(DeathCause::OutOfMemory.disposition(), Disposition::RestartReduced);
        assert_eq!(DeathCause::VersionMismatch { ours: 1, theirs: 2 }.disposition(), Disposition::Never);
        assert_eq!(DeathCause::HeartbeatLost.disposition(), Disposition::Restart);
    }

    #[test]
    fn causes_read_well() {
        let aborted = DeathCause::Exit(ExitCause::Signal { signal: Signal::SIGABRT, core: true });
        assert_eq!(aborted.to_string(), "killed by SIGABRT, core dumped");
        assert_eq!(DeathCause::Exit(ExitCause::Code(2)).to_string(), "exit code 2 (usage error)");
        assert_eq!(DeathCause::Exit(ExitCause::Code(9)).to_string(), "exit code 9");
        let other = DeathCause::VersionMismatch { ours: 1, theirs: 2 };
        assert_eq!(other.to_string(), "speaks protocol 2, this build speaks 1");
    }
}
