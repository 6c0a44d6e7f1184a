//! What to run and how.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::sys::resource::{RLIM_INFINITY, Resource, rlim_t};
use nix::sys::signal::Signal;

use crate::cgroup::Leaf;
use crate::environment::Environment;
use crate::logs::LogPolicy;

/// A child that could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError {
    #[error("start {}", program.display())]
    Exec {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("start {}: {what}", program.display())]
    Prepare {
        program: PathBuf,
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("start {}: CPU {cpu} is none of this process's", program.display())]
    NoSuchCpu { program: PathBuf, cpu: usize },
    #[error("start {}: the spawning thread is gone", program.display())]
    NoSpawner { program: PathBuf },
}

/// What a child's standard input is.
#[derive(Debug, Default)]
pub enum Stdin {
    /// Nothing to read.
    #[default]
    Null,
    /// A pipe whose other end [`crate::Child::take_stdin`] gives.
    Piped,
    /// This descriptor.
    From(OwnedFd),
}

/// Where a child's standard output goes; its standard error always goes to the log.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// To the log.
    #[default]
    Log,
    /// Into a pipe whose other end [`crate::Child::take_stdout`] gives.
    Piped,
    /// Nowhere.
    Null,
}

/// What the child leads, so that all that it starts can be found.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Grouping {
    /// A process group of its own.
    #[default]
    Group,
    /// A session of its own, and with it a group.
    Session,
}

/// A resource limit. Both numbers are lowered to what this process may set.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    pub resource: Resource,
    pub soft: rlim_t,
    pub hard: rlim_t,
}

impl Limit {
    /// `value` for both numbers.
    #[must_use]
    pub fn fixed(resource: Resource, value: rlim_t) -> Self {
        Self { resource, soft: value, hard: value }
    }

    /// As much as this process may set.
    #[must_use]
    pub fn most(resource: Resource) -> Self {
        Self::fixed(resource, RLIM_INFINITY)
    }
}

/// A variable by which descendants are recognised even when they have left the group: they inherit it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marker {
    pub variable: String,
    /// Unguessable and new for each child.
    pub value: String,
}

/// What to run and how.
///
/// By default: harmless variables only, nothing on stdin, both outputs to the log, a process group of its own, killed when this
/// process dies, no core dump, no new privileges, and no descriptor but the three standard ones.
#[derive(Debug)]
pub struct ChildSpec {
    /// Name in logs and events, for instance `worker-0`.
    pub name: String,
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    pub environment: Environment,
    /// Working directory; unset = ours.
    pub directory: Option<PathBuf>,
    pub stdin: Stdin,
    pub stdout: Output,
    pub grouping: Grouping,
    /// Signal that the kernel sends it when this process dies.
    pub parent_death_signal: Option<Signal>,
    pub limits: Vec<Limit>,
    /// Which process the kernel kills first when memory runs out, -1000..=1000; what it refuses is left out.
    pub oom_score_adjustment: Option<i16>,
    /// CPUs it may run on; empty = all of ours.
    pub cpus: Vec<usize>,
    /// NUMA node that its memory comes from as long as there is some; what the kernel refuses is left out.
    pub numa_node: Option<u32>,
    /// Control group that it enters; what the kernel refuses is left out.
    pub cgroup: Option<Leaf>,
    pub log: LogPolicy,
    pub marker: Option<Marker>,
    pub(crate) inherited: Vec<OwnedFd>,
}

impl ChildSpec {
    /// `program`, found along PATH if it has no slash, without arguments.
    #[must_use]
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            arguments: Vec::new(),
            environment: Environment::default(),
            directory: None,
            stdin: Stdin::default(),
            stdout: Output::default(),
            grouping: Grouping::default(),
            parent_death_signal: Some(Signal::SIGKILL),
            limits: vec![Limit::fixed(Resource::RLIMIT_CORE, 0)],
            oom_score_adjustment: None,
            cpus: Vec::new(),
            numa_node: None,
            cgroup: None,
            log: LogPolicy::default(),
            marker: None,
            inherited: Vec::new(),
        }
    }

    /// Appends one argument.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Appends arguments.
    #[must_use]
    pub fn arguments<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Lets the child have `descriptor`, under the number that this gives, for an argument.
    pub fn inherit(&mut self, descriptor: OwnedFd) -> RawFd {
        let number = descriptor.as_raw_fd();
        self.inherited.push(descriptor);
        number
    }

    /// Hands `bytes` (at most one page) to the child: it reads them to the end from the descriptor whose number this gives.
    ///
    /// # Errors
    /// If no pipe can be made.
    pub fn hand_over(&mut self, bytes: &[u8]) -> io::Result<RawFd> {
        /// What a pipe takes without a reader, whatever the limits are.
        const PAGE_BYTES: usize = 4_096;
        if bytes.len() > PAGE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than a page would block"));
        }
        let (reader, mut writer) = io::pipe()?;
        writer.write_all(bytes)?;
        Ok(self.inherit(reader.into()))
    }
}
