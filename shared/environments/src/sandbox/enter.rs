//! The way in: what the helper does with itself until it is the interpreter.
//!
//! There are two stages, each a program start of its own, because a namespace of processes holds only those that are started
//! after it was made. The first makes the namespaces, starts the second in them and waits; the second builds the new root,
//! restricts itself and becomes the interpreter. Nothing here runs between fork and exec.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::error::EnterError;
use super::layers::Layer;
use super::plan::{Plan, ZYGOTE};
use super::{filters, namespaces, restrict, root};

/// First stage.
pub(crate) const OUTER: &str = "outer";
/// Second stage.
const INNER: &str = "inner";
/// This program, whatever became of its file meanwhile.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// Where the kernel tells, and is told, how nice this session is.
const OWN_GROUP: &str = "/proc/self/autogroup";
const MOST_NICE_TRIES: u32 = 5;
const NICE_PAUSE: Duration = Duration::from_millis(110);
/// What a shell says of a process that a signal ended.
const SIGNAL_CODE: i32 = 128;

/// Does what `arguments`, the last two of this process, say: enters a sandbox and becomes the interpreter in it. Must be called
/// before any thread is started. Returns only if it fails, which it says on stderr, or when the interpreter has ended.
#[must_use]
pub fn enter_and_exec(arguments: &[OsString]) -> ExitCode {
    match stage(arguments) {
        Ok(status) => ExitCode::from(u8::try_from(exit_value(status)).unwrap_or(u8::MAX)),
        Err(error) => {
            eprintln!("{}", grail_process::with_causes(&error));
            error.exit_code().into()
        }
    }
}

fn exit_value(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| SIGNAL_CODE + status.signal().unwrap_or_default())
}

fn stage(arguments: &[OsString]) -> Result<ExitStatus, EnterError> {
    let [stage, text] = arguments else {
        return Err(EnterError::Stage(arguments.join(OsStr::new(" ")).to_string_lossy().into_owned()));
    };
    let plan: Plan = serde_json::from_slice(text.as_encoded_bytes()).map_err(EnterError::Plan)?;
    // Where nothing is asked for, nothing is written: the kernel takes few such orders a second.
    if stage == OUTER && plan.nice > 0 {
        be_nice(plan.nice);
    }
    match stage.to_str() {
        Some(OUTER) if plan.layers.has(Layer::Namespaces) => outer(text),
        Some(OUTER | INNER) => inner(&plan),
        _ => Err(EnterError::Stage(stage.to_string_lossy().into_owned())),
    }
}

/// Makes this session, which is new, as a whole give way to others. Where the kernel groups processes by session it weighs the
/// groups, and a process's own value counts only among those of its session. Not every kernel has that, and nothing but speed
/// hangs on it.
fn be_nice(steps: u8) {
    for _ in 0..MOST_NICE_TRIES {
        match std::fs::write(OWN_GROUP, steps.to_string()) {
            // The kernel bears this only every tenth of a second of all users without privileges.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(NICE_PAUSE),
            _ => return,
        }
    }
}

/// Makes the namespaces, starts the second stage in them, and waits for its end.
fn outer(plan: &OsStr) -> Result<ExitStatus, EnterError> {
    namespaces::unshare()?;
    let own: Vec<OsString> = std::env::args_os().skip(1).collect();
    let failed = |source| EnterError::Exec { program: THIS_PROGRAM.into(), source };
    let mut child = Command::new(THIS_PROGRAM)
        .args(&own[..own.len().saturating_sub(2)])
        .args([OsStr::new(INNER), plan])
        .env_clear()
        .spawn()
        .map_err(failed)?;
    // The pipes are the interpreter's alone, so that its end is the end of them.
    if let Ok(nowhere) = OpenOptions::new().read(true).write(true).open("/dev/null") {
        nix::unistd::dup2_stdin(&nowhere).and_then(|()| nix::unistd::dup2_stdout(&nowhere)).unwrap_or_default();
    }
    child.wait().map_err(failed)
}

/// Restricts this process, layer by layer, and makes it the interpreter.
fn inner(plan: &Plan) -> Result<ExitStatus, EnterError> {
    let layers = plan.layers;
    if layers.has(Layer::Process) {
        let refused = |what| EnterError::layer(Layer::Process, what);
        prctl::set_no_new_privs().map_err(refused("no new privileges"))?;
        prctl::set_pdeathsig(Signal::SIGKILL).map_err(refused("death with the parent"))?;
    }
    // Opened before the new root, which has no devices.
    let nowhere = nowhere()?;
    if layers.has(Layer::Namespaces) {
        root::enter(&plan.view)?;
    }
    if layers.has(Layer::Namespaces) || layers.has(Layer::Process) {
        drop_capabilities()?;
    }
    if layers.has(Layer::Landlock) {
        restrict::files_and_sockets(&plan.view, layers.has(Layer::Namespaces))?;
    }
    if layers.has(Layer::Seccomp) {
        for filter in filters::interpreter()? {
            seccompiler::apply_filter(&filter)?;
        }
    }
    if plan.only_try {
        return Ok(ExitStatus::default());
    }
    become_interpreter(&plan.view.python, &nowhere).map(|never| match never {})
}

/// `/dev/null`, open across exec.
fn nowhere() -> Result<OwnedFd, EnterError> {
    let path = Path::new("/dev/null");
    let failed = |source| EnterError::Show { path: path.to_owned(), source };
    let nowhere = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    fcntl(&nowhere, FcntlArg::F_SETFD(FdFlag::empty())).map_err(io::Error::from).map_err(failed)?;
    Ok(nowhere.into())
}

/// Gives up all privileges: root of this host, or of the namespaces, is root no more after exec.
fn drop_capabilities() -> Result<(), EnterError> {
    let held = rustix::thread::capabilities(None).map_err(refused_capabilities)?;
    if held.effective.is_empty() && held.permitted.is_empty() {
        return Ok(());
    }
    let no_root = CapabilitiesSecureBits::NO_ROOT | CapabilitiesSecureBits::NO_ROOT_LOCKED;
    rustix::thread::set_capabilities_secure_bits(no_root).map_err(refused_capabilities)?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).map_err(refused_capabilities)
}

fn refused_capabilities(source: rustix::io::Errno) -> EnterError {
    EnterError::Layer { layer: Layer::Process, what: "give up capabilities".to_owned(), source: source.into() }
}

fn become_interpreter(python: &Path, nowhere: &OwnedFd) -> Result<Infallible, EnterError> {
    let source = Command::new(python)
        .args(["-I", "-S", "-E", "-X", "utf8", "-c", ZYGOTE])
        .arg(nowhere.as_raw_fd().to_string())
        .env_clear()
        // Or every child would look up for itself what it calls. The interpreter removes it from what programs see.
        .env("LD_BIND_NOW", "1")
        .exec();
    Err(EnterError::Exec { program: python.to_owned(), source })
}
