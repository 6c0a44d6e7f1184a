//! Starting, watching and stopping a child process.
//!
//! [`ChildSpec`] says what to run, [`spawn`] runs it from one thread that never ends, [`Child`] watches and stops it with
//! everything that belongs to it. [`state`] is the life of a child as a pure function, [`restart`] decides whether and when it
//! comes back, and [`supervise`] ties them together for one child. [`exit`] is the table of exit codes
//! of all our binaries, [`fault`] what tests make them do wrong.

pub mod cause;
mod child;
pub mod environment;
pub mod exit;
pub mod fault;
pub mod logs;
mod pre_exec;
pub mod restart;
mod spawner;
mod spec;
pub mod state;
pub mod supervised;
pub mod sweep;

pub use cause::{DeathCause, Disposition, ExitCause};
pub use child::{Child, Exit, SignalError, StopPlan, StopStep, StopTarget, Unkillable, become_subreaper, spawn};
pub use environment::Environment;
pub use exit::ExitCode;
pub use logs::{LogLine, LogPolicy, Stream};
pub use nix::sys::resource::Resource;
pub use nix::sys::signal::Signal;
pub use spec::{ChildSpec, Grouping, Limit, Marker, Output, SpawnError, Stdin};
pub use supervised::{ChildEvent, ChildPolicy, Incarnation, NotReady, Role, Supervised, supervise};
