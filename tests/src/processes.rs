//! Which processes are still there, and in which state.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::waiting::wait_until;

/// A process that belongs to a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub pid: u32,
    pub command: String,
}

/// Processes whose command line mentions `folder`, without this one.
#[must_use]
pub fn mentioning(folder: &Path) -> Vec<Found> {
    let needle = folder.to_string_lossy().into_owned();
    found(|_, command| command.contains(&needle))
}

/// Processes whose command line mentions `folder` or that work in it, without this one.
#[must_use]
pub fn of(folder: &Path) -> Vec<Found> {
    let needle = folder.to_string_lossy().into_owned();
    let works_there = |process: &Path| fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder));
    found(|process, command| command.contains(&needle) || works_there(process))
}

/// Processes that descend from `ancestor`.
#[must_use]
pub fn below(ancestor: u32) -> Vec<Found> {
    let mut known = vec![ancestor];
    let mut descendants = Vec::new();
    // A child may be listed before its parent, so until a round finds nobody new.
    loop {
        let is_new = |process: &Path, _: &str| {
            let of = |text: &str| text.parse().ok().is_some_and(|pid: u32| known.contains(&pid));
            let is_known = process.file_name().and_then(|name| name.to_str()).is_none_or(of);
            !is_known && parent(process).is_some_and(|parent| known.contains(&parent))
        };
        let round = found(is_new);
        if round.is_empty() {
            return descendants;
        }
        known.extend(round.iter().map(|process| process.pid));
        descendants.extend(round);
    }
}

fn parent(process: &Path) -> Option<u32> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn found(belongs: impl Fn(&Path, &str) -> bool) -> Vec<Found> {
    let entries = fs::read_dir("/proc").map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
    entries
        .iter()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            (pid != std::process::id() && belongs(&entry.path(), &command)).then_some(Found { pid, command })
        })
        .collect()
}

/// The kernel's letter for the state of a process, for instance `T` for a stopped one; `None` when it is gone.
#[must_use]
pub fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// Whether nothing of a process runs any more; its parent may not have asked for its status yet.
#[must_use]
pub fn has_ended(pid: u32) -> bool {
    matches!(state(pid), None | Some('Z' | 'X'))
}

/// Sends a signal, and waits until it has done its work: the process has ended, stopped, or goes on.
///
/// # Panics
/// If that does not come.
pub fn strike(pid: u32, signal: Signal) {
    let target = Pid::from_raw(i32::try_from(pid).expect("a pid fits"));
    wait_until(&format!("{signal} takes effect on {pid}"), || {
        // The first SIGSEGV may only take away the handler by which the standard library reports a stack overflow.
        let sent = kill(target, signal);
        match signal {
            Signal::SIGSTOP => state(pid) == Some('T'),
            Signal::SIGKILL | Signal::SIGSEGV => has_ended(pid),
            _ => sent.is_ok(),
        }
    });
}

/// Ticks of the CPU, a hundredth of a second each, that a process has had; 0 if there is no such process.
#[must_use]
pub fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    // User and system time; the first field here is the third of the line.
    fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

/// Resident memory of a process in bytes.
///
/// # Panics
/// If there is no such process.
#[must_use]
pub fn resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number of KiB");
    kib << 10
}
