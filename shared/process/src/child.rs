//! A running child: waiting for it, signalling it, ending it with all that belongs to it.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::getrlimit;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid, waitpid};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::signal::unix::SignalKind;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::cause::ExitCause;
use crate::cgroup::{Leaf, Memory};
use crate::logs::{Log, Stream};
use crate::pre_exec::{self, NodeMask, Preparation};
use crate::spawner;
use crate::spec::{ChildSpec, Output, SpawnError, Stdin};
use crate::sweep::Family;

/// How long the rest of a family may take to die, and the rest of a log to arrive.
const SWEEP_LIMIT: Duration = Duration::from_secs(5);
const LOG_LIMIT: Duration = Duration::from_secs(1);

/// How long a control group may stay busy after its last process has ended, and how often it is looked at.
const REMOVAL_LIMIT: Duration = Duration::from_secs(1);
const REMOVAL_PAUSE: Duration = Duration::from_millis(5);

/// How long a process may take to end after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Makes this process the parent of all descendants whose own parent ends, so that none can slip away.
///
/// # Errors
/// What the kernel says.
pub fn become_subreaper() -> io::Result<()> {
    nix::sys::prctl::set_child_subreaper(true).map_err(io::Error::from)
}

/// The end of a child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub cause: ExitCause,
    /// Members of its family that had to be killed.
    pub killed: usize,
    /// Members that did not die: processes that wait in the kernel for a device.
    pub survivors: Vec<i32>,
}

/// A signal that could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignalError {
    #[error("signal a child that is gone")]
    Gone,
    #[error("signal a child")]
    Refused(#[source] Errno),
}

/// A process that did not end after SIGKILL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "end process {pid}: it did not end within {KILL_LIMIT:?} after SIGKILL, so it waits in the kernel for a device"
)]
pub struct Unkillable {
    pub pid: i32,
}

/// Who gets a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopTarget {
    Leader,
    Group,
}

/// One signal and the time that the child then has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopStep {
    pub signal: Signal,
    pub target: StopTarget,
    pub grace: Duration,
}

/// How a child is ended: step by step, and at last with SIGKILL for the whole group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopPlan {
    pub steps: Vec<StopStep>,
}

impl StopPlan {
    /// SIGTERM to the leader, then `grace`.
    #[must_use]
    pub fn terminate(grace: Duration) -> Self {
        Self::default().then(Signal::SIGTERM, StopTarget::Leader, grace)
    }

    /// SIGKILL at once.
    #[must_use]
    pub fn kill() -> Self {
        Self::default()
    }

    /// The longest that [`Child::stop`] may take by this plan.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.steps.iter().map(|step| step.grace).sum::<Duration>()
            + KILL_LIMIT
            + SWEEP_LIMIT
            + LOG_LIMIT
            + REMOVAL_LIMIT
    }

    /// Waits `grace` for a child that has been told otherwise.
    #[must_use]
    pub fn then(mut self, signal: Signal, target: StopTarget, grace: Duration) -> Self {
        self.steps.push(StopStep { signal, target, grace });
        self
    }
}

/// A child of this process. Dropping it kills it and its family.
#[derive(Debug)]
pub struct Child {
    name: String,
    leader: Arc<Leader>,
    exit: watch::Receiver<Option<Exit>>,
    log: Arc<Log>,
    pipes: Mutex<Pipes>,
    family: Family,
}

#[derive(Debug, Default)]
struct Pipes {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
}

/// The process itself; its number is ours until it is reaped.
struct Leader {
    pid: Pid,
    is_reaped: Mutex<bool>,
    cgroup: Option<Arc<Leaf>>,
}

impl Leader {
    /// Runs `act` while the pid, and the group's number, cannot belong to anybody else.
    fn while_ours(&self, act: impl FnOnce(Pid) -> Result<(), Errno>) -> Result<(), SignalError> {
        let is_reaped = self.is_reaped.lock().unwrap_or_else(PoisonError::into_inner);
        if *is_reaped {
            return Err(SignalError::Gone);
        }
        act(self.pid)
            .map_err(|error| if error == Errno::ESRCH { SignalError::Gone } else { SignalError::Refused(error) })
    }

    fn reap(&self) {
        let mut is_reaped = self.is_reaped.lock().unwrap_or_else(PoisonError::into_inner);
        if !*is_reaped {
            *is_reaped = true;
            if let Err(error) = waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
                debug!(pid = %self.pid, %error, "A child was reaped by somebody else.");
            }
        }
    }

    /// Ends leader, group and control group without waiting.
    fn kill_all(&self) {
        self.while_ours(|pid| killpg(pid, Signal::SIGKILL)).unwrap_or_default();
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill();
        }
    }
}

impl fmt::Debug for Leader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leader").field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// Starts a child, from the thread that never ends.
///
/// # Errors
/// [`SpawnError`].
///
/// # Panics
/// Outside a tokio runtime with I/O enabled.
pub async fn spawn(spec: ChildSpec) -> Result<Child, SpawnError> {
    let program = spec.program.clone();
    let command = command(&spec)?;
    let started =
        spawner::spawn(command, spec.inherited).await.ok_or(SpawnError::NoSpawner { program: program.clone() })?;
    let mut process = started.map_err(|source| SpawnError::Exec { program: program.clone(), source })?;
    // A pid always fits.
    let pid = Pid::from_raw(i32::try_from(process.id()).unwrap_or(i32::MAX));
    let cgroup = spec.cgroup.map(Arc::new);
    let leader = Arc::new(Leader { pid, is_reaped: Mutex::new(false), cgroup: cgroup.clone() });
    // Whatever fails from here on must not leave the process behind.
    let guard = KillGuard(Arc::clone(&leader));
    let watch =
        ExitWatch::open(pid).map_err(|source| SpawnError::Prepare { program, what: "watch for its end", source })?;

    let log = Arc::new(Log::new(spec.name.clone(), pid.as_raw(), spec.log));
    let mut readers = Vec::new();
    if let Some(stderr) = process.stderr.take() {
        readers.push(tokio::spawn(Arc::clone(&log).follow(Stream::Stderr, stderr.into())));
    }
    let mut pipes = Pipes { stdin: process.stdin.take().map(OwnedFd::from), stdout: None };
    match (spec.stdout, process.stdout.take()) {
        (Output::Log, Some(stdout)) => {
            readers.push(tokio::spawn(Arc::clone(&log).follow(Stream::Stdout, stdout.into())));
        }
        (_, stdout) => pipes.stdout = stdout.map(OwnedFd::from),
    }
    debug!(child = %spec.name, %pid, "Started a child.");

    let family = Family { leader: pid, marker: spec.marker, cgroup };
    let (publish, exit) = watch::channel(None);
    tokio::spawn(see_through(watch, guard, family.clone(), readers, publish));
    Ok(Child { name: spec.name, leader, exit, log, pipes: Mutex::new(pipes), family })
}

impl Child {
    /// The name that its spec gave it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.leader.pid.as_raw()
    }

    /// Waits until the process has ended, nothing of its family is left, and its log is read. Safe to cancel, and to call from
    /// several places.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone(),
            // The runtime shuts down.
            Err(_) => None,
        }
        .unwrap_or(Exit { cause: ExitCause::Unknown, killed: 0, survivors: Vec::new() })
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }

    /// Sends `signal` to the process.
    ///
    /// # Errors
    /// [`SignalError`].
    pub fn signal(&self, signal: Signal) -> Result<(), SignalError> {
        self.leader.while_ours(|pid| kill(pid, signal))
    }

    /// Sends `signal` to the process and its group.
    ///
    /// # Errors
    /// [`SignalError`].
    pub fn signal_group(&self, signal: Signal) -> Result<(), SignalError> {
        self.leader.while_ours(|pid| killpg(pid, signal))
    }

    /// Ends it by `plan` and waits for the end of all that belongs to it.
    ///
    /// # Errors
    /// [`Unkillable`] if not even SIGKILL ends it.
    pub async fn stop(&self, plan: &StopPlan) -> Result<Exit, Unkillable> {
        for step in &plan.steps {
            let sent = match step.target {
                StopTarget::Leader => self.signal(step.signal),
                StopTarget::Group => self.signal_group(step.signal),
            };
            if let Err(error @ SignalError::Refused(_)) = sent {
                warn!(child = %self.name, %error, "Could not signal a child.");
            }
            if let Ok(exit) = tokio::time::timeout(step.grace, self.wait()).await {
                return Ok(exit);
            }
            debug!(child = %self.name, signal = %step.signal, grace = ?step.grace, "Child did not end in its grace.");
        }
        self.leader.kill_all();
        // The sweep has a limit of its own after the process has ended.
        let limit = KILL_LIMIT + SWEEP_LIMIT + LOG_LIMIT;
        tokio::time::timeout(limit, self.wait()).await.map_err(|_| Unkillable { pid: self.pid() })
    }

    /// The last lines of its log, oldest first.
    #[must_use]
    pub fn last_lines(&self) -> Vec<String> {
        self.log.kept_lines()
    }

    /// Living processes of its family, without itself.
    #[must_use]
    pub fn members(&self) -> Vec<i32> {
        self.family.members().into_iter().map(Pid::as_raw).collect()
    }

    /// Memory of it and all that it has started; the last reading once it has ended. `None` without a control group.
    #[must_use]
    pub fn memory(&self) -> Option<Memory> {
        self.leader.cgroup.as_ref().map(|cgroup| cgroup.memory())
    }

    /// Whether the kernel has killed it, or anything that it has started, because memory ran out. Only control groups with a
    /// memory account tell; without one the answer is no.
    #[must_use]
    pub fn was_oom_killed(&self) -> bool {
        self.leader.cgroup.as_ref().is_some_and(|cgroup| cgroup.was_oom_killed())
    }

    /// The writing end of its standard input, once, if the spec asked for a pipe.
    ///
    /// # Errors
    /// If the descriptor cannot be used asynchronously.
    pub fn take_stdin(&self) -> io::Result<Option<pipe::Sender>> {
        self.pipes().stdin.take().map(pipe::Sender::from_owned_fd).transpose()
    }

    /// The reading end of its standard output, once, if the spec asked for a pipe.
    ///
    /// # Errors
    /// If the descriptor cannot be used asynchronously.
    pub fn take_stdout(&self) -> io::Result<Option<pipe::Receiver>> {
        self.pipes().stdout.take().map(pipe::Receiver::from_owned_fd).transpose()
    }

    fn pipes(&self) -> std::sync::MutexGuard<'_, Pipes> {
        self.pipes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.leader.kill_all();
    }
}

/// Kills the child when the task that watches it is dropped with the runtime.
struct KillGuard(Arc<Leader>);

impl Drop for KillGuard {
    fn drop(&mut self) {
        self.0.kill_all();
        self.0.reap();
    }
}

/// Waits for the process, ends its family while its zombie still holds the group's number, reaps it, and tells.
async fn see_through(
    mut watch: ExitWatch,
    guard: KillGuard,
    family: Family,
    readers: Vec<JoinHandle<()>>,
    publish: watch::Sender<Option<Exit>>,
) {
    let cause = watch.ended().await;
    let swept = family.sweep(SWEEP_LIMIT).await;
    let aborts: Vec<_> = readers.iter().map(JoinHandle::abort_handle).collect();
    let all_read = async {
        for reader in readers {
            if let Err(error) = reader.await {
                warn!(%error, "Reading a child's log failed.");
            }
        }
    };
    if tokio::time::timeout(LOG_LIMIT, all_read).await.is_err() {
        // Somebody outside the family holds the pipe.
        for abort in aborts {
            abort.abort();
        }
    }
    guard.0.reap();
    if let Some(cgroup) = &family.cgroup {
        remove(cgroup).await;
    }
    debug!(pid = %family.leader, %cause, killed = swept.killed, "A child has ended.");
    publish.send_replace(Some(Exit { cause, killed: swept.killed, survivors: swept.survivors }));
}

/// Removes an empty control group; the kernel may count the dead for a moment.
async fn remove(cgroup: &Leaf) {
    let removal = async {
        while cgroup.remove().is_err() {
            tokio::time::sleep(REMOVAL_PAUSE).await;
        }
    };
    if tokio::time::timeout(REMOVAL_LIMIT, removal).await.is_err() {
        warn!(folder = %cgroup.folder().display(), "A control group stays behind until the next start.");
    }
}

/// Tells when a process has ended, without reaping it.
enum ExitWatch {
    PidFd(Pid, AsyncFd<OwnedFd>),
    /// Where there are no pidfds: looks at every SIGCHLD.
    Sigchld(Pid, tokio::signal::unix::Signal),
}

impl ExitWatch {
    fn open(pid: Pid) -> io::Result<Self> {
        match pre_exec::open_pidfd(pid) {
            Ok(descriptor) => {
                // SAFETY: the descriptor is owned by the `AsyncFd`, which deregisters it before it closes it, and nothing else
                // closes it.
                let watched = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?;
                Ok(Self::PidFd(pid, watched))
            }
            Err(Errno::ENOSYS | Errno::EPERM) => {
                Ok(Self::Sigchld(pid, tokio::signal::unix::signal(SignalKind::child())?))
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn ended(&mut self) -> ExitCause {
        loop {
            let pid = match self {
                Self::PidFd(pid, _) | Self::Sigchld(pid, _) => *pid,
            };
            match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT) {
                Ok(status) => {
                    if let Some(cause) = ExitCause::from_status(status) {
                        return cause;
                    }
                }
                Err(Errno::EINTR) => continue,
                // Somebody else has reaped it.
                Err(_) => return ExitCause::Unknown,
            }
            match self {
                Self::PidFd(_, descriptor) => match descriptor.readable().await {
                    // Its end is a state, not an event: what is readable once stays so.
                    Ok(mut ready) => ready.clear_ready(),
                    Err(_) => return ExitCause::Unknown,
                },
                Self::Sigchld(_, signals) => {
                    if signals.recv().await.is_none() {
                        return ExitCause::Unknown;
                    }
                }
            }
        }
    }
}

fn command(spec: &ChildSpec) -> Result<Command, SpawnError> {
    let mut command = Command::new(&spec.program);
    command.args(&spec.arguments).env_clear();
    let mut variables = spec.environment.resolve(std::env::vars_os());
    if let Some(marker) = &spec.marker {
        variables.insert(OsString::from(&marker.variable), OsString::from(&marker.value));
    }
    command.envs(variables);
    if let Some(directory) = &spec.directory {
        command.current_dir(directory);
    }
    let prepare = |what, source| SpawnError::Prepare { program: spec.program.clone(), what, source };
    command.stdin(match &spec.stdin {
        Stdin::Null => Stdio::null(),
        Stdin::Piped => Stdio::piped(),
        Stdin::From(descriptor) => {
            Stdio::from(descriptor.try_clone().map_err(|source| prepare("copy its standard input", source))?)
        }
    });
    command.stdout(if spec.stdout == Output::Null { Stdio::null() } else { Stdio::piped() });
    command.stderr(Stdio::piped());

    let mut limits = Vec::with_capacity(spec.limits.len());
    for limit in &spec.limits {
        let (_, most) = getrlimit(limit.resource).map_err(|error| prepare("read a resource limit", error.into()))?;
        limits.push((limit.resource, limit.soft.min(most), limit.hard.min(most)));
    }
    let preparation = Preparation {
        parent: Pid::this(),
        grouping: spec.grouping,
        parent_death_signal: spec.parent_death_signal,
        limits,
        oom_score_adjustment: spec.oom_score_adjustment.map(|score| score.clamp(-1_000, 1_000).to_string()),
        cpus: cpu_set(spec)?,
        preferred_nodes: spec.numa_node.and_then(NodeMask::only),
        entrance: entrance(spec),
        inherited: spec.inherited.iter().map(AsRawFd::as_raw_fd).collect(),
    };
    pre_exec::install(&mut command, preparation);
    Ok(command)
}

/// The way into the child's control group; without it the child runs outside.
fn entrance(spec: &ChildSpec) -> Option<std::fs::File> {
    let opened = spec.cgroup.as_ref()?.entrance();
    opened.inspect_err(|error| warn!(child = %spec.name, %error, "A child cannot enter its control group.")).ok()
}

fn cpu_set(spec: &ChildSpec) -> Result<Option<CpuSet>, SpawnError> {
    if spec.cpus.is_empty() {
        return Ok(None);
    }
    let refused = |source: Errno| SpawnError::Prepare {
        program: spec.program.clone(),
        what: "read the CPUs of this process",
        source: source.into(),
    };
    let ours = sched_getaffinity(Pid::from_raw(0)).map_err(refused)?;
    let mut cpus = CpuSet::new();
    for cpu in &spec.cpus {
        let is_ours = ours.is_set(*cpu).unwrap_or(false);
        if !is_ours || cpus.set(*cpu).is_err() {
            return Err(SpawnError::NoSuchCpu { program: spec.program.clone(), cpu: *cpu });
        }
    }
    Ok(Some(cpus))
}
