//! Filters of system calls: a loose one for the interpreter that forks, a tight one for the children that run programs.

use std::collections::BTreeMap;

use nix::errno::Errno;
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use super::error::EnterError;
use super::search;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What not even the interpreter that forks may call.
const FORBIDDEN: &[i64] = &[
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_personality,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_memfd_create,
    libc::SYS_memfd_secret,
];

/// What a program may call, whatever the arguments.
const ALLOWED: &[i64] = &[
    // Memory.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    // Open descriptors and names. What can be opened is Landlock's and the new root's matter.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_ppoll,
    // Threads of one: locks are used, others cannot be made.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    // Clocks.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_times,
    libc::SYS_setitimer,
    libc::SYS_getitimer,
    // Its own signals.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigpending,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    // What it is.
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// More of [`ALLOWED`]: calls that only x86-64 has beside their newer forms.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[i64] = &[
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_poll,
    libc::SYS_alarm,
    libc::SYS_time,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[i64] = &[];

/// Any of these makes an opened file writable, or makes one.
const WRITE_FLAGS: libc::c_int = libc::O_WRONLY
    | libc::O_RDWR
    | libc::O_CREAT
    | libc::O_TRUNC
    | libc::O_APPEND
    | (libc::O_TMPFILE & !libc::O_DIRECTORY);

/// The filters of the interpreter that forks. It never runs text of a model, so they name what is forbidden.
///
/// # Errors
/// [`EnterError`] on a machine without filters.
pub fn interpreter() -> Result<Vec<BpfProgram>, EnterError> {
    let refusal = |errno: Errno| SeccompAction::Errno(errno as u32);
    let any = |calls: &[i64]| calls.iter().map(|call| (*call, vec![])).collect::<Rules>();
    let forbidden = filter(any(FORBIDDEN), SeccompAction::Allow, refusal(Errno::EPERM))?;
    // Its flags lie in memory, where no filter sees them. Whoever gets ENOSYS uses clone.
    let clone3 = filter(any(&[libc::SYS_clone3]), SeccompAction::Allow, refusal(Errno::ENOSYS))?;
    Ok(vec![forbidden, clone3])
}

/// The filter of a child that runs a program: everything that is not named is refused with EPERM, above all every way to
/// start a process or a thread, to signal another one, to open a socket, and to open a file for writing.
///
/// # Errors
/// [`EnterError`] on a machine without filters.
pub fn program() -> Result<BpfProgram, EnterError> {
    let mut rules = Rules::new();
    let argument = |index, mask: libc::c_int, value: libc::c_int| {
        let bits = |flags: libc::c_int| u64::from(flags.cast_unsigned());
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(bits(mask)), bits(value))
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    rules.insert(libc::SYS_openat, vec![argument(2, WRITE_FLAGS, 0)?]);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, vec![argument(1, WRITE_FLAGS, 0)?]);
    let is = |index, value| argument(index, -1, value);
    rules.insert(libc::SYS_fcntl, vec![is(1, libc::F_GETFD)?, is(1, libc::F_SETFD)?, is(1, libc::F_GETFL)?]);
    rules.insert(libc::SYS_ioctl, vec![argument(1, -1, libc::c_int::try_from(libc::TCGETS).unwrap_or(0))?]);
    // Reading a limit: no new one is given.
    let none = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![none])?]);
    let calls = ALLOWED.iter().chain(ALLOWED_HERE).filter_map(|call| u32::try_from(*call).ok());
    let mut program = search::allowing(calls);
    program.extend(filter(rules, SeccompAction::Errno(Errno::EPERM as u32), SeccompAction::Allow)?);
    Ok(program)
}

fn filter(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> Result<BpfProgram, EnterError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    Ok(SeccompFilter::new(rules, otherwise, matched, architecture)?.try_into()?)
}

/// The bytes that the kernel reads, in hexadecimal.
#[must_use]
pub fn to_hex(program: &[sock_filter]) -> String {
    let bytes = program.iter().flat_map(|instruction| {
        let [code_low, code_high] = instruction.code.to_ne_bytes();
        let [a, b, c, d] = instruction.k.to_ne_bytes();
        [code_low, code_high, instruction.jt, instruction.jf, a, b, c, d]
    });
    hex::encode(bytes.collect::<Vec<u8>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_fit_the_kernel_and_share_no_call() {
        let program = program().unwrap();
        assert!(program.len() < 4_096);
        assert_eq!(to_hex(&program).len(), program.len() * 16);
        assert_eq!(interpreter().unwrap().len(), 2);
        for call in ALLOWED.iter().chain(ALLOWED_HERE) {
            assert!(!FORBIDDEN.contains(call), "{call}");
        }
    }
}
