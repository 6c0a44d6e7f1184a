//! What happens in the child between fork and exec: the only unsafe code of this crate, with the opening of a pidfd.
//!
//! After a fork of a program with threads only async-signal-safe calls are allowed: no allocation, no lock, no log. Everything
//! that needs memory is prepared before.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::libc;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, getppid, setpgid, setsid, write};

use crate::spec::Grouping;

const OOM_SCORE_FILE: &CStr = c"/proc/self/oom_score_adj";

/// First descriptor that is not standard input, output or error.
const FIRST_OTHER_DESCRIPTOR: libc::c_uint = 3;

/// Signals whose handling must not come from us: an ignored signal stays ignored across exec.
const RESET_SIGNALS: [Signal; 5] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP, Signal::SIGCHLD];

/// Bits of one word of a [`NodeMask`].
const WORD_BITS: u32 = libc::c_ulong::BITS;

/// NUMA nodes as the kernel takes them, one bit each; it knows 1024 at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeMask([libc::c_ulong; 1024 / WORD_BITS as usize]);

impl NodeMask {
    /// Only `node`; `None` if no kernel knows that many.
    pub(crate) fn only(node: u32) -> Option<Self> {
        let mut mask = Self([0; 1024 / WORD_BITS as usize]);
        let word = mask.0.get_mut(usize::try_from(node / WORD_BITS).ok()?)?;
        *word = 1 << (node % WORD_BITS);
        Some(mask)
    }
}

/// Everything that the child does to itself, prepared.
#[derive(Debug)]
pub(crate) struct Preparation {
    pub(crate) parent: Pid,
    pub(crate) grouping: Grouping,
    pub(crate) parent_death_signal: Option<Signal>,
    pub(crate) limits: Vec<(Resource, rlim_t, rlim_t)>,
    pub(crate) oom_score_adjustment: Option<String>,
    pub(crate) cpus: Option<CpuSet>,
    pub(crate) preferred_nodes: Option<NodeMask>,
    /// The file by which a control group is entered.
    pub(crate) entrance: Option<File>,
    pub(crate) inherited: Vec<RawFd>,
}

/// Has `command` run `preparation` in the child.
pub(crate) fn install(command: &mut Command, preparation: Preparation) {
    // SAFETY: the closure runs in the forked child. `Preparation::apply` and all that it calls make system calls only: it
    // allocates nothing (all texts and sets were made before the fork), takes no lock, and turns an errno into an
    // `io::Error`, which holds it inline. The descriptors it touches are the child's own copies.
    unsafe {
        command.pre_exec(move || preparation.apply().map_err(io::Error::from));
    }
}

impl Preparation {
    fn apply(&self) -> Result<(), Errno> {
        match self.grouping {
            Grouping::Group => setpgid(Pid::from_raw(0), Pid::from_raw(0))?,
            Grouping::Session => {
                setsid()?;
            }
        }
        for reset in RESET_SIGNALS {
            reset_handling(reset)?;
        }
        prctl::set_no_new_privs()?;
        if let Some(signal) = self.parent_death_signal {
            prctl::set_pdeathsig(signal)?;
            // The parent may have died before the line above, and then no signal comes.
            if getppid() != self.parent {
                return Err(Errno::ESRCH);
            }
        }
        if let Some(entrance) = &self.entrance {
            // 0 is whoever writes. First of all that may take memory, so that it is accounted for; to go without is no reason
            // to fail.
            write(entrance, b"0").unwrap_or_default();
        }
        for (resource, soft, hard) in &self.limits {
            setrlimit(*resource, *soft, *hard)?;
        }
        if let Some(cpus) = &self.cpus {
            sched_setaffinity(Pid::from_raw(0), cpus)?;
        }
        if let Some(nodes) = &self.preferred_nodes {
            // Sandboxes refuse it, and so do kernels without NUMA; to go without is no reason to fail.
            prefer_memory_of(nodes).unwrap_or_default();
        }
        if let Some(score) = &self.oom_score_adjustment {
            // A lower score needs privileges; to go without is no reason to fail.
            if let Ok(file) = open(OOM_SCORE_FILE, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()) {
                write(&file, score.as_bytes()).unwrap_or_default();
            }
        }
        close_all_on_exec()?;
        for descriptor in &self.inherited {
            // SAFETY: the parent holds the descriptor open until exec has succeeded or failed, so the child's copy is open.
            let descriptor = unsafe { BorrowedFd::borrow_raw(*descriptor) };
            fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    }
}

fn reset_handling(reset: Signal) -> Result<(), Errno> {
    // SAFETY: the default action is no code of ours that could run at a bad moment.
    unsafe { signal(reset, SigHandler::SigDfl) }.map(drop)
}

/// Has the memory of this process, also after exec, come from `nodes` as long as they have some.
fn prefer_memory_of(nodes: &NodeMask) -> Result<(), Errno> {
    // The kernel takes one bit less than it is told.
    let bits = libc::c_ulong::from(WORD_BITS) * nodes.0.len() as libc::c_ulong + 1;
    // SAFETY: the kernel reads `bits - 1` bits from the pointer, which is the whole of the mask; the mask lives through the
    // call, which keeps no pointer to it.
    let set = unsafe { libc::syscall(libc::SYS_set_mempolicy, libc::MPOL_PREFERRED, nodes.0.as_ptr(), bits) };
    Errno::result(set).map(drop)
}

/// Marks every descriptor but the standard ones to be closed by exec. Marked, not closed: the standard library reports a failed
/// exec through one of them.
fn close_all_on_exec() -> Result<(), Errno> {
    // SAFETY: the call takes three integers and touches no memory; marking descriptors of this process breaks no owner.
    let marked = unsafe {
        libc::syscall(libc::SYS_close_range, FIRST_OTHER_DESCRIPTOR, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    match Errno::result(marked) {
        Ok(_) => Ok(()),
        // Linux before 5.11.
        Err(Errno::ENOSYS | Errno::EINVAL) => mark_one_by_one(),
        Err(error) => Err(error),
    }
}

fn mark_one_by_one() -> Result<(), Errno> {
    let (most, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let most = RawFd::try_from(most).unwrap_or(1 << 20).min(1 << 20);
    for number in 3..most {
        // SAFETY: a number without an open descriptor makes the call fail with EBADF and nothing else; it is not kept.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        match fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
            Ok(_) | Err(Errno::EBADF) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A descriptor that becomes readable when the child `pid` ends.
///
/// # Errors
/// ENOSYS before Linux 5.3, EPERM in some sandboxes.
pub(crate) fn open_pidfd(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes two integers and touches no memory.
    let descriptor = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    let descriptor = RawFd::try_from(descriptor).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made the descriptor, close-on-exec, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
